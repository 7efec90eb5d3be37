"""Descriptions of the rules. The tables, curves and nulls of the findings are made from them alone.

Rules are in spikes.SPIKE_RULES and sinks.SINK_RULES. Shapes: N sequences, T tokens, L layers of attention, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

BEST_HEAD = "best_head"
SEQUENCES = "sequences"


class Scores:
    """What curves compare with their thresholds, a part of an observe.Observation. At padding it is False or 0."""

    strength: torch.Tensor  # (N, T), each token's largest |h| over its threshold, among the attended taps
    spikes: dict[str, torch.Tensor]  # spikes.marking_rules -> the tokens that each marks, bool (N, T)
    share: torch.Tensor  # (N, T), each key's share of its sequence's attention mass
    strong_alpha: torch.Tensor  # (N, T), the alpha that a twentieth of all heads reaches
    first_alpha: torch.Tensor  # (N, L, H), the first key's alpha
    best_alpha: torch.Tensor  # (N, L, H), the largest alpha of an eligible key


Hits = Callable[[Scores, float], torch.Tensor]


@dataclass(frozen=True)
class Curve:
    """How the number of marked tokens changes with a rule's threshold. A hit is a token, or a head, that passes it."""

    name: str  # its key in the findings
    title: str  # the title of a figure's axis
    thresholds: tuple[float, ...]
    used: float  # the rule's own threshold
    tokens: Hits  # the tokens that are hits: bool (N, T)
    best_head: Hits | None = None  # the heads that have a hit: bool (N, L, H); for rules that mark tokens head by head
    sink_1: Hits | None = None  # the heads in which the first key is a hit: bool (N, L, H)
    scale: str = "linear"  # the figure's axis: linear, log, or even, where all thresholds are equally far apart

    @property
    def key(self) -> str:
        """The field of CurvePoint by which verdicts and figures go."""
        return BEST_HEAD if self.best_head else SEQUENCES


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule that marks tokens."""

    text: str  # the rule in words
    heading: str  # the heading of its column in the table of nulls
    compared: str | None  # the name of its row in a comparison of checkpoints; None: it has no row there
    nulls: tuple[str, ...] = ("init",)  # the nulls in which every hit is a false positive
    curve: Curve | None = None
