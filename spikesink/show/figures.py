"""Figures of detect's findings: of a checkpoint, of a prompt, of checkpoints side by side, and over training."""

import itertools
import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from mpl_toolkits.mplot3d.art3d import Line3DCollection

from ..measure import history
from ..measure.calibrate import rules
from ..measure.examples import unpacked
from ..measure.findings import ExamplesEntry, Findings, HistoryRow, MatrixEntry, Measures, PromptFindings, PromptHead
from ..measure.sinks import HEAD_SHARE, PRIMARY_SINK_EPSILON
from ..measure.spikes import SPIKE_RATIO, SPIKE_RULES
from .drawing import GREY, INK, SHADES, SINK, SPIKE, Figure, canvas, label, log_ticks, measured_on, name_ticks, thinned
from .text import with_interval

AnyFindings = Findings | PromptFindings
Pairs = Sequence[tuple[str, Findings]]  # (short name, findings) of checkpoints side by side

# ---------------------------------------------------------------------------------- of a checkpoint: the stream


def examples_of(findings: AnyFindings) -> ExamplesEntry:
    """Returns the examples of findings that have some."""
    assert findings.examples
    return findings.examples


def largest_matrix(examples: ExamplesEntry) -> tuple[MatrixEntry, np.ndarray]:
    """Returns the matrix with the largest ratio of an entry to the median, and its values (T, bins)."""
    matrix = max(examples.matrices, key=lambda m: unpacked(m.values).max() / max(m.median, 1e-30))
    return matrix, unpacked(matrix.values)


def _matrix(findings: AnyFindings) -> Canvas:
    matrix, values = largest_matrix(examples_of(findings))
    starts = [int(start) for start in matrix.starts.split()]
    width, height = mpl.rcParams["figure.figsize"]
    figure = Canvas(figsize=(width, 1.25 * height))
    figure.set_layout_engine("none")
    axes: Any = figure.add_axes((0.0, 0.04, 0.93, 1.0), projection="3d", computed_zorder=False)
    lines = [[(x, t, z) for x, z in zip(starts, row, strict=True)] for t, row in enumerate(values.tolist())]
    spikes = examples_of(findings).sequences[0].spikes[: len(values)]
    colors = [SPIKE if spike else GREY for spike in spikes]
    axes.add_collection3d(Line3DCollection(lines[::-1], colors=colors[::-1], linewidths=0.7))
    last, top = matrix.n_channels - 1, float(values.max()) or 1
    axes.set(xlim=(0, last), ylim=(len(values) - 1, 0), zlim=(0, top), xlabel="channel", ylabel="position")
    axes.text(last, 0, 1.06 * top, "|h|", ha="center")  # a label of the axis would leave a narrow figure
    axes.set_box_aspect((1.5, 1, 0.8), zoom=1.0)
    axes.view_init(24, -55)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((0, 0, 0, 0))
        axis.line.set_color(GREY)
        axis._axinfo["grid"].update(color=(0.5, 0.5, 0.5, 0.25), linewidth=0.5)
    axes.tick_params(pad=-1)
    return figure


def _matrix_caption(findings: AnyFindings) -> str:
    matrix, values = largest_matrix(examples_of(findings))
    pooled = " A point is the largest of neighbouring channels." if values.shape[1] < matrix.n_channels else ""
    return (
        f"|h| of every token and channel after {matrix.layer} (median {matrix.median:.3g}), in the first {len(values)} "
        f"tokens of the first sequence.{pooled} Spike tokens are orange."
    )


def _magnitudes(findings: Findings) -> Canvas:
    figure, axes = canvas(height=1.3)
    layers = findings.layers
    for key, style in (("top1", "-o"), ("top2", "--"), ("top3", ":")):
        values = [getattr(layer, key) for layer in layers]
        axes.plot(values, style, color=SPIKE, markersize=2.5, label=f"top {key[3]}")
    axes.plot([layer.median for layer in layers], color=GREY, label="median")
    scale = "log" if any(layer.median > 0 for layer in layers) else "linear"
    axes.set(yscale=scale, ylabel="|h| in the residual stream")
    if scale == "log":
        log_ticks(axes.yaxis, [x for layer in layers for x in (layer.top1, layer.median)])
    name_ticks(axes.xaxis, [layer.name for layer in layers])
    figure.legend(ncols=4, loc="outside upper center")
    return figure


# ------------------------------------------------------------------------------------ of a checkpoint: attention


def _heads(findings: Findings) -> Canvas:
    sinks = findings.sinks
    panels = {"on the first key": sinks.at(PRIMARY_SINK_EPSILON).by_head, "on any key": sinks.any_sink_by_head}
    rows, heads = len(sinks.alpha_first), len(sinks.alpha_first[0])
    figure, pair = canvas(1, 2, lines=max(9, min(rows, 24) + 3), sharey=True)
    for axes, (title, values) in zip(pair, panels.items(), strict=True):
        image = axes.imshow(values, vmin=0, vmax=1, cmap=SHADES[SINK], aspect="auto", interpolation="nearest")
        axes.set(title=title, xlabel="head")
        name_ticks(axes.xaxis, range(heads), 8, 0)
        if rows * heads <= 36:
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    axes.text(j, i, f"{value:.0%}", ha="center", va="center")
        elif not any(map(any, values)):
            axes.text(0.5, 0.5, "0% in every head", transform=axes.transAxes, ha="center", va="center")
        for side in axes.spines.values():
            side.set(visible=True, color=GREY, linewidth=0.5)
    name_ticks(pair[0].yaxis, [seam.name for seam in sinks.seams], 24, 0)
    _shade_bar(figure, image, pair, "share of sequences")
    return figure


def _shade_bar(figure: Canvas, image: Any, axes: Axes, text: str) -> None:
    """Draws the colour bar of a shaded image."""
    bar = figure.colorbar(image, ax=axes, label=text)
    bar.outline.set_visible(False)
    assert bar.solids
    bar.solids.set(rasterized=True)


def _positions(findings: Findings) -> Canvas:
    sinks = findings.sinks
    T = len(sinks.share)
    figure, (top, bottom) = canvas(2, 1, height=1.5, sharex=True)
    marker = {"marker": "o", "markersize": 2} if T <= 128 else {}
    top.plot(*thinned(sinks.share), color=SINK, label="measured", **marker)
    top.plot(*thinned(sinks.share_uniform), "--", color=GREY, label="if every query spread it evenly")
    top.set(yscale="log", ylabel="share of all attention")
    top.legend()
    styles = itertools.chain(("-", "-", "--"), itertools.repeat(":"))
    for rates, style in zip(sinks.gu, styles, strict=False):
        main = rates.epsilon == PRIMARY_SINK_EPSILON
        color, width = (SINK, 1.6) if main else (INK, 0.8)
        bottom.plot(*thinned(rates.by_position), ls=style, color=color, lw=width, label=f"ε = {rates.epsilon}")
    if findings.causal:
        bottom.axvspan(0.75 * T, T - 1, color=GREY, alpha=0.15, lw=0)
    bottom.set(ylim=(-0.03, 1.03), xlabel="position of the key", ylabel="sink rate, share of heads")
    bottom.legend(ncols=2)
    return figure


def _positions_caption(findings: Findings) -> str:
    shaded = " Shaded: fewer than T/4 queries see these keys, so no verdict uses them." if findings.causal else ""
    return (
        "The attention that each position receives. Above: its share of all attention. Below: the share of heads in "
        f"which it is a sink by Gu et al.'s rule, which asks that the mean attention on it is above ε.{shaded}"
    )


# --------------------------------------------------------------------------------- of a checkpoint: the tokens


def best_layer(examples: ExamplesEntry) -> int:
    """Returns the index of the layer with the largest ratio of |h| to the median in the example sequences."""
    peaks = [unpacked(sequence.relative).max(1) for sequence in examples.sequences]
    return int(max(peaks, key=max).argmax())


def _text(findings: AnyFindings) -> Canvas:
    examples = examples_of(findings)
    sequence, layer = examples.sequences[0], best_layer(examples)
    relative = unpacked(sequence.relative)[layer]
    (width, _), size = mpl.rcParams["figure.figsize"], mpl.rcParams["font.size"]
    columns = int(width / (0.602 * size / 72)) - 1
    placed, x, line = [], 0.0, 0
    for text in sequence.texts:
        shown = label(text, 24)
        n = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in shown.replace(r"\$", "$"))  # columns
        if x + n > columns:
            x, line = 0.0, line + 1
        placed.append((shown, x, line, n))
        x += n + 0.4
    lines = line + 1
    figure = Canvas(figsize=(width, lines * 1.75 * size / 72))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.5, columns + 0.5), ylim=(lines, 0))
    axes.axis("off")
    for (shown, x, line, n), ratio, spike, sink, enough in zip(
        placed, relative, sequence.spikes, sequence.sink_heads, sequence.enough_queries, strict=True
    ):
        box = (x, line + 0.1), n, 0.72
        shade = min(1.0, math.log10(max(float(ratio), 1.0)) / 3)  # from 0 at a ratio of 1 to 1 at 1000 and more
        axes.add_patch(Rectangle(*box, lw=0, color=SHADES[SPIKE](shade)))
        if spike:
            axes.plot([x, x + n], [line + 0.9] * 2, color=SPIKE, lw=2, solid_capstyle="butt")
        if sink and enough:
            axes.add_patch(Rectangle(*box, fill=False, color=SINK, lw=1.2))
        axes.text(x + n / 2, line + 0.46, shown, family="monospace", ha="center", va="center")
    return figure


def _text_caption(findings: AnyFindings) -> str:
    examples = examples_of(findings)
    return (
        f"The first sequence. Colour: the token's largest |h| after {examples.layers[best_layer(examples)]}, divided "
        f"by that layer's median, from 1 (no colour) to 1000 (full), on a log scale. Underlined: a spike at any "
        f"layer. Boxed: a sink (alpha > {PRIMARY_SINK_EPSILON}) in at least one head."
    )


def _tokens(findings: Findings) -> Canvas:
    figure, panels = canvas(1, 2, height=1.1)
    spikes, sinks = findings.spikes.tokens[:10], findings.sinks.tokens[:10]
    names_of = lambda tokens: [f"{label(token.text, 10)} @{token.position}" for token in tokens]
    kinds = (
        (names_of(spikes), [token.magnitude for token in spikes], SPIKE, "largest |h|"),
        (names_of(sinks), [token.alpha for token in sinks], SINK, "largest alpha"),
    )
    for axes, (names, sizes, color, title) in zip(panels, kinds, strict=True):
        axes.barh(range(len(sizes)), sizes, color=color)
        axes.set_yticks(range(len(sizes)), names)
        axes.invert_yaxis()
        axes.set_xlabel(title)
    return figure


def _co_occurrence(findings: Findings) -> Canvas:
    overlap = findings.co_occurrence
    spikes, sinks, both = overlap.spike_tokens, overlap.sink_tokens, overlap.both
    figure, (top, bottom) = canvas(2, 1, height=1.2, height_ratios=(1, 1))
    counts = {"spike only": (spikes - both, SPIKE), "both": (both, INK), "sink only": (sinks - both, SINK)}
    for i, (n, color) in enumerate(counts.values()):
        top.barh(i, n, 0.6, color=color)
        top.annotate(f"{n:,}", (n, i), (4, 0), textcoords="offset points", va="center")
    expected = overlap.expected
    marks = {"marker": "D", "color": GREY, "markersize": 5, "ls": "", "markerfacecolor": "none"}
    top.plot(expected, 1.42, **marks, label="expected from positions alone")
    top.set_yticks(range(3), list(counts))
    top.set(xlabel="tokens", xlim=(0, 1.15 * max(1, spikes, sinks)), ylim=(2.5, -0.5))
    top.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    rates = {
        "P(sink | spike)": ("p_sink_given_spike", spikes, "no spike token"),
        "P(spike | sink)": ("p_spike_given_sink", sinks, "no sink token"),
        "Jaccard": ("jaccard", spikes + sinks - both, "neither kind of token"),
    }
    for i, (key, n, reason) in enumerate(rates.values()):
        if not n:
            bottom.text(0.02, i, f"undefined: {reason}", va="center", style="italic")
            continue
        if getattr(overlap.ci95, key):
            bottom.plot(getattr(overlap.ci95, key), [i, i], color=INK, lw=1.5)
        bottom.plot(getattr(overlap, key), i, "o", color=INK, markersize=4)
        bottom.plot(expected / (spikes + sinks - expected if key == "jaccard" else n), i + 0.3, **marks)
    bottom.set_yticks(range(3), list(rates))
    bottom.set(xlim=(-0.03, 1.03), ylim=(2.6, -0.5), xlabel="share of tokens, 95% interval")
    figure.legend(*top.get_legend_handles_labels(), loc="outside upper center")
    return figure


def _co_occurrence_caption(findings: Findings) -> str:
    overlap = findings.co_occurrence
    if math.isnan(overlap.lift):
        lift = "is undefined, since no position has both kinds"
    else:
        words = with_interval(overlap.lift, overlap.ci95.lift, ".2f")
        lift = f"is {words}, p {overlap.p_permutation:.2g}"
    return (
        f"Tokens that are spikes, sinks (alpha > {PRIMARY_SINK_EPSILON} in at least {HEAD_SHARE:.0%} of heads), or "
        f"both. The lift over a permutation of tokens at equal positions {lift}; 1 means that position alone explains "
        "the overlap."
    )


def _curve_style(name: str, color: str) -> dict[str, Any]:
    """Returns how to draw the line of this model in its colour, or that of a null, and its label."""
    shuffled = {"ls": ":", "color": INK, "label": "null: shuffled channels or positions"}
    styles: dict[str, dict[str, Any]] = {
        "this model": {"ls": "-", "marker": "o", "color": color, "label": "this model"},
        "init": {"ls": "--", "color": GREY, "label": "null: new random weights"},
        "shuffled_channels": shuffled,
        "shuffled_positions": shuffled,
    }
    return styles.get(name, {"ls": "-.", "color": GREY, "label": f"null: {name.replace('_', ' ')}"})


def _sensitivity(findings: Findings) -> Canvas:
    shown = [(rule, rule.curve) for rule in rules().values() if rule.curve and rule.curve.name in findings.sensitivity]
    figure, panels = canvas(1, len(shown), height=0.95, sharey=True)
    curves = {"this model": findings.sensitivity}
    curves |= {name: null.curves for name, null in findings.nulls.items() if isinstance(null, Measures)}
    for axes, (rule, curve) in zip(panels, shown, strict=True):
        color = SPIKE if rule in SPIKE_RULES.values() else SINK
        place: Callable[[float], Any] = str if curve.scale == "even" else float
        for name in ("this model", *(null for null in rule.nulls if null in curves)):
            points, style = curves[name][curve.name], _curve_style(name, color)
            axes.plot([place(p.at) for p in points], [getattr(p, curve.key) for p in points], markersize=2.5, **style)
        axes.set(ylim=(-0.03, 1.03), xlabel=curve.title)
        if curve.scale == "log":
            axes.set_xscale("log")
            log_ticks(axes.xaxis, [1, 100])
        if curve.scale == "even":
            axes.tick_params(axis="x", rotation=40)
        axes.axvline(place(curve.used), color=GREY, lw=0.8)
    panels[0].set_ylabel("share of sequences")
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    figure.legend(handles=list(handles.values()), ncols=3, loc="outside upper left")
    return figure


def _path(findings: Findings) -> Canvas:
    anatomy = findings.anatomy
    assert anatomy
    figure, axes = canvas()
    for (channel, values), color in zip(anatomy.path.items(), (SPIKE, SINK, GREY), strict=False):
        axes.plot(values, "-o", color=color, markersize=2.5, label=f"channel {channel}")
    for step, word in ((anatomy.step_up, "step-up"), (anatomy.step_down, "step-down")):
        if step:
            axes.axvline(step.index, color=GREY, lw=0.8, ls="--")
            at = {"xycoords": ("data", "axes fraction"), "xytext": (0, 2), "textcoords": "offset points"}
            axes.annotate(word, (step.index, 1), **at, color=GREY, ha="center", va="bottom")
    name_ticks(axes.xaxis, [layer.name for layer in findings.layers])
    axes.set_ylabel("h, mean over the tokens")
    figure.legend(ncols=3, loc="outside upper center")
    return figure


def _path_caption(findings: Findings) -> str:
    tokens = "spike tokens" if findings.spikes.primary_rule.tokens else "largest tokens (none is a spike)"
    return (
        f"The channels that the {tokens} share, sub-layer by sub-layer. Step-up: the sub-layer that adds the most. "
        "Step-down: the sub-layer that takes it away again, if there is any."
    )


def _history(rows: Sequence[HistoryRow]) -> Canvas:
    colours = {"ratio": SPIKE, "kurtosis": SPIKE, "sink_rate": SINK}
    figure, panels = canvas(len(history.COLUMNS), 1, height=2.2, sharex=True)
    steps = [row.step for row in rows]
    for axes, (key, (title, _)) in zip(panels, history.COLUMNS.items(), strict=True):
        values = [math.nan if getattr(row, key) is None else getattr(row, key) for row in rows]
        axes.plot(steps, values, "-o", color=colours.get(key, INK), markersize=2.5)
        axes.set_ylabel(title)
        if key in ("sink_rate", "p_sink_given_spike"):
            axes.set_ylim(-0.05, 1.05)
        if all(map(math.isnan, values)):
            axes.text(0.5, 0.5, "undefined at every step", transform=axes.transAxes, ha="center", va="center")
        if key == "ratio":
            axes.set_yscale("log")
            log_ticks(axes.yaxis, [*values, SPIKE_RATIO])
            axes.axhline(SPIKE_RATIO, color=GREY, lw=0.8, ls="--")
    later = [step for step in steps if step]
    if len(later) > 2 and max(later) > 30 * min(later):
        if 0 in steps:
            panels[-1].set_xscale("symlog", linthresh=min(later))
            panels[-1].set_xlim(left=-0.05 * min(later))
        else:
            panels[-1].set_xscale("log")
    panels[-1].set_xlabel("training step")
    figure.align_ylabels(panels)
    return figure


def _history_caption(rows: Sequence[HistoryRow]) -> str:
    columns = "; ".join(f"{title}: {text}" for title, text in history.COLUMNS.values())
    return (
        f"Over training, steps {rows[0].step:,} to {rows[-1].step:,} ({len(rows)} points). {columns}. Dashed: the "
        f"spike rule asks for at least {SPIKE_RATIO:g} x the median."
    )


def _history_figure(rows_of: Callable[[Any], Sequence[HistoryRow]]) -> Figure:
    """Returns the figure of the steps that some findings have."""
    return Figure(
        lambda findings: _history(rows_of(findings)),
        lambda findings: _history_caption(rows_of(findings)),
        is_drawable=lambda findings: len(rows_of(findings)) > 1,
    )


def _prompt_magnitudes(findings: PromptFindings) -> Canvas:
    relative = [
        [math.log10(max(x / max(median, 1e-30), 1.0)) for x in row]
        for row, median in zip(findings.magnitudes, findings.medians, strict=True)
    ]
    return _heat(findings, relative, findings.layers, "log10 of |h| / median", SPIKE)


def _strongest_heads(findings: PromptFindings) -> list[PromptHead]:
    names = {head.head for head in sorted(findings.heads, key=lambda head: -max(head.alpha))[:40]}
    return [head for head in findings.heads if head.head in names]


def _prompt_received(findings: PromptFindings) -> Canvas:
    heads = _strongest_heads(findings)
    return _heat(findings, [head.alpha for head in heads], [head.head for head in heads], "alpha", SINK, 1)


def _heat(
    findings: PromptFindings, values: Any, rows: list[str], text: str, color: str, vmax: float | None = None
) -> Canvas:
    """Draws a heat map of tokens (columns) against layers or heads (rows)."""
    figure, axes = canvas(lines=min(len(rows), 60) * 0.8 + 5)
    image = axes.imshow(values, aspect="auto", cmap=SHADES[color], vmin=0, vmax=vmax, interpolation="nearest")
    name_ticks(axes.xaxis, [label(token.text) for token in findings.tokens], 60, 90)
    name_ticks(axes.yaxis, rows, 40, 0)
    _shade_bar(figure, image, axes, text)
    return figure


def _comparison(pairs: Pairs) -> Canvas:
    figure, (top, bottom) = canvas(2, 1, height=1.9)
    shades = mpl.colormaps["viridis"]
    use_shades = len(pairs) > 8 or bool(_pairs_history(pairs))
    for i, (name, findings) in enumerate(pairs):
        color = shades(0.3 + 0.45 * i / max(1, len(pairs) - 1)) if use_shades else f"C{i}"
        ratios, rates = [layer.ratio for layer in findings.layers], findings.sinks.at(PRIMARY_SINK_EPSILON).by_layer
        for axes, values in ((top, ratios), (bottom, rates)):
            depth = [j / max(1, len(values) - 1) for j in range(len(values))]
            axes.plot(depth, values, "-o", markersize=2.5, color=color, label=label(name, 40))
    top.set(yscale="log", ylabel="largest |h| / median")
    log_ticks(top.yaxis, [SPIKE_RATIO, *(layer.ratio for _, findings in pairs for layer in findings.layers)])
    top.axhline(SPIKE_RATIO, color=GREY, lw=0.8, ls="--")
    bottom.set(ylim=(-0.03, 1.03), ylabel="sink rate, share of heads")
    bottom.set_xlabel("depth: 0 first layer, 1 last")
    longest = max(len(name) for name, _ in pairs)
    ncols = max(1, min(len(pairs), 48 // (longest + 5)))
    figure.legend(*top.get_legend_handles_labels(), ncols=ncols, loc="outside lower center")
    return figure


def _pairs_history(pairs: Pairs) -> list[HistoryRow]:
    return history.findings_rows([findings for _, findings in pairs])


DETECTION = {
    "matrix": Figure(_matrix, _matrix_caption, is_drawable=lambda f: f.examples and f.examples.matrices),
    "magnitudes": Figure(
        _magnitudes,
        "The three largest |h| in a sequence and its median, after each sub-layer; means over the sequences.",
        measured=True,
    ),
    "heads": Figure(
        _heads,
        "Sinks, head by head: the share of sequences in which the first key (left), or any key that at least T/4 "
        f"queries see (right), has alpha > {PRIMARY_SINK_EPSILON}.",
        measured=True,
    ),
    "positions": Figure(_positions, _positions_caption, measured=True),
    "text": Figure(_text, _text_caption, wide=True, is_drawable=lambda f: f.examples and f.examples.sequences),
    "co_occurrence": Figure(_co_occurrence, _co_occurrence_caption, measured=True),
    "tokens": Figure(
        _tokens,
        "The tokens with the largest |h|, and those that get the most attention in one head. @ gives the position.",
        measured=True,
    ),
    "path": Figure(_path, _path_caption, is_drawable=lambda findings: findings.anatomy),
    "sensitivity": Figure(
        _sensitivity,
        "How the findings depend on their thresholds; a vertical line marks the threshold that is used. Keys that "
        "fewer than T/4 queries see never count.",
        wide=True,
        is_drawable=lambda findings: findings.nulls,
        measured=True,
    ),
    "history": _history_figure(lambda findings: findings.history or ()),
}
PROMPT = {
    "matrix": DETECTION["matrix"],
    "text": DETECTION["text"],
    "magnitudes": Figure(
        _prompt_magnitudes,
        "The largest |h| of each token, divided by the layer's median, after each sub-layer; log scale.",
        wide=True,
    ),
    "received": Figure(
        _prompt_received,
        lambda findings: (
            "The attention that each token receives (alpha: the mean over the queries that can see it), in the "
            f"{len(_strongest_heads(findings))} heads in which some token receives the most."
        ),
        wide=True,
    ),
}
COMPARISON = {
    "comparison": Figure(
        _comparison,
        lambda pairs: (
            "Above: the largest |h| divided by the median, through the layers; dashed: the spike rule. Below: the "
            f"share of heads in which the first key is a sink, alpha > {PRIMARY_SINK_EPSILON}."
            + measured_on(pairs[0][1])
        ),
    ),
    "history": _history_figure(_pairs_history),
}
