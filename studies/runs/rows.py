"""The rows of a study's table: a run that is planned, has ended, or is done and measured."""

from dataclasses import dataclass
from typing import Any

from spikesink import schema
from spikesink.edit.findings import Exposed, Named, RemainingShare
from spikesink.errors import UserError
from spikesink.schema import Record

DONE, DIVERGED, STARTED, NOT_RUN = "done", "diverged", "started", "not run"

Measures = dict[str, float | None]  # name of a measure -> its number; None where it is undefined
Interval = tuple[float, float]  # the ends of a 95% interval


@dataclass(frozen=True)
class Planned:
    """A run that has not ended."""

    seed: int
    job: str  # hash by which a finished run is known again
    code: str  # hash of the code
    status: str


@dataclass(frozen=True)
class Ended(Planned):
    """A run that ended. Unless it is Done, it diverged: its loss or gradient was not finite."""

    step: int
    lr: float | None  # the learning rate at which it diverged
    loss: float | None  # validation loss, nats per token
    tokens: int
    machine: str
    torch: str


class Change(Record):
    """What an intervention or a control changes: how many entries it `edited`, the loss (nats per token), and the
    spikes and sinks that remain."""

    edited: int
    delta_loss: float
    ci95: Interval
    spikes_left: RemainingShare
    sinks_left: RemainingShare


class Control(Change, Named):
    """A matched control of an intervention."""

    exposed: Exposed | None = schema.sometimes()


class Effect(Change):
    """An intervention and its controls."""

    control: list[Control]
    exposed: Exposed | None = schema.sometimes()


@dataclass(frozen=True)
class Ablations:
    """Effects by intervention, and the verdicts on whether spikes need sinks. Both are absent where not asked for."""

    interventions: dict[str, Effect] | None = schema.sometimes()
    needs: dict[str, str] | None = schema.sometimes()


@dataclass(frozen=True)
class Point:
    """A checkpoint of a run."""

    step: int
    tokens: int
    loss: float | None
    measures: Measures


@dataclass(frozen=True)
class Where:
    """Where the spikes are."""

    layers: dict[str, float]  # layer -> top1/median
    tokens: dict[str, int]  # text -> how often it is among the listed spike tokens


@dataclass(frozen=True)
class Done(Ended):
    """A run that reached its last step, with its measures there and over training."""

    weights: str  # hash of the final weights
    verdicts: dict[str, str]
    measures: Measures
    ablations: Ablations
    course: list[Point]
    where: Where


@dataclass(frozen=True)
class Finished:
    """A row that does not change any more, and the seconds that its run took."""

    row: Ended
    seconds: float | None


def read_finished(content: dict[str, Any], origin: object) -> Finished:
    """The Finished that row.json holds. Raises UserError if another version has written it."""
    row = {key: value for key, value in content.items() if key not in ("what", "seconds")}
    try:
        return Finished(schema.from_json(Done if row["status"] == DONE else Ended, row), content["seconds"])
    except schema.Misfit as problem:
        raise UserError(f"{origin} is not what this version writes: {problem}") from None
