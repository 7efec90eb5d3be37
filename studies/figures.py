"""A study's page, and its figures: the arms with their intervals, the course over training, spikes against sinks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

from spikesink.measure.spikes import SPIKE_RATIO
from spikesink.show import page
from spikesink.show.drawing import GREY, INK, SINK, SPIKE, Figure, canvas, for_page, label, log_ticks
from studies import hypotheses, tables
from studies.aggregate import MIN_SEEDS
from studies.runs.measures import measure_of
from studies.table import Arm, Table

PANELS = {"loss": INK, "top1/median": SPIKE, "Sink_1": SINK, "P(sink | spike)": INK}
SHADES = mpl.colormaps["tab10"]


def _done_arms(table: Table) -> dict[str, Arm]:
    return {name: arm for name, arm in table.arms.items() if arm.done}


def _arms(table: Table) -> Any:
    arms = _done_arms(table)
    names = [*PANELS, *(name for name in tables.INT8 if name in table.base.measures)]
    figure, panels = canvas(1, len(names), lines=1.6 * len(arms) + 2, sharey=True)
    for axes, name in zip(panels, names, strict=True):
        color = PANELS.get(name, SPIKE)
        for i, arm in enumerate(arms.values()):
            result = arm.measures[name]
            axes.plot(result.values, [i] * result.n, "o", color=color, markersize=3, alpha=0.45, lw=0)
            if result.ci95:
                axes.plot(result.ci95, [i + 0.28] * 2, color=color, lw=1.5)
                axes.plot(result.middle, i + 0.28, "D", color=color, markersize=3.5)
        axes.set(xlabel=name)
        if not any(arm.measures[name].n for arm in arms.values()):
            axes.text(0.5, 0.5, "undefined", transform=axes.transAxes, ha="center", va="center", style="italic")
        if measure_of(name).kind == "log":
            axes.set_xscale("log")
            log_ticks(axes.xaxis, [x for arm in arms.values() for x in arm.measures[name].values])
            axes.axvline(SPIKE_RATIO, color=GREY, lw=0.8, ls="--")
        if measure_of(name).kind == "share":
            axes.set(xlim=(-0.04, 1.04), xticks=(0, 0.5, 1))
    panels[0].set_yticks(range(len(arms)), [label(name, 20) for name in arms])
    panels[0].set_ylim(len(arms) - 0.4, -0.6)
    return figure


def _course(table: Table) -> Any:
    arms = _done_arms(table)
    figure, panels = canvas(len(PANELS), 1, height=2.4, sharex=True)
    for axes, name in zip(panels, PANELS, strict=True):
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


def _figure(draw: Callable[[Table], Any], caption: str, wide: bool = False) -> Figure:
    """A figure of the arms that have a finished run."""

    def with_conditions(table: Table) -> str:
        measured = table.measured
        text = f"{measured.n_seq} sequences of {measured.seq_len} tokens of {table.config['dataset']}"
        return f"{caption} Measured on {text}."

    return Figure(draw, with_conditions, wide, is_drawable=_done_arms)


STUDY = {
    "arms": _figure(
        _arms,
        f"Every arm at the end of training, with a circle for each seed. From {MIN_SEEDS} seeds on, the median and its "
        f"95% interval are below the circles. Dashed: the spike rule, {SPIKE_RATIO:g} x the median.",
        wide=True,
    ),
    "course": _figure(_course, "The course over training, with a line for each seed."),
    "plane": _figure(
        _plane,
        "Do spikes and sinks come together? Each point is a run. Dashed: the spike rule. Best head: the share of "
        "sequences in which one and the same head has a sink.",
    ),
}


def study_page(folder: Path, table: Table) -> None:
    """Writes a study's page, and its figures for a paper."""
    templates, drawn = Path(__file__).with_name("pages"), for_page(STUDY, table)
    values: dict[str, Any] = {"study": table, "tables": tables, "judged": hypotheses.judge(table), "drawn": drawn}
    page.write_page(folder / "index.html", "study.html", templates=templates, **values)
    page.figure_files(folder / "figures", (STUDY, [("", table)]))
