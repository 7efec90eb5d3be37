"""What every rule says of itself: tables, curves and nulls of the findings are made of these, none names a rule.

A rule of spikes is an entry of spikes.SPIKE_RULES, one of sinks of sinks.SINK_RULES. Shapes: N sequences, T tokens,
L layers of attention, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

BEST_HEAD = "best_head"
SEQUENCES = "sequences"


class Observed(Protocol):
    """What rules and examples need of an observe.Observation, which says what each is."""

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
        """Which entries are tokens."""

    @property
    def strength(self) -> torch.Tensor:
        """How many times its threshold a token's largest |h| is."""

    @property
    def spikes(self) -> dict[str, torch.Tensor]:
        """What the rules mark."""

    @property
    def percentiles(self) -> dict[float, torch.Tensor]:
        """What the percentile rules mark."""


Hits = Callable[[Observed, float], torch.Tensor]


@dataclass(frozen=True)
class Curve:
    """How what a rule marks changes with its threshold."""

    name: str  # in the findings
    title: str  # of a figure's axis
    thresholds: tuple[float, ...]
    used: float  # the rule's own
    tokens: Hits  # which tokens have a hit: bool (N, T)
    best_head: Hits | None = None  # which heads have one: bool (N, L, H); for rules that mark tokens head by head
    sink_1: Hits | None = None  # in which heads the first key is one: bool (N, L, H)
    scale: str = "linear"  # of a figure's axis: linear, log, or even: each threshold as far from the next

    @property
    def key(self) -> str:
        """The entry of a point that verdicts and figures go by."""
        return BEST_HEAD if self.best_head else SEQUENCES


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule that marks tokens."""

    text: str  # in words
    heading: str  # of its column among the nulls
    compared: str | None  # what its row is called where checkpoints stand side by side; None: it has none there
    nulls: tuple[str, ...] = ("init",)  # whose hits are false ones
    curve: Curve | None = None
