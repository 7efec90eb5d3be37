"""One text, token by token: how large each token's stream is, how much attention it gets, where each head looks.

And the whole vocabulary, token by token: which of them spikes when it stands first?
"""

import contextlib

import torch
from tqdm import tqdm

from ..hooks import hooked, on_streams
from ..models.subject import map_rows
from .examples import TOKENS, Examples
from .observe import observe
from .sinks import queries_per_key
from .spikes import SPIKE_RATIO

SCHEMA = "spikesink-prompt-1"
VOCABULARY_SCHEMA = "spikesink-vocabulary-1"
BINS = tuple(round(10 ** (i / 4), 2) for i in range(0, 17))  # of largest |h| / median, 1 ... 10,000


def inspect(subject, ids, checkpoint, model):
    """Findings of one sequence, ids (1, T): a dict with a row per token, and per head where each query looks.

    Memory is O(T) per head: of each row of a map only the key that gets most is kept.
    """
    looks, whole = [], Examples(sequences=1, tokens=subject.seen(ids).size(1), shown=4 * TOKENS)

    def hook(module, args, kwargs, output):
        q, k, _ = args
        best, most = [], []
        for _, weights in map_rows(module, q, k, subject.causal):
            top = weights[0].max(-1)  # (H, R) each
            best.append(top.indices.cpu())
            most.append(top.values.cpu())
        looks.append((torch.cat(best, 1), torch.cat(most, 1)))  # (H, T) each

    with hooked([(seam.module, hook) for seam in subject.attends]):
        obs = observe(subject, ids, 1, progress=False, examples=whole)
    T = obs.ids.size(1)
    queries = queries_per_key(T, None if subject.causal else T)
    alpha = torch.cat([whole.alpha[i, 0] for i in range(len(subject.attends))])  # (L * H, T)
    received = alpha * queries  # attention mass
    names = [tap.name for tap in subject.streams]
    heads = subject.heads
    targets = torch.cat([best for best, _ in looks])  # (L * H, T)
    weights = torch.cat([most for _, most in looks])
    peak, tap = obs.magnitudes[:, 0].max(0)
    tokens = []
    for t in range(T):
        where, head = int(tap[t]), int(alpha[:, t].argmax())
        to, count = targets[:, t].mode().values.item(), int((targets[:, t] == targets[:, t].mode().values).sum())
        tokens.append(
            {
                "position": t,
                "id": int(obs.ids[0, t]),
                "text": subject.text(int(obs.ids[0, t])),
                "magnitude": peak[t].item(),
                "ratio": obs.ratio[0, t].item(),
                "channel": int(obs.channels[where, 0, t]),
                "after": names[where],
                "rules": [rule for rule, hits in obs.spikes.items() if hits[0, t]],
                "share": obs.share[0, t].item(),
                "alpha": alpha[head, t].item(),
                "head": heads[head],
                "sink_heads": int(obs.sink_heads[0, t]),
                "few_queries": not bool(obs.eligible[0, t]),  # alpha averages few of them: no sink is claimed here
                "looks_at": {"position": to, "heads": count},
            }
        )
    return {
        "schema": SCHEMA,
        "part": subject.part,
        "checkpoint": checkpoint,
        "model": model,
        "loss": obs.loss.mean().item(),
        "tokens": tokens,
        "layers": names,
        "magnitudes": obs.magnitudes[:, 0].tolist(),
        "medians": [s.sums["median"].item() for s in obs.streams],
        "heads": [
            {
                "head": name,
                "alpha": alpha[i].tolist(),
                "looks_at": targets[i].tolist(),
                "weight": weights[i].tolist(),
                "most_at": int(received[i].argmax()),
            }
            for i, name in enumerate(heads)
        ],
        "examples": whole.result(subject, obs),
    }


class Enough(Exception):
    """Raised in the last hook: the rest of the forward pass is not needed."""


@torch.no_grad()
def vocabulary(subject, found, ids, vocab_size, batch_size=512):
    """For every token of the vocabulary, its largest |h| / median when it stands first, and second: a dict.

    Medians are those of `found`, the findings on ordinary text: a lone token has none worth the name. What stands
    before it in second place is the first token of the first sequence of `ids`.
    """
    medians = torch.tensor([layer["median"] for layer in found["layers"]]).clamp_min(1e-30)
    before = ids[:1, :1]
    places = {"first": ids[:1, :0], "second": before}
    result = {"schema": VOCABULARY_SCHEMA, "vocab_size": vocab_size, "before": subject.text(int(before))}
    bar = tqdm(total=len(places) * vocab_size, desc="vocabulary", disable=None, leave=False)
    for place, context in places.items():
        peaks = []
        for some in torch.arange(vocab_size).split(batch_size):
            ratio, layer, channel = _peaks(
                subject, torch.cat((context.expand(len(some), -1), some[:, None]), 1), medians
            )
            peaks.append(torch.stack((ratio, layer, channel)))
            bar.update(len(some))
        ratio, layer, channel = torch.cat(peaks, dim=1)
        spiking = ratio >= SPIKE_RATIO
        result[place] = {
            "spiking": int(spiking.sum()),
            "fraction": spiking.double().mean().item(),
            "histogram": {
                "edges": BINS,
                "counts": torch.histogram(ratio.clamp(BINS[0], BINS[-1]), torch.tensor(BINS)).hist.int().tolist(),
            },
            "channels": [int(c) for c in channel[spiking].unique(return_counts=True)[0][:40]],
            "ratio": [round(r, 2) for r in ratio.tolist()],  # of every token, by id
            "tokens": [
                {
                    "id": int(i),
                    "text": subject.text(int(i)),
                    "ratio": ratio[i].item(),
                    "after": found["layers"][int(layer[i])]["kind"],
                    "layer": found["layers"][int(layer[i])]["layer"],
                    "channel": int(channel[i]),
                }
                for i in ratio.argsort(descending=True)[:40]
            ],
        }
    bar.close()
    return result


def _peaks(subject, ids, medians):
    """Of the last token of ids (B, T): largest |h| / median over layers, the layer, its channel; (B,) each."""
    largest, channels = [], []

    def last_token(x):
        size, channel = x.float().view(*subject.seen(ids).shape, -1)[:, -1].abs().max(-1)
        largest.append(size.cpu())
        channels.append(channel.cpu())
        if len(largest) == len(subject.streams):
            raise Enough

    with on_streams(subject.streams, [last_token] * len(subject.streams)), contextlib.suppress(Enough):
        subject.logits(ids.to(subject.device))
    ratio, layer = (torch.stack(largest) / medians[:, None]).max(0)
    return ratio, layer.float(), torch.stack(channels).gather(0, layer[None])[0].float()
