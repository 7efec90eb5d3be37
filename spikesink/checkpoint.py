"""Checkpoints: tensors and plain Python, written atomically, read without executing anything, verified by content.

The content hash lies inside the file, so that one rename is the whole commit: there is no second file to lose.
"""

import contextlib
import copy
import errno
import hashlib
import os
import re
import shutil
import sys
import threading
import warnings
from pathlib import Path

import torch

from . import convert
from .errors import UserError

FORMAT = "spikesink-checkpoint-1"


def write_atomic(path, write):
    """`write(file)` into a temporary file beside `path`, fsync, rename over `path`, fsync of the folder.

    Whatever fails, `path` holds either its old content or the whole new one.
    """
    try:
        with _replacing(path) as temporary, open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch.save's, on top of what the disk had said
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def link_atomic(path, name):
    """Makes `path` a symbolic link to its neighbour `name`, atomically; a copy where the file system has no links."""
    with _replacing(path) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.symlink(name, temporary)
        except OSError:
            shutil.copyfile(temporary.with_name(name), temporary)


@contextlib.contextmanager
def _replacing(path):
    """A temporary path beside `path`; what the block makes there is renamed over `path`, or gone if the block fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(folder):
    """Makes the renames in a folder survive a loss of power, where the file system can promise that."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # mounted buckets
            raise
    finally:
        os.close(number)


def check_writable(path):
    """Raises UserError if `path` cannot be written, before any work is done for it."""
    path = Path(path)
    folder = next(parent for parent in (path.parent, *path.parent.parents) if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}")


def content_hash(value):
    """SHA-256 (hex) of nested dicts, lists, tensors and plain values: types, keys, shapes, dtypes and bytes."""
    digest = hashlib.sha256()

    def feed(value):
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().to_dense().contiguous().flatten().view(torch.uint8)
            digest.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(flat.numpy().data)
        elif isinstance(value, dict):
            digest.update(f"dict {len(value)}\n".encode())
            for key, item in value.items():
                feed(key)
                feed(item)
        elif isinstance(value, (list, tuple)):
            digest.update(f"{type(value).__name__} {len(value)}\n".encode())
            for item in value:
                feed(item)
        else:
            digest.update(f"{type(value).__name__} {value!r}\n".encode())

    feed(value)
    return digest.hexdigest()


def file_hash(path):
    """SHA-256 (hex) of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(path, content):
    """Writes the dict `content` (tensors and plain Python) to `path`, with its hash, atomically."""
    whole = {"format": FORMAT, "sha256": content_hash(content), "content": content}
    write_atomic(path, lambda file: torch.save(whole, file))


def checked(content, path):
    """The content of a checkpoint, if every entry is what its readers take it for. Raises UserError."""
    kinds = {"model": dict, "model_args": dict, "config": dict, "data": dict, "step": int}
    for key, kind in kinds.items():
        if key in ("model", "model_args") or content.get(key) is not None:
            if not isinstance(content.get(key), kind):
                raise UserError(f"{path} is no checkpoint: its entry {key} is not a {kind.__name__}")
        else:
            content.pop(key, None)
    for name, tensor in content["model"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise UserError(f"{path} is no checkpoint: its weight {name!r} is not a plain tensor")
    dataset, data = content.get("config", {}).get("dataset", ""), content.get("data", {})
    known = {"tokenizer": (str, type(None)), "bpe": (str, type(None)), "chars": str, "vocab_size": int, "bos_id": int}
    wrong = [key for key, kind in known.items() if key in data and not isinstance(data[key], kind)]
    if wrong or not isinstance(dataset, str) or (data and "vocab_size" not in data):
        raise UserError(f"{path} is no checkpoint: its description of the data does not make sense")
    return content


def load(path):
    """The dict written by `save`, or nanoGPT's own dict, on the CPU.

    Never executes what the file holds (`weights_only=True`). Raises UserError if it is missing, not a checkpoint,
    damaged, or holds anything but tensors and plain Python.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt.pt"
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on odd files: the error below says it all
            whole = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "it holds more than tensors and plain Python, and nothing in it was executed"
        raise UserError(f"cannot read checkpoint {path}: {reason}; restore it from a copy or train again") from None
    if isinstance(whole, dict) and whole.get("format") == FORMAT and isinstance(whole.get("content"), dict):
        if content_hash(whole["content"]) != whole.get("sha256"):
            raise UserError(f"checkpoint {path} is damaged (its content hash differs); restore it from a copy")
        return checked(whole["content"], path)
    if isinstance(whole, dict) and {"model", "model_args"} <= whole.keys():
        return convert.from_nanogpt(checked(whole, path))
    raise UserError(f"{path} is neither a checkpoint of train.py nor of nanoGPT")


class Checkpoints:
    """The checkpoints of a run: ckpt-00000400.pt and so on, a link ckpt.pt to the newest and best.pt to the best.

    Kept are the newest `keep_last`, the best, and those of every `keep_every` steps (0: none); others go once a newer
    one is safely on the disk. `asynchronous`: a copy in memory is written while training goes on, one at a time and so
    in order; what a write raised, the next `save` or `wait` raises.
    """

    NAME = re.compile(r"ckpt-(\d{8,})\.pt")

    def __init__(self, folder, keep_last=2, keep_every=0, asynchronous=False):
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every
        self.asynchronous = asynchronous
        self.damaged = set()  # neither counted nor deleted
        self._thread = self._error = None

    @property
    def path(self):
        """What users open: the newest."""
        return self.folder / "ckpt.pt"

    def all(self):
        """{step: path}, oldest first."""
        found = {}
        if self.folder.is_dir():
            found = {int(m[1]): p for p in self.folder.iterdir() if (m := self.NAME.fullmatch(p.name)) and p.is_file()}
        return dict(sorted(found.items()))

    def any(self):
        """True if there is a checkpoint, sound or not."""
        return os.path.lexists(self.path) or bool(self.all())

    def newest(self, before=None):
        """(content, path) of the newest sound checkpoint, of a step less than `before` if that is given.

        One line on stderr names the damaged ones that were passed over. Raises UserError if there is none.
        """
        paths = [path for step, path in reversed(self.all().items()) if before is None or step < before]
        if self.path.is_file() and not self.path.is_symlink():  # another program's, or an older version's
            paths.insert(0, self.path)
        if not paths:
            when = f" before step {before}" if before else ""
            raise UserError(f"there is no checkpoint in {self.folder}{when}: name the folder of a run, --out_dir=DIR")
        reasons = []
        for path in paths:
            try:
                content = load(path)
            except UserError as error:
                reasons.append(str(error))
                self.damaged.add(path)
                continue
            if before is not None and content.get("step", 0) >= before:
                continue
            if reasons:
                print(f"warning: {'; '.join(reasons)}; going on from {path}", file=sys.stderr)
            return content, path
        raise UserError(f"no checkpoint in {self.folder} can be read: {'; '.join(reasons)}")

    def save(self, content, best=False):
        """Writes `content`, of step content["step"], and then lets go of old ones. Raises OSError."""
        self.wait()
        if not self.asynchronous:
            self._write(content, best)
            return
        content = copy.deepcopy(content)  # training goes on changing the weights
        self._thread = threading.Thread(target=self._try, args=(content, best), daemon=True)
        self._thread.start()

    def wait(self):
        """Until all is written. Raises OSError if something could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _try(self, content, best):
        try:
            self._write(content, best)
        except OSError as error:
            self._error = error

    def _write(self, content, best):
        path = self.folder / f"ckpt-{content['step']:08d}.pt"
        save(path, content)
        self.damaged.discard(path)
        for link in ("ckpt.pt", "best.pt") if best else ("ckpt.pt",):
            link_atomic(self.folder / link, path.name)
        self._let_go(path)

    def _let_go(self, written):
        sound = {step: path for step, path in self.all().items() if path not in self.damaged}
        best = self.folder / "best.pt"
        kept = {written, *list(sound.values())[-self.keep_last :]}
        kept |= {self.folder / os.readlink(best)} if best.is_symlink() else set()
        for step, path in sound.items():
            if path not in kept and not (self.keep_every and step % self.keep_every == 0):
                path.unlink()

    def clear(self):
        """Deletes every checkpoint."""
        for path in (*self.all().values(), self.path, self.folder / "best.pt"):
            path.unlink(missing_ok=True)

    def sweep(self):
        """Deletes what writers that were killed left half-written."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
