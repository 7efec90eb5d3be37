"""A decoder-only GPT in one file, every architectural choice a switch.

Shapes: B batch, T sequence, C = n_embd, H = n_head, D = head_dim, R a chunk of queries, V = vocab_size.
The names are nanoGPT's (wte, wpe, h, ln_f, c_attn, c_proj, c_fc), so that GPT-2 weights and tools map over.
To add a choice, add a line to its table; to add an axis, add a field to GPTConfig and a table.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------- norms


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels (Ba et al. 2016); `bias` follows the model's."""

    def __init__(self, config):
        super().__init__(config.n_embd, eps=1e-5, bias=config.bias)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * w (Zhang & Sennrich 2019)."""

    def __init__(self, config):
        super().__init__(config.n_embd, eps=1e-5)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


class NormPlace(NamedTuple):
    """Which of a sub-layer's three norm slots are used, and whether the model ends on a norm."""

    before: bool  # on the input of attention / FFN
    update: bool  # on their output, before the add
    after: bool  # on the stream, after the add
    final: bool  # ln_f; a post-norm stream is normalised already


NORM_PLACES = {
    "pre": NormPlace(True, False, False, True),  # GPT-2, Llama
    "post": NormPlace(False, False, True, False),  # Vaswani et al. 2017, GPT-1, BERT
    "sandwich": NormPlace(True, True, False, True),  # CogView, Gemma 2
    "output": NormPlace(False, True, False, True),  # OLMo 2
    "none": NormPlace(False, False, False, False),
}

# -------------------------------------------------------------------------------------------- residual


class FixedScale(nn.Module):
    """update * scale, a constant."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, update):
        return update if self.scale == 1 else self.scale * update


class LearnedScale(nn.Module):
    """update * w, with w learned: one per channel (LayerScale) or one scalar (ReZero)."""

    def __init__(self, size, init):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), float(init)))

    def forward(self, update):
        return self.weight * update


# The multiplier of each update in the forward pass. L = n_layer, so 2L updates are added to the stream.
# deepnorm (Wang et al. 2022): LN(a x + f(x)) with a = (2L)^1/4 is written LN(x + f(x) / a), the same function of x.
RESIDUAL_SCALES = {
    "one": lambda c: FixedScale(1.0),
    "inv_sqrt_2L": lambda c: FixedScale((2 * c.n_layer) ** -0.5),
    "deepnorm": lambda c: FixedScale((2 * c.n_layer) ** -0.25),
    "learned": lambda c: LearnedScale(c.n_embd, 0.1),  # LayerScale (Touvron et al. 2021), init for <= 18 layers
    "rezero": lambda c: LearnedScale(1, 0.0),  # Bachlechner et al. 2020
}

# ----------------------------------------------------------------------------------- positions, attention


class NoPosition(nn.Module):
    """Adds nothing to the token embedding."""

    def __init__(self, config):
        super().__init__()

    def forward(self, positions):
        return 0.0


class LearnedPosition(nn.Embedding):
    """A learned vector per position (GPT-2's wpe)."""

    def __init__(self, config):
        super().__init__(config.block_size, config.n_embd)


class NoRotation(nn.Module):
    """Leaves q and k as they are."""

    def __init__(self, config):
        super().__init__()

    def forward(self, q, k):
        return q, k


class Rotary(nn.Module):
    """RoPE (Su et al. 2021), base 10000, the two halves of a head rotated against each other as in Llama."""

    def __init__(self, config):
        super().__init__()
        head_dim = config.n_embd // config.n_head
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(config.block_size), frequencies).repeat(1, 2)  # (T, D)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, q, k):
        cos, sin = self.cos[: q.size(-2)].to(q.dtype), self.sin[: q.size(-2)].to(q.dtype)

        def rotate(x):
            left, right = x.chunk(2, dim=-1)
            return x * cos + torch.cat((-right, left), dim=-1) * sin

        return rotate(q), rotate(k)


# name -> (what is added to the token embedding, what is done to q and k)
POSITIONS = {
    "learned": (LearnedPosition, NoRotation),
    "rope": (NoPosition, Rotary),
    "none": (NoPosition, NoRotation),
}


class SoftmaxAttention(nn.Module):
    """The attention seam: (q, k, v, bias) -> out. Instruments hook this module.

    A hook sees q, k, v; `weights` gives any chunk of rows of the attention map; a pre-hook may pass `bias`.
    """

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout

    def weights(self, q, k, first=0, bias=None):
        """Attention weights (B, H, R, T) of the queries `first ... first + R - 1`; rows sum to one.

        q is (B, H, R, D), k is (B, H, T, D). `bias` broadcasts to (B, H, 1, T): added to the logit of a key for every
        query but the one at the key's own position, so that a masked (-inf) first key leaves no empty row.
        """
        logits = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, R, T)
        query = torch.arange(first, first + q.size(-2), device=q.device)[:, None]
        key = torch.arange(k.size(-2), device=q.device)[None, :]
        if bias is not None:
            logits = logits + torch.where(query == key, 0.0, bias)
        return logits.masked_fill(key > query, -torch.inf).softmax(dim=-1)

    def forward(self, q, k, v, bias=None, chunk=256):
        """(B, H, T, D) x 3 -> (B, H, T, D); with a bias the map is made `chunk` queries at a time."""
        if bias is None:
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
            )
        rows = (self.weights(part, k, i * chunk, bias) @ v for i, part in enumerate(q.split(chunk, dim=-2)))
        return torch.cat(list(rows), dim=-2)


class SelfAttention(nn.Module):
    """Multi-head causal self-attention: c_proj(attend(q, k, v))."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.rotate = POSITIONS[config.position][1](config)
        self.attend = SoftmaxAttention(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        qkv = self.c_attn(x).chunk(3, dim=-1)  # 3 x (B, T, C)
        q, k, v = (p.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for p in qkv)  # (B, H, T, D)
        q, k = self.rotate(q, k)
        return self.c_proj(self.attend(q, k, v).transpose(1, 2).flatten(-2))


# ------------------------------------------------------------------------------------------------- FFN


class ReLU2(nn.Module):
    """relu(x)^2 (So et al. 2021, Primer)."""

    def forward(self, x):
        return F.relu(x).square()


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),  # GPT-2's own
    "relu": nn.ReLU,
    "relu2": ReLU2,
    "silu": nn.SiLU,
    "identity": nn.Identity,
}


class PlainFFN(nn.Module):
    """c_proj(act(c_fc(x))), hidden width 4C."""

    def __init__(self, config):
        super().__init__()
        hidden = 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.act = ACTIVATIONS[config.activation]()
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class GatedFFN(nn.Module):
    """c_proj(act(c_gate(x)) * c_fc(x)) (Shazeer 2020); hidden width 8C/3 to the nearest 8: a plain FFN's parameters."""

    def __init__(self, config):
        super().__init__()
        hidden = 8 * round(config.n_embd / 3)
        self.c_gate = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.act = ACTIVATIONS[config.activation]()
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(self.act(self.c_gate(x)) * self.c_fc(x))


FFNS = {"plain": PlainFFN, "gated": GatedFFN}

# ------------------------------------------------------------------------------------------------ init


def _gpt2_init(model, c_proj_scale):
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02 * (c_proj_scale if name.endswith("c_proj.weight") else 1.0))


def _deepnorm_init(model):
    gain = (8 * model.config.n_layer) ** -0.25
    _gpt2_init(model, 1.0)
    for name, parameter in model.named_parameters():
        if name.endswith("c_attn.weight"):
            query, key, value = parameter.chunk(3)
            nn.init.xavier_normal_(query)
            nn.init.xavier_normal_(key)
            nn.init.xavier_normal_(value, gain)
        elif name.endswith(("c_proj.weight", "c_fc.weight", "c_gate.weight")):
            nn.init.xavier_normal_(parameter, gain)


# Weights are N(0, 0.02), biases 0, norms 1; this says how the projections that write to the stream differ.
INIT_SCALES = {
    "one": lambda model: _gpt2_init(model, 1.0),
    "inv_sqrt_2L": lambda model: _gpt2_init(model, (2 * model.config.n_layer) ** -0.5),  # GPT-2
    "deepnorm": _deepnorm_init,  # Xavier, with gain (8L)^-1/4 on values, output and FFN weights (Wang et al. 2022)
}

# ----------------------------------------------------------------------------------------------- config

CHOICES = {
    "norm_place": NORM_PLACES,
    "norm": NORMS,
    "activation": ACTIVATIONS,
    "ffn": FFNS,
    "residual_scale": RESIDUAL_SCALES,
    "init_scale": INIT_SCALES,
    "position": POSITIONS,
}


@dataclass(frozen=True)
class GPTConfig:
    """The architecture. Raises ValueError naming the field, what was given and what is possible."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64
    bias: bool = False  # in linear layers and LayerNorms
    dropout: float = 0.0
    norm_place: str = "pre"
    norm: str = "layernorm"
    activation: str = "gelu"
    ffn: str = "plain"
    residual_scale: str = "one"
    init_scale: str = "inv_sqrt_2L"
    position: str = "learned"

    def __post_init__(self):
        for key, table in CHOICES.items():
            if getattr(self, key) not in table:
                raise ValueError(f"{key}={getattr(self, key)!r} is not one of: {', '.join(table)}")
        for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.position == "rope" and self.n_embd // self.n_head % 2:
            raise ValueError(f"position=rope needs an even head width, not n_embd/n_head={self.n_embd // self.n_head}")
        if self.residual_scale == "deepnorm" and self.norm_place != "post":
            raise ValueError(
                f"residual_scale=deepnorm is defined for norm_place=post, not norm_place={self.norm_place}"
            )


# ------------------------------------------------------------------------------------------------ model


class SubLayer(nn.Module):
    """x = norm_after(x + norm_update(scale * f(norm_before(x)))), f attention or an FFN; unused norms are identities.

    Two taps for hooks: `update`, what is added to the stream, and `stream`, the stream after it.
    """

    def __init__(self, config, f):
        super().__init__()
        place = NORM_PLACES[config.norm_place]
        norm = lambda used: NORMS[config.norm](config) if used else nn.Identity()
        self.norm_before, self.norm_update, self.norm_after = norm(place.before), norm(place.update), norm(place.after)
        self.f = f
        self.scale = RESIDUAL_SCALES[config.residual_scale](config)
        self.dropout = nn.Dropout(config.dropout)
        self.update, self.stream = nn.Identity(), nn.Identity()

    def forward(self, x):
        update = self.update(self.norm_update(self.scale(self.dropout(self.f(self.norm_before(x))))))
        return self.stream(self.norm_after(x + update))


class Block(nn.Module):
    """An attention sub-layer, then an FFN sub-layer."""

    def __init__(self, config):
        super().__init__()
        self.attn = SubLayer(config, SelfAttention(config))
        self.mlp = SubLayer(config, FFNS[config.ffn](config))

    def forward(self, x):
        return self.mlp(self.attn(x))


class GPT(nn.Module):
    """Embedding, n_layer blocks, final norm where the placement has one, and the tied unembedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": POSITIONS[config.position][0](config),
                "drop": nn.Dropout(config.dropout),
                "stream": nn.Identity(),  # tap: the stream before the first block
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": NORMS[config.norm](config) if NORM_PLACES[config.norm_place].final else nn.Identity(),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        INIT_SCALES[config.init_scale](self)

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, V) and, given targets (B, T), the mean cross-entropy in nats (else None).

        Targets of -1 are not counted. Raises ValueError if T > block_size.
        """
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size={self.config.block_size}")
        net = self.transformer
        x = net.wte(idx) + net.wpe(torch.arange(T, device=idx.device))
        x = net.stream(net.drop(x))
        for block in net.h:
            x = block(x)
        logits = self.lm_head(net.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)

    def num_params(self):
        """Parameters, as nanoGPT counts them: without learned positions."""
        position = self.transformer.wpe.weight.numel() if self.config.position == "learned" else 0
        return sum(p.numel() for p in self.parameters()) - position

    def optimiser_groups(self, weight_decay):
        """nanoGPT's groups: matrices and embeddings decay, vectors (biases, norms, scales) do not."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]

    @classmethod
    def from_checkpoint(cls, content):
        """The model of a checkpoint dict, ours or nanoGPT's: its entries `model_args` and `model`."""
        model = cls(GPTConfig(**content["model_args"]))
        model.load_state_dict(gpt2_names(content["model"]))
        return model

    @classmethod
    def from_pretrained(cls, name_or_path, **kwargs):
        """GPT-2 weights from the Hugging Face hub or a local folder (`pip install spikesink[hf]`).

        `kwargs` go to transformers' `from_pretrained`. Raises ValueError where the checkpoint's architecture is not
        one this class computes.
        """
        from transformers import GPT2LMHeadModel

        source = GPT2LMHeadModel.from_pretrained(name_or_path, use_safetensors=True, **kwargs)
        return cls.from_hf_gpt2(source)

    @classmethod
    def from_hf_gpt2(cls, source):
        """A copy of a transformers GPT2LMHeadModel; logits agree."""
        hf = source.config
        activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
        if hf.activation_function not in activations:
            raise ValueError(f"activation_function={hf.activation_function!r} has no counterpart here")
        if hf.n_inner not in (None, 4 * hf.n_embd) or hf.scale_attn_by_inverse_layer_idx or not hf.scale_attn_weights:
            raise ValueError("this GPT-2 changes n_inner or the attention scaling, which has no counterpart here")
        config = GPTConfig(
            n_layer=hf.n_layer,
            n_head=hf.n_head,
            n_embd=hf.n_embd,
            block_size=hf.n_positions,
            vocab_size=hf.vocab_size,
            bias=True,
            activation=activations[hf.activation_function],
        )
        # transformers' Conv1D holds the transpose of nn.Linear's weight
        conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        state = {k: v.T if k.endswith(conv1d) else v for k, v in source.state_dict().items()}
        model = cls(config)
        model.load_state_dict(gpt2_names(state))
        return model


def gpt2_names(state_dict):
    """A GPT-2 / nanoGPT state dict under this file's names: the norms move into their sub-layers."""
    renames = {
        "_orig_mod.": "",
        ".ln_1.": ".attn.norm_before.",
        ".ln_2.": ".mlp.norm_before.",
        ".attn.c_": ".attn.f.c_",
        ".mlp.c_": ".mlp.f.c_",
    }
    renamed = {}
    for name, tensor in state_dict.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal-mask buffers
            continue
        renamed[functools.reduce(lambda n, pair: n.replace(*pair), renames.items(), name)] = tensor
    return renamed
