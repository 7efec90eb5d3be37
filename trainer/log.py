"""Rows of numbers -> log.jsonl, the terminal, TensorBoard, wandb or trackio. None stops a training run.

What cannot be written waits for the next time, or is given up with a warning.
"""

import contextlib
import importlib
import json
import math
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from spikesink import files
from spikesink.errors import UserError
from spikesink.files import step_of
from spikesink.measure.monitor import flat, headline, words

Row = Mapping[str, Any]  # a line of log.jsonl
Look = tuple[int, Mapping[str, Any]]  # a step and what the monitor saw there


def warn(text: str) -> None:
    """One line on stderr."""
    tqdm.write(f"warning: {' '.join(text.split())}", file=sys.stderr)


class JsonLines:
    """A file of one JSON object per line. Rows that cannot be written (a full disk) wait for the next one."""

    def __init__(self, path: str | Path, step: int = 0) -> None:
        """Opens `path`, without the rows of steps after `step`, which a resumed run writes again. Raises OSError."""
        self.path, self.waiting, self.failing = Path(path), b"", False
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        kept = b"".join(line for line in lines if line.endswith(b"\n") and step_of(line) <= step)
        files.write_atomic(self.path, lambda file: file.write(kept))
        self.size = len(kept)
        self.file: Any = open(self.path, "r+b", buffering=0)

    def write(self, row: Row) -> None:
        """Appends a dict."""
        self.waiting += json.dumps(row).encode() + b"\n"
        try:
            self.file.seek(self.size)  # over what a failed attempt has left
            rest = self.waiting
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            if not self.failing:
                warn(f"cannot write {self.path}: {error.strerror}; its lines wait until it can be written")
            self.failing = True
            return
        self.size += len(self.waiting)
        self.waiting, self.failing = b"", False

    def close(self) -> None:
        """Closes the file; lines that still wait are lost."""
        if self.waiting:
            warn(f"{self.waiting.count(10)} lines of {self.path} could not be written")
        self.file.close()


class Log(Protocol):
    """Where rows go."""

    def write(self, row: Row) -> None:
        """Takes the row of a step."""

    def close(self) -> None:
        """Says that there are no more."""


class Progress:
    """The terminal: a bar of steps with the last loss, and a line for every row that has a validation loss."""

    def __init__(self, steps: int, first: int = 0, name: str = "", hidden: bool = False) -> None:
        """`name`: what the bar and its lines call the run. The bar is hidden where stderr is no terminal, too."""
        self.label, self.looked = f"{name}: " if name else "", ""
        self.bar = tqdm(total=steps, initial=first, unit="step", desc=name or None, disable=True if hidden else None)

    def advance(self) -> None:
        """One step is done."""
        self.bar.update()

    def write(self, row: Row) -> None:
        """Shows the row of a step."""
        if "monitor" in row:
            self.looked = words(row["monitor"])
        self.bar.set_postfix_str(", ".join(filter(None, (f"loss={row['loss']:.3f}", self.looked))), refresh=False)
        if row["val_loss"] is not None:
            said = f"loss {row['loss']:.4f}, val_loss {row['val_loss']:.4f}, {row['tokens_per_s']:,.0f} tokens/s"
            said = ", ".join(filter(None, (said, self.looked)))
            self.bar.write(f"{self.label}step {row['step']}: {said}", file=sys.stdout)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self.bar.close()


class Speed:
    """Tokens a second since the last `start`."""

    def __init__(self, tokens_per_step: int, step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.start(step)

    def start(self, step: int) -> None:
        """Time runs from here."""
        self.since, self.first = time.perf_counter(), step

    def at(self, step: int) -> float:
        """Tokens a second up to now, after step `step`."""
        return (step - self.first) * self.tokens_per_step / (time.perf_counter() - self.since)


def numbers(row: Row) -> dict[str, float]:
    """{name: number} of a row, without its step; its other losses are "losses/NAME", a model's own scalars
    "scalars/NAME", and its look at spikes and sinks is as `flat` names it."""
    more = {f"{kind}/{name}": value for kind in ("losses", "scalars") for name, value in row.get(kind, {}).items()}
    own = {key: value for key, value in {**row, **more}.items() if key != "step" and isinstance(value, (int, float))}
    return own | (flat(row["monitor"]) if "monitor" in row else {})


# what is drawn over layers and steps -> (where a row has it, its key there, whether its logarithm is shown)
HEATMAPS: dict[str, tuple[str, str, bool]] = {
    "spike/ratio": ("layers", "ratio", True),
    "spike/kurtosis": ("layers", "kurtosis", True),
    "sink/rate": ("attention", "sink_rate", False),
}


class TensorBoard:
    """Rows in TensorBoard, by step: numbers as scalars; at the end heatmaps of layers and steps, and the run's line in
    the HParams view. Given up with one warning if it cannot be written."""

    def __init__(self, folder: Path, step: int = 0, arm: Row | None = None, rows: Iterable[Row] = ()) -> None:
        """`arm`: the settings that tell this run from others; `rows`: those up to `step`, of a run that goes on.

        Raises UserError if the package is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs a package: pip install tensorboard") from None
        self.folder, self.arm = folder, dict(arm or {})
        self.writer: Any = None
        self.val_loss: float | None = None
        self.looks: list[Look] = []
        for row in rows:
            self._keep(row)
        self._try(lambda: setattr(self, "writer", SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)))

    def _keep(self, row: Row) -> None:
        self.val_loss = self.val_loss if row.get("val_loss") is None else row["val_loss"]
        if "monitor" in row:
            self.looks.append((row["step"], row["monitor"]))

    def write(self, row: Row) -> None:
        """Appends the numbers of a dict that has a `step`."""
        self._keep(row)
        for key, value in numbers(row).items():
            if self.writer:
                self._try(self.writer.add_scalar, key, value, row["step"])

    def close(self) -> None:
        """Adds what the whole run is needed for, and closes the files."""
        if self.writer:
            self._try(self._finish, self.writer)

    def _finish(self, writer: Any) -> None:
        ends: dict[str, float | None] = {"val_loss": self.val_loss}
        with contextlib.closing(writer):
            if self.looks:
                step, row = self.looks[-1]
                ends |= headline(dict(row))
                for name, (where, key, log) in HEATMAPS.items():
                    if row[where]:
                        writer.add_figure(f"heatmap/{name}", heatmap(self.looks, where, key, log), step)
            ends = {f"hparam/{key}": value for key, value in ends.items() if value is not None}
            writer.add_hparams(self.arm, ends, run_name=".")

    def _try(self, call: Callable[..., object], *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:  # whatever TensorBoard's own thread ran into
            self.writer = None
            warn(f"no TensorBoard in {self.folder}: {error}; training goes on")


def heatmap(looks: list[Look], where: str, key: str, log: bool) -> Any:
    """A figure of one number over layers (down) and steps."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    steps, names = [step for step, _ in looks], [layer["name"] for layer in looks[-1][1][where]]
    of = [{layer["name"]: layer[key] for layer in row[where]} for _, row in looks]
    values = [[math.nan if found.get(name) is None else found[name] for found in of] for name in names]
    figure = Figure(figsize=(7, 1.2 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", interpolation="nearest", norm=LogNorm() if log else None)
    axes.set_yticks(range(len(names)), names)
    places = range(0, len(steps), -(-len(steps) // 8))
    axes.set_xticks(places, [str(steps[i]) for i in places])
    axes.set_xlabel("step")
    figure.colorbar(image, label=key.replace("_", " "))
    return figure


# name -> the module of that name, which has init, log and finish alike
TRACKERS: dict[str, str | None] = {"none": None, "wandb": "wandb", "trackio": "trackio"}


class Tracker:
    """The numbers of rows in wandb or trackio, by step. Given up with one warning if it fails.

    A run that is resumed goes on with its own there: OUT_DIR/tracker.json has its id. Neither can take back a step, so
    of those that a resumed run does again, what they have stays.
    """

    FILE = "tracker.json"  # {"name": wandb or trackio, "id": ..., "step": the last that arrived before it was given up}

    def __init__(self, name: str, out_dir: Path, arm: Row, logged: int = 0) -> None:
        """`arm`: the settings of the run; `logged`: the last step of its log so far. Raises UserError if the package is
        not there."""
        self.name, self.file, self.last = name, out_dir / self.FILE, 0
        self.module: Any = None
        try:
            module: Any = importlib.import_module(TRACKERS[name] or "")
        except ImportError:
            raise UserError(f"--tracker={name} needs a package: pip install {name}") from None
        told: Any = None
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(self.file.read_text())
        if isinstance(told, dict) and told.get("name") == name and isinstance(told.get("id"), str):
            self.id, self.last = told["id"], min(logged, told.get("step", logged))
        else:
            self.id = uuid.uuid4().hex[:8]
        # trackio knows runs by their names alone
        names = {"id": self.id, "name": out_dir.name} if name == "wandb" else {"name": f"{out_dir.name}-{self.id}"}
        if self._try(module.init, project="spikesink", **names, config=dict(arm), resume="allow"):
            self.module = module
            self._note({})

    def write(self, row: Row) -> None:
        """Appends the numbers of a dict that has a `step`, unless that step is there."""
        if self.module and row["step"] > self.last:
            if self._try(self.module.log, numbers(row), step=row["step"]):
                self.last = row["step"]
            else:
                self._note({"step": self.last})

    def close(self) -> None:
        """Ends the run there."""
        if self.module:
            self._try(self.module.finish)

    def _note(self, more: Row) -> None:
        with contextlib.suppress(OSError):  # a full disk: a resumed run is then another one there
            files.write_atomic(
                self.file, lambda file: file.write(json.dumps({"name": self.name, "id": self.id, **more}).encode())
            )

    def _try(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> bool:
        """True if the call did not fail."""
        try:
            call(*args, **kwargs)
        except Exception as error:  # no network, no login, a full disk
            self.module = None
            warn(f"no {self.name}: {error}; training goes on")
            return False
        return True


class LossWatch:
    """Which losses stand out: above the running mean by more than SIGMAS running standard deviations.

    Exponential averages over about 1 / (1 - DECAY) steps; what stands out enters them cut down to the threshold, so
    that a spike does not hide the next one. `state`: what a checkpoint must hold for a resumed run to see the same.
    """

    DECAY, SIGMAS, FIRST = 0.98, 6.0, 50  # FIRST: steps before it says anything

    def __init__(self, state: Sequence[float] = (0, 0.0, 0.0)) -> None:
        self.n, self.mean, self.variance = state

    @property
    def state(self) -> list[float]:
        """[steps seen, mean, variance]."""
        return [self.n, self.mean, self.variance]

    def stands_out(self, loss: float) -> tuple[bool, float, float]:
        """(whether a finite loss stands out, the mean before it, the standard deviation before it); takes it in."""
        mean, sd = self.mean, math.sqrt(self.variance)
        found = self.n >= self.FIRST and loss > mean + self.SIGMAS * sd
        taken = min(loss, mean + self.SIGMAS * sd) if self.n >= self.FIRST else loss
        weight = max(1 - self.DECAY, 1 / (self.n + 1))  # a plain mean at first
        self.n += 1
        self.mean += weight * (taken - mean)
        self.variance = (1 - weight) * (self.variance + weight * (taken - mean) ** 2)
        return found, mean, sd
