"""The unedited ("clean") model on one batch: its spikes and sinks, and reference values from other text."""

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


HALF = 0.5  # of a spike rule's threshold: a spike goes on as long as |h| is that large


class TapState(NamedTuple):
    """What every token has at a tap: (B, T) each, on the CPU.

    `marked`: it has a spike; `half_spike`: an entry is at least half as large as a spike; `entry`: |h| in the channel
    in which the clean model has its spike, or its largest |h|; `magnitude`: that, or the largest |h| of a spike there;
    `large`: `entry` is as large as the rule asks; `norm`: the norm of the state.
    """

    marked: torch.Tensor
    half_spike: torch.Tensor
    entry: torch.Tensor
    magnitude: torch.Tensor
    large: torch.Tensor
    norm: torch.Tensor


@dataclass
class CleanPass:
    """One pass of the clean model over a batch: where its spikes and sinks are, and what an edit is compared with.

    It stores the stream of the batch at every tap: with a large model, take few sequences at a time.
    """

    subject: Subject
    ids: torch.Tensor  # (B, T), int64
    numbers: torch.Tensor  # (B,), numbers of the sequences, which seed random controls
    ordinary: Ordinary  # the usual magnitudes that spikes are compared with
    losses: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (B, T - shift), nats
    output: torch.Tensor | None = None  # without a language-model head, the output states (B, T, C)
    streams: list[torch.Tensor] = field(default_factory=list)  # at each tap (B, T, C)
    spikes: list[torch.Tensor] = field(default_factory=list)  # at each tap bool (B, T, C)
    calls: list[Call] = field(default_factory=list)  # of each seam
    alpha: list[torch.Tensor] = field(default_factory=list)  # at each seam (B, H, T), on the CPU
    sinks: list[torch.Tensor] = field(default_factory=list)  # at each seam bool (B, H, T), on the CPU
    queries: list[torch.Tensor] = field(default_factory=list)  # at each seam, how many queries see each key (T,)
    outputs: list[Any] = field(default_factory=list)  # of each stage, as its module returned it
    contexts: list[dict[str, Any]] = field(default_factory=list)  # after each stage, see `context_values`

    @classmethod
    def run(
        cls,
        subject: Subject,
        ids: torch.Tensor,
        numbers: torch.Tensor | None = None,
        ordinary: Ordinary | None = None,
    ) -> "CleanPass":
        """Runs one forward pass over ids (B, T). `ordinary`: usual magnitudes, by default those of these very ids."""
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
            clean.contexts.append(dict(context_values(args)))

        hooks: list[tuple[nn.Module, Any]] = [(tap.module, on_attention) for tap in subject.attends]
        hooks += [(stage, on_stage) for stage in subject.stages]
        with on_streams(subject.streams, [on_stream] * len(subject.streams)), hooked(hooks):
            clean.losses, clean.output = subject.losses_and_states(ids)
        return clean

    @functools.cached_property
    def eligible(self) -> list[torch.Tensor]:
        """At each seam, which keys could be sinks: bool (T,)."""
        pairs = zip(self.queries, self.calls, strict=True)
        return [eligible_keys(queries, call.q.size(-2)) for queries, call in pairs]

    @functools.cached_property
    def mass(self) -> list[torch.Tensor]:
        """At each seam, the attention that each key gets, summed over queries: (B, H, T)."""
        return [alpha * queries for alpha, queries in zip(self.alpha, self.queries, strict=True)]

    @functools.cached_property
    def channel(self) -> list[torch.Tensor]:
        """At each tap, the channel of each token's largest spike entry, or without one its largest entry: (B, T, 1)."""
        return [
            x.abs().masked_fill(~spikes & spikes.any(-1, keepdim=True), -1).argmax(-1, keepdim=True)
            for x, spikes in zip(self.streams, self.spikes, strict=True)
        ]

    @functools.cached_property
    def tap_states(self) -> list[TapState]:
        """The TapState of the clean model at each tap."""
        return [self.tap_state(i, x) for i, x in enumerate(self.streams)]

    def tap_state(self, i: int, x: torch.Tensor) -> TapState:
        """Returns the TapState at tap i if the stream there is x (B, T, C)."""
        usual, magnitudes = self.ordinary.sums[i], x.float().abs()
        assert usual is not None
        marked = self.ordinary.spikes_at(i, x)
        entry = magnitudes.gather(-1, self.channel[i])[..., 0]
        return TapState(
            marked=marked.any(-1).cpu(),
            half_spike=((magnitudes * usual.per_threshold).amax(-1) >= HALF).cpu(),
            entry=entry.cpu(),
            magnitude=torch.maximum(entry, (magnitudes * marked).amax(-1)).cpu(),
            large=(entry >= usual.thresholds[self.channel[i][..., 0]]).cpu(),
            norm=torch.linalg.vector_norm(magnitudes, dim=-1).cpu(),
        )

    @property
    def spike_tokens(self) -> torch.Tensor:
        """Tokens with a spike at some attended tap: bool (B, T)."""
        return torch.stack([tap.marked for tap in self.tap_states[self.subject.attended]]).any(0)

    @property
    def sink_tokens(self) -> torch.Tensor:
        """Tokens that are a sink in enough heads: bool (B, T)."""
        heads = torch.cat(self.sinks, dim=1)
        return heads.sum(1) >= needed_heads(heads.size(1))

    def why_whole(self) -> str:
        """Says why no stage may be replayed, or '' where a replay is right. It is tried once for a subject."""
        reasons = self.subject.whole_passes
        if not reasons:
            taps = self.broken_replay()
            reasons.append("")
            if taps:
                reader = taps[1].name
                reasons[0] = f"Every pass runs the whole model: in a replay, {reader} reads what another pass left."
                say_once(f"{reasons[0]} The numbers are right, but take longer; see `carry` in model.py")
        return reasons[0]

    def broken_replay(self, at_most: int = 12) -> "tuple[Tap, Tap] | tuple[()]":
        """Returns (the tap from which a pass is replayed, the first tap that then differs), or () if none differs.

        This compares replays with whole passes over 32 tokens of two sequences, with noise on the stream at `at_most`
        of the taps. Other text goes through the model before each replay, so that no value is right by chance.
        """
        subject, short = self.subject, CleanPass.run(self.subject, self.ids[:2, :32], ordinary=self.ordinary)
        taps = [tap for tap in subject.writable if subject.stage_of(tap)]
        for tap in taps[:: max(1, -(-len(taps) // at_most))]:
            subject.losses(short.ids.flip(1))
            with short.prefix(subject.stage_of(tap), sure=True):
                replayed = short._with_noise(tap)
            for (later, x), (_, y) in zip(replayed, short._with_noise(tap), strict=True):
                if not torch.allclose(x, y, rtol=0, atol=1e-4 * float(y.abs().float().mean()), equal_nan=True):
                    return tap, later
        return ()

    def _with_noise(self, noisy: Tap) -> list[tuple[Tap, torch.Tensor]]:
        """Returns the stream at a tap with noise on it and at every later tap, then the losses or output states."""
        noise = lambda x: x + x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        streams: list[tuple[Tap, torch.Tensor]] = []
        later = [tap for tap in self.subject.streams if self.subject.stage_of(tap) >= self.subject.stage_of(noisy)]
        record = [functools.partial(lambda tap, x: streams.append((tap, x)), tap) for tap in later]
        with on_streams([noisy], [noise]), on_streams(later, record):
            losses, output = self.subject.losses_and_states(self.ids)
        return [*streams, (later[-1], losses if output is None else output)]

    @contextlib.contextmanager
    def prefix(self, stage: int, sure: bool = False) -> Iterator[None]:
        """Within the block, the stages before `stage` are replayed: they return their clean outputs, uncomputed, and
        put back what they left in their context. Unless `sure`, this does nothing where `why_whole` has a reason."""
        replaced = self.subject.stages[: 0 if stage and not sure and self.why_whole() else stage]
        forwards = [vars(module).get("forward") for module in replaced]

        def replay(output: Any, context: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            context_values(args).update(context)
            return output

        for module, output, context in zip(replaced, self.outputs, self.contexts, strict=False):
            module.forward = functools.partial(replay, output, context)
        try:
            yield
        finally:
            for module, forward in zip(replaced, forwards, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


def context_values(args: tuple) -> dict[str, Any]:
    """Returns what earlier layers of a GPT of model.py left for later ones, from a stage's arguments; else {}."""
    return getattr(args[1], "carry", {}) if len(args) > 1 else {}


class Means:
    """The mean of each channel over marked entries and over all others, batch by batch."""

    def __init__(self) -> None:
        self.sums: Any = 0  # (2, C): over marked entries, over all
        self.counts: Any = 0

    def add(self, total: torch.Tensor, n: int, marked: torch.Tensor, mask: torch.Tensor) -> None:
        """Adds `n` tokens whose sum is `total` (C,), and K rows of them, `marked` (K, C): 0 where `mask` (K, C) is."""
        self.sums = self.sums + torch.stack((marked.sum(0), total))
        self.counts = self.counts + torch.stack((mask.double().sum(0), torch.full_like(total, n)))

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (mean of the marked, or without any of the others; mean of the others), (C,) each, float32."""
        others = (self.sums[1] - self.sums[0]) / (self.counts[1] - self.counts[0]).clamp_min(1)
        marked = torch.where(self.counts[0] > 0, self.sums[0] / self.counts[0].clamp_min(1), others)
        return marked.float(), others.float()


class Reference:
    """What text other than the edited one says about a model's spikes and sinks.

    `entries`: at each tap the mean of each channel (C,) over spike entries (over the others if the channel has no
    spike), and over the others. `states`: at each tap the mean state (C,) of spike tokens (of the others if there are
    none), and of the others. `direction`: the former, scaled to length 1. `step_up`: the tap at which most spike
    entries begin; None without spikes. `sink_rate` (L, H): the share of sequences in which a head has a sink.
    `ordinary`: the usual magnitudes that spikes are compared with, here and where edits are made.
    """

    def __init__(
        self, subject: Subject, ids: torch.Tensor, batch_size: int = 8, ordinary: Ordinary | None = None
    ) -> None:
        self.ordinary = ordinary or Ordinary.from_ids(subject, ids, batch_size)
        entries, states = ([Means() for _ in subject.streams] for _ in range(2))
        starts, hits = torch.zeros(len(subject.streams)), torch.zeros(())
        for numbers, batch in batches(ids, batch_size):
            clean = CleanPass.run(subject, batch, numbers, ordinary=self.ordinary)
            earlier = torch.zeros_like(clean.spikes[0])
            for i, (x, spikes) in enumerate(zip(clean.streams, clean.spikes, strict=True)):
                tokens = spikes.any(-1)
                rows, total = x[tokens].double(), x.sum((0, 1), dtype=torch.float64)
                entries[i].add(total, tokens.numel(), rows * spikes[tokens], spikes[tokens])
                states[i].add(total, tokens.numel(), rows, torch.ones_like(rows))
                earlier = earlier.to(x.device)
                starts[i] += (spikes & ~earlier).sum().cpu()
                earlier = spikes | earlier
            hits = hits + torch.stack([sinks.any(-1) for sinks in clean.sinks]).double().sum(1)
        self.entries = [means.result() for means in entries]
        self.states = [means.result() for means in states]
        self.direction = [nn.functional.normalize(spike, dim=0) for spike, _ in self.states]
        self.step_up = int(starts.argmax()) if starts.any() else None
        self.sink_rate = hits / len(ids)
