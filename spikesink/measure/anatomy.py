"""How spikes are made and how the keys of sinks lie: a second pass over the few sequences with the strongest spikes.

Terms of Sun et al. 2026: a spike rises at the *step-up* block and is cancelled at the *step-down* block; here these are
sub-layers where they can be told apart. Spike tokens share channels, whose ratios are nearly fixed, and their
normalised states are nearly equal. Sink keys span one or two dimensions. In a gated FFN, channel k of the output is
about the quadratic form x^T U_k x with U_k = sum_i W_down[k,i] W_gate[i] W_up[i]^T.
"""

import functools
import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from ..hooks import Tap, hooked, on_streams
from ..models.subject import PLACES, Subject, batches, for_heads
from . import findings, metrics
from .observe import Observation, Side, StreamStats, observed_state_key, state_key
from .sinks import alpha_in, are_sinks
from .spikes import PRIMARY_SPIKE_RULE

SEQUENCES, PER_SEQUENCE = 16, 4  # so many sequences are dissected, and so many tokens in each
CHANNELS = 8
LEAST_FALL = 0.1  # of the peak: a smaller fall is no step-down
Keys = list[tuple[int, Hashable, torch.Tensor]]  # (head, state_key of the token, its key vector (D,))


class Dissection:
    """The second pass over K tokens, (K, 2) of sequence and position: the chosen ones, then as many others."""

    def __init__(self, subject: Subject, tokens: torch.Tensor, seed: int) -> None:
        self.subject, self.tokens, self.seed = subject, tokens, seed
        self.states: dict[tuple[str, int], torch.Tensor] = {}  # (place, tap) -> (K, C)
        # place off the stream -> the statistics of each tap; what sub-layers read was measured on all sequences before
        self.stats = {place: [StreamStats() for _ in subject.inner[place]] for place in ("output", "update")}
        self.sink_keys: list[Keys] = [[] for _ in subject.attends]  # of each layer of attention
        self.other_keys: list[Keys] = [[] for _ in subject.attends]  # as many random others

    @torch.no_grad()
    def add(self, ids: torch.Tensor, sequences: torch.Tensor) -> None:
        """Fills in the tokens' states at every tap, and sink keys, in one forward pass over some of the sequences."""
        in_batch = torch.isin(self.tokens[:, 0], sequences)
        b, t = torch.searchsorted(sequences, self.tokens[in_batch, 0].contiguous()), self.tokens[in_batch, 1]
        B, T = self.subject.stream_ids(ids).shape

        def record(place: str, index: int, x: torch.Tensor) -> None:
            x = x.detach().float().view(B, T, -1)
            states = self.states.setdefault((place, index), torch.zeros(len(self.tokens), x.size(-1)))
            states[in_batch] = x[b, t].cpu()
            if place in self.stats:
                self.stats[place][index].add(x)

        places = {"stream": self.subject.streams, **self.subject.inner}.items()
        taps = [(tap, functools.partial(record, place, i)) for place, taps in places for i, tap in enumerate(taps)]
        seams = [
            (seam.module, functools.partial(self._add_keys, ids, sequences, i))
            for i, seam in enumerate(self.subject.attends)
        ]
        with on_streams(*zip(*taps, strict=True)), hooked(seams):
            self.subject.losses(ids)

    def _add_keys(
        self, ids: torch.Tensor, sequences: torch.Tensor, index: int, module: Any, args: tuple, *rest: object
    ) -> None:
        """A hook of a seam that collects the keys of its sinks, and as many random other keys."""
        subject, (q, k, _) = self.subject, args
        tokens = subject.stream_ids(ids) if subject.part != "cross" else ids
        sinks = are_sinks(*alpha_in(module, q, k, subject.causal), q.size(-2))
        k = for_heads(k.float().cpu(), q.size(1))
        draw = metrics.uniform(sequences, sinks.shape[1:], self.seed, index).masked_fill(sinks, -1.0)
        draw[..., : subject.n_register + 1] = -1.0  # no controls: these are often the same in every sequence
        control = draw.argsort(-1, descending=True).argsort(-1) < sinks.sum(-1, keepdim=True)
        for chosen, keys in ((sinks, self.sink_keys[index]), (control, self.other_keys[index])):
            for i, head, position in chosen.nonzero().tolist():
                state = state_key(subject, int(sequences[i]), position, int(tokens[i, position]))
                keys.append((head, state, k[i, head, position]))


def anatomy(
    subject: Subject, ids: torch.Tensor, obs: Observation, batch_size: int = 8, seed: int = 0
) -> findings.Anatomy:
    """The findings' entry `anatomy` from ids (N, T) and their Observation."""
    tokens, are_spikes = chosen_tokens(obs)
    sequences, K = tokens[:, 0].unique(), len(tokens)
    dissection = Dissection(subject, torch.cat((tokens, other_tokens(obs, tokens, seed))), seed)
    for numbers, batch in batches(ids[sequences], batch_size):
        dissection.add(batch, sequences[numbers])
    states = dissection.states
    distinct = distinct_tokens(subject, obs, tokens)
    path = torch.stack([states["stream", i][:K] for i in range(len(subject.streams))])
    steps = step_up_and_down(path, subject.streams)
    keys = zip(subject.attends, dissection.sink_keys, dissection.other_keys, strict=True)
    spiking = [channel.channel for channel in steps.channels[:4]]
    return findings.Anatomy(
        of="tokens that the primary rule marks" if are_spikes else "each sequence's largest token: none is a spike",
        n_seq=len(sequences),
        tokens=K,
        distinct_tokens=len(distinct),
        episodes=episodes(obs.sum, subject.streams),
        **vars(steps),
        normed_cosine=[
            findings.NormedCosine(
                layer=tap.layer,
                kind=tap.kind,
                spikes=mean_cosine(states["normed", i][distinct]),
                others=mean_cosine(states["normed", i][K:]),
            )
            for i, tap in enumerate(subject.inner["normed"])
        ],
        inner={
            place: [
                findings.LayerStats(index=i, layer=tap.layer, kind=tap.kind, **vars(all_stats[i].result()))
                for i, tap in enumerate(subject.inner[place])
            ]
            for place, all_stats in dissection.stats.items()
        },
        places={place: PLACES[place] for place in dissection.stats},
        key_subspace=[
            findings.KeySubspace(layer=tap.layer, kind=tap.kind, heads=key_subspace(sinks, others, subject.n_head))
            for tap, sinks, others in keys
        ],
        quadratic_form=quadratic_form(subject, steps.step_up, spiking, torch.Generator().manual_seed(seed)),
    )


def chosen_tokens(obs: Observation) -> tuple[torch.Tensor, bool]:
    """Returns ((K, 2) of sequence and position, whether they are spikes). They are the strongest spikes of the
    sequences that have the strongest; if no token is a spike, the largest token of as many sequences."""
    spike = obs.spikes[PRIMARY_SPIKE_RULE]
    score = obs.strength.masked_fill(~spike, 0.0) if spike.any() else obs.sum.ratio
    sequences = score.amax(1).argsort(descending=True, stable=True)[:SEQUENCES]
    best = score[sequences].topk(min(PER_SEQUENCE, score.size(1)), dim=1)
    chosen = best.values > 0
    if not spike.any():
        chosen[:, 0], chosen[:, 1:] = True, False
    return torch.stack((sequences[:, None].expand_as(chosen)[chosen], best.indices[chosen]), dim=1), bool(spike.any())


def other_tokens(obs: Observation, tokens: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """As many random tokens of the same sequences that are not spikes: (K, 2), or fewer if there are not enough."""
    free = obs.tokens & ~obs.spikes[PRIMARY_SPIKE_RULE]
    free[tokens[:, 0], tokens[:, 1]] = False
    draw = metrics.uniform(torch.arange(len(free)), free.shape[1:], seed).masked_fill(~free, -1.0)
    others = []
    for sequence in tokens[:, 0].tolist():
        position = int(draw[sequence].argmax())
        if draw[sequence, position] >= 0:
            others.append((sequence, position))
            draw[sequence, position] = -1.0
    return torch.tensor(others, dtype=torch.int64).view(-1, 2)


def distinct_tokens(subject: Subject, obs: Observation, tokens: torch.Tensor) -> list[int]:
    """The numbers of those tokens (K, 2) that have different states."""
    states = {observed_state_key(subject, obs, n, t): i for i, (n, t) in reversed([*enumerate(tokens.tolist())])}
    return sorted(states.values())


def step_up_and_down(path: torch.Tensor, taps: Sequence[Tap]) -> findings.Steps:
    """Where spikes rise and fall, and the channels they share, from the tokens' streams at every tap (taps, K, C).

    A token's channel is that of its largest |h|. Its step-up is the tap at which that entry gains most towards its
    peak. Its step-down is the later tap at which it loses most, if that is at least a tenth of the peak. Each is
    reported as the most frequent one over tokens, with means.
    """
    K, C = path.shape[1:]
    largest = path.abs().transpose(0, 1).flatten(1).argmax(1)
    peak_tap, channel = largest // C, largest % C
    token, tap = torch.arange(K), torch.arange(len(path))[:, None]
    entry = path[:, token, channel]  # (taps, K)
    peak = entry[peak_tap, token]
    # (taps, K), what each tap adds, as a part of the peak; a spike that is there from the embedding on rises at tap 0
    change = entry.diff(dim=0, prepend=entry.new_zeros(1, K)) * peak.sign() / peak.abs().clamp_min(1e-30)
    up = change.masked_fill(tap > peak_tap, -torch.inf).argmax(0)
    later = change.masked_fill(tap <= peak_tap, torch.inf)
    falls = later.amin(0) <= -LEAST_FALL
    down = later.argmin(0)[falls]
    step = lambda i, n: {"index": i, "layer": taps[i].layer, "kind": taps[i].kind, "tokens": n / K}

    def most_frequent(steps: torch.Tensor, change: torch.Tensor) -> findings.StepChange:
        index = int(steps.mode().values)
        part = change[index, steps == index]
        return findings.StepChange(**step(index, len(part)), part_of_peak=part.mean().item())

    at = int(peak_tap.mode().values)  # where most tokens have their peak
    channels = shared_channels(path[at])
    return findings.Steps(
        path={str(shared.channel): path[:, :, shared.channel].mean(1).tolist() for shared in channels[:3]},
        step_up=most_frequent(up, change),
        step_down=most_frequent(down, change[:, falls]) if falls.any() else None,
        peak=findings.Step(**step(at, int((peak_tap == at).sum()))),
        channels=channels,
    )


def episodes(side: Side, taps: Sequence[Tap]) -> list[findings.Episode]:
    """The runs of taps at which the spike tokens of a side are large; those that start at the same tap are one episode.
    Episodes of fewer than a twentieth of the tokens are left out.

    In a run the token is a spike at one tap at least, and its |h| is at least half the threshold at every tap.
    """
    attended, marked = side.attended, side.spikes[PRIMARY_SPIKE_RULE]
    strength = side.strengths[attended][:, marked]  # (taps, K)
    magnitudes, channels = side.magnitudes[attended][:, marked], side.channels[attended][:, marked]
    runs: dict[int, list[tuple[int, int, int]]] = {}  # first tap -> (last tap, token, the tap of its largest |h|)
    for token, is_large in enumerate((strength >= 0.5).T.tolist()):
        for large, group in itertools.groupby(range(len(is_large)), is_large.__getitem__):
            run = [*group]
            if large and bool((strength[run, token] >= 1).any()):
                runs.setdefault(run[0], []).append((run[-1], token, run[int(magnitudes[run, token].argmax())]))
    step = lambda i, n: findings.Step(index=i, layer=taps[i].layer, kind=taps[i].kind, tokens=n / strength.size(1))
    entries = []
    for start, rows in sorted(runs.items()):
        if len(rows) < strength.size(1) / 20:
            continue
        ends, tokens, peaks = (torch.tensor(column) for column in zip(*rows, strict=True))
        end, peak = int(ends.mode().values), magnitudes[peaks, tokens]
        usual = torch.stack([u.layer.cpu() for u in side.usual[attended] if u is not None])
        entries.append(
            findings.Episode(
                start=step(start, len(rows)),
                end=step(end, int((ends == end).sum())),
                tokens=len(rows) / strength.size(1),
                channel=int(channels[peaks, tokens].mode().values),
                magnitude=peak.median().item(),
                ratio=(peak / usual[peaks].clamp_min(1e-30)).median().item(),
            )
        )
    return entries


def shared_channels(x: torch.Tensor) -> list[findings.SharedChannel]:
    """The channels with the largest mean |h| over tokens x (K, C)."""
    top = x.abs().mean(0).argsort(descending=True, stable=True)[:CHANNELS]
    values = x[:, top]
    relative = values / values[:, :1].abs().clamp_min(1e-30)
    return [
        findings.SharedChannel(
            channel=channel,
            value=values[:, i].mean().item(),
            same_sign=(values[:, i].sign() == values[:, i].mean().sign()).double().mean().item(),
            ratio=relative[:, i].mean().item(),
            ratio_std=relative[:, i].std(correction=0).item(),
            median=x[:, channel].abs().median().item(),
        )
        for i, channel in enumerate(top.tolist())
    ]


def mean_cosine(x: torch.Tensor) -> float | None:
    """The mean cosine over all pairs of the rows of x (K, C); None for fewer than two rows."""
    n = len(x)
    if n < 2:
        return None
    total = torch.nn.functional.normalize(x.double(), dim=1).sum(0).square().sum().item()  # n + 2 x the sum over pairs
    return (total - n) / (n * (n - 1))


def key_subspace(sinks: Keys, others: Keys, n_head: int) -> list[findings.KeyDimensions]:
    """The number of dimensions in which each head's sink keys lie, and the same for as many other keys.

    `dims95`: how many singular values have 95% of the keys' energy; `participation`: (sum s^2)^2 / sum s^4.
    """
    rows = []
    for head in range(n_head):
        different = {token: key for h, token, key in sinks if h == head}
        control = {token: key for h, token, key in others if h == head}
        dimensions = _dimensions([*different.values()])
        others_dimensions = _dimensions([*control.values()][: len(different)], "others_")
        rows.append(findings.KeyDimensions(head=head, keys=len(different), **dimensions, **others_dimensions))
    return rows


def _dimensions(keys: list[torch.Tensor], prefix: str = "") -> dict[str, Any]:
    """`dims95` and `participation` of keys (D,), None for fewer than two, with a prefix before the names."""
    if len(keys) < 2:
        return {f"{prefix}dims95": None, f"{prefix}participation": None}
    energy = torch.linalg.svdvals(torch.stack(keys).double()).square()
    return {
        f"{prefix}dims95": int((energy.cumsum(0) < 0.95 * energy.sum()).sum()) + 1,
        f"{prefix}participation": (energy.sum() ** 2 / energy.square().sum().clamp_min(1e-30)).item(),
    }


def quadratic_form(
    subject: Subject, step_up: findings.Place, spiking: list[int], generator: torch.Generator
) -> findings.QuadraticForm | None:
    """Is a `spiking` channel's form in the step-up's gated FFN an outlier, and of rank one? None without such an FFN.

    `norm`: ||U_k||_F over the median of all channels'; `dominance`: the largest eigenvalue^2 of S_k = (U_k + U_k^T) / 2
    over ||S_k||_F^2, which is 1 for rank one. Both are given for the spiking channels and as many random others.
    """
    ffn = next((ffn for ffn in subject.gated if ffn.layer == step_up.layer), None)
    if ffn is None or step_up.kind not in ("ffn", "block"):
        return None
    gate, up, down = ffn.gate(), ffn.up(), ffn.down()  # (M, C), (M, C), (C, M)
    gain = ffn.gain().to(gate.device)
    gate, up = gate * gain, up * gain
    norms = form_norms(gate, up, down)
    free = torch.ones(len(norms), dtype=torch.bool)
    free[spiking] = False
    random = torch.rand(len(norms), generator=generator).masked_fill(~free, -1.0).topk(len(spiking)).indices.tolist()
    channels = [*spiking, *random]
    parts = dominance(gate, up, down[channels], norms[channels], generator)
    forms = [
        findings.ChannelForm(channel=k, norm=norm, dominance=part)
        for k, norm, part in zip(channels, (norms[channels] / norms.median()).tolist(), parts.tolist(), strict=True)
    ]
    return findings.QuadraticForm(
        layer=ffn.layer,
        channels=forms[: len(spiking)],
        others=forms[len(spiking) :],
        largest_norms=norms.argsort(descending=True)[:CHANNELS].tolist(),
    )


def form_norms(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """||U_k||_F of every channel k: (C,). gate, up (M, C), down (C, M)."""
    products = (gate @ gate.T).mul_(up @ up.T)  # (M, M), in place: M is large
    return ((down @ products) * down).sum(1).clamp_min(0).sqrt()


def dominance(
    gate: torch.Tensor, up: torch.Tensor, rows: torch.Tensor, norms: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """lambda_1^2 / ||S||_F^2 of each S = (U + U^T) / 2, U = sum_i row_i gate_i up_i^T, by power iteration on S^2: (K,).

    `rows`: (K, M). `norms`: ||U||_F, (K,).
    """
    apply = lambda x: 0.5 * (gate.T @ (rows.T * (up @ x)) + up.T @ (rows.T * (gate @ x)))  # (C, K) -> (C, K)
    x = torch.randn(gate.size(1), len(rows), generator=generator).to(gate)
    for _ in range(200):
        x = apply(x)
        x = x / x.norm(dim=0).clamp_min(1e-30)
    cross = gate @ up.T
    square = 0.5 * (norms**2 + ((rows @ (cross * cross.T)) * rows).sum(1))
    return apply(x).norm(dim=0) ** 2 / square.clamp_min(1e-30)
