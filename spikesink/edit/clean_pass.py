"""The model left alone: where its spikes and sinks are on a batch, and what other text says of them."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import say_once
from ..hooks import Tap, hooked, on_streams
from ..measure.observe import Ordinary
from ..measure.sinks import alpha_in, are_sinks, eligible_keys, needed_heads
from ..models.subject import Subject, batches


class Call(NamedTuple):
    """A call of an attention seam: q (B, H, T, D), k (B, heads of keys, T, D)."""

    module: Any
    q: torch.Tensor
    k: torch.Tensor


HELD = 0.5  # of a spike rule's threshold: as long as |h| is so large, a spike goes on


class AtTap(NamedTuple):
    """What is at a tap, of every token, on the CPU: (B, T) each.

    `marked`: it has a spike there; `held`: an entry of half a spike's size at least; `entry`: |h| in the channel in
    which the clean model has its spike, or its largest |h|; `magnitude`: that, or the largest |h| of a spike there;
    `large`: `entry` is as large as the rule asks; `norm`: of the state.
    """

    marked: torch.Tensor
    held: torch.Tensor
    entry: torch.Tensor
    magnitude: torch.Tensor
    large: torch.Tensor
    norm: torch.Tensor


@dataclass
class CleanPass:
    """One batch as the model left alone sees it: where its spikes and sinks are, and what an edit is compared with.

    It holds the stream of the batch at every tap: with a large model, take few sequences at a time.
    """

    subject: Subject
    ids: torch.Tensor  # (B, T), int64
    numbers: torch.Tensor  # (B,), of its sequences, to which random controls are tied
    ordinary: Ordinary  # with what spikes are compared
    losses: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (B, T - shift), nats
    streams: list[torch.Tensor] = field(default_factory=list)  # at each tap (B, T, C)
    spikes: list[torch.Tensor] = field(default_factory=list)  # at each tap bool (B, T, C)
    calls: list[Call] = field(default_factory=list)  # of each seam
    alpha: list[torch.Tensor] = field(default_factory=list)  # at each seam (B, H, T), on the CPU
    sinks: list[torch.Tensor] = field(default_factory=list)  # of these, which are sinks: bool
    queries: list[torch.Tensor] = field(default_factory=list)  # how many see each key (T,)
    outputs: list[Any] = field(default_factory=list)  # of each stage, as its module returned it
    left: list[dict[str, Any]] = field(default_factory=list)  # what was in its context then, see `left_in`

    @classmethod
    def of(
        cls,
        subject: Subject,
        ids: torch.Tensor,
        numbers: torch.Tensor | None = None,
        ordinary: Ordinary | None = None,
    ) -> "CleanPass":
        """One forward pass over ids (B, T). `ordinary`: what is usual, by default on these very ids."""
        ordinary = ordinary or Ordinary.from_ids(subject, ids)
        clean = cls(subject, ids, torch.arange(len(ids)) if numbers is None else numbers, ordinary)

        def on_stream(x: torch.Tensor) -> None:
            x = x.detach().view(len(ids), -1, x.size(-1))
            clean.spikes.append(ordinary.spikes_at(len(clean.streams), x))
            clean.streams.append(x)

        def on_attention(module: Any, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
            q, k, *_ = args
            alpha, queries = alpha_in(module, q, k, subject.causal)
            clean.calls.append(Call(module, q, k))
            clean.alpha.append(alpha)
            clean.sinks.append(are_sinks(alpha, queries, q.size(-2)))
            clean.queries.append(queries)

        def on_stage(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            clean.outputs.append(output)
            clean.left.append(dict(left_in(args)))

        hooks: list[tuple[nn.Module, Any]] = [(tap.module, on_attention) for tap in subject.attends]
        hooks += [(stage, on_stage) for stage in subject.stages]
        with on_streams(subject.streams, [on_stream] * len(subject.streams)), hooked(hooks):
            clean.losses = subject.losses(ids)
        return clean

    @functools.cached_property
    def eligible(self) -> list[torch.Tensor]:
        """At each seam which keys could be sinks: bool (T,)."""
        pairs = zip(self.queries, self.calls, strict=True)
        return [eligible_keys(queries, call.q.size(-2)) for queries, call in pairs]

    @functools.cached_property
    def mass(self) -> list[torch.Tensor]:
        """At each seam the attention that each key gets, summed over queries: (B, H, T)."""
        return [alpha * queries for alpha, queries in zip(self.alpha, self.queries, strict=True)]

    @functools.cached_property
    def channel(self) -> list[torch.Tensor]:
        """At each tap a channel of every token, (B, T, 1): of its largest spike entry, or without one its largest."""
        pairs = zip(self.streams, self.spikes, strict=True)
        return [
            x.abs().masked_fill(~entries & entries.any(-1, keepdim=True), -1).argmax(-1, keepdim=True)
            for x, entries in pairs
        ]

    @functools.cached_property
    def at(self) -> list["AtTap"]:
        """What is at each tap."""
        return [self.look_at(i, x) for i, x in enumerate(self.streams)]

    def look_at(self, i: int, x: torch.Tensor) -> "AtTap":
        """What is at tap i where the stream there is x (B, T, C)."""
        usual, size = self.ordinary.sums[i], x.float().abs()
        assert usual is not None
        marked = self.ordinary.spikes_at(i, x)
        entry = size.gather(-1, self.channel[i])[..., 0]
        return AtTap(
            marked=marked.any(-1).cpu(),
            held=((size * usual.per_threshold).amax(-1) >= HELD).cpu(),
            entry=entry.cpu(),
            magnitude=torch.maximum(entry, (size * marked).amax(-1)).cpu(),
            large=(entry >= usual.thresholds[self.channel[i][..., 0]]).cpu(),
            norm=torch.linalg.vector_norm(size, dim=-1).cpu(),
        )

    @property
    def spike_tokens(self) -> torch.Tensor:
        """Tokens with a spike at some attended tap: bool (B, T)."""
        return torch.stack([tap.marked for tap in self.at[self.subject.attended]]).any(0)

    @property
    def sink_tokens(self) -> torch.Tensor:
        """Tokens that are a sink in enough heads: bool (B, T)."""
        heads = torch.cat(self.sinks, dim=1)
        return heads.sum(1) >= needed_heads(heads.size(1))

    def why_whole(self) -> str:
        """Why no stage is replayed, a line that is said once; '' where a replay is right. Tried once for a subject."""
        known = self.subject.whole_passes
        if not known:
            found = self.broken_replay()
            known.append(f"Passes are made whole: replayed, {found[1].name} reads what another left." if found else "")
            if known[0]:
                say_once(f"{known[0]} Numbers are right, and take longer; see `carry` in model.py")
        return known[0]

    def broken_replay(self, at_most: int = 12) -> "tuple[Tap, Tap] | tuple[()]":
        """(the tap from which on a pass is replayed, the first that then differs from a whole pass), or () for none.

        On 32 tokens of two sequences, with noise on the stream at `at_most` of the taps; other text goes through the
        model before each replay, so that nothing is still there by chance.
        """
        subject, few = self.subject, CleanPass.of(self.subject, self.ids[:2, :32], ordinary=self.ordinary)
        taps = [tap for tap in subject.writable if subject.stage_of(tap)]
        for tap in taps[:: max(1, -(-len(taps) // at_most))]:
            subject.losses(few.ids.flip(1))
            with few.prefix(subject.stage_of(tap), sure=True):
                replayed = few._with_noise(tap)
            for (later, x), (_, y) in zip(replayed, few._with_noise(tap), strict=True):
                if not torch.allclose(x, y, rtol=0, atol=1e-4 * float(y.abs().float().mean()), equal_nan=True):
                    return tap, later
        return ()

    def _with_noise(self, tap: Tap) -> list[tuple[Tap, torch.Tensor]]:
        """A pass with noise on the stream at a tap: the stream there and at every later tap, then the loss."""
        noise = lambda x: x + x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        seen: list[tuple[Tap, torch.Tensor]] = []
        later = [one for one in self.subject.streams if self.subject.stage_of(one) >= self.subject.stage_of(tap)]
        keep = [functools.partial(lambda one, x: seen.append((one, x)), one) for one in later]
        with on_streams([tap], [noise]), on_streams(later, keep):
            losses = self.subject.losses(self.ids)
        return [*seen, (later[-1], losses)]

    @contextlib.contextmanager
    def prefix(self, stage: int, sure: bool = False) -> Iterator[None]:
        """Within the block, the stages before `stage` return what they returned in the clean model, uncomputed, and
        leave in their context what they left there then. Unless `sure`, not where `why_whole` has a reason."""
        replaced = self.subject.stages[: 0 if stage and not sure and self.why_whole() else stage]
        own = [vars(module).get("forward") for module in replaced]

        def again(output: Any, left: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            left_in(args).update(left)
            return output

        for module, output, left in zip(replaced, self.outputs, self.left, strict=False):
            module.forward = functools.partial(again, output, left)
        try:
            yield
        finally:
            for module, forward in zip(replaced, own, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


def left_in(args: tuple) -> dict[str, Any]:
    """What earlier layers of a GPT of model.py left for later ones, in the Context that a stage was called with; empty
    for other models."""
    return getattr(args[1], "carry", {}) if len(args) > 1 else {}


class Means:
    """The mean of each channel over what is marked, and over all others, batch by batch."""

    def __init__(self) -> None:
        self.sums: Any = 0  # (2, C): of what is marked, of all
        self.counts: Any = 0

    def add(self, total: torch.Tensor, n: int, marked: torch.Tensor, counts: torch.Tensor) -> None:
        """`total` (C,): the sum over `n` tokens; `marked` (K, C): what is marked of some, 0 elsewhere; `counts`: alike,
        1 where it is."""
        self.sums = self.sums + torch.stack((marked.sum(0), total))
        self.counts = self.counts + torch.stack((counts.double().sum(0), torch.full_like(total, n)))

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean of the marked, where none is of the others; mean of the others), (C,) each, float32."""
        others = (self.sums[1] - self.sums[0]) / (self.counts[1] - self.counts[0]).clamp_min(1)
        marked = torch.where(self.counts[0] > 0, self.sums[0] / self.counts[0].clamp_min(1), others)
        return marked.float(), others.float()


class Reference:
    """What other text than the one intervened on says of a model's spikes and sinks.

    `entries`: per tap the mean of each channel (C,) over spike entries (where no spike fell: over the others) and over
    the others. `states`: per tap the mean state (C,) of spike tokens (where none: of the others) and of the others.
    `direction`: the former, of length 1. `step_up`: the tap at which most spike entries first stand; None without
    spikes. `sink_rate`: the share of sequences in which a head has a sink (L, H). `ordinary`: with what spikes
    are compared, here and where edits are made.
    """

    def __init__(
        self, subject: Subject, ids: torch.Tensor, batch_size: int = 8, ordinary: Ordinary | None = None
    ) -> None:
        self.ordinary = ordinary or Ordinary.from_ids(subject, ids, batch_size)
        entries, tokens = ([Means() for _ in subject.streams] for _ in range(2))
        new, hits = torch.zeros(len(subject.streams)), torch.zeros(())
        for numbers, batch in batches(ids, batch_size):
            clean = CleanPass.of(subject, batch, numbers, ordinary=self.ordinary)
            seen = torch.zeros_like(clean.spikes[0])
            for i, (x, marked) in enumerate(zip(clean.streams, clean.spikes, strict=True)):
                of_token = marked.any(-1)
                rows, total = x[of_token].double(), x.sum((0, 1), dtype=torch.float64)
                entries[i].add(total, of_token.numel(), rows * marked[of_token], marked[of_token])
                tokens[i].add(total, of_token.numel(), rows, torch.ones_like(rows))
                seen = seen.to(x.device)
                new[i] += (marked & ~seen).sum().cpu()
                seen = marked | seen
            hits = hits + torch.stack([found.any(-1) for found in clean.sinks]).double().sum(1)
        self.entries = [means.result() for means in entries]
        self.states = [means.result() for means in tokens]
        self.direction = [nn.functional.normalize(spike, dim=0) for spike, _ in self.states]
        self.step_up = int(new.argmax()) if new.any() else None
        self.sink_rate = hits / len(ids)
