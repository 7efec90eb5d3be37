"""Part 1 of studies/PLAN.md: what it predicted of two public models on English Wikipedia, and what came.

  python -m benchmarks.predictions --text enwiki.txt --smollm2 smollm2.gguf --minilm all-MiniLM-L6-v2

Writes results/predictions.json after every model, goes on from there, and writes results/predictions.md.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import spikesink
from benchmarks.report import document
from spikesink import schema
from spikesink.errors import Flags, cli
from spikesink.files import save_text
from spikesink.measure.observe import observe
from spikesink.measure.sinks import PRIMARY_SINK_RULE, SINK_RULES
from spikesink.measure.spikes import PRIMARY_SPIKE_RULE
from spikesink.show.text import number
from train import ROOT, provenance

N_SEQ, T = 48, 512
LONG_LIVED = 0.5  # a long-lived spike stands in this share of the layers or more
SMOLLM2, SMOLLM2_BOS, MINILM = "SmolLM2, no BOS", "SmolLM2, BOS", "MiniLM, [CLS]"
COLUMNS = {  # key of a row -> (heading, how it is printed)
    "loss": ("loss", ".3f"),
    "both": ("spike and sink present", "g"),
    "first_tokens": ("spikes among first tokens", ".0%"),
    "spike_tokens": ("spike tokens", ".2%"),
    "read_tokens": ("the same as read", ".2%"),
    "sink_tokens": ("sink tokens", ".2%"),
    "sink_1": ("Sink_1", ".1%"),
    "p_sink_given_spike": ("P(sink, spike)", ".3f"),
    "n_long_lived": ("long-lived spikes", "g"),
    "p_sink_given_long_lived": ("P(sink, long-lived)", ".3f"),
    "read_per_sum": ("spikes as read, for one on the sum", ".3f"),
}


def measure(target: str, text: str, bos: bool) -> dict[str, float | None]:
    """The row of one model, by the keys of COLUMNS. Raises UserError if the model cannot be opened."""
    with spikesink.open(target, text=text, seq_len=T, bos=bos, n_seq=N_SEQ, nulls=4) as look:
        findings = spikesink.detect(look)
        observation = observe(look.subjects[0], look.ids, look.options.batch_size)
    side, spikes = observation.sum, findings.spikes
    layers = (side.strengths[side.attended] >= 1).double().mean(0)  # (N, T), share of the layers with a spike
    long_lived = side.spikes[PRIMARY_SPIKE_RULE] & (layers >= LONG_LIVED)
    sinks, n_long_lived = SINK_RULES[PRIMARY_SINK_RULE].tokens(observation), int(long_lived.sum())
    read = spikes.read.fraction if spikes.read else None
    return {
        "loss": findings.data.loss,
        "both": float(findings.verdicts.spike.verdict == findings.verdicts.sink.verdict == "present"),
        "first_tokens": spikes.by_position[0],
        "spike_tokens": spikes.sum.fraction,
        "read_tokens": read,
        "sink_tokens": findings.sinks.primary_rule.fraction,
        "sink_1": findings.sinks.first,
        "p_sink_given_spike": findings.co_occurrence.p_sink_given_spike,
        "n_long_lived": n_long_lived,
        "p_sink_given_long_lived": int((long_lived & sinks).sum()) / n_long_lived if n_long_lived else math.nan,
        "read_per_sum": read / spikes.sum.fraction if read is not None and spikes.sum.fraction else None,
    }


class Prediction(NamedTuple):
    """A number of a row that was to be at least `bound` (at most, where `wrong` is above it); beyond `wrong` the
    prediction is wrong, and between the two it is open."""

    model: str
    key: str
    bound: float
    wrong: float

    def cells(self, rows: dict[str, Any]) -> list[str]:
        """Its line of the table."""
        value, (heading, form) = rows[self.model][self.key], COLUMNS[self.key]
        sign = -1 if self.wrong > self.bound else 1
        outcome = "open" if value is None or sign * value >= sign * self.wrong else "wrong"
        if value is not None and sign * value >= sign * self.bound:
            outcome = "came true"
        side = "at least" if sign > 0 else "at most"
        return [f"{self.model}: {heading}", f"{side} {number(self.bound, form)}", number(value, form), outcome]


PREDICTIONS = (
    Prediction(SMOLLM2, "both", 1, 1),
    Prediction(SMOLLM2_BOS, "both", 1, 1),
    Prediction(SMOLLM2, "first_tokens", 1, 1),
    Prediction(SMOLLM2_BOS, "first_tokens", 1, 1),
    Prediction(SMOLLM2, "p_sink_given_spike", 0.8, 0.7),
    Prediction(SMOLLM2, "p_sink_given_long_lived", 0.95, 0.9),
    Prediction(SMOLLM2_BOS, "p_sink_given_long_lived", 0.95, 0.9),
    Prediction(MINILM, "first_tokens", 1, 1),
    Prediction(MINILM, "read_per_sum", 0.1, 0.1 + 1e-9),
    Prediction(MINILM, "p_sink_given_spike", 0.2, 0.3),
)


def markdown(rows: dict[str, Any], text: str) -> str:
    """The text of results/predictions.md."""
    headings = ["model", *(heading for heading, _ in COLUMNS.values())]
    shown = [[name, *(number(row[key], form) for key, (_, form) in COLUMNS.items())] for name, row in rows.items()]
    about = f"""# Part 1 of the plan: two public models on English Wikipedia

`python -m benchmarks.predictions`, commit {", ".join({row["commit"] for row in rows.values()})}, float32,
{N_SEQ} sequences of {T} tokens of {text}. The predictions were committed in studies/PLAN.md
before these rows were measured. SmolLM2 is SmolLM2-135M-Instruct with 4-bit weights (Q4_1); all-MiniLM-L6-v2 has
no loss. *As read*: behind the norms, as sub-layers read the stream. *Long-lived*: a spike that stands in half of the
layers or more."""
    outcomes = ["number", "predicted", "measured", "outcome"], [prediction.cells(rows) for prediction in PREDICTIONS]
    return document(about, outcomes, (headings, shown))


def main() -> None:
    flags = Flags(description=(__doc__ or "").partition("\n")[0])
    for name in ("text", "smollm2", "minilm"):
        flags.add_argument(f"--{name}", required=True, metavar="PATH")
    args = flags.parse_args()
    path = ROOT / "results" / "predictions.json"
    rows = json.loads(path.read_text()) if path.is_file() else {}
    models = {SMOLLM2: (args.smollm2, False), SMOLLM2_BOS: (args.smollm2, True), MINILM: (args.minilm, True)}
    for name, (target, bos) in models.items():
        if name not in rows:
            rows[name] = {"commit": provenance()["git_commit"][:7], **measure(target, args.text, bos)}
            schema.save(path, rows)
    text = markdown(rows, Path(args.text).name)
    save_text(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    cli(main)
