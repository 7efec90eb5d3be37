"""How often do the intervals hold the truth, and how often do the tests see what is not there? By simulation.

  python -m benchmarks.coverage                  minutes; writes results/coverage.md and .json
  python -m benchmarks.coverage --trials=200     seconds

Every interval and test of a study (studies/aggregate.py) at 3, 6, 8 and 10 seeds, and those of one measurement over its
sequences (spikesink/measure/metrics.py) at 10, 24 and 100, on draws whose truth is known. An interval should hold it in
95% of the trials; a test of two arms that do not differ should find p < .05 in at most 5%.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from spikesink import schema
from spikesink.edit.causes import SUMS, lost_of
from spikesink.files import save_text
from spikesink.measure import metrics
from studies import aggregate
from studies.tables import markdown_table

RESULTS = Path(__file__).resolve().parents[1] / "results"
Hits = Iterator[tuple[str, bool | None]]  # of one trial: what it is of, and a hit or a miss, None where nothing is said


class Truth(NamedTuple):
    """What is drawn: the kind of such numbers, and how."""

    kind: str
    draw: Callable[[np.random.Generator, int], np.ndarray]

    def middles(self) -> tuple[float, float]:
        """(median, mean)."""
        many = self.draw(np.random.default_rng(1), 200_001)
        return float(np.median(many)), float(many.mean())


TRUTHS = {
    "normal": Truth("plain", lambda rng, n: rng.normal(4.0, 0.05, n)),
    "plain, 10% fail": Truth("plain", lambda rng, n: rng.normal(4.0, 0.05, n) + (rng.random(n) < 0.1) * 0.7),
    "log-normal": Truth("log", lambda rng, n: np.exp(rng.normal(3.0, 0.8, n))),
    "share near 0": Truth("share", lambda rng, n: rng.beta(0.3, 6.0, n)),
    "share near 1": Truth("share", lambda rng, n: rng.beta(18.0, 2.0, n)),
    "share, 20% fail": Truth("share", lambda rng, n: np.where(rng.random(n) < 0.2, 0.0, rng.beta(18.0, 2.0, n))),
    "0 or 1, 10%": Truth("share", lambda rng, n: (rng.random(n) < 0.1).astype(float)),
    "0 or 1, 60%": Truth("share", lambda rng, n: (rng.random(n) < 0.6).astype(float)),
    "all 4": Truth("plain", lambda rng, n: np.full(n, 4.0)),
    "all 1": Truth("share", lambda rng, n: np.ones(n)),
}


def covers(ci: Sequence[float] | None, truth: float) -> bool | None:
    """True if the truth is in an interval; None without one. A hair's breadth is for rounding."""
    return None if ci is None else bool(ci[0] - 1e-9 <= truth <= ci[1] + 1e-9)


def of_seeds(truth: Truth, rng: np.random.Generator, n: int, trial: int, middle: float, mean: float) -> Hits:
    """The intervals and tests of a study on two arms that are the same; the tests in every fourth trial."""
    kind, by_seed = truth.kind, lambda: dict(enumerate(truth.draw(rng, n).tolist()))
    arm, base = by_seed(), by_seed()
    values = np.array([*arm.values()])
    yield "interval", covers(aggregate.estimate(arm.values()).ci95, middle)
    half, most = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5, 1.0 if kind == "share" else np.inf
    clipped = max(0.0, values.mean() - half), min(most, values.mean() + half)
    yield "not used: Student's t (of shares clipped)", covers(clipped, mean)
    for start in (False, True)[: 1 + (n >= aggregate.MIN_SEEDS_PAIRED)]:
        how = ", paired" if start else ""
        found = aggregate.difference(arm, base, kind, start)
        yield f"difference{how}", covers(found.ci95 if found else None, float(kind == "log"))
        if trial % 4 == 0:
            p = aggregate.p_value(arm, base, kind, start)
            yield f"test{how}", None if p is None else p < 0.05
    if trial % 4 == 0 and truth is TRUTHS["normal"]:
        ps = [p for p in aggregate.holm([aggregate.p_value(by_seed(), by_seed()) for _ in range(4)]) if p is not None]
        yield "any of 4 tests, by Holm", min(ps) < 0.05 if ps else None


def of_sequences(truth: Truth, rng: np.random.Generator, n: int, trial: int, middle: float, mean: float) -> Hits:
    """The intervals of one measurement, in every tenth trial, since most are bootstraps."""
    if trial % 10:
        return
    x, change = (torch.from_numpy(truth.draw(rng, n)) for _ in range(2))
    yield "bootstrap_ci of a mean", covers(metrics.bootstrap_ci(lambda i: x[i].mean().item(), n), mean)
    yield "paired_effect", covers(metrics.paired_effect(x, x + change)["ci95"], mean)
    if truth.kind == "share":
        yield "rate_ci", covers(metrics.rate_ci(x), mean)
        sums = torch.zeros(n, len(SUMS), dtype=torch.float64)  # one to nine sinks a sequence, which lose this share
        sums[:, SUMS.index("judged")] = judged = torch.from_numpy(rng.integers(1, 10, n))
        sums[:, SUMS.index("share")] = judged * (1 - x)
        yield "lost_of, of causes", covers(lost_of(sums).ci95, mean)
    if set(x.tolist()) <= {0.0, 1.0}:
        yield "wilson", covers(metrics.wilson(int(x.sum()), n), mean)


GROUPS = {"Over seeds": (of_seeds, (3, 6, 8, 10)), "Over sequences": (of_sequences, (10, 24, 100))}


def simulate(
    group: str, trials: int, numbers: Sequence[int] = ()
) -> dict[str, dict[str, dict[int, list[float | None]]]]:
    """{what: {truth: {n: [rate of hits, share of the trials that say something]}}}; the rate of none is None."""
    of, usual = GROUPS[group]
    hits: dict[str, dict[str, dict[int, list[bool | None]]]] = {}
    for name, truth in TRUTHS.items():
        middles = truth.middles()
        for n in numbers or usual:
            rng = np.random.default_rng(n)
            for what, hit in (found for i in range(trials) for found in of(truth, rng, n, i, *middles)):
                hits.setdefault(what, {}).setdefault(name, {}).setdefault(n, []).append(hit)
    said = lambda every: [hit for hit in every if hit is not None]
    rates = lambda every: [float(np.mean(said(every))) if said(every) else None, len(said(every)) / len(every)]
    return {
        what: {name: {n: rates(x) for n, x in of_n.items()} for name, of_n in of.items()} for what, of in hits.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    trials = parser.parse_args().trials
    found = {group: simulate(group, trials) for group in GROUPS}
    lines = ["# Coverage of intervals, size of tests", "", " ".join((__doc__ or "").split("\n\n")[2].split()), ""]
    lines += [f"`python -m benchmarks.coverage --trials={trials}`; –: nothing is said; (60%): in so many of them.", ""]
    cell = lambda rate, said: "–" if rate is None else f"{rate:.1%}" + (f" ({said:.0%})" if said < 1 else "")
    for group, (_, numbers) in GROUPS.items():
        rows = [
            [what, name, *(cell(*of[n]) if n in of else "–" for n in numbers)]
            for what in sorted(found[group])
            for name, of in found[group][what].items()
        ]
        lines += [f"## {group}", "", *markdown_table(["", "truth", *(f"n = {n}" for n in numbers)], rows), ""]
    schema.save(RESULTS / "coverage.json", {"trials": trials, **found})
    save_text(RESULTS / "coverage.md", "\n".join(lines))


if __name__ == "__main__":
    main()
