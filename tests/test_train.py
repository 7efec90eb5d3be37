"""The loop: exact resume, the non-finite guard, ranks, and what it leaves behind."""

import json
import os
import subprocess
import sys

import pytest
import torch

from spikesink import checkpoint

from .conftest import ROOT, SMALL_RUN


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(a, b):
    """Bitwise equality of nested dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def train(cli, toy_data):
    def call(out, *args):
        return cli("train.py", *SMALL_RUN, f"--dataset={toy_data}", f"--out_dir={out}", *args)

    return call


@pytest.mark.parametrize("extra", [[], ["--dropout=0.2", "--norm_place=post"]], ids=["plain", "dropout"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(train, tmp_path, extra):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(whole, *extra)[0] == 0
    # the schedule must be the whole run's: lr_decay_iters, not max_iters, says where it ends
    extra = [*extra, "--lr_decay_iters=8"]
    assert train(halves, *extra, "--max_iters=4")[0] == 0
    with open(halves / "log.jsonl", "a") as log:
        log.write('{"step": 5, "loss": 0}\n{"step": 6, "lo')  # what a killed run leaves
    assert train(halves, *extra, "--resume")[0] == 0
    one, two = checkpoint.load(whole), checkpoint.load(halves)
    assert one["step"] == two["step"] == 8
    assert same(one["model"], two["model"]) and same(one["optimizer"], two["optimizer"])
    timing = "tokens_per_s"
    assert [{**row, timing: 0} for row in rows(whole)] == [{**row, timing: 0} for row in rows(halves)]


def test_dropout_noise_is_used_and_differs_between_steps(train, tmp_path):
    train(tmp_path / "a", "--max_iters=1", "--dropout=0.5")
    train(tmp_path / "b", "--max_iters=1")
    assert rows(tmp_path / "a")[0]["loss"] != rows(tmp_path / "b")[0]["loss"]


def test_log_and_checkpoint_hold_what_they_should(train, tmp_path):
    code, out, _ = train(tmp_path / "o")
    assert code == 0 and f"python detect.py {tmp_path}/o/ckpt.pt" in out
    log = rows(tmp_path / "o")
    assert [row["step"] for row in log] == list(range(1, 9))
    assert all(row.keys() == {"step", "loss", "val_loss", "tokens", "lr", "grad_norm", "tokens_per_s"} for row in log)
    assert [row["step"] for row in log if row["val_loss"] is not None] == [4, 8]
    assert log[-1]["tokens"] == 8 * 4 * 2 * 16
    assert log[-1]["loss"] < log[0]["loss"]
    saved = checkpoint.load(tmp_path / "o" / "ckpt.pt")
    assert saved["model_args"]["vocab_size"] == 64 and saved["config"]["seed"] == 1337
    assert saved["val_loss"] == log[-1]["val_loss"]
    assert json.loads((tmp_path / "o" / "config.json").read_text())["given"]["n_layer"] == 1


def test_a_run_is_not_overwritten_unasked(train, tmp_path):
    train(tmp_path, "--max_iters=2")
    before = (tmp_path / "ckpt.pt").read_bytes()
    code, _, err = train(tmp_path, "--max_iters=3")
    assert code == 2 and "--resume" in err and "--overwrite" in err and err.count("\n") == 1
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    code, _, err = train(tmp_path, "--resume", "--norm_place=post")
    assert code == 2 and "norm_place=pre" in err
    assert train(tmp_path, "--max_iters=3", "--overwrite")[0] == 0


def test_resume_without_a_checkpoint_or_with_a_damaged_one(train, tmp_path):
    code, _, err = train(tmp_path, "--resume")
    assert code == 2 and "no checkpoint" in err and not (tmp_path / "log.jsonl").exists()
    train(tmp_path, "--max_iters=2")
    data = bytearray((tmp_path / "ckpt.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "ckpt.pt").write_bytes(data)
    code, _, err = train(tmp_path, "--resume")
    assert code == 2 and "ckpt.pt" in err and err.count("\n") == 1


def test_non_finite_gradient_stops_before_the_update(train, tmp_path, monkeypatch):
    import train as script

    update = script.Run.update

    def poison(self, model):
        if self.step == 5:
            weight = self.model.transformer.h[0].mlp.f.c_fc.weight
            weight.register_hook(lambda gradient: gradient * torch.nan)
            self.poisoned = weight.detach().clone(), weight
        try:
            return update(self, model)
        finally:
            if self.step == 5 and hasattr(self, "poisoned"):
                assert torch.equal(*self.poisoned)  # the weights are those before the step

    monkeypatch.setattr(script.Run, "update", poison)
    code, _, err = train(tmp_path)
    assert code == 3 and "step 6" in err and "gradient norm nan" in err and str(tmp_path / "ckpt.pt") in err
    assert rows(tmp_path)[-1]["step"] == 5
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] == 4


def test_decay_groups_are_nanogpts():
    from .conftest import tiny

    model = tiny(bias=True)
    decayed, other = model.optimiser_groups(0.1)
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() >= 2 for p in decayed["params"]) and all(p.dim() < 2 for p in other["params"])
    assert sum(len(group["params"]) for group in (decayed, other)) == len(list(model.parameters()))


def test_bfloat16_trains_close_to_float32(train, tmp_path):
    train(tmp_path / "a", "--dtype=bfloat16")
    train(tmp_path / "b")
    a, b = rows(tmp_path / "a")[-1]["loss"], rows(tmp_path / "b")[-1]["loss"]
    assert a == pytest.approx(b, rel=0.02) and a != b


def test_two_ranks_train_like_one(tmp_path, toy_data):
    """Equal global batch; gradients are averaged in another order, so equal to float32 rounding, not bitwise."""
    common = [*SMALL_RUN, "--dropout=0.0", f"--dataset={toy_data}", "--bos"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for launcher, out in ((torchrun, tmp_path / "two"), ([sys.executable], tmp_path / "one")):
        done = subprocess.run(
            [*launcher, "train.py", *common, f"--out_dir={out}"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-4)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-4)
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
