"""Checkpoints: tensors and plain Python, written atomically, read without executing anything, verified by content.

The content hash lies inside the file, so that one rename is the whole commit: there is no second file to lose.
"""

import hashlib
import os
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
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def content_hash(value):
    """SHA-256 (hex) of nested dicts, lists, tensors and plain values: types, keys, shapes, dtypes and bytes."""
    digest = hashlib.sha256()

    def feed(value):
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
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


def load(path):
    """The dict written by `save`, or nanoGPT's own dict, on the CPU.

    Never executes what the file holds (`weights_only=True`). Raises UserError if it is missing, not a checkpoint,
    damaged, or holds anything but tensors and plain Python.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt.pt"
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; `python train.py configs/quickstart.py` makes one")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on odd files: the error below says it all
            whole = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "it holds more than tensors and plain Python, and nothing in it was executed"
        raise UserError(f"cannot read checkpoint {path}: {reason}; restore it from a copy or train again") from None
    if isinstance(whole, dict) and whole.get("format") == FORMAT:
        if content_hash(whole.get("content")) != whole.get("sha256"):
            raise UserError(f"checkpoint {path} is damaged (its content hash differs); restore it from a copy")
        return whole["content"]
    if isinstance(whole, dict) and {"model", "model_args"} <= whole.keys():
        return convert.from_nanogpt(whole)
    raise UserError(f"{path} is neither a checkpoint of train.py nor of nanoGPT")
