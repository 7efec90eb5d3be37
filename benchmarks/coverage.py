"""Simulates how often the intervals cover the truth, and how often the tests find differences that do not exist.

  python -m benchmarks.coverage                  takes minutes; writes results/coverage.md and .json
  python -m benchmarks.coverage --trials=200     takes seconds

We simulate draws whose truth is known, and try every interval and test of a study (studies/aggregate.py) at 3, 6, 8 and
10 seeds, and those over the sequences of one measurement (spikesink/measure/metrics.py) at 10, 24 and 100. An interval
should cover the truth in 95% of the trials. A test of two equal arms should find p < .05 in at most 5% of them.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from benchmarks.report import Part, document
from spikesink import schema
from spikesink.edit.causes import SUMS, lost_of
from spikesink.files import save_text
from spikesink.measure import metrics
from studies import aggregate

RESULTS = Path(__file__).resolve().parents[1] / "results"
Hits = Iterator[tuple[str, bool | None]]  # of one trial: (interval or test, hit or miss); None: it gives no answer


class Truth(NamedTuple):
    """A distribution to draw from, and the kind of its numbers (studies/runs/measures.py)."""

    kind: str
    draw: Callable[[np.random.Generator, int], np.ndarray]


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
    """True if the truth is in an interval, within 1e-9 for rounding; None if there is no interval."""
    return None if ci is None else bool(ci[0] - 1e-9 <= truth <= ci[1] + 1e-9)


def seed_checks(truth: Truth, rng: np.random.Generator, n: int, trial: int, middle: float, mean: float) -> Hits:
    """The intervals and tests of a study, on two arms with the same truth. The tests run in every fourth trial."""
    kind, by_seed = truth.kind, lambda: dict(enumerate(truth.draw(rng, n).tolist()))
    arm, base = by_seed(), by_seed()
    values = np.array([*arm.values()])
    yield "interval", covers(aggregate.estimate(arm.values()).ci95, middle)
    half, limit = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5, 1.0 if kind == "share" else np.inf
    clipped = max(0.0, values.mean() - half), min(limit, values.mean() + half)
    yield "not used: Student's t (of shares clipped)", covers(clipped, mean)
    for start in (False, True)[: 1 + (n >= aggregate.MIN_SEEDS_PAIRED)]:
        suffix = ", paired" if start else ""
        change = aggregate.difference(arm, base, kind, start)
        yield f"difference{suffix}", covers(change.ci95 if change else None, float(kind == "log"))
        if trial % 4 == 0:
            p = aggregate.p_value(arm, base, kind, start)
            yield f"test{suffix}", None if p is None else p < 0.05
    if trial % 4 == 0 and truth is TRUTHS["normal"]:
        ps = [p for p in aggregate.holm([aggregate.p_value(by_seed(), by_seed()) for _ in range(4)]) if p is not None]
        yield "any of 4 tests, by Holm", min(ps) < 0.05 if ps else None


def sequence_checks(truth: Truth, rng: np.random.Generator, n: int, trial: int, middle: float, mean: float) -> Hits:
    """The intervals over the sequences of one measurement. They run in every tenth trial, since most are bootstraps."""
    if trial % 10:
        return
    x, change = (torch.from_numpy(truth.draw(rng, n)) for _ in range(2))
    yield "bootstrap_ci of a mean", covers(metrics.bootstrap_ci(lambda i: x[i].mean().item(), n), mean)
    yield "paired_effect", covers(metrics.paired_effect(x, x + change)["ci95"], mean)
    if truth.kind == "share":
        yield "rate_ci", covers(metrics.rate_ci(x), mean)
        sums = torch.zeros(n, len(SUMS), dtype=torch.float64)  # a sequence has 1 to 9 sinks, which lose the share x
        sums[:, SUMS.index("judged")] = judged = torch.from_numpy(rng.integers(1, 10, n))
        sums[:, SUMS.index("share")] = judged * (1 - x)
        yield "lost_of, of causes", covers(lost_of(sums).ci95, mean)
    if set(x.tolist()) <= {0.0, 1.0}:
        yield "wilson", covers(metrics.wilson(int(x.sum()), n), mean)


GROUPS = {"Over seeds": (seed_checks, (3, 6, 8, 10)), "Over sequences": (sequence_checks, (10, 24, 100))}


Rates = dict[str, dict[str, dict[int, list[float | None]]]]


def simulate(group: str, trials: int, numbers: Sequence[int] = ()) -> Rates:
    """{check: {truth: {n: [rate of hits, share of the trials with an answer]}}}; the rate is None without answers."""
    run_checks, default_numbers = GROUPS[group]
    rates: Rates = {}
    for name, truth in TRUTHS.items():
        many = truth.draw(np.random.default_rng(1), 200_001)
        middles = float(np.median(many)), float(many.mean())
        for n in numbers or default_numbers:
            rng, hits = np.random.default_rng(n), dict[str, list[bool | None]]()
            for check, hit in (result for i in range(trials) for result in run_checks(truth, rng, n, i, *middles)):
                hits.setdefault(check, []).append(hit)
            for check, trial_hits in hits.items():
                answers = [hit for hit in trial_hits if hit is not None]
                rate = float(np.mean(answers)) if answers else None
                rates.setdefault(check, {}).setdefault(name, {})[n] = [rate, len(answers) / len(trial_hits)]
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    trials = parser.parse_args().trials
    results = {group: simulate(group, trials) for group in GROUPS}
    parts: list[Part] = ["# Coverage of intervals, size of tests", " ".join((__doc__ or "").split("\n\n")[2].split())]
    parts += [f"`python -m benchmarks.coverage --trials={trials}`; –: no answer; (60%): share of trials with one."]
    cell = lambda rate, share: "–" if rate is None else f"{rate:.1%}" + (f" ({share:.0%})" if share < 1 else "")
    for group, (_, numbers) in GROUPS.items():
        rows = [
            [check, truth, *(cell(*by_n[n]) if n in by_n else "–" for n in numbers)]
            for check in sorted(results[group])
            for truth, by_n in results[group][check].items()
        ]
        parts += [f"## {group}", (["", "truth", *(f"n = {n}" for n in numbers)], rows)]
    schema.save(RESULTS / "coverage.json", {"trials": trials, **results})
    save_text(RESULTS / "coverage.md", document(*parts))


if __name__ == "__main__":
    main()
