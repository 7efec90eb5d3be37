"""Writes rows of numbers to log.jsonl, the terminal, TensorBoard, wandb or trackio.

A failed write never stops a training run. Its rows wait for the next write, or are dropped with a warning.
"""

import contextlib
import importlib
import json
import math
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spikesink import files
from spikesink.errors import UserError
from spikesink.files import step_of
from spikesink.measure.monitor import flat, headline, words

Row = Mapping[str, Any]  # a line of log.jsonl
Look = tuple[int, Mapping[str, Any]]  # a step and the monitor's row there


def warn(text: str) -> None:
    """Prints a warning as one line on stderr."""
    tqdm.write(f"warning: {' '.join(text.split())}", file=sys.stderr)


class JsonLines:
    """A file of one JSON object per line. Rows that cannot be written (a full disk) wait for the next row."""

    def __init__(self, path: str | Path, step: int = 0) -> None:
        """Opens `path` and deletes the rows after `step`, which a resumed run writes again. Raises OSError."""
        self.path, self.waiting, self.failing = Path(path), b"", False
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        content = b"".join(line for line in lines if line.endswith(b"\n") and step_of(line) <= step)
        files.write_atomic(self.path, lambda file: file.write(content))
        self.size = len(content)
        self.file: Any = open(self.path, "r+b", buffering=0)

    def write(self, row: Row) -> None:
        """Appends a row."""
        self.waiting += json.dumps(row).encode() + b"\n"
        try:
            self.file.seek(self.size)  # overwrites the remains of a failed write
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
        """Closes the file. Lines that still wait are lost."""
        if self.waiting:
            warn(f"{self.waiting.count(10)} lines of {self.path} could not be written")
        self.file.close()


class Progress:
    """A progress bar with the last loss, and a line on the terminal for every row that has a validation loss."""

    def __init__(self, steps: int, first: int = 0, name: str = "", hidden: bool = False) -> None:
        """`name`: the name of the run in the bar and the lines. If stderr is no terminal, the bar is hidden too."""
        self.label, self.spikes_and_sinks = f"{name}: " if name else "", ""
        self.bar = tqdm(total=steps, initial=first, unit="step", desc=name or None, disable=True if hidden else None)

    def write(self, row: Row) -> None:
        """Shows the row of a step."""
        if "monitor" in row:
            self.spikes_and_sinks = words(row["monitor"])
        more = f", {self.spikes_and_sinks}" if self.spikes_and_sinks else ""
        self.bar.set_postfix_str(f"loss={row['loss']:.3f}{more}", refresh=False)
        if row["val_loss"] is not None:
            text = f"loss {row['loss']:.4f}, val_loss {row['val_loss']:.4f}, {row['tokens_per_s']:,.0f} tokens/s"
            self.bar.write(f"{self.label}step {row['step']}: {text}{more}", file=sys.stdout)

    def close(self) -> None:
        """Closes the bar, which stays visible."""
        self.bar.close()


def numbers(row: Row) -> dict[str, float]:
    """{name: number} of a row, without its step. Auxiliary losses are named "losses/NAME", the model's scalars
    "scalars/NAME", and the monitor's numbers as `flat` names them."""
    more = {f"{kind}/{name}": value for kind in ("losses", "scalars") for name, value in row.get(kind, {}).items()}
    own = {key: value for key, value in {**row, **more}.items() if key != "step" and isinstance(value, (int, float))}
    return own | (flat(row["monitor"]) if "monitor" in row else {})


# heatmap over layers and steps -> (list in the monitor's row, key in its entries, whether colours are logarithmic)
HEATMAPS: dict[str, tuple[str, str, bool]] = {
    "spike/ratio": ("layers", "ratio", True),
    "spike/kurtosis": ("layers", "kurtosis", True),
    "sink/rate": ("attention", "sink_rate", False),
}


class Sender:
    """Sends numbers to another program. After a failure it prints one warning and stops sending."""

    client: Any = None  # the other program, while it works

    def __init__(self, name: str) -> None:
        self.name = name

    def _try(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> bool:
        """Calls it; True if it did not fail."""
        try:
            call(*args, **kwargs)
        except Exception as error:  # no network, no login, a full disk, whatever the other program's thread ran into
            self.client = None
            warn(f"no {self.name}: {error}; training goes on")
            return False
        return True


class TensorBoard(Sender):
    """Writes the numbers of rows to TensorBoard, and at the end heatmaps over layers and steps and the run's entry in
    the HParams view."""

    def __init__(self, folder: Path, step: int, arm: Row, rows: Iterable[Row]) -> None:
        """`arm`: the settings of this run that are no defaults. `rows`: the rows up to `step` of a resumed run. Raises
        UserError if the package is not installed."""
        super().__init__(f"TensorBoard in {folder}")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs a package: pip install tensorboard") from None
        self.arm = dict(arm)
        self.val_loss: float | None = None
        self.looks: list[Look] = []
        for row in rows:
            self._keep(row)
        self._try(lambda: setattr(self, "client", SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)))

    def _keep(self, row: Row) -> None:
        self.val_loss = self.val_loss if row.get("val_loss") is None else row["val_loss"]
        if "monitor" in row:
            self.looks.append((row["step"], row["monitor"]))

    def write(self, row: Row) -> None:
        """Writes the numbers of a row."""
        self._keep(row)
        for key, value in numbers(row).items():
            if self.client:
                self._try(self.client.add_scalar, key, value, row["step"])

    def close(self) -> None:
        """Adds the heatmaps and the HParams entry, and closes the files."""
        if self.client:
            self._try(self._finish, self.client)

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


def heatmap(looks: list[Look], where: str, key: str, log: bool) -> Any:
    """A figure of one number over layers (y) and steps (x)."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    steps, names = [step for step, _ in looks], [layer["name"] for layer in looks[-1][1][where]]
    columns = [{layer["name"]: layer[key] for layer in row[where]} for _, row in looks]
    values = [[math.nan if column.get(name) is None else column[name] for column in columns] for name in names]
    figure = Figure(figsize=(7, 1.2 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", interpolation="nearest", norm=LogNorm() if log else None)
    axes.set_yticks(range(len(names)), names)
    places = range(0, len(steps), -(-len(steps) // 8))
    axes.set_xticks(places, [str(steps[i]) for i in places])
    axes.set_xlabel("step")
    figure.colorbar(image, label=key.replace("_", " "))
    return figure


# name -> a module with the functions init, log and finish
TRACKERS: dict[str, str | None] = {"none": None, "wandb": "wandb", "trackio": "trackio"}


class Tracker(Sender):
    """Sends the numbers of rows to wandb or trackio.

    A resumed run continues its run there, whose id is in OUT_DIR/tracker.json. Neither tracker can delete a step, so
    the steps that a resumed run repeats keep their first numbers there.
    """

    FILE = "tracker.json"  # {"name": wandb or trackio, "id": ..., "step": the last one that arrived before a failure}

    def __init__(self, name: str, out_dir: Path, arm: Row, logged: int = 0) -> None:
        """`arm`: the settings of the run. `logged`: the last step in its log so far. Raises UserError if the package is
        not installed."""
        super().__init__(name)
        self.file, self.last = out_dir / self.FILE, 0
        try:
            module: Any = importlib.import_module(TRACKERS[name] or "")
        except ImportError:
            raise UserError(f"--tracker={name} needs a package: pip install {name}") from None
        state: Any = None
        with contextlib.suppress(OSError, ValueError):
            state = json.loads(self.file.read_text())
        if isinstance(state, dict) and state.get("name") == name and isinstance(state.get("id"), str):
            self.id, self.last = state["id"], min(logged, state.get("step", logged))
        else:
            self.id = uuid.uuid4().hex[:8]
        # trackio identifies runs by name only
        names = {"id": self.id, "name": out_dir.name} if name == "wandb" else {"name": f"{out_dir.name}-{self.id}"}
        if self._try(module.init, project="spikesink", **names, config=dict(arm), resume="allow"):
            self.client = module
            self._note({})

    def write(self, row: Row) -> None:
        """Sends the numbers of a row, unless its step was sent before."""
        if self.client and row["step"] > self.last:
            if self._try(self.client.log, numbers(row), step=row["step"]):
                self.last = row["step"]
            else:
                self._note({"step": self.last})

    def close(self) -> None:
        """Ends the run in the tracker."""
        if self.client:
            self._try(self.client.finish)

    def _note(self, more: Row) -> None:
        with contextlib.suppress(UserError):  # if the disk is full, a resumed run becomes a new one in the tracker
            files.save_text(self.file, json.dumps({"name": self.name, "id": self.id, **more}))


Log = JsonLines | Progress | TensorBoard | Tracker  # what rows are written to


class LossWatch:
    """Finds losses that stand out: above the running mean by more than SIGMAS running standard deviations.

    Both are exponential averages over about 1 / (1 - DECAY) steps. A loss that stands out enters them as the threshold,
    so that it does not hide the next one. A resumed run needs `state` from the checkpoint.
    """

    DECAY, SIGMAS, FIRST = 0.98, 6.0, 50  # FIRST: number of steps before a loss can stand out

    def __init__(self, state: Sequence[float] = (0, 0.0, 0.0)) -> None:
        self.n, self.mean, self.variance = state

    @property
    def state(self) -> list[float]:
        """[steps seen, mean, variance]."""
        return [self.n, self.mean, self.variance]

    def stands_out(self, loss: float) -> tuple[bool, float, float]:
        """(whether a finite loss stands out, the mean before it, the standard deviation before it). Updates both."""
        mean, sd = self.mean, math.sqrt(self.variance)
        limit = mean + self.SIGMAS * sd if self.n >= self.FIRST else math.inf
        clipped = min(loss, limit)
        weight = max(1 - self.DECAY, 1 / (self.n + 1))  # a plain mean at first
        self.n += 1
        self.mean += weight * (clipped - mean)
        self.variance = (1 - weight) * (self.variance + weight * (clipped - mean) ** 2)
        return loss > limit, mean, sd
