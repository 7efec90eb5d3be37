"""spikesink.open: a path, a model in memory, what it leaves behind, and which model.py it runs."""

import copy
import dataclasses

import pytest
import torch
import transformers
from torch import nn

import spikesink
from spikesink import schema
from spikesink.errors import UserError
from spikesink.models import checkpoint, lab
from spikesink.models.export import byte_tokenizer

from .conftest import ROOT, same, subject_of, tiny

IDS = torch.randint(64, (9, 24), generator=torch.Generator().manual_seed(1))
HOW = {"tokens": IDS, "nulls": 0}


def gpt2(**changes):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 64}
    config = transformers.GPT2Config(**{**sizes, "bos_token_id": 63, "eos_token_id": 63, **changes})
    return transformers.GPT2LMHeadModel(config)


def state_of(model):
    """All that a caller could see change: modes, attributes of modules, settings, random state, weights."""
    own = [sorted(set(vars(m)) - {"_modules", "_parameters", "_buffers"}) for m in model.modules()]
    settings = [model.config._attn_implementation, model.config.use_cache] if hasattr(model.config, "use_cache") else []
    return [m.training for m in model.modules()], own, settings, torch.get_rng_state(), model.state_dict()


def numbers(look):
    """Findings without where they come from, as a file has them."""
    found = schema.to_json(spikesink.detect(look))
    return [found[key] for key in ("layers", "spikes", "sinks", "co_occurrence")]


def test_a_model_in_memory_is_the_one_in_the_folder_and_stays_as_it_was(tmp_path):
    """In training mode with dropout, and sdpa attention: measured without either, trained with both afterwards."""
    model = gpt2().train()
    model.save_pretrained(tmp_path)
    twin, before = copy.deepcopy(model), copy.deepcopy(state_of(model))
    with spikesink.open(model, **HOW) as look, spikesink.open(tmp_path, **HOW) as stored:
        assert same(numbers(look), numbers(stored))
        assert not model.training
    assert same(state_of(model), before)
    for each in (model, twin):
        torch.manual_seed(3)
        each(input_ids=IDS, labels=IDS).loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


class Refused(transformers.GPT2LMHeadModel):
    """A GPT-2 whose logits change whenever it is called."""

    def forward(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        output = super().forward(*args, **kwargs)
        return (output[0] * self.calls, *output[1:]) if isinstance(output, tuple) else (output.logits * self.calls,)


def test_a_refused_model_stays_as_it_was():
    model = Refused(gpt2().config).train()
    model.calls = 0
    before = copy.deepcopy(state_of(model))
    with pytest.raises(UserError, match="logits change under our attention"):
        spikesink.open(model, **HOW)
    assert same(state_of(model), before)
    with pytest.raises(UserError, match="Linear is neither a model of transformers nor a GPT"):
        spikesink.open(nn.Linear(2, 2), **HOW)
    with pytest.raises(UserError, match="there is no tokenizer to translate"):
        spikesink.open(model := gpt2().train())
    assert model.training and model.config._attn_implementation != "spikesink"


def test_a_model_in_memory_reads_text_with_its_tokenizer():
    model = gpt2(vocab_size=257)
    with spikesink.open(model, tokenizer=byte_tokenizer(), n_seq=4, seq_len=32, nulls=0) as look:
        found = schema.to_json(spikesink.detect(look))
    assert found["data"]["name"].startswith("stdlib of Python 3") and found["data"]["n_seq"] == 4
    assert all(text for text in found["examples"]["sequences"][0]["texts"])


def test_a_gpt_of_model_py_in_memory(tmp_path):
    model = tiny(dropout=0.1)
    content = checkpoint.Checkpoint(dataclasses.asdict(model.config), model.state_dict(), step=3)
    checkpoint.save(tmp_path / "ckpt.pt", content)
    model.train()
    with (
        spikesink.open(model, **HOW) as look,
        spikesink.open(tmp_path / "ckpt.pt", model=ROOT / "model.py", **HOW) as stored,
    ):
        assert same(numbers(look), numbers(stored))
    assert all(module.training for module in model.modules())


def test_a_nanogpt_checkpoint_is_the_same_with_and_without_a_model_py(tmp_path):
    """Through transformers' GPT-2, or through the GPT of model.py: one function, so the same numbers."""
    model = tiny()
    names = {
        ".attn.norm_before.": ".ln_1.",
        ".mlp.norm_before.": ".ln_2.",
        ".attn.f.c_": ".attn.c_",
        ".mlp.f.c_": ".mlp.c_",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[f"_orig_mod.{name}"] = tensor
    keys = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    args = {key: getattr(model.config, key) for key in keys}
    torch.save({"model": state, "model_args": args, "iter_num": 7}, tmp_path / "nano.pt")
    with (
        spikesink.open(tmp_path / "nano.pt", **HOW) as alone,
        spikesink.open(tmp_path / "nano.pt", model=ROOT / "model.py", **HOW) as ours,
    ):
        assert torch.allclose(alone.losses(), ours.losses(), atol=1e-6)
        assert alone.loaded.checkpoint.step == ours.loaded.checkpoint.step == 7
        first = [numbers(look)[0][-1] for look in (alone, ours)]
        assert first[0]["top1"] == pytest.approx(first[1]["top1"], rel=1e-5)


def test_other_text_is_what_a_calibration_reads(trained):
    from detect import LAB

    how = {"lab": LAB, "seq_len": 16, "n_seq": 20}
    later, at_once = spikesink.open(trained, **how), spikesink.open(trained, calibration=True, **how)
    assert torch.equal(later.ids, at_once.ids) and torch.equal(later.other_ids, at_once.other_ids)
    with pytest.raises(UserError, match="smaller n_seq"):
        _ = spikesink.open(trained, lab=LAB, tokens=IDS[:, :16]).other_ids


def test_options_that_cannot_be():
    for changes, words in (({"n_seq": 0}, "at least 1"), ({"text": "a", "data": "b"}, "two texts")):
        with pytest.raises(UserError, match=words):
            spikesink.Options(**changes)
    with pytest.raises(TypeError):
        spikesink.open("x", n_seqs=3)


# ------------------------------------------------------------------------------------------- which model.py is run


def write(path, contract=None, more=""):
    stated = f'CONTRACT = "{contract}"\n' if contract else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{stated}{more}open({str(path.parent / 'was_run')!r}, 'w')\n")
    return path


def test_a_model_py_is_known_by_its_contract_not_by_its_name(tmp_path):
    write(tmp_path / "model.py")  # nanoGPT's, say
    mine = write(tmp_path / "my_gpt.py", lab.CONTRACT)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "broken.py").write_text("def (")
    assert lab.find(tmp_path) == lab.find(tmp_path / "runs" / "a") == mine
    write(tmp_path / "copy.py", lab.CONTRACT)
    with pytest.raises(UserError, match="choose one with --model"):
        lab.find(tmp_path)
    assert not (tmp_path / "was_run").exists()


def test_no_code_beside_a_checkpoint_is_run(tmp_path, monkeypatch, trained):
    stranger = tmp_path / "stranger"
    write(stranger / "model.py", lab.CONTRACT)
    (stranger / "ckpt.pt").write_bytes(trained.read_bytes())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"--model path/to/model\.py"):
        spikesink.open(stranger / "ckpt.pt", **HOW)
    for contract, words in ((None, "states no CONTRACT"), ("spikesink-model-9", "'spikesink-model-9'")):
        with pytest.raises(UserError, match=words):
            spikesink.open(stranger / "ckpt.pt", model=write(tmp_path / "other" / "m.py", contract), **HOW)
    assert not list(tmp_path.rglob("was_run"))


def test_a_clone_is_found_from_within_and_said(trained, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "docs")
    with spikesink.open(trained, seq_len=16, n_seq=4, nulls=0) as look:
        assert look.data.n_seq == 4
    assert f"running {ROOT / 'model.py'}" in capsys.readouterr().err


def test_a_fork_whose_attention_is_older_is_told_what_it_lacks(monkeypatch):
    model = tiny()
    monkeypatch.delattr(type(model.transformer.h[0].attn.f.attend), "seen")
    with pytest.raises(UserError, match="has no seen, which this version needs"):
        subject_of(model)
