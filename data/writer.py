"""Writes documents to train.bin, val.bin and meta.json. It streams, can resume, and renames only complete files."""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from tqdm import tqdm

from spikesink.errors import UserError
from spikesink.files import write_atomic
from spikesink.text.tokenizers import ByteTokenizer, GPT2Tokenizer

Tokenizer = ByteTokenizer | GPT2Tokenizer
BATCH = 256  # documents encoded at a time
STATE = ("settings", "tokens", "documents", "empty", "source")  # attributes of a writer that progress.json stores


def lock_of(folder: Path) -> filelock.BaseFileLock:
    """The lock for making a dataset. A process that holds it may acquire it again."""
    return filelock.FileLock(folder / ".lock", is_singleton=True)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Locks a folder, so that no other process prepares its dataset. Raises UserError if one does already."""
    try:
        with lock_of(folder).acquire(timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(f"another process prepares {folder}: wait for it, or stop it") from None


class DatasetWriter(contextlib.AbstractContextManager["DatasetWriter"]):
    """Appends encoded documents to train.bin.part and val.bin.part; `finish` renames them.

    Every `val_every`-th document goes to val, the others to train; each ends with the tokenizer's bos_id. After a crash
    a new writer on the folder continues from the last `mark`; `documents` and `source` say how far that was. If a
    part is missing or the `settings` differ, it prints that and starts again. Documents without text are left out and
    counted (`empty`). Raises UserError while another process writes there.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, val_every: int, settings: Mapping[str, Any] = {}) -> None:
        self.folder, self.tokenizer, self.val_every = folder, tokenizer, val_every
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        own = {"tokenizer": [tokenizer.name, tokenizer.vocab_size, tokenizer.bpe], "val_every": val_every}
        self.settings = json.loads(json.dumps({**own, **settings}))  # as progress.json will return them
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open = contextlib.ExitStack()
        self._open.enter_context(alone_in(self.folder))
        self.progress_file = self.folder / "progress.json"
        self.tokens, self.documents, self.empty, self.source = {"train": 0, "val": 0}, 0, 0, 0
        if self.progress_file.exists():
            self._resume()
        self.files = {}
        for split, count in self.tokens.items():
            file = self.files[split] = self._open.enter_context(open(self.folder / f"{split}.bin.part", "ab"))
            file.truncate(self.dtype.itemsize * count)

    def _resume(self) -> None:
        """Restores the state of the last `mark`, if everything that was written is still there."""
        state: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            state = json.loads(self.progress_file.read_text())
        if state.keys() != {*STATE, "finishing"} or state["settings"] != self.settings:
            why = "was begun with other files or options"
        else:
            lost = []
            for split, count in state["tokens"].items():
                part, whole = self.folder / f"{split}.bin.part", self.folder / f"{split}.bin"
                if state["finishing"] and not part.exists() and whole.exists():
                    os.replace(whole, part)  # the crash came between the two renames
                if not part.exists() or part.stat().st_size < self.dtype.itemsize * count:
                    lost.append(part.name)
            if not lost:
                vars(self).update({key: state[key] for key in STATE})
                return
            why = f"lacks what was written to {' and '.join(lost)}"
        print(f"{self.folder}: the unfinished preparation there {why}; starting again", file=sys.stderr)
        self.progress_file.unlink()

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, documents: Iterable[str], split: str | None = None) -> None:
        """Encodes and writes documents. All go to `split`, if it is given."""
        texts = filter(self._has_text, documents)
        while batch := list(itertools.islice(texts, BATCH)):
            for ids in self.tokenizer.encode(batch):
                target = split or ("val" if self.documents % self.val_every == 0 else "train")
                self.files[target].write(np.append(ids, self.tokenizer.bos_id).astype(self.dtype).tobytes())
                self.tokens[target] += len(ids) + 1
                self.documents += 1

    def _has_text(self, document: str) -> bool:
        self.empty += not document.strip()
        return bool(document.strip())

    def mark(self, source: int, finishing: bool = False) -> None:
        """Flushes everything to disk and records that `source` sources, or with `finishing` all of them, are done."""
        self.source = source
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        state = {key: getattr(self, key) for key in STATE} | {"finishing": finishing}
        write_atomic(self.progress_file, lambda file: file.write(json.dumps(state).encode()))

    def finish(self, **meta: Any) -> None:
        """Renames the files, writes meta.json and prints the counts. Raises UserError if a split is empty."""
        for split, count in self.tokens.items():
            if count == 0:
                self.progress_file.unlink(missing_ok=True)
                raise UserError(
                    f"{self.folder}: {self.documents} document(s), none for the {split} split; give more text, "
                    "or end each document with a line <|endoftext|>"
                )
        if self.empty:
            print(f"{self.empty:,} documents without text are left out", file=sys.stderr)
        clear(self.folder)
        if self.progress_file.exists():
            self.mark(self.source, finishing=True)
        for file in self.files.values():
            file.close()
        own = {"vocab_size": self.tokenizer.vocab_size, "tokenizer": self.tokenizer.name}
        own |= {"bos_id": self.tokenizer.bos_id, "bpe": self.tokenizer.bpe, "documents": self.documents}
        finish_dataset(self.folder, {"dtype": self.dtype.name, **own, **meta}, self.tokens)
        self.progress_file.unlink(missing_ok=True)


def finish_dataset(folder: Path, meta: Mapping[str, Any], tokens: Mapping[str, int]) -> None:
    """Writes meta.json with the token counts, then renames {split}.bin.part to {split}.bin."""
    clear(folder)
    meta = {**meta, **{f"{split}_tokens": count for split, count in tokens.items()}}
    write_atomic(folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
    for split in tokens:
        os.replace(folder / f"{split}.bin.part", folder / f"{split}.bin")
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    print(f"{shown}: {', '.join(f'{count:,} {split} tokens' for split, count in tokens.items())}")


def clear(folder: Path) -> None:
    """Deletes the old token files, so that an old one never lies beside a new one."""
    for split in ("train", "val"):
        (folder / f"{split}.bin").unlink(missing_ok=True)


def identities(files: Iterable[str | Path]) -> list[tuple[str, int, int]]:
    """(path, bytes, time of change) of files. A resumed preparation compares these to see whether files changed."""
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in map(Path, files)]


def progress(items: Iterable[Any], **kwargs: Any) -> tqdm:
    """A progress bar, hidden if the output is not a terminal."""
    return tqdm(items, disable=None, **kwargs)
