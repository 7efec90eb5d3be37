"""Writes numbers and tokens as text, and text in columns."""

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..text.tokenizers import visible  # noqa: F401  # whoever shows a token imports it from here


def number(value: float | None, form: str = ".3g") -> str:
    """Returns a number as a table shows it: a dash if it is undefined (None or NaN)."""
    return "–" if value is None or math.isnan(value) else format(value, form)


def printable(text: str) -> str:
    """Returns text that is safe to print: control characters become escapes such as \\x1b."""
    return "".join(c if unicodedata.category(c) != "Cc" or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def format_interval(ci: Sequence[float] | None, form: str = ".3g") -> str:
    """Returns an interval as a table shows it, "[low, high]"; an empty string if it is undefined."""
    return "" if ci is None else f"[{ci[0]:{form}}, {ci[1]:{form}}]"


def with_interval(value: float | None, ci: Sequence[float] | None, form: str = ".3g") -> str:
    """Returns a number as a table shows it, followed by its interval if it has one: "0.41 [0.34, 0.49]"."""
    return f"{number(value, form)} {format_interval(ci, form)}".strip()


class Table(NamedTuple):
    """Text in columns, for a terminal or a page."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, how to get a cell's value from an item, and the format of a number."""

    title: str
    value: Callable[[Any], Any]  # item -> text, or a number
    form: str = ".3g"

    def cell(self, item: Any) -> str:
        """Returns the text of an item's cell."""
        value = self.value(item)
        return value if isinstance(value, str) else number(value, self.form)


def table(columns: Iterable[Column], items: Iterable[Any]) -> Table:
    """Returns a table with one row per item."""
    columns = [*columns]
    return Table([column.title for column in columns], [[column.cell(item) for column in columns] for item in items])


def transposed_table(names: Iterable[str], columns: Iterable[Column], items: Iterable[Any]) -> Table:
    """Returns the table transposed, with one column per item under its name: for few items and many columns."""
    items = [*items]
    return Table(["", *names], [[row.title, *map(row.cell, items)] for row in columns])


def grid(header: list[str], rows: list[list[str]]) -> str:
    """Returns rows of text in aligned columns; the first column is aligned to the left."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    align = lambda row: "  ".join(
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
    )
    return "\n".join(align(row).rstrip() for row in rows)
