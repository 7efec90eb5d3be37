"""What a caller may choose, as frozen dataclasses. Command-line flags are made from their fields, never the reverse."""

import argparse
import dataclasses
import functools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
import torch

from .errors import UserError

T = TypeVar("T")


def option(text: str, default: Any = None, *, metavar: str | None = None, group: str = "", least: int = 1) -> Any:
    """A field of a dataclass of options: `text` is its help; whole numbers must be at least `least`."""
    about = {"help": text, "metavar": metavar, "group": group, "least": least}
    return dataclasses.field(default=default, metadata=about)


TEXT = "on which text (default: its training's validation split, or Python's docs)"
on_text, on_run = functools.partial(option, group=TEXT), functools.partial(option, group="how it runs")


@dataclass(frozen=True)
class Options:
    """On which text a model is looked at, and how. Raises UserError for what cannot be."""

    data: str | None = on_text("the validation split of this dataset, a name or a folder", metavar="NAME")
    text: str | Path | None = on_text("a text file, encoded as the training data was", metavar="FILE")
    tokens: str | Path | np.ndarray | torch.Tensor | None = on_text(
        "integer ids [n_seq, seq_len], used as they are; -100 is padding", metavar="FILE.npy"
    )
    bos: bool | None = on_text(
        "BOS before every sequence, or none (default: as its tokenizer or its training has it); of BERT's frame, "
        "--no-bos drops [CLS] and leaves [SEP]"
    )
    special: bool = on_text(
        "special tokens that a text or a prompt spells, as <s>, are read as these tokens (default: as text)", False
    )
    seq_len: int | None = on_text("tokens in a sequence, with BOS (default: 64, Gu et al.'s)", metavar="N")
    n_seq: int | None = on_text("number of sequences (default: 100)", metavar="N")
    bpe: str | Path | None = on_text("local file of GPT-2's BPE ranks", metavar="FILE")
    device: str = on_run("auto (default), cpu, cuda, cuda:1 ...", "auto", metavar="NAME")
    batch_size: int = on_run("sequences at a time (default: 8)", 8, metavar="N")
    nulls: int | None = on_run("sequences of each null, 0 for none (default: up to 16)", metavar="N", least=0)
    revision: str | None = on_run(
        "of a Hugging Face model: a branch, tag or commit of the hub, or a folder within the folder", metavar="REV"
    )
    max_memory: int | None = on_run(
        "on the CPU, a Hugging Face model that needs more is read from disk as it runs (default: what is free)",
        metavar="GiB",
    )
    model: str | Path | None = on_run(
        "the model.py that made a checkpoint of train.py, whose code is run (default: the one of the current clone)",
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        texts = [name for name in ("data", "text", "tokens") if getattr(self, name) is not None]
        if len(texts) > 1:
            raise UserError(f"--{texts[0]} and --{texts[1]} are two texts: give one of them")
        if self.bos is not None and self.tokens is not None:
            raise UserError(f"--tokens are used as they are: --{'' if self.bos else 'no-'}bos goes with a text")
        check_least(self)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: from softmax(logits / temperature). Raises UserError for what cannot be."""

    n_tokens: int = option("tokens of a sample, at most (default: 64)", 64, metavar="N")
    n_samples: int = option("samples, with seeds one after the other (default: 1)", 1, metavar="N")
    temperature: float = option("below 1 likely tokens get likelier; 0: the likeliest (default: 1)", 1.0, metavar="X")
    top_k: int = option("draws from so many likeliest tokens alone (default: 0, all)", 0, metavar="K", least=0)
    seed: int = option("of the first sample (default: 0)", 0, metavar="N", least=0)

    def __post_init__(self) -> None:
        check_least(self)
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature={self.temperature} must be a number of at least 0")


def check_least(options: Any) -> None:
    """Raises UserError for a whole number of a dataclass of options that is smaller than its field allows."""
    for field in dataclasses.fields(options):
        value, least = getattr(options, field.name), field.metadata["least"]
        if type(value) is int and value < least:
            raise UserError(f"--{field.name}={value} must be at least {least}")


def whole(text: str, least: int = 1) -> int:
    """A whole number of at least `least`, from a command line."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def add_flags(parser: argparse.ArgumentParser, kind: type, only: Collection[str] = ()) -> None:
    """A flag for every field of a dataclass of options, or `only` for some: `--key value` or `--key=value`, `--flag`
    and `--no-flag`."""
    groups: dict[str, Any] = {"": parser}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if only and field.name not in only:
            continue
        about, types = field.metadata, get_args(hints[field.name]) or (hints[field.name],)
        heading = about["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        flag: dict[str, Any] = {"default": argparse.SUPPRESS, "help": about["help"]}
        if bool in types:
            flag["action"] = argparse.BooleanOptionalAction
        else:
            kinds: dict[type, Any] = {int: functools.partial(whole, least=about["least"]), float: float}
            convert = next((kinds[kind] for kind in types if kind in kinds), str)
            flag |= {"metavar": about["metavar"], "type": convert}
        groups[heading].add_argument(f"--{field.name}", **flag)


def from_flags(kind: type[T], parsed: argparse.Namespace) -> T:
    """The dataclass `kind` from what `add_flags` parsed. Raises UserError as it does."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in vars(parsed).items() if name in names})
