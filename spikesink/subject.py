"""What the instruments need of a model: residual-stream taps, attention seams, token text."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Tap:
    """A module whose output is the residual stream (B, T, C) after a sub-layer, or after the embedding (layer -1)."""

    layer: int
    kind: str  # embedding, attn, ffn
    module: nn.Module


@dataclass(frozen=True)
class Subject:
    """A model under observation.

    `streams`: the taps, in the order of the forward pass. `attends`: per layer the attention seam, a module called
    as (q, k, v, bias=None) with q, k, v (B, H, T, D), that has `weights(q, k, first, bias)` -> (B, H, R, T).
    `decode`: one token id -> text.
    """

    model: nn.Module
    streams: list[Tap]
    attends: list[nn.Module]
    n_head: int
    decode: Callable[[int], str]

    @classmethod
    def of_gpt(cls, model, decode):
        """A GPT of model.py (recognised by its taps, not imported)."""
        net = model.transformer
        taps = [Tap(-1, "embedding", net.stream)]
        for layer, block in enumerate(net.h):
            taps += [Tap(layer, "attn", block.attn.stream), Tap(layer, "ffn", block.mlp.stream)]
        return cls(model.eval(), taps, [block.attn.f.attend for block in net.h], model.config.n_head, decode)

    @property
    def device(self):
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def losses(self, ids):
        """One forward pass: the next-token loss in nats of ids (B, T), as (B, T - 1), float32 on the CPU."""
        ids = ids.to(self.device)
        logits = self.model(ids)[0].float()
        losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        return losses.cpu()
