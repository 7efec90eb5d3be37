"""Verdicts, nulls, sensitivity and co-occurrence, on planted ground truth and against written formulas."""

import dataclasses

import pytest
import torch

from model import GPT, GPTConfig
from spikesink import schema
from spikesink.measure import calibrate, metrics, planted
from spikesink.measure.anatomy import anatomy
from spikesink.measure.findings import CoOccurrence, Measures, Overlap, OverlapIntervals, Skipped, Verdict
from spikesink.measure.observe import Ordinary, observe
from spikesink.measure.sinks import uniform_share
from spikesink.measure.spikes import Usual
from spikesink.measure.summarise import co_occurrence
from spikesink.text.sequences import PADDING

from .conftest import TINY, subject_of
from .test_observe import marked_ids  # noqa: F401
from .test_observe import planted as planted_model

HEADS = ["0.0", "0.1", "1.0", "1.1"]


def weak(obs, parameters=125e6, step=None, tokens=None):
    """Of a large trained model, unless said otherwise."""
    return calibrate.weakness(len(obs.ids), parameters, step, tokens)


def fresh(seed=0, **changes):
    torch.manual_seed(seed)
    return subject_of(GPT(GPTConfig(**{**TINY, **changes})))


def ids_of(n, T=32, seed=0):
    return torch.randint(64, (n, T), generator=torch.Generator().manual_seed(seed))


def one_each(n, T, choices, seed=0):
    tokens = torch.zeros(n, T, dtype=torch.bool)
    tokens[torch.arange(n), torch.randint(choices, (n,), generator=torch.Generator().manual_seed(seed))] = True
    return tokens


def test_wilson_interval():
    assert metrics.wilson(0, 16) == pytest.approx([0, 0.19361], abs=1e-5)  # z^2 / (n + z^2)
    assert metrics.wilson(5, 100) == pytest.approx([0.02154, 0.11175], abs=1e-4)  # Newcombe 1998's example of 5%
    assert metrics.wilson(50, 100, tests=100)[0] < metrics.wilson(50, 100)[0]


@pytest.mark.parametrize(
    ("n", "prevalence", "expected"), [(64, 1.0, "present"), (64, 0.0, "absent"), (16, 0.0, "underpowered")]
)
def test_verdict_on_planted_spikes(n, prevalence, expected):
    subject, ids = fresh(), ids_of(n)
    tokens = one_each(n, 32, 32) & (torch.arange(n) < prevalence * n)[:, None]
    ordinary = Ordinary.from_ids(subject, ids)
    with planted.spikes(subject, tokens, channel=5, size=75.0):
        obs = observe(subject, ids, batch_size=n, progress=False, ordinary=ordinary)
    null = calibrate.nulls(subject, ids, 64, 16)
    assert torch.equal(obs.spikes["spike"], tokens)
    verdict = calibrate.spike_verdict(obs, null, weak(obs))
    assert verdict.verdict == expected
    if prevalence:
        # the model's own other tokens are at most some 10x their layer, the planted ones 75x: 2.5 thresholds
        assert (max(verdict.holds), obs.sum.spike_channels["spike"].argmax()) == (2, 5)
    assert calibrate.spike_verdict(obs, null, weak(obs, 1e6)).verdict in (
        "present",
        "underpowered",
    )


@pytest.mark.parametrize(("alpha", "expected"), [(0.6, "present"), (0.15, "absent")])
def test_verdict_on_planted_sinks(alpha, expected):
    """The planted strength is the closed form's, and the verdict holds up to about that epsilon."""
    subject, ids, keys = fresh(), ids_of(64), one_each(64, 32, 16)
    bias = torch.tensor([planted.bias_from_alpha(alpha, int(k), 32) for k in keys.int().argmax(1)])
    ordinary = Ordinary.from_ids(subject, ids)
    with planted.sinks(subject, keys, layer=1, head=1, bias=bias):
        obs = observe(subject, ids, batch_size=64, progress=False, ordinary=ordinary)
        null = calibrate.nulls(fresh(), ids, 64, 16)
    assert obs.best_alpha[:, 1, 1] == pytest.approx(torch.full((64,), alpha), abs=0.02)  # logits of step 0 are ~0
    verdict = calibrate.sink_verdict(obs, null, weak(obs), HEADS)
    assert verdict.verdict == expected
    assert max(verdict.holds, default=0) == pytest.approx(alpha if alpha > 0.3 else 0, abs=0.051)
    if alpha > 0.3:
        assert torch.equal(obs.strong_alpha > 0.3, keys)
        assert "head 1.1, the best of 4" in verdict.reason


def test_small_models_and_short_training_are_underpowered():
    obs = observe(fresh(), ids_of(64), progress=False)
    for given, words in (
        ((1e6, None, None), "1M parameters"),
        ((1e9, 10, 1e6), "1M tokens of training"),
        ((1e9, 0, None), "untrained"),
    ):
        spike = calibrate.spike_verdict(obs, {}, weak(obs, *given))
        assert spike.verdict == "underpowered"
        assert words in spike.reason
    assert calibrate.spike_verdict(obs, {}, weak(obs)).verdict == "absent"


def test_nulls_keep_what_they_say_and_take_the_rest():
    shuffles = calibrate.shuffles(0)
    x = torch.randn(3, 10, 8)
    numbers = torch.arange(3)
    channels = shuffles["shuffled_channels"].stream(x, numbers, 0, 0)
    torch.testing.assert_close(channels.sort(-1).values, x.sort(-1).values)
    assert not torch.equal(channels, x)
    positions = shuffles["shuffled_positions"].stream(x, numbers, 0, 0)
    torch.testing.assert_close(positions.sort(1).values, x.sort(1).values)
    rows = torch.rand(2, 2, 4, 9).tril(5)  # queries 5 ... 8
    rotated = shuffles["shuffled_positions"].rows(numbers[:2], 0, (2, 9))(rows, 5, True)
    torch.testing.assert_close(rotated.sort(-1).values, rows.sort(-1).values)
    assert (rotated.triu(6) == 0).all()  # still causal
    ids = torch.randint(1, 60, (5, 9))
    ids[:, 0], ids[2, 6:] = 63, PADDING
    changed = calibrate.other_text(ids, 60, 0)
    assert torch.equal(changed.pop("no_first"), ids[:, 1:])
    for other in changed.values():
        assert (other[:, 0] == 63).all()  # a first token that all share
        assert torch.equal(other == PADDING, ids == PADDING)
    assert changed["repeated_token"][0, 1:].unique().numel() == 1
    shuffled = changed["shuffled_text"]
    assert torch.equal(shuffled.sort(1).values, ids.sort(1).values) and not torch.equal(shuffled, ids)


def test_texts_that_share_a_last_token_keep_it_and_those_that_share_none_have_no_null_without_it():
    ids = torch.arange(40).view(4, 10)
    ids[torch.arange(4), torch.tensor([9, 9, 6, 3])] = 50
    ids[2, 7:], ids[3, 4:] = PADDING, PADDING
    changed = calibrate.other_text(ids, 40, 0)
    assert list(changed) == ["random_tokens", "repeated_token", "shuffled_text"]
    for other in changed.values():
        assert torch.equal(other == 50, ids == 50)
    assert torch.equal(changed["shuffled_text"].sort(1).values, ids.sort(1).values)
    # every place gets every token: of 10 tokens, 9 change places
    places = [calibrate.other_text(ids, 40, seed)["shuffled_text"][0, 0].item() for seed in range(200)]
    assert {*places} == {*range(9)}


def test_a_sink_is_gone_when_positions_are_shuffled():
    subject, ids, keys = fresh(), ids_of(32), one_each(32, 32, 1)
    bias = torch.full((32,), planted.bias_from_alpha(0.9, 0, 32))
    how = {"batch_size": 32, "progress": False, "ordinary": Ordinary.from_ids(subject, ids)}
    with planted.sinks(subject, keys, layer=0, head=0, bias=bias):
        kept = observe(subject, ids, **how)
        gone = observe(subject, ids, shuffle=calibrate.shuffles(0)["shuffled_positions"], **how)
    assert (kept.sink_heads > 0).sum() == 32
    assert (gone.sink_heads > 0).sum() == 0
    uniform = uniform_share(32, causal=True)
    one_head = gone.attention[0].sums["alpha"][0] / 32  # (T,)
    expected = uniform * 32 / torch.arange(32, 0, -1)
    torch.testing.assert_close(one_head[:16], expected[:16], atol=0.05, rtol=0.3)


def test_nulls_are_the_named_ones_and_leave_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    subject, ids = fresh(), ids_of(6)
    before = torch.random.get_rng_state()
    null = calibrate.nulls(subject, ids, 64)
    assert torch.equal(torch.random.get_rng_state(), before)
    names = ["init", "shuffled_channels", "shuffled_positions", "random_tokens", "repeated_token", "shuffled_text"]
    assert list(null) == names
    ids[:, 0] = 63
    assert list(calibrate.nulls(subject, ids, 64, 2)) == [*names, "no_first"]
    assert null["init"].n_seq == 6
    assert calibrate.nulls(subject, ids, 64, 0) == {}
    skipped = calibrate.nulls(subject, ids, 64, no_init="too large")
    assert skipped["init"] == Skipped(skipped="too large")
    assert calibrate.false_positives(skipped, "spike") is None
    assert calibrate.false_positives(null, "percentile").rate >= null["init"].rules["percentile"].sequences


def test_padding_enters_no_statistic():
    """Sequences of different lengths, padded on either side, are what they are alone."""
    subject, whole = fresh(3), ids_of(4)
    lengths = [32, 20, 20, 11]
    padded = torch.full((4, 32), PADDING)
    for i, n in enumerate(lengths):
        padded[i, :n] = whole[i, :n] if i % 2 else padded[i, :n]
        if i % 2 == 0:
            padded[i, 32 - n :] = whole[i, :n]  # on the left
    ordinary = Ordinary.from_ids(subject, whole)  # of other text
    together = observe(subject, padded, batch_size=4, progress=False, ordinary=ordinary)
    for i, n in enumerate(lengths):
        alone = observe(subject, whole[i : i + 1, :n], progress=False, ordinary=ordinary)
        for name in ("share", "max_alpha", "strong_alpha", "sink_heads", "eligible", "ids"):
            got = getattr(together, name)[i]
            torch.testing.assert_close(got[:n], getattr(alone, name)[0])
            assert (got[n:] == (PADDING if name == "ids" else 0)).all()
        torch.testing.assert_close(together.best_alpha[i], alone.best_alpha[0])
        torch.testing.assert_close(together.loss[i], alone.loss[0])
        for side, other in ((together.sum, alone.sum), (together.read, alone.read)):
            torch.testing.assert_close(side.ratio[i, :n], other.ratio[0])
            for name in ("magnitudes", "norms", "strengths"):
                torch.testing.assert_close(getattr(side, name)[:, i, :n], getattr(other, name)[:, 0])
                assert (getattr(side, name)[:, i, n:] == 0).all()
            for rule, hits in side.spikes.items():
                assert torch.equal(hits[i, :n], other.spikes[rule][0]) and not hits[i, n:].any()
    entropy = sum(
        observe(subject, whole[i : i + 1, :n], progress=False, ordinary=ordinary).attention[0].sums["entropy"]
        for i, n in enumerate(lengths)
    )
    torch.testing.assert_close(together.attention[0].sums["entropy"], entropy)


def test_padding_is_not_what_is_usual():
    """What is usual is that of the tokens alone: medians written out."""
    subject, whole, lengths = fresh(3), ids_of(4), [32, 20, 20, 11]
    padded = torch.where(torch.arange(32) < torch.tensor(lengths)[:, None], whole, PADDING)
    found = Ordinary.from_ids(subject, padded)
    with torch.no_grad():
        x = torch.cat([subject.model.transformer.wte(whole[i, :n]) for i, n in enumerate(lengths)])
        x = x + torch.cat([subject.model.transformer.wpe(torch.arange(n)) for n in lengths])
    size = x.abs()
    median = lambda values: values.sort(0).values[(len(values) - 1) // 2]
    layer, channels = median(size.flatten()), median(size)
    prominence = (size / channels.clamp_min(layer.item())).amax(1)
    for ours, theirs in zip(dataclasses.astuple(found.sums[0]), (layer, channels, median(prominence)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found.reads[-1] is None and all(isinstance(usual, Usual) for usual in (*found.sums, *found.reads[:-1]))


def test_what_position_explains():
    n, T = 60, 16
    first = torch.zeros(n, T, dtype=torch.bool)
    first[:, 0] = True
    by_position = metrics.overlap(first, first)
    assert by_position.explained_by_position == pytest.approx(1)
    assert by_position.lift_anywhere == pytest.approx(T)
    assert metrics.permutation_p(first, first) == 1
    anywhere = one_each(n, T, T)
    by_token = metrics.overlap(anywhere, anywhere)
    assert by_token.explained_by_position < 0.15
    assert metrics.permutation_p(anywhere, anywhere) == pytest.approx(0.001)
    assert metrics.permutation_p(anywhere, one_each(n, T, T, seed=1)) > 0.05


def test_co_occurrence_verdict_needs_both_and_says_what_position_explains():
    present, absent = (Verdict(verdict=word, reason="") for word in ("present", "absent"))
    n, T = 60, 16
    first = torch.zeros(n, T, dtype=torch.bool)
    first[:, 0] = True
    counts = {"spike_rule": "", "sink_rule": "", "spike_tokens": n, "sink_tokens": n, "both": n, "p_permutation": 1.0}

    def overlap(low, high):
        of = {"lift_anywhere": [low, high], "lift": [1.0, 1.0]}
        unknown = ("p_sink_given_spike", "p_spike_given_sink", "jaccard", "expected", "explained_by_position")
        ci = OverlapIntervals(**of, **dict.fromkeys(unknown))
        of = {**vars(metrics.overlap(first, first)), **counts, "ci95": ci}
        return CoOccurrence(**of, without_first=Overlap(**of), read=None, by_construction=False)

    both = calibrate.co_verdict(present, present, overlap(15.0, 17.0), [], {})
    assert both.verdict == "present"
    assert "100% of the excess" in both.reason and "no more than that" in both.reason
    assert calibrate.co_verdict(present, absent, overlap(15.0, 17.0), [], {}).verdict == "underpowered"
    assert calibrate.co_verdict(present, present, overlap(0.2, 1.1), [], {}).verdict == "absent"
    assert calibrate.co_verdict(present, present, overlap(0.2, 1.1), ["small"], {}).verdict == "underpowered"
    # a failure to reject is no absence
    assert calibrate.co_verdict(present, present, overlap(0.2, 7.7), [], {}).verdict == "underpowered"


def test_one_state_in_every_sequence_is_one_observation(marked_ids):  # noqa: F811
    """The same token first in every sequence is the same state: text without it decides, if it can."""
    subject = subject_of(planted_model(size=300.0, sink_logit=10.0))
    apart = co_occurrence(subject, observe(subject, marked_ids, progress=False))
    assert (apart.spike_tokens, apart.both, apart.by_construction) == (6, 6, False)
    once = marked_ids.clone()
    once[1:][once[1:] == 63] = 0
    assert not co_occurrence(subject, observe(subject, once, progress=False)).by_construction  # in one sequence only
    first = marked_ids.clamp_max(62)
    first[:, 0] = 63
    overlap = co_occurrence(subject, observe(subject, first, progress=False))
    assert (overlap.spike_tokens, overlap.both, overlap.by_construction) == (6, 6, True)
    present = Verdict(verdict="present", reason="")
    of = lambda null: calibrate.co_verdict(present, present, overlap, [], null)
    assert (of({}).verdict, "nothing" in of({}).reason) == ("underpowered", True)
    null = calibrate.nulls(subject, first, 64)
    assert isinstance(null["no_first"], Measures) and null["no_first"].rules["spike"].tokens == 0
    assert (of(null).verdict, "no spikes" in of(null).reason) == ("underpowered", True)
    first[torch.arange(6), 1 + torch.arange(6)] = 63  # the token elsewhere, too
    null = calibrate.nulls(subject, first, 64)
    assert null["no_first"].p_sink_given_spike == 1 and of(null).verdict == "present"


def rejections(make, runs=200):
    return sum(metrics.permutation_p(*make(i), permutations=99) <= 0.05 for i in range(runs)) / runs


def test_permutation_test_keeps_its_level():
    """Independent labels that cluster in sequences, and sequences of two lengths, are rejected about 5% of the time."""

    def clustered(seed):
        draw = torch.Generator().manual_seed(seed)
        rate = lambda: 0.6 * (torch.rand(60, 1, generator=draw) < 0.5)
        return [torch.rand(60, 12, generator=draw) < rate() for _ in range(2)]

    def ragged(seed):
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.arange(24) < torch.where(torch.arange(60) % 2 == 0, 24, 6)[:, None]
        return [(torch.rand(60, 24, generator=draw) < 0.1) & tokens for _ in range(2)] + [tokens]

    assert rejections(clustered) < 0.11
    assert rejections(ragged) < 0.11


def test_bootstrap_of_the_lift_is_centred_on_it():
    draw = torch.Generator().manual_seed(0)
    spike = torch.rand(100, 64, generator=draw) < 0.01
    sink = spike & (torch.rand(100, 64, generator=draw) < 0.8)
    lift = metrics.overlap(spike, sink).lift
    low, high = metrics.bootstrap_ci(
        lambda i: metrics.overlap(spike, sink, weights=i.bincount(minlength=100)).lift, 100
    )
    assert low < lift < high
    repeated = torch.arange(100).bincount(minlength=100)
    once, again = metrics.overlap(spike, sink), metrics.overlap(spike, sink, weights=repeated)
    assert vars(again) == pytest.approx(vars(once), nan_ok=True)


def test_intervals_of_rates_have_a_width():
    assert metrics.rate_ci(torch.ones(100, dtype=torch.float64)) == metrics.wilson(100, 100)
    assert metrics.rate_ci(torch.zeros(1, dtype=torch.float64))[1] > 0.7
    assert metrics.bootstrap_ci(lambda i: 1.0, 1) is None


def test_a_verdict_is_only_said_to_hold_where_the_null_differs():
    subject, ids = fresh(), ids_of(64)
    ordinary = Ordinary.from_ids(subject, ids)
    with planted.spikes(subject, one_each(64, 32, 32), channel=5, size=75.0):
        obs = observe(subject, ids, batch_size=64, progress=False, ordinary=ordinary)
    null = calibrate.nulls(subject, ids, 64, 16)
    holds = lambda: calibrate.spike_verdict(obs, null, weak(obs)).holds
    assert holds() == [0.2, 0.33, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2]
    curve = null["init"].curves["strictness"]
    curve[:] = [dataclasses.replace(point, sequences=0.9 if point.at <= 0.5 else 0.0) for point in curve]
    assert holds() == [0.67, 0.8, 1, 1.25, 1.5, 2]


@pytest.mark.parametrize("name", ["shuffled_channels", "shuffled_positions"])
def test_what_a_null_draws_is_tied_to_the_sequence(name):
    """The same for a sequence alone, in any batch, and whatever chunks of rows; another for each tap, side and seam."""
    shuffle, numbers = calibrate.shuffles(0)[name], torch.tensor([5, 2, 7])
    x = torch.randn(3, 10, 40)
    together = shuffle.stream(x, numbers, 0, 1)
    for i, n in enumerate(numbers):
        assert torch.equal(shuffle.stream(x[i : i + 1], n[None], 0, 1)[0], together[i])
    for other in ((1, 1), (0, 2)):
        assert not torch.equal(shuffle.stream(x, numbers, *other), together)
    same = shuffle.stream(x[:1].expand(3, -1, -1), numbers, 0, 1)
    assert not torch.equal(same[0], same[1])
    if name == "shuffled_positions":
        weights, shape = torch.rand(3, 2, 30, 30).tril(), (2, 30)
        whole = shuffle.rows(numbers, 4, shape)(weights, 0, True)
        chunk = shuffle.rows(numbers[1:], 4, shape)(weights[1:, :, 20:], 20, True)
        assert torch.equal(whole[1:, :, 20:], chunk)
        assert not torch.equal(shuffle.rows(numbers, 5, shape)(weights, 0, True), whole)


def approximately(value):
    """Nested plain values, floats up to the noise of another batch."""
    if isinstance(value, dict):
        return {key: approximately(item) for key, item in value.items()}
    if isinstance(value, list):
        return [approximately(item) for item in value]
    return pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value


def test_findings_do_not_depend_on_the_batch_size(marked_ids):  # noqa: F811
    subject = subject_of(planted_model(size=300.0, sink_logit=10.0))
    ids = torch.cat((marked_ids, marked_ids.flip(1)))
    ids[[1, 4, 8], 20:] = PADDING
    found = []
    for batch_size in (8, 3, 1):
        obs = observe(subject, ids, batch_size, progress=False)
        null = calibrate.nulls(
            subject, ids, 64, batch_size=batch_size, ordinary=Ordinary.from_ids(subject, ids, batch_size)
        )
        parts = {"nulls": null, "anatomy": anatomy(subject, ids, obs, batch_size)}
        found.append(schema.to_json(parts | {"measures": calibrate.measures_entry(obs)}))
    assert found[0]["anatomy"]["normed_cosine"][2]["others"] is not None
    assert any(head["others_dims95"] for seam in found[0]["anatomy"]["key_subspace"] for head in seam["heads"])
    for other in found[1:]:
        assert other == approximately(found[0])
