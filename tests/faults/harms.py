"""What goes wrong inside a process, installed there before train.py starts. Each is called once, without arguments."""

import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import train
from data.loader import Tokens

CALLS = ("fsync", "replace", "symlink", "unlink")  # what a save is made of, besides writing


def kill():
    """kill -9 of this process."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class CountCalls:
    """Notes in a file every one of CALLS that this process makes, a line each."""

    path: Path

    def __call__(self):
        file = open(self.path, "w", buffering=1)
        on_calls(lambda number, name: file.write(f"{name}\n"))


@dataclass
class KillBeforeCall:
    """kill -9 before call number `number` (from 0) of CALLS."""

    number: int

    def __call__(self):
        on_calls(lambda number, name: kill() if number == self.number else None)


def on_calls(do):
    """Runs do(number, name) before every one of CALLS."""
    number = iter(range(10**9))

    def watched(name, call):
        def with_notice(*args, **kwargs):
            do(next(number), name)
            return call(*args, **kwargs)

        return with_notice

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))


@dataclass
class FileLimit:
    """No file can grow beyond `size` bytes. `deadly`: the kernel kills who tries, else the write fails (EFBIG)."""

    size: int
    deadly: bool

    def __call__(self):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if self.deadly else signal.SIG_IGN)


@dataclass
class BeforeStep:
    """Runs do(*args) in the process before it trains step `step` (from 1)."""

    step: int
    do: object
    args: tuple = ()

    def __call__(self):
        update = train.Run.update

        def with_harm(run):
            if run.step + 1 == self.step:
                self.do(*self.args)
            return update(run)

        train.Run.update = with_harm


@dataclass
class KillBetweenMicroBatches:
    """kill -9 in step `step` (from 1), when the gradients of its first micro-batch are there and the next is read."""

    step: int

    def __call__(self):
        batch = Tokens.batch

        def with_harm(tokens, step, size, micro=0, n_micro=1, **ranks):
            if (step, micro) == (self.step - 1, 1):
                kill()
            return batch(tokens, step, size, micro, n_micro, **ranks)

        Tokens.batch = with_harm


def turn_clock_back(seconds=86400.0):
    """From now on the time of day is a day earlier, and runs backwards."""
    true = time.time
    start = true()
    time.time = lambda: start - seconds - (true() - start)


def poison_weights():
    """Every gradient from now on is not a number."""
    gradients = train.Run.gradients

    def hook(block, args, x):
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * float("nan"))

    def poisoned(run):
        run.model.transformer.h[0].register_forward_hook(hook)
        return gradients(run)

    train.Run.gradients = poisoned
