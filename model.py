"""A decoder-only GPT in one file. Every architectural choice is a switch.

Shapes: B batch, T sequence, C = n_embd, H = n_head, D = head_dim, R a chunk of queries, V = vocab_size.
The names are nanoGPT's (wte, wpe, h, ln_f, c_attn, c_proj, c_fc), so that GPT-2 weights and tools fit.

To fork it: a new choice is a line in its table; a new axis is a field of GPTConfig and a table. The rest of the project
relies on the following rules, and `python train.py ARM --check` tests whether your change keeps them.

- A part is built from (config, layer). The config is that of its own layer: every axis has one value there.
- A part is called with its input and a Context, which is new in each pass. What later layers need, a layer puts into
  `context.carry`, never on a module, and nobody changes it in place. (When ablate.py replays a pass from the middle,
  GPT.forward still runs, the earlier sub-layers return their stored outputs, and `carry` is restored.)
- The stream changes inside a sub-layer, before its tap `stream`, and nowhere between two sub-layers.
- A pass changes no weight and no buffer. A module that changes once a step does so in `after_update()`, on each rank.
- A matrix is an nn.Linear, so that init, weight decay, FLOPs, Muon and int8 find it; a matrix that writes to the stream
  is a StreamLinear. A module whose FLOPs are not those of its matrices defines `flops(T)`; one that does not start from
  N(0, std) defines `init(std)`. Only weights of nn.Linear and nn.Embedding decay.
- Position t depends on tokens up to t only, and on no other sequence of the batch.
- All attention goes through Attend, whose `rows` and `seen` describe its attention map.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CONTRACT = "spikesink-model-1"  # `spikesink detect` recognises the model file of a checkpoint by this line


# ---------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class GPTConfig:
    """The architecture. Raises ValueError naming the fields, their values and the possible ones.

    Every field except MODEL_WIDE may vary by layer: norm_place="post*2 pre" (post in two layers, pre in the rest),
    "post*25% pre", window="cycle(64*3 0)" (64 in three layers, 0 in one, repeated). `layers` has one config per layer.
    """

    MODEL_WIDE: ClassVar = (
        *("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "tie", "embedding_init", "n_register"),
        "logit_cap",
    )

    # size
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0  # heads of keys and values, shared by groups of query heads; 0: n_head
    n_embd: int = 768
    head_dim: int = 0  # width of a head; 0: n_embd / n_head
    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64
    # weights
    bias: bool = False  # in linear layers and LayerNorms
    dropout: float = 0.0
    tie: bool = True  # the unembedding is the token embedding
    # norms
    norm_place: str = "pre"  # pre, post, sandwich, output, none
    norm: str = "layernorm"  # layernorm, rmsnorm, dyt
    norm_gain: bool = True  # learned gain (and bias) in the norms
    norm_eps: float = 1e-5
    qk_norm: str = "none"  # none, head, full (heads x width)
    # feed-forward
    ffn: str = "plain"  # plain, gated, linear, attention, moe (a mixture of gated experts)
    ffn_hidden: int = 0  # hidden width; 0: 4 n_embd, or if gated 8/3 n_embd, which moe's active experts share
    n_expert: int = 8  # experts of moe
    n_active: int = 2  # experts that each token goes to
    activation: str = "gelu"  # gelu, gelu_tanh, relu, relu2, silu, tanh, identity
    # residual stream
    residual_scale: str = "one"  # forward multiplier: one, inv_sqrt_2L, deepnorm, learned, rezero or a number
    init_scale: str = "inv_sqrt_2L"  # init of what writes to the stream: one, inv_sqrt_2L, deepnorm
    embedding_init: str = "small"  # small (0.02), unit (1, and 1/sqrt(n_embd) for the unembedding)
    # attention
    attention: str = "softmax"  # softmax, softmax1, sink_logit, k_bias, kv_bias, clipped, softpick, sigmoid, relu
    window: int = 0  # number of keys that a query sees, its own included; 0: all up to its own
    n_register: int = 0  # number of learned tokens before the sequence
    value: str = "own"  # values: own, residual (mixed with the first layer's)
    head_out: str = "none"  # applied to each head's output: none, rmsnorm, differential (pairs of heads are subtracted)
    gate: str = "none"  # gates on the attention output: none, channel, head, single
    gate_input: str = "input"  # what a gate depends on: input, constant, position, token
    # positions
    position: str = "learned"  # learned, sinusoidal, rope, alibi, none
    rope_base: float = 10000.0
    # limits
    stream_clip: float = 0.0  # the stream is clamped to +- this value after every sub-layer; 0: no clamp
    logit_cap: float = 0.0  # logits become cap * tanh(logits / cap); 0: no cap

    def __post_init__(self) -> None:
        if self.layers[0] is self:  # otherwise each layer has a config of its own, which has checked itself
            self._check()
        differs = lambda key: len({getattr(layer, key) for layer in self.layers}) > 1
        embedded = [layer.position for layer in self.layers if POSITIONS[layer.position].embedding is not NO_EMBEDDING]
        if embedded and differs("position"):
            raise ValueError(f"position={self.position}: {embedded[0]} is added to the embedding, before any layer")
        for key in ("n_kv_head", "head_dim", "head_out"):
            if "residual" in {layer.value for layer in self.layers} and differs(key):
                raise ValueError(f"value={self.value} needs values of one shape, not {key}={getattr(self, key)}")

    @functools.cached_property
    def layers(self) -> "list[GPTConfig]":
        """One config per layer, in which every axis has one value. Raises ValueError if a list does not fit n_layer."""
        varied = [f for f in fields(self) if f.name not in self.MODEL_WIDE and is_varied(getattr(self, f.name))]
        if not varied:
            return [self] * (self.n_layer if type(self.n_layer) is int and self.n_layer > 0 else 1)
        columns = {f.name: by_layer(f.name, getattr(self, f.name), f.type, self.n_layer) for f in varied}
        return [replace(self, **{key: column[i] for key, column in columns.items()}) for i in range(self.n_layer)]

    def _check(self) -> None:
        """Raises ValueError if this config of one layer is impossible. __post_init__ checks the layers together."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            fits = type(value) is entry.type or (entry.type is float and type(value) is int)
            if isinstance(entry.type, type) and not fits:
                hint = ", one for all layers" if is_varied(value) else ""
                raise ValueError(f"{entry.name}={value!r} is not of type {entry.type.__name__}{hint}")
        for key, table in CHOICES.items():
            if getattr(self, key) not in table:
                raise ValueError(f"{key}={getattr(self, key)!r} is not one of: {', '.join(table)}")
        for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "n_expert", "n_active"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        for key in ("n_kv_head", "head_dim", "ffn_hidden", "window", "n_register", "stream_clip", "logit_cap"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} must be 0 or more")
        for key in ("norm_eps", "rope_base"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}={getattr(self, key)} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.residual_scale not in RESIDUAL_SCALES and not is_number(self.residual_scale):
            known = ", ".join(RESIDUAL_SCALES)
            raise ValueError(f"residual_scale={self.residual_scale!r} is not a number or one of: {known}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.n_head % self.n_key_head:
            raise ValueError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if self.position == "rope" and self.head_width % 2:
            raise ValueError(f"position=rope needs an even head_dim, not {self.head_width}")
        if self.head_out == "differential" and (self.n_head % 2 or self.n_key_head % 2):
            found = f"n_head={self.n_head}, n_kv_head={self.n_key_head}"
            raise ValueError(f"head_out=differential takes heads in pairs: {found}")
        if self.residual_scale == "deepnorm" and self.norm_place != "post":
            raise ValueError(
                f"residual_scale=deepnorm is defined for norm_place=post, not norm_place={self.norm_place}"
            )
        if self.embedding_init == "unit" and self.tie:
            raise ValueError("embedding_init=unit would start a tied unembedding at 1 too: it needs tie=False")
        if self.gate == "none" and self.gate_input != "input":
            raise ValueError(f"gate_input={self.gate_input} needs a gate, not gate=none")
        if self.ffn_hidden and self.ffn not in ("plain", "gated", "moe"):
            raise ValueError(f"ffn_hidden={self.ffn_hidden} needs ffn=plain, gated or moe, not ffn={self.ffn}")
        if self.ffn != "moe" and (self.n_expert, self.n_active) != (GPTConfig.n_expert, GPTConfig.n_active):
            raise ValueError(f"n_expert={self.n_expert}, n_active={self.n_active} need ffn=moe, not ffn={self.ffn}")
        if self.n_active > self.n_expert:
            raise ValueError(f"n_active={self.n_active} is more than n_expert={self.n_expert}")
        if self.window == 1:
            raise ValueError("window=1: a query that sees itself alone is no attention; use 0 (all) or at least 2")

    @property
    def n_key_head(self) -> int:
        """Number of key and value heads."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Width D of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def out_heads(self) -> tuple[int, int]:
        """(number, width) of the attention outputs: one per head, or per pair of heads that share values."""
        paired = 2 if self.head_out == "differential" else 1
        return self.n_head // paired, self.head_width * paired


def is_number(text: str) -> bool:
    """True if `text` is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def is_varied(value: Any) -> bool:
    """True if `value` is text with a value per layer."""
    return isinstance(value, str) and bool(re.search(r"[\s*(]", value))


def by_layer(key: str, text: str, kind: Any, n_layer: int) -> list[Any]:
    """The value of `key` in each layer. "a*3 b" is a in three layers, then b; "a*25% b" is a in a quarter of them;
    "cycle(a*3 b)" repeats. Raises ValueError if `text` does not fit n_layer or an entry is not of type `kind`."""
    cycle = re.fullmatch(r"\s*cycle\((.*)\)\s*", text)
    entries = (cycle[1] if cycle else text).split()
    values: list[Any] = []
    for i, entry in enumerate(entries):
        value, counted, count = entry.partition("*")
        is_percentage = count.endswith("%")
        try:
            n = round(float(count.removesuffix("%")) * n_layer / 100) if is_percentage else int(count) if counted else 1
            parsed = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
            if is_varied(parsed):  # a lone bracket, which would be read as a list again, without end
                raise ValueError
        except (KeyError, ValueError, TypeError, OverflowError):
            raise ValueError(f"{key}={text!r}: {entry!r} is not a value of {key}, or value*count") from None
        n = max(1, n) if is_percentage else n
        if not cycle and not counted and i == len(entries) - 1:
            n = n_layer - len(values)  # the last entry fills the remaining layers
        if n < 1:
            raise ValueError(f"{key}={text!r} leaves no layer of {n_layer} for {entry!r}")
        values += [parsed] * n
    fits = 0 < len(values) <= n_layer if cycle else len(values) == n_layer
    if not fits:
        raise ValueError(f"{key}={text!r} describes {len(values)} layers and does not fit n_layer={n_layer}")
    return (values * n_layer)[:n_layer]


@dataclass
class Context:
    """What a part may read besides its input. It is new in each pass. Registers stand in front of the tokens."""

    ids: Tensor  # (B, T), without registers
    embedding: Tensor  # (B, n_register + T, C), registers and tokens, without positions
    positions: Tensor  # (T,), positions of the tokens
    carry: dict[str, Any] = field(default_factory=dict)  # what layers hand to later layers
    losses: dict[str, Tensor] = field(default_factory=dict)  # auxiliary losses by name, for train.py's `losses`
    scalars: dict[str, Tensor] = field(default_factory=dict)  # numbers by name, for log.jsonl

    def add_loss(self, name: str, value: Tensor) -> None:
        """Adds `value` to an auxiliary loss. It must be a mean over sequences, so that batching does not change it."""
        self.losses[name] = self.losses.get(name, 0) + value


Part = Callable[[GPTConfig, int], nn.Module]  # (config of the layer, its number from 0) -> module


class StreamLinear(nn.Linear):
    """The matrix whose output a sub-layer adds to the stream. `init_scale` sets its initial scale."""


class Apply(nn.Module):
    """A function without weights, as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


# ---------------------------------------------------------------------------------------------- norms


class DyT(nn.Module):
    """w * tanh(a x) + b, where a is a learned scalar (Zhu et al. 2025)."""

    def __init__(self, size: int, alpha: float, gain: bool, bias: bool) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([alpha]))
        self.weight = nn.Parameter(torch.ones(size)) if gain else 1.0
        self.bias = nn.Parameter(torch.zeros(size)) if gain and bias else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(self.alpha * x) + self.bias


def layernorm(config: GPTConfig, size: int, role: str) -> nn.Module:
    """LayerNorm (Ba et al. 2016)."""
    return nn.LayerNorm(size, config.norm_eps, elementwise_affine=config.norm_gain, bias=config.bias)


def rmsnorm(config: GPTConfig, size: int, role: str) -> nn.Module:
    """x / rms(x) * w (Zhang & Sennrich 2019)."""
    return nn.RMSNorm(size, config.norm_eps, elementwise_affine=config.norm_gain)


def dyt(config: GPTConfig, size: int, role: str) -> nn.Module:
    """DyT as in Sun et al. 2026: alpha is 0.8 around attention and 0.2 around the FFN; the last norm is RMSNorm."""
    if role == "final":
        return rmsnorm(config, size, role)
    return DyT(size, {"attn": 0.8, "ffn": 0.2}[role], config.norm_gain, config.bias)


# name -> constructor(config, size, role), where role is attn, ffn or final
NORMS = {"layernorm": layernorm, "rmsnorm": rmsnorm, "dyt": dyt}


class NormPlace(NamedTuple):
    """Which of a sub-layer's three norm slots are used, and whether the model ends with a norm."""

    before: bool  # on the input of attention or FFN
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


class QKNorm(nn.Module):
    """Normalises queries and keys (B, T, H, D), each head separately or all heads x width together."""

    def __init__(self, config: GPTConfig, full: bool) -> None:
        super().__init__()
        self.full, D = full, config.head_width
        self.q = NORMS[config.norm](config, config.n_head * D if full else D, "attn")
        self.k = NORMS[config.norm](config, config.n_key_head * D if full else D, "attn")

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.full:
            return self.q(q.flatten(-2)).view_as(q), self.k(k.flatten(-2)).view_as(k)
        return self.q(q), self.k(k)


QK_NORMS: dict[str, Part] = {
    "none": lambda config, layer: Apply(lambda q, k: (q, k)),
    "head": lambda config, layer: QKNorm(config, full=False),  # Qwen 3
    "full": lambda config, layer: QKNorm(config, full=True),  # OLMo 2, and the paper's "QK + output" arm
}

# -------------------------------------------------------------------------------------------- residual


class LearnedScale(nn.Module):
    """update * scale, where scale is a parameter with an entry per channel, or a single one."""

    def __init__(self, size: int, init: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((size,), init))

    def forward(self, update: Tensor) -> Tensor:
        return self.scale * update


def fixed_scale(scale: float) -> nn.Module:
    """update * scale, where scale is a constant."""
    return Apply(lambda update: scale * update)


# Multiplier of each update in the forward pass. L = n_layer, so 2L updates are added to the stream.
# deepnorm (Wang et al. 2022): LN(a x + f(x)) with a = (2L)^1/4 is written LN(x + f(x) / a), the same function of x.
RESIDUAL_SCALES = {
    "one": lambda c: nn.Identity(),
    "inv_sqrt_2L": lambda c: fixed_scale((2 * c.n_layer) ** -0.5),
    "deepnorm": lambda c: fixed_scale((2 * c.n_layer) ** -0.25),
    "learned": lambda c: LearnedScale(c.n_embd, 0.1),  # LayerScale (Touvron et al. 2021), its init for <= 18 layers
    "rezero": lambda c: LearnedScale(1, 0.0),  # Bachlechner et al. 2020
}


def residual_scale(config: GPTConfig) -> nn.Module:
    """The module for config.residual_scale, which is a name of RESIDUAL_SCALES or a number."""
    make = RESIDUAL_SCALES.get(config.residual_scale)
    return make(config) if make else fixed_scale(float(config.residual_scale))


# ------------------------------------------------------------------------------------------- positions


class LearnedPosition(nn.Embedding):
    """A learned vector for each position (GPT-2's wpe)."""

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__(config.block_size, config.n_embd)


class Sinusoid(nn.Module):
    """sin and cos of position * 10000^(-2i/C) (Vaswani et al. 2017), scaled to the rms of a new token embedding."""

    table: Tensor

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        frequencies = 1e4 ** (-torch.arange(0, config.n_embd, 2) / config.n_embd)
        angles = torch.outer(torch.arange(config.block_size), frequencies)  # (T, C/2)
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, : config.n_embd]
        std = EMBEDDING_INITS[config.embedding_init](config)[0]
        self.register_buffer("table", std * math.sqrt(2) * table, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        return self.table[positions]


class Rotary(nn.Module):
    """RoPE (Su et al. 2021). It rotates the two halves of a head against each other, as Llama does."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        frequencies = config.rope_base ** (-torch.arange(0, config.head_width, 2) / config.head_width)
        angles = torch.outer(torch.arange(config.n_register + config.block_size), frequencies).repeat(1, 2)  # (T, D)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos[: q.size(-2)].to(q.dtype), self.sin[: q.size(-2)].to(q.dtype)

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat((-second, first), dim=-1) * sin

        return rotate(q), rotate(k)


def alibi_slopes(n_head: int) -> Tensor:
    """ALiBi's slope of each head: 2^(-8i/n) (Press et al. 2022). For n that is not a power of 2, the other heads take
    every second slope of twice as many heads."""
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return torch.tensor(slopes + [2 ** (-4 * i / power) for i in range(1, 2 * (n_head - power), 2)])


NO_EMBEDDING: Part = lambda config, layer: Apply(lambda positions: 0.0)


class Position(NamedTuple):
    """Where positions enter: added to the token embedding, as a rotation of q and k, or as slopes on the logits."""

    embedding: Part = NO_EMBEDDING
    rotation: Part = lambda config, layer: Apply(lambda q, k: (q, k))
    alibi: bool = False


POSITIONS = {
    "learned": Position(embedding=LearnedPosition),
    "sinusoidal": Position(embedding=Sinusoid),
    "rope": Position(rotation=Rotary),
    "alibi": Position(alibi=True),
    "none": Position(),
}

# ------------------------------------------------------------------------------------------- attention

Weights = tuple[Tensor, Tensor | float]  # (B, H, R, T) of queries for keys, and what a slot adds to the output


class RowNormaliser(nn.Module):
    """weights = function(logits), without a slot. `rows` is one, less, any or signed (see Attend)."""

    def __init__(self, function: Callable[..., Any], rows: str = "one") -> None:
        super().__init__()
        self.function, self.rows = function, rows

    def forward(self, logits: Tensor, q: Tensor) -> Weights:
        return self.function(logits), 0.0


class SlotSoftmax(nn.Module):
    """Softmax over the keys and a slot that holds no token, so that the weights of the keys sum to less than one.

    The slot's logit is 0 (softmax-off-by-one, Miller 2023), learned per head (GPT-OSS), or q k* with a learned key k*
    (K bias, Gu et al. 2024). Its value is 0, or learned (KV bias).
    """

    rows = "slot"

    def __init__(self, config: GPTConfig, layer: int, learned: tuple[str, ...] = ()) -> None:
        super().__init__()
        parameter = lambda name, *size: nn.Parameter(torch.zeros(config.n_head, *size)) if name in learned else None
        self.logit = parameter("logit")
        self.key = parameter("key", config.head_width)
        self.value = parameter("value", config.out_heads[1])

    def flops(self, T: int) -> int:
        """FLOPs of q k*."""
        return 0 if self.key is None else 6 * self.key.numel()

    def forward(self, logits: Tensor, q: Tensor) -> Weights:
        slot = torch.zeros_like(logits[..., :1])  # (B, H, R, 1)
        if self.logit is not None:
            slot = slot + self.logit[:, None, None]
        if self.key is not None:
            slot = q @ self.key[:, :, None] / math.sqrt(q.size(-1))
        weights = torch.cat((logits, slot), dim=-1).softmax(dim=-1)
        extra = 0.0 if self.value is None else weights[..., -1:] * self.value[:, None]  # (B, H, R, D)
        return weights[..., :-1], extra


def softpick(logits: Tensor) -> Tensor:
    """relu(e^x - 1) / sum |e^x - 1| (Zuhri et al. 2025), where the sum is over the keys that the query sees.

    The paper sums over all T keys. Then each hidden key (e^-inf) adds 1, and a query depends on how many tokens follow.
    """
    largest = logits.amax(dim=-1, keepdim=True).clamp_min(0)
    powers = ((logits - largest).exp() - (-largest).exp()).masked_fill(logits.isneginf(), 0)
    return powers.relu() / (powers.abs().sum(dim=-1, keepdim=True) + 1e-6)


# name -> module: logits (B, H, R, T), q (B, H, R, D) -> weights (B, H, R, T), the slot's contribution to the output
ATTENTIONS: dict[str, Part] = {
    "softmax": lambda c, layer: RowNormaliser(lambda logits: logits.softmax(dim=-1)),
    "softmax1": SlotSoftmax,
    "sink_logit": functools.partial(SlotSoftmax, learned=("logit",)),
    "k_bias": functools.partial(SlotSoftmax, learned=("key",)),
    "kv_bias": functools.partial(SlotSoftmax, learned=("key", "value")),
    # clip((zeta - gamma) softmax + gamma, 0, 1) with zeta 1, gamma -0.03 gives exact zeros (Bondarenko et al. 2023)
    "clipped": lambda c, layer: RowNormaliser(
        lambda logits: (1.03 * logits.softmax(dim=-1) - 0.03).clamp(0, 1), "less"
    ),
    "softpick": lambda c, layer: RowNormaliser(softpick, "less"),
    # Ramapuram et al. 2024
    "sigmoid": lambda c, layer: RowNormaliser(lambda logits: torch.sigmoid(logits - math.log(c.block_size)), "any"),
    # divided by the number of keys the query sees (Wortsman et al. 2023)
    "relu": lambda c, layer: RowNormaliser(
        lambda logits: F.relu(logits) / logits.isfinite().sum(dim=-1, keepdim=True), "any"
    ),
}


def for_heads(x: Tensor, n_head: int) -> Tensor:
    """Repeats keys or values (B, n_kv_head, T, D) for the query heads that share them: (B, n_head, T, D)."""
    return x if x.size(1) == n_head else x.repeat_interleave(n_head // x.size(1), dim=1)


class Attend(nn.Module):
    """The attention seam, which instruments hook: (q, k, v, bias) -> out.

    A hook sees q, k, v; `shares` returns any chunk of rows of the attention map; a pre-hook may pass `bias`. `rows` is
    what a row of that map sums to. "one": to one. "slot": to at most one, and a slot takes the rest. "less": to at most
    one, and the rest is lost. "signed": to anything, with weights of either sign. A normaliser may also have "any": its
    weights sum to anything, and the map divides them by that sum, so that `rows` of the seam is "one".
    """

    slopes: Tensor | None

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.kind, self.dropout, self.window = config.attention, config.dropout, config.window
        self.width = config.n_head * (config.head_width + config.out_heads[1])
        self.normalise = ATTENTIONS[config.attention](config, layer)
        slopes = alibi_slopes(config.n_head)[:, None, None] if POSITIONS[config.position].alibi else None
        self.register_buffer("slopes", slopes, persistent=False)

    def mask(self, first: int, R: int, T: int, device: torch.device | str) -> Tensor:
        """The mask ([H,] R, T) of queries first ... first + R - 1, from causality, the window and ALiBi's slopes."""
        distance = torch.arange(first, first + R, device=device)[:, None] - torch.arange(T, device=device)
        hidden = (distance < 0) | (distance >= self.window) if self.window else distance < 0
        mask = torch.zeros(R, T, device=device) if self.slopes is None else -self.slopes * distance
        return mask.masked_fill(hidden, -torch.inf)

    @property
    def rows(self) -> str:
        """What the rows of the attention map sum to; see the class."""
        rows = str(self.normalise.rows)
        return "one" if rows == "any" else rows

    def flops(self, T: int) -> int:
        """Training FLOPs per query of q k^T and weights @ v, over the keys that the last query sees."""
        return 6 * self.width * min(T, self.window or T) + flops_of(self.normalise, T)

    def seen(self, first: int, R: int, T: int) -> Tensor:
        """Which of the first T keys are visible to queries first ... first + R - 1: bool (R, T)."""
        return self.mask(first, R, T, "cpu" if self.slopes is None else self.slopes.device).isfinite().view(-1, R, T)[0]

    def weights(self, q: Tensor, k: Tensor, first: int = 0, bias: Tensor | None = None) -> Weights:
        """Weights (B, H, R, T) of the queries q (B, H, R, D), the first at position `first`, and the slot's output.

        `bias` broadcasts to (B, H, 1, T). It is added to a key's logit for every query except the one at the key's own
        position, so that no row is empty when the first key is masked (-inf).
        """
        R, T = q.size(-2), k.size(-2)
        logits = q @ for_heads(k, q.size(1)).transpose(-2, -1) / math.sqrt(q.size(-1))
        logits = logits + self.mask(first, R, T, q.device)
        if bias is not None:
            is_own = torch.arange(first, first + R, device=q.device)[:, None] == torch.arange(T, device=q.device)
            logits = logits + torch.where(is_own, 0.0, bias)
        return self.normalise(logits, q)

    def shares(self, q: Tensor, k: Tensor, first: int = 0, bias: Tensor | None = None) -> Tensor:
        """The attention map (B, H, R, T) that is reported: the share of its attention that a query gives to each key.

        These are the weights; a row sums to less than one if a slot takes some. Weights that may sum to anything
        (sigmoid, ReLU) are divided by the sum of their row; a row of zeros stays zero.
        """
        weights, _ = self.weights(q, k, first, bias)
        if self.normalise.rows == "any":
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-30)
        return weights

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, chunk: int = 256) -> Tensor:
        """q (B, H, T, D), k (B, n_kv_head, T, D), v of as many heads or fewer, of any width -> (B, H, T, width of v).

        Softmax without a bias uses PyTorch's fused kernels, except in training on a CPU, where matrix products are 2 to
        5 times as fast (and under autocast give logits in bfloat16, as other eager attention does). Otherwise the map
        is made for `chunk` queries at a time; if that takes several chunks, the backward pass makes it again.
        """
        dropout, T = self.dropout if self.training else 0.0, q.size(-2)
        fused = self.kind == "softmax" and bias is None and not (self.training and q.device.type == "cpu")
        v = for_heads(v, k.size(1)) if fused else v
        if fused and self.slopes is None and not self.window:
            grouped = k.size(1) < q.size(1)
            return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, enable_gqa=grouped)
        chunk = T if fused and self.training else chunk
        attend = self._fused_rows if fused else self._rows
        if torch.is_grad_enabled() and not fused and not dropout and chunk < T:
            attend = functools.partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
        outputs = []
        for first in range(0, T, chunk):
            end = min(first + chunk, T)  # later keys are hidden from these queries
            key_bias = None if bias is None else bias[..., :end]
            outputs.append(attend(q[:, :, first:end], k[:, :, :end], v[:, :, :end], first, key_bias, dropout))
        return torch.cat(outputs, dim=-2)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, first: int, bias: Tensor | None, dropout: float) -> Tensor:
        """Output (B, H, R, width of v) of queries q, the first at position `first`; the last one sees all keys of k."""
        weights, slot = self.weights(q, k, first, bias)
        return F.dropout(weights, dropout, self.training).to(v.dtype) @ for_heads(v, q.size(1)) + slot

    def _fused_rows(self, q: Tensor, k: Tensor, v: Tensor, first: int, bias: Tensor | None, dropout: float) -> Tensor:
        """The same output from PyTorch's fused kernels, for masks that must be passed to them."""
        mask = self.mask(first, q.size(-2), k.size(-2), q.device).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=k.size(1) < q.size(1))


class Gate(nn.Module):
    """out * sigmoid(W source), out (B, T, H, D), a gate per entry of `shape` (Qiu et al. 2025; Sun et al. 2026)."""

    def __init__(self, config: GPTConfig, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        width, self.source, self.per_token = GATE_INPUTS[config.gate_input]
        self.c_gate = nn.Linear(width(config), math.prod(shape), bias=config.bias)

    def flops(self, T: int) -> int:
        """FLOPs of W source. A gate that is the same for all sequences costs nothing per token."""
        return 6 * self.c_gate.weight.numel() if self.per_token else 0

    def forward(self, out: Tensor, x: Tensor, context: Context) -> Tensor:
        source = self.source(x, context, self.c_gate.in_features)
        return out * torch.sigmoid(self.c_gate(source)).unflatten(-1, self.shape)


GATES: dict[str, Part] = {
    "none": lambda c, layer: Apply(lambda out, x, context: out),
    "channel": lambda c, layer: Gate(c, c.out_heads),
    "head": lambda c, layer: Gate(c, (c.out_heads[0], 1)),
    "single": lambda c, layer: Gate(c, (1, 1)),
}

# name -> source of the gate: (its width, source(attention's input x, context, width), whether it depends on the tokens)
GATE_INPUTS = {
    "input": (lambda c: c.n_embd, lambda x, context, width: x, True),
    "constant": (lambda c: 1, lambda x, context, width: x.new_ones(1), False),
    "position": (
        lambda c: c.n_register + c.block_size,
        lambda x, context, width: torch.eye(width, device=x.device)[: x.size(1)],
        False,
    ),
    "token": (lambda c: c.n_embd, lambda x, context, width: context.embedding, True),
}


def residual_value(v: Tensor, context: Context) -> Tensor:
    """(v + v of the first layer) / 2, which in the first layer is v (ResFormer, Zhou et al. 2024)."""
    return 0.5 * (v + context.carry.setdefault("value", v))


# name -> function(a layer's own values (B, n_kv_head, T, D), context) -> the values that attention uses
VALUES = {"own": lambda v, context: v, "residual": residual_value}


class HeadRMSNorm(nn.Module):
    """Divides each head's output (B, T, H, D) by its rms, which equalises the variance of positions (2605.06611)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.head_width, config.norm_eps, elementwise_affine=config.norm_gain)

    def forward(self, out: Tensor) -> Tensor:
        return self.norm(out)


class Differential(nn.Module):
    """(1 - l0) * norm(head 2i - lambda * head 2i + 1), where the two heads share values (Ye et al. 2024, 2410.05258).

    lambda = exp(lq1 lk1) - exp(lq2 lk2) + l0, l0 = 0.8 - 0.6 exp(-0.3 layer). Instruments see the two softmax maps of a
    pair as two heads.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.l0 = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.vectors = nn.Parameter(0.1 * torch.randn(4, config.head_width))  # lq1, lk1, lq2, lk2
        self.norm = nn.RMSNorm(2 * config.head_width, config.norm_eps, elementwise_affine=config.norm_gain)

    def forward(self, out: Tensor) -> Tensor:
        """(B, T, H, 2D) -> (B, T, H/2, 2D)."""
        q1, k1, q2, k2 = self.vectors.float()
        lambda_ = ((q1 @ k1).exp() - (q2 @ k2).exp() + self.l0).to(out.dtype)
        first, second = out.unflatten(-2, (-1, 2)).unbind(-2)
        return (1 - self.l0) * self.norm(first - lambda_ * second)


# name -> module: outputs of the heads (B, T, H, width of values) -> (B, T, *out_heads)
HEAD_OUTS: dict[str, Part] = {
    "none": lambda config, layer: nn.Identity(),
    "rmsnorm": HeadRMSNorm,
    "differential": Differential,
}


class SelfAttention(nn.Module):
    """Causal self-attention: c_proj(gate(head_out(attend(q, k, v))))."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.head_width = (config.n_head, config.n_key_head, config.n_key_head), config.head_width
        self.value_width = config.out_heads[1]
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * self.head_width, bias=config.bias)
        self.qk_norm = QK_NORMS[config.qk_norm](config, layer)
        self.rotate = POSITIONS[config.position].rotation(config, layer)
        self.value = VALUES[config.value]
        self.attend = Attend(config, layer)
        self.head_out = HEAD_OUTS[config.head_out](config, layer)
        self.gate = GATES[config.gate](config, layer)
        self.c_proj = StreamLinear(config.n_head * self.head_width, config.n_embd, bias=config.bias)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), keys (B, n_kv_head, T, D) and the layer's own values: like keys, or one per pair."""
        qkv = self.c_attn(x).unflatten(-1, (-1, self.head_width))  # (B, T, heads of q, k and v, D)
        q, k, v = qkv.split(self.heads, dim=-2)
        v = v.flatten(-2).unflatten(-1, (-1, self.value_width))
        q, k, v = (p.transpose(1, 2) for p in (*self.qk_norm(q, k), v))  # (B, H, T, D)
        return *self.rotate(q, k), v

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.qkv(x)
        out = self.head_out(self.attend(q, k, self.value(v, context)).transpose(1, 2))  # (B, T, H, D)
        return self.c_proj(self.gate(out, x, context).flatten(-2))


# ------------------------------------------------------------------------------------------------- FFN

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),  # GPT-2's own
    "relu": nn.ReLU,
    "relu2": lambda: Apply(lambda x: F.relu(x).square()),  # So et al. 2021, Primer
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


class PlainFFN(nn.Module):
    """c_proj(act(c_fc(x))), hidden width 4C."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        hidden = config.ffn_hidden or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.act = ACTIVATIONS[config.activation]()
        self.c_proj = StreamLinear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class GatedFFN(nn.Module):
    """c_proj(act(c_gate(x)) * c_fc(x)) (Shazeer 2020). A hidden width of 8C/3, rounded to a multiple of 8, has as many
    parameters as a plain FFN."""

    def __init__(self, config: GPTConfig, layer: int, hidden: int = 0) -> None:
        super().__init__()
        hidden = hidden or config.ffn_hidden or 8 * round(config.n_embd / 3)
        self.c_gate = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.act = ACTIVATIONS[config.activation]()
        self.c_proj = StreamLinear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.c_proj(self.act(self.c_gate(x)) * self.c_fc(x))


class LinearFFN(nn.Module):
    """c_proj(x), a single matrix without hidden layer."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.c_proj = StreamLinear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.c_proj(x)


class MoE(nn.Module):
    """sum_e w_e expert_e(x) over the n_active of n_expert gated FFNs that a router scores highest; w is the softmax of
    their scores (Mixtral, Jiang et al. 2024). The active experts together are as wide as one gated FFN.

    Adds n_expert * sum_e f_e p_e to the loss "load_balance", where f_e is expert e's share of the choices in a sequence
    and p_e its mean probability there (Fedus et al. 2022; per sequence, as in DeepSeek-V2). This is 1 per layer if all
    experts are used equally. The scalar "busiest_expert" is the batch's largest f_e in the last such layer.

    It is not compiled, because the number of tokens of an expert is not known before the pass.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_active = config.n_active
        hidden = max(1, (config.ffn_hidden or 8 * round(config.n_embd / 3)) // config.n_active)
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(GatedFFN(config, layer, hidden) for _ in range(config.n_expert))

    def flops(self, T: int) -> int:
        """FLOPs of the router and the active experts."""
        return flops_of(self.router, T) + self.n_active * flops_of(self.experts[0], T)

    @torch.compiler.disable
    def forward(self, x: Tensor, context: Context) -> Tensor:
        logits = self.router(x)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        probabilities = logits.to(dtype).softmax(dim=-1)  # (B, T, experts)
        weights, choices = probabilities.topk(self.n_active, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):  # an expert without tokens is called too, so that it has a gradient
            *tokens, rank = (choices == e).nonzero(as_tuple=True)
            update = weights[*tokens, rank, None] * expert(x[*tokens], context)
            out.index_put_(tuple(tokens), update.to(out.dtype), accumulate=True)
        n_expert = len(self.experts)
        share = F.one_hot(choices, n_expert).to(dtype).mean(dim=(1, 2))  # (B, experts)
        context.add_loss("load_balance", n_expert * (share * probabilities.mean(dim=1)).sum(dim=-1).mean())
        context.scalars["busiest_expert"] = share.mean(dim=0).amax()
        return out


FFNS: dict[str, Part] = {
    "plain": PlainFFN,
    "gated": GatedFFN,
    "linear": LinearFFN,
    "attention": SelfAttention,
    "moe": MoE,
}

# ------------------------------------------------------------------------------------------------ loss

MAX_LOGITS_BYTES = {"cpu": 2**26, "cuda": 2**30}  # largest chunk of logits in float32

# logits (R, V) in float32, targets (R,) -> the summed loss (); targets of -1 are not counted
RowLoss = Callable[[Tensor, Tensor], Tensor]


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) (Gemma 2). With a cap of 0 the logits stay as they are."""
    return cap * torch.tanh(logits / cap) if cap else logits


def grad_and_loss(loss_of_rows: RowLoss, logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The summed loss of the capped logits, and before it its gradient by `logits` (R, V), in their dtype."""
    return torch.func.grad_and_value(lambda rows: loss_of_rows(soft_cap(rows.float(), cap), targets))(logits)


class ChunkedLoss(torch.autograd.Function):
    """The mean loss of the logits x @ weight^T, which are never all in memory: each chunk of rows is turned into its
    gradient at once.

    x (N, C), weight (V, C), targets (N,). `grad_and_loss` is called with (logits, targets) of a chunk. Products are in
    `dtype`, sums and the weight's gradient in float32. The loss can be differentiated once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, grad_and_loss: Callable[..., Any], dtype: torch.dtype
    ) -> Tensor:
        ctx.dtype, ctx.n = x.dtype, (targets >= 0).sum()
        x, w = x.detach().to(dtype), weight.detach().to(dtype)
        loss, needs_grad = torch.zeros((), device=x.device), any(ctx.needs_input_grad)
        if needs_grad:
            dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        n_chunks = -(-4 * len(weight) * len(x) // MAX_LOGITS_BYTES.get(x.device.type, MAX_LOGITS_BYTES["cuda"]))
        chunk_size = -(-len(x) // n_chunks)
        for first in range(0, len(x), chunk_size):
            rows = slice(first, first + chunk_size)
            grad, chunk_loss = grad_and_loss(x[rows] @ w.t(), targets[rows])
            loss += chunk_loss
            if needs_grad:
                torch.mm(grad, w, out=dx[rows])
                for dw_part, grad_part in zip(dw.split(8192), grad.split(8192, dim=1), strict=True):
                    dw_part.add_(grad_part.t() @ x[rows])
        ctx.gradients = (dx, dw) if needs_grad else None
        return loss / ctx.n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (dx, dw), ctx.gradients = ctx.gradients, None
        scale = gradient / ctx.n
        return dx.to(ctx.dtype) * scale, dw.mul_(scale), None, None, None


# ------------------------------------------------------------------------------------------------ init

INIT_STD = 0.02


def init_matrices(module: nn.Module, std: float = INIT_STD, stream: float = 1.0) -> None:
    """Draws matrices and embeddings in `module` from N(0, std), a StreamLinear from N(0, std * stream), and sets biases
    to 0. A module that has `init(std)` does it itself. Norms, scales and other vectors keep the values they have."""
    custom_init = getattr(module, "init", None)
    if custom_init:
        custom_init(std)
    elif isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std * (stream if isinstance(module, StreamLinear) else 1.0))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    else:
        for child in module.children():
            init_matrices(child, std, stream)


def deepnorm_init(block: nn.Module, n_layer: int) -> None:
    """Xavier init with gain (8L)^-1/4 for values, attention's c_proj and the FFN (Wang et al. 2022, decoder-only)."""
    init_matrices(block)
    gain = (8 * n_layer) ** -0.25
    for module in block.modules():
        if isinstance(module, SelfAttention):
            sizes = [heads * module.head_width for heads in module.heads]
            for part, part_gain in zip(module.c_attn.weight.split(sizes), (1.0, 1.0, gain), strict=True):
                nn.init.xavier_normal_(part, part_gain)
            nn.init.xavier_normal_(module.c_proj.weight, gain)
        elif isinstance(module, (PlainFFN, GatedFFN, LinearFFN)):
            for matrix in (m for m in module.modules() if isinstance(m, nn.Linear)):
                nn.init.xavier_normal_(matrix.weight, gain)


# name -> function(block, n_layer) that initialises the block's matrices
INIT_SCALES: dict[str, Callable[[nn.Module, int], None]] = {
    "one": lambda block, n_layer: init_matrices(block),
    "inv_sqrt_2L": lambda block, n_layer: init_matrices(block, stream=(2 * n_layer) ** -0.5),  # GPT-2
    "deepnorm": deepnorm_init,
}
# name -> (std of the embeddings, std of the unembedding)
EMBEDDING_INITS: dict[str, Callable[[GPTConfig], tuple[float, float]]] = {
    "small": lambda c: (INIT_STD, INIT_STD),
    "unit": lambda c: (1.0, c.n_embd**-0.5),  # Sun et al. 2026, who also set tie=False and init_scale=one
}

# ----------------------------------------------------------------------------------------------- FLOPs


def flops_of(module: nn.Module, T: int) -> int:
    """Training FLOPs per token of a module at sequence length T: 6 per weight of each matrix in it. A module that has
    `flops(T)` gives its own number."""
    custom_flops = getattr(module, "flops", None)
    if custom_flops:
        return custom_flops(T)
    if isinstance(module, nn.Linear):
        return 6 * module.weight.numel()
    return sum(flops_of(child, T) for child in module.children())


# ---------------------------------------------------------------------------------------------- choices

CHOICES: dict[str, Mapping[str, Any]] = {
    "norm_place": NORM_PLACES,
    "norm": NORMS,
    "qk_norm": QK_NORMS,
    "ffn": FFNS,
    "activation": ACTIVATIONS,
    "attention": ATTENTIONS,
    "gate": GATES,
    "gate_input": GATE_INPUTS,
    "value": VALUES,
    "head_out": HEAD_OUTS,
    "position": POSITIONS,
    "init_scale": INIT_SCALES,
    "embedding_init": EMBEDDING_INITS,
}

# ------------------------------------------------------------------------------------------------ model


class SubLayer(nn.Module):
    """x = clip(norm_after(x + scale * norm_update(f(norm_before(x))))), where f is attention or an FFN.

    Unused slots are identities. Two taps can be hooked: `update`, which is added to x, and `stream`, the result.
    """

    def __init__(self, config: GPTConfig, f: nn.Module, role: str) -> None:
        super().__init__()
        place = NORM_PLACES[config.norm_place]
        norm = lambda used: NORMS[config.norm](config, config.n_embd, role) if used else nn.Identity()
        self.norm_before, self.norm_update, self.norm_after = norm(place.before), norm(place.update), norm(place.after)
        self.f = f
        self.scale = residual_scale(config)
        self.dropout = nn.Dropout(config.dropout)
        self.clip = nn.Hardtanh(-config.stream_clip, config.stream_clip) if config.stream_clip else nn.Identity()
        self.update, self.stream = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        update = self.update(self.scale(self.norm_update(self.dropout(self.f(self.norm_before(x), context)))))
        return self.stream(self.clip(self.norm_after(x + update)))


class Block(nn.Module):
    """x = mlp(attn(x)): an attention sub-layer, then an FFN sub-layer."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = SubLayer(config, SelfAttention(config, layer), "attn")
        self.mlp = SubLayer(config, FFNS[config.ffn](config, layer), "ffn")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.mlp(self.attn(x, context), context)


class Transformer(nn.ModuleDict):
    """The parts of a GPT before the unembedding, with nanoGPT's names. `stream` is a tap before the first block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        first, last = config.layers[0], config.layers[-1]
        final = NORM_PLACES[last.norm_place].final
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = POSITIONS[first.position].embedding(first, 0)
        self.drop = nn.Dropout(first.dropout)
        self.stream = nn.Identity()
        self.h = nn.ModuleList(Block(layer_config, i) for i, layer_config in enumerate(config.layers))
        self.ln_f = NORMS[last.norm](last, config.n_embd, "final") if final else nn.Identity()
        if config.n_register:
            self.registers = nn.Embedding(config.n_register, config.n_embd)


class GPT(nn.Module):
    """Embedding, n_layer blocks, a final norm if the norm_place of the last block has one, and the unembedding.
    `losses` and `scalars` are those of the Context of the last pass with targets."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie:
            self.lm_head.weight = self.transformer.wte.weight
        self._init()
        self.grad_and_loss = grad_and_loss  # compile_sublayers replaces it
        self.losses: dict[str, Tensor] = {}
        self.scalars: dict[str, Tensor] = {}

    def _init(self) -> None:
        embeddings, unembedding = EMBEDDING_INITS[self.config.embedding_init](self.config)
        for part in self.transformer.values():
            if part is self.transformer.h:
                for block, config in zip(self.transformer.h, self.config.layers, strict=True):
                    INIT_SCALES[config.init_scale](block, config.n_layer)
            else:
                init_matrices(part, embeddings)
        init_matrices(self.lm_head, unembedding)

    def __getstate__(self) -> dict[str, Any]:
        """The state that a copy of the model gets, without the losses and scalars of the last pass."""
        return {**vars(self), "losses": {}, "scalars": {}}

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (B, T) -> (logits (B, T, V), None); with targets (B, T) -> (None, mean cross-entropy in nats).

        Targets of -1 are not counted. For another loss, override `loss_of_rows`; its gradient is derived.
        Raises ValueError if T > block_size.
        """
        B, T = idx.shape
        if self.config.block_size < T:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size={self.config.block_size}")
        net, n_register = self.transformer, self.config.n_register
        embedding, positions = net.wte(idx), torch.arange(T, device=idx.device)
        x = embedding + net.wpe(positions)
        if n_register:  # in front of position 0
            registers = net.registers.weight.expand(B, -1, -1)
            x, embedding = torch.cat((registers, x), dim=1), torch.cat((registers, embedding), dim=1)
        x, context = net.stream(net.drop(x)), Context(idx, embedding, positions)
        for block in net.h:
            x = block(x, context)
        x = net.ln_f(x[:, n_register:])
        if targets is None:
            return soft_cap(self.lm_head(x), self.config.logit_cap), None
        self.losses, self.scalars = context.losses, {name: x.detach() for name, x in context.scalars.items()}
        mixed = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if mixed else x.dtype
        grad_and_loss = functools.partial(self.grad_and_loss, self.loss_of_rows, cap=self.config.logit_cap)
        return None, ChunkedLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), grad_and_loss, dtype)

    @torch.no_grad()
    def generate(
        self, ids: Tensor, n: int, temperature: float = 1.0, top_k: int = 0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Token ids (B, T) -> (B, T + n). Each new token is drawn from softmax(logits / temperature), with top_k only
        among the k likeliest; temperature 0 takes the likeliest.

        Each token takes a whole pass over the last block_size tokens. If the model has dropout, call eval() first.
        """
        for _ in range(n):
            row = self(ids[:, -self.config.block_size :])[0][:, -1].float()
            if top_k:
                row = row.masked_fill(row < row.topk(min(top_k, row.size(-1))).values[:, -1:], -torch.inf)
            if temperature:
                probabilities = ((row - row.amax(-1, keepdim=True)) / temperature).softmax(-1)
                token = torch.multinomial(probabilities, 1, generator=generator)
            else:
                token = row.argmax(-1, keepdim=True)
            ids = torch.cat((ids, token), dim=1)
        return ids

    @staticmethod
    def loss_of_rows(logits: Tensor, targets: Tensor) -> Tensor:
        """The summed cross-entropy in nats of logits (R, V), float32, with targets (R,); targets of -1 add nothing."""
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")

    def compile_sublayers(self, **kwargs: Any) -> None:
        """Compiles each sub-layer and the loss separately, in place; `kwargs` go to torch.compile. Sub-layers of one
        kind share a compilation. Hooks between sub-layers, not inside, still see the stream."""
        torch._dynamo.config.recompile_limit = 64  # per function; sub-layers of all arms and modes count as one
        for sub_layer in self.sub_layers():
            sub_layer.forward = torch.compile(sub_layer.forward, dynamic=False, **kwargs)  # type: ignore[method-assign]
        self.grad_and_loss = torch.compile(grad_and_loss, dynamic=False, **kwargs)

    def sub_layers(self) -> list[SubLayer]:
        """The sub-layers in order: the attention and the FFN of each block."""
        return [m for m in self.transformer.h.modules() if isinstance(m, SubLayer)]

    def num_params(self) -> int:
        """The number of parameters without learned positions, as nanoGPT counts."""
        wpe = self.transformer.wpe
        position = wpe.weight.numel() if isinstance(wpe, LearnedPosition) else 0
        return sum(p.numel() for p in self.parameters()) - position

    def flops_per_token(self, T: int) -> int:
        """Training FLOPs per token at sequence length T: 6 per weight of a matrix, 12 H D T' per attention.

        This follows appendix B of PaLM. T' is at most the window; the cost of registers is divided among the tokens.
        Embedding look-ups are free, the unembedding is not.
        """
        length = self.config.n_register + T
        return flops_of(self.transformer, length) * length // T + flops_of(self.lm_head, T)

    def optimizer_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """nanoGPT's groups: matrices and embeddings decay; biases, norms, scales and slot keys do not. The learning
        rate of a group is multiplied by its `lr_scale`, if it has one."""
        decays = {id(m.weight) for m in self.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in parameters if id(p) in decays], "weight_decay": weight_decay},
            {"params": [p for p in parameters if id(p) not in decays], "weight_decay": 0.0},
        ]

    def block_matrices(self) -> list[Tensor]:
        """The weight matrices inside the blocks, which Muon updates."""
        return [m.weight for m in self.transformer.h.modules() if isinstance(m, nn.Linear)]

    @classmethod
    def from_checkpoint(cls, saved: Any) -> "GPT":
        """The model of a checkpoint with `model_args` (the fields of GPTConfig) and `model` (a state dict)."""
        model = cls(GPTConfig(**saved.model_args))
        model.load_state_dict(saved.model)
        return model

    @classmethod
    def from_pretrained(cls, name_or_path: str, **kwargs: Any) -> "GPT":
        """A GPT with GPT-2 or Llama weights from the Hugging Face hub or a folder (`pip install spikesink[hf]`).
        `kwargs` go to transformers' `from_pretrained`. Raises UserError if the model cannot be opened completely, and
        ValueError if this class cannot compute its architecture."""
        from spikesink.models import convert, hf

        return cls.from_checkpoint(convert.from_hf(hf.open_model(name_or_path, **kwargs)))
