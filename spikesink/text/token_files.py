"""Cuts tokens into windows. They are memory-mapped files in nanoGPT's format, or an array in memory.

A dataset is a folder with train.bin and val.bin (little-endian unsigned tokens, nanoGPT's format) and meta.json:
{"dtype": "uint16", "vocab_size": 50257, "tokenizer": "gpt2", "bos_id": 50256, "train_tokens": ..., "val_tokens": ...}.
A folder without meta.json is read like nanoGPT's: uint16, with the characters of its meta.pkl or GPT-2's vocabulary.
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
HEADERS = (b"\x93NUMPY", *(magic.to_bytes(4, "little") for magic in (20240520, 20240801)))  # of other formats
Meta = dict[str, Any]  # the content of a meta.json


def meta_of_vocabulary(size: int) -> Meta:
    """The data of a model whose file does not describe it: nanoGPT's if the vocabulary is GPT-2's (or padded to 50,304
    as in nanoGPT), else empty."""
    return dict(NANOGPT_META) if size in (50257, 50304) else {}


def meta_of(path: str | Path) -> Meta:
    """Reads and checks meta.json of a dataset folder. If there is none, reads nanoGPT's meta.pkl, or takes
    nanoGPT's values. Raises UserError."""
    file, pickled = Path(path) / "meta.json", Path(path) / "meta.pkl"
    if not file.exists():
        return meta_of_pickle(pickled) if pickled.is_file() else dict(NANOGPT_META)
    try:
        meta = json.loads(file.read_text())
        counts = [meta["vocab_size"], *(meta[key] for key in ("train_tokens", "val_tokens") if key in meta)]
        valid = meta["dtype"] in ("uint8", "uint16", "uint32") and {type(n) for n in counts} == {int}
        valid = valid and min(counts) > 0
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise UserError(f"{file} is not a dataset description; run the dataset's prepare.py again")
    return meta


def other_ids(data: Meta, trained: Meta) -> str:
    """Says how the ids of `data` differ from those that a model was `trained` on; '' if no difference is known."""
    size = lambda meta: min(meta["vocab_size"], 50257) if meta.get("tokenizer") == "gpt2" else meta["vocab_size"]
    if not trained:
        return ""
    pairs = [(key, data.get(key), trained.get(key)) for key in ("tokenizer", "chars")]
    pairs += [("vocab_size", size(data), size(trained))]
    pairs += [("bos_id", data["bos_id"], trained["bos_id"])] if "bos_id" in data and "bos_id" in trained else []
    return next((f"{key} {here!r:.24}, not {there!r:.24}" for key, here, there in pairs if here != there), "")


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers of them. It refuses a pickle that names a class or a function."""

    def find_class(self, module: str, name: str) -> Any:
        """Is called for every class or function in a pickle. Raises UnpicklingError."""
        raise pickle.UnpicklingError(f"it names {module}.{name}, and nothing in it was executed")


def meta_of_pickle(file: Path) -> Meta:
    """Reads nanoGPT's meta.pkl of characters as a Meta. Raises UserError."""
    try:
        if file.stat().st_size > 2**24:
            raise ValueError("it is too large")
        meta = PlainUnpickler(io.BytesIO(file.read_bytes())).load()
        size, characters = meta["vocab_size"], [meta["itos"][i] for i in range(len(meta["itos"]))]
        single = all(type(c) is str and len(c) == 1 for c in characters)
        if type(size) is not int or size != len(characters) or not single:
            raise ValueError("it is not a list of characters")
    except Exception as error:  # a hostile or broken pickle fails in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = 'put a meta.json beside it, {"dtype": "uint16", "vocab_size": ..., "tokenizer": null}'
        raise UserError(f"{file} is not a meta.pkl of nanoGPT's character data ({reason[:120]}): {remedy}") from None
    return {"dtype": "uint16", "vocab_size": size, "tokenizer": "chars", "chars": "".join(characters)}


class Windows:
    """Cuts tokens into `n_windows` windows of `block_size` tokens. With `bos`, each starts with the data's bos_id.

    `tokens`: (n,), unsigned integers. `meta`: as in meta.json. `name`: shown in messages. Raises UserError if `bos` is
    True without a bos_id, a token is outside the vocabulary, or there is less than one window.
    """

    def __init__(self, tokens: np.ndarray, meta: Meta, name: str | Path, block_size: int, bos: bool = False) -> None:
        self.tokens, self.meta, self.name, self.block_size = tokens, meta, name, block_size
        self.bos_id = meta.get("bos_id") if bos else None
        if bos and not (isinstance(self.bos_id, int) and 0 <= self.bos_id < meta["vocab_size"]):
            lack = "no meta.json beside it with a bos_id inside the vocabulary"
            raise UserError(f"bos=True, but {name} has {lack}: use --no-bos")
        places = range(0, len(tokens), max(2**14, len(tokens) // 64))  # a sample; `read` checks every batch
        largest = max(tokens[place : place + 2**14].max() for place in places)
        if largest >= meta["vocab_size"]:
            remedy = 'a meta.json beside it must state its "dtype" and "vocab_size"'
            raise UserError(f"{name} holds token {largest}, outside the vocabulary of {meta['vocab_size']}: {remedy}")
        self.span = block_size + (0 if bos else 1)  # tokens read per window
        self.n_windows = (len(tokens) - self.span) // block_size + 1
        if len(tokens) < self.span:
            raise UserError(f"{name} holds {len(tokens)} tokens, fewer than one window of {self.span}")

    def read(self, windows: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns x, y of these windows, int64 (len(windows), block_size); y is x one token later. Raises UserError."""
        starts = np.asarray(windows)[:, None] * self.block_size
        ids = self.tokens[starts + np.arange(self.span)].astype(np.int64)
        if ids.max() >= self.meta["vocab_size"]:
            raise UserError(f"token {ids.max()} is outside the vocabulary of {self.meta['vocab_size']}")
        if self.bos_id is not None:
            ids = np.concatenate([np.full((len(ids), 1), self.bos_id), ids], axis=1)
        xy = torch.from_numpy(ids)
        return xy[:, :-1].contiguous(), xy[:, 1:].clone()  # separate memory, so that targets can be edited


class TokenFile(Windows):
    """One split of a dataset folder, memory-mapped.

    `sample`: SHA-256 (hex) of about 4096 tokens across the file, by which a run recognises its data. Raises UserError
    if the file is missing, empty, truncated, of another dtype, out of vocabulary, or changed since it was opened.
    """

    def __init__(self, folder: str | Path, split: str, block_size: int, bos: bool = False) -> None:
        self.file, meta = Path(folder) / f"{split}.bin", meta_of(folder)
        self._mapped = _map(self.file, meta, split)
        super().__init__(self._mapped, meta, self.file, block_size, bos)
        self.sample, self._last_stat = self._hash(), self._stat()

    def read(self, windows: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Windows.read`. Raises UserError if the file has changed."""
        self._check()
        return super().read(windows)

    def _hash(self) -> str:
        return hashlib.sha256(self.tokens[:: max(1, len(self.tokens) // 4096)].tobytes()).hexdigest()

    def _stat(self) -> tuple[int, int | None]:
        file: Any = self._mapped.base  # the mmap, whose size() is the file's current size
        with contextlib.suppress(FileNotFoundError):  # the file was moved, but the mapping stays
            return file.size(), os.stat(self.file).st_mtime_ns
        return file.size(), None

    def _check(self) -> None:
        stat = self._stat()
        if stat == self._last_stat:
            return
        if stat[0] != self._last_stat[0] or self._hash() != self.sample:  # a truncated mapping is a bus error
            raise UserError(f"{self.file} changed while it was read; put it back as it was, and go on with --resume")
        self._last_stat = stat


def _map(file: Path, meta: Meta, split: str) -> np.memmap:
    if not file.is_file():
        raise UserError(f"{file} is missing; run the dataset's prepare.py")
    size, dtype = file.stat().st_size, np.dtype(meta["dtype"]).newbyteorder("<")
    if size == 0:
        raise UserError(f"{file} is empty; run the dataset's prepare.py again")
    expected = meta.get(f"{split}_tokens")
    if size % dtype.itemsize or (expected is not None and size != expected * dtype.itemsize):
        expectation = f"{expected} tokens" if expected is not None else "whole tokens"
        cause = "it is truncated or of another dtype; run the dataset's prepare.py again"
        raise UserError(f"{file} has {size} bytes, not {expectation} of {dtype.name}: {cause}")
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
    """If a file's first `tokens` look like another format than their dtype, says which and what to do; else ''."""
    name, first = tokens.dtype.name, tokens[:8].tobytes()
    remedy = f'write it with ids.astype(np.{name}).tofile(FILE), or put its "dtype" and "vocab_size" into a meta.json'
    if first.startswith(HEADERS):
        return "starts with the header of an llm.c or NumPy file: write the ids alone, with ids.tofile(FILE)"
    upper = tokens[1::2]
    if len(tokens) >= 64 and tokens.itemsize > 1 and upper.max() <= 3 < tokens[::2].max():  # ids below 2**18
        n_bytes = (4 if tokens[2::4].max() else 8) * (tokens.itemsize // 2)
        return f"holds ids of {n_bytes} bytes, not {name}: {remedy}"
    low, high = (np.bincount(tokens.view(np.uint8)[i::2], minlength=256) for i in (0, 1))
    if len(tokens) >= 4096 and tokens.any() and name == "uint16" and np.abs(low - high).sum() < 0.2 * len(tokens):
        return f"holds single bytes, not {name}: {remedy}"
    return ""
