"""Checkpoints: tensors and plain Python, written atomically, read without executing anything, verified by content.

The content hash lies inside the file, so that one rename is the whole commit: there is no second file to lose.
"""

import warnings
from pathlib import Path

import torch

from ..errors import UserError
from ..files import content_hash, write_atomic
from . import convert

FORMAT = "spikesink-checkpoint-1"


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


def is_ours(content):
    """True for the content of a checkpoint of train.py."""
    return content.get("maker") != "nanoGPT"


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
        return {**convert.from_nanogpt(checked(whole, path)), "maker": "nanoGPT"}
    raise UserError(f"{path} is neither a checkpoint of train.py nor of nanoGPT")
