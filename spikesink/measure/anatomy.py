"""How a spike is made and what a sink's keys look like: a second pass over the few sequences with the strongest spikes.

Terms of Sun et al. 2026: a spike rises at the *step-up* block and is cancelled at the *step-down* block, blocks counted
as sub-layers where those can be told apart. Its tokens share channels with near-fixed ratios, and once normalised they
are nearly one vector. Sink keys span one or two dimensions. In a gated FFN, channel k of the output is about the
quadratic form x^T U_k x with U_k = sum_i W_down[k,i] W_gate[i] W_up[i]^T.
"""

import torch

from ..hooks import hooked, on_streams
from ..models.subject import PLACES, batches, for_heads
from .observe import StreamStats
from .sinks import sinks_in
from .spikes import PRIMARY_SPIKE_RULE

SEQUENCES, PER_SEQUENCE = 16, 4  # how many are dissected, and tokens in each
CHANNELS = 8
LEAST_FALL = 0.1  # of the peak: less is no step-down


def anatomy(subject, ids, obs, batch_size=8, seed=0):
    """The findings' entry `anatomy`, a dict, from ids (N, T) and their Observation."""
    generator = torch.Generator().manual_seed(seed)
    tokens, are_spikes = chosen_tokens(obs)
    sequences = tokens[:, 0].unique()
    both = torch.cat((tokens, other_tokens(obs, tokens, generator)))
    taps = {"stream": subject.streams, **subject.inner}
    rows = {place: [None] * len(of_place) for place, of_place in taps.items()}  # (len(both), C) each
    stats = {place: [StreamStats() for _ in of_place] for place, of_place in subject.inner.items()}
    keys = [([], []) for _ in subject.attends]  # per layer: (head, token, key) of sinks, and of random other keys
    for numbers, some in batches(ids[sequences], batch_size):
        _dissect_batch(subject, some, sequences[numbers], both, rows, stats, keys, generator)
    K = len(tokens)
    distinct = distinct_tokens(subject, obs, tokens)
    steps = step_up_and_down(torch.stack(rows["stream"])[:, :K], subject.streams)
    of_what = ("each sequence's largest token: none is a spike", "tokens that the primary rule marks")[are_spikes]
    return {
        "of": of_what,
        "n_seq": len(sequences),
        "tokens": K,
        "distinct_tokens": len(distinct),
        **steps,
        "normed_cosine": [
            {"layer": tap.layer, "kind": tap.kind, "spikes": mean_cosine(x[:K][distinct]), "others": mean_cosine(x[K:])}
            for tap, x in zip(subject.inner["normed"], rows["normed"], strict=True)
        ],
        "inner": {
            place: [
                {"index": i, "layer": tap.layer, "kind": tap.kind, **s.result()}
                for i, (tap, s) in enumerate(zip(subject.inner[place], of_place, strict=True))
            ]
            for place, of_place in stats.items()
        },
        "places": PLACES,
        "key_subspace": [
            {"layer": tap.layer, "kind": tap.kind, "heads": key_subspace(*of_layer, subject.n_head)}
            for tap, of_layer in zip(subject.attends, keys, strict=True)
        ],
        "quadratic_form": quadratic_form(subject, steps, generator),
    }


def chosen_tokens(obs):
    """((K, 2) of sequence and position, whether they are spikes): the strongest spikes of the sequences that have the
    strongest; where no token is one, the largest token of as many sequences."""
    spike = obs.spikes[PRIMARY_SPIKE_RULE]
    score = obs.ratio.masked_fill(~spike, 0.0) if spike.any() else obs.ratio
    sequences = score.amax(1).argsort(descending=True, stable=True)[:SEQUENCES]
    best = score[sequences].topk(min(PER_SEQUENCE, score.size(1)), dim=1)
    kept = best.values > 0
    if not spike.any():
        kept[:, 0], kept[:, 1:] = True, False
    return torch.stack((sequences[:, None].expand_as(kept)[kept], best.indices[kept]), dim=1), bool(spike.any())


def other_tokens(obs, tokens, generator):
    """As many random tokens that are no spikes, of the same sequences: (K, 2); fewer where there are no more."""
    free = obs.tokens & ~obs.spikes[PRIMARY_SPIKE_RULE]
    free[tokens[:, 0], tokens[:, 1]] = False
    draw = torch.rand(free.shape, generator=generator).masked_fill(~free, -1.0)
    others = []
    for sequence in tokens[:, 0].tolist():
        position = int(draw[sequence].argmax())
        if draw[sequence, position] >= 0:
            others.append((sequence, position))
            draw[sequence, position] = -1.0
    return torch.tensor(others, dtype=torch.int64).view(-1, 2)


def state_of(subject, sequence, position, token):
    """What a token's state depends on, as a key: equal keys are one state, not two that are alike.

    Under causal attention registers are the same in every sequence, and so are equal first tokens after them (not in a
    decoder that reads an encoder's text).
    """
    if subject.causal and subject.part != "decoder":
        if position < subject.n_register:
            return ("register", position)
        if position == subject.n_register:
            return ("first", token)
    return (sequence, position)


def distinct_tokens(subject, obs, tokens):
    """Which of the tokens (K, 2) have a state of their own."""
    states = {state_of(subject, n, t, int(obs.ids[n, t])): i for i, (n, t) in reversed([*enumerate(tokens.tolist())])}
    return sorted(states.values())


@torch.no_grad()
def _dissect_batch(subject, ids, sequences, tokens, rows, stats, keys, generator):
    """One forward pass over some of the sequences; fills in the rows of their tokens at every tap, and sink keys."""
    mine = torch.isin(tokens[:, 0], sequences)
    place_of = {int(n): i for i, n in enumerate(sequences)}
    b = torch.tensor([place_of[int(n)] for n in tokens[mine, 0]])
    t = tokens[mine, 1]
    B, T = subject.seen(ids).shape

    def record(place, index):
        def function(x):
            x = x.detach().float().view(B, T, -1)
            if rows[place][index] is None:
                rows[place][index] = torch.zeros(len(tokens), x.size(-1))
            rows[place][index][mine] = x[b, t].cpu()
            if place in stats:
                stats[place][index].add(x)

        return function

    def on_keys(index):
        def hook(module, args, kwargs, output):
            q, k, _ = args
            sinks = sinks_in(module, q, k, subject.causal)
            k = for_heads(k.float().cpu(), q.size(1))
            draw = torch.rand(sinks.shape, generator=generator).masked_fill(sinks, -1.0)
            draw[..., : subject.n_register + 1] = -1.0  # these are often the same in every sequence
            control = draw.argsort(-1, descending=True).argsort(-1) < sinks.sum(-1, keepdim=True)
            seen = subject.seen(ids) if subject.part != "cross" else ids
            for found, kept in zip((sinks, control), keys[index], strict=True):
                for i, head, position in found.nonzero().tolist():
                    token = state_of(subject, int(sequences[i]), position, int(seen[i, position]))
                    kept.append((head, token, k[i, head, position]))

        return hook

    places = {"stream": subject.streams, **subject.inner}
    taps = [(tap, record(place, i)) for place, of in places.items() for i, tap in enumerate(of)]
    seams = [(seam.module, on_keys(i)) for i, seam in enumerate(subject.attends)]
    with on_streams([tap for tap, _ in taps], [function for _, function in taps]), hooked(seams):
        subject.losses(ids)


def step_up_and_down(path, taps):
    """Where spikes rise and fall, and the channels they share, from the tokens' streams at every tap (taps, K, C).

    A token's channel is that of its largest |h|; its step-up is the tap where that entry gains most towards its peak,
    its step-down the later tap where it loses most, if at least a tenth of the peak. Reported: the commonest of each
    over tokens, with means.
    """
    size = path.abs()
    K, C = path.shape[1:]
    largest = size.transpose(0, 1).flatten(1).argmax(1)
    peak_tap, channel = largest // C, largest % C
    token = torch.arange(K)
    entry = path[:, token, channel]  # (taps, K)
    peak = entry[peak_tap, token]
    change = entry.diff(dim=0) * peak.sign() / peak.abs().clamp_min(1e-30)  # (taps - 1, K), as parts of the peak
    tap = torch.arange(1, len(path))[:, None]
    up = change.masked_fill(tap > peak_tap, -torch.inf).argmax(0) + 1 if len(path) > 1 else torch.zeros_like(token)
    starts = entry[0] * peak.sign() / peak.abs().clamp_min(1e-30)
    up = torch.where(starts >= change[up - 1, token], 0, up) if len(path) > 1 else up  # there from the embedding on
    later = change.masked_fill(tap <= peak_tap, torch.inf)
    falls = (peak_tap < len(path) - 1) & (later.amin(0) <= -LEAST_FALL)
    named = lambda index: {"index": index, "layer": taps[index].layer, "kind": taps[index].kind}

    up_index = int(up.mode().values)
    part = torch.cat((starts[None], change))
    step_up = {
        **named(up_index),
        "tokens": (up == up_index).double().mean().item(),
        "part_of_peak": part[up_index, up == up_index].mean().item(),
    }
    step_down = None
    if falls.any():
        down = later.argmin(0)[falls] + 1
        index = int(down.mode().values)
        step_down = {
            **named(index),
            "tokens": (down == index).double().sum().item() / K,
            "part_of_peak": change[index - 1, falls][down == index].mean().item(),
        }
    at = int(peak_tap.mode().values)
    shared = path[at]  # (K, C), every token at the tap where most have their peak
    top = shared.abs().mean(0).argsort(descending=True, stable=True)[:CHANNELS]
    values = shared[:, top]
    relative = values / values[:, :1].abs().clamp_min(1e-30)
    return {
        "path": {str(int(c)): path[:, :, c].mean(1).tolist() for c in top[:3]},  # mean over tokens, at every tap
        "step_up": step_up,
        "step_down": step_down,
        "peak": {**named(at), "tokens": (peak_tap == at).double().mean().item()},
        "channels": [
            {
                "channel": int(c),
                "value": values[:, i].mean().item(),
                "same_sign": (values[:, i].sign() == values[:, i].mean().sign()).double().mean().item(),
                "ratio": relative[:, i].mean().item(),  # to the |value| of the first channel, token by token
                "ratio_std": relative[:, i].std(correction=0).item(),
                "median": shared[:, c].abs().median().item(),
            }
            for i, c in enumerate(top.tolist())
        ],
    }


def mean_cosine(x):
    """Mean cosine over all pairs of the rows of x (K, C); None for fewer than two rows."""
    n = len(x)
    if n < 2:
        return None
    total = torch.nn.functional.normalize(x.double(), dim=1).sum(0).square().sum().item()  # n + the pairs, both ways
    return (total - n) / (n * (n - 1))


def key_subspace(sinks, others, n_head):
    """Per head, in how many dimensions its sink keys lie, beside as many other keys; [(head, token, key (D,))] each.

    `dims95`: singular values that hold 95% of the keys' energy; `participation`: (sum s^2)^2 / sum s^4. None below two
    different keys.
    """
    rows = []
    for head in range(n_head):
        different = {token: key for h, token, key in sinks if h == head}
        control = {token: key for h, token, key in others if h == head}
        row = {"head": head, "keys": len(different)}
        for name, of in (("", different), ("others_", control)):
            keys = list(of.values())[: len(different)]
            energy = torch.linalg.svdvals(torch.stack(keys).double()).square() if len(keys) > 1 else None
            row[f"{name}dims95"] = None if energy is None else int((energy.cumsum(0) < 0.95 * energy.sum()).sum()) + 1
            row[f"{name}participation"] = (
                None if energy is None else (energy.sum() ** 2 / energy.square().sum().clamp_min(1e-30)).item()
            )
        rows.append(row)
    return rows


def quadratic_form(subject, steps, generator):
    """Is the step-up FFN's form of a spiking channel an outlier, and of rank one? None where the step-up is no FFN, or
    not a gated one.

    `norm`: ||U_k||_F over the median of all channels'; `dominance`: largest eigenvalue^2 of S_k = (U_k + U_k^T) / 2
    over ||S_k||_F^2, 1 for rank one; for spiking channels and as many random others.
    """
    up_at = steps["step_up"]
    ffn = next((f for f in subject.gated if f.layer == up_at["layer"]), None)
    if ffn is None or up_at["kind"] not in ("ffn", "block"):
        return None
    gate, up, down = ffn.gate(), ffn.up(), ffn.down()  # (M, C), (M, C), (C, M)
    gain = ffn.gain().to(gate.device)
    gate, up = gate * gain, up * gain
    norms = form_norms(gate, up, down)
    spiking = [row["channel"] for row in steps["channels"][:4]]
    free = torch.ones(len(norms), dtype=torch.bool)
    free[spiking] = False
    random = torch.rand(len(norms), generator=generator).masked_fill(~free, -1.0).topk(len(spiking)).indices.tolist()
    channels = [*spiking, *random]
    parts = dominance(gate, up, down[channels], norms[channels], generator)
    entries = [
        {"channel": k, "norm": norm, "dominance": part}
        for k, norm, part in zip(channels, (norms[channels] / norms.median()).tolist(), parts.tolist(), strict=True)
    ]
    return {
        "layer": ffn.layer,
        "channels": entries[: len(spiking)],
        "others": entries[len(spiking) :],
        "largest_norms": norms.argsort(descending=True)[:CHANNELS].tolist(),
    }


def form_norms(gate, up, down):
    """||U_k||_F of every channel k: (C,). gate, up (M, C), down (C, M)."""
    products = (gate @ gate.T).mul_(up @ up.T)  # (M, M): in place, for M is the largest size of a model
    return ((down @ products) * down).sum(1).clamp_min(0).sqrt()


def dominance(gate, up, rows, norms, generator, iterations=200):
    """lambda_1^2 / ||S||_F^2 of each S = (U + U^T) / 2, U = sum_i row_i gate_i up_i^T, by power iteration on S^2: (K,).

    rows (K, M), norms (K,): ||U||_F.
    """
    apply = lambda x: 0.5 * (gate.T @ (rows.T * (up @ x)) + up.T @ (rows.T * (gate @ x)))  # (C, K) -> (C, K)
    x = torch.randn(gate.size(1), len(rows), generator=generator).to(gate)
    for _ in range(iterations):
        x = apply(x)
        x = x / x.norm(dim=0).clamp_min(1e-30)
    cross = gate @ up.T
    square = 0.5 * (norms**2 + ((rows @ (cross * cross.T)) * rows).sum(1))
    return apply(x).norm(dim=0) ** 2 / square.clamp_min(1e-30)
