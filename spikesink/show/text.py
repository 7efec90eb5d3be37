"""Numbers and tokens as text, and text in columns."""

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..measure.findings import TextEntry
from ..text.tokenizers import visible  # noqa: F401  # where a token is shown, its text is


def number(value: float | None, form: str = ".3g") -> str:
    """A number for a table; a dash for one that is undefined."""
    return "–" if value is None or math.isnan(value) else format(value, form)


def printable(text: str) -> str:
    """Text for a terminal: control characters are shown, not sent."""
    return "".join(c if unicodedata.category(c) != "Cc" or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def interval(ci: Sequence[float] | None, form: str = ".3g") -> str:
    """A 95% interval for a table; empty if it is undefined."""
    return "" if ci is None else f"[{ci[0]:{form}}, {ci[1]:{form}}]"


class Table(NamedTuple):
    """Text in columns, for a terminal or a page."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, what stands in it of each thing that has a row, and how a number is written."""

    title: str
    of: Callable[[Any], Any]  # text, or a number
    form: str = ".3g"

    def cell(self, thing: Any) -> str:
        """The text of a row."""
        value = self.of(thing)
        return value if isinstance(value, str) else number(value, self.form)


def table(columns: Iterable[Column], things: Iterable[Any]) -> Table:
    """A row per thing."""
    columns = [*columns]
    return Table([column.title for column in columns], [[column.cell(thing) for column in columns] for thing in things])


def turned(names: Iterable[str], columns: Iterable[Column], things: Iterable[Any]) -> Table:
    """The table of few things and many columns, on its side: a column per thing, under its name."""
    things = [*things]
    return Table(["", *names], [[row.title, *map(row.cell, things)] for row in columns])


def grid(header: list[str], rows: list[list[str]]) -> str:
    """Rows of text in aligned columns, the first to the left."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    align = lambda row: "  ".join(
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
    )
    return "\n".join(align(row).rstrip() for row in rows)


def on_text(text: TextEntry) -> str:
    """Which sequences findings are about, in short."""
    return f"{text.n_seq} sequences of {text.seq_len} tokens of {text.name}, {text.dtype}"
