"""Numbers and tokens as text, and text in columns."""

import math

from ..text.tokenizers import visible as visible  # where a token is shown, its text is


def number(value, form=".3g"):
    """A number for a table; a dash for one that is undefined."""
    return "–" if value is None or math.isnan(value) else format(value, form)


def interval(ci, form=".3g"):
    """A 95% interval for a table; empty if it is undefined."""
    return "" if ci is None else f"[{ci[0]:{form}}, {ci[1]:{form}}]"


def grid(header, rows):
    """Rows of text in aligned columns, the first to the left."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    align = lambda row: "  ".join(
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
    )
    return "\n".join(align(row).rstrip() for row in rows)


def on_text(findings):
    """The sequences that findings are about, in short."""
    data = findings["data"]
    return f"{data['n_seq']} sequences of {data['seq_len']} tokens of {data['name']}, {data['dtype']}"
