"""dataclasses <- config files <- --key=value; typed, and typos are refused with the nearest name.

A config file is Python: a list of `key = value` lines (it is executed: run only files you trust). `config/x.py`,
`configs/x.py` and `x` name the same file. Several files compose left to right, then the command line has its say.
"""

import dataclasses
import inspect
import re
import runpy
import types
from pathlib import Path

from .errors import UserError, nearest

TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def find_config(name, root):
    """The path of a config given as a path, as config/x.py, configs/x.py, configs/x or x. Raises UserError."""
    path = Path(name)
    relative = Path(*path.parts[1:]) if path.parts[0] in ("config", "configs") else path
    for candidate in (path, root / "configs" / relative):
        for tried in (candidate, Path(f"{candidate}.py")):
            if tried.is_file():
                return tried
    known = [str(p.relative_to(root / "configs").with_suffix("")) for p in (root / "configs").rglob("*.py")]
    wanted = str(relative).removesuffix(".py")
    raise UserError(f"there is no config {name!r}{nearest(wanted, known)}; known: {', '.join(sorted(known))}")


def read_config(path):
    """{key: value} assigned by a config file. Raises UserError if the file does not run."""
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise UserError(f"config {path} failed: {type(error).__name__}: {error}") from None
    hidden = (types.ModuleType, types.FunctionType, type)
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
            return float(value)
    except (KeyError, ValueError):
        pass
    if type(value) is not kind:
        raise UserError(f"{origin}: {key}={value!r} is not of type {kind.__name__}")
    return value


def load(schemas, argv, root):
    """Instances of the dataclasses `schemas`, from the config files and `--key=value` in `argv`.

    Returns (instances, every value that was given as a dict, names of the config files). Keys are flat: a key belongs
    to the one dataclass that has it. Raises UserError for an unknown key, a wrong type or an impossible value.
    """
    fields = {f.name: f for schema in schemas for f in dataclasses.fields(schema)}
    values, files = {}, []

    def take(key, value, origin):
        if key not in fields:
            raise UserError(f"{origin}: unknown key {key!r}{nearest(key, fields)}")
        values[key] = typed(key, value, fields[key].type, origin)

    options = [arg for arg in argv if arg.startswith("--")]
    for name in (arg for arg in argv if not arg.startswith("--")):
        path = find_config(name, root)
        files.append(path.stem)
        for key, value in read_config(path).items():
            take(key, value, str(path))
    for option in options:
        key, equals, value = option[2:].partition("=")
        if not equals and key in fields and fields[key].type is not bool:
            raise UserError(f"--{key} needs a value: --{key}={fields[key].default}")
        take(key, value if equals else True, "command line")
    try:
        instances = [s(**{f.name: values[f.name] for f in dataclasses.fields(s) if f.name in values}) for s in schemas]
    except ValueError as error:
        raise UserError(str(error)) from None
    return instances, values, files


def describe(schemas):
    """Help text: every key, its default and the comment beside it in the source."""
    lines = []
    for schema in schemas:
        comments = dict(re.findall(r"^ {4}(\w+): .*?  # (.*)$", inspect.getsource(schema), re.MULTILINE))
        lines += ["", f"{schema.__name__}: {inspect.getdoc(schema).splitlines()[0]}"]
        lines += [f"  --{f.name}={f.default!s:<14} {comments.get(f.name, '')}" for f in dataclasses.fields(schema)]
    return "\n".join(lines)
