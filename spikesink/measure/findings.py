"""The findings of detect as dataclasses. They are written as JSON of the same names; reading checks the schema.

nan or None: undefined, as P(sink | spike) if there is no spike; null in a file. `ci95`: the 95% interval [low, high] of
the number before it, None where undefined, as for one sequence. Positions and layers count from 0; the embedding is
layer -1. Lists are by position, by layer of attention (L), or by layer and head (L, H).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import schema
from ..schema import Record, keyed, or_empty, sometimes
from .sinks import PRIMARY_SINK_EPSILON, PRIMARY_SINK_RULE

SCHEMA = "spikesink-findings-2"
COMPARISON_SCHEMA = "spikesink-comparison-2"
PROMPT_SCHEMA = "spikesink-prompt-2"
VOCABULARY_SCHEMA = "spikesink-vocabulary-2"
Interval = list[float]

# ------------------------------------------------------------------------------------------------ what was observed


class CheckpointEntry(Record):
    """A checkpoint: its weights' SHA-256, the step and the number of tokens of its training; None where unknown."""

    path: str
    sha256: str | None = None
    step: int | None = None
    tokens: int | None = None


class TextEntry(Record):
    """The text: `n_seq` sequences of up to `seq_len` tokens, `tokens` in all; `bos`: each starts with that token.

    `predicted_bytes`: bytes of UTF-8 of the predicted tokens' text; 0 if that text is not known. `tokenizer`:
    identifies it, see tokenizers.fingerprint. Files of older versions have neither.
    """

    name: str
    n_seq: int
    seq_len: int
    tokens: int
    bos: bool
    dtype: str = "float32"
    predicted_bytes: int | None = sometimes()
    tokenizer: str | None = sometimes()


class DataEntry(TextEntry):
    """The text and the model's loss on it, in nats per token and bits per byte. `loss_of`: what is predicted."""

    n_register: int
    loss: float
    loss_of: str
    bits_per_byte: float | None = sometimes()


# ---------------------------------------------------------------------------------------------------- the stream


class Indexed(Record):
    """A tap by its number, in the order of the forward pass."""

    index: int


class Place(Record):
    """A sub-layer: its layer, and its kind (embedding, attn, cross, ffn or block)."""

    layer: int
    kind: str

    @property
    def name(self) -> str:
        """'embedding', 'attn 0', 'ffn 0', ..."""
        return self.kind if self.layer < 0 else f"{self.kind} {self.layer}"


class Magnitudes(Record):
    """One tap's tensor: top-1/2/3 and median |h| of each sequence's [T x C] entries, averaged over sequences, and the
    kurtoses of metrics.py. `inf_norm` equals `top1`."""

    top1: float
    top2: float
    top3: float
    median: float
    max: float
    kurtosis: float
    entry_kurtosis: float
    inf_norm: float

    @property
    def ratio(self) -> float:
        """top-1 over the median; 0 if the median is 0."""
        return self.top1 / self.median if self.median else 0.0


class LayerStats(Magnitudes, Place, Indexed):
    """The tensor at a tap."""


class SideStats(LayerStats):
    """The stream after a sub-layer, on one of its sides: the sum, or what the next sub-layer reads of it.

    `spike_tokens`: the share of tokens that the primary rule marks here. `usual`: what it compares them with.
    `first_energy`, `first_norm`: the share of the first token's energy (squared norm) in its largest channel, and its
    norm over the median token's; means over sequences. Files of older versions have neither.
    """

    spike_tokens: float
    first_energy: float | None = sometimes()
    first_norm: float | None = sometimes()
    usual: "UsualEntry"


class UsualEntry(Record):
    """The usual magnitudes at a tap on ordinary text, see spikes.Usual. `channels` (C,) is packed. `outlier_channels`
    are the channels whose median |h| is at least 10 times the layer's."""

    layer: float
    typical: float
    channels: "Packed"
    outlier_channels: list[int]


# ---------------------------------------------------------------------------------------------- rates and verdicts


class FalsePositives(Record):
    """The share of `n_seq` sequences in which a rule fires, in the worst of the `nulls` that were run."""

    rate: float
    ci95: Interval
    n_seq: int
    nulls: list[str]


class Verdict(Record):
    """present, absent or underpowered, with the reason."""

    verdict: str
    reason: str


class RateVerdict(Verdict):
    """The verdict on what a share `rate` of the sequences has. `holds`: the thresholds at which it would be present."""

    rate: float
    ci95: Interval
    null: FalsePositives | None
    holds: list[float]


class Verdicts(Record):
    """A verdict on each phenomenon."""

    spike: RateVerdict
    sink: RateVerdict
    co_occurrence: Verdict

    @property
    def by_name(self) -> dict[str, Verdict]:
        """{phenomenon: verdict}, named as in a sentence."""
        return {name.replace("_", "-"): verdict for name, verdict in vars(self).items()}

    @property
    def words(self) -> dict[str, str]:
        """{phenomenon, named as its field: present, absent or underpowered}."""
        return {name: verdict.verdict for name, verdict in vars(self).items()}


class CurvePoint(Record):
    """The shares of tokens and of sequences with a hit at one threshold. For sinks also `sink_1`, Gu et al.'s rate for
    the first key, and `best_head`, the largest share of sequences in which one and the same head has a sink."""

    at: float
    tokens: float
    sequences: float
    sink_1: float | None = sometimes()
    best_head: float | None = sometimes()


class RuleRates(Record):
    """The shares of tokens and of sequences that a rule marks, and of sequences in the head that has most."""

    tokens: float
    sequences: float
    best_head: float | None = sometimes()


class Measures(Record):
    """The numbers that are compared between a model and its nulls; `rules` and `curves` by name."""

    n_seq: int
    loss: float
    largest_ratio: float
    kurtosis: float
    first_alpha: float
    p_sink_given_spike: float
    rules: dict[str, RuleRates]
    curves: dict[str, list[CurvePoint]]


class Skipped(Record):
    """A null that could not be run, with the reason."""

    skipped: str


Nulls = dict[str, Measures | Skipped]

# ----------------------------------------------------------------------------------------------- spikes and sinks


class RuleCount(Record):
    """The number of tokens that a rule marks, and their share of all tokens."""

    threshold: str
    tokens: int
    fraction: float
    false_positives: FalsePositives | None


class SpikeRuleCount(RuleCount):
    """A RuleCount with the number of marked channels, and the most frequent of them."""

    n_channels: int
    channels: list[int]


class TokenRow(Record):
    """A token that stands out, once; `occurrences`: the number of sequences with this token at this position."""

    sequence: int
    position: int
    occurrences: int
    id: int
    text: str
    before: str


class SpikeToken(TokenRow):
    """A token where its |h| exceeds its threshold most: |h| (`magnitude`), |h| over the threshold (`strength`; a spike
    from 1 on), the channel, and the `index` of the layer in `layers`; there the share of the token's energy in that
    channel, and its norm over the median token's. `persistence`: the share of layers in which the primary rule marks
    the token. `rules`: all that mark it."""

    magnitude: float
    strength: float
    channel: int
    index: int
    energy_share: float
    norm_ratio: float
    persistence: float
    rules: list[str]


class SinkToken(TokenRow):
    """A token with its largest alpha, the number of heads in which it is a sink, and its share of all attention."""

    alpha: float
    heads: int
    share: float


class SideSpikes(Record):
    """The spikes that the primary rule marks on one side, without those at the last tap, which no attention reads.

    `fraction`: share of tokens; `sequences`: share of sequences with a spike; `states`: the number of different states
    of the marked tokens (a first token that is always the same is one state); `strength`: the largest |h| over its
    threshold; `norm_ratio`, `energy_share`, `persistence`: medians over the marked tokens, see SpikeToken.
    `in_embedding`: the share of them that are marked in the embedding already, where a spike is a parameter. `last`:
    the share of tokens marked at the last tap; None if attention reads it.
    """

    tokens: int
    fraction: float
    sequences: float
    states: int
    strength: float
    energy_share: float | None
    norm_ratio: float | None
    persistence: float | None
    in_embedding: float | None
    last: float | None
    channels: list[int]


class OutlierChannel(Record):
    """A channel that is large in nearly every token in a share `layers` of the layers.

    `ratio`: its median |h| over the layer's, at the layer where that is largest.
    """

    channel: int
    layers: float
    ratio: float


class SpikeFindings(Record):
    """`sum`: the stream before any norm on it, to which `rules` and `tokens` refer; `read`: what the next sub-layer
    reads of it. `by_position`: the share of tokens at each position that the primary rule marks."""

    primary: str
    rules: dict[str, SpikeRuleCount]
    sum: SideSpikes
    read: SideSpikes | None
    outlier_channels: list[OutlierChannel]
    by_position: list[float]
    tokens: list[SpikeToken]

    @property
    def primary_rule(self) -> SpikeRuleCount:
        """The counts of the primary rule."""
        return self.rules[self.primary]

    @property
    def primary_tokens(self) -> list[SpikeToken]:
        """The listed tokens that the primary rule marks."""
        return [token for token in self.tokens if self.primary in token.rules]


class BestKey(Record):
    """The key that is most often a sink, among those with at least T/4 queries, and how often it is one."""

    position: int
    rate: float


class SinkRates(Record):
    """Gu et al.'s sink metric (2410.10781) at one threshold: shares of heads and sequences with alpha > epsilon.

    `first`, `by_layer`, `by_head`: for the first key (Sink_1); `first_second_half_queries`: from the second half's
    queries alone. `max_first_half`: for any key of the first half. `best_eligible`: None if no key has enough queries.
    """

    epsilon: float
    by_position: list[float]
    first: float
    first_ci95: Interval | None
    by_layer: list[float]
    by_head: list[list[float]]
    best_eligible: BestKey | None
    first_second_half_queries: float
    max_first_half: float


class SinkFindings(Record):
    """`seams`: the layers of attention, over which lists (L) and (L, H) run. `possible`: whether a quarter of the
    queries see any key of the layer; under a short window none is seen so often, and no sink is possible.
    `heads_needed`: the number of heads in which a token must be a sink to be called one.

    By position: `share` of all attention, `share_uniform`, the same if every query spread its attention evenly, and
    `token_rate`, the share of tokens that are sinks. By layer and head: `alpha_first`, the first key's alpha;
    `any_sink_by_head`, the share of sequences with a sink; `first_argmax`, the share of queries that attend most to the
    first key; `slot_share`, the attention that a slot takes, undefined without one; `entropy` (nats); `distance`, the
    mean |i - j| under the weights (tokens); norms of values over the sequence's mean norm.
    """

    seams: list[Place]
    possible: list[bool]
    heads_needed: int
    primary: str
    gu: list[SinkRates] = keyed("epsilon")
    rules: dict[str, RuleCount]
    share: list[float]
    share_uniform: list[float]
    token_rate: list[float]
    alpha_first: list[list[float]]
    any_sink_by_head: list[list[float]]
    first_argmax: list[list[float]]
    slot_share: list[list[float]]
    entropy: list[list[float]]
    distance: list[list[float]]
    distance_without_sinks: list[list[float]]
    first_value_norm_ratio: list[list[float]]
    sink_value_norm_ratio: list[list[float]]
    tokens: list[SinkToken]

    def at(self, epsilon: float = PRIMARY_SINK_EPSILON) -> SinkRates:
        """Gu et al.'s metric at a threshold. Raises KeyError if that was not measured."""
        by_epsilon = {rates.epsilon: rates for rates in self.gu}
        if epsilon not in by_epsilon:
            raise KeyError(f"epsilon {epsilon:g} was not measured, only {', '.join(f'{e:g}' for e in by_epsilon)}")
        return by_epsilon[epsilon]

    @property
    def first(self) -> float:
        """Sink_1 at Gu et al.'s threshold."""
        return self.at().first

    @property
    def primary_rule(self) -> RuleCount:
        """The tokens that are sinks by the primary rule."""
        return self.rules[PRIMARY_SINK_RULE]


# -------------------------------------------------------------------------------------------------- co-occurrence


class OverlapRates(Record):
    """The overlap of spike and sink tokens, see metrics.overlap; nan where undefined."""

    p_sink_given_spike: float
    p_spike_given_sink: float
    jaccard: float
    expected: float
    lift: float
    lift_anywhere: float
    explained_by_position: float


class OverlapIntervals(Record):
    """95% intervals of OverlapRates."""

    p_sink_given_spike: Interval | None
    p_spike_given_sink: Interval | None
    jaccard: Interval | None
    expected: Interval | None
    lift: Interval | None
    lift_anywhere: Interval | None
    explained_by_position: Interval | None


class Overlap(OverlapRates):
    """The overlap by two rules, with the numbers of tokens. `p_permutation`: the chance of an overlap as large."""

    spike_rule: str
    sink_rule: str
    spike_tokens: int
    sink_tokens: int
    both: int
    ci95: OverlapIntervals
    p_permutation: float


class CoOccurrence(Overlap):
    """The overlap on all tokens, on all but the first, and with the spikes of what sub-layers `read`, not the sum's.

    `by_construction`: all spikes or all sinks are one state that is the same in every sequence. Then n is 1, and no
    null that permutes labels can differ.
    """

    without_first: Overlap
    read: Overlap | None
    by_construction: bool


# -------------------------------------------------------------------------------------------------------- anatomy


class Step(Place, Indexed):
    """A tap, and the share of tokens that have it in common."""

    tokens: float


class StepChange(Step):
    """The tap at which an entry rises or falls, and the change over its peak."""

    part_of_peak: float


class SharedChannel(Record):
    """A channel that the tokens share: mean value, share of tokens with its sign, `ratio` to the |value| of the first
    channel (mean and standard deviation over tokens), median |value|."""

    channel: int
    value: float
    same_sign: float
    ratio: float
    ratio_std: float
    median: float


class Steps(Record):
    """How a spike rises and falls. `path`: {channel: its mean at every tap} of the three largest channels."""

    path: dict[str, list[float]]
    step_up: StepChange
    step_down: StepChange | None
    peak: Step
    channels: list[SharedChannel]


class NormedCosine(Place):
    """The mean cosine over pairs of normalised inputs, of the tokens and of as many others; None for fewer than two."""

    spikes: float | None
    others: float | None


class KeyDimensions(Record):
    """The dimensions in which a head's sink keys lie, and as many other keys: see anatomy.key_subspace."""

    head: int
    keys: int
    dims95: int | None
    participation: float | None
    others_dims95: int | None
    others_participation: float | None


class KeySubspace(Place):
    """Sink keys of a layer, head by head."""

    heads: list[KeyDimensions]


class ChannelForm(Record):
    """The quadratic form of a channel: its norm over the median channel's, and how nearly it is of rank one."""

    channel: int
    norm: float
    dominance: float


class QuadraticForm(Record):
    """Forms in the step-up's FFN: of spiking channels, of random ones, and the channels of the largest norms."""

    layer: int
    channels: list[ChannelForm]
    others: list[ChannelForm]
    largest_norms: list[int]


class Episode(Record):
    """A run of taps at which spikes are large, from `start` to `end`, see anatomy.episodes. `tokens`: the share of the
    spike tokens with a run that starts there; `channel`: the most frequent one; `magnitude`, `ratio`: medians of the
    largest |h|, and of that over the median |h| of its tap."""

    start: Step
    end: Step
    tokens: float
    channel: int
    magnitude: float
    ratio: float


class Anatomy(Steps):
    """`of`: the examined tokens, in words. `episodes`: empty if no token is a spike. `inner`: the tensors off the
    stream, by place; `places`: descriptions of these places."""

    of: str
    n_seq: int
    tokens: int
    distinct_tokens: int
    episodes: list[Episode]
    normed_cosine: list[NormedCosine]
    inner: dict[str, list[LayerStats]]
    places: dict[str, str]
    key_subspace: list[KeySubspace]
    quadratic_form: QuadraticForm | None


# ------------------------------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Packed:
    """An array: its shape ('3 5'), and bfloat16, little-endian, in base64: examples.unpacked reads it."""

    shape: str
    base64: str


class SequenceEntry(Record):
    """The start of one sequence, token by token (T). Packed: `share` (T,), `relative` (layers, T), `alpha` (heads, T).

    `spikes`, `enough_queries`: 0 or 1. `sink_heads`: the number of heads in which the token is a sink.
    """

    sequence: int
    length: int
    loss: float
    ids: list[int]
    texts: list[str]
    spikes: list[int]
    sink_heads: list[int]
    enough_queries: list[int]
    share: Packed
    relative: Packed
    alpha: Packed


class MatrixEntry(Record):
    """|h| of the first sequence after a layer: (tokens, bins of channels), and the first channel of each bin."""

    layer: str
    values: Packed
    starts: str
    n_channels: int
    median: float


class ExamplesEntry(Record):
    """A few sequences, token by token, with the names of the layers and of the listed heads, out of `n_heads`."""

    encoding: str
    layers: list[str]
    heads: list[str]
    n_heads: int
    sequences: list[SequenceEntry]
    matrices: list[MatrixEntry]


# --------------------------------------------------------------------------------------- over training, vocabulary


class HistoryRow(Record):
    """Spikes and sinks at one step of training; history.COLUMNS describes the numbers."""

    step: int
    loss: float | None
    ratio: float | None
    kurtosis: float | None
    sink_rate: float | None
    p_sink_given_spike: float | None


class Histogram(Record):
    """Counts between edges."""

    edges: list[float]
    counts: list[int]


class VocabularyToken(Record):
    """A token where its |h| exceeds its threshold most: |h| over the layer's usual median, |h| over the threshold
    (`strength`), the channel, and the sub-layer (`after`: its kind, and its `layer`)."""

    id: int
    text: str
    ratio: float
    strength: float
    after: str
    layer: int
    channel: int

    @property
    def place(self) -> Place:
        """The sub-layer after which the token's |h| exceeds its threshold most."""
        return Place(layer=self.layer, kind=self.after)


class VocabularyPlace(Record):
    """All tokens of the vocabulary at one position: how many spike, in which channels, and all `strength`s by id."""

    spiking: int
    fraction: float
    histogram: Histogram
    channels: list[int]
    strength: list[float]
    tokens: list[VocabularyToken]


class Vocabulary(Record):
    """Every token of the vocabulary in the first place, and in the second, after the token `before`."""

    schema: str = VOCABULARY_SCHEMA
    vocab_size: int
    before: str
    first: VocabularyPlace
    second: VocabularyPlace


# ------------------------------------------------------------------------------------------------------ everything


class Findings(Record):
    """The findings of detect for a model, or for one part of an encoder-decoder.

    `model`: its architecture, and its `parameters`. `layers`: the stream after the embedding and after each sub-layer,
    before any norm on it; `reads`: what the next sub-layer reads of it, where that is known. `sensitivity`: how the
    findings change with their thresholds, by name of the curve. `nulls`: by name. `anatomy`, `examples`: None if they
    were not made. `history`: over the training of a run of train.py. `parts`: the other parts of an encoder-decoder, by
    name.
    """

    schema: str = SCHEMA
    part: str
    causal: bool
    checkpoint: CheckpointEntry
    model: dict[str, Any]
    data: DataEntry
    verdicts: Verdicts
    layers: list[SideStats]
    reads: list[SideStats]
    spikes: SpikeFindings
    sinks: SinkFindings
    co_occurrence: CoOccurrence
    sensitivity: dict[str, list[CurvePoint]]
    measures: Measures
    nulls: Nulls
    anatomy: Anatomy | None = or_empty()
    examples: ExamplesEntry | None = or_empty()
    history: list[HistoryRow] | None = sometimes()
    parts: "dict[str, Findings] | None" = sometimes()
    vocabulary: Vocabulary | None = sometimes()

    @property
    def all_parts(self) -> "list[tuple[str, Findings]]":
        """(name, findings) of this part and of the others; an only part has an empty name."""
        return [(self.part, self), *(self.parts or {}).items()]

    @property
    def attended(self) -> list[SideStats]:
        """The layers whose stream some attention reads: all but the last, unless a decoder attends to it."""
        return self.layers if self.part in ("encoder", "cross") else self.layers[:-1]

    @property
    def largest_ratio(self) -> float:
        """The largest top-1 over the median of an attended layer."""
        return max(layer.ratio for layer in self.attended)

    @property
    def largest_kurtosis(self) -> float:
        """The largest channel kurtosis of an attended layer."""
        return max(layer.kurtosis for layer in self.attended)

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically. Raises UserError."""
        schema.save(path, self)

    @classmethod
    def load(cls, path: str | Path) -> "Findings":
        """Reads a file that `save` wrote. Raises UserError if it cannot be read or has another schema."""
        return schema.load(cls, path, "detect")


class Comparison(Record):
    """Several checkpoints side by side, each under a short name."""

    schema: str = COMPARISON_SCHEMA
    names: list[str]
    findings: list[Findings]


# ------------------------------------------------------------------------------------------------------- a prompt


class LookedAt(Record):
    """The position that most heads attend to, and the number of these heads."""

    position: int
    heads: int


class PromptToken(Record):
    """One token where its |h| exceeds its threshold most: |h| over the threshold (`strength`), |h| over the layer's
    usual median (`ratio`), the sub-layer (`after`) and the channel. Also its share of all attention, and alpha in the
    `head` where that is largest. `few_queries`: alpha is a mean over too few queries to call the token a sink."""

    position: int
    id: int
    text: str
    magnitude: float
    ratio: float
    strength: float
    channel: int
    after: str
    rules: list[str]
    share: float
    alpha: float
    head: str
    sink_heads: int
    few_queries: bool
    looks_at: LookedAt


class PromptHead(Record):
    """One head: alpha of every key, each query's strongest key and its weight, and the key with most attention."""

    head: str
    alpha: list[float]
    looks_at: list[int]
    weight: list[float]
    most_at: int


class PromptFindings(Record):
    """One text, token by token. `magnitudes`: the largest |h| of each token, by layer; `medians`: by layer."""

    schema: str = PROMPT_SCHEMA
    part: str
    checkpoint: CheckpointEntry
    model: dict[str, Any]
    loss: float
    bits_per_byte: float | None = sometimes()
    tokens: list[PromptToken]
    layers: list[str]
    magnitudes: list[list[float]]
    medians: list[float]
    heads: list[PromptHead]
    examples: ExamplesEntry | None = or_empty()
    parts: "dict[str, PromptFindings] | None" = sometimes()

    @property
    def all_parts(self) -> "list[tuple[str, PromptFindings]]":
        """See Findings."""
        return [(self.part, self), *(self.parts or {}).items()]
