"""Where in a transformers block the residual stream is: learned from the tensors of a trial run, not from names.

A block is followed sub-layer by sub-layer: the tensor that is, bit by bit, the stream before plus something a module
returned is the stream after it (pre-norm), or what a norm makes of that sum is (post-norm).
"""

import contextlib
import itertools
from typing import NamedTuple

import torch
from torch import nn

from ..errors import UserError
from ..hooks import hooked
from .subject import PLACES, SEAM, Tap, gated_ffn


def stacks_of(model):
    """The stacks of blocks: the outermost ModuleLists whose every entry holds an attention module that calls the
    seam. Raises UserError unless there is one, or an encoder's and a decoder's, that hold them all."""
    holds = lambda module: any(hasattr(m, SEAM) for m in module.modules())
    stacks, inside = [], set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside and len(module) and any(map(holds, module)):
            stacks.append(module)
            inside.update(module.modules())
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
    at: str  # input, output
    value: torch.Tensor


class Stack:
    """A stack of blocks, watched during a trial run to learn where in each block the stream is."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.seams = [[getattr(m, SEAM) for m in b.modules() if hasattr(m, SEAM)] for b in blocks]

    @contextlib.contextmanager
    def watched(self):
        """Records the Events of each block; a call of a seam is an event too, with its module as value."""
        self.events = [[] for _ in self.blocks]
        self.output = None
        forward, before = [], []
        for block, seams, events in zip(self.blocks, self.seams, self.events, strict=True):
            for module in block.modules():
                before.append((module, self._entered(events, module is block)))
                forward.append((module, self._left(events)))
            forward += [(seam, self._called(events)) for seam in seams]
        with hooked(forward, before):
            yield
        self.output = self.events[-1][-1].value

    @staticmethod
    def _entered(events, outermost):
        def hook(module, args, kwargs):
            value = args[0] if args else kwargs.get("hidden_states")
            if outermost or like_stream(value, events):
                events.append(Event(module, "input", value.view(events[0].value.shape if events else value.shape)))

        return hook

    @staticmethod
    def _left(events):
        def hook(module, args, kwargs, output):
            value = output[0] if isinstance(output, tuple) else output
            if like_stream(value, events):
                events.append(Event(module, "output", value.view(events[0].value.shape)))

        return hook

    @staticmethod
    def _called(events):
        def hook(seam, args, kwargs, output):
            q, k, _ = args
            seam.heads = q.size(1)
            events.append(Event(seam, "cross" if k.size(-2) != q.size(-2) else "attn", output))

        return hook

    def taps(self):
        """The Taps of the Subject. Raises UserError if a block cannot be understood."""
        found = Taps([Tap(-1, "embedding", self.blocks[0], "input")], {place: [] for place in PLACES}, [], [])
        for layer, (block, seams, events) in enumerate(zip(self.blocks, self.seams, self.events, strict=True)):
            calls = [event for event in events if event.module in seams]
            check_block(block, seams, events, calls)
            found.attends.extend(Tap(layer, event.at, event.module) for event in calls)
            steps = sub_layers(events)
            kinds = [step.kind for step in steps]
            for i, step in enumerate(steps):
                again = kinds[:i].count(step.kind)
                kind = f"{step.kind}{again + 1}" if again else step.kind
                if steps[0].stream:
                    found.streams.append(tap_of(layer, kind, step.stream))
                for place, taps in found.inner.items():
                    if getattr(step, place):
                        taps.append(tap_of(layer, kind, getattr(step, place)))
            if not steps or not steps[0].stream:
                found.streams.append(Tap(layer, "block", block))
            for event in events:
                of = next((s for s in steps if event.at == "output" and torch.equal(event.value, s.output.value)), None)
                if of and of.norm:
                    found.gated.extend(gated_ffn(layer, event.module, of.norm))
        return found


class Taps(NamedTuple):
    """What of a Subject a stack of blocks determines."""

    streams: list
    inner: dict
    gated: list
    attends: list


def tap_of(layer, kind, event):
    """The Tap where an Event was seen; what a module was only called with cannot be written there for others."""
    return Tap(layer, kind, event.module, event.at, writable=event.at == "output")


def check_block(block, seams, events, calls):
    """Raises UserError for a block whose stream or attention is not what a Subject needs."""
    problems = {
        "its residual stream is not one vector per token": events[0].value.dim() != 3 or events[-1].module is not block,
        "its attention calls the interface more than once, or its layers share weights": len(calls) > len(seams),
        "its attention bypasses the interface": len(calls) < len(seams),
    }
    for problem, found in problems.items():
        if found:
            raise UserError(f"{type(block).__name__} cannot be observed: {problem}")


def like_stream(value, events):
    """True for a tensor (1, T, C) or (T, C) as the block was called with."""
    block = events[0].value
    return isinstance(value, torch.Tensor) and value.shape[-2:] == block.shape[-2:] and value.numel() == block.numel()


class Step(NamedTuple):
    """A sub-layer of a block, as a trial run showed it: the stream after it, and the Events of PLACES."""

    kind: str
    stream: Event | None  # None where the next sub-layer's update is added at the same time
    normed: Event | None
    output: Event
    update: Event
    norm: nn.Module | None  # what made `normed`: an identity where it is the stream itself, None if not found


def is_norm(module):
    """True for a module whose parameters are vectors only."""
    own = list(module.parameters())
    return bool(own) and all(p.dim() == 1 for p in own)


def sub_layers(events):
    """The sub-layers of a block, from the tensors seen in it, or [] where those do not add up, bit by bit, to its
    output (scaled residuals). Each adds an update to the stream, and a norm may follow; or all add theirs at once."""
    steps = _sequential(events, 1, events[0].value) or []
    return steps if len(steps) > 1 else _parallel(events)


def _sequential(events, start, stream):
    """The Steps from events[start] on, where the stream is `stream`; None if they do not lead to the last event."""
    last = events[-1]
    for i in range(start, len(events)):
        seen = events[i]
        for update in events[start:i]:
            if seen.at not in ("input", "output") or update.at != "output":
                continue
            if seen.value is stream or not torch.equal(seen.value, stream + update.value):
                continue
            for after in (seen, _norm_of(events, i)):  # pre-norm: the sum is the stream; post-norm: its norm is
                if after is None:
                    continue
                if torch.equal(after.value, last.value):
                    return [_step(events, events[start - 1 :], stream, update, last)]
                at = next(n for n in range(i, len(events)) if events[n] is after)
                rest = _sequential(events, at + 1, after.value)
                if rest:
                    return [_step(events, events[start - 1 : at], stream, update, after), *rest]
    return None


def _parallel(events):
    """The Steps of a block that adds two updates at once (GPT-NeoX, Phi); [] if it does not."""
    stream, last = events[0].value, events[-1]
    outputs = [i for i in range(1, len(events)) if events[i].at == "output"]
    for i, j in itertools.combinations(outputs, 2):
        one, two = events[i], events[j]
        orders = itertools.permutations((one.value, two.value, stream))
        if any(torch.equal(last.value, a + b + c) for a, b, c in orders):
            return [
                _step(events, events[: i + 1], stream, one, None),
                _step(events, events[i + 1 :], stream, two, last),
            ]
    return []


def _norm_of(events, i):
    """The output of the norm whose input is events[i], or None."""
    if events[i].at != "input" or not is_norm(events[i].module):
        return None
    return next((e for e in events[i + 1 :] if e.module is events[i].module and e.at == "output"), None)


def _step(block, events, stream, update, after):
    """The Step that adds `update` to `stream`, from the Events between; `block` are those of the whole block."""
    kinds = [event.at for event in events if event.at in ("attn", "cross")]
    output = update
    if is_norm(update.module):
        output = next((e for e in events if e.module is update.module and e.at == "input"), update)
    normed = next((e for e in events if e.at == "input" and has_matrix(e.module)), None)
    norm = None
    if normed:
        made = [
            e.module for e in block if e.at == "output" and is_norm(e.module) and torch.equal(e.value, normed.value)
        ]
        norm = made[0] if made else nn.Identity() if torch.equal(normed.value, stream) else None
    return Step(kinds[0] if kinds else "ffn", after, normed, output, update, norm)


def has_matrix(module):
    """True for a module that multiplies by a matrix of its own."""
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))
