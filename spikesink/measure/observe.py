"""One streaming pass over a model: every statistic is reduced inside the hook that sees the tensor.

Kept: running sums, per token and layer the largest magnitude, and the few entries that a rule marks. Never kept: a
T x T map, or an activation after its sub-layer has run.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ..errors import UserError
from ..hooks import hooked, on_streams
from ..models.subject import Seam, Subject, batches, for_heads, map_rows
from ..text.sequences import PADDING
from . import metrics
from .examples import Examples
from .findings import Magnitudes
from .sinks import EPSILONS, PRIMARY_SINK_EPSILON, eligible_keys, queries_per_key, second_half_alpha, sink_alpha
from .spikes import PERCENTILE_RULES, PERCENTILES, SPIKE_RULES, SpikeRule, TapBatch, entries_above

# (rows of the map (B, H, R, keys), the first query, whether attention is causal) -> the rows that are measured instead
ShuffleRows = Callable[[torch.Tensor, int, bool], torch.Tensor]


class StreamStats:
    """Running statistics of one tap's tensor (B, T, C)."""

    def __init__(self) -> None:
        self.sequences = self.tokens = 0
        self.sums: dict[str, torch.Tensor] = {}  # name -> sum over sequences
        self.largest = 0.0
        self.channel_power = torch.zeros((), dtype=torch.float64)  # (C,) once there is one, sum over tokens of x^2
        self.moments = torch.zeros(4, dtype=torch.float64)  # sums over entries of x, x^2, x^3, x^4

    def add(self, x: torch.Tensor) -> TapBatch:
        """Takes in x (B, T, C) of B sequences. Returns what the rules need of it."""
        B, T, C = x.shape
        self.sequences, self.tokens = self.sequences + B, self.tokens + B * T
        size = x.abs()
        magnitude, channel = size.max(dim=-1)
        wanted = max(3, 1 + entries_above(min(PERCENTILES), T * C))
        of_sequences = [metrics.median_and_largest(values, wanted) for values in size.flatten(1)]
        median, largest, where = (torch.stack(part) for part in zip(*of_sequences, strict=True))
        square = x.square()
        power = square.sum(1)  # (B, C)
        moments = torch.stack(
            [m.sum((1, 2), dtype=torch.float64) for m in (x, square, square * x)]
            + [square.square_().sum((1, 2), dtype=torch.float64)]
        )
        self._sum("top", largest[:, :3])
        self._sum("median", median)
        relative = magnitude / metrics.zero_is_nan(size.median(-1).values)
        self._sum("mmr", relative.nan_to_num(0.0).sum(1))
        self._sum("mmr tokens", relative.isfinite().sum(1))
        self.largest = max(self.largest, magnitude.max().item())
        self.channel_power = self.channel_power + power.double().sum(0).cpu()
        self.moments += moments.sum(1).cpu()
        mean, mean_square = moments[0] / (T * C), moments[1] / (T * C)
        std = ((mean_square - mean**2) * T * C / max(1, T * C - 1)).clamp_min(0).sqrt()
        return TapBatch(x, magnitude, channel, largest, where, median, mean.float(), std.float())

    def _sum(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value.double().sum(0).cpu()

    def result(self) -> Magnitudes:
        """The findings' entry for this tap."""
        top1, top2, top3 = (self.sums["top"] / self.sequences).tolist()
        channels = len(self.channel_power)
        return Magnitudes(
            top1=top1,
            top2=top2,
            top3=top3,
            median=(self.sums["median"] / self.sequences).item(),
            max=self.largest,
            mmr=(self.sums["mmr"] / self.sums["mmr tokens"]).item(),
            kurtosis=metrics.channel_kurtosis(self.channel_power / self.tokens).item(),
            entry_kurtosis=metrics.entry_kurtosis((self.moments / (self.tokens * channels)).tolist()),
            inf_norm=top1,
        )


class AttentionStats:
    """Running statistics of one layer's attention; sums over sequences, by head."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def _sum(self, name: str, value: torch.Tensor) -> None:
        value = value.double().cpu()
        old = self.sums.get(name)
        if old is not None and old.shape != value.shape:  # sequences of another length: positions count from the first
            short, long = sorted((old, value), key=lambda x: x.size(-1))
            long = long.clone()
            long[..., : short.size(-1)] += short
            self.sums[name] = long
        else:
            self.sums[name] = value if old is None else old + value

    def add(
        self,
        seam: Seam,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        causal: bool,
        shuffled: ShuffleRows,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One batch: each key's attention mass and alpha (B, H, T), and which are eligible (T,); all on the CPU."""
        B, H, n_queries, _ = q.shape
        T = k.size(-2)
        received = q.new_zeros(B, H, T, dtype=torch.float32)
        late, distance = torch.zeros_like(received), torch.zeros_like(received)
        entropy, first_argmax = received.new_zeros(B, H), received.new_zeros(B, H)
        keys = torch.arange(T, device=q.device)
        for first, measured in map_rows(seam, q, k, causal, bias):
            weights = shuffled(measured, first, causal)  # (B, H, R, seen)
            last, seen = first + weights.size(-2), weights.size(-1)
            queries = torch.arange(first, last, device=q.device)
            received[..., :seen] += weights.sum(-2)
            if last > n_queries // 2:
                late[..., :seen] += weights[:, :, max(0, n_queries // 2 - first) :].sum(-2)
            first_argmax += ((weights[..., 0] >= weights.amax(-1)) & (weights[..., 0] > 0)).sum(-1)
            entropy -= torch.einsum("bhrt,bhrt->bh", weights, weights.clamp_min(1e-38).log_())
            distance[..., :seen] += weights.mul_((queries[:, None] - keys[:seen]).abs()).sum(-2)
        possible = queries_per_key(T, None if causal else n_queries)
        alpha = sink_alpha(received.cpu(), possible)
        eligible = eligible_keys(possible)
        is_sink = (alpha > PRIMARY_SINK_EPSILON) & eligible  # (B, H, T)
        others = ~is_sink.to(received.device)
        norms = for_heads(v.float().norm(dim=-1), H).cpu()  # (B, H, T)
        relative = norms / norms.mean(-1, keepdim=True)
        for name, value in {
            "alpha": alpha.sum(0),
            "entropy": entropy.sum(0) / n_queries,
            "first_argmax": first_argmax.sum(0) / n_queries,
            "distance": distance.sum((0, -1)),
            "mass": received.sum((0, -1)),
            "queries": torch.full((H,), B * n_queries),
            "distance_others": (distance * others).sum((0, -1)),
            "mass_others": (received * others).sum((0, -1)),
            "first_value": relative[..., 0].sum(0),
            "sink_value": (relative * is_sink).sum((0, -1)),
            "sinks": is_sink.sum((0, -1)),
        }.items():
            self._sum(name, value)
        late_alpha = second_half_alpha(late.cpu(), possible)
        for epsilon in EPSILONS:
            hit = alpha > epsilon
            self._sum(f"hits {epsilon}", hit.sum(0))
            self._sum(f"eligible hits {epsilon}", (hit & eligible).sum(0))
            self._sum(f"late first {epsilon}", (late_alpha[..., 0] > epsilon).sum(0))
            self._sum(f"first half {epsilon}", hit[..., : (T + 1) // 2].any(-1).sum(0))
        return received.cpu(), alpha, eligible


@dataclass
class Observation:
    """What one pass saw of N sequences of up to T tokens (registers included); L attention layers, H heads.

    At padding, which follows a shorter sequence here, ids are PADDING, and everything else is False or 0.
    """

    ids: torch.Tensor  # (N, T)
    streams: list[StreamStats]
    attention: list[AttentionStats]
    magnitudes: torch.Tensor  # (taps, N, T), largest |h| of each token
    channels: torch.Tensor  # (taps, N, T), and where
    ratio: torch.Tensor  # (N, T), largest |h| / median |h| of the layer, over layers
    spikes: dict[str, torch.Tensor]  # rule -> bool (N, T)
    spike_channels: dict[str, torch.Tensor]  # rule -> how often each channel was marked (C,)
    percentiles: dict[float, torch.Tensor]  # percentile -> bool (N, T), above it in enough layers
    share: torch.Tensor  # (N, T), of all the sequence's attention mass
    max_alpha: torch.Tensor  # (N, T), over layers and heads
    sink_heads: torch.Tensor  # (N, T), heads in which the token is a sink by Gu's rule
    eligible: torch.Tensor  # bool (N, T), keys with enough queries
    first_alpha: torch.Tensor  # (N, L, H), of the first key
    best_alpha: torch.Tensor  # (N, L, H), of the eligible key that has most
    loss: torch.Tensor  # (N,), mean loss per predicted token, nats
    predicted: torch.Tensor  # (N,), how many those are
    examples: Examples  # some sequences, token by token

    @property
    def tokens(self) -> torch.Tensor:
        """Which entries of (N, T) are tokens: bool."""
        return self.ids != PADDING


@dataclass(frozen=True)
class Shuffle:
    """For nulls: what a stream (B, T, C) and rows of a map (B, H, R, T) are replaced with before they are measured,
    while the model goes on with its own."""

    stream: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    rows: ShuffleRows = lambda weights, first, causal: weights


def observe(
    subject: Subject,
    ids: torch.Tensor,
    batch_size: int = 8,
    progress: bool = True,
    shuffle: Shuffle | None = None,
    desc: str = "observe",
    examples: Examples | None = None,
) -> Observation:
    """Runs `subject` over token ids (N, T), PADDING where there is none, and returns an Observation.

    `examples`: an examples.Examples to fill in.

    Raises UserError if the model's loss is not finite.
    """
    shuffle = shuffle or Shuffle()
    seen = [(rows, some, subject.seen(some)) for rows, some in batches(ids, batch_size)]
    N, T = len(ids), max(s.size(1) for _, _, s in seen)
    L, H, taps = len(subject.attends), subject.n_head, len(subject.streams)
    zeros = functools.partial(torch.zeros, dtype=torch.float32)
    obs = Observation(
        ids=torch.full((N, T), PADDING),
        streams=[StreamStats() for _ in range(taps)],
        attention=[AttentionStats() for _ in range(L)],
        magnitudes=zeros(taps, N, T),
        channels=zeros(taps, N, T, dtype=torch.int32),
        ratio=zeros(N, T),
        spikes={rule: zeros(N, T, dtype=torch.bool) for rule in SPIKE_RULES},
        spike_channels={rule: torch.zeros((), dtype=torch.int64) for rule in SPIKE_RULES},
        percentiles={percentile: zeros(N, T, dtype=torch.bool) for percentile in PERCENTILES},
        share=zeros(N, T),
        max_alpha=zeros(N, T),
        sink_heads=zeros(N, T),
        eligible=zeros(N, T, dtype=torch.bool),
        first_alpha=zeros(N, L, H),
        best_alpha=zeros(N, L, H),
        loss=zeros(N),
        predicted=zeros(N),
        examples=examples or Examples(sequences=0),
    )
    bar = tqdm(total=N * max(1, taps - 1), desc=desc, unit="layer", disable=None if progress else True, leave=False)
    with bar:
        for rows, some, tokens in seen:
            obs.ids[rows, : tokens.size(1)] = tokens
            _observe_batch(subject, some, rows, obs, shuffle, bar)
    return obs


@torch.no_grad()
def _observe_batch(
    subject: Subject, ids: torch.Tensor, rows: torch.Tensor, obs: Observation, shuffle: Shuffle, bar: tqdm
) -> None:
    """One forward pass with every tap hooked; fills in what it saw of these sequences."""
    B, T = subject.seen(ids).shape
    marked: dict[SpikeRule, list[torch.Tensor]] = {
        rule: [] for rule in (*SPIKE_RULES.values(), *PERCENTILE_RULES.values())
    }
    share, max_alpha, sink_heads, ratio = (torch.zeros(B, T) for _ in range(4))
    C = n_queries = 0

    def on_stream(index: int) -> Callable[[torch.Tensor], None]:
        def function(stream: torch.Tensor) -> None:
            nonlocal C
            batch = obs.streams[index].add(shuffle.stream(stream.detach().float().view(B, T, -1)))
            C = batch.x.size(-1)
            obs.magnitudes[index, rows, :T] = batch.magnitude.cpu()
            obs.channels[index, rows, :T] = batch.channel.int().cpu()
            relative = batch.magnitude / metrics.zero_is_nan(batch.median)[:, None]
            torch.maximum(ratio, relative.nan_to_num(0.0).cpu(), out=ratio)
            for rule, entries in marked.items():
                entries.append(rule.marked(batch))
            obs.examples.add_stream(index, rows, batch)
            bar.update(B if index else 0)

        return function

    def on_attention(index: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any], output: object) -> None:
            nonlocal n_queries
            q, k, v = args
            n_queries, bias = q.size(-2), kwargs.get("bias")
            seen = obs.attention[index].add(module, q, k, v, bias, subject.causal, shuffle.rows)
            received, alpha, eligible = seen
            obs.examples.add_attention(index, rows, alpha)
            share.add_(received.sum(1))
            torch.maximum(max_alpha, alpha.amax(1), out=max_alpha)
            sink_heads.add_(((alpha > PRIMARY_SINK_EPSILON) & eligible).sum(1))
            obs.eligible[rows, :T] = eligible
            obs.first_alpha[rows, index] = alpha[..., 0]
            obs.best_alpha[rows, index] = alpha.masked_fill(~eligible, 0.0).amax(-1)

        return hook

    seams = [(seam.module, on_attention(i)) for i, seam in enumerate(subject.attends)]
    with on_streams(subject.streams, [on_stream(i) for i in range(len(obs.streams))]), hooked(seams):
        losses = subject.losses(ids)
    loss = losses.mean(1)
    if subject.has_loss and not loss.isfinite().all():
        raise UserError("the model's loss on this text is not finite: its weights are broken, or overflow in float32")

    obs.loss[rows], obs.predicted[rows] = loss, losses.size(1)
    obs.share[rows, :T] = share / (len(subject.attends) * subject.n_head * n_queries)
    obs.max_alpha[rows, :T], obs.sink_heads[rows, :T], obs.ratio[rows, :T] = max_alpha, sink_heads, ratio
    needed = lambda rule: max(1, math.ceil(rule.persistence * len(obs.streams)))
    hits = {rule: _marked_often(entries, needed(rule)) for rule, entries in marked.items()}
    _take_hits(obs, hits, rows, (B, T, C))


def _take_hits(
    obs: Observation, hits: dict[SpikeRule, torch.Tensor], rows: torch.Tensor, shape: tuple[int, int, int]
) -> None:
    """Fills in what the rules mark in these sequences: entries of their streams of a `shape` (B, T, C), as indices."""
    B, T, C = shape
    for name, rule in SPIKE_RULES.items():
        obs.spikes[name][rows, :T] = _tokens_of(hits[rule], B, T, C)
        obs.spike_channels[name] = obs.spike_channels[name] + (hits[rule] % C).bincount(minlength=C)
    for percentile, rule in PERCENTILE_RULES.items():
        obs.percentiles[percentile][rows, :T] = _tokens_of(hits[rule], B, T, C)


def _marked_often(marked: list[torch.Tensor], needed: int) -> torch.Tensor:
    """The entries (B, T, C), as indices, that are marked in at least `needed` layers."""
    entries, layers = torch.cat(marked).unique(return_counts=True)
    return entries[layers >= needed]


def _tokens_of(entries: torch.Tensor, B: int, T: int, C: int) -> torch.Tensor:
    """Tokens that have one of the entries: bool (B, T)."""
    tokens = torch.zeros(B * T, dtype=torch.bool)
    tokens[entries // C] = True
    return tokens.view(B, T)
