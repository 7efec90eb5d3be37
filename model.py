"""A decoder-only GPT in one file, every architectural choice a switch.

Shapes: B batch, T sequence, C = n_embd, H = n_head, D = head_dim, R a chunk of queries, V = vocab_size.
The names are nanoGPT's (wte, wpe, h, ln_f, c_attn, c_proj, c_fc), so that GPT-2 weights and tools map over.

To fork: a choice is a line in its table, an axis a field of GPTConfig and a table. `python train.py ARM --check` tells
what a change broke. What the rest of the house relies on:

- A part is built from (config, layer): the config of its own layer, in which every axis has one value.
- It is called with its input and one Context, made anew for each pass. What a later layer needs, it leaves there in
  `left`, never on a module, and never changed in place: GPT.forward runs in every pass, but where one is replayed from
  the middle, the sub-layers before return what they returned, and `left` is put back.
- The stream changes inside a sub-layer, before its tap `stream`, and nowhere between two sub-layers.
- A pass changes no weight and no buffer. What changes once a step, a module does in `after_update()`, on each rank.
- A matrix is an nn.Linear: then init, weight decay, FLOPs, Muon and int8 know it. The one whose output is added to the
  stream is a StreamLinear. A module that is no such sum of matrices defines `flops(T)`; one that starts otherwise than
  N(0, std) defines `init(std)`. Only weights of nn.Linear and nn.Embedding decay.
- Position t depends on tokens up to t alone, and on no other sequence of the batch.
- What queries see goes through Attend, whose `rows` and `seen` say what its map is.
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

CONTRACT = "spikesink-model-1"  # by which `spikesink detect` knows this file as the model of a checkpoint


# ---------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class GPTConfig:
    """The architecture. Raises ValueError naming the fields, what was given and what is possible.

    All but MODEL_WIDE may vary by layer: norm_place="post*2 pre" (two, then the rest), "post*25% pre",
    window="cycle(64*3 0)" (three and one, over and over). `layers` has a config for each layer.
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
    ffn_hidden: int = (
        0  # hidden width of the FFN; 0: 4 n_embd; 8/3 n_embd if gated, of which moe's active experts share
    )
    n_expert: int = 8  # of moe
    n_active: int = 2  # experts that a token goes to
    activation: str = "gelu"  # gelu, gelu_tanh, relu, relu2, silu, tanh, identity
    # residual stream
    residual_scale: str = "one"  # forward multiplier: one, inv_sqrt_2L, deepnorm, learned, rezero or a number
    init_scale: str = "inv_sqrt_2L"  # init of what writes to the stream: one, inv_sqrt_2L, deepnorm
    embedding_init: str = "small"  # small (0.02), unit (1, and 1/sqrt(n_embd) for the unembedding)
    # attention
    attention: str = "softmax"  # softmax, softmax1, sink_logit, k_bias, kv_bias, clipped, softpick, sigmoid, relu
    window: int = 0  # keys a query sees, itself included; 0: all before it
    n_register: int = 0  # learned tokens before the sequence
    value: str = "own"  # values: own, residual (mixed with the first layer's)
    head_out: str = "none"  # on each head's output: none, rmsnorm, differential (pairs of heads are subtracted)
    gate: str = "none"  # on the attention output: none, channel, head, single
    gate_input: str = "input"  # what a gate depends on: input, constant, position, token
    # positions
    position: str = "learned"  # learned, sinusoidal, rope, alibi, none
    rope_base: float = 10000.0
    # limits
    stream_clip: float = 0.0  # the stream is clamped to +- this after every sub-layer; 0: not
    logit_cap: float = 0.0  # logits become cap * tanh(logits / cap); 0: not

    def __post_init__(self) -> None:
        for layer in {id(layer): layer for layer in self.layers}.values():
            layer._check()
        several = lambda key: len({getattr(layer, key) for layer in self.layers}) > 1
        added = [layer.position for layer in self.layers if POSITIONS[layer.position].embedding is not NO_EMBEDDING]
        if added and several("position"):
            raise ValueError(f"position={self.position}: {added[0]} is added to the embedding, before any layer")
        for key in ("n_kv_head", "head_dim", "head_out"):
            if "residual" in {layer.value for layer in self.layers} and several(key):
                raise ValueError(f"value={self.value} needs values of one shape, not {key}={getattr(self, key)}")

    @functools.cached_property
    def layers(self) -> "list[GPTConfig]":
        """One config a layer, in which every axis has one value. Raises ValueError for what does not fit n_layer."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.MODEL_WIDE}
        kinds = {f.name: f.type for f in fields(self)}
        varied = {k: by_layer(k, v, kinds[k], self.n_layer) for k, v in values.items() if is_varied(v)}
        if not varied:
            return [self] * (self.n_layer if type(self.n_layer) is int and self.n_layer > 0 else 1)
        return [replace(self, **{k: column[i] for k, column in varied.items()}) for i in range(self.n_layer)]

    def _check(self) -> None:
        """Raises ValueError for what no layer can be, given its own config; what layers are together is for
        __post_init__."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            fits = type(value) is entry.type or (entry.type is float and type(value) is int)
            if isinstance(entry.type, type) and not fits:
                whole = ", one for all layers" if is_varied(value) else ""
                raise ValueError(f"{entry.name}={value!r} is not of type {entry.type.__name__}{whole}")
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
        experts = (self.n_expert, self.n_active) == (GPTConfig.n_expert, GPTConfig.n_active)
        for refused, reason in (
            (not self.head_dim and self.n_embd % self.n_head, "n_embd={n_embd} is not a multiple of n_head={n_head}"),
            (self.n_head % self.n_key_head, "n_head={n_head} is not a multiple of n_kv_head={n_kv_head}"),
            (self.position == "rope" and self.head_width % 2, "position=rope needs an even head_dim, not {head_width}"),
            (
                self.head_out == "differential" and (self.n_head % 2 or self.n_key_head % 2),
                "head_out=differential takes heads in pairs: n_head={n_head}, n_kv_head={n_key_head}",
            ),
            (
                self.residual_scale == "deepnorm" and self.norm_place != "post",
                "residual_scale=deepnorm is defined for norm_place=post, not norm_place={norm_place}",
            ),
            (
                self.embedding_init == "unit" and self.tie,
                "embedding_init=unit would start a tied unembedding at 1 too: it needs tie=False",
            ),
            (self.gate == "none" and self.gate_input != "input", "gate_input={gate_input} needs a gate, not gate=none"),
            (
                self.ffn_hidden and self.ffn not in ("plain", "gated", "moe"),
                "ffn_hidden={ffn_hidden} needs ffn=plain, gated or moe, not ffn={ffn}",
            ),
            (not experts and self.ffn != "moe", "n_expert={n_expert}, n_active={n_active} need ffn=moe, not ffn={ffn}"),
            (self.n_active > self.n_expert, "n_active={n_active} is more than n_expert={n_expert}"),
            (
                self.window and self.window < 2,
                "window={window}: a query that sees itself alone is no attention; use 0 (all) or at least 2",
            ),
        ):
            if refused:
                raise ValueError(reason.format_map({key: getattr(self, key) for key in dir(self)}))

    @property
    def n_key_head(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Width D of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def out_heads(self) -> tuple[int, int]:
        """(how many outputs attention has, the width of each): of its heads, or of pairs that share values."""
        paired = 2 if self.head_out == "differential" else 1
        return self.n_head // paired, self.head_width * paired


def is_number(text: str) -> bool:
    """True if `text` is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def is_varied(value: Any) -> bool:
    """True for a value that is written layer by layer."""
    return isinstance(value, str) and bool(re.search(r"[\s*(]", value))


def by_layer(key: str, text: str, kind: Any, n_layer: int) -> list[Any]:
    """What `key` is in each layer: "a*3 b" three times a, then b; "a*25% b" a quarter; "cycle(a*3 b)" over and over.

    Raises ValueError where that does not fit n_layer, or an entry is not of type `kind`.
    """
    inside = re.fullmatch(r"\s*cycle\((.*)\)\s*", text)
    entries = (inside[1] if inside else text).split()
    values: list[Any] = []
    for i, entry in enumerate(entries):
        value, counted, count = entry.partition("*")
        share = count.endswith("%")
        try:
            n = round(float(count.removesuffix("%")) * n_layer / 100) if share else int(count) if counted else 1
            read = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError, TypeError):
            raise ValueError(f"{key}={text!r}: {entry!r} is not a value of {key}, or value*count") from None
        n = max(1, n) if share else n
        if not inside and not counted and i == len(entries) - 1:
            n = n_layer - len(values)  # the last entry fills what is left
        if n < 1:
            raise ValueError(f"{key}={text!r} leaves no layer of {n_layer} for {entry!r}")
        values += [read] * n
    fits = 0 < len(values) <= n_layer if inside else len(values) == n_layer
    if not fits:
        raise ValueError(f"{key}={text!r} is of {len(values)} layers and does not fit n_layer={n_layer}")
    return (values * n_layer)[:n_layer]


@dataclass
class Context:
    """What a part may read beside its input. Made anew for each pass; the registers stand in front of the tokens."""

    ids: Tensor  # (B, T), without registers
    embedding: Tensor  # (B, n_register + T, C), of tokens and registers, without positions: not yet the stream
    positions: Tensor  # (T,), of the tokens
    left: dict[str, Any] = field(default_factory=dict)  # what layers leave for later ones
    losses: dict[str, Tensor] = field(default_factory=dict)  # of this pass, by name, for train.py's `losses`
    scalars: dict[str, Tensor] = field(default_factory=dict)  # of this pass, by name, for log.jsonl

    def add_loss(self, name: str, value: Tensor) -> None:
        """Adds to an auxiliary loss: a mean over sequences, so that it is the same however these are batched."""
        self.losses[name] = self.losses.get(name, 0) + value


Part = Callable[[GPTConfig, int], nn.Module]  # (config of the layer, its number from 0)


class StreamLinear(nn.Linear):
    """The matrix of a sub-layer whose output is added to the stream: init_scale says how it starts."""


class Apply(nn.Module):
    """A function without weights, as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


# ---------------------------------------------------------------------------------------------- norms


class DyT(nn.Module):
    """w * tanh(a x) + b (Zhu et al. 2025), a learned scalar."""

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
    """DyT as in Sun et al. 2026: alpha 0.8 around attention, 0.2 around the FFN, and the last norm stays RMSNorm."""
    if role == "final":
        return rmsnorm(config, size, role)
    return DyT(size, {"attn": 0.8, "ffn": 0.2}[role], config.norm_gain, config.bias)


# name -> constructor(config, size, role), role attn, ffn or final
NORMS = {"layernorm": layernorm, "rmsnorm": rmsnorm, "dyt": dyt}


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


class QKNorm(nn.Module):
    """Normalises queries and keys (B, T, H, D): each head by itself, or over the full heads x width."""

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
    """update * scale, a parameter with one entry per channel or one in all."""

    def __init__(self, size: int, init: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((size,), init))

    def forward(self, update: Tensor) -> Tensor:
        return self.scale * update


def fixed_scale(scale: float) -> nn.Module:
    """update * scale, a constant."""
    return Apply(lambda update: scale * update)


# The multiplier of each update in the forward pass, or a fixed number. L = n_layer: 2L updates are added to the stream.
# deepnorm (Wang et al. 2022): LN(a x + f(x)) with a = (2L)^1/4 is written LN(x + f(x) / a), the same function of x.
RESIDUAL_SCALES = {
    "one": lambda c: nn.Identity(),
    "inv_sqrt_2L": lambda c: fixed_scale((2 * c.n_layer) ** -0.5),
    "deepnorm": lambda c: fixed_scale((2 * c.n_layer) ** -0.25),
    "learned": lambda c: LearnedScale(c.n_embd, 0.1),  # LayerScale (Touvron et al. 2021), its init for <= 18 layers
    "rezero": lambda c: LearnedScale(1, 0.0),  # Bachlechner et al. 2020
}


def residual_scale(config: GPTConfig) -> nn.Module:
    """The module of config.residual_scale: a name of RESIDUAL_SCALES or a number."""
    named = RESIDUAL_SCALES.get(config.residual_scale)
    return named(config) if named else fixed_scale(float(config.residual_scale))


# ------------------------------------------------------------------------------------------- positions


class LearnedPosition(nn.Embedding):
    """A learned vector per position (GPT-2's wpe)."""

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__(config.block_size, config.n_embd)


class Sinusoid(nn.Module):
    """sin and cos of position x 10000^(-2i/C) (Vaswani et al. 2017), scaled to the rms of a new token embedding."""

    table: Tensor

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        angles = torch.outer(
            torch.arange(config.block_size), 1e4 ** (-torch.arange(0, config.n_embd, 2) / config.n_embd)
        )
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, : config.n_embd]
        std = EMBEDDING_INITS[config.embedding_init](config)[0]
        self.register_buffer("table", std * math.sqrt(2) * table, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        return self.table[positions]


class Rotary(nn.Module):
    """RoPE (Su et al. 2021), the two halves of a head rotated against each other as in Llama."""

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
            left, right = x.chunk(2, dim=-1)
            return x * cos + torch.cat((-right, left), dim=-1) * sin

        return rotate(q), rotate(k)


def alibi_slopes(n_head: int) -> Tensor:
    """ALiBi's slope per head (Press et al. 2022): 2^(-8i/n); beyond a power of 2, every other one of twice as many."""
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return torch.tensor(slopes + [2 ** (-4 * i / power) for i in range(1, 2 * (n_head - power), 2)])


NO_EMBEDDING: Part = lambda config, layer: Apply(lambda positions: 0.0)


class Position(NamedTuple):
    """Where a kind of position enters: added to the token embedding, on q and k, or as slopes on the logits."""

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


class RowNormaliser(nn.Module):
    """weights = function(logits), and no slot. `rows`: one, less, any or signed, see Attend."""

    def __init__(self, function: Callable[..., Any], rows: str = "one") -> None:
        super().__init__()
        self.function, self.rows = function, rows

    def forward(self, logits: Tensor, q: Tensor) -> tuple[Tensor, Tensor | float]:
        return self.function(logits), 0.0


class SlotSoftmax(nn.Module):
    """Softmax over the keys and one slot more that holds no token; the keys' weights sum to less than one.

    The slot's logit: 0 (softmax-off-by-one, Miller 2023), learned per head (GPT-OSS), or q k* with a learned key (Gu et
    al. 2024's K bias); its value: 0, or learned (KV bias).
    """

    rows = "slot"

    def __init__(
        self, config: GPTConfig, layer: int, logit: bool = False, key: bool = False, value: bool = False
    ) -> None:
        super().__init__()
        H, D = config.n_head, config.head_width
        self.logit = nn.Parameter(torch.zeros(H)) if logit else None
        self.key = nn.Parameter(torch.zeros(H, D)) if key else None
        self.value = nn.Parameter(torch.zeros(H, config.out_heads[1])) if value else None

    def flops(self, T: int) -> int:
        """Of q k*."""
        return 0 if self.key is None else 6 * self.key.numel()

    def forward(self, logits: Tensor, q: Tensor) -> tuple[Tensor, Tensor | float]:
        slot = torch.zeros_like(logits[..., :1])  # (B, H, R, 1)
        if self.logit is not None:
            slot = slot + self.logit[:, None, None]
        if self.key is not None:
            slot = q @ self.key[:, :, None] / math.sqrt(q.size(-1))
        weights = torch.cat((logits, slot), dim=-1).softmax(dim=-1)
        extra = 0.0 if self.value is None else weights[..., -1:] * self.value[:, None]  # (B, H, R, D)
        return weights[..., :-1], extra


def softpick(logits: Tensor) -> Tensor:
    """relu(e^x - 1) / sum |e^x - 1| (Zuhri et al. 2025), summed over the keys that a query sees.

    Summed over all T, as the paper prints it, hidden keys (e^-inf) count 1 each: then what a query gets depends on how
    many tokens follow it.
    """
    largest = logits.amax(dim=-1, keepdim=True).clamp_min(0)
    powers = ((logits - largest).exp() - (-largest).exp()).masked_fill(logits.isneginf(), 0)
    return powers.relu() / (powers.abs().sum(dim=-1, keepdim=True) + 1e-6)


# name -> module: logits (B, H, R, T), q (B, H, R, D) -> weights (B, H, R, T), what the slot adds to the output
ATTENTIONS: dict[str, Part] = {
    "softmax": lambda c, layer: RowNormaliser(lambda logits: logits.softmax(dim=-1)),
    "softmax1": SlotSoftmax,
    "sink_logit": functools.partial(SlotSoftmax, logit=True),
    "k_bias": functools.partial(SlotSoftmax, key=True),
    "kv_bias": functools.partial(SlotSoftmax, key=True, value=True),
    # clip((zeta - gamma) softmax + gamma, 0, 1), zeta 1, gamma -0.03 (Bondarenko et al. 2023): exact zeros
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
    """Keys or values (B, heads of them, T, D) as each of `n_head` heads has them: (B, n_head, T, D)."""
    return x if x.size(1) == n_head else x.repeat_interleave(n_head // x.size(1), dim=1)


class Attend(nn.Module):
    """The attention seam: (q, k, v, bias) -> out. Instruments hook this module.

    A hook sees q, k, v; `shares` gives any chunk of rows of the attention map; a pre-hook may pass `bias`. `rows`: what
    the rows that it gives are: "one", they sum to one; "slot", to at most one, a slot has the rest; "less", to at most
    one, and nothing has the rest; "signed", to anything, of either sign. Where weights may sum to anything ("any"), the
    rows are the weights divided by their sum, and "one".
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
        """What causality, the window and ALiBi add to the logits of queries first ... first + R - 1: ([H,] R, T)."""
        distance = torch.arange(first, first + R, device=device)[:, None] - torch.arange(T, device=device)
        hidden = (distance < 0) | (distance >= self.window) if self.window else distance < 0
        mask = torch.zeros(R, T, device=device) if self.slopes is None else -self.slopes * distance
        return mask.masked_fill(hidden, -torch.inf)

    @property
    def rows(self) -> str:
        """See above."""
        rows = str(self.normalise.rows)
        return "one" if rows == "any" else rows

    def flops(self, T: int) -> int:
        """Training FLOPs per query: of q k and the weights times v, over the keys that the last query sees."""
        return 6 * self.width * min(T, self.window or T) + flops_of(self.normalise, T)

    def seen(self, first: int, R: int, T: int) -> Tensor:
        """Which of the first T keys the queries first ... first + R - 1 see: bool (R, T)."""
        return self.mask(first, R, T, "cpu" if self.slopes is None else self.slopes.device).isfinite().view(-1, R, T)[0]

    def weights(
        self, q: Tensor, k: Tensor, first: int = 0, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | float]:
        """Weights (B, H, R, T) of the queries q (B, H, R, D), the first at position `first`, and the slot's output.

        `bias` broadcasts to (B, H, 1, T): added to the logit of a key for every query but the one at the key's own
        position, so that a masked (-inf) first key leaves no empty row.
        """
        R, T = q.size(-2), k.size(-2)
        logits = q @ for_heads(k, q.size(1)).transpose(-2, -1) / math.sqrt(q.size(-1)) + self.mask(
            first, R, T, q.device
        )
        if bias is not None:
            own = torch.arange(first, first + R, device=q.device)[:, None] == torch.arange(T, device=q.device)
            logits = logits + torch.where(own, 0.0, bias)
        return self.normalise(logits, q)

    def shares(self, q: Tensor, k: Tensor, first: int = 0, bias: Tensor | None = None) -> Tensor:
        """The attention map (B, H, R, T) as reported: the part of its attention that a query gives to each key.

        These are the weights, so rows sum to less than one where a slot takes some. Weights that may sum to anything
        (sigmoid, ReLU) are divided by their row's sum; a row of zeros stays zero.
        """
        weights, _ = self.weights(q, k, first, bias)
        if self.normalise.rows == "any":
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-30)
        return weights

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, chunk: int = 256) -> Tensor:
        """q (B, H, T, D), k (B, n_kv_head, T, D), v of as many heads or fewer, of any width -> (B, H, T, width of v).

        Softmax without a bias uses PyTorch's fused kernels, but not to train on a CPU, where matrix products are 2 to 5
        times as fast (and under autocast give logits in bfloat16, as other eager attention does). What is not fused
        makes the map `chunk` queries at a time, over the keys that they see; of sequences longer than that it is made
        again for the backward pass rather than kept.
        """
        dropout, T = self.dropout if self.training else 0.0, q.size(-2)
        fused = self.kind == "softmax" and bias is None and not (self.training and q.device.type == "cpu")
        v = for_heads(v, k.size(1)) if fused else v
        if fused and self.slopes is None and not self.window:
            grouped = k.size(1) < q.size(1)
            return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, enable_gqa=grouped)
        chunk = T if fused and self.training else chunk
        rows_of = self._fused_rows if fused else self._rows
        if torch.is_grad_enabled() and not fused and not dropout and chunk < T:
            rows_of = functools.partial(checkpoint, rows_of, use_reentrant=False, preserve_rng_state=False)
        rows = []
        for first in range(0, T, chunk):
            part = q[:, :, first : first + chunk]
            seen = first + part.size(-2)
            some = None if bias is None else bias[..., :seen]
            rows.append(rows_of(part, k[:, :, :seen], v[:, :, :seen], first, some, dropout))
        return torch.cat(rows, dim=-2)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, first: int, bias: Tensor | None, dropout: float) -> Tensor:
        """Output of the queries q (B, H, R, D), the first at position `first`, over the keys up to the last of them."""
        weights, slot = self.weights(q, k, first, bias)
        return F.dropout(weights, dropout, self.training).to(v.dtype) @ for_heads(v, q.size(1)) + slot

    def _fused_rows(self, q: Tensor, k: Tensor, v: Tensor, first: int, bias: Tensor | None, dropout: float) -> Tensor:
        """The same by PyTorch's kernels, for a mask that they do not know."""
        mask = self.mask(first, q.size(-2), k.size(-2), q.device).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=k.size(1) < q.size(1))


class Gate(nn.Module):
    """out * sigmoid(W source), out (B, T, H, D), one gate per entry of `shape` (Qiu et al. 2025; Sun et al. 2026)."""

    def __init__(self, config: GPTConfig, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        width, self.source, self.of_tokens = GATE_INPUTS[config.gate_input]
        self.c_gate = nn.Linear(width(config), math.prod(shape), bias=config.bias)

    def flops(self, T: int) -> int:
        """None where the gate is the same for all sequences."""
        return 6 * self.c_gate.weight.numel() if self.of_tokens else 0

    def forward(self, out: Tensor, x: Tensor, context: Context) -> Tensor:
        source = self.source(x, context, self.c_gate.in_features)
        return out * torch.sigmoid(self.c_gate(source)).unflatten(-1, self.shape)


GATES: dict[str, Part] = {
    "none": lambda c, layer: Apply(lambda out, x, context: out),
    "channel": lambda c, layer: Gate(c, c.out_heads),
    "head": lambda c, layer: Gate(c, (c.out_heads[0], 1)),
    "single": lambda c, layer: Gate(c, (1, 1)),
}

# name -> what a gate is linear in: (its width, the source, whether that differs between sequences), given the
# attention's input x
GATE_INPUTS = {
    "input": (lambda c: c.n_embd, lambda x, context, width: x, True),  # conditional
    "constant": (lambda c: 1, lambda x, context, width: x.new_ones(1), False),
    "position": (
        lambda c: c.n_register + c.block_size,
        lambda x, context, width: torch.eye(width, device=x.device)[: x.size(1)],
        False,
    ),
    "token": (lambda c: c.n_embd, lambda x, context, width: context.embedding, True),
}


def residual_value(v: Tensor, context: Context) -> Tensor:
    """(v + the first layer's v) / 2, which in the first layer is v (Zhou et al. 2024, ResFormer)."""
    return 0.5 * (v + context.left.setdefault("value", v))


# name -> values (B, n_kv_head, T, D) as attention has them, given the context
VALUES = {"own": lambda v, context: v, "residual": residual_value}


class HeadRMSNorm(nn.Module):
    """Each head's output (B, T, H, D) by its own rms (2605.06611: position by position the same variance)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.head_width, config.norm_eps, elementwise_affine=config.norm_gain)

    def forward(self, out: Tensor) -> Tensor:
        return self.norm(out)


class Differential(nn.Module):
    """Head 2i less lambda times head 2i + 1, which share values, then a norm (Ye et al. 2024, 2410.05258).

    lambda = exp(lq1 lk1) - exp(lq2 lk2) + l0, l0 = 0.8 - 0.6 exp(-0.3 layer). The two maps of a pair are heads of their
    own to instruments: each is a softmax.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.vectors = nn.Parameter(0.1 * torch.randn(4, config.head_width))  # lq1, lk1, lq2, lk2
        self.norm = nn.RMSNorm(2 * config.head_width, config.norm_eps, elementwise_affine=config.norm_gain)

    def forward(self, out: Tensor) -> Tensor:
        """(B, T, H, 2D) -> (B, T, H/2, 2D)."""
        q1, k1, q2, k2 = self.vectors.float()
        factor = (q1 @ k1).exp() - (q2 @ k2).exp() + self.start
        first, second = out.unflatten(-2, (-1, 2)).unbind(-2)
        return (1 - self.start) * self.norm(first - factor.to(out.dtype) * second)


# name -> module: the outputs of heads (B, T, H, width of values) -> (B, T, *out_heads)
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
        """Queries (B, H, T, D), keys (B, n_kv_head, T, D) and the layer's own values, alike or of pairs of heads."""
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
    """c_proj(act(c_gate(x)) * c_fc(x)) (Shazeer 2020); hidden width 8C/3 to the nearest 8: a plain FFN's parameters."""

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
    """c_proj(x): one matrix, no hidden layer."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.c_proj = StreamLinear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.c_proj(x)


class MoE(nn.Module):
    """A token goes to the n_active of n_expert gated FFNs that a router prefers, weighed by its softmax over these
    (Mixtral, Jiang et al. 2024). The active experts together are as wide as one gated FFN.

    Leaves the loss "load_balance": n_expert * sum_e f_e p_e, f_e expert e's share of a sequence's choices and p_e its
    mean probability there (Fedus et al. 2022; by sequence, as DeepSeek-V2): 1 where all are used alike. Summed over
    layers. And the scalar "busiest_expert": the largest f_e of the batch, of the last such layer.

    Is not compiled: how many tokens an expert gets is not known before the pass.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_active = config.n_active
        hidden = max(1, (config.ffn_hidden or 8 * round(config.n_embd / 3)) // config.n_active)
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(GatedFFN(config, layer, hidden) for _ in range(config.n_expert))

    def flops(self, T: int) -> int:
        """Of the router and the active experts."""
        return flops_of(self.router, T) + self.n_active * flops_of(self.experts[0], T)

    @torch.compiler.disable
    def forward(self, x: Tensor, context: Context) -> Tensor:
        logits = self.router(x)
        precise = torch.promote_types(logits.dtype, torch.float32)
        probabilities = logits.to(precise).softmax(dim=-1)  # (B, T, experts)
        weights, chosen = probabilities.topk(self.n_active, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):  # one without tokens is called too, so that it has a gradient
            *tokens, slot = (chosen == number).nonzero(as_tuple=True)
            given = weights[*tokens, slot, None] * expert(x[*tokens], context)
            out.index_put_(tuple(tokens), given.to(out.dtype), accumulate=True)
        n_expert = len(self.experts)
        share = F.one_hot(chosen, n_expert).to(precise).mean(dim=(1, 2))  # (B, experts)
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

MAX_LOGITS_BYTES = {"cpu": 2**26, "cuda": 2**30}  # of the logits in float32 that are held at a time

# logits (R, V) in float32, targets (R,) -> the summed loss (); targets of -1 count nothing
RowLoss = Callable[[Tensor, Tensor], Tensor]


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) (Gemma 2); a cap of 0 is none."""
    return cap * torch.tanh(logits / cap) if cap else logits


def slope_and_loss(loss_of_rows: RowLoss, logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The gradient of the summed loss by `logits` (R, V), in their dtype, and that loss, of the capped logits."""
    return torch.func.grad_and_value(lambda rows: loss_of_rows(soft_cap(rows.float(), cap), targets))(logits)


class ChunkedLoss(torch.autograd.Function):
    """Mean loss of logits x weight^T that are never held whole: a chunk of rows at a time, its gradient at once.

    x (N, C), weight (V, C), targets (N,); `slope_of(logits, targets)` is `slope_and_loss` of a loss and a cap. The
    products are taken in `dtype`, sums and the gradient of the weight in float32. Can be differentiated once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, slope_of: Callable[..., Any], dtype: torch.dtype
    ) -> Tensor:
        small, w = x.detach().to(dtype), weight.detach().to(dtype)
        loss, n = torch.zeros((), device=x.device), (targets >= 0).sum()
        wanted = any(ctx.needs_input_grad)
        if wanted:
            dx, dw = torch.empty_like(small), torch.zeros_like(weight)
        n_chunks = -(-4 * len(weight) * len(x) // MAX_LOGITS_BYTES.get(x.device.type, MAX_LOGITS_BYTES["cuda"]))
        at_once = -(-len(x) // n_chunks)
        for first in range(0, len(x), at_once):
            part = slice(first, first + at_once)
            slope, its_loss = slope_of(small[part] @ w.t(), targets[part])
            loss += its_loss
            if wanted:
                torch.mm(slope, w, out=dx[part])
                for its_dw, of_words in zip(dw.split(8192), slope.split(8192, dim=1), strict=True):
                    its_dw.add_(of_words.t() @ small[part])
        ctx.gradients, ctx.n, ctx.dtype = (dx, dw) if wanted else None, n, x.dtype
        return loss / n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (dx, dw), ctx.gradients = ctx.gradients, None
        scale = gradient / ctx.n
        return dx.to(ctx.dtype) * scale, dw.mul_(scale), None, None, None


# ------------------------------------------------------------------------------------------------ init

INIT_STD = 0.02


def init_matrices(module: nn.Module, std: float = INIT_STD, stream: float = 1.0) -> None:
    """Matrices and embeddings in `module` N(0, std), a StreamLinear's std times `stream`; biases 0. A module with
    `init(std)` is asked to do it; norms, scales and other vectors start as they are made."""
    own = getattr(module, "init", None)
    if own:
        own(std)
    elif isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std * (stream if isinstance(module, StreamLinear) else 1.0))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    else:
        for child in module.children():
            init_matrices(child, std, stream)


def deepnorm_init(block: nn.Module, n_layer: int) -> None:
    """Xavier, with gain (8L)^-1/4 on values, what writes to the stream and FFN (Wang et al. 2022, decoder-only)."""
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


# name -> what starts the matrices of a block, given n_layer
INIT_SCALES: dict[str, Callable[[nn.Module, int], None]] = {
    "one": lambda block, n_layer: init_matrices(block),
    "inv_sqrt_2L": lambda block, n_layer: init_matrices(block, stream=(2 * n_layer) ** -0.5),  # GPT-2
    "deepnorm": deepnorm_init,
}
# name -> (std of embeddings, of the unembedding)
EMBEDDING_INITS: dict[str, Callable[[GPTConfig], tuple[float, float]]] = {
    "small": lambda c: (INIT_STD, INIT_STD),
    "unit": lambda c: (1.0, c.n_embd**-0.5),  # Sun et al. 2026, with tie=False and init_scale=one
}

# ----------------------------------------------------------------------------------------------- FLOPs


def flops_of(module: nn.Module, T: int) -> int:
    """Training FLOPs per token of a module at sequence length T: 6 per weight of a matrix, as often as it stands there;
    a module with `flops(T)` is asked."""
    own = getattr(module, "flops", None)
    if own:
        return own(T)
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
    """x = clip(norm_after(x + scale * norm_update(f(norm_before(x))))), f attention or an FFN.

    Slots that are not used are identities. Two taps for hooks: `update`, what is added to the stream, and `stream`,
    the stream after it.
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
    """An attention sub-layer, then an FFN sub-layer."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = SubLayer(config, SelfAttention(config, layer), "attn")
        self.mlp = SubLayer(config, FFNS[config.ffn](config, layer), "ffn")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.mlp(self.attn(x, context), context)


class Transformer(nn.ModuleDict):
    """The parts of a GPT up to the unembedding, by nanoGPT's names."""

    wte: nn.Embedding  # tokens
    wpe: nn.Module  # positions
    registers: nn.Embedding  # where the config has some
    drop: nn.Dropout
    stream: nn.Identity  # tap: the stream before the first block
    h: nn.ModuleList
    ln_f: nn.Module


class GPT(nn.Module):
    """Embedding, n_layer blocks, final norm where the last one's placement has one, and the unembedding.

    `losses` and `scalars`: what the parts of the last pass with targets left of these in its Context.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        first, last = config.layers[0], config.layers[-1]
        final = NORM_PLACES[last.norm_place].final
        self.transformer = Transformer(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": POSITIONS[first.position].embedding(first, 0),
                "drop": nn.Dropout(first.dropout),
                "stream": nn.Identity(),
                "h": nn.ModuleList(Block(of_layer, i) for i, of_layer in enumerate(config.layers)),
                "ln_f": NORMS[last.norm](last, config.n_embd, "final") if final else nn.Identity(),
            }
        )
        if config.n_register:
            self.transformer["registers"] = nn.Embedding(config.n_register, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie:
            self.lm_head.weight = self.transformer.wte.weight
        self._init()
        self.slope_and_loss = slope_and_loss  # perhaps compiled
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
        """What a copy of the model takes over: not what its last pass left."""
        return {**vars(self), "losses": {}, "scalars": {}}

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (B, T) -> logits (B, T, V), None; given targets (B, T) -> None, their mean cross-entropy in nats.

        Targets of -1 are not counted. For another loss, override `loss_of_rows`, from which the gradient follows.
        Raises ValueError if T > block_size.
        """
        B, T = idx.shape
        if self.config.block_size < T:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size={self.config.block_size}")
        net, n_register = self.transformer, self.config.n_register
        embedding, positions = net.wte(idx), torch.arange(T, device=idx.device)
        x = embedding + net.wpe(positions)
        if n_register:  # they stand before the tokens, in front of position 0
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
        slope_of = functools.partial(self.slope_and_loss, self.loss_of_rows, cap=self.config.logit_cap)
        return None, ChunkedLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), slope_of, dtype)

    @torch.no_grad()
    def generate(
        self, ids: Tensor, n: int, temperature: float = 1.0, top_k: int = 0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Token ids (B, T) -> (B, T + n): `n` more, each drawn from softmax(logits / temperature), or with top_k from
        the k likeliest alone. Temperature 0 takes the likeliest.

        Each is a whole pass over the last block_size tokens. Call eval() first where the model has dropout.
        """
        for _ in range(n):
            row = self(ids[:, -self.config.block_size :])[0][:, -1].float()
            if top_k:
                row = row.masked_fill(row < row.topk(min(top_k, row.size(-1))).values[:, -1:], -torch.inf)
            if temperature:
                token = torch.multinomial(
                    ((row - row.amax(-1, keepdim=True)) / temperature).softmax(-1), 1, generator=generator
                )
            else:
                token = row.argmax(-1, keepdim=True)
            ids = torch.cat((ids, token), dim=1)
        return ids

    @staticmethod
    def loss_of_rows(logits: Tensor, targets: Tensor) -> Tensor:
        """The summed cross-entropy in nats of logits (R, V), float32; targets (R,), of which those of -1 count 0."""
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")

    def compile_sublayers(self, **kwargs: Any) -> None:
        """Compiles the sub-layers and the loss in place, each by itself; `kwargs` go to torch.compile.

        Sub-layers of a kind share one compilation, and what is hooked between them, not inside, still sees the stream.
        """
        torch._dynamo.config.recompile_limit = 64  # per function: sub-layers of all arms and modes are one to it
        for sub_layer in self.sub_layers():
            sub_layer.forward = torch.compile(sub_layer.forward, dynamic=False, **kwargs)  # type: ignore[method-assign]
        self.slope_and_loss = torch.compile(slope_and_loss, dynamic=False, **kwargs)

    def sub_layers(self) -> list[SubLayer]:
        """The sub-layers in order: attention and FFN of each block."""
        return [m for m in self.transformer.h.modules() if isinstance(m, SubLayer)]

    def num_params(self) -> int:
        """Parameters, as nanoGPT counts them: without learned positions."""
        wpe = self.transformer.wpe
        position = wpe.weight.numel() if isinstance(wpe, LearnedPosition) else 0
        return sum(p.numel() for p in self.parameters()) - position

    def flops_per_token(self, T: int) -> int:
        """Training FLOPs per token at sequence length T: 6 per weight of a matrix, 12 H D T' per attention.

        As in appendix B of PaLM, with T' at most the window, and the registers' passes shared out over the tokens.
        Embedding look-ups are free, the unembedding is not.
        """
        whole = self.config.n_register + T
        return flops_of(self.transformer, whole) * whole // T + flops_of(self.lm_head, T)

    def optimiser_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """nanoGPT's groups: matrices and embeddings decay, all else (biases, norms, scales, keys of slots) does not.

        A group may have an `lr_scale`, by which its learning rate is multiplied.
        """
        decays = {id(m.weight) for m in self.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in parameters if id(p) in decays], "weight_decay": weight_decay},
            {"params": [p for p in parameters if id(p) not in decays], "weight_decay": 0.0},
        ]

    def block_matrices(self) -> list[Tensor]:
        """The weight matrices inside the blocks: what Muon updates."""
        return [m.weight for m in self.transformer.h.modules() if isinstance(m, nn.Linear)]

    @classmethod
    def from_checkpoint(cls, saved: Any) -> "GPT":
        """The model of a checkpoint: of its `model_args`, the fields of GPTConfig, and its state dict `model`."""
        model = cls(GPTConfig(**saved.model_args))
        model.load_state_dict(saved.model)
        return model

    @classmethod
    def from_pretrained(cls, name_or_path: str, **kwargs: Any) -> "GPT":
        """GPT-2 or Llama weights from the Hugging Face hub or a local folder (`pip install spikesink[hf]`).

        `kwargs` go to transformers' `from_pretrained`. Raises UserError where the model cannot be had whole, ValueError
        where its architecture is not one this class computes.
        """
        from spikesink.models import convert, hf

        return cls.from_checkpoint(convert.from_hf(hf.open_model(name_or_path, **kwargs)))
