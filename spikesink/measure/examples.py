"""A few sequences of the text kept token by token while a pass observes it: what pages show, small whatever the model.

Of a model of L layers and H heads on T tokens, at most: SEQUENCES x TOKENS tokens, HEADS heads, LAYERS matrices of
TOKENS x CHANNELS. Arrays are bfloat16 in base64, two bytes a number, about three digits: `unpacked` reads them.
"""

import base64
from dataclasses import dataclass, field

import numpy as np
import torch

from ..models.subject import Subject
from . import metrics
from .findings import ExamplesEntry, MatrixEntry, Packed, SequenceEntry
from .rules import Observed
from .spikes import PRIMARY_SPIKE_RULE, TapBatch

SEQUENCES, TOKENS, HEADS = 3, 128, 512
LAYERS, CHANNELS, EXTREME = 16, 128, 8  # of the matrices: how many, their bins, and channels that stand alone in one


@dataclass
class Examples:
    """Takes the first `tokens` of the first `sequences` of a pass, filled in by `observe`; `shown` become findings."""

    sequences: int = SEQUENCES
    tokens: int = TOKENS
    shown: int = TOKENS
    # (tap, sequence) -> largest |h| of each token / the median (T,)
    relative: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    alpha: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # (seam, sequence) -> alpha (H, T)
    matrices: "list[Matrix]" = field(default_factory=list)  # of the first sequence, tap by tap

    def add_stream(self, tap: int, rows: torch.Tensor, batch: TapBatch) -> None:
        """Takes in one batch at a tap; `rows`: the numbers of its sequences."""
        for b, n in self._mine(rows):
            median = metrics.zero_is_nan(batch.median[b])
            self.relative[tap, n] = (batch.magnitude[b, : self.tokens] / median).nan_to_num(0.0).cpu()
            if n == 0:
                self.matrices.append(matrix(batch.x[b, : min(self.tokens, TOKENS)].abs(), batch.median[b].item()))

    def add_attention(self, seam: int, rows: torch.Tensor, alpha: torch.Tensor) -> None:
        """Takes in one batch's alpha (B, H, T) of a seam."""
        for b, n in self._mine(rows):
            self.alpha[seam, n] = alpha[b, :, : self.tokens].clone()

    def _mine(self, rows: torch.Tensor) -> list[tuple[int, int]]:
        return [(b, n) for b, n in enumerate(rows.tolist()) if n < self.sequences]

    def result(self, subject: Subject, obs: Observed) -> ExamplesEntry | None:
        """The findings' entry; None where nothing was kept."""
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
                if subject.part != "cross"  # its streams are the encoder's, which shows them
            ],
        )

    def _strongest(self, alphas: dict[int, torch.Tensor]) -> list[int]:
        """The heads that are kept, in their order: those with the strongest eligible key."""
        best = torch.stack([alpha.amax(1) for alpha in alphas.values()]).amax(0)
        return best.argsort(descending=True, stable=True)[:HEADS].sort().values.tolist()

    def _shown_layers(self) -> list[int]:
        """The taps whose matrix is kept: evenly spread, the one with the largest ratio among them."""
        if not self.matrices:
            return []
        ratios = [float(self.relative[i, 0].max()) for i in range(len(self.matrices))]
        spread = torch.linspace(0, len(ratios) - 1, min(LAYERS - 1, len(ratios))).round().int().tolist()
        return sorted({*spread, max(range(len(ratios)), key=ratios.__getitem__)})

    def _sequence(self, subject: Subject, obs: Observed, n: int, alpha: torch.Tensor) -> SequenceEntry:
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
    """|h| of one sequence: its values (T, bins), the first channel of each bin, all channels, the median |h|."""

    values: torch.Tensor
    starts: list[int]
    n_channels: int
    median: float

    def packed(self, layer: str) -> MatrixEntry:
        """The findings' entry, of a layer."""
        return MatrixEntry(
            layer=layer,
            values=packed(self.values),
            starts=" ".join(map(str, self.starts)),
            n_channels=self.n_channels,
            median=self.median,
        )


def matrix(size: torch.Tensor, median: float) -> Matrix:
    """The Matrix of |h| (T, C).

    Bins are neighbouring channels, each given by its largest; the EXTREME channels with the largest |h| stand alone.
    """
    C = size.size(1)
    starts = torch.arange(C)
    if C > CHANNELS:
        alone = size.amax(0).topk(EXTREME).indices.cpu()
        even = torch.linspace(0, C, CHANNELS - 2 * EXTREME + 1).int()[:-1]
        starts = torch.cat((even, alone, alone + 1)).unique()
        starts = starts[starts < C]
    bin_of = torch.bucketize(torch.arange(C), starts, right=True) - 1
    values = size.new_zeros(len(size), len(starts))
    values.scatter_reduce_(1, bin_of.to(size.device).expand(len(size), -1), size, "amax")
    return Matrix(values.cpu(), starts.tolist(), C, median)


def packed(array: torch.Tensor) -> Packed:
    """A tensor, packed."""
    raw = array.float().bfloat16().contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
    return Packed(" ".join(map(str, array.shape)), base64.b64encode(raw).decode())


def unpacked(array: Packed) -> np.ndarray:
    """The float32 array of `packed`."""
    raw = np.frombuffer(base64.b64decode(array.base64), "<u2").astype("<u4") << 16
    return raw.view("<f4").reshape([int(n) for n in array.shape.split()])
