"""Tests H1 to H7, claims of the field's popular summary (Sun et al. 2026, arXiv 2603.05498), all by one rule.

Each hypothesis says which number of which arm should lie in which range, what must be present for that to mean
anything, and when a study cannot ask it. We take the 95% interval of the median over seeds by order statistics, which
is valid for any distribution: with six to eight seeds it runs from the least value to the largest, with nine from the
second to the last but one. A part is `supported` if the interval lies within its range and `contradicted` if it lies
outside. Otherwise the verdict is `cannot tell`, with the seeds that would be needed. H7 is about differences between
arms: its parts are the planned contrasts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from spikesink.show.text import number, with_interval
from studies.aggregate import MIN_SEEDS, Estimate, estimate, known
from studies.runs.measures import measure_of
from studies.table import Arm, Contrast, Table

SUPPORTED, CONTRADICTED, CANNOT_TELL, NOT_ASKED = "supported", "contradicted", "cannot tell", "not asked"
ARCHITECTURE = {"activation", "ffn", "residual_scale", "init_scale"}
FACTOR, SHIFT = 1.5, 0.1  # an effect matters from this factor of a magnitude, or this difference of a share


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim."""

    claim: str
    verdict: str
    reason: str  # the numbers behind the verdict
    rule: str


def post_norm(table: Table) -> list[str]:
    """The arms that differ from a pre-norm baseline in being post-norm alone; none if the baseline is not pre-norm."""
    changes = {"norm_place": "post"} if table.config["norm_place"] == "pre" else None
    return [name for name, arm in table.others.items() if arm.changes == changes]


def done_arms(table: Table) -> list[str]:
    """The arms that have a finished run."""
    return [name for name, arm in table.arms.items() if arm.done]


@dataclass(frozen=True)
class Part:
    """A number that should lie between `low` and `high` in some arms."""

    terms: dict[str, int]  # measure -> its sign; the number is their sum
    low: float
    high: float
    needs: tuple[str, ...] = ()  # "spike", "sink": by detect.py's verdict, present in all runs of the arm
    arms: Callable[[Table], list[str]] = lambda table: [table.baseline]

    @property
    def name(self) -> str:
        """The number in words."""
        words = "".join(f" {'-' if sign < 0 else '+'} {name}" for name, sign in self.terms.items())
        return words.removeprefix(" + ").strip()

    @property
    def form(self) -> str:
        """The format spec for printing the number."""
        form = measure_of(next(iter(self.terms))).form
        return form if form.startswith("+") or len(self.terms) == 1 else f"+{form}"

    def over_seeds(self, arm: Arm) -> Estimate:
        """The number over the seeds of an arm that have all terms."""
        terms = [[row.measures.get(name) for name in self.terms] for row in arm.ended.values()]
        full = (known(values) for values in terms if None not in values)
        return estimate(sum(s * x for s, x in zip(self.terms.values(), values, strict=True)) for values in full)


@dataclass(frozen=True)
class Hypothesis:
    """A claim, its rule, its parts (if none, the planned contrasts), and the conditions under which a table can ask it.
    One contradicted part contradicts the claim, and all parts must be supported to support it. For contrasts, one that
    is supported is enough, and all must be contradicted."""

    claim: str
    rule: str
    parts: tuple[Part, ...] = ()
    tokens: int = 0  # the least length of a sequence
    without_bos: bool = False
    lacking: tuple[str, ...] = ()  # shares of which each must be below half in some arm
    at_least: dict[str, float] = field(default_factory=dict)  # measures that some run of the baseline must reach


class Judgement(NamedTuple):
    """The verdict on one number of one arm."""

    verdict: str
    name: str
    words: str
    need: str  # what a verdict would take, if it is "cannot tell"


def seeds_needed(part: Part, values: Sequence[float]) -> int | None:
    """About how many seeds a verdict would take: the least number at which the median's interval excludes all seeds
    outside the majority, if further seeds fall on the range's three sides (below, within, above) in the same
    proportions. None if no side has a majority."""
    below, above = sum(x < part.low for x in values), sum(x > part.high for x in values)
    majority = max(below, above, len(values) - below - above)
    if 2 * majority <= len(values):
        return None
    minority = 1 - majority / len(values)
    from scipy import stats

    return next((n for n in range(MIN_SEEDS, 1000) if stats.binom.ppf(0.025, n, 0.5) > math.ceil(minority * n)), None)


def judge_part(part: Part, name: str, arm: Arm) -> Judgement:
    """The judgement of a part in one arm."""
    result = part.over_seeds(arm)
    ci, absent = result.ci95, [f"{kind}s" for kind in part.needs if arm.present(kind) < max(1, arm.done)]
    shown = " ".join(number(x, part.form) for x in result.values) or "–"
    if ci:
        shown = f"{with_interval(result.middle, ci, part.form)} of {result.n} seeds"
    verdict, need = CANNOT_TELL, ""
    if absent:
        need = f"{' and '.join(absent)} in all runs of {name}"
    elif ci is None:
        need = f"{MIN_SEEDS} seeds ({result.n} ran)"
    elif part.low <= ci[0] and ci[1] <= part.high:
        verdict = SUPPORTED
    elif ci[1] < part.low or ci[0] > part.high:
        verdict = CONTRADICTED
    else:
        n = seeds_needed(part, result.values)
        need = f"about {n} seeds of {name}" if n else f"seeds of {name} of which most lie on one side"
    return Judgement(verdict, part.name, f"{name} {shown}", need)


def judge_contrast(contrast: Contrast) -> Judgement:
    """The judgement of "this change matters": it does if Holm's p is below .05 and the difference is beyond FACTOR or
    SHIFT; it does not if the whole interval lies within them."""
    change, measure, arm = contrast.difference, measure_of(contrast.measure), contrast.arm
    if change is None or change.ci95 is None or change.middle is None:
        return Judgement(CANNOT_TELL, contrast.measure, f"{arm} –", f"{MIN_SEEDS} seeds of {arm} and the baseline")
    low, high = (1 / FACTOR, FACTOR) if measure.kind == "log" else (-SHIFT, SHIFT)
    form = ".2f" if measure.kind == "log" else f"+{measure.form}"
    inside = low <= change.ci95[0] and change.ci95[1] <= high
    clear = contrast.clear and not low <= change.middle <= high
    verdict = CONTRADICTED if inside else SUPPORTED if clear else CANNOT_TELL
    words = f"{arm} {with_interval(change.middle, change.ci95, form)}"
    return Judgement(verdict, contrast.measure, words, f"more seeds of {arm}")


def not_asked(table: Table, hypothesis: Hypothesis) -> str:
    """Why a table cannot ask a hypothesis; '' if it can."""
    base, parts, T = table.base.measures, hypothesis.parts, table.measured.seq_len
    if hypothesis.tokens > T:
        return f"one token of a sequence of {T} is {1 / T:.2%}; {hypothesis.tokens} tokens are needed"
    if hypothesis.without_bos and table.config["bos"]:
        return "sequences start with BOS, and spikes on BOS cannot be on punctuation"
    if any(not part.arms(table) for part in parts):
        return "it takes a pre-norm baseline and an arm that is post-norm and nothing else"
    if missing := [name for part in parts for name in [*part.terms, *hypothesis.at_least] if name not in base]:
        return f"not measured: {', '.join(dict.fromkeys(missing))}"
    for name, least in hypothesis.at_least.items():
        if (most := max(base[name].values, default=0.0)) < least:
            return f"{name}: no run has more than {most:.1%}, near chance; {least:.0%} are needed"
    arms = [table.arms[name].measures for name in done_arms(table)]
    if full := [name for name in hypothesis.lacking if all((arm[name].middle or 0.0) >= 0.5 for arm in arms)]:
        return f"{' and '.join(full)}: above half in every arm, where a rule that always fires passes"
    return "" if parts or architecture(table) else "no planned contrast changes activation or residual scaling alone"


def architecture(table: Table) -> list[Contrast]:
    """The planned contrasts of arms that change the activation function or the residual's scaling alone."""
    return [contrast for contrast in table.contrasts if table.arms[contrast.arm].changes.keys() <= ARCHITECTURE]


def judge(table: Table) -> dict[str, Verdict]:
    """{name: Verdict} of the hypotheses that the study asks; the verdict is `not asked` where the table cannot ask."""
    return {name: judge_hypothesis(table, HYPOTHESES[name]) for name in HYPOTHESES if name in table.asked}


def judge_hypothesis(table: Table, hypothesis: Hypothesis) -> Verdict:
    """The Verdict on one hypothesis."""
    claim, rule, parts = hypothesis.claim, hypothesis.rule, hypothesis.parts
    if not table.base.done:
        return Verdict(claim, CANNOT_TELL, "no run of the baseline has ended", rule)
    if reason := not_asked(table, hypothesis):
        return Verdict(claim, NOT_ASKED, reason, rule)
    judgements = [judge_part(part, name, table.arms[name]) for part in parts for name in part.arms(table)]
    judgements = judgements or [judge_contrast(contrast) for contrast in architecture(table)]
    if_any, if_all = (CONTRADICTED, SUPPORTED) if parts else (SUPPORTED, CONTRADICTED)
    verdicts = {judged.verdict for judged in judgements}
    verdict = if_any if if_any in verdicts else if_all if verdicts == {if_all} else CANNOT_TELL
    words: dict[str, list[str]] = {}
    for judged in judgements:
        words.setdefault(judged.name, []).append(judged.words)
    needs = dict.fromkeys(judged.need for judged in judgements if judged.verdict == verdict == CANNOT_TELL)
    reason = "; ".join(f"{name}: {', '.join(arms)}" for name, arms in words.items())
    return Verdict(claim, verdict, reason + ("; it takes " + ", ".join(needs) if needs else ""), rule)


HYPOTHESES = {
    "H1": Hypothesis(
        "spikes on about 0.2% of tokens, sinks on about 0.5%",
        "In the baseline, spikes are on 0.1 to 0.4% of tokens and sinks on 0.25 to 1% (half and twice the claim). "
        "Sequences must be so long that one token is less than 0.1%.",
        (
            Part({"spike tokens": 1}, 0.001, 0.004, ("spike",)),
            Part({"sink tokens": 1}, 0.0025, 0.01, ("sink",)),
        ),
        tokens=1024,
    ),
    "H2": Hypothesis(
        "co-occurrence above 80% pre-norm, below 10% post-norm",
        "P(sink | spike) is at least 80% in the pre-norm baseline and at most 10% in the post-norm arm. Both must have "
        "spikes and sinks.",
        (
            Part({"P(sink | spike)": 1}, 0.8, 1.0, ("spike", "sink")),
            Part({"P(sink | spike)": 1}, 0.0, 0.1, ("spike", "sink"), post_norm),
        ),
    ),
    "H3": Hypothesis(
        "zeroing spikes raises perplexity by 3 to 5%",
        "In the baseline, zeroing spikes costs more than its controls, and raises perplexity by 1.5 to 10%: +0.015 to "
        "+0.095 nat. (That is half and twice the claim; no affordable number of seeds would decide the claim itself.)",
        (
            Part({"spike_zero: loss": 1}, math.log(1.015), math.log(1.1), ("spike",)),
            Part({"spike_zero: loss": 1, "spike_zero: control loss": -1}, 0.0, math.inf, ("spike",)),
        ),
    ),
    "H4": Hypothesis(
        "flattening sinks hurts syntax more than zeroing spikes hurts the loss",
        "In the baseline, sink_mask lowers BLiMP accuracy (0 to 1) by more than the nats that spike_zero adds to the "
        "loss. Some run must have at least 60% on BLiMP.",
        (Part({"sink_mask: BLiMP": -1, "spike_zero: loss": -1}, 0.0, math.inf, ("spike", "sink")),),
        at_least={"BLiMP": 0.6},
    ),
    "H5": Hypothesis(
        "spikes on punctuation, sinks on first tokens",
        "In a baseline without BOS, most spike tokens come after the first position, and most of these are punctuation "
        "(among the strongest, which detect.py lists); most sink tokens come first. Frequent, rare and special tokens "
        "are not considered.",
        (
            Part({"spikes first": 1}, 0.0, 0.5, ("spike",)),
            Part({"spikes punctuation": 1}, 0.5, 1.0, ("spike",)),
            Part({"sinks first": 1}, 0.5, 1.0, ("sink",)),
        ),
        without_bos=True,
    ),
    "H6": Hypothesis(
        "a 99.9th percentile and a share of all attention find them",
        "In the trained models of every arm, the percentile rule fires in as many sequences as have a spike, and the "
        "share rule in as many as have a sink in one head, within 10% of the sequences. Some arm must lack either.",
        (
            Part({"percentile sequences": 1, "spike sequences": -1}, -0.1, 0.1, (), done_arms),
            Part({"share sequences": 1, "best head": -1}, -0.1, 0.1, (), done_arms),
        ),
        lacking=("spike sequences", "best head"),
    ),
    "H7": Hypothesis(
        "activation function and residual scaling matter too",
        "Among the planned contrasts of arms that change these alone, one differs (Holm, p < .05) by more than a "
        f"factor of {FACTOR:g} or {SHIFT:.0%} of a share. It is contradicted if the intervals of all lie within that.",
    ),
}
