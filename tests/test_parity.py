"""Logits and gradients against Hugging Face models built from a config, with random weights."""

import pytest
import torch

from model import GPT, GPTConfig
from spikesink.models import convert

IDS = torch.randint(63, (3, 32), generator=torch.Generator().manual_seed(0))
SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32, "vocab_size": 64}
HF_SHAPE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "max_position_embeddings": 32,
    "vocab_size": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def shaken(model):
    """The model with weights large enough that every part matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def compare(config, theirs, names, moved=None):
    """Equal logits, loss and gradients. `names`: our parameter -> theirs, stacked; layer numbers are {i}.

    `moved`: our parameter -> what turns theirs, value or gradient, into ours where the layout differs.
    """
    moved = moved or {}
    as_ours = lambda name, parts: moved.get(name, lambda tensor: tensor)(torch.cat(parts))
    ours = GPT(config)
    state, pairs = ours.state_dict(), {}
    reference = dict(theirs.named_parameters())
    for i in range(config.n_layer):
        for our_name, their_names in names.items():
            pairs[our_name.format(i=i)] = [name.format(i=i) for name in their_names]
    covered = set(pairs) | ({"lm_head.weight"} if config.tie else set())
    assert covered == set(state), covered ^ set(state)
    for our_name, their_names in pairs.items():
        state[our_name] = as_ours(our_name, [reference[name].detach() for name in their_names])
    state["lm_head.weight"] = state["lm_head.weight"] if not config.tie else state["transformer.wte.weight"]
    ours.load_state_dict(state)
    result = theirs(IDS, labels=IDS)
    logits, loss = ours(IDS[:, :-1])[0], ours(IDS[:, :-1], IDS[:, 1:])[1]
    torch.testing.assert_close(logits, result.logits[:, :-1], atol=1e-4, rtol=1e-4)
    loss.backward()
    result.loss.backward()
    gradients = dict(ours.named_parameters())
    for our_name, their_names in pairs.items():
        expected = as_ours(our_name, [reference[name].grad for name in their_names])
        torch.testing.assert_close(gradients[our_name].grad, expected, atol=1e-5, rtol=1e-3, msg=our_name)


def with_bias(names):
    """Each ".weight" entry, and the same for ".bias"."""
    swap = lambda name: name.replace(".weight", ".bias")
    return names | {swap(ours): [swap(name) for name in theirs] for ours, theirs in names.items()}


LLAMA = {
    "transformer.h.{i}.attn.f.c_attn.weight": [f"model.layers.{{i}}.self_attn.{p}_proj.weight" for p in "qkv"],
    "transformer.h.{i}.attn.f.c_proj.weight": ["model.layers.{i}.self_attn.o_proj.weight"],
    "transformer.h.{i}.mlp.f.c_gate.weight": ["model.layers.{i}.mlp.gate_proj.weight"],
    "transformer.h.{i}.mlp.f.c_fc.weight": ["model.layers.{i}.mlp.up_proj.weight"],
    "transformer.h.{i}.mlp.f.c_proj.weight": ["model.layers.{i}.mlp.down_proj.weight"],
    "transformer.wte.weight": ["model.embed_tokens.weight"],
    "transformer.ln_f.weight": ["model.norm.weight"],
    "lm_head.weight": ["lm_head.weight"],
}


def test_llama_rmsnorm_rope_swiglu_grouped_keys_free_head_width():
    from transformers import LlamaConfig, LlamaForCausalLM

    hf = LlamaConfig(
        **HF_SHAPE,
        num_key_value_heads=2,
        head_dim=10,
        intermediate_size=88,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    config = GPTConfig(
        **SHAPE,
        n_kv_head=2,
        head_dim=10,
        ffn_hidden=88,
        norm="rmsnorm",
        ffn="gated",
        activation="silu",
        position="rope",
        tie=False,
    )
    names = LLAMA | {
        "transformer.h.{i}.attn.norm_before.weight": ["model.layers.{i}.input_layernorm.weight"],
        "transformer.h.{i}.mlp.norm_before.weight": ["model.layers.{i}.post_attention_layernorm.weight"],
    }
    compare(config, shaken(LlamaForCausalLM(hf)), names)


def test_olmo2_output_norm_and_full_width_qk_norm():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    hf = Olmo2Config(**HF_SHAPE, intermediate_size=88, rms_norm_eps=1e-5, tie_word_embeddings=False)
    config = GPTConfig(
        **SHAPE, norm_place="output", qk_norm="full", ffn_hidden=88, norm="rmsnorm", ffn="gated", activation="silu",
        position="rope", tie=False, rope_base=hf.rope_parameters["rope_theta"],
    )  # fmt: skip
    names = LLAMA | {
        "transformer.h.{i}.attn.norm_update.weight": ["model.layers.{i}.post_attention_layernorm.weight"],
        "transformer.h.{i}.mlp.norm_update.weight": ["model.layers.{i}.post_feedforward_layernorm.weight"],
        "transformer.h.{i}.attn.f.qk_norm.q.weight": ["model.layers.{i}.self_attn.q_norm.weight"],
        "transformer.h.{i}.attn.f.qk_norm.k.weight": ["model.layers.{i}.self_attn.k_norm.weight"],
    }
    compare(config, shaken(Olmo2ForCausalLM(hf)), names)


def test_qwen3_qk_norm_per_head():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hf = Qwen3Config(
        **HF_SHAPE,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=88,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    config = GPTConfig(
        **SHAPE, n_kv_head=2, qk_norm="head", ffn_hidden=88, norm="rmsnorm", ffn="gated", activation="silu",
        position="rope", tie=False, rope_base=hf.rope_parameters["rope_theta"],
    )  # fmt: skip
    names = LLAMA | {
        "transformer.h.{i}.attn.norm_before.weight": ["model.layers.{i}.input_layernorm.weight"],
        "transformer.h.{i}.mlp.norm_before.weight": ["model.layers.{i}.post_attention_layernorm.weight"],
        "transformer.h.{i}.attn.f.qk_norm.q.weight": ["model.layers.{i}.self_attn.q_norm.weight"],
        "transformer.h.{i}.attn.f.qk_norm.k.weight": ["model.layers.{i}.self_attn.k_norm.weight"],
    }
    compare(config, shaken(Qwen3ForCausalLM(hf)), names)


@pytest.mark.parametrize("place", ["pre", "post"])
def test_opt_relu_learned_positions_and_the_post_norm_layout_of_350m(place):
    from transformers import OPTConfig, OPTForCausalLM

    shape = {key: value for key, value in HF_SHAPE.items() if key != "pad_token_id"}
    hf = OPTConfig(
        **shape, pad_token_id=63, ffn_dim=128, do_layer_norm_before=place == "pre", word_embed_proj_dim=32, dropout=0.0,
        attention_dropout=0.0, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = shaken(OPTForCausalLM(hf))
    config = GPTConfig(**{**SHAPE, "block_size": 34}, bias=True, activation="relu", norm_place=place)
    layer, norm = "model.decoder.layers.{i}.", "norm_before" if place == "pre" else "norm_after"
    names = with_bias(
        {
            "transformer.h.{i}.attn.f.c_attn.weight": [layer + f"self_attn.{p}_proj.weight" for p in "qkv"],
            "transformer.h.{i}.attn.f.c_proj.weight": [layer + "self_attn.out_proj.weight"],
            f"transformer.h.{{i}}.attn.{norm}.weight": [layer + "self_attn_layer_norm.weight"],
            "transformer.h.{i}.mlp.f.c_fc.weight": [layer + "fc1.weight"],
            "transformer.h.{i}.mlp.f.c_proj.weight": [layer + "fc2.weight"],
            f"transformer.h.{{i}}.mlp.{norm}.weight": [layer + "final_layer_norm.weight"],
            **({"transformer.ln_f.weight": ["model.decoder.final_layer_norm.weight"]} if place == "pre" else {}),
        }
    )
    names["transformer.wte.weight"] = ["model.decoder.embed_tokens.weight"]
    names["transformer.wpe.weight"] = ["model.decoder.embed_positions.weight"]
    # position p is row p for us and row p + 2 for them
    compare(config, theirs, names, moved={"transformer.wpe.weight": lambda table: table.roll(-2, 0)})


def test_gpt_oss_sink_logit():
    from types import SimpleNamespace

    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, n_kv_head=2, attention="sink_logit"))
    seam = model.transformer.h[0].attn.f.attend
    seam.normalise.logit.data.normal_()
    q, k, v = (torch.randn(2, heads, 20, 8, requires_grad=True) for heads in (4, 2, 2))
    sinks = seam.normalise.logit.detach().clone().requires_grad_()
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
    theirs, maps = eager_attention_forward(module, q, k, v, mask, scaling=8**-0.5)
    ours = seam(q, k, v)
    torch.testing.assert_close(ours.transpose(1, 2), theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seam.shares(q, k), maps, atol=1e-6, rtol=1e-4)
    grads = torch.autograd.grad(ours.square().sum(), (q, k, v, seam.normalise.logit))
    expected = torch.autograd.grad(theirs.square().sum(), (q, k, v, sinks))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("tie", [True, False])
def test_llama_from_pretrained_and_back(tmp_path, tie):
    from transformers import LlamaConfig, LlamaForCausalLM

    hf = LlamaConfig(
        **HF_SHAPE, num_key_value_heads=2, intermediate_size=88, tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    theirs = shaken(LlamaForCausalLM(hf)).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_models_without_a_counterpart_are_refused_by_name():
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    with pytest.raises(ValueError, match="opt model has no counterpart"):
        convert.from_hf(
            OPTForCausalLM(OPTConfig(**small, ffn_dim=8, word_embed_proj_dim=8, bos_token_id=1, pad_token_id=0))
        )
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="scales its rope"):
        convert.from_hf(LlamaForCausalLM(LlamaConfig(**small, intermediate_size=8, rope_parameters=scaled)))
