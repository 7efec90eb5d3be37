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

from scipy.stats import t as student

from studies.measures import measure_of

LEAST = 3  # seeds, for an interval
DONE = "done"


def interval(values, kind="plain"):
    """{"n", "mean", "ci95"} of one number per seed; None where a number is undefined, which `n` does not count.

    ci95 is None for fewer than LEAST numbers. A share's ends at 0 and 1; of a `log` number the mean is geometric, so
    that it is 0, without an interval, if one is.
    """
    values = [x for x in values if x is not None]
    n = len(values)
    if not n:
        return {"n": 0, "mean": None, "ci95": None}
    if kind == "log" and min(values) <= 0:
        return {"n": n, "mean": 0.0, "ci95": None}
    seen = [math.log(x) for x in values] if kind == "log" else values
    mean, ci = statistics.fmean(seen), None
    if n >= LEAST:
        half = float(student.ppf(0.975, n - 1)) * statistics.stdev(seen) / math.sqrt(n)
        ci = [mean - half, mean + half]
    if kind == "log":
        mean, ci = math.exp(mean), ci and [math.exp(x) for x in ci]
    if kind == "share":
        ci = ci and [max(0.0, ci[0]), min(1.0, ci[1])]
    return {"n": n, "mean": mean, "ci95": ci}


def paired(values, base, kind="plain"):
    """The interval of values - base, or of values / base for `log` numbers, seed by seed; both {seed: number}."""
    both = [(values[s], base[s]) for s in values if values[s] is not None and base.get(s) is not None]
    if kind == "log":
        seen = [a / b for a, b in both if b > 0]
        return {**interval(seen, "log"), "p": chance([math.log(x) for x in seen]) if 0 not in seen else None}
    seen = [a - b for a, b in both]
    found = interval(seen)
    if kind == "share" and found["ci95"]:
        found["ci95"] = [max(-1.0, found["ci95"][0]), min(1.0, found["ci95"][1])]
    return {**found, "p": chance(seen)}


def chance(values):
    """Two-sided p of a mean as far from 0, by Student's t; None for fewer than LEAST values."""
    n = len(values)
    if n < LEAST:
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(n)
    return 2 * float(student.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)


def done(rows):
    """{seed: row} of the runs that reached their end."""
    return {row["seed"]: row for row in rows if row["status"] == DONE}


def numbers(rows, name):
    """{seed: a measure's number} of {seed: row or point of a time course}."""
    return {seed: row["measures"].get(name) for seed, row in rows.items()}


def names_of(rows):
    """The measures that any of {seed: row} has, in their order."""
    return list(dict.fromkeys(name for row in rows.values() for name in row["measures"]))


def at_equal_loss(row, base):
    """The points of two runs, (of `row`, of `base`), at which their validation losses are as near as can be said.

    The run that ends with the higher loss is taken at its end; the other at its earliest kept checkpoint whose loss is
    at most that. Losses are the trainer's own, on the same batches. None where a loss is not known.
    """
    losses = row["loss"], base["loss"]
    if None in losses:
        return None
    if losses[0] > losses[1]:
        return row, _earliest(base, losses[0])
    return _earliest(row, losses[1]), base


def _earliest(row, loss):
    reached = (point for point in row["course"] if point["loss"] is not None and point["loss"] <= loss)
    return next(reached, row)


def onset(course, name, most=0.5):
    """The step of the first point of a time course from which on a share is more than `most`; None if it never is."""
    step = None
    for point in reversed(course):
        if not (point["measures"][name] or 0) > most:
            break
        step = point["step"]
    return step


def compare(rows, base):
    """Differences of an arm's rows to the baseline's, per measure: (at equal tokens, at equal loss)."""
    rows, base = done(rows), done(base)
    pairs = {seed: at_equal_loss(rows[seed], base[seed]) for seed in rows if seed in base}
    pairs = {seed: pair for seed, pair in pairs.items() if pair}
    first, second = ({seed: pair[i] for seed, pair in pairs.items()} for i in (0, 1))
    difference = lambda of, against: {
        name: paired(numbers(of, name), numbers(against, name), measure_of(name).kind)
        for name in names_of(of)
        if name in names_of(against)
    }
    steps = {
        "step": statistics.fmean(point["step"] for point in first.values()) if first else None,
        "baseline_step": statistics.fmean(point["step"] for point in second.values()) if second else None,
    }
    return difference(rows, base), {**steps, "measures": difference(first, second)}


def interactions(arms, baseline):
    """Of a factorial: {A and B: {measure: interval}} of AB - A - B + baseline, seed by seed (of logarithms, a factor).

    AB is an arm whose changes are those of two others together. What is not 0 (not 1) is more than both add up to.
    """
    changes = {name: set(arm["changes"].items()) for name, arm in arms.items()}
    found = {}
    for both in arms:
        for a in arms:
            for b in arms:
                parts = changes[a] and changes[b] and not changes[a] & changes[b]
                if a < b and parts and changes[a] | changes[b] == changes[both]:
                    rows = [done(arms[name]["seeds"]) for name in (both, baseline, a, b)]
                    found[f"{a} and {b}"] = {
                        name: _interaction([numbers(of, name) for of in rows], measure_of(name).kind)
                        for name in names_of(rows[0])
                    }
    return found


def _interaction(values, kind):
    seeds = [s for s in values[0] if all(of.get(s) is not None and (kind != "log" or of[s] > 0) for of in values)]
    if kind == "log":
        return interval([values[0][s] * values[1][s] / (values[2][s] * values[3][s]) for s in seeds], "log")
    return interval([values[0][s] + values[1][s] - values[2][s] - values[3][s] for s in seeds])


def arm_summary(rows):
    """{"done", "diverged", "verdicts", "mean"} of an arm: counts, and every measure over the runs that ended."""
    ended = done(rows)
    verdicts = {}
    for row in ended.values():
        for what, verdict in row["verdicts"].items():
            counts = verdicts.setdefault(what, {})
            counts[verdict] = counts.get(verdict, 0) + 1
    return {
        "done": len(ended),
        "diverged": sum(row["status"] == "diverged" for row in rows),
        "verdicts": verdicts,
        "mean": {name: interval(numbers(ended, name).values(), measure_of(name).kind) for name in names_of(ended)},
    }
