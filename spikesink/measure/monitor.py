"""Measures spikes and sinks as detect.py does while a model trains, in the training batch, without a second pass.

    monitor = Monitor(model, every=100)
    for step, batch in enumerate(loader):
        with monitor(step):
            loss = model(**batch).loss
        ...
        if monitor.row:
            print(monitor.words())

The row of a monitored step is the entry "monitor" of log.jsonl. At other steps it is None.

    layers         [{name, top1, median, ratio, kurtosis}] of the stream after each sub-layer: top1 and median of |h|
                   over a sequence's T x C entries, averaged over sequences, ratio = top1 / median, He et al.'s kurtosis
    attention      [{name, sink_rate, best_position}]: the share of heads x sequences in which an eligible key (that
                   T/4 queries see) has alpha > 0.3, and the eligible key with the largest mean alpha, None without one
    spike_tokens   the share of tokens that the primary spike rule marks in any layer that attention reads (all but the
                   last); None without such a layer
    sink_tokens    the share of tokens that are sinks in at least a twentieth of all heads (sinks.needed_heads); None
                   if no attention was measured
    p_sink_given_spike, p_spike_given_sink    None where undefined
    sequences      the number of measured sequences; texts that are packed in one row count each

Definitions and sources are those of metrics.py, in float32. Numbers that are not finite are None.
"""

import contextlib
import functools
import inspect
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..hooks import hooked, on_streams
from ..models.views import Attention, Part, View, compiled, no_stream, view_of
from ..schema import to_json
from . import metrics
from .observe import StreamStats
from .sinks import alpha_in, are_sinks, eligible_keys, needed_heads
from .spikes import PRIMARY_SPIKE_RULE, SPIKE_RULES, Usual

Row = dict[str, Any]  # of a log, see above


class Monitor:
    """Measures spikes and sinks in a model's own training passes, every so many steps, and changes nothing in them.

    `model`: a GPT of model.py, compiled by its own `compile` or not; a transformers model in eager mode, of an
    encoder-decoder its decoder; or any module whose blocks, the longest ModuleList in it, return the stream (B, T, C).
    It is found inside DDP, FSDP2 and PEFT wrappers. `streams`, {name: module}, tells where the stream of any other
    model is. Attention is measured in a GPT of model.py, and in transformers models with sdpa or eager attention.

    `every`: steps between measurements; 0: never. `sequences`: so many of the batch's first sequences are measured.
    Padding is left out if the model is called with a 2-D `attention_mask`. Texts packed in one row are measured each by
    itself if it is called with 2-D `position_ids` that start again. `row`: the measurements of the last block, None if
    there were none. Raises UserError for a model whose stream is not found, or that is compiled as a whole.
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
        """Measures the first forward pass within the block, if `step` is a multiple of `every`. Raises UserError if
        that pass does not call any of the streams' modules."""
        self.row = None
        if self.view is None or step % self.every:
            yield
            return
        observer = BatchObserver(self.view, self.sequences)
        with observer.watching():
            yield
        self.row = self.last = observer.row()

    def words(self) -> str:
        """The last row in a few words; empty if there was none."""
        return words(self.last) if self.last else ""


class BatchObserver:
    """Measures the first sequences of the batch in one forward pass. Each tap is measured when it is first called."""

    def __init__(self, view: View, sequences: int) -> None:
        self.view, self.sequences = view, sequences
        self.attended = {tap.name for tap in view.streams[view.attended]}
        self.mask: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.shape = torch.Size()  # (B, T) of the batch
        self.parts: list[Part] | None = None
        self.layers: dict[str, Row] = {}  # name -> its entry in the row
        self.attention: dict[str, Row] = {}
        self.spikes: list[torch.Tensor] = []  # each part's spikes in any attended layer, bool (sequences, T)
        self.sink_heads: list[torch.Tensor] = []  # alike, the number of heads in which a token is a sink
        self.heads = 0  # the number of measured heads

    def watching(self) -> contextlib.ExitStack:
        """A context in which the model is measured."""
        stack, taps = contextlib.ExitStack(), self.view.streams
        stack.enter_context(self.view.around())
        stack.enter_context(on_streams(taps, [functools.partial(self._on_stream, tap.name) for tap in taps]))
        seams = [(seam.module, functools.partial(self._on_attention, seam)) for seam in self.view.attends]
        stack.enter_context(hooked(seams, [(self.view.model, self._on_call)]))
        return stack

    def _on_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.mask is None and self.parts is None:
            arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            arguments = {**arguments.get("kwargs", {}), **arguments}
            matrix = lambda x: x if isinstance(x, torch.Tensor) and x.dim() == 2 else None
            self.mask, self.positions = matrix(arguments.get(self.view.mask)), matrix(arguments.get("position_ids"))

    def _find_parts(self, stream: torch.Tensor) -> None:
        """Finds the Parts of a batch whose stream is (B, T, C). Without padding and packed rows they are all one Part.
        A row holds several texts if its positions start again."""
        self.shape = stream.shape[:2]
        mask = self.mask if self.mask is not None and self.mask.shape == self.shape else torch.ones(self.shape)
        mask = mask[: self.sequences].cpu() != 0
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

    def _on_stream(self, name: str, stream: torch.Tensor) -> None:
        if name in self.layers:
            return
        if self.parts is None:
            if not isinstance(stream, torch.Tensor) or stream.dim() != 3:
                raise no_stream(self.view.model)
            self._find_parts(stream)
        with measuring(stream):
            self._measure_stream(name, stream.detach().view(*self.shape, -1))

    def _measure_stream(self, name: str, stream: torch.Tensor) -> None:
        stats, rule = StreamStats(), SPIKE_RULES[PRIMARY_SPIKE_RULE]
        states = [stream[rows, span].float() for rows, span in self.parts or ()]
        usual = Usual.from_states(torch.cat([x.flatten(0, 1) for x in states]))  # the batch is ordinary text
        for i, x in enumerate(states):
            batch = stats.add(x)
            if name in self.attended:
                B, T, C = batch.x.shape
                if len(self.spikes) == i:
                    self.spikes.append(torch.zeros(B, T, dtype=torch.bool))
                self.spikes[i].view(-1)[rule.marked(batch, usual, batch.strength(usual)) // C] = True
        result = stats.result()
        self.layers[name] = {
            "name": name,
            "top1": result.top1,
            "median": result.median,
            "ratio": result.ratio if result.median else None,
            "kurtosis": result.kurtosis,
        }

    def _on_attention(
        self, attention: Attention, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: object
    ) -> None:
        if attention.name not in self.attention and self.parts is not None:
            cast = torch.is_autocast_enabled(args[0].device.type)
            with measuring(args[0]):
                self._measure_attention(attention, args, cast)

    def _measure_attention(self, attention: Attention, args: tuple, cast: bool) -> None:
        device, hits, mass = args[0].device.type, [], torch.zeros(self.shape[1])
        for i, part in enumerate(self.parts or ()):
            # in the model's own precision; the cache would keep casts without a gradient for the model's passes
            with torch.autocast(device, torch.get_autocast_dtype(device), cast, cache_enabled=False):
                seam, q, k = attention.seam_inputs(args, part)
            later = seam.shares(q[:, :, :1].float(), k.float())[..., 1:]
            alpha, queries = alpha_in(seam, q, k, not bool((later > 0).any()))  # (B, H, T), (T,)
            eligible, is_sink = eligible_keys(queries, q.size(-2)), are_sinks(alpha, queries, q.size(-2))
            hits.append(is_sink.any(-1).flatten())
            mass[: k.size(-2)] += (alpha * eligible).sum((0, 1))
            if len(self.sink_heads) == i:
                self.sink_heads.append(torch.zeros(len(alpha), k.size(-2), dtype=torch.int64))
            self.sink_heads[i] += is_sink.sum(1)
        self.heads += alpha.size(1)
        self.attention[attention.name] = {
            "name": attention.name,
            "sink_rate": torch.cat(hits).double().mean().item(),
            "best_position": int(mass.argmax()) if mass.any() else None,
        }

    def row(self) -> Row:
        """The measurements, as a row of a log."""
        if not self.layers:
            raise no_stream(self.view.model)
        join = lambda tensors: torch.cat([tensor.flatten() for tensor in tensors])[None] if tensors else None
        spike, heads = join(self.spikes), join(self.sink_heads)
        sink = None if heads is None else heads >= needed_heads(self.heads)
        both = None if spike is None or sink is None else metrics.overlap(spike, sink)
        return to_json(
            {
                "layers": [*self.layers.values()],
                "attention": [*self.attention.values()],
                "spike_tokens": None if spike is None else spike.double().mean().item(),
                "sink_tokens": None if sink is None else sink.double().mean().item(),
                "p_sink_given_spike": both.p_sink_given_spike if both else None,
                "p_spike_given_sink": both.p_spike_given_sink if both else None,
                "sequences": sum(len(range(self.sequences)[part.rows]) for part in self.parts or ()),
            }
        )


@contextlib.contextmanager
def measuring(x: torch.Tensor) -> Iterator[None]:
    """A context without gradients and autocast, in which every algorithm is allowed."""
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)  # all give the same medians
    try:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)


def headline(row: Row) -> dict[str, float | None]:
    """A row in four numbers, {name: number or None}: the largest ratio and kurtosis over layers, the share of heads
    that have sinks, and the share of tokens that are spikes."""
    known = lambda key: [layer[key] for layer in row["layers"] if layer[key] is not None]
    rates = [attention["sink_rate"] for attention in row["attention"]]
    return {
        "spike/largest_ratio": max(known("ratio"), default=None),
        "spike/largest_kurtosis": max(known("kurtosis"), default=None),
        "sink/heads": statistics.fmean(rates) if rates else None,
        "spike/tokens": row["spike_tokens"],
    }


def flat(row: Row) -> dict[str, float]:
    """All numbers of a row and its headline, {name: number}: 'spike/ratio/attn 0', 'sink/rate/attn 0', ..."""
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
    sinks = "attention not measured" if rate is None else f"sinks {rate:.0%} of heads"
    return f"spike {ratio} {largest['name']}, {sinks}"


class MonitorCallback:
    """A TrainerCallback with a Monitor: `trainer.add_callback(MonitorCallback(trainer))`. Needs transformers.

    The numbers, named by `flat`, go through `trainer.log` to wherever the Trainer reports. Steps count from 1, as the
    Trainer's do. `monitor`: the Monitor, which takes `options`. Raises UserError as Monitor does, or if it compiles.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An instance that is a TrainerCallback too; transformers is imported only here."""
        from transformers import TrainerCallback

        return super().__new__(type(cls.__name__, (cls, TrainerCallback), {}))

    def __init__(self, trainer: Any, every: int = 100, **options: Any) -> None:
        if trainer.args.torch_compile:  # the Trainer compiles when it trains, not yet
            raise compiled(trainer.model)
        self.trainer = trainer
        self.monitor = Monitor(trainer.model, every if trainer.is_world_process_zero() else 0, **options)
        self.block = contextlib.ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts to watch the step's passes."""
        self.block.close()  # of a step that did not end
        self.block.enter_context(self.monitor(state.global_step + 1))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logs what was measured in the step."""
        self.block.close()
        if self.monitor.row:
            should_log = control.should_log
            self.trainer.log(flat(self.monitor.row))
            control.should_log = should_log  # logging resets it, and the Trainer would not log its own row
