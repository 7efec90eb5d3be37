"""Descriptions of the rules. The tables, curves and nulls of the findings are made from them alone.

Rules are in spikes.SPIKE_RULES and sinks.SINK_RULES. Shapes: N sequences, T tokens, L layers of attention, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

BEST_HEAD = "best_head"
SEQUENCES = "sequences"


class ObservationLike(Protocol):
    """The part of an observe.Observation that rules and examples need; see there."""

    ids: torch.Tensor
    share: torch.Tensor
    max_alpha: torch.Tensor
    strong_alpha: torch.Tensor
    sink_heads: torch.Tensor
    eligible: torch.Tensor
    first_alpha: torch.Tensor
    best_alpha: torch.Tensor
    loss: torch.Tensor

    @property
    def tokens(self) -> torch.Tensor:
        """Which entries are tokens and not padding."""

    @property
    def strength(self) -> torch.Tensor:
        """Each token's largest |h| over its threshold."""

    @property
    def spikes(self) -> dict[str, torch.Tensor]:
        """The tokens that each spike rule marks."""

    @property
    def percentiles(self) -> dict[float, torch.Tensor]:
        """The tokens that each percentile rule marks."""


Hits = Callable[[ObservationLike, float], torch.Tensor]


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
