"""A study's table: the content of table.json (the plan and every run), and what is computed from it.

Medians, intervals, differences and verdicts are not in the file. studies/aggregate.py and studies/hypotheses.py compute
them from its rows, so that today's rules apply to a committed table too.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Any

from spikesink import schema
from studies import aggregate
from studies.aggregate import BySeed, Difference, Estimate, Measured, difference, estimate
from studies.runs.measures import measure_of
from studies.runs.rows import DIVERGED, Done, Ended, Planned


@dataclass(frozen=True)
class Arm:
    """An arm and its runs."""

    configs: str | dict[str, Any]  # the arm's entry in the study file
    changes: dict[str, Any]  # keys in which it differs from the baseline
    parameters: int
    flops_per_token: int
    tokens: int
    seeds: list[Done | Ended | Planned]

    @cached_property
    def ended(self) -> dict[int, Done]:
        """{seed: row} of the runs that reached their last step."""
        return {row.seed: row for row in self.seeds if isinstance(row, Done)}

    @property
    def done(self) -> int:
        """The number of runs that reached their last step."""
        return len(self.ended)

    @property
    def diverged(self) -> int:
        """The number of runs whose loss or gradient became non-finite."""
        return sum(row.status == DIVERGED for row in self.seeds)

    @cached_property
    def measures(self) -> dict[str, Estimate]:
        """Every measure over the runs that reached their last step."""
        return {m: estimate(numbers(self.ended, m).values()) for m in measure_names(self.ended)}

    def present(self, phenomenon: str) -> int:
        """The number of runs in which detect.py's verdict on "spike", "sink" or "co_occurrence" is present."""
        return sum(row.verdicts.get(phenomenon) == "present" for row in self.ended.values())


def numbers(rows: Mapping[int, Measured], name: str) -> dict[int, float | None]:
    """{seed: number} of one measure."""
    return {seed: row.measures.get(name) for seed, row in rows.items()}


def measure_names(rows: Mapping[int, Measured]) -> list[str]:
    """The measures that any row has, in their order."""
    return list(dict.fromkeys(name for row in rows.values() for name in row.measures))


@dataclass(frozen=True)
class EqualLoss:
    """Differences from the baseline at equal loss. Runs are matched one by one, so these are paired by seed."""

    matched: int  # pairs of runs that have points of equal loss
    pairs: int  # pairs of runs: seeds that both arms have
    step: float | None  # mean step of the matched points
    baseline_step: float | None
    measures: dict[str, Estimate]  # differences


def equal_loss(arm: Arm, base: Arm) -> EqualLoss:
    """The differences between an arm and the baseline at equal loss."""
    points = {s: aggregate.at_equal_loss(row, base.ended[s]) for s, row in arm.ended.items() if s in base.ended}
    matches = {seed: pair for seed, pair in points.items() if pair}
    rows, base_rows = ({seed: pair[i] for seed, pair in matches.items()} for i in (0, 1))
    steps = [statistics.fmean(p.step for p in side.values()) if side else None for side in (rows, base_rows)]
    names = measure_names(rows)
    changes = {m: difference(numbers(rows, m), numbers(base_rows, m), measure_of(m).kind) for m in names}
    measures = {name: estimate(change.values) for name, change in changes.items() if change}
    return EqualLoss(len(matches), len(points), steps[0], steps[1], measures)


@dataclass(frozen=True)
class Contrast:
    """A planned comparison with the baseline: its p, and its p after Holm's correction over all planned ones."""

    arm: str
    measure: str
    difference: Difference | None
    p: float | None
    p_holm: float | None

    @property
    def clear(self) -> bool:
        """True if the arms differ significantly."""
        return self.p_holm is not None and self.p_holm < 0.05

    @property
    def conclusion(self) -> str:
        """The result of the test in words."""
        if self.p_holm is not None:
            return "differs" if self.clear else "no difference seen"
        seeds = self.difference.seeds if self.difference else 0
        least = aggregate.MIN_SEEDS
        return f"cannot tell: {least} seeds an arm; {seeds} have it" if seeds < least else "cannot tell: all the same"


@dataclass(frozen=True)
class Conditions:
    """The conditions under which the runs were measured."""

    n_seq: int
    seq_len: int
    points: int
    dtype: str


@dataclass(frozen=True)
class Table:
    """A study's plan, and the runs that were made of it."""

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
    data: list[str]  # hashes of samples of both splits, and of the checkpoint that runs start from, if any
    seeds: list[int]
    asked: list[str]  # hypotheses
    measured: Conditions
    published: dict[str, list[float | int | None]]
    planned: list[tuple[str, str]]  # (arm, measure): contrasts with the baseline, written down before the runs
    arms: dict[str, Arm]
    times: dict[str, float | None]  # ARM-SEED -> seconds
    findings: str | None = schema.sometimes()  # the schema of the findings from which the measures were read
    schema: str = "spikesink-study-2"

    @property
    def base(self) -> Arm:
        """The arm with which the others are compared."""
        return self.arms[self.baseline]

    @property
    def others(self) -> dict[str, Arm]:
        """All arms but the baseline."""
        return {name: arm for name, arm in self.arms.items() if name != self.baseline}

    def matched(self, arm: str) -> bool:
        """True if an arm has as many parameters as the baseline, within 1%."""
        return abs(self.arms[arm].parameters / self.base.parameters - 1) < 0.01

    def same_start(self, arm: str) -> bool:
        """True if an arm computes the same function as the baseline at step 0, judged by the losses on detect.py's
        sequences."""
        runs = (self.arms[name].ended.items() for name in (arm, self.baseline))
        losses = [{seed: row.course[0].measures.get("short loss") for seed, row in rows} for rows in runs]
        ratios = aggregate.seed_differences(losses[0], losses[1], "log")
        return bool(ratios) and max(map(abs, ratios)) <= 1e-6

    @cached_property
    def differences(self) -> dict[str, dict[str, Difference]]:
        """{arm: {measure: its difference from the baseline at equal tokens}}."""
        return {
            name: {m: d for m in arm.measures if (d := difference(*self.pair(name, m), self.same_start(name)))}
            for name, arm in self.others.items()
        }

    def pair(self, arm: str, measure: str) -> tuple[BySeed, BySeed, str]:
        """(numbers of an arm, numbers of the baseline, kind) of a measure."""
        kind = measure_of(measure).kind
        return numbers(self.arms[arm].ended, measure), numbers(self.base.ended, measure), kind

    @cached_property
    def equal_loss(self) -> dict[str, EqualLoss]:
        """{arm: its differences from the baseline at equal loss}."""
        return {name: equal_loss(arm, self.base) for name, arm in self.others.items()}

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """The planned comparisons. Holm's correction is over all of them, including those without a p."""
        ps = [aggregate.p_value(*self.pair(arm, m), self.same_start(arm)) for arm, m in self.planned]
        entries = zip(self.planned, ps, aggregate.holm(ps), strict=True)
        return [Contrast(arm, m, self.differences[arm].get(m), p, adjusted) for (arm, m), p, adjusted in entries]

    @cached_property
    def interactions(self) -> dict[str, dict[str, Estimate]]:
        """The interactions of a factorial: {A and B: {measure: AB - A - B + baseline, seed by seed}}. AB is an arm with
        the changes of both. At 0 (for `log` measures, a factor of 1) the effects of A and B add up."""
        changes = {name: {(key, repr(value)) for key, value in arm.changes.items()} for name, arm in self.arms.items()}
        estimates = {}
        for both, a, b in permutations(self.arms, 3):
            parts = changes[a] and changes[b] and not changes[a] & changes[b]
            if a < b and parts and changes[a] | changes[b] == changes[both]:
                rows = [self.arms[name].ended for name in (both, self.baseline, a, b)]
                estimates[f"{a} and {b}"] = {m: _interaction_estimate(rows, m) for m in measure_names(rows[0])}
        return estimates

    @cached_property
    def runs(self) -> list[Done | Ended | Planned]:
        """Every planned run."""
        return [row for arm in self.arms.values() for row in arm.seeds]


def _interaction_estimate(arms: Sequence[Mapping[int, Done]], name: str) -> Estimate:
    """The interaction in one measure. `arms`: the rows by seed of AB, the baseline, A and B."""
    shared = [seed for seed in arms[0] if all(seed in rows for rows in arms)]
    fours = [[rows[seed].measures.get(name) for rows in arms] for seed in shared]
    full = [[x for x in four if x is not None] for four in fours if None not in four]
    if measure_of(name).kind == "log":
        return estimate([both * base / (a * b) for both, base, a, b in full if min(both, base, a, b) > 0])
    return estimate([both + base - a - b for both, base, a, b in full])


def load_table(path: str | Path) -> Table:
    """Reads a table.json. Raises UserError."""
    return schema.load(Table, path, "study.py")
