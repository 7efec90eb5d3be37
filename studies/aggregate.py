"""Runs -> a study's table: means over seeds with intervals, arms against the baseline, at equal tokens and equal loss.

Intervals are Student's t over seeds, 95%, for at least three seeds. With three to five values a percentile bootstrap
covers far less than it says (about 75% at n = 3; tests/test_study.py simulates both), while t is exact for normal
values and close for others. What spans orders of magnitude is taken as logarithms: geometric means, factors. Arms are
compared seed by seed, since a seed fixes the batches and their order. Intervals are not corrected for the number of
comparisons (H7's verdict is, by Bonferroni). An interval without width says that the seeds agree, not more. (1 of 3)
behind a number: it is of one run, the others have none.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations

from scipy.stats import t as student

from studies.runs.measures import measure_of
from studies.runs.rows import DIVERGED, Done, Planned, Point
from studies.table import Arm, Difference, EqualLoss, Estimate, Summary

LEAST = 3  # seeds, for an interval
Looked = Point | Done  # a run as it was looked at: at a checkpoint, or at its end
BySeed = Mapping[int, float | None]  # a measure's number of each seed


def t_interval(values: Iterable[float | None], kind: str = "plain") -> Estimate:
    """Mean and Student's t interval of one number per seed; None where a number is undefined, which `n` does not count.

    ci95 is None for fewer than LEAST numbers. A share's ends at 0 and 1; of a `log` number the mean is geometric, so
    that it is 0, without an interval, if one is.
    """
    known = [x for x in values if x is not None]
    n = len(known)
    if not n:
        return Estimate(0, None, None)
    if kind == "log" and min(known) <= 0:
        return Estimate(n, 0.0, None)
    seen = [math.log(x) for x in known] if kind == "log" else known
    mean, ci = statistics.fmean(seen), None
    if n >= LEAST:
        half = float(student.ppf(0.975, n - 1)) * standard_error(seen)
        ci = (mean - half, mean + half)
    if kind == "log":
        mean, ci = math.exp(mean), ci and (math.exp(ci[0]), math.exp(ci[1]))
    return Estimate(n, mean, _within(ci, 0.0) if kind == "share" else ci)


def _within(ci: tuple[float, float] | None, low: float) -> tuple[float, float] | None:
    """An interval that ends at what shares, or differences of shares, can be: from `low` to 1."""
    return ci and (max(low, ci[0]), min(1.0, ci[1]))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values, at least two."""
    return statistics.stdev(values) / math.sqrt(len(values))


def paired(values: BySeed, base: BySeed, kind: str = "plain") -> Difference:
    """The interval of values - base, or of values / base for `log` numbers, seed by seed."""
    both = [(x, y) for x, y in ((x, base.get(s)) for s, x in values.items()) if x is not None and y is not None]
    if kind == "log":
        seen = [a / b for a, b in both if b > 0]
        found, p = t_interval(seen, "log"), p_value([math.log(x) for x in seen]) if 0 not in seen else None
        return Difference(found.n, found.mean, found.ci95, p)
    seen = [a - b for a, b in both]
    found = t_interval(seen)
    return Difference(found.n, found.mean, _within(found.ci95, -1.0) if kind == "share" else found.ci95, p_value(seen))


def p_value(values: Sequence[float]) -> float | None:
    """Two-sided p of a mean as far from 0, by Student's t; None for fewer than LEAST values."""
    n = len(values)
    if n < LEAST:
        return None
    mean, error = statistics.fmean(values), standard_error(values)
    return 2 * float(student.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)


def done(rows: Iterable[Planned]) -> dict[int, Done]:
    """{seed: row} of the runs that reached their end."""
    return {row.seed: row for row in rows if isinstance(row, Done)}


def numbers(rows: Mapping[int, Looked], name: str) -> dict[int, float | None]:
    """{seed: a measure's number}."""
    return {seed: row.measures.get(name) for seed, row in rows.items()}


def names_of(rows: Mapping[int, Looked]) -> list[str]:
    """The measures that any of {seed: row} has, in their order."""
    return list(dict.fromkeys(name for row in rows.values() for name in row.measures))


def at_equal_loss(row: Done, base: Done) -> tuple[Looked, Looked] | None:
    """The points of two runs, (of `row`, of `base`), at which their validation losses are as near as can be said.

    The run that ends with the higher loss is taken at its end; the other at its earliest kept checkpoint whose loss is
    at most that. Losses are the trainer's own, on the same batches. None where a loss is not known.
    """
    if row.loss is None or base.loss is None:
        return None
    if row.loss > base.loss:
        return row, _earliest(base, row.loss)
    return _earliest(row, base.loss), base


def _earliest(row: Done, loss: float) -> Looked:
    reached = (point for point in row.course if point.loss is not None and point.loss <= loss)
    return next(reached, row)


def onset(course: Sequence[Point], name: str, most: float = 0.5) -> int | None:
    """The step of the first point of a time course from which on a share is more than `most`; None if it never is."""
    step = None
    for point in reversed(course):
        if not (point.measures[name] or 0) > most:
            break
        step = point.step
    return step


def compare(rows: Iterable[Planned], base: Iterable[Planned]) -> tuple[dict[str, Difference], EqualLoss]:
    """Differences of an arm's rows to the baseline's, per measure: at equal tokens, and at equal loss."""
    of_arm, of_base = done(rows), done(base)
    found = {seed: at_equal_loss(row, of_base[seed]) for seed, row in of_arm.items() if seed in of_base}
    pairs = {seed: pair for seed, pair in found.items() if pair}
    first, second = ({seed: pair[i] for seed, pair in pairs.items()} for i in (0, 1))
    mean_step = lambda points: statistics.fmean(point.step for point in points.values()) if points else None
    at_equal = EqualLoss(mean_step(first), mean_step(second), _differences(first, second))
    return _differences(of_arm, of_base), at_equal


def _differences(rows: Mapping[int, Looked], base: Mapping[int, Looked]) -> dict[str, Difference]:
    return {
        name: paired(numbers(rows, name), numbers(base, name), measure_of(name).kind)
        for name in names_of(rows)
        if name in names_of(base)
    }


def interactions(arms: Mapping[str, Arm], baseline: str) -> dict[str, dict[str, Estimate]]:
    """Of a factorial: {A and B: {measure: interval}} of AB - A - B + baseline, seed by seed (of logarithms, a factor).

    AB is an arm whose changes are those of two others together. What is not 0 (not 1) is more than both add up to.
    """
    changes = {name: set(arm.changes.items()) for name, arm in arms.items()}
    found = {}
    for both, a, b in permutations(arms, 3):
        parts = changes[a] and changes[b] and not changes[a] & changes[b]
        if a < b and parts and changes[a] | changes[b] == changes[both]:
            rows = [done(arms[name].seeds) for name in (both, baseline, a, b)]
            found[f"{a} and {b}"] = {
                name: _interaction([numbers(of_arm, name) for of_arm in rows], measure_of(name).kind)
                for name in names_of(rows[0])
            }
    return found


def _interaction(values: Sequence[BySeed], kind: str) -> Estimate:
    """Of one measure, by seed, in the arms AB, baseline, A and B."""
    of_seeds = ([of_arm.get(seed) for of_arm in values] for seed in values[0])
    known = [[x for x in four if x is not None] for four in of_seeds]
    full = [four for four in known if len(four) == len(values)]
    if kind == "log":
        return t_interval([both * base / (a * b) for both, base, a, b in full if min(both, base, a, b) > 0], "log")
    return t_interval([both + base - a - b for both, base, a, b in full])


def arm_summary(rows: Sequence[Planned]) -> Summary:
    """Counts of an arm's runs and verdicts, and every measure over the runs that ended."""
    ended = done(rows)
    verdicts: dict[str, dict[str, int]] = {}
    for row in ended.values():
        for what, verdict in row.verdicts.items():
            counts = verdicts.setdefault(what, {})
            counts[verdict] = counts.get(verdict, 0) + 1
    mean = {name: t_interval(numbers(ended, name).values(), measure_of(name).kind) for name in names_of(ended)}
    return Summary(len(ended), sum(row.status == DIVERGED for row in rows), verdicts, mean)
