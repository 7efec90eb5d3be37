"""Interventions on spikes and sinks, as context managers, each with its matched controls.

    clean = CleanPass.run(subject, ids)
    with interventions.spike_zero(clean), interventions.sink_mask(clean):
        losses = subject.losses(ids)

The clean model on the same ids determines what is edited: a spike is an entry of the residual stream that the primary
rule marks, at any tap; a sink is a key with alpha > 0.3 that at least T/4 queries see, in one head. So an intervention
and its controls start from the same spikes and sinks, and interventions can be combined in any order.

A control is matched in number (as many other entries, tokens or keys) or in size: it moves states as far (the squared
distance is the energy of an edit), or moves as much attention. `dose` says how much of either an edit moves.

Every intervention is called as (clean, reference=None, control=None). `reference` has means and directions from other
text. `control` names one of its CONTROLS, whose random draws depend on the number of a sequence and on nothing else.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from ..hooks import hooked, on_streams
from ..measure import metrics
from ..models.subject import Tap, for_heads, map_rows
from .clean_pass import CleanPass, Reference

# ----------------------------------------------------------------------------------------------- controls


def as_many(marked: Tensor, scores: Tensor, free: Tensor | None = None, dim: int = -1) -> Tensor:
    """Chooses, along `dim`, as many unmarked (and `free`) entries as are marked, by highest score: bool."""
    marked, scores = marked.movedim(dim, -1), scores.to(marked.device).movedim(dim, -1)
    free = ~marked if free is None else free.expand(marked.movedim(-1, dim).shape).movedim(dim, -1) & ~marked
    chosen, rows = torch.zeros_like(marked), marked.any(-1)  # in most rows there is nothing to choose
    ranks = scores[rows].masked_fill(~free[rows], -torch.inf).argsort(-1, descending=True).argsort(-1)
    chosen[rows] = (ranks < marked[rows].sum(-1, keepdim=True)) & free[rows]
    return chosen.movedim(-1, dim)


def direction_of(clean: CleanPass, seed: int) -> Tensor:
    """Returns a random unit direction for each sequence, 0 in its spike channels: (B, 1, C), float32."""
    draws = metrics.uniform(clean.numbers, (1, clean.streams[0].size(-1)), seed)
    normal = torch.erfinv(2 * draws.clamp(1e-6, 1 - 1e-6) - 1).to(clean.streams[0].device)
    spiking = torch.stack([spikes.any(1, keepdim=True).to(normal.device) for spikes in clean.spikes]).any(0)
    return torch.nn.functional.normalize(normal.masked_fill(spiking, 0), dim=-1)


def displaced(x: Tensor, clean: Tensor, u: Tensor, distance: Tensor) -> Tensor:
    """Moves the state x along u until it is `distance` away from the `clean` one in that direction: as x."""
    return x + (distance - ((x - clean) * u).sum(-1, keepdim=True)) * u


def _random_others(clean: CleanPass, i: int, marked: Tensor, free: Tensor | None = None) -> Tensor:
    """Draws as many other (and `free`) entries as are marked, at tap or seam i: bool, as `marked` (B, ...)."""
    return as_many(marked, metrics.uniform(clean.numbers, marked.shape[1:], i), free)


def _same_mass(clean: CleanPass) -> list[Tensor]:
    """Draws other keys of all heads at random, at each seam, until they would get more attention than its sinks."""
    chosen = []
    for i, (sinks, mass) in enumerate(zip(clean.sinks, clean.mass, strict=True)):
        sink_mass = (mass * sinks).sum((1, 2))[:, None]
        order = metrics.uniform(clean.numbers, sinks.shape[1:], i).masked_fill(sinks, 2).flatten(1).argsort(-1)
        free = mass.masked_fill(sinks, 0).flatten(1).gather(-1, order)
        taken = (free.cumsum(-1) <= sink_mass) & (free > 0)
        chosen.append(torch.zeros_like(taken).scatter(-1, order, taken).view_as(sinks))
    return chosen


CONTROLS = {
    "random_channels": "as many random other channels of the same tokens",
    "same_energy": "the same tokens, moved as far in a random direction off the spike channels",
    "other_tokens": "as many random other tokens of the same sequence",
    "random_keys": "as many random other keys of the same head",
    "same_mass": "random other keys of the same layer, until they get as much attention",
    "second_token": "the token after the first",
    "random_heads": "as many random other heads",
    "other_sub_layer": "another sub-layer of the same kind, drawn at random",
}


def entries_of(clean: CleanPass, control: str | None = None) -> list[Tensor]:
    """Returns the entries to edit at each tap: the spikes, or as many random channels; bool (B, T, C)."""
    random = control == "random_channels"
    return [_random_others(clean, i, mask) if random and mask.any() else mask for i, mask in enumerate(clean.spikes)]


def tokens_of(clean: CleanPass, control: str | None = None) -> list[Tensor]:
    """Returns the tokens to edit at each tap: those with a spike there, or the control's; bool (B, T, 1)."""
    tokens = [spikes.any(-1) for spikes in clean.spikes]
    if control == "other_tokens":
        tokens = [_random_others(clean, i, mask) for i, mask in enumerate(tokens)]
    return [mask[..., None] for mask in tokens]


def keys_of(clean: CleanPass, control: str | None = None) -> list[Tensor]:
    """Returns the keys to edit at each seam: the sinks, or the control's; bool (B, H, T)."""
    if control == "random_keys":
        return [_random_others(clean, i, *pair) for i, pair in enumerate(zip(clean.sinks, clean.eligible, strict=True))]
    return _same_mass(clean) if control else clean.sinks


# -------------------------------------------------------------------------------------------- the edits


Rows = Callable[[Tensor, int], Tensor]  # (rows of a map (B, H, R, keys), the first query's number) -> rows


class Edit:
    """An intervention on one batch: a context manager that can be entered often. Leaving it always removes its hooks.

    `edited`: how many entries, tokens, keys, heads or sub-layers it edits, over all sequences. `stage`: the first stage
    that it touches; earlier ones are as in the clean model. `tokens`: tap -> the tokens whose states it writes, bool
    (B, T). `keys`: seam -> the keys whose attention it changes, bool (B, H, T). `rows`: seam -> a function (rows of the
    map, first query) -> rows, for an edit of the map that (q, k, bias) do not show. `dose`: for keys, the attention
    that they get; for the stream, after a pass, the squared distance of the written from the clean states, summed over
    tokens and taps; else 0.
    """

    def __init__(
        self,
        clean: CleanPass,
        taps: Sequence[Tap],
        edited: int,
        hooks: Callable[[Any], contextlib.AbstractContextManager[Any]],  # called with the Edit
        *,
        tokens: dict[int, Tensor] | None = None,
        keys: dict[int, Tensor] | None = None,
        rows: dict[int, Rows] | None = None,
    ) -> None:
        subject = clean.subject
        self.stage = min(map(subject.stage_of, taps), default=len(subject.stages))
        self.edited, self.hooks, self.tokens, self.keys, self.rows = edited, hooks, tokens or {}, keys or {}, rows or {}
        self.dose = sum(float((clean.mass[s] * mask).sum()) for s, mask in self.keys.items())
        self._entered: list[contextlib.AbstractContextManager[None]] = []

    def __enter__(self) -> "Edit":
        if self.tokens:
            self.dose = 0.0
        hooks = self.hooks(self)
        hooks.__enter__()
        self._entered.append(hooks)
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


def nothing(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """The intervention that changes nothing."""
    return Edit(clean, [], 0, contextlib.nullcontext)


def _on_streams(
    clean: CleanPass,
    where: list[Tensor],
    function: Callable[[int, Tensor], Tensor],
    control: str | None = None,
    only: int | None = None,
) -> Edit:
    """Returns an Edit that replaces x by function(i, x) at each writable tap i, where `where[i]` is true.

    `where[i]`: bool (B, T, C) or (B, T, 1). `only`: the single tap to edit. The control same_energy moves the same
    tokens as far from their clean state, in a random direction.
    """
    subject = clean.subject
    writable = (i for i, tap in enumerate(subject.streams) if tap.writable and only in (None, i))
    chosen = [i for i in writable if bool(where[i].any())]
    written = {i: where[i].any(-1) for i in chosen}
    edit_of = lambda i, x: torch.where(where[i], function(i, x), x)
    if control == "same_energy":
        u, matched_edit = direction_of(clean, ENERGY_SEED), edit_of

        def edit_of(i: int, x: Tensor) -> Tensor:
            state = clean.streams[i]
            distance = torch.linalg.vector_norm((matched_edit(i, state) - state).float(), dim=-1, keepdim=True)
            return torch.where(written[i][..., None], displaced(x, state, u.to(x), distance.to(x)), x)

    def write(edit: Edit, i: int) -> Callable[[Tensor], Tensor]:
        def on_stream(x: Tensor) -> Tensor:
            old = x.view(clean.streams[i].shape)  # transformers may flatten a stream to (B T, C) on its way
            new = edit_of(i, old)
            edit.dose += float(((new - clean.streams[i]).float().square().sum(-1) * written[i]).sum())
            return new.view_as(x)

        return on_stream

    taps = [subject.streams[i] for i in chosen]
    hooks = lambda edit: on_streams(taps, [write(edit, i) for i in chosen])
    tokens = {i: mask.cpu() for i, mask in written.items()}
    return Edit(clean, taps, sum(int(where[i].sum()) for i in chosen), hooks, tokens=tokens)


# ------------------------------------------------------------------------------------------------- spikes


CLIP_RATIO = 10.0  # well below the spike rule's ratio
ENERGY_SEED, DIRECTION_SEED = 10_001, 10_002  # seeds of random directions; lower seeds are the numbers of taps


def spike_zero(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """Sets h = 0 at every spike entry of every tap."""
    return _on_streams(clean, entries_of(clean, control), lambda i, x: torch.zeros_like(x), control)


def spike_mean(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """Sets spike entries to their channel's mean over spike entries (a control: the others) of other text (Sun et al.
    2024)."""
    mean = lambda i, x: reference.entries[i][control == "random_channels"].to(x).expand_as(x)
    return _on_streams(clean, entries_of(clean, control), mean, control)


def spike_clip(
    clean: CleanPass, reference: Reference | None = None, control: str | None = None, ratio: float = CLIP_RATIO
) -> Edit:
    """Clips |h| to `ratio` x the layer's median |h|; random channels shrink by their token's mean factor."""

    def clip(i: int, x: Tensor) -> Tensor:
        threshold = ratio * metrics.median_magnitude(x.float())[:, None, None]
        factor = (threshold / x.float().abs().clamp_min(1e-30)).clamp_max(1)
        if control == "random_channels":
            marked = clean.spikes[i]
            factor = (factor * marked).sum(-1, keepdim=True) / marked.sum(-1, keepdim=True).clamp_min(1)
        return x * factor.to(x.dtype)

    return _on_streams(clean, entries_of(clean, control), clip, control)


def spike_stepup(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """Sets h = 0 at the spike entries of the step-up tap alone; later sub-layers may raise them again."""
    only = -1 if reference.step_up is None else reference.step_up
    return _on_streams(clean, entries_of(clean, control), lambda i, x: torch.zeros_like(x), control, only)


def spike_scale(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """Scales the state of every spike token, at every tap, to its sequence's median norm; the direction stays."""

    def scale(i: int, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(clean.streams[i].float(), dim=-1)
        median = norms.median(1).values[:, None, None]
        return x * (median / torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).clamp_min(1e-30)).to(x)

    return _on_streams(clean, tokens_of(clean), scale, control)


def spike_direction(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """Moves the spike entries' energy into a random direction off all spike channels; the norm of the state stays."""
    u = direction_of(clean, DIRECTION_SEED)

    def turn(i: int, x: Tensor) -> Tensor:
        state, marked = clean.streams[i].float(), clean.spikes[i]
        distance = torch.linalg.vector_norm(state * marked, dim=-1, keepdim=True)
        turned = displaced(x.float() * ~marked, state, u, distance)
        norm = torch.linalg.vector_norm(state, dim=-1, keepdim=True)
        return (torch.nn.functional.normalize(turned, dim=-1) * norm).to(x)

    return _on_streams(clean, tokens_of(clean), turn, control)


def spike_project(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """Sets h to h - (h u) u at every spike token of every tap, with u other text's mean spike direction there."""

    def project(i: int, x: Tensor) -> Tensor:
        u = reference.direction[i].to(x)
        return x - (x @ u)[..., None] * u

    return _on_streams(clean, tokens_of(clean, control), project, control)


def spike_constant(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """Sets the whole state of every spike token, at every tap, to the mean state of other text's spike tokens there.

    Sun et al. 2026 say that spikes act as near-constant, implicit parameters. The control uses tokens without a spike.
    """
    constant = lambda i, x: reference.states[i][control == "other_tokens"].to(x).expand_as(x)
    return _on_streams(clean, tokens_of(clean, control), constant, control)


# -------------------------------------------------------------------------------------------------- sinks


def _on_seams(
    clean: CleanPass,
    keys: list[Tensor],
    make_hooks: Callable[[Tensor], dict[str, Callable[..., Any]]],
    make_rows: Callable[[Tensor], Rows] | None = None,
) -> Edit:
    """Returns an Edit of the seams at which `keys` (bool (B, H, T) for each seam) has any.

    make_hooks(keys of a seam) returns arguments of `hooked`, make_rows(keys of a seam) a function for `Edit.rows`.
    """
    masks = {s: mask for s, mask in enumerate(keys) if mask.any()}
    taps = [clean.subject.attends[s] for s in masks]

    def hooks(_: Edit) -> contextlib.AbstractContextManager[None]:
        by_kind: dict[str, list[tuple[Any, Any]]] = {}
        for tap, mask in zip(taps, masks.values(), strict=True):
            for kind, hook in make_hooks(mask).items():
                by_kind.setdefault(kind, []).append((tap.module, hook))
        return hooked(**by_kind)

    rows = {s: make_rows(mask) for s, mask in masks.items()} if make_rows else None
    return Edit(clean, taps, sum(int(mask.sum()) for mask in masks.values()), hooks, keys=masks, rows=rows)


def mask_bias(clean: CleanPass) -> float:
    """Returns the number that takes a key's attention away when it is added to its logit. It is finite in encoders,
    where a row can lose all its keys and must not become NaN; its exp still is 0."""
    return -math.inf if clean.subject.causal else -1e4


def bias_keys(clean: CleanPass, keys: list[Tensor], value: float) -> Edit:
    """Returns an Edit that adds `value` to the logit of each key for every query, under causal attention except for the
    query at the key's own position."""

    def make_hooks(mask: Tensor) -> dict[str, Callable[..., Any]]:
        def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
            q = args[0]
            bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask.to(q.device), value)
            others = kwargs.get("bias")
            return args, {**kwargs, "bias": bias[:, :, None] if others is None else others + bias[:, :, None]}

        return {"before": hook}

    return _on_seams(clean, keys, make_hooks)


def sink_mask(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """Takes all attention from sink keys, under causal attention except that of each key's own query. The softmax
    renormalises the rest."""
    return bias_keys(clean, keys_of(clean, control), mask_bias(clean))


def sink_damp(
    clean: CleanPass, reference: Reference | None = None, control: str | None = None, factor: float = 0.5
) -> Edit:
    """Multiplies exp(logit) of sink keys by `factor`: with one sink in a row A is factor A / (1 - (1 - factor) A)."""
    return bias_keys(clean, keys_of(clean, control), math.log(factor))


def _destinations(keys: Tensor) -> Tensor:
    """Returns the nearest later position that is not in `keys` (B, H, T), or else the nearest earlier one: int64."""
    T = keys.size(-1)
    place = torch.arange(T).expand(keys.shape)
    later = torch.where(keys, T, place).flip(-1).cummin(-1).values.flip(-1)
    earlier = torch.where(keys, -1, place).cummax(-1).values
    return torch.where(later < T, later, torch.where(earlier >= 0, earlier, place))


def sink_relocate(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """Moves a sink key's attention to the nearest later key that is no sink, for every query that sees both."""
    causal = clean.subject.causal

    def make_rows(mask: Tensor) -> Rows:
        targets = _destinations(mask)

        def rows(weights: Tensor, first: int) -> Tensor:
            _, _, R, S = weights.shape
            target = targets[..., :S].to(weights.device)[:, :, None].expand_as(weights)
            moves = mask[..., :S].to(weights.device)[:, :, None]
            if causal:
                moves = moves & (target <= torch.arange(first, first + R, device=weights.device)[:, None])
            mass = weights * moves
            return (weights - mass).scatter_add(-1, target.clamp_max(S - 1), mass)

        return rows

    def make_hooks(mask: Tensor) -> dict[str, Callable[..., Any]]:
        rows = make_rows(mask)

        def hook(module: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            q, k, v = args
            v, moved = for_heads(v, q.size(1)), []
            weights_of = lambda *call: module.weights(*call)[0]
            for first, weights in map_rows(module, q, k, causal, kwargs.get("bias"), weights_of):
                moved.append((rows(weights, first) - weights).to(v.dtype) @ v[:, :, : weights.size(-1)])
            return output + torch.cat(moved, dim=-2)

        return {"forward": hook}

    return _on_seams(clean, keys_of(clean, control), make_hooks, make_rows)


def sink_null(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """Turns each sink key into a null slot: its key and its value are zero, and so is its logit, up to position terms.

    The query at a sink's own position stays as it was.
    """

    def make_hooks(mask: Tensor) -> dict[str, Callable[..., Any]]:
        calls = []

        def zero_keys(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
            q, k, v = args
            calls.append((args, kwargs))
            others = ~mask.to(q.device)[..., None]
            return (q, for_heads(k, q.size(1)) * others, for_heads(v, q.size(1)) * others), kwargs

        def restore_own(module: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            args, kwargs = calls.pop()
            if not clean.subject.causal:
                return None
            return torch.where(mask.to(output.device)[..., None], module.forward(*args, **kwargs), output)

        return {"before": zero_keys, "first": restore_own}

    return _on_seams(clean, keys_of(clean, control), make_hooks)


def bos_remove(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """Hides BOS, the first token after any registers, from all tokens in all heads; positions stay as they are.

    This is for models whose sequences start with one (an encoder's [CLS], a decoder's start token).
    """
    keys = [torch.zeros_like(sinks) for sinks in clean.sinks]
    for mask in keys:
        mask[..., clean.subject.n_register + (control is not None)] = True
    return bias_keys(clean, keys, mask_bias(clean))


# -------------------------------------------------------------------------------------- heads, sub-layers


def remove_heads(clean: CleanPass, heads: Tensor) -> Edit:
    """Sets the output of `heads` to zero: bool (L, H)."""
    chosen = [(tap, off) for tap, off in zip(clean.subject.attends, heads, strict=True) if off.any()]

    def hook_of(off: Tensor) -> Callable[..., Tensor]:
        return lambda module, args, kwargs, output: output.masked_fill(off.to(output.device)[:, None, None], 0)

    hooks = lambda _: hooked([(tap.module, hook_of(off)) for tap, off in chosen])
    return Edit(clean, [tap for tap, _ in chosen], len(clean.ids) * sum(int(off.sum()) for _, off in chosen), hooks)


def remove_sub_layer(clean: CleanPass, tap: Tap | None) -> Edit:
    """Lets a sub-layer add nothing to the stream; `tap`: one of subject.inner["update"], or None for no sub-layer."""
    taps = [] if tap is None else [tap]
    return Edit(clean, taps, len(clean.ids) * len(taps), lambda _: on_streams(taps, [torch.zeros_like] * len(taps)))


def sink_heads(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """Sets the output of heads to zero that have a sink in at least half of the sequences of other text."""
    heads = reference.sink_rate >= 0.5
    if control:
        draw = torch.rand(heads.numel(), generator=torch.Generator().manual_seed(0))
        heads = as_many(heads.flatten(), draw).view_as(heads)  # as far as there are so many others, over all layers
    return remove_heads(clean, heads)


def _step_up_update(clean: CleanPass, reference: Reference, other: bool) -> tuple[int, Tap] | None:
    """Returns (the tap after it, the Tap of its update) of the sub-layer at which spikes begin, or of an `other` of its
    kind that is drawn at random; None if there is none."""
    if reference.step_up is None:
        return None
    subject, tap = clean.subject, clean.subject.streams[reference.step_up]
    indices = {(stream.layer, stream.kind): i for i, stream in enumerate(subject.streams)}
    updates = {(update.layer, update.kind): update for update in subject.inner["update"]}
    updates = {place: update for place, update in updates.items() if place in indices}
    place = (tap.layer, tap.kind)
    if place not in updates:
        return None
    if other:
        others = [(layer, kind) for layer, kind in updates if kind == tap.kind and layer != tap.layer]
        if not others:
            return None
        place = others[int(torch.randint(len(others), (), generator=torch.Generator().manual_seed(0)))]
    return indices[place], updates[place]


def step_up(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """Lets the sub-layer at which spikes begin add nothing to the stream."""
    step = _step_up_update(clean, reference, control is not None)
    return remove_sub_layer(clean, step and step[1])


def bos_ffn(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """Lets the FFN at which spikes begin add nothing to the first token, which is BOS if there is one.

    Queipo-de-Llano et al. 2025 (2510.06477) say that the spike on BOS goes, and the sinks with it.
    """
    step = _step_up_update(clean, reference, control == "other_sub_layer")
    if step is None or step[1].kind != "ffn":
        return nothing(clean)
    index, update = step
    token, shape = clean.subject.n_register + (control == "second_token"), clean.streams[index].shape

    def write(edit: Edit, x: Tensor) -> Tensor:
        new = x.view(shape).clone()
        edit.dose += float(new[:, token].float().square().sum())
        new[:, token] = 0
        return new.view_as(x)

    written = torch.zeros(shape[:2], dtype=torch.bool)
    written[:, token] = True
    hooks = lambda edit: on_streams([update], [functools.partial(write, edit)])
    return Edit(clean, [update], len(clean.ids), hooks, tokens={index: written})


# ----------------------------------------------------------------------------------------------- the table


class EditFunction(Protocol):
    """A function that makes an Edit."""

    def __call__(self, clean: CleanPass, reference: Any, control: str | None = None) -> Edit:
        """Returns the Edit of one batch, or that of a control; `reference`: a Reference, or None if not needed."""


class Intervention(NamedTuple):
    """One row of the tables below, from which the commands, the pages and `import spikesink` take interventions."""

    kind: str  # what it edits: spike, sink, bos
    edit: EditFunction
    controls: tuple[str, ...]  # names in CONTROLS
    needs_reference: bool = False  # whether it takes anything from other text


_ENTRIES, _KEYS = ("same_energy", "random_channels"), ("same_mass", "random_keys")
INTERVENTIONS = {
    "spike_zero": Intervention("spike", spike_zero, _ENTRIES),
    "spike_mean": Intervention("spike", spike_mean, _ENTRIES, needs_reference=True),
    "spike_clip": Intervention("spike", spike_clip, _ENTRIES),
    "spike_stepup": Intervention("spike", spike_stepup, _ENTRIES, needs_reference=True),
    "spike_scale": Intervention("spike", spike_scale, ("same_energy",)),
    "spike_direction": Intervention("spike", spike_direction, ("same_energy",)),
    "spike_project": Intervention("spike", spike_project, ("same_energy", "other_tokens"), needs_reference=True),
    "sink_mask": Intervention("sink", sink_mask, _KEYS),
    "sink_damp": Intervention("sink", sink_damp, _KEYS),
    "sink_relocate": Intervention("sink", sink_relocate, _KEYS),
    "sink_null": Intervention("sink", sink_null, _KEYS),
    "bos_remove": Intervention("bos", bos_remove, ("second_token",)),
    "bos_ffn": Intervention("bos", bos_ffn, ("second_token", "other_sub_layer"), needs_reference=True),
}
# interventions on whole tokens, heads and sub-layers
REMOVALS = {
    "spike_constant": Intervention("spike", spike_constant, ("same_energy", "other_tokens"), needs_reference=True),
    "remove_sink_heads": Intervention("sink", sink_heads, ("random_heads",), needs_reference=True),
    "remove_step_up": Intervention("spike", step_up, ("other_sub_layer",), needs_reference=True),
}


def intervention_named(name: str, control: str | None = None) -> Intervention:
    """Returns a row of the two tables. Raises UserError for an unknown name, or a control that the row lacks."""
    table = INTERVENTIONS | REMOVALS
    if name not in table:
        raise UserError(f"there is no intervention {name!r}; known: {', '.join(table)}")
    if control is not None and control not in table[name].controls:
        raise UserError(f"{name} has no control {control!r}; known: {', '.join(table[name].controls)}")
    return table[name]
