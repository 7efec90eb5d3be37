"""The figures of a study: the arms with their seeds and intervals, the course over training, spikes against sinks."""

from typing import Any

import matplotlib as mpl

from spikesink.measure.spikes import SPIKE_RATIO
from spikesink.show.drawing import GREY, INK, SINK, SPIKE, Figure, canvas, label, log_ticks
from studies.aggregate import MIN_SEEDS, known
from studies.runs.measures import measure_of
from studies.table import Arm, Table
from studies.tables import INT8

PANELS = {"loss": INK, "top1/median": SPIKE, "Sink_1": SINK, "P(sink | spike)": INK}
SHADES = mpl.colormaps["tab10"]


def _done_arms(table: Table) -> dict[str, Arm]:
    return {name: arm for name, arm in table.arms.items() if arm.done}


def _known(arm: Arm, name: str) -> list[float]:
    """The numbers of a measure, of all runs that have it."""
    return known(row.measures[name] for row in arm.ended.values())


def _arms(table: Table) -> Any:
    arms = _done_arms(table)
    names = [*PANELS, *(name for name in INT8 if name in table.base.measures)]
    figure, panels = canvas(1, len(names), lines=1.6 * len(arms) + 2, sharey=True)
    for axes, name in zip(panels, names, strict=True):
        color = PANELS.get(name, SPIKE)
        for i, arm in enumerate(arms.values()):
            result, values = arm.measures[name], _known(arm, name)
            axes.plot(values, [i] * len(values), "o", color=color, markersize=3, alpha=0.45, lw=0)
            if result.ci95:
                axes.plot(result.ci95, [i + 0.28] * 2, color=color, lw=1.5)
                axes.plot(result.middle, i + 0.28, "D", color=color, markersize=3.5)
        axes.set(xlabel=name)
        if not any(arm.measures[name].n for arm in arms.values()):
            axes.text(0.5, 0.5, "undefined", transform=axes.transAxes, ha="center", va="center", style="italic")
        if measure_of(name).kind == "log":
            axes.set_xscale("log")
            log_ticks(axes.xaxis, [x for arm in arms.values() for x in _known(arm, name)])
            axes.axvline(SPIKE_RATIO, color=GREY, lw=0.8, ls="--")
        if measure_of(name).kind == "share":
            axes.set(xlim=(-0.04, 1.04), xticks=(0, 0.5, 1))
    panels[0].set_yticks(range(len(arms)), [label(name, 20) for name in arms])
    panels[0].set_ylim(len(arms) - 0.4, -0.6)
    return figure


def _course(table: Table) -> Any:
    arms = _done_arms(table)
    names = ("loss", "top1/median", "Sink_1", "P(sink | spike)")
    figure, panels = canvas(len(names), 1, height=2.4, sharex=True)
    for axes, name in zip(panels, names, strict=True):
        for i, (arm_name, arm) in enumerate(arms.items()):
            for j, row in enumerate(arm.ended.values()):
                points = [point for point in row.course if point.measures[name] is not None]
                x, y = [point.tokens / 1e6 for point in points], [point.measures[name] for point in points]
                text = "" if j else label(arm_name, 24)
                axes.plot(x, y, "-o", color=SHADES(i % 10), lw=1, markersize=2, label=text)
        axes.set_ylabel(name)
        if not axes.lines:
            axes.text(0.5, 0.5, "undefined at every step", transform=axes.transAxes, ha="center", va="center")
        if measure_of(name).kind == "log":
            axes.set_yscale("log")
            log_ticks(axes.yaxis, [SPIKE_RATIO, *(y for line in axes.lines for y in line.get_ydata())])
            axes.axhline(SPIKE_RATIO, color=GREY, lw=0.8, ls="--")
        if measure_of(name).kind == "share":
            axes.set_ylim(-0.05, 1.05)
    panels[-1].set_xlabel("tokens, M")
    figure.align_ylabels(panels)
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return figure


def _plane(table: Table) -> Any:
    figure, axes = canvas(height=1.3)
    for i, (name, arm) in enumerate(_done_arms(table).items()):
        rows = arm.ended.values()
        points = [(row.measures["top1/median"], row.measures["best head"]) for row in rows]
        axes.plot(*zip(*points, strict=True), "o", color=SHADES(i % 10), markersize=5, alpha=0.7, label=label(name, 24))
    axes.set(xscale="log", xlabel="top-1 / median of the layer where it is largest", ylim=(-0.04, 1.04))
    log_ticks(axes.xaxis, [SPIKE_RATIO, *(x for line in axes.lines for x in line.get_xdata())])
    axes.set_ylabel("sequences with a sink\nin the best head")
    axes.axvline(SPIKE_RATIO, color=GREY, lw=0.8, ls="--")
    figure.legend(ncols=3, loc="outside lower center")
    return figure


def _conditions(table: Table) -> str:
    measured = table.measured
    return f" Measured on {measured.n_seq} sequences of {measured.seq_len} tokens of {table.config['dataset']}."


STUDY = {
    "arms": Figure(
        _arms,
        lambda table: (
            f"Every arm at the end of training, with a circle for each seed. From {MIN_SEEDS} seeds on, the median and "
            f"its 95% interval are below the circles. Dashed: the spike rule, {SPIKE_RATIO:g} x the median."
            + _conditions(table)
        ),
        wide=True,
        is_drawable=_done_arms,
    ),
    "course": Figure(
        _course,
        lambda table: "The course over training, with a line for each seed." + _conditions(table),
        is_drawable=_done_arms,
    ),
    "plane": Figure(
        _plane,
        lambda table: (
            "Do spikes and sinks come together? Each point is a run. Dashed: the spike rule. Best head: the share of "
            "sequences in which one and the same head has a sink." + _conditions(table)
        ),
        is_drawable=_done_arms,
    ),
}
