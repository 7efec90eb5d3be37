"""What ablate finds, as dataclasses. They are written as JSON of the same names, and read back with a schema check.

None stands for undefined values, such as a mean over spike tokens where there are none. Losses are in nats per token.
`ci95` is the 95% interval [low, high] of the value before it, by bootstrap over sequences; None for one sequence.
"""

import math
from pathlib import Path
from typing import Any

from .. import schema
from ..measure.findings import CheckpointEntry, Interval, Place, TextEntry
from ..schema import Record, sometimes

SCHEMA = "spikesink-ablation-2"


class Named(Record):
    """A record with a name."""

    name: str


class Unavailable(Record):
    """Stands for a measurement that could not be made; `reason` says why."""

    reason: str


class LossChange(Record):
    """The loss after a change, its perplexity, and its difference from the clean model's, paired by sequence; nan
    without a language-model head."""

    loss: float
    ppl: float
    delta_loss: float
    ci95: Interval | None


# ----------------------------------------------------------------------------------------------- interventions


class ClassLoss(Record):
    """The clean model's loss of predictions made at a class of tokens, and the number of these tokens."""

    loss: float | None
    tokens: int


class Baseline(Record):
    """The clean model's loss, also by class of tokens (outcomes.CLASSES) and by position; without a language-model head
    nan, None and []. `bits_per_byte` is None if the text of the tokens is not known."""

    loss: float
    ppl: float
    bits_per_byte: float | None = sometimes()
    by_class: dict[str, ClassLoss]
    by_position: list[float]


class ClassChange(Record):
    """How the loss of predictions made at a class of tokens changed."""

    delta_loss: float | None
    ci95: Interval | None
    tokens: int


class ShareIntervals(Record):
    """The intervals of a RemainingShare."""

    same: Interval | None
    all: Interval | None


class RemainingShare(Record):
    """The share of spikes or sinks that remain, in the `sequences` that had any. `same` counts the very same ones,
    `all` also counts new ones; both are divided by the number in the clean model."""

    sequences: int
    same: float | None
    all: float | None
    ci95: ShareIntervals | None


class Exposed(Record):
    """The number of `sinks` downstream of edited spikes, the share that still are sinks (`left`), and the mean share of
    their alpha that is `lost` (a gain counts as 100% at most)."""

    sinks: int
    left: float
    lost: float


class OutputChange(Record):
    """How far the output states o of a model without a language-model head move.

    `change`: the mean |o' - o| / |o| over tokens; `by_class`: by outcomes.CLASSES, None without such a token. `pooled`:
    the mean of 1 - cos between a sequence's mean output state before and after, as embeddings of text are compared.
    """

    change: float
    ci95: Interval | None
    by_class: dict[str, float | None]
    pooled: float
    pooled_ci95: Interval | None


class StateChange(Record):
    """The mean |h' - h| / |h| of the states at a tap, over spike tokens and over the others."""

    spike_tokens: float | None
    others: float | None


class Effect(LossChange, Named):
    """What an intervention changes.

    `edited`: how many entries, tokens, keys, heads or sub-layers were edited, over all sequences. `dose`: the squared
    distance of the written states from the clean ones, or the attention of the keys; None if not known. `by_class`: by
    outcomes.CLASSES. `by_position`: the change of the loss. `output`: None with a language-model head. `exposed`: for
    causes.EXPOSING and their controls; None if there are no such sinks. `state_change`: one per tap.
    """

    edited: int
    dose: float | None
    bits_per_byte: float | None = sometimes()
    by_class: dict[str, ClassChange]
    by_position: list[float]
    spikes_left: RemainingShare
    sinks_left: RemainingShare
    output: OutputChange | None = sometimes()
    exposed: Exposed | None = sometimes()
    state_change: list[StateChange]

    @property
    def change(self) -> tuple[float, Interval | None]:
        """The change of the loss, or without a language-model head of the output states; and its interval."""
        return (self.output.change, self.output.ci95) if self.output else (self.delta_loss, self.ci95)


class ControlEffect(Effect):
    """What a control of an intervention changes; `text` says what it edits instead."""

    text: str


class Entry(Effect):
    """What an intervention on spikes, sinks or BOS (`kind`) changes, and what its controls do."""

    kind: str
    control: list[ControlEffect]

    @property
    def controls_that_edited(self) -> list[ControlEffect]:
        """The controls that had something to edit."""
        return [control for control in self.control if control.edited]


class Lost(Record):
    """The share of the judged sinks' alpha, or of the judged spikes' |h|, that is lost; or a difference of two."""

    share: float | None
    ci95: Interval | None


class CauseControl(Named):
    """What is lost under a control, and how much more is lost under the intervention (`beyond`)."""

    lost: Lost
    beyond: Lost


class Cause(Record):
    """Whether the `asked` need the `removed`, each "sinks" or "spikes". See causes.py for the rules.

    `by`: the intervention. `edited`: how many spikes (tokens at taps) or sinks (keys of heads) it was to remove, of
    which `still` many remain. `there`: how many of the `asked` the clean model has. `judged`: how many of these lie
    downstream of the edit, in `sequences` sequences, on tokens with `states` different states; `left` of them remain
    by the rule. `verdict`: yes, partly, no, cannot tell, not removed, out of reach.
    """

    by: str
    removed: str
    asked: str
    edited: int
    still: int
    there: int
    judged: int
    left: int
    sequences: int
    states: int
    lost: Lost
    control: list[CauseControl]
    verdict: str
    reason: str


# ----------------------------------------------------------------------------------------------- attention, int8


class ControlChange(Named):
    """The same change under a control."""

    change: float | None
    ci95: Interval | None


class MapChange(Record):
    """A property of the attention maps of heads that have sinks, with and without their sink keys."""

    with_sink: float | None
    without_sink: float | None
    change: float | None
    ci95: Interval | None
    control: ControlChange


class AttentionChange(Record):
    """Entropy (nats) and mean distance (tokens) of attention, in the `sequences` that have sinks."""

    sequences: int
    entropy: MapChange
    distance: MapChange


class Int8(LossChange):
    """The loss with weights and activations in 8 or 4 bits, and with either alone. What concerns activations is None
    if they stay in float. `weights`, `activations`: which of their entries share a scale."""

    weight_bits: int
    weights: str
    activation_bits: int | None
    activations: str | None
    weights_only: LossChange | None
    activations_only: LossChange | None


# ------------------------------------------------------------------------------------------------------- probes


class Accuracy(Record):
    """The accuracy on `n` items, and its change from the clean model's, paired."""

    n: int
    accuracy: float
    ci95: Interval | None
    change: float
    change_ci95: Interval | None


class BlimpCondition(Accuracy, Named):
    """BLiMP under one condition. For `accuracy_per_token`, scores are means over tokens instead of sums."""

    accuracy_per_token: float
    by_field: dict[str, Accuracy]
    by_phenomenon: dict[str, Accuracy]


class Blimp(Record):
    """BLiMP under every condition, the clean model ("none") first. `left_out`: number of pairs too long for it."""

    normalisation: str
    pairs: int
    left_out: int
    conditions: list[BlimpCondition]


class WordCounts(Record):
    """The number of words that probes were trained and tested on."""

    train: int
    test: int


class Selectivity(Place):
    """A probe on the states at a tap: its accuracy, its control task's, and their difference (`selectivity`). `change`
    is selectivity minus the clean model's, `accuracy_change` is the same for accuracy."""

    index: int
    accuracy: float
    ci95: Interval
    control_accuracy: float
    selectivity: float
    selectivity_ci95: Interval
    change: float
    change_ci95: Interval
    accuracy_change: float
    accuracy_change_ci95: Interval


class LinearCondition(Named):
    """Linear probes under one condition: one per task and tap."""

    tasks: dict[str, list[Selectivity]]


class Linear(Record):
    """Linear probes under every condition, the clean model ("none") first. `left_out`: number of words that do not fit
    into the model or have no token of their own. `majority`: task -> accuracy of the commonest answer."""

    pooling: str
    features: str
    classifier: str
    words: WordCounts
    left_out: int
    majority: dict[str, float]
    conditions: list[LinearCondition]


class ChoicesCondition(Accuracy, Named):
    """Multiple choice under one condition: acc, and acc_norm as `normalised`."""

    normalised: Accuracy


class Choices(Record):
    """Multiple choice under every condition, the clean model ("none") first. `cropped`: number of questions whose start
    the model cannot read; `left_out`: number with too long an ending; `chance`: the accuracy of guessing."""

    questions: int
    left_out: int
    cropped: int
    chance: float
    conditions: list[ChoicesCondition]


class Probes(Record):
    """Grammar, linear probes and multiple choice under every condition; None if not asked for."""

    blimp: Blimp | Unavailable | None = sometimes()
    linear: Linear | Unavailable | None = sometimes()
    choices: Choices | Unavailable | None = sometimes()


# ------------------------------------------------------------------------------------------------------ samples


class Continuation(Record):
    """What a model wrote after a prompt: ids (n_tokens,), their text, and the clean model's loss on as many of the last
    ones as fit into it, in nats per token."""

    ids: list[int]
    text: str
    loss: float

    @property
    def repeated(self) -> float:
        """The share of runs of four tokens that occurred earlier in the continuation."""
        runs = [*zip(*(self.ids[i:] for i in range(4)), strict=False)]
        return 1 - len({*runs}) / len(runs) if runs else 0.0


class Samples(Record):
    """Continuations of a prompt by the clean model, and with the same seeds under an `edit`.

    `n_edited`: how many entries, tokens, keys, heads or sub-layers it edited, over all passes. `reference`: the text
    that gives usual magnitudes, and means where the edit needs them.
    """

    prompt: str
    clean: list[Continuation]
    edit: str | None = None
    edited: list[Continuation] | None = None
    n_edited: int = 0
    reference: str | None = None


# --------------------------------------------------------------------------------------------------- everything


class Calibration(Record):
    """The other text, which gives means, directions, the step-up and int8's ranges."""

    n_seq: int


class Ablation(Record):
    """What changes in a model, or in a part of an encoder-decoder, under every intervention.

    `checkpoint`, `model` and `data` are as in detect's findings. `int8`: by quantise.SCHEMES. `causes`: whether sinks
    need spikes, and spikes sinks, by intervention. `parts`: the other parts of an encoder-decoder, by name.
    """

    schema: str = SCHEMA
    checkpoint: CheckpointEntry
    model: dict[str, Any]
    data: TextEntry
    part: str
    calibration: Calibration
    note: str
    taps: list[Place]
    baseline: Baseline
    interventions: list[Entry]
    removals: list[Entry]
    causes: list[Cause]
    attention: AttentionChange
    int8: Unavailable | dict[str, Int8]
    probes: Probes
    parts: "dict[str, Ablation] | None" = sometimes()

    @property
    def has_loss(self) -> bool:
        """Whether there is a loss; without a language-model head, edits have an `output` in its place."""
        return not math.isnan(self.baseline.loss)

    @property
    def entries(self) -> list[Entry]:
        """All interventions: those on single entries and keys, then those on whole tokens, heads and sub-layers."""
        return self.interventions + self.removals

    @property
    def all_parts(self) -> "list[tuple[str, Ablation]]":
        """(name, findings) of this part and of the others; the name is empty if there is one part."""
        return [(self.part, self), *(self.parts or {}).items()]

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically. Raises UserError."""
        schema.save(path, self)

    @classmethod
    def load(cls, path: str | Path) -> "Ablation":
        """Reads what `save` wrote. Raises UserError if it cannot be read or has another schema."""
        return schema.load(cls, path, "ablate")
