"""Turns an Observation into Findings."""

import math
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..models.subject import Subject
from . import calibrate, findings, metrics
from .examples import HEADS, packed
from .observe import Observation, Side, observed_state_key
from .sinks import EPSILONS, PRIMARY_SINK_EPSILON, PRIMARY_SINK_RULE, SINK_RULES, needed_heads, uniform_share
from .spikes import PRIMARY_SPIKE_RULE, SPIKE_RULES

SHOWN = 40  # so many tokens are listed


def summarise(
    subject: Subject,
    obs: Observation,
    checkpoint: findings.CheckpointEntry | None = None,
    model: dict[str, Any] | None = None,
    data: findings.TextEntry | None = None,
    null: findings.Nulls | None = None,
    anatomy: findings.Anatomy | None = None,
) -> findings.Findings:
    """The findings of one observation; `checkpoint`, `model` and `data` describe what was observed, and on which text.

    `model`: its architecture, with `parameters`, their number. `null` and `anatomy`: the same subject's, if any.
    """
    model, null = model or {}, null or {}
    checkpoint = checkpoint or findings.CheckpointEntry(path="in memory")
    overlap, measures = co_occurrence(subject, obs), calibrate.measures_entry(obs)
    weaknesses = calibrate.weakness(len(obs.ids), model.get("parameters", 0), checkpoint.step, checkpoint.tokens)
    return findings.Findings(
        part=subject.part,
        causal=subject.causal,
        checkpoint=checkpoint,
        model=model,
        data=_data(subject, obs, data),
        verdicts=calibrate.verdicts(obs, null, overlap, subject.heads, weaknesses),
        layers=_side_stats(subject, obs, obs.sum),
        reads=_side_stats(subject, obs, obs.read),
        spikes=_spikes(subject, obs, null),
        sinks=_sinks(subject, obs, null),
        co_occurrence=overlap,
        sensitivity=measures.curves,
        measures=measures,
        nulls=null,
        anatomy=anatomy,
        examples=examples_entry(subject, obs),
    )


def _data(subject: Subject, obs: Observation, text: findings.TextEntry | None) -> findings.DataEntry:
    """The text, or token ids without further information, and the loss on it."""
    N, T = obs.ids.shape
    text = text or findings.TextEntry(name="token ids", n_seq=N, seq_len=T, tokens=int(obs.tokens.sum()), bos=False)
    nats = (obs.loss * obs.predicted).sum().item()
    return findings.DataEntry(
        **vars(text),
        n_register=subject.n_register,
        loss=nats / max(1, int(obs.predicted.sum())),
        loss_of=subject.loss_of,
        bits_per_byte=metrics.bits_per_byte(nats, text.predicted_bytes),
    )


def _side_stats(subject: Subject, obs: Observation, side: Side) -> list[findings.SideStats]:
    """The findings' entries of one side of the taps, after every sub-layer at which it was observed."""
    magnitude, norm = (x[..., subject.n_register].double() for x in (side.magnitudes, side.norms))  # first tokens'
    median_norms = _median_norms(side)
    return [
        findings.SideStats(
            index=i,
            layer=subject.streams[i].layer,
            kind=subject.streams[i].kind,
            **vars(side.stats[i].result()),
            spike_tokens=(side.strengths[i] >= 1).sum().item() / int(obs.tokens.sum()),
            first_energy=_mean(magnitude[i].square() / norm[i].square()),
            first_norm=_mean(norm[i] / median_norms[i]),
            usual=findings.UsualEntry(
                layer=usual.layer.item(),
                typical=usual.typical.item(),
                channels=packed(usual.channels.cpu()),
                outlier_channels=usual.outlier_channels,
            ),
        )
        for i, usual in enumerate(side.usual)
        if usual is not None
    ]


def _mean(values: torch.Tensor) -> float | None:
    """The mean of the finite values; None if there are none."""
    mean = values.double().nanmean().item()
    return mean if math.isfinite(mean) else None


def _strongest(score: torch.Tensor, ids: torch.Tensor, among: torch.Tensor) -> list[tuple[int, int]]:
    """(sequence, position) of the largest scores (N, T) in a mask, each (id, position) once."""
    entries: dict[tuple[int, int], tuple[int, int]] = {}
    for flat in score.masked_fill(~among, -torch.inf).flatten().argsort(descending=True).tolist():
        n, t = divmod(flat, score.size(1))
        if len(entries) == SHOWN or not among[n, t]:
            break
        entries.setdefault((int(ids[n, t]), t), (n, t))
    return [*entries.values()]


def _token(subject: Subject, obs: Observation, n: int, t: int) -> dict[str, Any]:
    """The fields of a TokenRow."""
    token = int(obs.ids[n, t])
    return {
        "sequence": n,
        "position": t,
        "occurrences": int((obs.ids[:, t] == token).sum()),
        "id": token,
        "text": subject.text(token),
        "before": "".join(subject.text(i) for i in obs.ids[n, max(0, t - 12) : t].tolist()),
    }


def _count(obs: Observation, null: findings.Nulls, name: str, hits: torch.Tensor) -> dict[str, Any]:
    """The fields of a rule's RuleCount; `hits` (N, T) are the tokens that it marks."""
    return {
        "threshold": calibrate.rules()[name].text,
        "tokens": int(hits.sum()),
        "fraction": hits.sum().item() / int(obs.tokens.sum()),
        "false_positives": calibrate.false_positives(null, name),
    }


def _frequent(counts: torch.Tensor) -> list[int]:
    """The channels with counts (C,) above 0, the most frequent first."""
    return counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())].tolist()


def _spikes(subject: Subject, obs: Observation, null: findings.Nulls) -> findings.SpikeFindings:
    rules = {}
    for name in SPIKE_RULES:
        channels = _frequent(obs.sum.spike_channels[name])
        fields = _count(obs, null, name, obs.spikes[name])
        rules[name] = findings.SpikeRuleCount(**fields, n_channels=len(channels), channels=channels[:SHOWN])
    peaks = Peaks(obs.sum)
    return findings.SpikeFindings(
        primary=PRIMARY_SPIKE_RULE,
        rules=rules,
        sum=_side_spikes(subject, obs, obs.sum),
        read=_side_spikes(subject, obs, obs.read) if obs.read.known else None,
        outlier_channels=_outlier_channels(obs.sum),
        by_position=(obs.spikes[PRIMARY_SPIKE_RULE].double().sum(0) / obs.tokens.sum(0)).tolist(),
        tokens=[
            findings.SpikeToken(
                **_token(subject, obs, n, t),
                **peaks.at(n, t),
                rules=[rule for rule in rules if obs.spikes[rule][n, t]],
            )
            for n, t in _strongest(peaks.strength, obs.ids, obs.tokens)
        ],
    )


class Peaks:
    """Every token at the attended tap of a side where |h| exceeds its threshold most: (N, T) each, see SpikeToken."""

    def __init__(self, side: Side) -> None:
        self.strength, self.index = side.strengths[side.attended].max(0)
        at_peak = lambda x: x[side.attended].gather(0, self.index[None])[0]
        norm = at_peak(side.norms)
        self.magnitude, self.channel = at_peak(side.magnitudes), at_peak(side.channels)
        self.energy_share = self.magnitude.square() / metrics.zero_is_nan(norm.square())
        self.norm_ratio = norm / at_peak(_median_norms(side)[:, None, None].expand_as(side.norms))
        known = [i for i, _ in side.known if i in side.attended_taps]
        self.persistence = (side.strengths[known] >= 1).double().mean(0)

    def at(self, n: int, t: int) -> dict[str, Any]:
        """These fields of the SpikeToken of one token."""
        return {name: values[n, t].item() for name, values in vars(self).items()}


def _median_norms(side: Side) -> torch.Tensor:
    """The median norm of a token at every tap: (taps,)."""
    present = side.norms.masked_fill(side.norms == 0, torch.nan)  # padding
    return present.flatten(1).nanmedian(1).values


def _side_spikes(subject: Subject, obs: Observation, side: Side) -> findings.SideSpikes:
    """The spikes that the primary rule marks on one side."""
    marked, peaks, tokens = side.spikes[PRIMARY_SPIKE_RULE], Peaks(side), int(obs.tokens.sum())
    median = lambda x: x[marked].double().median().item() if marked.any() else None
    last = len(side.taps) - 1
    has_last = last not in side.attended_taps and side.taps[last] is not None
    return findings.SideSpikes(
        tokens=int(marked.sum()),
        fraction=marked.sum().item() / tokens,
        sequences=marked.any(1).double().mean().item(),
        states=len(_states(subject, obs, marked)),
        strength=peaks.strength.max().item(),
        energy_share=median(peaks.energy_share),
        norm_ratio=median(peaks.norm_ratio),
        persistence=median(peaks.persistence),
        in_embedding=(side.strengths[0][marked] >= 1).double().mean().item() if marked.any() else None,
        last=(side.strengths[last] >= 1).sum().item() / tokens if has_last else None,
        channels=_frequent(side.spike_channels[PRIMARY_SPIKE_RULE])[:SHOWN],
    )


def _states(subject: Subject, obs: Observation, tokens: torch.Tensor) -> set[Hashable]:
    """The different states of some tokens, bool (N, T)."""
    return {observed_state_key(subject, obs, n, t) for n, t in tokens.nonzero().tolist()}


def _outlier_channels(side: Side) -> list[findings.OutlierChannel]:
    """Channels that are large in nearly every token of some layer; those of most layers come first."""
    usual = [u for i, u in enumerate(side.usual) if u is not None and i in side.attended_taps]
    layer_counts = Counter(channel for u in usual for channel in u.outlier_channels)
    # a layer with a median of 0 can have outlier channels, but they have no ratio
    ratio = lambda channel: max((float(u.channels[channel] / u.layer) for u in usual if u.layer > 0), default=math.nan)
    return [
        findings.OutlierChannel(channel=channel, layers=n / len(usual), ratio=ratio(channel))
        for channel, n in layer_counts.most_common(SHOWN)
    ]


def _sinks(subject: Subject, obs: Observation, null: findings.Nulls) -> findings.SinkFindings:
    N, T = obs.ids.shape
    at_position = obs.tokens.sum(0)  # sequences that reach each position (T,)
    total = lambda name: torch.stack([a.sums[name] for a in obs.attention])
    per_layer = lambda name: (total(name) / N).tolist()
    ratio = lambda a, b: torch.where(b > 0, a / b, torch.nan).tolist()
    slot = torch.tensor([0.0 if a.has_slot else torch.nan for a in obs.attention])[:, None]
    # cross-attention of an encoder-decoder is between two texts, where a distance is undefined
    same_text = torch.nan if subject.part == "cross" else 1.0
    uniform = torch.zeros(len(obs.ids), T, dtype=torch.float64)
    for n, length in enumerate(obs.tokens.sum(1).tolist()):
        uniform[n, :length] = uniform_share(length, subject.causal)
    hits = {name: rule.tokens(obs) for name, rule in SINK_RULES.items()}
    return findings.SinkFindings(
        seams=[findings.Place(layer=tap.layer, kind=tap.kind) for tap in subject.attends],
        possible=[a.sinks_possible for a in obs.attention],
        heads_needed=needed_heads(len(subject.heads)),
        primary=SINK_RULES[PRIMARY_SINK_RULE].text,
        gu=[_sink_rates(obs, epsilon, total, at_position) for epsilon in EPSILONS],
        rules={name: findings.RuleCount(**_count(obs, null, name, marked)) for name, marked in hits.items()},
        share=(obs.share.double().sum(0) / at_position).tolist(),
        share_uniform=(uniform.sum(0) / at_position).tolist(),
        token_rate=(hits[PRIMARY_SINK_RULE].double().sum(0) / at_position).tolist(),
        alpha_first=(total("alpha") / N)[..., 0].tolist(),
        any_sink_by_head=(obs.best_alpha > PRIMARY_SINK_EPSILON).double().mean(0).tolist(),
        first_argmax=per_layer("first_argmax"),
        slot_share=((1 - total("mass") / total("queries")).clamp_min(0).round(decimals=6) + slot).tolist(),
        entropy=per_layer("entropy"),
        distance=ratio(total("distance") * same_text, total("mass")),
        distance_without_sinks=ratio(total("distance_others") * same_text, total("mass_others")),
        first_value_norm_ratio=per_layer("first_value"),
        sink_value_norm_ratio=ratio(total("sink_value"), total("sinks")),
        tokens=[
            findings.SinkToken(
                **_token(subject, obs, n, t),
                alpha=obs.max_alpha[n, t].item(),
                heads=int(obs.sink_heads[n, t]),
                share=obs.share[n, t].item(),
            )
            for n, t in _strongest(obs.max_alpha, obs.ids, obs.eligible)
        ],
    )


def _sink_rates(
    obs: Observation, epsilon: float, total: Callable[[str], torch.Tensor], at_position: torch.Tensor
) -> findings.SinkRates:
    """Gu et al.'s metric at a threshold. `total`: name -> sums of AttentionStats, of every layer (L, ...)."""
    N = len(obs.ids)
    eligible = obs.eligible.sum(0)  # sequences in which each position's key has enough queries (T,)
    rate = total(f"hits {epsilon}") / at_position  # (L, H, T), share of sequences
    by_position = rate.mean((0, 1))
    first = (obs.first_alpha > epsilon).double().mean((1, 2))  # (N,), share of heads
    strong = (total(f"eligible hits {epsilon}") / eligible).mean((0, 1)).nan_to_num(0.0)  # (T,)
    among = (eligible >= N / 2) & (eligible > 0)  # positions that are eligible in most sequences
    best = int(strong.masked_fill(~among, -1).argmax())
    return findings.SinkRates(
        epsilon=epsilon,
        by_position=by_position.tolist(),
        first=by_position[0].item(),
        first_ci95=metrics.rate_ci(first),
        by_layer=rate[..., 0].mean(1).tolist(),
        by_head=rate[..., 0].tolist(),
        best_eligible=findings.BestKey(position=best, rate=strong[best].item()) if among.any() else None,
        first_second_half_queries=(total(f"late first {epsilon}") / N).mean().item(),
        max_first_half=(total(f"first half {epsilon}") / N).mean().item(),
    )


def co_occurrence(subject: Subject, obs: Observation) -> findings.CoOccurrence:
    """Compares the tokens that the two primary rules mark."""
    spike, sink = obs.spikes[PRIMARY_SPIKE_RULE], SINK_RULES[PRIMARY_SINK_RULE].tokens(obs)
    share_a_state = lambda tokens: len(_states(subject, obs, tokens)) == 1 and int(tokens.sum()) > 1
    return findings.CoOccurrence(
        **vars(_overlap(spike, sink, obs.tokens)),
        without_first=_overlap(spike[:, 1:], sink[:, 1:], obs.tokens[:, 1:]),
        read=_overlap(obs.read.spikes[PRIMARY_SPIKE_RULE], sink, obs.tokens) if obs.read.known else None,
        by_construction=share_a_state(spike) or share_a_state(sink),
    )


def _overlap(spike: torch.Tensor, sink: torch.Tensor, tokens: torch.Tensor) -> findings.Overlap:
    """The overlap of spike and sink tokens (N, T), with its intervals over sequences and its permutation p."""
    N = len(spike)
    rates = vars(metrics.overlap(spike, sink, tokens))
    weighted = lambda i: vars(metrics.overlap(spike, sink, tokens, weights=i.bincount(minlength=N)))
    intervals = metrics.bootstrap_ci(weighted, N)
    for key, marked in (("p_sink_given_spike", spike), ("p_spike_given_sink", sink), ("jaccard", spike | sink)):
        n = int(marked.any(1).sum())
        if rates[key] in (0, 1) and n:  # a bootstrap interval has no width there
            intervals[key] = metrics.wilson(round(rates[key] * n), n)
    if not (spike & sink).any():
        intervals["lift"] = intervals["lift_anywhere"] = None  # nothing to resample
    return findings.Overlap(
        spike_rule=PRIMARY_SPIKE_RULE,
        sink_rule=f"{PRIMARY_SINK_RULE} {PRIMARY_SINK_EPSILON}",
        spike_tokens=int(spike.sum()),
        sink_tokens=int(sink.sum()),
        both=int((spike & sink).sum()),
        **rates,
        ci95=findings.OverlapIntervals(**intervals),
        p_permutation=metrics.permutation_p(spike, sink, tokens),
    )


def examples_entry(subject: Subject, obs: Observation) -> findings.ExamplesEntry | None:
    """The sequences that were recorded token by token; None if none was."""
    kept = obs.examples
    if not kept.relative:
        return None
    numbers = sorted({n for _, n in kept.relative})
    alphas = {n: torch.cat([kept.alpha[s, n] for s in range(len(subject.attends))]) for n in numbers}
    # the heads with the strongest eligible key, in their order
    best = torch.stack([(alpha * obs.eligible[n, : alpha.size(1)]).amax(1) for n, alpha in alphas.items()]).amax(0)
    heads = best.argsort(descending=True, stable=True)[:HEADS].sort().values.tolist()
    return findings.ExamplesEntry(
        encoding="bfloat16, little-endian, base64: spikesink.examples.unpacked",
        layers=[tap.name for tap in subject.streams],
        heads=[subject.heads[h] for h in heads],
        n_heads=len(subject.heads),
        sequences=[_sequence(subject, obs, n, alphas[n][heads]) for n in numbers],
        # the streams of cross-attention are the encoder's, and shown there
        matrices=kept.shown_matrices() if subject.part != "cross" else [],
    )


def _sequence(subject: Subject, obs: Observation, n: int, alpha: torch.Tensor) -> findings.SequenceEntry:
    kept, length = obs.examples, int(obs.tokens[n].sum())
    shown = min(length, alpha.size(1), kept.shown)
    ids = obs.ids[n, :shown].tolist()
    return findings.SequenceEntry(
        sequence=n,
        length=length,
        loss=obs.loss[n].item(),
        ids=ids,
        texts=[subject.text(i) for i in ids],
        spikes=obs.spikes[PRIMARY_SPIKE_RULE][n, :shown].int().tolist(),
        sink_heads=obs.sink_heads[n, :shown].int().tolist(),
        enough_queries=obs.eligible[n, :shown].int().tolist(),
        share=packed(obs.share[n, :shown]),
        relative=packed(torch.stack([kept.relative[i, n][:shown] for i in range(len(subject.streams))])),
        alpha=packed(alpha[:, :shown]),
    )
