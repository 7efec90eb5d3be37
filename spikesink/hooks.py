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
    writable: bool = True  # what a hook writes here is what every later module reads
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
) -> Iterator[None]:
    """Within the block, (module, hook) pairs are registered: `forward` hooks are called as
    (module, args, kwargs, output), `before` hooks as (module, args, kwargs); what they return replaces it. `first` are
    forward hooks that run before those that are there already."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in forward]
    handles += [module.register_forward_hook(hook, with_kwargs=True, prepend=True) for module, hook in first]
    handles += [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in before]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_streams(
    taps: Iterable[Tap], functions: Iterable[Callable[[torch.Tensor], torch.Tensor | None]]
) -> contextlib.AbstractContextManager[None]:
    """A context manager in which functions[i](stream) is called at taps[i]; if it returns a tensor, that goes on."""
    pairs = list(zip(taps, functions, strict=True))
    return hooked(
        [(tap.module, _after(function, tap.made)) for tap, function in pairs if tap.place == "output"],
        [(tap.module, _before(function)) for tap, function in pairs if tap.place == "input"],
    )


def _after(function: Callable[[torch.Tensor], torch.Tensor | None], made: Callable[..., torch.Tensor] | None) -> Hook:
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


def _before(function: Callable[[torch.Tensor], torch.Tensor | None]) -> Hook:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = function(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    return hook
