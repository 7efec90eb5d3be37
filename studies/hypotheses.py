"""H1 to H7 of the field's popular summary (Sun et al. 2026, arXiv 2603.05498), each a row, judged by one rule.

A row says which number of which arm is to lie in which range, what must be there for that to mean anything, and when a
study cannot ask it. The judge takes the 95% interval of the median seed by order statistics, which is exact for any
distribution: with six to eight seeds from the least to the largest, with nine from the second to the last but one. A
part is `supported` if the interval lies within its range, `contradicted` if it lies outside, and `cannot tell`
otherwise, with the seeds that it would take. H7 is about differences between arms: its parts are the planned contrasts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from spikesink.show.text import interval as brackets
from spikesink.show.text import number
from studies.aggregate import LEAST, Estimate, estimate, known
from studies.runs.measures import measure_of
from studies.table import Arm, Contrast, Table

SUPPORTED, CONTRADICTED, CANNOT_TELL, NOT_ASKED = "supported", "contradicted", "cannot tell", "not asked"
ARCHITECTURE = {"activation", "ffn", "residual_scale", "init_scale"}
FACTOR, SHIFT = 1.5, 0.1  # what matters: half as much again of a magnitude, a tenth of a share


@dataclass(frozen=True)
class Verdict:
    """What is claimed, what the table says to that and by which numbers, and the rule."""

    claim: str
    verdict: str
    reason: str
    rule: str


def post_norm(table: Table) -> list[str]:
    """The arm that is post-norm and nothing else, if there is one and the baseline is pre-norm."""
    changes = {"norm_place": "post"}
    return [
        name for name, arm in table.others.items() if arm.changes == changes and table.config["norm_place"] == "pre"
    ]


def ended(table: Table) -> list[str]:
    """The arms of which a run has ended."""
    return [name for name, arm in table.arms.items() if arm.done]


@dataclass(frozen=True)
class Part:
    """A number of every seed of some arms that is to lie between `low` and `high`."""

    of: dict[str, int]  # measures with their signs: the number is their sum
    low: float
    high: float
    needs: tuple[str, ...] = ()  # "spike", "sink": must be present, by detect.py's verdict, in all of the arm's runs
    arms: Callable[[Table], list[str]] = lambda table: [table.baseline]

    @property
    def name(self) -> str:
        """The number in words."""
        return (
            "".join(f" {'-' if sign < 0 else '+'} {name}" for name, sign in self.of.items()).removeprefix(" + ").strip()
        )

    @property
    def form(self) -> str:
        """How it is printed."""
        form = measure_of(next(iter(self.of))).form
        return form if form.startswith("+") or len(self.of) == 1 else f"+{form}"

    def over_seeds(self, arm: Arm) -> Estimate:
        """Of the arm's runs that have it."""
        of_runs = [[row.measures.get(name) for name in self.of] for row in arm.ended.values()]
        full = (known(values) for values in of_runs if None not in values)
        return estimate(sum(s * x for s, x in zip(self.of.values(), values, strict=True)) for values in full)


@dataclass(frozen=True)
class Hypothesis:
    """A claim, its rule in words, its parts (none: the planned contrasts), and when a table can ask it.

    One part that is contradicted contradicts it, and all must be supported. Of contrasts it is the other way round.
    """

    claim: str
    rule: str
    parts: tuple[Part, ...] = ()
    tokens: int = 0  # of a sequence, at least
    without_bos: bool = False
    lacking: tuple[str, ...] = ()  # shares that are below half in some arm
    at_least: dict[str, float] = field(default_factory=dict)  # measures that some run of the baseline must reach


class Judged(NamedTuple):
    """Of one number of one arm: the verdict, the number in words, and what it would take where it cannot tell."""

    verdict: str
    name: str
    words: str
    need: str


def seeds_needed(part: Part, values: Sequence[float]) -> int | None:
    """About how many seeds a verdict would take, if as many of further ones lay below, within and above the range: the
    least n at which the median's interval leaves out as many as are not with most. None where no side has most."""
    below, above = sum(x < part.low for x in values), sum(x > part.high for x in values)
    most = max(below, above, len(values) - below - above)
    if 2 * most <= len(values):
        return None
    other = 1 - most / len(values)
    from scipy import stats

    return next((n for n in range(LEAST, 1000) if stats.binom.ppf(0.025, n, 0.5) > math.ceil(other * n)), None)


def judge_part(part: Part, name: str, arm: Arm) -> Judged:
    """Of a part in one arm."""
    found = part.over_seeds(arm)
    ci, gone = found.ci95, [f"{what}s" for what in part.needs if arm.present(what) < max(1, arm.done)]
    shown = " ".join(number(x, part.form) for x in found.values) or "–"
    if ci:
        shown = f"{number(found.middle, part.form)} {brackets(ci, part.form)} of {found.n} seeds"
    verdict, need = CANNOT_TELL, ""
    if gone:
        need = f"{' and '.join(gone)} in all runs of {name}"
    elif ci is None:
        need = f"{LEAST} seeds ({found.n} ran)"
    elif part.low <= ci[0] and ci[1] <= part.high:
        verdict = SUPPORTED
    elif ci[1] < part.low or ci[0] > part.high:
        verdict = CONTRADICTED
    else:
        n = seeds_needed(part, found.values)
        need = f"about {n} seeds of {name}" if n else f"seeds of {name} of which most lie on one side"
    return Judged(verdict, part.name, f"{name} {shown}", need)


def judge_contrast(of: Contrast) -> Judged:
    """Of "this matters": by Holm's p, and by whether the interval allows for more than a factor of FACTOR, or a
    difference of SHIFT of a share."""
    found, measure = of.difference, measure_of(of.measure)
    if found is None or found.ci95 is None or found.middle is None:
        return Judged(CANNOT_TELL, of.measure, f"{of.arm} –", f"{LEAST} seeds of {of.arm} and the baseline")
    low, high = (1 / FACTOR, FACTOR) if measure.kind == "log" else (-SHIFT, SHIFT)
    form = ".2f" if measure.kind == "log" else f"+{measure.form}"
    inside = low <= found.ci95[0] and found.ci95[1] <= high
    clear = of.clear and not low <= found.middle <= high
    verdict = CONTRADICTED if inside else SUPPORTED if clear else CANNOT_TELL
    words = f"{of.arm} {number(found.middle, form)} {brackets(found.ci95, form)}"
    return Judged(verdict, of.measure, words, f"more seeds of {of.arm}")


def not_asked(table: Table, of: Hypothesis) -> str:
    """Why a table cannot ask a hypothesis; '' if it can."""
    base, token = table.base.measures, 1 / table.measured.seq_len
    if table.measured.seq_len < of.tokens:
        return f"one token of a sequence of {table.measured.seq_len} is {token:.2%}; {of.tokens} tokens are needed"
    if of.without_bos and table.config["bos"]:
        return "sequences start with BOS: what sits on it sits on no punctuation"
    if any(not part.arms(table) for part in of.parts):
        return "it takes a pre-norm baseline and an arm that is post-norm and nothing else"
    if missing := [name for part in of.parts for name in [*part.of, *of.at_least] if name not in base]:
        return f"not measured: {', '.join(dict.fromkeys(missing))}"
    for name, least in of.at_least.items():
        if (most := max(base[name].values, default=0.0)) < least:
            return f"{name}: no run has more than {most:.1%}, near chance; {least:.0%} are needed"
    arms = [table.arms[name].measures for name in ended(table)]
    if full := [name for name in of.lacking if all((arm[name].middle or 0.0) >= 0.5 for arm in arms)]:
        return f"{' and '.join(full)}: most in every arm, where a rule that always fires passes"
    return "" if of.parts or architecture(table) else "no planned contrast changes activation or residual scaling alone"


def architecture(table: Table) -> list[Contrast]:
    """The planned contrasts of arms that change the activation function or the residual's scaling alone."""
    return [of for of in table.contrasts if table.arms[of.arm].changes.keys() <= ARCHITECTURE]


def judge(table: Table) -> dict[str, Verdict]:
    """{name: its Verdict} of those of H1 to H7 that the study asks; `not asked` where it cannot."""
    return {name: judge_one(table, HYPOTHESES[name]) for name in HYPOTHESES if name in table.asked}


def judge_one(table: Table, of: Hypothesis) -> Verdict:
    """The Verdict on one."""
    if not table.base.done:
        return Verdict(of.claim, CANNOT_TELL, "no run of the baseline has ended", of.rule)
    if reason := not_asked(table, of):
        return Verdict(of.claim, NOT_ASKED, reason, of.rule)
    found = [judge_part(part, name, table.arms[name]) for part in of.parts for name in part.arms(table)]
    found = found or [judge_contrast(contrast) for contrast in architecture(table)]
    one, every = (CONTRADICTED, SUPPORTED) if of.parts else (SUPPORTED, CONTRADICTED)
    verdicts = {judged.verdict for judged in found}
    verdict = one if one in verdicts else every if verdicts == {every} else CANNOT_TELL
    words: dict[str, list[str]] = {}
    for judged in found:
        words.setdefault(judged.name, []).append(judged.words)
    needs = dict.fromkeys(judged.need for judged in found if judged.verdict == verdict == CANNOT_TELL)
    reason = "; ".join(f"{name}: {', '.join(of_arms)}" for name, of_arms in words.items())
    return Verdict(of.claim, verdict, reason + ("; it takes " + ", ".join(needs) if needs else ""), of.rule)


HYPOTHESES = {
    "H1": Hypothesis(
        "spikes on about 0.2% of tokens, sinks on about 0.5%",
        "In the baseline, spikes on 0.1 to 0.4% of tokens and sinks on 0.25 to 1% (half and twice the claim), where a "
        "token of a sequence is less than 0.1% of it.",
        (
            Part({"spike tokens": 1}, 0.001, 0.004, ("spike",)),
            Part({"sink tokens": 1}, 0.0025, 0.01, ("sink",)),
        ),
        tokens=1024,
    ),
    "H2": Hypothesis(
        "co-occurrence above 80% pre-norm, below 10% post-norm",
        "P(sink | spike) is at least 80% in the pre-norm baseline and at most 10% in the post-norm arm; both must have "
        "spikes and sinks.",
        (
            Part({"P(sink | spike)": 1}, 0.8, 1.0, ("spike", "sink")),
            Part({"P(sink | spike)": 1}, 0.0, 0.1, ("spike", "sink"), post_norm),
        ),
    ),
    "H3": Hypothesis(
        "zeroing spikes raises perplexity by 3 to 5%",
        "In the baseline, zeroing spikes costs more than its controls, and raises perplexity by 1.5 to 10% (half and "
        "twice the claim, which no number of seeds at hand would decide): +0.015 to +0.095 nat.",
        (
            Part({"spike_zero: loss": 1}, math.log(1.015), math.log(1.1), ("spike",)),
            Part({"spike_zero: loss": 1, "spike_zero: control loss": -1}, 0.0, math.inf, ("spike",)),
        ),
    ),
    "H4": Hypothesis(
        "flattening sinks hurts syntax more than zeroing spikes hurts the loss",
        "In the baseline, the BLiMP accuracy (0 to 1) that sink_mask takes, less the nats that spike_zero adds to the "
        "loss, is above 0; where a run has at least 60% on BLiMP.",
        (Part({"sink_mask: BLiMP": -1, "spike_zero: loss": -1}, 0.0, math.inf, ("spike", "sink")),),
        at_least={"BLiMP": 0.6},
    ),
    "H5": Hypothesis(
        "spikes on punctuation, sinks on first tokens",
        "In a baseline without BOS, most spike tokens stand behind the first position, most of these are punctuation "
        "(of the strongest that detect.py lists); most sink tokens stand first. Frequent, rare and special tokens are "
        "not looked at.",
        (
            Part({"spikes first": 1}, 0.0, 0.5, ("spike",)),
            Part({"spikes punctuation": 1}, 0.5, 1.0, ("spike",)),
            Part({"sinks first": 1}, 0.5, 1.0, ("sink",)),
        ),
        without_bos=True,
    ),
    "H6": Hypothesis(
        "a 99.9th percentile and a share of all attention find them",
        "In the trained models of every arm, the percentile rule fires in as many sequences as have a spike, the share "
        "rule in as many as have a sink in one head, within 10% of the sequences; where some arm lacks either.",
        (
            Part({"percentile sequences": 1, "spike sequences": -1}, -0.1, 0.1, (), ended),
            Part({"share sequences": 1, "best head": -1}, -0.1, 0.1, (), ended),
        ),
        lacking=("spike sequences", "best head"),
    ),
    "H7": Hypothesis(
        "activation function and residual scaling matter too",
        "Of the planned contrasts of arms that change these alone: one differs (Holm, p < .05) by more than a factor "
        f"of {FACTOR:g} or {SHIFT:.0%} of a share; contradicted if the intervals of all lie within that.",
    ),
}
