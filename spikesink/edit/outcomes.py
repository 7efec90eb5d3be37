"""What an intervention changes: the loss, and where; which spikes and sinks remain; how far states move.

Everything is stored per sequence, so that every interval is a bootstrap over sequences, paired with the clean model.
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
from .clean_pass import CleanPass, Reference, TapState
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
    MapChange,
    OutputChange,
    RemainingShare,
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
    """What we measure under one intervention, for each of N sequences."""

    losses: Tensor  # (N, T - shift), float64, nan where there is no prediction
    spikes: Tensor  # (N, 2): tokens that were spikes and still are; tokens that are spikes now
    sinks: Tensor  # (N, 2): the same counts of (head, key) pairs
    moved: Tensor  # (taps, N, 2): mean |h' - h| / |h| of spike tokens and of the others; nan without any
    sums: Tensor  # (N, 5): causes.SUMS
    output: Tensor  # (N, T): |o' - o| / |o| of the output states of a model without a head; nan with one
    pooled: Tensor  # (N,): 1 - cos between the sequence's mean output states o' and o; nan with a head
    edited: int = 0
    dose: float = 0.0

    @classmethod
    def empty(cls, taps: int, n: int, length: int) -> "Outcome":
        """Returns an Outcome of `n` sequences to be filled in."""
        losses = torch.full((n, length), nan, dtype=torch.float64)
        counts = torch.zeros(n, 2), torch.zeros(n, 2)
        sums = torch.zeros(n, len(causes.SUMS), dtype=torch.float64)
        output, pooled = torch.full((n, length), nan), torch.full((n,), nan)
        return cls(losses, *counts, torch.full((taps, n, 2), nan), sums, output, pooled)


@dataclass
class Outcomes:
    """All outcomes on the same N sequences, and what the clean model has on them."""

    by_name: dict[str, Outcome]  # "none" is the clean model
    classes: Tensor  # bool (4, N, T - shift): CLASSES of the token at which a prediction is made
    spikes: Tensor  # (N,): spike tokens in the clean model
    sinks: Tensor  # (N,): (head, key) sinks in the clean model
    spikes_at_taps: Tensor  # (N,): spike tokens, counted at every attended tap
    states: dict[str, set[Hashable]] = field(default_factory=dict)  # intervention -> states of the judged tokens
    spread: dict[str, Tensor] = field(default_factory=dict)  # name -> `spread_of` (N, 2), nan without sinks
    predicted_bytes: int | None = None  # length of the predicted text

    @property
    def has_loss(self) -> bool:
        """Whether the model has a language-model head."""
        return not self.by_name["none"].losses.isnan().all()

    def bits_per_byte(self, name: str) -> float | None:
        """Returns the loss under a condition in bits per byte; None if the text is not known, or there is no loss."""
        if not self.has_loss:
            return None
        return metrics.bits_per_byte(self.by_name[name].losses.nansum().item(), self.predicted_bytes)


def measure_outcomes(
    subject: Subject,
    ids: Tensor,
    conditions: Conditions,
    batch_size: int,
    description: str = "ablate",
    ordinary: Ordinary | None = None,
) -> Outcomes:
    """Runs every condition on ids (N, T), int64. `ordinary`: usual magnitudes, by default those of these ids.

    Each batch takes one clean pass, and then one pass per condition from the first stage that the condition touches.
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
            clean = _clean_pass(subject, batch, rows, result, ordinary)
            bar.update()
            judged: dict[str, Judged] = {}
            for name, condition in conditions.items():
                bar.set_postfix_str(name, refresh=False)
                edit, intervention = condition(clean), name.partition("/")[0]  # controls follow their intervention
                if name in (*causes.CAUSES, *causes.EXPOSING):
                    asked = causes.ASKED[intervention_named(name).kind]
                    judged[name] = Judged(clean, edit, asked, name in causes.SIZES)
                    result.states.setdefault(name, set()).update(judged[name].states())
                _edited_pass(edit, clean, rows, result.by_name[name], judged.get(intervention))
                bar.update()
    return result


def _clean_pass(subject: Subject, batch: Tensor, rows: Tensor, result: Outcomes, ordinary: Ordinary) -> CleanPass:
    """Makes the clean pass over one batch, and writes what it shows into `result`."""
    clean = CleanPass.run(subject, batch, rows, ordinary)
    outcome = result.by_name["none"]
    T = clean.losses.size(1)
    outcome.losses[rows, :T] = clean.losses.double()
    result.spikes[rows] = clean.spike_tokens.sum(1).float()
    marked = torch.stack([tap.marked for tap in clean.tap_states[subject.attended]])
    result.spikes_at_taps[rows] = marked.sum((0, 2)).float()
    result.sinks[rows] = torch.stack([sinks.sum((1, 2)) for sinks in clean.sinks]).sum(0).float()
    outcome.spikes[rows] = result.spikes[rows, None].expand(-1, 2)
    outcome.sinks[rows] = result.sinks[rows, None].expand(-1, 2)
    if subject.part != "cross":  # there the keys are not the tokens at which predictions are made
        result.classes[:, rows, :T] = classes_of(clean)[..., subject.n_register :][..., :T]
    masks = {"with": None, "without": clean.sinks, "control": interventions.keys_of(clean, "random_keys")}
    for name, keys in masks.items():
        result.spread[name][rows] = spread_of(clean, keys)
    return clean


def classes_of(clean: CleanPass) -> Tensor:
    """Returns CLASSES of tokens: bool (4, B, T). `after`: right after a spike or sink; `other`: none of the three."""
    spike, sink = clean.spike_tokens, clean.sink_tokens
    next_tokens = torch.zeros_like(spike)
    next_tokens[:, 1:] = (spike | sink)[:, :-1]
    return torch.stack((spike, sink, next_tokens, ~(spike | sink | next_tokens)))


@torch.no_grad()
def spread_of(clean: CleanPass, masked: list[Tensor] | None = None) -> Tensor:
    """Returns the mean entropy (nats) and mean distance (tokens) of the maps of heads that have a sink: (B, 2).

    `masked`: keys (B, H, T) of each seam that get no attention except from the query at their own position; the rest of
    each row is renormalised. q and k are the clean model's. A sequence without sinks has nan.
    """
    total, heads = torch.zeros(len(clean.ids), 2), torch.zeros(len(clean.ids), 1)
    for i, (seam, q, k) in enumerate(clean.calls):
        has_sink = clean.sinks[i].any(-1)  # (B, H)
        if not has_sink.any():
            continue
        bias = None
        if masked is not None:
            keys = masked[i].to(q.device)[:, :, None]
            bias = torch.zeros(keys.shape, device=q.device).masked_fill(keys, interventions.mask_bias(clean))
        sums = torch.zeros(2, *has_sink.shape)
        for first, weights in map_rows(seam, q, k, clean.subject.causal, bias):
            query = torch.arange(first, first + weights.size(-2), device=q.device)[:, None]
            distance = (query - torch.arange(weights.size(-1), device=q.device)).abs()
            sums[0] -= torch.special.xlogy(weights, weights).sum((-1, -2)).cpu()
            sums[1] += (weights * distance).sum((-1, -2)).cpu()
        total += (sums * has_sink).sum(-1).T / q.size(-2)
        heads += has_sink.sum(-1, keepdim=True)
    return torch.where(heads > 0, total / heads.clamp_min(1), nan)


class _Watch:
    """Hooks that compare a pass under an edit with the clean pass, at the taps and seams that the edit can reach."""

    def __init__(self, edit: Edit, clean: CleanPass, rows: Tensor, outcome: Outcome, judged: Judged | None) -> None:
        self.edit, self.clean, self.rows, self.outcome, self.judged = edit, clean, rows, outcome, judged
        self.tokens = clean.spike_tokens  # bool (B, T)
        self.spike_tokens = torch.zeros_like(self.tokens)  # with a spike at some attended tap under the edit
        self.attended = clean.subject.attended_taps
        self.sinks = torch.zeros(len(rows), 2)  # clean sinks that still are sinks; all sinks
        outcome.sums[rows] = 0.0

    def hooks(self) -> contextlib.ExitStack:
        """Returns a context manager of all hooks, after filling in what the edit cannot reach and so cannot change."""
        subject, clean, first = self.clean.subject, self.clean, self.edit.stage
        taps, functions, seams = [], [], []
        for i, tap in enumerate(subject.streams):
            if subject.stage_of(tap) >= first:
                taps.append(tap)
                functions.append(functools.partial(self.on_stream, i))
            else:
                self.count_tap(i, clean.tap_states[i])
                for kind, tokens in enumerate((self.tokens, ~self.tokens)):
                    self.outcome.moved[i, self.rows, kind] = torch.where(tokens.any(1), 0.0, nan)
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
        """Compares the stream (B, T, C), or flattened, at tap i."""
        x = x.view(self.clean.streams[i].shape)
        if self.judged:
            self.count_tap(i, self.clean.tap_state(i, x))
        elif i in self.attended:
            self.spike_tokens |= self.clean.ordinary.spikes_at(i, x).any(-1).cpu()
        old = self.clean.streams[i].float()
        relative = ((x.float() - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(1e-30)).cpu()
        for kind, tokens in enumerate((self.tokens, ~self.tokens)):
            self.outcome.moved[i, self.rows, kind] = (relative * tokens).sum(1) / tokens.sum(1)  # nan without any

    def on_attention(self, i: int, module: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        """Compares a call of seam i."""
        q, k, *_ = args
        alpha, queries = alpha_in(module, q, k, self.clean.subject.causal, kwargs.get("bias"), self.edit.rows.get(i))
        self.count_seam(i, are_sinks(alpha, queries, q.size(-2)), alpha)

    def count_tap(self, i: int, state: TapState) -> None:
        """Counts the spikes at tap i."""
        if i in self.attended:
            self.spike_tokens |= state.marked
        if self.judged:
            self.outcome.sums[self.rows] += self.judged.count_tap(i, state)

    def count_seam(self, i: int, sinks: Tensor, alpha: Tensor) -> None:
        """Counts the sinks, bool (B, H, T), at seam i; alpha (B, H, T)."""
        self.sinks += torch.stack(((sinks & self.clean.sinks[i]).sum((1, 2)), sinks.sum((1, 2))), dim=1)
        if self.judged:
            self.outcome.sums[self.rows] += self.judged.count_seam(i, sinks, alpha)


@torch.no_grad()
def _edited_pass(edit: Edit, clean: CleanPass, rows: Tensor, outcome: Outcome, judged: Judged | None = None) -> None:
    """Makes one pass under an edit, replaying the stages before it; fills in the outcome of these sequences."""
    watch = _Watch(edit, clean, rows, outcome, judged)
    with clean.prefix(edit.stage), edit, watch.hooks():  # the edit's hooks come first, so we watch edited states
        losses, output = clean.subject.losses_and_states(clean.ids)
    outcome.losses[rows, : losses.size(1)] = losses.double()
    if output is not None and clean.output is not None:
        new, old = output.float(), clean.output.float()
        outcome.output[rows, : old.size(1)] = ((new - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(1e-30)).cpu()
        outcome.pooled[rows] = 1 - torch.cosine_similarity(new.mean(1), old.mean(1)).cpu()
    outcome.edited, outcome.dose = outcome.edited + edit.edited, outcome.dose + edit.dose
    spikes = torch.stack(((watch.spike_tokens & watch.tokens).sum(1), watch.spike_tokens.sum(1)), dim=1)
    outcome.spikes[rows], outcome.sinks[rows] = spikes.float(), watch.sinks


def conditions_of(table: Mapping[str, Intervention], reference: Reference) -> dict[str, Condition]:
    """Returns every intervention of a table and, as 'name/control', its controls."""
    return {
        f"{name}/{control}" if control else name: functools.partial(row.edit, reference=reference, control=control)
        for name, row in table.items()
        for control in (None, *row.controls)
    }


def edited_losses(
    subject: Subject, ids: Tensor, edits: Iterable[Condition], batch_size: int = 8, ordinary: Ordinary | None = None
) -> Tensor:
    """Returns the mean loss of each sequence of ids (N, T) under all `edits`, the outermost first: (N,), float64, nats.

    The clean model determines what is edited, batch by batch.
    """
    ordinary = ordinary or Ordinary.from_ids(subject, ids, batch_size)
    losses = torch.empty(len(ids), dtype=torch.float64)
    for rows, batch in batches(ids, batch_size):
        clean = CleanPass.run(subject, batch, rows, ordinary=ordinary)
        batch_edits = [edit(clean) for edit in edits]
        with contextlib.ExitStack() as stack:
            stack.enter_context(clean.prefix(min(edit.stage for edit in batch_edits)))
            for edit in batch_edits:
                stack.enter_context(edit)
            losses[rows] = subject.losses(batch).double().mean(1)
    return losses


TextCondition = Callable[[Tensor, Tensor], contextlib.AbstractContextManager[Any]]  # (ids (B, T), numbers (B,))
TextConditions = Mapping[str, TextCondition]


def on_texts(
    subject: Subject, conditions: Conditions, shared: bool, ordinary: Ordinary | None = None
) -> dict[str, TextCondition]:
    """Returns the conditions as probes take them: (ids (B, T), numbers of the sequences (B,)) -> context manager.

    Conditions that run on the same batch in a row share one clean pass. `shared`: the stages before an edit are not
    computed again, so taps inside them are not called. `ordinary`: usual magnitudes on ordinary text, because a batch
    of short sentences does not show them.
    """
    last: list[CleanPass] = []

    def under(condition: Condition, ids: Tensor, numbers: Tensor) -> contextlib.ExitStack:
        if not last or last[0].ids is not ids:
            last[:] = [CleanPass.run(subject, ids, numbers, ordinary=ordinary)]
        clean, stack = last[0], contextlib.ExitStack()
        edit = condition(clean)
        if shared:
            stack.enter_context(clean.prefix(edit.stage))
        stack.enter_context(edit)
        return stack

    return {name: functools.partial(under, condition) for name, condition in conditions.items()}


# ------------------------------------------------------------------------------------------------- findings


def mean_of_sequences(values: Tensor) -> tuple[float | None, Interval | None]:
    """Returns (mean, its 95% interval) of values (N,) of sequences, ignoring nan; (None, None) if none remains."""
    values = values[~values.isnan()].double()
    if not len(values):
        return None, None
    return values.mean().item(), metrics.bootstrap_ci(lambda i: values[i].mean().item(), len(values))


def none_if_nan(value: float) -> float | None:
    """Returns the value, or None for nan."""
    return None if math.isnan(value) else value


def mean_of_class(losses: Tensor, chosen: Tensor) -> Tensor:
    """Returns each sequence's mean of losses (N, T') over its `chosen` tokens, bool (N, T'): (N,), nan without any."""
    return losses.where(chosen, nan).nanmean(1)


def mean_by_position(losses: Tensor) -> list[float]:
    """Returns means over sequences of losses (N, T'), rounded to six places; nothing where there is no loss."""
    return [] if losses.isnan().all() else [round(x, 6) for x in losses.nanmean(0).tolist()]


def _class_change(delta: Tensor, chosen: Tensor) -> ClassChange:
    change, ci95 = mean_of_sequences(mean_of_class(delta, chosen))
    return ClassChange(delta_loss=change, ci95=ci95, tokens=int(chosen.sum()))


def effect_entry(name: str, kind: str, outcomes: Outcomes) -> dict[str, Any]:
    """Returns the fields of a findings.Effect except its name: a condition's losses against the clean ones, paired.

    Remaining spikes and sinks are counted in the sequences that had what an intervention of this `kind` edits.
    """
    eligible = {"spike": outcomes.spikes > 0, "sink": outcomes.sinks > 0}.get(kind, outcomes.spikes >= 0)
    outcome, clean = outcomes.by_name[name], outcomes.by_name["none"]
    delta = outcome.losses - clean.losses  # (N, T')
    moved = [[none_if_nan(x) for x in tap] for tap in outcome.moved.nanmean(1).tolist()]
    return {
        "edited": outcome.edited,
        "dose": outcome.dose or None,
        "bits_per_byte": outcomes.bits_per_byte(name),
        **metrics.paired_effect(clean.losses.nanmean(1), outcome.losses.nanmean(1)),
        "output": None if outcomes.has_loss else _output_change(outcome, outcomes.classes),
        "by_class": {kind: _class_change(delta, mask) for kind, mask in zip(CLASSES, outcomes.classes, strict=True)},
        "by_position": mean_by_position(delta),
        "spikes_left": remaining_share(outcome.spikes[eligible], outcomes.spikes[eligible]),
        "sinks_left": remaining_share(outcome.sinks[eligible], outcomes.sinks[eligible]),
        "exposed": exposed(outcome) if name.partition("/")[0] in causes.EXPOSING else None,
        "state_change": [StateChange(spike_tokens=spike_tokens, others=others) for spike_tokens, others in moved],
    }


def _output_change(outcome: Outcome, classes: Tensor) -> OutputChange:
    """Returns how far the output states move; `classes` as in Outcomes."""
    change, ci95 = mean_of_sequences(outcome.output.nanmean(1))
    pooled, pooled_ci95 = mean_of_sequences(outcome.pooled)
    by_class = [mean_of_sequences(mean_of_class(outcome.output, mask))[0] for mask in classes]
    return OutputChange(
        change=nan if change is None else change,
        ci95=ci95,
        by_class=dict(zip(CLASSES, by_class, strict=True)),
        pooled=nan if pooled is None else pooled,
        pooled_ci95=pooled_ci95,
    )


def exposed(outcome: Outcome) -> Exposed | None:
    """Returns what became of the sinks downstream of an edit; None if there are none."""
    sums = dict(zip(causes.SUMS, outcome.sums.sum(0).tolist(), strict=True))
    sinks = sums["judged"]
    return Exposed(sinks=int(sinks), left=sums["left"] / sinks, lost=1 - sums["share"] / sinks) if sinks else None


def table_entries(table: Mapping[str, Intervention], outcomes: Outcomes) -> list[Entry]:
    """Returns the findings of a table's interventions, each with its controls."""

    def control_effect(name: str, kind: str, control: str) -> ControlEffect:
        fields = effect_entry(f"{name}/{control}", kind, outcomes)
        return ControlEffect(name=control, text=interventions.CONTROLS[control], **fields)

    return [
        Entry(
            name=name,
            kind=row.kind,
            **effect_entry(name, row.kind, outcomes),
            control=[control_effect(name, row.kind, control) for control in row.controls],
        )
        for name, row in table.items()
    ]


def remaining_share(edited: Tensor, clean: Tensor) -> RemainingShare:
    """Returns the shares of the `clean` counts (N,) that `edited` (N, 2) has: of the very same ones, and of all.

    They are ratios of sums over sequences with bootstrap intervals, and None where the clean counts are 0.
    """
    n = int((clean > 0).sum())
    if not n:
        return RemainingShare(sequences=0, same=None, all=None, ci95=None)
    rates = lambda i: {key: (edited[i, j].sum() / clean[i].sum()).item() for j, key in enumerate(("same", "all"))}
    intervals = ShareIntervals(**metrics.bootstrap_ci(rates, len(clean)))
    return RemainingShare(sequences=n, **rates(torch.arange(len(clean))), ci95=intervals)


def baseline(outcomes: Outcomes) -> Baseline:
    """Returns the clean model's loss, also by token class and by position."""
    losses = outcomes.by_name["none"].losses
    loss = losses.nanmean(1).mean()
    class_loss = lambda mask: ClassLoss(loss=mean_of_sequences(mean_of_class(losses, mask))[0], tokens=int(mask.sum()))
    return Baseline(
        loss=loss.item(),
        ppl=loss.exp().item(),
        bits_per_byte=outcomes.bits_per_byte("none"),
        by_class={kind: class_loss(mask) for kind, mask in zip(CLASSES, outcomes.classes, strict=True)},
        by_position=mean_by_position(losses),
    )


def causes_of(table: Mapping[str, Intervention], outcomes: Outcomes) -> list[Cause]:
    """Says whether sinks need spikes, and spikes sinks, by each intervention of a table that tests it."""
    present = {"sinks": outcomes.sinks, "spikes": outcomes.spikes_at_taps}
    verdicts = []
    for name in (name for name in causes.CAUSES if name in table):
        outcome, asked = outcomes.by_name[name], causes.ASKED[table[name].kind]
        controls = {control: outcomes.by_name[f"{name}/{control}"] for control in table[name].controls}
        sums = {
            control: other.sums
            for control, other in controls.items()
            if other.edited and causes.matches(control, other.dose, outcome.dose)
        }
        states = len(outcomes.states.get(name, ()))
        undone = name in causes.SIZES and _is_undone(outcome, controls.get("same_energy"), outcomes)
        verdicts.append(causes.cause(name, asked, outcome.edited, states, outcome.sums, sums, present[asked], undone))
    return verdicts


def _is_undone(outcome: Outcome, control: Outcome | None, outcomes: Outcomes) -> bool:
    """Whether an edit moves the losses, or the output states, by less than causes.UNDONE of what its control does."""
    clean = outcomes.by_name["none"].losses
    moved = lambda edited: ((edited.losses - clean).abs() if outcomes.has_loss else edited.output).nanmean()
    return control is not None and bool(moved(outcome) < causes.UNDONE * moved(control))


def attention_change(outcomes: Outcomes) -> AttentionChange:
    """Returns entropy and distance of the heads that have sinks: unedited, without sinks, without random other keys."""
    spread = outcomes.spread

    def map_change(i: int) -> MapChange:
        clean, without, control = (spread[name][:, i] for name in ("with", "without", "control"))
        change, ci95 = mean_of_sequences(without - clean)
        control_change, control_ci95 = mean_of_sequences(control - clean)
        return MapChange(
            with_sink=mean_of_sequences(clean)[0],
            without_sink=mean_of_sequences(without)[0],
            change=change,
            ci95=ci95,
            control=ControlChange(name="random_keys", change=control_change, ci95=control_ci95),
        )

    sequences = int((~spread["with"][:, 0].isnan()).sum())
    return AttentionChange(sequences=sequences, entropy=map_change(0), distance=map_change(1))
