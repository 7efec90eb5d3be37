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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
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
