"""Figures of ablate's findings."""

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import PercentFormatter, SymmetricalLogLocator

from ..edit.causes import MARGIN, NEEDED
from ..edit.findings import Ablation, Blimp, Cause, Effect, Linear
from ..measure.findings import Interval
from .drawing import GREY, INK, SINK, SPIKE, Figure, canvas, name_ticks, thinned

KIND_COLORS = {"spike": SPIKE, "sink": SINK}  # any other kind of intervention: INK


def _effects(ablation: Ablation) -> list[tuple[str, Effect, str]]:
    """Returns (label, effect, colour) of each intervention that edited something, followed by its controls."""
    effects: list[tuple[str, Effect, str]] = []
    for entry in ablation.entries:
        effects.append((entry.name, entry, KIND_COLORS.get(entry.kind, INK)))
        effects += [(f"control: {control.name}", control, GREY) for control in entry.control]
    return [row for row in effects if row[1].edited]


def _deltas(ablation: Ablation) -> Canvas:
    effects = _effects(ablation)
    figure, axes = canvas(lines=0.95 * len(effects))
    smallest = min((abs(e.change[0]) for _, e, _ in effects if abs(e.change[0]) > 1e-3), default=1e-3)
    axes.set_xscale("symlog", linthresh=smallest)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=smallest))
    _plot_intervals(axes, [(label, *effect.change, color) for label, effect, color in effects])
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set_xlabel(f"change of the {'loss, nats per token' if ablation.has_loss else 'output states'}")
    return figure


def _plot_intervals(axes: Axes, rows: list[tuple[str, float | None, Interval | None, str]]) -> None:
    """Plots (label, number, its interval, colour), one row below the other."""
    for i, (_, value, ci95, color) in enumerate(rows):
        if ci95:
            axes.plot(ci95, [i, i], color=color, lw=2)
        if value is not None:
            axes.plot(value, i, "o", color=color, markersize=4)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _causes(ablation: Ablation) -> Canvas:
    rows: list[tuple[str, float | None, Interval | None, str]] = []
    for cause in _judged_causes(ablation):
        name = f"{cause.asked}, {cause.by}: {cause.verdict}"
        rows.append((name, cause.lost.share, cause.lost.ci95, {"sinks": SINK, "spikes": SPIKE}[cause.asked]))
        rows += [(f"control: {one.name}", one.lost.share, one.lost.ci95, GREY) for one in cause.control]
    figure, axes = canvas(lines=0.95 * len(rows))
    _plot_intervals(axes, rows)
    for bound in (MARGIN, NEEDED):
        axes.axvline(bound, color=GREY, lw=0.8, ls=":")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlim(left=min(0, max(-1.05, axes.get_xlim()[0])))  # sinks may grow many times
    axes.set_xlabel("share that is lost")
    return figure


def _judged_causes(ablation: Ablation) -> list[Cause]:
    return [cause for cause in ablation.causes if cause.judged]


def _loss_by_position(ablation: Ablation) -> Canvas:
    figure, (top, bottom) = canvas(2, 1, height=1.5, sharex=True)
    top.plot(*thinned(ablation.baseline.by_position), color=INK)
    top.set(ylabel="loss, clean model")
    drawn = {
        "spike_zero": (SPIKE, "-"),
        "spike_mean": (SPIKE, ":"),
        "sink_mask": (SINK, "-"),
        "bos_remove": (INK, "--"),
    }
    for entry in ablation.interventions:
        if entry.name in drawn and entry.edited:
            color, style = drawn[entry.name]
            bottom.plot(*thinned(entry.by_position), style, color=color, lw=1.2, label=entry.name)
    bottom.axhline(0, color=GREY, lw=0.8)
    bottom.set(ylabel="change of the loss", xlabel="position at which the prediction is made")
    if bottom.get_legend_handles_labels()[1]:
        bottom.legend()
    return figure


def _state_change(ablation: Ablation) -> Canvas:
    figure, panels = canvas(1, 2, sharey=True)
    drawn = {"spike_zero": SPIKE, "spike_constant": INK, "sink_mask": SINK}
    entries = [entry for entry in ablation.entries if entry.name in drawn and entry.edited]
    curves = {
        "spike tokens": {entry.name: [tap.spike_tokens for tap in entry.state_change] for entry in entries},
        "other tokens": {entry.name: [tap.others for tap in entry.state_change] for entry in entries},
    }
    for axes, (title, values_by_name) in zip(panels, curves.items(), strict=True):
        for name, values in values_by_name.items():
            if None not in values:
                axes.plot(values, "-o", markersize=3, color=drawn[name], label=name)
        name_ticks(axes.xaxis, [tap.name for tap in ablation.taps], 8)
        axes.set_title(title)
    panels[0].set_ylabel("|h' - h| / |h|")
    handles = {h.get_label(): h for axes in panels for h in axes.get_lines()}
    if handles:
        figure.legend(handles=list(handles.values()), ncols=3, loc="outside upper center")
    return figure


def _selectivity(ablation: Ablation) -> Canvas:
    assert isinstance(ablation.probes.linear, Linear)
    conditions = ablation.probes.linear.conditions
    tasks = conditions[0].tasks
    figure, panels = canvas(1, len(tasks), sharey=True)
    drawn = {"none": (INK, "-"), "spike_zero": (SPIKE, "-"), "spike_mean": (SPIKE, ":"), "sink_mask": (SINK, "-")}
    for axes, (task, clean) in zip(panels, tasks.items(), strict=True):
        for row in conditions:
            if row.name in drawn:
                color, style = drawn[row.name]
                taps = row.tasks[task]
                axes.plot([tap.selectivity for tap in taps], style, color=color, label=row.name, lw=1.4)
        low, high = zip(*(tap.selectivity_ci95 for tap in clean), strict=True)
        axes.fill_between(range(len(clean)), low, high, color=GREY, alpha=0.25, lw=0)
        name_ticks(axes.xaxis, [tap.name for tap in clean], 8)
        axes.axhline(0, color=GREY, lw=0.8)
        axes.set_title(task)
    panels[0].set_ylabel("accuracy - control accuracy")
    figure.legend(*panels[-1].get_legend_handles_labels(), ncols=4, loc="outside upper center")
    return figure


def _blimp(ablation: Ablation) -> Canvas:
    assert isinstance(ablation.probes.blimp, Blimp)
    rows = ablation.probes.blimp.conditions[1:]
    fields = list(rows[0].by_field)
    figure, panels = canvas(1, len(fields), lines=len(rows), sharey=True)
    kinds = {entry.name: entry.kind for entry in ablation.entries}
    color_of = lambda name: GREY if "/" in name else KIND_COLORS.get(kinds[name], SINK)  # "/": a control
    for axes, name in zip(panels, fields, strict=True):
        for i, row in enumerate(rows):
            part, color = row.by_field[name], color_of(row.name)
            axes.plot(part.change, i, "o", color=color, markersize=4)
            if part.change_ci95:
                axes.plot(part.change_ci95, [i, i], color=color, lw=1.5)
        axes.axvline(0, color=GREY, lw=0.8)
        axes.set_title(name.replace("_", " "))
    panels[0].set_yticks(range(len(rows)), [row.name.replace("/", " / ") for row in rows])
    panels[0].invert_yaxis()
    figure.supxlabel("change of BLiMP accuracy", fontsize=mpl.rcParams["font.size"])
    return figure


ABLATION = {
    "deltas": Figure(
        _deltas,
        lambda ablation: (
            f"How {'the loss changes' if ablation.has_loss else 'far the output states move'} under each intervention "
            "(orange: on spikes, blue: on sinks) and under its matched controls (grey), with 95% intervals. The axis "
            "is linear near 0 and logarithmic beyond."
        ),
        is_drawable=_effects,
        measured=True,
    ),
    "causes": Figure(
        _causes,
        "Do sinks need spikes, and do spikes need sinks? The share of their attention that sinks lose when spikes "
        "are removed upstream of them, or the share of |h| that spikes lose when sinks are (grey: under controls). "
        f"Dotted: the bounds of the verdicts, {MARGIN:.0%} and {NEEDED:.0%}.",
        is_drawable=_judged_causes,
        measured=True,
    ),
    "loss_by_position": Figure(
        _loss_by_position,
        "The loss by position, in nats, and how the main interventions change it.",
        is_drawable=lambda ablation: ablation.has_loss and _effects(ablation),
        measured=True,
    ),
    "state_change": Figure(
        _state_change,
        "How far the main interventions move hidden states: |h' - h| / |h| by layer.",
        is_drawable=lambda f: _effects(f) and any(e.kind == "spike" and e.edited for e in f.interventions),
        measured=True,
    ),
    "linear": Figure(
        _selectivity,
        "Linear probes: selectivity by layer (accuracy minus that of the control task); band: 95%.",
        wide=True,
        is_drawable=lambda f: _effects(f) and isinstance(f.probes.linear, Linear) and f.probes.linear.conditions[1:],
    ),
    "blimp": Figure(
        _blimp,
        "How the accuracy on BLiMP changes under each intervention and its first control (grey); 95%.",
        wide=True,
        is_drawable=lambda f: _effects(f) and isinstance(f.probes.blimp, Blimp) and f.probes.blimp.conditions[1:],
    ),
}
