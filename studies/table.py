"""A study's table, as table.json holds it: what was planned, every run, and what follows from them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikesink import schema
from studies.runs.rows import Done, Ended, Pair, Planned


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, of those `n` that have the number, with its 95% interval."""

    n: int
    mean: float | None
    ci95: Pair | None


@dataclass(frozen=True)
class Difference(Estimate):
    """The same of what seeds differ in, and the two-sided p of no difference."""

    p: float | None


@dataclass(frozen=True)
class EqualLoss:
    """Differences to the baseline at equal loss, and the mean steps at which that is."""

    step: float | None
    baseline_step: float | None
    measures: dict[str, Difference]


@dataclass(frozen=True)
class Summary:
    """Of an arm's runs: how many reached their end, counts of detect.py's verdicts, means over seeds."""

    done: int
    diverged: int
    verdicts: dict[str, dict[str, int]]
    mean: dict[str, Estimate]


@dataclass(frozen=True)
class Arm(Summary):
    """An arm: what it is, its runs, and how it differs from the baseline."""

    configs: str | dict[str, Any]  # as the study file has it
    changes: dict[str, Any]  # keys in which it differs from the baseline
    parameters: int
    flops_per_token: int
    tokens: int
    seeds: list[Done | Ended | Planned]
    matched: bool  # as many parameters as the baseline, within 1%
    difference: dict[str, Difference] | None = schema.sometimes()
    equal_loss: EqualLoss | None = schema.sometimes()


@dataclass(frozen=True)
class Conditions:
    """On what the runs were measured."""

    n_seq: int
    seq_len: int
    points: int
    dtype: str


@dataclass(frozen=True)
class Verdict:
    """What is claimed, and what the table says to that by the rule."""

    claim: str
    verdict: str
    reason: str
    rule: str


@dataclass(frozen=True)
class Table:
    """Everything that a study found."""

    name: str
    question: str
    command: str
    code: str
    spikesink: str
    torch: str
    python: str
    git_commit: str
    baseline: str
    config: dict[str, Any]  # the baseline's, but for the seed
    data: list[str]  # hashes of samples of both splits, and of the checkpoint that is started from if there is one
    seeds: list[int]
    asked: list[str]
    measured: Conditions
    published: dict[str, list[float | int | None]]
    arms: dict[str, Arm]
    interactions: dict[str, dict[str, Estimate]]
    times: dict[str, float | None]  # seconds, by ARM-SEED
    findings: str | None = schema.sometimes()  # the schema of the findings that it was measured with
    hypotheses: dict[str, Verdict] = field(default_factory=dict)
    schema: str = "spikesink-study-1"

    @property
    def base(self) -> Arm:
        """The arm to which others are compared."""
        return self.arms[self.baseline]


def load_table(path: str | Path) -> Table:
    """The table in a file. Raises UserError."""
    return schema.load(Table, path, "study.py")
