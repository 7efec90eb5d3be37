"""Interventions on spikes and sinks, as context managers, each with its matched controls.

    clean = CleanPass.of(subject, ids)
    with interventions.spike_zero(clean), interventions.sink_mask(clean):
        losses = subject.losses(ids)

What is edited is fixed by the clean model on the same ids: a spike is an entry of the residual stream that the
primary rule marks, at whatever tap it stands; a sink is a key with alpha > 0.3 that at least T/4 queries see, head by
head. So an intervention and its control edit as many entries, and interventions can be combined in any order.

Every intervention is called as (clean, reference=None, control=None): `reference` holds what other text says, `control`
names one of its CONTROLS, whose draws depend on the number of a sequence and on nothing else.
"""

import contextlib
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


def uniform(numbers: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """Uniform draws (B, *shape), each sequence's from its number and the seed alone."""
    generators = [torch.Generator().manual_seed(2**20 * seed + int(number)) for number in numbers]
    return torch.stack([torch.rand(shape, generator=generator) for generator in generators])


def as_many(marked: Tensor, scores: Tensor, free: Tensor | None = None, dim: int = -1) -> Tensor:
    """Along `dim`, as many unmarked (and `free`) entries as are marked, those of the highest scores: bool."""
    marked, scores = marked.movedim(dim, -1), scores.to(marked.device).movedim(dim, -1)
    free = ~marked if free is None else free.expand(marked.movedim(-1, dim).shape).movedim(dim, -1) & ~marked
    chosen, some = torch.zeros_like(marked), marked.any(-1)  # in most rows there is nothing to choose
    ranks = scores[some].masked_fill(~free[some], -torch.inf).argsort(-1, descending=True).argsort(-1)
    chosen[some] = (ranks < marked[some].sum(-1, keepdim=True)) & free[some]
    return chosen.movedim(-1, dim)


def _random_channels(clean: CleanPass, i: int) -> Tensor:
    return as_many(clean.spikes[i], uniform(clean.numbers, clean.spikes[i].shape[1:], i))


def _median_entries(clean: CleanPass, i: int) -> Tensor:
    size = clean.streams[i].float().abs()
    return as_many(clean.spikes[i], -(size - metrics.median_magnitude(size)[:, None, None]).abs())


def _other_tokens(clean: CleanPass, i: int) -> Tensor:
    tokens = clean.spikes[i].any(-1)
    return as_many(tokens, uniform(clean.numbers, tokens.shape[1:], i))


def _random_keys(clean: CleanPass) -> list[Tensor]:
    draws = [uniform(clean.numbers, found.shape[1:], i) for i, found in enumerate(clean.sinks)]
    return [as_many(f, d, e) for f, d, e in zip(clean.sinks, draws, clean.eligible, strict=True)]


def _same_positions(clean: CleanPass) -> list[Tensor]:
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


_ENTRIES_OF: dict[str | None, Callable[[CleanPass, int], Tensor]] = {
    None: lambda clean, i: clean.spikes[i],
    "random_channels": _random_channels,
    "median_entries": _median_entries,
}
_KEYS_OF: dict[str | None, Callable[[CleanPass], list[Tensor]]] = {
    None: lambda clean: clean.sinks,
    "random_keys": _random_keys,
    "same_positions": _same_positions,
}


def entries_of(clean: CleanPass, control: str | None = None) -> list[Tensor]:
    """Per tap the entries to edit: the spikes, or a control's. bool (B, T, C)."""
    return [_ENTRIES_OF[control](clean, i) if found.any() else found for i, found in enumerate(clean.spikes)]


def tokens_of(clean: CleanPass, control: str | None = None) -> list[Tensor]:
    """Per tap the tokens to edit: those with a spike there, or a control's. bool (B, T)."""
    if control == "other_tokens":
        return [_other_tokens(clean, i) for i in range(len(clean.spikes))]
    return [marked.any(-1) for marked in clean.spikes]


def keys_of(clean: CleanPass, control: str | None = None) -> list[Tensor]:
    """Per seam the keys to edit: the sinks, or a control's. bool (B, H, T)."""
    return _KEYS_OF[control](clean)


# -------------------------------------------------------------------------------------------- the edits


Rows = Callable[[Tensor, int], Tensor]  # (rows of a map (B, H, R, keys), the first query's number) -> rows


class Edit:
    """An intervention, to be entered as often as needed. Hooks go when the block is left, whatever happens in it.

    `edited`: how many entries, tokens, keys, heads or sub-layers, over the sequences. `stage`: the first that it
    touches; all before are as in the clean model. `rows`: per seam whose map it changes in a way that cannot be seen in
    (q, k, bias), the function (rows of the map, first query) -> rows.
    """

    def __init__(
        self,
        clean: CleanPass,
        taps: Sequence[Tap],
        edited: int,
        hooks: Callable[[], contextlib.AbstractContextManager[None]],
        rows: dict[int, Rows] | None = None,
    ) -> None:
        subject = clean.subject
        self.stage = min(map(subject.stage_of, taps), default=len(subject.stages))
        self.edited, self.hooks, self.rows = edited, hooks, rows or {}
        self._entered: list[contextlib.AbstractContextManager[None]] = []

    def __enter__(self) -> "Edit":
        hooks = self.hooks()
        hooks.__enter__()
        self._entered.append(hooks)
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


def nothing(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """The intervention that changes nothing."""
    return Edit(clean, [], 0, contextlib.nullcontext)


def _on_streams(
    clean: CleanPass, where: list[Tensor], function: Callable[[int, Tensor], Tensor], only: int | None = None
) -> Edit:
    """An Edit: at each writable tap i, `where[i]` (bool (B, T, C) or (B, T, 1)) of x become function(i, x)'s."""
    subject = clean.subject
    chosen = [
        i
        for i, tap in enumerate(subject.streams)
        if tap.writable and bool(where[i].any()) and (only is None or i == only)
    ]

    def write(i: int) -> Callable[[Tensor], Tensor]:
        # transformers may flatten a stream to (B T, C) on its way
        return lambda x: torch.where(
            where[i], function(i, x.view(clean.streams[i].shape)), x.view_as(clean.streams[i])
        ).view_as(x)

    taps = [subject.streams[i] for i in chosen]
    hooks = lambda: on_streams(taps, [write(i) for i in chosen])
    return Edit(clean, taps, sum(int(where[i].sum()) for i in chosen), hooks)


# ------------------------------------------------------------------------------------------------- spikes


CLIP_RATIO = 10.0  # well below the spike rule's


def spike_zero(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """h = 0 at every spike entry of every tap."""
    return _on_streams(clean, entries_of(clean, control), lambda i, x: torch.zeros_like(x))


def spike_mean(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """h = the mean of its channel over spike entries of other text (Sun et al. 2024); a control's, over the others."""
    mean = lambda i, x: reference.entries[i][control is not None].to(x).expand_as(x)
    return _on_streams(clean, entries_of(clean, control), mean)


def spike_clip(
    clean: CleanPass, reference: Reference | None = None, control: str | None = None, ratio: float = CLIP_RATIO
) -> Edit:
    """|h| cut down to `ratio` x the layer's median |h|; a control's entries shrink by their token's mean factor."""

    def clip(i: int, x: Tensor) -> Tensor:
        threshold = ratio * metrics.median_magnitude(x.float())[:, None, None]
        factor = (threshold / x.float().abs().clamp_min(1e-30)).clamp_max(1)
        if control:
            marked = clean.spikes[i]
            factor = (factor * marked).sum(-1, keepdim=True) / marked.sum(-1, keepdim=True).clamp_min(1)
        return x * factor.to(x.dtype)

    return _on_streams(clean, entries_of(clean, control), clip)


def spike_stepup(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """h = 0 at the spike entries of the step-up tap alone: later sub-layers may raise them again."""
    only = -1 if reference.step_up is None else reference.step_up
    return _on_streams(clean, entries_of(clean, control), lambda i, x: torch.zeros_like(x), only)


def spike_project(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """h - (h u) u at every spike token of every tap, u the direction of other text's mean spike token there."""

    def project(i: int, x: Tensor) -> Tensor:
        u = reference.direction[i].to(x)
        if control == "random_direction":
            u = torch.nn.functional.normalize(torch.randn(u.shape, generator=torch.Generator().manual_seed(i)), dim=0)
        u = u.to(x)
        return x - (x @ u)[..., None] * u

    return _on_streams(clean, [tokens[..., None] for tokens in tokens_of(clean, control)], project)


def spike_constant(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """The whole state of every spike token, at every tap, is the mean state of other text's spike tokens there.

    Sun et al. 2026: spikes act as near-constant, implicit parameters. A control's tokens get the others' mean state.
    """
    constant = lambda i, x: reference.states[i][control is not None].to(x).expand_as(x)
    return _on_streams(clean, [tokens[..., None] for tokens in tokens_of(clean, control)], constant)


# -------------------------------------------------------------------------------------------------- sinks


def _on_seams(
    clean: CleanPass,
    keys: list[Tensor],
    hooks_of: Callable[[Tensor], dict[str, Callable[..., Any]]],
    rows_of: Callable[[Tensor], Rows] | None = None,
) -> Edit:
    """An Edit of the seams where keys (per seam bool (B, H, T)) has any; hooks_of(its keys) -> arguments of hooked."""
    chosen = [(tap, found) for tap, found in zip(clean.subject.attends, keys, strict=True) if found.any()]

    def hooks() -> contextlib.AbstractContextManager[None]:
        found = [{kind: (tap.module, hook) for kind, hook in hooks_of(at).items()} for tap, at in chosen]
        return hooked(**{kind: [of[kind] for of in found] for kind in (found[0] if found else ())})

    rows = {i: rows_of(found) for i, found in enumerate(keys) if found.any()} if rows_of else None
    return Edit(clean, [tap for tap, _ in chosen], sum(int(found.sum()) for _, found in chosen), hooks, rows)


def biased(clean: CleanPass, keys: list[Tensor], value: float) -> Edit:
    """An Edit: `value` is added to the logit of each key for every query but the one at its own position."""

    def hooks_of(found: Tensor) -> dict[str, Callable[..., Any]]:
        def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
            q = args[0]
            bias = torch.zeros(found.shape, dtype=q.dtype, device=q.device).masked_fill(found.to(q.device), value)
            others = kwargs.get("bias")
            return args, {**kwargs, "bias": bias[:, :, None] if others is None else others + bias[:, :, None]}

        return {"before": hook}

    return _on_seams(clean, keys, hooks_of)


def sink_mask(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """Sink keys get no attention, but for each key's own query; a softmax renormalises the rest."""
    return biased(clean, keys_of(clean, control), -math.inf)


def sink_damp(
    clean: CleanPass, reference: Reference | None = None, control: str | None = None, factor: float = 0.5
) -> Edit:
    """exp(logit) of sink keys times `factor`: A becomes factor A / (1 - (1 - factor) A) where a row has one sink."""
    return biased(clean, keys_of(clean, control), math.log(factor))


def _destinations(keys: Tensor) -> Tensor:
    """Per key of (B, H, T) the nearest later key that is not among them, or else the nearest earlier one: int64."""
    T = keys.size(-1)
    place = torch.arange(T).expand(keys.shape)
    later = torch.where(keys, T, place).flip(-1).cummin(-1).values.flip(-1)
    earlier = torch.where(keys, -1, place).cummax(-1).values
    return torch.where(later < T, later, torch.where(earlier >= 0, earlier, place))


def sink_relocate(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """A sink key's attention goes to the nearest later key that is no sink, for every query that sees both."""
    causal = clean.subject.causal

    def rows_of(found: Tensor) -> Rows:
        targets = _destinations(found)

        def rows(weights: Tensor, first: int) -> Tensor:
            _, _, R, S = weights.shape
            target = targets[..., :S].to(weights.device)[:, :, None].expand_as(weights)
            moves = found[..., :S].to(weights.device)[:, :, None]
            if causal:
                moves = moves & (target <= torch.arange(first, first + R, device=weights.device)[:, None])
            mass = weights * moves
            return (weights - mass).scatter_add(-1, target.clamp_max(S - 1), mass)

        return rows

    def hooks_of(found: Tensor) -> dict[str, Callable[..., Any]]:
        rows = rows_of(found)

        def hook(module: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            q, k, v = args
            v, moved = for_heads(v, q.size(1)), []
            weights_of = lambda *call: module.weights(*call)[0]
            for first, weights in map_rows(module, q, k, causal, kwargs.get("bias"), weights_of):
                moved.append((rows(weights, first) - weights).to(v.dtype) @ v[:, :, : weights.size(-1)])
            return output + torch.cat(moved, dim=-2)

        return {"forward": hook}

    return _on_seams(clean, keys_of(clean, control), hooks_of, rows_of)


def sink_null(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """Each sink key becomes a null slot, of zero key (so zero logit, but for what depends on positions) and zero value.

    The query at a sink's own position stays as it was.
    """

    def hooks_of(found: Tensor) -> dict[str, Callable[..., Any]]:
        whole = []

        def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
            q, k, v = args
            whole.append((args, kwargs))
            kept = ~found.to(q.device)[..., None]
            return (q, for_heads(k, q.size(1)) * kept, for_heads(v, q.size(1)) * kept), kwargs

        def own(module: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            args, kwargs = whole.pop()
            if not clean.subject.causal:
                return None
            return torch.where(found.to(output.device)[..., None], module.forward(*args, **kwargs), output)

        return {"before": before, "first": own}

    return _on_seams(clean, keys_of(clean, control), hooks_of)


def bos_remove(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """No token sees BOS, the first token after any registers, in any head: as if it were not there, all positions kept.

    For models whose sequences start with one (an encoder's [CLS], a decoder's start token).
    """
    keys = [torch.zeros_like(found) for found in clean.sinks]
    for found in keys:
        found[..., clean.subject.n_register + (control is not None)] = True
    return biased(clean, keys, -math.inf)


# -------------------------------------------------------------------------------------- heads, sub-layers


def remove_heads(clean: CleanPass, heads: Tensor) -> Edit:
    """The output of heads is zero; `heads`: bool (L, H)."""
    chosen = [(tap, off) for tap, off in zip(clean.subject.attends, heads, strict=True) if off.any()]

    def hook_of(off: Tensor) -> Callable[..., Tensor]:
        return lambda module, args, kwargs, output: output.masked_fill(off.to(output.device)[:, None, None], 0)

    hooks = lambda: hooked([(tap.module, hook_of(off)) for tap, off in chosen])
    return Edit(clean, [tap for tap, _ in chosen], len(clean.ids) * sum(int(off.sum()) for _, off in chosen), hooks)


def remove_sub_layer(clean: CleanPass, tap: Tap | None) -> Edit:
    """A sub-layer adds nothing to the stream; `tap`: one of subject.inner["update"], or None for none."""
    taps = [] if tap is None else [tap]
    return Edit(clean, taps, len(clean.ids) * len(taps), lambda: on_streams(taps, [torch.zeros_like] * len(taps)))


def sink_heads(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """The heads that have a sink in at least half of the sequences of other text give nothing."""
    heads = reference.sink_rate >= 0.5
    if control:
        draw = torch.rand(heads.numel(), generator=torch.Generator().manual_seed(0))
        # as many as there are elsewhere, over all layers
        heads = as_many(heads.flatten(), draw).view_as(heads)
    return remove_heads(clean, heads)


def step_up(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """The sub-layer at which spikes first stand adds nothing to the stream."""
    if reference.step_up is None:
        return remove_sub_layer(clean, None)
    at = clean.subject.streams[reference.step_up]
    updates = clean.subject.inner["update"]
    chosen = [tap for tap in updates if (tap.layer, tap.kind) == (at.layer, at.kind)]
    if control:
        others = [tap for tap in updates if chosen and tap.kind == at.kind and tap not in chosen]
        draw = torch.Generator().manual_seed(0)
        chosen = [others[int(torch.randint(len(others), (), generator=draw))]] if others else []
    return remove_sub_layer(clean, next(iter(chosen), None))


# ----------------------------------------------------------------------------------------------- the table


class EditFunction(Protocol):
    """What makes an intervention."""

    def __call__(self, clean: CleanPass, reference: Any, control: str | None = None) -> Edit:
        """The Edit of one batch, or that of a control; `reference`: a Reference, or None where none is needed."""


class Intervention(NamedTuple):
    """One row of the tables: what the terminal, the pages, the findings and `import spikesink` know it by."""

    kind: str  # what it edits: spike, sink, bos
    edit: EditFunction
    controls: tuple[str, ...]  # of CONTROLS
    needs_reference: bool = False  # whether it takes anything from other text


_ENTRIES, _KEYS = ("random_channels", "median_entries"), ("random_keys", "same_positions")
INTERVENTIONS = {
    "spike_zero": Intervention("spike", spike_zero, _ENTRIES),
    "spike_mean": Intervention("spike", spike_mean, _ENTRIES, needs_reference=True),
    "spike_clip": Intervention("spike", spike_clip, _ENTRIES),
    "spike_stepup": Intervention("spike", spike_stepup, _ENTRIES, needs_reference=True),
    "spike_project": Intervention("spike", spike_project, ("random_direction", "other_tokens"), needs_reference=True),
    "sink_mask": Intervention("sink", sink_mask, _KEYS),
    "sink_damp": Intervention("sink", sink_damp, _KEYS),
    "sink_relocate": Intervention("sink", sink_relocate, _KEYS),
    "sink_null": Intervention("sink", sink_null, _KEYS),
    "bos_remove": Intervention("bos", bos_remove, ("second_token",)),
}
# on whole tokens, heads and sub-layers
REMOVALS = {
    "spike_constant": Intervention("spike", spike_constant, ("other_tokens",), needs_reference=True),
    "remove_sink_heads": Intervention("sink", sink_heads, ("random_heads",), needs_reference=True),
    "remove_step_up": Intervention("spike", step_up, ("other_sub_layer",), needs_reference=True),
}


def intervention_named(name: str, control: str | None = None) -> Intervention:
    """A row of the two tables. Raises UserError for a name that neither has, or a control that the row lacks."""
    table = INTERVENTIONS | REMOVALS
    if name not in table:
        raise UserError(f"there is no intervention {name!r}; known: {', '.join(table)}")
    if control is not None and control not in table[name].controls:
        raise UserError(f"{name} has no control {control!r}; known: {', '.join(table[name].controls)}")
    return table[name]
