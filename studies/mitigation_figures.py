"""The figures of what fine-tuning against spikes does."""

import functools
from typing import Any

from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullFormatter

from spikesink.measure.spikes import SPIKE_RATIO
from spikesink.show.drawing import GREY, INK, SINK, SPIKE, Figure, canvas

Models = list[tuple[str, dict[str, Any]]]  # (name, entry) of the checkpoint before and of every arm

ARM_COLORS = {"before": INK, "none": GREY, "clip": SPIKE, "penalty": SINK, "gate": "#15803d"}


def _seeds(of: dict[str, Any], *keys: str) -> list[float]:
    """The number at `keys` in every run of an arm; of the checkpoint before, the one there is."""
    inside = lambda entry: functools.reduce(dict.get, keys, entry)
    return [inside(run) for run in of["runs"]] if "runs" in of else [inside(of)["mean"]]


def _trade(models: Models) -> Canvas:
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


def _int8(models: Models) -> Canvas:
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


MITIGATION = {
    "trade": Figure(_trade, lambda models: "Is the spike gone, and at what loss? A point per seed."),
    "int8": Figure(_int8, lambda models: "What int8 costs. A point per seed."),
}
