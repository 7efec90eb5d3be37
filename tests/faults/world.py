"""A world to break: a run of train.py in a process of its own that can be killed, its folder, and its reference.

Processes are forked from a server that has imported torch, so that a fault costs tenths of a second. What goes wrong
inside a process (`harm`) is installed there before train.py starts; what a harm calls, the kernel does for real.
"""

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from spikesink.models import checkpoint
from tests.conftest import SMALL_RUN, same, write_toy
from trainer import checkpoints

RUN = [*SMALL_RUN, "--max_iters=24", "--lr_decay_iters=24", "--eval_interval=4", "--keep_every=8", "--dropout=0.1"]

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch", "train", "tests.faults.harms"])


class Process:
    """train.py in a process of its own; what it prints goes to a file."""

    numbers = itertools.count()

    def __init__(self, folder, arguments, harm=None, environment=()):
        self.err = folder / f"stderr-{next(self.numbers)}"
        self.err.touch()
        self.process = processes.Process(target=_main, args=(arguments, self.err, harm, dict(environment)))
        self.process.start()

    def kill(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(self.process.pid, number)

    def wait(self, timeout=60):
        """(exit code, or minus the signal it died of; stderr)."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
            raise AssertionError(f"still running after {timeout} s: {self.err.read_text()}")
        return self.process.exitcode, self.err.read_text()


def _main(arguments, err, harm, environment):
    os.environ.update(environment)
    for stream, path in ((sys.stdout, os.devnull), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY), stream.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # multiprocessing ignores it
    script = importlib.import_module("train")
    script.torch.set_num_threads(1)
    if harm is not None:
        harm()
    sys.argv = ["train.py", *map(str, arguments)]
    importlib.import_module("spikesink.errors").cli(script.main)
    sys.stdout.flush()


class World:
    """A folder with data and the run `out`, fresh for every fault; `reference`: the same run, never disturbed."""

    def __init__(self, folder, data, reference):
        self.folder, self.data, self.reference = Path(folder), data, reference
        self.out = self.folder / "out"
        self.save_interval, self.asynchronous = 2, False
        self.messages = []  # what the trainer said of the fault

    @property
    def options(self):
        saving = [f"--save_interval={self.save_interval}", f"--async_save={self.asynchronous}"]
        return [*RUN, *saving, f"--dataset={self.data}", f"--out_dir={self.out}"]

    def start(self, *extra, harm=None):
        """Starts a process; `wait` it."""
        return Process(self.folder, [*self.options, *extra], harm)

    def start_ranks(self, *extra, harms=(None, None)):
        """Starts processes that are the ranks of one run, as torchrun would; harms: one for each."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": str(len(harms)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            Process(self.folder, [*self.options, *extra], harm, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank, harm in enumerate(harms)
        ]

    def run_ranks(self, *extra, harms=(None, None), code=0):
        """Ranks from start to end. Returns their stderr; AssertionError if an exit code is not `code`."""
        ends = [process.wait() for process in self.start_ranks(*extra, harms=harms)]
        assert [end[0] for end in ends] == [code] * len(ends), ends
        return "".join(end[1] for end in ends)

    def run(self, *extra, harm=None, code=0):
        """A process from start to end. Returns its stderr; AssertionError if the exit code is not `code`."""
        found, err = self.start(*extra, harm=harm).wait()
        assert found == code, f"exit code {found}, not {code}: {err}"
        assert "Traceback" not in err, err
        return err

    def says(self, err, *words):
        """Asserts that stderr is one line that has the words, and remembers it."""
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1, f"not one line: {lines}"
        missing = [word for word in words if word not in lines[0]]
        assert not missing, f"{missing} not in {lines[0]!r}"
        self.messages.append(lines[0].replace(str(self.folder) + "/", ""))

    def go_on(self, saves_failed=False):
        """Resumes, or starts again if nothing had been saved; nothing to complain of, and the end is the reference's.

        What was saved must not have been lost: AssertionError, unless saves had failed.
        """
        steps = [int(path.stem[5:]) for path in checkpoints.Checkpoints(self.out).all().values()]
        log = self.out / "log.jsonl"
        trained = log.read_bytes().count(b"\n") if log.exists() else 0
        saves = max(0, (trained - 1) // self.save_interval - self.asynchronous)  # that were done before the last row
        newest = max(steps, default=0)
        assert saves_failed or newest >= saves * self.save_interval, f"step {trained} was logged, {newest} is saved"
        err = self.run(self.again)
        assert err == "", f"complains: {err}"
        self.is_the_reference()

    @property
    def again(self):
        """The flag to start once more."""
        return "--resume" if checkpoints.Checkpoints(self.out).any() else "--overwrite"

    def is_the_reference(self):
        """Asserts that weights, optimiser, loss watch and log are bitwise those of the undisturbed run."""
        ours, theirs = checkpoint.load(self.out), checkpoint.load(self.reference)
        for key in ("step", "model", "optimizer", "val_loss", "best", "loss_watch", "tokens"):
            assert same(getattr(ours, key), getattr(theirs, key)), f"{key} differs from the undisturbed run"
        assert log_of(self.out) == log_of(self.reference), "log.jsonl differs from the undisturbed run"
        assert not list(self.out.glob(".*.tmp")), "half-written files are left"

    def halfway(self):
        """A run that has been stopped in order after 12 of its 24 steps."""
        self.run("--max_iters=12")

    def newest(self):
        """The file of the newest checkpoint."""
        return list(checkpoints.Checkpoints(self.out).all().values())[-1]


def log_of(folder):
    """The rows of log.jsonl, without the speed."""
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows]


def make_worlds(base):
    """A function that returns a fresh World, all with one reference run."""
    base = Path(base)
    write_toy(base / "data")
    first = World(base, base / "data", base / "reference")
    first.out = first.reference
    first.run()

    def fresh(name):
        folder = base / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return World(folder, base / "data", base / "reference")

    return fresh


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    """A tmpfs of a given size at `folder`; yields False where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "spikesink-faults", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder, option):
    """Changes a small disk: 'size=900k', 'ro', 'rw'."""
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def until(condition, seconds=60):
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
