"""Observation -> findings: plain dicts, JSON-serialisable, schema-versioned; and the reading and writing of them."""

import json
import math
from pathlib import Path

import torch

from . import metrics
from .checkpoint import write_atomic
from .errors import UserError

SCHEMA = "spikesink-findings-1"
SHOWN = 40  # tokens listed


def detection(subject, observation, checkpoint, model, data):
    """The findings of one observation; the dicts `checkpoint`, `model` and `data` say what was observed, and how."""
    obs = observation
    layers = [
        {"index": i, "layer": tap.layer, "kind": tap.kind, **stats.result()}
        for i, (tap, stats) in enumerate(zip(subject.streams, obs.streams, strict=True))
    ]
    return {
        "schema": SCHEMA,
        "checkpoint": checkpoint,
        "model": model,
        "data": {**data, "n_register": subject.n_register, "loss": obs.loss.mean().item()},
        "layers": layers,
        "spikes": _spikes(subject, obs),
        "sinks": _sinks(subject, obs),
        "co_occurrence": _co_occurrence(obs),
    }


def _strongest(score, ids):
    """(sequence, position, number of sequences) of the largest scores (N, T), each (token id, position) once."""
    seen = {}
    for flat in score.flatten().argsort(descending=True).tolist():
        n, t = divmod(flat, score.size(1))
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


def _spikes(subject, obs):
    rules = {}
    for rule, (text, _) in metrics.SPIKE_RULES.items():
        channels = obs.spike_channels[rule]
        order = channels.argsort(descending=True, stable=True)[: int((channels > 0).sum())]
        rules[rule] = {
            "threshold": text,
            "tokens": int(obs.spikes[rule].sum()),
            "fraction": obs.spikes[rule].double().mean().item(),
            "n_channels": len(order),
            "channels": order[:SHOWN].tolist(),
        }
    magnitudes = torch.stack([torch.cat(s.magnitudes) for s in obs.streams])  # (taps, N, T)
    channels = torch.stack([torch.cat(s.channels) for s in obs.streams])
    peak, tap = magnitudes.max(0)  # (N, T)
    tokens = []
    for n, t, occurrences in _strongest(peak, obs.ids):
        where = int(tap[n, t])
        tokens.append(
            {
                **_token_row(subject, obs, n, t, occurrences),
                "magnitude": peak[n, t].item(),
                "channel": int(channels[where, n, t]),
                "index": where,  # of the layer, in `layers`
                "rules": [rule for rule in rules if obs.spikes[rule][n, t]],
            }
        )
    return {
        "primary": metrics.PRIMARY_SPIKE_RULE,
        "rules": rules,
        "by_position": obs.spikes[metrics.PRIMARY_SPIKE_RULE].double().mean(0).tolist(),
        "tokens": tokens,
    }


def _sinks(subject, obs):
    N, T = obs.ids.shape
    per_layer = lambda name: torch.stack([a.sums[name] for a in obs.attention]) / N
    total = lambda name: torch.stack([a.sums[name] for a in obs.attention])
    eligible = metrics.eligible_keys(T)
    gu = {}
    for epsilon in metrics.EPSILONS:
        rate = per_layer(f"hits {epsilon}")  # (L, H, T), share of sequences
        by_position = rate.mean((0, 1))
        per_sequence = obs.first_rate[epsilon]
        best = int(by_position.masked_fill(~eligible, -1).argmax())
        gu[str(epsilon)] = {
            "by_position": by_position.tolist(),
            "first": by_position[0].item(),
            "first_ci95": metrics.bootstrap_ci(lambda i, x=per_sequence: x[i].mean().item(), N),
            "by_layer": rate[..., 0].mean(1).tolist(),
            "by_head": rate[..., 0].tolist(),
            "best_eligible": {"position": best, "rate": by_position[best].item()},
            "first_second_half_queries": per_layer(f"late first {epsilon}").mean().item(),
            "max_first_half": per_layer(f"first half {epsilon}").mean().item(),
        }
    ratio = lambda a, b: torch.where(b > 0, a / b, torch.nan).tolist()
    share_rule = obs.share > metrics.SHARE
    tokens = []
    for n, t, occurrences in _strongest(obs.max_alpha.masked_fill(~eligible, -1), obs.ids):
        tokens.append(
            {
                **_token_row(subject, obs, n, t, occurrences),
                "alpha": obs.max_alpha[n, t].item(),
                "heads": int(obs.sink_heads[n, t]),
                "share": obs.share[n, t].item(),
            }
        )
    is_sink = obs.sink_heads > 0
    return {
        "seams": [
            {"layer": tap.layer, "kind": tap.kind} for tap in subject.attends
        ],  # the rows of by_layer, by_head ...
        "primary": f"alpha > {metrics.PRIMARY_SINK_EPSILON} in at least one head, keys with at least T/4 queries",
        "gu": gu,
        "rules": {
            "gu": {"tokens": int(is_sink.sum()), "fraction": is_sink.double().mean().item()},
            "share": {
                "threshold": f"more than {metrics.SHARE:.0%} of all attention mass of its sequence",
                "tokens": int(share_rule.sum()),
                "fraction": share_rule.double().mean().item(),
            },
        },
        "share": obs.share.mean(0).tolist(),
        "share_uniform": metrics.uniform_share(T).tolist(),
        "token_rate": is_sink.double().mean(0).tolist(),
        "alpha_first": per_layer("alpha")[..., 0].tolist(),
        "any_sink_by_head": per_layer("any_sink").tolist(),
        "first_argmax": per_layer("first_argmax").tolist(),
        "slot_share": (1 - per_layer("mass") / T)
        .clamp_min(0)
        .round(decimals=6)
        .tolist(),  # attention that goes to no key
        "entropy": per_layer("entropy").tolist(),
        "distance": ratio(total("distance"), total("mass")),
        "distance_without_sinks": ratio(total("distance_others"), total("mass_others")),
        "first_value_norm_ratio": per_layer("first_value").tolist(),
        "sink_value_norm_ratio": ratio(total("sink_value"), total("sinks")),
        "tokens": tokens,
    }


def _co_occurrence(obs):
    spike, sink = obs.spikes[metrics.PRIMARY_SPIKE_RULE], obs.sink_heads > 0
    return {
        "spike_rule": metrics.PRIMARY_SPIKE_RULE,
        "sink_rule": f"gu {metrics.PRIMARY_SINK_EPSILON}",
        "spike_tokens": int(spike.sum()),
        "sink_tokens": int(sink.sum()),
        "both": int((spike & sink).sum()),
        **metrics.overlap(spike, sink),
        "ci95": metrics.bootstrap_ci(lambda i: metrics.overlap(spike[i], sink[i]), len(spike)),
    }


def plain(value):
    """The value with every nan and infinity as None, so that it is valid JSON."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_text(path, text):
    """Writes a text file atomically. Raises UserError if that cannot be done."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def save(path, findings):
    """Writes findings as JSON, atomically."""
    save_text(path, json.dumps(plain(findings), indent=1, allow_nan=False))
