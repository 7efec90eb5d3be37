"""One text, token by token: how large each token's stream is, how much attention it gets, where each head looks.

And the whole vocabulary, token by token: which of them spikes when it stands first?
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from ..hooks import hooked, on_streams
from ..models.subject import Subject, map_rows
from .examples import TOKENS, Examples
from .findings import (
    CheckpointEntry,
    Findings,
    Histogram,
    LookedAt,
    PromptFindings,
    PromptHead,
    PromptToken,
    Vocabulary,
    VocabularyPlace,
    VocabularyToken,
)
from .observe import Observation, observe
from .sinks import queries_per_key
from .spikes import SPIKE_RATIO

BINS = tuple(round(10 ** (i / 4), 2) for i in range(0, 17))  # of largest |h| / median, 1 ... 10,000
SHOWN = 40  # tokens of the vocabulary, and channels, that are listed


def inspect(subject: Subject, ids: torch.Tensor, checkpoint: CheckpointEntry, model: dict[str, Any]) -> PromptFindings:
    """Findings of one sequence, ids (1, T): per token, and per head where each query looks.

    Memory is O(T) per head: of each row of a map only the key that gets most is kept.
    """
    looks: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer: the key that gets most, and how much (H, T)
    whole = Examples(sequences=1, tokens=subject.seen(ids).size(1), shown=4 * TOKENS)
    with hooked([(seam.module, _on_looks(subject, looks)) for seam in subject.attends]):
        obs = observe(subject, ids, 1, progress=False, examples=whole)
    alpha = torch.cat([whole.alpha[i, 0] for i in range(len(subject.attends))])  # (L * H, T)
    targets, weights = (torch.cat(parts) for parts in zip(*looks, strict=True))  # (L * H, T) each
    T = obs.ids.size(1)
    received = alpha * queries_per_key(T, None if subject.causal else T)  # attention mass
    return PromptFindings(
        part=subject.part,
        checkpoint=checkpoint,
        model=model,
        loss=obs.loss.mean().item(),
        tokens=[_token(subject, obs, t, alpha, targets) for t in range(T)],
        layers=[tap.name for tap in subject.streams],
        magnitudes=obs.magnitudes[:, 0].tolist(),
        medians=[stats.sums["median"].item() for stats in obs.streams],
        heads=[
            PromptHead(
                head=name,
                alpha=alpha[i].tolist(),
                looks_at=targets[i].tolist(),
                weight=weights[i].tolist(),
                most_at=int(received[i].argmax()),
            )
            for i, name in enumerate(subject.heads)
        ],
        examples=whole.result(subject, obs),
    )


def _on_looks(subject: Subject, looks: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., None]:
    """A hook of a seam that keeps where each query looks."""

    def hook(module: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any], output: object) -> None:
        q, k, _ = args
        best, most = [], []
        for _, weights in map_rows(module, q, k, subject.causal):
            top = weights[0].max(-1)  # (H, R) each
            best.append(top.indices.cpu())
            most.append(top.values.cpu())
        looks.append((torch.cat(best, 1), torch.cat(most, 1)))

    return hook


def _token(subject: Subject, obs: Observation, t: int, alpha: torch.Tensor, targets: torch.Tensor) -> PromptToken:
    """What is said of the token at position t, from alpha and where each head looks (L * H, T)."""
    peak, tap = obs.magnitudes[:, 0, t].max(0)
    head, token, most = int(alpha[:, t].argmax()), int(obs.ids[0, t]), targets[:, t].mode().values
    return PromptToken(
        position=t,
        id=token,
        text=subject.text(token),
        magnitude=peak.item(),
        ratio=obs.ratio[0, t].item(),
        channel=int(obs.channels[int(tap), 0, t]),
        after=subject.streams[int(tap)].name,
        rules=[rule for rule, hits in obs.spikes.items() if hits[0, t]],
        share=obs.share[0, t].item(),
        alpha=alpha[head, t].item(),
        head=subject.heads[head],
        sink_heads=int(obs.sink_heads[0, t]),
        few_queries=not bool(obs.eligible[0, t]),
        looks_at=LookedAt(position=int(most), heads=int((targets[:, t] == most).sum())),
    )


class Enough(Exception):
    """Raised in the last hook: the rest of the forward pass is not needed."""


@torch.no_grad()
def vocabulary(
    subject: Subject, found: Findings, ids: torch.Tensor, vocab_size: int, batch_size: int = 512
) -> Vocabulary:
    """For every token of the vocabulary, its largest |h| / median when it stands first, and second.

    Medians are those of `found`, the findings on ordinary text: a lone token has none worth the name. What stands
    before it in second place is the first token of the first sequence of `ids`.
    """
    before = ids[:1, :1]
    with tqdm(total=2 * vocab_size, desc="vocabulary", disable=None, leave=False) as bar:
        places = [
            _vocabulary_place(subject, found, context, vocab_size, batch_size, bar) for context in (ids[:1, :0], before)
        ]
    return Vocabulary(vocab_size=vocab_size, before=subject.text(int(before)), first=places[0], second=places[1])


def _vocabulary_place(
    subject: Subject, found: Findings, context: torch.Tensor, vocab_size: int, batch_size: int, bar: tqdm
) -> VocabularyPlace:
    """Every token after the `context` (1, T)."""
    medians = torch.tensor([layer.median for layer in found.layers]).clamp_min(1e-30)
    peaks = []
    for some in torch.arange(vocab_size).split(batch_size):
        text = torch.cat((context.expand(len(some), -1), some[:, None]), 1)
        peaks.append(torch.stack(_peaks(subject, text, medians)))
        bar.update(len(some))
    ratio, layer, channel = torch.cat(peaks, dim=1)
    spiking, edges = ratio >= SPIKE_RATIO, torch.tensor(BINS)
    return VocabularyPlace(
        spiking=int(spiking.sum()),
        fraction=spiking.double().mean().item(),
        histogram=Histogram(
            edges=[*BINS], counts=torch.histogram(ratio.clamp(BINS[0], BINS[-1]), edges).hist.int().tolist()
        ),
        channels=[int(c) for c in channel[spiking].unique()[:SHOWN]],
        ratio=[round(r, 2) for r in ratio.tolist()],
        tokens=[
            VocabularyToken(
                id=i,
                text=subject.text(i),
                ratio=ratio[i].item(),
                after=found.layers[int(layer[i])].kind,
                layer=found.layers[int(layer[i])].layer,
                channel=int(channel[i]),
            )
            for i in ratio.argsort(descending=True)[:SHOWN].tolist()
        ],
    )


def _peaks(
    subject: Subject, ids: torch.Tensor, medians: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the last token of ids (B, T): largest |h| / median over layers, the layer, its channel; (B,) each."""
    largest: list[torch.Tensor] = []
    channels: list[torch.Tensor] = []

    def last_token(x: torch.Tensor) -> None:
        size, channel = x.float().view(*subject.seen(ids).shape, -1)[:, -1].abs().max(-1)
        largest.append(size.cpu())
        channels.append(channel.cpu())
        if len(largest) == len(subject.streams):
            raise Enough

    with on_streams(subject.streams, [last_token] * len(subject.streams)), contextlib.suppress(Enough):
        subject.logits(ids.to(subject.device))
    ratio, layer = (torch.stack(largest) / medians[:, None]).max(0)
    return ratio, layer.float(), torch.stack(channels).gather(0, layer[None])[0].float()
