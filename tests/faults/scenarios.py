"""The faults. Each is a generator: it harms a fresh World, yields the World once all is as it should be, and goes on
with the next variant; AssertionError where it is not. `n`: how often a fault of chance is repeated."""

import os
import random
import shutil
import signal
import time
from functools import partial

import numpy as np
import torch

from spikesink.models import checkpoint
from trainer import checkpoints

from .harms import (
    BeforeStep,
    CountCalls,
    FileLimit,
    KillBeforeCall,
    KillBetweenMicroBatches,
    kill,
    poison_weights,
    turn_clock_back,
)
from .world import log_of, remount, small_disk, until

FAULTS = {}  # what happened -> the generator


def fault(name):
    def register(generator):
        FAULTS[name] = generator
        return generator

    return register


# ---------------------------------------------------------------------------------------------------------- kill -9


def _killed_by(harm, world):
    """A run killed by its harm, then resumed to the reference."""
    code, err = world.start(harm=harm).wait()
    assert code in (-signal.SIGKILL, -signal.SIGXFSZ), f"was not killed: {code} {err}"
    world.go_on()
    return world


@fault("kill -9 before each system call of starting and of saving")
def kill_in_save(fresh, n, asynchronous=False):
    """Every fsync, rename, link and deletion of four saves, among them new best ones and rotations."""
    counting = fresh("calls")
    counting.asynchronous = asynchronous
    counting.run("--max_iters=8", harm=CountCalls(counting.folder / "calls"))
    calls = len((counting.folder / "calls").read_text().splitlines())
    assert calls >= 4 * 9, "four saves and their links make more calls than that"
    for number in range(0 if n >= 100 else calls - 20, calls):  # the last 20 are a whole save and more
        world = fresh("kill_in_save")
        world.asynchronous = asynchronous
        yield _killed_by(KillBeforeCall(number), world)


@fault("kill -9 before each system call of an --async_save")
def kill_in_async_save(fresh, n):
    return kill_in_save(fresh, n, asynchronous=True)


@fault("killed by the kernel at a random byte of writing a checkpoint")
def kill_in_write(fresh, n):
    size = fresh("size").reference.joinpath("ckpt.pt").stat().st_size
    log_size = 8192  # log.jsonl and config.json stay below it
    for seed in range(max(2, n // 5)):
        limit = random.Random(seed).randint(log_size, size - 1)
        yield _killed_by(FileLimit(limit, deadly=True), fresh("kill_in_write"))


@fault("kill -9 at a random moment, three times in one run")
def kill_at_random(fresh, n):
    for seed in range(n):
        chance, world = random.Random(seed), fresh("kill_at_random")
        world.asynchronous, world.save_interval = bool(seed % 2), chance.choice((1, 2, 3))
        for _ in range(3):
            process = world.start(world.again)
            process.process.join(chance.uniform(0.01, 0.8))
            process.kill()
            process.wait()
        world.go_on()
        yield world


@fault("kill -9 between two micro-batches of a step")
def kill_between_micro_batches(fresh, n):
    for step in (1, 6, 24):
        yield _killed_by(KillBetweenMicroBatches(step), fresh("kill_between_micro_batches"))


# ------------------------------------------------------------------------------------------------------ full, closed


@fault("disk full (tmpfs) from some checkpoint on")
def disk_full(fresh, n):
    size = fresh("size").reference.joinpath("ckpt.pt").stat().st_size // 1024
    for room in (0.5, 1.5, 2.5):
        world = fresh("disk_full")
        with small_disk(world.out, int(size * room) + 16) as mounted:
            if not mounted:
                return
            _, err = (process := world.start()).wait()
            lines = err.splitlines()
            assert process.process.exitcode == 2 and "Traceback" not in err, err
            assert all("No space left on device" in line for line in lines), err
            assert all("training goes on" in line for line in lines[:-1]) and lines[-1].startswith("error: "), err
            for path in checkpoints.Checkpoints(world.out).all().values():
                checkpoint.load(path)  # what is there is whole
            remount(world.out, f"size={size * 20}k")
            world.go_on(saves_failed=True)
        world.says(lines[-1], "cannot write a checkpoint", "go on with --resume")
        yield world


@fault("writes fail for a while (file size limit) and then succeed")
def writes_fail(fresh, n):
    world = fresh("writes_fail")
    err = world.run(harm=FileLimit(20_000, False), code=2)
    lines = err.splitlines()
    assert all("File too large" in line for line in lines), err
    world.says(lines[-1], "there is none yet; make room and go on with --resume")
    world.go_on(saves_failed=True)
    yield world


@fault("folder becomes read-only")
def read_only(fresh, n):
    world = fresh("read_only")
    with small_disk(world.out, 20_000) as mounted:
        if not mounted:
            return
        world.run("--max_iters=12")
        remount(world.out, "ro")
        err = world.run("--resume", code=2)
        world.says(err, "cannot write")
        remount(world.out, "rw")
        world.go_on()
    yield world


# -------------------------------------------------------------------------------------------------- damaged checkpoints


def _falls_back(world):
    """The newest checkpoint is damaged: one warning names it, the run goes on from the one before."""
    newest = world.newest()
    err = world.run("--resume")
    world.says(err, "warning: ", newest.name, "going on from", "ckpt-00000010.pt")
    world.is_the_reference()
    return world


@fault("newest checkpoint truncated to 0, 50 and 99%")
def truncated(fresh, n):
    for share in (0, 0.5, 0.99):
        world = fresh("truncated")
        world.halfway()
        os.truncate(world.newest(), int(world.newest().stat().st_size * share))
        yield _falls_back(world)


@fault("one byte of the newest checkpoint flipped: weights, optimiser, metadata, archive")
def flipped(fresh, n):
    for place in ("weights", "optimiser", "metadata", "archive"):
        for seed in range(max(1, n // 20)):
            world, chance = fresh("flipped"), random.Random(seed)
            world.halfway()
            path = world.newest()
            content, data = checkpoint.load(path), bytearray(path.read_bytes())
            state = content.optimizer["state"]
            tensor = {
                "weights": chance.choice(list(content.model.values())),
                "optimiser": chance.choice(list(state.values()))["exp_avg"],
            }
            if place in tensor:
                start, length = data.index(tensor[place].numpy().tobytes()), tensor[place].nbytes
            elif place == "metadata":
                start, length = data.index(b"loss_watch"), len(b"loss_watch")
            else:  # the signature of its table of contents
                start, length = len(data) - 22, 4
            data[start + chance.randrange(length)] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
            yield _falls_back(world)


@fault("content hash removed from the newest checkpoint")
def hash_removed(fresh, n):
    world = fresh("hash_removed")
    world.halfway()
    whole = torch.load(world.newest(), weights_only=True)
    del whole["sha256"]
    torch.save(whole, world.newest())
    yield _falls_back(world)


@fault("every checkpoint damaged")
def all_damaged(fresh, n):
    world = fresh("all_damaged")
    world.halfway()
    paths = list(checkpoints.Checkpoints(world.out).all().values())
    for path in paths:
        os.truncate(path, 1000)
    before = {path: path.read_bytes() for path in world.out.rglob("*") if path.is_file()}
    world.says(world.run("--resume", code=2), "error: no checkpoint in", "can be read", *(path.name for path in paths))
    assert before == {path: path.read_bytes() for path in world.out.rglob("*") if path.is_file()}, "something changed"
    yield world


@fault("links ckpt.pt and best.pt deleted")
def links_deleted(fresh, n):
    world = fresh("links_deleted")
    world.halfway()
    for name in ("ckpt.pt", "best.pt"):
        (world.out / name).unlink()
    world.go_on()
    yield world


# ---------------------------------------------------------------------------------------------------- other processes


@fault("a second trainer on the same folder")
def two_trainers(fresh, n):
    for flag in ("--resume", "--overwrite"):
        world = fresh("two_trainers")
        first = world.start(harm=BeforeStep(12, time.sleep, (3,)))
        until(lambda out=world.out: (out / "log.jsonl").exists() and len(log_of(out)) >= 11)
        world.says(world.run(flag, code=2), "another process trains in")
        assert first.wait() == (0, "")
        world.is_the_reference()
        yield world


@fault("SIGTERM, SIGINT or SIGUSR1 at a random moment")
def signals(fresh, n):
    for seed in range(max(3, n // 5)):
        chance, world = random.Random(seed), fresh("signals")
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[seed % 3]
        process = world.start(harm=BeforeStep(chance.randint(1, 20), _signal_self, (number, chance.uniform(0, 0.02))))
        code, err = process.wait()
        assert code == 130, f"{code}: {err}"
        world.says(err, number.name, "saved", "go on with --resume")
        world.go_on()
        yield world


def _signal_self(number, delay):
    """Another process sends the signal, while this one goes on."""
    if os.fork() == 0:
        time.sleep(delay)
        os.kill(os.getppid(), number)
        os._exit(0)


@fault("a second Ctrl-C while the step after the first is not done")
def second_interrupt(fresh, n):
    world = fresh("second_interrupt")
    code, err = world.start(harm=BeforeStep(12, _interrupt_twice)).wait()
    assert code == 130 and "Traceback" not in err, err
    world.says(err, "interrupted")
    world.go_on()
    yield world


def _interrupt_twice():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


# ------------------------------------------------------------------------------------------------------- the world


@fault("the clock goes back a day and runs backwards")
def clock(fresh, n):
    world = fresh("clock")
    world.run("--tensorboard=True", harm=BeforeStep(5, turn_clock_back))
    world.is_the_reference()
    (world.out / "ckpt-00000024.pt").unlink()
    for number, path in enumerate(checkpoints.Checkpoints(world.out).all().values()):
        os.utime(path, (10**9 - number, 10**9 - number))  # the newest has the oldest date
    world.go_on()
    yield world


@fault("data file shrunk while training")
def data_shrunk(fresh, n):
    yield _data_harmed(fresh("data_shrunk"), partial(os.truncate, length=2000))


@fault("data file overwritten with another dtype while training")
def data_retyped(fresh, n):
    yield _data_harmed(fresh("data_retyped"), _overwrite_as_uint32)


def _overwrite_as_uint32(path):
    """In place and of the same size, as a preparation script that is run again would."""
    tokens = np.fromfile(path, "<u2")
    with open(path, "r+b") as file:
        file.write(tokens[: len(tokens) // 2].astype("<u4").tobytes())


def _data_harmed(world, harm):
    """The run stops with a checkpoint and says why; with the data as it was, it goes on."""
    good = world.data
    world.data = world.folder / "data"
    shutil.copytree(good, world.data)
    err = world.run(harm=BeforeStep(11, harm, (world.data / "train.bin",)), code=2)
    world.says(err, "train.bin changed while it was read", "--resume")
    world.run("--resume", code=2)  # refused, while the data is not as it was
    shutil.copyfile(good / "train.bin", world.data / "train.bin")
    world.go_on()
    return world


@fault("TensorBoard's folder cannot be written")
def tensorboard(fresh, n):
    world = fresh("tensorboard")
    world.out.mkdir()
    (world.out / "tensorboard").write_text("a file where the folder should be")
    world.says(world.run("--tensorboard=True"), "no TensorBoard in", "training goes on")
    world.is_the_reference()
    yield world


@fault("a gradient is not a number")
def not_a_number(fresh, n):
    world = fresh("not_a_number")
    err = world.run(harm=BeforeStep(11, poison_weights), code=3)
    world.says(err, "step 11", "gradient norm nan", "stopped before the update", "--replay=11")
    world.go_on()
    yield world


@fault("killed, resumed, killed again, resumed again")
def twice(fresh, n):
    world = fresh("twice")
    for step, extra in ((7, []), (15, ["--resume"])):
        assert world.start(*extra, harm=BeforeStep(step, kill)).wait()[0] == -signal.SIGKILL
    world.go_on()
    yield world
