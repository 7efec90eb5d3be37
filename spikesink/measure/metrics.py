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
    """Draws from [0, 1) for sequences with these numbers (B,): (B, *shape), float32, on the CPU. A sequence's draws
    depend only on its number and on the keys (not negative), so they are the same for any batch size."""
    draws = [np.random.default_rng((*keys, n)).random(tuple(shape), np.float32) for n in numbers.tolist()]
    return torch.from_numpy(np.stack(draws))


def bits_per_byte(nats: float, n_bytes: int | None) -> float | None:
    """The summed loss of some tokens, in nats, as bits per byte of their text, which can be compared between
    tokenizers. None if the loss is not finite or the text is not known."""
    return nats / math.log(2) / n_bytes if n_bytes and math.isfinite(nats) else None


def median_magnitude(stream: torch.Tensor) -> torch.Tensor:
    """The median |h| of each sequence's [T x C] matrix: (N,). Sun et al. 2402.17762."""
    return stream.abs().flatten(1).median(1).values


BITS = 16  # a histogram ignores so many bits of a float32: its bins are 2^-7 wide, relative to the values in them


def histogram(x: torch.Tensor) -> torch.Tensor:
    """Counts the values x (B, K), float32 and not negative, in bins of their leading bits: (B, 2^15).

    A float's bits, read as an integer, grow with it: a bin is an exponent and 7 bits of mantissa.
    """
    bins = (x.contiguous().view(torch.int32) >> BITS).long()
    bins += torch.arange(len(x), device=x.device)[:, None] << 15
    return torch.bincount(bins.flatten(), minlength=len(x) << 15).view(len(x), -1)


def quantiles(counts: torch.Tensor, probabilities: Sequence[float]) -> torch.Tensor:
    """Quantiles, at `probabilities` in [0, 1], of the values that `histogram` counted in `counts` (B, bins): (B,
    len(probabilities)). They are within 0.4% of the exact ones."""
    cumulative = counts.cumsum(-1)
    n = cumulative[:, -1:]
    rank = torch.tensor(probabilities, device=counts.device, dtype=torch.float64) * (n - 1).double()
    bins = torch.searchsorted(cumulative, rank.floor().long() + 1)
    middle = ((bins << BITS) | (1 << (BITS - 1))).int().view(torch.float32)
    return middle.masked_fill(bins == 0, 0.0)


def zero_is_nan(x: torch.Tensor) -> torch.Tensor:
    """Returns x with nan in place of 0, for use as a divisor."""
    return torch.where(x == 0, torch.nan, x)


def channel_kurtosis(power: torch.Tensor) -> torch.Tensor:
    """mean_j s_j^4 / (mean_j s_j^2)^2 with s_j^2 = `power` (C,), channel j's mean square over tokens; in [1, C].

    He et al. 2405.19279, equation 2. It is 1 if all channels have equal power, and C if one channel has all of it.
    """
    return power.square().mean() / power.mean().square()


def entry_kurtosis(x: torch.Tensor) -> torch.Tensor:
    """E[(x - mu)^4] / sigma^4 over the entries of each sequence x (N, T, C): (N,). Bondarenko 2306.12929, who average
    it over sequences."""
    square = (x - x.mean((1, 2), keepdim=True)).square()
    return square.square().mean((1, 2)) / zero_is_nan(square.mean((1, 2)).square())


def overlap(
    spike: torch.Tensor, sink: torch.Tensor, tokens: torch.Tensor | None = None, weights: torch.Tensor | None = None
) -> OverlapRates:
    """P(sink|spike), P(spike|sink), Jaccard, lift and the part due to position, of bool arrays (N, T).

    `tokens`: bool (N, T), which entries are tokens and not padding. `weights`: how often each sequence counts (N,), as
    in a bootstrap. `expected`: the expected number of tokens that are both, if the sink labels were permuted among the
    sequences at each position. `lift`: the overlap over that expectation; 1 if position alone explains the overlap.
    `lift_anywhere`: the overlap over its expectation if the labels were permuted among all tokens.
    `explained_by_position`: the share of the overlap's excess over this expectation that the first expectation has too,
    at most 1. Both expectations are exact, not drawn. Undefined numbers are nan.
    """
    p = (torch.ones_like(spike) if tokens is None else tokens).double()
    w = (torch.ones(len(spike)) if weights is None else weights).double()[:, None]
    spike, sink = spike.double(), sink.double()
    pairs = spike * sink
    both, spikes, sinks, total = (w * pairs).sum(), (w * spike).sum(), (w * sink).sum(), (w * p).sum()
    # at each position: pairs of different sequences (one drawn twice is not paired with itself), then with itself
    n = (w * p).sum(0)
    others = (w * spike).sum(0) * (w * sink).sum(0) - (w * w * pairs).sum(0)
    all_pairs = n * n - (w * w * p).sum(0)
    at_position = ((others * (n - 1).clamp_min(0) / all_pairs.clamp_min(1)) + (w * pairs).sum(0) / n.clamp_min(1)).sum()
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
    spike: torch.Tensor, sink: torch.Tensor, tokens: torch.Tensor | None = None, permutations: int = 999
) -> float:
    """One-sided p of the overlap of bool arrays (N, T) when whole sequences' sink labels are permuted.

    Sequences are permuted as wholes, because tokens cluster in them, among those with equally many `tokens` (N, T).
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((len(spike),), spike.size(1)) if tokens is None else tokens.sum(1)
    columns = (spike.any(0) & sink.any(0)).nonzero()[:, 0]  # at other positions the overlap is always zero
    if not len(columns):
        return 1.0
    spike, sink = spike[:, columns], sink[:, columns]
    by_length = lengths.argsort(stable=True)
    observed, as_large = (spike & sink).sum(), 0
    for _ in range(permutations):
        order = (lengths + torch.rand(len(lengths), generator=generator, dtype=torch.float64)).argsort()
        as_large += bool((spike[by_length] & sink[order]).sum() >= observed)
    return (1 + as_large) / (1 + permutations)


def wilson(hits: int, n: int, tests: int = 1) -> Interval:
    """The 95% interval of a rate, `hits` among n: Wilson (1927), and Bonferroni for the best of several `tests`."""
    z = NormalDist().inv_cdf(1 - 0.025 / tests)
    rate = hits / n
    middle, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return [max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))]


def rate_ci(rates: torch.Tensor) -> Interval | None:
    """The 95% interval of the mean of rates (N,) of sequences, by bootstrap; by Wilson where all are 0 or all are 1."""
    if len(rates) and bool((rates == rates[0]).all()) and rates[0] in (0, 1):
        return wilson(int(rates.sum()), len(rates))
    return bootstrap_ci(lambda i: rates[i].mean().item(), len(rates))


@overload
def bootstrap_ci(statistic: Callable[[torch.Tensor], float], n: int, resamples: int = ...) -> Interval | None: ...


@overload
def bootstrap_ci(
    statistic: Callable[[torch.Tensor], dict[str, float]], n: int, resamples: int = ...
) -> dict[str, Interval | None]: ...


def bootstrap_ci(statistic: Callable[[torch.Tensor], Any], n: int, resamples: int = 1000) -> Any:
    """The 95% interval of `statistic(indices)` over resampled sequences; None where it is undefined, as for n = 1.

    The percentiles are expanded, so that the interval is not too narrow for few sequences: Hesterberg 2015 (1411.5279),
    section 5.2. `statistic` maps a LongTensor (n,) of sequence numbers to a float, or to a dict of floats.
    """
    generator = torch.Generator().manual_seed(0)
    if n < 2:
        value = statistic(torch.zeros(1, dtype=torch.int64))
        return dict.fromkeys(value) if isinstance(value, dict) else None
    draws = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(resamples)]
    if isinstance(draws[0], dict):
        return {key: _expanded_interval([draw[key] for draw in draws], n) for key in draws[0]}
    return _expanded_interval(draws, n)


def paired_effect(clean: torch.Tensor, changed: torch.Tensor) -> dict[str, Any]:
    """The findings' entry of an edit: paired differences of the same sequences' losses (N,) without and with it."""
    delta = changed - clean
    return {
        "loss": changed.mean().item(),
        "ppl": changed.mean().exp().item(),
        "delta_loss": delta.mean().item(),
        "ci95": bootstrap_ci(lambda i: delta[i].mean().item(), len(delta)),
    }


def _expanded_interval(values: list[float], n: int) -> Interval | None:
    """The interval of a statistic from its values in resamples of `n` sequences."""
    draws, tail = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64), _tail(n)
    return draws.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist() if len(draws) else None


def _tail(n: int) -> float:
    """The percentile at which a 95% interval of n values ends: Phi(-t sqrt(n / (n - 1))). t is Student's with n - 1
    degrees of freedom, by its expansion in 1 / (n - 1) (Abramowitz and Stegun 26.7.5)."""
    z, f = NormalDist().inv_cdf(0.975), n - 1
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    t = z + sum(term / f ** (i + 1) for i, term in enumerate(terms))
    return NormalDist().cdf(-t * math.sqrt(n / f))
