"""The day a GPU is at hand, rehearsed: every step on a CPU, what fits into a slice, what its checks would notice."""

import json
import re
import signal

import numpy as np
import pytest
import torch

import train
from benchmarks import gpu_day
from benchmarks.gpu_day import ARMS, NANO, STEPS, Day
from spikesink.errors import InterruptedRunError, UserError
from trainer.machine import Machine

from . import gpu_checks
from .conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def day(tmp_path):
    return Day(NANO, tmp_path, tmp_path / "results", 60.0, Machine.find("cpu"))


def test_every_step_is_rehearsed(cli, tmp_path):
    """On a CPU, at nano scale; the second call has nothing left to do but the table, which it makes again."""
    results = tmp_path / "results"
    argv = ("--rehearse", "--slice=9", f"--out={tmp_path / 'out'}", f"--results={results}", "--commit=abc")
    code, out, err = cli("benchmarks.gpu_day", *argv)
    assert code == 0, out + err
    found = {name: json.loads((results / f"{name}.json").read_text()) for name in STEPS}
    assert {name: step["status"] for name, step in found.items()} == dict.fromkeys(STEPS, "done"), out
    for step in found.values():
        assert step["git_commit"] == "abc" and "--rehearse" in step["command"] and "CPU" in step["machine"]
        assert step["torch"] == torch.__version__ and len(step["code"]) == 12
    assert found["correct"]["found"]["passed"] == list(gpu_checks.CHECKS)
    assert found["speed"]["found"]["ours"]["batch_size"] == found["speed"]["found"]["recipe"]["batch_size"] == 8
    assert found["attention"]["found"].keys() == gpu_checks.KINDS.keys()
    assert found["together"]["found"]["3 models"].keys() == {"stacked", "3 apart"}
    assert {found[arm]["found"]["row"]["status"] for arm in ARMS} == {"done"}
    assert found["pre"]["found"]["ablate"]["seconds"] > 0 and found["pre"]["found"]["tokens"] == 8 * 4 * 32
    assert all((results / "arms" / name).stat().st_size for name in ("table.json", "table.md", "figures/arms.svg"))
    files = [path for path in results.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert list(tmp_path.rglob("runs/**/*.pt")) == []  # no weights are kept
    assert not any(str(ROOT) in path.read_text(errors="replace") for path in files)
    code, out, _ = cli("benchmarks.gpu_day", *argv, f"--data={tmp_path / 'out' / 'stdlib.xz'}")
    assert code == 0 and out.count(": done before") == len(STEPS) - 1 and "table: done\n" in out


def test_a_step_starts_if_it_fits(cli, day, monkeypatch):
    """In order of value; what does not fit is left, a failure stops nothing, and an arm may take a whole slice."""
    monkeypatch.setattr(gpu_day, "TABLE_PACKAGES", ("no_such_package",))
    monkeypatch.setattr(gpu_day, "estimate", lambda name, day: {"correct": 60, "speed": 400, "pre": 2000}.get(name, 90))
    ran = []

    def run_step(name, day, about, flags):
        ran.append((name, round(day.seconds)))
        (day.results / f"{name}.json").write_text(json.dumps({"status": "failed" if name == "correct" else "done"}))
        return "failed"

    monkeypatch.setattr(gpu_day, "run_step", run_step)
    day.results.mkdir()
    argv = [f"--out={day.out}", f"--results={day.results}", "--slice=5", "--minutes=11"]
    code, out, _ = cli("benchmarks.gpu_day", *argv)
    assert [name for name, _ in ran] == ["correct", "attention", "together"]  # no data for arms
    assert ran[0][1] == 300 and "speed: not started: it takes about 400 s" in out
    assert (
        "pre: skipped, because of missing --data" in out
        and "table: skipped, because of missing --data, an arm, no_such_package" in out
    )
    assert code == 0  # speed would not fit into the next slice either
    (day.out / "data").mkdir()
    (day.out / "data" / "meta.json").write_text("{}")
    ran.clear()
    (day.results / "slices.json").write_text("[100, 80]")
    code, out, _ = cli("benchmarks.gpu_day", *argv)
    assert code == 0 and "correct: failed before" in out and "pre: not started" in out  # 2000 s, and 480 are left
    assert ran[0] == ("post", 300) and len(ran) == 5
    for arm in ("post", "gate"):
        (day.results / f"{arm}.json").unlink()
    monkeypatch.setattr(gpu_day, "estimate", lambda name, day: 350)
    ran.clear()
    code, out, _ = cli("benchmarks.gpu_day", *argv)
    assert [name for name, _ in ran] == ["pre", "post", "gate"]  # longer than a slice: they have it from its start


def test_an_arm_that_is_cut_goes_on(day, monkeypatch):
    """Training saves half a minute before the end, and the next call goes on to the same end."""
    gpu_day.pack("stdlib", day.out / "text.xz", 0.3)
    gpu_day.unpack(day.out / "text.xz", day.out / "data")
    timers = []

    class Timer:
        """Comes in step 4."""

        def __init__(self, seconds, call, args):
            self.seconds, self.call = seconds, lambda: call(*args)
            timers.append(self)

        start = cancel = lambda self: None

    update = train.Run.update

    def updated(run):
        if run.step == 3:
            timers[-1].call()
        return update(run)

    monkeypatch.setattr(gpu_day.threading, "Timer", Timer)
    monkeypatch.setattr(train.Run, "update", updated)
    old = signal.getsignal(signal.SIGUSR1)
    try:
        with pytest.raises(InterruptedRunError, match="at step 4"):
            gpu_day.arm(day, "post")
        found = gpu_day.arm(day, "post")
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert timers[0].seconds == day.seconds - 30 and found["row"]["step"] == 8
    assert (day.results / "post" / "detect.json").exists() and not list(day.out.rglob("*.pt"))
    log = [json.loads(line)["step"] for line in (day.results / "post" / "log.jsonl").read_text().splitlines()]
    assert log == [4, 8]


def test_packed_tokens_come_back(tmp_path, toy_data):
    gpu_day.pack(str(toy_data), tmp_path / "toy.xz", 1)
    gpu_day.unpack(tmp_path / "toy.xz", tmp_path / "data")
    for split in ("train", "val"):
        assert (tmp_path / "data" / f"{split}.bin").read_bytes() == (toy_data / f"{split}.bin").read_bytes()
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    assert meta == json.loads((toy_data / "meta.json").read_text())
    (tmp_path / "toy.xz").write_bytes((tmp_path / "toy.xz").read_bytes()[:-9])
    with pytest.raises(UserError, match="was not written by --pack"):
        gpu_day.unpack(tmp_path / "toy.xz", tmp_path / "other")


def test_no_more_is_packed_than_there_is_room_for(tmp_path, capsys):
    """Tokens that cannot be compressed: two bytes each."""
    meta = {"dtype": "uint16", "vocab_size": 65536, "train_tokens": 2**21, "val_tokens": 4096, "bos_id": 0}
    for split in ("train", "val"):
        np.random.default_rng(0).integers(65536, size=meta[f"{split}_tokens"], dtype=np.uint16).tofile(
            tmp_path / f"{split}.bin"
        )
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    gpu_day.pack(str(tmp_path), tmp_path / "some.xz", 3)
    assert 2 * 2**20 < (tmp_path / "some.xz").stat().st_size < 3 * 2**20
    gpu_day.unpack(tmp_path / "some.xz", tmp_path / "data")
    kept = (tmp_path / "data" / "train.bin").read_bytes()
    assert (tmp_path / "train.bin").read_bytes().startswith(
        kept
    ) and f"{len(kept) // 2:,} train" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "became"), [("speed", "failed: it took too long"), ("qk", "stopped")])
def test_a_step_that_takes_too_long_is_stopped(day, name, became):
    """An arm goes on with the next call."""
    day.results.mkdir()
    short = Day(NANO, day.out, day.results, 0.2, day.machine)
    assert gpu_day.run_step(name, short, {}, ["--rehearse"]).startswith(became)
    assert (day.results / f"{name}.json").exists() == (name == "speed")


def test_the_estimate_of_an_arm_is_of_the_measured_speed(day):
    large = Day(gpu_day.GPT2_SMALL, day.out, day.results, 0, day.machine)
    assert gpu_day.estimate("pre", large) == 7.5 * 60
    day.results.mkdir()
    (day.results / "speed.json").write_text('{"status": "failed"}')
    assert gpu_day.estimate("pre", large) == 7.5 * 60
    (day.results / "speed.json").write_text('{"status": "done", "found": {"ours": {"tokens_per_s": 1e6}}}')
    assert gpu_day.estimate("pre", large) == pytest.approx(1.1 * 100 + 120, abs=0.1)
    (day.out / "runs" / "pre-1").mkdir(parents=True)
    (day.out / "runs" / "pre-1" / "log.jsonl").write_text('{"step": 763, "tokens": 50003968}\n')
    assert gpu_day.estimate("pre", large) == pytest.approx(1.1 * 50 + 120, abs=0.1)


# ------------------------------------------------------------------------------- what the checks would notice


def test_the_checks_notice_what_is_wrong(monkeypatch, tmp_path, capsys):
    """Another ALiBi slope, gradients that point back, a spike that is too small; one failure does not hide others."""
    monkeypatch.setattr(gpu_checks, "CHECKS", {n: gpu_checks.CHECKS[n] for n in ("flex", "stacked", "large spikes")})
    slopes = gpu_checks.alibi_slopes
    monkeypatch.setattr(gpu_checks, "alibi_slopes", lambda n: 1.01 * slopes(n))
    monkeypatch.setattr(gpu_checks.nn.utils, "clip_grad_norm_", lambda ps, *a, **k: [p.grad.neg_() for p in ps])
    spikes = gpu_checks.planted.spikes
    monkeypatch.setattr(gpu_checks.planted, "spikes", lambda *a, size, **k: spikes(*a, **k, size=3e3))
    assert gpu_checks.run_checks(CPU, tmp_path) == ["flex", "stacked", "large spikes"]
    assert capsys.readouterr().out.count("FAILED: AssertionError") == 3


@pytest.mark.parametrize("name", ["flex", "stacked"])
def test_what_may_become_faster_gives_the_same_numbers(name, tmp_path):
    assert gpu_checks.CHECKS[name](CPU, tmp_path)


def test_the_page_names_flags_that_exist():
    page = (ROOT / "docs" / "gpu_day.md").read_text()
    source = (ROOT / "benchmarks" / "gpu_day.py").read_text()
    flags = {flag for line in page.splitlines() if "gpu_day" in line for flag in re.findall(r" (--\w+)", line)}
    assert len(flags) >= 5 and all(f'"{flag}"' in source for flag in flags), flags
    named = {name.strip() for row in re.findall(r"^\| ([\w, ]+?) \|", page, re.MULTILINE) for name in row.split(",")}
    assert named - {"step"} == STEPS.keys()
