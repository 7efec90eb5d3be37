"""Converts weights between our GPT and nanoGPT, GPT-2 or Llama."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Args = Mapping[str, Any]  # fields of GPTConfig
State = Mapping[str, Tensor]  # a state dict


class Weights(NamedTuple):
    """A model in our format: the fields of GPTConfig that differ from its defaults, and its state dict."""

    model_args: dict[str, Any]
    model: dict[str, Tensor]


GPT2_NAMES = {
    ".attn.norm_before.": ".ln_1.",
    ".mlp.norm_before.": ".ln_2.",
    ".attn.f.c_": ".attn.c_",
    ".mlp.f.c_": ".mlp.c_",
}
WRAPPERS = re.compile(r"^((module|_orig_mod|model)\.)+")
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # transformers stores these transposed

# our module in block i -> Llama's modules in layer i, whose weights are stacked along the outputs
LLAMA_LAYER = {
    "attn.norm_before": ("input_layernorm",),
    "attn.f.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.f.c_proj": ("self_attn.o_proj",),
    "mlp.norm_before": ("post_attention_layernorm",),
    "mlp.f.c_gate": ("mlp.gate_proj",),
    "mlp.f.c_fc": ("mlp.up_proj",),
    "mlp.f.c_proj": ("mlp.down_proj",),
}
LLAMA_ENDS = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}

# field of GPTConfig -> transformers' name for it
GPT2_FIELDS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "tie": "tie_word_embeddings",
    "norm_eps": "layer_norm_epsilon",
}
LLAMA_FIELDS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "head_dim": "head_dim",
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "tie": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "ffn_hidden": "intermediate_size",
}

# our activation -> transformers' name for it
ACTIVATIONS = {"gelu_tanh": "gelu_new"} | {name: name for name in ("gelu", "relu", "silu", "tanh", "relu2")}
SAME_ACTIVATION = {"gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}


def rename(name: str, table: Mapping[str, str]) -> str:
    """`name` with every key of `table` replaced by its value."""
    return functools.reduce(lambda text, pair: text.replace(*pair), table.items(), name)


def activation_of(name: str) -> str:
    """Our name for a transformers activation. Raises ValueError."""
    our_names = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | SAME_ACTIVATION
    if name not in our_names:
        raise ValueError(f"activation function {name!r} has no counterpart here")
    return our_names[name]


# --------------------------------------------------------------------------------------------- theirs -> ours


def from_nanogpt(state: State) -> dict[str, Tensor]:
    """Gives a state dict of nanoGPT our names; ours stays as it is. Removes prefixes of DDP and torch.compile."""
    ours = {theirs: ours for ours, theirs in GPT2_NAMES.items()} | {"_orig_mod.": ""}
    masks = (".attn.bias", ".attn.masked_bias")  # causal-mask buffers
    return {rename(WRAPPERS.sub("", k), ours): v for k, v in state.items() if not k.endswith(masks)}


def from_gpt2(config: Any, state: State) -> Weights:
    """Converts a transformers GPT-2. Raises ValueError."""
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise ValueError("this GPT-2 changes the attention scaling, which has no counterpart here")
    args = {ours: getattr(config, theirs) for ours, theirs in GPT2_FIELDS.items()}
    args |= {"bias": True, "ffn_hidden": config.n_inner or 0, "activation": activation_of(config.activation_function)}
    return Weights(args, from_nanogpt({k: v.T if CONV1D.search(k) else v for k, v in state.items()}))


def from_llama(config: Any, state: State) -> Weights:
    """Converts a transformers Llama. Raises ValueError."""
    rope = config.rope_parameters
    if rope["rope_type"] != "default" or config.attention_bias or config.mlp_bias:
        raise ValueError("this Llama scales its rope or has biases, which has no counterpart here")
    args = {ours: getattr(config, theirs) for ours, theirs in LLAMA_FIELDS.items()}
    args |= {"norm": "rmsnorm", "ffn": "gated", "activation": activation_of(config.hidden_act)}
    args |= {"position": "rope", "rope_base": float(rope["rope_theta"])}
    model = {ours: state[theirs] for ours, theirs in LLAMA_ENDS.items()}
    for i in range(config.num_hidden_layers):
        for ours, parts in LLAMA_LAYER.items():
            weights = [state[f"model.layers.{i}.{part}.weight"] for part in parts]
            model[f"transformer.h.{i}.{ours}.weight"] = torch.cat(weights)
    return Weights(args, model)


FAMILIES: dict[str, Callable[[Any, State], Weights]] = {"gpt2": from_gpt2, "llama": from_llama}


def from_hf(source: nn.Module) -> Weights:
    """Converts a transformers GPT2LMHeadModel or LlamaForCausalLM. Raises ValueError for any other model."""
    config: Any = source.config
    kind = config.model_type
    if kind not in FAMILIES:
        raise ValueError(f"a {kind} model has no counterpart here; known: {', '.join(FAMILIES)}")
    return FAMILIES[kind](config, source.state_dict())


# ----------------------------------------------------------------------------------------------- ours -> ours


def with_gates(state: State, gated: State) -> dict[str, Tensor]:
    """A state dict for the same model with gates on its attention outputs, which computes the same logits.

    `gated`: the state dict of the gated model. A gate with zero weights is sigmoid(0) = 1/2. Doubling the weight of
    the projection behind it undoes that exactly (the bias is added later).
    """
    new = {name: torch.zeros_like(value) for name, value in gated.items() if ".gate.c_gate." in name} | dict(state)
    for name in gated.keys() - state.keys():
        prefix, gate, kind = name.partition("gate.c_gate")
        if gate and kind == ".weight" and f"{prefix}c_proj.weight" in state:
            new[f"{prefix}c_proj.weight"] = 2 * state[f"{prefix}c_proj.weight"]
    return new


# --------------------------------------------------------------------------------------------- ours -> theirs

# settings that a model must have so that the family can compute it: key -> value
GPT2_NEEDS: dict[str, Any] = {"position": "learned", "norm": "layernorm", "ffn": "plain", "n_kv_head": 0, "head_dim": 0}
LLAMA_NEEDS: dict[str, Any] = {"position": "rope", "norm": "rmsnorm", "ffn": "gated", "bias": False}
BOTH_NEED: dict[str, Any] = {
    "norm_place": "pre",
    "norm_gain": True,
    "qk_norm": "none",
    "residual_scale": "one",
    "attention": "softmax",
    "window": 0,
    "n_register": 0,
    "value": "own",
    "head_out": "none",
    "gate": "none",
    "stream_clip": 0.0,
    "logit_cap": 0.0,
}
DEFAULTS: dict[str, Any] = {"activation": "gelu", "norm_eps": 1e-5, "ffn_hidden": 0}
DEFAULTS |= {"tie": True, "bias": False, "dropout": 0.0}


def check_nanogpt(args: Args) -> None:
    """Raises ValueError for settings that nanoGPT does not have. Such a checkpoint is a fork's, whose code we lack."""
    known_keys = {*BOTH_NEED, *GPT2_NEEDS, *DEFAULTS, "n_layer", "n_head", "n_embd", "block_size", "vocab_size"}
    foreign = lambda key, value: value != "learned" if key == "position" else value and key not in known_keys
    other = [f"{key}={value}" for key, value in args.items() if foreign(key, value)]
    if other:
        raise ValueError(f"nanoGPT's model has no {', '.join(other)}")


def to_gpt2(args: Args, state: State) -> tuple[Any, dict[str, Tensor]]:
    """Returns (transformers config, state dict) of a GPT-2 with the same logits."""
    from transformers import GPT2Config

    settings: dict[str, Any] = {theirs: args[ours] for ours, theirs in GPT2_FIELDS.items()}
    settings |= {"n_inner": args["ffn_hidden"] or None, "activation_function": ACTIVATIONS[args["activation"]]}
    settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), args["dropout"])
    config = GPT2Config(**settings, bos_token_id=None, eos_token_id=None)
    model = {rename(k, GPT2_NAMES): v.T.contiguous() if CONV1D.search(k) else v for k, v in state.items()}
    for name in [name for name in model if name.endswith(".weight") and not args["bias"]]:
        outputs = model[name].size(-1)  # GPT-2 always has biases, so we set them to zero
        if re.search(r"\.(ln_1|ln_2|ln_f|c_attn|c_proj|c_fc)\.", name):
            model[name.removesuffix("weight") + "bias"] = torch.zeros(outputs)
    return config, model


def to_llama(args: Args, state: State) -> tuple[Any, dict[str, Tensor]]:
    """Returns (transformers config, state dict) of a Llama with the same logits."""
    from transformers import LlamaConfig

    head_dim = args["head_dim"] or args["n_embd"] // args["n_head"]
    n_kv_head = args["n_kv_head"] or args["n_head"]
    width = state["transformer.h.0.mlp.f.c_fc.weight"].size(0)
    args = {**args, "head_dim": head_dim, "n_kv_head": n_kv_head, "ffn_hidden": width}
    settings: dict[str, Any] = {theirs: args[ours] for ours, theirs in LLAMA_FIELDS.items()}
    settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": args["rope_base"]}}
    settings |= {"hidden_act": ACTIVATIONS[args["activation"]]}
    config = LlamaConfig(**settings, bos_token_id=None, eos_token_id=None)
    model = {theirs: state[ours] for ours, theirs in LLAMA_ENDS.items()}
    widths = [head_dim * heads for heads in (args["n_head"], n_kv_head, n_kv_head)]
    for i in range(args["n_layer"]):
        for ours, parts in LLAMA_LAYER.items():
            weight = state[f"transformer.h.{i}.{ours}.weight"]
            pieces = weight.split(widths) if len(parts) == len(widths) else [weight]
            for part, piece in zip(parts, pieces, strict=True):
                model[f"model.layers.{i}.{part}.weight"] = piece.contiguous()
    return config, model


def to_hf(args: Args, state: State) -> tuple[Any, dict[str, Tensor]]:
    """Returns (transformers config, state dict) of the GPT-2 or Llama with the same logits.

    `args` are fields of GPTConfig; missing ones are as in GPT-2. Raises ValueError that names what the family lacks.
    """
    args = {**BOTH_NEED, **GPT2_NEEDS, **DEFAULTS, **args}
    llama, gpt2 = ("Llama", LLAMA_NEEDS, to_llama), ("GPT-2", GPT2_NEEDS, to_gpt2)
    family, required, convert = llama if args["position"] == "rope" else gpt2
    other = [f"{k}={args[k]} (it has {v})" for k, v in {**required, **BOTH_NEED}.items() if args[k] != v]
    free = [key for key in ("head_dim", "n_kv_head", *DEFAULTS) if key not in required]
    other += [f"{key}={args[key]}" for key in free if re.search(r"[\s*(]", str(args[key]))]  # a value per layer
    if args["activation"] not in ACTIVATIONS:
        other.append(f"activation={args['activation']}")
    if other:
        raise ValueError(f"{family} does not compute {', '.join(other)}")
    return convert(args, state)
