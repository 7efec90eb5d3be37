"""Documents -> train.bin, val.bin, meta.json: streaming, resumable, never half-written under the final names."""

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

BATCH = 256  # documents encoded at a time
KEPT = ("settings", "tokens", "documents", "empty", "source")  # of a writer, in progress.json


def lock_of(folder: Path) -> filelock.BaseFileLock:
    """The lock of whoever makes a dataset; a process that holds it may take it again."""
    return filelock.FileLock(folder / ".lock", is_singleton=True)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within, no other process prepares the dataset of this folder. Raises UserError where one does."""
    try:
        with lock_of(folder).acquire(timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(f"another process prepares {folder}: wait for it, or stop it") from None


class DatasetWriter:
    """Appends encoded documents to train.bin.part and val.bin.part; `finish` gives them their names.

    Every `val_every`-th document goes to val, the others to train; each ends with the tokenizer's bos_id. What was
    written up to the last `mark` survives a crash: a new writer on the same folder goes on from there (`documents`
    and `source` say how far that was). Where that is not all there any more, or was begun with other `settings`, it
    starts again and says so. Documents of white space alone are left out, and counted (`empty`). Raises UserError while
    another process writes there.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: ByteTokenizer | GPT2Tokenizer,
        val_every: int,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.tokenizer, self.val_every = Path(folder), tokenizer, val_every
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        own = {"tokenizer": [tokenizer.name, tokenizer.vocab_size, tokenizer.bpe], "val_every": val_every}
        self.settings = json.loads(json.dumps({**own, **(settings or {})}))  # as it is read back
        self.folder.mkdir(parents=True, exist_ok=True)
        self._alone = contextlib.ExitStack()
        self._alone.enter_context(alone_in(self.folder))
        self.progress_file = self.folder / "progress.json"
        self.tokens, self.documents, self.empty, self.source = {"train": 0, "val": 0}, 0, 0, 0
        if self.progress_file.exists():
            self._go_on()
        self.files = {split: open(self.folder / f"{split}.bin.part", "ab") for split in self.tokens}
        for split, file in self.files.items():
            file.truncate(self.dtype.itemsize * self.tokens[split])

    def _go_on(self) -> None:
        """Takes up what the last `mark` noted, if all of it is still there."""
        noted: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            noted = json.loads(self.progress_file.read_text())
        if noted.keys() != {*KEPT, "finishing"} or noted["settings"] != self.settings:
            why = "was begun with other files or options"
        else:
            lost = []
            for split, count in noted["tokens"].items():
                part, whole = self.folder / f"{split}.bin.part", self.folder / f"{split}.bin"
                if noted["finishing"] and not part.exists() and whole.exists():
                    os.replace(whole, part)  # it was renamed, and not yet the other one
                if not part.exists() or part.stat().st_size < self.dtype.itemsize * count:
                    lost.append(part.name)
            if not lost:
                vars(self).update({key: noted[key] for key in KEPT})
                return
            why = f"lacks what was written to {' and '.join(lost)}"
        print(f"{self.folder}: the unfinished preparation there {why}; starting again", file=sys.stderr)
        self.progress_file.unlink()

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.files.values():
            file.close()
        self._alone.close()

    def add(self, documents: Iterable[str], split: str | None = None) -> None:
        """Encodes an iterable of strings; `split` overrides the every-n-th rule."""
        rest = filter(self._has_text, documents)
        while batch := list(itertools.islice(rest, BATCH)):
            for ids in self.tokenizer.encode(batch):
                to = split or ("val" if self.documents % self.val_every == 0 else "train")
                self.files[to].write(np.append(ids, self.tokenizer.bos_id).astype(self.dtype).tobytes())
                self.tokens[to] += len(ids) + 1
                self.documents += 1

    def _has_text(self, document: str) -> bool:
        self.empty += not document.strip()
        return bool(document.strip())

    def mark(self, source: int, finishing: bool = False) -> None:
        """Makes everything so far durable and notes that `source` sources are done; `finishing`: that all are."""
        self.source = source
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        state = {key: getattr(self, key) for key in KEPT} | {"finishing": finishing}
        write_atomic(self.progress_file, lambda file: file.write(json.dumps(state).encode()))

    def finish(self, **meta: Any) -> None:
        """Renames the files, writes meta.json and prints what there is. Raises UserError if a split is empty."""
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
        finish_dataset(
            self.folder,
            {
                "dtype": self.dtype.name,
                "vocab_size": self.tokenizer.vocab_size,
                "tokenizer": self.tokenizer.name,
                "bos_id": self.tokenizer.bos_id,
                "bpe": self.tokenizer.bpe,
                "documents": self.documents,
                **meta,
            },
            self.tokens,
        )
        self.progress_file.unlink(missing_ok=True)


def finish_dataset(folder: Path, meta: Mapping[str, Any], tokens: Mapping[str, int]) -> None:
    """Writes meta.json with the token counts, then {split}.bin.part -> {split}.bin: no file is ever misread."""
    clear(folder)
    meta = {**meta, **{f"{split}_tokens": count for split, count in tokens.items()}}
    write_atomic(folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
    for split in tokens:
        os.replace(folder / f"{split}.bin.part", folder / f"{split}.bin")
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    print(f"{shown}: {', '.join(f'{count:,} {split} tokens' for split, count in tokens.items())}")


def clear(folder: Path) -> None:
    """Removes the files of tokens of before, so that none of them ever lies beside a new one."""
    for split in ("train", "val"):
        (folder / f"{split}.bin").unlink(missing_ok=True)


def identities(files: Iterable[str | Path]) -> list[tuple[str, int, int]]:
    """(path, bytes, time of change) of files: by which a preparation that goes on knows that they are the same."""
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in map(Path, files)]


def progress(items: Iterable[Any], **kwargs: Any) -> tqdm:
    """A progress bar that is quiet where the output is not a terminal."""
    return tqdm(items, disable=None, **kwargs)
