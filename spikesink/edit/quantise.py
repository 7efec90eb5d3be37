"""Simulated int8: every matrix of the blocks and the residual stream rounded to 255 levels, the arithmetic in float.

    ranges = quantise.Ranges(subject, other_ids)
    with quantise.weights(subject, "per_tensor"), quantise.activations(subject, ranges, "per_tensor"):
        losses = subject.losses(ids)

Outliers are what breaks it (Dettmers et al. 2208.07339; Bondarenko et al. 2306.12929): one scale must reach the largest
|x|, and what is a few hundred times smaller rounds to nothing.

Quantised: the weight and the input of every matrix (nn.Linear, transformers' Conv1D) inside the blocks, and the
residual stream at every writable tap, that after the embedding included (of an encoder-decoder: the matrices of both
stacks, the stream of the part). Not quantised: embeddings, unembedding (Bondarenko et al. leave out the last layer
too), norms, biases, queries, keys, values and attention weights as such, and experts that are kept in one 3-D tensor.
Symmetric, absmax, round to nearest; Bondarenko et al.'s activations are asymmetric.
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

LARGEST = 127  # levels -127 ... 127: the same number on both sides of 0


class Granularity(NamedTuple):
    """How many scales: the range (absmax) that entries share, of a weight (out, in), and of an activation whose absmax
    per channel is known (C,)."""

    text: str
    weight: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]


GRANULARITIES = {
    "per_tensor": Granularity(
        "one scale for a weight matrix, one for an activation",
        lambda weight: weight.abs().amax(),
        lambda largest: largest.amax(),
    ),
    # What integer arithmetic cannot do as it is (the input's scales do not leave the sum) and SmoothQuant (Xiao et al.
    # 2211.10438) comes near to by moving scales into the weights.
    "per_channel": Granularity(
        "a scale per output channel of a weight, one per channel of an activation",
        lambda weight: weight.abs().amax(1, keepdim=True),
        lambda largest: largest,
    ),
}
NOTE = (
    "int8: simulated, symmetric, absmax, round to nearest, levels -127 ... 127. The weight and the input of every "
    "matrix inside the blocks, and the residual stream after the embedding and every sub-layer; not the embeddings, "
    "the unembedding, norms, biases, and queries, keys, values and attention weights as such. Activation ranges are "
    "static: the largest |x| on other text, as in post-training quantisation. "
    + "; ".join(f"{name}: {granularity.text}" for name, granularity in GRANULARITIES.items())
    + "."
)


def rounded(x: Tensor, largest: Tensor) -> Tensor:
    """x to the nearest of the 255 multiples of largest / 127 up to `largest`, which broadcasts; 0 where that is 0."""
    scale = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return ((x.float() / scale).round().clamp(-LARGEST, LARGEST) * scale).to(x.dtype)


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def matrices(subject: Subject) -> list[nn.Module]:
    """The modules inside the blocks that are a matrix, each once."""
    inside = (module for stage in subject.stages for module in stage.modules())
    return list(dict.fromkeys(m for m in inside if isinstance(m, nn.Linear) or is_conv1d(m)))


def sites(subject: Subject) -> list[Tap]:
    """Taps on every activation that is quantised: the stream, and the inputs of the matrices."""
    return [*subject.writable, *(Tap(0, "matrix", module, "input") for module in matrices(subject))]


class Ranges:
    """The static range of every activation: absmax per channel over token ids (N, T), which should be other text.

    `largest`: a (C,) per site, None at one that no token reached (an idle expert), which then is not quantised.
    """

    def __init__(self, subject: Subject, ids: Tensor, batch_size: int = 8) -> None:
        taps = sites(subject)
        self.largest: list[Tensor | None] = [None] * len(taps)

        def record(index: int, x: Tensor) -> None:
            new, old = x.float().abs().reshape(-1, x.size(-1)).amax(0), self.largest[index]
            self.largest[index] = new if old is None else torch.maximum(old, new)

        with on_streams(taps, [functools.partial(record, i) for i in range(len(taps))]):
            for _, batch in batches(ids, batch_size):
                subject.losses(batch)


@contextlib.contextmanager
def weights(subject: Subject, granularity: str) -> Iterator[None]:
    """The matrices' weights are int8's within the block, and bit by bit what they were after it.

    Raises UserError for a model that is read from disk as it runs.
    """
    held = {m.get_parameter("weight"): is_conv1d(m) for m in matrices(subject)}  # a shared weight once
    if any(weight.is_meta for weight in held):
        raise UserError("int8 needs the weights in memory; this model is read from disk as it runs (--max_memory)")
    original = {weight: weight.data for weight in held}
    try:
        for weight, transposed in held.items():
            turned = weight.data.T if transposed else weight.data  # (out, in)
            new = rounded(turned, GRANULARITIES[granularity].weight(turned.float()))
            weight.data = new.T if transposed else new
        yield
    finally:
        for weight, data in original.items():
            weight.data = data


def activations(subject: Subject, ranges: Ranges, granularity: str) -> contextlib.AbstractContextManager[None]:
    """A context manager in which the stream and the matrices' inputs are int8's, within `ranges`."""
    range_of = GRANULARITIES[granularity].activation

    def function_of(largest: Tensor | None) -> Callable[[Tensor], Tensor | None]:
        return lambda x: None if largest is None else rounded(x, range_of(largest))

    return on_streams(sites(subject), [function_of(largest) for largest in ranges.largest])


def sequence_losses(subject: Subject, ids: Tensor, batch_size: int = 8) -> Tensor:
    """The mean loss of each sequence of ids (N, T), in nats: (N,), float64."""
    losses = torch.empty(len(ids), dtype=torch.float64)
    for rows, batch in batches(ids, batch_size):
        losses[rows] = subject.losses(batch).double().mean(1)
    return losses


def quantised_losses(subject: Subject, ids: Tensor, other_ids: Tensor, batch_size: int = 8) -> dict[str, Int8]:
    """By granularity, the loss of ids (N, T) in int8 against that in float, paired by sequence.

    Ranges are those of `other_ids` (N', T). Raises UserError where the weights are not in memory.
    """
    clean = sequence_losses(subject, ids, batch_size)
    ranges = Ranges(subject, other_ids, batch_size)

    def change(*contexts: contextlib.AbstractContextManager[None]) -> LossChange:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return LossChange(**metrics.paired_effect(clean, sequence_losses(subject, ids, batch_size)))

    return {
        name: Int8(
            **vars(change(weights(subject, name), activations(subject, ranges, name))),
            weights_only=change(weights(subject, name)),
            activations_only=change(activations(subject, ranges, name)),
        )
        for name in GRANULARITIES
    }
