"""Fine-tuning against spikes, end to end; gates that change nothing at first; what is trained is not trained again."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from model import GATES, GPT, GPTConfig
from spikesink.edit import quantise
from spikesink.measure import metrics
from spikesink.models import checkpoint, convert
from spikesink.options import Options
from studies import report

from .conftest import TINY, tiny


@pytest.mark.parametrize("ffn", ["plain", "attention"])
@pytest.mark.parametrize("gate_input", ["input", "constant", "position", "token"])
@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "none"])
def test_added_gates_change_no_logit(ids, gate, gate_input, ffn):
    source = tiny(ffn=ffn, bias=True)
    gated = GPT(dataclasses.replace(source.config, gate=gate, gate_input=gate_input))
    state = convert.with_gates(source.state_dict(), gated.state_dict())
    gated.load_state_dict(state)
    assert torch.equal(gated.eval()(ids)[0], source(ids)[0])
    n_gates = 2 * 2 if ffn == "attention" else 2
    assert sum(name.endswith("c_gate.weight") for name in state) == n_gates
    assert all(not value.any() for name, value in state.items() if "c_gate" in name)


def test_gates_that_are_there_stay_and_a_gated_ffn_is_none():
    gated = tiny(gate="head", ffn="gated")
    again = convert.with_gates(gated.state_dict(), gated.state_dict())
    assert all(torch.equal(again[name], value) for name, value in gated.state_dict().items())
    other = GPT(GPTConfig(**{**TINY, "ffn": "gated"}))
    plain = tiny()
    assert convert.with_gates(plain.state_dict(), other.state_dict()).keys() == plain.state_dict().keys()


SCHEDULE = {  # what every arm changes
    *("out_dir", "init_from", "overwrite", "seed", "max_iters", "eval_interval", "save_interval"),
    *("lr_schedule", "learning_rate", "min_lr", "warmup_iters"),
}


@pytest.fixture
def source(trained, tmp_path):
    """A copy of the checkpoint in a folder of its own."""
    return shutil.copy(trained, tmp_path / "ckpt.pt")


@pytest.fixture
def mitigate(cli, source, monkeypatch):
    """mitigate.py on it, few and short, with few resamples; the findings too where it succeeds."""
    monkeypatch.setattr(metrics, "bootstrap_ci", functools.partial(metrics.bootstrap_ci, resamples=50))
    monkeypatch.setattr(metrics, "permutation_p", functools.partial(metrics.permutation_p, permutations=9))

    def call(*args, steps=3, seeds=1):
        common = ["--seq_len=16", "--n_seq=12", "--nulls=0", f"--steps={steps}", f"--seeds={seeds}"]
        code, out, err = cli("studies.mitigate", source, *common, *args)
        found = source.with_name("mitigate.json")
        return code, out, err, json.loads(found.read_text()) if code == 0 else None

    return call


def test_end_to_end(mitigate, source, tmp_path):
    code, out, err, found = mitigate("--learning_rate=3e-3", seeds=2)
    assert code == 0, err
    assert found["schema"] == "spikesink-mitigation-1"
    assert [arm["name"] for arm in found["arms"]] == ["none", "clip", "penalty", "gate"]
    runs = {(arm["name"], run["seed"]): run for arm in found["arms"] for run in arm["runs"]}
    assert len(runs) == 8
    saved = {key: checkpoint.load(run["path"]) for key, run in runs.items()}
    base = checkpoint.load(source)
    own = {"none": set(), "clip": {"stream_clip"}, "penalty": {"penalty", "penalty_weight"}, "gate": {"gate"}}
    for (name, seed), content in saved.items():
        assert (content.step, content.config["seed"], content.config["learning_rate"]) == (3, seed, 3e-3)
        everything, was = (of.model_args | of.config for of in (content, base))
        assert {key for key in everything if everything[key] != was[key]} == own[name] | SCHEDULE
        changes = next(arm["changes"] for arm in found["arms"] if arm["name"] == name)
        assert changes.items() <= everything.items() and set(changes) == set(own[name])
    # the gate's first step is from the same function, so from the same loss
    first = lambda name: json.loads((tmp_path / "mitigate" / f"{name}-seed1" / "log.jsonl").read_text().split("\n")[0])
    assert first("gate")["loss"] == pytest.approx(first("none")["loss"], rel=1e-6)
    assert first("penalty")["loss"] == first("none")["loss"]
    clip = next(arm for arm in found["arms"] if arm["name"] == "clip")
    assert clip["changes"]["stream_clip"] > 0
    for arm in found["arms"]:
        values = [run["loss"] for run in arm["runs"]]
        assert arm["loss"] == pytest.approx({"mean": sum(values) / 2, "lowest": min(values), "highest": max(values)})
        against = arm["against_before"]
        assert against["delta_loss"] == pytest.approx(arm["loss"]["mean"] - found["before"]["loss"]["mean"])
        assert against["ci95"][0] <= against["delta_loss"] <= against["ci95"][1]
        assert set(arm["int8"]) == set(quantise.GRANULARITIES)
    # the loss of the table is the checkpoint's own
    import spikesink
    from detect import LAB

    opened = spikesink.open(runs["gate", 1]["path"], lab=LAB, calibration=True, seq_len=16, n_seq=12)
    model = GPT.from_checkpoint(saved["gate", 1]).eval()
    loss = model(opened.ids[:, :-1], opened.ids[:, 1:])[1].item()
    assert runs["gate", 1]["loss"] == pytest.approx(loss, rel=1e-5)
    html = source.with_name("mitigate.html").read_text()
    assert "<script" not in html
    assert all(link.startswith(("#", "data:")) for link in re.findall(r"(?:src|href)=[\"']?([^\"' >]+)", html))
    for text in (html, out):
        assert all(word in text for word in ("against none", "per tensor", "penalty_weight=0.01", "Sink_1"))


def test_what_is_trained_is_not_trained_again_and_the_rest_goes_on(mitigate, source, monkeypatch):
    import train

    update, steps = train.Run.update, []

    def counted(self):
        steps.append((self.out_dir.name, self.step))
        if len(steps) == stop:
            self.signals.receive(2)
        return update(self)

    monkeypatch.setattr(train.Run, "update", counted)
    stop = 5  # in the second of three steps of the second run
    code, _, err, _ = mitigate("--arms", "gate")
    assert code == 130 and "the same command goes on" in err and "--resume" not in err and err.count("\n") == 1
    stop, half = None, len(steps)
    assert half == 5
    code, out, err, found = mitigate("--arms", "gate")
    assert code == 0, err
    assert steps[half:] == [("gate-seed1", 2)] and "none, seed 1: trained already" in out
    whole = checkpoint.load(source.with_name("mitigate") / "gate-seed1" / "ckpt.pt").model
    code, out, _, again = mitigate("--arms", "gate", seeds=2)
    assert code == 0 and out.count("trained already") == 2 and len(steps) == half + 1 + 2 * 3
    assert again["arms"][1]["runs"][0] == found["arms"][1]["runs"][0]
    code, _, err, _ = mitigate("--arms", "gate", steps=4)
    assert code == 2 and "max_iters=3, not 4" in err and "--overwrite" in err and err.count("\n") == 1
    code, out, _, _ = mitigate("--arms", "gate", "--overwrite")
    assert code == 0 and "trained already" not in out
    uninterrupted = checkpoint.load(source.with_name("mitigate") / "gate-seed1" / "ckpt.pt").model
    assert all(torch.equal(whole[name], value) for name, value in uninterrupted.items())


def test_runs_of_another_checkpoint_are_not_taken_for_its_own(mitigate, source):
    assert mitigate("--arms", "clip", steps=1)[0] == 0
    content = checkpoint.load(source)
    checkpoint.save(source, dataclasses.replace(content, step=content.step + 1))
    code, _, err, _ = mitigate("--arms", "clip", steps=1)
    assert code == 2 and "init_from=" in err and "--overwrite" in err


MISTAKES = {
    "no such arm": (["--arms", "clap"], "invalid choice: 'clap'"),
    "no rate": (["--learning_rate=0"], "'0' is not a number above 0"),
    "below its schedule": (["--clip=-1"], "'-1' is not a number above 0"),
    "unwritable": (["--html=/dev/null/f.html"], "cannot write /dev/null/f.html"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(mitigate, mistake):
    args, words = MISTAKES[mistake]
    code, _, err, _ = mitigate(*args)
    assert code == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1


def test_checkpoints_that_cannot_be_tuned(cli, source, tmp_path):
    content = checkpoint.load(source)
    for name, changed, words in (
        ("unknown", {"config": {}}, "does not say what it was trained on"),
        ("rate", {"config": {**content.config, "min_lr": 0.0}}, "say which --learning_rate"),
        ("data", {"config": {**content.config, "dataset": "nothing"}}, "no dataset 'nothing'"),
        ("model", {"model_args": {"n_layers": 3}}, "does not hold a model of this version"),
        ("clipped", {"model_args": {**content.model_args, "stream_clip": 3.0}}, "leave clip out of --arms"),
    ):
        checkpoint.save(tmp_path / f"{name}.pt", dataclasses.replace(content, **changed))
        code, _, err = cli("studies.mitigate", tmp_path / f"{name}.pt", "--seq_len=16", "--steps=1")
        assert code == 2 and words in err and err.count("\n") == 1, err
    (tmp_path / "config.json").write_text("{}")
    source.unlink()
    code, _, err = cli("studies.mitigate", tmp_path)
    assert code == 2 and "no checkpoint of train.py or nanoGPT" in err and "--init_from" in err
    assert cli("studies.mitigate")[0] == 2


def test_nanogpts_settings_are_taken_where_they_mean_something_here():
    from studies import mitigate

    theirs = {"dataset": "shakespeare", "dtype": "float16", "device": "cuda", "compile": True, "grad_clip": 1}
    theirs |= {"min_lr": 6e-5, "weight_decay": 1e-1, "backend": "nccl", "warmup_iters": 2000, "max_iters": 600000}
    asked = mitigate.Asked(Path("nano.pt"), Options(device="cpu"), steps=50)
    cfg = mitigate.base_of(checkpoint.Checkpoint({}, {}, config=theirs), asked)
    assert (cfg.dataset, cfg.dtype, cfg.device, cfg.compile) == ("shakespeare", "auto", "cpu", False)
    assert (cfg.grad_clip, cfg.weight_decay, cfg.learning_rate, cfg.min_lr) == (1, 0.1, 6e-5, 6e-5)
    assert (cfg.max_iters, cfg.warmup_iters, cfg.lr_schedule) == (50, 5, "constant")


def test_numbers_of_seeds():
    assert report.of_seeds({"mean": 1.0, "lowest": 0.5, "highest": 2.0}, ".1f") == "1.0 [0.5, 2.0]"
    assert report.of_seeds({"mean": 1.0, "lowest": 1.0, "highest": 1.0001}, ".1f") == "1.0"
