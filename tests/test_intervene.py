"""Interventions do what their formula says, nothing else, in any combination, and undo themselves."""

import math
import types

import pytest
import torch

from spikesink.edit import interventions
from spikesink.edit.clean_pass import CleanPass, Reference
from spikesink.edit.interventions import INTERVENTIONS, REMOVALS
from spikesink.hooks import hooked, on_streams
from spikesink.measure.sinks import eligible_keys

from .conftest import subject_of, tiny
from .test_observe import explicit_maps, marked_ids, planted  # noqa: F401

EVERY = INTERVENTIONS | REMOVALS
ROWS = torch.arange(6)
SPIKE = (ROWS, ROWS * 3)  # where token 63 stands; its spike is in channel 7, from ffn 0 (tap 2) on


@pytest.fixture
def both(marked_ids):  # noqa: F811
    """(subject with a planted spike and a planted sink, CleanPass, Reference)."""
    subject = subject_of(planted(size=300.0, sink_logit=10.0))
    return subject, CleanPass.run(subject, marked_ids), Reference(subject, marked_ids)


def streams_under(clean, *edits):
    """The stream at every tap under edits."""
    seen, subject = [], clean.subject
    for edit in edits:
        edit.__enter__()
    with on_streams(subject.streams, [lambda x: seen.append(x.detach().clone())] * len(subject.streams)):
        subject.losses(clean.ids)
    for edit in reversed(edits):
        edit.__exit__(None, None, None)
    return seen


def output_under(clean, layer, edit):
    """What the seam of a layer returns under an edit, and the q, k, v it was called with."""
    seen = {}

    def look(module, args, kwargs, output):
        seen.update(out=output, qkv=args)

    with edit, hooked([(clean.subject.attends[layer].module, look)]):
        clean.subject.losses(clean.ids)
    return seen["out"], seen["qkv"]


def test_nothing_and_what_finds_nothing_are_bit_identical(ids):
    subject = subject_of(tiny())  # has no spikes
    clean, reference = CleanPass.run(subject, ids), Reference(subject, ids)
    assert torch.equal(clean.losses, subject.losses(ids))
    for name in ("spike_zero", "spike_mean", "spike_clip", "spike_stepup", "spike_project", "spike_constant"):
        edit = EVERY[name].edit(clean, reference)
        assert edit.edited == 0 and edit.stage == len(subject.stages)
        with edit:
            assert torch.equal(subject.losses(ids), clean.losses)
    with interventions.nothing(clean):
        assert torch.equal(subject.losses(ids), clean.losses)


@pytest.mark.parametrize("changes", [{}, {"norm_place": "post"}, {"n_register": 2, "position": "rope"}])
def test_the_shared_prefix_is_bit_identical_and_not_computed(ids, changes):
    subject = subject_of(tiny(n_layer=3, **changes))
    clean = CleanPass.run(subject, ids)
    calls = []
    counted = [(tap.module, lambda m, a, k, out: calls.append(1)) for tap in subject.attends]
    for stage in range(len(subject.stages) + 1):
        calls.clear()
        with clean.prefix(stage), hooked(counted):
            assert torch.equal(subject.losses(ids), clean.losses)
        assert len(calls) == 3 - (stage + 1) // 2
    assert not any("forward" in vars(module) for module in subject.stages)


@pytest.mark.parametrize("name", EVERY)
def test_edits_change_something_and_come_off_also_after_an_exception(both, name):
    subject, clean, reference = both
    for control in (None, *EVERY[name].controls):
        edit = EVERY[name].edit(clean, reference, control)
        for _ in range(2):  # an edit can be entered again
            with pytest.raises(KeyError), clean.prefix(edit.stage), edit:
                changed = subject.losses(clean.ids)
                raise KeyError
            weak = ("spike_mean", "sink_damp")  # here every spike is its mean, and half a strong sink still takes all
            assert control or name in weak or not torch.equal(changed, clean.losses)
            assert torch.equal(subject.losses(clean.ids), clean.losses)


@pytest.mark.parametrize("name", EVERY)
def test_an_edit_on_the_shared_prefix_is_the_edit_on_the_whole_model(both, name):
    subject, clean, reference = both
    for control in (None, *EVERY[name].controls):
        edit = EVERY[name].edit(clean, reference, control)
        with edit:
            whole = subject.losses(clean.ids)
        with clean.prefix(edit.stage), edit:
            assert torch.equal(subject.losses(clean.ids), whole)


def test_spike_edits_are_their_formulas_and_touch_nothing_else(both):
    _, clean, reference = both
    x = clean.streams[2]
    where = (*SPIKE, torch.full((6,), 7))
    others = torch.ones_like(x, dtype=torch.bool)
    others[where] = False
    median = x.abs().flatten(1).median(1).values
    expected = {
        "spike_zero": torch.zeros(6),
        "spike_mean": x[where].mean().expand(6),
        "spike_clip": 10 * median,
        "spike_stepup": torch.zeros(6),
    }
    for name, values in expected.items():
        edit = EVERY[name].edit(clean, reference)
        edited = streams_under(clean, edit)
        torch.testing.assert_close(edited[2][where], values, atol=1e-2, rtol=1e-3)
        assert torch.equal(edited[2][others], x[others])
        assert torch.equal(edited[1], clean.streams[1])
        assert edit.edited == (6 if name == "spike_stepup" else 6 * 3)  # ffn 0, and the two sub-layers after it
        assert edit.stage == 1  # ffn 0
    assert reference.step_up == 2
    token = x[SPIKE]
    drawn = interventions.entries_of(clean, "random_channels")[2][SPIKE]
    factor = (10 * median / x[where].abs())[:, None]
    for name, values in (("spike_zero", 0 * token), ("spike_clip", token * factor)):
        edited = streams_under(clean, EVERY[name].edit(clean, reference, "random_channels"))[2][SPIKE]
        torch.testing.assert_close(edited, torch.where(drawn, values, token), atol=1e-4, rtol=1e-3)
    edited = streams_under(clean, interventions.spike_mean(clean, reference, "random_channels"))[2]
    usual = torch.where(others, x, torch.nan).nanmean((0, 1))  # of each channel over the entries that are no spikes
    torch.testing.assert_close(edited[SPIKE], torch.where(drawn, usual, token), atol=1e-4, rtol=1e-3)


def test_the_step_up_is_where_spikes_first_stand_not_where_most_are(both):
    subject, clean, _ = both
    three, last = (torch.arange(3), torch.tensor(20), torch.tensor(5)), []

    def more(x):
        last.append(x.index_put(three, torch.tensor(500.0)))
        return last[-1]

    with on_streams(subject.streams[3:5], [more, lambda x: last[-1]]):
        assert [int(marked.sum()) for marked in CleanPass.run(subject, clean.ids).spikes] == [0, 0, 6, 9, 9]
        assert Reference(subject, clean.ids).step_up == 2  # only three are new at tap 3


def test_projection_and_constant_state_are_their_formulas(both):
    _, clean, reference = both
    x = clean.streams[2]
    rest = torch.ones(6, 32, dtype=torch.bool)
    rest[SPIKE] = False
    mean = x[SPIKE].mean(0)
    u = mean / mean.norm()
    for name, expected in (
        ("spike_project", x[SPIKE] - (x[SPIKE] @ u)[:, None] * u),
        ("spike_constant", mean.expand(6, -1)),
    ):
        edited = streams_under(clean, EVERY[name].edit(clean, reference))[2]
        torch.testing.assert_close(edited[SPIKE], expected, atol=1e-3, rtol=1e-4)
        assert torch.equal(edited[rest], x[rest])
    others = streams_under(clean, interventions.spike_constant(clean, reference, "other_tokens"))[2]
    changed = (others != x).any(-1)
    assert changed.sum(1).tolist() == [1] * 6 and not changed[SPIKE].any()
    torch.testing.assert_close(others[changed], x[rest].mean(0).expand(6, -1), atol=1e-4, rtol=1e-4)


def explicit_null(module, q, k, v, sinks):
    """Attention written out, sink keys of zero logit and value, but for the query at a sink's own position."""
    T = q.size(-2)
    logits = (q @ k.transpose(-1, -2)) / math.sqrt(q.size(-1))
    causal = torch.ones(T, T).triu(1).bool()
    real = logits.masked_fill(causal, -torch.inf).softmax(-1) @ v
    null = logits.masked_fill(sinks[:, :, None], 0).masked_fill(causal, -torch.inf).softmax(-1)
    return torch.where(sinks[..., None], real, null @ v.masked_fill(sinks[..., None], 0))


def test_sink_edits_are_their_formulas(both):
    subject, clean, _ = both
    maps, _ = explicit_maps(subject.model, clean.ids)
    A, sinks = maps[1], clean.sinks[1]
    assert [int(found.sum()) for found in clean.sinks] == [0, 12]  # two heads in each of six sequences
    own = torch.eye(32, dtype=torch.bool)
    column = sinks[:, :, None] & ~own  # (B, H, T, T): a sink's key, but for its own query
    a = (A * column).sum(-1, keepdim=True)
    masked = A.masked_fill(column, 0)
    moved = masked + 0
    for n in range(6):
        moved[n, :, n * 3 + 1 :, n * 3 + 1] += A[n, :, n * 3 + 1 :, n * 3]
    expected = {
        "sink_mask": masked / masked.sum(-1, keepdim=True),
        "sink_damp": torch.where(column, 0.5 * A, A) / (1 - 0.5 * a),
        "sink_relocate": moved,
    }
    for name, weights in expected.items():
        edit = EVERY[name].edit(clean)
        out, (_, _, v) = output_under(clean, 1, edit)
        torch.testing.assert_close(out, weights @ v, atol=1e-5, rtol=1e-4)
        assert edit.edited == 12 and edit.stage == 2
    _, (q, k, v) = output_under(clean, 1, interventions.nothing(clean))
    out, _ = output_under(clean, 1, interventions.sink_null(clean))
    torch.testing.assert_close(out, explicit_null(subject.attends[1].module, q, k, v, sinks), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["softmax1", "kv_bias", "clipped", "sigmoid", "relu"])
def test_relocation_moves_the_weights_that_are_used(ids, attention):
    subject = subject_of(tiny(attention=attention, n_kv_head=1))
    clean = CleanPass.run(subject, ids)
    clean.sinks = [torch.zeros(6, 2, 32, dtype=torch.bool) for _ in range(2)]
    clean.sinks[0][2, 1, [4, 5]] = True
    module = subject.attends[0].module
    before, (q, k, v) = output_under(clean, 0, interventions.nothing(clean))
    after, _ = output_under(clean, 0, interventions.sink_relocate(clean))
    weights, slot = module.weights(q, k)
    torch.testing.assert_close(weights @ v + slot, before, atol=1e-5, rtol=1e-4)
    weights[2, 1, 6:, 6] += weights[2, 1, 6:, 4] + weights[2, 1, 6:, 5]
    weights[2, 1, 6:, 4:6] = 0
    torch.testing.assert_close(after, weights @ v + slot, atol=1e-5, rtol=1e-4)


def test_destinations():
    keys = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 1], [1] * 8, [0] * 8]).bool()[None]
    places = list(range(8))
    assert interventions._destinations(keys)[0].tolist() == [[2, 2, 2, 3, 5, 5, 5, 5], places, places]


@pytest.mark.parametrize("changes", [{}, {"attention": "relu"}, {"attention": "softmax1", "n_kv_head": 1}])
def test_bos_remove_is_the_model_without_bos(ids, changes):
    subject = subject_of(tiny(position="rope", **changes))  # positions count only relative to each other
    with interventions.bos_remove(CleanPass.run(subject, ids)):
        without = subject.losses(ids)[:, 1:]
    torch.testing.assert_close(without, subject.losses(ids[:, 1:]), atol=1e-4, rtol=1e-4)


def test_bos_stands_after_the_registers(ids):
    subject = subject_of(tiny(n_register=2))
    clean = CleanPass.run(subject, ids)
    received = []
    look = lambda module, args, kwargs, output: received.append(module.shares(*args[:2], 0, kwargs["bias"]))
    with interventions.bos_remove(clean), hooked([(tap.module, look) for tap in subject.attends]):
        subject.losses(ids)
    for weights in received:
        assert weights[:, :, 3:, 2].max() == 0 and weights[:, :, 3:, :2].min() > 0


def test_entry_controls_are_matched_in_number(both):
    _, clean, _ = both
    for marked, drawn in zip(clean.spikes, interventions.entries_of(clean, "random_channels"), strict=True):
        assert torch.equal(marked.sum(-1), drawn.sum(-1)) and not (marked & drawn).any()


@pytest.mark.parametrize("name", [name for name, one in EVERY.items() if "same_energy" in one.controls])
def test_the_control_of_the_same_energy_moves_states_as_far(both, name):
    _, clean, reference = both
    one, other = (EVERY[name].edit(clean, reference, control) for control in (None, "same_energy"))
    streams = {edit: streams_under(clean, edit) for edit in (one, other)}
    for i in one.tokens:  # the edit is the same at every tap here, as nothing adds to a spike
        away = {edit: (of[i] - clean.streams[i]) for edit, of in streams.items()}
        assert torch.equal(other.tokens[i], clean.tap_states[i].marked)
        torch.testing.assert_close(away[other][SPIKE].norm(dim=-1), away[one][SPIKE].norm(dim=-1), atol=1, rtol=0.02)
        assert away[other][SPIKE][:, 7].abs().max() < 1e-3  # off the spike's channel
    assert one.dose > 0 or name == "spike_mean"
    assert other.dose == pytest.approx(one.dose, rel=0.05, abs=1)


def test_size_and_direction_are_two_things(both):
    _, clean, _ = both
    x = clean.streams[2]
    norms = x.norm(dim=-1)
    scaled, turned = (streams_under(clean, EVERY[name].edit(clean))[2] for name in ("spike_scale", "spike_direction"))
    usual = norms.median(1).values
    torch.testing.assert_close(scaled[SPIKE], x[SPIKE] * (usual / norms[SPIKE])[:, None], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned[SPIKE].norm(dim=-1), norms[SPIKE], atol=1e-2, rtol=1e-4)
    assert turned[SPIKE][:, 7].abs().max() == 0
    assert torch.nn.functional.cosine_similarity(turned[SPIKE], x[SPIKE]).abs().max() < 0.1
    others = torch.ones(6, 32, dtype=torch.bool)
    others[SPIKE] = False
    assert torch.equal(scaled[others], x[others]) and torch.equal(turned[others], x[others])


def test_key_controls_are_matched(both):
    _, clean, _ = both
    sinks = torch.stack(clean.sinks)
    random, same = (torch.stack(interventions.keys_of(clean, c)) for c in ("random_keys", "same_mass"))
    assert torch.equal(random.sum(-1), sinks.sum(-1)) and not (random & sinks).any()
    assert not random[..., ~eligible_keys(torch.arange(32, 0, -1), 32)].any()
    assert not (same & sinks).any() and not same[0].any()


def test_keys_of_the_same_mass_have_as_much_but_for_one_key():
    draw = torch.rand(5, 2, 30, generator=torch.Generator().manual_seed(0))
    sinks = torch.zeros(5, 2, 30, dtype=torch.bool)
    sinks[:, 0, 0] = True
    clean = types.SimpleNamespace(sinks=[sinks], mass=[draw + 8 * sinks], numbers=torch.arange(5))
    same = interventions.keys_of(clean, "same_mass")[0]
    wanted, taken = ((clean.mass[0] * keys).sum((1, 2)) for keys in (sinks, same))
    assert not (same & sinks).any() and (taken <= wanted).all() and (taken > wanted - 1).all()


def test_the_ffn_of_the_step_up_gives_the_first_token_nothing(both):
    _, clean, reference = both
    for control, token in ((None, 0), ("second_token", 1)):
        edit = interventions.bos_ffn(clean, reference, control)
        streams = streams_under(clean, edit)
        assert torch.equal(streams[2][:, token], streams[1][:, token]) and edit.edited == 6
        rest = torch.arange(32) != token
        assert torch.equal(streams[2][:, rest], clean.streams[2][:, rest])
        added = (clean.streams[2] - clean.streams[1])[:, token]
        assert edit.dose == pytest.approx(added.square().sum().item(), rel=1e-4)
    assert streams_under(clean, interventions.bos_ffn(clean, reference, "other_sub_layer"))[2].equal(clean.streams[2])


def test_controls_do_not_depend_on_the_batch(both):
    subject, clean, _ = both
    part = CleanPass.run(subject, clean.ids[2:5], torch.arange(2, 5))
    pairs = zip(*(interventions.entries_of(of, "random_channels") for of in (part, clean)), strict=True)
    assert all(torch.equal(a, b[2:5]) for a, b in pairs)
    assert torch.equal(interventions.direction_of(part, 1), interventions.direction_of(clean, 1)[2:5])
    for control in ("random_keys", "same_mass"):
        pairs = zip(interventions.keys_of(part, control), interventions.keys_of(clean, control), strict=True)
        assert all(torch.equal(a, b[2:5]) for a, b in pairs)


def test_edits_compose_in_any_order(both):
    subject, clean, reference = both
    zero, mask, bos = (EVERY[name].edit(clean, reference) for name in ("spike_zero", "sink_mask", "bos_remove"))
    losses = []
    for first, second, third in ((zero, mask, bos), (bos, mask, zero), (mask, zero, bos)):
        with first, second, third:
            losses.append(subject.losses(clean.ids))
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    edited = streams_under(clean, zero, mask)
    assert all(x[(*SPIKE, torch.full((6,), 7))].abs().max() == 0 for x in edited[2:])
    with zero:
        out, (q, k, v) = output_under(clean, 1, mask)
    weights = subject.attends[1].module.shares(q, k)
    weights = weights.masked_fill(clean.sinks[1][:, :, None] & ~torch.eye(32, dtype=torch.bool), 0)
    torch.testing.assert_close(out, weights / weights.sum(-1, keepdim=True) @ v, atol=1e-5, rtol=1e-4)


def test_removed_heads_and_sub_layers_give_nothing(both):
    _, clean, reference = both
    assert reference.sink_rate.tolist() == [[0, 0], [1, 1]]
    edit = interventions.sink_heads(clean, reference)
    out, _ = output_under(clean, 1, edit)
    assert out.abs().max() == 0 and edit.edited == 2 * 6
    drawn = interventions.sink_heads(clean, reference, "random_heads")
    out, _ = output_under(clean, 1, drawn)
    assert out.abs().max() > 0 and drawn.edited == 2 * 6
    streams = streams_under(clean, interventions.step_up(clean, reference))
    assert torch.equal(streams[2], streams[1])  # ffn 0 added nothing
    streams = streams_under(clean, interventions.step_up(clean, reference, "other_sub_layer"))
    assert torch.equal(streams[4], streams[3]) and not torch.equal(streams[2], streams[1])
