"""The measures by which a study compares runs, and how each is read from the findings.

A measure's `kind` says how arms are compared. `plain` numbers and `share`s (0 to 1) are compared by differences, and
`log` numbers, which span orders of magnitude, by factors.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from spikesink import schema
from spikesink.api import Look
from spikesink.edit.findings import Ablation, Blimp, ControlEffect, Entry
from spikesink.edit.quantise import quantised_losses
from spikesink.measure.findings import Findings, LayerStats, RuleCount
from spikesink.measure.sinks import PRIMARY_SINK_EPSILON, PRIMARY_SINK_RULE, SHARE
from spikesink.measure.spikes import PRIMARY_SPIKE_RULE, SPIKE_RULES
from spikesink.text.tokenizers import visible
from studies.runs.rows import Measures, Where


class Measure(NamedTuple):
    """One number of a run."""

    text: str  # what it is, in words
    kind: str
    form: str  # format spec for printing
    read: Callable[[Findings], float | None] | None = None  # None: it is not read from the findings


def _largest(key: str) -> Callable[[Findings], float | None]:
    def read(findings: Findings) -> float | None:
        return max((x for layer in findings.attended if math.isfinite(x := getattr(layer, key))), default=None)

    return read


def _finite(findings: Findings) -> list[LayerStats]:
    """The layers with finite magnitudes. A model that is about to diverge has others too."""
    return [layer for layer in findings.attended if math.isfinite(layer.top1) and math.isfinite(layer.median)]


def _first(rates: list[float]) -> float | None:
    """The first token's share of rates by position."""
    return rates[0] / sum(rates) if sum(rates) else None


def _false_rate(rule: RuleCount) -> float | None:
    """How often a rule fires in the worst of its nulls."""
    return rule.false_positives.rate if rule.false_positives else None


def _punctuation_of_spikes(findings: Findings) -> float | None:
    """The share of the listed spike tokens after the first position that have no letter and no digit."""
    texts = [token.text for token in findings.spikes.primary_tokens if token.position > 0]
    return sum(not any(c.isalnum() for c in visible(text)) for text in texts) / len(texts) if texts else None


def _sequences(rule: str) -> Callable[[Findings], float | None]:
    return lambda findings: findings.measures.rules[rule].sequences


def _overlap(key: str) -> Callable[[Findings], float | None]:
    return lambda findings: getattr(findings.co_occurrence, key)


SINK = f"alpha > {PRIMARY_SINK_EPSILON}"
SPIKE = SPIKE_RULES[PRIMARY_SPIKE_RULE].text

# name -> Measure. `loss` is the trainer's loss on its validation batches; the others are read from detect.py's findings
MEASURES = {
    "loss": Measure("validation loss at the training length, nats per token", "plain", ".4f"),
    "short loss": Measure("loss on detect.py's sequences, nats per token", "plain", ".4f", lambda f: f.data.loss),
    "largest |h|": Measure(
        "largest |h| of a sequence, averaged over sequences, in the layer where that is largest",
        "log",
        ".4g",
        _largest("inf_norm"),
    ),
    "top1/median": Measure(
        "top-1 over the median |h|, in the layer where it is largest; means over sequences",
        "log",
        ".3g",
        lambda f: max((layer.ratio for layer in _finite(f)), default=None),
    ),
    "kurtosis": Measure(
        "He et al.'s channel kurtosis of the layer where it is largest", "log", ".3g", _largest("kurtosis")
    ),
    "spike tokens": Measure(f"share of tokens with {SPIKE}", "share", ".2%", lambda f: f.spikes.primary_rule.fraction),
    "spikes as read": Measure(
        "the same share, in what sub-layers read behind their norms",
        "share",
        ".2%",
        lambda f: f.spikes.read.fraction if f.spikes.read else None,
    ),
    "spikes last": Measure(
        "the same share, at the last tap, which no attention reads", "share", ".2%", lambda f: f.spikes.sum.last
    ),
    "spikes in embedding": Measure(
        "share of the spike tokens that are spikes in the embedding already",
        "share",
        ".0%",
        lambda f: f.spikes.sum.in_embedding,
    ),
    "spike sequences": Measure("share of sequences with a spike token", "share", ".0%", _sequences(PRIMARY_SPIKE_RULE)),
    "first energy": Measure(
        "share of the first token's energy (squared norm) in its largest channel, in the layer where that is largest",
        "share",
        ".0%",
        lambda f: max((x for layer in f.attended if (x := layer.first_energy) is not None), default=None),
    ),
    "first norm": Measure(
        "norm of the first token's state over the median token's, in the layer where that is largest",
        "log",
        ".3g",
        lambda f: max((x for layer in f.attended if (x := layer.first_norm) is not None), default=None),
    ),
    "Sink_1": Measure(
        "Gu et al.'s Sink_1 at epsilon 0.3: share of heads and sequences in which the first key has alpha > 0.3",
        "share",
        ".1%",
        lambda f: f.sinks.at(PRIMARY_SINK_EPSILON).first,
    ),
    "best head": Measure(
        f"share of sequences in which one and the same head has a sink ({SINK}, keys with at least T/4 queries)",
        "share",
        ".0%",
        lambda f: f.measures.rules[PRIMARY_SINK_RULE].best_head,
    ),
    "sink tokens": Measure(
        f"share of tokens with {SINK} in a head", "share", ".2%", lambda f: f.sinks.primary_rule.fraction
    ),
    "first key": Measure("share of all attention on the first key", "share", ".1%", lambda f: f.sinks.share[0]),
    "P(sink | spike)": Measure(
        "share of the spike tokens that are sinks", "share", ".0%", _overlap("p_sink_given_spike")
    ),
    "P(spike | sink)": Measure(
        "share of the sink tokens that are spikes", "share", ".0%", _overlap("p_spike_given_sink")
    ),
    "Jaccard": Measure(
        "tokens that are spike and sink over tokens that are either", "share", ".2f", _overlap("jaccard")
    ),
    "lift": Measure("overlap over the overlap that position alone explains", "log", ".2f", _overlap("lift")),
    "spikes first": Measure(
        "share of the spike tokens that stand first", "share", ".0%", lambda f: _first(f.spikes.by_position)
    ),
    "sinks first": Measure(
        "share of the sink tokens that stand first", "share", ".0%", lambda f: _first(f.sinks.token_rate)
    ),
    "spikes punctuation": Measure(
        "share of the strongest spike tokens after the first position that have no letter and no digit",
        "share",
        ".0%",
        _punctuation_of_spikes,
    ),
    "percentile sequences": Measure(
        f"share of sequences with a token by the percentile rule: {SPIKE_RULES['percentile'].text}",
        "share",
        ".0%",
        _sequences("percentile"),
    ),
    "percentile false": Measure(
        "the same share, in the worst of its nulls", "share", ".0%", lambda f: _false_rate(f.spikes.rules["percentile"])
    ),
    "share sequences": Measure(
        f"share of sequences with a token that gets more than {SHARE:.0%} of all attention",
        "share",
        ".0%",
        _sequences("share"),
    ),
    "share false": Measure(
        "the same share, in the worst of its nulls", "share", ".0%", lambda f: _false_rate(f.sinks.rules["share"])
    ),
}


def from_findings(findings: Findings) -> Measures:
    """{name: number, or None where it is undefined} of detect.py's findings."""
    numbers = {name: measure.read(findings) for name, measure in MEASURES.items() if measure.read}
    return {name: None if x is None or not math.isfinite(x) else x for name, x in numbers.items()}


def _same_size_controls(entry: Entry) -> list[ControlEffect]:
    """The control that moves the states as far as the intervention does, in a list; empty if there is none."""
    return [control for control in entry.controls_that_edited if control.name == "same_energy"]


# measures of an intervention: name -> (Measure, how it is read from the Entry and the change of BLiMP accuracy)
EFFECTS: dict[str, tuple[Measure, Callable[[Entry, float | None], float | None]]] = {
    "loss": (Measure("change of the loss, nats per token", "plain", "+.4f"), lambda e, blimp: e.delta_loss),
    "control loss": (
        Measure("largest change of the loss under its controls", "plain", "+.4f"),
        lambda e, blimp: max((c.delta_loss for c in e.controls_that_edited), default=None),
    ),
    "spikes left": (
        Measure("share of the earlier spikes that remain", "share", ".0%"),
        lambda e, blimp: e.spikes_left.same,
    ),
    "sinks left": (
        Measure("share of the earlier sinks that remain", "share", ".0%"),
        lambda e, blimp: e.sinks_left.same,
    ),
    "exposed lost": (
        Measure("share of alpha lost by the sinks downstream of an edited spike", "share", ".0%"),
        lambda e, blimp: e.exposed.lost if e.exposed else None,
    ),
    "same size loss": (
        Measure("change of the loss when the same tokens move as far in a random direction", "plain", "+.4f"),
        lambda e, blimp: next((c.delta_loss for c in _same_size_controls(e)), None),
    ),
    "same size exposed lost": (
        Measure("share of alpha that the same sinks lose under that control", "share", ".0%"),
        lambda e, blimp: next((c.exposed.lost for c in _same_size_controls(e) if c.exposed), None),
    ),
    "BLiMP": (Measure("change of BLiMP accuracy", "plain", "+.2%"), lambda e, blimp: blimp),
}


def from_ablation(ablation: Ablation) -> dict[str, float | None]:
    """{'spike_zero: loss': number, ...} of ablate.py's findings; None where there was nothing to edit."""
    blimp = ablation.probes.blimp
    accuracy = {c.name: c.accuracy for c in blimp.conditions} if isinstance(blimp, Blimp) else {}
    values: dict[str, float | None] = {}
    for entry in ablation.interventions:
        change = accuracy[entry.name] - accuracy["none"] if entry.name in accuracy else None
        for name, (_, read) in EFFECTS.items():
            values[f"{entry.name}: {name}"] = read(entry, change) if entry.edited else None
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


TABLE_FIELDS = ("edited", "delta_loss", "ci95", "spikes_left", "sinks_left", "exposed")


def ablations(ablation: Ablation) -> dict[str, Any]:
    """The part of ablate.py's findings that goes into a study's table: Ablations as JSON."""
    fields = lambda effect: {key: schema.to_json(getattr(effect, key)) for key in TABLE_FIELDS}
    effects = {
        entry.name: {**fields(entry), "control": [{**fields(each), "name": each.name} for each in entry.control]}
        for entry in ablation.interventions
    }
    return {"interventions": effects, "needs": {cause.by: cause.verdict for cause in ablation.causes}}


def measure_of(name: str) -> Measure:
    """The Measure with this name, which may be that of an effect: "spike_zero: loss". Raises KeyError."""
    if name == "BLiMP":
        return Measure("accuracy on BLiMP's minimal pairs", "share", ".1%")
    intervention, colon, effect = name.partition(": ")
    if not colon:
        return MEASURES[name]
    measure, _ = EFFECTS[effect]
    return measure._replace(text=f"{intervention}: {measure.text}")


def where(findings: Findings) -> Where:
    """The layers and the tokens that have spikes, of detect.py's findings."""
    layers = {layer.name: layer.ratio for layer in _finite(findings)}
    return Where(layers=layers, tokens=dict(Counter(visible(token.text) for token in findings.spikes.primary_tokens)))
