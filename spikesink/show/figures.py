"""The figures of what detect.py finds: of a checkpoint, of a prompt, of checkpoints side by side, and over training."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from mpl_toolkits.mplot3d.art3d import Line3DCollection

from ..measure import history
from ..measure.calibrate import rules
from ..measure.examples import unpacked
from ..measure.findings import (
    CurvePoint,
    ExamplesEntry,
    Findings,
    HistoryRow,
    MatrixEntry,
    Measures,
    PromptFindings,
    PromptHead,
    TokenRow,
)
from ..measure.sinks import HEAD_SHARE, PRIMARY_SINK_EPSILON
from ..measure.spikes import SPIKE_RATIO, SPIKE_RULES
from .drawing import (
    GREY,
    INK,
    SHADES,
    SINK,
    SPIKE,
    Figure,
    canvas,
    columns_of,
    heat,
    label,
    log_ticks,
    name_ticks,
    shade_bar,
    thinned,
)
from .text import number, on_text

Found = Findings | PromptFindings
Pairs = Sequence[tuple[str, Findings]]  # (short name, findings) of checkpoints side by side

# ---------------------------------------------------------------------------------- of a checkpoint: the stream


def examples_of(found: Found) -> ExamplesEntry:
    """The examples of findings that have some."""
    assert found.examples
    return found.examples


def largest_matrix(examples: ExamplesEntry) -> tuple[MatrixEntry, np.ndarray]:
    """The kept matrix with the largest ratio, and its values (T, bins)."""
    of = max(examples.matrices, key=lambda matrix: unpacked(matrix.values).max() / max(matrix.median, 1e-30))
    return of, unpacked(of.values)


def _matrix(found: Found) -> Canvas:
    of, values = largest_matrix(examples_of(found))
    starts = [int(start) for start in of.starts.split()]
    width, height = mpl.rcParams["figure.figsize"]
    figure = Canvas(figsize=(width, 1.25 * height))
    figure.set_layout_engine("none")
    axes: Any = figure.add_axes((0.0, 0.04, 0.93, 1.0), projection="3d", computed_zorder=False)
    lines = [[(x, t, z) for x, z in zip(starts, row, strict=True)] for t, row in enumerate(values.tolist())]
    spikes = examples_of(found).sequences[0].spikes[: len(values)]
    colors = [SPIKE if spike else GREY for spike in spikes]
    axes.add_collection3d(Line3DCollection(lines[::-1], colors=colors[::-1], linewidths=0.7))
    axes.set(xlim=(0, of.n_channels - 1), ylim=(len(values) - 1, 0), zlim=(0, float(values.max()) or 1))
    axes.set(xlabel="channel", ylabel="position", zlabel="|h|")
    axes.set_box_aspect((1.5, 1, 0.8), zoom=1.0)
    axes.view_init(24, -55)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((0, 0, 0, 0))
        axis.line.set_color(GREY)
        axis._axinfo["grid"].update(color=(0.5, 0.5, 0.5, 0.25), linewidth=0.5)
    axes.tick_params(pad=-1)
    return figure


def _matrix_caption(found: Found) -> str:
    of, values = largest_matrix(examples_of(found))
    pooled = ", neighbouring channels by their largest" if values.shape[1] < of.n_channels else ""
    return (
        f"|h| of every token and channel after {of.layer} (median {of.median:.3g}), in the first {len(values)} "
        f"tokens of the first sequence{pooled}. Coloured: spike tokens."
    )


def _magnitudes(found: Findings) -> Canvas:
    figure, axes = canvas(height=1.3)
    layers = found.layers
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


def _heads(found: Findings) -> Canvas:
    sinks = found.sinks
    panels = {"on the first key": sinks.at(PRIMARY_SINK_EPSILON).by_head, "on any key": sinks.any_sink_by_head}
    rows, heads = len(sinks.alpha_first), len(sinks.alpha_first[0])
    figure, both = canvas(1, 2, lines=max(9, min(rows, 24) + 3), sharey=True)
    for axes, (title, values) in zip(both, panels.items(), strict=True):
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
    name_ticks(both[0].yaxis, [seam.name for seam in sinks.seams], 24, 0)
    shade_bar(figure, image, both, "share of sequences")
    return figure


def _positions(found: Findings) -> Canvas:
    sinks = found.sinks
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
    if found.causal:
        bottom.axvspan(0.75 * T, T - 1, color=GREY, alpha=0.15, lw=0)
    bottom.set(ylim=(-0.03, 1.03), xlabel="position of the key", ylabel="sink rate, share of heads")
    bottom.legend(ncols=2)
    return figure


def _positions_caption(found: Findings) -> str:
    shaded = " Shaded: fewer than T/4 queries see the key, so no verdict rests there." if found.causal else ""
    return (
        "Attention received by position. Above: share of all attention. Below: share of heads in which the key is a "
        f"sink by Gu et al.'s rule, its mean attention above ε.{shaded}"
    )


# --------------------------------------------------------------------------------- of a checkpoint: the tokens


def best_layer(examples: ExamplesEntry) -> int:
    """The layer (its number) with the largest ratio in the sequences that are kept."""
    peaks = [unpacked(sequence.relative).max(1) for sequence in examples.sequences]
    return int(max(peaks, key=max).argmax())


def _text(found: Found) -> Canvas:
    examples = examples_of(found)
    sequence, layer = examples.sequences[0], best_layer(examples)
    relative = unpacked(sequence.relative)[layer]
    (width, _), size = mpl.rcParams["figure.figsize"], mpl.rcParams["font.size"]
    columns = int(width / (0.602 * size / 72)) - 1
    placed, x, line = [], 0.0, 0
    for text in sequence.texts:
        shown = label(text, 24)
        n = columns_of(shown.replace(r"\$", "$"))
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
        axes.add_patch(Rectangle(*box, lw=0, color=SHADES[SPIKE](_log_share(ratio))))
        if spike:
            axes.plot([x, x + n], [line + 0.9] * 2, color=SPIKE, lw=2, solid_capstyle="butt")
        if sink and enough:
            axes.add_patch(Rectangle(*box, fill=False, color=SINK, lw=1.2))
        axes.text(x + n / 2, line + 0.46, shown, family="monospace", ha="center", va="center")
    return figure


def _log_share(ratio: float) -> float:
    """Where a ratio to the median lies between 1 and 1000, on a log scale: 0 to 1."""
    return min(1.0, math.log10(max(float(ratio), 1.0)) / 3)


def _text_caption(found: Found) -> str:
    examples = examples_of(found)
    return (
        f"The first sequence. Colour: the token's largest |h| after {examples.layers[best_layer(examples)]} over "
        f"that layer's median, from 1 (none) to 1000 (full), on a log scale. Underlined: a spike, at any "
        f"layer. Boxed: a sink (alpha > {PRIMARY_SINK_EPSILON} in at least one head)."
    )


def _tokens(found: Findings) -> Canvas:
    figure, panels = canvas(1, 2, height=1.1)
    of_kinds: tuple[tuple[Sequence[TokenRow], str, str, str], ...] = (
        (found.spikes.tokens, "magnitude", SPIKE, "largest |h|"),
        (found.sinks.tokens, "alpha", SINK, "alpha, best head"),
    )
    for axes, (tokens, key, color, title) in zip(panels, of_kinds, strict=True):
        top = tokens[:10]
        axes.barh(range(len(top)), [getattr(token, key) for token in top], color=color)
        names = [f"{label(token.text, 10)} @{token.position}" for token in top]
        axes.set_yticks(range(len(top)), names)
        axes.invert_yaxis()
        axes.set_xlabel(title)
    return figure


def _co_occurrence(found: Findings) -> Canvas:
    of = found.co_occurrence
    spikes, sinks, both = of.spike_tokens, of.sink_tokens, of.both
    figure, (top, bottom) = canvas(2, 1, height=1.2, height_ratios=(1, 1))
    counts = {"spike only": (spikes - both, SPIKE), "both": (both, INK), "sink only": (sinks - both, SINK)}
    for i, (n, color) in enumerate(counts.values()):
        top.barh(i, n, 0.6, color=color)
        top.annotate(f"{n:,}", (n, i), (4, 0), textcoords="offset points", va="center")
    expected = of.expected
    marks = {"marker": "D", "color": GREY, "markersize": 5, "ls": "", "markerfacecolor": "none"}
    chance = "expected from positions alone"
    top.plot(expected, 1.42, **marks, label=chance)
    top.set_yticks(range(3), list(counts))
    top.set(xlabel="tokens", xlim=(0, 1.15 * max(1, spikes, sinks)), ylim=(2.5, -0.5))
    top.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    rates = {
        "P(sink | spike)": ("p_sink_given_spike", spikes, "no spike token"),
        "P(spike | sink)": ("p_spike_given_sink", sinks, "no sink token"),
        "Jaccard": ("jaccard", spikes + sinks - both, "neither"),
    }
    for i, (key, n, none) in enumerate(rates.values()):
        if not n:
            bottom.text(0.02, i, f"undefined: {none}", va="center", style="italic")
            continue
        if getattr(of.ci95, key):
            bottom.plot(getattr(of.ci95, key), [i, i], color=INK, lw=1.5)
        bottom.plot(getattr(of, key), i, "o", color=INK, markersize=4)
        bottom.plot(expected / (spikes + sinks - expected if key == "jaccard" else n), i + 0.3, **marks)
    bottom.set_yticks(range(3), list(rates))
    bottom.set(xlim=(-0.03, 1.03), ylim=(2.6, -0.5), xlabel="share of tokens, 95% interval")
    figure.legend(*top.get_legend_handles_labels(), loc="outside upper center")
    return figure


def _co_occurrence_caption(found: Findings) -> str:
    of = found.co_occurrence
    if math.isnan(of.lift):
        lift = "undefined: no position has both kinds"
    else:
        ci = of.ci95.lift
        within = f" [{number(ci[0], '.2f')}, {number(ci[1], '.2f')}]" if ci else ""
        lift = f"{of.lift:.2f}{within}, p {of.p_permutation:.2g}"
    return (
        f"Tokens that are spikes, sinks (alpha > {PRIMARY_SINK_EPSILON} in at least {HEAD_SHARE:.0%} of heads), or "
        f"both. Lift over the permutation among equal positions: {lift}; 1 means that position alone explains the "
        "overlap."
    )


def _null_style(name: str) -> dict[str, Any]:
    """How a null is drawn, and what its line is called."""
    shuffled = {"ls": ":", "color": INK, "label": "null: shuffled channels or positions"}
    styles: dict[str, dict[str, Any]] = {
        "init": {"ls": "--", "color": GREY, "label": "null: new random weights"},
        "shuffled_channels": shuffled,
        "shuffled_positions": shuffled,
    }
    return styles.get(name, {"ls": "-.", "color": GREY, "label": f"null: {name.replace('_', ' ')}"})


def _sensitivity(found: Findings) -> Canvas:
    shown = [(rule, rule.curve) for rule in rules().values() if rule.curve and rule.curve.name in found.sensitivity]
    figure, panels = canvas(1, len(shown), height=0.95, sharey=True)
    nulls = {name: of.curves for name, of in found.nulls.items() if isinstance(of, Measures)}
    for axes, (rule, curve) in zip(panels, shown, strict=True):
        color = SPIKE if rule in SPIKE_RULES.values() else SINK
        lines: list[tuple[dict[str, list[CurvePoint]], dict[str, Any]]] = [
            (found.sensitivity, {"ls": "-", "marker": "o", "color": color, "label": "this model"})
        ]
        lines += [(nulls[name], _null_style(name)) for name in rule.nulls if name in nulls]
        place: Callable[[float], Any] = str if curve.scale == "even" else float
        for curves, style in lines:
            points = curves[curve.name]
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


def _path(found: Findings) -> Canvas:
    anatomy = found.anatomy
    assert anatomy
    figure, axes = canvas()
    for (channel, values), color in zip(anatomy.path.items(), (SPIKE, SINK, GREY), strict=False):
        axes.plot(values, "-o", color=color, markersize=2.5, label=f"channel {channel}")
    for step, word in ((anatomy.step_up, "step-up"), (anatomy.step_down, "step-down")):
        if step:
            axes.axvline(step.index, color=GREY, lw=0.8, ls="--")
            at = {"xycoords": ("data", "axes fraction"), "xytext": (0, 2), "textcoords": "offset points"}
            axes.annotate(word, (step.index, 1), **at, color=GREY, ha="center", va="bottom")
    name_ticks(axes.xaxis, [layer.name for layer in found.layers])
    axes.set_ylabel("h, mean over the tokens")
    figure.legend(ncols=3, loc="outside upper center")
    return figure


def _path_caption(found: Findings) -> str:
    whose = "spike tokens" if found.spikes.primary_rule.tokens else "largest tokens (none is a spike)"
    return (
        f"The channels that the {whose} share, sub-layer by sub-layer. Step-up: the sub-layer that adds most; "
        "step-down: the one that takes it away again, if any does."
    )


# ------------------------------------------------------------------------------------------------ over training


def _history(rows: Sequence[HistoryRow]) -> Canvas:
    colours = {"ratio": SPIKE, "kurtosis": SPIKE, "sink_rate": SINK}
    figure, axes_of = canvas(len(history.COLUMNS), 1, height=2.2, sharex=True)
    steps = [row.step for row in rows]
    for axes, (key, (title, _)) in zip(axes_of, history.COLUMNS.items(), strict=True):
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
            axes_of[-1].set_xscale("symlog", linthresh=min(later))
            axes_of[-1].set_xlim(left=-0.05 * min(later))
        else:
            axes_of[-1].set_xscale("log")
    axes_of[-1].set_xlabel("training step")
    figure.align_ylabels(axes_of)
    return figure


def _history_caption(rows: Sequence[HistoryRow]) -> str:
    said = "; ".join(f"{title}: {text}" for title, text in history.COLUMNS.values())
    return (
        f"Over training, steps {rows[0].step:,} to {rows[-1].step:,} ({len(rows)} points). {said}. Dashed: the "
        f"first part of the spike rule, {SPIKE_RATIO:g} x the median."
    )


HISTORY = Figure(_history, _history_caption, needs=lambda rows: len(rows) > 1)


# ------------------------------------------------------------------------------------------------ of a prompt


def _prompt_magnitudes(found: PromptFindings) -> Canvas:
    relative = [
        [math.log10(max(x / max(median, 1e-30), 1.0)) for x in row]
        for row, median in zip(found.magnitudes, found.medians, strict=True)
    ]
    return heat(relative, found.layers, [label(token.text) for token in found.tokens], "log10 of |h| / median", SPIKE)


def _strongest_heads(found: PromptFindings) -> list[PromptHead]:
    kept = {head.head for head in sorted(found.heads, key=lambda head: -max(head.alpha))[:40]}
    return [head for head in found.heads if head.head in kept]


def _prompt_received(found: PromptFindings) -> Canvas:
    heads, texts = _strongest_heads(found), [label(token.text) for token in found.tokens]
    return heat([head.alpha for head in heads], [head.head for head in heads], texts, "alpha", SINK, 1)


# ------------------------------------------------------------------------------------------------- side by side


def _comparison(pairs: Pairs) -> Canvas:
    figure, (top, bottom) = canvas(2, 1, height=1.9)
    shades = mpl.colormaps["viridis"]
    many = len(pairs) > 8 or bool(history.findings_rows([found for _, found in pairs]))
    for i, (name, found) in enumerate(pairs):
        color = shades(0.3 + 0.45 * i / max(1, len(pairs) - 1)) if many else f"C{i}"
        ratios, rates = [layer.ratio for layer in found.layers], found.sinks.at(PRIMARY_SINK_EPSILON).by_layer
        for axes, values in ((top, ratios), (bottom, rates)):
            depth = [j / max(1, len(values) - 1) for j in range(len(values))]
            axes.plot(depth, values, "-o", markersize=2.5, color=color, label=label(name, 40))
    top.set(yscale="log", ylabel="largest |h| / median")
    log_ticks(top.yaxis, [SPIKE_RATIO, *(layer.ratio for _, found in pairs for layer in found.layers)])
    top.axhline(SPIKE_RATIO, color=GREY, lw=0.8, ls="--")
    bottom.set(ylim=(-0.03, 1.03), ylabel="sink rate, share of heads")
    bottom.set_xlabel("depth: 0 first layer, 1 last")
    longest = max(len(name) for name, _ in pairs)
    ncols = max(1, min(len(pairs), 48 // (longest + 5)))
    figure.legend(*top.get_legend_handles_labels(), ncols=ncols, loc="outside lower center")
    return figure


# --------------------------------------------------------------------------------------------------- the tables

on_this = lambda found: f" Measured on {on_text(found.data)}."
DETECTION = {
    "matrix": Figure(_matrix, _matrix_caption, needs=lambda found: found.examples and found.examples.matrices),
    "magnitudes": Figure(
        _magnitudes,
        lambda found: (
            "The three largest |h| of a sequence against its median, after each sub-layer; means." + on_this(found)
        ),
    ),
    "heads": Figure(
        _heads,
        lambda found: (
            f"Sinks, head by head: share of sequences in which the first key, or any key that at least T/4 queries "
            f"see, has alpha > {PRIMARY_SINK_EPSILON}." + on_this(found)
        ),
    ),
    "positions": Figure(_positions, lambda found: _positions_caption(found) + on_this(found)),
    "text": Figure(_text, _text_caption, wide=True, needs=lambda found: found.examples and found.examples.sequences),
    "co_occurrence": Figure(_co_occurrence, lambda found: _co_occurrence_caption(found) + on_this(found)),
    "tokens": Figure(
        _tokens,
        lambda found: (
            "The tokens with the largest |h|, and with most attention in one head, @ position." + on_this(found)
        ),
    ),
    "path": Figure(_path, _path_caption, needs=lambda found: found.anatomy),
    "sensitivity": Figure(
        _sensitivity,
        lambda found: (
            "How the findings change with their thresholds; a line marks the one that is used. Keys with fewer than "
            "T/4 queries never count." + on_this(found)
        ),
        wide=True,
        needs=lambda found: found.nulls,
    ),
    "history": Figure(
        lambda found: _history(found.history),
        lambda found: _history_caption(found.history),
        needs=lambda found: HISTORY.needs(found.history or ()),
    ),
}
PROMPT = {
    "matrix": DETECTION["matrix"],
    "text": DETECTION["text"],
    "magnitudes": Figure(
        _prompt_magnitudes,
        lambda found: "The largest |h| of each token over the layer's median, after each sub-layer, on a log scale.",
        wide=True,
    ),
    "received": Figure(
        _prompt_received,
        lambda found: (
            f"Attention received (alpha: the mean over the queries that see the token) in the "
            f"{len(_strongest_heads(found))} heads where some token has most."
        ),
        wide=True,
    ),
}
of_pairs = lambda pairs: history.findings_rows([found for _, found in pairs])
COMPARISON = {
    "comparison": Figure(
        _comparison,
        lambda pairs: (
            "Above: largest |h| over the median, through the layers; dashed: the spike rule. Below: sink rate of the "
            f"first key, alpha > {PRIMARY_SINK_EPSILON}." + on_this(pairs[0][1])
        ),
    ),
    "history": Figure(
        lambda pairs: _history(of_pairs(pairs)),
        lambda pairs: _history_caption(of_pairs(pairs)),
        needs=lambda pairs: HISTORY.needs(of_pairs(pairs)),
    ),
}
