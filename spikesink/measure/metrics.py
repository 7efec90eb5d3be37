"""The field's definitions as pure functions of tensors; each cites its source.

Shapes: N sequences, T tokens, C channels, H heads. `stream` is a residual stream (N, T, C) in float32. `received` is
the attention mass (N, H, T) each key gets, summed over its queries. Positions count from 0 in code, from 1 in papers.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, overload

import numpy as np
import torch

from .findings import Interval, OverlapRates


def uniform(numbers: torch.Tensor, shape: Sequence[int], *keys: int) -> torch.Tensor:
    """Draws from [0, 1) for sequences of these numbers (B,): (B, *shape), float32, on the CPU; each sequence's are a
    function of its number and the keys (not negative) alone, and so the same for any batch size."""
    draws = [np.random.default_rng((*keys, n)).random(tuple(shape), np.float32) for n in numbers.tolist()]
    return torch.from_numpy(np.stack(draws))


def bits_per_byte(nats: float, n_bytes: int | None) -> float | None:
    """The summed loss of some tokens, in nats, as bits per byte of their text: what models of different tokenizers can
    be compared by. None without a loss, or without a text."""
    return nats / math.log(2) / n_bytes if n_bytes and math.isfinite(nats) else None


# -------------------------------------------------------------------------------- magnitudes in the stream


def median_magnitude(stream: torch.Tensor) -> torch.Tensor:
    """The median |h| of each sequence's [T x C] matrix: (N,). Sun et al. 2402.17762."""
    return stream.abs().flatten(1).median(1).values


BITS = 16  # of a float32 that a histogram leaves out: its bins are 2^-7 wide, relative to what they hold


def histogram(size: torch.Tensor) -> torch.Tensor:
    """Counts of the values of size (B, K), float32 and not negative, in bins of their leading bits: (B, 2^15).

    A float's bits, read as an integer, grow with it: a bin is an exponent and 7 bits of mantissa.
    """
    bins = (size.contiguous().view(torch.int32) >> BITS).long()
    bins += torch.arange(len(size), device=size.device)[:, None] << 15
    return torch.bincount(bins.flatten(), minlength=len(size) << 15).view(len(size), -1)


def quantiles(counts: torch.Tensor, wanted: Sequence[float]) -> torch.Tensor:
    """The quantiles, in [0, 1], of what a `histogram` (B, bins) counted: (B, len(wanted)), within 0.4% of the exact
    ones."""
    cumulative = counts.cumsum(-1)
    n = cumulative[:, -1:]
    rank = torch.tensor(wanted, device=counts.device, dtype=torch.float64) * (n - 1).double()
    bins = torch.searchsorted(cumulative, rank.floor().long() + 1)
    middle = ((bins << BITS) | (1 << (BITS - 1))).int().view(torch.float32)
    return middle.masked_fill(bins == 0, 0.0)


def zero_is_nan(x: torch.Tensor) -> torch.Tensor:
    """x with nan for 0: to divide by."""
    return torch.where(x == 0, torch.nan, x)


def channel_kurtosis(power: torch.Tensor) -> torch.Tensor:
    """mean_j s_j^4 / (mean_j s_j^2)^2 with s_j^2 = `power` (C,), channel j's mean square over tokens; in [1, C].

    He et al. 2405.19279, equation 2: 1 if all channels are alike, C if one holds everything.
    """
    return power.square().mean() / power.mean().square()


def entry_kurtosis(x: torch.Tensor) -> torch.Tensor:
    """E[(x - mu)^4] / sigma^4 over the entries of each sequence x (N, T, C): (N,). Bondarenko 2306.12929, who average
    it over sequences."""
    square = (x - x.mean((1, 2), keepdim=True)).square()
    return square.square().mean((1, 2)) / zero_is_nan(square.mean((1, 2)).square())


# ------------------------------------------------------------------------------------------ co-occurrence


def overlap(
    spike: torch.Tensor, sink: torch.Tensor, tokens: torch.Tensor | None = None, weights: torch.Tensor | None = None
) -> OverlapRates:
    """P(sink|spike), P(spike|sink), Jaccard, lift and what position explains, of bool arrays (N, T); nan if undefined.

    `tokens`: bool (N, T), which entries are tokens and not padding. `weights`: how often each sequence counts (N,), as
    in a bootstrap. `lift` is the overlap over its expectation when, at each position, the sink labels are permuted
    among the sequences: 1 if position alone explains it. `lift_anywhere`: over its expectation when they are permuted
    among all tokens. `explained_by_position`: the part of the overlap in excess of the latter that the former has too,
    at most 1. Expectations are exact, not drawn. `expected`: the tokens that would be both, position by position.
    """
    present = torch.ones_like(spike) if tokens is None else tokens
    w = (torch.ones(len(spike)) if weights is None else weights).double()[:, None]
    p, spike, sink = present.double(), spike.double(), sink.double()
    pairs = spike * sink
    both, spikes, sinks, total = (w * pairs).sum(), (w * spike).sum(), (w * sink).sum(), (w * p).sum()
    # at each position: pairs of two different sequences, so that a sequence drawn twice does not meet itself, and own
    n = (w * p).sum(0)
    others = (w * spike).sum(0) * (w * sink).sum(0) - (w * w * pairs).sum(0)
    possible = n * n - (w * w * p).sum(0)
    at_position = ((others * (n - 1).clamp_min(0) / possible.clamp_min(1)) + (w * pairs).sum(0) / n.clamp_min(1)).sum()
    anywhere = spikes * sinks / total
    ratio = lambda a, b: (a / b).item() if b > 0 else float("nan")
    excess = both - anywhere
    return OverlapRates(
        p_sink_given_spike=ratio(both, spikes),
        p_spike_given_sink=ratio(both, sinks),
        jaccard=ratio(both, spikes + sinks - both),
        expected=at_position.item(),
        lift=ratio(both, at_position),
        lift_anywhere=ratio(both, anywhere),
        explained_by_position=ratio((at_position - anywhere).clamp_min(0).minimum(excess), excess),
    )


def permutation_p(
    spike: torch.Tensor,
    sink: torch.Tensor,
    tokens: torch.Tensor | None = None,
    permutations: int = 999,
    seed: int = 0,
) -> float:
    """One-sided p of the overlap of bool arrays (N, T) when whole sequences' sink labels are permuted.

    Whole sequences, so that what clusters in a sequence stays together; among sequences of the same length (`tokens`).
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.full((len(spike),), spike.size(1)) if tokens is None else tokens.sum(1)
    columns = (spike.any(0) & sink.any(0)).nonzero()[:, 0]  # elsewhere the overlap is zero either way
    if not len(columns):
        return 1.0
    spike, sink = spike[:, columns], sink[:, columns]
    by_length = lengths.argsort(stable=True)
    observed, as_large = (spike & sink).sum(), 0
    for _ in range(permutations):
        drawn = (lengths + torch.rand(len(lengths), generator=generator, dtype=torch.float64)).argsort()
        as_large += bool((spike[by_length] & sink[drawn]).sum() >= observed)
    return (1 + as_large) / (1 + permutations)


def wilson(hits: int, n: int, tests: int = 1) -> Interval:
    """95% interval of a rate by Wilson (1927), of `hits` among n; Bonferroni's if it is the best of several `tests`."""
    z = NormalDist().inv_cdf(1 - 0.025 / tests)
    rate = hits / n
    middle, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return [max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))]


def rate_ci(rates: torch.Tensor) -> Interval | None:
    """95% interval of the mean of rates (N,) of sequences: bootstrap, or Wilson's where all of them are 0 or all 1."""
    if len(rates) and bool((rates == rates[0]).all()) and rates[0] in (0, 1):
        return wilson(int(rates.sum()), len(rates))
    return bootstrap_ci(lambda i: rates[i].mean().item(), len(rates))


@overload
def bootstrap_ci(
    statistic: Callable[[torch.Tensor], float], n: int, resamples: int = ..., seed: int = ...
) -> Interval | None: ...


@overload
def bootstrap_ci(
    statistic: Callable[[torch.Tensor], dict[str, float]], n: int, resamples: int = ..., seed: int = ...
) -> dict[str, Interval | None]: ...


def bootstrap_ci(statistic: Callable[[torch.Tensor], Any], n: int, resamples: int = 1000, seed: int = 0) -> Any:
    """95% interval of `statistic(indices)` over resampled sequences; None where undefined, as for n = 1.

    Percentiles, expanded so that few sequences do not make it too narrow: Hesterberg 2015 (1411.5279), section 5.2.

    `statistic` maps a LongTensor (n,) of sequence numbers to a float, or to a dict of floats.
    """
    generator = torch.Generator().manual_seed(seed)
    if n < 2:
        only = statistic(torch.zeros(1, dtype=torch.int64))
        return dict.fromkeys(only) if isinstance(only, dict) else None
    draws = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(resamples)]
    if isinstance(draws[0], dict):
        return {key: _interval([draw[key] for draw in draws], n) for key in draws[0]}
    return _interval(draws, n)


def paired_effect(clean: torch.Tensor, changed: torch.Tensor) -> dict[str, Any]:
    """The findings' entry of a change, from the losses (N,) of the same sequences before and after it: paired."""
    delta = changed - clean
    return {
        "loss": changed.mean().item(),
        "ppl": changed.mean().exp().item(),
        "delta_loss": delta.mean().item(),
        "ci95": bootstrap_ci(lambda i: delta[i].mean().item(), len(delta)),
    }


def _interval(values: list[float], n: int) -> Interval | None:
    """Of statistics of resamples of `n` sequences."""
    drawn = torch.tensor(values, dtype=torch.float64)
    drawn, tail = drawn[~drawn.isnan()], _tail(n)
    return drawn.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist() if len(drawn) else None


def _tail(n: int) -> float:
    """The percentile at which a 95% interval of n values ends: Phi(-t sqrt(n / (n - 1))), t Student's of n - 1 degrees
    of freedom, by its expansion in 1 / (n - 1) (Abramowitz and Stegun 26.7.5)."""
    z, f = NormalDist().inv_cdf(0.975), n - 1
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    t = z + sum(term / f ** (i + 1) for i, term in enumerate(terms))
    return NormalDist().cdf(-t * math.sqrt(n / f))
