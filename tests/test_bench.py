"""Benchmarks measure what they say: the recipe is the same model and the same step, and methods run in turn."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks import bench
from benchmarks.nanogpt_recipe import Recipe
from model import GPT, GPTConfig
from spikesink.models.export import byte_tokenizer
from train import adamw

from .conftest import TINY

SHAPE = {**TINY, "vocab_size": 60}


@pytest.mark.parametrize("fast", (False, True))
def test_the_recipe_is_the_same_model_and_the_same_update(fast, monkeypatch):
    """Two updates from the same weights end in the same weights: neither side of a ratio does less than the other.

    In bfloat16 the losses are compared, the second of which follows from the first update.
    """
    monkeypatch.setattr(torch, "compile", lambda module: module)
    torch.manual_seed(0)
    config = GPTConfig(**TINY)
    ours, recipe = (
        GPT(config),
        Recipe((config.n_layer, config.n_head, config.n_embd, 32, 64), torch.device("cpu"), fast, 1e-2),
    )
    pairs = {"transformer.wte": "wte", "transformer.wpe": "wpe", "transformer.ln_f": "ln_f"}
    for i in range(config.n_layer):
        names = {"attn.norm_before": "ln_1", "attn.f.c_attn": "c_attn", "attn.f.c_proj": "attn_proj"}
        names |= {"mlp.norm_before": "ln_2", "mlp.f.c_fc": "c_fc", "mlp.f.c_proj": "mlp_proj"}
        pairs |= {f"transformer.h.{i}.{mine}": f"h.{i}.{its}" for mine, its in names.items()}
    mine, its = dict(ours.named_parameters()), dict(recipe.model.named_parameters())
    assert len(mine) == len(its) == len(pairs)
    with torch.no_grad():
        for a, b in pairs.items():
            its[f"{b}.weight"].copy_(mine[f"{a}.weight"])
    cfg = bench.config.build(bench.SCHEMAS, {"learning_rate": 1e-2, "min_lr": 1e-3})[1]
    optimizer = adamw(ours.optimizer_groups(0.1), cfg)
    for seed in range(2):
        ids = torch.randint(60, (4, 33), generator=torch.Generator().manual_seed(seed))
        loss = ours(ids[:, :-1], ids[:, 1:])[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert recipe.step([(ids[:, :-1], ids[:, 1:].contiguous())]) == pytest.approx(
            loss.item(), rel=1e-2 if fast else 1e-5
        )
    for a, b in pairs.items() if not fast else ():
        torch.testing.assert_close(mine[f"{a}.weight"], its[f"{b}.weight"], atol=1e-4, rtol=1e-4, msg=a)


def test_training_is_measured_in_turn_and_reported(monkeypatch, tmp_path, cli):
    monkeypatch.setitem(bench.SHAPES, "10M", SHAPE)
    monkeypatch.setattr(bench, "QUICK_ROUNDS", {"10M": 2})
    monkeypatch.setattr(
        bench, "arguments", lambda *args, **more: [*ARGUMENTS(*args, **more), "--compile=False", "--warmup_iters=1"]
    )
    code, out, err = cli("benchmarks.bench", "--quick", "--only", "train", f"--json={tmp_path / 'b.json'}")
    assert code == 0, err
    found = json.loads((tmp_path / "b.json").read_text())
    ours, fast, eager = found["train"]
    assert [row["method"] for row in found["train"]] == [bench.OURS, *bench.RECIPES] and ours["ratio"] == 1
    for row in (ours, fast, eager):
        assert row["model"] == "10M" and row["ratio_range"][0] <= row["ratio"] <= row["ratio_range"][1]
        assert row["tokens_per_s"] > 0 and 0 < row["of_ceiling"] < 1 and row["peak_mb"] > 0
    assert min(found["matmul"][0][dtype] for dtype in ("bfloat16", "float32")) > 0
    (look,) = found["monitor"]
    assert look["every"] == 100 and look["share"] == pytest.approx(look["look_s"] / look["step_s"] / 100)
    assert "16 x 32" in out and "100 steps" in out


ARGUMENTS = bench.arguments


def test_what_was_not_measured_is_a_dash():
    assert bench.field("peak MB", "peak_mb", ",.0f").cell({"peak_mb": None}) == "–"
    assert bench.field("TFLOP/s", "rate", ".2f", 1e-12).cell({"rate": 9.5e11}) == "0.95"


def test_commands_are_timed_on_a_trained_model_alone(cli, tmp_path):
    code, out, err = cli("benchmarks.bench", "--only", "detect", "ablate", f"--json={tmp_path / 'b.json'}")
    assert code == 0, err
    assert "detect: not timed" in out and "ablate: not timed" in out
    assert json.loads((tmp_path / "b.json").read_text()).keys() == {"machine"}


def test_a_command_is_timed_beside_plain_passes_of_its_sequences(monkeypatch, tmp_path):
    """Every pass of the model under observation is counted, by a hook on the model, and of the one with new weights."""
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=257, n_positions=64)
    ).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    shapes, load = [], bench.api.load

    def hooked(*args):
        loaded = load(*args)
        before = lambda module, args, kwargs: shapes.append((args or (kwargs["input_ids"],))[0].shape)
        loaded.subjects[0].model.register_forward_pre_hook(before, with_kwargs=True)
        return loaded

    monkeypatch.setattr(bench.api, "load", hooked)
    for name in ("detect", "ablate"):
        shapes.clear()
        said = bench.command_job(bench.Memory(), name, str(tmp_path / "m"), 32, 4)()
        init = 2 * 4  # what is usual, and what is observed, in the model with new weights, whose passes are plain again
        assert sum(n for n, _ in shapes) == 2 * said["sequences"] - init and {T for _, T in shapes} == {32}
        assert 0 < said["plain"] < said["seconds"] and 0 < said["plain_cpu"] < said["seconds_cpu"]
    assert said["conditions"] >= 6 and said["passes"] > 0  # those of few bits; a random model has little to edit


def test_power_on_a_few_sizes(cli, tmp_path):
    code, out, err = cli("benchmarks.power", "--quick", "--out", tmp_path)
    assert code == 0, err
    found = json.loads((tmp_path / "power.json").read_text())
    assert {(row["size"], row["power"] > 0.99) for row in found["spikes"]} == {(5, False), (100, True)}
    assert (
        max(row["marked"] for row in found["alarms"])
        < 0.01
        < max(row["by the median alone"] for row in found["alarms"])
    )
    assert [row["power"] for row in found["sinks"]][-1] == 1
    assert (tmp_path / "power.md").read_text() in out and (tmp_path / "power.png").stat().st_size > 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_spike_of_a_model_larger_than_memory_is_found(cli, tmp_path):
    shape = ("--layers=3", "--hidden=256", "--ffn=512", "--vocab=500", "--max_memory=1")
    code, out, err = cli("benchmarks.seven_b", *shape, f"--out={tmp_path / 'small.md'}")
    assert code == 0, err
    assert "Found: channel 11, by ffn 1 for 100% of 7 tokens" in out
