"""Writes files atomically, hashes them, and reads lines of JSON."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import UserError


def write_atomic(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write(file)` on a temporary file beside `path`, and renames it over `path`. Both are synced to the disk.
    Whatever fails, `path` has either its old content or the whole new content."""
    try:
        with _replacing(path) as temporary, open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch.save wraps the OSError that tells the reason
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def link_atomic(path: str | Path, name: str) -> None:
    """Makes `path` a symbolic link to `name` in its folder, atomically. Copies it where links are not supported."""
    with _replacing(path) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.symlink(name, temporary)
        except OSError:
            shutil.copyfile(temporary.with_name(name), temporary)


@contextlib.contextmanager
def _replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path. The file made there is renamed over `path`, or removed if the block fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Makes the renames in a folder survive a loss of power, where the file system can promise that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # mounted buckets cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def check_writable(path: str | Path) -> None:
    """Raises UserError if `path` cannot be written, before any work is done for it."""
    path = Path(path)
    folder = next(parent for parent in (path.parent, *path.parent.parents) if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}")


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of nested dicts, lists, tensors and plain values, with their types, keys, shapes and dtypes."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
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


def file_hash(path: str | Path) -> str:
    """SHA-256 (hex) of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically. Raises UserError if that cannot be done."""
    save_bytes(path, text.encode())


def save_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file atomically. Raises UserError if that cannot be done."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: file.write(content))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, as dicts. Broken lines are left out, and a missing file has no rows."""
    lines = Path(path).read_bytes().splitlines() if Path(path).is_file() else []
    return [json.loads(line) for line in lines if step_of(line) < math.inf]


def step_of(line: str | bytes) -> float:
    """The step in a line of JSON; infinity for a broken line, so that comparisons drop it."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if type(step) is int else math.inf
