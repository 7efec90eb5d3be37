"""The measures by which a study compares runs, and how each is read from the findings.

A measure's `kind` says how arms are compared. `plain` numbers and `share`s (0 to 1) are compared by differences, and
`log` numbers, which span orders of magnitude, by factors.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, Generic, NamedTuple, TypeVar

from spikesink.api import Look
from spikesink.edit.findings import Ablation, Blimp, ControlEffect, Entry
from spikesink.edit.quantise import quantised_losses
from spikesink.measure.findings import Findings, LayerStats, RuleCount
from spikesink.measure.sinks import PRIMARY_SINK_EPSILON, PRIMARY_SINK_RULE
from spikesink.measure.spikes import PRIMARY_SPIKE_RULE
from spikesink.text.tokenizers import visible
from studies.runs.rows import Ablations, Change, Control, Effect, Measures, Where

T = TypeVar("T")


class Measure(NamedTuple, Generic[T]):
    """One number of a run."""

    kind: str
    form: str  # format spec for printing
    read: Callable[[T], float | None] | None = None  # how it is read from findings (T); None: it is not


def known(numbers: Iterable[float | None]) -> list[float]:
    """The numbers that are defined."""
    return [x for x in numbers if x is not None]


def _largest(numbers: Iterable[float]) -> float | None:
    """The largest of the finite numbers. A model that is about to diverge has others too."""
    return max(filter(math.isfinite, numbers), default=None)


def _finite(findings: Findings) -> list[LayerStats]:
    """The layers with finite magnitudes."""
    return [layer for layer in findings.attended if math.isfinite(layer.top1) and math.isfinite(layer.median)]


def _first(rates: list[float]) -> float | None:
    """The first token's share of rates by position."""
    return rates[0] / sum(rates) if sum(rates) else None


def _false_rate(rule: RuleCount) -> float | None:
    """How often a rule fires in the worst of its nulls."""
    return rule.false_positives.rate if rule.false_positives else None


def _punctuation_of_spikes(findings: Findings) -> float | None:
    texts = [token.text for token in findings.spikes.primary_tokens if token.position > 0]
    return sum(not any(c.isalnum() for c in visible(text)) for text in texts) / len(texts) if texts else None


# name -> Measure. Magnitudes are averaged over sequences, and taken from the layer where they are largest. "tokens" and
# "sequences" are shares: of tokens that are one, of sequences that have one.
MEASURES: dict[str, Measure[Findings]] = {
    "loss": Measure("plain", ".4f"),  # the trainer's, on its validation batches, nats per token
    "short loss": Measure("plain", ".4f", lambda f: f.data.loss),  # on detect.py's sequences
    "largest |h|": Measure("log", ".4g", lambda f: _largest(layer.inf_norm for layer in f.attended)),
    "top1/median": Measure("log", ".3g", lambda f: max((layer.ratio for layer in _finite(f)), default=None)),
    "kurtosis": Measure("log", ".3g", lambda f: _largest(layer.kurtosis for layer in f.attended)),  # He et al.'s
    "spike tokens": Measure("share", ".2%", lambda f: f.spikes.primary_rule.fraction),
    # the same, in what sub-layers read behind their norms
    "spikes as read": Measure("share", ".2%", lambda f: f.spikes.read.fraction if f.spikes.read else None),
    "spikes last": Measure("share", ".2%", lambda f: f.spikes.sum.last),  # at the last tap, which no attention reads
    # share of the spike tokens that are spikes in the embedding already
    "spikes in embedding": Measure("share", ".0%", lambda f: f.spikes.sum.in_embedding),
    "spike sequences": Measure("share", ".0%", lambda f: f.measures.rules[PRIMARY_SPIKE_RULE].sequences),
    # share of the first token's energy (squared norm) in its largest channel
    "first energy": Measure("share", ".0%", lambda f: max(known(x.first_energy for x in f.attended), default=None)),
    # norm of the first token's state over the median token's
    "first norm": Measure("log", ".3g", lambda f: max(known(x.first_norm for x in f.attended), default=None)),
    # Gu et al.'s at epsilon 0.3: share of heads and sequences in which the first key has alpha > 0.3
    "Sink_1": Measure("share", ".1%", lambda f: f.sinks.at(PRIMARY_SINK_EPSILON).first),
    # share of sequences in which one and the same head has a sink (alpha > 0.3, keys with at least T/4 queries)
    "best head": Measure("share", ".0%", lambda f: f.measures.rules[PRIMARY_SINK_RULE].best_head),
    "sink tokens": Measure("share", ".2%", lambda f: f.sinks.primary_rule.fraction),  # alpha > 0.3 in a head
    "first key": Measure("share", ".1%", lambda f: f.sinks.share[0]),  # share of all attention on it
    "P(sink | spike)": Measure("share", ".0%", lambda f: f.co_occurrence.p_sink_given_spike),
    "P(spike | sink)": Measure("share", ".0%", lambda f: f.co_occurrence.p_spike_given_sink),
    "Jaccard": Measure("share", ".2f", lambda f: f.co_occurrence.jaccard),  # spike and sink over spike or sink
    "lift": Measure("log", ".2f", lambda f: f.co_occurrence.lift),  # overlap over what position alone explains
    # share of the spike tokens, and of the sink tokens, that stand first
    "spikes first": Measure("share", ".0%", lambda f: _first(f.spikes.by_position)),
    "sinks first": Measure("share", ".0%", lambda f: _first(f.sinks.token_rate)),
    # share of the strongest spike tokens after the first position that have no letter and no digit
    "spikes punctuation": Measure("share", ".0%", _punctuation_of_spikes),
    # the percentile rule's sequences, and those in the worst of its nulls
    "percentile sequences": Measure("share", ".0%", lambda f: f.measures.rules["percentile"].sequences),
    "percentile false": Measure("share", ".0%", lambda f: _false_rate(f.spikes.rules["percentile"])),
    # the same for tokens that get more than 20% of all attention (sinks.SHARE)
    "share sequences": Measure("share", ".0%", lambda f: f.measures.rules["share"].sequences),
    "share false": Measure("share", ".0%", lambda f: _false_rate(f.sinks.rules["share"])),
}


def from_findings(findings: Findings) -> Measures:
    """{name: number, or None where it is undefined} of detect.py's findings."""
    numbers = {name: measure.read(findings) for name, measure in MEASURES.items() if measure.read}
    return {name: None if x is None or not math.isfinite(x) else x for name, x in numbers.items()}


def _same_size(entry: Entry) -> list[ControlEffect]:
    """The control that moves the states as far as the intervention does, in a list; empty if there is none."""
    return [control for control in entry.controls_that_edited if control.name == "same_energy"]


# measures of an intervention: name -> Measure, read from its Entry
EFFECTS: dict[str, Measure[Entry]] = {
    # change of the loss, nats per token, and the largest under its controls
    "loss": Measure("plain", "+.4f", lambda e: e.delta_loss),
    "control loss": Measure(
        "plain", "+.4f", lambda e: max((c.delta_loss for c in e.controls_that_edited), default=None)
    ),
    # shares of the earlier spikes, and of the earlier sinks, that remain
    "spikes left": Measure("share", ".0%", lambda e: e.spikes_left.same),
    "sinks left": Measure("share", ".0%", lambda e: e.sinks_left.same),
    # share of alpha lost by the sinks downstream of an edited spike
    "exposed lost": Measure("share", ".0%", lambda e: e.exposed.lost if e.exposed else None),
    # change of the loss, and share of alpha lost, when the same tokens move as far in a random direction
    "same size loss": Measure("plain", "+.4f", lambda e: next((c.delta_loss for c in _same_size(e)), None)),
    "same size exposed lost": Measure(
        "share", ".0%", lambda e: next((c.exposed.lost for c in _same_size(e) if c.exposed), None)
    ),
    # change of the accuracy on BLiMP's minimal pairs, which is not in the Entry
    "BLiMP": Measure("plain", "+.2%"),
}


def from_ablation(ablation: Ablation) -> Measures:
    """{'spike_zero: loss': number, ...} of ablate.py's findings; None where there was nothing to edit."""
    blimp = ablation.probes.blimp
    accuracy = {c.name: c.accuracy for c in blimp.conditions} if isinstance(blimp, Blimp) else {}
    values: Measures = {}
    for entry in ablation.interventions:
        change = accuracy[entry.name] - accuracy["none"] if entry.name in accuracy else None
        for name, effect in EFFECTS.items():
            number = effect.read(entry) if effect.read else change
            values[f"{entry.name}: {name}"] = number if entry.edited else None
    if accuracy:
        values["BLiMP"] = accuracy["none"]
    return values


def int8_costs(look: Look) -> Measures:
    """{'int8 per tensor: loss': nats, ...} of an open model: the cost of 8 and of 4 bits, together and for weights and
    activations alone."""
    subject, batch_size = look.subjects[0], look.options.batch_size
    return {
        f"{'' if 'int4' in name else 'int8 '}{name.replace('_', ' ')}{half}: loss": change.delta_loss
        for name, cost in quantised_losses(subject, look.ids, look.other_ids, batch_size).items()
        for half, change in (("", cost), (", weights", cost.weights_only), (", activations", cost.activations_only))
        if change
    }


def ablations(ablation: Ablation) -> Ablations:
    """The part of ablate.py's findings that goes into a study's table."""
    names = [f.name for f in fields(Change)] + ["exposed"]
    shown = lambda effect: {name: getattr(effect, name) for name in names}
    effects = {
        entry.name: Effect(**shown(entry), control=[Control(**shown(each), name=each.name) for each in entry.control])
        for entry in ablation.interventions
    }
    return Ablations(effects, {cause.by: cause.verdict for cause in ablation.causes})


def measure_of(name: str) -> Measure[Any]:
    """The Measure with this name, which may be that of an effect: "spike_zero: loss". Raises KeyError."""
    if name == "BLiMP":  # the accuracy on its minimal pairs
        return Measure("share", ".1%")
    _, colon, effect = name.partition(": ")
    return EFFECTS[effect] if colon else MEASURES[name]


def where(findings: Findings) -> Where:
    """The layers and the tokens that have spikes, of detect.py's findings."""
    layers = {layer.name: layer.ratio for layer in _finite(findings)}
    return Where(layers, dict(Counter(visible(token.text) for token in findings.spikes.primary_tokens)))
