"""Spikes and sinks over training, a row per step: what the monitor wrote, or what several checkpoints show."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import rows_of
from .findings import Findings, HistoryRow
from .sinks import PRIMARY_SINK_EPSILON

ROWS = 200  # at most so many are kept, evenly spread
COLUMNS = {  # of a HistoryRow: the name of each number on a page, and what it is
    "loss": ("loss", "nats per token"),
    "ratio": ("|h| / median", "of the layer where it is largest"),
    "kurtosis": ("kurtosis", "of the layer where it is largest"),
    "sink_rate": (
        "sink rate",
        f"share of heads with alpha > {PRIMARY_SINK_EPSILON} on one key, in the layer where it is largest",
    ),
    "p_sink_given_spike": ("P(sink | spike)", "share of the spike tokens that are sinks"),
}


def of_log(path: str | Path, last_step: int | None = None) -> list[HistoryRow]:
    """Rows of a run's log.jsonl in which the monitor spoke, up to `last_step`; [] if there are none."""
    rows = [
        HistoryRow(
            step=row["step"],
            loss=row.get("loss"),
            ratio=_most(row["monitor"]["layers"], "ratio"),
            kurtosis=_most(row["monitor"]["layers"], "kurtosis"),
            sink_rate=_most(row["monitor"]["attention"], "sink_rate"),
            p_sink_given_spike=row["monitor"].get("p_sink_given_spike"),
        )
        for row in rows_of(Path(path))
        if row.get("monitor") and (last_step is None or row["step"] <= last_step)
    ]
    kept = {round(i * (len(rows) - 1) / (ROWS - 1)) for i in range(ROWS)} if len(rows) > ROWS else range(len(rows))
    return [rows[i] for i in sorted(kept)]


def _most(entries: list[dict[str, Any]], key: str) -> float | None:
    """The largest of a number over layers; None where no layer has it."""
    return max((entry[key] for entry in entries if entry.get(key) is not None), default=None)


def of_findings(all_findings: Sequence[Findings]) -> list[HistoryRow]:
    """Rows of checkpoints of one run, by step; [] unless they are one architecture at different steps."""
    steps = [found.checkpoint.step for found in all_findings]
    known = [step for step in steps if step is not None]
    if len(known) < len(steps) or len(set(known)) < max(2, len(known)):
        return []
    if any(found.model != all_findings[0].model for found in all_findings):
        return []
    rows = [
        HistoryRow(
            step=step,
            loss=found.data.loss,
            ratio=found.largest_ratio,
            kurtosis=found.largest_kurtosis,
            sink_rate=max(found.sinks.at().by_layer),
            p_sink_given_spike=found.co_occurrence.p_sink_given_spike,
        )
        for step, found in zip(known, all_findings, strict=True)
    ]
    return sorted(rows, key=lambda row: row.step)
