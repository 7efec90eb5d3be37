"""A few sequences of the text, recorded token by token during a pass. Pages show them; they are small for any model.

A model of L layers and H heads on T tokens gives at most SEQUENCES x TOKENS tokens, HEADS heads, and LAYERS matrices of
TOKENS x CHANNELS. Arrays are bfloat16 in base64, two bytes per number with about three digits: `unpacked` reads them.
"""

import base64
from dataclasses import dataclass, field

import numpy as np
import torch

from . import metrics
from .findings import MatrixEntry, Packed
from .spikes import TapBatch

SEQUENCES, TOKENS, HEADS = 3, 128, 512
LAYERS, CHANNELS, EXTREME = 16, 128, 8  # the number of matrices, their bins, and the channels with bins of their own


@dataclass
class Examples:
    """Records the first `tokens` of the first `sequences` of a pass; `shown` of these become findings."""

    sequences: int = SEQUENCES
    tokens: int = TOKENS
    shown: int = TOKENS
    # (tap, sequence) -> each token's largest |h| over the median (T,)
    relative: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    alpha: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # (seam, sequence) -> alpha (H, T)
    matrices: list[MatrixEntry] = field(default_factory=list)  # the first sequence's, tap by tap

    def add_stream(self, tap: int, name: str, rows: torch.Tensor, batch: TapBatch) -> None:
        """Adds one batch at a tap; `rows`: the numbers of its sequences."""
        for b, n in self._recorded(rows):
            median = metrics.zero_is_nan(batch.median[b])
            self.relative[tap, n] = (batch.magnitude[b, : self.tokens] / median).nan_to_num(0.0).cpu()
            if n == 0:
                values, starts = binned(batch.x[b, : min(self.tokens, TOKENS)].abs())
                entry = MatrixEntry(
                    layer=name,
                    values=packed(values),
                    starts=" ".join(map(str, starts)),
                    n_channels=batch.x.size(-1),
                    median=batch.median[b].item(),
                )
                self.matrices.append(entry)

    def add_attention(self, seam: int, rows: torch.Tensor, alpha: torch.Tensor) -> None:
        """Adds one batch's alpha (B, H, T) of a seam."""
        for b, n in self._recorded(rows):
            self.alpha[seam, n] = alpha[b, :, : self.tokens].clone()

    def _recorded(self, rows: torch.Tensor) -> list[tuple[int, int]]:
        return [(b, n) for b, n in enumerate(rows.tolist()) if n < self.sequences]

    def shown_matrices(self) -> list[MatrixEntry]:
        """At most LAYERS of the matrices: evenly spread, with that of the tap of the largest ratio among them."""
        if not self.matrices:
            return []
        ratios = [float(self.relative[i, 0].max()) for i in range(len(self.matrices))]
        spread = torch.linspace(0, len(ratios) - 1, min(LAYERS - 1, len(ratios))).round().int().tolist()
        return [self.matrices[i] for i in sorted({*spread, max(range(len(ratios)), key=ratios.__getitem__)})]


def binned(magnitudes: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Bins the channels of |h| (T, C): (values (T, bins), the first channel of each bin). A bin has the largest value
    of some neighbouring channels; the EXTREME channels with the largest |h| have bins of their own."""
    C = magnitudes.size(1)
    starts = torch.arange(C)
    if C > CHANNELS:
        extreme = magnitudes.amax(0).topk(EXTREME).indices.cpu()
        even = torch.linspace(0, C, CHANNELS - 2 * EXTREME + 1).int()[:-1]
        starts = torch.cat((even, extreme, extreme + 1)).unique()
        starts = starts[starts < C]
    bins = torch.bucketize(torch.arange(C), starts, right=True) - 1
    values = magnitudes.new_zeros(len(magnitudes), len(starts))
    values.scatter_reduce_(1, bins.to(magnitudes.device).expand(len(magnitudes), -1), magnitudes, "amax")
    return values.cpu(), starts.tolist()


def packed(array: torch.Tensor) -> Packed:
    """Packs a tensor."""
    raw = array.float().bfloat16().contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
    return Packed(" ".join(map(str, array.shape)), base64.b64encode(raw).decode())


def unpacked(array: Packed) -> np.ndarray:
    """The float32 array of a Packed."""
    raw = np.frombuffer(base64.b64decode(array.base64), "<u2").astype("<u4") << 16
    return raw.view("<f4").reshape([int(n) for n in array.shape.split()])
