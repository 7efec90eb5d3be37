"""The loop: exact resume, the non-finite guard, ranks, and what it leaves behind."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from data.loader import Tokens
from spikesink import errors
from spikesink.models import checkpoint
from train import SCHEMAS, STREAM_LOSSES, Run, TrainConfig, cpp_compiler, soap, validation_loss
from trainer import config
from trainer.log import numbers
from trainer.machine import Machine

from .conftest import ROOT, SMALL_RUN, same, tiny


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def train(cli, toy_data):
    def call(out, *args):
        return cli("train.py", *SMALL_RUN, f"--dataset={toy_data}", f"--out_dir={out}", *args)

    return call


def test_a_run_that_was_stopped_before_its_first_checkpoint_says_so(train, cli, tmp_path):
    train(tmp_path / "whole", "--max_iters=1")
    for name in ("config.json", "log.jsonl"):
        (tmp_path / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    for script in ("detect.py", "ablate.py"):
        code, _, err = cli(script, tmp_path)
        assert code == 2 and err == f"error: {tmp_path} is a run of train.py that has no checkpoint yet\n"
    for flag, words in ((f"--init_from={tmp_path}", "has no checkpoint yet"), ("--resume", "again with --overwrite")):
        code, _, err = train(tmp_path / "other" if "init" in flag else tmp_path, flag)
        assert code == 2 and words in err and err.count("\n") == 1
    code, _, err = train(tmp_path)
    assert code == 2 and "--resume" not in err and "--overwrite starts again" in err
    assert train(tmp_path, "--overwrite", "--max_iters=1")[0] == 0


@pytest.mark.parametrize("device", ["mps", "cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_one_line(train, tmp_path, device):
    code, _, err = train(tmp_path / "o", f"--device={device}")
    assert code == 2 and err.count("\n") == 1 and f"device {device} is not available" in err and len(err) < 200
    assert not (tmp_path / "o").exists()


def test_an_ascii_terminal_shows_what_it_can():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", "from spikesink import errors; errors.cli(lambda: print('a\u23ce'))"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a\\u23ce\n", b"")


def test_on_windows_a_command_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    assert errors.exit_code(lambda: pytest.fail("it ran")) == 2
    assert re.fullmatch("error: .*on Windows, call it in WSL.*\n", capsys.readouterr().err)


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
    assert one.step == two.step == 8
    assert same(one.model, two.model) and same(one.optimizer, two.optimizer)
    timing = "tokens_per_s"
    assert [{**row, timing: 0} for row in rows(whole)] == [{**row, timing: 0} for row in rows(halves)]


def test_dropout_noise_is_used_and_differs_between_steps(train, tmp_path):
    train(tmp_path / "a", "--max_iters=1", "--dropout=0.5")
    train(tmp_path / "b", "--max_iters=1")
    assert rows(tmp_path / "a")[0]["loss"] != rows(tmp_path / "b")[0]["loss"]


def test_noise_is_a_function_of_seed_step_and_rank():
    from train import noise_seed

    triples = list(itertools.product(range(3), range(40), range(4)))
    assert [noise_seed(*triple) for triple in triples] == [noise_seed(*triple) for triple in triples]
    assert len({noise_seed(*triple) for triple in triples}) == len(triples)
    assert noise_seed(1337, 0, 0) == 13582406009521608908  # on every machine, in every version


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
    assert saved.model_args["vocab_size"] == 64 and saved.config["seed"] == 1337
    assert saved.val_loss == log[-1]["val_loss"] and saved.tokens == log[-1]["tokens"]
    assert (saved.maker, saved.contract) == ("spikesink", "spikesink-model-1")
    assert json.loads((tmp_path / "o" / "config.json").read_text())["given"]["n_layer"] == 1


def test_the_validation_loss_does_not_depend_on_the_batch_size(toy_data):
    """Nor on how many ranks share the windows out; it is the mean over the windows, each counted once."""
    data, model = Tokens(toy_data, "val", 16), tiny()

    @torch.no_grad()
    def mean(windows):
        x, y = data.read(windows)
        return torch.stack([model(a[None], b[None])[1] for a, b in zip(x, y, strict=True)]).mean().item()

    def loss(batch_size, world, eval_iters=3):
        cfg, each = TrainConfig(batch_size=batch_size, eval_iters=eval_iters), []
        for rank in range(world):
            machine = SimpleNamespace(device="cpu", autocast=contextlib.nullcontext, rank=rank, world=world)
            machine.sum = lambda total: total
            each.append(validation_loss(model, data, cfg, machine))
        return sum(each)

    for batch_size, world in itertools.product((1, 7, 16, 100), (1, 3)):
        assert loss(batch_size, world) == pytest.approx(mean(data.windows(0, 48)), rel=1e-5)
    assert loss(16, 1, eval_iters=100) == pytest.approx(mean(range(data.n_windows)), rel=1e-5)  # none of them twice


def test_a_run_is_not_overwritten_unasked(train, tmp_path):
    train(tmp_path, "--max_iters=2")
    before = (tmp_path / "ckpt.pt").read_bytes()
    code, _, err = train(tmp_path, "--max_iters=3")
    assert code == 2 and "--resume" in err and "--overwrite" in err and err.count("\n") == 1
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    for change in ("--norm_place=post", "--weight_decay=0", "--batch_size=8", "--optimizer=sgd", "--seed=3", "--bos"):
        code, _, err = train(tmp_path, "--resume", change)
        assert code == 2
        assert "was trained with " + change[2:].split("=")[0] in err
    assert train(tmp_path, "--max_iters=3", "--overwrite")[0] == 0


def test_resume_without_a_checkpoint_or_with_a_damaged_one(train, tmp_path):
    code, _, err = train(tmp_path, "--resume")
    assert code == 2 and "no checkpoint" in err and not (tmp_path / "log.jsonl").exists()
    train(tmp_path, "--max_iters=2")
    data = bytearray((tmp_path / "ckpt.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "ckpt.pt").write_bytes(data)
    code, _, err = train(tmp_path, "--resume")
    assert code == 2 and "ckpt-00000002.pt is damaged" in err and err.count("\n") == 1


def test_non_finite_gradient_stops_before_the_update(train, tmp_path, monkeypatch):
    import train as script

    update = script.Run.update

    def poison(self):
        if self.step == 5:
            weight = self.model.transformer.h[0].mlp.f.c_fc.weight
            weight.register_hook(lambda gradient: gradient * torch.nan)
            self.poisoned = weight.detach().clone(), weight
        try:
            return update(self)
        finally:
            if self.step == 5 and hasattr(self, "poisoned"):
                assert torch.equal(*self.poisoned)  # the weights are those before the step

    monkeypatch.setattr(script.Run, "update", poison)
    code, _, err = train(tmp_path)
    assert code == 3 and "step 6" in err and "gradient norm nan" in err and str(tmp_path / "ckpt-00000004.pt") in err
    assert rows(tmp_path)[-1]["step"] == 5
    assert checkpoint.load(tmp_path / "ckpt.pt").step == 4


SPOILED = [  # the first update leaves finite weights whose loss is not
    *(
        "--optimizer=sgd",
        "--learning_rate=1e9",
        "--min_lr=1e8",
        "--warmup_iters=0",
        "--grad_clip=0",
        "--save_interval=1",
    )
]


@pytest.mark.parametrize("interval", [1, 100])
def test_a_model_whose_loss_is_not_finite_is_not_the_last_good_one(train, tmp_path, interval):
    """A validation loss of NaN was logged, which is no JSON, and the model saved and called good."""
    code, _, err = train(tmp_path, *SPOILED, f"--eval_interval={interval}")
    first = "step 1: val_loss nan after the update: stopped, not saved" if interval == 1 else "step 2: loss nan"
    assert code == 3 and first in err and "checkpoints: there is none yet" in err
    assert f"--replay={1 if interval == 1 else 2} shows" in err
    assert (tmp_path / "ckpt.pt").exists() == (interval > 1)
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_a_run_started_again_leaves_no_old_checkpoint_behind(train, tmp_path, monkeypatch):
    import train as script

    train(tmp_path, "--max_iters=2")
    monkeypatch.setattr(script.Run, "update", lambda self: (_ for _ in ()).throw(script.StoppedError("step 1")))
    assert train(tmp_path, "--overwrite", "--seed=2")[0] == 3
    assert not (tmp_path / "ckpt.pt").exists()


@pytest.mark.parametrize("out", ["{file}", "/proc/nowhere"])
def test_out_dir_that_cannot_be_written(train, tmp_path, out):
    (tmp_path / "file").write_text("x")
    code, _, err = train(out.format(file=tmp_path / "file"))
    assert code == 2
    assert "cannot write" in err
    assert err.count("\n") == 1


def test_a_broken_log_line_is_dropped_on_resume(train, tmp_path):
    train(tmp_path, "--max_iters=4")
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write("\nnot json\n")
    assert train(tmp_path, "--resume")[0] == 0
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 9))


def test_decay_groups_are_nanogpts():
    from .conftest import tiny

    model = tiny(bias=True)
    decayed, other = model.optimizer_groups(0.1)
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() >= 2 for p in decayed["params"]) and all(p.dim() < 2 for p in other["params"])
    assert sum(len(group["params"]) for group in (decayed, other)) == len(list(model.parameters()))


def test_bfloat16_trains_close_to_float32(train, tmp_path):
    train(tmp_path / "a", "--dtype=bfloat16")
    train(tmp_path / "b")
    a, b = rows(tmp_path / "a")[-1]["loss"], rows(tmp_path / "b")[-1]["loss"]
    assert a == pytest.approx(b, rel=0.02) and a != b


# ------------------------------------------------------------------------------- optimisers, losses, loss range


def test_muon_updates_the_blocks_matrices_and_adamw_the_rest():
    from train import OPTIMIZERS, TrainConfig

    from .conftest import tiny

    model = tiny(bias=True, norm="rmsnorm")
    first, second = OPTIMIZERS["muon"](model, TrainConfig(optimizer="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    of = lambda optimizer: [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert isinstance(first, torch.optim.Muon)
    assert sorted(of(first) + of(second)) == sorted(names.values())
    assert set(of(first)) == {n for n in names.values() if ".h." in n and n.endswith(".weight") and "norm" not in n}


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd", "soap"])
def test_every_optimiser_learns_and_resumes_bitwise(train, tmp_path, optimizer):
    extra = [f"--optimizer={optimizer}", "--lr_decay_iters=8", f"--learning_rate={0.3 if optimizer == 'sgd' else 1e-2}"]
    train(tmp_path / "whole", *extra)
    train(tmp_path / "halves", *extra, "--max_iters=4")
    train(tmp_path / "halves", *extra, "--resume")
    assert rows(tmp_path / "whole")[-1]["val_loss"] < rows(tmp_path / "whole")[3]["val_loss"]
    one, two = (checkpoint.load(tmp_path / name) for name in ("whole", "halves"))
    assert same(one.model, two.model)
    assert same(one.optimizer, two.optimizer)


def test_loss_range_counts_the_positions_it_says(train, tmp_path):
    from model import GPT, GPTConfig

    train(tmp_path, "--loss_first=3", "--loss_last=9", "--max_iters=1", "--gradient_accumulation_steps=1")
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    torch.manual_seed(config["seed"])
    model = GPT(GPTConfig(**{key: config[key] for key in (field.name for field in dataclasses.fields(GPTConfig))}))
    x, y = Tokens(config["dataset"], "train", 16, False, config["seed"]).batch(0, 4)
    each = torch.nn.functional.cross_entropy(model(x)[0].transpose(1, 2), y, reduction="none")
    assert rows(tmp_path)[0]["loss"] == pytest.approx(each[:, 3:9].mean().item(), rel=1e-5)


@pytest.mark.parametrize("penalty", ["kurtosis", "magnitude"])
def test_penalty_is_its_formula_and_lowers_what_it_penalises(train, tmp_path, penalty):
    x = torch.randn(2, 5, 8)
    power = x.square().mean(1)
    expected = {
        "kurtosis": ((power**2).mean(1) / power.mean(1) ** 2).mean(),
        "magnitude": (x.abs().max(-1).values / x.square().mean(-1).sqrt()).mean(),
    }[penalty]
    torch.testing.assert_close(STREAM_LOSSES[penalty](x), expected)

    measured = {}
    for weight in ("0.0", "3.0"):
        train(tmp_path / weight, f"--losses={penalty}={weight}", "--max_iters=30")
        from model import GPT

        model, streams = GPT.from_checkpoint(checkpoint.load(tmp_path / weight)).eval(), []
        model.transformer.h[0].mlp.stream.register_forward_hook(lambda m, a, out, s=streams: s.append(out))
        model(torch.arange(16)[None])
        measured[weight] = STREAM_LOSSES[penalty](streams[0]).item()
    assert measured["3.0"] < measured["0.0"] * 0.97
    # with no weight it is the run without a penalty, bit by bit: the penalty only adds its own gradient
    train(tmp_path / "plain", "--max_iters=30")
    assert same(checkpoint.load(tmp_path / "plain").model, checkpoint.load(tmp_path / "0.0").model)


@pytest.mark.parametrize("losses", ["", "kurtosis=1 magnitude=1"])
def test_a_step_is_the_same_however_micro_batches_share_it_out(toy_data, tmp_path, losses):
    """The kurtosis of a batch is not the mean of its parts': over a whole batch it made 15% of a gradient."""
    grads = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        options = dict(option.removeprefix("--").split("=") for option in SMALL_RUN)
        options |= {"dataset": str(toy_data), "batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        options |= {"losses": losses}
        fields = config.fields_of(SCHEMAS)
        typed = {key: config.typed(key, value, fields[key].type, "test") for key, value in options.items()}
        run = Run.open(typed, tmp_path / str(batch_size), Machine.find("cpu"))
        run.gradients()
        grads.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
        run.lock.release()
    assert (grads[0] - grads[1]).abs().max() < 1e-4 * grads[0].abs().max()


def test_losses_of_the_stream_and_of_the_model_are_added_with_their_weights_and_logged(train, tmp_path, monkeypatch):
    """The log's loss and the validation loss stay the language model's alone."""
    import train as script

    def forward(self, idx, targets=None):
        found = forward_of_gpt(self, idx, targets)
        self.losses, self.scalars = {"load_balance": self.lm_head.weight.square().mean()}, {"one": torch.ones(())}
        return found

    forward_of_gpt = script.GPT.forward
    monkeypatch.setattr(script.GPT, "forward", forward)
    assert train(tmp_path / "plain", "--max_iters=4")[0] == 0
    assert train(tmp_path / "o", "--losses=load_balance=50 kurtosis=0", "--max_iters=4", "--tensorboard")[0] == 0
    plain, log = rows(tmp_path / "plain"), rows(tmp_path / "o")
    assert plain[0]["losses"].keys() == {"load_balance"} and log[0]["losses"].keys() == {"load_balance", "kurtosis"}
    assert log[0]["losses"]["load_balance"] == pytest.approx(4e-4, rel=0.1) and log[0]["scalars"] == {"one": 1.0}
    assert log[0]["loss"] == plain[0]["loss"] and log[0]["grad_norm"] != plain[0]["grad_norm"]
    assert log[-1]["losses"]["load_balance"] < 0.9 * plain[-1]["losses"]["load_balance"]
    assert numbers(log[0])["losses/kurtosis"] == log[0]["losses"]["kurtosis"]
    code, _, err = train(tmp_path / "typo", "--losses=load_balanc=1")
    assert code == 2 and "there is no 'load_balanc' (did you mean load_balance?); there are kurtosis" in err
    assert err.count("\n") == 1 and not (tmp_path / "typo").exists()


def test_a_run_with_the_keys_of_an_older_version_goes_on_as_the_same_run(train, tmp_path):
    extra = ["--losses=kurtosis=0.5", "--lr_schedule=wsd", "--lr_decay_iters=8"]
    train(tmp_path / "whole", *extra)
    train(tmp_path / "halves", *extra, "--max_iters=4")
    content = checkpoint.load(tmp_path / "halves")
    del content.config["losses"], content.given["losses"]
    older = {"penalty": "kurtosis", "penalty_weight": 0.5, "lr_schedule": "constant_linear"}
    content.config.update(older)
    content.given.update(older)
    checkpoint.save((tmp_path / "halves" / "ckpt.pt").resolve(), content)
    assert train(tmp_path / "halves", "--resume")[0] == 0
    one, two = (checkpoint.load(tmp_path / name) for name in ("whole", "halves"))
    assert same(one.model, two.model) and two.config["losses"] == {"kurtosis": 0.5} == two.given["losses"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd", "soap"])
def test_a_group_has_its_own_rate_after_resume_too(train, tmp_path, monkeypatch, optimizer):
    import train as script

    def groups(self, weight_decay):
        scaled = [{**group, "lr_scale": 0.0} for group in groups_of_gpt(self, weight_decay)]
        return [*scaled[:1], {**scaled[1], "lr_scale": 1.0}]  # matrices stand still, vectors do not

    groups_of_gpt = script.GPT.optimizer_groups
    monkeypatch.setattr(script.GPT, "optimizer_groups", groups)
    train(tmp_path, f"--optimizer={optimizer}", "--max_iters=1", "--save_interval=1")
    first = checkpoint.load(tmp_path).model
    train(tmp_path, "--resume", "--max_iters=3")
    last = checkpoint.load(tmp_path).model
    assert {torch.equal(first[name], last[name]) for name in first if first[name].dim() > 1} == {True}
    assert {torch.equal(first[name], last[name]) for name in first if first[name].dim() == 1} == {False}


def test_soap_is_its_papers_algorithm():
    """Vyas et al. 2024, algorithm 3, on one matrix: the first gradient finds the basis, which is kept for 10 steps."""
    torch.manual_seed(0)
    weight, lr, decay, (b1, b2) = torch.nn.Parameter(torch.randn(5, 5)), 0.1, 0.2, (0.9, 0.8)
    cfg = TrainConfig(learning_rate=lr, beta1=b1, beta2=b2)
    optimizer = soap([{"params": [weight], "weight_decay": decay}], cfg)
    gradients, w = torch.randn(5, 5, 5), weight.detach().clone()
    first = gradients[0]
    left, right = (torch.linalg.eigh(square)[1] for square in (first @ first.T, first.T @ first))
    m, v = torch.zeros(5, 5), torch.zeros(5, 5)
    for step, g in enumerate(gradients):
        weight.grad = g.clone()
        optimizer.step()
        if step:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (left.T @ g @ right) ** 2
            n = (left.T @ m @ right / (1 - b1**step)) / (v / (1 - b2**step)).sqrt()
            w = (w - lr * left @ n @ right.T) * (1 - lr * decay)
        torch.testing.assert_close(weight.detach(), w, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ init_from


def test_init_from_a_hugging_face_folder_and_a_checkpoint(train, tmp_path, cli, toy_data):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    source = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=70)).eval()
    source.save_pretrained(tmp_path / "hf")
    common = [f"--dataset={toy_data}", "--warmup_iters=0", "--learning_rate=1e-3", "--min_lr=1e-3", "--compile=False"]
    common += [
        "--max_iters=1",
        "--gradient_accumulation_steps=1",
        "--batch_size=4",
        "--dtype=float32",
        "--eval_iters=1",
    ]
    code, _, err = cli("train.py", *common, f"--init_from={tmp_path / 'hf'}", f"--out_dir={tmp_path / 'a'}")
    assert code == 0, err
    x, y = Tokens(str(toy_data), "train", 16, False, 1337).batch(0, 4)
    loss = torch.nn.functional.cross_entropy(source(x).logits.transpose(1, 2), y).item()
    assert rows(tmp_path / "a")[0]["loss"] == pytest.approx(loss, rel=1e-4)
    saved = checkpoint.load(tmp_path / "a").model_args
    assert (saved["n_embd"], saved["vocab_size"], saved["activation"]) == (32, 70, "gelu_tanh")

    code, _, err = cli(
        "train.py", *common, f"--init_from={tmp_path / 'a'}", f"--out_dir={tmp_path / 'b'}", "--logit_cap=30"
    )
    assert code == 0, err
    assert checkpoint.load(tmp_path / "b").model_args["logit_cap"] == 30

    for extra, words in (
        ([f"--init_from={tmp_path / 'a'}", "--ffn_hidden=100"], "does not fit the architecture that was given"),
        ([f"--init_from={tmp_path / 'nowhere'}"], "cannot be opened"),
    ):
        code, _, err = cli("train.py", *common, *extra, f"--out_dir={tmp_path / 'c'}")
        assert code == 2
        assert words in err
        assert err.count("\n") == 1


def test_arms_table(cli, toy_data):
    code, out, err = cli("benchmarks.arms", "postnorm", "muon", "registers", "--steps=2", f"--dataset={toy_data}")
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["arm", "postnorm", "muon", "registers"]
    code, out, _ = cli("benchmarks.arms", "postnorm", "--steps=1", f"--dataset={toy_data}", "--markdown")
    assert "| `postnorm` | `norm_place='post'` |" in out


# ------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_at_the_end_of_the_step_and_resume_is_exact(train, tmp_path, toy_data, number):
    import signal
    import time

    out = tmp_path / "stopped"
    options = [*SMALL_RUN, f"--dataset={toy_data}", f"--out_dir={out}", "--lr_decay_iters=3000", "--max_iters=3000"]
    options += ["--save_interval=100000", "--eval_interval=100000"]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # other sums, with other threads
    command = [sys.executable, "train.py", *options]
    running = subprocess.Popen(command, cwd=ROOT, env=threads, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (out / "log.jsonl").exists() and len(rows(out)) > 3:
            break
        time.sleep(0.1)
    running.send_signal(getattr(signal, number))
    err = running.communicate()[1]
    step = checkpoint.load(out).step
    assert running.returncode == 130
    assert f"{number} at step {step}: saved {out}/ckpt.pt; go on with --resume" in err
    assert err.count("\n") == 1
    more = ["--lr_decay_iters=3000", "--save_interval=100000", "--eval_interval=100000", f"--max_iters={step + 3}"]
    assert train(out, *more, "--resume")[0] == 0
    assert train(tmp_path / "whole", *more)[0] == 0
    assert same(checkpoint.load(out).model, checkpoint.load(tmp_path / "whole").model)


def test_resume_notices_other_data_and_says_what_changed(train, tmp_path, toy_data):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    options = [f"--dataset={data}", "--max_iters=2"]
    train(tmp_path / "o", *options)
    code, out, _ = train(tmp_path / "o", f"--dataset={data}", "--max_iters=4", "--learning_rate=0.02", "--resume")
    assert code == 0
    assert "changed on resume: learning_rate 0.01 -> 0.02" in out
    code, _, err = train(tmp_path / "o", f"--dataset={data}", "--max_iters=3", "--resume")
    assert code == 2
    assert "beyond max_iters=3" in err
    (data / "train.bin").write_bytes((data / "train.bin").read_bytes()[:4096])
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps({**meta, "train_tokens": 2048}))
    code, _, err = train(tmp_path / "o", f"--dataset={data}", "--max_iters=8", "--resume")
    assert code == 2
    assert "other data" in err


# ------------------------------------------------------------------------------------------------- what surviving is


def test_replay_computes_a_step_again_and_writes_nothing(train, tmp_path, cli):
    """From the checkpoint before it (step 6 from 4), and from the start where there is none (step 3)."""
    train(tmp_path, "--dropout=0.1")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for step in (6, 3, 8):
        code, out, err = cli("train.py", f"--replay={step}", f"--out_dir={tmp_path}", "--compile=False", "--device=cpu")
        assert code == 0, err
        row = rows(tmp_path)[step - 1]
        assert f"step {step}: loss {row['loss']:.6f}, gradient norm {row['grad_norm']:.6g} (logged: " in out
        assert f"(logged: {row['loss']:.6f}, {row['grad_norm']:.6g})" in out
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, err = cli("train.py", "--replay=2", f"--out_dir={tmp_path / 'nowhere'}", "--dataset=nothing")
    assert code == 2 and err.count("\n") == 1


def test_replay_names_the_window_that_spoils_a_batch(train, tmp_path, toy_data):
    """One window of random tokens among learnable ones has the highest loss, and is the first that replay shows."""
    import shutil

    import numpy as np

    from train import Machine, Run, replay

    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    tokens = np.fromfile(data / "train.bin", "<u2")
    step, n = 200, 8
    spoiled = Tokens(str(data), "train", 16, False, 1337).windows(step - 1, n)[5]
    tokens[spoiled * 16 : spoiled * 16 + 17] = np.random.default_rng(0).integers(0, 64, 17)
    tokens.tofile(data / "train.bin")
    train(tmp_path / "o", f"--dataset={data}", "--max_iters=220", "--save_interval=50", "--eval_interval=220")
    found = replay(Run.open({"replay": step}, tmp_path / "o", Machine.find("cpu")))
    assert found.windows[0][0] == spoiled
    windows = Tokens(str(data), "train", 16, False, 1337).windows(step - 1, n)
    assert sorted(window for window, _, _ in found.windows) == sorted(windows)
    assert sum(share for _, share in found.shares) == pytest.approx(1)


def test_a_loss_that_stands_out_is_noted_with_its_windows():
    from trainer.log import LossWatch

    generator = torch.Generator().manual_seed(0)
    losses = (3 + 0.1 * torch.randn(400, generator=generator)).tolist()
    losses[200], losses[201], losses[300] = 5.0, 5.0, 3.9
    watch, found = LossWatch(), []
    for step, loss in enumerate(losses):
        if step == 250:
            watch = LossWatch(watch.state)  # a resumed run sees the same
        if watch.stands_out(loss)[0]:
            found.append(step)
    assert found == [200, 201, 300]
    rising = LossWatch()
    assert not any(rising.stands_out(1 + 0.01 * step)[0] for step in range(400))  # a slow drift does not


def test_a_spike_of_the_loss_is_written_with_what_replays_it(train, tmp_path, monkeypatch):
    import train as script

    gradients = script.Run.gradients

    def jumping(run):
        return gradients(run) + 9 * (run.step == 59)

    monkeypatch.setattr(script.Run, "gradients", jumping)
    train(tmp_path, "--max_iters=70", "--eval_interval=70", "--save_interval=70")
    noted = [json.loads(line) for line in (tmp_path / "loss_spikes.jsonl").read_text().splitlines()]
    assert [row["step"] for row in noted] == [60]
    dataset = json.loads((tmp_path / "config.json").read_text())["config"]["dataset"]
    assert noted[0]["windows"] == Tokens(dataset, "train", 16, False, 1337).windows(59, 8)


def test_best_is_the_best_over_both_parts_of_a_run(train, tmp_path):
    train(tmp_path, "--max_iters=4")
    assert train(tmp_path, "--resume", "--learning_rate=30", "--keep_last=1")[0] == 0
    log = rows(tmp_path)
    assert log[-1]["val_loss"] > log[3]["val_loss"]
    assert checkpoint.load(tmp_path / "best.pt").step == 4
    assert checkpoint.load(tmp_path).step == 8


def test_tensorboard_holds_the_log(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "--tensorboard=True", "--max_iters=4")
    train(tmp_path, "--tensorboard=True", "--resume")
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in seen.Scalars("loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in rows(tmp_path)
    ]


def test_lines_wait_while_the_disk_is_full(tmp_path, capsys):
    from trainer.log import JsonLines

    log = JsonLines(tmp_path / "log.jsonl")
    log.write({"step": 1})
    file = log.file

    class Full:
        """Takes half of a line and then fails."""

        def __init__(self):
            self.writes = 0

        def seek(self, place):
            file.seek(place)

        def write(self, data):
            self.writes += 1
            if self.writes % 2:
                return file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

    log.file = Full()
    log.write({"step": 2})
    log.write({"step": 3})
    log.file = file
    log.write({"step": 4})
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("wait until it can be written") == 1


def test_paths_in_a_checkpoint_do_not_decide_where_anything_is_written(train, tmp_path, cli):
    """A checkpoint that was given to us says out_dir=elsewhere; what is written stays beside it."""
    train(tmp_path / "o", "--max_iters=4")
    content = checkpoint.load(tmp_path / "o")
    content.config["out_dir"] = content.given["out_dir"] = str(tmp_path / "elsewhere")
    path = (tmp_path / "o" / "ckpt.pt").resolve()
    checkpoint.save(path, content)
    for command in (
        ["train.py", "--resume", f"--out_dir={tmp_path / 'o'}", "--max_iters=5", "--compile=False"],
        ["detect.py", path],
    ):
        code, _, err = cli(*command)
        assert code == 0, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o"]
    assert (tmp_path / "o" / "detect.json").exists()


@pytest.mark.skipif(not cpp_compiler(), reason="needs a C++ compiler")
def test_a_compiled_run_resumes_bitwise(tmp_path, toy_data):
    options = [*SMALL_RUN, f"--dataset={toy_data}", "--compile=True", "--dropout=0.1", "--eval_interval=8"]

    def train(out, *more):
        subprocess.run([sys.executable, "train.py", *options, f"--out_dir={out}", *more], cwd=ROOT, check=True)

    train(tmp_path / "whole")
    (tmp_path / "halves").mkdir()
    for name in ("ckpt-00000004.pt", "log.jsonl"):
        (tmp_path / "halves" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    train(tmp_path / "halves", "--resume")
    one, two = (checkpoint.load(tmp_path / name) for name in ("whole", "halves"))
    assert same(one.model, two.model) and same(one.optimizer, two.optimizer)


def test_deterministic_asks_torch_for_it(train, tmp_path):
    try:
        assert train(tmp_path, "--deterministic=True", "--max_iters=2")[0] == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
