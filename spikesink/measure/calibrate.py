"""How far to trust a finding: nulls with their false-positive rates, sensitivity curves, and a verdict with its reason.

A null is the same measurement where the phenomenon cannot occur, or where one explanation of it is removed:

  init                the same architecture with new random weights: nothing is learned
  shuffled_channels   each token's stream is rotated by a random number of channels: only magnitudes stay
  shuffled_positions  each query's attention is rotated by a random number of keys, each channel of the stream by a
                      random number of tokens: as sharp and as large, but no token in particular
  random_tokens       ids drawn evenly from the vocabulary: is it the text?
  repeated_token      each sequence is one token: is it the position?
  shuffled_text       each sequence's tokens in random order: is it what they say?
  no_first            without the first token, where all sequences start with the same one: is it that token?

The last four run the trained model, so a phenomenon that remains in them is a finding, not a false positive. All but
no_first keep a fixed first token. All that run the trained model compare with the usual magnitudes of ordinary text.
"""

import functools
import math

import torch

from ..models.subject import Subject
from ..text.sequences import PADDING
from . import findings, metrics
from .observe import Observation, Ordinary, Shuffle, observe
from .rules import SEQUENCES, Curve, Rule
from .sinks import PRIMARY_SINK_RULE, SINK_RULES
from .spikes import PRIMARY_SPIKE_RULE, SPIKE_RULES

N_SEQ, TOKENS = 16, 2**14  # at most so many sequences and tokens in each null (but at least two sequences)
POWERED_PARAMETERS, POWERED_TOKENS, POWERED_SEQUENCES = 50e6, 1e9, 60  # below these, absence is "underpowered"
MAJORITY = 0.5  # a phenomenon is present if most sequences have it
ATTENTION = 2  # the key of draws for attention; those for the stream have the side, 0 or 1
NULL_WORDS = {"init": "new random weights", "shuffled_positions": "shuffled positions"}
UNRELATED = 2.0  # co-occurrence is absent only if the interval of its lift over chance lies below this


def rules() -> dict[str, Rule]:
    """Every rule by its name."""
    return {**SPIKE_RULES, **SINK_RULES}


def _rotate(x: torch.Tensor, draws: torch.Tensor, dim: int) -> torch.Tensor:
    """Rotates x along `dim` by parts of its length, which are `draws` in [0, 1), in a shape that broadcasts to x."""
    n, shape = x.size(dim), [1] * x.dim()
    shape[dim] = n
    index = torch.arange(n, device=x.device).view(shape) + (draws.to(x.device) * n).long()
    return x.take_along_dim(index % n, dim)


def _rotate_rows(draws: torch.Tensor, weights: torch.Tensor, first: int, causal: bool) -> torch.Tensor:
    """Rotates the weights (B, H, R, T) of the queries from `first` on, each among the keys that it may see; in a
    window, from the first key in it. `draws` (B, H, queries) in [0, 1): by which part of these keys."""
    *_, R, T = weights.shape
    key, query = torch.arange(T, device=weights.device), torch.arange(first, first + R, device=weights.device)
    end = (query + 1 if causal else torch.full_like(query, T))[:, None]  # (R, 1)
    start = (weights > 0).int().argmax(-1, keepdim=True)  # (B, H, R, 1)
    shift = (draws[:, :, first : first + R, None].to(weights) * (end - start)).long()
    rotated = start + (key - start + shift) % (end - start)
    return weights.gather(-1, torch.where((key >= start) & (key < end), rotated, key))


def shuffles(seed: int) -> dict[str, Shuffle]:
    """{name: Shuffle} for the nulls that change what is measured. Seed, sequence number and place decide each draw."""
    draws = lambda numbers, shape, *place: metrics.uniform(numbers, shape, seed, *place)
    channels = lambda x, numbers, *place: _rotate(x, draws(numbers, (x.size(1), 1), *place), 2)
    positions = lambda x, numbers, *place: _rotate(x, draws(numbers, (1, x.size(2)), *place), 1)
    rows = lambda numbers, seam, shape: functools.partial(_rotate_rows, draws(numbers, shape, ATTENTION, seam))
    return {"shuffled_channels": Shuffle(stream=channels), "shuffled_positions": Shuffle(stream=positions, rows=rows)}


def other_text(ids: torch.Tensor, vocabulary: int, seed: int) -> dict[str, torch.Tensor]:
    """{name: ids} for the nulls that change the text ids (N, T), which are padded on the right.

    A first or last token that all sequences share (BOS, [SEP]) stays; `no_first` leaves such a first token out.
    """
    draw = torch.Generator().manual_seed(seed)
    place, last = torch.arange(ids.size(1)), (ids != PADDING).sum(1, keepdim=True) - 1
    fixed = ids == PADDING
    shared = [len(ids) > 1 and bool((ids.gather(1, at) == ids.gather(1, at)[0]).all()) for at in (last * 0, last)]
    for at, is_shared in zip((last * 0, last), shared, strict=True):
        fixed = fixed | ((place == at) & is_shared)
    random = torch.randint(vocabulary, ids.shape, generator=draw)
    repeated = torch.randint(vocabulary, (len(ids), 1), generator=draw).expand(ids.shape)
    # fixed tokens stay in their places, the others change places among themselves
    order = torch.where(fixed, place.double(), torch.rand(ids.shape, generator=draw, dtype=torch.float64) - 1)
    free = (~fixed).double().cumsum(1)  # the n-th free place gets the n-th of the shuffled others
    source = torch.where(fixed, place, order.argsort(1).gather(1, (free.long() - 1).clamp_min(0)))
    texts = {
        "random_tokens": torch.where(fixed, ids, random),
        "repeated_token": torch.where(fixed, ids, repeated),
        "shuffled_text": ids.gather(1, source),
    }
    return texts | ({"no_first": ids[:, 1:]} if shared[0] and ids.size(1) > 2 else {})


def nulls(
    subject: Subject,
    ids: torch.Tensor,
    vocabulary: int,
    n_seq: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    no_init: str | None = None,
    ordinary: Ordinary | None = None,
) -> findings.Nulls:
    """{name: measures of that null} on the first sequences of ids (N, T), at most `n_seq` (0: no nulls).

    `no_init`: why the model cannot get new weights, for that null. `ordinary`: the trained model's usual magnitudes.
    """
    n_seq = max(2, min(N_SEQ, TOKENS // ids.size(1))) if n_seq is None else n_seq
    if not n_seq:
        return {}
    ids = ids[:n_seq]
    entries: findings.Nulls = {}
    if no_init or not subject.rebuild:
        entries["init"] = findings.Skipped(skipped=no_init or "this model cannot be made anew")
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = subject.rebuild()
        entries["init"] = measures_entry(observe(fresh, ids, batch_size, desc="init"))
        del fresh
    for name, shuffle in shuffles(seed).items():
        entries[name] = measures_entry(observe(subject, ids, batch_size, shuffle=shuffle, desc=name))
    for name, text_ids in other_text(ids, vocabulary, seed).items():
        entries[name] = measures_entry(observe(subject, text_ids, batch_size, desc=name, ordinary=ordinary))
    return entries


def measures_entry(obs: Observation) -> findings.Measures:
    """What is compared between the model and its nulls."""
    spikes, sinks = obs.spikes[PRIMARY_SPIKE_RULE], SINK_RULES[PRIMARY_SINK_RULE].tokens(obs)
    return findings.Measures(
        n_seq=len(obs.ids),
        loss=obs.loss.mean().item(),
        largest_ratio=obs.sum.ratio.max().item(),
        kurtosis=max(stats.result().kurtosis for stats in obs.sum.stats[obs.sum.attended]),
        first_alpha=obs.first_alpha.mean().item(),
        p_sink_given_spike=(sinks & spikes).sum().item() / int(spikes.sum()) if spikes.any() else math.nan,
        rules=rates(obs),
        curves=curves(obs),
    )


def rates(obs: Observation) -> dict[str, findings.RuleRates]:
    """{rule: how much it marks}, for every rule."""
    entries = {name: findings.RuleRates(**_shares(obs, obs.spikes[name])) for name in SPIKE_RULES}
    for name, rule in SINK_RULES.items():
        best_head = _best_head(rule.curve, obs, rule.curve.used)
        entries[name] = findings.RuleRates(**_shares(obs, rule.tokens(obs)), best_head=best_head)
    return entries


def _shares(obs: Observation, hits: torch.Tensor) -> dict[str, float]:
    """The shares of tokens and of sequences with a hit. `hits`: bool (N, T)."""
    tokens = obs.tokens
    return {
        "tokens": (hits & tokens).sum().item() / int(tokens.sum()),
        "sequences": hits.any(1).double().mean().item(),
    }


def _best_head(curve: Curve, obs: Observation, threshold: float) -> float | None:
    """The share of sequences with a hit in the head that has most; None for a rule that does not go by heads."""
    return curve.best_head(obs, threshold).double().mean(0).max().item() if curve.best_head else None


def curves(obs: Observation) -> dict[str, list[findings.CurvePoint]]:
    """{curve: how the findings change with its threshold}. Keys with too few queries never count."""
    return {
        curve.name: [
            findings.CurvePoint(
                at=threshold,
                **_shares(obs, curve.tokens(obs, threshold)),
                sink_1=curve.sink_1(obs, threshold).double().mean().item() if curve.sink_1 else None,
                best_head=_best_head(curve, obs, threshold),
            )
            for threshold in curve.thresholds
        ]
        for curve in (rule.curve for rule in rules().values())
        if curve
    }


def _measured_nulls(null: findings.Nulls, rule: Rule) -> dict[str, findings.Measures]:
    """The nulls of a rule that were run."""
    return {name: entry for name in rule.nulls if isinstance(entry := null.get(name), findings.Measures)}


def false_positives(null: findings.Nulls, name: str, key: str = SEQUENCES) -> findings.FalsePositives | None:
    """The rate at which a rule fires in the worst of its nulls, with its 95% interval; None if none was run."""
    entries = _measured_nulls(null, rules()[name])
    if not entries:
        return None
    worst = max(entries.values(), key=lambda entry: getattr(entry.rules[name], key))
    rate = getattr(worst.rules[name], key)
    return findings.FalsePositives(rate=rate, ci95=_interval(rate, worst.n_seq), n_seq=worst.n_seq, nulls=[*entries])


def _interval(rate: float, n: int, tests: int = 1) -> findings.Interval:
    """The 95% interval of a share of n sequences."""
    return metrics.wilson(round(rate * n), n, tests)


def verdicts(
    obs: Observation, null: findings.Nulls, overlap: findings.CoOccurrence, heads: list[str], weaknesses: list[str]
) -> findings.Verdicts:
    """Verdicts on spikes, sinks and their co-occurrence, with reasons: present, absent or underpowered.

    Present: most sequences have it (sinks: in one and the same head), and fewer do in the nulls. Absent needs power,
    see `weakness`. Everything between is underpowered. `heads`: names of the L x H heads.
    """
    spike, sink = spike_verdict(obs, null, weaknesses), sink_verdict(obs, null, weaknesses, heads)
    return findings.Verdicts(spike=spike, sink=sink, co_occurrence=co_verdict(spike, sink, overlap, weaknesses, null))


def spike_verdict(obs: Observation, null: findings.Nulls, weaknesses: list[str]) -> findings.RateVerdict:
    """Do most sequences have a spike token? `weaknesses`: see `weakness`."""
    share = obs.spikes[PRIMARY_SPIKE_RULE].any(1).double().mean().item()
    return _verdict("of sequences have a spike token", PRIMARY_SPIKE_RULE, obs, null, share, weaknesses)


def sink_verdict(
    obs: Observation, null: findings.Nulls, weaknesses: list[str], heads: list[str]
) -> findings.RateVerdict:
    """Do most sequences have a sink in one and the same head?"""
    curve = SINK_RULES[PRIMARY_SINK_RULE].curve
    assert curve.best_head
    shares = curve.best_head(obs, curve.used).double().mean(0).flatten()
    claim = f"of sequences have a sink in head {heads[int(shares.argmax())]}, the best of {len(heads)}"
    return _verdict(claim, PRIMARY_SINK_RULE, obs, null, shares.max().item(), weaknesses, tests=len(heads))


def weakness(n_seq: int, parameters: float, step: int | None, trained_tokens: float | None) -> list[str]:
    """The reasons why a missing phenomenon would not be evidence of absence; empty if there are none.

    Published models of fewer than 50M parameters, or 1e9 tokens of training where that is known, have shown no more.
    """
    weaknesses = []
    if parameters < POWERED_PARAMETERS:
        weaknesses.append(f"{parameters / 1e6:.3g}M parameters, fewer than {POWERED_PARAMETERS / 1e6:.0f}M")
    if trained_tokens is not None and trained_tokens < POWERED_TOKENS:
        weaknesses.append(f"{trained_tokens / 1e6:.3g}M tokens of training, fewer than {POWERED_TOKENS / 1e6:.0f}M")
    elif step == 0:
        weaknesses.append("untrained")
    if n_seq < POWERED_SEQUENCES:
        weaknesses.append(f"{n_seq} sequences, fewer than {POWERED_SEQUENCES}")
    return weaknesses


def _holding_thresholds(rule: Rule, curve: Curve, obs: Observation, null: findings.Nulls, tests: int) -> list[float]:
    """The thresholds of a rule's curve at which most sequences of the model have it, and fewer do in the nulls."""
    entries, thresholds = _measured_nulls(null, rule).values(), []
    for i, point in enumerate(curves(obs)[curve.name]):
        low = _interval(getattr(point, curve.key), len(obs.ids), tests)[0]
        highs = [_interval(getattr(entry.curves[curve.name][i], curve.key), entry.n_seq)[1] for entry in entries]
        if low > max([MAJORITY, *highs]):
            thresholds.append(point.at)
    return thresholds


def _verdict(
    claim: str, name: str, obs: Observation, null: findings.Nulls, share: float, weaknesses: list[str], tests: int = 1
) -> findings.RateVerdict:
    """One phenomenon's verdict from the share of sequences that have it and from its nulls."""
    rule = rules()[name]
    assert rule.curve
    knob, used, holds = rule.curve.name, rule.curve.used, _holding_thresholds(rule, rule.curve, obs, null, tests)
    null_rate, ci = false_positives(null, name, rule.curve.key), _interval(share, len(obs.ids), tests)
    reason = f"{share:.0%} [{ci[0]:.0%}, {ci[1]:.0%}] {claim}"
    if null_rate is None:
        reason += "; no null was run"
    else:
        changes = " or ".join(NULL_WORDS.get(null, null) for null in null_rate.nulls)
        reason += f", {null_rate.rate:.0%} [{null_rate.ci95[0]:.0%}, {null_rate.ci95[1]:.0%}] with {changes}"
    verdict = "underpowered"
    if ci[0] > MAJORITY and (null_rate is None or null_rate.ci95[1] < ci[0]):
        verdict = "present"
        reason += f"; this holds for every {knob} tried from {min(holds):g} to {max(holds):g} (the rule takes {used:g})"
    elif ci[0] > MAJORITY:
        reason += "; the nulls have it as often, or are too few to tell"
    elif ci[1] > MAJORITY:
        reason += "; more sequences would decide whether most have it"
    elif weaknesses:
        reason += f"; absence would need more: {', '.join(weaknesses)}"
    else:
        verdict = "absent"
        reason += "; not in most sequences of a model and a sample large enough to show it"
        if holds:
            reason += f" (but in most at a {knob} of {max(holds):g})"
    return findings.RateVerdict(verdict=verdict, reason=reason, rate=share, ci95=ci, null=null_rate, holds=holds)


def co_verdict(
    spike: findings.Verdict,
    sink: findings.Verdict,
    overlap: findings.CoOccurrence,
    weaknesses: list[str],
    null: findings.Nulls,
) -> findings.Verdict:
    """Do spikes and sinks fall on the same tokens, and does position alone explain it?

    If all spikes or all sinks are one state that is the same in every sequence, all sequences together are one
    observation. Then the text without its fixed first token decides.
    """
    missing = [name for name, verdict in (("spikes", spike), ("sinks", sink)) if verdict.verdict != "present"]
    if missing:
        reason = f"{' and '.join(missing)} are not present: nothing to compare"
        return findings.Verdict(verdict="underpowered", reason=reason)
    if overlap.by_construction:
        return _one_state_verdict(overlap, null)
    ci, lift_ci = overlap.ci95.lift_anywhere, overlap.ci95.lift
    reason = f"P(sink | spike) is {overlap.p_sink_given_spike:.0%}, {overlap.lift_anywhere:.3g}"
    reason += f" [{ci[0]:.3g}, {ci[1]:.3g}] times what chance over all tokens gives" if ci else " times chance"
    if ci and ci[0] > 1:
        part, p = overlap.explained_by_position, overlap.p_permutation
        reason += f"; {part:.0%} of the excess is there when labels are permuted among equal positions, "
        if p < 0.05:
            reason += f"and the rest is more than chance (p = {p:.3g})"
        elif lift_ci and lift_ci[1] < 1:
            reason += "and sequences that have the one have the other less often than that"
        else:
            reason += f"and there is no more than that (p = {p:.3g})"
        return findings.Verdict(verdict="present", reason=reason)
    if ci and ci[1] < UNRELATED and not weaknesses:
        return findings.Verdict(verdict="absent", reason=reason)
    lacking = f"absence would need more: {', '.join(weaknesses)}" if weaknesses else "the interval leaves room for more"
    return findings.Verdict(verdict="underpowered", reason=f"{reason}; {lacking}")


def _one_state_verdict(overlap: findings.CoOccurrence, null: findings.Nulls) -> findings.Verdict:
    reason = (
        f"P(sink | spike) is {overlap.p_sink_given_spike:.0%}, but the spikes or the sinks are one state, the same in "
        "every sequence: they are one observation, which no permutation of sequences changes"
    )
    other = null.get("no_first")
    if not isinstance(other, findings.Measures) or math.isnan(other.p_sink_given_spike):
        more = "there are no spikes" if isinstance(other, findings.Measures) else "nothing was measured"
        return findings.Verdict(verdict="underpowered", reason=f"{reason}; without that first token {more}")
    reason += f"; without that first token it is {other.p_sink_given_spike:.0%}, in {other.n_seq} sequences"
    return findings.Verdict(verdict="present" if other.p_sink_given_spike > MAJORITY else "underpowered", reason=reason)
