"""Finds the residual stream in a transformers block from the tensors of a trial run, not from names.

We follow a block sub-layer by sub-layer. If a tensor equals, bit by bit, the stream before plus the output of a module,
it is the sum after that sub-layer. The next sub-layer gets that sum (pre-norm), or its norm (post-norm).
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..hooks import Tap, hooked
from .subject import PLACES, SEAM, GatedFFN, gated_ffn


def outermost_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The ModuleLists that are not empty and not inside another one."""
    lists: list[nn.ModuleList] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and module not in inside:
            lists.append(module)
            inside.update(module.modules())
    return lists


def stacks_of(model: Any) -> list[nn.ModuleList]:
    """The stacks of blocks of a transformers model: the outermost ModuleLists whose blocks have attention seams.
    Raises UserError unless there is one stack, or two in an encoder-decoder, and every block in it has a seam."""
    has_seam = lambda module: any(hasattr(m, SEAM) for m in module.modules())
    stacks = [blocks for blocks in outermost_lists(model) if any(map(has_seam, blocks))]
    expected = 2 if model.config.is_encoder_decoder else 1
    kind = model.config.model_type
    if len(stacks) != expected:
        count = f"it has {len(stacks)} stacks of blocks with attention where it needs {expected}"
        raise UserError(f"{kind} cannot be observed: its attention bypasses the interface, or {count}")
    if not all(map(has_seam, itertools.chain(*stacks))):
        raise UserError(f"{kind} cannot be observed: some blocks have no attention that goes through the interface")
    return stacks


class Event(NamedTuple):
    """A module took or returned a tensor of the stream's shape."""

    module: nn.Module
    place: str  # input, output
    value: Tensor
    only_reader: bool = False  # True for an input that no other module gets


class SeamCall(NamedTuple):
    """A seam was called."""

    module: nn.Module
    kind: str  # attn, cross


Record = Event | SeamCall


class Stack:
    """A stack of blocks. Watching a trial run shows where in each block the stream is."""

    output: Tensor  # the stream after the last block, (1, T, C), once a run was watched

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.blocks = blocks
        self.seams = [[getattr(m, SEAM) for m in b.modules() if hasattr(m, SEAM)] for b in blocks]
        self.records: list[list[Record]] = []  # a list per block, in the order of the forward pass

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Records the events and seam calls of each block in a forward pass."""
        self.records = [[] for _ in self.blocks]
        forward, before = [], []
        for block, seams, records in zip(self.blocks, self.seams, self.records, strict=True):
            for module in block.modules():
                before.append((module, functools.partial(record_input, records, module is block)))
                forward.append((module, functools.partial(record_output, records)))
            forward += [(seam, functools.partial(record_call, records)) for seam in seams]
        with hooked(forward, before):
            yield
        self.output = events_in(self.records[-1])[-1].value

    def taps(self) -> "Taps":
        """The Taps of the Subject. Raises UserError if a block cannot be understood."""
        all_taps = Taps([Tap(-1, "embedding", self.blocks[0], "input")], [], {place: [] for place in PLACES}, [], [])
        for layer, (block, seams, records) in enumerate(zip(self.blocks, self.seams, self.records, strict=True)):
            calls = [call for call in records if isinstance(call, SeamCall)]
            check_block(block, seams, records, calls)
            all_taps.attends.extend(Tap(layer, call.kind, call.module) for call in calls)
            steps = sub_layers(records)
            kinds = [step.kind for step in steps]
            for i, step in enumerate(steps):
                repeats = kinds[:i].count(step.kind)
                kind = f"{step.kind}{repeats + 1}" if repeats else step.kind
                if len(all_taps.reads) < len(all_taps.streams):
                    all_taps.reads.append(tap_of(layer, kind, step.normed) if step.normed else None)
                if step.sum:
                    all_taps.streams.append(tap_of(layer, kind, step.sum))
                for place, taps in all_taps.inner.items():
                    if event := getattr(step, place):
                        taps.append(tap_of(layer, kind, event))
            if not steps:
                all_taps.reads.append(None)
            if not any(step.sum for step in steps):
                all_taps.streams.append(Tap(layer, "block", block))
            for event in filter(is_output, records):
                source = next((step for step in steps if torch.equal(event.value, step.output.value)), None)
                if source and source.norm:
                    all_taps.gated.extend(gated_ffn(layer, event.module, source.norm))
        all_taps.reads.append(None)  # no block reads the output of the last norm
        return all_taps._replace(streams=with_rewrites(all_taps.streams))


class Taps(NamedTuple):
    """The fields of a Subject that follow from a stack of blocks."""

    streams: list[Tap]
    reads: list[Tap | None]
    inner: dict[str, list[Tap]]
    gated: list[GatedFFN]
    attends: list[Tap]


def with_rewrites(streams: list[Tap]) -> list[Tap]:
    """Makes the taps of a stack (in order) writable where the stream also goes past them.

    A change at such a tap is written again at the next taps, up to the first that the whole stream goes through. Each
    sum is the one before plus an update, so adding the change to a later sum equals adding it to this one.
    """
    reversed_taps: list[Tap] = []
    later: tuple[Tap, ...] = ()
    for tap in reversed(streams):
        if tap.writable or not later:
            reversed_taps.append(tap)
            later = (tap,) if tap.writable else ()
        else:
            reversed_taps.append(dataclasses.replace(tap, writable=True, rewritten_at=later))
            later = (tap, *later)
    return reversed_taps[::-1]


def tap_of(layer: int, kind: str, event: Event) -> Tap:
    """The Tap at the place of an Event. An output is writable; an input only if no other module reads that tensor."""
    return Tap(layer, kind, event.module, event.place, writable=event.place == "output" or event.only_reader)


def check_block(block: nn.Module, seams: Sequence[nn.Module], records: list[Record], calls: list[SeamCall]) -> None:
    """Raises UserError for a block whose stream or attention a Subject cannot use."""
    found = stream_into(records).dim() == 3 and records[-1].module is block
    problems = {
        "its residual stream is not one vector per token": not found,
        "its attention calls the interface more than once, or its layers share weights": len(calls) > len(seams),
        "its attention bypasses the interface": len(calls) < len(seams),
    }
    for problem, applies in problems.items():
        if applies:
            raise UserError(f"{type(block).__name__} cannot be observed: {problem}")


def record_input(records: list[Record], is_block: bool, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A hook before a module: records its input, if that is like the stream. `is_block`: the module is the block."""
    value: Any = args[0] if args else kwargs.get("hidden_states")
    if not records and is_block:
        records.append(Event(module, "input", value))
    elif is_block or like_stream(value, records):
        records.append(Event(module, "input", value.view(stream_into(records).shape)))


def record_output(records: list[Record], module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """A hook after a module: records its output, if that is like the stream."""
    value = output[0] if isinstance(output, tuple) else output
    if like_stream(value, records):
        records.append(Event(module, "output", value.view(stream_into(records).shape)))


def record_call(records: list[Record], seam: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """A hook after a seam: records its call."""
    q, k, _ = args
    seam.heads = q.size(1)
    records.append(SeamCall(seam, "cross" if k.size(-2) != q.size(-2) else "attn"))


def events_in(records: Iterable[Record]) -> list[Event]:
    """The events among the records of a block."""
    return [record for record in records if isinstance(record, Event)]


def stream_into(records: list[Record]) -> Tensor:
    """The stream that the block was called with, which is its first record."""
    entry = records[0]
    assert isinstance(entry, Event)
    return entry.value


def like_stream(value: object, records: list[Record]) -> TypeGuard[Tensor]:
    """True for a tensor (1, T, C) or (T, C) with the shape of the stream that entered the block."""
    block = stream_into(records)
    return isinstance(value, Tensor) and value.shape[-2:] == block.shape[-2:] and value.numel() == block.numel()


def is_output(record: Record) -> TypeGuard[Event]:
    """True for a tensor that a module returned."""
    return isinstance(record, Event) and record.place == "output"


class Step(NamedTuple):
    """A sub-layer of a block in a trial run: the sum after it, and the Events of PLACES."""

    kind: str
    sum: Event | None  # the stream before plus the update; None where a block adds all its updates at once
    normed: Event | None
    output: Event
    update: Event
    norm: nn.Module | None  # computes `normed`; an Identity where that is the stream itself; None if unknown


def is_norm(module: nn.Module) -> bool:
    """True for a module whose parameters are all vectors."""
    parameters = list(module.parameters())
    return bool(parameters) and all(p.dim() == 1 for p in parameters)


def has_matrix(module: nn.Module) -> bool:
    """True for a module that multiplies by a matrix of its own."""
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))


def sub_layers(records: list[Record]) -> list[Step]:
    """The sub-layers of a block, from its records. Either each adds an update to the stream in turn, perhaps with a
    norm behind it, or all add theirs at once. [] if the sums do not give the block's output exactly (scaled residuals).
    """
    steps = _sequential(records, 1, stream_into(records)) or []
    return steps if len(steps) > 1 else _parallel(records)


def _sequential(records: list[Record], start: int, stream: Tensor) -> list[Step] | None:
    """The Steps from records[start] on, where the stream is `stream`. None if they miss the block's output."""
    last = events_in(records)[-1]
    for i in range(start, len(records)):
        total = records[i]
        if not isinstance(total, Event) or total.value is stream:
            continue
        for update in filter(is_output, records[start:i]):
            if not torch.equal(total.value, stream + update.value):
                continue
            for stream_event in (total, _norm_of(records, i)):  # the sum (pre-norm), or its norm (post-norm)
                if stream_event is None:
                    continue
                sum_event = total._replace(only_reader=True) if stream_event is not total else total
                if torch.equal(stream_event.value, last.value):
                    final_sum = last if stream_event is total else sum_event
                    return [_step(records, records[start - 1 :], stream, update, final_sum)]
                end = next(n for n in range(i, len(records)) if records[n] is stream_event)
                rest = _sequential(records, end + 1, stream_event.value)
                if rest:
                    return [_step(records, records[start - 1 : end], stream, update, sum_event), *rest]
    return None


def _parallel(records: list[Record]) -> list[Step]:
    """The Steps of a block that adds two updates at once (GPT-NeoX, Phi). [] for any other block."""
    stream, last = stream_into(records), events_in(records)[-1]
    outputs = [(i, event) for i, event in enumerate(records) if is_output(event)]
    for (i, first), (_, second) in itertools.combinations(outputs, 2):
        orders = itertools.permutations((first.value, second.value, stream))
        if any(torch.equal(last.value, a + b + c) for a, b, c in orders):
            halves = ((records[: i + 1], first), (records[i + 1 :], second))
            return [_step(records, half, stream, update, None) for half, update in halves]
    return []


def _norm_of(records: list[Record], i: int) -> Event | None:
    """The output of the norm whose input is records[i], or None."""
    norm = records[i].module
    if is_output(records[i]) or not is_norm(norm):
        return None
    return next((event for event in filter(is_output, records[i + 1 :]) if event.module is norm), None)


def _step(block: list[Record], records: list[Record], stream: Tensor, update: Event, total: Event | None) -> Step:
    """The Step that adds `update` to `stream`, from its own records and those of the whole block."""
    kinds = [call.kind for call in records if isinstance(call, SeamCall)]
    inputs = [event for event in events_in(records) if event.place == "input"]
    output = update
    if is_norm(update.module):
        output = next((event for event in inputs if event.module is update.module), update)
    normed = next((event for event in inputs if has_matrix(event.module)), None)
    norm = None
    if normed:
        sources = [e for e in filter(is_output, block) if is_norm(e.module) and torch.equal(e.value, normed.value)]
        norm = sources[0].module if sources else nn.Identity() if torch.equal(normed.value, stream) else None
    return Step(kinds[0] if kinds else "ffn", total, normed, output, update, norm)
