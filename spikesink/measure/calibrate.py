"""How far to trust a finding: nulls with their false-positive rates, sensitivity curves, and a verdict with its reason.

A null is the same measurement where the phenomenon cannot be, or where one explanation of it is taken away:

  init                the same architecture with new random weights: nothing is learned
  shuffled_channels   each token's stream is rotated by a random number of channels: magnitudes stay, channels do not
  shuffled_positions  each query's attention is rotated by a random number of keys, each channel of the stream by a
                      random number of tokens: as sharp and as large, but no token in particular
  random_tokens       ids drawn evenly from the vocabulary: is it the text?
  repeated_token      each sequence is one token: is it the position?

The last two run the trained model, so what stays in them is a finding, not a false positive.
"""

import torch

from ..text.sequences import PADDING
from . import metrics
from .observe import Shuffle, observe
from .sinks import EPSILON_CURVE, PRIMARY_SINK_EPSILON, SHARE, SHARES
from .spikes import PRIMARY_SPIKE_RULE, RATIOS, SPIKE_RATIO

SEQUENCES, TOKENS = 16, 2**14  # of each null: at most so many sequences, and tokens (but at least two sequences)
# what may call a rule's hits false
NULLS_OF = {
    "ratio": ("init",),
    "massive": ("init",),
    "six_sigma": ("init",),
    "percentile": ("init", "shuffled_channels"),
    "gu": ("init", "shuffled_positions"),
    "share": ("init", "shuffled_positions"),
}
POWERED_PARAMETERS, POWERED_TOKENS, POWERED_SEQUENCES = 50e6, 1e9, 60  # below these, absence is "underpowered"
MAJORITY = 0.5  # a phenomenon is present if most sequences have it


def _rotate(x, by, dim):
    """x rotated along `dim` by `by` places, a tensor of x's shape but 1 at `dim`."""
    n = x.size(dim)
    shape = [1] * x.dim()
    shape[dim] = n
    index = (torch.arange(n, device=x.device).view(shape) + by) % n
    return x.gather(dim, index.expand(x.shape))


def shuffles(seed):
    """{name: Shuffle} of the nulls that change what is measured."""
    draw = torch.Generator().manual_seed(seed)
    places = lambda n, shape, device: torch.randint(n, shape, generator=draw).to(device)

    def channels(x):
        return _rotate(x, places(x.size(2), (*x.shape[:2], 1), x.device), 2)

    def positions(x):
        return _rotate(x, places(x.size(1), (len(x), 1, x.size(2)), x.device), 1)

    def rows(weights, first, causal):
        """Each query's weights rotated among the keys that it may see, from the first that has any (a window's)."""
        *_, R, T = weights.shape
        key, query = torch.arange(T, device=weights.device), torch.arange(first, first + R, device=weights.device)
        end = (query + 1 if causal else torch.full_like(query, T))[:, None]  # (R, 1)
        start = (weights > 0).int().argmax(-1, keepdim=True)  # (B, H, R, 1)
        by = (torch.rand(start.shape, generator=draw).to(weights) * (end - start)).long()
        rotated = start + (key - start + by) % (end - start)
        return weights.gather(-1, torch.where((key >= start) & (key < end), rotated, key))

    return {"shuffled_channels": Shuffle(stream=channels), "shuffled_positions": Shuffle(stream=positions, rows=rows)}


def other_text(ids, vocabulary, seed):
    """{name: ids} of the nulls that change the text; a first or last token that all sequences share (BOS, [SEP]) stays.

    ids (N, T), padded on the right.
    """
    draw = torch.Generator().manual_seed(seed)
    place, last = torch.arange(ids.size(1)), (ids != PADDING).sum(1, keepdim=True) - 1
    kept = ids == PADDING
    for at in (torch.zeros_like(last), last):
        special = ids.gather(1, at)
        if len(ids) > 1 and bool((special == special[0]).all()):
            kept = kept | (place == at)
    random = torch.randint(vocabulary, ids.shape, generator=draw)
    repeated = torch.randint(vocabulary, (len(ids), 1), generator=draw).expand(ids.shape)
    return {"random_tokens": torch.where(kept, ids, random), "repeated_token": torch.where(kept, ids, repeated)}


def nulls(subject, ids, vocabulary, n_seq=None, batch_size=8, seed=0, no_init=None):
    """{name: measures of that null} on the first sequences of ids (N, T), at most `n_seq` (0: no nulls).

    `no_init`: why the model cannot be had with new weights, which that null then says.
    """
    n_seq = max(2, min(SEQUENCES, TOKENS // ids.size(1))) if n_seq is None else n_seq
    if not n_seq:
        return {}
    some = ids[:n_seq]
    found = {}
    if no_init or not subject.rebuild:
        found["init"] = {"skipped": no_init or "this model cannot be made anew"}
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = subject.rebuild()
        found["init"] = measures(observe(fresh, some, batch_size, desc="init"))
        del fresh
    for name, shuffle in shuffles(seed).items():
        found[name] = measures(observe(subject, some, batch_size, shuffle=shuffle, desc=name))
    for name, changed in other_text(some, vocabulary, seed).items():
        found[name] = measures(observe(subject, changed, batch_size, desc=name))
    return found


def measures(obs):
    """What is compared between the model and its nulls, a dict: per rule the fraction of tokens and of sequences."""
    tokens = obs.tokens
    rate = lambda hits: {
        "tokens": (hits & tokens).sum().item() / int(tokens.sum()),
        "sequences": hits.any(1).double().mean().item(),
    }
    heads = obs.best_alpha > PRIMARY_SINK_EPSILON  # (N, L, H)
    kurtosis = max(s.result()["kurtosis"] for s in obs.streams)
    return {
        "n_seq": len(obs.ids),
        "loss": obs.loss.mean().item(),
        "largest_ratio": obs.ratio.max().item(),
        "kurtosis": kurtosis,
        "first_alpha": obs.first_alpha.mean().item(),
        "rules": {
            **{rule: rate(hits) for rule, hits in obs.spikes.items()},
            "gu": {**rate(obs.sink_heads > 0), "best_head": heads.double().mean(0).max().item()},
            "share": rate(obs.share > SHARE),
        },
        "curves": curves(obs),
    }


def curves(obs):
    """How the findings change with their thresholds: a list of points for each of ratio, percentile, epsilon, share.

    tokens, sequences: the fraction that has a hit. best_head: the largest fraction of sequences in which one and the
    same head has a sink. sink_1: Gu et al.'s for the first key. Keys with few queries never count.
    """
    tokens, n = obs.tokens, int(obs.tokens.sum())
    alpha = obs.max_alpha.masked_fill(~obs.eligible, 0.0)
    point = lambda hits: {
        "tokens": (hits & tokens).sum().item() / n,
        "sequences": hits.any(1).double().mean().item(),
    }
    return {
        "ratio": [{"at": r, **point(obs.ratio >= r)} for r in RATIOS],
        "percentile": [{"at": p, **point(hits)} for p, hits in obs.percentiles.items()],
        "epsilon": [
            {
                "at": epsilon,
                **point(alpha > epsilon),
                "sink_1": (obs.first_alpha > epsilon).double().mean().item(),
                "best_head": (obs.best_alpha > epsilon).double().mean(0).max().item(),
            }
            for epsilon in EPSILON_CURVE
        ],
        "share": [{"at": share, **point(obs.share > share)} for share in SHARES],
    }


def false_positives(null, rule, key="sequences"):
    """The rate at which a rule fires in the worst of its nulls, with its 95% interval; None where none was run."""
    run = {name: null[name] for name in NULLS_OF[rule] if "rules" in null.get(name, {})}
    if not run:
        return None
    worst = max(run.values(), key=lambda m: m["rules"][rule][key])
    return {**_rate(worst["rules"][rule][key], worst["n_seq"]), "nulls": [*run]}


def _rate(rate, n, tests=1):
    return {"rate": rate, "ci95": metrics.wilson(round(rate * n), n, tests), "n_seq": n}


def verdicts(obs, null, overlap, heads, model, step, trained_tokens):
    """{"spike", "sink", "co_occurrence": {"verdict", "reason", ...}}: present, absent or underpowered, and why.

    Present: most sequences have it (in one and the same head, for sinks), and not so in the null. Absent needs power:
    a model of at least 50M parameters, 1e9 tokens of training where that is known, and 60 sequences; published models
    below that have shown no more. Everything between is underpowered. `heads`: names of the L x H heads.
    """
    N = len(obs.ids)
    found = (obs.best_alpha > PRIMARY_SINK_EPSILON).double().mean(0).flatten()
    points = curves(obs)
    weak = _weakness(N, model, step, trained_tokens)
    spike = _verdict(
        "of sequences have a spike token",
        _rate(obs.spikes[PRIMARY_SPIKE_RULE].any(1).double().mean().item(), N),
        false_positives(null, PRIMARY_SPIKE_RULE),
        weak,
        ("ratio", _holds(points, null, "ratio", "sequences", N), SPIKE_RATIO),
    )
    sink = _verdict(
        f"of sequences have a sink in head {heads[int(found.argmax())]}, the best of {len(heads)}",
        _rate(found.max().item(), N, tests=len(heads)),
        false_positives(null, "gu", "best_head"),
        weak,
        ("epsilon", _holds(points, null, "epsilon", "best_head", N, tests=len(heads)), PRIMARY_SINK_EPSILON),
    )
    return {"spike": spike, "sink": sink, "co_occurrence": _co_verdict(spike, sink, overlap, weak)}


def _holds(points, null, curve, key, n_seq, tests=1):
    """The thresholds of one of the curves `points` at which the model would be said to have it: most sequences do, and
    the null not so."""
    of_rule = {"ratio": "ratio", "epsilon": "gu"}[curve]
    nulls_run = [null[name] for name in NULLS_OF[of_rule] if "curves" in null.get(name, {})]
    thresholds = []
    for i, point in enumerate(points[curve]):
        low = _rate(point[key], n_seq, tests)["ci95"][0]
        false = [_rate(m["curves"][curve][i][key], m["n_seq"])["ci95"][1] for m in nulls_run]
        if low > max([MAJORITY, *false]):
            thresholds.append(point["at"])
    return thresholds


def _weakness(n_seq, model, step, trained_tokens):
    """Why absence would be no evidence; empty if it would."""
    weak = []
    if model["parameters"] < POWERED_PARAMETERS:
        weak.append(f"{model['parameters'] / 1e6:.3g}M parameters, fewer than {POWERED_PARAMETERS / 1e6:.0f}M")
    if trained_tokens is not None and trained_tokens < POWERED_TOKENS:
        weak.append(f"{trained_tokens / 1e6:.3g}M tokens of training, fewer than {POWERED_TOKENS / 1e6:.0f}M")
    elif step == 0:
        weak.append("untrained")
    if n_seq < POWERED_SEQUENCES:
        weak.append(f"{n_seq} sequences, fewer than {POWERED_SEQUENCES}")
    return weak


def _verdict(what, found, false, weak, sensitivity):
    """One phenomenon's verdict from the share of sequences that have it, against its null."""
    knob, holds, used = sensitivity
    rate, ci = found["rate"], found["ci95"]
    reason = f"{rate:.0%} [{ci[0]:.0%}, {ci[1]:.0%}] {what}"
    if false is None:
        reason += "; no null was run"
    else:
        reason += f", {false['rate']:.0%} [{false['ci95'][0]:.0%}, {false['ci95'][1]:.0%}] in its nulls"
    if ci[0] > MAJORITY and (false is None or false["ci95"][1] < ci[0]):
        verdict = "present"
        reason += f"; so for every {knob} tried from {min(holds):g} to {max(holds):g} ({used:g} is used)"
    elif ci[0] > MAJORITY:
        verdict = "underpowered"
        reason += "; the nulls have it as often, or are too few to tell"
    elif ci[1] > MAJORITY:
        verdict = "underpowered"
        reason += "; more sequences would decide whether most have it"
    elif weak:
        verdict = "underpowered"
        reason += f"; absence would need more: {', '.join(weak)}"
    else:
        verdict = "absent"
        reason += "; not in most sequences of a model and a sample large enough to show it"
        if holds:
            reason += f" (but in most at a {knob} of {max(holds):g})"
    return {"verdict": verdict, "reason": reason, "rate": rate, "ci95": ci, "null": false, "holds": holds}


UNRELATED = 2.0  # lift over chance that an interval must exclude before co-occurrence is called absent


def _co_verdict(spike, sink, overlap, weak):
    """Do spikes and sinks fall on the same tokens, and does position alone explain it?"""
    missing = [name for name, of in (("spikes", spike), ("sinks", sink)) if of["verdict"] != "present"]
    if missing:
        return {"verdict": "underpowered", "reason": f"{' and '.join(missing)} are not present: nothing to compare"}
    ci, lift_ci = overlap["ci95"]["lift_anywhere"], overlap["ci95"]["lift"]
    reason = f"P(sink | spike) is {overlap['p_sink_given_spike']:.0%}, {overlap['lift_anywhere']:.3g}"
    reason += f" [{ci[0]:.3g}, {ci[1]:.3g}] times what chance over all tokens gives" if ci else " times chance"
    if ci and ci[0] > 1:
        part, p = overlap["explained_by_position"], overlap["p_permutation"]
        reason += f"; {part:.0%} of the excess is there when labels are permuted among equal positions, "
        if p < 0.05:
            reason += f"and the rest is more than chance (p = {p:.3g})"
        elif lift_ci and lift_ci[1] < 1:
            reason += "and sequences that have the one have the other less often than that"
        else:
            reason += f"and there is no more than that (p = {p:.3g})"
        return {"verdict": "present", "reason": reason}
    if ci and ci[1] < UNRELATED and not weak:
        return {"verdict": "absent", "reason": reason}
    more = f"; absence would need more: {', '.join(weak)}" if weak else "; the interval leaves room for much more"
    return {"verdict": "underpowered", "reason": reason + more}
