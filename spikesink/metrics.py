"""The field's definitions as pure functions of tensors; each cites its source.

Shapes: N sequences, T tokens, C channels, H heads. `stream` is a residual stream (N, T, C) in float32. `received` is
the attention mass (N, H, T) each key gets, summed over its queries. Positions count from 0 in code, from 1 in papers.
"""

import torch

EPSILONS = (0.2, 0.3, 0.5, 0.8)  # thresholds of Gu et al.'s sink metric; 0.3 is theirs
SPIKE_RATIO = 30.0  # of the scale-free spike rule
PERCENTILE, PERSISTENCE = 99.9, 0.5
SHARE = 0.2  # of all attention mass, for the share rule

# -------------------------------------------------------------------------------- magnitudes in the stream


def top_magnitudes(stream, n=3):
    """The n largest |h| of each sequence's [T x C] matrix, descending: (N, n). Sun et al. 2402.17762, figure 4."""
    return stream.abs().flatten(1).topk(n).values


def median_magnitude(stream):
    """The median |h| of each sequence's [T x C] matrix: (N,). Sun et al. 2402.17762."""
    return stream.abs().flatten(1).median(dim=1).values


def max_median_ratio(stream):
    """max_j |x_j| / median_j |x_j| of every token: (N, T); its mean over tokens is MMR."""
    magnitude = stream.abs()
    return magnitude.amax(-1) / magnitude.median(-1).values.clamp_min(1e-30)


def channel_kurtosis(power):
    """mean_j s_j^4 / (mean_j s_j^2)^2 with s_j^2 = `power` (C,), channel j's mean square over tokens; in [1, C].

    He et al. 2405.19279, equation 2: 1 if all channels are alike, C if one holds everything.
    """
    return power.square().mean() / power.mean().square()


def entry_kurtosis(moments):
    """E[(x - mu)^4] / sigma^4 over all entries, from their raw moments (E x, ..., E x^4). Bondarenko 2306.12929."""
    m1, m2, m3, m4 = moments
    variance = m2 - m1**2
    return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2 if variance > 0 else float("nan")


# -------------------------------------------------------------------------------------------- spike rules


def massive_threshold(stream):
    """max(100, 1000 x median |h|) of each sequence: (N,). Massive activations, Sun et al. 2402.17762.

    Theirs is |h| > 100 and |h| >= 1000 x median; below about 1B parameters it rarely fires.
    """
    return (1000 * median_magnitude(stream)).clamp_min(torch.nextafter(torch.tensor(100.0), torch.tensor(torch.inf)))


def ratio_threshold(stream, ratio=SPIKE_RATIO):
    """`ratio` x median |h| of each sequence: (N,). The scale-free form of Sun et al.'s rule, for small models."""
    return ratio * median_magnitude(stream)


def percentile_threshold(stream, percentile=PERCENTILE):
    """The given percentile of |h| in each sequence: (N,). An entry is a spike if above it in enough layers."""
    flat = stream.abs().flatten(1)
    above = max(1, round(flat.size(1) * (1 - percentile / 100)))
    return flat.topk(above + 1).values[:, -1] if above < flat.size(1) else flat.amin(1)


def sigma_outliers(stream, sigmas=6.0):
    """|x - mu| > 6 sigma over each sequence's entries: bool (N, T, C). Bondarenko 2306.12929."""
    flat = stream.flatten(1)
    mean, std = flat.mean(1)[:, None, None], flat.std(1)[:, None, None]
    return (stream - mean).abs() > sigmas * std


# name -> (what it says, entries of one layer that it marks: bool (N, T, C)). The persistent one is counted over layers.
SPIKE_RULES = {
    "ratio": (
        f"|h| >= {SPIKE_RATIO:g} x median |h| of the layer",
        lambda x: x.abs() >= ratio_threshold(x)[:, None, None],
    ),
    "massive": (
        "|h| > 100 and |h| >= 1000 x median |h| of the layer",
        lambda x: x.abs() >= massive_threshold(x)[:, None, None],
    ),
    "six_sigma": ("|x - mu| > 6 sigma of the layer", sigma_outliers),
    "percentile": (
        f"|h| above its layer's {PERCENTILE}th percentile in at least {PERSISTENCE:.0%} of the layers",
        lambda x: x.abs() > percentile_threshold(x)[:, None, None],
    ),
}
PERSISTENT_RULES = {"percentile": PERSISTENCE}
PRIMARY_SPIKE_RULE = "ratio"
PRIMARY_SINK_EPSILON = 0.3

# -------------------------------------------------------------------------------------------------- sinks


def queries_per_key(T):
    """How many queries can see key k under causal attention, T - k: (T,)."""
    return torch.arange(T, 0, -1)


def sink_alpha(received):
    """alpha_k = sum_{i >= k} A[i, k] / (number of such queries): (N, H, T). Gu et al. 2410.10781.

    All later queries count, also those that a sliding window keeps from seeing the key.
    """
    return received / queries_per_key(received.size(-1))


def eligible_keys(T):
    """Keys with at least T/4 queries: bool (T,). Later ones pass any threshold by ordinary local attention."""
    return queries_per_key(T) >= T / 4


def second_half_alpha(received_late):
    """alpha_k over the queries of the second half only: (N, H, T); `received_late` is their attention mass."""
    T = received_late.size(-1)
    return received_late / queries_per_key(T).clamp_max(T - T // 2)


def uniform_share(T):
    """Each key's share of the mass if every query spread its attention evenly over its past: (T,), sums to 1."""
    per_query = 1.0 / torch.arange(1, T + 1, dtype=torch.float64)
    return per_query.flip(0).cumsum(0).flip(0) / T


# ------------------------------------------------------------------------------------------ co-occurrence


def overlap(spike, sink):
    """P(sink|spike), P(spike|sink), Jaccard and lift of two bool arrays (N, T); nan where undefined.

    Lift is the overlap over its expectation when, at each position, the sink labels are permuted among the
    sequences: 1 if position alone explains it. The expectation is exact: sum_t spikes_t x sinks_t / N.
    """
    spike, sink = spike.double(), sink.double()
    both, spikes, sinks = (spike * sink).sum(), spike.sum(), sink.sum()
    expected = (spike.sum(0) * sink.sum(0)).sum() / len(spike)
    ratio = lambda a, b: (a / b).item() if b > 0 else float("nan")
    return {
        "p_sink_given_spike": ratio(both, spikes),
        "p_spike_given_sink": ratio(both, sinks),
        "jaccard": ratio(both, spikes + sinks - both),
        "lift": ratio(both, expected),
    }


def bootstrap_ci(statistic, n, resamples=1000, seed=0):
    """95% percentile interval of `statistic(indices)` over resampled sequences; None where it is undefined.

    `statistic` maps a LongTensor (n,) of sequence numbers to a float, or to a dict of floats.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(resamples)]
    if isinstance(draws[0], dict):
        return {key: _interval([draw[key] for draw in draws]) for key in draws[0]}
    return _interval(draws)


def _interval(values):
    values = torch.tensor(values, dtype=torch.float64)
    values = values[~values.isnan()]
    return values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist() if len(values) else None
