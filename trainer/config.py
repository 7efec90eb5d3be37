"""dataclasses <- config files <- --key=value; typed, and typos are refused with the nearest name.

A config file is Python: a list of `key = value` lines (it is executed: run only files you trust). `config/x.py`,
`configs/x.py` and `x` name the same file. Sizes (scale/) are taken first, then the other files left to right, then the
command line: an arm keeps what it says at every size.
"""

import dataclasses
import inspect
import itertools
import math
import re
import runpy
import shutil
import textwrap
import types
from pathlib import Path

from spikesink.errors import UserError, nearest

TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# what other trainers call our keys: a hint for those who try, not a second name
ELSEWHERE = {
    **dict.fromkeys(("lr", "max_lr", "peak_lr"), "learning_rate"),
    **dict.fromkeys(("steps", "max_steps", "num_steps", "iters", "iterations", "n_steps", "epochs"), "max_iters"),
    **dict.fromkeys(("bs", "micro_batch_size", "device_batch_size"), "batch_size"),
    **dict.fromkeys(("grad_accum", "accumulate", "accumulation_steps"), "gradient_accumulation_steps"),
    **dict.fromkeys(("warmup", "warmup_steps"), "warmup_iters"),
    **dict.fromkeys(("layers", "depth", "num_layers", "n_layers"), "n_layer"),
    **dict.fromkeys(("heads", "num_heads", "n_heads"), "n_head"),
    **dict.fromkeys(("dim", "d_model", "width", "hidden_size"), "n_embd"),
    **dict.fromkeys(("seq_len", "context", "context_length", "max_seq_len"), "block_size"),
    **dict.fromkeys(("out", "outdir", "output", "output_dir"), "out_dir"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("act", "activation_function"), "activation"),
    **dict.fromkeys(("pos", "pos_emb", "positions"), "position"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "schedule"), "lr_schedule"),
    **dict.fromkeys(("checkpoint", "ckpt", "finetune_from"), "init_from"),
    "data": "dataset",
    "opt": "optimizer",
    "placement": "norm_place",
    "random_seed": "seed",
}


def find_config(name, root):
    """The path of a config given as a path, as config/x.py, configs/x.py, configs/x or x. Raises UserError."""
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
    for candidate in (path, root / "configs" / relative):
        for tried in (candidate, Path(f"{candidate}.py")):
            if tried.is_file() and tried.suffix == ".py":
                return tried
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


def read_config(path):
    """{key: value} assigned by a config file. Raises UserError if the file does not run."""
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise UserError(f"config {path} failed: {type(error).__name__}: {error}") from None
    hidden = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, hidden)}


def typed(key, value, kind, origin):
    """`value` as `kind` (int, float, bool or str), read from text where it came from the command line."""
    text = isinstance(value, str)
    try:
        if kind is bool and text:
            return TRUTH[value.lower()]
        if kind is int and text:
            return int(value.replace("_", ""))
        if kind is float and (text or type(value) is int):
            value = float(value)
        if kind is str and type(value) in (int, float):
            return str(value)
    except (KeyError, ValueError, OverflowError):
        pass
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{origin}: {key}={value!r} is not of type {kind.__name__}{_as_written(value, kind)}")
    return value


def _as_written(value, kind):
    """How a value of the wrong type would be written, or ''."""
    if kind is bool:
        return ": true or false"
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return ""
    return f": write {int(number)}" if kind is int and number.is_integer() else ""


def fields_of(schemas):
    """{key: field} of dataclasses whose keys are flat: a key belongs to the one that has it."""
    return {f.name: f for schema in schemas for f in dataclasses.fields(schema)}


def given(schemas, argv, root):
    """({key: value} of all that the config files and `--key=value` in `argv` say, names of the config files).

    Raises UserError for an unknown key or a wrong type.
    """
    fields, values = fields_of(schemas), {}

    def take(key, value, origin):
        if key not in fields:
            raise UserError(f"{origin}: unknown key {key!r}{_known_as(key, fields)}")
        values[key] = typed(key, value, fields[key].type, origin)

    options = [arg for arg in argv if arg.startswith("--")]
    for option, value in itertools.pairwise(argv):
        key = option.removeprefix("--")
        if option == key or key not in fields or value.startswith("-") or "=" in value:
            continue
        if value.lower() in TRUTH if fields[key].type is bool else not _is_config(value, root):
            raise UserError(f"{option} {value}: write {option}={value}")
    paths = [find_config(arg, root) for arg in argv if not arg.startswith("--")]
    for path in sorted(paths, key=lambda path: path.parent.name != "scale"):
        for key, value in read_config(path).items():
            take(key, value, str(path))
    for option in options:
        key, equals, value = option[2:].partition("=")
        if not equals and key in fields and fields[key].type is not bool:
            raise UserError(f"--{key} needs a value: --{key}={fields[key].default}")
        take(key, value if equals else True, "command line")
    return values, [path.stem for path in paths]


def _is_config(name, root):
    try:
        return bool(find_config(name, root))
    except UserError:
        return False


def _known_as(key, fields):
    """What to do about an unknown key."""
    plain = key.lower().replace("-", "_")
    if plain == "config":
        return ": name a config without a flag, as in: python train.py prenorm scale/nano"
    if plain.removeprefix("no_") in fields and fields[plain.removeprefix("no_")].type is bool:
        return f": write --{plain.removeprefix('no_')}=false"
    known = plain if plain in fields else ELSEWHERE.get(plain)
    return (f" (did you mean {known}?)" if known else nearest(key, fields)) or "; --help lists them"


def build(schemas, values):
    """Instances of the dataclasses `schemas` from {key: value}. Raises UserError for an impossible value."""
    try:
        return [s(**{f.name: values[f.name] for f in dataclasses.fields(s) if f.name in values}) for s in schemas]
    except ValueError as error:
        raise UserError(str(error)) from None


def load(schemas, argv, root):
    """(instances of `schemas`, all that was given as a dict, names of the config files). Raises UserError."""
    values, names = given(schemas, argv, root)
    return build(schemas, values), values, names


def describe(schemas, choices=None, width=None):
    """Help text: every key, its default and the comment beside it in the source, as wide as the terminal.

    A comment line between the fields of a dataclass heads those below it. `choices`: {key: its table}; names that a
    comment leaves out are added.
    """
    width, choices = max(60, (width or shutil.get_terminal_size().columns) - 1), choices or {}
    left, middle = 2 + len("--lr_decay_iters="), len("openwebtext") + 1
    fold = lambda text, indent: textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    lines = []
    for schema in schemas:
        about = inspect.getdoc(schema).splitlines()[0].partition(" Raises ")[0]
        lines += ["", *fold(f"{schema.__name__}: {about}", "")]
        fields = fields_of([schema])
        for line in inspect.getsource(schema).splitlines():
            if heading := re.match(r"^ {4}# (.*)$", line):
                lines += ["", heading[1]]
            found = re.match(r"^ {4}(\w+): [^#]*(?:# (.*))?$", line)
            if not found or found[1] not in fields:
                continue
            key, comment = found[1], found[2] or ""
            more = [name for name in choices.get(key, ()) if not re.search(rf"\b{re.escape(name)}\b", comment)]
            comment += f"{'; also ' if comment else ''}{', '.join(more)}" if more else ""
            option, default = f"  --{key}=", str(fields[key].default)
            start = f"{option:<{left}} {default:<{middle}}"
            told = fold(comment, " " * (left + middle + 2)) or [""]
            if len(start.rstrip()) <= left + 1 + middle:
                told[0] = f"{start} {told[0].lstrip()}".rstrip()
            else:
                told.insert(0, start.rstrip())
            lines += told
    return "\n".join(lines)
