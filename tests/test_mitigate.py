"""Fine-tuning against spikes, end to end; gates that change nothing at first; what is trained is not trained again."""

import dataclasses
import functools
import json
import re
import shutil

import pytest
import torch

import spikesink
from detect import LAB
from model import GATES, GPT, GPTConfig
from spikesink.edit import quantise
from spikesink.measure import metrics
from spikesink.models import checkpoint, convert
from studies import jobs

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
    *("out_dir", "init_from", "overwrite", "seed", "max_iters", "eval_interval", "save_interval", "keep_every"),
    *("lr_schedule", "learning_rate", "min_lr", "warmup_iters", "device"),
}


@pytest.fixture
def source(trained, tmp_path):
    """A copy of the checkpoint in a folder of its own."""
    return shutil.copy(trained, tmp_path / "ckpt.pt")


@pytest.fixture
def mitigate(cli, source, tmp_path, monkeypatch):
    """The study of it, few and short, with few resamples; the table too where it succeeds."""
    jobs.start_of.cache_clear()
    monkeypatch.setattr(metrics, "bootstrap_ci", functools.partial(metrics.bootstrap_ci, resamples=50))
    monkeypatch.setattr(metrics, "permutation_p", functools.partial(metrics.permutation_p, permutations=9))

    def call(*args, steps=3, seeds=(1,)):
        common = ["--seq_len=16", "--n_seq=12", "--points=1", f"--max_iters={steps}", "--warmup_iters=0"]
        common += [f"--seeds={','.join(map(str, seeds))}", f"--init_from={source}"]
        where = [f"--out={tmp_path / 'out'}", f"--results={tmp_path / 'results'}", "--keep_checkpoints"]
        code, out, err = cli("study.py", "mitigate", *common, *where, *args)
        table = tmp_path / "results" / "mitigate" / "table.json"
        return code, out, err, json.loads(table.read_text()) if code == 0 else None

    return call


def test_end_to_end(mitigate, source, tmp_path):
    code, _, err, table = mitigate("--learning_rate=3e-3", seeds=(1, 2))
    assert code == 0, err
    assert list(table["arms"]) == ["none", "clip", "penalty", "gate"]
    rows = {(name, row["seed"]): row for name, arm in table["arms"].items() for row in arm["seeds"]}
    assert len(rows) == 8 and {row["status"] for row in rows.values()} == {"done"}
    runs = tmp_path / "out" / "mitigate"
    saved = {(name, seed): checkpoint.load(runs / f"{name}-{seed}") for name, seed in rows}
    base = checkpoint.load(source)
    own = {"none": set(), "clip": {"stream_clip"}, "penalty": {"losses"}, "gate": {"gate"}}
    for (name, seed), content in saved.items():
        assert (content.step, content.config["seed"], content.config["learning_rate"]) == (3, seed, 3e-3)
        everything, was = (of.model_args | of.config for of in (content, base))
        assert {key for key in everything if everything[key] != was[key]} - SCHEDULE == own[name]
        changes = table["arms"][name]["changes"]
        assert changes.items() <= everything.items() and set(changes) == own[name]
    # the gate's first step is from the same function, so from the same loss
    first = lambda name: json.loads((runs / f"{name}-1" / "log.jsonl").read_text().split("\n")[0])["loss"]
    assert first("gate") == pytest.approx(first("none"), rel=1e-6)
    assert first("penalty") == first("none")
    assert table["arms"]["clip"]["changes"]["stream_clip"] > 0
    names = [f"int8 per {name}{half}: loss" for name in ("tensor", "channel", "token") for half in ("", ", weights")]
    for row in rows.values():
        assert all(point["measures"].keys() >= set(names) for point in row["course"])
    before = [rows[name, 1]["course"][0]["measures"] for name in ("none", "gate")]
    opened = spikesink.open(source, lab=LAB, seq_len=16, n_seq=12)
    assert [of["short loss"] for of in before] == pytest.approx([opened.loss()] * 2)
    int8 = quantise.quantised_losses(opened.subjects[0], opened.ids, opened.other_ids)
    assert before[0]["int8 per tensor: loss"] == pytest.approx(int8["per_tensor"].delta_loss, abs=1e-5)
    text = (tmp_path / "results" / "mitigate" / "table.md").read_text()
    html = (runs / "index.html").read_text()
    assert all(re.search(r"none, step 0.*\n.*none, end", page) for page in (text, re.sub("</td>.*?(?=<tr>)", "", html)))
    assert all("int8 per tensor" in page for page in (text, html))


def test_what_is_trained_is_not_trained_again_and_the_rest_goes_on(mitigate, source, tmp_path, monkeypatch):
    import train

    update, steps = train.Run.update, []

    def counted(self):
        steps.append((self.out_dir.name, self.step))
        if len(steps) == stop:
            self.signals.receive(2)
        return update(self)

    monkeypatch.setattr(train.Run, "update", counted)
    stop = 5  # in the second of three steps of the second run
    code, _, err, _ = mitigate("--arms=none,gate")
    assert code == 130 and "the same command goes on" in err and "--resume" not in err and err.count("\n") == 1
    stop, half = None, len(steps)
    assert half == 5
    code, _, err, found = mitigate("--arms=none,gate")
    assert code == 0, err
    assert steps[half:] == [("gate-1", 2)]
    whole = checkpoint.load(tmp_path / "out" / "mitigate" / "gate-1").model
    code, _, _, again = mitigate("--arms=none,gate", seeds=(1, 2))
    assert code == 0 and len(steps) == half + 1 + 2 * 3
    assert again["arms"]["gate"]["seeds"][0] == found["arms"]["gate"]["seeds"][0]
    assert mitigate("--arms=none,gate", "--name=again")[0] == 0
    uninterrupted = checkpoint.load(tmp_path / "out" / "again" / "gate-1").model
    assert all(torch.equal(whole[name], value) for name, value in uninterrupted.items())


def test_runs_of_another_checkpoint_are_not_taken_for_its_own(mitigate, source):
    found = mitigate("--arms=none", steps=1)[-1]
    content = checkpoint.load(source)
    checkpoint.save(source, dataclasses.replace(content, step=content.step + 1))
    jobs.start_of.cache_clear()
    again = mitigate("--arms=none", steps=1)[-1]
    assert found["data"][:2] == again["data"][:2] and found["data"][2] != again["data"][2]
    assert found["arms"]["none"]["seeds"][0]["job"] != again["arms"]["none"]["seeds"][0]["job"]


MISTAKES = {
    "no such arm": (["--arms=clap"], "has no arm 'clap' (did you mean clip?)"),
    "no rate": (["--learning_rate=0"], "above 0"),
    "no clipping": (["--clip=-1"], "clip=-1.0 must be above 0"),
    "no checkpoint": (["--init_from=scratch"], "needs a checkpoint to start from"),
    "not one of ours": (
        ["--init_from=gpt2"],
        "there is no checkpoint gpt2; train.py --init_from=gpt2 makes one from a Hugging Face GPT-2 or Llama",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(mitigate, mistake):
    args, words = MISTAKES[mistake]
    code, _, err, _ = mitigate(*args)
    assert code == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1


def test_checkpoints_that_cannot_be_tuned(mitigate, source, tmp_path):
    content = checkpoint.load(source)
    for name, changed, words in (
        ("unknown", {"config": {}}, "does not say what it was trained on"),
        ("rate", {"config": {**content.config, "min_lr": 0.0}}, "learning_rate=0.0, and that above 0"),
        ("data", {"config": {**content.config, "dataset": "nothing"}}, "no dataset 'nothing'"),
        ("model", {"model_args": {**content.model_args, "n_layer": 3}}, "does not hold a model of this version"),
        ("gated", {"model_args": {**content.model_args, "gate": "head"}}, "none and gate are the same here: leave one"),
    ):
        checkpoint.save(tmp_path / f"{name}.pt", dataclasses.replace(content, **changed))
        arms = "none,gate" if name == "gated" else "none,clip"
        code, _, err, _ = mitigate(f"--init_from={tmp_path / name}.pt", f"--arms={arms}")
        assert code == 2 and words in err and err.count("\n") == 1, err


def test_nanogpts_settings_are_taken_where_they_mean_something_here(source, tmp_path):
    theirs = {"dataset": "shakespeare", "dtype": "float16", "device": "cuda", "compile": True, "grad_clip": 1}
    theirs |= {"min_lr": 6e-5, "weight_decay": 1e-1, "backend": "nccl", "warmup_iters": 2000, "max_iters": 600000}
    checkpoint.save(tmp_path / "nano.pt", dataclasses.replace(checkpoint.load(source), config=theirs))
    values, hashes, _ = jobs.start_of(str(tmp_path / "nano.pt"))
    of_run = {key: value for key, value in values.items() if key not in GPTConfig.__dataclass_fields__}
    assert len(hashes) == 1 and of_run == {
        **{"dataset": "shakespeare", "dtype": "auto", "grad_clip": 1, "weight_decay": 0.1},
        **{"learning_rate": 6e-5, "min_lr": 0.0, "lr_schedule": "constant"},
    }
