"""Simulated int8 and int4: the blocks' matrices and their inputs are rounded to few levels; arithmetic stays in float.

    ranges, (for_weights, for_activations) = quantise.Ranges(subject, other_ids), quantise.SCHEMES["per_tensor"]
    with quantise.weights(subject, for_weights), quantise.activations(subject, ranges, for_activations):
        losses = subject.losses(ids)

Outliers break quantisation (Dettmers et al. 2208.07339; Bondarenko et al. 2306.12929): one scale must reach the largest
|x|, so values a few hundred times smaller round to zero. With static scales we also round the residual stream at every
writable tap, as Bondarenko et al. do. With scales per token we do not, as in LLM.int8 and its successors. See NOTE.
Experts in one 3-D tensor are not rounded. In an encoder-decoder we round both stacks' matrices and the part's stream.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..hooks import on_streams
from ..measure import metrics
from ..models.subject import Subject, Tap, batches
from .findings import Int8, LossChange

# number of inputs whose weights share a scale, as in GPTQ (Frantar et al. 2210.17323) and AWQ (Lin et al. 2306.00978)
GROUP = 128


class Rounding(NamedTuple):
    """A way to round. `text` says in words which entries share a scale. `range_of` returns the range (absmax) of each
    entry, which broadcasts: of a weight (out, in), or of an activation (..., C) and its static absmax per channel (C,).
    A `dynamic` one ignores the static absmax."""

    bits: int
    text: str
    range_of: Callable[..., Tensor]
    dynamic: bool = False


def _group_ranges(weight: Tensor) -> Tensor:
    return torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in weight.split(GROUP, 1)], dim=1)


MATRIX = Rounding(8, "one scale for a matrix", lambda weight: weight.abs().amax())
OUTPUT = Rounding(8, "a scale per output channel", lambda weight: weight.abs().amax(1, keepdim=True))
INPUTS = Rounding(4, f"a scale per {GROUP} inputs of an output channel", _group_ranges)
TENSOR = Rounding(8, "one static scale", lambda x, largest: largest.amax())
CHANNEL = Rounding(8, "a static scale per channel", lambda x, largest: largest)
TOKEN = Rounding(8, "a dynamic scale per token", lambda x, largest: x.abs().amax(-1, keepdim=True), dynamic=True)
SCHEMES: dict[str, tuple[Rounding, Rounding | None]] = {  # for weights and for activations
    "per_tensor": (MATRIX, TENSOR),
    # Integer arithmetic cannot do this directly, because the input's scales stay inside the sum. SmoothQuant (Xiao et
    # al. 2211.10438) approximates it by moving scales into the weights.
    "per_channel": (OUTPUT, CHANNEL),
    # LLM.int8's "vector-wise" (Dettmers et al. 2208.07339) without its outliers in 16 bits. The tokens' scales are as
    # in ZeroQuant (Yao et al. 2206.01861) and SmoothQuant-O1.
    "per_token": (OUTPUT, TOKEN),
    # W4A4 as in QuaRot (Ashkboos et al. 2404.00456), but without its rotations and its clipping.
    "int4_per_token": (OUTPUT._replace(bits=4), TOKEN._replace(bits=4)),
    # W4A16, which GPTQ and AWQ call round-to-nearest at g128; theirs has zero points.
    "int4_per_group": (INPUTS, None),
}
NOTE = (
    "int8 and int4 are simulated: symmetric, absmax, round to nearest, levels -127 ... 127 and -7 ... 7. The weight "
    "and the input of every matrix inside the blocks are rounded; with static scales also the residual stream after "
    "the embedding and every sub-layer. Embeddings, the unembedding, norms, biases, and queries, keys, values and "
    "attention weights as such are not. Static ranges are the largest |x| on other text, as in post-training "
    "quantisation; a scale per token comes from the largest |x| of that token."
)


def rounded(x: Tensor, largest: Tensor, bits: int = 8) -> Tensor:
    """Rounds x to the nearest of 2^bits - 1 equally spaced levels from -`largest` to `largest`, which broadcasts; to 0
    where `largest` is 0."""
    levels = 2 ** (bits - 1) - 1  # the same number on both sides of 0
    scale = (largest / levels).clamp_min(torch.finfo(torch.float32).tiny)
    return ((x.float() / scale).round().clamp(-levels, levels) * scale).to(x.dtype)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def matrices(subject: Subject) -> list[nn.Module]:
    """Returns the modules inside the blocks that are a matrix, each once."""
    inside = (module for stage in subject.stages for module in stage.modules())
    return list(dict.fromkeys(m for m in inside if isinstance(m, nn.Linear) or is_conv1d(m)))


def sites(subject: Subject) -> list[Tap]:
    """Returns taps on every activation that is quantised: the stream, and the inputs of the matrices."""
    return [*subject.writable, *(Tap(0, "matrix", module, "input") for module in matrices(subject))]


class Ranges:
    """The static range of every activation: absmax per channel over ids (N, T), which should be other text. `largest`:
    one (C,) per site; None at a site that no token reached (an idle expert), which then is not quantised."""

    def __init__(self, subject: Subject, ids: Tensor, batch_size: int = 8) -> None:
        taps = sites(subject)
        self.largest: list[Tensor | None] = [None] * len(taps)

        def record(index: int, x: Tensor) -> None:
            if not x.numel():  # no token of this batch went to this expert
                return
            new, old = x.float().abs().reshape(-1, x.size(-1)).amax(0), self.largest[index]
            self.largest[index] = new if old is None else torch.maximum(old, new)

        with on_streams(taps, [functools.partial(record, i) for i in range(len(taps))]):
            for _, batch in batches(ids, batch_size):
                subject.losses(batch)


@contextlib.contextmanager
def weights(subject: Subject, rounding: Rounding) -> Iterator[None]:
    """Rounds the matrices' weights within the block, and restores them bit by bit after it.

    Raises UserError for a model that is read from disk as it runs.
    """
    transposed = {m.get_parameter("weight"): is_conv1d(m) for m in matrices(subject)}  # a shared weight once
    if any(weight.is_meta for weight in transposed):
        raise UserError("int8 needs the weights in memory; this model is read from disk as it runs (--max_memory)")
    original = {weight: weight.data for weight in transposed}
    try:
        for weight, turn in transposed.items():
            matrix = weight.data.T if turn else weight.data  # (out, in)
            new = rounded(matrix, rounding.range_of(matrix.float()), rounding.bits)
            weight.data = new.T if turn else new
        yield
    finally:
        for weight, data in original.items():
            weight.data = data


def activations(subject: Subject, ranges: Ranges, rounding: Rounding) -> contextlib.AbstractContextManager[None]:
    """Rounds the matrices' inputs within the block, and the stream too unless scales are dynamic."""
    pairs = zip(sites(subject), ranges.largest, strict=True)
    chosen = [(tap, largest) for tap, largest in pairs if not (rounding.dynamic and tap in subject.writable)]

    def function_of(largest: Tensor | None) -> Callable[[Tensor], Tensor | None]:
        return lambda x: None if largest is None else rounded(x, rounding.range_of(x, largest), rounding.bits)

    return on_streams([tap for tap, _ in chosen], [function_of(largest) for _, largest in chosen])


def sequence_losses(subject: Subject, ids: Tensor, batch_size: int = 8) -> Tensor:
    """Returns the mean loss of each sequence of ids (N, T), in nats: (N,), float64."""
    losses = torch.empty(len(ids), dtype=torch.float64)
    for rows, batch in batches(ids, batch_size):
        losses[rows] = subject.losses(batch).double().mean(1)
    return losses


def quantised_losses(subject: Subject, ids: Tensor, other_ids: Tensor, batch_size: int = 8) -> dict[str, Int8]:
    """Returns, by name in SCHEMES, the loss of ids (N, T) in few bits against that in float, paired by sequence.

    Static ranges come from `other_ids` (N', T). This takes 13 passes over ids and one over other_ids. Raises UserError
    if the weights are not in memory.
    """
    clean = sequence_losses(subject, ids, batch_size)
    ranges = Ranges(subject, other_ids, batch_size)

    @functools.cache  # two schemes round weights alike
    def change(for_weights: Rounding | None, for_activations: Rounding | None) -> LossChange:
        with contextlib.ExitStack() as stack:
            if for_weights:
                stack.enter_context(weights(subject, for_weights))
            if for_activations:
                stack.enter_context(activations(subject, ranges, for_activations))
            return LossChange(**metrics.paired_effect(clean, sequence_losses(subject, ids, batch_size)))

    return {
        name: Int8(
            **vars(change(for_weights, for_activations)),
            weight_bits=for_weights.bits,
            weights=for_weights.text,
            activation_bits=for_activations and for_activations.bits,
            activations=for_activations and for_activations.text,
            weights_only=change(for_weights, None) if for_activations else None,
            activations_only=change(None, for_activations) if for_activations else None,
        )
        for name, (for_weights, for_activations) in SCHEMES.items()
    }
