"""How figures are drawn: one table entry each, the page's style and the paper's, SVG that follows a page's colours."""

import contextlib
import io
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
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


def _sizes(font: float, width: float, height: float, wide: float) -> dict[bool, dict[str, Any]]:
    """rc entries: the font, and the size of a canvas of one or of two columns, in inches."""
    sizes = dict.fromkeys(("axes.titlesize", "axes.labelsize", "legend.fontsize"), font)
    ticks = dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), font - 0.5)
    return {
        at: {**STYLE, "font.size": font, **sizes, **ticks, "figure.figsize": (inches, height)}
        for at, inches in ((False, width), (True, wide))
    }


# a page's figures are as wide as a phone, at its scale; a paper's have a journal's columns
STYLES = {"page": _sizes(9, 5.2, 2.9, 10.4), "paper": _sizes(8, 3.35, 2.1, 6.9)}


def _style(kind: str, wide: bool) -> contextlib.AbstractContextManager[None]:
    entries: Any = STYLES[kind][wide]
    return mpl.rc_context(entries)


class Figure(NamedTuple):
    """A figure: how it is drawn from what was found, what its caption says, and whether there is anything to draw."""

    draw: Callable[[Any], Canvas]
    caption: Callable[[Any], str]
    wide: bool = False
    needs: Callable[[Any], Any] = lambda found: True


class Drawn(NamedTuple):
    """A figure on a page."""

    name: str
    svg: str
    caption: str
    wide: bool


def canvas(
    rows: int = 1, columns: int = 1, height: float = 1.0, lines: float = 0, **options: Any
) -> tuple[Canvas, Any]:
    """`subplots` on a canvas of the style's width; `height` in its usual heights, or enough for `lines` of text."""
    width, usual = mpl.rcParams["figure.figsize"]
    inches = (lines + 4) * 1.45 * mpl.rcParams["font.size"] / 72 if lines else height * usual
    figure = Canvas(figsize=(width, inches))
    return figure, figure.subplots(rows, columns, **options)


def _svg(figure: Canvas, **options: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, **options)
    return text.getvalue()


def page_svg(figure: Canvas) -> str:
    """SVG to stand in a page, whose colours it takes."""
    svg = _svg(figure, transparent=True)
    for color, name in PAGE_COLOURS.items():
        svg = svg.replace(color, name)
    return svg[svg.index("<svg") :]


def for_page(table: Mapping[str, Figure], found: Any) -> dict[str, Drawn]:
    """{name: Drawn} of those figures of a {name: Figure} that there is something to draw of."""
    drawn = {}
    for name, of in table.items():
        if of.needs(found):
            with _style("page", of.wide):
                figure = of.draw(found)
                drawn[name] = Drawn(name, page_svg(figure), of.caption(found), of.wide)
    return drawn


def for_paper(table: Mapping[str, Figure], found: Any) -> Iterator[tuple[str, str, bytes, str]]:
    """Yields (name, SVG text, PNG bytes, caption) of the same figures in a paper's style."""
    for name, of in table.items():
        if of.needs(found):
            with _style("paper", of.wide):
                figure, png = of.draw(found), io.BytesIO()
                figure.savefig(png, format="png")
                yield name, _svg(figure), png.getvalue(), of.caption(found)


# ------------------------------------------------------------------------------------------- parts of figures


def label(text: str, longest: int = 12) -> str:
    """A token's text as a label: visible, short, and not read as mathematics."""
    shown = visible(text)
    return (shown if len(shown) <= longest else shown[: longest - 1] + "…").replace("$", r"\$")


def columns_of(text: str) -> int:
    """How many columns a monospaced text takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def name_ticks(axis: Axis, names: Sequence[Any], at_most: int = 14, turn: int = 40) -> None:
    """Names along an axis, evenly thinned."""
    step = -(-len(names) // at_most)
    turned: dict[str, Any] = {"rotation": turn, "ha": "right" if turn < 90 else "center"} if turn else {}
    axis.set_ticks(range(0, len(names), step), names[::step], **turned)


def log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, in more places where the values span little."""
    positive = [x for x in values if x > 0]
    near = positive and max(positive) < 50 * min(positive)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def thinned(values: Sequence[float], at_most: int = 600) -> tuple[list[int], list[float]]:
    """(x, y) of a long curve: its start as it is, then the largest of as many neighbours as needed."""
    start, rest = values[: at_most // 4], values[at_most // 4 :]
    n = max(1, -(-len(rest) // at_most))
    x = [*range(len(start)), *range(len(start), len(values), n)]
    return x, [*start, *(max(rest[i : i + n]) for i in range(0, len(rest), n))]


def shade_bar(figure: Canvas, image: Any, axes: Axes, text: str | None = None) -> Any:
    """A colour bar for a shaded image."""
    bar = figure.colorbar(image, ax=axes, label=text)
    bar.outline.set_visible(False)
    assert bar.solids
    bar.solids.set(rasterized=True)
    return bar


def heat(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    text: str,
    color: str,
    vmax: float | None = None,
) -> Canvas:
    """A heat map of tokens (columns) against layers or heads (rows)."""
    figure, axes = canvas(lines=min(len(rows), 60) * 0.8 + 5)
    image = axes.imshow(values, aspect="auto", cmap=SHADES[color], vmin=0, vmax=vmax, interpolation="nearest")
    name_ticks(axes.xaxis, columns, 60, 90)
    name_ticks(axes.yaxis, rows, 40, 0)
    shade_bar(figure, image, axes, text)
    return figure
