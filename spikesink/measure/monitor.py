"""Spikes and sinks while a model trains, from the training batch itself: what detect.py measures, with no second pass.

    monitor = Monitor(model, every=100)
    for step, batch in enumerate(loader):
        with monitor(step):
            loss = model(**batch).loss
        ...
        if monitor.row:
            print(monitor.words())

A row, made at monitored steps and else None, is what log.jsonl has under "monitor":

    layers                 [{name, top1, median, ratio, kurtosis}] of the stream after each sub-layer; top1 and median
                           of |h| over a sequence's T x C entries, averaged over sequences, ratio = top1 / median, and
                           He et al.'s kurtosis
    attention              [{name, sink_rate, best_position}]: the share of heads x sequences in which an eligible key
                           (that T/4 queries see) has alpha > 0.3, and the eligible key with the largest mean alpha,
                           None where a window leaves none
    spike_tokens           the share of tokens that the primary spike rule marks in any layer that attention reads: all
                           but the last; None where there is none
    sink_tokens            the share that are sinks in at least a twentieth of all heads (sinks.needed_heads); None
                           where no attention was seen
    p_sink_given_spike, p_spike_given_sink    None where undefined
    sequences              how many were measured; texts that are packed in one row count as what they are

Definitions and sources are those of metrics.py, in float32; what is not finite is None.
"""

import contextlib
import inspect
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..hooks import hooked, on_streams
from ..models.subject import attention_received
from ..models.views import Attention, Part, View, compiled, no_stream, view_of
from ..schema import to_json
from . import metrics
from .observe import StreamStats
from .sinks import PRIMARY_SINK_EPSILON, eligible_keys, needed_heads, queries_that_see, sink_alpha
from .spikes import PRIMARY_SPIKE_RULE, SPIKE_RULES, Usual

Row = dict[str, Any]  # of a log, as said above


class Monitor:
    """Looks at spikes and sinks in a model's own training passes, every so many steps, and changes nothing in them.

    `model`: a GPT of model.py, compiled by its own `compile` or not; a transformers model in eager mode, of an
    encoder-decoder its decoder; or any module whose blocks, the longest ModuleList in it, return the stream (B, T, C).
    Wrapped by DDP, FSDP2 or PEFT, it is found inside. `streams`, {name: module}, says of any other where its stream is.
    Attention is seen in the first two, in transformers models with sdpa or eager attention.

    `every`: steps between looks; 0: never. `sequences`: how many of the batch are measured, the first ones; padding,
    where the model is given a 2-D `attention_mask`, is left out, and texts packed in one row, where it is given 2-D
    `position_ids` that start again, are measured each by itself. `row`: what the last block saw, None if it did not
    look. Raises UserError for a model whose stream is not found, or that is compiled as a whole.
    """

    def __init__(
        self, model: nn.Module, every: int = 100, sequences: int = 4, streams: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.every, self.sequences = every, sequences
        self.view = view_of(model, streams) if every else None
        self.row: Row | None = None
        self.last: Row | None = None

    @contextlib.contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Looks at the first forward pass within the block, if `step` is a multiple of `every`. Raises UserError if
        none of its streams was seen."""
        self.row = None
        if self.view is None or step % self.every:
            yield
            return
        look = Look(self.view, self.sequences)
        with look.watching():
            yield
        self.row = self.last = look.row()

    def words(self) -> str:
        """The last row in a few words; empty if there was none."""
        return words(self.last) if self.last else ""


class Look:
    """What one forward pass shows of the first sequences of its batch. Each tap is measured when it is first called."""

    def __init__(self, view: View, sequences: int) -> None:
        self.view, self.sequences = view, sequences
        self.attended = {tap.name for tap in view.streams[view.attended]}
        self.mask: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.shape = torch.Size()  # (B, T) of the batch
        self.parts: list[Part] | None = None
        self.layers: dict[str, Row] = {}  # name -> what a row says of it
        self.attention: dict[str, Row] = {}
        self.spikes: list[torch.Tensor] = []  # of each part, bool (sequences, T): in any layer that is attended to
        self.sink_heads: list[torch.Tensor] = []  # in how many heads
        self.heads = 0  # that were seen

    def watching(self) -> contextlib.ExitStack:
        """A context in which the model is looked at."""
        stack = contextlib.ExitStack()
        stack.enter_context(self.view.around())
        taps = self.view.streams
        stack.enter_context(on_streams(taps, [self._on_stream(tap.name) for tap in taps]))
        seams = [(attention.module, self._on_attention(attention)) for attention in self.view.attends]
        stack.enter_context(hooked(seams, [(self.view.model, self._on_call)]))
        return stack

    def _on_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.mask is None and self.parts is None:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            mask = given.get(self.view.mask, given.get("kwargs", {}).get(self.view.mask))
            self.mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
            positions = given.get("position_ids", given.get("kwargs", {}).get("position_ids"))
            self.positions = positions if isinstance(positions, torch.Tensor) and positions.dim() == 2 else None

    def _take_parts(self, stream: torch.Tensor) -> None:
        """The Parts of a batch whose stream is (B, T, C): all in one where there is no padding, or nothing else, and no
        row holds several texts, each of whose positions start again."""
        self.shape = stream.shape[:2]
        given = self.mask if self.mask is not None and self.mask.shape == self.shape else torch.ones(self.shape)
        mask = given[: self.sequences].cpu() != 0
        starts = torch.zeros_like(mask)
        if self.positions is not None and self.positions.size(1) == self.shape[1]:
            starts[:, 1:] = (self.positions.diff(dim=1) <= 0).cpu()[: len(mask)]
        if bool((mask & ~starts).all()) or not bool(mask.any()):
            self.parts = [Part(slice(len(mask)), slice(None))]
            return
        self.parts = []
        for i, (row, begins) in enumerate(zip(mask, starts, strict=True)):
            texts = begins.cumsum(0).masked_fill(~row, -1)
            for text in texts[row].unique().tolist():
                at = (texts == text).nonzero()[:, 0]
                self.parts.append(Part(slice(i, i + 1), slice(int(at[0]), int(at[-1]) + 1)))

    def _on_stream(self, name: str) -> Callable[[torch.Tensor], None]:
        def function(stream: torch.Tensor) -> None:
            if name in self.layers:
                return
            if self.parts is None:
                if not isinstance(stream, torch.Tensor) or stream.dim() != 3:
                    raise no_stream(self.view.model)
                self._take_parts(stream)
            with measuring(stream):
                self._measure_stream(name, stream.detach().view(*self.shape, -1))

        return function

    def _measure_stream(self, name: str, stream: torch.Tensor) -> None:
        stats, rule = StreamStats(), SPIKE_RULES[PRIMARY_SPIKE_RULE]
        states = [stream[rows, span].float() for rows, span in self.parts or ()]
        usual = Usual.of(torch.cat([x.flatten(0, 1) for x in states]))  # the batch is ordinary text
        for i, x in enumerate(states):
            batch = stats.add(x)
            if name in self.attended:
                B, T, C = batch.x.shape
                if len(self.spikes) == i:
                    self.spikes.append(torch.zeros(B, T, dtype=torch.bool))
                self.spikes[i].view(-1)[rule.marked(batch, usual, batch.strength(usual)) // C] = True
        found = stats.result()
        self.layers[name] = {
            "top1": found.top1,
            "median": found.median,
            "ratio": found.ratio if found.median else None,
            "kurtosis": found.kurtosis,
        }

    def _on_attention(self, attention: Attention) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: object) -> None:
            if attention.name in self.attention or self.parts is None:
                return
            cast = torch.is_autocast_enabled(args[0].device.type)
            with measuring(args[0]):
                self._measure_attention(attention, args, cast)

        return hook

    def _measure_attention(self, attention: Attention, args: tuple, cast: bool) -> None:
        device, hits, mass = args[0].device.type, [], torch.zeros(self.shape[1])
        for i, part in enumerate(self.parts or ()):
            # in the model's own precision; casts of weights made here, without a gradient, are not kept for its passes
            with torch.autocast(device, torch.get_autocast_dtype(device), cast, cache_enabled=False):
                seam, q, k = attention.seam_inputs(args, part)
            later = seam.shares(q[:, :, :1].float(), k.float())[..., 1:]
            causal = not bool((later > 0).any())
            T = k.size(-2)
            queries, _ = queries_that_see(seam, T, q.size(-2), causal)
            alpha = sink_alpha(attention_received(seam, q, k, causal).cpu(), queries)  # (B, H, T)
            eligible = eligible_keys(queries, q.size(-2))
            is_sink = (alpha > PRIMARY_SINK_EPSILON) & eligible
            hits.append(is_sink.any(-1).flatten())
            mass[:T] += (alpha * eligible).sum((0, 1))
            if len(self.sink_heads) == i:
                self.sink_heads.append(torch.zeros(len(alpha), T, dtype=torch.int64))
            self.sink_heads[i] += is_sink.sum(1)
        self.heads += alpha.size(1)
        self.attention[attention.name] = {
            "sink_rate": torch.cat(hits).double().mean().item(),
            "best_position": int(mass.argmax()) if mass.any() else None,
        }

    def row(self) -> Row:
        """What was seen, as the row of a log has it."""
        if not self.layers:
            raise no_stream(self.view.model)
        parts = self.parts or []
        together = lambda of_parts: torch.cat([of_part.flatten() for of_part in of_parts])[None] if of_parts else None
        spike, heads = together(self.spikes), together(self.sink_heads)
        sink = None if heads is None else heads >= needed_heads(self.heads)
        both = None if spike is None or sink is None else metrics.overlap(spike, sink)
        return to_json(
            {
                "layers": [{"name": n, **of} for n, of in self.layers.items()],
                "attention": [{"name": n, **of} for n, of in self.attention.items()],
                "spike_tokens": None if spike is None else spike.double().mean().item(),
                "sink_tokens": None if sink is None else sink.double().mean().item(),
                "p_sink_given_spike": both.p_sink_given_spike if both else None,
                "p_spike_given_sink": both.p_spike_given_sink if both else None,
                "sequences": sum(len(range(self.sequences)[part.rows]) for part in parts),
            }
        )


@contextlib.contextmanager
def measuring(x: torch.Tensor) -> Iterator[None]:
    """Within, nothing is recorded for a gradient, float32 is float32, and no algorithm is refused."""
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)  # the values of a median are the same by any
    try:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)


# ------------------------------------------------------------------------------------------------ rows, elsewhere


def headline(row: Row) -> dict[str, float | None]:
    """A row in four numbers, {name: number or None}: over layers the largest ratio and kurtosis, over heads the share
    that has sinks, and the share of tokens that are spikes."""
    known = lambda key: [layer[key] for layer in row["layers"] if layer[key] is not None]
    rates = [attention["sink_rate"] for attention in row["attention"]]
    return {
        "spike/largest_ratio": max(known("ratio"), default=None),
        "spike/largest_kurtosis": max(known("kurtosis"), default=None),
        "sink/heads": statistics.fmean(rates) if rates else None,
        "spike/tokens": row["spike_tokens"],
    }


def flat(row: Row) -> dict[str, float]:
    """All numbers of a row, {name: number}: 'spike/ratio/attn 0', 'sink/rate/attn 0', ..., and its headline."""
    numbers: dict[str, float | None] = {
        **headline(row),
        "sink/tokens": row["sink_tokens"],
        "both/p_sink_given_spike": row["p_sink_given_spike"],
        "both/p_spike_given_sink": row["p_spike_given_sink"],
    }
    for layer in row["layers"]:
        numbers |= {f"spike/{key}/{layer['name']}": value for key, value in layer.items() if key != "name"}
    for attention in row["attention"]:
        numbers[f"sink/rate/{attention['name']}"] = attention["sink_rate"]
        numbers[f"sink/position/{attention['name']}"] = attention["best_position"]
    return {key: value for key, value in numbers.items() if value is not None}


def words(row: Row) -> str:
    """A row in a few words: 'spike 179x ffn 0, sinks 6% of heads'."""
    largest = max(row["layers"], key=lambda layer: layer["ratio"] or 0)
    rate = headline(row)["sink/heads"]
    ratio = "?" if largest["ratio"] is None else f"{largest['ratio']:.0f}x"
    sinks = "attention not seen" if rate is None else f"sinks {rate:.0%} of heads"
    return f"spike {ratio} {largest['name']}, {sinks}"


# ------------------------------------------------------------------------------------------------ in other loops


def MonitorCallback(trainer: Any, every: int = 100, **how: Any) -> Any:
    """A TrainerCallback: `trainer.add_callback(MonitorCallback(trainer))`; numbers as `flat` names them go through
    `trainer.log`, to wherever the Trainer reports. `how` goes to Monitor. Needs transformers.

    Steps count from 1, as the Trainer's do. `monitor`: the Monitor. Raises UserError as Monitor does, and where the
    Trainer compiles.
    """
    from transformers import TrainerCallback

    if trainer.args.torch_compile:  # when it trains, not yet
        raise compiled(trainer.model)

    class Callback(TrainerCallback):
        def __init__(self) -> None:
            self.monitor = Monitor(trainer.model, every if trainer.is_world_process_zero() else 0, **how)
            self.block = contextlib.ExitStack()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.block.close()  # of a step that did not end
            self.block.enter_context(self.monitor(state.global_step + 1))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.block.close()
            if self.monitor.row:
                due = control.should_log
                trainer.log(flat(self.monitor.row))
                control.should_log = due  # which logging takes back, and with it the Trainer's own row

    return Callback()
