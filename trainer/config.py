"""Reads the settings of a run: defaults of dataclasses, then config files, then --key value. Values have types.

A key may be an int, float, bool, str, enum, Literal, X | None, or a list, tuple or dict of these.

A config file is Python, a list of `key = value` lines. It is executed, so run only files you trust. `config/x.py`,
`configs/x.py` and `x` name the same file. Sizes (scale/) are read first, then the other files from left to right, then
the command line, so that an arm overrides every size. Keys are written `--key value` or `--key=value`, `--flag` and
`--no-flag`.
"""

import ast
import contextlib
import dataclasses
import enum
import inspect
import math
import re
import runpy
import shutil
import textwrap
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from spikesink.errors import UserError, nearest

TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
Schemas = Sequence[type[Any]]  # dataclasses that share one flat set of keys
Values = dict[str, Any]  # {key: value}


def find_config(name: str, root: Path) -> Path:
    """The path of a config that is named as a path, config/x.py, configs/x.py, configs/x or x. Raises UserError."""
    path = Path(name)
    if not path.parts:
        raise UserError(f"there is no config {name!r}: name one of configs/, or give no name for the defaults")
    relative = Path(*path.parts[1:]) if path.parts[0] in ("config", "configs") else path
    if name.startswith("-") or "=" in name:
        raise UserError(f"there is no config {name!r}; keys are written --key=value")
    if path.suffix in (".pt", ".pth", ".zip", ".safetensors"):
        raise UserError(
            f"{name} is no config; a checkpoint goes on with --resume and its out_dir, or --init_from={name}"
        )
    for stem in (path, root / "configs" / relative):
        for candidate in (stem, Path(f"{stem}.py")):
            if candidate.is_file() and candidate.suffix == ".py":
                return candidate
    if (path / "ckpt.pt").exists():
        raise UserError(f"{name} is a run, no config: --resume --out_dir={name} goes on with it")
    if path.is_file():
        raise UserError(f"{name} is no config: that is a .py file of lines `key = value`")
    known = {str(p.relative_to(root / "configs").with_suffix("")): p.stem for p in (root / "configs").rglob("*.py")}
    sizes = ", ".join(sorted(config for config in known if config.startswith("scale/")))
    if path.is_dir():
        raise UserError(f"{name} is a folder; name a config in it, as in: prenorm, or a size: {sizes}")
    wanted = str(relative).removesuffix(".py")
    hint = next((f" (did you mean {config}?)" for config, stem in known.items() if stem == wanted), None)
    hint = hint or nearest(wanted, known) or f"; arms: configs/README.md; sizes: {sizes}; keys are written --key=value"
    raise UserError(f"there is no config {name!r}{hint}")


def read_config(path: str | Path) -> Values:
    """The {key: value} that a config file assigns. Raises UserError if the file does not run."""
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise UserError(f"config {path} failed: {type(error).__name__}: {error}") from None
    hidden = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, type(ClassVar))
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, hidden)}


class Key(NamedTuple):
    """A key of a schema."""

    name: str
    type: Any
    default: Any  # dataclasses.MISSING if it has none
    by_layer: bool  # whether it may be a text with a value per layer: "post*2 pre", "cycle(64*3 0)"

    def read(self, value: Any, origin: str | Path) -> Any:
        """`value` with this key's type. The dataclass checks a text with values per layer. Raises UserError."""
        if self.by_layer and isinstance(value, str) and re.search(r"[\s*]|cycle\(", value):
            return value
        return typed(self.name, value, self.type, origin)


def fields_of(schemas: Schemas) -> dict[str, Key]:
    """{key: Key} of all schemas. In a schema with `MODEL_WIDE`, all fields except those may have a value per layer."""
    keys: dict[str, Key] = {}
    for schema in schemas:
        types_, wide = get_type_hints(schema), getattr(schema, "MODEL_WIDE", None)
        for f in dataclasses.fields(schema):
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            keys[f.name] = Key(f.name, types_[f.name], default, wide is not None and f.name not in wide)
    return keys


def typed(key: str, value: Any, kind: Any, origin: str | Path) -> Any:
    """`value` as `kind`. A text from the command line is parsed. Raises UserError. A list may stand for a tuple and the
    reverse, as JSON has no tuples; a name may stand for a member of an enum."""
    try:
        return _read(value, kind)
    except MISFIT:
        name = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")
        raise UserError(f"{origin}: {key}={value!r} is not of type {name}{_as_written(value, kind)}") from None


MISFIT = (KeyError, ValueError, TypeError, OverflowError, StopIteration, RecursionError, MemoryError)  # from _read


def _read(value: Any, kind: Any) -> Any:
    """`value` as `kind`. Raises one of MISFIT if that is impossible."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    text = isinstance(value, str)
    if origin in (Union, types.UnionType):
        if type(None) in inner and str(value).lower() == "none":
            return None
        for member in sorted(inner, key=lambda t: (text or type(value) is not t, t is str)):  # its own type first
            with contextlib.suppress(*MISFIT):
                return _read(value, member)
        raise ValueError(value)
    if origin is Literal:
        return next(choice for choice in inner if choice == value or (text and str(choice) == value))
    if origin in (list, tuple, dict):
        return _read_container(value, origin, inner)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind[value] if text else kind(value)
    if kind is bool and text:
        return TRUTH[value.lower()]
    if (text and kind is int) or (kind is float and (text or type(value) is int)):
        value = kind(value.replace("_", "") if text else value)
    elif kind is str and type(value) in (int, float):
        value = str(value)
    if (kind is not Any and type(value) is not kind) or (kind is float and not math.isfinite(value)):
        raise ValueError(value)
    return value


def _read_container(source: Any, origin: Any, inner: Sequence[Any]) -> Any:
    """A list, tuple or dict, written in Python or as items between blanks or commas; items of a dict are name=item."""
    value = source
    if isinstance(source, str):
        with contextlib.suppress(ValueError, TypeError, SyntaxError):
            value = ast.literal_eval(source)
        if not isinstance(value, (list, tuple, dict)):
            value = re.findall(r"[^\s,]+", source)
            value = dict(part.split("=", 1) for part in value) if origin is dict else value
    if isinstance(value, dict) and origin is dict:
        return {_read(name, (inner or [Any])[0]): _read(item, (inner or [Any])[-1]) for name, item in value.items()}
    if isinstance(value, (list, tuple)) and origin is not dict:
        fixed = origin is tuple and inner and inner[-1] is not ...
        kinds = inner if fixed else [inner[0] if inner else Any] * len(value)
        return origin(_read(item, kind) for item, kind in zip(value, kinds, strict=True))
    raise ValueError(source)


def plain(value: Any) -> Any:
    """`value` in plain Python types, as checkpoints hold it: names in place of enum members."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value.name if isinstance(value, enum.Enum) else value


def _as_written(value: Any, kind: Any) -> str:
    """Says how to write a value of type `kind`, or ''."""
    if kind is bool:
        return ": true or false"
    if get_origin(kind) is dict:
        return ': write "name=1 other=2", or a dict as Python writes it'
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f": one of {', '.join(kind.__members__)}"
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return ""
    return f": write {int(number)}" if kind is int and number.is_integer() else ""


def split_argv(argv: Sequence[str], fields: Mapping[str, Key]) -> tuple[list[str], Values]:
    """(words that are no flags, {key: value as text, or a bool}) of a command line. The last value of a key counts.
    Raises UserError for a key that is not in `fields` or has no value."""
    names: list[str] = []
    values: Values = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        no_key = key.removeprefix("no-")
        if not word.startswith("--"):
            names.append(word)
        elif not equals and no_key != key and no_key in fields and fields[no_key].type is bool:
            values[no_key] = False
        elif key not in fields:
            raise UserError(f"command line: unknown key {key!r}{_known_as(key, fields)}")
        elif equals:
            values[key] = value
        elif fields[key].type is bool:
            if words and words[0].lower() in TRUTH:
                raise UserError(f"{word} {words[0]}: write {word}={words[0]}")
            values[key] = True
        elif words and not words[0].startswith("--"):
            values[key] = words.pop(0)
        else:
            default = fields[key].default
            raise UserError(f"--{key} needs a value: --{key}={'VALUE' if default is dataclasses.MISSING else default}")
    return names, values


def parse_argv(schemas: Schemas, argv: Sequence[str], root: Path) -> tuple[Values, list[str]]:
    """({key: value} from the config files and flags in `argv`, names of the config files). Raises UserError for an
    unknown key or a wrong type."""
    fields = fields_of(schemas)
    names, flags = split_argv(argv, fields)
    paths = [find_config(name, root) for name in names]
    values: Values = {}
    for path in sorted(paths, key=lambda path: path.parent.name != "scale"):
        for key, value in read_config(path).items():
            if key not in fields:
                raise UserError(f"{path}: unknown key {key!r}{_known_as(key, fields)}")
            values[key] = fields[key].read(value, path)
    values |= {key: fields[key].read(value, "command line") for key, value in flags.items()}
    return values, [path.stem for path in paths]


def _known_as(key: str, fields: Mapping[str, Key]) -> str:
    """Advice about an unknown key."""
    plain = key.lower().replace("-", "_")
    switched = plain.removeprefix("no_")
    if plain == "config":
        return ": name a config without a flag, as in: python train.py prenorm scale/nano"
    if switched != plain and switched in fields and fields[switched].type is bool:
        return f": write --no-{switched}"
    return (f" (did you mean {plain}?)" if plain in fields else nearest(key, fields)) or "; --help lists them"


def build(schemas: Schemas, values: Mapping[str, Any]) -> list[Any]:
    """Makes instances of the dataclasses `schemas` from {key: value}. Raises UserError for an impossible value."""
    try:
        return [s(**{f.name: values[f.name] for f in dataclasses.fields(s) if f.name in values}) for s in schemas]
    except ValueError as error:
        raise UserError(str(error)) from None


def describe(schemas: Schemas, choices: Mapping[str, Collection[str]] | None = None, width: int | None = None) -> str:
    """The help text, as wide as the terminal: every key, its default, and the comment beside it in the source.

    A comment line between fields is the heading of the fields below it. `choices`: {key: table of its choices}; names
    of a table that the comment does not mention are added.
    """
    width, choices = max(60, (width or shutil.get_terminal_size().columns) - 1), choices or {}
    key_width, default_width = 2 + len("--lr_decay_iters="), len("openwebtext") + 1
    fold = lambda text, indent: textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    lines: list[str] = []
    for schema in schemas:
        about = (inspect.getdoc(schema) or "").splitlines()[0].partition(" Raises ")[0]
        lines += ["", *fold(f"{schema.__name__}: {about}", "")]
        fields = fields_of([schema])
        for line in inspect.getsource(schema).splitlines():
            if heading := re.match(r"^ {4}# (.*)$", line):
                lines += ["", heading[1]]
            match = re.match(r"^ {4}(\w+): [^#]*(?:# (.*))?$", line)
            if not match or match[1] not in fields:
                continue
            key, comment, kind = match[1], match[2] or "", fields[match[1]].type
            members = get_args(kind) if get_origin(kind) is Literal else getattr(kind, "__members__", ())
            names = [str(name) for name in (*choices.get(key, ()), *members)]
            more = [name for name in names if not re.search(rf"\b{re.escape(name)}\b", comment)]
            comment += f"{'; also ' if comment else ''}{', '.join(more)}" if more else ""
            option, default = f"  --{key}=", str(plain(fields[key].default))
            start = f"{option:<{key_width}} {default:<{default_width}}"
            entry = fold(comment, " " * (key_width + default_width + 2)) or [""]
            if len(start.rstrip()) <= key_width + 1 + default_width:
                entry[0] = f"{start} {entry[0].lstrip()}".rstrip()
            else:
                entry.insert(0, start.rstrip())
            lines += entry
    return "\n".join(lines)
