"""Tokens cut into windows: files in nanoGPT's format, memory-mapped, or an array in memory.

A dataset is a folder with train.bin and val.bin (little-endian unsigned tokens, nanoGPT's format) and meta.json:
{"dtype": "uint16", "vocab_size": 50257, "tokenizer": "gpt2", "bos_id": 50256, "train_tokens": ..., "val_tokens": ...}.
A folder without meta.json is read as nanoGPT's: uint16, the characters of its meta.pkl, else GPT-2's vocabulary.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError

NANOGPT_META = {"dtype": "uint16", "vocab_size": 50257, "tokenizer": "gpt2", "bos_id": 50256}
HEADERS = (b"\x93NUMPY", *(magic.to_bytes(4, "little") for magic in (20240520, 20240801)))  # not tokens
Meta = dict[str, Any]  # what meta.json says


def meta_of_vocabulary(size: int) -> Meta:
    """What is known of the data of a model whose file does not say: GPT-2's where it has GPT-2's vocabulary (nanoGPT
    pads that to 50,304), else nothing."""
    return dict(NANOGPT_META) if size in (50257, 50304) else {}


def meta_of(path: str | Path) -> Meta:
    """meta.json of a dataset folder, checked; what nanoGPT's meta.pkl says, or nanoGPT's own, where there is none.

    Raises UserError.
    """
    file, pickled = Path(path) / "meta.json", Path(path) / "meta.pkl"
    if not file.exists():
        return meta_of_pickle(pickled) if pickled.is_file() else dict(NANOGPT_META)
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


def other_ids(data: Meta, trained: Meta) -> str:
    """By what the ids of `data` are known to be others than those that a model was `trained` on, in words; else ''."""
    size = lambda meta: min(meta["vocab_size"], 50257) if meta.get("tokenizer") == "gpt2" else meta["vocab_size"]
    if not trained:
        return ""
    told = [(key, data.get(key), trained.get(key)) for key in ("tokenizer", "chars")]
    told += [("vocab_size", size(data), size(trained))]
    told += [("bos_id", data["bos_id"], trained["bos_id"])] if "bos_id" in data and "bos_id" in trained else []
    return next((f"{key} {here!r:.24}, not {there!r:.24}" for key, here, there in told if here != there), "")


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers of them. Whatever names a class or a function is refused unread."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle calls for anything that is not plain. Raises UnpicklingError."""
        raise pickle.UnpicklingError(f"it names {module}.{name}, and nothing in it was executed")


def meta_of_pickle(file: Path) -> Meta:
    """What nanoGPT's meta.pkl of characters says, as a meta.json. Raises UserError."""
    try:
        if file.stat().st_size > 2**24:
            raise ValueError("it is too large")
        meta = PlainUnpickler(io.BytesIO(file.read_bytes())).load()
        size, shown = meta["vocab_size"], [meta["itos"][i] for i in range(len(meta["itos"]))]
        if type(size) is not int or size != len(shown) or not all(type(c) is str and len(c) == 1 for c in shown):
            raise ValueError("it is no list of characters")
    except Exception as error:  # a hostile or broken pickle fails in many ways
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{file} is not what nanoGPT's prepare.py of characters writes ({why[:120]}): put a meta.json beside it, "
            '{"dtype": "uint16", "vocab_size": ..., "tokenizer": null}'
        ) from None
    return {"dtype": "uint16", "vocab_size": size, "tokenizer": "chars", "chars": "".join(shown)}


class Windows:
    """Tokens cut into `n_windows` windows of `block_size` tokens; with `bos`, each starts with the data's bos_id.

    `tokens` (n,), unsigned integers; `meta` as meta.json has it; `name` is what messages call it. Raises UserError if
    there is no bos_id where one is asked for, a token is outside the vocabulary, or there is less than one window.
    """

    def __init__(self, tokens: np.ndarray, meta: Meta, name: str | Path, block_size: int, bos: bool = False) -> None:
        self.tokens, self.meta, self.name, self.block_size = tokens, meta, name, block_size
        self.bos_id = meta.get("bos_id") if bos else None
        if bos and not (isinstance(self.bos_id, int) and 0 <= self.bos_id < meta["vocab_size"]):
            raise UserError(
                f"bos=True, but {name} has no bos_id inside its vocabulary in a meta.json beside it: leave it out with "
                "--no-bos"
            )
        places = range(0, len(tokens), max(2**14, len(tokens) // 64))  # all over it; every batch is looked at too
        largest = max(tokens[place : place + 2**14].max() for place in places)
        if largest >= meta["vocab_size"]:
            raise UserError(
                f"{name} holds token {largest}, outside the vocabulary of {meta['vocab_size']}: a meta.json beside it "
                'says of which "dtype" and "vocab_size" it is'
            )
        self.span = block_size + (0 if bos else 1)  # tokens read per window
        self.n_windows = (len(tokens) - self.span) // block_size + 1
        if len(tokens) < self.span:
            raise UserError(f"{name} holds {len(tokens)} tokens, fewer than one window of {self.span}")

    def read(self, windows: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """x, y (int64, len(windows) x block_size) of the given windows; y is x one token later. Raises UserError."""
        starts = np.asarray(windows)[:, None] * self.block_size
        ids = self.tokens[starts + np.arange(self.span)].astype(np.int64)
        if ids.max() >= self.meta["vocab_size"]:
            raise UserError(f"token {ids.max()} is outside the vocabulary of {self.meta['vocab_size']}")
        if self.bos_id is not None:
            ids = np.concatenate([np.full((len(ids), 1), self.bos_id), ids], axis=1)
        both = torch.from_numpy(ids)
        return both[:, :-1].contiguous(), both[:, 1:].clone()  # apart, so that targets can be edited


class TokenFile(Windows):
    """One split of a dataset folder, memory-mapped.

    `sample`: SHA-256 (hex) of about 4096 tokens from all over the file, by which a run knows its data again.
    Raises UserError if the file is missing, truncated, of another dtype, empty, out of vocabulary, or not what it was
    when it was opened.
    """

    def __init__(self, folder: str | Path, split: str, block_size: int, bos: bool = False) -> None:
        self.file, meta = Path(folder) / f"{split}.bin", meta_of(folder)
        self._mapped = _map(self.file, meta, split)
        super().__init__(self._mapped, meta, self.file, block_size, bos)
        self.sample, self._seen = self._hash(), self._stat()

    def read(self, windows: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Windows.read`. Raises UserError if the file has changed."""
        self._check()
        return super().read(windows)

    def _hash(self) -> str:
        return hashlib.sha256(self.tokens[:: max(1, len(self.tokens) // 4096)].tobytes()).hexdigest()

    def _stat(self) -> tuple[int, int | None]:
        file: Any = self._mapped.base  # the mmap: its size is the file's as it is now
        with contextlib.suppress(FileNotFoundError):  # moved away: what is mapped stays
            return file.size(), os.stat(self.file).st_mtime_ns
        return file.size(), None

    def _check(self) -> None:
        seen = self._stat()
        if seen == self._seen:
            return
        if seen[0] != self._seen[0] or self._hash() != self.sample:  # what is gone, reading it is a bus error
            raise UserError(f"{self.file} changed while it was read; put it back as it was, and go on with --resume")
        self._seen = seen


def _map(file: Path, meta: Meta, split: str) -> np.memmap:
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
    tokens = np.memmap(file, dtype=dtype, mode="r")
    first = np.asarray(tokens[: 2**20])
    if expected is None and (wrong := other_format(first)):
        raise UserError(f"{file} {wrong}")
    described = any((file.parent / name).is_file() for name in ("meta.json", "meta.pkl"))
    if not described and len(first) >= 4096 and first.max() < 256:  # GPT-2's first ids are single bytes
        raise UserError(
            f"{file} holds ids up to {first.max()}, which are not GPT-2's: put nanoGPT's meta.pkl, or a meta.json with "
            'its "dtype" and "vocab_size", beside it'
        )
    return tokens


def other_format(tokens: np.ndarray) -> str:
    """What a file is, and what to do, if its first `tokens`, read as meta.json or nanoGPT has it, are no such thing."""
    name, first = tokens.dtype.name, tokens[:8].tobytes()
    mended = f'write it with ids.astype(np.{name}).tofile(FILE), or its "dtype" and "vocab_size" into a meta.json'
    if first.startswith(HEADERS):
        return "starts with the header of llm.c's or NumPy's files: write the ids alone, with ids.tofile(FILE)"
    upper = tokens[1::2]
    if len(tokens) >= 64 and tokens.itemsize > 1 and upper.max() <= 3 < tokens[::2].max():  # ids below 2**18
        wide = (4 if tokens[2::4].max() else 8) * (tokens.itemsize // 2)
        return f"holds ids of {wide} bytes, not {name}: {mended}"
    low, high = (np.bincount(tokens.view(np.uint8)[i::2], minlength=256) for i in (0, 1))
    if len(tokens) >= 4096 and tokens.any() and name == "uint16" and np.abs(low - high).sum() < 0.2 * len(tokens):
        return f"holds single bytes, not {name}: {mended}"
    return ""
