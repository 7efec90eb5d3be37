"""What a spike is: the rules that mark entries of a residual stream, each with its source.

Shapes: N sequences, T tokens, C channels. `stream` is a residual stream (N, T, C) in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .metrics import median_magnitude
from .rules import Curve, Rule

SPIKE_RATIO = 30.0  # of the scale-free spike rule
PERCENTILE, PERSISTENCE = 99.9, 0.5
# what the sensitivity curves run over
RATIOS = (5, 10, 15, 20, 30, 40, 50, 75, 100, 200, 500, 1000)
PERCENTILES = (99.5, 99.9, 99.95, 99.99)


def ratio_threshold(median: torch.Tensor, ratio: float = SPIKE_RATIO) -> torch.Tensor:
    """`ratio` x the median |h| (N,) of each sequence: the scale-free form of Sun et al.'s rule, for small models."""
    return torch.where(median > 0, ratio * median, torch.inf)  # no median, no spike


def massive_threshold(median: torch.Tensor) -> torch.Tensor:
    """max(100, 1000 x median |h|) of each sequence: (N,). Massive activations, Sun et al. 2402.17762.

    Theirs is |h| > 100 and |h| >= 1000 x median; below about 1B parameters it rarely fires.
    """
    return (1000 * median).clamp_min(torch.nextafter(torch.tensor(100.0), torch.tensor(torch.inf)).item())


def sigma_threshold(std: torch.Tensor, sigmas: float = 6.0) -> torch.Tensor:
    """6 sigma of each sequence's entries, exclusive: (N,). Bondarenko 2306.12929: |x - mu| > 6 sigma."""
    return torch.nextafter(sigmas * std, torch.full_like(std, torch.inf))


def entries_above(percentile: float, size: int) -> int:
    """How many of a layer's `size` entries are above its given percentile, at least 1."""
    return max(1, round(size * (1 - percentile / 100)))


@dataclass
class TapBatch:
    """One batch's stream x (B, T, C) at one tap, with what the rules need of it."""

    x: torch.Tensor
    magnitude: torch.Tensor  # (B, T), largest |x| of each token
    channel: torch.Tensor  # (B, T), where it is
    largest: torch.Tensor  # (B, K), largest |x| of each sequence, as many as the percentiles need
    where: torch.Tensor  # (B, K), and in which of its T x C entries
    median: torch.Tensor  # (B,), of |x|
    mean: torch.Tensor  # (B,), of x
    std: torch.Tensor  # (B,), of x


@dataclass(frozen=True, kw_only=True)
class SpikeRule(Rule):
    """Marks tokens by their entries: those that are marked in at least `persistence` of the taps; 0: in any."""

    persistence: float = 0.0

    def marked(self, batch: TapBatch) -> torch.Tensor:
        """Where it marks entries of a stream: indices into x.flatten(), on the CPU."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ThresholdRule(SpikeRule):
    """Marks entries with |x - centre| >= threshold."""

    # (median |h|, mean, standard deviation), each (N,) of sequences -> (centre, threshold), alike
    bounds: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    def entries(self, stream: torch.Tensor) -> torch.Tensor:
        """The marked entries of a stream (N, T, C): bool, of its shape."""
        std, mean = torch.std_mean(stream.flatten(1), dim=1)
        centre, threshold = (b[:, None, None] for b in self.bounds(median_magnitude(stream), mean, std))
        return (stream - centre).abs() >= threshold

    def marked(self, batch: TapBatch) -> torch.Tensor:
        """As of SpikeRule. Looks only at tokens whose largest could pass."""
        centre, threshold = self.bounds(batch.median, batch.mean, batch.std)
        tokens = ((batch.magnitude + centre.abs()[:, None]) >= threshold[:, None]).nonzero()  # (K, 2)
        rows = (batch.x[tokens[:, 0], tokens[:, 1]] - centre[tokens[:, 0], None]).abs()  # (K, C)
        token, channel = (rows >= threshold[tokens[:, 0], None]).nonzero().unbind(1)
        _, T, C = batch.x.shape
        return ((tokens[token, 0] * T + tokens[token, 1]) * C + channel).cpu()


@dataclass(frozen=True, kw_only=True)
class PercentileRule(SpikeRule):
    """Marks entries above a percentile of their sequence's |x|."""

    percentile: float

    def marked(self, batch: TapBatch) -> torch.Tensor:
        """As of SpikeRule."""
        B, T, C = batch.x.shape
        last = min(entries_above(self.percentile, T * C), batch.largest.size(1) - 1)
        first = torch.arange(B, device=batch.where.device)[:, None] * T * C
        return (batch.where + first)[batch.largest > batch.largest[:, last, None]].cpu()


PRIMARY_SPIKE_RULE = "ratio"
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
PRIMARY = ThresholdRule(
    text=f"|h| >= {SPIKE_RATIO:g} x median |h| of the layer",
    heading="spikes",
    compared="spike tokens",
    bounds=lambda median, mean, std: (torch.zeros_like(mean), ratio_threshold(median)),
    curve=Curve(
        name="ratio",
        title="spike: |h| / median",
        thresholds=RATIOS,
        used=SPIKE_RATIO,
        tokens=lambda obs, ratio: obs.ratio >= ratio,
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


def spike_entries(x: torch.Tensor) -> torch.Tensor:
    """Entries of a stream (B, T, C) that the primary spike rule marks: bool (B, T, C)."""
    return PRIMARY.entries(x.float())
