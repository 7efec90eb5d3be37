"""Numbers of seeds -> what may be said of them: values, intervals, differences, tests, and what a time course says.

Fewer than six seeds: the values themselves are shown, without interval or test; of three against three no exact test
can reach .05. From six on it is their median, with a 95% interval by order statistics: at six to eight seeds from the
least to the largest, which holds the median of any distribution in at least 97% of studies. Why not a mean: one seed in
ten that fails is no rare thing here, and then Student's t of six covers the mean in 57% of studies; clipped to [0, 1],
it covers 45 to 91% for shares that are 0 or 1. (An interval of the mean of shares that always covers is no narrower
than Clopper and Pearson's, 54% to 100% for six times 100%.)

Arms are compared without pairing: by the intervals of both medians (MOVER: Zou and Donner 2008; magnitudes by their
logarithms), and by an exact permutation test of ranks. Seeds pair only where both arms are the same function at step 0,
and from eight seeds on, of which the sign flips can reach 2 of 256. Only contrasts that the study file has planned are
tested, with Holm's correction over all of them; everything else is exploratory. Coverage and sizes are in
results/coverage.md. (1 of 3) behind a number: it is of one run, the others have none.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from studies.runs.measures import measure_of
from studies.runs.rows import Done, Pair, Point

LEAST = 6  # seeds, for an interval or a test
LEAST_PAIRED = 8  # seeds that pairs take: six can reach .031 only, which no correction leaves below .05
SPLITS = 20_000  # a permutation test is exact up to so many splits (8 against 8: 12,870), and by as many draws beyond
MATCHED = 0.01  # nat: losses that differ by no more are equal
MOVES = 0.05  # a part by which a number that still moves has changed in the last tenth of training
Looked = Point | Done  # a run as it was looked at: at a checkpoint, or at its end
BySeed = Mapping[int, float | None]  # a measure's number of each seed


@dataclass(frozen=True)
class Estimate:
    """A measure over seeds: the values of those that have it, their median, and its 95% interval if there is one."""

    values: tuple[float, ...]
    middle: float | None
    ci95: Pair | None

    @property
    def n(self) -> int:
        """Seeds that have the number."""
        return len(self.values)


@dataclass(frozen=True)
class Difference(Estimate):
    """Of an arm less the baseline, of `log` numbers over it; `values`: of the seeds that both have."""

    paired: bool
    seeds: int  # of the arm that has fewer


def known(numbers: Iterable[float | None]) -> list[float]:
    """The numbers that are defined."""
    return [x for x in numbers if x is not None]


def median_interval(values: Sequence[float]) -> Pair | None:
    """The narrowest symmetric interval by order statistics that holds the median in at least 95%; None below LEAST.

    [x_(k), x_(n+1-k)] does in 1 - 2 P(Binomial(n, 1/2) < k), or more (David and Nagaraja, Order Statistics, 7.1).
    """
    from scipy import stats

    k = int(stats.binom.ppf(0.025, len(values), 0.5))
    ordered = sorted(values)
    return (ordered[k - 1], ordered[-k]) if k else None


def estimate(numbers: Iterable[float | None]) -> Estimate:
    """Of one number per seed."""
    values = known(numbers)
    return Estimate(tuple(values), statistics.median(values) if values else None, median_interval(values))


def difference(arm: BySeed, base: BySeed, kind: str = "plain", same_start: bool = False) -> Difference | None:
    """What an arm has more than the baseline, of `log` numbers how many times as much; None where that is undefined.

    Paired by seed if both are the same function at the start and LEAST_PAIRED seeds have both, else unpaired.
    """
    a, b = known(arm.values()), known(base.values())
    if not a or not b or (kind == "log" and min(*a, *b) <= 0):
        return None
    a, b, changes = _scaled(a, kind), _scaled(b, kind), by_seed_of(arm, base, kind)
    middle, ci = statistics.median(a) - statistics.median(b), mover(a, b)
    if paired := same_start and len(changes) >= LEAST_PAIRED:
        middle, ci = statistics.median(changes), median_interval(changes)
    back = math.exp if kind == "log" else float
    values = tuple(back(x) for x in changes)
    return Difference(values, back(middle), ci and (back(ci[0]), back(ci[1])), paired, min(len(a), len(b)))


def _scaled(values: Iterable[float], kind: str) -> list[float]:
    return [math.log(x) if kind == "log" else x for x in values]


def by_seed_of(arm: BySeed, base: BySeed, kind: str) -> list[float]:
    """The differences (of logarithms for `log`) of the seeds that both have."""
    both = ((x, base.get(seed)) for seed, x in arm.items())
    pairs = [_scaled((x, y), kind) for x, y in both if x is not None and y is not None]
    return [x - y for x, y in pairs]


def mover(a: Sequence[float], b: Sequence[float]) -> Pair | None:
    """The interval of median(a) - median(b) from both medians' own (Zou and Donner 2008, Statistics in Medicine 27)."""
    first, second = median_interval(a), median_interval(b)
    if first is None or second is None:
        return None
    m, n = statistics.median(a), statistics.median(b)
    below, above = math.hypot(m - first[0], second[1] - n), math.hypot(first[1] - m, n - second[0])
    return m - n - below, m - n + above


def p_value(arm: BySeed, base: BySeed, kind: str = "plain", same_start: bool = False) -> float | None:
    """Two-sided p of no difference: of the mean ranks over all splits of both arms' seeds, or where they pair (as in
    `difference`) of the mean difference over all sign flips. None for too few seeds, and where all values agree."""
    a, b = known(arm.values()), known(base.values())
    if min(len(a), len(b)) < LEAST or (kind == "log" and min(*a, *b) <= 0):
        return None
    changes = by_seed_of(arm, base, kind)
    paired = same_start and len(changes) >= LEAST_PAIRED
    if not any(changes) if paired else len({*a, *b}) == 1:
        return None
    from scipy import stats

    if not paired and len({*a, *b}) == len(a) + len(b):  # no two are the same: Mann and Whitney's exact distribution
        return float(stats.mannwhitneyu(a, b, method="exact").pvalue)
    ranks = stats.rankdata([*a, *b])
    data, kinds = ([changes], "samples") if paired else ([ranks[: len(a)], ranks[len(a) :]], "independent")
    mean = lambda x, *y, axis: np.mean(x, axis=axis) - sum(np.mean(other, axis=axis) for other in y)
    found = stats.permutation_test(data, mean, permutation_type=kinds, vectorized=True, n_resamples=SPLITS, rng=0)
    return float(found.pvalue)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p by Holm's correction (1979) over all of these; a contrast without a p counts among them."""
    adjusted: list[float | None] = [None] * len(ps)
    least = 0.0
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    for rank, (p, i) in enumerate(order):
        least = max(least, min(1.0, (len(ps) - rank) * p))
        adjusted[i] = least
    return adjusted


# --------------------------------------------------------------------------------------------------- time courses


def at_equal_loss(row: Done, base: Done) -> tuple[Looked, Looked] | None:
    """The points of two runs, (of `row`, of `base`), at which their validation losses are equal.

    The run that ends with the higher loss is taken at its end. The other is taken where its course last comes down to
    that loss: between two checkpoints, its step and its measures are interpolated linearly in the loss (magnitudes by
    their logarithms). Where the learning rate falls between them, so do a run before its decay and one after it; a
    decay branch from each checkpoint would say more. Losses are the trainer's own, on the same batches. None, "not
    matched", where a loss is not known or no checkpoint is above it, unless both ends are within MATCHED.
    """
    if row.loss is None or base.loss is None:
        return None
    worse, better = (row, base) if row.loss > base.loss else (base, row)
    found: Looked | None = crossing(better.course, max(row.loss, base.loss))
    if found is None and abs(row.loss - base.loss) <= MATCHED:
        found = better
    return None if found is None else (worse, found) if worse is row else (found, worse)


def crossing(course: Sequence[Point], loss: float) -> Point | None:
    """Where a time course last comes down to a loss, between two checkpoints; None if it never does."""
    seen = [(point.loss, point) for point in course if point.loss is not None]
    for (above, before), (below, after) in reversed(list(pairwise(seen))):
        if above > loss >= below:
            part = (above - loss) / (above - below)
            names = before.measures.keys() & after.measures.keys()
            measures = {m: _between(before.measures[m], after.measures[m], part, m) for m in names}
            step, tokens = (round(x + part * (y - x)) for x, y in zip(_place(before), _place(after), strict=True))
            return Point(step, tokens, loss, measures)
    return None


def _place(point: Point) -> tuple[int, int]:
    return point.step, point.tokens


def _between(x: float | None, y: float | None, part: float, name: str) -> float | None:
    if x is None or y is None:
        return None
    log = measure_of(name).kind == "log" and x > 0 and y > 0
    return math.exp(math.log(x) + part * math.log(y / x)) if log else x + part * (y - x)


def onset(course: Sequence[Point], name: str, most: float = 0.5) -> int | None:
    """The step of the first point of a time course from which on a share is more than `most`; None if it never is."""
    step = None
    for point in reversed(course):
        if not (point.measures[name] or 0) > most:
            break
        step = point.step
    return step


def last_tenth(course: Sequence[Point], name: str) -> Pair | None:
    """A measure at 90% of training, and at its end; None where it is undefined or no checkpoint is at 80 to 95%."""
    end = course[-1]
    late = [point for point in course if 0.8 * end.step <= point.step <= 0.95 * end.step]
    point = min(late, key=lambda point: abs(point.step - 0.9 * end.step), default=None)
    before, after = point.measures.get(name) if point else None, end.measures.get(name)
    return None if before is None or after is None else (before, after)


def moves(before: float, after: float, kind: str) -> bool:
    """True if a number has changed by more than MOVES, as a part of the larger; a `plain` one, a loss, by MATCHED."""
    return abs(after - before) > (MATCHED if kind == "plain" else MOVES * max(abs(before), abs(after)))
