"""What a spike is: the rules that mark entries of a residual stream, each with its source.

Shapes: N sequences, T tokens, C channels. `stream` is a residual stream (N, T, C) in float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .metrics import median_magnitude

SPIKE_RATIO = 30.0  # of the scale-free spike rule
PERCENTILE, PERSISTENCE = 99.9, 0.5
# what the sensitivity curves run over
RATIOS = (5, 10, 15, 20, 30, 40, 50, 75, 100, 200, 500, 1000)
PERCENTILES = (99.5, 99.9, 99.95, 99.99)


def ratio_threshold(median, ratio=SPIKE_RATIO):
    """`ratio` x the median |h| (N,) of each sequence: the scale-free form of Sun et al.'s rule, for small models."""
    return torch.where(median > 0, ratio * median, torch.inf)  # no median, no spike


def massive_threshold(median):
    """max(100, 1000 x median |h|) of each sequence: (N,). Massive activations, Sun et al. 2402.17762.

    Theirs is |h| > 100 and |h| >= 1000 x median; below about 1B parameters it rarely fires.
    """
    return (1000 * median).clamp_min(torch.nextafter(torch.tensor(100.0), torch.tensor(torch.inf)).item())


def sigma_threshold(std, sigmas=6.0):
    """6 sigma of each sequence's entries, exclusive: (N,). Bondarenko 2306.12929: |x - mu| > 6 sigma."""
    return torch.nextafter(sigmas * std, torch.full_like(std, torch.inf))


class SpikeRule(NamedTuple):
    """Marks the entries of one layer's stream with |x - centre| >= threshold, each a tensor (N,) of sequences."""

    text: str
    bounds: Callable  # (median |h|, mean, standard deviation), each (N,) -> (centre, threshold)

    def entries(self, stream):
        """The marked entries: bool (N, T, C)."""
        std, mean = torch.std_mean(stream.flatten(1), dim=1)
        centre, threshold = (b[:, None, None] for b in self.bounds(median_magnitude(stream), mean, std))
        return (stream - centre).abs() >= threshold


SPIKE_RULES = {
    "ratio": SpikeRule(
        f"|h| >= {SPIKE_RATIO:g} x median |h| of the layer",
        lambda median, mean, std: (torch.zeros_like(mean), ratio_threshold(median)),
    ),
    "massive": SpikeRule(
        "|h| > 100 and |h| >= 1000 x median |h| of the layer",
        lambda median, mean, std: (torch.zeros_like(mean), massive_threshold(median)),
    ),
    "six_sigma": SpikeRule("|x - mu| > 6 sigma of the layer", lambda median, mean, std: (mean, sigma_threshold(std))),
}
PERCENTILE_RULE = f"|h| above its layer's {PERCENTILE}th percentile in at least {PERSISTENCE:.0%} of the layers"
PRIMARY_SPIKE_RULE = "ratio"


def entries_above(percentile, size):
    """How many of a layer's `size` entries are above its given percentile, at least 1."""
    return max(1, round(size * (1 - percentile / 100)))


def spike_entries(x):
    """Entries of a stream (B, T, C) that the primary spike rule marks: bool (B, T, C)."""
    return SPIKE_RULES[PRIMARY_SPIKE_RULE].entries(x.float())
