"""What the instruments need of a model: residual-stream taps, attention seams, token text."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

CHUNK_BYTES = 2**25  # of one chunk of rows of an attention map


def rows_at_once(q, k):
    """How many queries of q (B, H, T, D) to take at a time, so that their rows over the keys k fit CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (4 * q.size(0) * q.size(1) * k.size(-2)))


@dataclass(frozen=True)
class Tap:
    """A module to hook: the stream (B, T, C) after a sub-layer or the embedding (layer -1), or an attention seam."""

    layer: int
    kind: str  # embedding, attn, ffn, block
    module: nn.Module
    at: str = "output"  # where the module has the stream: input or output, alone or first in a tuple


@dataclass(frozen=True)
class Subject:
    """A model under observation.

    `streams`: the taps, in the order of the forward pass. `attends`: the attention seams, whose module is called as
    (q, k, v, bias=None) with q (B, H, T, D) and has `shares(q, k, first, bias)` -> rows of the map (B, H, R, T).
    `n_register`: learned tokens that stand before every sequence, in the streams and the maps; instruments number
    them -1, -2, ... where token ids stand. `decode`: one token id -> text.
    """

    model: nn.Module
    streams: list[Tap]
    attends: list[Tap]
    n_head: int
    n_register: int
    decode: Callable[[int], str]

    @classmethod
    def of_gpt(cls, model, decode):
        """A GPT of model.py (recognised by its taps, not imported)."""
        net = model.transformer
        taps = [Tap(-1, "embedding", net.stream)]
        seams = []
        for layer, block in enumerate(net.h):
            for kind, sub_layer in (("attn", block.attn), ("ffn", block.mlp)):
                taps.append(Tap(layer, kind, sub_layer.stream))
                if hasattr(sub_layer.f, "attend"):
                    seams.append(Tap(layer, kind, sub_layer.f.attend))
        return cls(model.eval(), taps, seams, model.config.n_head, model.config.n_register, decode)

    @property
    def device(self):
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    def seen(self, ids):
        """Token ids as the streams and maps have them: with the registers' numbers -1, -2, ... in front."""
        registers = -torch.arange(1, self.n_register + 1).expand(len(ids), -1)
        return torch.cat((registers, ids), dim=1)

    def text(self, token):
        """Text to show for an id of `seen`."""
        return f"<register {-1 - token}>" if token < 0 else self.decode(token)

    @torch.no_grad()
    def losses(self, ids):
        """One forward pass: the next-token loss in nats of ids (B, T), as (B, T - 1), float32 on the CPU."""
        ids = ids.to(self.device)
        logits = self.model(ids)[0].float()
        losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        return losses.cpu()
