"""Rows of numbers -> log.jsonl and TensorBoard. Neither stops a training run: what cannot be written waits for the next
time, or is given up with a warning."""

import json
import math
import sys
from pathlib import Path

from tqdm import tqdm

from . import checkpoint
from .errors import UserError


def warn(text):
    """One line on stderr."""
    tqdm.write(f"warning: {' '.join(text.split())}", file=sys.stderr)


class JsonLines:
    """A file of one JSON object per line. Rows that cannot be written (a full disk) wait for the next one."""

    def __init__(self, path, step=0):
        """Opens `path`, without the rows of steps after `step`, which a resumed run writes again. Raises OSError."""
        self.path, self.waiting, self.failing = Path(path), b"", False
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        kept = b"".join(line for line in lines if line.endswith(b"\n") and step_of(line) <= step)
        checkpoint.write_atomic(self.path, lambda file: file.write(kept))
        self.size = len(kept)
        self.file = open(self.path, "r+b", buffering=0)

    def write(self, row):
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

    def close(self):
        """Closes the file; lines that still wait are lost."""
        if self.waiting:
            warn(f"{self.waiting.count(10)} lines of {self.path} could not be written")
        self.file.close()


def rows_of(path):
    """The rows of a file of JSON lines, as dicts; broken lines are left out, and a file that is not there has none."""
    lines = Path(path).read_bytes().splitlines() if Path(path).is_file() else []
    return [json.loads(line) for line in lines if step_of(line) < math.inf]


def step_of(line):
    """The step of a line of JSON; infinity for a broken one, which is dropped."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if type(step) is int else math.inf


class TensorBoard:
    """The numbers of rows as scalars of TensorBoard, by step. Given up with one warning if it cannot be written."""

    def __init__(self, folder, step=0):
        """Raises UserError if the package is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs a package: pip install tensorboard") from None
        self.folder, self.writer = folder, None
        self._try(lambda: setattr(self, "writer", SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)))

    def write(self, row):
        """Appends the numbers of a dict that has a `step`."""
        numbers = {key: value for key, value in row.items() if key != "step" and isinstance(value, (int, float))}
        for key, value in numbers.items():
            if self.writer:
                self._try(self.writer.add_scalar, key, value, row["step"])

    def close(self):
        """Closes the files."""
        if self.writer:
            self._try(self.writer.close)

    def _try(self, call, *args):
        try:
            call(*args)
        except Exception as error:  # whatever TensorBoard's own thread ran into
            self.writer = None
            warn(f"no TensorBoard in {self.folder}: {error}; training goes on")


class LossWatch:
    """Which losses stand out: above the running mean by more than SIGMAS running standard deviations.

    Exponential averages over about 1 / (1 - DECAY) steps; what stands out enters them cut down to the threshold, so
    that a spike does not hide the next one. `state`: what a checkpoint must hold for a resumed run to see the same.
    """

    DECAY, SIGMAS, FIRST = 0.98, 6.0, 50  # FIRST: steps before it says anything

    def __init__(self, state=(0, 0.0, 0.0)):
        self.n, self.mean, self.variance = state

    @property
    def state(self):
        """[steps seen, mean, variance]."""
        return [self.n, self.mean, self.variance]

    def stands_out(self, loss):
        """(whether a finite loss stands out, the mean before it, the standard deviation before it); takes it in."""
        mean, sd = self.mean, math.sqrt(self.variance)
        found = self.n >= self.FIRST and loss > mean + self.SIGMAS * sd
        taken = min(loss, mean + self.SIGMAS * sd) if self.n >= self.FIRST else loss
        weight = max(1 - self.DECAY, 1 / (self.n + 1))  # a plain mean at first
        self.n += 1
        self.mean += weight * (taken - mean)
        self.variance = (1 - weight) * (self.variance + weight * (taken - mean) ** 2)
        return found, mean, sd
