"""The figures of what ablate finds."""

from collections.abc import Callable, Iterable

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import PercentFormatter, SymmetricalLogLocator

from ..edit.causes import MARGIN, NEEDED
from ..edit.findings import Ablation, Blimp, Cause, Effect, Linear, Lost
from ..measure.findings import Place
from .drawing import GREY, INK, SINK, SPIKE, Figure, canvas, name_ticks, thinned
from .text import on_text

KIND_COLORS = {"spike": SPIKE, "sink": SINK}  # of an intervention that has a kind of its own: INK


def _shown(found: Ablation) -> list[tuple[str, Effect, str]]:
    """(label, effect, colour) of every intervention that edited something, each followed by its controls."""
    shown: list[tuple[str, Effect, str]] = []
    for entry in found.entries:
        shown.append((entry.name, entry, KIND_COLORS.get(entry.kind, INK)))
        shown += [(f"control: {control.name}", control, GREY) for control in entry.control]
    return [one for one in shown if one[1].edited]


def _deltas(found: Ablation) -> Canvas:
    shown = _shown(found)
    figure, axes = canvas(lines=0.95 * len(shown))
    smallest = min((abs(e.delta_loss) for _, e, _ in shown if abs(e.delta_loss) > 1e-3), default=1e-3)
    axes.set_xscale("symlog", linthresh=smallest)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=smallest))
    for i, (_, effect, color) in enumerate(shown):
        if effect.ci95:
            axes.plot(effect.ci95, [i, i], color=color, lw=2)
        axes.plot(effect.delta_loss, i, "o", color=color, markersize=4)
    axes.set_yticks(range(len(shown)), [label for label, _, _ in shown])
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set_xlabel("change of the loss, nats per token")
    return figure


def _causes(found: Ablation) -> Canvas:
    shown: list[tuple[str, Lost, str]] = []
    for cause in _judged(found):
        color = {"sinks": SINK, "spikes": SPIKE}[cause.asked]
        shown.append((f"{cause.asked} without {cause.removed}: {cause.by}, {cause.verdict}", cause.lost, color))
        shown += [(f"control: {control.name}", control.lost, GREY) for control in cause.control]
    figure, axes = canvas(lines=0.95 * len(shown))
    for i, (_, lost, color) in enumerate(shown):
        if lost.ci95:
            axes.plot(lost.ci95, [i, i], color=color, lw=2)
        if lost.share is not None:
            axes.plot(lost.share, i, "o", color=color, markersize=4)
    axes.set_yticks(range(len(shown)), [label for label, _, _ in shown])
    axes.margins(y=0.02)
    axes.invert_yaxis()
    for bound in (MARGIN, NEEDED):
        axes.axvline(bound, color=GREY, lw=0.8, ls=":")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlim(left=max(-1.05, axes.get_xlim()[0]))  # sinks may grow many times
    axes.set_xlabel("share lost (dotted: bounds)")
    return figure


def _judged(found: Ablation) -> list[Cause]:
    return [cause for cause in found.causes if cause.judged]


def _loss_by_position(found: Ablation) -> Canvas:
    figure, (top, bottom) = canvas(2, 1, height=1.5, sharex=True)
    top.plot(*thinned(found.baseline.by_position), color=INK)
    top.set(ylabel="loss, clean model")
    wanted = {
        "spike_zero": (SPIKE, "-"),
        "spike_mean": (SPIKE, ":"),
        "sink_mask": (SINK, "-"),
        "bos_remove": (INK, "--"),
    }
    for entry in found.interventions:
        if entry.name in wanted and entry.edited:
            color, style = wanted[entry.name]
            bottom.plot(*thinned(entry.by_position), style, color=color, lw=1.2, label=entry.name)
    bottom.axhline(0, color=GREY, lw=0.8)
    bottom.set(ylabel="its change", xlabel="position at which the prediction is made")
    if bottom.get_legend_handles_labels()[1]:
        bottom.legend()
    return figure


def _state_change(found: Ablation) -> Canvas:
    figure, panels = canvas(1, 2, sharey=True)
    wanted = {"spike_zero": SPIKE, "spike_constant": INK, "sink_mask": SINK}
    entries = [entry for entry in found.entries if entry.name in wanted and entry.edited]
    curves = {
        "spike tokens": {entry.name: [tap.spike_tokens for tap in entry.state_change] for entry in entries},
        "other tokens": {entry.name: [tap.others for tap in entry.state_change] for entry in entries},
    }
    for axes, (title, of) in zip(panels, curves.items(), strict=True):
        for name, values in of.items():
            if None not in values:
                axes.plot(values, "-o", markersize=3, color=wanted[name], label=name)
        _name_taps(axes, found.taps)
        axes.set_title(title)
    panels[0].set_ylabel("|h' - h| / |h|")
    handles = {h.get_label(): h for axes in panels for h in axes.get_lines()}
    if handles:
        figure.legend(handles=list(handles.values()), ncols=3, loc="outside upper center")
    return figure


def _name_taps(axes: Axes, taps: Iterable[Place]) -> None:
    name_ticks(axes.xaxis, [tap.name for tap in taps], 8)


def _selectivity(found: Ablation) -> Canvas:
    assert isinstance(found.probes.linear, Linear)
    conditions = found.probes.linear.conditions
    tasks = conditions[0].tasks
    figure, panels = canvas(1, len(tasks), sharey=True)
    wanted = {"none": (INK, "-"), "spike_zero": (SPIKE, "-"), "spike_mean": (SPIKE, ":"), "sink_mask": (SINK, "-")}
    for axes, (task, clean) in zip(panels, tasks.items(), strict=True):
        for row in conditions:
            if row.name in wanted:
                color, style = wanted[row.name]
                taps = row.tasks[task]
                axes.plot([tap.selectivity for tap in taps], style, color=color, label=row.name, lw=1.4)
        low, high = zip(*(tap.selectivity_ci95 for tap in clean), strict=True)
        axes.fill_between(range(len(clean)), low, high, color=GREY, alpha=0.25, lw=0)
        _name_taps(axes, clean)
        axes.axhline(0, color=GREY, lw=0.8)
        axes.set_title(task)
    panels[0].set_ylabel("accuracy - control accuracy")
    figure.legend(*panels[-1].get_legend_handles_labels(), ncols=4, loc="outside upper center")
    return figure


def _blimp(found: Ablation) -> Canvas:
    assert isinstance(found.probes.blimp, Blimp)
    rows = found.probes.blimp.conditions[1:]
    fields = list(rows[0].by_field)
    figure, panels = canvas(1, len(fields), lines=len(rows), sharey=True)
    kinds = {entry.name: entry.kind for entry in found.entries}
    color_of = lambda name: GREY if "/" in name else KIND_COLORS.get(kinds[name], SINK)
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


def _on_this(found: Ablation) -> str:
    return f" Measured on {on_text(found.data)}."


def _edits(found: Ablation) -> bool:
    return bool(_shown(found))


def _probed(kind: type[Blimp] | type[Linear]) -> Callable[[Ablation], bool]:
    """Whether a probe was run under more conditions than the clean model."""

    def needs(found: Ablation) -> bool:
        run = [of for of in (found.probes.blimp, found.probes.linear) if isinstance(of, kind)]
        return _edits(found) and any(len(of.conditions) > 1 for of in run)

    return needs


ABLATION = {
    "deltas": Figure(
        _deltas,
        lambda found: (
            "Change of the loss under each intervention (orange: on spikes, blue: on sinks) and, in grey, under its "
            "matched controls; 95% intervals. The axis is linear near 0, then logarithmic." + _on_this(found)
        ),
        needs=_edits,
    ),
    "causes": Figure(
        _causes,
        lambda found: (
            "Do sinks need spikes, do spikes need sinks? How much of the attention of sinks, or of |h| of spikes, that "
            "lie downstream is lost when the other is removed, and, in grey, under the controls; and the verdicts."
            + _on_this(found)
        ),
        needs=lambda found: bool(_judged(found)),
    ),
    "loss_by_position": Figure(
        _loss_by_position,
        lambda found: "The loss by position, nats, and how the main interventions change it." + _on_this(found),
        needs=_edits,
    ),
    "state_change": Figure(
        _state_change,
        lambda found: "How far states move under the main interventions, |h' - h| / |h| by layer." + _on_this(found),
        needs=lambda found: _edits(found) and any(e.kind == "spike" and e.edited for e in found.interventions),
    ),
    "linear": Figure(
        _selectivity,
        lambda found: "Linear probes: selectivity by layer, accuracy minus that of the control task; band: 95%.",
        wide=True,
        needs=_probed(Linear),
    ),
    "blimp": Figure(
        _blimp,
        lambda found: "Change of BLiMP accuracy under each intervention and, in grey, its first control; 95%.",
        wide=True,
        needs=_probed(Blimp),
    ),
}
