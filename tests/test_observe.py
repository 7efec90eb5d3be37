"""What the instruments report, against explicit T x T maps, hand-written formulas and planted ground truth."""

import math

import pytest
import torch

from model import GPT, GPTConfig
from spikesink.hooks import hooked
from spikesink.measure import metrics
from spikesink.measure.observe import StreamStats, observe
from spikesink.measure.sinks import eligible_keys, needed_heads, sink_alpha, uniform_share
from spikesink.measure.spikes import PERCENTILES, SPIKE_RULES, Usual, spike_entries
from spikesink.measure.summarise import summarise
from spikesink.models.subject import sub_layers_of

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
    torch.testing.assert_close(torch.stack([sink_alpha(m.sum(-2), torch.arange(T, 0, -1)) for m in maps]), alpha)
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
    close(sinks.first_argmax, (maps[..., 0] > maps[..., 1:].amax(-1)).float().mean((1, 3)))
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
    assert sinks.heads_needed == 1  # of 4
    assert sinks.rules["gu"].tokens == int(is_sink.any(2).any(0).sum())
    assert all(math.isnan(x) for row in sinks.slot_share for x in row)  # a softmax over keys alone has no slot


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
        z = x - x.mean((1, 2), keepdim=True)
        expected = {
            "top1": ranked[:, 0].mean(),
            "top2": ranked[:, 1].mean(),
            "top3": ranked[:, 2].mean(),
            "median": median.mean(),
            "max": x.abs().max(),
            "kurtosis": (s**4).mean() / (s**2).mean() ** 2,
            "entry_kurtosis": ((z**4).mean((1, 2)) / (z**2).mean((1, 2)) ** 2).mean(),  # of sequences, then averaged
            "inf_norm": ranked[:, 0].mean(),
        }
        assert layer.median == pytest.approx(expected.pop("median").item(), rel=0.004)  # of a histogram
        assert {key: getattr(layer, key) for key in expected} == pytest.approx(
            {k: v.item() for k, v in expected.items()}, rel=1e-4
        )


def marked(rule, x):
    """The entries of x (1, T, C) that a rule marks."""
    batch = StreamStats().add(x)
    usual = Usual.from_states(x.flatten(0, 1))
    return rule.marked(batch, usual, batch.strength(usual)).tolist()


def test_sun_et_al_rule_at_its_boundaries():
    x = torch.full((1, 10, 10), 0.05)
    x[0, 3, 4] = 100.0
    rule = SPIKE_RULES["massive"]
    assert not marked(rule, x)  # |h| > 100 is strict
    x[0, 3, 4] = -100.5
    assert marked(rule, x) == [34]
    assert not marked(rule, x + 0.1)  # 1000 x median is 150 now


def test_kurtosis_bounds():
    assert metrics.channel_kurtosis(torch.ones(50)).item() == pytest.approx(1)
    assert metrics.channel_kurtosis(torch.eye(50)[0]).item() == pytest.approx(50)


def test_uniform_share_is_that_of_uniform_attention():
    maps = torch.ones(9, 9).tril().double()
    maps /= maps.sum(-1, keepdim=True)
    torch.testing.assert_close(uniform_share(9, causal=True), maps.sum(0) / 9)


def test_eligible_keys_have_a_quarter_of_the_queries():
    eligible = lambda T: eligible_keys(torch.arange(T, 0, -1), T)
    assert eligible(64).nonzero().flatten().tolist() == list(range(49))  # key 48 has 16 queries
    assert eligible(10).sum() == 8  # key 7 has 3, key 8 has 2 < 2.5


def test_step_0_model_has_neither(ids):
    for seed in range(3):
        torch.manual_seed(seed)
        found = found_in(GPT(GPTConfig(**{**TINY, "n_embd": 64})), ids)
        assert found.spikes.rules["spike"].tokens == 0
        assert found.spikes.rules["massive"].tokens == 0
        assert found.sinks.rules["gu"].tokens == 0
        assert found.co_occurrence.both == 0


MARK = 0.1  # how the planted token's embedding differs: too little for a spike of its own


def planted(token=63, channel=7, size=None, sink_logit=None, **changes):
    """A tiny model whose FFN of block 0 writes `size` into one channel for one token, and whose heads of block 1 add
    `sink_logit` to every logit of that token as a key."""
    model = tiny(**{"norm_place": "none", "position": "none", "bias": True, "activation": "relu", **changes})
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
    assert found.spikes.rules["spike"].tokens == 6
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


@pytest.mark.parametrize("n", [7, 1000, 100_001])
@pytest.mark.parametrize("kind", ["normal", "tiny", "huge", "spiky", "zeros"])
def test_quantiles_of_a_histogram_are_within_half_a_percent(n, kind):
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(n)).abs()
    x = {"normal": x, "tiny": x * 1e-20, "huge": x * 1e20, "spiky": torch.where(x > 2, x * 1e4, x), "zeros": x * 0}[
        kind
    ]
    wanted = (0.0, 0.25, 0.5, 0.999, 1.0)
    exact = x.sort(1).values[:, [int(q * (n - 1)) for q in wanted]]
    torch.testing.assert_close(metrics.quantiles(metrics.histogram(x), wanted), exact, rtol=0.004, atol=0)


def test_percentile_rule_is_counted_over_layers_entry_by_entry(ids):
    model = tiny()
    streams = []
    subject = subject_of(model)
    keep = lambda m, a, k, out: streams.append(out.detach())
    with hooked([(tap.module, keep) for tap in subject.streams]), torch.no_grad():
        model(ids)
    obs = observe(subject, ids, batch_size=4, progress=False)
    streams.pop()  # no attention reads the last
    for percentile in PERCENTILES:
        hits = obs.spikes[f"percentile {percentile}"]
        surely, perhaps = torch.zeros((*ids.shape, 32)), torch.zeros((*ids.shape, 32))
        for x in streams:
            size = x.abs()
            limit = size.flatten(1).quantile(percentile / 100, dim=1, interpolation="lower")[:, None, None]
            surely += size > 1.004 * limit  # a percentile is known within 0.4%
            perhaps += size > limit / 1.004
        often = lambda count: (count >= math.ceil(len(streams) / 2)).any(-1)
        assert bool((hits >= often(surely)).all()) and bool((hits <= often(perhaps)).all())
        assert hits.any()


# ------------------------------------------------------------------------------- the spike rule, sides, windows


def states(channels=64, tokens=512, seed=0):
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))


def test_a_spike_stands_out_from_its_layer_its_channel_and_other_tokens():
    x = states()
    x[:, 5] *= 60  # an outlier channel: large in every token
    usual = Usual.from_states(x)
    assert usual.outlier_channels == [5]
    assert not spike_entries(x[None], usual).any()
    x[100, 9], x[200, 5], x[300, 9] = 40.0, 40.0, 15.0  # a spike; usual in that channel; too small
    assert spike_entries(x[None], usual).nonzero().tolist() == [[0, 100, 9]]
    x[200, 5] = 60 * 40.0
    assert spike_entries(x[None], usual)[0].nonzero().tolist() == [[100, 9], [200, 5]]


def test_a_token_that_is_large_as_a_whole_has_no_spike():
    """As an untrained model's first token, whose attention averages nothing."""
    x = states()
    x[100] *= 60
    usual = Usual.from_states(x)
    assert (x[100].abs() >= usual.thresholds).any() and not spike_entries(x[None], usual).any()
    x[100, 9] = 6.5 * x[100].norm() / 8  # 6 x the rms of the others, and now a spike
    assert bool(spike_entries(x[None], usual)[0, 100, 9])


def test_heavy_tails_are_no_spikes():
    """Where every token has some extreme entry, none stands out: Student's t of 3 degrees at 1024 channels."""
    x = torch.distributions.StudentT(torch.tensor(3.0))
    torch.manual_seed(0)
    x = x.sample((512, 1024))
    over = (x.abs() >= 30 * x.abs().median()).any(-1).float().mean()
    assert over > 0.1  # by the layer's median alone
    assert spike_entries(x[None], Usual.from_states(x)).any(-1).float().mean() < 0.02


def test_both_sides_of_a_post_norm_and_the_last_tap_apart(ids):
    """A spike that a norm on the stream hides is on the sum; one after the last FFN is for the unembedding alone."""
    model = tiny(norm_place="post", n_embd=32)
    token = 63
    ids = ids.clamp_max(62)
    ids[:, 2] = token

    def spike(module, args, kwargs):
        x = args[0].clone()
        x[:, 2, 7] = 300.0
        return (x,), kwargs

    first, last = model.transformer.h[0].mlp, model.transformer.h[-1].mlp
    with hooked(before=[(first.norm_after, spike)]):
        found = found_in(model, ids)
    assert found.spikes.sum.tokens == len(ids) and found.spikes.read.tokens == 0
    assert [layer.name for layer in found.layers if layer.spike_tokens] == ["ffn 0"]
    assert max(layer.ratio for layer in found.reads) < 32**0.5 / 0.6  # behind a norm nothing passes sqrt(d) / median
    with hooked(before=[(last.norm_after, spike)]):
        found = found_in(model, ids)
    assert found.spikes.sum.tokens == 0 and found.spikes.sum.last == pytest.approx(1 / 32)


@pytest.mark.parametrize("norm_place", ["pre", "post", "sandwich", "output", "none"])
def test_sums_and_reads_are_the_tensors_of_the_equation(norm_place, ids):
    """x + update before a norm on the stream, and what the next sub-layer's f is called with."""
    model = tiny(norm_place=norm_place)
    expected_sums, expected_reads = [], []

    def sub_layer(module, args, kwargs):
        x, embedding = args
        read = module.norm_before(x)
        expected_reads.append(read)
        expected_sums.append(x + module.scale(module.norm_update(module.f(read, embedding))))

    subject = subject_of(model)
    with hooked(before=[(s, sub_layer) for _, _, s in sub_layers_of(model)]), torch.no_grad():
        model(ids)
    obs = observe(subject, ids, batch_size=len(ids), progress=False)
    largest = lambda xs: torch.stack([x.abs().amax(-1) for x in xs])
    torch.testing.assert_close(obs.sum.magnitudes[1:], largest(expected_sums), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(obs.read.magnitudes[:-1], largest(expected_reads), atol=1e-5, rtol=1e-5)


def test_alpha_under_a_window_is_over_the_queries_that_see_the_key(ids):
    model = tiny(window=12, n_layer=2)
    obs = observe(subject_of(model), ids, batch_size=4, progress=False)
    T = ids.size(1)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    seen = (i >= j) & (i - j < 12)
    calls = []
    keep = lambda m, args, k, out: calls.append(m.shares(*args[:2]))
    with hooked([(model.transformer.h[0].attn.f.attend, keep)]), torch.no_grad():
        model(ids)
    alpha = (calls[0] * seen).sum(-2) / seen.sum(0)
    torch.testing.assert_close(obs.attention[0].sums["alpha"].float(), alpha.sum(0), atol=1e-5, rtol=1e-4)
    assert obs.attention[0].sinks_possible  # 12 of 32 queries are more than a quarter
    narrow = observe(subject_of(tiny(window=7)), ids, batch_size=4, progress=False)
    assert not narrow.attention[0].sinks_possible and not narrow.eligible.any()


def test_uniform_attention_has_no_favourite_key(ids):
    model = tiny()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.f.c_attn.weight[:32].zero_()  # queries of 0: every key alike
    found = found_in(model, ids).sinks
    first_query_alone = 1 / ids.size(1)  # which sees one key
    assert all(x == pytest.approx(first_query_alone) for row in found.first_argmax for x in row)


def test_a_sink_token_needs_a_twentieth_of_the_heads(ids):
    assert [needed_heads(n) for n in (1, 16, 20, 21, 270)] == [1, 1, 1, 2, 14]


def test_a_first_token_that_is_always_the_same_is_one_observation(ids):
    ids = ids.clamp_max(62)
    ids[:, 0] = 63
    both = found_in(planted(size=300.0, sink_logit=10.0), ids)
    assert both.spikes.sum.tokens == len(ids) and both.spikes.sum.states == 1
    assert both.co_occurrence.by_construction
    verdict = both.verdicts.co_occurrence
    assert verdict.verdict == "underpowered"
    ids[:, 0], ids[:, 1] = 5, 63  # the second token's state is that of its own sequence, as far as we know
    assert found_in(planted(size=300.0, sink_logit=10.0), ids).spikes.sum.states == len(ids)


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
