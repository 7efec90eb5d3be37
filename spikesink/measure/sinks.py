"""Attention sinks: Gu et al.'s alpha, the keys that have enough queries, and the rules that mark tokens.

Shapes: N sequences, T tokens, H heads. `received` is the attention mass (N, H, T) each key gets, summed over its
queries. Positions count from 0 in code, from 1 in papers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..models.subject import Seam, map_rows
from .rules import Curve, Rule, Scores

EPSILONS = (0.2, 0.3, 0.5, 0.8)  # thresholds of Gu et al.'s sink metric; 0.3 is theirs
SHARE = 0.2  # of all attention mass, for the share rule
EPSILON_CURVE = tuple(round(0.05 * i, 2) for i in range(1, 20))
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
PRIMARY_SINK_EPSILON = 0.3
HEAD_SHARE = 0.05  # a sink token is a sink in at least this share of all heads


def queries_that_see(seam: Seam, T: int, n_queries: int, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of queries that see each key through a seam's mask (which may be a window), and the number of those in
    the second half: (T,) each, on the CPU."""
    counts = torch.zeros(2, T, dtype=torch.int64)
    for first in range(0, n_queries, 256):
        rows = seam.seen(first, min(256, n_queries - first), T).cpu()  # (R, T)
        if causal:
            rows = rows & (torch.arange(T) <= torch.arange(first, first + len(rows))[:, None])
        counts[0] += rows.sum(0)
        counts[1] += rows[max(0, n_queries // 2 - first) :].sum(0)
    return counts[0], counts[1]


def sink_alpha(received: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """alpha_k = sum_i A[i, k] / (number of queries that see k, `queries` (T,)): (N, H, T). Gu et al. 2410.10781.

    They divide by the number of queries i >= k, which is the same for attention without a window.
    """
    return received / queries.clamp_min(1)


def eligible_keys(queries: torch.Tensor, n_queries: int) -> torch.Tensor:
    """Keys that at least a quarter of all `n_queries` see: bool (T,). Other keys pass any threshold by ordinary local
    attention. Under a window shorter than that, no key can be a sink."""
    return queries >= n_queries / 4


def needed_heads(heads: int) -> int:
    """The number of heads in which a token must be a sink to be called one: a twentieth of all `heads`, at least one.

    If any one head were enough, large models would meet the rule by their number of heads alone.
    """
    return max(1, math.ceil(HEAD_SHARE * heads))


def uniform_share(T: int, causal: bool) -> torch.Tensor:
    """Each key's share of the mass if every query spread its attention evenly over what it may see: (T,), sums to 1."""
    if not causal:
        return torch.full((T,), 1 / T, dtype=torch.float64)
    per_query = 1.0 / torch.arange(1, T + 1, dtype=torch.float64)
    return per_query.flip(0).cumsum(0).flip(0) / T


@torch.no_grad()
def alpha_in(
    seam: Seam,
    q: torch.Tensor,
    k: torch.Tensor,
    causal: bool,
    bias: torch.Tensor | None = None,
    rows: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (alpha of every key of a seam's map (B, H, T), the number of queries that see it (T,)), on the CPU.

    `rows`: (rows of the map, first query) -> the rows that are used instead.
    """
    received = q.new_zeros(*q.shape[:2], k.size(-2), dtype=torch.float32)
    for first, weights in map_rows(seam, q, k, causal, bias):
        received[..., : weights.size(-1)] += (rows(weights, first) if rows else weights).sum(-2)
    queries, _ = queries_that_see(seam, k.size(-2), q.size(-2), causal)
    return sink_alpha(received.cpu(), queries), queries


def are_sinks(alpha: torch.Tensor, queries: torch.Tensor, n_queries: int) -> torch.Tensor:
    """Which keys are sinks: alpha > 0.3, and T/4 queries see them. Takes what `alpha_in` returns; bool, as alpha."""
    return (alpha > PRIMARY_SINK_EPSILON) & eligible_keys(queries, n_queries)


@dataclass(frozen=True, kw_only=True)
class SinkRule(Rule):
    """Marks the tokens that its curve counts at the rule's own threshold."""

    curve: Curve

    def tokens(self, obs: Scores) -> torch.Tensor:
        """The marked tokens: bool (N, T)."""
        return self.curve.tokens(obs, self.curve.used)


PRIMARY_SINK_RULE = "gu"
SINK_NULLS = ("init", "shuffled_positions")
SINK_RULES = {  # the first is Gu et al.'s, 2410.10781
    PRIMARY_SINK_RULE: SinkRule(
        text=f"alpha > {PRIMARY_SINK_EPSILON} in at least {HEAD_SHARE:.0%} of all heads, keys that T/4 queries see",
        heading="sinks",
        compared="sink tokens",
        nulls=SINK_NULLS,
        curve=Curve(
            name="epsilon",
            title="sink: ε, best head",
            thresholds=EPSILON_CURVE,
            used=PRIMARY_SINK_EPSILON,
            tokens=lambda obs, epsilon: obs.strong_alpha > epsilon,
            best_head=lambda obs, epsilon: obs.best_alpha > epsilon,
            sink_1=lambda obs, epsilon: obs.first_alpha > epsilon,
        ),
    ),
    "share": SinkRule(
        text=f"more than {SHARE:.0%} of all attention mass of its sequence",
        heading="share rule",
        compared=None,
        nulls=SINK_NULLS,
        curve=Curve(
            name="share",
            title="sink: share of attention",
            thresholds=SHARES,
            used=SHARE,
            tokens=lambda obs, share: obs.share > share,
        ),
    ),
}
