"""The API's edits: losses of an open model under any interventions are those of the interventions themselves."""

import dataclasses
import json

import pytest
import torch

import spikesink
from spikesink.edit import ablation, interventions
from spikesink.edit.clean_pass import CleanPass
from spikesink.edit.findings import Ablation, Unavailable
from spikesink.edit.interventions import INTERVENTIONS, REMOVALS, Intervention
from spikesink.errors import UserError
from spikesink.options import Options
from spikesink.show import page, report

from .conftest import tiny
from .test_observe import planted
from .test_outcomes import many

EVERY = INTERVENTIONS | REMOVALS


def looking(model, **changes):
    """A model in memory, open on 8 sequences with a spike and a sink, and 7 others."""
    return spikesink.open(model, Options(tokens=many(15), n_seq=8, batch_size=3), calibration=True, **changes)


def both_matter():
    """A planted spike and a planted sink, the values of whose block are large enough that it matters who gets them."""
    model = planted(size=300.0, sink_logit=10.0)
    attn = model.transformer.h[1].attn.f
    with torch.no_grad():
        attn.c_attn.weight[64:] *= 60
        attn.c_proj.weight *= 60
    return model


@pytest.fixture
def look():
    with looking(both_matter()) as opened:
        opened.data = dataclasses.replace(opened.data, bos=True)  # as if the first token were one
        yield opened


def under(look, *made):
    """The mean loss of each sequence, all in one batch, under edits of one clean pass."""
    subject = look.subjects[0]
    clean = CleanPass.run(subject, look.ids)
    for edit in (edits := [make(clean) for make in made]):
        edit.__enter__()
    losses = subject.losses(look.ids).double().mean(1)
    for edit in reversed(edits):
        edit.__exit__(None, None, None)
    return losses


def test_every_intervention_is_a_function_of_the_library():
    assert set(EVERY) <= set(spikesink.__all__)
    for name in EVERY:
        edit = getattr(spikesink, name)
        assert edit.__name__ == name and all(control in edit.__doc__ for control in EVERY[name].controls)


@pytest.mark.parametrize("name", EVERY)
def test_losses_within_an_edit_are_the_interventions(look, name):
    reference = look.references[0]
    for control in (None, *EVERY[name].controls):
        with getattr(spikesink, name)(look, control) as within:
            assert within is look
            expected = under(look, lambda clean, how=control: EVERY[name].edit(clean, reference, how))
            torch.testing.assert_close(look.losses(), expected, atol=1e-5, rtol=1e-5)


def test_edits_nest_in_any_order_and_leave_nothing(look):
    reference, clean = look.references[0], look.losses()
    spike, sink = (lambda c, one=EVERY[name]: one.edit(c, reference) for name in ("spike_zero", "sink_mask"))
    both = under(look, spike, sink)
    with spikesink.spike_zero(look):
        only = look.losses()
        with spikesink.sink_mask(look):
            torch.testing.assert_close(look.losses(), both, atol=1e-5, rtol=1e-5)
            assert look.loss() == pytest.approx(both.mean().item(), rel=1e-5)
        assert torch.equal(look.losses(), only)
    with spikesink.edited(look, "sink_mask"), spikesink.edited(look, "spike_zero"):
        torch.testing.assert_close(look.losses(), both, atol=1e-5, rtol=1e-5)
    with pytest.raises(KeyError), spikesink.sink_mask(look):
        raise KeyError
    assert not look.edits and torch.equal(look.losses(), clean)
    masked = under(look, sink)
    assert all((both - other).abs().max() > 1e-3 for other in (clean, only, masked))


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda look: spikesink.spike_zero(look, control="random_keys"), "spike_zero has no control 'random_keys'"),
        (lambda look: spikesink.edited(look, "spike_zap"), "no intervention 'spike_zap'; known: spike_zero"),
        (lambda look: spikesink.ablate(look, only=["sink_zap"]), "no intervention 'sink_zap'"),
    ],
)
def test_what_there_is_not_is_refused_when_it_is_asked_for(look, ask, words):
    with pytest.raises(UserError, match=words):
        ask(look)


def test_there_must_be_a_bos_to_remove(look):
    look.data = dataclasses.replace(look.data, bos=False)
    with pytest.raises(UserError, match="do not start with BOS"):
        spikesink.bos_remove(look)


def test_other_text_is_asked_for_only_where_an_edit_needs_it():
    with spikesink.open(planted(size=300.0), tokens=many(8), n_seq=8) as look:
        with spikesink.spike_zero(look):
            assert look.loss() > 0
        with pytest.raises(UserError, match=r"fewer than the 15 needed|holds no other text"):
            spikesink.spike_mean(look)


# ------------------------------------------------------------------------------------------------ the findings


def test_findings_are_read_back_as_they_were_written(look, tmp_path):
    found = spikesink.ablate(look, probe=False)
    found.save(tmp_path / "a.json")
    assert Ablation.load(tmp_path / "a.json") == found
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["probes"] == {} and "parts" not in written
    assert [cause["by"] for cause in written["causes"]] == ["spike_zero", "spike_scale", "bos_ffn", "sink_mask"]
    (tmp_path / "b.json").write_text(json.dumps({**written, "schema": "spikesink-ablation-0"}))
    with pytest.raises(UserError, match=r"spikesink-ablation-0.*run ablate again"):
        Ablation.load(tmp_path / "b.json")
    written["interventions"][0]["control"][1]["spikes_left"].pop("same")
    (tmp_path / "b.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"interventions\[0\].control\[1\].spikes_left.same is missing"):
        Ablation.load(tmp_path / "b.json")


def test_what_is_undefined_is_read_back_too(tmp_path):
    """No spike, no sink, one sequence: nothing has an interval."""
    with looking(tiny(), n_seq=1) as look:
        found = spikesink.ablate(look, only=["spike_zero", "sink_mask"])
    found.save(tmp_path / "a.json")
    again = Ablation.load(tmp_path / "a.json")
    assert again == found and again.interventions[0].ci95 is None and again.attention.entropy.change is None
    assert isinstance(again.probes.blimp, Unavailable)
    assert "The model has no spikes on this text." in report.ablation_terminal(again)


def test_an_intervention_of_the_table_is_everywhere_by_itself(look, tmp_path, monkeypatch):
    halve = lambda clean, reference=None, control=None: interventions.spike_clip(clean, reference, control, 20.0)
    one = Intervention("spike", halve, ("random_channels",))
    monkeypatch.setitem(interventions.INTERVENTIONS, "spike_halve", one)
    found = spikesink.ablate(look, probe=False)
    entry = next(entry for entry in found.interventions if entry.name == "spike_halve")
    with spikesink.edited(look, "spike_halve"):
        edited = look.loss()
    assert entry.edited and edited == pytest.approx(entry.loss, rel=1e-6)
    assert ablation.changed_conditions(found.interventions)[-1] == "spike_halve/random_channels"  # probes run it
    row = next(line for line in report.ablation_terminal(found).splitlines() if line.startswith("spike_halve"))
    assert f"{entry.delta_loss:+.4f}" in row
    page.detection_page(tmp_path / "report.html", spikesink.detect(look), found)
    html = (tmp_path / "report.html").read_text()
    assert html.count("spike_halve") >= 3  # the table, the classes of tokens, the figure
    found.save(tmp_path / "a.json")
    assert Ablation.load(tmp_path / "a.json") == found
