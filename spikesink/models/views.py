"""A model in training, watched and left as it is: where its stream passes, and its queries and keys.

Everything here only reads. The trial run that finds the taps of a transformers model restores what it touches, and
the model's own attention function computes its attention throughout.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from ..errors import UserError
from . import hf
from .blocks import Stack, stacks_of
from .subject import SEAM, Subject, Tap


class Part(NamedTuple):
    """Sequences of one length in a batch: which of them, and which of its positions are tokens."""

    rows: slice
    span: slice


@dataclass(frozen=True)
class Attention:
    """An attention module to hook. `of`: (what it was called with, a Part) -> (seam, q (B, H, T, D), k), the part's."""

    name: str
    module: nn.Module
    of: Callable


@dataclass(frozen=True)
class View:
    """What is watched of a model: taps of the stream (B, T, C) and its attention, perhaps none.

    `model`: what is called with the batch. `mask`: the argument in which a 2-D mask says what is padding. `around`:
    makes a context in which the attention modules' hooks are called.
    """

    model: nn.Module
    streams: list[Tap]
    attends: list[Attention] = field(default_factory=list)
    mask: str = "attention_mask"
    around: Callable = contextlib.nullcontext


def view_of(model, streams=None):
    """The View of any model; `streams`, {name: module that returns the stream}, says where it is. Raises UserError."""
    if any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in model.modules()):
        raise compiled(model)
    if streams:
        return View(model, [Tap(-1, name, module) for name, module in streams.items()])
    return next(view for view in (kind(model) for kind in KINDS) if view)


def gpt_in(model):
    """The GPT of a model.py in `model` (recognised by its taps, not imported), or None."""
    tapped = lambda m: isinstance(getattr(m, "transformer", None), nn.ModuleDict) and "stream" in m.transformer
    return next((m for m in model.modules() if tapped(m)), None)


def of_gpt(model):
    """The View of a GPT of model.py (recognised by its taps, not imported), or None."""
    gpt = gpt_in(model)
    if gpt is None:
        return None
    streams, attends = [Tap(-1, "embedding", gpt.transformer.stream)], []
    for layer, block in enumerate(gpt.transformer.h):
        for kind, sub_layer in (("attn", block.attn), ("ffn", block.mlp)):
            tap = Tap(layer, kind, sub_layer)  # not a module inside it, which compiled code does not call
            streams.append(tap)
            if hasattr(sub_layer.f, "attend"):
                attends.append(Attention(tap.name, sub_layer, _of_sub_layer(sub_layer)))
    return View(gpt, streams, attends)


def _of_sub_layer(sub_layer):
    """Queries and keys anew, from the stream that the sub-layer was called with: what it made of it is not at hand."""

    def of(args, part):
        q, k, _ = sub_layer.f.qkv(sub_layer.norm_before(args[0][part.rows, part.span]))
        return sub_layer.f.attend, q, k

    return of


# ------------------------------------------------------------------------------------------------ transformers


class OwnSeam(hf.HFSeam):
    """The seam of an attention module whose own function, `own`, goes on computing its output."""

    def forward(self, q, k, v):
        """What the model's own function returns."""
        return self.own(q, k, v)

    def of(self, args, part):
        """As Attention has it; the mask, too, is cut to the part."""
        rows, span = part
        cut = lambda x: x[rows if len(x) > 1 else slice(None), :, span if x.size(-2) > 1 else slice(None), span]
        seam = copy.copy(self)
        seam.mask, seam.position_bias = (None if x is None else cut(x) for x in (self.mask, self.position_bias))
        return seam, *(x[rows, :, span] for x in args[:2])


@contextlib.contextmanager
def reading(seam_of):
    """Within, every attention module for which seam_of(module) is not None calls its function through that OwnSeam."""
    from transformers import AttentionInterface

    get_interface = AttentionInterface.get_interface

    def through_seams(interface, name, default):
        own = get_interface(interface, name, default)

        def function(module, query, key, value, attention_mask=None, **kwargs):
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

    AttentionInterface.get_interface = through_seams
    try:
        yield
    finally:
        AttentionInterface.get_interface = get_interface


def of_transformers(model):
    """The View of the transformers model in `model`, of an encoder-decoder its decoder; None where it cannot be had."""
    found = hf.found_in(model)
    if found is None:
        return None
    try:
        return _tried(found)
    except Exception:  # models fail in their own ways, and their streams may be had all the same
        return None


@torch.no_grad()
def _tried(model):
    both = model.config.is_encoder_decoder
    with as_it_was(model):
        model.eval()
        seams = {}

        def make(module):
            if module not in seams:
                seams[module] = OwnSeam()
                object.__setattr__(module, SEAM, seams[module])  # where blocks.py looks for it
            return seams[module]

        ids = torch.arange(3, 19, device=Subject(model, [], [], 0, 0, str, None).device)[None] % model.config.vocab_size
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :11]} if both else {})
        with reading(make):
            model(**inputs)
            stack = Stack(stacks_of(model)[-1])
            with stack.watched():
                model(**inputs)
            taps = stack.taps()
    attends = [Attention(tap.name, tap.module, tap.module.of) for tap in taps.attends if tap.kind == "attn"]
    return View(
        model, taps.streams, attends, "decoder_attention_mask" if both else "attention_mask", lambda: reading(seams.get)
    )


OWN = (SEAM, "_attn")  # what instruments put beside a module's own attributes
SETTINGS = ("_attn_implementation", "use_cache", "return_dict")  # and what they set in a transformers config


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """After the block the model's modes, attention implementation and attributes, and torch's random state, are what
    they were before it, whatever was done to them within."""
    modules = list(model.modules())
    modes = [m.training for m in modules]
    own = [{name: vars(m)[name] for name in OWN if name in vars(m)} for m in modules]
    configs = {id(m.config): m.config for m in modules if hasattr(getattr(m, "config", None), "_attn_implementation")}
    settings = [(c, {key: getattr(c, key) for key in SETTINGS if hasattr(c, key)}) for c in configs.values()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, mode, before in zip(modules, modes, own, strict=True):
            module.training = mode
            for name in OWN:
                vars(module).pop(name, None)
            for name, value in before.items():
                object.__setattr__(module, name, value)
        for config, before in settings:
            for key, value in before.items():
                setattr(config, key, value)


# ------------------------------------------------------------------------------------------------ any other


def of_blocks(model):
    """The View of a model whose blocks are the longest ModuleList that is in no other. Raises UserError without one."""
    lists, inside = [], set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and module not in inside:
            lists.append(module)
            inside.update(module.modules())
    if not lists:
        raise no_stream(model)
    return View(model, [Tap(i, "block", block) for i, block in enumerate(max(lists, key=len))])


def compiled(model):
    """The UserError of a model whose modules are called by compiled code, which calls no hook."""
    return UserError(
        f"{type(model).__name__} is compiled as a whole, where nothing can be watched: compile the forward of its "
        "sub-layers, each by itself, as GPT.compile of model.py does"
    )


def no_stream(model):
    """The UserError of a model whose stream is not where it was looked for."""
    return UserError(
        f"where the residual stream of {type(model).__name__} is cannot be told: name modules that return it, "
        "(B, T, C), as Monitor(model, streams={'block 0': module, ...})"
    )


# tried in this order; the last one raises
KINDS = (of_gpt, of_transformers, of_blocks)
