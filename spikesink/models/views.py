"""A model in training, watched and left as it is: where its stream passes, and its queries and keys.

Everything here only reads. The trial run that finds the taps of a transformers model restores what it touches, and
the model's own attention function computes its attention throughout.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UserError
from ..hooks import Tap, hooked
from . import hf
from .blocks import Stack, outermost_lists, stacks_of
from .subject import SEAM, Seam, gpt_in, sub_layers_of


class Part(NamedTuple):
    """Sequences of one length in a batch: which of them, and which of its positions are tokens."""

    rows: slice
    span: slice


@dataclass(frozen=True)
class Attention:
    """An attention module to hook. `of`: (what it was called with, a Part) -> (seam, q (B, H, T, D), k), the part's."""

    name: str
    module: nn.Module
    of: Callable[[tuple, Part], tuple[Seam, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class View:
    """What is watched of a model: taps of the stream (B, T, C) and its attention, perhaps none.

    `attended`: the taps whose stream some attention reads, as Subject has it; those that a user names all count.
    `model`: what is called with the batch. `mask`: the argument in which a 2-D mask says what is padding. `around`:
    makes a context in which the attention modules' hooks are called.
    """

    model: nn.Module
    streams: list[Tap]
    attends: list[Attention] = field(default_factory=list)
    mask: str = "attention_mask"
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    attended: slice = field(default_factory=lambda: slice(-1))


def view_of(model: nn.Module, streams: Mapping[str, nn.Module] | None = None) -> View:
    """The View of any model; `streams`, {name: module that returns the stream}, says where it is. Raises UserError."""
    if any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in model.modules()):
        raise compiled(model)
    if streams:
        return View(model, [Tap(-1, name, module) for name, module in streams.items()], attended=slice(None))
    return of_gpt(model) or of_transformers(model) or of_blocks(model)


def of_gpt(model: nn.Module) -> View | None:
    """The View of the GPT of a model.py in `model`, or None."""
    gpt = gpt_in(model)
    if gpt is None:
        return None
    # sub-layers, not the taps inside them, which compiled code does not call
    taps = [Tap(layer, kind, s, made=_sum_of(s)) for layer, kind, s in sub_layers_of(gpt)]
    attends = [
        Attention(tap.name, tap.module, _of_sub_layer(tap.module)) for tap in taps if hasattr(tap.module.f, "attend")
    ]
    return View(gpt, [Tap(-1, "embedding", gpt.transformer.stream), *taps], attends)


def _sum_of(sub_layer: Any) -> Callable[[tuple, dict[str, Any], Any], torch.Tensor] | None:
    """None where a sub-layer returns its sum. Where a norm follows on it, what makes the sum anew, as it is written and
    not compiled, with dropout drawn anew: what the sub-layer made of it is not at hand."""
    if isinstance(sub_layer.norm_after, nn.Identity):
        return None

    def made(args: tuple, kwargs: dict[str, Any], output: Any) -> torch.Tensor:
        sums: list[torch.Tensor] = []
        device = args[0].device.type
        cast = torch.is_autocast_enabled(device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(hooked(before=[(sub_layer.norm_after, lambda m, args, kwargs: sums.append(args[0]))]))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng())
            stack.enter_context(torch.autocast(device, torch.get_autocast_dtype(device), cast, cache_enabled=False))
            type(sub_layer).forward(sub_layer, *(_apart(arg) for arg in args), **kwargs)
        return sums[0]

    return made


def _apart(arg: Any) -> Any:
    """A Context (see model.py) in which a second call of a sub-layer leaves nothing that the first pass reads."""
    if not hasattr(arg, "carry"):
        return arg
    copied = copy.copy(arg)
    vars(copied).update({name: value.copy() for name, value in vars(arg).items() if isinstance(value, dict)})
    return copied


def _of_sub_layer(sub_layer: Any) -> Callable[[tuple, Part], tuple[Seam, torch.Tensor, torch.Tensor]]:
    """Queries and keys anew, from the stream that the sub-layer was called with: what it made of it is not at hand."""

    def of(args: tuple, part: Part) -> tuple[Seam, torch.Tensor, torch.Tensor]:
        q, k, _ = sub_layer.f.qkv(sub_layer.norm_before(args[0][part.rows, part.span]))
        return sub_layer.f.attend, q, k

    return of


# ------------------------------------------------------------------------------------------------ transformers


class OwnSeam(hf.HFSeam):
    """The seam of an attention module whose own function, `own`, goes on computing its output."""

    own: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        """What the model's own function returns."""
        assert bias is None  # nothing is edited where one only reads
        return self.own(q, k, v)

    def of(self, args: tuple, part: Part) -> tuple[Seam, torch.Tensor, torch.Tensor]:
        """As Attention has it; the mask, too, is cut to the part."""
        rows, span = part
        cut = lambda x: x[rows if len(x) > 1 else slice(None), :, span if x.size(-2) > 1 else slice(None), span]
        seam = copy.copy(self)
        seam.mask, seam.position_bias = (None if x is None else cut(x) for x in (self.mask, self.position_bias))
        return seam, *(x[rows, :, span] for x in args[:2])


@contextlib.contextmanager
def reading(seam_of: Callable[[nn.Module], "OwnSeam | None"]) -> Iterator[None]:
    """Within, every attention module for which seam_of(module) is not None calls its function through that OwnSeam."""
    from transformers import AttentionInterface

    interface_class: Any = AttentionInterface
    get_interface = interface_class.get_interface

    def through_seams(interface: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        own = get_interface(interface, name, default)

        def function(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            seam = seam_of(module)
            call = lambda q, k, v: own(module, q, k, v, attention_mask, **kwargs)
            if seam is None or name not in ("sdpa", "eager"):  # others have masks that are no tensors
                return call(query, key, value)
            about = {key: kwargs.get(key) for key in ("scaling", "softcap", "position_bias", "is_causal")}
            seam.set(module, attention_mask, **about, sinks=kwargs.get("s_aux", getattr(module, "sinks", None)))
            seam.own = call
            try:
                return seam(query, key, value)
            finally:
                del seam.own, seam.mask, seam.position_bias, seam.sinks  # nothing of the batch is kept

        return function

    interface_class.get_interface = through_seams
    try:
        yield
    finally:
        interface_class.get_interface = get_interface


def of_transformers(model: nn.Module) -> View | None:
    """The View of the transformers model in `model`, of an encoder-decoder its decoder; None where it cannot be had."""
    found = hf.found_in(model)
    if found is None:
        return None
    try:
        return _tried(found)
    except Exception:  # models fail in their own ways, and their streams may be had all the same
        return None


@torch.no_grad()
def _tried(model: Any) -> View:
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
    attends = [Attention(tap.name, tap.module, tap.module.of) for tap in taps.attends if tap.kind == "attn"]
    mask = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    return View(model, taps.streams, attends, mask, lambda: reading(seams.get))


# attributes of a module that hide its class's: seams, GPT-Neo's attention, and what torch.compile puts there
OWN = (SEAM, "_attn", "_compiled_call_impl", "forward")


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """After the block the modes of a model's modules, their seams, their transformers configs (with the attention
    implementation) and torch's random state are what they were before it, whatever was done to them within.

    Within, what was compiled in place (a model, or the sub-layers of a GPT of model.py) runs as it is written: compiled
    code calls no hook.
    """
    modules = list(model.modules())
    modes = [m.training for m in modules]
    own = [{name: vars(m)[name] for name in OWN if name in vars(m)} for m in modules]
    configs = [config for m in modules for config in _configs(getattr(m, "config", None))]
    settings = [dict(vars(config)) for config in configs]
    gpt = gpt_in(model)
    try:
        for module in modules:
            vars(module).pop("_compiled_call_impl", None)
        for _, _, sub_layer in sub_layers_of(gpt) if gpt else ():  # others' forward may be accelerate's
            vars(sub_layer).pop("forward", None)
        with torch.random.fork_rng():
            yield
    finally:
        for module, mode, attributes in zip(modules, modes, own, strict=True):
            module.training = mode
            for name in OWN:
                vars(module).pop(name, None)
            vars(module).update(attributes)
        for config, setting in zip(configs, settings, strict=True):
            vars(config).clear()
            vars(config).update(setting)


def _configs(config: Any) -> Iterator[Any]:
    """A transformers config and those within it, as they are: setting the outer one's attention sets theirs."""
    if hasattr(config, "sub_configs"):
        yield config
        for name in config.sub_configs:
            yield from _configs(getattr(config, name, None))


# ------------------------------------------------------------------------------------------------ any other


def of_blocks(model: nn.Module) -> View:
    """The View of a model whose blocks are the longest ModuleList that is in no other. Raises UserError without one."""
    lists = outermost_lists(model)
    if not lists:
        raise no_stream(model)
    longest = max(lists, key=len)
    return View(model, [Tap(i, "block", block) for i, block in enumerate(longest)])


def compiled(model: nn.Module) -> UserError:
    """The UserError of a model whose modules are called by compiled code, which calls no hook."""
    return UserError(
        f"{type(model).__name__} is compiled as a whole, where nothing can be watched: compile the forward of its "
        "sub-layers, each by itself, as GPT.compile of model.py does"
    )


def no_stream(model: nn.Module) -> UserError:
    """The UserError of a model whose stream is not where it was looked for."""
    return UserError(
        f"where the residual stream of {type(model).__name__} is cannot be told: name modules that return it, "
        "(B, T, C), as Monitor(model, streams={'block 0': module, ...})"
    )
