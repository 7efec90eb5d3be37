"""What an intervention changes: the loss, where it changes, which spikes and sinks are left, how far states move.

Everything is kept per sequence, so that every interval is a bootstrap over sequences, paired with the clean model's.
"""

import contextlib
import functools
import math
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from ..hooks import hooked, on_streams
from ..measure import metrics
from ..measure.sinks import sinks_in
from ..measure.spikes import spike_entries
from ..models.subject import batches, map_rows
from . import interventions

CLASSES = ("spike", "sink", "after", "other")
ENOUGH = 10  # sequences that have a phenomenon: with fewer, whether it needs the other is not said
nan = float("nan")


@dataclass
class Outcome:
    """What was measured under one intervention: sums per sequence, N of them, and the losses (N, T - shift)."""

    losses: torch.Tensor  # nan where there is no prediction
    edited: int = 0
    spikes: torch.Tensor = None  # (N, 2): tokens that were spikes and still are; that are now
    sinks: torch.Tensor = None  # (N, 2): (head, key) pairs, alike
    moved: torch.Tensor = None  # (taps, N, 2): mean |h' - h| / |h| of spike tokens and of the others; nan without


@dataclass
class Measured:
    """All outcomes on the same sequences, and what the clean model showed on them."""

    outcomes: dict  # name -> Outcome; "none" is the clean model
    classes: torch.Tensor  # bool (4, N, T - shift): CLASSES of the token at which a prediction is made
    spikes: torch.Tensor  # (N,): spike tokens in the clean model
    sinks: torch.Tensor  # (N,): (head, key) sinks in the clean model
    spread: dict = field(default_factory=dict)  # of `spread_of`: name -> (N, 2), nan without sinks


def measure(subject, ids, conditions, batch_size, desc="ablate"):
    """Runs every condition, name -> function(Clean) -> Edit, on ids (N, T). Returns a Measured.

    Batch by batch: one clean pass, then each condition from the first stage that it touches on.
    """
    N, T = len(ids), ids.size(1) - subject.shift
    result = Measured({}, torch.zeros(len(CLASSES), N, T, dtype=torch.bool), torch.zeros(N), torch.zeros(N))
    new = lambda: Outcome(
        torch.full((N, T), nan, dtype=torch.float64),
        spikes=torch.zeros(N, 2),
        sinks=torch.zeros(N, 2),
        moved=torch.full((len(subject.streams), N, 2), nan),
    )
    result.outcomes = {name: new() for name in ("none", *conditions)}
    for name in ("with", "without", "control"):
        result.spread[name] = torch.full((N, 2), nan)
    parts = [*batches(ids, batch_size)]
    with tqdm(total=len(parts) * (len(conditions) + 1), desc=desc, disable=None, leave=False) as bar:
        for rows, batch in parts:
            clean = _clean(subject, batch, rows, result)
            bar.update()
            for name, condition in conditions.items():
                bar.set_postfix_str(name, refresh=False)
                _under(condition(clean), clean, rows, result.outcomes[name])
                bar.update()
    return result


def _clean(subject, batch, rows, result):
    """The clean pass over one batch; fills in what it showed."""
    calls = []
    keep = lambda module, args, kwargs, output: calls.append((module, *args[:2]))
    clean = interventions.Clean.of(subject, batch, rows, watch=[(tap.module, keep) for tap in subject.attends])
    outcome = result.outcomes["none"]
    T = clean.losses.size(1)
    outcome.losses[rows, :T] = clean.losses.double()
    result.spikes[rows] = clean.spike_tokens.sum(1).float()
    result.sinks[rows] = sum(found.sum((1, 2)) for found in clean.sinks).float()
    outcome.spikes[rows] = result.spikes[rows, None].expand(-1, 2)
    outcome.sinks[rows] = result.sinks[rows, None].expand(-1, 2)
    if subject.part != "cross":  # whose keys are not the tokens at which predictions are made
        result.classes[:, rows, :T] = classes_of(clean)[..., subject.n_register :][..., :T]
    for name, keys in (
        ("with", None),
        ("without", clean.sinks),
        ("control", interventions.keys_of(clean, "random_keys")),
    ):
        result.spread[name][rows] = spread_of(clean, calls, keys)
    return clean


def classes_of(clean):
    """CLASSES of tokens: bool (4, B, T). `after`: right after a spike or a sink; `other`: none of the three."""
    spike, sink = clean.spike_tokens, clean.sink_tokens
    after = torch.zeros_like(spike)
    after[:, 1:] = (spike | sink)[:, :-1]
    return torch.stack((spike, sink, after, ~(spike | sink | after)))


@torch.no_grad()
def spread_of(clean, calls, masked=None):
    """Entropy (nats) and mean distance (tokens) of the maps of heads that have a sink, averaged over them: (B, 2).

    `masked`: per seam keys (B, H, T) that get no attention but for their own query, the rest of each row renormalised;
    q and k are the clean model's. nan for a sequence without sinks.
    """
    total, heads = torch.zeros(len(clean.ids), 2), torch.zeros(len(clean.ids), 1)
    for i, (seam, q, k) in enumerate(calls):
        wanted = clean.sinks[i].any(-1)  # (B, H)
        if not wanted.any():
            continue
        bias = None
        if masked is not None:
            of = masked[i].to(q.device)[:, :, None]
            bias = torch.zeros(of.shape, device=q.device).masked_fill(of, -torch.inf)
        sums = torch.zeros(2, *wanted.shape)
        for first, weights in map_rows(seam, q, k, clean.subject.causal, bias):
            query = torch.arange(first, first + weights.size(-2), device=q.device)[:, None]
            distance = (query - torch.arange(weights.size(-1), device=q.device)).abs()
            sums[0] -= torch.special.xlogy(weights, weights).sum((-1, -2)).cpu()
            sums[1] += (weights * distance).sum((-1, -2)).cpu()
        total += (sums * wanted).sum(-1).T / q.size(-2)
        heads += wanted.sum(-1, keepdim=True)
    return torch.where(heads > 0, total / heads.clamp_min(1), nan)


@torch.no_grad()
def _under(edit, clean, rows, outcome):
    """One pass under an edit, with the stages before it as they were; fills in the outcome of these sequences."""
    subject = clean.subject
    first = edit.stage
    tokens = clean.spike_tokens
    still = torch.zeros_like(tokens)
    counts = torch.zeros(len(rows), 2)

    def on_stream(i):
        def function(x):
            x = x.view(clean.streams[i].shape)
            still.logical_or_(spike_entries(x).any(-1).cpu())
            old = clean.streams[i].float()
            relative = ((x.float() - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(1e-30)).cpu()
            for kind, of in enumerate((tokens, ~tokens)):
                mean = (relative * of).sum(1) / of.sum(1)  # nan without any
                outcome.moved[i, rows, kind] = mean

        return function

    def on_attention(i):
        def hook(module, args, kwargs, output):
            now = sinks_in(module, *args[:2], subject.causal, kwargs.get("bias"), edit.rows.get(i))
            counts.add_(torch.stack(((now & clean.sinks[i]).sum((1, 2)), now.sum((1, 2))), dim=1))

        return hook

    live = [subject.stage_of(tap) >= first for tap in subject.streams]
    for i in range(len(live)):
        if not live[i]:  # before the edit: as it was
            still |= clean.spikes[i].any(-1).cpu()
            for kind, of in enumerate((tokens, ~tokens)):
                outcome.moved[i, rows, kind] = torch.where(of.any(1), 0.0, nan)
    watched = []
    for i, tap in enumerate(subject.attends):
        if subject.stage_of(tap) >= first:
            watched.append((tap.module, on_attention(i)))
        else:
            counts += clean.sinks[i].sum((1, 2))[:, None]
    taps = [(tap, on_stream(i)) for i, tap in enumerate(subject.streams) if live[i]]
    with contextlib.ExitStack() as stack:
        stack.enter_context(clean.prefix(first))
        stack.enter_context(edit)
        stack.enter_context(on_streams([tap for tap, _ in taps], [function for _, function in taps]))
        stack.enter_context(hooked(watched))
        losses = subject.losses(clean.ids)
    outcome.losses[rows, : losses.size(1)] = losses.double()
    outcome.edited += edit.edited
    outcome.spikes[rows] = torch.stack(((still & tokens).sum(1), still.sum(1)), dim=1).float()
    outcome.sinks[rows] = counts


# ------------------------------------------------------------------------------------------------- findings


def interval_of(values):
    """(mean, its 95% interval) of values (N,) of sequences, nan left out; (None, None) without any."""
    values = values[~values.isnan()].double()
    if not len(values):
        return None, None
    return values.mean().item(), metrics.bootstrap_ci(lambda i: values[i].mean().item(), len(values))


def effect(name, kind, measured):
    """The findings' entry of one intervention: its loss against the clean one, paired by sequence.

    What is left is counted in the sequences that had what an intervention of this `kind` edits.
    """
    among = {"spike": measured.spikes > 0, "sink": measured.sinks > 0}.get(kind, measured.spikes >= 0)
    outcome, clean = measured.outcomes[name], measured.outcomes["none"]
    delta = outcome.losses - clean.losses  # (N, T')
    return {
        "edited": outcome.edited,
        **metrics.paired_effect(clean.losses.nanmean(1), outcome.losses.nanmean(1)),
        "by_class": {
            of: dict(zip(("delta_loss", "ci95"), interval_of(of_class(delta, at)), strict=True), tokens=int(at.sum()))
            for of, at in zip(CLASSES, measured.classes, strict=True)
        },
        "by_position": [round(x, 6) for x in delta.nanmean(0).tolist()],
        "spikes_left": left(outcome.spikes[among], measured.spikes[among]),
        "sinks_left": left(outcome.sinks[among], measured.sinks[among]),
        "state_change": [
            dict(zip(("spike_tokens", "others"), map(defined, tap), strict=True))
            for tap in outcome.moved.nanmean(1).tolist()
        ],
    }


def defined(value):
    """A float for JSON: None for nan."""
    return None if math.isnan(value) else value


def of_class(delta, chosen):
    """Mean of delta (N, T') over the chosen tokens of each sequence: (N,), nan without any."""
    return delta.where(chosen, nan).nanmean(1)


def left(now, before):
    """Which part of what was there is left: `same` (the very ones) and `all` (how many there are now) over `before`.

    Ratios of sums over sequences, their intervals by bootstrap; None where nothing was there.
    """
    n = int((before > 0).sum())
    if not n:
        return {"sequences": 0, "same": None, "all": None, "ci95": None}
    rates = lambda i: {key: (now[i, j].sum() / before[i].sum()).item() for j, key in enumerate(("same", "all"))}
    everything = rates(torch.arange(len(before)))
    return {"sequences": n, **everything, "ci95": metrics.bootstrap_ci(rates, len(before))}


def baseline(measured):
    """The findings' entry of the clean model: its loss, by token class and by position."""
    losses = measured.outcomes["none"].losses
    loss = losses.nanmean(1).mean()
    return {
        "loss": loss.item(),
        "ppl": loss.exp().item(),
        "by_class": {
            kind: {"loss": interval_of(of_class(losses, of))[0], "tokens": int(of.sum())}
            for kind, of in zip(CLASSES, measured.classes, strict=True)
        },
        "by_position": [round(x, 6) for x in losses.nanmean(0).tolist()],
    }


REMOVE_SPIKES, REMOVE_SINKS = "spike_zero", "sink_mask"


def two_by_two(entries):
    """The causal 2 x 2: remove spikes - do sinks remain? Remove sinks - do spikes remain? From the findings' entries.

    `needs`: "yes" if less than half is left, and less than under every control (intervals apart); "no" if more than
    half is left; "underpowered" where fewer than ENOUGH sequences have it, or nothing was removed; else "unclear".
    """
    by_name = {entry["name"]: entry for entry in entries}
    cells = {}
    for removed, name, asked in (("spikes", REMOVE_SPIKES, "sinks"), ("sinks", REMOVE_SINKS, "spikes")):
        if name in by_name:
            entry = by_name[name]
            cells[f"remove_{removed}"] = {
                "by": name,
                "edited": entry["edited"],
                "spikes_remain": entry["spikes_left"],
                "sinks_remain": entry["sinks_left"],
                "control": [
                    {"name": c["name"], "spikes_remain": c["spikes_left"], "sinks_remain": c["sinks_left"]}
                    for c in entry["control"]
                    if c["edited"]
                ],
                "asked": f"{asked}_remain",
                "needs": needs(entry, f"{asked}_left"),
            }
    return cells


def needs(entry, key):
    """Whether what is asked for (`key`) needs what was removed: see `two_by_two`."""
    real = entry[key]
    controls = [c[key] for c in entry["control"] if c["edited"]]
    if not entry["edited"] or real["sequences"] < ENOUGH or not controls:
        return "underpowered"
    low, high = real["ci95"]["same"]
    if low > 0.5:
        return "no"
    if high < 0.5 and all(high < c["ci95"]["same"][0] for c in controls):
        return "yes"
    return "unclear"


def attention(measured):
    """Entropy and distance of the heads that have sinks: as they are, without the sink keys, without random others."""
    found = {"sequences": int((~measured.spread["with"][:, 0].isnan()).sum())}
    for i, kind in enumerate(("entropy", "distance")):
        part = {name: values[:, i] for name, values in measured.spread.items()}
        mean = lambda values: interval_of(values)[0]
        without, control = part["without"] - part["with"], part["control"] - part["with"]
        found[kind] = {
            "with_sink": mean(part["with"]),
            "without_sink": mean(part["without"]),
            "change": mean(without),
            "ci95": interval_of(without)[1],
            "control": {"name": "random_keys", "change": mean(control), "ci95": interval_of(control)[1]},
        }
    return found


def conditions_of(table, reference):
    """name -> function(Clean) -> Edit, for every intervention of a table and, as 'name/control', its controls."""
    conditions = {}
    for name, one in table.items():
        for control in (None, *one.controls):
            key = f"{name}/{control}" if control else name
            conditions[key] = functools.partial(one.edit, reference=reference, control=control)
    return conditions


def edited_losses(subject, ids, edits, reference, batch_size=8):
    """The mean loss of each sequence of ids (N, T) under all `edits`: (N,), float64. Each: (clean, reference=) -> Edit.

    What is edited is fixed by the clean model, batch by batch.
    """
    losses = torch.empty(len(ids), dtype=torch.float64)
    for rows, batch in batches(ids, batch_size):
        clean = interventions.Clean.of(subject, batch, rows)
        made = [edit(clean, reference=reference) for edit in edits]
        with contextlib.ExitStack() as stack:
            stack.enter_context(clean.prefix(min(edit.stage for edit in made)))
            for edit in made:
                stack.enter_context(edit)
            losses[rows] = subject.losses(batch).double().mean(1)
    return losses


def on_texts(subject, conditions, shared):
    """The conditions as probes take them: name -> function(ids (B, T), numbers (B,)) -> context manager.

    One clean pass for all conditions that are asked for the same batch in a row. `shared`: the stages before an edit
    are not computed again, so taps inside them are not called.
    """
    last = {}

    def under(condition, ids, numbers):
        if last.get("ids") is not ids:
            last.update(ids=ids, clean=interventions.Clean.of(subject, ids, numbers))
        stack = contextlib.ExitStack()
        edit = condition(last["clean"])
        if shared:
            stack.enter_context(last["clean"].prefix(edit.stage))
        stack.enter_context(edit)
        return stack

    return {name: functools.partial(under, condition) for name, condition in conditions.items()}


def entries(table, measured):
    """The findings' list of a table's interventions, each with its controls."""
    return [
        {
            "name": name,
            "kind": one.kind,
            **effect(name, one.kind, measured),
            "control": [
                {
                    "name": control,
                    "text": interventions.CONTROLS[control],
                    **effect(f"{name}/{control}", one.kind, measured),
                }
                for control in one.controls
            ],
        }
        for name, one in table.items()
    ]
