"""Planted ground truth: spikes of known size and channel, sinks of known strength, in any Subject.

ordinary = Ordinary.of(subject, ids)     # what is usual without them
with planted.spikes(subject, tokens, channel=3, size=50.0):
    obs = observe(subject, ids, batch_size=len(ids), ordinary=ordinary)  # finds them, or does not
"""

import contextlib
import math
from typing import Any

import torch

from ..hooks import hooked, on_streams
from ..models.subject import Subject
from . import metrics


def spikes(
    subject: Subject, tokens: torch.Tensor, channel: int, size: float, tap: int | None = None
) -> contextlib.AbstractContextManager[None]:
    """A context manager in which each token of `tokens` (B, T) bool has |h| = `size` x the median in one channel.

    Written after the sub-layer `streams[tap]`, by default the middle one that can be written. One batch at a time:
    the next forward pass must be on the sequences that `tokens` is about.
    """
    can = [i for i, t in enumerate(subject.streams) if t.writable]
    at = subject.streams[can[len(can) // 2] if tap is None else tap]

    def write(x: torch.Tensor) -> torch.Tensor:
        value = size * metrics.median_magnitude(x.float())[:, None].to(x)  # (B, 1)
        x = x.clone()
        x[..., channel] = torch.where(tokens.to(x.device), value, x[..., channel])
        return x

    return on_streams([at], [write])


def sinks(
    subject: Subject, keys: torch.Tensor, layer: int, head: int, bias: torch.Tensor
) -> contextlib.AbstractContextManager[None]:
    """A context manager in which, in one head, every key of `keys` (B, T) bool gets its sequence's `bias` (B,) added
    to its logit.

    As everywhere, a query's own key is spared under causal attention. One batch at a time.
    """

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        q = args[0]
        added = torch.zeros(*q.shape[:2], 1, keys.size(1), dtype=q.dtype, device=q.device)
        added[:, head, 0] = torch.where(keys.to(q.device), bias.to(q)[:, None], 0.0)
        return args, {**kwargs, "bias": added}

    return hooked(before=[(subject.attends[layer].module, hook)])


def alpha_of(bias: float, position: int, T: int) -> float:
    """The alpha of a key at `position` whose logit is `bias` above those of all others, which are alike. Causal.

    Query i > k gives it e^b / (e^b + i); its own query, which is spared, 1 / (k + 1).
    """
    later = [math.exp(bias) / (math.exp(bias) + i) for i in range(position + 1, T)]
    return (1 / (position + 1) + sum(later)) / (T - position)


def bias_for(alpha: float, position: int, T: int) -> float:
    """The bias that gives a key at `position` this alpha: the inverse of `alpha_of`, by bisection."""
    low, high = -20.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if alpha_of(middle, position, T) < alpha else (low, middle)
    return (low + high) / 2
