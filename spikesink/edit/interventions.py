"""Interventions on spikes and sinks, as context managers, each with its matched controls.

    clean = interventions.Clean.of(subject, ids)
    with interventions.spike_zero(clean), interventions.sink_mask(clean):
        losses = subject.losses(ids)

What is edited is fixed by the clean model on the same ids: a spike is an entry of the residual stream that the ratio
rule marks, at whatever tap it stands; a sink is a key with alpha > 0.3 and at least T/4 queries, head by head. So an
intervention and its control edit as many entries, and interventions can be combined in any order.

Every intervention is called as (clean, reference=None, control=None): `reference` holds what other text says, `control`
names one of its CONTROLS, whose draws depend on the number of a sequence and on nothing else.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..hooks import hooked, on_streams
from ..measure import metrics
from ..measure.sinks import eligible_keys, queries_per_key, sinks_in
from ..measure.spikes import ratio_threshold, spike_entries
from ..models.subject import Subject, batches, for_heads, map_rows

# ---------------------------------------------------------------------------------------- the clean model


@dataclass
class Clean:
    """One batch as the model left alone sees it: where its spikes and sinks are, and what an edit is compared with.

    It holds the stream of the batch at every tap: with a large model, take few sequences at a time.
    """

    subject: Subject
    ids: torch.Tensor  # (B, T)
    numbers: torch.Tensor  # (B,), of its sequences, to which random controls are tied
    losses: torch.Tensor = None  # (B, T - shift), nats
    streams: list = field(default_factory=list)  # at each tap (B, T, C)
    spikes: list = field(default_factory=list)  # at each tap bool (B, T, C)
    sinks: list = field(default_factory=list)  # at each seam bool (B, H, T)
    outputs: list = field(default_factory=list)  # of each stage, as its module returned it

    @classmethod
    def of(cls, subject, ids, numbers=None, watch=()):
        """One forward pass over ids (B, T); `watch`: more forward hooks, (module, hook)."""
        clean = cls(subject, ids, torch.arange(len(ids)) if numbers is None else numbers)

        def on_stream(x):
            x = x.detach().view(len(ids), -1, x.size(-1))
            clean.streams.append(x)
            clean.spikes.append(spike_entries(x))

        def on_attention(module, args, kwargs, output):
            clean.sinks.append(sinks_in(module, *args[:2], subject.causal))

        hooks = [(tap.module, on_attention) for tap in subject.attends]
        hooks += [(stage, lambda m, a, k, output: clean.outputs.append(output)) for stage in subject.stages]
        with on_streams(subject.streams, [on_stream] * len(subject.streams)), hooked([*hooks, *watch]):
            clean.losses = subject.losses(ids)
        return clean

    @property
    def spike_tokens(self):
        """Tokens with a spike at some tap: bool (B, T)."""
        return torch.stack([marked.any(-1).cpu() for marked in self.spikes]).any(0)

    @property
    def sink_tokens(self):
        """Tokens that are a sink in some head: bool (B, T)."""
        return torch.stack([found.any(1) for found in self.sinks]).any(0)

    @contextlib.contextmanager
    def prefix(self, stage):
        """Within the block, the stages before `stage` return what they returned in the clean model, uncomputed."""
        replaced = self.subject.stages[:stage]
        own = [vars(module).get("forward") for module in replaced]
        for module, output in zip(replaced, self.outputs, strict=False):
            module.forward = lambda *args, _output=output, **kwargs: _output
        try:
            yield
        finally:
            for module, forward in zip(replaced, own, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


class Reference:
    """What other text than the one intervened on says of a model's spikes and sinks.

    `entries`: per tap the mean of each channel (C,) over spike entries (where no spike fell: over the others) and over
    the others. `states`: per tap the mean state (C,) of spike tokens (where none: of the others) and of the others.
    `direction`: the former, of length 1. `step_up`: the tap at which most spike entries first stand; None without
    spikes. `sink_rate`: the share of sequences in which a head has a sink (L, H).
    """

    def __init__(self, subject, ids, batch_size=8):
        sums, new, hits = [0] * len(subject.streams), torch.zeros(len(subject.streams)), 0
        for numbers, batch in batches(ids, batch_size):
            clean = Clean.of(subject, batch, numbers)
            seen = False
            for i, (x, marked) in enumerate(zip(clean.streams, clean.spikes, strict=True)):
                tokens = marked.any(-1, keepdim=True)
                masks = (marked, ~marked, tokens.expand_as(x), ~tokens.expand_as(x))
                sums[i] += torch.stack([torch.stack((x * m, m)).double().sum((1, 2)) for m in masks])  # (4, 2, C)
                new[i] += (marked & ~torch.as_tensor(seen, device=x.device)).sum().cpu()
                seen = marked | seen
            hits = hits + torch.stack([found.any(-1) for found in clean.sinks]).double().sum(1)
        means = lambda s: (s[:, 0] / s[:, 1].clamp_min(1)).float()  # (4, C)
        known = lambda s, i: torch.where(s[i, 1] > 0, means(s)[i], means(s)[i + 1])
        self.entries = [(known(s, 0), means(s)[1]) for s in sums]
        self.states = [(known(s, 2), means(s)[3]) for s in sums]
        self.direction = [torch.nn.functional.normalize(spike, dim=0) for spike, _ in self.states]
        new[[not tap.writable for tap in subject.streams]] = 0
        self.step_up = int(new.argmax()) if new.any() else None
        self.sink_rate = hits / len(ids)


# ----------------------------------------------------------------------------------------------- controls


def uniform(numbers, shape, seed):
    """Uniform draws (B, *shape), each sequence's from its number and the seed alone."""
    generators = [torch.Generator().manual_seed(2**20 * seed + int(number)) for number in numbers]
    return torch.stack([torch.rand(shape, generator=generator) for generator in generators])


def as_many(marked, scores, free=None, dim=-1):
    """Along `dim`, as many unmarked (and `free`) entries as are marked, those of the highest scores: bool."""
    free = ~marked if free is None else free & ~marked
    scores = scores.to(marked.device).masked_fill(~free, -torch.inf)
    ranks = scores.argsort(dim, descending=True).argsort(dim)
    return (ranks < marked.sum(dim, keepdim=True)) & free


def _random_channels(clean, i):
    return as_many(clean.spikes[i], uniform(clean.numbers, clean.spikes[i].shape[1:], i))


def _median_entries(clean, i):
    size = clean.streams[i].float().abs()
    return as_many(clean.spikes[i], -(size - metrics.median_magnitude(size)[:, None, None]).abs())


def _other_tokens(clean, i):
    tokens = clean.spikes[i].any(-1)
    return as_many(tokens, uniform(clean.numbers, tokens.shape[1:], i))


def _random_keys(clean):
    queries = queries_per_key(clean.sinks[0].size(-1), None if clean.subject.causal else 1)
    draws = [uniform(clean.numbers, found.shape[1:], i) for i, found in enumerate(clean.sinks)]
    return [as_many(f, d, eligible_keys(queries)) for f, d in zip(clean.sinks, draws, strict=True)]


def _same_positions(clean):
    sinks = torch.stack(clean.sinks, dim=1)  # (B, L, H, T)
    draws = uniform(clean.numbers, sinks.shape[1:], len(clean.sinks))
    chosen = as_many(sinks.flatten(1, 2), draws.flatten(1, 2), dim=1)
    return list(chosen.view_as(sinks).unbind(1))


CONTROLS = {
    "random_channels": "as many random other channels of the same tokens",
    "median_entries": "as many entries of the same tokens, those nearest to the median magnitude",
    "random_direction": "a random direction, projected out of the same tokens",
    "other_tokens": "as many random other tokens of the same sequence",
    "random_keys": "as many random other keys of the same head",
    "same_positions": "the same positions in as many other heads, drawn at random, where they are no sinks",
    "second_token": "the token after BOS",
    "random_heads": "as many random other heads",
    "other_sub_layer": "another sub-layer of the same kind, drawn at random",
}


def entries_of(clean, control=None):
    """Per tap the entries to edit: the spikes, or a control's. bool (B, T, C)."""
    draw = {"random_channels": _random_channels, "median_entries": _median_entries}.get(control)
    return [draw(clean, i) for i in range(len(clean.spikes))] if draw else clean.spikes


def tokens_of(clean, control=None):
    """Per tap the tokens to edit: those with a spike there, or a control's. bool (B, T)."""
    if control == "other_tokens":
        return [_other_tokens(clean, i) for i in range(len(clean.spikes))]
    return [marked.any(-1) for marked in clean.spikes]


def keys_of(clean, control=None):
    """Per seam the keys to edit: the sinks, or a control's. bool (B, H, T)."""
    return {None: lambda c: c.sinks, "random_keys": _random_keys, "same_positions": _same_positions}[control](clean)


# -------------------------------------------------------------------------------------------- the edits


class Edit:
    """An intervention, to be entered as often as needed. Hooks go when the block is left, whatever happens in it.

    `edited`: how many entries, tokens, keys, heads or sub-layers, over the sequences. `stage`: the first that it
    touches; all before are as in the clean model. `rows`: per seam whose map it changes in a way that cannot be seen in
    (q, k, bias), the function (rows of the map, first query) -> rows.
    """

    def __init__(self, clean, taps, edited, hooks, rows=None):
        subject = clean.subject
        self.stage = min(map(subject.stage_of, taps), default=len(subject.stages))
        self.edited, self.hooks, self.rows, self._entered = int(edited), hooks, rows or {}, []

    def __enter__(self):
        hooks = self.hooks()
        hooks.__enter__()
        self._entered.append(hooks)
        return self

    def __exit__(self, *error):
        return self._entered.pop().__exit__(*error)


def nothing(clean, reference=None, control=None):
    """The intervention that changes nothing."""
    return Edit(clean, [], 0, contextlib.nullcontext)


def _on_streams(clean, where, function, only=None):
    """An Edit: at each writable tap i, `where[i]` (bool (B, T, C) or (B, T, 1)) of x become function(i, x)'s."""
    subject = clean.subject
    chosen = [
        i
        for i, tap in enumerate(subject.streams)
        if tap.writable and bool(where[i].any()) and (only is None or i == only)
    ]

    def write(i):
        # transformers may flatten a stream to (B T, C) on its way
        return lambda x: torch.where(
            where[i], function(i, x.view(clean.streams[i].shape)), x.view_as(clean.streams[i])
        ).view_as(x)

    taps = [subject.streams[i] for i in chosen]
    hooks = lambda: on_streams(taps, [write(i) for i in chosen])
    return Edit(clean, taps, sum(int(where[i].sum()) for i in chosen), hooks)


# ------------------------------------------------------------------------------------------------- spikes


CLIP_RATIO = 10.0  # well below the spike rule's


def spike_zero(clean, reference=None, control=None):
    """h = 0 at every spike entry of every tap."""
    return _on_streams(clean, entries_of(clean, control), lambda i, x: torch.zeros_like(x))


def spike_mean(clean, reference, control=None):
    """h = the mean of its channel over spike entries of other text (Sun et al. 2024); a control's, over the others."""
    mean = lambda i, x: reference.entries[i][control is not None].to(x).expand_as(x)
    return _on_streams(clean, entries_of(clean, control), mean)


def spike_clip(clean, reference=None, control=None, ratio=CLIP_RATIO):
    """|h| cut down to `ratio` x the layer's median |h|; a control's entries shrink by their token's mean factor."""

    def clip(i, x):
        threshold = ratio_threshold(metrics.median_magnitude(x.float()), ratio)[:, None, None]
        factor = (threshold / x.float().abs().clamp_min(1e-30)).clamp_max(1)
        if control:
            marked = clean.spikes[i]
            factor = (factor * marked).sum(-1, keepdim=True) / marked.sum(-1, keepdim=True).clamp_min(1)
        return x * factor.to(x.dtype)

    return _on_streams(clean, entries_of(clean, control), clip)


def spike_stepup(clean, reference, control=None):
    """h = 0 at the spike entries of the step-up tap alone: later sub-layers may raise them again."""
    only = -1 if reference.step_up is None else reference.step_up
    return _on_streams(clean, entries_of(clean, control), lambda i, x: torch.zeros_like(x), only)


def spike_project(clean, reference, control=None):
    """h - (h u) u at every spike token of every tap, u the direction of other text's mean spike token there."""

    def project(i, x):
        u = reference.direction[i].to(x)
        if control == "random_direction":
            u = torch.nn.functional.normalize(torch.randn(u.shape, generator=torch.Generator().manual_seed(i)), dim=0)
        u = u.to(x)
        return x - (x @ u)[..., None] * u

    return _on_streams(clean, [tokens[..., None] for tokens in tokens_of(clean, control)], project)


def spike_constant(clean, reference, control=None):
    """The whole state of every spike token, at every tap, is the mean state of other text's spike tokens there.

    Sun et al. 2026: spikes act as near-constant, implicit parameters. A control's tokens get the others' mean state.
    """
    constant = lambda i, x: reference.states[i][control is not None].to(x).expand_as(x)
    return _on_streams(clean, [tokens[..., None] for tokens in tokens_of(clean, control)], constant)


# -------------------------------------------------------------------------------------------------- sinks


def _on_seams(clean, keys, hooks_of, rows_of=None):
    """An Edit of the seams where keys (per seam bool (B, H, T)) has any; hooks_of(its keys) -> arguments of hooked."""
    chosen = [(tap, found) for tap, found in zip(clean.subject.attends, keys, strict=True) if found.any()]

    def hooks():
        found = [{kind: (tap.module, hook) for kind, hook in hooks_of(at).items()} for tap, at in chosen]
        return hooked(**{kind: [of[kind] for of in found] for kind in (found[0] if found else ())})

    rows = {i: rows_of(found) for i, found in enumerate(keys) if found.any()} if rows_of else None
    return Edit(clean, [tap for tap, _ in chosen], sum(int(found.sum()) for _, found in chosen), hooks, rows)


def biased(clean, keys, value):
    """An Edit: `value` is added to the logit of each key for every query but the one at its own position."""

    def hooks_of(found):
        def hook(module, args, kwargs):
            q = args[0]
            bias = torch.zeros(found.shape, dtype=q.dtype, device=q.device).masked_fill(found.to(q.device), value)
            others = kwargs.get("bias")
            return args, {**kwargs, "bias": bias[:, :, None] if others is None else others + bias[:, :, None]}

        return {"before": hook}

    return _on_seams(clean, keys, hooks_of)


def sink_mask(clean, reference=None, control=None):
    """Sink keys get no attention, but for each key's own query; a softmax renormalises the rest."""
    return biased(clean, keys_of(clean, control), -math.inf)


def sink_damp(clean, reference=None, control=None, factor=0.5):
    """exp(logit) of sink keys times `factor`: A becomes factor A / (1 - (1 - factor) A) where a row has one sink."""
    return biased(clean, keys_of(clean, control), math.log(factor))


def _destinations(keys):
    """Per key of (B, H, T) the nearest later key that is not among them, or else the nearest earlier one: int64."""
    T = keys.size(-1)
    place = torch.arange(T).expand(keys.shape)
    later = torch.where(keys, T, place).flip(-1).cummin(-1).values.flip(-1)
    earlier = torch.where(keys, -1, place).cummax(-1).values
    return torch.where(later < T, later, torch.where(earlier >= 0, earlier, place))


def sink_relocate(clean, reference=None, control=None):
    """A sink key's attention goes to the nearest later key that is no sink, for every query that sees both."""
    causal = clean.subject.causal

    def rows_of(found):
        targets = _destinations(found)

        def rows(weights, first):
            _, _, R, S = weights.shape
            target = targets[..., :S].to(weights.device)[:, :, None].expand_as(weights)
            moves = found[..., :S].to(weights.device)[:, :, None]
            if causal:
                moves = moves & (target <= torch.arange(first, first + R, device=weights.device)[:, None])
            mass = weights * moves
            return (weights - mass).scatter_add(-1, target.clamp_max(S - 1), mass)

        return rows

    def hooks_of(found):
        rows = rows_of(found)

        def hook(module, args, kwargs, output):
            q, k, v = args
            v, moved = for_heads(v, q.size(1)), []
            weights_of = lambda *call: module.weights(*call)[0]
            for first, weights in map_rows(module, q, k, causal, kwargs.get("bias"), weights_of):
                moved.append((rows(weights, first) - weights).to(v.dtype) @ v[:, :, : weights.size(-1)])
            return output + torch.cat(moved, dim=-2)

        return {"forward": hook}

    return _on_seams(clean, keys_of(clean, control), hooks_of, rows_of)


def sink_null(clean, reference=None, control=None):
    """Each sink key becomes a null slot, of zero key (so zero logit, but for what depends on positions) and zero value.

    The query at a sink's own position stays as it was.
    """

    def hooks_of(found):
        whole = []

        def before(module, args, kwargs):
            q, k, v = args
            whole.append((args, kwargs))
            kept = ~found.to(q.device)[..., None]
            return (q, for_heads(k, q.size(1)) * kept, for_heads(v, q.size(1)) * kept), kwargs

        def own(module, args, kwargs, output):
            args, kwargs = whole.pop()
            if not clean.subject.causal:
                return None
            return torch.where(found.to(output.device)[..., None], module.forward(*args, **kwargs), output)

        return {"before": before, "first": own}

    return _on_seams(clean, keys_of(clean, control), hooks_of)


def bos_remove(clean, reference=None, control=None):
    """No token sees BOS, the first token after any registers, in any head: as if it were not there, all positions kept.

    For models whose sequences start with one (an encoder's [CLS], a decoder's start token).
    """
    keys = [torch.zeros_like(found) for found in clean.sinks]
    for found in keys:
        found[..., clean.subject.n_register + (control is not None)] = True
    return biased(clean, keys, -math.inf)


# -------------------------------------------------------------------------------------- heads, sub-layers


def remove_heads(clean, heads):
    """The output of heads is zero; `heads`: bool (L, H)."""
    chosen = [(tap, off) for tap, off in zip(clean.subject.attends, heads, strict=True) if off.any()]

    def hook_of(off):
        return lambda module, args, kwargs, output: output.masked_fill(off.to(output.device)[:, None, None], 0)

    hooks = lambda: hooked([(tap.module, hook_of(off)) for tap, off in chosen])
    return Edit(clean, [tap for tap, _ in chosen], len(clean.ids) * sum(int(off.sum()) for _, off in chosen), hooks)


def remove_sub_layer(clean, tap):
    """A sub-layer adds nothing to the stream; `tap`: one of subject.inner["update"], or None for none."""
    taps = [] if tap is None else [tap]
    return Edit(clean, taps, len(clean.ids) * len(taps), lambda: on_streams(taps, [torch.zeros_like] * len(taps)))


def sink_heads(clean, reference, control=None):
    """The heads that have a sink in at least half of the sequences of other text give nothing."""
    heads = reference.sink_rate >= 0.5
    if control:
        draw = torch.rand(heads.numel(), generator=torch.Generator().manual_seed(0))
        # as many as there are elsewhere, over all layers
        heads = as_many(heads.flatten(), draw).view_as(heads)
    return remove_heads(clean, heads)


def step_up(clean, reference, control=None):
    """The sub-layer at which spikes first stand adds nothing to the stream."""
    at = None if reference.step_up is None else clean.subject.streams[reference.step_up]
    updates = clean.subject.inner["update"]
    chosen = [tap for tap in updates if at and (tap.layer, tap.kind) == (at.layer, at.kind)]
    if control:
        others = [tap for tap in updates if chosen and tap.kind == at.kind and tap not in chosen]
        draw = torch.Generator().manual_seed(0)
        chosen = [others[int(torch.randint(len(others), (), generator=draw))]] if others else []
    return remove_sub_layer(clean, next(iter(chosen), None))


class Intervention(NamedTuple):
    """A function (clean, reference, control) -> Edit, what it edits, and the names of its controls."""

    kind: str  # spike, sink, bos
    edit: Callable
    controls: tuple


_ENTRIES, _KEYS = ("random_channels", "median_entries"), ("random_keys", "same_positions")
INTERVENTIONS = {
    "spike_zero": Intervention("spike", spike_zero, _ENTRIES),
    "spike_mean": Intervention("spike", spike_mean, _ENTRIES),
    "spike_clip": Intervention("spike", spike_clip, _ENTRIES),
    "spike_stepup": Intervention("spike", spike_stepup, _ENTRIES),
    "spike_project": Intervention("spike", spike_project, ("random_direction", "other_tokens")),
    "sink_mask": Intervention("sink", sink_mask, _KEYS),
    "sink_damp": Intervention("sink", sink_damp, _KEYS),
    "sink_relocate": Intervention("sink", sink_relocate, _KEYS),
    "sink_null": Intervention("sink", sink_null, _KEYS),
    "bos_remove": Intervention("bos", bos_remove, ("second_token",)),
}
REMOVALS = {
    "spike_constant": Intervention("spike", spike_constant, ("other_tokens",)),
    "remove_sink_heads": Intervention("sink", sink_heads, ("random_heads",)),
    "remove_step_up": Intervention("spike", step_up, ("other_sub_layer",)),
}
