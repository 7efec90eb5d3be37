"""Token files -> batches. A batch is a pure function of (seed, step, rank, world size).

A dataset is a folder with train.bin and val.bin (little-endian unsigned tokens, nanoGPT's format) and meta.json:
{"dtype": "uint16", "vocab_size": 50257, "tokenizer": "gpt2", "bos_id": 50256, "train_tokens": ..., "val_tokens": ...}.
A folder without meta.json is read as nanoGPT's: uint16, GPT-2's vocabulary.
"""

import contextlib
import hashlib
import json
import os
import runpy
import sys
from pathlib import Path

import filelock
import numpy as np
import torch

from spikesink.errors import UserError, nearest

ROOT = Path(__file__).parent
SELF_MADE = ("stdlib", "backcopy")  # datasets that need no download and are made on first use, in seconds
NANOGPT_META = {"dtype": "uint16", "vocab_size": 50257, "tokenizer": "gpt2", "bos_id": 50256}


def folder(dataset):
    """The folder of a dataset given by name (under data/) or as a path. Raises UserError with the command to run."""
    path = Path(dataset) if Path(dataset).is_dir() and dataset not in SELF_MADE else ROOT / dataset
    if dataset in SELF_MADE:
        make_once(path)
    if (path / "train.bin").is_file() or (path / "val.bin").is_file():
        return path
    known = sorted(p.parent.name for p in ROOT.glob("*/prepare.py"))
    if (path / "prepare.py").is_file():
        small = "; or --dataset=stdlib, which needs no download" if dataset == "openwebtext" else ""  # the default
        raise UserError(f"dataset {dataset!r} is not prepared; run: python data/{path.name}/prepare.py{small}")
    if Path(dataset).suffix == ".bin" and Path(dataset).is_file():
        raise UserError(f"{dataset} is a part of a dataset; give its folder, {Path(dataset).parent}")
    if Path(dataset).is_file():
        raise UserError(
            f"{dataset} is a file, no dataset: python data/text/prepare.py --name=mine {dataset} makes one of it, to "
            "train on; detect.py and ablate.py read it as it is, with --text"
        )
    if Path(dataset).is_dir():
        raise UserError(
            f"{dataset} is no dataset: it holds no train.bin and val.bin, which a prepare.py of data/ makes"
        )
    raise UserError(f"there is no dataset {dataset!r}{nearest(dataset, known)}; known: {', '.join(known)}")


def make_once(path):
    """Makes a self-made dataset unless it is there; of several processes one makes it and the others wait."""
    whole = lambda: all((path / name).is_file() for name in ("train.bin", "val.bin", "meta.json"))
    if whole():
        return
    with filelock.FileLock(path / ".lock"), contextlib.redirect_stdout(sys.stderr):  # a remark, not anyone's output
        if not whole():
            runpy.run_path(str(path / "prepare.py"))["prepare"]()


def meta_of(path):
    """meta.json of a dataset folder, checked. Raises UserError."""
    file = Path(path) / "meta.json"
    if not file.exists():
        return dict(NANOGPT_META)
    try:
        meta = json.loads(file.read_text())
        counts = [meta["vocab_size"], *(meta[key] for key in ("train_tokens", "val_tokens") if key in meta)]
        known = (
            meta["dtype"] in ("uint8", "uint16", "uint32") and min(counts) > 0 and {type(n) for n in counts} == {int}
        )
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{file} is not a dataset description; run the dataset's prepare.py again")
    return meta


class Tokens:
    """One split of a dataset, memory-mapped and cut into windows of `block_size` tokens.

    `batch(step)` gives x, y (int64, batch_size x block_size). Over an epoch every window is seen once, in an order
    that depends on `seed` alone; the samples of a step are the same whatever the world size, so arms and machines
    differ only where they are meant to. With `bos`, each window starts with the dataset's bos_id.
    `sample`: SHA-256 (hex) of about 4096 tokens from all over the file, by which a run knows its data again.
    Raises UserError if the file is missing, truncated, of another dtype, empty or out of vocabulary.
    """

    def __init__(self, dataset, split, block_size, bos=False, seed=0):
        path = folder(dataset)
        self.meta = meta_of(path)
        file = path / f"{split}.bin"
        self.tokens = _map(file, self.meta, split)
        self.file = file
        self.sample, self._seen = self._hash(), self._stat()
        self.block_size, self.seed = block_size, seed
        self.bos_id = self.meta.get("bos_id") if bos else None
        if bos and not (isinstance(self.bos_id, int) and 0 <= self.bos_id < self.meta["vocab_size"]):
            raise UserError(f"bos=True, but the meta.json of dataset {dataset!r} has no bos_id inside its vocabulary")
        largest = self.tokens[: 2**20].max()
        if largest >= self.meta["vocab_size"]:
            raise UserError(f"{file} holds token {largest}, outside the vocabulary of {self.meta['vocab_size']}")
        self.span = block_size + (0 if bos else 1)  # tokens read per window
        self.n_windows = (len(self.tokens) - self.span) // block_size + 1
        if len(self.tokens) < self.span:
            raise UserError(f"{file} holds {len(self.tokens)} tokens, fewer than one window of {self.span}")
        self._order = (None, None)  # (epoch, permutation of the windows)

    def _hash(self):
        return hashlib.sha256(np.ascontiguousarray(self.tokens[:: max(1, len(self.tokens) // 4096)])).hexdigest()

    def _stat(self):
        with contextlib.suppress(FileNotFoundError):  # moved away: what is mapped stays
            return self.tokens.base.size(), os.stat(self.file).st_mtime_ns
        return self.tokens.base.size(), None

    def _check(self):
        """Raises UserError if the file is not what it was when it was opened."""
        seen = self._stat()
        if seen == self._seen:
            return
        if seen[0] != self._seen[0] or self._hash() != self.sample:  # what is gone, reading it is a bus error
            raise UserError(f"{self.file} changed while it was read; put it back as it was, and go on with --resume")
        self._seen = seen

    def _window(self, sample):
        """The window that sample number `sample` of the endless, epoch by epoch shuffled, sequence falls on."""
        epoch, place = divmod(sample, self.n_windows)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n_windows))
        return self._order[1][place]

    def read(self, windows):
        """x, y (int64, len(windows) x block_size) of the given windows. Raises UserError if the file has changed."""
        self._check()
        starts = np.asarray(windows)[:, None] * self.block_size
        ids = self.tokens[starts + np.arange(self.span)].astype(np.int64)
        if ids.max() >= self.meta["vocab_size"]:
            raise UserError(f"token {ids.max()} is outside the vocabulary of {self.meta['vocab_size']}")
        if self.bos_id is not None:
            ids = np.concatenate([np.full((len(ids), 1), self.bos_id), ids], axis=1)
        ids = torch.from_numpy(ids)
        return ids[:, :-1].contiguous(), ids[:, 1:].clone()  # apart, so that targets can be edited

    def windows(self, step, n):
        """The windows of `step`, which takes n sequences over all micro-batches and ranks."""
        return [int(self._window(sample)) for sample in range(step * n, (step + 1) * n)]

    def batch(self, step, batch_size, micro=0, n_micro=1, *, rank=0, world=1):
        """x, y of micro-batch `micro` of `n_micro`, at `step`, on `rank` of `world`."""
        first = ((step * n_micro + micro) * world + rank) * batch_size
        return self.read([self._window(sample) for sample in range(first, first + batch_size)])


def _map(file, meta, split):
    if not file.is_file():
        raise UserError(f"{file} is missing; run the dataset's prepare.py")
    size, dtype = file.stat().st_size, np.dtype(meta["dtype"]).newbyteorder("<")
    if size == 0:
        raise UserError(f"{file} is empty; run the dataset's prepare.py again")
    expected = meta.get(f"{split}_tokens")
    if size % dtype.itemsize or (expected is not None and size != expected * dtype.itemsize):
        wanted = f"{expected} tokens" if expected is not None else "whole tokens"
        raise UserError(
            f"{file} has {size} bytes, not {wanted} of {dtype.name}: truncated or of another dtype; "
            "run the dataset's prepare.py again"
        )
    return np.memmap(file, dtype=dtype, mode="r")
