"""What the instruments need of a model: residual-stream taps, attention seams, token text."""

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

CHUNK_BYTES = 2**20  # of one chunk of rows of an attention map: what stays in a core's cache
SEAM = "_spikesink_seam"  # the attribute of a transformers attention module that holds its seam, once called
PLACES = {
    "normed": "the input of attention or FFN, after the norm before it",
    "output": "the output of attention or FFN, before any norm",
    "update": "what is added to the stream, after any norm of the update",
}


SEAM_NEEDS = ("shares", "weights", "seen", "rows")


class Seam(Protocol):
    """An attention seam, as Subject describes it, but for the call that makes it a module.

    `rows`: what the rows of its map are: "one", they sum to one; "slot", to at most one, a slot that is no token has
    the rest; "less", to at most one, and nothing has the rest.
    """

    @property
    def rows(self) -> str:
        """See above."""

    def seen(self, first: int, R: int, T: int) -> torch.Tensor:
        """Which of the first T keys the queries first ... first + R - 1 see: bool (R, T)."""

    def shares(
        self, q: torch.Tensor, k: torch.Tensor, first: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows of the attention map."""

    def weights(
        self, q: torch.Tensor, k: torch.Tensor, first: int = 0, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        """What its values are multiplied with, what a slot adds."""


def rows_at_once(q: torch.Tensor, k: torch.Tensor) -> int:
    """How many queries of q (B, H, T, D) to take at a time, so that their rows over the keys k about fit CHUNK_BYTES.

    At least 16: fewer rows would read every key again for too little work.
    """
    return max(16, CHUNK_BYTES // (4 * q.size(0) * q.size(1) * k.size(-2)))


def for_heads(x: torch.Tensor, n_head: int) -> torch.Tensor:
    """Keys or values (B, heads of keys, ...) as each of `n_head` query heads sees them: (B, n_head, ...)."""
    return x if x.size(1) == n_head else x.repeat_interleave(n_head // x.size(1), dim=1)


def map_rows(
    seam: Seam,
    q: torch.Tensor,
    k: torch.Tensor,
    causal: bool,
    bias: torch.Tensor | None = None,
    rows_of: Callable[..., Any] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yields (first query, its and the next ones' rows of the map (B, H, R, keys)), some at a time, over all queries.

    Under causal attention the rows end at the last key that any of them sees. float32. `rows_of`: what makes them, by
    default seam.shares.
    """
    q, k = q.float(), for_heads(k.float(), q.size(1))
    rows_of = rows_of or seam.shares
    rows = rows_at_once(q, k)
    for first in range(0, q.size(-2), rows):
        part = q[:, :, first : first + rows]
        seen = first + part.size(-2) if causal else k.size(-2)
        yield first, rows_of(part, k[:, :, :seen], first, None if bias is None else bias[..., :seen])


def attention_received(seam: Seam, q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    """The attention mass (B, H, keys) that each key gets, summed over the queries of q (B, H, T, D). float32."""
    received = q.new_zeros(*q.shape[:2], k.size(-2), dtype=torch.float32)
    for _, weights in map_rows(seam, q, k, causal):
        received[..., : weights.size(-1)] += weights.sum(-2)
    return received


def after_start(ids: torch.Tensor, start: int) -> torch.Tensor:
    """A decoder's input that teaches it to give ids (B, T): they, one later, after the token `start`."""
    return torch.cat((torch.full_like(ids[:, :1], start), ids[:, :-1]), dim=1)


def batches(ids: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (sequence numbers, their ids (B, T)), at most `batch_size` sequences of one length at a time.

    Padding is cut off, so that no model ever sees it and it enters no statistic.
    """
    lengths = (ids != PADDING).sum(1)
    for length in lengths.unique().tolist():
        for rows in (lengths == length).nonzero()[:, 0].split(batch_size):
            some = ids[rows]
            yield rows, some[some != PADDING].view(len(rows), length)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's input goes."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


@dataclass(frozen=True)
class GatedFFN:
    """Weights of c_proj(act(c_gate x) * c_fc x), whose input is norm(stream): gate and up (M, C), down (C, M)."""

    layer: int
    gate: Callable[[], torch.Tensor]
    up: Callable[[], torch.Tensor]
    down: Callable[[], torch.Tensor]
    gain: Callable[[], torch.Tensor]  # of the norm before it (C,)


@dataclass(frozen=True)
class Subject:
    """A model under observation, or one part of it.

    `streams`: the taps, in the order of the forward pass: the stream's **sum** (what was there plus the update) after
    the embedding and after each sub-layer, before a norm on the stream itself (post-norm). `reads`: as many, what the
    next sub-layer **reads** of that sum, behind whatever norm stands between; None where that is not known. `inner`:
    taps off the stream, a list per place (PLACES),
    each in the same order; a sub-layer whose parts could not be told apart has none. `attends`: the attention seams,
    whose module is called as (q, k, v, bias=None) with q (B, H, T, D) and has `shares(q, k, first, bias)` -> rows of
    the map (B, H, R, T), and `weights`, alike -> (what its values are multiplied with, what a slot adds). `n_register`:
    learned tokens that stand before every sequence, in the streams and the maps; instruments number them -1, -2, ...
    where token ids stand. `decode`: one token id -> text.

    `logits`: token ids (B, T) -> (B, T, V); without a language-model head (`has_loss` is False) whatever the model
    returns. `shift`: how far ahead they predict, 1 for a causal model, 0 where they
    are of the token itself (a masked model; the decoder of an encoder-decoder, whose input is shifted already).
    `causal`: a query sees no later key. An encoder-decoder is three subjects: `part` is encoder, decoder or cross (the
    decoder's attention to the encoder's tokens, with the encoder's streams). `start`: the decoder's first token.
    `stages`: the modules that hand the stream on, one after the other: sub-layers or blocks; of an encoder-decoder,
    the encoder's, then the decoder's, whatever the part. They hold all weights but the embeddings, the last norm and
    the unembedding, and what one returns depends on the ids and on those before it alone.
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
    # of CleanPass.why_whole: nothing yet, then '' or why passes are made whole
    whole_passes: list[str] = field(default_factory=list)

    @classmethod
    def of_gpt(cls, model: Any, decode: Callable[[int], str]) -> "Subject":
        """A GPT of model.py (recognised by its taps, not imported). Raises UserError where its attention lacks what a
        Seam has."""
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
                        f"the attention of this model.py has no {' and no '.join(missing)}, which instruments of this "
                        "version ask for: take them over from the class Attend of ours"
                    )
                seams.append(Tap(layer, kind, f.attend))
            gated += gated_ffn(layer, f, sub_layer.norm_before)
        model.eval()
        config = model.config
        return cls(
            model,
            streams,
            seams,
            config.n_head,
            config.n_register,
            decode,
            lambda ids: model(ids)[0],
            [*inner["normed"], None],
            inner,
            gated,
            rebuild=lambda: cls.of_gpt(type(model)(config).to(next(model.parameters())), decode),
            stages=stages,
        )

    @functools.cached_property
    def _stage_of(self) -> dict[nn.Module, int]:
        inside = lambda stage: (m for module in stage.modules() for m in (module, getattr(module, SEAM, module)))
        return {module: i for i, stage in enumerate(self.stages) for module in inside(stage)}

    @property
    def attended(self) -> slice:
        """The taps whose stream some attention reads: all but the last, which is there for the unembedding, unless a
        decoder attends to it."""
        return slice(0, len(self.streams) if self.part in ("encoder", "cross") else -1)

    @property
    def attended_taps(self) -> range:
        """The numbers of these taps."""
        return range(len(self.streams))[self.attended]

    @property
    def writable(self) -> list[Tap]:
        """The taps of the stream where an edit reaches every later module."""
        return [tap for tap in self.streams if tap.writable]

    def stage_of(self, tap: Tap) -> int:
        """The first stage that what is written at a tap can change; 0 for one before all of them."""
        return self._stage_of.get(tap.module, 0)

    @property
    def heads(self) -> list[str]:
        """Names of the L x H heads: '0.3' is head 3 of attn 0; other seams keep their kind, 'ffn 0.3'."""
        return [f"{tap.name.removeprefix('attn ')}.{head}" for tap in self.attends for head in range(self.n_head)]

    @property
    def loss_of(self) -> str:
        """Of which token the loss is."""
        if not self.has_loss:
            return "nothing: no language-model head"
        return "the next token" if self.shift else "each token, none masked"

    @property
    def device(self) -> torch.device:
        """Where the model's input goes."""
        return device_of(self.model)

    @property
    def dtype(self) -> str:
        """What the model computes in, as its weights have it: 'float32', or several, 'bfloat16, float32'."""
        dtypes = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))

    def seen(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) as the streams and maps have them: the registers' numbers -1, -2, ... or the decoder's
        start token in front."""
        if self.start is not None:
            return after_start(ids, self.start)
        registers = -torch.arange(1, self.n_register + 1).expand(len(ids), -1)
        return torch.cat((registers, ids), dim=1)

    def text(self, token: int) -> str:
        """Text to show for an id of `seen`."""
        return f"<register {-1 - token}>" if token < 0 else self.decode(token)

    @torch.no_grad()
    def losses(self, ids: torch.Tensor) -> torch.Tensor:
        """One forward pass: the loss in nats of each token that is predicted, (B, T - shift), float32 on the CPU; nan
        without a head."""
        ids = ids.to(self.device)
        logits = self.logits(ids)
        if not self.has_loss:
            return torch.full((len(ids), ids.size(1) - self.shift), torch.nan)
        losses = logits.new_empty(len(ids), ids.size(1) - self.shift, dtype=torch.float32)
        for n, of_sequence in enumerate(losses):
            for first in range(0, len(of_sequence), 128):  # few rows at a time: logits are by far the largest tensor
                last = min(first + 128, len(of_sequence))
                targets = ids[n, self.shift + first : self.shift + last].to(logits.device)
                x = logits[n, first:last].float()
                losses[n, first:last] = nn.functional.cross_entropy(x, targets, reduction="none")
        return losses.cpu()


def gpt_in(model: nn.Module) -> Any:
    """The GPT of a model.py in `model`, perhaps wrapped (recognised by its taps, not imported); None without one."""
    tapped = lambda m: isinstance(getattr(m, "transformer", None), nn.ModuleDict) and "stream" in m.transformer
    return next((m for m in model.modules() if tapped(m)), None)


def sub_layers_of(gpt: Any) -> Iterator[tuple[int, str, Any]]:
    """Yields (layer, kind, sub-layer) of a GPT of model.py, in the order of the forward pass."""
    for layer, block in enumerate(gpt.transformer.h):
        yield layer, "attn", block.attn
        yield layer, "ffn", block.mlp


GATED_NAMES = (("c_gate", "c_fc", "c_proj"), ("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"))


def gated_ffn(layer: int, module: nn.Module, norm: nn.Module) -> list[GatedFFN]:
    """[GatedFFN] of a module that names its three matrices as GPT, Llama or T5 do, else []; `norm` stands before it."""
    for names in GATED_NAMES:
        parts = [part for name in names if isinstance(part := getattr(module, name, None), nn.Linear)]
        if len(parts) == len(names):
            gate, up, down = (functools.partial(weight, part) for part in parts)
            return [GatedFFN(layer, gate, up, down, functools.partial(norm_gain, norm, parts[0].in_features))]
    return []


def weight(linear: nn.Linear) -> torch.Tensor:
    """The weight (out, in) of a Linear, float32, from wherever it is."""
    with weights_at_hand(linear):
        return linear.weight.detach().float()


@torch.no_grad()
def norm_gain(norm: nn.Module, size: int) -> torch.Tensor:
    """The gain (C,) of any LayerNorm or RMSNorm, as it acts on x = (1, -1, 1, ...), of mean 0 and rms 1."""
    x = 1.0 - 2.0 * (torch.arange(size) % 2)
    with weights_at_hand(norm):
        x = x.to(next(norm.parameters(), x))
    return (norm(x[None, None]) - norm(-x[None, None]))[0, 0].float() / (2 * x.float())
