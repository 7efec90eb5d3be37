"""The making of a spike and the shape of sink keys, against planted truth and matrices written out."""

import dataclasses

import pytest
import torch
from torch import nn

from spikesink.measure import anatomy
from spikesink.measure.findings import Place, QuadraticForm
from spikesink.measure.observe import Side, observe, state_key
from spikesink.measure.spikes import Usual
from spikesink.models import subject
from spikesink.models.subject import Tap

from .conftest import subject_of, tiny
from .test_observe import marked_ids, planted  # noqa: F401


def test_planted_spike_rises_at_its_ffn_in_its_channel(marked_ids):  # noqa: F811
    of = subject_of(planted(size=-300.0))
    found = anatomy.anatomy(of, marked_ids, observe(of, marked_ids, progress=False))
    assert found.of == "tokens that the primary rule marks"
    assert (found.tokens, found.n_seq, found.distinct_tokens) == (6, 6, 6)
    assert (found.step_up.layer, found.step_up.kind) == (0, "ffn")
    assert found.step_up.tokens == 1
    assert found.step_up.part_of_peak == pytest.approx(1, abs=0.01)
    assert found.step_down is None
    (episode,) = found.episodes  # until the last tap that attention reads
    assert (episode.start.index, episode.end.index, episode.tokens, episode.channel) == (2, 3, 1, 7)
    assert episode.magnitude == pytest.approx(300, rel=0.01)
    top = found.channels[0]
    assert (top.channel, top.same_sign, top.ratio) == (7, 1, -1)
    assert top.value == pytest.approx(-300, rel=0.01)
    outputs = found.inner["output"]
    assert max(outputs, key=lambda row: row.top1).index == 1  # ffn 0 writes it, nobody else
    assert outputs[1].top1 == pytest.approx(300, rel=0.01)


def test_step_down_is_where_the_entry_is_cancelled():
    path = torch.randn(6, 10, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    path[2:5, :, 3] = 50.0  # up at tap 2, down at tap 5
    path[2:5, :, 9] = -20.0
    taps = [Tap(i // 2, ("ffn", "attn")[i % 2], nn.Identity()) for i in range(6)]
    found = anatomy.step_up_and_down(path, taps)
    assert (found.step_up.index, found.step_down.index) == (2, 5)
    assert found.step_down.part_of_peak == pytest.approx(-1, abs=0.02)
    assert [row.channel for row in found.channels[:2]] == [3, 9]
    assert found.channels[1].ratio == pytest.approx(-0.4, abs=0.02)
    assert found.path["3"][2] == pytest.approx(50)


def test_episodes_are_runs_that_begin_at_the_same_tap():
    """40 tokens: all rise at tap 1 and most fall after 3, one after 2, one after 4; half rise again at 5."""
    taps = [Tap(i // 2, ("ffn", "attn")[i % 2], nn.Identity()) for i in range(8)]
    usual = [Usual(torch.tensor(2.0), torch.ones(4), torch.ones(())) for _ in taps]
    side = Side(taps, usual, slice(0, -1), 1, 50)
    side.spikes["spike"][0, :40] = True
    side.strengths[1:4, 0, :39], side.strengths[1:3, 0, 39] = 1.5, 1.5
    side.strengths[2, 0, :40] = 0.5  # no spike, but it holds on
    side.strengths[5:, 0, :20], side.strengths[4, 0, 30] = 2.0, 1.0
    side.strengths[0, 0, :40] = 0.49  # not yet
    side.magnitudes[:] = side.strengths * 60
    side.magnitudes[6, 0, :20], side.channels[6, 0, :20] = 300, 3
    first, second = anatomy.episodes(side, taps)
    assert (first.start.index, first.start.tokens, first.end.index, first.end.tokens) == (1, 1, 3, 38 / 40)
    assert (first.tokens, first.channel, first.magnitude, first.ratio) == (1, 0, 90, 45)
    assert (second.start.index, second.tokens, second.end.index) == (5, 0.5, 6)  # the last tap stands apart
    assert (second.channel, second.magnitude, second.ratio) == (3, 300, 150)


def test_mean_cosine_is_that_of_all_pairs():
    x = torch.randn(7, 5)
    all_pairs = nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    assert anatomy.mean_cosine(x) == pytest.approx(((all_pairs.sum() - 7) / 42).item(), abs=1e-6)
    assert anatomy.mean_cosine(x[:1]) is None


def test_equal_first_tokens_count_once():
    """Under causal attention equal first tokens have one state: their likeness is no finding."""
    of = subject_of(planted(size=300.0))
    ids = torch.randint(62, (6, 32), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 63
    found = anatomy.anatomy(of, ids, observe(of, ids, progress=False))
    assert (found.tokens, found.distinct_tokens) == (6, 1)
    assert all(row.spikes is None for row in found.normed_cosine)


def test_what_a_state_depends_on():
    decoder = subject_of(tiny(n_register=2))
    assert state_key(decoder, 0, 1, -2) == state_key(decoder, 5, 1, -2)
    assert state_key(decoder, 0, 2, 7) == state_key(decoder, 5, 2, 7)
    assert state_key(decoder, 0, 2, 7) != state_key(decoder, 5, 2, 8)
    assert state_key(decoder, 0, 3, 7) != state_key(decoder, 5, 3, 7)
    for other in (dataclasses.replace(decoder, causal=False), dataclasses.replace(decoder, part="decoder")):
        assert state_key(other, 0, 2, 7) != state_key(other, 5, 2, 7)


def test_key_subspace_counts_dimensions():
    line = torch.randn(8)
    sinks = [(0, (i, 5), line * (i + 1)) for i in range(6)] + [(1, (0, 2), line)]
    others = [(0, (i, 9), key) for i, key in enumerate(torch.eye(8)[:6])]
    rows = anatomy.key_subspace(sinks, others, 2)
    assert (rows[0].keys, rows[0].dims95, rows[0].others_dims95) == (6, 1, 6)
    assert rows[0].participation == pytest.approx(1)
    assert rows[0].others_participation == pytest.approx(6)
    assert (rows[1].keys, rows[1].dims95) == (1, None)


def test_quadratic_form_is_the_matrix_written_out():
    generator = torch.Generator().manual_seed(0)
    M, C = 24, 10
    gate, up, down = (torch.randn(*s, generator=generator) for s in ((M, C), (M, C), (C, M)))
    gate[0], up[0] = 5 * gate[0], 5 * gate[0]  # one neuron makes channel 4 a rank-one form
    down[4, 0] = 9.0
    norms = anatomy.form_norms(gate, up, down)
    for k in range(C):
        U = sum(down[k, i] * torch.outer(gate[i], up[i]) for i in range(M))
        S = (U + U.T) / 2
        values = torch.linalg.eigvalsh(S)
        assert norms[k].item() == pytest.approx(torch.linalg.matrix_norm(U).item(), rel=1e-4)
        expected = values.abs().max() ** 2 / values.square().sum()
        assert anatomy.dominance(gate, up, down[[k]], norms[[k]], generator).item() == pytest.approx(
            expected.item(), rel=0.02
        )
    assert anatomy.dominance(gate, up, down[[4]], norms[[4]], generator) > 0.9


def test_gated_models_have_a_quadratic_form_and_the_rest_do_not():
    for ffn, expected in (("gated", QuadraticForm), ("plain", type(None))):
        of = subject_of(tiny(ffn=ffn, norm="rmsnorm", activation="silu"))
        spiking = [0, 1, 2, 3]
        form = anatomy.quadratic_form(of, Place(layer=0, kind="ffn"), spiking, torch.Generator().manual_seed(0))
        assert isinstance(form, expected)
        assert anatomy.quadratic_form(of, Place(layer=0, kind="attn"), spiking, torch.Generator()) is None
        if form:
            assert len(form.channels) == len(form.others) == 4
            assert all(0 < row.dominance <= 1.001 for row in form.channels)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6), nn.Identity()])
def test_norm_gain_is_the_weight(norm):
    if not isinstance(norm, nn.Identity):
        nn.init.normal_(norm.weight)
    expected = getattr(norm, "weight", torch.ones(6))
    torch.testing.assert_close(subject.norm_gain(norm, 6), expected.detach(), atol=1e-4, rtol=1e-4)
