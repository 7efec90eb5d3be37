"""Two ranks on one machine, over gloo: they train like one, stop together, and go on after a death."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from spikesink.models import checkpoint
from trainer import machine

from .conftest import ROOT, same
from .faults.harms import BeforeStep, poison_weights
from .faults.world import log_of, make_worlds

PARALLEL = ["ddp", "fsdp"]
ON_PATH = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    return make_worlds(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def whole(fresh):
    """{parallel: a run of two ranks from start to end}."""

    def run(parallel):
        world = fresh(f"whole-{parallel}")
        assert world.run_ranks(f"--parallel={parallel}") == ""
        return world

    return {parallel: run(parallel) for parallel in PARALLEL}


def saved_like(world, other):
    """True if two runs ended with the same bits."""
    ours, theirs = (checkpoint.load(one.out) for one in (world, other))
    keys = ("step", "model", "optimizer", "val_loss", "best", "loss_watch")
    assert all(same(getattr(ours, key), getattr(theirs, key)) for key in keys)
    return log_of(world.out) == log_of(other.out)


def assert_close(world, other):
    """Two runs agree to rounding: sums over ranks are taken in another order."""
    for ours, theirs in zip(log_of(world.out), log_of(other.out), strict=True):
        numbers = lambda row: {key: value for key, value in row.items() if value is not None}
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-5)
    ours, theirs = (checkpoint.load(one.out).model for one in (world, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def one_rank(fresh):
    world = fresh("one")
    world.run("--dropout=0", "--eval_iters=3")
    return world


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_ranks_train_like_one(fresh, one_rank, parallel):
    """At equal global batch; three validation batches, so that one rank has one more."""
    world = fresh(parallel)
    assert world.run_ranks("--dropout=0", "--eval_iters=3", f"--parallel={parallel}") == ""
    assert_close(world, one_rank)
    model = checkpoint.load(world.out).model
    assert model["lm_head.weight"].data_ptr() == model["transformer.wte.weight"].data_ptr()  # shared in the file too


def test_a_run_goes_on_with_other_ranks(fresh, one_rank):
    """2 ranks with shards -> 1 -> 2 with copies: the batches are those of the undisturbed run, and so is the end."""
    world = fresh("changing")
    options = ["--dropout=0", "--eval_iters=3"]
    world.run_ranks(*options, "--parallel=fsdp", "--max_iters=8")
    world.run(*options, "--resume", "--max_iters=16")
    world.run_ranks(*options, "--resume", "--parallel=ddp")
    assert_close(world, one_rank)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_rank_0_looks_at_its_first_micro_batch_and_changes_nothing(fresh, whole, parallel):
    """Under FSDP too, where weights are whole only while their block runs."""
    world, one = fresh(f"monitored-{parallel}"), fresh("monitored-one")
    assert world.run_ranks(f"--parallel={parallel}", "--monitor=8") == ""
    one.run("--dropout=0", "--monitor=1", "--max_iters=1")
    looks = [row.get("monitor") for row in log_of(world.out)]
    assert [step for step, look in enumerate(looks, 1) if look] == [8, 16, 24]
    assert all(look["attention"] and len(look["layers"]) == 3 for look in looks if look)
    keys = ("model", "optimizer", "val_loss", "loss_watch")
    ours, theirs = (checkpoint.load(it.out) for it in (world, whole[parallel]))
    assert all(same(getattr(ours, key), getattr(theirs, key)) for key in keys)
    first = fresh(f"first-{parallel}")
    assert first.run_ranks(f"--parallel={parallel}", "--dropout=0", "--monitor=1", "--max_iters=1") == ""
    ours, theirs = (log_of(it.out)[0]["monitor"] for it in (first, one))
    assert ours["attention"] == theirs["attention"] and ours["sequences"] == theirs["sequences"] == 4
    for layer, other in zip(ours["layers"], theirs["layers"], strict=True):
        assert layer.pop("name") == other.pop("name") and layer == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_resumed_run_of_two_ranks_is_bitwise_the_uninterrupted_one(fresh, whole, parallel):
    world = fresh("resumed")
    world.run_ranks(f"--parallel={parallel}", "--max_iters=12")
    world.run_ranks(f"--parallel={parallel}", "--resume")
    assert saved_like(world, whole[parallel])


def test_soap_and_losses_are_the_same_on_two_ranks_and_after_a_resume(fresh):
    whole, halves, one = (fresh(f"soap-{name}") for name in ("whole", "halves", "one"))
    options = ["--optimizer=soap", "--losses=kurtosis=0.1", "--dropout=0"]
    whole.run_ranks(*options)
    halves.run_ranks(*options, "--max_iters=12")
    halves.run_ranks("--dropout=0", "--resume")
    assert saved_like(halves, whole)
    one.run(*options, "--max_iters=1")
    assert log_of(whole.out)[0]["losses"] == pytest.approx(log_of(one.out)[0]["losses"], rel=1e-5)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(fresh, whole, parallel):
    world = fresh("signal")
    harm = BeforeStep(7, signal.raise_signal, (signal.SIGTERM,))
    err = world.run_ranks(f"--parallel={parallel}", harms=(None, harm), code=130)
    world.says(err, "SIGTERM at step 7: saved")
    assert checkpoint.load(world.out).step == 7
    world.run_ranks(f"--parallel={parallel}", "--resume")
    assert saved_like(world, whole[parallel])


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_rank_that_sees_no_number_stops_all_before_the_step(fresh, whole, parallel):
    world = fresh("nan")
    err = world.run_ranks(f"--parallel={parallel}", harms=(None, BeforeStep(7, poison_weights)), code=3)
    world.says(err, "step 7", "gradient norm nan", "stopped before the update")
    assert log_of(world.out)[-1]["step"] == 6
    world.run_ranks(f"--parallel={parallel}", "--resume")
    assert saved_like(world, whole[parallel])


def torchrun(*arguments, **environment):
    """torchrun as a user types it, with two processes."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("parallel", PARALLEL)
def test_torchrun_restarts_a_run_whose_rank_was_killed(fresh, whole, parallel):
    """kill -9 of rank 1 in step 7: both start again from step 6, and the end is as if nothing had been."""
    world = fresh("killed")
    script = Path(__file__).parent / "faults" / "killed_rank.py"
    done = torchrun("--max-restarts=1", script, *world.options, f"--parallel={parallel}", KILL_RANK="1", KILL_STEP="7")
    assert done.returncode == 0, done.stderr
    assert "from step 6 to 24" in done.stdout
    assert saved_like(world, whole[parallel])


def test_the_example_of_many_machines_works_as_typed(tmp_path):
    page = (ROOT / "docs" / "many_machines.md").read_text()
    command = next(line for line in page.splitlines() if "--nproc_per_node=2" in line)
    command = command.replace("out/two", str(tmp_path / "two"))  # as typed, but for where it writes
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=ON_PATH, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 ranks (ddp)" in done.stdout
    assert checkpoint.load(tmp_path / "two").step == 20


def test_errors_of_two_ranks(fresh):
    """What only rank 0 can see reaches all; it is said once."""
    world = fresh("errors")
    assert "there is no checkpoint in" in world.run_ranks("--resume", code=2)
    world.says(world.run_ranks("--resume", code=2), "there is no checkpoint in")
    err = world.run_ranks("--gradient_accumulation_steps=3", code=2)
    assert "is not a multiple of the 2 ranks" in err
    for optimizer in ("muon", "soap"):
        err = world.run_ranks("--parallel=fsdp", f"--optimizer={optimizer}", code=2)
        assert f"{optimizer} needs whole matrices" in err
    assert not world.out.exists()


@dataclass
class CountSyncs:
    """Writes to a file how many messages with gradients this rank took part in."""

    path: Path

    def __call__(self):
        file = open(self.path, "w", buffering=1)
        wrap = machine.Machine.wrap

        def counted(call):
            def counting(*args, **kwargs):
                file.write("x\n")
                return call(*args, **kwargs)

            return counting

        for name in ("reduce_scatter_tensor", "reduce_scatter_single"):  # the older and the newer name
            if hasattr(torch.distributed, name):
                setattr(torch.distributed, name, counted(getattr(torch.distributed, name)))

        def hook(state, bucket):
            file.write("x\n")
            return default_hooks.allreduce_hook(state, bucket)

        def wrapped(self, model):
            model = wrap(self, model)
            if isinstance(model, torch.nn.parallel.DistributedDataParallel):
                model.register_comm_hook(None, hook)
            return model

        machine.Machine.wrap = wrapped


@pytest.mark.parametrize("parallel", PARALLEL)
def test_gradients_travel_once_a_step(fresh, parallel):
    """However many micro-batches a step has."""
    world, counts = fresh("syncs"), []
    for number in (2, 8):
        count, other = (CountSyncs(world.folder / f"count-{number}-{rank}") for rank in range(2))
        options = ["--max_iters=4", "--overwrite", f"--parallel={parallel}", f"--gradient_accumulation_steps={number}"]
        world.run_ranks(*options, harms=(count, other))
        counts.append(count.path.read_text().count("x"))
    assert counts[0] == counts[1] > 0
    assert counts[0] % 4 == 0
