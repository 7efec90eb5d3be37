"""Interventions as context managers, each with its matched control.

    with intervene.spikes(subject, ids, "zero"):
        losses = subject.losses(ids)

What is edited is fixed by the clean model on the same ids: a spike is an entry of the residual stream that the ratio
rule marks, at whatever tap it stands; a sink is a key with alpha > 0.3 and at least T/4 queries, head by head. So an
intervention and its control edit the same number of entries.
"""

import contextlib

import torch

from . import metrics
from .hooks import hooked, on_streams
from .subject import batches, map_rows


class ChannelMeans:
    """Mean of each channel at every tap, over spike entries and over the others; the values that `mean` sets.

    Measured on other text than it is used on. Lists of (C,), one per writable tap; alike where no spike fell.
    """

    def __init__(self, subject, ids, batch_size=8):
        taps = writable(subject)
        sums = [None] * len(taps)

        def record(index):
            def function(x):
                marked = spike_entries(x)
                parts = (x * marked, marked, x * ~marked, ~marked)
                new = torch.stack([part.double().sum((0, 1)) for part in parts])  # (4, C)
                sums[index] = new if sums[index] is None else sums[index] + new

            return function

        with on_streams(taps, [record(i) for i in range(len(sums))]):
            for _, batch in batches(ids, batch_size):
                subject.losses(batch)
        self.other = [(s[2] / s[3].clamp_min(1)).float() for s in sums]
        self.spike = [
            torch.where(s[1] > 0, s[0] / s[1].clamp_min(1), o).float() for s, o in zip(sums, self.other, strict=True)
        ]


def writable(subject):
    """The taps of the stream where an edit reaches every later module."""
    return [tap for tap in subject.streams if tap.writable]


def spike_entries(x):
    """Entries of a stream (B, T, C) that the primary spike rule marks: bool (B, T, C)."""
    return metrics.SPIKE_RULES[metrics.PRIMARY_SPIKE_RULE].entries(x.float())


def clean_spikes(subject, ids):
    """The spike entries of ids (B, T) in the model as it is: per writable tap a bool (B, T, C)."""
    found, taps = [], writable(subject)
    with on_streams(taps, [lambda x: found.append(spike_entries(x))] * len(taps)):
        subject.losses(ids)
    return found


def random_channels(marked, generator):
    """For each token, as many unmarked channels at random as it has marked ones, or all there are: bool (B, T, C)."""
    scores = torch.rand(marked.shape, generator=generator).to(marked.device).masked_fill(marked, -1.0)
    ranks = scores.argsort(-1, descending=True).argsort(-1)
    return (ranks < marked.sum(-1, keepdim=True)) & ~marked


def _zero(x, marked, means, control):
    return torch.zeros_like(x)


def _mean(x, marked, means, control):
    return means[1 if control else 0].to(x).expand_as(x)


def _clip(x, marked, means, control):
    """Spikes down to the rule's threshold; the control shrinks its entries by the mean factor of the token's spikes."""
    threshold = metrics.ratio_threshold(metrics.median_magnitude(x.float()))[:, None, None]
    factor = (threshold / x.float().abs().clamp_min(1e-30)).clamp_max(1)
    if control:
        factor = (factor * marked).sum(-1, keepdim=True) / marked.sum(-1, keepdim=True).clamp_min(1)
    return x * factor.to(x.dtype)


# name -> what the edited entries of a stream x (B, T, C) become; `means` are its tap's (spike, other) channel means
SPIKE_EDITS = {"zero": _zero, "mean": _mean, "clip": _clip}


@contextlib.contextmanager
def spikes(subject, ids, edit, *, control=False, means=None, seed=0):
    """Edits, at every tap of the stream, the entries that are spikes of ids (B, T) in the clean model.

    edit: zero, mean (needs `means`, a ChannelMeans) or clip (to the rule's threshold). control: the same edit on as
    many random other channels of the same tokens. Yields {"edited": number of entries}.
    """
    marked = clean_spikes(subject, ids)
    generator = torch.Generator().manual_seed(seed)
    entries = [random_channels(m, generator) for m in marked] if control else marked

    def edit_of(index):
        def function(x):
            if not marked[index].any():
                return None
            of_tap = (means.spike[index], means.other[index]) if means else None
            return torch.where(entries[index], SPIKE_EDITS[edit](x, marked[index], of_tap, control), x)

        return function

    with on_streams(writable(subject), [edit_of(i) for i in range(len(marked))]):
        yield {"edited": sum(int(m.sum()) for m in entries)}


@torch.no_grad()
def sinks_in(seam, q, k, causal):
    """Which keys of a seam's map are sinks: alpha > 0.3 and enough queries. bool (B, H, T), on the CPU."""
    received = q.new_zeros(*q.shape[:2], k.size(-2), dtype=torch.float32)
    for _, weights in map_rows(seam, q, k, causal):
        received[..., : weights.size(-1)] += weights.sum(-2)
    queries = metrics.queries_per_key(k.size(-2), None if causal else q.size(-2))
    alpha = metrics.sink_alpha(received.cpu(), queries)
    return (alpha > metrics.PRIMARY_SINK_EPSILON) & metrics.eligible_keys(queries)


def sink_keys(subject, ids):
    """Per layer the keys of ids (B, T) that are sinks in the model as it is: list of bool (B, H, T)."""
    found = []
    hook = lambda module, args, kwargs, output: found.append(sinks_in(module, *args[:2], subject.causal))
    with hooked([(seam.module, hook) for seam in subject.attends]):
        subject.losses(ids)
    return found


def random_keys(sinks, eligible, generator):
    """For each head, as many eligible (T,) non-sink keys at random as it has sinks: bool (B, H, T)."""
    scores = torch.rand(sinks.shape, generator=generator)
    scores = scores.masked_fill(sinks | ~eligible, -1.0)
    ranks = scores.argsort(-1, descending=True).argsort(-1)
    return (ranks < sinks.sum(-1, keepdim=True)) & (scores >= 0)


@contextlib.contextmanager
def mask_keys(subject, keys):
    """Masks keys (per layer a bool (B, H, T)) for every query but their own; a softmax renormalises the rest."""

    def hook_of(index):
        def hook(module, args, kwargs):
            mask = keys[index].to(args[0].device)
            if not mask.any():
                return None
            bias = torch.zeros_like(mask, dtype=args[0].dtype).masked_fill(mask, -torch.inf)
            return args, {**kwargs, "bias": bias[:, :, None, :]}

        return hook

    with hooked(before=[(seam.module, hook_of(i)) for i, seam in enumerate(subject.attends)]):
        yield


@contextlib.contextmanager
def sinks(subject, ids, *, control=False, seed=0):
    """Masks the keys of ids (B, T) that are sinks in the clean model, head by head, and renormalises.

    control: as many random other keys with at least T/4 queries instead. Yields {"edited": keys masked}.
    """
    keys = sink_keys(subject, ids)
    if control:
        generator = torch.Generator().manual_seed(seed)
        T = keys[0].size(-1)
        eligible = metrics.eligible_keys(metrics.queries_per_key(T, None if subject.causal else T))
        keys = [random_keys(found, eligible, generator) for found in keys]
    with mask_keys(subject, keys):
        yield {"edited": sum(int(found.sum()) for found in keys)}
