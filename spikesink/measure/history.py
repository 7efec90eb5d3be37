"""Spikes and sinks over training, a row per step, from the monitor's log or from several checkpoints' findings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import rows_of
from .findings import Findings, HistoryRow
from .sinks import PRIMARY_SINK_EPSILON

ROWS = 200  # the largest number of rows; they are evenly spread
COLUMNS = {  # field of a HistoryRow -> its heading on a page, and its description
    "loss": ("loss", "nats per token"),
    "ratio": ("|h| / median", "in the layer where it is largest"),
    "kurtosis": ("kurtosis", "in the layer where it is largest"),
    "sink_rate": (
        "sink rate",
        f"share of heads with alpha > {PRIMARY_SINK_EPSILON} on one key, in the layer where it is largest",
    ),
    "p_sink_given_spike": ("P(sink | spike)", "share of the spike tokens that are sinks"),
}


def log_rows(path: str | Path, last_step: int | None = None) -> list[HistoryRow]:
    """Rows of the monitored steps in a run's log.jsonl, up to `last_step`; [] if there are none."""
    rows = [
        HistoryRow(
            step=row["step"],
            loss=row.get("loss"),
            ratio=_largest(row["monitor"]["layers"], "ratio"),
            kurtosis=_largest(row["monitor"]["layers"], "kurtosis"),
            sink_rate=_largest(row["monitor"]["attention"], "sink_rate"),
            p_sink_given_spike=row["monitor"].get("p_sink_given_spike"),
        )
        for row in rows_of(Path(path))
        if row.get("monitor") and (last_step is None or row["step"] <= last_step)
    ]
    n = min(ROWS, len(rows))
    return [rows[round(i * (len(rows) - 1) / max(1, n - 1))] for i in range(n)]


def _largest(layers: list[dict[str, Any]], key: str) -> float | None:
    """The largest number under a key over layers; None if no layer has it."""
    return max((layer[key] for layer in layers if layer.get(key) is not None), default=None)


def findings_rows(all_findings: Sequence[Findings]) -> list[HistoryRow]:
    """Rows of checkpoints of one run, by step; [] unless they have one architecture and different steps."""
    rows = [
        HistoryRow(
            step=findings.checkpoint.step,
            loss=findings.data.loss,
            ratio=findings.largest_ratio,
            kurtosis=findings.largest_kurtosis,
            sink_rate=max(findings.sinks.at().by_layer),
            p_sink_given_spike=findings.co_occurrence.p_sink_given_spike,
        )
        for findings in all_findings
        if findings.checkpoint.step is not None and findings.model == all_findings[0].model
    ]
    if len({row.step for row in rows}) < max(2, len(all_findings)):
        return []
    return sorted(rows, key=lambda row: row.step)
