"""What ablate finds, as dataclasses; written as JSON of the same names, and read back with a check of the schema.

None: undefined, as the mean over spike tokens where there are none. Losses: nats per token. `ci95`: the 95% interval
[low, high] of what stands before it, by bootstrap over sequences; None where undefined, as for one sequence.
"""

from pathlib import Path
from typing import Any

from .. import schema
from ..measure.findings import CheckpointEntry, Interval, Place, TextEntry
from ..schema import Record, sometimes

SCHEMA = "spikesink-ablation-2"


class Named(Record):
    """What has a name."""

    name: str


class Unavailable(Record):
    """What could not be measured, and why."""

    reason: str


class LossChange(Record):
    """The loss after a change, its exponential, and its difference from the clean model's, paired by sequence."""

    loss: float
    ppl: float
    delta_loss: float
    ci95: Interval | None


# ----------------------------------------------------------------------------------------------- interventions


class ClassLoss(Record):
    """The clean model's loss of predictions made at a class of tokens, and how many tokens that are."""

    loss: float | None
    tokens: int


class Baseline(Record):
    """The clean model: its loss, by class of tokens (outcomes.CLASSES), and by position. `bits_per_byte`: None where
    the text of the tokens is not at hand."""

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
    """The intervals of a Left."""

    same: Interval | None
    all: Interval | None


class Left(Record):
    """Which part of the spikes or sinks is left, in the `sequences` that had any: the `same`, the very ones, over
    those that were there; `all`: those there now over those that were there."""

    sequences: int
    same: float | None
    all: float | None
    ci95: ShareIntervals | None


class Exposed(Record):
    """Of the sinks that lie downstream of a spike that was edited: how many there are, the share that still are sinks,
    and the share of their alpha that is lost, in the mean over them (a gain counts as 100% at most)."""

    sinks: int
    left: float
    lost: float


class StateChange(Record):
    """The mean |h' - h| / |h| of the states at a tap, of spike tokens and of the others."""

    spike_tokens: float | None
    others: float | None


class Effect(LossChange, Named):
    """What an intervention changes.

    `edited`: entries, tokens, keys, heads or sub-layers, over all sequences. `dose`: the squared distance
    from the clean states of what was written, or the attention of the keys; None where that is not known. `by_class`:
    by outcomes.CLASSES. `by_position`: the change of the loss. `exposed`: of causes.EXPOSING, and of their controls;
    None where there are no such sinks. `state_change`: one per tap.
    """

    edited: int
    dose: float | None
    bits_per_byte: float | None = sometimes()
    by_class: dict[str, ClassChange]
    by_position: list[float]
    spikes_left: Left
    sinks_left: Left
    exposed: Exposed | None = sometimes()
    state_change: list[StateChange]


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
    """What is lost under a control, and how much more than that under the intervention."""

    lost: Lost
    beyond: Lost


class Cause(Record):
    """Does what is `asked` for need what was `removed`? "sinks" or "spikes", either. See causes.py for the rules.

    `by`: an intervention. `edited`: spikes (tokens at taps) or sinks (keys of heads) that it was to remove; `still`:
    of these, how many are there. `there`: how many there are of what is asked for; `judged`: of these, those downstream
    of the edit, in so many `sequences` and on tokens of so many different `states`; `left`: of the judged ones, by the
    rule. `verdict`: yes, partly, no, cannot tell, not removed, out of reach.
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
    """A property of the maps of heads that have sinks: as they are, and without their sink keys."""

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
    """What 8 or 4 bits cost: weights and activations, and either alone; None where activations stay in float.
    `weights`, `activations`: which of their entries share a scale."""

    weight_bits: int
    weights: str
    activation_bits: int | None
    activations: str | None
    weights_only: LossChange | None
    activations_only: LossChange | None


# ------------------------------------------------------------------------------------------------------- probes


class Accuracy(Record):
    """The accuracy on `n` minimal pairs, and its change against the clean model, paired."""

    n: int
    accuracy: float
    ci95: Interval | None
    change: float
    change_ci95: Interval | None


class BlimpCondition(Accuracy, Named):
    """BLiMP under one condition. `accuracy_per_token`: scores are means over tokens instead of sums."""

    accuracy_per_token: float
    by_field: dict[str, Accuracy]
    by_phenomenon: dict[str, Accuracy]


class Blimp(Record):
    """BLiMP under every condition, the clean model ("none") first. `left_out`: pairs too long for the model."""

    normalisation: str
    pairs: int
    left_out: int
    conditions: list[BlimpCondition]


class WordCounts(Record):
    """How many words probes were trained and tested on."""

    train: int
    test: int


class Selectivity(Place):
    """A probe on the states at a tap: accuracy, that of its control task, their difference (`selectivity`), and how
    selectivity (`change`) and accuracy differ from the clean model's."""

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
    """Linear probes under one condition: of every task one per tap."""

    tasks: dict[str, list[Selectivity]]


class Linear(Record):
    """Linear probes under every condition, the clean model ("none") first. `left_out`: words too many for the model, or
    without a token of their own.

    `majority`: of each task the accuracy of the commonest answer.
    """

    pooling: str
    features: str
    classifier: str
    words: WordCounts
    left_out: int
    majority: dict[str, float]
    conditions: list[LinearCondition]


class ChoicesCondition(Accuracy, Named):
    """Multiple choice under one condition: acc; `normalised`: acc_norm."""

    normalised: Accuracy


class Choices(Record):
    """Multiple choice under every condition, the clean model ("none") first. `cropped`: questions too long for the
    model, of which the start is not read; `left_out`: those with an ending that is; `chance`: of a guess."""

    questions: int
    left_out: int
    cropped: int
    chance: float
    conditions: list[ChoicesCondition]


class Probes(Record):
    """What grammar, the states and multiple choice say under every condition; None where it was not asked for."""

    blimp: Blimp | Unavailable | None = sometimes()
    linear: Linear | Unavailable | None = sometimes()
    choices: Choices | Unavailable | None = sometimes()


# ------------------------------------------------------------------------------------------------------ samples


class Continuation(Record):
    """What a model said after a prompt: its ids (n_tokens,), their text, and the clean model's loss on those of them
    that it can read at once, in nats per token."""

    ids: list[int]
    text: str
    loss: float

    @property
    def repeated(self) -> float:
        """The share of its runs of four tokens that stand in it earlier."""
        runs = [*zip(*(self.ids[i:] for i in range(4)), strict=False)]
        return 1 - len({*runs}) / len(runs) if runs else 0.0


class Samples(Record):
    """Continuations of a prompt by the model left alone, and with the same seeds under an `edit`.

    `n_edited`: entries, tokens, keys, heads or sub-layers that it changed, over all passes. `reference`: the text that
    says what is usual, and from which an edit that needs them has its means.
    """

    prompt: str
    clean: list[Continuation]
    edit: str | None = None
    edited: list[Continuation] | None = None
    n_edited: int = 0
    reference: str | None = None


# --------------------------------------------------------------------------------------------------- everything


class Calibration(Record):
    """The other text, from which means, directions, the step-up and int8's ranges are taken."""

    n_seq: int


class Ablation(Record):
    """What changes in a model, or in a part of an encoder-decoder, under every intervention.

    `checkpoint`, `model`, `data`: as in detect's findings. `int8`: by quantise.SCHEMES. `causes`: whether sinks need
    spikes, and spikes sinks, by intervention. `parts`: the other parts of an encoder-decoder, by name.
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
    def entries(self) -> list[Entry]:
        """All interventions: on single entries and keys, then on whole tokens, heads and sub-layers."""
        return self.interventions + self.removals

    @property
    def all_parts(self) -> "list[tuple[str, Ablation]]":
        """(name, findings) of this part and of the others; the name of the only one is empty."""
        return [(self.part, self), *(self.parts or {}).items()]

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically. Raises UserError."""
        schema.save(path, self)

    @classmethod
    def load(cls, path: str | Path) -> "Ablation":
        """What `save` wrote. Raises UserError where it cannot be read or is of another schema."""
        return schema.load(cls, path, "ablate")
