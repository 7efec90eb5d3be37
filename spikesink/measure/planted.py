"""Planted ground truth: spikes of known size and channel, sinks of known strength, in any Subject.

ordinary = Ordinary.from_ids(subject, ids)     # measured before anything is planted
with planted.spikes(subject, tokens, channel=3, size=50.0):
    obs = observe(subject, ids, batch_size=len(ids), ordinary=ordinary)  # does it detect them?
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

    The value is written after the sub-layer `streams[tap]`, by default the middle one that can be written. The next
    forward pass must be on the batch to which `tokens` refers.
    """
    writable = [i for i, t in enumerate(subject.streams) if t.writable]
    target = subject.streams[writable[len(writable) // 2] if tap is None else tap]

    def write(x: torch.Tensor) -> torch.Tensor:
        value = size * metrics.median_magnitude(x.float())[:, None].to(x)  # (B, 1)
        x = x.clone()
        x[..., channel] = torch.where(tokens.to(x.device), value, x[..., channel])
        return x

    return on_streams([target], [write])


def sinks(
    subject: Subject, keys: torch.Tensor, layer: int, head: int, bias: torch.Tensor
) -> contextlib.AbstractContextManager[None]:
    """A context manager in which one head adds each sequence's `bias` (B,) to the logits of its `keys`, (B, T) bool.

    As everywhere, the bias leaves out a query's own key under causal attention. It works for one batch.
    """

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        q = args[0]
        added = torch.zeros(*q.shape[:2], 1, keys.size(1), dtype=q.dtype, device=q.device)
        added[:, head, 0] = torch.where(keys.to(q.device), bias.to(q)[:, None], 0.0)
        return args, {**kwargs, "bias": added}

    return hooked(before=[(subject.attends[layer].module, hook)])


def alpha_from_bias(bias: float, position: int, T: int) -> float:
    """The alpha of a key at `position` whose logit exceeds all others, which are equal, by `bias`. Attention is causal.

    Query i > k gives the key e^b / (e^b + i). Its own query, to which the bias does not apply, gives it 1 / (k + 1).
    """
    later = [math.exp(bias) / (math.exp(bias) + i) for i in range(position + 1, T)]
    return (1 / (position + 1) + sum(later)) / (T - position)


def bias_from_alpha(alpha: float, position: int, T: int) -> float:
    """The bias that gives a key at `position` this alpha: the inverse of `alpha_from_bias`, by bisection."""
    low, high = -20.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if alpha_from_bias(middle, position, T) < alpha else (low, middle)
    return (low + high) / 2
