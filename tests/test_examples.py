"""Sequences kept token by token: equal to the explicit computation, and small whatever the model."""

import json

import pytest
import torch

from spikesink.measure import examples
from spikesink.measure.examples import Examples, unpacked
from spikesink.measure.findings import Packed
from spikesink.measure.observe import observe
from spikesink.measure.summarise import examples_entry, summarise
from spikesink.schema import from_json, to_json

from .conftest import subject_of
from .test_observe import explicit_maps, planted


def test_packing_keeps_two_digits_and_the_shape():
    values = torch.randn(3, 5) * 1e4
    back = unpacked(from_json(Packed, json.loads(json.dumps(to_json(examples.packed(values))))))
    torch.testing.assert_close(torch.from_numpy(back.copy()), values, rtol=0.004, atol=0)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_examples_are_what_explicit_maps_say(batch_size):
    model = planted(size=300.0, sink_logit=10.0)
    ids = torch.randint(62, (5, 20))
    ids[0, 3] = 63
    ids[1, 12:] = -100  # padding: shorter sequences come in other batches
    of = subject_of(model)
    obs = observe(of, ids, batch_size, progress=False, examples=Examples())
    found = summarise(of, obs).examples
    assert [s.sequence for s in found.sequences] == [0, 1, 2]
    assert [len(s.texts) for s in found.sequences] == [20, 12, 20]
    for sequence in found.sequences:
        n, T = sequence.sequence, len(sequence.texts)
        maps = explicit_maps(model, ids[n : n + 1, :T])[0].flatten(0, 2)
        alpha = maps.sum(1) / torch.arange(T, 0, -1)
        torch.testing.assert_close(torch.tensor(unpacked(sequence.alpha)), alpha, atol=1e-4, rtol=0.005)
        assert sequence.texts == [of.text(i) for i in sequence.ids] == [f"<{i}>" for i in ids[n, :T].tolist()]
        assert sequence.spikes == obs.spikes["spike"][n, :T].int().tolist()
    assert found.sequences[0].spikes[3] == 1 and found.sequences[0].sink_heads[3] == 2
    streams = []
    hooks = [t.module.register_forward_hook(lambda m, a, out: streams.append(out[0])) for t in of.streams]
    of.losses(ids[:1])
    for hook in hooks:
        hook.remove()
    for matrix, x in zip(found.matrices, streams, strict=True):
        torch.testing.assert_close(torch.tensor(unpacked(matrix.values)), x.abs(), rtol=0.005, atol=1e-6)
    relative = torch.tensor(unpacked(found.sequences[0].relative))
    expected = torch.stack([x.abs().amax(-1) / x.abs().flatten().median() for x in streams])
    torch.testing.assert_close(relative, expected, rtol=0.03, atol=0)  # medians of an even count differ a little


def test_extreme_channels_stand_alone_and_no_maximum_is_lost():
    size = torch.rand(10, 4096)
    size[2, 1000], size[5, 1001], size[7, 4095] = 50.0, 60.0, 70.0
    values, starts = examples.binned(size)
    assert len(starts) <= examples.CHANNELS and values.shape == (10, len(starts))
    assert {1000, 1001, 1002, 4095} <= set(starts) and starts[0] == 0
    torch.testing.assert_close(values.amax(1), size.amax(1))
    ends = [*starts[1:], 4096]
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        torch.testing.assert_close(values[:, i], size[:, start:end].amax(1))


def test_a_large_model_has_a_small_entry():
    """A 7B's shapes: 65 taps, 32 x 32 heads, 4096 channels."""
    from types import SimpleNamespace

    kept, rows, T = Examples(), torch.arange(4), 300
    layer = SimpleNamespace(x=torch.randn(4, T, 4096), magnitude=torch.rand(4, T), median=torch.rand(4))
    for tap in range(65):
        kept.add_stream(tap, "attn 0", rows, layer)
    for seam in range(32):
        kept.add_attention(seam, rows, torch.rand(4, 32, T))
    tap = SimpleNamespace(name="attn 0")
    subject = SimpleNamespace(
        part="", streams=[tap] * 65, attends=[tap] * 32, heads=["31.31"] * 1024, text=lambda i: " token of some length"
    )
    obs = SimpleNamespace(
        ids=torch.randint(9**5, (4, T)),
        tokens=torch.ones(4, T, dtype=torch.bool),
        eligible=torch.ones(4, T, dtype=torch.bool),
        spikes={"spike": torch.zeros(4, T)},
        sink_heads=torch.zeros(4, T),
        share=torch.rand(4, T),
        loss=torch.rand(4),
        examples=kept,
    )
    assert len(json.dumps(to_json(examples_entry(subject, obs)), indent=1)) < 1.5e6
