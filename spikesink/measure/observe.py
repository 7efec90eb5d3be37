"""One streaming pass over a model, in which hooks reduce every tensor to its statistics as soon as they see it.

The pass keeps running sums, the largest magnitude of every token at every layer, and the few entries that a rule marks.
It never keeps a T x T map, nor an activation after its sub-layer has run.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from tqdm import tqdm

from ..errors import UserError
from ..hooks import Tap, hooked, on_streams
from ..models.subject import Seam, Subject, batches, for_heads, map_rows
from ..text.sequences import PADDING
from . import metrics
from .examples import Examples
from .findings import Magnitudes
from .rules import Scores
from .sinks import EPSILONS, PRIMARY_SINK_EPSILON, eligible_keys, needed_heads, queries_that_see, sink_alpha
from .spikes import TapBatch, Usual, marking_rules, spike_entries

# (rows of the map (B, H, R, keys), the first query, whether attention is causal) -> the rows to measure in their place
ShuffleRows = Callable[[torch.Tensor, int, bool], torch.Tensor]


class StreamStats:
    """Running statistics of one tap's tensor (B, T, C)."""

    def __init__(self) -> None:
        self.sequences = self.tokens = 0
        self.sums: dict[str, torch.Tensor] = {}  # name -> sum over sequences
        self.largest = 0.0
        self.channel_power = torch.zeros((), dtype=torch.float64)  # later (C,): sum over tokens of x^2

    def add(self, x: torch.Tensor) -> TapBatch:
        """Adds x (B, T, C) of B sequences. Returns x with what the spike rules need to know about it."""
        B, T, C = x.shape
        self.sequences, self.tokens = self.sequences + B, self.tokens + B * T
        abs_x = x.abs()
        magnitude, channel = abs_x.max(dim=-1)
        counts = metrics.histogram(abs_x.view(B, -1))
        median = metrics.quantiles(counts, [0.5])[:, 0]
        tokens = magnitude.topk(min(3, T), dim=1).indices  # they have the three largest entries
        largest = abs_x[torch.arange(B, device=x.device)[:, None], tokens].flatten(1).topk(min(3, T * C)).values
        self._sum("top", largest)
        self._sum("median", median)
        self._sum("entry kurtosis", metrics.entry_kurtosis(x).nan_to_num(0.0))
        self.largest = max(self.largest, magnitude.max().item())
        self.channel_power = self.channel_power + torch.linalg.vector_norm(x, dim=(0, 1)).double().square().cpu()
        norm = torch.linalg.vector_norm(x, dim=-1)
        return TapBatch(x, abs_x, magnitude, channel, norm, counts, median, x.mean((1, 2)))

    def _sum(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value.double().sum(0).cpu()

    def result(self) -> Magnitudes:
        """The findings' entry for this tap."""
        top1, top2, top3 = (self.sums["top"] / self.sequences).tolist()
        return Magnitudes(
            top1=top1,
            top2=top2,
            top3=top3,
            median=(self.sums["median"] / self.sequences).item(),
            max=self.largest,
            kurtosis=metrics.channel_kurtosis(self.channel_power / self.tokens).item(),
            entry_kurtosis=(self.sums["entry kurtosis"] / self.sequences).item(),
            inf_norm=top1,
        )


class AttentionStats:
    """Running statistics of one layer's attention: sums over sequences, by head."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        # (keys, queries) -> the number of queries that see each key, and the number of those in the second half
        self.queries: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.sinks_possible = False  # under a short window no key has enough queries
        self.has_slot = False  # a slot takes attention that goes to no key

    def _sum(self, name: str, value: torch.Tensor) -> None:
        value = value.double().cpu()
        old = self.sums.get(name, torch.zeros_like(value))
        short, long = sorted((old, value), key=lambda x: x.size(-1))
        long[..., : short.size(-1)] += short  # lengths that differ are aligned at the first position
        self.sums[name] = long

    def add(
        self, seam: Seam, qkv: tuple[torch.Tensor, ...], bias: torch.Tensor | None, causal: bool, shuffled: ShuffleRows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Adds a batch. Returns, on the CPU, each key's mass and alpha (B, H, T), and the eligible keys (T,)."""
        q, k, v = qkv
        (B, H, n_queries, _), T = q.shape, k.size(-2)
        received = q.new_zeros(B, H, T, dtype=torch.float32)
        late, distance = torch.zeros_like(received), torch.zeros_like(received)
        entropy, first_argmax = received.new_zeros(B, H), received.new_zeros(B, H)
        keys = torch.arange(T, device=q.device)
        for first, rows in map_rows(seam, q, k, causal, bias):
            weights = shuffled(rows, first, causal)  # (B, H, R, n_keys)
            last, n_keys = first + weights.size(-2), weights.size(-1)
            queries = torch.arange(first, last, device=q.device)
            received[..., :n_keys] += weights.sum(-2)
            if last > n_queries // 2:
                late[..., :n_keys] += weights[:, :, max(0, n_queries // 2 - first) :].sum(-2)
            # not argmax, which would prefer the first of equal keys
            first_argmax += (weights[..., 0] > weights[..., 1:].amax(-1)).sum(-1) if n_keys > 1 else weights.size(-2)
            entropy -= torch.einsum("bhrt,bhrt->bh", weights, weights.clamp_min(1e-38).log_())
            distance[..., :n_keys] += weights.mul_((queries[:, None] - keys[:n_keys]).abs()).sum(-2)
        if (T, n_queries) not in self.queries:
            self.queries[T, n_queries] = queries_that_see(seam, T, n_queries, causal)
        per_key, late_per_key = self.queries[T, n_queries]
        alpha, eligible = sink_alpha(received.cpu(), per_key), eligible_keys(per_key, n_queries)
        self.sinks_possible |= bool(eligible.any())
        self.has_slot = seam.rows == "slot"
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
            "received": received.sum(0),
            "queries": torch.full((H,), B * n_queries),
            "distance_others": (distance * others).sum((0, -1)),
            "mass_others": (received * others).sum((0, -1)),
            "first_value": relative[..., 0].sum(0),
            "sink_value": (relative * is_sink).sum((0, -1)),
            "sinks": is_sink.sum((0, -1)),
        }.items():
            self._sum(name, value)
        late_alpha = sink_alpha(late.cpu(), late_per_key)
        for epsilon in EPSILONS:
            hit = alpha > epsilon
            self._sum(f"hits {epsilon}", hit.sum(0))
            self._sum(f"eligible hits {epsilon}", (hit & eligible).sum(0))
            self._sum(f"late first {epsilon}", (late_alpha[..., 0] > epsilon).sum(0))
            self._sum(f"first half {epsilon}", hit[..., : (T + 1) // 2].any(-1).sum(0))
        return received.cpu(), alpha, eligible


@dataclass(frozen=True)
class Shuffle:
    """Replaces the measured streams and maps, for nulls, while the model continues with its own.

    `stream`: (x (B, T, C), numbers of the sequences (B,), side: 0 for the sum or 1 for what is read, tap) -> changed x.
    `rows`: (numbers, seam, (heads, queries)) -> ShuffleRows.
    """

    stream: Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor] = lambda x, numbers, side, tap: x
    rows: Callable[..., ShuffleRows] = lambda numbers, seam, shape: lambda weights, first, causal: weights


ORDINARY_SEQUENCES, ORDINARY_TOKENS = 8, 64  # the usual magnitudes are measured on so many sequences, tokens of each


@dataclass(frozen=True)
class Ordinary:
    """The usual magnitudes on ordinary text at every tap of a Subject, on both sides; None where a tap has only one."""

    sums: list[Usual | None]
    reads: list[Usual | None]

    def spikes_at(self, tap: int, x: torch.Tensor) -> torch.Tensor:
        """The entries of the sum (B, T, C) at a tap that are spikes: bool (B, T, C)."""
        usual = self.sums[tap]
        assert usual is not None
        return spike_entries(x, usual)

    @classmethod
    @torch.no_grad()
    def from_ids(cls, subject: Subject, ids: torch.Tensor, batch_size: int = 8, shuffle: Shuffle | None = None) -> Self:
        """Measures the first sequences of ids (N, T) in one pass."""
        change = (shuffle or Shuffle()).stream
        sides: tuple[Sequence[Tap | None], ...] = (subject.streams, subject.reads)
        places = {(side, i): tap for side, taps in enumerate(sides) for i, tap in enumerate(taps) if tap}
        states: dict[tuple[int, int], list[torch.Tensor]] = {place: [] for place in places}

        def keep(place: tuple[int, int], rows: torch.Tensor, T: int, x: torch.Tensor) -> None:
            positions = torch.linspace(0, T - 1, min(T, ORDINARY_TOKENS)).long()
            x = change(x.detach().float().view(len(rows), T, -1), rows, *place)
            states[place].append(x[:, positions].flatten(0, 1))

        for rows, batch in batches(ids[:ORDINARY_SEQUENCES], batch_size):
            T = subject.stream_ids(batch).size(1)
            with on_streams(places.values(), [functools.partial(keep, place, rows, T) for place in places]):
                subject.logits(batch.to(subject.device))
        usual = {place: Usual.from_states(torch.cat(x)) for place, x in states.items()}
        return cls(*([usual.get((side, i)) for i in range(len(taps))] for side, taps in enumerate(sides)))


class Side:
    """One side of the taps (see Subject) as observed in N sequences of up to T tokens; False or 0 at padding.

    Statistics over all taps use those in `Subject.attended`. The last tap, which no attention reads, is separate.
    """

    def __init__(self, taps: Sequence[Tap | None], usual: list[Usual | None], attended: slice, N: int, T: int) -> None:
        self.taps, self.usual, self.attended = taps, usual, attended
        self.stats = [StreamStats() for _ in taps]
        size = len(taps), N, T  # of what is kept of every token at every tap:
        self.magnitudes = torch.zeros(size)  # each token's largest |h|
        self.channels = torch.zeros(size, dtype=torch.int32)  # the channel of that
        self.norms = torch.zeros(size)  # each token's norm
        self.strengths = torch.zeros(size)  # largest |h| over its threshold: the primary rule marks it from 1 on
        self.ratio = torch.zeros(N, T)  # largest |h| / median |h| of the layer, at the tap where that is largest
        # rule -> the tokens that it marks (N, T), and how often it marks each channel (C,)
        self.spikes = {name: torch.zeros(N, T, dtype=torch.bool) for name in marking_rules()}
        self.spike_channels = {name: torch.zeros((), dtype=torch.int64) for name in marking_rules()}

    @property
    def attended_taps(self) -> range:
        """The numbers of the attended taps."""
        return range(len(self.taps))[self.attended]

    @property
    def known(self) -> list[tuple[int, Tap]]:
        """The taps that were observed on this side, with their numbers."""
        return [(i, tap) for i, tap in enumerate(self.taps) if tap is not None]


class Observation(Scores):
    """What one pass observed of N sequences of up to T tokens (registers included); L attention layers, H heads.

    Padding follows the shorter sequences. There ids are PADDING, and everything else is False or 0.
    """

    def __init__(self, subject: Subject, ordinary: Ordinary, N: int, T: int, examples: Examples) -> None:
        heads = N, len(subject.attends), subject.n_head
        self.ids = torch.full((N, T), PADDING)
        self.sum = Side(subject.streams, ordinary.sums, subject.attended, N, T)  # the stream before any norm on it
        self.read = Side(subject.reads, ordinary.reads, subject.attended, N, T)  # as the next sub-layer reads it
        self.spikes = self.sum.spikes
        self.attention = [AttentionStats() for _ in subject.attends]
        self.strength, self.share, self.strong_alpha = torch.zeros(3, N, T)
        self.max_alpha = torch.zeros(N, T)  # the largest alpha over layers and heads
        self.sink_heads = torch.zeros(N, T)  # the number of heads in which the token is a sink by Gu's rule
        self.eligible = torch.zeros(N, T, dtype=torch.bool)  # keys with enough queries in some layer
        self.first_alpha, self.best_alpha = torch.zeros(heads), torch.zeros(heads)
        self.loss, self.predicted = torch.zeros(N), torch.zeros(N)  # mean nats per predicted token, and their number
        self.examples = examples  # some sequences, token by token

    @property
    def tokens(self) -> torch.Tensor:
        """Which entries of (N, T) are tokens: bool."""
        return self.ids != PADDING


def state_key(subject: Subject, sequence: int, position: int, token: int) -> Hashable:
    """A key for what a token's state depends on. Equal keys are the same state, not two similar ones.

    Under causal attention a register has the same state in every sequence, and so have equal first tokens after the
    registers, except in a decoder that reads an encoder's text.
    """
    if subject.causal and subject.part != "decoder":
        if position < subject.n_register:
            return ("register", position)
        if position == subject.n_register:
            return ("first", token)
    return (sequence, position)


def observed_state_key(subject: Subject, obs: Observation, sequence: int, position: int) -> Hashable:
    """The `state_key` of a token of an Observation."""
    return state_key(subject, sequence, position, int(obs.ids[sequence, position]))


def observe(
    subject: Subject,
    ids: torch.Tensor,
    batch_size: int = 8,
    progress: bool = True,
    shuffle: Shuffle | None = None,
    desc: str = "observe",
    examples: Examples | None = None,
    ordinary: Ordinary | None = None,
) -> Observation:
    """Runs `subject` over token ids (N, T), PADDING where there is no token, and returns an Observation.

    `examples`: an examples.Examples to fill in. `ordinary`: the usual magnitudes on other text; by default, on this
    text. Raises UserError if the model's states or loss are not finite.
    """
    shuffle = shuffle or Shuffle()
    ordinary = ordinary or Ordinary.from_ids(subject, ids, batch_size, shuffle)
    tokens = [(rows, batch, subject.stream_ids(batch)) for rows, batch in batches(ids, batch_size)]
    N, T = len(ids), max(batch_tokens.size(1) for _, _, batch_tokens in tokens)
    obs = Observation(subject, ordinary, N, T, examples or Examples(sequences=0))
    total = N * max(1, len(subject.streams) - 1)
    with tqdm(total=total, desc=desc, unit="layer", disable=None if progress else True, leave=False) as bar:
        for rows, batch, batch_tokens in tokens:
            obs.ids[rows, : batch_tokens.size(1)] = batch_tokens
            _observe_batch(subject, batch, rows, obs, shuffle, bar)
    return obs


class SideBatch:
    """One batch on one side of the taps, number 0 or 1. It takes each stream and fills in its Side at the end."""

    def __init__(self, side: Side, number: int, rows: torch.Tensor, shape: torch.Size, shuffle: Shuffle) -> None:
        self.side, self.number, self.rows, self.shape, self.shuffle = side, number, rows, shape, shuffle
        self.ratio = torch.zeros(shape)
        # rule -> at each attended tap, indices of the entries that it marks
        self.marked = {rule: [torch.zeros(0, dtype=torch.int64)] for rule in marking_rules().values()}
        self.C = 1

    def add(self, index: int, stream: torch.Tensor) -> TapBatch:
        """Takes the tensor at one tap."""
        (B, T), side, usual = self.shape, self.side, self.side.usual[index]
        assert usual is not None
        x = self.shuffle.stream(stream.detach().float().view(B, T, -1), self.rows, self.number, index)
        batch, self.C = side.stats[index].add(x), x.size(-1)
        strength = batch.strength(usual)
        side.magnitudes[index, self.rows, :T] = batch.magnitude.cpu()
        side.channels[index, self.rows, :T] = batch.channel.int().cpu()
        side.norms[index, self.rows, :T] = batch.norm.cpu()
        side.strengths[index, self.rows, :T] = strength.cpu()
        if index in side.attended_taps:
            relative = batch.magnitude / metrics.zero_is_nan(batch.median)[:, None]
            torch.maximum(self.ratio, relative.nan_to_num(0.0).cpu(), out=self.ratio)
            for rule, entries in self.marked.items():
                entries.append(rule.marked(batch, usual, strength))
        return batch

    def finish(self) -> None:
        """Fills in the tokens that the rules mark in these sequences."""
        (B, T), side = self.shape, self.side
        side.ratio[self.rows, :T] = self.ratio
        for name, rule in marking_rules().items():
            entries, taps = torch.cat(self.marked[rule]).unique(return_counts=True)
            hits = entries[taps >= max(1, math.ceil(rule.persistence * len(side.attended_taps)))]
            tokens = torch.zeros(B * T, dtype=torch.bool)
            tokens[hits // self.C] = True
            side.spikes[name][self.rows, :T] = tokens.view(B, T)
            side.spike_channels[name] = side.spike_channels[name] + (hits % self.C).bincount(minlength=self.C)


@torch.no_grad()
def _observe_batch(
    subject: Subject, ids: torch.Tensor, rows: torch.Tensor, obs: Observation, shuffle: Shuffle, bar: tqdm
) -> None:
    """Runs one forward pass with a hook at every tap, and fills in the observations of these sequences."""
    shape = subject.stream_ids(ids).shape
    T = shape[1]
    sums, reads = (SideBatch(side, number, rows, shape, shuffle) for number, side in enumerate((obs.sum, obs.read)))
    share, alphas = torch.zeros(shape), []

    def on_sum(index: int, stream: torch.Tensor) -> None:
        obs.examples.add_stream(index, subject.streams[index].name, rows, sums.add(index, stream))
        bar.update(len(rows) if index else 0)

    def on_read(index: int, stream: torch.Tensor) -> None:
        reads.add(index, stream)

    def on_attention(index: int, module: Any, args: tuple, kwargs: dict[str, Any], output: object) -> None:
        change = shuffle.rows(rows, index, args[0].shape[1:3])
        received, alpha, eligible = obs.attention[index].add(module, args, kwargs.get("bias"), subject.causal, change)
        obs.examples.add_attention(index, rows, alpha)
        share.add_(received.sum(1))
        alphas.append(alpha.masked_fill(~eligible, 0.0))
        obs.eligible[rows, :T] |= eligible
        obs.first_alpha[rows, index] = alpha[..., 0]
        obs.best_alpha[rows, index] = alphas[-1].amax(-1)

    taps = [(tap, functools.partial(on_sum, i)) for i, tap in obs.sum.known]
    taps += [(tap, functools.partial(on_read, i)) for i, tap in obs.read.known]
    seams = [(seam.module, functools.partial(on_attention, i)) for i, seam in enumerate(subject.attends)]
    with on_streams(*zip(*taps, strict=True)), hooked(seams):
        losses = subject.losses(ids)
    loss = losses.mean(1)
    if not obs.sum.magnitudes[:, rows, :T].isfinite().all() or (subject.has_loss and not loss.isfinite().all()):
        raise UserError(
            f"the states or the loss are not finite: the weights are broken, or they overflow in {subject.dtype}"
        )

    obs.loss[rows], obs.predicted[rows] = loss, losses.size(1)
    obs.strength[rows] = obs.sum.strengths[obs.sum.attended][:, rows].amax(0)
    obs.share[rows, :T] = share / metrics.zero_is_nan(share.sum(1, keepdim=True))
    heads = torch.cat(alphas, 1)  # (B, L * H, T)
    obs.sink_heads[rows, :T] = (heads > PRIMARY_SINK_EPSILON).sum(1).float()
    strongest = heads.topk(needed_heads(heads.size(1)), dim=1).values
    obs.max_alpha[rows, :T], obs.strong_alpha[rows, :T] = strongest[:, 0], strongest[:, -1]
    for side in (sums, reads):
        side.finish()
