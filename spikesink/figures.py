"""Findings -> figures, as SVG text."""

import functools
import io
import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.patches
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, SymmetricalLogLocator

from .metrics import SPIKE_RATIO
from .words import name_of, ratio_of, visible

SPIKE, SINK, GREY, INK = "#c2410c", "#1d4ed8", "#78716c", "#1c1917"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "svg.fonttype": "none",
    "svg.hashsalt": "spikesink",
    "figure.constrained_layout.use": True,
}


def _svg(figure):
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _magnitudes(findings):
    figure, axes = plt.subplots(figsize=(6.2, 3.2))
    layers = findings["layers"]
    for key, style in (("top1", "-o"), ("top2", "--"), ("top3", ":")):
        axes.plot([x[key] for x in layers], style, color=SPIKE, markersize=3, label=f"{key[:3]}-{key[3]}")
    axes.plot([x["median"] for x in layers], color=GREY, label="median")
    scale = "log" if any(x["median"] > 0 for x in layers) else "linear"
    axes.set(yscale=scale, title="Largest |h| in the residual stream against its median", ylabel="|h|")
    step = max(1, len(layers) // 12)
    axes.set_xticks(range(0, len(layers), step), [name_of(x) for x in layers[::step]], rotation=40, ha="right")
    axes.legend(frameon=False, ncols=4)
    return figure


def _heads(findings):
    sinks = findings["sinks"]
    panels = {"Sink rate of the first key (0.3)": sinks["gu"]["0.3"]["by_head"], "its alpha": sinks["alpha_first"]}
    rows = len(sinks["alpha_first"])
    figure, both = plt.subplots(1, 2, figsize=(6.2, max(1.8, min(5.0, 0.35 * rows + 1.2))), sharey=True)
    for axes, (title, values) in zip(both, panels.items(), strict=True):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axes.set(title=title, xlabel="head")
        for axis, n in ((axes.xaxis, len(values[0])), (axes.yaxis, rows)):
            axis.set_ticks(range(0, n, -(-n // 12)))
    both[0].set_ylabel("layer")
    figure.colorbar(image, ax=both)
    return figure


def _positions(findings):
    sinks = findings["sinks"]
    T = len(sinks["share"])
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.2, 4.4), sharex=True)
    top.plot(sinks["share"], color=SINK, label="measured")
    top.plot(sinks["share_uniform"], "--", color=GREY, label="if spread evenly")
    top.set(yscale="log", title="Share of all attention received, by position", ylabel="share")
    top.legend(frameon=False)
    for epsilon, shade in zip(("0.2", "0.3", "0.5", "0.8"), (0.35, 1.0, 0.6, 0.8), strict=True):
        curve = sinks["gu"][epsilon]["by_position"]
        bottom.plot(curve, color=SINK, alpha=shade, lw=1.8 if epsilon == "0.3" else 0.9, label=f"epsilon {epsilon}")
    label = "position of the key"
    if findings["causal"]:
        bottom.axvspan(0.75 * T, T - 1, color=GREY, alpha=0.15, lw=0)
        label += " (shaded: fewer than T/4 queries, no verdict rests here)"
    bottom.set(
        ylim=(-0.03, 1.03),
        xlabel=label,
        title="Sink rate (Gu et al.), share of heads",
        ylabel="Sink_k",
    )
    bottom.legend(frameon=False, ncols=4)
    return figure


def _tokens(findings):
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.2, 3.0))
    for axes, kind, key, color in (
        (left, "spikes", "magnitude", SPIKE),
        (right, "sinks", "alpha", SINK),
    ):
        top = findings[kind]["tokens"][:10]
        axes.barh(range(len(top)), [token[key] for token in top], color=color)
        labels = [f"{visible(token['text'])[:12]}  @{token['position']}".replace("$", r"\$") for token in top]
        axes.set_yticks(range(len(top)), labels)
        axes.invert_yaxis()
        axes.set_title("Largest |h|, by token" if kind == "spikes" else "Most attention in a head (alpha)")
    return figure


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
    figure, axes = plt.subplots(figsize=(6.2, 0.19 * len(shown) + 0.9))
    smallest = min((abs(e["delta_loss"]) for _, e, _ in shown if abs(e["delta_loss"]) > 1e-3), default=1e-3)
    axes.set_xscale("symlog", linthresh=smallest)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=smallest))
    for i, (_, entry, color) in enumerate(shown):
        if entry["ci95"]:
            axes.plot(entry["ci95"], [i, i], color=color, lw=2)
        axes.plot(entry["delta_loss"], i, "o", color=color, markersize=4)
    axes.set_yticks(range(len(shown)), [label for label, _, _ in shown], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set(title="Change of the loss, nats per token (95% interval)", xlabel="linear near 0, then logarithmic")
    return figure


def _two_by_two(ablation):
    cells = ablation["two_by_two"]
    figure, both = plt.subplots(1, 2, figsize=(6.2, 2.9), sharey=True)
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
        axes.set_xticks(range(len(runs)), [name.replace("_", "\n") for name, _ in runs], fontsize=7)
        axes.set(ylim=(0, 1.05), title=f"{removed.replace('_', ' ')}: needs? {cell['needs']}")
    both[0].set_ylabel("share that remains")
    handles = [matplotlib.patches.Patch(color=c, label=n) for n, c in (("spikes", SPIKE), ("sinks", SINK))]
    figure.legend(handles=handles, frameon=False, ncols=2, fontsize=8, loc="outside lower center")
    return figure


def _loss_by_position(ablation):
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.2, 4.0), sharex=True)
    top.plot(ablation["baseline"]["by_position"], color=INK)
    top.set(title="Loss by position, clean", ylabel="nats")
    wanted = {
        "spike_zero": (SPIKE, "-"),
        "spike_mean": (SPIKE, ":"),
        "sink_mask": (SINK, "-"),
        "bos_remove": (INK, "--"),
    }
    for entry in ablation["interventions"]:
        if entry["name"] in wanted and entry["edited"]:
            color, style = wanted[entry["name"]]
            bottom.plot(entry["by_position"], style, color=color, lw=1.2, label=entry["name"])
    bottom.axhline(0, color=GREY, lw=0.8)
    bottom.set(title="its change", ylabel="nats", xlabel="position at which the prediction is made")
    bottom.legend(frameon=False, fontsize=7)
    return figure


def _state_change(ablation):
    figure, panels = plt.subplots(1, 2, figsize=(6.2, 2.8), sharey=True)
    labels = [name_of(tap) for tap in ablation["taps"]]
    wanted = {"spike_zero": SPIKE, "spike_constant": INK, "sink_mask": SINK}
    for axes, (key, title) in zip(panels, (("spike_tokens", "spike tokens"), ("others", "other tokens")), strict=True):
        for entry in ablation["interventions"] + ablation["removals"]:
            values = [tap[key] for tap in entry["state_change"]]
            if entry["name"] in wanted and entry["edited"] and None not in values:
                axes.plot(values, "-o", markersize=3, color=wanted[entry["name"]], label=entry["name"])
        step = max(1, len(labels) // 8)
        axes.set_xticks(range(0, len(labels), step), labels[::step], rotation=40, ha="right", fontsize=7)
        axes.set_title(f"How far states of {title} move")
    panels[0].set_ylabel("|h' - h| / |h|")
    panels[1].legend(frameon=False, fontsize=7)
    return figure


def _selectivity(ablation):
    of = ablation["probes"]["linear"]
    tasks = of["conditions"][0]["tasks"]
    figure, panels = plt.subplots(1, len(tasks), figsize=(9.3, 3.0), sharey=True)
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
        labels = [name_of(tap) for tap in tasks[task]]
        step = max(1, len(labels) // 8)
        axes.set_xticks(range(0, len(labels), step), labels[::step], rotation=40, ha="right", fontsize=7)
        axes.axhline(0, color=GREY, lw=0.8)
        axes.set_title(f"{task}: selectivity by layer")
    panels[0].set_ylabel("accuracy - control accuracy")
    panels[-1].legend(frameon=False, fontsize=7)
    return figure


def _blimp(ablation):
    rows = ablation["probes"]["blimp"]["conditions"][1:]
    fields = list(rows[0]["by_field"])
    figure, panels = plt.subplots(1, len(fields), figsize=(9.3, 0.22 * len(rows) + 1.0), sharey=True)
    for axes, name in zip(panels, fields, strict=True):
        for i, row in enumerate(rows):
            part = row["by_field"][name]
            color = GREY if "/" in row["name"] else SPIKE if row["name"].startswith("spike") else SINK
            axes.plot(part["change"], i, "o", color=color, markersize=4)
            if part["change_ci95"]:
                axes.plot(part["change_ci95"], [i, i], color=color, lw=1.5)
        axes.axvline(0, color=GREY, lw=0.8)
        axes.set_title(name.replace("_", " "))
        axes.tick_params(labelsize=7)
    panels[0].set_yticks(range(len(rows)), [row["name"].replace("/", " / ") for row in rows], fontsize=7)
    panels[0].invert_yaxis()
    figure.supxlabel("change of BLiMP accuracy", fontsize=8)
    return figure


def _sensitivity(findings):
    figure, panels = plt.subplots(1, 4, figsize=(12.6, 2.6))
    names = {
        "ratio": ("sequences", "spike: |h| / median at least"),
        "percentile": ("sequences", "spike: percentile, in half the layers"),
        "epsilon": ("best_head", "sink: epsilon (best head)"),
        "share": ("sequences", "sink: share of all attention above"),
    }
    curves = {"this model": findings["sensitivity"]}
    curves |= {name: null["curves"] for name, null in findings["nulls"].items() if "curves" in null}
    for axes, (kind, (key, title)) in zip(panels, names.items(), strict=True):
        for name in ("this model", "init", "shuffled_channels" if kind == "percentile" else "shuffled_positions"):
            if name not in curves:
                continue
            points = curves[name][kind]
            x = [p["at"] if kind != "percentile" else str(p["at"]) for p in points]
            color = {"this model": SPIKE if kind in ("ratio", "percentile") else SINK, "init": GREY}.get(name, INK)
            style = "-o" if name == "this model" else "--" if name == "init" else ":"
            axes.plot(x, [p[key] for p in points], style, color=color, markersize=3, label=name.replace("_", " "))
        axes.set(ylim=(-0.03, 1.03), xlabel=title)
        if kind == "ratio":
            axes.set(xscale="log", ylabel="share of sequences")
        used = {"ratio": 30, "percentile": "99.9", "epsilon": 0.3, "share": 0.2}[kind]
        axes.axvline(used, color=GREY, lw=0.8)
    panels[0].legend(frameon=False)
    panels[3].legend(frameon=False)
    return figure


def _path(findings):
    anatomy, layers = findings["anatomy"], findings["layers"]
    whose = "spike tokens" if findings["spikes"]["rules"]["ratio"]["tokens"] else "largest tokens (no spikes)"
    figure, axes = plt.subplots(figsize=(6.2, 3.2))
    for (channel, values), color in zip(anatomy["path"].items(), (SPIKE, SINK, GREY), strict=False):
        axes.plot(values, "-o", color=color, markersize=3, label=f"channel {channel}")
    for step, word in ((anatomy["step_up"], "step-up"), (anatomy["step_down"], "step-down")):
        if step:
            axes.axvline(step["index"], color=GREY, lw=0.8, ls="--")
            axes.annotate(
                word, (step["index"], axes.get_ylim()[1]), fontsize=8, color=GREY, ha="right", rotation=90, va="top"
            )
    step = max(1, len(layers) // 12)
    axes.set_xticks(range(0, len(layers), step), [name_of(x) for x in layers[::step]], rotation=40, ha="right")
    axes.set(title=f"Shared channels of the {whose} through the model (mean)", ylabel="h")
    axes.legend(frameon=False)
    return figure


def _heat(values, rows, columns, title, cmap, vmax=None):
    """A heat map with at most some 60 labels on either side."""
    figure, axes = plt.subplots(figsize=(max(6.2, min(12.6, 0.22 * len(columns) + 2)), min(9, 0.16 * len(rows) + 1.8)))
    image = axes.imshow(values, aspect="auto", cmap=cmap, vmin=0, vmax=vmax)
    for axis, labels, turn in ((axes.xaxis, columns, 90), (axes.yaxis, rows, 0)):
        step = -(-len(labels) // 60)
        axis.set_ticks(range(0, len(labels), step), labels[::step], rotation=turn, fontsize=7)
    axes.set_title(title)
    figure.colorbar(image, ax=axes)
    return figure


def _label(token):
    return visible(token["text"])[:12].replace("$", r"\$")


def prompt(found):
    """{name: SVG text} of the figures of a prompt's page."""
    labels = [_label(token) for token in found["tokens"]]
    relative = [
        [math.log10(max(x / max(median, 1e-30), 1.0)) for x in row]
        for row, median in zip(found["magnitudes"], found["medians"], strict=True)
    ]
    strongest = sorted(found["heads"], key=lambda head: -max(head["alpha"]))[:60]
    heads = [head for head in found["heads"] if head in strongest]
    alpha = [head["alpha"] for head in heads]
    with plt.rc_context(STYLE):
        return {
            "magnitudes": _svg(
                _heat(
                    relative,
                    found["layers"],
                    labels,
                    "log10 of the token's largest |h| / the layer's median",
                    "Oranges",
                )
            ),
            "received": _svg(
                _heat(
                    alpha,
                    [head["head"] for head in heads],
                    labels,
                    f"Attention received (alpha), {len(heads)} heads with the strongest",
                    "Blues",
                    1,
                )
            ),
        }


def comparison(names, all_findings):
    """{name: SVG text} of the figures that put checkpoints side by side."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12.6, 3.6))
        for name, found in zip(names, all_findings, strict=True):
            ratios, rates = [ratio_of(x) for x in found["layers"]], found["sinks"]["gu"]["0.3"]["by_layer"]
            for axes, values in ((left, ratios), (right, rates)):
                axes.plot(
                    [i / max(1, len(values) - 1) for i in range(len(values))], values, "-o", markersize=3, label=name
                )
        left.set(yscale="log", title="Largest |h| over the median", xlabel="depth", ylabel="top-1 / median")
        right.set(ylim=(-0.03, 1.03), title="Sink rate of the first key (0.3), share of heads", xlabel="depth")
        left.legend(frameon=False)
        return {"comparison": _svg(figure)}


def detection(findings):
    """{name: SVG text} of the figures of one part of the findings."""
    drawings = {"magnitudes": _magnitudes, "heads": _heads, "positions": _positions, "tokens": _tokens}
    if findings["nulls"]:
        drawings["sensitivity"] = _sensitivity
    if findings["anatomy"]:
        drawings["path"] = _path
    with plt.rc_context(STYLE):
        return {name: _svg(draw(findings)) for name, draw in drawings.items()}


def ablation(found):
    """{name: SVG text} of the figures of one part of an ablation; none if nothing was edited."""
    if not _entries(found):
        return {}
    drawings = {"deltas": _deltas, "positions": _loss_by_position}
    if any(entry["kind"] == "spike" and entry["edited"] for entry in found["interventions"]):
        drawings["state_change"] = _state_change
    if any(cell["edited"] for cell in found["two_by_two"].values()):
        drawings["two_by_two"] = _two_by_two
    for name, draw in (("linear", _selectivity), ("blimp", _blimp)):
        if len(found["probes"].get(name, {}).get("conditions", ())) > 1:
            drawings[name] = draw
    with plt.rc_context(STYLE):
        return {name: _svg(draw(found)) for name, draw in drawings.items()}


ARM_COLORS = {"before": INK, "none": GREY, "clip": SPIKE, "penalty": SINK, "gate": "#15803d"}


def _seeds(of, *keys):
    """The number at `keys` in every run of an arm; of the checkpoint before, the one there is."""
    inside = lambda entry: functools.reduce(dict.get, keys, entry)
    return [inside(run) for run in of["runs"]] if "runs" in of else [inside(of)["mean"]]


def _trade(models):
    figure, axes = plt.subplots(figsize=(6.2, 3.4))
    for name, of in models:
        x, y, color = _seeds(of, "top1_over_median"), _seeds(of, "loss"), ARM_COLORS[name]
        axes.plot(x, y, "X" if name == "before" else "o", color=color, label=name, markersize=7, alpha=0.7)
    axes.set(
        xscale="log",
        title="Is the spike gone, and at what loss? A point per seed",
        xlabel="top-1 / median of the layer where it is largest",
        ylabel="loss, nats per token",
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(SPIKE_RATIO, color=GREY, lw=0.8, ls="--")
    at = {"xycoords": ("data", "axes fraction"), "xytext": (3, 0), "textcoords": "offset points", "va": "top"}
    axes.annotate("the spike rule", (SPIKE_RATIO, 1), **at, color=GREY, size=8)
    axes.legend(frameon=False)
    return figure


def _int8(models):
    figure, axes = plt.subplots(figsize=(6.2, 0.5 * len(models) + 1.3))
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
    axes.set(ylim=(len(models) - 0.4, -0.6), title="What int8 costs. A point per seed", xlabel="loss, nats per token")
    axes.legend(frameon=False, loc="best")
    return figure


def mitigation(models):
    """{name: SVG text} of the figures of a mitigation, of its report.models_of."""
    with plt.rc_context(STYLE):
        return {"trade": _svg(_trade(models)), "int8": _svg(_int8(models))}
