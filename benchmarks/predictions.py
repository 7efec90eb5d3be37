"""Part 1 of studies/PLAN.md: what it predicted of two public models on English Wikipedia, and what came.

  python -m benchmarks.predictions --text enwiki.txt --smollm2 smollm2.gguf --minilm all-MiniLM-L6-v2

Writes results/predictions.json and results/predictions.md. Each row is one model at one length, with BOS or without.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import spikesink
from spikesink import schema
from spikesink.errors import Flags, cli
from spikesink.files import save_text
from spikesink.measure.observe import observe
from spikesink.measure.sinks import PRIMARY_SINK_RULE, SINK_RULES
from spikesink.measure.spikes import PRIMARY_SPIKE_RULE
from spikesink.show.text import number
from studies.tables import markdown_table
from train import provenance

ROOT = Path(__file__).resolve().parents[1]
T = 512
LONG_LIVED = 0.5  # of the layers in which a long-lived spike stands


@dataclass(frozen=True)
class Row:
    """What one model showed on `n_seq` sequences of `seq_len` tokens. Shares are of tokens, or of spike tokens."""

    model: str
    seq_len: int
    bos: bool
    n_seq: int
    loss: float | None
    spike: str  # the verdicts
    sink: str
    first_tokens: float  # of the first tokens, the share that are spikes
    spike_tokens: float
    read_tokens: float | None  # the same behind the norms, as sub-layers read the stream
    sink_tokens: float
    sink_1: float
    p_sink_given_spike: float | None
    n_long_lived: int  # spike tokens that are one in at least half of the layers
    p_sink_given_long_lived: float | None


def measure(target: str, name: str, text: str, bos: bool, n_seq: int) -> Row:
    """Detects in one model. Raises UserError where it cannot be opened."""
    with spikesink.open(target, text=text, seq_len=T, bos=bos, n_seq=n_seq, nulls=8) as look:
        findings = spikesink.detect(look)
        subject = look.subjects[0]
        observation = observe(subject, look.ids, look.options.batch_size)
    side = observation.sum
    standing = (side.strengths[side.attended] >= 1).double().mean(0)  # (N, T), over the layers
    long_lived = side.spikes[PRIMARY_SPIKE_RULE] & (standing >= LONG_LIVED)
    sinks = SINK_RULES[PRIMARY_SINK_RULE].tokens(observation)
    both, loss = findings.co_occurrence.p_sink_given_spike, findings.data.loss
    n_long_lived = int(long_lived.sum())
    return Row(
        name,
        T,
        bos,
        len(look.ids),
        None if math.isnan(loss) else loss,
        findings.verdicts.spike.verdict,
        findings.verdicts.sink.verdict,
        findings.spikes.by_position[0],
        findings.spikes.sum.fraction,
        findings.spikes.read.fraction if findings.spikes.read else None,
        findings.sinks.primary_rule.fraction,
        findings.sinks.first,
        None if math.isnan(both) else both,
        n_long_lived,
        int((long_lived & sinks).sum()) / n_long_lived if n_long_lived else None,
    )


class Prediction(NamedTuple):
    """A sentence on a number: it comes true from `bound` on (or down), and is wrong beyond `wrong`; between, open."""

    text: str
    number: Callable[[dict[str, Row]], float | None]
    side: str  # "at least" or "at most"
    bound: float
    wrong: float

    def outcome(self, rows: dict[str, Row]) -> str:
        """What came of it."""
        value = self.number(rows)
        if value is None:
            return "open: undefined"
        sign = 1 if self.side == AT else -1
        if sign * value >= sign * self.bound:
            return "came true"
        return "wrong" if sign * value < sign * self.wrong else "open"


AT, UP_TO = "at least", "at most"


def read_for_sum(row: Row) -> float:
    """Spike tokens behind the norms, for one on the sum."""
    return (row.read_tokens or 0.0) / row.spike_tokens


def both_present(row: Row) -> float:
    """1 if spike and sink are present."""
    return float(row.spike == row.sink == "present")


PREDICTIONS = (
    Prediction("SmolLM2, no BOS: both present", lambda r: both_present(r["smollm2, no BOS"]), AT, 1, 1),
    Prediction("SmolLM2, BOS: both present", lambda r: both_present(r["smollm2, BOS"]), AT, 1, 1),
    Prediction("SmolLM2, no BOS: spikes among first tokens", lambda r: r["smollm2, no BOS"].first_tokens, AT, 1, 1),
    Prediction("SmolLM2, BOS: spikes among first tokens", lambda r: r["smollm2, BOS"].first_tokens, AT, 1, 1),
    Prediction("SmolLM2, no BOS: P(sink, spike)", lambda r: r["smollm2, no BOS"].p_sink_given_spike, AT, 0.8, 0.7),
    Prediction(
        "SmolLM2, no BOS: P(sink, long-lived)", lambda r: r["smollm2, no BOS"].p_sink_given_long_lived, AT, 0.95, 0.9
    ),
    Prediction("SmolLM2, BOS: P(sink, long-lived)", lambda r: r["smollm2, BOS"].p_sink_given_long_lived, AT, 0.95, 0.9),
    Prediction("MiniLM: spikes among [CLS], on the sum", lambda r: r["minilm, BOS"].first_tokens, AT, 1, 1),
    Prediction("MiniLM: spikes as read, for one on the sum", lambda r: read_for_sum(r["minilm, BOS"]), UP_TO, 0.1, 0.1),
    Prediction("MiniLM: P(sink, spike)", lambda r: r["minilm, BOS"].p_sink_given_spike, UP_TO, 0.2, 0.3),
)


def markdown(rows: dict[str, Row], text: str) -> str:
    """results/predictions.md."""
    header = ["model", "sequences", "spike", "sink", "first tokens", "spike tokens", "as read", "sink tokens", "Sink_1"]
    header += ["P(sink given spike)", "long-lived spikes", "P(sink given one)", "loss"]
    shown = [
        [
            name,
            f"{r.n_seq} x {r.seq_len}",
            r.spike,
            r.sink,
            number(r.first_tokens, ".0%"),
            number(r.spike_tokens, ".2%"),
            number(r.read_tokens, ".2%"),
            number(r.sink_tokens, ".2%"),
            number(r.sink_1, ".1%"),
            number(r.p_sink_given_spike, ".3f"),
            str(r.n_long_lived),
            number(r.p_sink_given_long_lived, ".3f"),
            number(r.loss, ".3f"),
        ]
        for name, r in rows.items()
    ]
    outcomes = [[p.text, number(p.number(rows), ".3f"), f"{p.side} {p.bound:g}", p.outcome(rows)] for p in PREDICTIONS]
    lines = [
        "# Part 1 of the plan: two public models, on English Wikipedia",
        "",
        f"`python -m benchmarks.predictions`, commit {provenance()['git_commit'][:7]}, float32, text: {text}. The",
        "predictions were committed in studies/PLAN.md before these rows. SmolLM2 is SmolLM2-135M-Instruct with 4-bit",
        "weights (Q4_1), MiniLM is all-MiniLM-L6-v2. *First tokens*: the share of first tokens that are spikes on the",
        "sum. *As read*: spike tokens behind the norms. *Long-lived*: spikes that stand in half of the layers or more.",
        "",
        *markdown_table(header, shown),
        "",
        *markdown_table(["prediction", "measured", "predicted", "outcome"], outcomes),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    flags = Flags(description=(__doc__ or "").partition("\n")[0])
    for name in ("text", "smollm2", "minilm"):
        flags.add_argument(f"--{name}", required=True, metavar="PATH")
    flags.add_argument("--n_seq", type=int, default=48, metavar="N", help="sequences (default: 48)")
    args = flags.parse_args()
    conditions = {
        "smollm2, no BOS": (args.smollm2, False),
        "smollm2, BOS": (args.smollm2, True),
        "minilm, BOS": (args.minilm, True),
    }
    rows = {name: measure(target, name, args.text, bos, args.n_seq) for name, (target, bos) in conditions.items()}
    schema.save(ROOT / "results" / "predictions.json", rows)
    save_text(ROOT / "results" / "predictions.md", markdown(rows, Path(args.text).name))
    print(markdown(rows, Path(args.text).name))


if __name__ == "__main__":
    cli(main)
