"""What the instruments report, against explicit T x T maps, hand-written formulas and planted ground truth."""

import math

import pytest
import torch

from model import GPT, GPTConfig
from spikesink.hooks import hooked
from spikesink.measure import metrics
from spikesink.measure.observe import observe
from spikesink.measure.sinks import eligible_keys, queries_per_key, sink_alpha, uniform_share
from spikesink.measure.spikes import SPIKE_RULES
from spikesink.measure.summarise import summarise

from .conftest import TINY, subject_of, tiny


def found_in(model, ids):
    subject = subject_of(model)
    return summarise(subject, observe(subject, ids, batch_size=4, progress=False))


def explicit_maps(model, ids):
    """Attention maps (L, N, H, T, T) and value norms (L, N, H, T), by softmax written out."""
    maps, norms = [], []

    def hook(module, args, kwargs, output):
        q, k, v = args
        logits = torch.einsum("nhid,nhjd->nhij", q, k) / math.sqrt(q.size(-1))
        maps.append(logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf).softmax(-1))
        norms.append(v.norm(dim=-1))

    with hooked([(block.attn.f.attend, hook) for block in model.transformer.h]), torch.no_grad():
        model(ids)
    return torch.stack(maps), torch.stack(norms)


@pytest.mark.parametrize("chunk_bytes", [1, 2**25])
def test_attention_metrics_are_those_of_explicit_maps(marked_ids, monkeypatch, chunk_bytes):
    monkeypatch.setattr("spikesink.models.subject.CHUNK_BYTES", chunk_bytes)
    model, ids = planted(sink_logit=4.5), marked_ids
    sinks = found_in(model, ids).sinks
    maps, norms = explicit_maps(model, ids)  # (L, N, H, T, T)
    L, N, H, T, _ = maps.shape
    alpha = torch.zeros(L, N, H, T)
    for k in range(1, T + 1):  # Gu et al.'s formula, keys counted from 1
        alpha[..., k - 1] = sum(maps[..., i - 1, k - 1] for i in range(k, T + 1)) / (T - k + 1)
    torch.testing.assert_close(torch.stack([sink_alpha(m.sum(-2), queries_per_key(T)) for m in maps]), alpha)
    for epsilon in (0.2, 0.3, 0.5, 0.8):
        hits = (alpha > epsilon).float()
        ours = sinks.at(epsilon)
        assert 0 < hits.mean() < 1 or epsilon == 0.8
        assert ours.by_position == pytest.approx(hits.mean((0, 1, 2)).tolist())
        assert ours.first == pytest.approx(hits[..., 0].mean().item())
        assert ours.by_layer == pytest.approx(hits[..., 0].mean((1, 2)).tolist())
        assert torch.tensor(ours.by_head).flatten().tolist() == pytest.approx(hits[..., 0].mean(1).flatten().tolist())
        assert ours.max_first_half == pytest.approx(hits[..., : T // 2].amax(-1).mean().item())
        late = maps[..., T // 2 :, 0].mean(-1)
        assert ours.first_second_half_queries == pytest.approx((late > epsilon).float().mean().item())
    close = lambda ours, theirs: torch.testing.assert_close(
        torch.tensor(ours), theirs, atol=1e-5, rtol=1e-4, equal_nan=True
    )
    close(sinks.alpha_first, alpha[..., 0].mean(1))
    close(sinks.share, (maps.sum((0, 2, 3)) / maps.sum((0, 2, 3, 4))[:, None]).mean(0))
    close(sinks.first_argmax, (maps.argmax(-1) == 0).float().mean((1, 3)))
    close(sinks.entropy, -(maps * maps.clamp_min(1e-30).log()).sum(-1).mean((1, 3)))
    i, j = torch.arange(T)[:, None], torch.arange(T)
    close(sinks.distance, (maps * (i - j).abs()).sum((1, 3, 4)) / maps.sum((1, 3, 4)))
    few = torch.arange(T, 0, -1) < T / 4
    is_sink = (alpha > 0.3) & ~few
    assert is_sink.any()
    others = maps * ~is_sink[..., None, :]
    close(sinks.distance_without_sinks, (others * (i - j).abs()).sum((1, 3, 4)) / others.sum((1, 3, 4)))
    close(sinks.first_value_norm_ratio, (norms[..., 0] / norms.mean(-1)).mean(1))
    relative = norms / norms.mean(-1, keepdim=True)
    close(sinks.sink_value_norm_ratio, (relative * is_sink).sum((1, 3)) / is_sink.sum((1, 3)))
    close(sinks.any_sink_by_head, is_sink.any(-1).float().mean(1))
    assert sinks.rules["gu"].tokens == int(is_sink.any(2).any(0).sum())


def test_layer_statistics_are_the_written_formulas(ids):
    model = tiny()
    streams = []
    taps = [tap.module for tap in subject_of(model).streams]
    with hooked([(tap, lambda m, a, k, out: streams.append(out.detach())) for tap in taps]), torch.no_grad():
        model(ids)
    for x, layer in zip(streams, found_in(model, ids).layers, strict=True):
        ranked = x.abs().flatten(1).sort(descending=True).values  # (N, T*C)
        median = ranked.flip(1)[:, (ranked.size(1) - 1) // 2]
        s = x.square().mean((0, 1)).sqrt()
        z = x - x.mean()
        expected = {
            "top1": ranked[:, 0].mean(),
            "top2": ranked[:, 1].mean(),
            "top3": ranked[:, 2].mean(),
            "median": median.mean(),
            "max": x.abs().max(),
            "mmr": (x.abs().amax(-1) / x.abs().median(-1).values).mean(),
            "kurtosis": (s**4).mean() / (s**2).mean() ** 2,
            "entry_kurtosis": (z**4).mean() / (z**2).mean() ** 2,
            "inf_norm": ranked[:, 0].mean(),
        }
        assert {key: getattr(layer, key) for key in expected} == pytest.approx(
            {k: v.item() for k, v in expected.items()}, rel=1e-4
        )


def test_sun_et_al_rule_at_its_boundaries():
    x = torch.full((1, 10, 10), 0.05)
    x[0, 3, 4] = 100.0
    entries = SPIKE_RULES["massive"].entries
    assert not entries(x).any()  # |h| > 100 is strict
    x[0, 3, 4] = -100.5
    assert entries(x).nonzero().tolist() == [[0, 3, 4]]
    assert not entries(x + 0.1).any()  # 1000 x median is 150 now


def test_kurtosis_bounds():
    assert metrics.channel_kurtosis(torch.ones(50)).item() == pytest.approx(1)
    assert metrics.channel_kurtosis(torch.eye(50)[0]).item() == pytest.approx(50)


def test_uniform_share_is_that_of_uniform_attention():
    maps = torch.ones(9, 9).tril().double()
    maps /= maps.sum(-1, keepdim=True)
    torch.testing.assert_close(uniform_share(queries_per_key(9), causal=True), maps.sum(0) / 9)


def test_eligible_keys_have_a_quarter_of_the_queries():
    eligible = lambda T: eligible_keys(queries_per_key(T))
    assert eligible(64).nonzero().flatten().tolist() == list(range(49))  # key 48 has 16 queries
    assert eligible(10).sum() == 8  # key 7 has 3, key 8 has 2 < 2.5


def test_step_0_model_has_neither(ids):
    for seed in range(3):
        torch.manual_seed(seed)
        found = found_in(GPT(GPTConfig(**{**TINY, "n_embd": 64})), ids)
        assert found.spikes.rules["ratio"].tokens == 0
        assert found.spikes.rules["massive"].tokens == 0
        assert found.sinks.rules["gu"].tokens == 0
        assert found.co_occurrence.both == 0


MARK = 0.1  # how the planted token's embedding differs: too little for a spike of its own


def planted(token=63, channel=7, size=None, sink_logit=None):
    """A tiny model whose FFN of block 0 writes `size` into one channel for one token, and whose heads of block 1 add
    `sink_logit` to every logit of that token as a key."""
    model = tiny(norm_place="none", position="none", bias=True, activation="relu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
        mark = 31  # a channel that only this token's embedding uses
        model.transformer.wte.weight[:, mark] = 0
        model.transformer.wte.weight[token, mark] = MARK
        for block in model.transformer.h:
            block.attn.f.c_attn.weight[:, mark] = 0
            for sub in (block.attn, block.mlp):  # nobody else writes to the two channels
                sub.f.c_proj.weight[[mark, channel]] = 0
                sub.f.c_proj.bias[[mark, channel]] = 0
        if size:
            ffn = model.transformer.h[0].mlp.f
            ffn.c_fc.weight[0].zero_()
            ffn.c_fc.bias[0] = 0
            ffn.c_fc.weight[0, mark] = 1 / MARK  # relu(1) for the token, 0 for the others
            ffn.c_proj.weight[channel, 0] = size
            model.transformer.h[1].attn.f.c_attn.weight[:, channel] = 0
            model.transformer.h[1].mlp.f.c_fc.weight[:, channel] = 0
        if sink_logit:
            c_attn = model.transformer.h[1].attn.f.c_attn
            for head in range(2):
                q, k = 16 * head, 32 + 16 * head
                c_attn.bias[q] = 1.0  # a constant query component
                c_attn.weight[q].zero_()
                c_attn.weight[k].zero_()
                c_attn.weight[k, mark] = sink_logit / MARK * 4  # the logit is divided by sqrt(16)
    return model


@pytest.fixture
def marked_ids(ids):
    """Sequences in which token 63 stands once, at position 0, 3, 6, ..."""
    ids = ids.clamp_max(62)
    ids[torch.arange(6), torch.arange(6) * 3] = 63
    return ids


@pytest.mark.parametrize("size", [300.0, -3000.0])
def test_planted_spike_is_found_and_nothing_else(marked_ids, size):
    found = found_in(planted(size=size), marked_ids)
    rule = found.spikes.rules["massive"]
    assert (rule.tokens, rule.channels) == (6, [7])
    assert found.spikes.rules["ratio"].tokens == 6
    for token in found.spikes.tokens[:6]:
        assert (token.id, token.channel, token.position % 3) == (63, 7, 0)
        assert token.magnitude == pytest.approx(abs(size), rel=0.01)
    assert found.sinks.rules["gu"].tokens == 0
    ratios = [layer.ratio for layer in found.layers]
    assert max(ratios[:2]) < 100 < min(ratios[2:])  # nothing before ffn 0, everything after


@pytest.mark.parametrize("sink_logit", [5.0, 10.0])
def test_planted_sink_is_found_and_nothing_else(marked_ids, sink_logit):
    found = found_in(planted(sink_logit=sink_logit), marked_ids)
    sinks = found.sinks
    assert sinks.rules["gu"].tokens == 6
    assert {(token.id, token.heads) for token in sinks.tokens[:6]} == {(63, 2)}
    # the closed form: the mark's weight among t + 1 keys, averaged over the queries that see it
    p, strength = 0, math.exp(sink_logit)
    expected = sum(strength / (strength + t) for t in range(p, 32)) / 32
    assert sinks.tokens[0].alpha >= expected - 0.02
    assert found.spikes.rules["massive"].tokens == 0
    assert sinks.at(0.3).by_layer[0] == 0


def test_co_occurrence_of_planted_both(marked_ids):
    both = found_in(planted(size=300.0, sink_logit=10.0), marked_ids).co_occurrence
    assert (both.p_sink_given_spike, both.p_spike_given_sink, both.jaccard) == (1, 1, 1)
    assert both.lift == pytest.approx(6)  # six sequences, each position once: 6 / (6 x 1 x 1 / 6)


def test_lift_is_one_when_position_explains_everything():
    first = torch.zeros(50, 32, dtype=torch.bool)
    first[:, 0] = True
    assert metrics.overlap(first, first).lift == pytest.approx(1)
    assert math.isnan(metrics.overlap(first, first & False).p_spike_given_sink)


def test_lift_matches_a_permutation():
    generator = torch.Generator().manual_seed(0)
    spike = torch.rand(40, 8, generator=generator) < torch.linspace(0.9, 0.1, 8)
    sink = spike & (torch.rand(40, 8, generator=generator) < 0.6)
    drawn = []
    for _ in range(2000):
        permuted = torch.stack([sink[torch.randperm(40, generator=generator), t] for t in range(8)], dim=1)
        drawn.append((spike & permuted).sum().item())
    assert metrics.overlap(spike, sink).lift == pytest.approx(
        (spike & sink).sum().item() / (sum(drawn) / 2000), rel=0.02
    )


@pytest.mark.parametrize("n", [7, 1000, 40_000, 100_001])
@pytest.mark.parametrize("kind", ["normal", "ties", "spiky", "zeros"])
def test_median_and_largest_are_exact(n, kind):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).abs()
    x = {"normal": x, "ties": x.mul(3).round(), "spiky": torch.where(x > 2, x * 1000, x), "zeros": x * 0}[kind]
    k = max(1, n // 100)
    median, largest, where = metrics.median_and_largest(x, k)
    assert median == x.median()
    assert torch.equal(largest, x.sort(descending=True).values[:k])
    assert torch.equal(x[where], largest) and len(where.unique()) == k


def test_percentile_rule_is_counted_over_layers_entry_by_entry(ids):
    model = tiny()
    streams = []
    subject = subject_of(model)
    keep = lambda m, a, k, out: streams.append(out.detach())
    with hooked([(tap.module, keep) for tap in subject.streams]), torch.no_grad():
        model(ids)
    obs = observe(subject, ids, batch_size=4, progress=False)
    for percentile, hits in obs.percentiles.items():
        count = torch.zeros((*ids.shape, 32))
        for x in streams:
            for n, values in enumerate(x.abs().flatten(1)):
                above = max(1, round(len(values) * (1 - percentile / 100)))  # so many entries are the largest
                where = values.sort(descending=True).indices[:above]
                count[n].view(-1)[where] += 1
        assert torch.equal(hits, (count >= math.ceil(len(streams) / 2)).any(-1))
        assert hits.any()


def test_overlap_under_weights_pairs_different_sequences():
    generator = torch.Generator().manual_seed(1)
    spike, sink = (torch.rand(7, 3, generator=generator) < 0.5 for _ in range(2))
    weights = torch.tensor([0, 1, 3, 1, 0, 1, 1])
    expected = 0.0
    for t in range(3):
        pairs = [(weights[i] * weights[j], spike[i, t] & sink[j, t]) for i in range(7) for j in range(7) if i != j]
        other = sum(w * hit for w, hit in pairs) / sum(w for w, _ in pairs)
        own = (weights * (spike & sink)[:, t]).sum() / 7
        expected += 6 * other + own
    both = (weights[:, None] * (spike & sink)).sum()
    assert metrics.overlap(spike, sink, weights=weights).lift == pytest.approx((both / expected).item())
