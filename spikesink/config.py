"""dataclasses <- config files <- --key=value; typed, and typos are refused with the nearest name.

A config file is Python: a list of `key = value` lines (it is executed: run only files you trust). `config/x.py`,
`configs/x.py` and `x` name the same file. Sizes (scale/) are taken first, then the other files left to right, then the
command line: an arm keeps what it says at every size.
"""

import dataclasses
import inspect
import math
import re
import runpy
import types
from pathlib import Path

from .errors import UserError, nearest

TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


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
    known = [str(p.relative_to(root / "configs").with_suffix("")) for p in (root / "configs").rglob("*.py")]
    wanted = str(relative).removesuffix(".py")
    hint = nearest(wanted, known) or f"; known: {', '.join(sorted(known))}; keys are written --key=value"
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
    except (KeyError, ValueError):
        pass
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{origin}: {key}={value!r} is not of type {kind.__name__}")
    return value


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
            raise UserError(f"{origin}: unknown key {key!r}{nearest(key, fields)}")
        values[key] = typed(key, value, fields[key].type, origin)

    options = [arg for arg in argv if arg.startswith("--")]
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


def describe(schemas):
    """Help text: every key, its default and the comment beside it in the source."""
    lines = []
    for schema in schemas:
        comments = dict(re.findall(r"^ {4}(\w+): .*?  # (.*)$", inspect.getsource(schema), re.MULTILINE))
        lines += ["", f"{schema.__name__}: {inspect.getdoc(schema).splitlines()[0]}"]
        options = [(f"--{f.name}={f.default}", comments.get(f.name, "")) for f in dataclasses.fields(schema)]
        lines += [f"  {option:<34} {comment}".rstrip() for option, comment in options]
    return "\n".join(lines)
