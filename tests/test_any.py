"""Any checkpoint: GGUF, revisions, BOS or none, no head, wrappers, and what a file lacks or adds."""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import spikesink
from spikesink import schema
from spikesink.errors import UserError
from spikesink.measure import history
from spikesink.measure.findings import Comparison
from spikesink.models import disk_weights, hf
from spikesink.models.export import byte_tokenizer

from .conftest import ROOT
from .test_hf import FAMILIES, GROUPED, IDS, SHAPE, build, shaken

HOW = {"tokens": IDS, "nulls": 1}


def config_with(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def with_weights(folder, **tensors):
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def one_line(cli, *args):
    """The one line of an error."""
    cli("detect.py", "--help")
    code, _, err = cli(*args)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


# --------------------------------------------------------------------------------------------------------- GGUF

NAMES = {  # llama.cpp's -> transformers'
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


def write_gguf(path, model):
    """A Llama in llama.cpp's format, its matrices in Q8_0 but for the embeddings; `model` gets the rounded weights."""
    gguf = pytest.importorskip("gguf")
    config, state = model.config, model.state_dict()
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in NAMES.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for ours, theirs in names.items():
        tensor = state[f"{theirs}.weight"]
        if tensor.dim() == 1 or ours == "token_embd":
            writer.add_tensor(f"{ours}.weight", tensor.numpy())
            continue
        packed = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
        rounded = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
        assert 0 < (rounded - tensor).abs().max() < 0.02
        tensor.copy_(rounded)
        if ours[-1] in "qk" and "attn" in ours:  # llama.cpp turns pairs of neighbours, transformers two halves
            heads = len(packed) // config.head_dim
            packed = packed.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(packed.shape)
        writer.add_tensor(f"{ours}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def test_a_gguf_file_is_the_model_of_its_rounded_weights(tmp_path):
    model = build("llama")
    with torch.no_grad():
        write_gguf(tmp_path / "model.gguf", model)
    (tmp_path / "tokenizer.json").write_text("{}")  # of another model: not looked at
    with spikesink.open(tmp_path / "model.gguf", **HOW) as look, spikesink.open(model, **HOW) as truth:
        found, expected = spikesink.detect(look), spikesink.detect(truth)
    assert found.data.loss == pytest.approx(expected.data.loss, abs=1e-5)
    assert [layer.top1 for layer in found.layers] == pytest.approx([layer.top1 for layer in expected.layers], rel=1e-4)
    assert found.model["weights"] == "dequantised from Q8_0, F32"
    assert found.checkpoint.sha256 == hf.file_hash(tmp_path / "model.gguf")
    with pytest.raises(UserError, match="cannot be read part by part"):
        hf.load(hf.Source.locate(tmp_path / "model.gguf"), free=1000)


def test_a_broken_gguf_file_and_a_missing_package_are_one_line(tmp_path, cli, monkeypatch):
    file = tmp_path / "model.gguf"
    with torch.no_grad():
        write_gguf(file, build("llama"))
    whole = file.read_bytes()
    for content in (whole[:300], whole[:-5000], b"GGUF", b"no such thing"):
        file.write_bytes(content)
        assert "it is not a complete GGUF file" in one_line(cli, "detect.py", file)
    assert "no file" in one_line(cli, "detect.py", tmp_path / "none.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "spikesink[hf]" in one_line(cli, "detect.py", file)


# ---------------------------------------------------------------------------------------------------- revisions


@pytest.fixture
def course(tmp_path):
    """A folder of revisions of one model, and the losses of transformers on each."""
    folder, losses = tmp_path / "course", {}
    for seed, step in enumerate((0, 1000, 20000)):
        model = build("llama", seed)
        model.save_pretrained(folder / f"step{step}")
        losses[step] = model(IDS, labels=IDS).loss.item()
    return folder, losses


def test_revisions_are_a_course_over_training(course, tmp_path, cli):
    folder, losses = course
    np.save(tmp_path / "ids.npy", IDS.numpy())
    how = (f"--tokens={tmp_path / 'ids.npy'}", "--nulls=0", f"--json={tmp_path / 'c.json'}")
    code, out, err = cli(
        "detect.py", folder, "--revisions=step20000,step0,step1000", *how, f"--html={tmp_path / 'c.html'}"
    )
    assert code == 0, err
    assert out.split("\n")[0].split() == ["step20000", "step0", "step1000"]
    rows = history.findings_rows(schema.load(Comparison, tmp_path / "c.json", "detect").findings)
    assert {row.step: row.loss for row in rows} == pytest.approx(losses, rel=1e-4)
    assert [row.step for row in rows] == [0, 1000, 20000]
    with spikesink.open(folder, revision="step1000", **HOW) as look:
        assert look.loss() == pytest.approx(losses[1000], rel=1e-4)
        assert look.loaded.checkpoint.path == str(folder / "step1000")


def test_a_revision_that_is_not_there_names_those_that_are(course, cli, trained):
    folder, _ = course
    known = "step0, step1000, step20000"
    assert known in one_line(cli, "detect.py", folder, "--revision=step5")
    assert known in one_line(cli, "detect.py", folder, "--revisions=step0,step5")
    assert known in one_line(cli, "detect.py", folder)
    assert "lists several" in one_line(cli, "detect.py", folder, "--revisions=,")
    assert "goes with a Hugging Face" in one_line(cli, "detect.py", trained, "--revision=step5")
    with pytest.raises(UserError, match="goes with a Hugging Face"):
        spikesink.open(build("llama"), revision="x", **HOW)


def test_revisions_of_the_hub(tmp_path, monkeypatch):
    """Config, weights and tokenizer are all of the revision: here from the hub's cache, as it lies on a disk."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--some--model" / "refs").mkdir(parents=True)
    losses = {}
    for i, name in enumerate(("main", "step2000")):
        torch.manual_seed(i)
        model = shaken(
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, "vocab_size": 257 + i}))
        ).eval()
        snapshot = tmp_path / "models--some--model" / "snapshots" / (str(i) * 40)
        model.save_pretrained(snapshot)
        if i:
            byte_tokenizer().save_pretrained(snapshot)
        (tmp_path / "models--some--model" / "refs" / name).write_text(snapshot.name)
        losses[name] = model(IDS, labels=IDS).loss.item()
    for revision, loss in ((None, losses["main"]), ("step2000", losses["step2000"])):
        with spikesink.open("some/model", revision=revision, **HOW) as look:
            assert look.loss() == pytest.approx(loss, rel=1e-4)
            assert isinstance(look.loaded.reader.tokenizer, hf.Tokenizer) == (revision is not None)
    assert (look.loaded.checkpoint.path, look.loaded.checkpoint.step) == ("some/model@step2000", 2000)
    with pytest.raises(UserError, match=r"some/model@step5 .* cannot be opened"):
        spikesink.open("some/model", revision="step5", **HOW)


def test_the_step_that_a_name_says():
    steps = {
        "step1000": 1000,
        "checkpoint-500": 500,
        "stage1-step150000-tokens315B": 150000,
        "step-50K-105b": 50000,
        "step1.5k": None,
        "main": None,
    }
    assert {name: hf.step_of(name) for name in steps} == steps


# ---------------------------------------------------------------------------------------------------------- BOS


def bert_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]")


# family, vocabulary, tokenizer -> the first and the last id of a sequence by default, with --bos, with --no-bos
STARTS = {
    "gpt2": (257, byte_tokenizer, (None, 256, None), (None, None, None)),  # its <|endoftext|> is its BOS
    "bert": (64, bert_tokenizer, (2, 2, None), (3, 3, 3)),
}


@pytest.mark.parametrize("family", STARTS)
def test_bos_is_before_every_sequence_or_none(family, tmp_path):
    size, make, first, last = STARTS[family]
    config = FAMILIES[family]()
    config.vocab_size = size
    hf.model_class(config).from_config(config).save_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    (tmp_path / "t.txt").write_text("the cat " * 200)
    plain = set(make()("the cat " * 2, add_special_tokens=False)["input_ids"])
    for bos, start, end in zip((None, True, False), first, last, strict=True):
        with spikesink.open(tmp_path, text=tmp_path / "t.txt", seq_len=16, n_seq=3, nulls=0, bos=bos) as look:
            assert spikesink.detect(look).data.bos == (start is not None)
            for wanted, ids in ((start, look.ids[:, 0]), (end, look.ids[:, -1])):
                assert set(ids.tolist()) <= ({wanted} if wanted is not None else plain)
            assert set(look.ids[:, 1:-1].flatten().tolist()) <= plain and look.ids.shape == (3, 16)


def test_bos_of_a_run_and_of_a_model_that_has_none(trained, tmp_path, cli):
    """A run with BOS read without, against one read as it was trained."""
    from detect import LAB

    how = {"lab": LAB, "seq_len": 16, "n_seq": 4, "nulls": 0}
    with spikesink.open(trained, **how) as with_bos, spikesink.open(trained, bos=False, **how) as without:
        assert (with_bos.ids[:, 0] == 63).all() and not (without.ids[:, 0] == 63).any()
        assert (with_bos.data.bos, without.data.bos) == (True, False)
    build("t5").save_pretrained(tmp_path)
    assert "no BOS" in one_line(cli, "detect.py", tmp_path, "--bos")
    assert "--no-bos goes with a text" in one_line(cli, "ablate.py", tmp_path, "--no-bos", "--tokens=x.npy")


# ------------------------------------------------------------------------------------------------ without a head


HEADLESS = {
    "bert": lambda: transformers.BertModel(FAMILIES["bert"]()),
    "another task's head": lambda: transformers.BertForSequenceClassification(FAMILIES["bert"]()),
    "llama": lambda: transformers.LlamaModel(FAMILIES["llama"]()),
    "t5": lambda: transformers.T5EncoderModel(FAMILIES["t5"]()),
}


@pytest.mark.parametrize("kind", HEADLESS)
def test_a_model_without_a_head_is_measured_without_a_loss(kind, tmp_path):
    torch.manual_seed(0)
    model = shaken(HEADLESS[kind]()).eval()
    model.save_pretrained(tmp_path)
    with spikesink.open(tmp_path, **HOW) as look:
        found = spikesink.detect(look)
        with pytest.raises(UserError, match="no language-model head"):
            look.loss()
    with spikesink.open(tmp_path, **HOW, n_seq=2) as look:
        edits = spikesink.ablate(look, only=["sink_mask", "remove_sink_heads"], probe=False)
    assert not edits.has_loss and edits.baseline.bits_per_byte is None and edits.baseline.by_position == []
    as_json = schema.to_json(edits)
    assert schema.to_json(schema.from_json(type(edits), json.loads(json.dumps(as_json)))) == as_json
    states = model(IDS, output_hidden_states=True).hidden_states
    side = found.reads if found.model["model_type"] == "bert" else found.layers  # a post-norm block ends on its norm
    tops = [layer.top1 for layer in side if layer.kind in ("embedding", "ffn")]
    expected = [x.abs().flatten(1).max(1).values.mean().item() for x in states[:-1]]
    assert tops[: len(expected)] == pytest.approx(expected, rel=1e-4)
    assert math.isnan(found.data.loss) and schema.to_json(found)["data"]["loss"] is None
    assert "init" in found.nulls
    schema.from_json(type(found), json.loads(json.dumps(schema.to_json(found))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_states_that_are_not_finite_are_no_findings(dtype):
    """Without a loss that told of them, they were written down as nan; and whatever overflowed was called float32."""
    model = HEADLESS["bert"]().to(dtype)
    with torch.no_grad():
        model.encoder.layer[-1].output.dense.bias[3] = 65504 if dtype == torch.float16 else torch.nan
        model.encoder.layer[-1].attention.output.LayerNorm.bias[3] = 65504
    words = f"are not finite: the weights are broken, or they overflow in {str(dtype).removeprefix('torch.')}"
    with spikesink.open(model, tokens=IDS, nulls=0) as look, pytest.raises(UserError, match=words):
        spikesink.detect(look)


def test_the_commands_say_that_there_is_no_loss(tmp_path, cli):
    transformers.BertModel(transformers.BertConfig(**{**SHAPE, "pad_token_id": 0})).save_pretrained(tmp_path)
    bert_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "t.txt").write_text("the cat " * 200)
    code, out, err = cli("detect.py", tmp_path, f"--text={tmp_path / 't.txt'}", "--seq_len=16", "--n_seq=4")
    assert code == 0 and "no loss, since the model has no language-model head" in out and "nan" not in out, err
    assert "unused pooler.dense.bias, pooler.dense.weight" in err and err.count("no language-model head") == 1
    assert cli("detect.py", tmp_path, "--prompt=the cat the cat the cat")[0] == 0
    code, out, err = cli("ablate.py", tmp_path, f"--text={tmp_path / 't.txt'}", "--seq_len=16", "--n_seq=4")
    assert code == 0 and "output moves" in out and "so there is no loss" in out and "nan" not in out, err
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Which output states move?" in page and "change of the output states" in page and "nan" not in page.split()


def test_without_a_head_an_edit_is_judged_by_the_output_states():
    """A spike on a BERT's first position is zeroed: ablate's numbers against a hook on transformers' own model."""
    torch.manual_seed(0)
    model = shaken(HEADLESS["bert"]()).eval()
    start, channel = model.embeddings, 5

    def zeroed(x):
        return torch.where((torch.arange(24)[:, None] == 0) & (torch.arange(32) == channel), 0, x)

    with torch.no_grad():
        for embedding in (start.word_embeddings, start.position_embeddings, start.token_type_embeddings):
            embedding.weight[:, channel] = 0
        start.position_embeddings.weight[0, channel], start.LayerNorm.weight[channel] = 500, 60
        start.LayerNorm.bias[channel] = 0
        old = model(IDS[:2])[0]
        with spikesink.open(model, tokens=IDS, n_seq=2, nulls=0) as look:
            entry, *_ = spikesink.ablate(look, only=["spike_zero"], probe=False).interventions
        start.LayerNorm.register_forward_hook(lambda _, args, x: zeroed(x))
        new = model(IDS[:2])[0]
    moved = (new - old).norm(dim=-1) / old.norm(dim=-1)
    assert entry.edited == 2 and moved[:, 0].mean() > 0.1
    assert entry.output.change == pytest.approx(moved.mean().item(), rel=1e-4)
    assert entry.output.by_class["spike"] == pytest.approx(moved[:, 0].mean().item(), rel=1e-4)
    pooled = [1 - torch.cosine_similarity(a.mean(0), b.mean(0), dim=0) for a, b in zip(new, old, strict=True)]
    assert entry.output.pooled == pytest.approx(sum(pooled).item() / len(pooled), rel=1e-3)
    assert math.isnan(entry.delta_loss) and entry.ci95 is None


def test_a_block_that_is_missing_is_refused_without_a_head_too(tmp_path):
    HEADLESS["bert"]().save_pretrained(tmp_path)
    config_with(tmp_path, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"lacks 16 weights, the first bert\.encoder\.layer\.2"):
        spikesink.open(tmp_path, **HOW)


# ------------------------------------------------------------------------------------------- wrappers, odd files

EYES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
WRAPPERS = {
    "gemma3": lambda: transformers.Gemma3Config(
        text_config={**GROUPED, "pad_token_id": 0, "sliding_window": 6},
        vision_config=EYES,
        image_token_index=62,
        mm_tokens_per_image=4,
    ),
    "llava": lambda: transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**GROUPED),
        vision_config=transformers.CLIPVisionConfig(**EYES),
        image_token_index=63,
    ),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_text_decoder_of_a_multimodal_model_is_measured(kind, tmp_path):
    torch.manual_seed(0)
    config = WRAPPERS[kind]()
    model = shaken(hf.model_class(config).from_config(config)).eval()
    model.save_pretrained(tmp_path)
    with spikesink.open(tmp_path, **HOW) as look:
        found = spikesink.detect(look)
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), output_hidden_states=True)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert found.data.loss == pytest.approx(loss.item(), rel=1e-4)
    assert found.layers[2].top1 == pytest.approx(
        out.hidden_states[1].abs().flatten(1).max(1).values.mean().item(), rel=1e-4
    )
    assert len(found.layers) == 5 and found.model["num_hidden_layers"] == 2 and "init" in found.nulls


def test_weights_without_a_place_are_said_or_refused(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with_weights(tmp_path, **{"score.weight": torch.ones(2, 32)})
    assert hf.load(hf.Source.locate(tmp_path)).about == {"unused": "score.weight"}
    for key in ("layers.2.mlp.up_proj.weight", "layers.0.self_attn.q_proj.bias"):
        build("llama").save_pretrained(tmp_path)
        with_weights(tmp_path, **{f"model.{key}": torch.ones(32)})
        with pytest.raises(UserError, match=f"no place for, the first model.{key}"):
            spikesink.open(tmp_path, **HOW)
    build("llama").save_pretrained(tmp_path)
    config_with(tmp_path, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"9 weights of blocks .* the first model\.layers\.1"):
        spikesink.open(tmp_path, **HOW)


@pytest.mark.parametrize("free", [math.inf, 1000])
def test_a_head_that_differs_from_the_embedding_it_is_said_to_be_is_used(tmp_path, free):
    model = build("llama")
    model.save_pretrained(tmp_path)
    config_with(tmp_path, tie_word_embeddings=True)
    found = hf.open_model(tmp_path, free=free)
    assert not found.config.tie_word_embeddings  # nor will the null of random weights tie them
    assert disk_weights.parameter_count(found) == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(found(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    with_weights(tmp_path, **{"lm_head.weight": model.model.embed_tokens.weight.detach().clone()})
    assert hf.open_model(tmp_path, free=free).config.tie_word_embeddings


def test_an_older_transformers_is_one_line(tmp_path, cli, monkeypatch):
    build("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.__version__", "5.19.2")
    assert "transformers 5.19.2 is too old, 5.20 is needed" in one_line(cli, "detect.py", tmp_path)
    with pytest.raises(UserError, match="too old"):
        spikesink.open(build("llama"), **HOW)
    assert f'transformers>={".".join(map(str, hf.OLDEST))}"' in (ROOT / "pyproject.toml").read_text()


# -------------------------------------------------------------------------------------------------- real models


@pytest.fixture
def models():
    """A folder that holds smollm2.gguf, a SmolLM2-135M-Instruct in Q4_1, and minilm/, all-MiniLM-L6-v2."""
    if "SPIKESINK_MODELS" not in os.environ:
        pytest.skip("SPIKESINK_MODELS names no folder of models")
    return Path(os.environ["SPIKESINK_MODELS"])


def test_a_real_gguf_file(models):
    with spikesink.open(models / "smollm2.gguf", n_seq=4, nulls=0, bos=True) as look:
        found = spikesink.detect(look)
    assert found.model["weights"] == "dequantised from Q4_1, Q8_0" and found.model["parameters"] == 134_515_008
    assert found.data.bos and 3 < found.data.loss < 5
    assert found.largest_ratio > 1000 and found.sinks.share[0] > 0.4


def test_a_real_sentence_encoder(models):
    with spikesink.open(models / "minilm", n_seq=4, nulls=0) as look:
        found = spikesink.detect(look)
    assert math.isnan(found.data.loss) and found.data.bos
    assert found.spikes.tokens[0].text == "[CLS]" and found.model["unused"].startswith("pooler")
