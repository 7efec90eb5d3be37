"""The checkpoints of a run: saving, deleting old ones, and opening the newest intact one."""

import copy
import os
import re
import sys
import threading
from pathlib import Path

from spikesink.errors import UserError
from spikesink.files import link_atomic
from spikesink.models.checkpoint import Checkpoint, load, save


class Checkpoints:
    """The checkpoints of a run: ckpt-00000400.pt and so on, a link ckpt.pt to the newest and best.pt to the best.

    The newest `keep_last`, the best, and those of every `keep_every` steps (0: none) are kept. The others are deleted
    once a newer one is safely on the disk. `asynchronous`: a thread writes a copy in memory while training continues,
    one copy at a time. If its write fails, the next `save` or `wait` raises the error.
    """

    NAME = re.compile(r"ckpt-(\d{8,})\.pt")

    def __init__(self, folder: str | Path, keep_last: int = 2, keep_every: int = 0, asynchronous: bool = False) -> None:
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every
        self.asynchronous = asynchronous
        self.damaged: set[Path] = set()  # these do not count as kept, and are not deleted
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    @property
    def path(self) -> Path:
        """The link to the newest checkpoint, which users open."""
        return self.folder / "ckpt.pt"

    def all(self) -> dict[int, Path]:
        """{step: path}, oldest first."""
        files = self.folder.iterdir() if self.folder.is_dir() else ()
        return dict(sorted((int(m[1]), p) for p in files if (m := self.NAME.fullmatch(p.name)) and p.is_file()))

    def any(self) -> bool:
        """True if there is a checkpoint, intact or not."""
        return os.path.lexists(self.path) or bool(self.all())

    def newest(self, before: int | None = None) -> tuple[Checkpoint, Path]:
        """(checkpoint, path) of the newest intact checkpoint, with `before` of a step less than that. One line on
        stderr names the damaged ones that were skipped. Raises UserError if there is none."""
        paths = [path for step, path in reversed(self.all().items()) if before is None or step < before]
        if self.path.is_file() and not self.path.is_symlink():  # another program's, or an older version's
            paths.insert(0, self.path)
        if not paths:
            when = f" before step {before}" if before else ""
            has_log = (self.folder / "log.jsonl").exists() and not before
            advice = "its run starts again with --overwrite" if has_log else "name the folder of a run, --out_dir=DIR"
            raise UserError(f"there is no checkpoint in {self.folder}{when}: {advice}")
        reasons = []
        for path in paths:
            try:
                content = load(path)
            except UserError as error:
                reasons.append(str(error))
                self.damaged.add(path)
                continue
            if before is not None and (content.step or 0) >= before:
                continue
            if reasons:
                print(f"warning: {'; '.join(reasons)}; going on from {path}", file=sys.stderr)
            return content, path
        raise UserError(f"no checkpoint in {self.folder} can be read: {'; '.join(reasons)}")

    def save(self, content: Checkpoint, best: bool = False) -> None:
        """Writes the checkpoint of its step, then deletes old ones. Raises OSError."""
        self.wait()
        if not self.asynchronous:
            self._write(content, best)
            return
        content = copy.deepcopy(content)  # training keeps changing the weights
        self._thread = threading.Thread(target=self._try, args=(content, best), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until everything is written. Raises OSError if a write failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _try(self, content: Checkpoint, best: bool) -> None:
        try:
            self._write(content, best)
        except OSError as error:
            self._error = error

    def _write(self, content: Checkpoint, best: bool) -> None:
        path = self.folder / f"ckpt-{content.step:08d}.pt"
        save(path, content)
        self.damaged.discard(path)
        for link in ("ckpt.pt", "best.pt") if best else ("ckpt.pt",):
            link_atomic(self.folder / link, path.name)
        self._delete_old(path)

    def _delete_old(self, written: Path) -> None:
        intact = {step: path for step, path in self.all().items() if path not in self.damaged}
        best = self.folder / "best.pt"
        keep = {written, *list(intact.values())[-self.keep_last :]}
        keep |= {self.folder / os.readlink(best)} if best.is_symlink() else set()
        for step, path in intact.items():
            if path not in keep and not (self.keep_every and step % self.keep_every == 0):
                path.unlink()

    def clear(self) -> None:
        """Deletes every checkpoint."""
        for path in (*self.all().values(), self.path, self.folder / "best.pt"):
            path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Deletes the unfinished files of writers that were killed."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
