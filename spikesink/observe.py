"""One streaming pass over a model: every statistic is reduced inside the hook that sees the tensor.

Kept: running sums, and per token the largest magnitude by layer and what each rule says. Never kept: a T x T map, or
an activation after its sub-layer has run.
"""

import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from . import metrics
from .errors import UserError
from .hooks import hooked, on_streams
from .subject import rows_at_once


class StreamStats:
    """Running statistics of one tap's stream (B, T, C)."""

    def __init__(self):
        self.sequences = 0
        self.sums = {}  # name -> sum over sequences
        self.largest = 0.0
        self.channel_power = 0.0  # (C,), sum over tokens of x^2
        self.moments = torch.zeros(4, dtype=torch.float64)  # sums over entries of x, x^2, x^3, x^4
        self.magnitudes, self.channels = [], []  # per batch: largest |x| of each token (B, T), and its channel

    def add(self, x):
        """Takes in the streams x (B, T, C) of B sequences."""
        self.sequences += len(x)
        top = metrics.top_magnitudes(x)
        self._sum("top", top)
        self._sum("median", metrics.median_magnitude(x))
        self._sum("mmr", metrics.max_median_ratio(x).mean(1))
        self.largest = max(self.largest, top[:, 0].max().item())
        self.channel_power = self.channel_power + x.double().square().sum((0, 1)).cpu()
        powers = x.double().flatten()
        for order in range(4):
            self.moments[order] += powers.sum().cpu()
            powers = powers * x.double().flatten()
        magnitude, channel = x.abs().max(dim=-1)
        self.magnitudes.append(magnitude.cpu())
        self.channels.append(channel.int().cpu())

    def _sum(self, name, value):
        self.sums[name] = self.sums.get(name, 0) + value.double().sum(0).cpu()

    def result(self):
        """The findings' entry for this layer."""
        top1, top2, top3 = (self.sums["top"] / self.sequences).tolist()
        tokens = sum(m.numel() for m in self.magnitudes)
        channels = len(self.channel_power)
        return {
            "top1": top1,
            "top2": top2,
            "top3": top3,
            "median": (self.sums["median"] / self.sequences).item(),
            "max": self.largest,
            "mmr": (self.sums["mmr"] / self.sequences).item(),
            "kurtosis": metrics.channel_kurtosis(self.channel_power / tokens).item(),
            "entry_kurtosis": metrics.entry_kurtosis((self.moments / (tokens * channels)).tolist()),
            "inf_norm": top1,
        }


class AttentionStats:
    """Running statistics of one layer's attention."""

    def __init__(self):
        self.sums = {}

    def _sum(self, name, value):
        self.sums[name] = self.sums.get(name, 0) + value.double().cpu()

    def add(self, seam, q, k, v, bias):
        """One batch. Returns the attention mass of each key and its alpha, both (B, H, T), on the CPU."""
        B, H, T, _ = q.shape
        q, k, v = q.float(), k.float(), v.float()
        chunk = rows_at_once(q, k)
        received = q.new_zeros(B, H, T)
        late, distance = torch.zeros_like(received), torch.zeros_like(received)
        entropy, first_argmax = q.new_zeros(B, H), q.new_zeros(B, H)
        keys = torch.arange(T, device=q.device)
        for first in range(0, T, chunk):
            weights = seam.shares(q[:, :, first : first + chunk], k, first, bias)  # (B, H, R, T)
            queries = torch.arange(first, first + weights.size(-2), device=q.device)
            received += weights.sum(-2)
            late += weights[:, :, queries >= T // 2].sum(-2)
            distance += (weights * (queries[:, None] - keys).clamp_min(0)).sum(-2)
            entropy += torch.special.entr(weights).sum((-1, -2))
            first_argmax += ((weights.argmax(-1) == 0) & (weights[..., 0] > 0)).sum(-1)
        alpha = metrics.sink_alpha(received.cpu())
        is_sink = (alpha > metrics.PRIMARY_SINK_EPSILON) & metrics.eligible_keys(T)  # (B, H, T)
        others = ~is_sink.to(received.device)
        norms = v.norm(dim=-1)
        norms = norms.repeat_interleave(H // norms.size(1), dim=1).cpu()  # (B, H, T), grouped keys or not
        relative = norms / norms.mean(-1, keepdim=True)
        for name, value in {
            "alpha": alpha.sum(0),
            "entropy": entropy.sum(0) / T,
            "first_argmax": first_argmax.sum(0) / T,
            "distance": distance.sum((0, -1)),
            "mass": received.sum((0, -1)),
            "distance_others": (distance * others).sum((0, -1)),
            "mass_others": (received * others).sum((0, -1)),
            "first_value": relative[..., 0].sum(0),
            "sink_value": (relative * is_sink).sum((0, -1)),
            "sinks": is_sink.sum((0, -1)),
            "any_sink": is_sink.any(-1).sum(0),
        }.items():
            self._sum(name, value)
        late_alpha = metrics.second_half_alpha(late.cpu())
        for epsilon in metrics.EPSILONS:
            hit = alpha > epsilon
            self._sum(f"hits {epsilon}", hit.sum(0))
            self._sum(f"late first {epsilon}", (late_alpha[..., 0] > epsilon).sum(0))
            self._sum(f"first half {epsilon}", hit[..., : (T + 1) // 2].any(-1).sum(0))
        return received.cpu(), alpha


@dataclass
class Observation:
    """What one pass saw of N sequences of T tokens."""

    ids: torch.Tensor  # (N, T)
    streams: list[StreamStats]
    attention: list[AttentionStats]
    spikes: dict[str, torch.Tensor]  # rule -> bool (N, T)
    spike_channels: dict[str, torch.Tensor]  # rule -> how often each channel was marked (C,)
    share: torch.Tensor  # (N, T), of all the sequence's attention mass
    max_alpha: torch.Tensor  # (N, T), over layers and heads
    sink_heads: torch.Tensor  # (N, T), heads in which the token is a sink by Gu's rule
    first_rate: dict[float, torch.Tensor]  # epsilon -> (N,), share of heads in which the first key is a sink
    loss: torch.Tensor  # (N,), mean next-token loss, nats


def observe(subject, ids, batch_size=8, progress=True):
    """Runs `subject` over token ids (N, T) once and returns an Observation (of N x T with the registers)."""
    streams = [StreamStats() for _ in subject.streams]
    attention = [AttentionStats() for _ in subject.attends]
    batches = []
    for start in tqdm(range(0, len(ids), batch_size), desc="observe", disable=None if progress else True):
        batches.append(_observe_batch(subject, ids[start : start + batch_size], streams, attention))
    join = lambda key: torch.cat([batch[key] for batch in batches])
    return Observation(
        ids=subject.seen(ids),
        streams=streams,
        attention=attention,
        spikes={rule: join(("spike", rule)) for rule in metrics.SPIKE_RULES},
        spike_channels={rule: sum(b["channels", rule] for b in batches) for rule in metrics.SPIKE_RULES},
        share=join("share"),
        max_alpha=join("max_alpha"),
        sink_heads=join("sink_heads"),
        first_rate={epsilon: join(("first", epsilon)) for epsilon in metrics.EPSILONS},
        loss=join("loss"),
    )


@torch.no_grad()
def _observe_batch(subject, ids, streams, attention):
    """One forward pass with every tap hooked; returns the per-token results of these sequences."""
    B, T = subject.seen(ids).shape
    marked = {rule: 0 for rule in metrics.SPIKE_RULES}  # per rule: in how many layers each entry was marked (B, T, C)
    batch = {"share": torch.zeros(B, T), "max_alpha": torch.zeros(B, T), "sink_heads": torch.zeros(B, T)}
    batch |= {("first", epsilon): torch.zeros(B) for epsilon in metrics.EPSILONS}
    heads = len(subject.attends) * subject.n_head
    eligible = metrics.eligible_keys(T)

    def on_stream(index):
        def function(stream):
            x = stream.detach().float()
            streams[index].add(x)
            for rule, (_, entries) in metrics.SPIKE_RULES.items():
                marked[rule] = marked[rule] + entries(x).to(torch.int16)

        return function

    def on_attention(index):
        def hook(module, args, kwargs, output):
            q, k, v = args
            received, alpha = attention[index].add(module, q, k, v, kwargs.get("bias"))
            batch["share"] += received.sum(1)
            batch["max_alpha"] = torch.maximum(batch["max_alpha"], alpha.amax(1))
            batch["sink_heads"] += ((alpha > metrics.PRIMARY_SINK_EPSILON) & eligible).sum(1)
            for epsilon in metrics.EPSILONS:
                batch["first", epsilon] += (alpha[..., 0] > epsilon).sum(1) / heads

        return hook

    seams = [(seam.module, on_attention(i)) for i, seam in enumerate(subject.attends)]
    with on_streams(subject.streams, [on_stream(i) for i in range(len(streams))]), hooked(seams):
        batch["loss"] = subject.losses(ids).mean(1)
        if not batch["loss"].isfinite().all():
            raise UserError(
                "the model's loss on this text is not finite: its weights are broken, or overflow in float32"
            )

    batch["share"] /= batch["share"].sum(1, keepdim=True)
    for rule, count in marked.items():
        needed = max(1, math.ceil(metrics.PERSISTENT_RULES.get(rule, 0) * len(streams)))
        entries = count >= needed
        batch["spike", rule] = entries.any(-1).cpu()
        batch["channels", rule] = entries.sum((0, 1)).cpu()
    return batch
