"""Stock PyTorch hooks that are certain to come off again."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Hook = Callable[..., Any]  # what it returns, if anything, replaces the output or (args, kwargs)


@dataclass(frozen=True)
class Tap:
    """A module to hook: the stream (B, T, C) after a sub-layer or the embedding (layer -1), or an attention seam."""

    layer: int
    kind: str  # embedding, attn, cross, ffn, block
    module: Any  # an nn.Module; a seam has more to it, see Subject
    place: str = "output"  # where the module has the stream: input or output, alone or first in a tuple
    writable: bool = True  # what is written here with on_streams is what every later module reads
    # the next taps, where the module here is not all that reads the stream: what is written here is added there again
    carried: tuple["Tap", ...] = ()
    # (args, kwargs, output of the module) -> the stream, where the module neither takes nor returns it
    made: Callable[[tuple, dict[str, Any], Any], torch.Tensor] | None = None

    @property
    def name(self) -> str:
        """'embedding', 'attn 0', 'ffn 0', ..."""
        return self.kind if self.layer < 0 else f"{self.kind} {self.layer}"


@contextlib.contextmanager
def hooked(
    forward: Iterable[tuple[nn.Module, Hook]] = (),
    before: Iterable[tuple[nn.Module, Hook]] = (),
    first: Iterable[tuple[nn.Module, Hook]] = (),
    first_before: Iterable[tuple[nn.Module, Hook]] = (),
) -> Iterator[None]:
    """Within the block, (module, hook) pairs are registered: `forward` hooks are called as
    (module, args, kwargs, output), `before` hooks as (module, args, kwargs); what they return replaces it. `first` and
    `first_before` are the same, but run before those that are there already."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in forward]
    handles += [module.register_forward_hook(hook, with_kwargs=True, prepend=True) for module, hook in first]
    handles += [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in before]
    handles += [module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True) for module, hook in first_before]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Function = Callable[[torch.Tensor], torch.Tensor | None]


def on_streams(taps: Iterable[Tap], functions: Iterable[Function]) -> contextlib.AbstractContextManager[None]:
    """A context manager in which functions[i](stream) is called at taps[i]; if it returns a tensor, that goes on."""
    hooks: dict[str, list[tuple[nn.Module, Hook]]] = {"forward": [], "before": [], "first": [], "first_before": []}

    def add(tap: Tap, function: Function, first: bool = False) -> None:
        kind = ("first" if first else "forward") if tap.place == "output" else "first_before" if first else "before"
        hook = _after(function, tap.made) if tap.place == "output" else _before(function)
        hooks[kind].append((tap.module, hook))

    for tap, function in zip(taps, functions, strict=True):
        write, again = _carrying(function)
        for later in tap.carried:
            add(later, again, first=True)
        add(tap, write if tap.carried else function)
    return hooked(**hooks)


def _carrying(function: Function) -> tuple[Function, Function]:
    """(`function`, what adds to the stream, further on, the change that it made)."""
    change: list[torch.Tensor | None] = [None]

    def write(x: torch.Tensor) -> torch.Tensor | None:
        new = function(x)
        change[0] = None if new is None else new - x
        return new

    return write, lambda x: None if change[0] is None else x + change[0].view_as(x)


def _after(function: Function, made: Callable[..., torch.Tensor] | None) -> Hook:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if made:
            function(made(args, kwargs, output))
            return None
        stream, *rest = output if isinstance(output, tuple) else (output,)
        new = function(stream)
        if new is None:
            return None
        return (new, *rest) if isinstance(output, tuple) else new

    return hook


def _before(function: Function) -> Hook:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = function(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    return hook
