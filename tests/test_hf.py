"""Transformers models through the seam, against eager attention with its explicit maps."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from spikesink import findings, hf, intervene
from spikesink.errors import UserError
from spikesink.observe import observe

transformers.logging.set_verbosity_error()
IDS = torch.randint(60, (3, 24), generator=torch.Generator().manual_seed(0))
SHAPE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=64, vocab_size=64),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        num_layers=2,
        num_heads=4,
        hidden_size=32,
        max_position_embeddings=64,
        vocab_size=64,
        window_size=5,
        attention_types=[[["global", "local"], 1]],
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SHAPE),
    "opt": lambda: transformers.OPTConfig(**{**SHAPE, "pad_token_id": 63}, ffn_dim=64, word_embed_proj_dim=32),
    "opt_post_norm": lambda: transformers.OPTConfig(
        **{**SHAPE, "pad_token_id": 63}, ffn_dim=64, word_embed_proj_dim=32, do_layer_norm_before=False
    ),
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=6),
    "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE),
    "gemma2": lambda: transformers.Gemma2Config(**{**GROUPED, "pad_token_id": 0}, sliding_window=6),
    "gpt_oss": lambda: transformers.GptOssConfig(**GROUPED, **EXPERTS, sliding_window=6),
    "phi": lambda: transformers.PhiConfig(**SHAPE),
}


def build(family, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_findings_are_those_of_eager_maps_and_hidden_states(family):
    model = build(family)
    with torch.no_grad():
        eager = model(IDS, output_attentions=True, output_hidden_states=True)
    subject = hf.subject_of(model, str)
    obs = observe(subject, IDS, batch_size=3, progress=False)
    found = findings.detection(subject, obs, {}, {}, {})
    alpha_all = []
    for stats, maps in zip(obs.attention, eager.attentions, strict=True):
        alpha_all.append(maps.sum(2) / torch.arange(24, 0, -1))
        torch.testing.assert_close(stats.sums["alpha"], alpha_all[-1].sum(0).double(), atol=1e-5, rtol=1e-5)
    alpha = torch.stack(alpha_all)  # (L, N, H, T)
    for epsilon in ("0.2", "0.3", "0.5", "0.8"):
        expected = (alpha > float(epsilon)).float().mean((0, 1, 2))
        assert found["sinks"]["gu"][epsilon]["by_position"] == pytest.approx(expected.tolist(), abs=1e-6)
    # hidden_states[-1] is after the final norm, so the last block is not compared there
    for layer, states in zip(found["layers"], eager.hidden_states[:-1], strict=False):
        assert layer["top1"] == pytest.approx(states.abs().flatten(1).max(1).values.mean().item(), rel=1e-4)
    logits = eager.logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert obs.loss.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    assert len(found["layers"]) == 3


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "mistral", "gpt_oss"])
def test_fused_and_explicit_paths_agree_and_a_masked_key_gets_nothing(family):
    subject = hf.subject_of(build(family), str)
    clean = subject.losses(IDS)
    none = [torch.zeros(3, 4, 24, dtype=torch.bool)] * 2
    with intervene.mask_keys(subject, none):
        assert torch.equal(subject.losses(IDS), clean)
    first = [mask.clone() for mask in none]
    for mask in first:
        mask[..., 0] = True
    received = []

    def look(module, args, kwargs, output):
        received.append(module.shares(args[0], args[1], 0, kwargs["bias"]))

    from spikesink.hooks import hooked

    with intervene.mask_keys(subject, first), hooked([(seam.module, look) for seam in subject.attends]):
        assert not torch.equal(subject.losses(IDS), clean)
    for maps in received:
        assert maps[:, :, 1:, 0].abs().max() == 0
    assert torch.equal(subject.losses(IDS), clean)


def test_edited_stream_reaches_the_next_block():
    model = build("llama")
    subject = hf.subject_of(model, str)
    from spikesink.hooks import on_streams

    seen = []
    functions = [lambda x: torch.zeros_like(x), lambda x: seen.append(x), lambda x: None]
    with on_streams(subject.streams, functions):
        subject.losses(IDS)
    assert seen[0].abs().max() == 0  # attention and FFN of zeros, without biases, are zeros


def test_families_that_bypass_the_interface_are_refused():
    config = transformers.FalconConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16, vocab_size=64)
    with pytest.raises(UserError, match="falcon cannot be observed"):
        hf.subject_of(AutoModelForCausalLM.from_config(config), str)


def test_padding_is_in_the_lazy_mask():
    from transformers.masking_utils import causal_mask_function

    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[0, :2] = False
    mask = hf.lazy_mask(2, 6, 6, mask_function=causal_mask_function, attention_mask=padding)
    expected = torch.ones(6, 6).tril().bool() & padding[:, None, None]
    assert torch.equal(mask.rows(2, 3).expand(2, 1, 3, 6), expected[:, :, 2:5])
    assert hf.lazy_mask(2, 6, 6, mask_function=causal_mask_function) is None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_detect_and_ablate_a_hugging_face_folder(cli, tmp_path, family):
    import numpy as np

    build(family).save_pretrained(tmp_path / "hf")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 60, (8, 24)))
    for script in ("detect.py", "ablate.py"):
        out = tmp_path / "f.json"
        code, _, err = cli(script, tmp_path / "hf", f"--tokens={tmp_path / 'ids.npy'}", f"--json={out}")
        assert code == 0, err
        assert json.loads(out.read_text())["model"]["model_type"] == family
    assert (tmp_path / "hf" / "report.html").exists()
    code, _, err = cli("detect.py", tmp_path / "hf")
    assert code == 2
    assert "tokenizer" in err


def test_text_is_translated_by_the_models_own_tokenizer(cli, tmp_path):
    from spikesink.export import byte_tokenizer

    config = transformers.LlamaConfig(**{**SHAPE, "vocab_size": 260})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    byte_tokenizer().save_pretrained(tmp_path / "hf")
    (tmp_path / "t.txt").write_text("abcdefgh" * 50)
    code, _, err = cli("detect.py", tmp_path / "hf", f"--text={tmp_path / 't.txt'}", f"--json={tmp_path / 'f.json'}")
    assert code == 0, err
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["spikes"]["tokens"][0]["text"] in "abcdefgh"
    assert found["data"]["seq_len"] == 64


@pytest.mark.parametrize("key", hf.REFUSED_KEYS)
def test_a_config_that_names_code_is_refused_before_anything_loads(cli, tmp_path, key):
    config = {"model_type": "llama", key: "someone/evil-kernel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = cli("detect.py", tmp_path)
    assert code == 2
    assert key in err
    assert err.count("\n") == 1


def test_broken_folders_and_unreachable_names_are_one_line(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    pickled = tmp_path / "pickled"
    build("gpt2").save_pretrained(pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cli("detect.py", "--help")  # what was printed so far
    for name in (tmp_path / "empty", tmp_path / "broken", pickled, "someone/not-a-model"):
        code, _, err = cli("detect.py", name)
        assert code == 2, name
        assert err.count("\n") == 1, err
