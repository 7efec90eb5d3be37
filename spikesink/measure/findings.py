"""Observation -> findings: plain dicts, JSON-serialisable, schema-versioned; and the reading and writing of them."""

import torch

from . import calibrate, metrics
from .sinks import EPSILONS, PRIMARY_SINK_EPSILON, SHARE, queries_per_key, uniform_share
from .spikes import PERCENTILE_RULE, PRIMARY_SPIKE_RULE, SPIKE_RULES

SCHEMA = "spikesink-findings-1"
COMPARISON_SCHEMA = "spikesink-comparison-1"
SHOWN = 40  # tokens listed


def detection(subject, obs, checkpoint, model, data, null=None, anatomy=None):
    """The findings of one observation; the dicts `checkpoint`, `model` and `data` say what was observed, and how.

    `null`: calibrate.nulls of the same subject, `anatomy`: anatomy.anatomy; empty where they were not run.
    """
    layers = [
        {"index": i, "layer": tap.layer, "kind": tap.kind, **stats.result()}
        for i, (tap, stats) in enumerate(zip(subject.streams, obs.streams, strict=True))
    ]
    co_occurrence, measures = _co_occurrence(obs), calibrate.measures(obs)
    null = null or {}
    trained = checkpoint.get("step"), checkpoint.get("tokens")
    return {
        "schema": SCHEMA,
        "part": subject.part,
        "causal": subject.causal,
        "checkpoint": checkpoint,
        "model": model,
        "data": {
            **data,
            "n_register": subject.n_register,
            "loss": (obs.loss * obs.predicted).sum().item() / max(1, int(obs.predicted.sum())),
            "loss_of": "the next token" if subject.shift else "each token, none masked",
        },
        "verdicts": calibrate.verdicts(obs, null, co_occurrence, subject.heads, {"parameters": 0, **model}, *trained),
        "layers": layers,
        "spikes": _spikes(subject, obs, null),
        "sinks": _sinks(subject, obs, null),
        "co_occurrence": co_occurrence,
        "sensitivity": measures["curves"],
        "measures": measures,
        "nulls": null,
        "anatomy": anatomy or {},
        "examples": obs.examples.result(subject, obs) if obs.examples.relative else {},
    }


def _strongest(score, ids, among):
    """(sequence, position, number of sequences) of the largest scores (N, T) `among` some, each (id, position) once."""
    seen = {}
    for flat in score.masked_fill(~among, -torch.inf).flatten().argsort(descending=True).tolist():
        n, t = divmod(flat, score.size(1))
        if not among[n, t]:
            break
        key = (int(ids[n, t]), t)
        if key not in seen:
            if len(seen) == SHOWN:
                break
            seen[key] = (n, t, int((ids[:, t] == ids[n, t]).sum()))
    return seen.values()


def _token_row(subject, obs, sequence, position, occurrences):
    before = obs.ids[sequence, max(0, position - 12) : position].tolist()
    return {
        "sequence": sequence,
        "position": position,
        "occurrences": occurrences,  # sequences with this token at this position; the strongest is shown
        "id": int(obs.ids[sequence, position]),
        "text": subject.text(int(obs.ids[sequence, position])),
        "before": "".join(subject.text(i) for i in before),
    }


def _spikes(subject, obs, null):
    rules, n_tokens = {}, int(obs.tokens.sum())
    texts = {rule: definition.text for rule, definition in SPIKE_RULES.items()}
    for rule, text in {**texts, "percentile": PERCENTILE_RULE}.items():
        channels = obs.spike_channels[rule]
        order = channels.argsort(descending=True, stable=True)[: int((channels > 0).sum())]
        rules[rule] = {
            "threshold": text,
            "tokens": int(obs.spikes[rule].sum()),
            "fraction": obs.spikes[rule].sum().item() / n_tokens,
            "false_positives": calibrate.false_positives(null, rule),
            "n_channels": len(order),
            "channels": order[:SHOWN].tolist(),
        }
    peak, tap = obs.magnitudes.max(0)  # (N, T)
    tokens = []
    for n, t, occurrences in _strongest(peak, obs.ids, obs.tokens):
        where = int(tap[n, t])
        tokens.append(
            {
                **_token_row(subject, obs, n, t, occurrences),
                "magnitude": peak[n, t].item(),
                "channel": int(obs.channels[where, n, t]),
                "index": where,  # of the layer, in `layers`
                "rules": [rule for rule in rules if obs.spikes[rule][n, t]],
            }
        )
    return {
        "primary": PRIMARY_SPIKE_RULE,
        "rules": rules,
        "by_position": (obs.spikes[PRIMARY_SPIKE_RULE].double().sum(0) / obs.tokens.sum(0)).tolist(),
        "tokens": tokens,
    }


def _sinks(subject, obs, null):
    N, T = obs.ids.shape
    n_tokens, at_position = int(obs.tokens.sum()), obs.tokens.sum(0)  # sequences that reach each position (T,)
    total = lambda name: torch.stack([a.sums[name] for a in obs.attention])
    per_layer = lambda name: total(name) / N
    eligible = obs.eligible.sum(0)  # sequences in which each position's key has enough queries (T,)
    gu = {}
    for epsilon in EPSILONS:
        rate = total(f"hits {epsilon}") / at_position  # (L, H, T), share of sequences
        by_position = rate.mean((0, 1))
        first = (obs.first_alpha > epsilon).double().mean((1, 2))  # (N,), share of heads
        strong = (total(f"eligible hits {epsilon}") / eligible).mean((0, 1)).nan_to_num(0.0)  # (T,)
        strong = strong.masked_fill(eligible < N / 2, -1)  # positions that most sequences have
        best = int(strong.argmax())
        gu[str(epsilon)] = {
            "by_position": by_position.tolist(),
            "first": by_position[0].item(),
            "first_ci95": metrics.rate_ci(first),
            "by_layer": rate[..., 0].mean(1).tolist(),
            "by_head": rate[..., 0].tolist(),
            "best_eligible": {"position": best, "rate": strong[best].item()},
            "first_second_half_queries": per_layer(f"late first {epsilon}").mean().item(),
            "max_first_half": per_layer(f"first half {epsilon}").mean().item(),
        }
    ratio = lambda a, b: torch.where(b > 0, a / b, torch.nan).tolist()
    share_rule = obs.share > SHARE
    uniform = sum(_uniform(subject, int(n), T) for n in obs.tokens.sum(1)) / at_position
    tokens = []
    for n, t, occurrences in _strongest(obs.max_alpha, obs.ids, obs.eligible):
        tokens.append(
            {
                **_token_row(subject, obs, n, t, occurrences),
                "alpha": obs.max_alpha[n, t].item(),
                "heads": int(obs.sink_heads[n, t]),
                "share": obs.share[n, t].item(),
            }
        )
    is_sink = obs.sink_heads > 0
    same_text = torch.nan if subject.part == "cross" else 1.0
    return {
        "seams": [
            {"layer": tap.layer, "kind": tap.kind} for tap in subject.attends
        ],  # the rows of by_layer, by_head ...
        "primary": f"alpha > {PRIMARY_SINK_EPSILON} in at least one head, keys with at least T/4 queries",
        "gu": gu,
        "rules": {
            "gu": {
                "threshold": f"alpha > {PRIMARY_SINK_EPSILON} in a head, keys with at least T/4 queries",
                "tokens": int(is_sink.sum()),
                "fraction": is_sink.sum().item() / n_tokens,
                "false_positives": calibrate.false_positives(null, "gu"),
            },
            "share": {
                "threshold": f"more than {SHARE:.0%} of all attention mass of its sequence",
                "tokens": int(share_rule.sum()),
                "fraction": share_rule.sum().item() / n_tokens,
                "false_positives": calibrate.false_positives(null, "share"),
            },
        },
        "share": (obs.share.double().sum(0) / at_position).tolist(),
        "share_uniform": uniform.tolist(),
        "token_rate": (is_sink.double().sum(0) / at_position).tolist(),
        "alpha_first": per_layer("alpha")[..., 0].tolist(),
        "any_sink_by_head": (obs.best_alpha > PRIMARY_SINK_EPSILON).double().mean(0).tolist(),
        "first_argmax": per_layer("first_argmax").tolist(),
        "slot_share": (1 - total("mass") / total("queries"))
        .clamp_min(0)
        .round(decimals=6)
        .tolist(),  # attention that goes to no key
        "entropy": per_layer("entropy").tolist(),
        # in an encoder-decoder's cross-attention, positions of two texts: no distance
        "distance": ratio(total("distance") * same_text, total("mass")),
        "distance_without_sinks": ratio(total("distance_others") * same_text, total("mass_others")),
        "first_value_norm_ratio": per_layer("first_value").tolist(),
        "sink_value_norm_ratio": ratio(total("sink_value"), total("sinks")),
        "tokens": tokens,
    }


def _uniform(subject, n, T):
    """Each key's share of a sequence of n tokens if attention were even, padded to T: (T,)."""
    share = uniform_share(queries_per_key(n), subject.causal)
    return torch.nn.functional.pad(share, (0, T - n))


def _co_occurrence(obs):
    spike, sink = obs.spikes[PRIMARY_SPIKE_RULE], obs.sink_heads > 0
    return {
        **_overlap(spike, sink, obs.tokens),
        "without_first": _overlap(spike[:, 1:], sink[:, 1:], obs.tokens[:, 1:]),
    }


def _overlap(spike, sink, tokens):
    """The overlap of spike and sink tokens (N, T), its intervals over sequences and its permutation p."""
    N = len(spike)
    found = metrics.overlap(spike, sink, tokens)
    weighted = lambda i: metrics.overlap(spike, sink, tokens, weights=i.bincount(minlength=N))
    intervals = metrics.bootstrap_ci(weighted, N)
    for key, of in (("p_sink_given_spike", spike), ("p_spike_given_sink", sink), ("jaccard", spike | sink)):
        n = int(of.any(1).sum())
        if found[key] in (0, 1) and n:  # a bootstrap has no width there
            intervals[key] = metrics.wilson(round(found[key] * n), n)
    if not (spike & sink).any():
        intervals["lift"] = intervals["lift_anywhere"] = None  # nothing to resample
    return {
        "spike_rule": PRIMARY_SPIKE_RULE,
        "sink_rule": f"gu {PRIMARY_SINK_EPSILON}",
        "spike_tokens": int(spike.sum()),
        "sink_tokens": int(sink.sum()),
        "both": int((spike & sink).sum()),
        **found,
        "ci95": intervals,
        "p_permutation": metrics.permutation_p(spike, sink, tokens),
    }


def ratio_of(layer):
    """top-1 over the median of a layer; 0 where the median is."""
    return layer["top1"] / layer["median"] if layer["median"] else 0.0


def name_of(layer):
    """'embedding', 'attn 0', 'ffn 0', ... of a layer of the findings."""
    return layer["kind"] if layer["layer"] < 0 else f"{layer['kind']} {layer['layer']}"
