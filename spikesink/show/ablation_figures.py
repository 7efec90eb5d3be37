"""The figures of what ablate.py and mitigate.py find."""

import functools

import matplotlib.patches
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, SymmetricalLogLocator

from ..measure.findings import Place, TextEntry
from ..measure.spikes import SPIKE_RATIO
from .drawing import GREY, INK, SINK, SPIKE, Figure, canvas, name_ticks, thinned
from .text import on_text


def _entries(ablation):
    """(label, entry, colour) of every intervention that edited something, each followed by its controls."""
    colours = {"spike": SPIKE, "sink": SINK, "bos": INK}
    return [
        (
            entry["name"] if entry is row else f"control: {entry['name']}",
            entry,
            colours[row["kind"]] if entry is row else GREY,
        )
        for row in ablation["interventions"] + ablation["removals"]
        for entry in (row, *row["control"])
        if entry["edited"]
    ]


def _deltas(ablation):
    shown = _entries(ablation)
    figure, axes = canvas(lines=0.95 * len(shown))
    smallest = min((abs(e["delta_loss"]) for _, e, _ in shown if abs(e["delta_loss"]) > 1e-3), default=1e-3)
    axes.set_xscale("symlog", linthresh=smallest)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=smallest))
    for i, (_, entry, color) in enumerate(shown):
        if entry["ci95"]:
            axes.plot(entry["ci95"], [i, i], color=color, lw=2)
        axes.plot(entry["delta_loss"], i, "o", color=color, markersize=4)
    axes.set_yticks(range(len(shown)), [label for label, _, _ in shown])
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set_xlabel("change of the loss, nats per token")
    return figure


def _two_by_two(ablation):
    cells = ablation["two_by_two"]
    figure, both = canvas(1, 2, sharey=True)
    for axes, (removed, cell) in zip(both, cells.items(), strict=False):
        runs = [(cell["by"], cell), *((c["name"], c) for c in cell["control"])]
        for j, (kind, color) in enumerate((("spikes_remain", SPIKE), ("sinks_remain", SINK))):
            for i, (_, run) in enumerate(runs):
                left = run[kind]
                if left["same"] is None:
                    continue
                x = i + 0.36 * (j - 0.5)
                axes.bar(
                    x, left["same"], 0.34, color=color, alpha=1 if i == 0 else 0.4, label=kind[:-7] if i == 0 else None
                )
                if left["ci95"]:
                    axes.plot([x, x], left["ci95"]["same"], color=INK, lw=1)
        axes.set_xticks(range(len(runs)), [name.replace("_", "\n") for name, _ in runs])
        axes.tick_params(axis="x", labelsize=0.85 * plt.rcParams["font.size"])
        axes.set(ylim=(0, 1.05), title=REMOVED[removed][0])
    both[0].set_ylabel("share that remains")
    handles = [matplotlib.patches.Patch(color=c, label=n) for n, c in (("spikes", SPIKE), ("sinks", SINK))]
    figure.legend(handles=handles, ncols=2, loc="outside lower center")
    return figure


def _loss_by_position(ablation):
    figure, (top, bottom) = canvas(2, 1, height=1.5, sharex=True)
    top.plot(*thinned(ablation["baseline"]["by_position"]), color=INK)
    top.set(ylabel="loss, clean model")
    wanted = {
        "spike_zero": (SPIKE, "-"),
        "spike_mean": (SPIKE, ":"),
        "sink_mask": (SINK, "-"),
        "bos_remove": (INK, "--"),
    }
    for entry in ablation["interventions"]:
        if entry["name"] in wanted and entry["edited"]:
            color, style = wanted[entry["name"]]
            bottom.plot(*thinned(entry["by_position"]), style, color=color, lw=1.2, label=entry["name"])
    bottom.axhline(0, color=GREY, lw=0.8)
    bottom.set(ylabel="its change", xlabel="position at which the prediction is made")
    if bottom.get_legend_handles_labels()[1]:
        bottom.legend()
    return figure


def _state_change(ablation):
    figure, panels = canvas(1, 2, sharey=True)
    labels = [Place(**tap).name for tap in ablation["taps"]]
    wanted = {"spike_zero": SPIKE, "spike_constant": INK, "sink_mask": SINK}
    for axes, (key, title) in zip(panels, (("spike_tokens", "spike tokens"), ("others", "other tokens")), strict=True):
        for entry in ablation["interventions"] + ablation["removals"]:
            values = [tap[key] for tap in entry["state_change"]]
            if entry["name"] in wanted and entry["edited"] and None not in values:
                axes.plot(values, "-o", markersize=3, color=wanted[entry["name"]], label=entry["name"])
        name_ticks(axes.xaxis, labels, 8)
        axes.set_title(title)
    panels[0].set_ylabel("|h' - h| / |h|")
    handles = {h.get_label(): h for axes in panels for h in axes.get_lines()}
    if handles:
        figure.legend(handles=list(handles.values()), ncols=3, loc="outside upper center")
    return figure


def _selectivity(ablation):
    of = ablation["probes"]["linear"]
    tasks = of["conditions"][0]["tasks"]
    figure, panels = canvas(1, len(tasks), sharey=True)
    wanted = {"none": (INK, "-"), "spike_zero": (SPIKE, "-"), "spike_mean": (SPIKE, ":"), "sink_mask": (SINK, "-")}
    for axes, task in zip(panels, tasks, strict=True):
        for row in of["conditions"]:
            if row["name"] in wanted:
                color, style = wanted[row["name"]]
                taps = row["tasks"][task]
                axes.plot([tap["selectivity"] for tap in taps], style, color=color, label=row["name"], lw=1.4)
                if row["name"] == "none":
                    low, high = zip(*(tap["selectivity_ci95"] for tap in taps), strict=True)
                    axes.fill_between(range(len(taps)), low, high, color=GREY, alpha=0.25, lw=0)
        labels = [Place(layer=tap["layer"], kind=tap["kind"]).name for tap in tasks[task]]
        name_ticks(axes.xaxis, labels, 8)
        axes.axhline(0, color=GREY, lw=0.8)
        axes.set_title(task)
    panels[0].set_ylabel("accuracy - control accuracy")
    figure.legend(*panels[-1].get_legend_handles_labels(), ncols=4, loc="outside upper center")
    return figure


def _blimp(ablation):
    rows = ablation["probes"]["blimp"]["conditions"][1:]
    fields = list(rows[0]["by_field"])
    figure, panels = canvas(1, len(fields), lines=len(rows), sharey=True)
    for axes, name in zip(panels, fields, strict=True):
        for i, row in enumerate(rows):
            part = row["by_field"][name]
            color = GREY if "/" in row["name"] else SPIKE if row["name"].startswith("spike") else SINK
            axes.plot(part["change"], i, "o", color=color, markersize=4)
            if part["change_ci95"]:
                axes.plot(part["change_ci95"], [i, i], color=color, lw=1.5)
        axes.axvline(0, color=GREY, lw=0.8)
        axes.set_title(name.replace("_", " "))
    panels[0].set_yticks(range(len(rows)), [row["name"].replace("/", " / ") for row in rows])
    panels[0].invert_yaxis()
    figure.supxlabel("change of BLiMP accuracy", fontsize=plt.rcParams["font.size"])
    return figure


ARM_COLORS = {"before": INK, "none": GREY, "clip": SPIKE, "penalty": SINK, "gate": "#15803d"}


def _seeds(of, *keys):
    """The number at `keys` in every run of an arm; of the checkpoint before, the one there is."""
    inside = lambda entry: functools.reduce(dict.get, keys, entry)
    return [inside(run) for run in of["runs"]] if "runs" in of else [inside(of)["mean"]]


def _trade(models):
    figure, axes = canvas(height=1.1)
    for name, of in models:
        x, y, color = _seeds(of, "top1_over_median"), _seeds(of, "loss"), ARM_COLORS[name]
        axes.plot(x, y, "X" if name == "before" else "o", color=color, label=name, markersize=7, alpha=0.7)
    axes.set(
        xscale="log",
        xlabel="top-1 / median of the layer where it is largest",
        ylabel="loss, nats per token",
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(SPIKE_RATIO, color=GREY, lw=0.8, ls="--")
    at = {"xycoords": ("data", "axes fraction"), "xytext": (3, 0), "textcoords": "offset points", "va": "top"}
    axes.annotate("the spike rule", (SPIKE_RATIO, 1), **at, color=GREY)
    axes.legend()
    return figure


def _int8(models):
    figure, axes = canvas(lines=2.5 * len(models) + 2)
    kinds = {
        "float": (("loss",), GREY, "|"),
        "int8 per channel": (("int8", "per_channel", "loss"), SINK, "o"),
        "int8 per tensor": (("int8", "per_tensor", "loss"), SPIKE, "o"),
    }
    for label, (keys, color, marker) in kinds.items():
        points = [(x, i) for i, (_, of) in enumerate(models) for x in _seeds(of, *keys)]
        size = 13 if marker == "|" else 6
        axes.plot(*zip(*points, strict=True), marker, color=color, label=label, markersize=size, alpha=0.7)
    axes.set_yticks(range(len(models)), [name for name, _ in models])
    axes.set(ylim=(len(models) - 0.4, -0.6), xlabel="loss, nats per token")
    figure.legend(ncols=3, loc="outside upper center")
    return figure


REMOVED = {  # title, question
    "remove_spikes": ("spikes removed", "Do sinks need spikes?"),
    "remove_sinks": ("sinks removed", "Do spikes need sinks?"),
}
on_this = lambda found: f" Measured on {on_text(TextEntry(**found['data']))}."
edits = lambda found: bool(_entries(found))


def _needs(ablation):
    """What the two by two says, in words."""
    return " ".join(f"{REMOVED[removed][1]} {cell['needs']}." for removed, cell in ablation["two_by_two"].items())


def _conditions(kind):
    return lambda found: edits(found) and len(found["probes"].get(kind, {}).get("conditions", ())) > 1


ABLATION = {
    "deltas": Figure(
        _deltas,
        lambda found: (
            "Change of the loss under each intervention (orange: on spikes, blue: on sinks) and, in grey, under its "
            "matched controls; 95% intervals. The axis is linear near 0, then logarithmic." + on_this(found)
        ),
        needs=edits,
    ),
    "two_by_two": Figure(
        _two_by_two,
        lambda found: (
            "What is left of the very same spikes and sinks when the other is removed, and, paler, under the controls. "
            f"{_needs(found)}" + on_this(found)
        ),
        needs=lambda found: edits(found) and any(cell["edited"] for cell in found["two_by_two"].values()),
    ),
    "loss_by_position": Figure(
        _loss_by_position,
        lambda found: "The loss by position, nats, and how the main interventions change it." + on_this(found),
        needs=edits,
    ),
    "state_change": Figure(
        _state_change,
        lambda found: "How far states move under the main interventions, |h' - h| / |h| by layer." + on_this(found),
        needs=lambda found: edits(found) and any(e["kind"] == "spike" and e["edited"] for e in found["interventions"]),
    ),
    "linear": Figure(
        _selectivity,
        lambda found: "Linear probes: selectivity by layer, accuracy minus that of the control task; band: 95%.",
        wide=True,
        needs=_conditions("linear"),
    ),
    "blimp": Figure(
        _blimp,
        lambda found: "Change of BLiMP accuracy under each intervention and, in grey, its first control; 95%.",
        wide=True,
        needs=_conditions("blimp"),
    ),
}
MITIGATION = {
    "trade": Figure(_trade, lambda models: "Is the spike gone, and at what loss? A point per seed."),
    "int8": Figure(_int8, lambda models: "What int8 costs. A point per seed."),
}
