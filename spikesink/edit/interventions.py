"""Interventions on spikes and sinks, as context managers, each with its matched controls.

    clean = CleanPass.of(subject, ids)
    with interventions.spike_zero(clean), interventions.sink_mask(clean):
        losses = subject.losses(ids)

What is edited is fixed by the clean model on the same ids: a spike is an entry of the residual stream that the
primary rule marks, at whatever tap it stands; a sink is a key with alpha > 0.3 that at least T/4 queries see, head by
head. So an intervention and its controls edit alike, and interventions can be combined in any order.

A control is matched in number (as many other entries, tokens, keys) or in size: as far from the clean state (the
squared distance is the energy of an edit), or as much attention. `dose` says how much of either an edit moves.

Every intervention is called as (clean, reference=None, control=None): `reference` holds what other text says, `control`
names one of its CONTROLS, whose draws depend on the number of a sequence and on nothing else.
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
    """Along `dim`, as many unmarked (and `free`) entries as are marked, those of the highest scores: bool."""
    marked, scores = marked.movedim(dim, -1), scores.to(marked.device).movedim(dim, -1)
    free = ~marked if free is None else free.expand(marked.movedim(-1, dim).shape).movedim(dim, -1) & ~marked
    chosen, some = torch.zeros_like(marked), marked.any(-1)  # in most rows there is nothing to choose
    ranks = scores[some].masked_fill(~free[some], -torch.inf).argsort(-1, descending=True).argsort(-1)
    chosen[some] = (ranks < marked[some].sum(-1, keepdim=True)) & free[some]
    return chosen.movedim(-1, dim)


def _random_channels(clean: CleanPass, i: int) -> Tensor:
    return as_many(clean.spikes[i], metrics.uniform(clean.numbers, clean.spikes[i].shape[1:], i))


def direction_of(clean: CleanPass, seed: int) -> Tensor:
    """A random unit direction for each sequence, off every channel in which it has a spike: (B, 1, C), float32."""
    draws = metrics.uniform(clean.numbers, (1, clean.streams[0].size(-1)), seed)
    normal = torch.erfinv(2 * draws.clamp(1e-6, 1 - 1e-6) - 1).to(clean.streams[0].device)
    spiking = torch.stack([entries.any(1, keepdim=True).to(normal.device) for entries in clean.spikes]).any(0)
    return torch.nn.functional.normalize(normal.masked_fill(spiking, 0), dim=-1)


def displaced(x: Tensor, clean: Tensor, u: Tensor, size: Tensor) -> Tensor:
    """The state x moved along u until it is `size` away from the `clean` one in that direction: as x."""
    return x + (size - ((x - clean) * u).sum(-1, keepdim=True)) * u


def _other_tokens(clean: CleanPass, i: int) -> Tensor:
    tokens = clean.spikes[i].any(-1)
    return as_many(tokens, metrics.uniform(clean.numbers, tokens.shape[1:], i))


def _random_keys(clean: CleanPass) -> list[Tensor]:
    draws = [metrics.uniform(clean.numbers, found.shape[1:], i) for i, found in enumerate(clean.sinks)]
    return [as_many(f, d, e) for f, d, e in zip(clean.sinks, draws, clean.eligible, strict=True)]


def _same_mass(clean: CleanPass) -> list[Tensor]:
    """At each seam random other keys of all heads, until they would have more attention than the sinks there."""
    chosen = []
    for i, (sinks, mass) in enumerate(zip(clean.sinks, clean.mass, strict=True)):
        wanted = (mass * sinks).sum((1, 2))[:, None]
        order = metrics.uniform(clean.numbers, sinks.shape[1:], i).masked_fill(sinks, 2).flatten(1).argsort(-1)
        free = mass.masked_fill(sinks, 0).flatten(1).gather(-1, order)
        taken = (free.cumsum(-1) <= wanted) & (free > 0)
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
    """Per tap the entries to edit: the spikes, or as many random channels. bool (B, T, C)."""
    random = control == "random_channels"
    return [_random_channels(clean, i) if random and found.any() else found for i, found in enumerate(clean.spikes)]


def tokens_of(clean: CleanPass, control: str | None = None) -> list[Tensor]:
    """Per tap the tokens to edit: those with a spike there, or a control's. bool (B, T, 1)."""
    if control == "other_tokens":
        return [_other_tokens(clean, i)[..., None] for i in range(len(clean.spikes))]
    return [marked.any(-1, keepdim=True) for marked in clean.spikes]


def keys_of(clean: CleanPass, control: str | None = None) -> list[Tensor]:
    """Per seam the keys to edit: the sinks, or a control's. bool (B, H, T)."""
    choose = {"random_keys": _random_keys, "same_mass": _same_mass}
    return choose[control](clean) if control else clean.sinks


# -------------------------------------------------------------------------------------------- the edits


Rows = Callable[[Tensor, int], Tensor]  # (rows of a map (B, H, R, keys), the first query's number) -> rows


class Edit:
    """An intervention, to be entered as often as needed. Hooks go when the block is left, whatever happens in it.

    `edited`: how many entries, tokens, keys, heads or sub-layers, over the sequences. `stage`: the first that it
    touches; all before are as in the clean model. `tokens`: by tap of the stream, whose states it writes, bool (B, T);
    `keys`: by seam, whose attention it changes, bool (B, H, T). `rows`: per seam whose map it changes in a way that
    cannot be seen in (q, k, bias), the function (rows of the map, first query) -> rows. `dose`: of keys the attention
    that they get; of an edit of the stream, after it has run, the squared distance of what it wrote from the clean
    states, summed over tokens and taps; else 0.
    """

    def __init__(
        self,
        clean: CleanPass,
        taps: Sequence[Tap],
        edited: int,
        hooks: Callable[[Any], contextlib.AbstractContextManager[Any]],  # of the Edit
        *,
        tokens: dict[int, Tensor] | None = None,
        keys: dict[int, Tensor] | None = None,
        rows: dict[int, Rows] | None = None,
    ) -> None:
        subject = clean.subject
        self.stage = min(map(subject.stage_of, taps), default=len(subject.stages))
        self.edited, self.hooks, self.tokens, self.keys, self.rows = edited, hooks, tokens or {}, keys or {}, rows or {}
        self.dose = sum(float((clean.mass[i] * found).sum()) for i, found in self.keys.items())
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
    """An Edit: at each writable tap i, `where[i]` (bool (B, T, C) or (B, T, 1)) of x become function(i, x)'s.

    Under the control same_energy the same tokens are moved as far from their clean state, in a random direction.
    """
    subject = clean.subject
    chosen = [
        i
        for i, tap in enumerate(subject.streams)
        if tap.writable and bool(where[i].any()) and (only is None or i == only)
    ]
    written = {i: where[i].any(-1) for i in chosen}
    edit_of = lambda i, x: torch.where(where[i], function(i, x), x)
    if control == "same_energy":
        u, real = direction_of(clean, SEED_OF_ENERGY), edit_of

        def edit_of(i: int, x: Tensor) -> Tensor:
            before = clean.streams[i]
            size = torch.linalg.vector_norm((real(i, before) - before).float(), dim=-1, keepdim=True)
            return torch.where(written[i][..., None], displaced(x, before, u.to(x), size.to(x)), x)

    def write(edit: Edit, i: int) -> Callable[[Tensor], Tensor]:
        def on_stream(x: Tensor) -> Tensor:
            old = x.view(clean.streams[i].shape)  # transformers may flatten a stream to (B T, C) on its way
            new = edit_of(i, old)
            edit.dose += float(((new - clean.streams[i]).float().square().sum(-1) * written[i]).sum())
            return new.view_as(x)

        return on_stream

    taps = [subject.streams[i] for i in chosen]
    hooks = lambda edit: on_streams(taps, [write(edit, i) for i in chosen])
    tokens = {i: found.cpu() for i, found in written.items()}
    return Edit(clean, taps, sum(int(where[i].sum()) for i in chosen), hooks, tokens=tokens)


# ------------------------------------------------------------------------------------------------- spikes


CLIP_RATIO = 10.0  # well below the spike rule's
SEED_OF_ENERGY, SEED_OF_DIRECTION = 10_001, 10_002  # of random directions; those below are taps'


def spike_zero(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """h = 0 at every spike entry of every tap."""
    return _on_streams(clean, entries_of(clean, control), lambda i, x: torch.zeros_like(x), control)


def spike_mean(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """h = the mean of its channel over spike entries of other text (Sun et al. 2024); a control's, over the others."""
    mean = lambda i, x: reference.entries[i][control == "random_channels"].to(x).expand_as(x)
    return _on_streams(clean, entries_of(clean, control), mean, control)


def spike_clip(
    clean: CleanPass, reference: Reference | None = None, control: str | None = None, ratio: float = CLIP_RATIO
) -> Edit:
    """|h| cut down to `ratio` x the layer's median |h|; random channels shrink by their token's mean factor."""

    def clip(i: int, x: Tensor) -> Tensor:
        threshold = ratio * metrics.median_magnitude(x.float())[:, None, None]
        factor = (threshold / x.float().abs().clamp_min(1e-30)).clamp_max(1)
        if control == "random_channels":
            marked = clean.spikes[i]
            factor = (factor * marked).sum(-1, keepdim=True) / marked.sum(-1, keepdim=True).clamp_min(1)
        return x * factor.to(x.dtype)

    return _on_streams(clean, entries_of(clean, control), clip, control)


def spike_stepup(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """h = 0 at the spike entries of the step-up tap alone: later sub-layers may raise them again."""
    only = -1 if reference.step_up is None else reference.step_up
    return _on_streams(clean, entries_of(clean, control), lambda i, x: torch.zeros_like(x), control, only)


def spike_scale(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """The whole state of every spike token, at every tap, scaled to its sequence's median norm: its size goes, its
    direction stays."""

    def scale(i: int, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(clean.streams[i].float(), dim=-1)
        usual = norms.median(1).values[:, None, None]
        return x * (usual / torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).clamp_min(1e-30)).to(x)

    return _on_streams(clean, tokens_of(clean), scale, control)


def spike_direction(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """The spike entries' energy goes into a random direction off all spike channels, the norm stays: a state as large
    as the spike token's, that points elsewhere."""
    u = direction_of(clean, SEED_OF_DIRECTION)

    def turn(i: int, x: Tensor) -> Tensor:
        before, marked = clean.streams[i].float(), clean.spikes[i]
        size = torch.linalg.vector_norm(before * marked, dim=-1, keepdim=True)
        turned = displaced(x.float() * ~marked, before, u, size)
        norm = torch.linalg.vector_norm(before, dim=-1, keepdim=True)
        return (torch.nn.functional.normalize(turned, dim=-1) * norm).to(x)

    return _on_streams(clean, tokens_of(clean), turn, control)


def spike_project(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """h - (h u) u at every spike token of every tap, u the direction of other text's mean spike token there."""

    def project(i: int, x: Tensor) -> Tensor:
        u = reference.direction[i].to(x)
        return x - (x @ u)[..., None] * u

    return _on_streams(clean, tokens_of(clean, control), project, control)


def spike_constant(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """The whole state of every spike token, at every tap, is the mean state of other text's spike tokens there.

    Sun et al. 2026: spikes act as near-constant, implicit parameters. Other tokens get the others' mean state.
    """
    constant = lambda i, x: reference.states[i][control == "other_tokens"].to(x).expand_as(x)
    return _on_streams(clean, tokens_of(clean, control), constant, control)


# -------------------------------------------------------------------------------------------------- sinks


def _on_seams(
    clean: CleanPass,
    keys: list[Tensor],
    hooks_of: Callable[[Tensor], dict[str, Callable[..., Any]]],
    rows_of: Callable[[Tensor], Rows] | None = None,
) -> Edit:
    """An Edit of the seams where keys (per seam bool (B, H, T)) has any; hooks_of(its keys) -> arguments of hooked."""
    chosen = [(tap, found) for tap, found in zip(clean.subject.attends, keys, strict=True) if found.any()]

    def hooks(_: Edit) -> contextlib.AbstractContextManager[None]:
        found = [{kind: (tap.module, hook) for kind, hook in hooks_of(at).items()} for tap, at in chosen]
        return hooked(**{kind: [of[kind] for of in found] for kind in (found[0] if found else ())})

    of_seam = {i: found for i, found in enumerate(keys) if found.any()}
    rows = {i: rows_of(found) for i, found in of_seam.items()} if rows_of else None
    edited = sum(int(found.sum()) for _, found in chosen)
    return Edit(clean, [tap for tap, _ in chosen], edited, hooks, keys=of_seam, rows=rows)


def masked(clean: CleanPass) -> float:
    """What takes a key its attention when it is added to its logit. Where a row can lose all its keys, as in encoders,
    a finite number, whose exp is 0: such a row stays as it is, and is no NaN."""
    return -math.inf if clean.subject.causal else -1e4


def biased(clean: CleanPass, keys: list[Tensor], value: float) -> Edit:
    """An Edit: `value` is added to the logit of each key for every query, under causal attention but for the one at its
    own position."""

    def hooks_of(found: Tensor) -> dict[str, Callable[..., Any]]:
        def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
            q = args[0]
            bias = torch.zeros(found.shape, dtype=q.dtype, device=q.device).masked_fill(found.to(q.device), value)
            others = kwargs.get("bias")
            return args, {**kwargs, "bias": bias[:, :, None] if others is None else others + bias[:, :, None]}

        return {"before": hook}

    return _on_seams(clean, keys, hooks_of)


def sink_mask(clean: CleanPass, reference: Reference | None = None, control: str | None = None) -> Edit:
    """Sink keys get no attention, under causal attention but for each key's own query; a softmax renormalises the
    rest."""
    return biased(clean, keys_of(clean, control), masked(clean))


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
    return biased(clean, keys, masked(clean))


# -------------------------------------------------------------------------------------- heads, sub-layers


def remove_heads(clean: CleanPass, heads: Tensor) -> Edit:
    """The output of heads is zero; `heads`: bool (L, H)."""
    chosen = [(tap, off) for tap, off in zip(clean.subject.attends, heads, strict=True) if off.any()]

    def hook_of(off: Tensor) -> Callable[..., Tensor]:
        return lambda module, args, kwargs, output: output.masked_fill(off.to(output.device)[:, None, None], 0)

    hooks = lambda _: hooked([(tap.module, hook_of(off)) for tap, off in chosen])
    return Edit(clean, [tap for tap, _ in chosen], len(clean.ids) * sum(int(off.sum()) for _, off in chosen), hooks)


def remove_sub_layer(clean: CleanPass, tap: Tap | None) -> Edit:
    """A sub-layer adds nothing to the stream; `tap`: one of subject.inner["update"], or None for none."""
    taps = [] if tap is None else [tap]
    return Edit(clean, taps, len(clean.ids) * len(taps), lambda _: on_streams(taps, [torch.zeros_like] * len(taps)))


def sink_heads(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """The heads that have a sink in at least half of the sequences of other text give nothing."""
    heads = reference.sink_rate >= 0.5
    if control:
        draw = torch.rand(heads.numel(), generator=torch.Generator().manual_seed(0))
        # as many as there are elsewhere, over all layers
        heads = as_many(heads.flatten(), draw).view_as(heads)
    return remove_heads(clean, heads)


def _of_step_up(clean: CleanPass, reference: Reference, other: bool) -> tuple[int, Tap] | None:
    """(the tap after it, the Tap of its update) of the sub-layer at which spikes first stand, or of an `other` of its
    kind, drawn at random; None where there is none."""
    if reference.step_up is None:
        return None
    subject, at = clean.subject, clean.subject.streams[reference.step_up]
    after = {(tap.layer, tap.kind): i for i, tap in enumerate(subject.streams)}
    known = {(tap.layer, tap.kind): tap for tap in subject.inner["update"] if (tap.layer, tap.kind) in after}
    if (at.layer, at.kind) not in known:
        return None
    place = (at.layer, at.kind)
    if other:
        others = [one for one in known if one[1] == at.kind and one != place]
        if not others:
            return None
        place = others[int(torch.randint(len(others), (), generator=torch.Generator().manual_seed(0)))]
    return after[place], known[place]


def step_up(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """The sub-layer at which spikes first stand adds nothing to the stream."""
    found = _of_step_up(clean, reference, control is not None)
    return remove_sub_layer(clean, found and found[1])


def bos_ffn(clean: CleanPass, reference: Reference, control: str | None = None) -> Edit:
    """The FFN at which spikes first stand adds nothing to the first token, BOS where there is one.

    Queipo-de-Llano et al. 2025 (2510.06477), who say that the spike on BOS goes, and the sinks with it.
    """
    found = _of_step_up(clean, reference, control == "other_sub_layer")
    if found is None or found[1].kind != "ffn":
        return nothing(clean)
    index, update = found
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
    """What makes an intervention."""

    def __call__(self, clean: CleanPass, reference: Any, control: str | None = None) -> Edit:
        """The Edit of one batch, or that of a control; `reference`: a Reference, or None where none is needed."""


class Intervention(NamedTuple):
    """One row of the tables: what the terminal, the pages, the findings and `import spikesink` know it by."""

    kind: str  # what it edits: spike, sink, bos
    edit: EditFunction
    controls: tuple[str, ...]  # of CONTROLS
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
# on whole tokens, heads and sub-layers
REMOVALS = {
    "spike_constant": Intervention("spike", spike_constant, ("same_energy", "other_tokens"), needs_reference=True),
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
