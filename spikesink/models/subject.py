"""Subject, a model as the instruments see it: residual-stream taps, attention seams and token text."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import UserError
from ..hooks import Tap
from ..text.sequences import PADDING
from .disk_weights import weights_at_hand

CHUNK_BYTES = 2**20  # size of one chunk of attention-map rows, which fits in a core's cache
SEAM = "_spikesink_seam"  # a transformers attention module has its seam in this attribute, once it was called
PLACES = {
    "normed": "the input of attention or FFN, after the norm before it",
    "output": "the output of attention or FFN, before any norm",
    "update": "the tensor that is added to the stream, after any norm of the update",
}
SEAM_NEEDS = ("shares", "weights", "seen", "rows")


class Seam(Protocol):
    """An attention seam: the methods that a module needs besides its call. Subject describes the call.

    `rows` says what a row of the attention map sums to. "one": to 1. "slot": to at most 1, and the rest goes to a slot
    that is not a token. "less": to at most 1, and the rest goes nowhere.
    """

    @property
    def rows(self) -> str:
        """Either "one", "slot" or "less", as above."""

    def seen(self, first: int, R: int, T: int) -> torch.Tensor:
        """Which of the first T keys each of the queries first ... first + R - 1 sees: bool (R, T)."""

    def shares(
        self, q: torch.Tensor, k: torch.Tensor, first: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows of the attention map (B, H, R, T) for queries first ... first + R - 1. `bias` is added to the logits."""

    def weights(
        self, q: torch.Tensor, k: torch.Tensor, first: int = 0, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        """(the factors of the values (B, H, R, T), what a slot adds to the output)."""


def rows_at_once(q: torch.Tensor, k: torch.Tensor) -> int:
    """How many queries of q (B, H, T, D) to take at a time, so that their rows over the keys k fit into CHUNK_BYTES.
    At least 16, since with fewer rows most of the time goes into reading the keys again."""
    return max(16, CHUNK_BYTES // (4 * q.size(0) * q.size(1) * k.size(-2)))


def for_heads(x: torch.Tensor, n_head: int) -> torch.Tensor:
    """Repeats keys or values (B, key heads, ...) for grouped queries, to (B, n_head, ...)."""
    return x if x.size(1) == n_head else x.repeat_interleave(n_head // x.size(1), dim=1)


def map_rows(
    seam: Seam,
    q: torch.Tensor,
    k: torch.Tensor,
    causal: bool,
    bias: torch.Tensor | None = None,
    rows_of: Callable[..., Any] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yields (first query, rows of the attention map (B, H, R, keys), float32) in chunks, over all queries.
    Under causal attention the rows end at the last key that any of them sees. `rows_of` computes the rows; by default
    it is seam.shares."""
    q, k = q.float(), for_heads(k.float(), q.size(1))
    rows_of = rows_of or seam.shares
    rows = rows_at_once(q, k)
    for first in range(0, q.size(-2), rows):
        part = q[:, :, first : first + rows]
        n_keys = first + part.size(-2) if causal else k.size(-2)
        yield first, rows_of(part, k[:, :, :n_keys], first, None if bias is None else bias[..., :n_keys])


def after_start(ids: torch.Tensor, start: int) -> torch.Tensor:
    """The decoder input for the targets ids (B, T): `start`, then the ids without the last one."""
    return torch.cat((torch.full_like(ids[:, :1], start), ids[:, :-1]), dim=1)


def batches(ids: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (row numbers, ids (B, T)): at most `batch_size` sequences at a time, all of one length. Padding is cut
    off, so that no model sees it and no statistic counts it."""
    lengths = (ids != PADDING).sum(1)
    for length in lengths.unique().tolist():
        for rows in (lengths == length).nonzero()[:, 0].split(batch_size):
            batch = ids[rows]
            yield rows, batch[batch != PADDING].view(len(rows), length)


def device_of(model: nn.Module) -> torch.device:
    """The device that a model's input must be on."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


@dataclass(frozen=True)
class GatedFFN:
    """Weights of c_proj(act(c_gate x) * c_fc x), where x = norm(stream): gate and up (M, C), down (C, M)."""

    layer: int
    gate: Callable[[], torch.Tensor]
    up: Callable[[], torch.Tensor]
    down: Callable[[], torch.Tensor]
    gain: Callable[[], torch.Tensor]  # (C,), the gain of the norm before it


@dataclass(frozen=True)
class Subject:
    """A model that is observed, or one part of it.

    `streams`: taps of the stream's **sum** after the embedding and after each sub-layer, in the order of the forward
    pass. The sum is the stream before plus the update; a norm on the stream itself (post-norm) comes after it. `reads`:
    one tap per stream, of the tensor that the next sub-layer **reads**, behind the norm in between; None if unknown.
    `inner`: for each place of PLACES, taps in the same order; a sub-layer whose parts cannot be told apart has none.
    `attends`: the attention seams. Their module is called as (q, k, v, bias=None) with q (B, H, T, D), and is a Seam.
    `n_register`: how many learned tokens come before every sequence, in the streams and the maps. Where token ids are
    shown they have the numbers -1, -2, ... `decode`: one token id -> text.

    `logits`: token ids (B, T) -> (B, T, V); without a language-model head (`has_loss` is False), the output states
    (B, T, C). `shift`: 1 if the logits predict the next token (a causal model); 0 if they predict the token itself (a
    masked model, or the decoder of an encoder-decoder, whose input is already shifted) or nothing. `causal`: a query
    sees no later key. An
    encoder-decoder is three subjects: `part` is encoder, decoder or cross (the decoder's attention to the encoder's
    tokens, with the encoder's streams). `start`: the decoder's first token.
    `stages`: the sub-layers or blocks that pass the stream on, in order; in an encoder-decoder the encoder's, then the
    decoder's, for every part. They have all weights except the embeddings, the last norm and the unembedding. The
    output of a stage depends only on the ids and the stages before it.
    """

    model: nn.Module
    streams: list[Tap]
    attends: list[Tap]
    n_head: int
    n_register: int
    decode: Callable[[int], str]
    logits: Callable[[torch.Tensor], torch.Tensor]
    reads: list[Tap | None]
    inner: dict[str, list[Tap]] = field(default_factory=lambda: {place: [] for place in PLACES})
    gated: list[GatedFFN] = field(default_factory=list)
    causal: bool = True
    shift: int = 1
    part: str = ""
    start: int | None = None
    has_loss: bool = True
    rebuild: Callable[[], "Subject"] | None = None  # the same model with new random weights
    stages: list[nn.Module] = field(default_factory=list)
    # a cache of CleanPass.why_whole: empty at first, then one string, '' or why every pass runs all stages
    whole_passes: list[str] = field(default_factory=list)

    @classmethod
    def from_gpt(cls, model: Any, decode: Callable[[int], str]) -> "Subject":
        """The Subject of a GPT of model.py, which is recognised by its taps, not imported. Raises UserError if its
        attention lacks a method of Seam."""
        streams, seams, gated, stages = [Tap(-1, "embedding", model.transformer.stream)], [], [], []
        inner: dict[str, list[Tap]] = {place: [] for place in PLACES}
        for layer, kind, sub_layer in sub_layers_of(model):
            f = sub_layer.f
            stages.append(sub_layer)
            inner["normed"].append(Tap(layer, kind, f, "input"))
            inner["output"].append(Tap(layer, kind, f))
            inner["update"].append(Tap(layer, kind, sub_layer.update))
            post = not isinstance(sub_layer.norm_after, nn.Identity)
            streams.append(Tap(layer, kind, *((sub_layer.norm_after, "input") if post else (sub_layer.stream,))))
            if hasattr(f, "attend"):
                missing = [name for name in SEAM_NEEDS if not hasattr(f.attend, name)]
                if missing:
                    raise UserError(
                        f"the attention of this model.py has no {' and no '.join(missing)}, which this version needs: "
                        "copy them from the class Attend of our model.py"
                    )
                seams.append(Tap(layer, kind, f.attend))
            gated += gated_ffn(layer, f, sub_layer.norm_before)
        model.eval()
        n_head, n_register = model.config.n_head, model.config.n_register
        logits, reads = lambda ids: model(ids)[0], [*inner["normed"], None]
        new = lambda: cls.from_gpt(type(model)(model.config).to(next(model.parameters())), decode)
        return cls(
            model, streams, seams, n_head, n_register, decode, logits, reads, inner, gated, rebuild=new, stages=stages
        )

    @functools.cached_property
    def _stage_of(self) -> dict[nn.Module, int]:
        inside = lambda stage: (m for module in stage.modules() for m in (module, getattr(module, SEAM, module)))
        return {module: i for i, stage in enumerate(self.stages) for module in inside(stage)}

    @property
    def attended(self) -> slice:
        """The taps whose stream some attention reads. Except in an encoder, none reads the last one."""
        return slice(0, len(self.streams) if self.part in ("encoder", "cross") else -1)

    @property
    def attended_taps(self) -> range:
        """The indices of the attended taps."""
        return range(len(self.streams))[self.attended]

    @property
    def writable(self) -> list[Tap]:
        """The stream's taps at which an edit reaches every later module."""
        return [tap for tap in self.streams if tap.writable]

    def stage_of(self, tap: Tap) -> int:
        """The index of the first stage that a change at this tap can affect."""
        return self._stage_of.get(tap.module, 0)

    @property
    def heads(self) -> list[str]:
        """Names of the L x H heads. '0.3' is head 3 of attn 0; other seams show their kind, as in 'ffn 0.3'."""
        return [f"{tap.name.removeprefix('attn ')}.{head}" for tap in self.attends for head in range(self.n_head)]

    @property
    def loss_of(self) -> str:
        """Says in words which token the loss is for."""
        if not self.has_loss:
            return "nothing: no language-model head"
        return "the next token" if self.shift else "each token, none masked"

    @property
    def device(self) -> torch.device:
        """The device that the model's input must be on."""
        return device_of(self.model)

    @property
    def dtype(self) -> str:
        """The dtypes of the model's weights, as 'float32' or 'bfloat16, float32'."""
        dtypes = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))

    def stream_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) at the positions of the streams and maps: with the registers' numbers -1, -2, ... in front,
        or shifted behind the decoder's start token."""
        if self.start is not None:
            return after_start(ids, self.start)
        registers = -torch.arange(1, self.n_register + 1).expand(len(ids), -1)
        return torch.cat((registers, ids), dim=1)

    def text(self, token: int) -> str:
        """Text to show for an id of `stream_ids`."""
        return f"<register {-1 - token}>" if token < 0 else self.decode(token)

    def losses(self, ids: torch.Tensor) -> torch.Tensor:
        """Runs one forward pass. Returns the loss of each predicted token in nats: float32 (B, T - shift) on the CPU.
        They are nan without a language-model head."""
        return self.losses_and_states(ids)[0]

    @torch.no_grad()
    def losses_and_states(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs one forward pass. Returns `losses`, and without a language-model head the output states (B, T, C)."""
        ids = ids.to(self.device)
        logits = self.logits(ids)
        if not self.has_loss:
            return torch.full((len(ids), ids.size(1) - self.shift), torch.nan), logits
        losses = logits.new_empty(len(ids), ids.size(1) - self.shift, dtype=torch.float32)
        for n in range(len(losses)):
            for first in range(0, losses.size(1), 128):  # few rows at a time, as the logits are the largest tensor
                last = min(first + 128, losses.size(1))
                targets = ids[n, self.shift + first : self.shift + last].to(logits.device)
                x = logits[n, first:last].float()
                losses[n, first:last] = nn.functional.cross_entropy(x, targets, reduction="none")
        return losses.cpu(), None


def gpt_in(model: nn.Module) -> Any:
    """The GPT of model.py in `model`, which may wrap it; None without one. It is known by its taps, not imported."""
    tapped = lambda m: isinstance(getattr(m, "transformer", None), nn.ModuleDict) and "stream" in m.transformer
    return next((m for m in model.modules() if tapped(m)), None)


def sub_layers_of(gpt: Any) -> Iterator[tuple[int, str, Any]]:
    """Yields (layer, kind, sub-layer) of a GPT of model.py, in the order of the forward pass."""
    for layer, block in enumerate(gpt.transformer.h):
        yield layer, "attn", block.attn
        yield layer, "ffn", block.mlp


GATED_NAMES = (("c_gate", "c_fc", "c_proj"), ("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"))


def gated_ffn(layer: int, module: nn.Module, norm: nn.Module) -> list[GatedFFN]:
    """[GatedFFN] of a module whose three matrices are named as in GPT, Llama or T5, else []. `norm` comes before it."""
    for names in GATED_NAMES:
        parts = [part for name in names if isinstance(part := getattr(module, name, None), nn.Linear)]
        if len(parts) == len(names):
            gate, up, down = (functools.partial(weight, part) for part in parts)
            return [GatedFFN(layer, gate, up, down, functools.partial(norm_gain, norm, parts[0].in_features))]
    return []


def weight(linear: nn.Linear) -> torch.Tensor:
    """The weight (out, in) of a Linear, float32, in memory or on disk."""
    with weights_at_hand(linear):
        return linear.weight.detach().float()


@torch.no_grad()
def norm_gain(norm: nn.Module, size: int) -> torch.Tensor:
    """The gain (C,) of a LayerNorm or RMSNorm, measured on x = (1, -1, 1, ...), which has mean 0 and rms 1."""
    x = 1.0 - 2.0 * (torch.arange(size) % 2)
    with weights_at_hand(norm):
        x = x.to(next(norm.parameters(), x))
    return (norm(x[None, None]) - norm(-x[None, None]))[0, 0].float() / (2 * x.float())
