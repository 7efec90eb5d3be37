"""What a spike is: the rules that mark entries of a residual stream, each with its source.

A massive activation (Sun et al. 2402.17762) is an entry of one token that stands far above its layer. Two things look
like one and are not: a channel that is large in nearly every token (an *outlier channel*: Kovaleva et al. 2105.06990,
Dettmers et al. 2208.07339), and the tail of a layer whose every token has some large entry. So the primary rule
compares an entry with its layer, with its channel and with other tokens, on ordinary text (see Usual), and with the
other channels of its own token: a token that is large as a whole has no spike.

Shapes: N sequences, T tokens, C channels. `stream` is a residual stream (N, T, C) in float32.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import metrics
from .rules import Curve, Rule

SPIKE_RATIO = 30.0  # of a spike, over its layer's median |h|
PROMINENCE = 5.0  # of a spike, over a typical token's most prominent entry
PEAKED = 6.0  # of a spike token's largest |h|, over the rms of its other channels
OUTLIER_RATIO = 10.0  # of an outlier channel's median |h|, over its layer's
PERCENTILE, PERSISTENCE = 99.9, 0.5
# what the sensitivity curves run over
FACTORS = (0.2, 0.33, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 30)
PERCENTILES = (99.5, 99.9, 99.95, 99.99)


@dataclass(frozen=True)
class Usual:
    """What is usual at a tap on ordinary text, with which a spike is compared. Medians over tokens: spikes do not move
    them.

    `layer`: the median |h| over tokens and channels, (). `channels`: of each channel over tokens, (C,). `typical`: a
    typical token's largest prominence, (); the prominence of an entry is |h| over the usual |h| of its channel, or of
    its layer where that is larger.
    """

    layer: torch.Tensor
    channels: torch.Tensor
    typical: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> "Usual":
        """Of the states x (K, C) of K tokens."""
        size = x.float().abs()
        layer, channels = size.flatten().median(), size.T.contiguous().median(-1).values
        scale = torch.maximum(channels, layer)
        return cls(layer, channels, (size / scale).nan_to_num(0.0).amax(-1).median())

    @functools.cached_property
    def thresholds(self) -> torch.Tensor:
        """From which |h| on an entry of each channel is a spike: (C,). Infinite where the layer's median is 0."""
        prominent = PROMINENCE * self.typical * torch.maximum(self.channels, self.layer)
        return torch.maximum(prominent, SPIKE_RATIO * self.layer).masked_fill(self.layer <= 0, torch.inf)

    @functools.cached_property
    def per_threshold(self) -> torch.Tensor:
        """1 / thresholds: (C,)."""
        return 1 / self.thresholds

    @property
    def outlier_channels(self) -> list[int]:
        """Channels whose median |h| over tokens is at least 10 x the layer's, the largest first."""
        found = (self.channels >= OUTLIER_RATIO * self.layer) & (self.channels > 0)
        order = self.channels.argsort(descending=True)
        return order[found[order]].tolist()


def peaked(magnitude: torch.Tensor, norm: torch.Tensor, channels: int) -> torch.Tensor:
    """A token's largest |h|, over 6 x the rms of its other channels, from that and its norm: alike. From 1 on it is
    large in few channels, and not as a whole, as an untrained model's first token is, whose attention averages nothing.
    """
    rest = ((norm.double().square() - magnitude.double().square()).clamp_min(0) / max(1, channels - 1)).sqrt()
    return (magnitude / (PEAKED * rest).clamp_min(1e-30)).float()


def massive_threshold(median: torch.Tensor) -> torch.Tensor:
    """max(100, 1000 x median |h|) of each sequence: (N,). Massive activations, Sun et al. 2402.17762.

    Theirs is |h| > 100 and |h| >= 1000 x median; below about 1B parameters it rarely fires.
    """
    return (1000 * median).clamp_min(torch.nextafter(torch.tensor(100.0), torch.tensor(torch.inf)).item())


def sigma_threshold(std: torch.Tensor, sigmas: float = 6.0) -> torch.Tensor:
    """6 sigma of each sequence's entries, exclusive: (N,). Bondarenko 2306.12929: |x - mu| > 6 sigma."""
    return torch.nextafter(sigmas * std, torch.full_like(std, torch.inf))


@dataclass
class TapBatch:
    """One batch's stream x (B, T, C) at one tap, with what the rules need of it."""

    x: torch.Tensor
    size: torch.Tensor  # |x|
    magnitude: torch.Tensor  # (B, T), largest |x| of each token
    channel: torch.Tensor  # (B, T), where it is
    norm: torch.Tensor  # (B, T), of each token
    counts: torch.Tensor  # (B, bins), metrics.histogram of |x|
    median: torch.Tensor  # (B,), of |x|
    mean: torch.Tensor  # (B,), of x

    @functools.cached_property
    def std(self) -> torch.Tensor:
        """The standard deviation of each sequence's entries: (B,)."""
        n = self.x[0].numel()
        variance = (self.norm.double().square().sum(1) - n * self.mean.double() ** 2) / max(1, n - 1)
        return variance.clamp_min(0).sqrt().float()

    @functools.cached_property
    def percentiles(self) -> dict[float, torch.Tensor]:
        """PERCENTILES of each sequence's |x|: (B,) each."""
        limits = metrics.quantiles(self.counts, [percentile / 100 for percentile in PERCENTILES])
        return dict(zip(PERCENTILES, limits.unbind(1), strict=True))

    @functools.cached_property
    def top(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices into x.flatten() of what is above the lowest of these percentiles, and |x| there: (K,) each."""
        above = (self.size > self.percentiles[PERCENTILES[0]][:, None, None]).flatten().nonzero()[:, 0]
        return above, self.size.flatten()[above]

    def strength(self, usual: Usual) -> torch.Tensor:
        """How many times its thresholds each token's |x| is, at the least: (B, T). A spike from 1 on."""
        return torch.minimum(
            (self.size * usual.per_threshold).amax(-1), peaked(self.magnitude, self.norm, self.x.size(-1))
        )


@dataclass(frozen=True, kw_only=True)
class SpikeRule(Rule):
    """Marks tokens by their entries: those that are marked in at least `persistence` of the taps; 0: in any."""

    persistence: float = 0.0

    def marked(self, batch: TapBatch, usual: Usual, strength: torch.Tensor) -> torch.Tensor:
        """Where it marks entries of a stream: indices into x.flatten(), on the CPU. `strength`: the batch's."""
        raise NotImplementedError


def _entries(
    batch: TapBatch, tokens: torch.Tensor, marks: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Indices into x.flatten() where marks(rows (K, C), their sequences (K,)) holds among some tokens (B, T)."""
    rows = tokens.nonzero()  # (K, 2)
    _, T, C = batch.x.shape
    token, channel = marks(batch.x[rows[:, 0], rows[:, 1]], rows[:, 0]).nonzero().unbind(1)
    return ((rows[token, 0] * T + rows[token, 1]) * C + channel).cpu()


@dataclass(frozen=True, kw_only=True)
class UsualRule(SpikeRule):
    """Marks entries that reach the thresholds of what is usual at the tap."""

    def marked(self, batch: TapBatch, usual: Usual, strength: torch.Tensor) -> torch.Tensor:
        """As of SpikeRule."""
        return _entries(batch, strength >= 1, lambda x, sequence: x.abs() >= usual.thresholds)


@dataclass(frozen=True, kw_only=True)
class ThresholdRule(SpikeRule):
    """Marks entries with |x - centre| >= threshold."""

    # (median |h|, mean, standard deviation), each (N,) of sequences -> (centre, threshold), alike
    bounds: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    def marked(self, batch: TapBatch, usual: Usual, strength: torch.Tensor) -> torch.Tensor:
        """As of SpikeRule. Looks only at tokens whose largest could pass."""
        centre, threshold = self.bounds(batch.median, batch.mean, batch.std)
        could = (batch.magnitude + centre.abs()[:, None]) >= threshold[:, None]
        return _entries(batch, could, lambda x, n: (x - centre[n, None]).abs() >= threshold[n, None])


@dataclass(frozen=True, kw_only=True)
class PercentileRule(SpikeRule):
    """Marks entries above a percentile of their sequence's |x|."""

    percentile: float

    def marked(self, batch: TapBatch, usual: Usual, strength: torch.Tensor) -> torch.Tensor:
        """As of SpikeRule."""
        _, T, C = batch.x.shape
        (top, size), limits = batch.top, batch.percentiles[self.percentile]
        return top[size > limits[top // (T * C)]].cpu()


PRIMARY_SPIKE_RULE = "spike"
PERCENTILE_RULES = {  # of the curve; one of them is a rule of its own
    percentile: PercentileRule(
        text=f"|h| above its layer's {percentile}th percentile in at least {PERSISTENCE:.0%} of the layers",
        heading="percentile",
        compared=None,
        nulls=("init", "shuffled_channels"),
        curve=Curve(
            name="percentile",
            title="spike: percentile",
            thresholds=PERCENTILES,
            used=PERCENTILE,
            tokens=lambda obs, percentile: obs.percentiles[percentile],
            scale="even",
        ),
        percentile=percentile,
        persistence=PERSISTENCE,
    )
    for percentile in PERCENTILES
}
PRIMARY = UsualRule(
    text=f"|h| >= {SPIKE_RATIO:g} x its layer's median, {PROMINENCE:g} x as prominent as a typical token's most "
    f"prominent entry, in a token whose largest |h| is >= {PEAKED:g} x the rms of its other channels",
    heading="spikes",
    compared="spike tokens",
    curve=Curve(
        name="strictness",
        title="spike: x the rule's thresholds",
        thresholds=FACTORS,
        used=1,
        tokens=lambda obs, factor: obs.strength >= factor,
        scale="log",
    ),
)
SPIKE_RULES: dict[str, SpikeRule] = {
    PRIMARY_SPIKE_RULE: PRIMARY,
    "massive": ThresholdRule(
        text="|h| > 100 and |h| >= 1000 x median |h| of the layer",
        heading="massive",
        compared="massive tokens",
        bounds=lambda median, mean, std: (torch.zeros_like(mean), massive_threshold(median)),
    ),
    "six_sigma": ThresholdRule(
        text="|x - mu| > 6 sigma of the layer",
        heading="6 sigma",
        compared=None,
        bounds=lambda median, mean, std: (mean, sigma_threshold(std)),
    ),
    "percentile": PERCENTILE_RULES[PERCENTILE],
}


def spike_entries(x: torch.Tensor, usual: Usual) -> torch.Tensor:
    """Entries of a stream (B, T, C) that the primary spike rule marks: bool (B, T, C)."""
    x = x.float()
    size = x.abs()
    token = peaked(size.amax(-1), torch.linalg.vector_norm(x, dim=-1), x.size(-1)) >= 1
    return (size >= usual.thresholds) & token[..., None]
