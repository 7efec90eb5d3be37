"""H1 to H7 of the field's popular summary (Sun et al. 2026, arXiv 2603.05498), each a row, judged by one rule.

A row says which measure of which arm is to lie in which range, what must be there for that to mean anything, and when
a study cannot ask it. The judge takes the 95% interval of the median seed by order statistics, which is exact for any
distribution: with six to eight seeds from the least to the largest, with nine from the second to the last but one. A
part is `supported` if the interval lies within its range, `contradicted` if it lies outside, and `cannot tell`
otherwise, with the seeds that it would take.
H7 is about differences between arms, so that its parts are the study's planned contrasts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy import stats

from spikesink.show.text import interval as brackets
from spikesink.show.text import number
from studies.aggregate import LEAST, Estimate, estimate, known
from studies.runs.measures import measure_of
from studies.table import DIFFERS, Arm, Contrast, Table

SUPPORTED, CONTRADICTED, CANNOT_TELL, NOT_ASKED = "supported", "contradicted", "cannot tell", "not asked"


@dataclass(frozen=True)
class Verdict:
    """What is claimed, what the table says to that and by which numbers, and the rule."""

    claim: str
    verdict: str
    reason: str
    rule: str


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

    def values(self, arm: Arm) -> list[float]:
        """Of the arm's runs that have it."""
        of_runs = [[row.measures.get(name) for name in self.of] for row in arm.ended.values()]
        full = (known(values) for values in of_runs if None not in values)
        return [sum(sign * x for sign, x in zip(self.of.values(), values, strict=True)) for values in full]


@dataclass(frozen=True)
class Hypothesis:
    """A claim, its rule in words, its parts (none: the planned contrasts), and why a table cannot ask it, '' if it can.

    A part that is contradicted contradicts it; all must be supported. Of contrasts it is the other way round.
    """

    claim: str
    rule: str
    parts: tuple[Part, ...]
    not_asked: Callable[[Table], str]


class Judged(NamedTuple):
    """Of one number of one arm: the verdict, the number in words, and what it would take where it cannot tell."""

    verdict: str
    name: str
    words: str
    need: str = ""
    arm: str = ""


def seeds_needed(low: float, high: float, values: Sequence[float]) -> int | None:
    """About how many seeds a verdict would take, if as many of further ones lay below, within and above the range: the
    least n at which the median's interval leaves out as many as are not with most. None where no side has most."""
    below, above = sum(x < low for x in values), sum(x > high for x in values)
    most = max(below, above, len(values) - below - above)
    if 2 * most <= len(values):
        return None
    other = 1 - most / len(values)
    return next((n for n in range(LEAST, 1000) if stats.binom.ppf(0.025, n, 0.5) > math.ceil(other * n)), None)


def judge_part(table: Table, part: Part) -> Iterator[Judged]:
    """Of a part, arm by arm."""
    for name in part.arms(table):
        found = estimate(part.values(table.arms[name]), "share")  # the median seed
        shown = " ".join(number(x, part.form) for x in found.values) or "–"
        if found.ci95:
            shown = f"{number(found.middle, part.form)} {brackets(found.ci95, part.form)} of {found.n} seeds"
        verdict, need = judge_values(table.arms[name], part, found)
        yield Judged(verdict, part.name, f"{name} {shown}", need, name)


def judge_values(arm: Arm, part: Part, found: Estimate) -> tuple[str, str]:
    """(verdict, what it would take instead of `cannot tell`) of a part, by its numbers in an arm."""
    gone = [what for what in part.needs if arm.present(what) < max(1, arm.done)]
    if gone:
        return CANNOT_TELL, f"{' and '.join(f'{what}s' for what in gone)} in all runs"
    ci = found.ci95
    if ci is None:
        return CANNOT_TELL, f"{LEAST} seeds ({found.n} ran)"
    if part.low <= ci[0] and ci[1] <= part.high:
        return SUPPORTED, ""
    if ci[1] < part.low or ci[0] > part.high:
        return CONTRADICTED, ""
    n = seeds_needed(part.low, part.high, found.values)
    return CANNOT_TELL, f"about {n} seeds" if n else "seeds that agree more: no side of the range has most of these"


def judge_contrast(contrast: Contrast) -> Judged:
    """Of "this matters": by Holm's p, and by whether the interval allows for more than a factor of FACTOR, or a
    difference of SHIFT of a share."""
    found, measure = contrast.difference, measure_of(contrast.measure)
    if found is None or found.ci95 is None or found.middle is None:
        return Judged(CANNOT_TELL, contrast.measure, f"{contrast.arm} –", contrast.says, contrast.arm)
    low, high = (1 / FACTOR, FACTOR) if measure.kind == "log" else (-SHIFT, SHIFT)
    form = ".2f" if measure.kind == "log" else f"+{measure.form}"
    words = f"{contrast.arm} {number(found.middle, form)} {brackets(found.ci95, form)}"
    if low <= found.ci95[0] and found.ci95[1] <= high:
        return Judged(CONTRADICTED, contrast.measure, words)
    if contrast.says == DIFFERS and not low <= found.middle <= high:
        return Judged(SUPPORTED, contrast.measure, words)
    return Judged(CANNOT_TELL, contrast.measure, words, "more seeds", contrast.arm)


def judge(table: Table) -> dict[str, Verdict]:
    """{name: its Verdict} of H1 to H7; `not asked` where the study does not ask it, or cannot."""
    return {name: _judge(table, name, hypothesis) for name, hypothesis in HYPOTHESES.items()}


def _judge(table: Table, name: str, of: Hypothesis) -> Verdict:
    if name not in table.asked:
        return Verdict(of.claim, NOT_ASKED, "the study does not ask it", of.rule)
    if not table.base.done:
        return Verdict(of.claim, CANNOT_TELL, "no run of the baseline has ended", of.rule)
    if reason := of.not_asked(table):
        return Verdict(of.claim, NOT_ASKED, reason, of.rule)
    found = [judged for part in of.parts for judged in judge_part(table, part)]
    decides, all_else = CONTRADICTED, SUPPORTED  # one part is enough against
    if not of.parts:
        found = [judge_contrast(contrast) for contrast in architecture(table)]
        decides, all_else = SUPPORTED, CONTRADICTED  # one is enough for
    verdicts = {judged.verdict for judged in found}
    verdict = decides if decides in verdicts else all_else if verdicts == {all_else} else CANNOT_TELL
    names, needs = (
        dict.fromkeys(of_all) for of_all in zip(*((judged.name, judged.need) for judged in found), strict=True)
    )
    words = [f"{name}: {', '.join(judged.words for judged in found if judged.name == name)}" for name in names]
    if verdict == CANNOT_TELL:
        arms = {need: dict.fromkeys(judged.arm for judged in found if judged.need == need) for need in needs if need}
        words.append("it takes " + ", ".join(f"{need} of {', '.join(those)}" for need, those in arms.items()))
    return Verdict(of.claim, verdict, "; ".join(words), of.rule)


# ------------------------------------------------------------------------------------- what the rows are made of


def changed(table: Table, *keys: str) -> dict[str, Arm]:
    """{name: arm} of the arms that differ from the baseline in these keys and no others."""
    return {name: arm for name, arm in table.others.items() if arm.changes and set(arm.changes) <= set(keys)}


def post_norm(table: Table) -> list[str]:
    """The arm that is post-norm and nothing else, if there is one."""
    return [name for name, arm in changed(table, "norm_place").items() if arm.changes["norm_place"] == "post"][:1]


def ended(table: Table) -> list[str]:
    """The arms of which a run has ended."""
    return [name for name, arm in table.arms.items() if arm.done]


ARCHITECTURE = ("activation", "ffn", "residual_scale", "init_scale")
FACTOR, SHIFT = 1.5, 0.1  # what matters: half as much again of a magnitude, a tenth of a share


def architecture(table: Table) -> list[Contrast]:
    """The planned contrasts of arms that change the activation function or the residual's scaling alone."""
    arms = changed(table, *ARCHITECTURE)
    return [contrast for contrast in table.contrasts if contrast.arm in arms]


def too_short(table: Table) -> str:
    """H1: one token of a sequence must be less than half of the share that is claimed."""
    first = 1 / table.measured.seq_len
    return f"one token of a sequence of {table.measured.seq_len} is {first:.2%}" if first >= 0.001 else ""


def no_post_norm(table: Table) -> str:
    """H2 is about two arms."""
    there = table.config["norm_place"] == "pre" and post_norm(table)
    return "" if there else "it takes a pre-norm baseline and an arm that is post-norm and nothing else"


def no_zeroing(table: Table) -> str:
    """H3 is about an intervention."""
    return "" if "spike_zero: loss" in table.base.measures else "spike_zero is not among the study's ablations"


def no_grammar(table: Table) -> str:
    """H4 takes a model that knows some grammar."""
    measures = table.base.measures
    if any(name not in measures for name in ("BLiMP", "sink_mask: BLiMP", "spike_zero: loss")):
        return "it takes sink_mask, spike_zero and BLiMP (probes, and python data/blimp/prepare.py)"
    most = max(measures["BLiMP"].values)
    return f"no run has more than {most:.1%} on BLiMP, near the 50% of chance: no syntax to hurt" if most < 0.6 else ""


def with_bos(table: Table) -> str:
    """H5 is decided by construction where a special token stands first."""
    return "sequences start with BOS: what sits on it sits on no punctuation" if table.config["bos"] else ""


def always_there(table: Table) -> str:
    """H6 takes models with and without the phenomena: a rule that always fires agrees with those that have them."""
    of = {name: [table.arms[arm].measures[name] for arm in ended(table)] for name in ("spike sequences", "best head")}
    full = [name for name, found in of.items() if all((x.middle or 0.0) >= 0.5 for x in found)]
    return f"{' and '.join(full)}: most in every arm, where a rule that always fires passes" if full else ""


def no_contrast(table: Table) -> str:
    """H7 is about planned contrasts."""
    return "" if architecture(table) else "no planned contrast changes activation or residual scaling alone"


HYPOTHESES = {
    "H1": Hypothesis(
        "spikes on about 0.2% of tokens, sinks on about 0.5%",
        "In the baseline, spikes on 0.1 to 0.4% of tokens and sinks on 0.25 to 1% (half and twice the claim), where a "
        "token of a sequence is less than 0.1% of it.",
        (
            Part({"spike tokens": 1}, 0.001, 0.004, ("spike",)),
            Part({"sink tokens": 1}, 0.0025, 0.01, ("sink",)),
        ),
        too_short,
    ),
    "H2": Hypothesis(
        "co-occurrence above 80% pre-norm, below 10% post-norm",
        "P(sink | spike) is at least 80% in the pre-norm baseline and at most 10% in the post-norm arm; both must have "
        "spikes and sinks.",
        (
            Part({"P(sink | spike)": 1}, 0.8, 1.0, ("spike", "sink")),
            Part({"P(sink | spike)": 1}, 0.0, 0.1, ("spike", "sink"), post_norm),
        ),
        no_post_norm,
    ),
    "H3": Hypothesis(
        "zeroing spikes raises perplexity by 3 to 5%",
        "In the baseline, zeroing spikes costs more than its controls, and raises perplexity by 1.5 to 10% (half and "
        "twice the claim, which no number of seeds at hand would decide): +0.015 to +0.095 nat.",
        (
            Part({"spike_zero: loss": 1}, math.log(1.015), math.log(1.1), ("spike",)),
            Part({"spike_zero: loss": 1, "spike_zero: control loss": -1}, 0.0, math.inf, ("spike",)),
        ),
        no_zeroing,
    ),
    "H4": Hypothesis(
        "flattening sinks hurts syntax more than zeroing spikes hurts the loss",
        "In the baseline, the BLiMP accuracy (0 to 1) that sink_mask takes, less the nats that spike_zero adds to the "
        "loss, is above 0; where a run has at least 60% on BLiMP.",
        (Part({"sink_mask: BLiMP": -1, "spike_zero: loss": -1}, 0.0, math.inf, ("spike", "sink")),),
        no_grammar,
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
        with_bos,
    ),
    "H6": Hypothesis(
        "a 99.9th percentile and a share of all attention find them",
        "In the trained models of every arm, the percentile rule fires in as many sequences as have a spike, the share "
        "rule in as many as have a sink in one head, within 10% of the sequences; where some arm lacks either.",
        (
            Part({"percentile sequences": 1, "spike sequences": -1}, -0.1, 0.1, (), ended),
            Part({"share sequences": 1, "best head": -1}, -0.1, 0.1, (), ended),
        ),
        always_there,
    ),
    "H7": Hypothesis(
        "activation function and residual scaling matter too",
        "Of the planned contrasts of arms that change these alone: one differs (Holm, p < .05) by more than a factor "
        f"of {FACTOR:g} or {SHIFT:.0%} of a share; contradicted if the intervals of all lie within that.",
        (),
        no_contrast,
    ),
}
