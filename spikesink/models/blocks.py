"""Where in a transformers block the residual stream is: learned from the tensors of a trial run, not from names.

A block is followed sub-layer by sub-layer: the tensor that is, bit by bit, the stream before plus something a module
returned is the sum after it. It goes on as it is (pre-norm), or as what a norm makes of it (post-norm).
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn

from ..errors import UserError
from ..hooks import Hook, Tap, hooked
from .subject import PLACES, SEAM, GatedFFN, gated_ffn


def outermost_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The ModuleLists that hold something and are in no other."""
    lists: list[nn.ModuleList] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and module not in inside:
            lists.append(module)
            inside.update(module.modules())
    return lists


def stacks_of(model: Any) -> list[nn.ModuleList]:
    """The stacks of blocks of a transformers model: the outermost ModuleLists whose every entry holds an attention
    module that calls the seam. Raises UserError unless there is one, or an encoder's and a decoder's, that hold them
    all."""
    holds = lambda module: any(hasattr(m, SEAM) for m in module.modules())
    stacks = [blocks for blocks in outermost_lists(model) if any(map(holds, blocks))]
    wanted = 2 if model.config.is_encoder_decoder else 1
    kind = model.config.model_type
    if len(stacks) != wanted:
        raise UserError(
            f"{kind} cannot be observed: its attention bypasses the interface, or it has {len(stacks)} stacks of "
            f"blocks with attention where {wanted} is needed"
        )
    if not all(map(holds, itertools.chain(*stacks))):
        raise UserError(f"{kind} cannot be observed: some blocks have no attention that goes through the interface")
    return stacks


class Event(NamedTuple):
    """A tensor like the stream that a module was called with or returned."""

    module: nn.Module
    place: str  # input, output
    value: torch.Tensor
    only_reader: bool = False  # of an input: no other module is given this tensor


class SeamCall(NamedTuple):
    """A call of a seam."""

    module: nn.Module
    kind: str  # attn, cross


Seen = Event | SeamCall


class Stack:
    """A stack of blocks, watched during a trial run to learn where in each block the stream is.

    `output`: the stream after the last block, (1, T, C), once it was watched.
    """

    output: torch.Tensor

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.blocks = blocks
        self.seams = [[getattr(m, SEAM) for m in b.modules() if hasattr(m, SEAM)] for b in blocks]
        self.seen: list[list[Seen]] = []  # of each block, in the order of the forward pass

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Records what is seen of each block."""
        self.seen = [[] for _ in self.blocks]
        forward, before = [], []
        for block, seams, seen in zip(self.blocks, self.seams, self.seen, strict=True):
            for module in block.modules():
                before.append((module, self._entered(seen, module is block)))
                forward.append((module, self._left(seen)))
            forward += [(seam, self._called(seen)) for seam in seams]
        with hooked(forward, before):
            yield
        self.output = events_in(self.seen[-1])[-1].value

    @staticmethod
    def _entered(seen: list[Seen], outermost: bool) -> Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            value: Any = args[0] if args else kwargs.get("hidden_states")
            if not seen and outermost:
                seen.append(Event(module, "input", value))
            elif outermost or like_stream(value, seen):
                seen.append(Event(module, "input", value.view(stream_into(seen).shape)))

        return hook

    @staticmethod
    def _left(seen: list[Seen]) -> Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if like_stream(value, seen):
                seen.append(Event(module, "output", value.view(stream_into(seen).shape)))

        return hook

    @staticmethod
    def _called(seen: list[Seen]) -> Hook:
        def hook(seam: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            q, k, _ = args
            seam.heads = q.size(1)
            seen.append(SeamCall(seam, "cross" if k.size(-2) != q.size(-2) else "attn"))

        return hook

    def taps(self) -> "Taps":
        """The Taps of the Subject. Raises UserError if a block cannot be understood."""
        found = Taps([Tap(-1, "embedding", self.blocks[0], "input")], [], {place: [] for place in PLACES}, [], [])
        for layer, (block, seams, seen) in enumerate(zip(self.blocks, self.seams, self.seen, strict=True)):
            calls = [call for call in seen if isinstance(call, SeamCall)]
            check_block(block, seams, seen, calls)
            found.attends.extend(Tap(layer, call.kind, call.module) for call in calls)
            steps = sub_layers(seen)
            kinds = [step.kind for step in steps]
            for i, step in enumerate(steps):
                again = kinds[:i].count(step.kind)
                kind = f"{step.kind}{again + 1}" if again else step.kind
                if len(found.reads) < len(found.streams):
                    found.reads.append(tap_of(layer, kind, step.normed) if step.normed else None)
                if step.sum:
                    found.streams.append(tap_of(layer, kind, step.sum))
                for place, taps in found.inner.items():
                    if event := getattr(step, place):
                        taps.append(tap_of(layer, kind, event))
            if not steps:
                found.reads.append(None)
            if not any(step.sum for step in steps):
                found.streams.append(Tap(layer, "block", block))
            for event in filter(is_output, seen):
                of = next((step for step in steps if torch.equal(event.value, step.output.value)), None)
                if of and of.norm:
                    found.gated.extend(gated_ffn(layer, event.module, of.norm))
        found.reads.append(None)  # what the last norm makes of the stream is read by no block
        return found._replace(streams=written_again(found.streams))


class Taps(NamedTuple):
    """What of a Subject a stack of blocks determines."""

    streams: list[Tap]
    reads: list[Tap | None]
    inner: dict[str, list[Tap]]
    gated: list[GatedFFN]
    attends: list[Tap]


def written_again(streams: list[Tap]) -> list[Tap]:
    """The taps of a stream, in order; what is written at one past which the stream goes on is carried to the next ones,
    up to one where it does not. Each sum is the one before plus an update, so an addition there is one here."""
    found: list[Tap] = []
    later: tuple[Tap, ...] = ()
    for tap in reversed(streams):
        if tap.writable or not later:
            found.append(tap)
            later = (tap,) if tap.writable else ()
        else:
            found.append(dataclasses.replace(tap, writable=True, carried=later))
            later = (tap, *later)
    return found[::-1]


def tap_of(layer: int, kind: str, event: Event) -> Tap:
    """The Tap where an Event was seen; what a module was only called with cannot be written there for others, unless
    it is the norm that the stream goes on through."""
    return Tap(layer, kind, event.module, event.place, writable=event.place == "output" or event.only_reader)


def check_block(block: nn.Module, seams: Sequence[nn.Module], seen: list[Seen], calls: list[SeamCall]) -> None:
    """Raises UserError for a block whose stream or attention is not what a Subject needs."""
    problems = {
        "its residual stream is not one vector per token": stream_into(seen).dim() != 3 or seen[-1].module is not block,
        "its attention calls the interface more than once, or its layers share weights": len(calls) > len(seams),
        "its attention bypasses the interface": len(calls) < len(seams),
    }
    for problem, found in problems.items():
        if found:
            raise UserError(f"{type(block).__name__} cannot be observed: {problem}")


def events_in(seen: Iterable[Seen]) -> list[Event]:
    """What was seen but for the calls of seams."""
    return [event for event in seen if isinstance(event, Event)]


def stream_into(seen: list[Seen]) -> torch.Tensor:
    """The stream that the block was called with: what was seen first."""
    first = seen[0]
    assert isinstance(first, Event)
    return first.value


def like_stream(value: object, seen: list[Seen]) -> TypeGuard[torch.Tensor]:
    """True for a tensor (1, T, C) or (T, C) as the block was called with."""
    block = stream_into(seen)
    return isinstance(value, torch.Tensor) and value.shape[-2:] == block.shape[-2:] and value.numel() == block.numel()


def is_output(seen: Seen) -> TypeGuard[Event]:
    """True for a tensor that a module returned."""
    return isinstance(seen, Event) and seen.place == "output"


class Step(NamedTuple):
    """A sub-layer of a block, as a trial run showed it: the sum after it, and the Events of PLACES."""

    kind: str
    sum: Event | None  # the stream before plus the update; None where a block adds all its updates at once
    normed: Event | None
    output: Event
    update: Event
    norm: nn.Module | None  # what made `normed`: an identity where it is the stream itself, None if not found


def is_norm(module: nn.Module) -> bool:
    """True for a module whose parameters are vectors only."""
    own = list(module.parameters())
    return bool(own) and all(p.dim() == 1 for p in own)


def has_matrix(module: nn.Module) -> bool:
    """True for a module that multiplies by a matrix of its own."""
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))


def sub_layers(seen: list[Seen]) -> list[Step]:
    """The sub-layers of a block, from what was seen of it, or [] where that does not add up, bit by bit, to its
    output (scaled residuals). Each adds an update to the stream, and a norm may follow; or all add theirs at once."""
    steps = _sequential(seen, 1, stream_into(seen)) or []
    return steps if len(steps) > 1 else _parallel(seen)


def _sequential(seen: list[Seen], start: int, stream: torch.Tensor) -> list[Step] | None:
    """The Steps from seen[start] on, where the stream is `stream`; None if they do not lead to the block's output."""
    last = events_in(seen)[-1]
    for i in range(start, len(seen)):
        total = seen[i]
        if not isinstance(total, Event) or total.value is stream:
            continue
        for update in filter(is_output, seen[start:i]):
            if not torch.equal(total.value, stream + update.value):
                continue
            for after in (total, _norm_of(seen, i)):  # pre-norm: the sum is the stream; post-norm: its norm is
                if after is None:
                    continue
                goes_on = total._replace(only_reader=True) if after is not total else total
                if torch.equal(after.value, last.value):
                    return [_step(seen, seen[start - 1 :], stream, update, goes_on if after is not total else last)]
                at = next(n for n in range(i, len(seen)) if seen[n] is after)
                rest = _sequential(seen, at + 1, after.value)
                if rest:
                    return [_step(seen, seen[start - 1 : at], stream, update, goes_on), *rest]
    return None


def _parallel(seen: list[Seen]) -> list[Step]:
    """The Steps of a block that adds two updates at once (GPT-NeoX, Phi); [] if it does not."""
    stream, last = stream_into(seen), events_in(seen)[-1]
    outputs = [(i, event) for i, event in enumerate(seen) if is_output(event)]
    for (i, one), (_, two) in itertools.combinations(outputs, 2):
        orders = itertools.permutations((one.value, two.value, stream))
        if any(torch.equal(last.value, a + b + c) for a, b, c in orders):
            return [
                _step(seen, seen[: i + 1], stream, one, None),
                _step(seen, seen[i + 1 :], stream, two, None),
            ]
    return []


def _norm_of(seen: list[Seen], i: int) -> Event | None:
    """The output of the norm whose input is seen[i], or None."""
    given = seen[i]
    if is_output(given) or not is_norm(given.module):
        return None
    return next((event for event in filter(is_output, seen[i + 1 :]) if event.module is given.module), None)


def _step(block: list[Seen], seen: list[Seen], stream: torch.Tensor, update: Event, total: Event | None) -> Step:
    """The Step that adds `update` to `stream`, from what was seen between; `block` is what was seen of the whole."""
    kinds = [call.kind for call in seen if isinstance(call, SeamCall)]
    inputs = [event for event in events_in(seen) if event.place == "input"]
    output = update
    if is_norm(update.module):
        output = next((event for event in inputs if event.module is update.module), update)
    normed = next((event for event in inputs if has_matrix(event.module)), None)
    norm = None
    if normed:
        made = [e for e in filter(is_output, block) if is_norm(e.module) and torch.equal(e.value, normed.value)]
        norm = made[0].module if made else nn.Identity() if torch.equal(normed.value, stream) else None
    return Step(kinds[0] if kinds else "ffn", total, normed, output, update, norm)
