"""Checkpoints are tensors and plain Python. They are written atomically, read without running code, and verified.

The content hash is inside the file, so that one rename puts both in place.
"""

import dataclasses
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import content_hash, write_atomic
from ..text.token_files import Meta, meta_of_vocabulary
from . import convert

FORMAT = "spikesink-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file: a model, its data, and everything that is needed to train it further. A field that the
    file does not have is None or an empty dict."""

    model_args: dict[str, Any]  # fields of GPTConfig
    model: dict[str, torch.Tensor]  # state dict
    optimizer: dict[str, Any] | None = None  # state by parameter name
    config: dict[str, Any] = field(default_factory=dict)  # fields of TrainConfig
    given: dict[str, Any] | None = None  # those keys of model_args and config that the user set
    data: dict[str, Any] = field(default_factory=dict)  # meta.json of the dataset
    data_sample: str | None = None  # TokenFile.sample of the training data
    step: int | None = None  # number of updates
    tokens: int | None = None  # number of training tokens
    val_loss: float | None = None  # the latest, in nats per token
    best: float | None = None  # the lowest val_loss
    loss_watch: list[float] | None = None  # LossWatch.state
    contract: str | None = None  # CONTRACT of the model.py that made it
    maker: str = "spikesink"  # or "nanoGPT"; not in the file
    extra: dict[str, Any] = field(default_factory=dict)  # other entries, such as versions

    @property
    def meta(self) -> Meta:
        """The description of the training data; empty if it is unknown."""
        return self.data or meta_of_vocabulary(self.model_args.get("vocab_size", 0))

    def content(self) -> dict[str, Any]:
        """The dict that is hashed and written."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("maker", "extra")}
        return fields | self.extra

    def check_contract(self, contract: str, path: str | Path) -> None:
        """Raises UserError if the current model.py states another contract than the one that made this checkpoint."""
        if self.contract is not None and self.contract != contract:
            current = f"the model.py here states {contract!r}: use the clone that made it"
            raise UserError(f"{path} was made by a model.py of contract {self.contract!r}, but {current}")


Kinds = dict[str, type | tuple[type, ...]]  # entry -> its type, if the entry is there
KINDS: Kinds = {
    **dict.fromkeys(("model", "model_args", "optimizer", "config", "given", "data"), dict),
    **dict.fromkeys(("data_sample", "contract"), str),
    **dict.fromkeys(("step", "tokens"), int),
    **dict.fromkeys(("val_loss", "best"), (int, float)),
    "loss_watch": list,
}


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint and its content hash to `path`, atomically. Raises OSError."""
    content = checkpoint.content()
    saved = {"format": FORMAT, "sha256": content_hash(content), "content": content}
    write_atomic(path, lambda file: torch.save(saved, file))


OPTIONAL_STR = (str, type(None))
META_KINDS: Kinds = {"tokenizer": OPTIONAL_STR, "bpe": OPTIONAL_STR, "chars": str, "vocab_size": int, "bos_id": int}


def is_meta(data: object) -> bool:
    """True for an empty dict, or one that can be a meta.json."""
    if not isinstance(data, dict) or (data and "vocab_size" not in data):
        return False
    return all(isinstance(data[key], kind) for key, kind in META_KINDS.items() if key in data)


def _checked(content: dict[str, Any], path: Path) -> Checkpoint:
    """The Checkpoint of a file's dict. Raises UserError if an entry has the wrong type."""
    entries = {key: content[key] for key in KINDS if content.get(key) is not None}
    for key, kind in KINDS.items():
        if not isinstance(entries.get(key), kind) and (key in entries or key in ("model", "model_args")):
            name = kind.__name__ if isinstance(kind, type) else "number"
            raise UserError(f"{path} is not a checkpoint: its entry {key} is not a {name}")
    for name, tensor in entries["model"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise UserError(f"{path} is not a checkpoint: its weight {name!r} is not a plain tensor")
    dataset, data = entries.get("config", {}).get("dataset", ""), entries.get("data", {})
    if not isinstance(dataset, str) or not is_meta(data):
        raise UserError(f"{path} is not a checkpoint: its description of the data is malformed")
    return Checkpoint(**entries, extra={key: value for key, value in content.items() if key not in KINDS})


def load(path: str | Path) -> Checkpoint:
    """Loads the Checkpoint in a file, or in the ckpt.pt of a folder, that `save` or nanoGPT wrote. On the CPU.

    Never runs code from the file (`weights_only=True`). Raises UserError if it is missing, not a checkpoint, damaged,
    or has anything but tensors and plain Python.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt.pt"
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of odd files; our error says enough
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        todo = "restore it from a copy or train again"
        if "weights_only" in str(error) or "Unsupported" in str(error):
            match = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = "it has more than tensors and plain Python, and nothing in it was executed"
            if match:
                remedy = "; save it again with float(number) in place of NumPy's numbers"
                todo = f"the first is {match[1]}{remedy if 'numpy' in match[1] else ''}"
        raise UserError(f"cannot read checkpoint {path}: {reason}; {todo}") from None
    if isinstance(saved, dict) and saved.get("format") == FORMAT and isinstance(saved.get("content"), dict):
        if content_hash(saved["content"]) != saved.get("sha256"):
            raise UserError(f"checkpoint {path} is damaged (its content hash differs); restore it from a copy")
        return _checked(saved["content"], path)
    if isinstance(saved, dict) and {"model", "model_args"} <= saved.keys():
        theirs = _checked({"step": saved.get("iter_num"), **saved}, path)
        return dataclasses.replace(theirs, model=convert.from_nanogpt(theirs.model), maker="nanoGPT")
    raise UserError(f"{path} is neither a checkpoint of train.py nor of nanoGPT")
