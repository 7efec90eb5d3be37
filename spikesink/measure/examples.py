"""A few sequences of the text, recorded token by token during a pass. Pages show them; they are small for any model.

A model of L layers and H heads on T tokens gives at most SEQUENCES x TOKENS tokens, HEADS heads, and LAYERS matrices of
TOKENS x CHANNELS. Arrays are bfloat16 in base64, two bytes per number with about three digits: `unpacked` reads them.
"""

import base64
from dataclasses import dataclass, field

import numpy as np
import torch

from ..models.subject import Subject
from . import metrics
from .findings import ExamplesEntry, MatrixEntry, Packed, SequenceEntry
from .rules import ObservationLike
from .spikes import PRIMARY_SPIKE_RULE, TapBatch

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
    matrices: "list[Matrix]" = field(default_factory=list)  # the first sequence's, tap by tap

    def add_stream(self, tap: int, rows: torch.Tensor, batch: TapBatch) -> None:
        """Adds one batch at a tap; `rows`: the numbers of its sequences."""
        for b, n in self._recorded(rows):
            median = metrics.zero_is_nan(batch.median[b])
            self.relative[tap, n] = (batch.magnitude[b, : self.tokens] / median).nan_to_num(0.0).cpu()
            if n == 0:
                self.matrices.append(matrix(batch.x[b, : min(self.tokens, TOKENS)].abs(), batch.median[b].item()))

    def add_attention(self, seam: int, rows: torch.Tensor, alpha: torch.Tensor) -> None:
        """Adds one batch's alpha (B, H, T) of a seam."""
        for b, n in self._recorded(rows):
            self.alpha[seam, n] = alpha[b, :, : self.tokens].clone()

    def _recorded(self, rows: torch.Tensor) -> list[tuple[int, int]]:
        return [(b, n) for b, n in enumerate(rows.tolist()) if n < self.sequences]

    def result(self, subject: Subject, obs: ObservationLike) -> ExamplesEntry | None:
        """The findings' entry; None if nothing was recorded."""
        if not self.relative:
            return None
        names = [tap.name for tap in subject.streams]
        numbers = sorted({n for _, n in self.relative})
        alphas = {n: torch.cat([self.alpha[s, n] for s in range(len(subject.attends))]) for n in numbers}
        heads = self._strongest({n: alpha * obs.eligible[n, : alpha.size(1)] for n, alpha in alphas.items()})
        return ExamplesEntry(
            encoding="bfloat16, little-endian, base64: spikesink.examples.unpacked",
            layers=names,
            heads=[subject.heads[h] for h in heads],
            n_heads=len(subject.heads),
            sequences=[self._sequence(subject, obs, n, alphas[n][heads]) for n in numbers],
            matrices=[
                self.matrices[i].packed(names[i])
                for i in self._shown_layers()
                if subject.part != "cross"  # its streams are the encoder's, and shown there
            ],
        )

    def _strongest(self, alphas: dict[int, torch.Tensor]) -> list[int]:
        """The heads with the strongest eligible key, in their order."""
        best = torch.stack([alpha.amax(1) for alpha in alphas.values()]).amax(0)
        return best.argsort(descending=True, stable=True)[:HEADS].sort().values.tolist()

    def _shown_layers(self) -> list[int]:
        """The taps whose matrix is shown: evenly spread, with the tap of the largest ratio among them."""
        if not self.matrices:
            return []
        ratios = [float(self.relative[i, 0].max()) for i in range(len(self.matrices))]
        spread = torch.linspace(0, len(ratios) - 1, min(LAYERS - 1, len(ratios))).round().int().tolist()
        return sorted({*spread, max(range(len(ratios)), key=ratios.__getitem__)})

    def _sequence(self, subject: Subject, obs: ObservationLike, n: int, alpha: torch.Tensor) -> SequenceEntry:
        shown = min(int(obs.tokens[n].sum()), alpha.size(1), self.shown)
        ids = obs.ids[n, :shown].tolist()
        return SequenceEntry(
            sequence=n,
            length=int(obs.tokens[n].sum()),
            loss=obs.loss[n].item(),
            ids=ids,
            texts=[subject.text(i) for i in ids],
            spikes=obs.spikes[PRIMARY_SPIKE_RULE][n, :shown].int().tolist(),
            sink_heads=obs.sink_heads[n, :shown].int().tolist(),
            enough_queries=obs.eligible[n, :shown].int().tolist(),
            share=packed(obs.share[n, :shown]),
            relative=packed(torch.stack([self.relative[i, n][:shown] for i in range(len(subject.streams))])),
            alpha=packed(alpha[:, :shown]),
        )


@dataclass(frozen=True)
class Matrix:
    """|h| of one sequence: values (T, bins), the first channel of each bin, the number of channels, the median |h|."""

    values: torch.Tensor
    starts: list[int]
    n_channels: int
    median: float

    def packed(self, layer: str) -> MatrixEntry:
        """The findings' entry for a layer."""
        return MatrixEntry(
            layer=layer,
            values=packed(self.values),
            starts=" ".join(map(str, self.starts)),
            n_channels=self.n_channels,
            median=self.median,
        )


def matrix(magnitudes: torch.Tensor, median: float) -> Matrix:
    """The Matrix of |h| (T, C). Each bin has the largest value of some neighbouring channels; the EXTREME channels with
    the largest |h| have bins of their own."""
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
    return Matrix(values.cpu(), starts.tolist(), C, median)


def packed(array: torch.Tensor) -> Packed:
    """Packs a tensor."""
    raw = array.float().bfloat16().contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
    return Packed(" ".join(map(str, array.shape)), base64.b64encode(raw).decode())


def unpacked(array: Packed) -> np.ndarray:
    """The float32 array of a Packed."""
    raw = np.frombuffer(base64.b64decode(array.base64), "<u2").astype("<u4") << 16
    return raw.view("<f4").reshape([int(n) for n in array.shape.split()])
