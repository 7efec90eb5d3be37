"""Statistics over seeds: estimates, intervals, differences and tests; and what a time course shows.

With fewer than six seeds, the tables show the values themselves, without interval or test: no exact test of three
against three can reach .05. From six seeds on they show the median, with a 95% interval by order statistics. At six to
eight seeds it runs from the least to the largest value, and covers the median of any distribution in at least 97% of
studies. A mean would do worse: here a seed in ten may well fail, and then Student's t over six seeds covers the mean in
57% of studies. For shares that are 0 or 1 it covers 45 to 91%, clipped to [0, 1]. (An interval of the mean of shares
that always covers is no narrower than Clopper and Pearson's, 54% to 100% for six times 100%.)

Arms are compared without pairing, by the intervals of both medians (MOVER: Zou and Donner 2008; magnitudes by their
logarithms) and by an exact permutation test of ranks. Seeds are paired only where both arms are the same function at
step 0, and from eight seeds on, where the test by sign flips can reach p = 2/256. Only contrasts planned in the study
file are tested, with Holm's correction over all of them; everything else is exploratory. results/coverage.md has the
coverage of the intervals and the size of the tests. "(1 of 3)" after a number means that one of three runs has it.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from studies.runs.measures import known, measure_of
from studies.runs.rows import Done, Interval, Point

MIN_SEEDS = 6  # for an interval or a test
MIN_SEEDS_PAIRED = 8  # for pairing: six can reach .031 only, which no correction leaves below .05
MAX_SPLITS = 20_000  # with more splits, a permutation test draws this many (8 against 8 has 12,870)
LOSS_TOLERANCE = 0.01  # nat: losses that differ by no more are equal
MOVING_SHARE = 0.05  # a number still moves if the last tenth of training changed it by more than this
Measured = Point | Done  # the measures of a run at a checkpoint, or at its end
Change = tuple[float, float]  # a number at 90% of training, and at its end
BySeed = Mapping[int, float | None]  # seed -> a measure's number


@dataclass(frozen=True)
class Estimate:
    """A measure over seeds: the values of the seeds that have it, their median, and its 95% interval if any."""

    values: tuple[float, ...]
    middle: float | None
    ci95: Interval | None

    @property
    def n(self) -> int:
        """The number of seeds that have the measure."""
        return len(self.values)


@dataclass(frozen=True)
class Difference(Estimate):
    """An arm's numbers minus the baseline's (`log` numbers: over the baseline's). `values` are of the shared seeds."""

    paired: bool
    seeds: int  # the number of seeds of the arm that has fewer


def median_interval(values: Sequence[float]) -> Interval | None:
    """The narrowest symmetric interval of order statistics that covers the median in 95%; None below MIN_SEEDS.

    [x_(k), x_(n+1-k)] covers it in at least 1 - 2 P(Binomial(n, 1/2) < k) (David and Nagaraja, Order Statistics, 7.1).
    """
    from scipy import stats

    k = int(stats.binom.ppf(0.025, len(values), 0.5))
    ordered = sorted(values)
    return (ordered[k - 1], ordered[-k]) if k else None


def estimate(numbers: Iterable[float | None]) -> Estimate:
    """The Estimate of one number per seed; None stands for an undefined one."""
    values = known(numbers)
    return Estimate(tuple(values), statistics.median(values) if values else None, median_interval(values))


def difference(arm: BySeed, base: BySeed, kind: str = "plain", same_start: bool = False) -> Difference | None:
    """An arm's median minus the baseline's, or over it for `log` numbers. None where that is undefined.
    It is paired by seed if both are the same function at the start and share MIN_SEEDS_PAIRED seeds, else unpaired."""
    a, b = known(arm.values()), known(base.values())
    if not a or not b or (kind == "log" and min(*a, *b) <= 0):
        return None
    a, b, changes = _scaled(a, kind), _scaled(b, kind), seed_differences(arm, base, kind)
    middle, ci = statistics.median(a) - statistics.median(b), mover(a, b)
    if paired := same_start and len(changes) >= MIN_SEEDS_PAIRED:
        middle, ci = statistics.median(changes), median_interval(changes)
    back = math.exp if kind == "log" else float
    values = tuple(back(x) for x in changes)
    return Difference(values, back(middle), ci and (back(ci[0]), back(ci[1])), paired, min(len(a), len(b)))


def _scaled(values: Iterable[float], kind: str) -> list[float]:
    return [math.log(x) if kind == "log" else x for x in values]


def seed_differences(arm: BySeed, base: BySeed, kind: str) -> list[float]:
    """The differences (of logarithms for `log`) of the seeds that both arms have."""
    shared = ((x, base.get(seed)) for seed, x in arm.items())
    pairs = [_scaled((x, y), kind) for x, y in shared if x is not None and y is not None]
    return [x - y for x, y in pairs]


def mover(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """The interval of median(a) - median(b), from those of both medians (Zou and Donner 2008, Stat. in Medicine 27)."""
    first, second = median_interval(a), median_interval(b)
    if first is None or second is None:
        return None
    m, n = statistics.median(a), statistics.median(b)
    below, above = math.hypot(m - first[0], second[1] - n), math.hypot(first[1] - m, n - second[0])
    return m - n - below, m - n + above


def p_value(arm: BySeed, base: BySeed, kind: str = "plain", same_start: bool = False) -> float | None:
    """The two-sided p of no difference: of the mean ranks, over all splits of both arms' seeds. Where seeds are paired
    (as in `difference`): of the mean difference, over all sign flips. None for too few seeds or if all values agree."""
    a, b = known(arm.values()), known(base.values())
    if min(len(a), len(b)) < MIN_SEEDS or (kind == "log" and min(*a, *b) <= 0):
        return None
    changes = seed_differences(arm, base, kind)
    paired = same_start and len(changes) >= MIN_SEEDS_PAIRED
    if not any(changes) if paired else len({*a, *b}) == 1:
        return None
    from scipy import stats

    if not paired and len({*a, *b}) == len(a) + len(b):  # without ties, Mann and Whitney's exact distribution holds
        return float(stats.mannwhitneyu(a, b, method="exact").pvalue)
    ranks = stats.rankdata([*a, *b])
    data, kinds = ([changes], "samples") if paired else ([ranks[: len(a)], ranks[len(a) :]], "independent")
    mean = lambda x, *y, axis: np.mean(x, axis=axis) - sum(np.mean(other, axis=axis) for other in y)
    test = stats.permutation_test(data, mean, permutation_type=kinds, vectorized=True, n_resamples=MAX_SPLITS, rng=0)
    return float(test.pvalue)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """The p-values after Holm's correction (1979). A contrast without a p (None) counts in the number of tests."""
    adjusted: list[float | None] = [None] * len(ps)
    least = 0.0
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    for rank, (p, i) in enumerate(order):
        least = max(least, min(1.0, (len(ps) - rank) * p))
        adjusted[i] = least
    return adjusted


# --------------------------------------------------------------------------------------------------- time courses


def at_equal_loss(row: Done, base: Done) -> tuple[Measured, Measured] | None:
    """The points of two runs, (of `row`, of `base`), at which their validation losses are equal.

    We take the run with the higher final loss at its end, and the other where its course last comes down to that loss.
    Between two checkpoints, its step and its measures are interpolated linearly in the loss (magnitudes by their
    logarithms). If the learning rate decays between the two, this mixes a run before its decay with one after it;
    a decay branch from each checkpoint would be better. Losses are the trainer's, on the same batches. Returns None
    ("not matched") if a loss is unknown, or if no checkpoint is above it and the ends differ by over LOSS_TOLERANCE.
    """
    if row.loss is None or base.loss is None:
        return None
    worse, better = (row, base) if row.loss > base.loss else (base, row)
    match = crossing(better.course, max(row.loss, base.loss))
    if match is None and abs(row.loss - base.loss) > LOSS_TOLERANCE:
        return None
    point = match or better
    return (worse, point) if worse is row else (point, worse)


def crossing(course: Sequence[Point], loss: float) -> Point | None:
    """The point between two checkpoints where a course last comes down to a loss; None if it never does."""
    points = [(point.loss, point) for point in course if point.loss is not None]
    for (above, before), (below, after) in reversed(list(pairwise(points))):
        if above > loss >= below:
            weight = (above - loss) / (above - below)
            names = before.measures.keys() & after.measures.keys()
            measures = {m: _interpolate(before.measures[m], after.measures[m], weight, m) for m in names}
            places = (before.step, after.step), (before.tokens, after.tokens)
            step, tokens = (round(x + weight * (y - x)) for x, y in places)
            return Point(step, tokens, loss, measures)
    return None


def _interpolate(x: float | None, y: float | None, weight: float, name: str) -> float | None:
    if x is None or y is None:
        return None
    log = measure_of(name).kind == "log" and x > 0 and y > 0
    return math.exp(math.log(x) + weight * math.log(y / x)) if log else x + weight * (y - x)


def onset(course: Sequence[Point], name: str, threshold: float = 0.5) -> int | None:
    """The step of the first point from which on a share stays above `threshold`; None if it ends below."""
    step = None
    for point in reversed(course):
        if not (point.measures[name] or 0) > threshold:
            break
        step = point.step
    return step


def last_tenth(course: Sequence[Point], name: str) -> Change | None:
    """A measure at 90% of training, and at its end. None where it is undefined or no checkpoint is at 80 to 95%."""
    end = course[-1]
    late = [point for point in course if 0.8 * end.step <= point.step <= 0.95 * end.step]
    point = min(late, key=lambda point: abs(point.step - 0.9 * end.step), default=None)
    before, after = point.measures.get(name) if point else None, end.measures.get(name)
    return None if before is None or after is None else (before, after)


def moves(before: float, after: float, kind: str) -> bool:
    """True if a number changed by more than MOVING_SHARE of the larger value; a loss (`plain`), by LOSS_TOLERANCE."""
    return abs(after - before) > (LOSS_TOLERANCE if kind == "plain" else MOVING_SHARE * max(abs(before), abs(after)))
