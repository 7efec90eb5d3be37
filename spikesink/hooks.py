"""PyTorch hooks as context managers, so that they are always removed again."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Hook = Callable[..., Any]  # if it returns something, that replaces the output or (args, kwargs)


@dataclass(frozen=True)
class Tap:
    """A module to hook. It has the stream (B, T, C) after a sub-layer or the embedding (layer -1), or is a seam."""

    layer: int
    kind: str  # embedding, attn, cross, ffn, block
    module: Any  # an nn.Module; a seam also has the methods of subject.Seam
    place: str = "output"  # the stream is the module's input or output, alone or first in a tuple
    writable: bool = True  # every later module reads what on_streams writes here
    # other modules read this stream too: a change that is written here is written again at these later taps
    rewritten_at: tuple["Tap", ...] = ()
    # computes the stream from the module's (args, kwargs, output), where it is neither input nor output
    compute: Callable[[tuple, dict[str, Any], Any], torch.Tensor] | None = None

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
    """Registers (module, hook) pairs for the length of the block.

    `forward` hooks are called with (module, args, kwargs, output), and what they return replaces the output. `before`
    hooks are called with (module, args, kwargs), and replace (args, kwargs). The hooks in `first` and `first_before`
    run ahead of those that are already registered.
    """
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
    """A context manager that calls functions[i](stream) at taps[i]. A tensor that it returns replaces the stream."""
    hooks: dict[str, list[tuple[nn.Module, Hook]]] = {"forward": [], "before": [], "first": [], "first_before": []}

    def add(tap: Tap, function: Function, first: bool = False) -> None:
        kind = ("first" if first else "forward") if tap.place == "output" else "first_before" if first else "before"
        hook = _after(function, tap.compute) if tap.place == "output" else _before(function)
        hooks[kind].append((tap.module, hook))

    for tap, function in zip(taps, functions, strict=True):
        write, rewrite = _write_and_rewrite(function)
        for later_tap in tap.rewritten_at:
            add(later_tap, rewrite, first=True)
        add(tap, write if tap.rewritten_at else function)
    return hooked(**hooks)


def _write_and_rewrite(function: Function) -> tuple[Function, Function]:
    """Returns `function`, and a second function that adds the change which it made to the stream at a later tap."""
    change: list[torch.Tensor | None] = [None]

    def write(x: torch.Tensor) -> torch.Tensor | None:
        new = function(x)
        change[0] = None if new is None else new - x
        return new

    return write, lambda x: None if change[0] is None else x + change[0].view_as(x)


def _after(function: Function, compute: Callable[..., torch.Tensor] | None) -> Hook:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if compute:
            function(compute(args, kwargs, output))
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
