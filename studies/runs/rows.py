"""A run as a study's table holds it: planned, ended, or done and measured."""

from dataclasses import dataclass
from typing import Any

from spikesink import schema
from spikesink.edit.findings import Exposed
from spikesink.errors import UserError

DONE, DIVERGED, STARTED, NOT_RUN = "done", "diverged", "started", "not run"

Measures = dict[str, float | None]  # name of a measure -> its number, None where it is undefined
Pair = tuple[float, float]  # the ends of a 95% interval


@dataclass(frozen=True)
class Planned:
    """A run that has not ended."""

    seed: int
    job: str  # hash by which a finished run is known again
    code: str  # hash of the code
    status: str


@dataclass(frozen=True)
class Ended(Planned):
    """A run that ended; not at its last step, but in a loss or gradient that was not finite, unless it is Done."""

    step: int
    lr: float | None  # the learning rate at which it diverged
    loss: float | None  # validation loss, nats per token
    tokens: int
    machine: str
    torch: str


@dataclass(frozen=True)
class LeftBounds:
    """Intervals over sequences of what is left."""

    same: Pair | None
    all: Pair | None


@dataclass(frozen=True)
class Left:
    """What an edit leaves of spikes, or of sinks: a share of the very same ones, and of as many."""

    sequences: int
    same: float | None
    all: float | None
    ci95: LeftBounds | None


@dataclass(frozen=True)
class Control:
    """A matched control of an intervention: entries edited, and the change of the loss in nats per token."""

    name: str
    edited: int
    delta_loss: float
    ci95: Pair
    spikes_left: Left
    sinks_left: Left
    exposed: Exposed | None = schema.sometimes()


@dataclass(frozen=True)
class Effect:
    """The same of an intervention, with its controls."""

    edited: int
    delta_loss: float
    ci95: Pair
    spikes_left: Left
    sinks_left: Left
    control: list[Control]
    exposed: Exposed | None = schema.sometimes()


@dataclass(frozen=True)
class Ablations:
    """Effects by intervention, and the verdicts on whether spikes need sinks; without either if none was asked for."""

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
    """Where the spikes are: top1/median by layer, how often each text is among the tokens that are listed."""

    layers: dict[str, float]
    tokens: dict[str, int]


@dataclass(frozen=True)
class Done(Ended):
    """A run that reached its last step, and what it shows there and on the way."""

    weights: str  # hash
    verdicts: dict[str, str]
    measures: Measures
    ablations: Ablations
    course: list[Point]
    where: Where


@dataclass(frozen=True)
class Finished:
    """A row that stays as it is, and the seconds that it took."""

    row: Ended
    seconds: float | None


def finished_json(finished: Finished, config_hash: str) -> dict[str, Any]:
    """What row.json holds."""
    return {**schema.to_json(finished.row), "what": config_hash, "seconds": finished.seconds}


def read_finished(content: dict[str, Any], origin: object) -> Finished:
    """The other way round. Raises UserError where another version has written it."""
    row = {key: value for key, value in content.items() if key not in ("what", "seconds")}
    try:
        return Finished(schema.from_json(Done if row["status"] == DONE else Ended, row), content["seconds"])
    except schema.Misfit as problem:
        raise UserError(f"{origin} is not what this version writes: {problem}") from None
