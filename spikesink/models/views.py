"""Views watch a model in training without changing it: its stream, and its queries and keys.

Everything here only reads. The trial run that finds the taps of a transformers model restores all that it changes. The
model's own attention function always computes its attention.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..hooks import Tap, hooked
from . import hf
from .blocks import Stack, outermost_lists, stacks_of
from .subject import SEAM, Seam, gpt_in, sub_layers_of


class Part(NamedTuple):
    """The sequences of one length in a batch."""

    rows: slice  # which sequences
    span: slice  # which positions are tokens


@dataclass(frozen=True)
class Attention:
    """An attention module to hook. `seam_inputs` gets the module's args and a Part, and returns that Part's
    (seam, q (B, H, T, D), k)."""

    name: str
    module: nn.Module
    seam_inputs: Callable[[tuple, Part], tuple[Seam, Tensor, Tensor]]


@dataclass(frozen=True)
class View:
    """The parts of a model that are watched: taps of the stream (B, T, C) and attention modules, if any.

    `model`: the module that is called with the batch. `attended`: the taps whose stream some attention reads; of taps
    that a user names, all. `mask`: the name of the argument with a 2-D padding mask. `around`: makes the context
    manager in which the hooks of the attention modules are called.
    """

    model: nn.Module
    streams: list[Tap]
    attends: list[Attention] = field(default_factory=list)
    mask: str = "attention_mask"
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    attended: slice = field(default_factory=lambda: slice(-1))


def view_of(model: nn.Module, streams: Mapping[str, nn.Module] | None = None) -> View:
    """The View of any model. `streams`, {name: module returning the stream}, replaces our search. Raises UserError."""
    if any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in model.modules()):
        raise compiled(model)
    if streams:
        return View(model, [Tap(-1, name, module) for name, module in streams.items()], attended=slice(None))
    return gpt_view(model) or transformers_view(model) or blocks_view(model)


def gpt_view(model: nn.Module) -> View | None:
    """The View of the GPT of model.py in `model`, or None."""
    gpt = gpt_in(model)
    if gpt is None:
        return None
    # we hook the sub-layers, since compiled code does not call the modules inside them
    sum_of = lambda s: None if isinstance(s.norm_after, nn.Identity) else functools.partial(_sum_again, s)
    taps = [Tap(layer, kind, s, compute=sum_of(s)) for layer, kind, s in sub_layers_of(gpt)]
    attending = [tap for tap in taps if hasattr(tap.module.f, "attend")]
    attends = [Attention(tap.name, tap.module, functools.partial(_qk_again, tap.module)) for tap in attending]
    return View(gpt, [Tap(-1, "embedding", gpt.transformer.stream), *taps], attends)


def _sum_again(sub_layer: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Tensor:
    """The sum of a sub-layer that has a norm behind it, computed again, as that of the first pass is out of reach. Runs
    the uncompiled code, with a new dropout mask."""
    sums: list[Tensor] = []
    device = args[0].device.type
    cast = torch.is_autocast_enabled(device)
    with (
        hooked(before=[(sub_layer.norm_after, lambda module, args, kwargs: sums.append(args[0]))]),
        torch.no_grad(),
        torch.random.fork_rng(),
        torch.autocast(device, torch.get_autocast_dtype(device), cast, cache_enabled=False),
    ):
        type(sub_layer).forward(sub_layer, *(_apart(arg) for arg in args), **kwargs)
    return sums[0]


def _apart(arg: Any) -> Any:
    """A Context (see model.py) in which a second call of a sub-layer leaves nothing that the first pass reads."""
    if not hasattr(arg, "carry"):
        return arg
    copied = copy.copy(arg)
    vars(copied).update({name: value.copy() for name, value in vars(arg).items() if isinstance(value, dict)})
    return copied


def _qk_again(sub_layer: Any, args: tuple, part: Part) -> tuple[Seam, Tensor, Tensor]:
    """(seam, queries, keys), computed again from the sub-layer's input, as its own are out of reach."""
    q, k, _ = sub_layer.f.qkv(sub_layer.norm_before(args[0][part.rows, part.span]))
    return sub_layer.f.attend, q, k


# ------------------------------------------------------------------------------------------------ transformers


class OwnSeam(hf.HFSeam):
    """The seam of an attention module whose own function still computes its output."""

    own_attention: Callable[[Tensor, Tensor, Tensor], Any]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Any:
        """Returns the output of the model's own function."""
        assert bias is None  # views only read
        return self.own_attention(q, k, v)

    def seam_inputs(self, args: tuple, part: Part) -> tuple[Seam, Tensor, Tensor]:
        """See Attention. The mask and the position bias are cut to the part, too."""
        rows, span = part
        cut = lambda x: x[rows if len(x) > 1 else slice(None), :, span if x.size(-2) > 1 else slice(None), span]
        seam = copy.copy(self)
        seam.mask, seam.position_bias = (None if x is None else cut(x) for x in (self.mask, self.position_bias))
        return seam, *(x[rows, :, span] for x in args[:2])


@contextlib.contextmanager
def reading(seam_of: Callable[[nn.Module], "OwnSeam | None"]) -> Iterator[None]:
    """In the block, every attention module with an OwnSeam, seam_of(module), calls its function through that seam."""
    from transformers import AttentionInterface

    interface_class: Any = AttentionInterface
    get_interface = interface_class.get_interface

    def through_seams(interface: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        own_attention = get_interface(interface, name, default)

        def function(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
        ) -> Any:
            seam = seam_of(module)
            call = lambda q, k, v: own_attention(module, q, k, v, attention_mask, **kwargs)
            if seam is None or name not in ("sdpa", "eager"):  # masks of other implementations are not tensors
                return call(query, key, value)
            seam.set(module, attention_mask, **kwargs)
            seam.own_attention = call
            try:
                return seam(query, key, value)
            finally:
                del seam.own_attention, seam.mask, seam.position_bias, seam.sinks  # free the batch

        return function

    interface_class.get_interface = through_seams
    try:
        yield
    finally:
        interface_class.get_interface = get_interface


def transformers_view(model: nn.Module) -> View | None:
    """The View of the transformers model in `model`; in an encoder-decoder, the decoder's. None if that fails."""
    inner = hf.transformers_in(model)
    if inner is None:
        return None
    try:
        return _try_view(inner)
    except Exception:  # models fail in many ways, and their blocks can still be watched
        return None


@torch.no_grad()
def _try_view(model: Any) -> View:
    seams: dict[nn.Module, OwnSeam] = {}

    def make(module: nn.Module) -> OwnSeam:
        if module not in seams:
            seams[module] = OwnSeam()
            object.__setattr__(module, SEAM, seams[module])  # where blocks.py looks for it
        return seams[module]

    inputs = hf.trial_inputs(model)
    with as_it_was(model), reading(make):
        model.eval()(**inputs)
        stack = Stack(stacks_of(model)[-1])
        with stack.watched():
            model(**inputs)
        taps = stack.taps()
    attends = [Attention(tap.name, tap.module, tap.module.seam_inputs) for tap in taps.attends if tap.kind == "attn"]
    mask = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    return View(model, taps.streams, attends, mask, lambda: reading(seams.get))


# attributes that a module may have besides its class's: seams, GPT-Neo's attention, and compiled code
PATCHED_ATTRIBUTES = (SEAM, "_attn", "_compiled_call_impl", "forward")


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Restores a model after the block: training modes, seams, transformers configs, and torch's random state.

    In the block, a model (or a sub-layer of a GPT) that was compiled in place runs uncompiled, since compiled code
    calls no hooks.
    """
    modules = list(model.modules())
    modes = [m.training for m in modules]
    patches = [{name: vars(m)[name] for name in PATCHED_ATTRIBUTES if name in vars(m)} for m in modules]
    configs = [config for m in modules for config in _configs(getattr(m, "config", None))]
    settings = [dict(vars(config)) for config in configs]
    gpt = gpt_in(model)
    try:
        for module in modules:
            vars(module).pop("_compiled_call_impl", None)
        for _, _, sub_layer in sub_layers_of(gpt) if gpt else ():  # other models may need accelerate's forward
            vars(sub_layer).pop("forward", None)
        with torch.random.fork_rng():
            yield
    finally:
        for module, mode, attributes in zip(modules, modes, patches, strict=True):
            module.training = mode
            for name in PATCHED_ATTRIBUTES:
                vars(module).pop(name, None)
            vars(module).update(attributes)
        for config, setting in zip(configs, settings, strict=True):
            vars(config).clear()
            vars(config).update(setting)


def _configs(config: Any) -> Iterator[Any]:
    """Yields a transformers config and its inner configs, as setting an attention implementation changes all."""
    if hasattr(config, "sub_configs"):
        yield config
        for name in config.sub_configs:
            yield from _configs(getattr(config, name, None))


# ------------------------------------------------------------------------------------------------ any other


def blocks_view(model: nn.Module) -> View:
    """The View of a model whose blocks are its longest outermost ModuleList. Raises UserError without one."""
    lists = outermost_lists(model)
    if not lists:
        raise no_stream(model)
    longest = max(lists, key=len)
    return View(model, [Tap(i, "block", block) for i, block in enumerate(longest)])


def compiled(model: nn.Module) -> UserError:
    """The UserError for a model that is compiled as a whole, so that its hooks are not called."""
    return UserError(
        f"{type(model).__name__} is compiled as a whole, so it cannot be watched: compile the forward of each "
        "sub-layer by itself, as GPT.compile in model.py does"
    )


def no_stream(model: nn.Module) -> UserError:
    """The UserError for a model whose stream was not found."""
    return UserError(
        f"cannot find the residual stream of {type(model).__name__}: name modules that return it, "
        "(B, T, C), as Monitor(model, streams={'block 0': module, ...})"
    )
