"""How often do the intervals hold the truth, and how often do the tests see what is not there? By simulation.

  python -m benchmarks.coverage                 minutes; writes results/coverage.md and .json
  python -m benchmarks.coverage --trials 200    seconds

Every interval and test of a study (studies/aggregate.py) at 3, 6, 8 and 10 seeds, and those of a single measurement
over its sequences (spikesink/measure/metrics.py) at 10, 24 and 100. An interval should cover 95%, a test of p < .05
should fire in 5%, of draws from what has a known truth. Beside them stands what is not used, and why.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from spikesink import schema
from spikesink.files import save_text
from spikesink.measure import metrics
from studies import aggregate
from studies.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
Draw = Callable[[np.random.Generator, int], np.ndarray]
Interval = Sequence[float] | None


class Rate(NamedTuple):
    """How often an interval covers, or a test fires, of the trials in which it says anything (None: of none)."""

    what: str
    truth: str
    n: int
    rate: float | None
    said: float  # share of the trials in which there is an interval, or a p


# name -> (draws, the kind of such numbers)
DRAWS: dict[str, tuple[Draw, str]] = {
    "normal": (lambda rng, n: rng.normal(4.0, 0.05, n), "plain"),
    "plain, 10% fail": (lambda rng, n: rng.normal(4.0, 0.05, n) + (rng.random(n) < 0.1) * 0.7, "plain"),
    "log-normal": (lambda rng, n: np.exp(rng.normal(3.0, 0.8, n)), "log"),
    "share near 0": (lambda rng, n: rng.beta(0.3, 6.0, n), "share"),
    "share near 1": (lambda rng, n: rng.beta(18.0, 2.0, n), "share"),
    "share, 20% fail": (lambda rng, n: np.where(rng.random(n) < 0.2, 0.0, rng.beta(18.0, 2.0, n)), "share"),
    "0 or 1, 10%": (lambda rng, n: (rng.random(n) < 0.1).astype(float), "share"),
    "0 or 1, 60%": (lambda rng, n: (rng.random(n) < 0.6).astype(float), "share"),
    "all 4": (lambda rng, n: np.full(n, 4.0), "plain"),
    "all 1": (lambda rng, n: np.ones(n), "share"),
}


def truths(draw: Draw, kind: str) -> tuple[float, float]:
    """(the middle of a kind of numbers, their mean) of what is drawn."""
    many = draw(np.random.default_rng(1), 200_001)
    middle = {"plain": np.mean, "log": stats.gmean, "share": np.median}[kind]
    return float(middle(many)), float(many.mean())


def rate(what: str, truth: str, n: int, hits: Iterator[bool | None] | list[bool | None]) -> Rate:
    """Of one hit or miss a trial, None where nothing is said."""
    every = list(hits)
    said = [hit for hit in every if hit is not None]
    return Rate(what, truth, n, float(np.mean(said)) if said else None, len(said) / len(every))


def covers(ci: Interval, truth: float) -> bool | None:
    """True if the truth is in the interval; None without one. A hair's breadth is for rounding."""
    return None if ci is None else ci[0] - 1e-9 <= truth <= ci[1] + 1e-9


def clipped_t(values: np.ndarray) -> Interval:
    """What studies had before: Student's t of the mean, clipped to shares, also of no variance."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return max(0.0, values.mean() - half), min(1.0, values.mean() + half)


def by_seed(values: np.ndarray) -> dict[int, float | None]:
    """{seed: number}."""
    return dict(enumerate(values.tolist()))


def of_studies(trials: int, numbers: Sequence[int] = (3, 6, 8, 10)) -> Iterator[Rate]:
    """Intervals and tests over seeds; a test in a tenth of the trials."""
    for name, (draw, kind) in DRAWS.items():
        middle, mean = truths(draw, kind)
        for n in numbers:
            rng = np.random.default_rng(n)
            one, other = ([draw(rng, n) for _ in range(trials)] for _ in range(2))
            yield rate(f"interval of {kind}", name, n, [covers(aggregate.estimate(x, kind).ci95, middle) for x in one])
            if kind == "share":
                yield rate("not used: t, clipped", name, n, [covers(clipped_t(x), mean) for x in one])
            pairs = [(by_seed(x), by_seed(y)) for x, y in zip(one, other, strict=True)]
            for how, start in (("", False), (", paired", True))[: 1 + (n >= aggregate.LEAST_PAIRED)]:
                found = [aggregate.difference(x, y, kind, start) for x, y in pairs]
                hits = [covers(of.ci95 if of else None, float(kind == "log")) for of in found]
                yield rate(f"difference of {kind}{how}", name, n, hits)
                ps = [aggregate.p_value(x, y, kind, start) for x, y in pairs[: trials // 10]]
                yield rate(f"test of {kind}{how}", name, n, [None if p is None else p < 0.05 for p in ps])
    for n in (n for n in numbers if n >= aggregate.LEAST):
        rng = np.random.default_rng(n)
        p = lambda rng, n: aggregate.p_value(by_seed(rng.normal(size=n)), by_seed(rng.normal(size=n)))
        families = [aggregate.holm([p(rng, n) for _ in range(4)]) for _ in range(trials // 40)]
        yield rate("test, any of 4 by Holm", "normal", n, [min(x or 0.0 for x in ps) < 0.05 for ps in families])


def of_sequences(trials: int, numbers: Sequence[int] = (10, 24, 100)) -> Iterator[Rate]:
    """Intervals over the sequences of one measurement."""
    bootstrap = lambda x: metrics.bootstrap_ci(lambda i: x[i].mean().item(), len(x))
    for name, (draw, kind) in DRAWS.items():
        mean = truths(draw, kind)[1]
        for n in numbers:
            rng = np.random.default_rng(n)
            drawn = [torch.from_numpy(draw(rng, n)) for _ in range(trials)]
            what, of = ("rate_ci", metrics.rate_ci) if kind == "share" else ("bootstrap_ci of a mean", bootstrap)
            yield rate(what, name, n, [covers(of(x), mean) for x in drawn])
            if name.startswith("0 or 1"):
                yield rate("wilson", name, n, [covers(metrics.wilson(int(x.sum()), n), mean) for x in drawn])
            after = [x + torch.from_numpy(draw(rng, n)) for x in drawn]
            effects = [metrics.paired_effect(x, y)["ci95"] for x, y in zip(drawn, after, strict=True)]
            yield rate("paired_effect", name, n, [covers(ci, mean) for ci in effects])


def markdown(groups: dict[str, list[Rate]], trials: int) -> str:
    """A table per group: a row for what and truth, a column for n."""
    lines = ["# Coverage of intervals, size of tests", "", " ".join((__doc__ or "").split("\n\n")[2].split()), ""]
    lines += [
        f"`python -m benchmarks.coverage --trials {trials}`; –: says nothing; (60%): in so many of the trials.",
        "",
    ]
    for title, rates in groups.items():
        ns, cells = sorted({of.n for of in rates}), {(of.what, of.truth, of.n): of for of in rates}
        keys = sorted({(of.what, of.truth): None for of in rates}, key=lambda key: key[0])
        rows = [[*key, *(_cell(cells.get((*key, n))) for n in ns)] for key in keys]
        lines += [f"## {title}", "", *markdown_table(["", "truth", *(f"n = {n}" for n in ns)], rows), ""]
    return "\n".join(lines)


def _cell(of: Rate | None) -> str:
    if of is None or of.rate is None:
        return "–"
    return f"{of.rate:.1%}" + (f" ({of.said:.0%})" if of.said < 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000)
    trials = parser.parse_args().trials
    groups = {"Over seeds": [*of_studies(trials)], "Over sequences": [*of_sequences(trials // 10)]}
    rows = {title: [rate._asdict() for rate in rates] for title, rates in groups.items()}
    schema.save(ROOT / "results" / "coverage.json", {"trials": trials, **rows})
    save_text(ROOT / "results" / "coverage.md", markdown(groups, trials))


if __name__ == "__main__":
    main()
