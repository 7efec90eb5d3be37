"""Spikes and sinks over training, a row per step: what the monitor wrote, or what several checkpoints show."""

from pathlib import Path

from ..files import rows_of
from .findings import ratio_of

ROWS = 200  # at most so many are kept, evenly spread
COLUMNS = {  # what each measure is, by its name on a page
    "loss": "nats per token",
    "|h| / median": "of the layer where it is largest",
    "kurtosis": "of the layer where it is largest",
    "sink rate": "share of heads with alpha > 0.3 on one key, in the layer where it is largest",
    "P(sink | spike)": "share of the spike tokens that are sinks",
}


def of_log(path, last_step=None):
    """Rows of a run's log.jsonl in which the monitor spoke, up to `last_step`; [] if there are none."""
    rows = [
        {
            "step": row["step"],
            "loss": row.get("loss"),
            "ratio": _most(row["monitor"]["layers"], "ratio"),
            "kurtosis": _most(row["monitor"]["layers"], "kurtosis"),
            "sink_rate": _most(row["monitor"]["attention"], "sink_rate"),
            "p_sink_given_spike": row["monitor"].get("p_sink_given_spike"),
        }
        for row in rows_of(Path(path))
        if row.get("monitor") and (last_step is None or row["step"] <= last_step)
    ]
    kept = {round(i * (len(rows) - 1) / (ROWS - 1)) for i in range(ROWS)} if len(rows) > ROWS else range(len(rows))
    return [rows[i] for i in sorted(kept)]


def _most(entries, key):
    """The largest of a number over layers; None where no layer has it."""
    return max((entry[key] for entry in entries if entry.get(key) is not None), default=None)


def of_findings(all_findings):
    """Rows of checkpoints of one run, by step; [] unless they are one architecture at different steps."""
    steps = [found["checkpoint"]["step"] for found in all_findings]
    models = [found["model"] for found in all_findings]
    if None in steps or len(set(steps)) < max(2, len(steps)) or any(model != models[0] for model in models):
        return []
    rows = [
        {
            "step": found["checkpoint"]["step"],
            "loss": found["data"]["loss"],
            "ratio": max(map(ratio_of, found["layers"])),
            "kurtosis": max(layer["kurtosis"] for layer in found["layers"]),
            "sink_rate": max(found["sinks"]["gu"]["0.3"]["by_layer"]),
            "p_sink_given_spike": found["co_occurrence"]["p_sink_given_spike"],
        }
        for found in all_findings
    ]
    return sorted(rows, key=lambda row: row["step"])
