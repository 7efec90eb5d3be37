"""What an intervention changes: the loss, where it changes, which spikes and sinks are left, how far states move.

Everything is kept per sequence, so that every interval is a bootstrap over sequences, paired with the clean model's.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..hooks import hooked, on_streams
from ..measure import metrics
from ..measure.observe import Ordinary
from ..measure.sinks import alpha_in, are_sinks
from ..models.subject import Subject, batches, map_rows
from . import causes, interventions
from .causes import Judged
from .clean_pass import AtTap, CleanPass, Reference
from .findings import (
    AttentionChange,
    Baseline,
    Cause,
    ClassChange,
    ClassLoss,
    ControlChange,
    ControlEffect,
    Entry,
    Exposed,
    Interval,
    Left,
    MapChange,
    ShareIntervals,
    StateChange,
)
from .interventions import Edit, Intervention, intervention_named

CLASSES = ("spike", "sink", "after", "other")
nan = float("nan")

Condition = Callable[[CleanPass], Edit]
Conditions = Mapping[str, Condition]


@dataclass
class Outcome:
    """What was measured under one intervention: sums per sequence, N of them, and the losses (N, T - shift)."""

    losses: Tensor  # float64, nan where there is no prediction
    spikes: Tensor  # (N, 2): tokens that were spikes and still are; that are now
    sinks: Tensor  # (N, 2): (head, key) pairs, alike
    moved: Tensor  # (taps, N, 2): mean |h' - h| / |h| of spike tokens and of the others; nan without
    sums: Tensor  # (N, 5): causes.SUMS
    edited: int = 0
    dose: float = 0.0

    @classmethod
    def empty(cls, taps: int, n: int, length: int) -> "Outcome":
        """Nothing measured yet, of `n` sequences."""
        losses = torch.full((n, length), nan, dtype=torch.float64)
        counts = torch.zeros(n, 2), torch.zeros(n, 2)
        sums = torch.zeros(n, len(causes.SUMS), dtype=torch.float64)
        return cls(losses, *counts, torch.full((taps, n, 2), nan), sums)


@dataclass
class Outcomes:
    """All outcomes on the same sequences, and what the clean model showed on them."""

    by_name: dict[str, Outcome]  # "none" is the clean model
    classes: Tensor  # bool (4, N, T - shift): CLASSES of the token at which a prediction is made
    spikes: Tensor  # (N,): spike tokens in the clean model
    sinks: Tensor  # (N,): (head, key) sinks in the clean model
    spikes_at_taps: Tensor  # (N,): spike tokens, counted at every attended tap
    states: dict[str, set[Hashable]] = field(default_factory=dict)  # of what is judged, by intervention
    spread: dict[str, Tensor] = field(default_factory=dict)  # of `spread_of`: name -> (N, 2), nan without sinks
    predicted_bytes: int | None = None  # of the text of what is predicted

    def bits_per_byte(self, name: str) -> float | None:
        """The loss under a condition; None where the text is not known."""
        return metrics.bits_per_byte(self.by_name[name].losses.nansum().item(), self.predicted_bytes)


def measure(
    subject: Subject,
    ids: Tensor,
    conditions: Conditions,
    batch_size: int,
    description: str = "ablate",
    ordinary: Ordinary | None = None,
) -> Outcomes:
    """Runs every condition on ids (N, T), int64. `ordinary`: what is usual, by default on these ids.

    Batch by batch: one clean pass, then each condition from the first stage that it touches on.
    """
    ordinary = ordinary or Ordinary.from_ids(subject, ids, batch_size)
    N, T = len(ids), ids.size(1) - subject.shift
    result = Outcomes(
        {name: Outcome.empty(len(subject.streams), N, T) for name in ("none", *conditions)},
        torch.zeros(len(CLASSES), N, T, dtype=torch.bool),
        torch.zeros(N),
        torch.zeros(N),
        torch.zeros(N),
        spread={name: torch.full((N, 2), nan) for name in ("with", "without", "control")},
    )
    parts = [*batches(ids, batch_size)]
    with tqdm(total=len(parts) * (len(conditions) + 1), desc=description, disable=None, leave=False) as bar:
        for rows, batch in parts:
            clean = _clean(subject, batch, rows, result, ordinary)
            bar.update()
            judged: dict[str, Judged] = {}
            for name, condition in conditions.items():
                bar.set_postfix_str(name, refresh=False)
                edit, intervention = condition(clean), name.partition("/")[0]  # controls follow their intervention
                if name in (*causes.CAUSES, *causes.EXPOSING):
                    asked = causes.ASKED[intervention_named(name).kind]
                    judged[name] = Judged(clean, edit, asked, name in causes.SIZES)
                    result.states.setdefault(name, set()).update(judged[name].states())
                _under(edit, clean, rows, result.by_name[name], judged.get(intervention))
                bar.update()
    return result


def _clean(subject: Subject, batch: Tensor, rows: Tensor, result: Outcomes, ordinary: Ordinary) -> CleanPass:
    """The clean pass over one batch; fills in what it showed."""
    clean = CleanPass.of(subject, batch, rows, ordinary)
    outcome = result.by_name["none"]
    T = clean.losses.size(1)
    outcome.losses[rows, :T] = clean.losses.double()
    result.spikes[rows] = clean.spike_tokens.sum(1).float()
    result.spikes_at_taps[rows] = torch.stack([tap.marked for tap in clean.at[subject.attended]]).sum((0, 2)).float()
    result.sinks[rows] = torch.stack([found.sum((1, 2)) for found in clean.sinks]).sum(0).float()
    outcome.spikes[rows] = result.spikes[rows, None].expand(-1, 2)
    outcome.sinks[rows] = result.sinks[rows, None].expand(-1, 2)
    if subject.part != "cross":  # whose keys are not the tokens at which predictions are made
        result.classes[:, rows, :T] = classes_of(clean)[..., subject.n_register :][..., :T]
    masks = {"with": None, "without": clean.sinks, "control": interventions.keys_of(clean, "random_keys")}
    for name, keys in masks.items():
        result.spread[name][rows] = spread_of(clean, keys)
    return clean


def classes_of(clean: CleanPass) -> Tensor:
    """CLASSES of tokens: bool (4, B, T). `after`: right after a spike or a sink; `other`: none of the three."""
    spike, sink = clean.spike_tokens, clean.sink_tokens
    after = torch.zeros_like(spike)
    after[:, 1:] = (spike | sink)[:, :-1]
    return torch.stack((spike, sink, after, ~(spike | sink | after)))


@torch.no_grad()
def spread_of(clean: CleanPass, masked: list[Tensor] | None = None) -> Tensor:
    """Entropy (nats) and mean distance (tokens) of the maps of heads that have a sink, averaged over them: (B, 2).

    `masked`: per seam keys (B, H, T) that get no attention but for their own query, the rest of each row renormalised;
    q and k are the clean model's. nan for a sequence without sinks.
    """
    total, heads = torch.zeros(len(clean.ids), 2), torch.zeros(len(clean.ids), 1)
    for i, (seam, q, k) in enumerate(clean.calls):
        wanted = clean.sinks[i].any(-1)  # (B, H)
        if not wanted.any():
            continue
        bias = None
        if masked is not None:
            of = masked[i].to(q.device)[:, :, None]
            bias = torch.zeros(of.shape, device=q.device).masked_fill(of, interventions.masked(clean))
        sums = torch.zeros(2, *wanted.shape)
        for first, weights in map_rows(seam, q, k, clean.subject.causal, bias):
            query = torch.arange(first, first + weights.size(-2), device=q.device)[:, None]
            distance = (query - torch.arange(weights.size(-1), device=q.device)).abs()
            sums[0] -= torch.special.xlogy(weights, weights).sum((-1, -2)).cpu()
            sums[1] += (weights * distance).sum((-1, -2)).cpu()
        total += (sums * wanted).sum(-1).T / q.size(-2)
        heads += wanted.sum(-1, keepdim=True)
    return torch.where(heads > 0, total / heads.clamp_min(1), nan)


class _Watch:
    """Hooks that compare a pass under an edit with the clean one, over the taps and seams that the edit can reach."""

    def __init__(self, edit: Edit, clean: CleanPass, rows: Tensor, outcome: Outcome, judged: Judged | None) -> None:
        self.edit, self.clean, self.rows, self.outcome, self.judged = edit, clean, rows, outcome, judged
        self.tokens = clean.spike_tokens  # bool (B, T)
        self.still = torch.zeros_like(self.tokens)  # those with a spike at some attended tap under the edit
        self.attended = clean.subject.attended_taps
        self.sinks = torch.zeros(len(rows), 2)  # the very same, and all
        outcome.sums[rows] = 0.0

    def hooks(self) -> contextlib.ExitStack:
        """A context manager of all hooks. What the edit cannot reach is as it was, and is filled in at once."""
        subject, clean, first = self.clean.subject, self.clean, self.edit.stage
        taps, functions, seams = [], [], []
        for i, tap in enumerate(subject.streams):
            if subject.stage_of(tap) >= first:
                taps.append(tap)
                functions.append(functools.partial(self.on_stream, i))
            else:
                self.count_tap(i, clean.at[i])
                for kind, of in enumerate((self.tokens, ~self.tokens)):
                    self.outcome.moved[i, self.rows, kind] = torch.where(of.any(1), 0.0, nan)
        for i, tap in enumerate(subject.attends):
            if subject.stage_of(tap) >= first:
                seams.append((tap.module, functools.partial(self.on_attention, i)))
            else:
                self.count_seam(i, clean.sinks[i], clean.alpha[i])
        stack = contextlib.ExitStack()
        stack.enter_context(on_streams(taps, functions))
        stack.enter_context(hooked(seams))
        return stack

    def on_stream(self, i: int, x: Tensor) -> None:
        """The stream (B, T, C), or flattened, at tap i."""
        x = x.view(self.clean.streams[i].shape)
        if self.judged:
            self.count_tap(i, self.clean.look_at(i, x))
        elif i in self.attended:
            self.still |= self.clean.ordinary.spikes_at(i, x).any(-1).cpu()
        old = self.clean.streams[i].float()
        relative = ((x.float() - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(1e-30)).cpu()
        for kind, of in enumerate((self.tokens, ~self.tokens)):
            self.outcome.moved[i, self.rows, kind] = (relative * of).sum(1) / of.sum(1)  # nan without any

    def on_attention(self, i: int, module: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        """A call of seam i."""
        q, k, *_ = args
        alpha, queries = alpha_in(module, q, k, self.clean.subject.causal, kwargs.get("bias"), self.edit.rows.get(i))
        self.count_seam(i, are_sinks(alpha, queries, q.size(-2)), alpha)

    def count_tap(self, i: int, now: AtTap) -> None:
        """What is at tap i."""
        if i in self.attended:
            self.still |= now.marked
        if self.judged:
            self.outcome.sums[self.rows] += self.judged.count_tap(i, now)

    def count_seam(self, i: int, sinks: Tensor, alpha: Tensor) -> None:
        """What is at seam i: sinks, bool (B, H, T), and alpha (B, H, T)."""
        self.sinks += torch.stack(((sinks & self.clean.sinks[i]).sum((1, 2)), sinks.sum((1, 2))), dim=1)
        if self.judged:
            self.outcome.sums[self.rows] += self.judged.count_seam(i, sinks, alpha)


@torch.no_grad()
def _under(edit: Edit, clean: CleanPass, rows: Tensor, outcome: Outcome, judged: Judged | None = None) -> None:
    """One pass under an edit, with the stages before it as they were; fills in the outcome of these sequences."""
    watch = _Watch(edit, clean, rows, outcome, judged)
    with clean.prefix(edit.stage), edit, watch.hooks():  # the edit's hooks first: what is watched is edited
        losses = clean.subject.losses(clean.ids)
    outcome.losses[rows, : losses.size(1)] = losses.double()
    outcome.edited, outcome.dose = outcome.edited + edit.edited, outcome.dose + edit.dose
    still = torch.stack(((watch.still & watch.tokens).sum(1), watch.still.sum(1)), dim=1)
    outcome.spikes[rows], outcome.sinks[rows] = still.float(), watch.sinks


def conditions_of(table: Mapping[str, Intervention], reference: Reference) -> dict[str, Condition]:
    """Every intervention of a table and, as 'name/control', its controls."""
    return {
        f"{name}/{control}" if control else name: functools.partial(one.edit, reference=reference, control=control)
        for name, one in table.items()
        for control in (None, *one.controls)
    }


def edited_losses(
    subject: Subject, ids: Tensor, edits: Iterable[Condition], batch_size: int = 8, ordinary: Ordinary | None = None
) -> Tensor:
    """The mean loss of each sequence of ids (N, T) under all `edits`, the outermost first: (N,), float64, nats.

    What is edited is fixed by the clean model, batch by batch.
    """
    ordinary = ordinary or Ordinary.from_ids(subject, ids, batch_size)
    losses = torch.empty(len(ids), dtype=torch.float64)
    for rows, batch in batches(ids, batch_size):
        clean = CleanPass.of(subject, batch, rows, ordinary=ordinary)
        made = [edit(clean) for edit in edits]
        with contextlib.ExitStack() as stack:
            stack.enter_context(clean.prefix(min(edit.stage for edit in made)))
            for edit in made:
                stack.enter_context(edit)
            losses[rows] = subject.losses(batch).double().mean(1)
    return losses


TextCondition = Callable[[Tensor, Tensor], contextlib.AbstractContextManager[Any]]  # (ids (B, T), numbers (B,))
TextConditions = Mapping[str, TextCondition]


def on_texts(
    subject: Subject, conditions: Conditions, shared: bool, ordinary: Ordinary | None = None
) -> dict[str, TextCondition]:
    """The conditions as probes take them: (ids (B, T), numbers of the sequences (B,)) -> context manager. `ordinary`:
    what is usual on ordinary text, which a batch of short sentences is not.

    One clean pass for all conditions that are asked for the same batch in a row. `shared`: the stages before an edit
    are not computed again, so taps inside them are not called.
    """
    last: list[CleanPass] = []

    def under(condition: Condition, ids: Tensor, numbers: Tensor) -> contextlib.ExitStack:
        if not last or last[0].ids is not ids:
            last[:] = [CleanPass.of(subject, ids, numbers, ordinary=ordinary)]
        clean, stack = last[0], contextlib.ExitStack()
        edit = condition(clean)
        if shared:
            stack.enter_context(clean.prefix(edit.stage))
        stack.enter_context(edit)
        return stack

    return {name: functools.partial(under, condition) for name, condition in conditions.items()}


# ------------------------------------------------------------------------------------------------- findings


def mean_of_sequences(values: Tensor) -> tuple[float | None, Interval | None]:
    """(mean, its 95% interval) of values (N,) of sequences, nan left out; (None, None) without any."""
    values = values[~values.isnan()].double()
    if not len(values):
        return None, None
    return values.mean().item(), metrics.bootstrap_ci(lambda i: values[i].mean().item(), len(values))


def none_if_nan(value: float) -> float | None:
    """A float, or None for nan."""
    return None if math.isnan(value) else value


def mean_of_class(losses: Tensor, chosen: Tensor) -> Tensor:
    """Mean of losses (N, T') over the chosen tokens of each sequence, bool (N, T'): (N,), nan without any."""
    return losses.where(chosen, nan).nanmean(1)


def mean_by_position(losses: Tensor) -> list[float]:
    """Means over sequences of losses (N, T'), to six places."""
    return [round(x, 6) for x in losses.nanmean(0).tolist()]


def _class_change(delta: Tensor, chosen: Tensor) -> ClassChange:
    change, ci95 = mean_of_sequences(mean_of_class(delta, chosen))
    return ClassChange(delta_loss=change, ci95=ci95, tokens=int(chosen.sum()))


def effect_entry(name: str, kind: str, outcomes: Outcomes) -> dict[str, Any]:
    """The fields of a findings.Effect, but for its name: a condition's losses against the clean ones, paired.

    What is left is counted in the sequences that had what an intervention of this `kind` edits.
    """
    among = {"spike": outcomes.spikes > 0, "sink": outcomes.sinks > 0}.get(kind, outcomes.spikes >= 0)
    outcome, clean = outcomes.by_name[name], outcomes.by_name["none"]
    delta = outcome.losses - clean.losses  # (N, T')
    moved = [[none_if_nan(x) for x in tap] for tap in outcome.moved.nanmean(1).tolist()]
    return {
        "edited": outcome.edited,
        "dose": outcome.dose or None,
        "bits_per_byte": outcomes.bits_per_byte(name),
        **metrics.paired_effect(clean.losses.nanmean(1), outcome.losses.nanmean(1)),
        "by_class": {name: _class_change(delta, at) for name, at in zip(CLASSES, outcomes.classes, strict=True)},
        "by_position": mean_by_position(delta),
        "spikes_left": share_left(outcome.spikes[among], outcomes.spikes[among]),
        "sinks_left": share_left(outcome.sinks[among], outcomes.sinks[among]),
        "exposed": exposed(outcome) if name.partition("/")[0] in causes.EXPOSING else None,
        "state_change": [StateChange(spike_tokens=spike_tokens, others=others) for spike_tokens, others in moved],
    }


def exposed(outcome: Outcome) -> Exposed | None:
    """What became of the sinks downstream of what was edited; None where there are none."""
    sums = dict(zip(causes.SUMS, outcome.sums.sum(0).tolist(), strict=True))
    sinks = sums["judged"]
    return Exposed(sinks=int(sinks), left=sums["left"] / sinks, lost=1 - sums["share"] / sinks) if sinks else None


def table_entries(table: Mapping[str, Intervention], outcomes: Outcomes) -> list[Entry]:
    """The findings of a table's interventions, each with its controls."""

    def controls(name: str, one: Intervention) -> list[ControlEffect]:
        effects = {control: effect_entry(f"{name}/{control}", one.kind, outcomes) for control in one.controls}
        texts = interventions.CONTROLS
        return [ControlEffect(name=control, text=texts[control], **effect) for control, effect in effects.items()]

    return [
        Entry(name=name, kind=one.kind, **effect_entry(name, one.kind, outcomes), control=controls(name, one))
        for name, one in table.items()
    ]


def share_left(now: Tensor, before: Tensor) -> Left:
    """Which part of what was there, `before` (N,), is left: `now` (N, 2), the very same ones and all that there are.

    Ratios of sums over sequences, their intervals by bootstrap; None where nothing was there.
    """
    n = int((before > 0).sum())
    if not n:
        return Left(sequences=0, same=None, all=None, ci95=None)
    rates = lambda i: {key: (now[i, j].sum() / before[i].sum()).item() for j, key in enumerate(("same", "all"))}
    intervals = ShareIntervals(**metrics.bootstrap_ci(rates, len(before)))
    return Left(sequences=n, **rates(torch.arange(len(before))), ci95=intervals)


def baseline(outcomes: Outcomes) -> Baseline:
    """The clean model: its loss, by token class and by position."""
    losses = outcomes.by_name["none"].losses
    loss = losses.nanmean(1).mean()
    of_class = lambda at: ClassLoss(loss=mean_of_sequences(mean_of_class(losses, at))[0], tokens=int(at.sum()))
    return Baseline(
        loss=loss.item(),
        ppl=loss.exp().item(),
        bits_per_byte=outcomes.bits_per_byte("none"),
        by_class={kind: of_class(at) for kind, at in zip(CLASSES, outcomes.classes, strict=True)},
        by_position=mean_by_position(losses),
    )


def causes_of(table: Mapping[str, Intervention], outcomes: Outcomes) -> list[Cause]:
    """Whether sinks need spikes, and spikes sinks, by each intervention of a table that asks it."""
    there = {"sinks": outcomes.sinks, "spikes": outcomes.spikes_at_taps}
    found = []
    for name in (name for name in causes.CAUSES if name in table):
        real, one = outcomes.by_name[name], table[name]
        of_controls = {control: outcomes.by_name[f"{name}/{control}"] for control in one.controls}
        sums = {
            control: outcome.sums
            for control, outcome in of_controls.items()
            if outcome.edited and causes.matches(control, outcome.dose, real.dose)
        }
        asked = causes.ASKED[one.kind]
        states = len(outcomes.states.get(name, ()))
        found.append(causes.cause(name, asked, real.edited, states, real.sums, sums, there[asked]))
    return found


def attention_change(outcomes: Outcomes) -> AttentionChange:
    """Entropy and distance of the heads that have sinks: as they are, without the sink keys, without random others."""
    spread = outcomes.spread

    def change_of(i: int) -> MapChange:
        before, without, control = (spread[name][:, i] for name in ("with", "without", "control"))
        change, ci95 = mean_of_sequences(without - before)
        of_control, ci95_of_control = mean_of_sequences(control - before)
        return MapChange(
            with_sink=mean_of_sequences(before)[0],
            without_sink=mean_of_sequences(without)[0],
            change=change,
            ci95=ci95,
            control=ControlChange(name="random_keys", change=of_control, ci95=ci95_of_control),
        )

    sequences = int((~spread["with"][:, 0].isnan()).sum())
    return AttentionChange(sequences=sequences, entropy=change_of(0), distance=change_of(1))
