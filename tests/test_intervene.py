"""Interventions do what their formula says, nothing else, and undo themselves."""

import pytest
import torch

from spikesink import intervene, metrics
from spikesink.hooks import hooked

from .conftest import subject_of, tiny
from .test_observe import explicit_maps, marked_ids, planted  # noqa: F401


def streams_of(subject, ids):
    """The stream at every tap."""
    seen = []
    with hooked([(tap.module, lambda m, a, k, out: seen.append(out.detach().clone())) for tap in subject.streams]):
        subject.losses(ids)
    return seen


def test_noop_is_bit_identical(ids):
    subject = subject_of(tiny())
    clean = subject.losses(ids)
    nothing = [torch.zeros(6, 2, 32, dtype=torch.bool)] * 2
    with intervene.mask_keys(subject, nothing):
        assert torch.equal(subject.losses(ids), clean)
    with intervene.spikes(subject, ids, "zero") as count:  # the model has none
        assert torch.equal(subject.losses(ids), clean)
    assert count["edited"] == 0


def test_hooks_come_off_also_after_an_exception(marked_ids):  # noqa: F811
    subject = subject_of(planted(size=300.0, sink_logit=10.0))
    clean = subject.losses(marked_ids)
    for intervention in (intervene.spikes(subject, marked_ids, "zero"), intervene.sinks(subject, marked_ids)):
        with pytest.raises(KeyError), intervention:
            assert not torch.equal(subject.losses(marked_ids), clean)
            raise KeyError
        assert torch.equal(subject.losses(marked_ids), clean)


def test_zero_clip_and_mean_edit_the_spike_alone(marked_ids):  # noqa: F811
    subject = subject_of(planted(size=300.0))
    clean = streams_of(subject, marked_ids)
    rows = torch.arange(6)
    spike = (rows, rows * 3, torch.full((6,), 7))  # where token 63 stands, channel 7
    others = torch.ones_like(clean[2], dtype=torch.bool)
    others[spike] = False
    means = intervene.ChannelMeans(subject, marked_ids)
    assert means.spike[2][7] == pytest.approx(300, rel=0.01)
    median = clean[2].abs().flatten(1).median(1).values
    for edit, expected in (("zero", torch.zeros(6)), ("clip", 30 * median), ("mean", clean[2][spike].mean().expand(6))):
        with intervene.spikes(subject, marked_ids, edit, means=means) as count:
            edited = streams_of(subject, marked_ids)
        # hooks run in the order they were registered, so the taps read here show the edited stream
        torch.testing.assert_close(edited[2][spike], expected, atol=1e-2, rtol=1e-3)
        assert torch.equal(edited[2][others], clean[2][others])
        assert torch.equal(edited[1], clean[1])
        assert count["edited"] == 6 * 3  # ffn 0 and the two sub-layers after it


def test_control_edits_as_many_other_channels_of_the_same_tokens(marked_ids):  # noqa: F811
    subject = subject_of(planted(size=300.0))
    clean = streams_of(subject, marked_ids)[2]
    with intervene.spikes(subject, marked_ids, "zero", control=True):
        changed = streams_of(subject, marked_ids)[2] != clean
    assert changed.sum((1, 2)).tolist() == [1] * 6
    assert changed.any(-1).nonzero()[:, 1].tolist() == [0, 3, 6, 9, 12, 15]
    assert not changed[..., 7].any()


def test_masked_sink_is_the_renormalised_map(marked_ids):  # noqa: F811
    model = planted(sink_logit=10.0)
    subject = subject_of(model)
    maps, _ = explicit_maps(model, marked_ids)
    found = intervene.sink_keys(subject, marked_ids)
    assert [int(layer.sum()) for layer in found] == [0, 12]  # two heads in each of six sequences
    expected = maps[1].clone()
    for n in range(6):
        expected[n, :, :, n * 3] *= torch.eye(32)[n * 3]
    expected /= expected.sum(-1, keepdim=True)
    seen = {}

    def look(module, args, kwargs, output):
        seen["out"], seen["v"] = output, args[2]

    with intervene.sinks(subject, marked_ids) as count, hooked([(subject.attends[1].module, look)]):
        subject.losses(marked_ids)
    assert count["edited"] == 12
    torch.testing.assert_close(seen["out"], expected @ seen["v"], atol=1e-5, rtol=1e-4)


def test_random_keys_are_as_many_and_never_sinks():
    sinks = torch.zeros(3, 2, 32, dtype=torch.bool)
    sinks[0, 0, 0] = sinks[1, 1, :3] = True
    eligible = metrics.eligible_keys(metrics.queries_per_key(32))
    control = intervene.random_keys(sinks, eligible, torch.Generator().manual_seed(0))
    assert torch.equal(control.sum(-1), sinks.sum(-1))
    assert not (control & sinks).any()
    assert not control[..., 25:].any()  # fewer than T/4 queries
