"""The rules that mark spikes in a residual stream, each with its source.

A massive activation (Sun et al. 2402.17762) is an entry of one token that is far larger than the rest of its layer. Two
things look similar but are not spikes: a channel that is large in nearly every token (an *outlier channel*: Kovaleva et
al. 2105.06990, Dettmers et al. 2208.07339), and the tail of a layer in which every token has some large entry. The
primary rule therefore compares an entry with its layer, with its channel and with other tokens of ordinary text (see
Usual). It also compares it with the token's other channels, because a token that is large as a whole has no spike.

Shapes: N sequences, T tokens, C channels. `stream` is a residual stream (N, T, C) in float32.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import metrics
from .rules import Curve, Rule

SPIKE_RATIO = 30.0  # a spike's |h| over its layer's median |h|, at least
PROMINENCE = 5.0  # a spike's prominence over that of a typical token's most prominent entry, at least
PEAKED = 6.0  # a spike token's largest |h| over the rms of its other channels, at least
OUTLIER_RATIO = 10.0  # an outlier channel's median |h| over its layer's, at least
PERCENTILE, PERSISTENCE = 99.9, 0.5
# the thresholds of the sensitivity curves
FACTORS = (0.2, 0.33, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 30)
PERCENTILES = (99.5, 99.9, 99.95, 99.99)


@dataclass(frozen=True)
class Usual:
    """The usual magnitudes at a tap on ordinary text, with which spikes are compared. Spikes do not move these medians.

    `layer`: the median |h| over tokens and channels, (). `channels`: the median |h| of each channel, (C,). `typical`:
    the largest prominence of a typical token, (). The prominence of an entry is |h| over the usual |h| of its channel,
    or over that of its layer where that is larger.
    """

    layer: torch.Tensor
    channels: torch.Tensor
    typical: torch.Tensor

    @classmethod
    def from_states(cls, x: torch.Tensor) -> "Usual":
        """Measures the states x (K, C) of K tokens."""
        abs_x = x.float().abs()
        layer, channels = abs_x.flatten().median(), abs_x.T.contiguous().median(-1).values
        scale = torch.maximum(channels, layer)
        return cls(layer, channels, (abs_x / scale).nan_to_num(0.0).amax(-1).median())

    @functools.cached_property
    def thresholds(self) -> torch.Tensor:
        """The |h| from which an entry of each channel is a spike: (C,). Infinite where the layer's median is 0."""
        prominent = PROMINENCE * self.typical * torch.maximum(self.channels, self.layer)
        return torch.maximum(prominent, SPIKE_RATIO * self.layer).masked_fill(self.layer <= 0, torch.inf)

    @functools.cached_property
    def per_threshold(self) -> torch.Tensor:
        """1 / thresholds: (C,)."""
        return 1 / self.thresholds

    @property
    def outlier_channels(self) -> list[int]:
        """Channels whose median |h| over tokens is at least 10 times the layer's, the largest first."""
        is_outlier = (self.channels >= OUTLIER_RATIO * self.layer) & (self.channels > 0)
        order = self.channels.argsort(descending=True)
        return order[is_outlier[order]].tolist()


def peaked(magnitude: torch.Tensor, norm: torch.Tensor, channels: int) -> torch.Tensor:
    """A token's largest |h| over 6 times the rms of its other channels; from 1 on, it is large in few channels only.

    An untrained model's first token is large as a whole, because its attention averages nothing. `magnitude` is the
    token's largest |h| and `norm` its norm, of any one shape; the result has that shape.
    """
    rest = ((norm.double().square() - magnitude.double().square()).clamp_min(0) / max(1, channels - 1)).sqrt()
    return (magnitude / (PEAKED * rest).clamp_min(1e-30)).float()


def just_above(x: torch.Tensor) -> torch.Tensor:
    """The next larger numbers: entries that reach these exceed x."""
    return torch.nextafter(x, torch.full_like(x, torch.inf))


@dataclass
class TapBatch:
    """The stream x (B, T, C) of one batch at one tap, with what the rules need to know about it."""

    x: torch.Tensor
    abs_x: torch.Tensor  # |x|
    magnitude: torch.Tensor  # (B, T), each token's largest |x|
    channel: torch.Tensor  # (B, T), the channel of that
    norm: torch.Tensor  # (B, T), each token's norm
    counts: torch.Tensor  # (B, bins), metrics.histogram of |x|
    median: torch.Tensor  # (B,), the median |x|
    mean: torch.Tensor  # (B,), the mean x

    @functools.cached_property
    def std(self) -> torch.Tensor:
        """The standard deviation of each sequence's entries: (B,)."""
        n = self.x[0].numel()
        variance = (self.norm.double().square().sum(1) - n * self.mean.double() ** 2) / max(1, n - 1)
        return variance.clamp_min(0).sqrt().float()

    @functools.cached_property
    def percentiles(self) -> dict[float, torch.Tensor]:
        """{percentile: its value in each sequence's |x|, (B,)} for PERCENTILES."""
        limits = metrics.quantiles(self.counts, [percentile / 100 for percentile in PERCENTILES])
        return dict(zip(PERCENTILES, limits.unbind(1), strict=True))

    @functools.cached_property
    def top(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The entries above the lowest of these percentiles: indices into x.flatten(), and |x| there, (K,) each."""
        indices = (self.abs_x > self.percentiles[PERCENTILES[0]][:, None, None]).flatten().nonzero()[:, 0]
        return indices, self.abs_x.flatten()[indices]

    def strength(self, usual: Usual) -> torch.Tensor:
        """The number of times by which each token exceeds its thresholds: (B, T). The token is a spike from 1 on."""
        return torch.minimum(
            (self.abs_x * usual.per_threshold).amax(-1), peaked(self.magnitude, self.norm, self.x.size(-1))
        )


# (the batch, what is usual, batch.strength(usual)) -> the marked entries, as indices into x.flatten(), on the CPU
Marks = Callable[[TapBatch, Usual, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class SpikeRule(Rule):
    """A rule that marks entries. A token counts if one is marked in at least `persistence` of the taps (0: in any)."""

    marked: Marks
    persistence: float = 0.0


def _entries(
    batch: TapBatch, tokens: torch.Tensor, marks: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Indices into x.flatten() where marks(rows (K, C), their sequences (K,)) is true, among some tokens (B, T)."""
    rows = tokens.nonzero()  # (K, 2)
    _, T, C = batch.x.shape
    token, channel = marks(batch.x[rows[:, 0], rows[:, 1]], rows[:, 0]).nonzero().unbind(1)
    return ((rows[token, 0] * T + rows[token, 1]) * C + channel).cpu()


def unusual(batch: TapBatch, usual: Usual, strength: torch.Tensor) -> torch.Tensor:
    """Marks entries that reach the thresholds of the usual magnitudes at the tap."""
    return _entries(batch, strength >= 1, lambda x, sequence: x.abs() >= usual.thresholds)


def beyond(bounds: Callable[[TapBatch], tuple[torch.Tensor, torch.Tensor]]) -> Marks:
    """Marks entries with |x - centre| >= threshold; `bounds` gives each sequence's centre and threshold, (B,) each."""

    def marked(batch: TapBatch, usual: Usual, strength: torch.Tensor) -> torch.Tensor:
        centre, threshold = bounds(batch)
        candidates = (batch.magnitude + centre.abs()[:, None]) >= threshold[:, None]  # no other token's entry can pass
        return _entries(batch, candidates, lambda x, n: (x - centre[n, None]).abs() >= threshold[n, None])

    return marked


def above(percentile: float) -> Marks:
    """Marks entries above a percentile of their sequence's |x|."""

    def marked(batch: TapBatch, usual: Usual, strength: torch.Tensor) -> torch.Tensor:
        (indices, abs_x), limits = batch.top, batch.percentiles[percentile]
        return indices[abs_x > limits[indices // batch.x[0].numel()]].cpu()

    return marked


PRIMARY_SPIKE_RULE = "spike"
PERCENTILE_RULES = {  # one for each point of the curve; one of them is also in SPIKE_RULES
    f"percentile {percentile}": SpikeRule(
        text=f"|h| above its layer's {percentile}th percentile in at least {PERSISTENCE:.0%} of the layers",
        heading="percentile",
        compared=None,
        nulls=("init", "shuffled_channels"),
        curve=Curve(
            name="percentile",
            title="spike: percentile",
            thresholds=PERCENTILES,
            used=PERCENTILE,
            tokens=lambda obs, percentile: obs.spikes[f"percentile {percentile}"],
            scale="even",
        ),
        marked=above(percentile),
        persistence=PERSISTENCE,
    )
    for percentile in PERCENTILES
}
PRIMARY = SpikeRule(
    text=f"|h| >= {SPIKE_RATIO:g} x its layer's median, {PROMINENCE:g} x as prominent as a typical token's most "
    f"prominent entry, in a token whose largest |h| is >= {PEAKED:g} x the rms of its other channels",
    heading="spikes",
    compared="spike tokens",
    marked=unusual,
    curve=Curve(
        name="strictness",
        title="spike: x the rule's thresholds",
        thresholds=FACTORS,
        used=1,
        tokens=lambda obs, factor: obs.strength >= factor,
        scale="log",
    ),
)
OVER_100 = just_above(torch.tensor(100.0)).item()
SPIKE_RULES = {
    PRIMARY_SPIKE_RULE: PRIMARY,
    # massive activations, Sun et al. 2402.17762; their rule rarely fires below about 1B parameters
    "massive": SpikeRule(
        text="|h| > 100 and |h| >= 1000 x median |h| of the layer",
        heading="massive",
        compared="massive tokens",
        marked=beyond(lambda batch: (torch.zeros_like(batch.mean), (1000 * batch.median).clamp_min(OVER_100))),
    ),
    # Bondarenko 2306.12929
    "six_sigma": SpikeRule(
        text="|x - mu| > 6 sigma of the layer",
        heading="6 sigma",
        compared=None,
        marked=beyond(lambda batch: (batch.mean, just_above(6 * batch.std))),
    ),
    "percentile": PERCENTILE_RULES[f"percentile {PERCENTILE}"],
}


def marking_rules() -> dict[str, SpikeRule]:
    """All rules that mark entries of the stream, those of the curve of percentiles too."""
    return {**SPIKE_RULES, **PERCENTILE_RULES}


def spike_entries(x: torch.Tensor, usual: Usual) -> torch.Tensor:
    """The entries of a stream (B, T, C) that the primary spike rule marks: bool (B, T, C)."""
    x = x.float()
    abs_x = x.abs()
    is_peaked = peaked(abs_x.amax(-1), torch.linalg.vector_norm(x, dim=-1), x.size(-1)) >= 1
    return (abs_x >= usual.thresholds) & is_peaked[..., None]
