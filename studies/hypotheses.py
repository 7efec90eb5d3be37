"""H1 to H7 of the field's popular summary (Sun et al. 2026, arXiv 2603.05498), each a rule over a study's table.

A verdict is `supported`, `contradicted` or `underpowered` (absence in a small run is no evidence, nor are fewer than
three seeds), or `not asked` where the study has nothing to say. Numbers are means over seeds with 95% intervals.
"""

import math
from collections.abc import Callable

from spikesink.show.text import interval as brackets
from spikesink.show.text import number
from studies.aggregate import done, numbers, paired, t_interval
from studies.runs.measures import measure_of
from studies.table import Arm, Estimate, Table, Verdict

SUPPORTED, CONTRADICTED, UNDERPOWERED, NOT_ASKED = "supported", "contradicted", "underpowered", "not asked"


def within(found: Estimate, low: float, high: float) -> str:
    """The verdict on "between low and high": by an interval that lies inside, outside, or neither."""
    if found.ci95 is None:
        return UNDERPOWERED
    first, last = found.ci95
    if low <= first and last <= high:
        return SUPPORTED
    return CONTRADICTED if last < low or first > high else UNDERPOWERED


def both(*verdicts: str) -> str:
    """Contradicted if one is, supported if all are."""
    if CONTRADICTED in verdicts:
        return CONTRADICTED
    return SUPPORTED if set(verdicts) == {SUPPORTED} else UNDERPOWERED


def in_words(found: Estimate, name: str) -> str:
    """A measure's mean and interval in words, with the number of seeds."""
    form = measure_of(name).form
    text = f"{number(found.mean, form)} {brackets(found.ci95, form)}".strip()
    return f"{name} {text} ({found.n} seed{'s' * (found.n != 1)})"


def changed(table: Table, *keys: str) -> dict[str, Arm]:
    """{name: arm} of the arms that differ from the baseline in these keys and no others."""
    return {name: arm for name, arm in table.arms.items() if arm.changes and set(arm.changes) <= set(keys)}


def missing(arm: Arm, *phenomena: str) -> list[str]:
    """Those of "spike" and "sink" that are not present, by detect.py's verdict, in every run of an arm that ended."""
    return [what for what in phenomena if arm.verdicts.get(what, {}).get("present", 0) < max(1, arm.done)]


def lacks(arm: Arm, *phenomena: str) -> str:
    """A clause on what an arm lacks, or ''."""
    gone = missing(arm, *phenomena)
    return f"; {' and '.join(f'{what}s' for what in gone)} are not present in all of its runs" if gone else ""


def where_present(verdict: str, words: str, arm: Arm, *phenomena: str) -> tuple[str, str]:
    """A verdict and its words, of an arm in which these must be present."""
    return (UNDERPOWERED if missing(arm, *phenomena) else verdict), words + lacks(arm, *phenomena)


def shares(table: Table) -> tuple[str, str]:
    """H1: spikes on about 0.2% of tokens, sinks on about 0.5%. Within half and twice that, in the baseline.

    Where either is not present in all runs: underpowered, unless there are too many of them.
    """
    arm, mean = table.base, table.base.mean
    wanted = {"spike tokens": ("spike", 0.002), "sink tokens": ("sink", 0.005)}
    verdicts = []
    for name, (what, share) in wanted.items():
        verdict = within(mean[name], share / 2, 2 * share)
        too_many = verdict == CONTRADICTED and (mean[name].mean or 0) > share
        verdicts.append(UNDERPOWERED if missing(arm, what) and not too_many else verdict)
    first, words = 1 / table.measured.seq_len, ", ".join(in_words(mean[name], name) for name in wanted)
    return both(*verdicts), f"{words}; one token of each sequence would be {first:.2%}{lacks(arm, 'spike', 'sink')}"


def co_occurrence(table: Table) -> tuple[str, str]:
    """H2: P(sink | spike) above 80% pre-norm, below 10% post-norm. Spikes and sinks must be present in both arms."""
    pre = table.base
    post = next((arm for arm in changed(table, "norm_place").values() if arm.changes["norm_place"] == "post"), None)
    if table.config["norm_place"] != "pre" or post is None:
        return NOT_ASKED, "it takes a pre-norm baseline and an arm that is post-norm and nothing else"
    name = "P(sink | spike)"
    of_pre, of_post = pre.mean.get(name, t_interval([])), post.mean.get(name, t_interval([]))
    verdict = both(within(of_pre, 0.8, 1.0), within(of_post, 0.0, 0.1))
    gaps = [f"{which}-norm{lacks(arm, 'spike', 'sink')}" for which, arm in (("pre", pre), ("post", post))]
    gaps = [gap for gap in gaps if ";" in gap]
    words = f"pre-norm {in_words(of_pre, name)}, post-norm {in_words(of_post, name)}"
    return (UNDERPOWERED if gaps else verdict), "; ".join([words, *(gap.replace(";", ":") for gap in gaps)])


def zeroing(table: Table) -> tuple[str, str]:
    """H3: zeroing spikes raises perplexity by 3 to 5%, exp(change of the loss) - 1, in the baseline."""
    arm, name = table.base, "spike_zero: loss"
    if name not in arm.mean:
        return NOT_ASKED, "spike_zero is not among the study's ablations"
    rise, control = arm.mean[name], arm.mean["spike_zero: control loss"]
    words = f"{in_words(rise, name)} nats, under its controls at most {number(control.mean, '+.4f')}"
    words += "; 3 to 5% of perplexity are +0.0296 to +0.0488"
    return where_present(within(rise, math.log(1.03), math.log(1.05)), words, arm, "spike")


def syntax(table: Table) -> tuple[str, str]:
    """H4: flattening sinks hurts syntax more than zeroing spikes hurts the loss.

    The part of BLiMP accuracy above chance that sink_mask takes, against the rise of the loss under spike_zero as a
    part of it, seed by seed in the baseline: supported if the difference is above 0, contradicted if below.
    """
    arm = table.base
    rows = done(arm.seeds)
    need = ("BLiMP", "sink_mask: BLiMP", "spike_zero: loss", "short loss")
    if not all(name in arm.mean for name in need):
        return NOT_ASKED, "it takes sink_mask, spike_zero and BLiMP (probes, and python data/blimp/prepare.py)"
    values = [numbers(rows, name) for name in need]
    lost, risen = {}, {}
    for seed in rows:
        grammar, change, rise, loss = (of_measure[seed] for of_measure in values)
        if grammar is not None and change is not None and rise is not None and loss is not None and grammar > 0.5:
            lost[seed], risen[seed] = -change / (grammar - 0.5), rise / loss
    found = paired(lost, risen)
    words = f"accuracy lost minus loss risen, as parts: {number(found.mean, '+.3f')} {brackets(found.ci95, '+.3f')}"
    words += f" ({found.n} seeds)"
    return where_present(within(found, 0.0, math.inf), words, arm, "spike", "sink")


def tokens(table: Table) -> tuple[str, str]:
    """H5: spikes on punctuation, sinks on first tokens: most of each, in the baseline.

    Of its words, frequent, rare and special tokens are not looked at; punctuation only behind the first position, among
    the strongest spike tokens that detect.py lists.
    """
    arm, mean = table.base, table.base.mean
    verdict = both(within(mean["spikes punctuation"], 0.5, 1.0), within(mean["sinks first"], 0.5, 1.0))
    first = mean["spikes first"].ci95
    if first and first[0] > 0.5:
        verdict = CONTRADICTED  # most spikes are no punctuation, whatever the others are
    words = ", ".join(in_words(mean[name], name) for name in ("spikes first", "spikes punctuation", "sinks first"))
    return where_present(verdict, words, arm, "spike", "sink")


def thresholds(table: Table) -> tuple[str, str]:
    """H6: a 99.9th percentile of channels and a share of all attention find spikes and sinks, in the baseline.

    Supported if both rules fire in most sequences and in at most 5% of those of their nulls; contradicted if either
    fires in more of its nulls' sequences.
    """
    arm, mean = table.base, table.base.mean
    verdicts, words = [], []
    for rule in ("percentile", "share"):
        fires, false = mean[f"{rule} sequences"], mean[f"{rule} false"]
        verdicts += [within(false, 0.0, 0.05), SUPPORTED if within(fires, 0.5, 1.0) == SUPPORTED else UNDERPOWERED]
        words.append(f"{in_words(fires, f'{rule} sequences')}, {in_words(false, f'{rule} false')}")
    return both(*verdicts), "; ".join(words) + lacks(arm, "spike", "sink")


ARCHITECTURE = ("activation", "ffn", "residual_scale", "init_scale")
FACTOR, SHIFT = 1.1, 0.05  # what counts as no difference: a tenth of a magnitude, 5% of a share


def elsewhere(table: Table) -> tuple[str, str]:
    """H7: activation function and residual scaling matter too.

    Over the arms that change these alone, and top1/median, Sink_1 and P(sink | spike): supported if a difference has a
    p below 0.05 over the number of differences (Bonferroni); contradicted if all intervals lie within a tenth of none
    (of a share, 5%).
    """
    arms = changed(table, *ARCHITECTURE)
    if not arms:
        return NOT_ASKED, "no arm changes activation or residual scaling alone"
    kinds = {name: measure_of(name).kind for name in ("top1/median", "Sink_1", "P(sink | spike)")}
    tried = {
        (arm, m): differences[m]
        for arm, differences in ((name, of_arm.difference or {}) for name, of_arm in arms.items())
        for m in kinds
        if m in differences
    }
    clear = {key: found for key, found in tried.items() if found.p is not None and found.p * len(tried) < 0.05}
    alike = [
        within(f, *((1 / FACTOR, FACTOR) if kinds[m] == "log" else (-SHIFT, SHIFT))) for (_, m), f in tried.items()
    ]
    verdict = SUPPORTED if clear else CONTRADICTED if alike and set(alike) == {SUPPORTED} else UNDERPOWERED
    shown = [
        f"{arm}: {name} {'x ' if kinds[name] == 'log' else ''}{number(found.mean)} {brackets(found.ci95)}"
        for (arm, name), found in sorted(clear.items(), key=lambda item: item[1].p or 0.0)
    ]
    more = f", and {len(shown) - 6} more" if len(shown) > 6 else ""
    words = f"{len(clear)} of {len(tried)} differences are clear of none"
    return verdict, words + (f": {'; '.join(shown[:6])}{more}" if shown else "")


# name -> (what is claimed, its rule)
HYPOTHESES: dict[str, tuple[str, Callable[[Table], tuple[str, str]]]] = {
    "H1": ("spikes on about 0.2% of tokens, sinks on about 0.5%", shares),
    "H2": ("co-occurrence above 80% pre-norm, below 10% post-norm", co_occurrence),
    "H3": ("zeroing spikes raises perplexity by 3 to 5%", zeroing),
    "H4": ("flattening sinks hurts syntax more than zeroing spikes hurts the loss", syntax),
    "H5": ("spikes on punctuation, sinks on first tokens", tokens),
    "H6": ("a 99.9th percentile and a share of all attention find them", thresholds),
    "H7": ("activation function and residual scaling matter too", elsewhere),
}


def judge(table: Table) -> dict[str, Verdict]:
    """{name: its Verdict} of H1 to H7; `not asked` if the study does not ask it."""
    found = {}
    for name, (claim, rule) in HYPOTHESES.items():
        asked, ended = name in table.asked, table.base.done
        verdict, reason = (
            rule(table)
            if asked and ended
            else (UNDERPOWERED, "no run of the baseline has ended")
            if asked
            else (NOT_ASKED, "the study does not ask it")
        )
        found[name] = Verdict(claim, verdict, reason, " ".join((rule.__doc__ or "").split()))
    return found
