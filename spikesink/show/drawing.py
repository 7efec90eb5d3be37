"""Draws figures in the style of a page, as SVG that takes the page's colours, or of a paper. Each is a `Figure`."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullFormatter

from .text import visible

SPIKE, SINK, GREY, INK = "#c2410c", "#1d4ed8", "#78716c", "#1c1917"
PAGE_COLOURS = {INK: "currentColor", GREY: "var(--soft)", SPIKE: "var(--spike)", SINK: "var(--sink)"}
SHADES = {
    color: LinearSegmentedColormap.from_list(color, [to_rgba(color, 0), to_rgba(color, 0.75)])
    for color in (SPIKE, SINK)
}

STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
    "svg.fonttype": "none",
    "svg.hashsalt": "spikesink",
    "savefig.dpi": 300,
    "figure.constrained_layout.use": True,
}

# font size in points, and height, width and width of a wide figure in inches: a page's figures are as wide as a phone's
# screen, a paper's as one or two columns of a journal
SIZES = {"page": (9, 2.9, 5.2, 10.4), "paper": (8, 2.1, 3.35, 6.9)}


def _style(medium: str, is_wide: bool) -> contextlib.AbstractContextManager[None]:
    font, height, width, wide = SIZES[medium]
    style: Any = {**STYLE, "font.size": font, "figure.figsize": (wide if is_wide else width, height)}
    style |= dict.fromkeys(("axes.titlesize", "axes.labelsize", "legend.fontsize"), font)
    return mpl.rc_context(style | dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), font - 0.5))


class Figure(NamedTuple):
    """How to draw a figure of some findings, how to caption it, and whether they have anything to draw."""

    draw: Callable[[Any], Canvas]
    caption: str | Callable[[Any], str]
    wide: bool = False
    is_drawable: Callable[[Any], Any] = lambda findings: True
    measured: bool = False  # the caption ends with the text that the findings are about

    def caption_of(self, findings: Any) -> str:
        """Returns the caption for some findings."""
        caption = self.caption if isinstance(self.caption, str) else self.caption(findings)
        return caption + measured_on(findings) if self.measured else caption


def measured_on(findings: Any) -> str:
    """Returns the last sentence of a caption: on which text findings were measured."""
    text = findings.data
    return f" Measured on {text.n_seq} sequences of {text.seq_len} tokens of {text.name}, {text.dtype}."


class Drawn(NamedTuple):
    """A figure that was drawn for a page."""

    svg: str
    caption: str
    wide: bool


def canvas(
    rows: int = 1, columns: int = 1, height: float = 1.0, lines: float = 0, **options: Any
) -> tuple[Canvas, Any]:
    """Returns a canvas of the style's width, and its subplots. It is `height` times as high as the style says, or high
    enough for so many `lines` of text."""
    width, style_height = mpl.rcParams["figure.figsize"]
    inches = (lines + 4) * 1.45 * mpl.rcParams["font.size"] / 72 if lines else height * style_height
    figure = Canvas(figsize=(width, inches))
    return figure, figure.subplots(rows, columns, **options)


def _svg(figure: Canvas, **options: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, **options)
    return text.getvalue()


def _page_svg(figure: Canvas) -> str:
    """Returns SVG that takes the colours of the page around it."""
    svg = _svg(figure, transparent=True)
    for color, name in PAGE_COLOURS.items():
        svg = svg.replace(color, name)
    return svg[svg.index("<svg") :]


def _draw(table: Mapping[str, Figure], findings: Any, medium: str) -> Iterator[tuple[str, Figure, Canvas]]:
    """Yields (name, figure, its drawing) of the figures in a table for which the findings have anything to draw. The
    style holds until the next one."""
    for name, figure in table.items():
        if figure.is_drawable(findings):
            with _style(medium, figure.wide):
                yield name, figure, figure.draw(findings)


def for_page(table: Mapping[str, Figure], findings: Any) -> dict[str, Drawn]:
    """Returns {name: Drawn} of the figures in a {name: Figure} for which the findings have anything to draw."""
    return {
        name: Drawn(_page_svg(drawing), figure.caption_of(findings), figure.wide)
        for name, figure, drawing in _draw(table, findings, "page")
    }


def for_paper(table: Mapping[str, Figure], findings: Any) -> Iterator[tuple[str, str, bytes, str]]:
    """Yields (name, SVG text, PNG bytes, caption) of the same figures in the style of a paper."""
    for name, figure, drawing in _draw(table, findings, "paper"):
        png = io.BytesIO()
        drawing.savefig(png, format="png")
        yield name, _svg(drawing), png.getvalue(), figure.caption_of(findings)


# ------------------------------------------------------------------------------------------- parts of figures


def label(text: str, longest: int = 12) -> str:
    """Returns a token's text as a label: visible, short, and with $ escaped, which would start mathematics."""
    shown = visible(text)
    return (shown if len(shown) <= longest else shown[: longest - 1] + "…").replace("$", r"\$")


def name_ticks(axis: Axis, names: Sequence[Any], at_most: int = 14, turn: int = 40) -> None:
    """Puts names along an axis, `at_most` so many of them, evenly spaced, at an angle of `turn` degrees."""
    step = -(-len(names) // at_most)
    rotation: dict[str, Any] = {"rotation": turn, "ha": "right" if turn < 90 else "center"} if turn else {}
    axis.set_ticks(range(0, len(names), step), names[::step], **rotation)


def log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Puts plain numbers on a logarithmic axis, and more of them if the values span a small range."""
    positive = [x for x in values if x > 0]
    is_narrow = positive and max(positive) < 50 * min(positive)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def thinned(values: Sequence[float], at_most: int = 600) -> tuple[list[int], list[float]]:
    """Returns (x, y) of a long curve: all of its start, then the largest of every few neighbours."""
    start, rest = values[: at_most // 4], values[at_most // 4 :]
    n = max(1, -(-len(rest) // at_most))
    x = [*range(len(start)), *range(len(start), len(values), n)]
    return x, [*start, *(max(rest[i : i + n]) for i in range(0, len(rest), n))]
