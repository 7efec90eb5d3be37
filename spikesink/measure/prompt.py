"""One text, token by token: how large each token's stream is, how much attention it gets, where each head looks.

And the whole vocabulary, token by token: which of them spikes when it stands first?
"""

import contextlib
import math
from typing import Any

import torch
from tqdm import tqdm

from ..hooks import hooked, on_streams
from ..models.subject import Subject, map_rows
from . import findings, metrics
from .examples import TOKENS, Examples, unpacked
from .observe import Observation, Ordinary, observe
from .spikes import SPIKE_RULES, Usual, peaked
from .summarise import Peaks, examples_entry

BINS = tuple(round(10 ** (i / 4), 3) for i in range(-8, 9))  # of largest |h| / its threshold, 0.01 ... 100
SHOWN = 40  # tokens of the vocabulary, and channels, that are listed


def inspect(
    subject: Subject,
    ids: torch.Tensor,
    checkpoint: findings.CheckpointEntry,
    model: dict[str, Any],
    ordinary: Ordinary,
    predicted_bytes: int | None = None,
) -> findings.PromptFindings:
    """Findings of one sequence, ids (1, T): per token, and per head where each query looks.

    `ordinary`: what is usual on ordinary text; a prompt has too few tokens to say. `predicted_bytes`: of the predicted
    tokens' text. Memory is O(T) per head, since only the key that gets most is kept of each row of a map.
    """
    looks: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer: the key that gets most, and how much (H, T)

    def look(module: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any], output: object) -> None:
        q, k, _ = args
        tops = [weights[0].max(-1) for _, weights in map_rows(module, q, k, subject.causal)]  # (H, R) each
        keys, most = torch.cat([top.indices for top in tops], 1), torch.cat([top.values for top in tops], 1)
        looks.append((keys.cpu(), most.cpu()))

    whole = Examples(sequences=1, tokens=subject.stream_ids(ids).size(1), shown=4 * TOKENS)
    with hooked([(seam.module, look) for seam in subject.attends]):
        obs = observe(subject, ids, 1, progress=False, examples=whole, ordinary=ordinary)
    alpha = torch.cat([whole.alpha[i, 0] for i in range(len(subject.attends))])  # (L * H, T)
    targets, weights = (torch.cat(parts) for parts in zip(*looks, strict=True))  # (L * H, T) each
    T, peaks = obs.ids.size(1), Peaks(obs.sum)
    received = torch.cat([a.sums["received"] for a in obs.attention])  # (L * H, T)
    return findings.PromptFindings(
        part=subject.part,
        checkpoint=checkpoint,
        model=model,
        loss=obs.loss.mean().item(),
        bits_per_byte=metrics.bits_per_byte((obs.loss * obs.predicted).sum().item(), predicted_bytes),
        tokens=[_token(subject, obs, peaks, t, alpha, targets) for t in range(T)],
        layers=[tap.name for tap in subject.streams],
        magnitudes=obs.sum.magnitudes[:, 0].tolist(),
        medians=[usual.layer.item() for usual in obs.sum.usual if usual],
        heads=[
            findings.PromptHead(
                head=name,
                alpha=alpha[i].tolist(),
                looks_at=targets[i].tolist(),
                weight=weights[i].tolist(),
                most_at=int(received[i].argmax()),
            )
            for i, name in enumerate(subject.heads)
        ],
        examples=examples_entry(subject, obs),
    )


def _token(
    subject: Subject, obs: Observation, peaks: Peaks, t: int, alpha: torch.Tensor, targets: torch.Tensor
) -> findings.PromptToken:
    """What is said of the token at position t, from alpha and where each head looks (L * H, T)."""
    peak = peaks.at(0, t)
    usual = obs.sum.usual[peak["index"]]
    head, token, most = int(alpha[:, t].argmax()), int(obs.ids[0, t]), targets[:, t].mode().values
    return findings.PromptToken(
        position=t,
        id=token,
        text=subject.text(token),
        magnitude=peak["magnitude"],
        ratio=peak["magnitude"] / usual.layer.item() if usual and usual.layer > 0 else math.nan,
        strength=peak["strength"],
        channel=peak["channel"],
        after=subject.streams[peak["index"]].name,
        rules=[rule for rule in SPIKE_RULES if obs.spikes[rule][0, t]],
        share=obs.share[0, t].item(),
        alpha=alpha[head, t].item(),
        head=subject.heads[head],
        sink_heads=int(obs.sink_heads[0, t]),
        few_queries=not bool(obs.eligible[0, t]),
        looks_at=findings.LookedAt(position=int(most), heads=int((targets[:, t] == most).sum())),
    )


class Enough(Exception):
    """Raised in the last hook: the rest of the forward pass is not needed."""


@torch.no_grad()
def vocabulary(
    subject: Subject, detected: findings.Findings, ids: torch.Tensor, vocab_size: int, batch_size: int = 512
) -> findings.Vocabulary:
    """For every token of the vocabulary, how far above its threshold its |h| is when it stands first, and second.

    The thresholds are those of `detected`, the findings on ordinary text, since a lone token has none worth the name.
    In second place it follows the first token of the first sequence of `ids`.
    """
    before = ids[:1, :1]
    with tqdm(total=2 * vocab_size, desc="vocabulary", disable=None, leave=False) as bar:
        first, second = (
            _vocabulary_place(subject, detected, context, vocab_size, batch_size, bar)
            for context in (ids[:1, :0], before)
        )
    return findings.Vocabulary(vocab_size=vocab_size, before=subject.text(int(before)), first=first, second=second)


def _vocabulary_place(
    subject: Subject, detected: findings.Findings, context: torch.Tensor, vocab_size: int, batch_size: int, bar: tqdm
) -> findings.VocabularyPlace:
    """Every token after the `context` (1, T)."""
    entries = [layer.usual for layer in detected.layers[: subject.attended.stop]]
    usual = [
        Usual(torch.tensor(u.layer), torch.from_numpy(unpacked(u.channels)), torch.tensor(u.typical)) for u in entries
    ]
    peaks = []
    for some in torch.arange(vocab_size).split(batch_size):
        text = torch.cat((context.expand(len(some), -1), some[:, None]), 1)
        peaks.append(torch.stack(_peaks(subject, text, usual)))
        bar.update(len(some))
    strength, ratio, layer, channel = torch.cat(peaks, dim=1)
    spiking, edges = strength >= 1, torch.tensor(BINS)
    return findings.VocabularyPlace(
        spiking=int(spiking.sum()),
        fraction=spiking.double().mean().item(),
        histogram=findings.Histogram(
            edges=[*BINS], counts=torch.histogram(strength.clamp(BINS[0], BINS[-1]), edges).hist.int().tolist()
        ),
        channels=[int(c) for c in channel[spiking].unique()[:SHOWN]],
        strength=[round(r, 3) for r in strength.tolist()],
        tokens=[
            findings.VocabularyToken(
                id=i,
                text=subject.text(i),
                ratio=ratio[i].item(),
                strength=strength[i].item(),
                after=detected.layers[int(layer[i])].kind,
                layer=detected.layers[int(layer[i])].layer,
                channel=int(channel[i]),
            )
            for i in strength.argsort(descending=True)[:SHOWN].tolist()
        ],
    )


def _peaks(subject: Subject, ids: torch.Tensor, usual: list[Usual]) -> tuple[torch.Tensor, ...]:
    """Of the last token of ids (B, T), where its |h| is most above its threshold: how many times that, |h| over the
    layer's usual median, the layer, the channel; (B,) each."""
    rows: list[torch.Tensor] = []

    def last_token(x: torch.Tensor) -> None:
        state, here = x.float().view(*subject.stream_ids(ids).shape, -1)[:, -1].cpu(), usual[len(rows)]
        magnitude = state.abs()
        strength, channel = (magnitude * here.per_threshold).max(-1)
        strength = torch.minimum(strength, peaked(magnitude.amax(-1), state.norm(dim=-1), state.size(-1)))
        ratio = magnitude.gather(1, channel[:, None])[:, 0] / here.layer.clamp_min(1e-30)
        rows.append(torch.stack((strength, ratio, channel.float())))
        if len(rows) == len(usual):
            raise Enough

    taps = subject.streams[: len(usual)]
    with on_streams(taps, [last_token] * len(taps)), contextlib.suppress(Enough):
        subject.logits(ids.to(subject.device))
    strength, layer = torch.stack([row[0] for row in rows]).max(0)
    _, ratio, channel = torch.stack(rows).gather(0, layer.expand(1, 3, -1))[0]
    return strength, ratio, layer.float(), channel
