"""A study's table: what table.json holds (what was planned, and every run), and what follows from it when it is read.

Means, intervals, differences and verdicts are not in the file. They are made of its rows by studies/aggregate.py and
studies/hypotheses.py, so that a table that is committed has them by the rules of today.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Any

from spikesink import schema
from studies.aggregate import (
    LEAST,
    BySeed,
    Difference,
    Estimate,
    Looked,
    at_equal_loss,
    by_seed_of,
    difference,
    estimate,
    holm,
    p_value,
)
from studies.runs.measures import measure_of
from studies.runs.rows import DIVERGED, Done, Ended, Planned


@dataclass(frozen=True)
class Arm:
    """An arm: what it is, and its runs."""

    configs: str | dict[str, Any]  # as the study file has it
    changes: dict[str, Any]  # keys in which it differs from the baseline
    parameters: int
    flops_per_token: int
    tokens: int
    seeds: list[Done | Ended | Planned]

    @cached_property
    def ended(self) -> dict[int, Done]:
        """{seed: row} of the runs that reached their end."""
        return {row.seed: row for row in self.seeds if isinstance(row, Done)}

    @property
    def done(self) -> int:
        """How many reached their end."""
        return len(self.ended)

    @property
    def diverged(self) -> int:
        """How many did not, as their loss or gradient was not finite."""
        return sum(row.status == DIVERGED for row in self.seeds)

    @cached_property
    def measures(self) -> dict[str, Estimate]:
        """Every measure over the runs that ended."""
        return {m: estimate(numbers(self.ended, m).values()) for m in names_of(self.ended)}

    def present(self, phenomenon: str) -> int:
        """In how many of its runs detect.py's verdict on "spike", "sink" or "co_occurrence" is present."""
        return sum(row.verdicts.get(phenomenon) == "present" for row in self.ended.values())


def numbers(rows: Mapping[int, Looked], name: str) -> dict[int, float | None]:
    """{seed: a measure's number}."""
    return {seed: row.measures.get(name) for seed, row in rows.items()}


def names_of(rows: Mapping[int, Looked]) -> list[str]:
    """The measures that any of {seed: row} has, in their order."""
    return list(dict.fromkeys(name for row in rows.values() for name in row.measures))


@dataclass(frozen=True)
class EqualLoss:
    """Differences to the baseline at equal loss: how many of the seeds that both have could be matched, the mean steps
    at which that is, and the measures there. What is matched is a pair of runs, so that these are paired by seed."""

    matched: int
    of: int
    step: float | None
    baseline_step: float | None
    measures: dict[str, Estimate]


def equal_loss(arm: Arm, base: Arm) -> EqualLoss:
    """Of an arm and the baseline."""
    found = {seed: at_equal_loss(arm.ended[seed], base.ended[seed]) for seed in arm.ended if seed in base.ended}
    pairs = {seed: pair for seed, pair in found.items() if pair}
    rows, base_rows = ({seed: pair[i] for seed, pair in pairs.items()} for i in (0, 1))
    steps = [statistics.fmean(point.step for point in of.values()) if of else None for of in (rows, base_rows)]
    both = {name: (numbers(rows, name), numbers(base_rows, name)) for name in names_of(rows)}
    changes = {name: difference(*of, measure_of(name).kind) for name, of in both.items()}
    measures = {name: estimate(of.values) for name, of in changes.items() if of}
    return EqualLoss(len(pairs), len(found), steps[0], steps[1], measures)


@dataclass(frozen=True)
class Contrast:
    """A comparison with the baseline that the study file planned: its p, and that by Holm over all that were."""

    arm: str
    measure: str
    difference: Difference | None
    p: float | None
    p_holm: float | None

    @property
    def clear(self) -> bool:
        """True if the arms differ."""
        return self.p_holm is not None and self.p_holm < 0.05

    @property
    def says(self) -> str:
        """The same in words."""
        if self.p_holm is not None:
            return "differs" if self.clear else "no difference seen"
        seeds = self.difference.seeds if self.difference else 0
        return f"cannot tell: {LEAST} seeds an arm; {seeds} have it" if seeds < LEAST else "cannot tell: all the same"


@dataclass(frozen=True)
class Conditions:
    """On what the runs were measured."""

    n_seq: int
    seq_len: int
    points: int
    dtype: str


@dataclass(frozen=True)
class Table:
    """Everything that a study was asked, and what it ran."""

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
    planned: list[tuple[str, str]]  # contrasts with the baseline, (arm, measure), written down before the runs
    arms: dict[str, Arm]
    times: dict[str, float | None]  # seconds, by ARM-SEED
    findings: str | None = schema.sometimes()  # the schema of the findings that it was measured with
    schema: str = "spikesink-study-2"

    @property
    def base(self) -> Arm:
        """The arm to which others are compared."""
        return self.arms[self.baseline]

    @property
    def others(self) -> dict[str, Arm]:
        """The arms that are compared."""
        return {name: arm for name, arm in self.arms.items() if name != self.baseline}

    def matched(self, arm: str) -> bool:
        """True if an arm has as many parameters as the baseline, within 1%."""
        return abs(self.arms[arm].parameters / self.base.parameters - 1) < 0.01

    def same_start(self, arm: str) -> bool:
        """True if an arm is the baseline's function at step 0: by the losses there, on detect.py's sequences."""
        runs = (self.arms[name].ended.items() for name in (arm, self.baseline))
        losses = [{seed: row.course[0].measures.get("short loss") for seed, row in of_arm} for of_arm in runs]
        ratios = by_seed_of(losses[0], losses[1], "log")
        return bool(ratios) and max(map(abs, ratios)) <= 1e-6

    @cached_property
    def differences(self) -> dict[str, dict[str, Difference]]:
        """{arm: {measure: its difference to the baseline at equal tokens}}."""
        found = {
            name: {m: difference(*self.pair(name, m), self.same_start(name)) for m in arm.measures}
            for name, arm in self.others.items()
        }
        return {name: {m: of for m, of in of_arm.items() if of} for name, of_arm in found.items()}

    def pair(self, arm: str, measure: str) -> tuple[BySeed, BySeed, str]:
        """The numbers of an arm and of the baseline in a measure, and its kind."""
        kind = measure_of(measure).kind
        return numbers(self.arms[arm].ended, measure), numbers(self.base.ended, measure), kind

    @cached_property
    def equal_loss(self) -> dict[str, EqualLoss]:
        """{arm: its differences to the baseline at equal loss}."""
        return {name: equal_loss(arm, self.base) for name, arm in self.others.items()}

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """The planned comparisons. Holm's correction is over all of them, those without a p too."""
        ps = [p_value(*self.pair(arm, m), self.same_start(arm)) for arm, m in self.planned]
        found = zip(self.planned, ps, holm(ps), strict=True)
        return [Contrast(arm, m, self.differences[arm].get(m), p, adjusted) for (arm, m), p, adjusted in found]

    @cached_property
    def interactions(self) -> dict[str, dict[str, Estimate]]:
        """Of a factorial: {A and B: {measure: AB - A - B + baseline, seed by seed}} (of logarithms, a factor).

        AB is an arm whose changes are those of two others together. What is not 0 (not 1) is more than both add up to.
        """
        changes = {name: {(key, repr(value)) for key, value in arm.changes.items()} for name, arm in self.arms.items()}
        found = {}
        for both, a, b in permutations(self.arms, 3):
            parts = changes[a] and changes[b] and not changes[a] & changes[b]
            if a < b and parts and changes[a] | changes[b] == changes[both]:
                rows = [self.arms[name].ended for name in (both, self.baseline, a, b)]
                found[f"{a} and {b}"] = {m: _interaction(rows, m) for m in names_of(rows[0])}
        return found

    @cached_property
    def runs(self) -> list[Done | Ended | Planned]:
        """Every run that was planned."""
        return [row for arm in self.arms.values() for row in arm.seeds]


def _interaction(arms: Sequence[Mapping[int, Done]], name: str) -> Estimate:
    """Of one measure in the arms AB, baseline, A and B."""
    both = [seed for seed in arms[0] if all(seed in rows for rows in arms)]
    of_seeds = [[rows[seed].measures.get(name) for rows in arms] for seed in both]
    full = [[x for x in four if x is not None] for four in of_seeds if None not in four]
    if measure_of(name).kind == "log":
        return estimate([both * base / (a * b) for both, base, a, b in full if min(both, base, a, b) > 0])
    return estimate([both + base - a - b for both, base, a, b in full])


def load_table(path: str | Path) -> Table:
    """The table in a file. Raises UserError."""
    return schema.load(Table, path, "study.py")
