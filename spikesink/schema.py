"""Dataclasses <-> JSON. A file that is read back is checked against the dataclass.

    class Findings(Record):
        schema: str
        layers: list[Layer]
        curve: list[Point] = keyed("at")          # {"0.3": {...}, "0.5": {...}} in the file
        history: list[Row] | None = sometimes()   # not in the file where it is None
        anatomy: Anatomy | None = or_empty()      # {} in the file where it is None

nan and infinity are null in a file. Where a float is expected, null is read as nan.
"""

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from .errors import UserError
from .files import save_text

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Record:
    """A base class. Every subclass becomes a frozen dataclass that takes keyword arguments."""

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def keyed(key: str) -> Any:
    """A field that is a list of dataclasses in Python, and in the file an object with their `key` as its keys."""
    return dataclasses.field(metadata={"keyed": key})


def sometimes() -> Any:
    """A field that is left out of the file where it is None."""
    return dataclasses.field(default=None, metadata={"sometimes": True})


def or_empty() -> Any:
    """A field that is an empty object in the file where it is None."""
    return dataclasses.field(default=None, metadata={"or_empty": True})


def to_json(value: Any) -> Any:
    """Turns a value into dicts, lists and plain values that JSON can hold; nan and infinity become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {
            field.name: _entry(item, field.metadata)
            for field, item in fields
            if not (item is None and "sometimes" in field.metadata)
        }
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _entry(item: Any, metadata: Mapping[str, Any]) -> Any:
    if item is None and "or_empty" in metadata:
        return {}
    entry = to_json(item)
    return {str(row.pop(metadata["keyed"])): row for row in entry} if "keyed" in metadata else entry


class Misfit(Exception):
    """The file is not what the dataclass expects. The message says where and why."""


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """Reads `value` as a `kind`: a dataclass, list[...], dict[str, ...], X | None or a plain type. Raises Misfit."""
    return _read(kind, value, where)


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _read_union(inner, value, where)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise Misfit(f"{where} is not a list")
        kinds = inner if origin is tuple and Ellipsis not in inner else (inner[:1] or (Any,)) * len(value)
        if len(kinds) != len(value):
            raise Misfit(f"{where} has {len(value)} entries, not {len(kinds)}")
        return origin(_read(kinds[i], entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise Misfit(f"{where} is not an object")
        return {key: _read(inner[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if kind is float:
        if value is None:
            return math.nan
        if type(value) in (int, float):
            return float(value)
    elif type(value) is kind or (kind in (dict, list) and isinstance(value, kind)):
        return value
    raise Misfit(f"{where} is {value!r}, not of type {getattr(kind, '__name__', kind)}")


def _read_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    problems = []
    for kind in kinds:
        try:
            return _read(kind, value, where)
        except Misfit as problem:
            problems.append(str(problem))
    raise Misfit(problems[0])


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise Misfit(f"{where or kind.__name__} is not an object")
    fields, hints = {field.name: field for field in dataclasses.fields(kind)}, get_type_hints(kind)
    unknown = next((name for name in value if name not in fields), None)
    if unknown is not None:
        raise Misfit(f"{where} has an unknown entry {unknown!r}")
    values = {}
    for name, field in fields.items():
        place = f"{where}.{name}".lstrip(".")
        if name not in value:
            if "sometimes" not in field.metadata:
                raise Misfit(f"{place} is missing")
            continue
        entry = value[name]
        if "or_empty" in field.metadata and entry == {}:
            continue
        if "keyed" in field.metadata:
            key, item = field.metadata["keyed"], get_args(hints[name])[0]
            key_type = get_type_hints(item)[key]
            if not isinstance(entry, dict):
                raise Misfit(f"{place} is not an object")
            try:
                entry = [{key: key_type(text), **row} for text, row in entry.items()]
            except (TypeError, ValueError):
                raise Misfit(f"{place} is not keyed by {key}") from None
        values[name] = _read(hints[name], entry, place)
    return kind(**values)


def save(path: str | Path, value: Any) -> None:
    """Writes a dataclass, or dicts, lists and plain values, as a JSON file, atomically. Raises UserError."""
    save_text(path, json.dumps(to_json(value), indent=1, allow_nan=False))


def load(kind: type[T], path: str | Path, made_by: str) -> T:
    """Reads the dataclass `kind`, which has a field `schema`, from a file that the command `made_by` wrote.
    Raises UserError if the file cannot be read, states another schema, or does not fit its schema."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    expected = next(f.default for f in dataclasses.fields(kind) if f.name == "schema")  # type: ignore[arg-type]
    stated = value.get("schema") if isinstance(value, dict) else None
    if stated != expected:
        raise UserError(f"{path} has schema {stated!r}, but this version reads {expected!r}: run {made_by} again")
    try:
        return from_json(kind, value)
    except Misfit as problem:
        raise UserError(f"{path} is not what {made_by} writes: {problem}") from None
