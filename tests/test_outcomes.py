"""What an intervention is said to change: against written formulas, and models built so that the answer is known."""

import types

import pytest
import torch

from benchmarks import causes as planted_causes
from spikesink.edit import causes, interventions, outcomes
from spikesink.edit.clean_pass import CleanPass, Reference
from spikesink.edit.findings import CauseControl, Lost
from spikesink.edit.interventions import INTERVENTIONS
from spikesink.text.sequences import PADDING

from .conftest import subject_of, tiny
from .test_observe import MARK, explicit_maps, planted

TABLE = {
    name: INTERVENTIONS[name] for name in ("spike_zero", "spike_scale", "spike_stepup", "sink_mask", "sink_relocate")
}


def many(n=16):
    """n sequences of 32 in which token 63 stands once, within the first 8, and token 62 once, after 20 others."""
    ids = torch.randint(62, (n, 32), generator=torch.Generator().manual_seed(2))
    ids[torch.arange(n), 20 + torch.arange(n) % 8] = 62
    ids[torch.arange(n), torch.arange(n) % 8] = 63
    return ids


def independent():
    """Spike and sink on the same token, neither made of the other."""
    return planted(size=300.0, sink_logit=10.0)


def sink_needs_spike():
    """The keys of block 1 read the channel that the FFN of block 0 spikes in."""
    model = independent()
    weight = model.transformer.h[1].attn.f.c_attn.weight
    with torch.no_grad():
        for k in (32, 48):
            weight[k] = 0
            weight[k, 7] = 40 / 300
    return model


def spike_needs_sink():
    """A sink in block 0 brings the mark of token 63 to whoever attends to it, and the FFN makes a spike of that in
    token 62, which has a mark of its own."""
    model = planted(size=300.0)
    attn, ffn = model.transformer.h[0].attn.f, model.transformer.h[0].mlp.f
    with torch.no_grad():
        for head in range(2):
            q, k = 16 * head, 32 + 16 * head
            attn.c_attn.weight[q] = attn.c_attn.weight[k] = 0
            attn.c_attn.bias[q], attn.c_attn.weight[k, 31] = 1.0, 40 / MARK
        attn.c_attn.weight[64], attn.c_attn.bias[64] = 0, 0  # the first channel of head 0's value: the mark
        attn.c_attn.weight[64, 31] = 1 / MARK
        attn.c_proj.weight[:, 0] = 0
        attn.c_proj.weight[9] = 0
        attn.c_proj.bias[9], attn.c_proj.weight[9, 0] = 0, 1.0  # arrives in channel 9, which nobody else uses
        model.transformer.wte.weight[:, [9, 10]] = 0
        model.transformer.wte.weight[62, 10] = MARK
        ffn.c_fc.weight[0] = 0
        # relu(1) where the one mark has arrived and the other is
        ffn.c_fc.weight[0, 9], ffn.c_fc.weight[0, 10], ffn.c_fc.bias[0] = 2.0, 2 / MARK, -3.0
        for block in model.transformer.h:
            block.mlp.f.c_proj.weight[[9, 10]] = 0
            block.mlp.f.c_proj.bias[[9, 10]] = 0
            block.attn.f.c_proj.weight[10] = 0
            block.attn.f.c_proj.bias[10] = 0
    return model


def causes_in(model, ids):
    """{intervention: Cause}, and what was measured."""
    subject = subject_of(model)
    measured = outcomes.measure_outcomes(subject, ids, outcomes.conditions_of(TABLE, Reference(subject, ids)), 5)
    return {cause.by: cause for cause in outcomes.causes_of(TABLE, measured)}, measured


@pytest.mark.parametrize(
    "model, sinks_need_spikes, spikes_need_sinks",
    [
        (independent, "no", "out of reach"),  # the sink stands after the spike
        (sink_needs_spike, "yes", "out of reach"),
        (spike_needs_sink, "out of reach", "yes"),  # and here before it
    ],
)
def test_causes_in_models_whose_answer_is_known(model, sinks_need_spikes, spikes_need_sinks):
    found, measured = causes_in(model(), many())
    spikes, sinks = found["spike_zero"], found["sink_mask"]
    assert (spikes.verdict, sinks.verdict) == (sinks_need_spikes, spikes_need_sinks)
    assert spikes.edited and sinks.edited and spikes.still == sinks.still == 0
    assert spikes.judged == (0 if sinks_need_spikes == "out of reach" else spikes.there)
    entries = {entry.name: entry for entry in outcomes.table_entries(TABLE, measured)}
    assert entries["sink_relocate"].sinks_left.same == 0
    assert entries["sink_relocate"].sinks_left.all > 0.5  # it is elsewhere now


def test_a_size_that_a_norm_undoes_tells_nothing():
    """In post-norm the state is normed right after the sum: scaling it can change nothing, whatever sinks need."""
    model = planted(size=300.0, norm="rmsnorm", norm_place="post")
    c_attn = model.transformer.h[1].attn.f.c_attn
    with torch.no_grad():
        for head in range(2):
            q, k = 16 * head, 32 + 16 * head
            c_attn.weight[[q, k]] = 0
            c_attn.bias[q], c_attn.weight[k, 7] = 1.0, 8.0  # sinks on the spike's channel, behind the norm
        for parameter in (
            norm.weight for block in model.transformer.h for norm in (block.attn.norm_after, block.mlp.norm_after)
        ):
            parameter.fill_(1.0)
    found, _ = causes_in(model, many())
    assert found["spike_zero"].verdict == "yes"
    scaled = found["spike_scale"]
    assert scaled.edited and not scaled.still and abs(scaled.lost.share) < 1e-4
    assert scaled.verdict == "cannot tell" and "a norm undoes this edit" in scaled.reason


def test_exposed_sinks_are_those_that_a_cause_is_judged_by():
    found, measured = causes_in(sink_needs_spike(), many())
    cause, entries = found["spike_zero"], {entry.name: entry for entry in outcomes.table_entries(TABLE, measured)}
    exposed = entries["spike_zero"].exposed
    assert (exposed.sinks, exposed.left) == (cause.judged, cause.left / cause.judged)
    assert exposed.lost == pytest.approx(cause.lost.share) and exposed.lost > 0.5
    beside = {control.name: control.exposed.lost for control in entries["spike_zero"].control}
    assert beside == pytest.approx({control.name: control.lost.share for control in cause.control})
    assert entries["sink_mask"].exposed is None  # it edits no spike
    nothing = {entry.name: entry for entry in outcomes.table_entries(TABLE, causes_in(spike_needs_sink(), many())[1])}
    assert nothing["spike_zero"].edited and nothing["spike_zero"].exposed is None  # no sink lies downstream


def test_what_is_lost_is_what_a_pass_under_the_edit_shows():
    subject, ids = subject_of(sink_needs_spike()), many()
    clean = CleanPass.run(subject, ids)
    with interventions.spike_zero(clean):
        edited = CleanPass.run(subject, ids, ordinary=clean.ordinary)
    left = (edited.alpha[1] / clean.alpha[1])[clean.sinks[1]]
    cause = causes_in(sink_needs_spike(), ids)[0]["spike_zero"]
    assert cause.lost.share == pytest.approx(1 - left.mean().item(), abs=1e-6)
    assert cause.left == (edited.sinks[1] & clean.sinks[1]).sum()
    assert cause.states == 16 - 1  # in the two that have it first, it is one state


WIRINGS = {  # what is to be said of spike_zero; None where half of the sinks go
    "sinks need spikes": "yes",
    "spikes need sinks": "out of reach",
    "each needs the other": "yes",
    "neither": "no",
    "sinks need spikes in part": None,
    "upstream only": "out of reach",
    "removal fails": "not removed",
    "the first token's sinks need its spike": "yes",
    "the first token's sinks do not": "no",
    "sinks need the spike's size": "yes",
}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_no_verdict_on_a_planted_cause_is_wrong(wiring):
    i = [*planted_causes.WIRINGS].index(wiring)
    rows = [row for number in (i, i + len(WIRINGS)) for row in planted_causes.try_model(number)]  # the second: outliers
    assert planted_causes.wrong(rows) == []
    assert not WIRINGS[wiring] or {row["verdict"] for row in rows if row["by"] == "spike_zero"} == {WIRINGS[wiring]}


def test_a_spike_beside_an_outlier_channel_is_lost_when_it_goes():
    """|h| is that of the spike's channel, not that of a larger one which every token has."""
    model = spike_needs_sink()
    with torch.no_grad():
        model.transformer.h[0].mlp.f.c_proj.bias[20] = 100.0
    cause = causes_in(model, many())[0]["sink_mask"]
    assert cause.verdict == "yes" and cause.lost.share > 0.9 and cause.left == 0


def test_where_a_spike_begins_is_what_counts():
    """One that goes on from before the edit, and is a little too small at a tap, is not judged."""
    none = torch.zeros(1, 2, dtype=torch.bool)
    on = torch.tensor([[True, False]])
    tap = lambda marked, half_spike: types.SimpleNamespace(marked=marked, half_spike=half_spike)
    clean = types.SimpleNamespace(
        subject=types.SimpleNamespace(streams=[0] * 4, attends=[], attended_taps=range(4)),
        tap_states=[tap(on, on), tap(none, on), tap(on, on), tap(on, on)],
        sinks=[],
    )
    edit = types.SimpleNamespace(keys={}, tokens={})
    late = [none, on, on, on]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causes, "reach", lambda clean, edit: late)
        judged = causes.Judged(clean, edit, "spikes")
    assert not any(found.any() for found in judged.spikes)


def test_verdicts_by_their_rule():
    lost = lambda low, high: Lost(share=(low + high) / 2, ci95=[low, high])
    control = lambda low, high: CauseControl(name="random_keys", lost=lost(0, 0.1), beyond=lost(low, high))
    sums = dict.fromkeys(causes.SUMS, 100.0) | {"still": 0.0}
    said = lambda of, *beyond, n=20, edited=5, **change: causes.needs_verdict(
        edited, sums | change, n, of, beyond, "sinks"
    )[0]
    assert said(lost(0.6, 0.9), control(0.5, 0.8)) == "yes"
    assert said(lost(0.6, 0.9), control(0.5, 0.8), control(-0.1, 0.2)) == "cannot tell"  # one control does it as well
    assert said(lost(0.4, 0.9), control(0.3, 0.8)) == "cannot tell"
    assert said(lost(0.2, 0.4), control(0.2, 0.4)) == "partly"
    assert said(lost(-0.5, 0.05), control(-0.6, 0.0)) == "no"
    assert said(lost(-0.5, 0.05), control(0.15, 0.2)) == "cannot tell"  # a control makes sinks grow, the edit does not
    assert said(lost(0.0, 0.2), control(0.0, 0.05)) == "cannot tell"
    assert said(lost(0.6, 0.9), control(0.5, 0.8), still=11.0) == "not removed"
    assert said(lost(0.6, 0.9), control(0.5, 0.8), judged=0.0) == "out of reach"
    assert said(lost(0.6, 0.9), control(0.5, 0.8), n=9) == "cannot tell"
    assert said(lost(0.6, 0.9)) == said(lost(0.6, 0.9), control(0.5, 0.8), edited=0) == "cannot tell"
    assert (
        said(lost(0.6, 0.9), CauseControl(name="c", lost=lost(0, 0), beyond=Lost(share=None, ci95=None)))
        == "cannot tell"
    )
    undecided = causes.undecided
    assert undecided(20, [0.05, 0.25], {"c": [0.05, 0.25]}) == (  # twice as narrow, four times as many
        "the interval of what is lost contains 10%: about 80 such sequences would decide"
    )
    assert "lost beyond c contains 10%" in undecided(20, [0.6, 0.8], {"c": [0.05, 0.25]})
    assert undecided(20, [0.6, 0.8], {"a": [-0.05, 0.05], "b": [0.4, 0.6]}) == "about as much is lost under a"
    assert undecided(20, [-0.05, 0.02], {"a": [0.25, 0.4]}) == "little is lost, but there is a gain under a"


def test_losses_classes_and_positions_are_those_of_a_run_by_hand():
    subject, ids = subject_of(independent()), many()
    ids[3, 20:] = PADDING
    reference = Reference(subject, ids)
    measured = outcomes.measure_outcomes(subject, ids, outcomes.conditions_of(TABLE, reference), 4)
    delta = torch.full((16, 31), torch.nan)
    for n in range(16):
        row = ids[n][ids[n] != PADDING][None]
        clean = CleanPass.run(subject, row)
        with interventions.spike_zero(clean):
            delta[n, : row.size(1) - 1] = (subject.losses(row) - clean.losses)[0]
    entry = outcomes.table_entries(TABLE, measured)[0]
    assert entry.delta_loss == pytest.approx(delta.nanmean(1).mean().item(), rel=1e-4)
    assert entry.by_position == pytest.approx(delta.nanmean(0).tolist(), abs=1e-5)
    at = torch.arange(16) % 8
    assert entry.by_class["spike"].delta_loss == pytest.approx(delta[range(16), at].mean().item(), rel=1e-4)
    assert entry.by_class["after"].delta_loss == pytest.approx(delta[range(16), at + 1].mean().item(), abs=1e-5)
    assert [entry.by_class[kind].tokens for kind in outcomes.CLASSES] == [16, 16, 16, 14 * 29 + 29 + 17]
    assert outcomes.baseline(measured).loss == pytest.approx(measured.by_name["none"].losses.nanmean(1).mean().item())


def test_the_batch_does_not_matter():
    subject, ids = subject_of(sink_needs_spike()), many()
    reference = Reference(subject, ids)
    one, two = (outcomes.measure_outcomes(subject, ids, outcomes.conditions_of(TABLE, reference), n) for n in (3, 16))
    for name, outcome in one.by_name.items():
        torch.testing.assert_close(outcome.losses, two.by_name[name].losses, atol=1e-4, rtol=1e-4)
        assert torch.equal(outcome.sinks, two.by_name[name].sinks)
        assert torch.equal(outcome.spikes, two.by_name[name].spikes)
        assert outcome.edited == two.by_name[name].edited


def test_spread_is_that_of_explicit_maps():
    model, ids = independent(), many()
    with torch.no_grad():
        model.transformer.h[1].attn.f.c_attn.weight[48] = 0  # head 1 has no sink, and does not count
    subject = subject_of(model)
    measured = outcomes.measure_outcomes(subject, ids, {}, 4)
    maps = explicit_maps(model, ids)[0][1][:, :1]  # the sink is in head 0 of block 1: (N, 1, T, T)
    distance = (torch.arange(32)[:, None] - torch.arange(32)).abs()
    without = maps.clone()
    for n in range(16):
        column = torch.arange(32) != n % 8
        without[n, :, column, n % 8] = 0
    without /= without.sum(-1, keepdim=True)
    for name, weights in (("with", maps), ("without", without)):
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean((1, 2))
        expected = torch.stack((entropy, (weights * distance).sum(-1).mean((1, 2))), dim=1)
        torch.testing.assert_close(measured.spread[name], expected, atol=1e-4, rtol=1e-4)
    found = outcomes.attention_change(measured)
    assert found.sequences == 16 and found.entropy.change > 0
    assert abs(found.entropy.control.change) < 0.1 * found.entropy.change


def test_a_model_without_spikes_or_sinks_says_so(ids):
    subject = subject_of(tiny())
    measured = outcomes.measure_outcomes(subject, ids, outcomes.conditions_of(TABLE, Reference(subject, ids)), 4)
    entries = outcomes.table_entries({"spike_zero": TABLE["spike_zero"]}, measured)
    assert entries[0].edited == 0 and entries[0].delta_loss == 0
    said = {cause.by: cause.verdict for cause in outcomes.causes_of(TABLE, measured)}
    assert {*said.values()} == {"cannot tell"}


def test_what_stands_before_an_edit_is_still_there():
    """A sink in block 0 and a spike at its FFN, then an edit of the last tap alone: all of both are left."""
    subject, ids = subject_of(spike_needs_sink()), many()
    last = lambda clean: interventions.remove_sub_layer(clean, subject.inner["update"][-1])
    measured = outcomes.measure_outcomes(subject, ids, {"last": last}, 4)
    clean, edited = measured.by_name["none"], measured.by_name["last"]
    assert clean.spikes.sum() > 0 and clean.sinks.sum() > 0
    assert torch.equal(edited.spikes, clean.spikes) and torch.equal(edited.sinks, clean.sinks)


def test_states_of_the_edited_tokens_move_and_those_before_the_edit_do_not():
    subject, ids = subject_of(independent()), many()
    measured = outcomes.measure_outcomes(subject, ids, outcomes.conditions_of(TABLE, Reference(subject, ids)), 4)
    change = outcomes.table_entries(TABLE, measured)[0].state_change
    assert [tap.spike_tokens for tap in change[:2]] == [0, 0]
    assert all(tap.spike_tokens > 0.9 and tap.others < 0.01 for tap in change[2:])


def spikes_last():
    """A model whose last FFN makes a spike of token 63, and which has no other."""
    model = planted()
    ffn = model.transformer.h[1].mlp.f
    with torch.no_grad():
        ffn.c_fc.weight[0], ffn.c_fc.bias[0] = 0, 0
        ffn.c_fc.weight[0, 31], ffn.c_proj.weight[7, 0] = 1 / MARK, 300
    return model


def test_what_no_attention_reads_is_no_spike_token():
    """Spikes at the last tap alone are edited there, but no token is called a spike for them, before and after."""
    subject, ids = subject_of(spikes_last()), many()
    clean = CleanPass.run(subject, ids)
    assert clean.spikes[-1].sum() == 16 and not clean.spike_tokens.any()
    attn = subject.inner["update"][0]
    edits = {"last": interventions.spike_zero, "first": lambda c: interventions.remove_sub_layer(c, attn)}
    measured = outcomes.measure_outcomes(subject, ids, edits, 4)
    assert measured.by_name["last"].edited == 16
    assert all(outcome.spikes.sum() == 0 for outcome in measured.by_name.values())
