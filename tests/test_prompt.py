"""--prompt, --vocab and --compare."""

import json

import pytest
import torch

from spikesink.edit.clean_pass import CleanPass
from spikesink.measure import prompt
from spikesink.measure.findings import COMPARISON_SCHEMA, CheckpointEntry, LookedAt
from spikesink.measure.observe import Ordinary, observe
from spikesink.measure.spikes import Usual, spike_entries
from spikesink.measure.summarise import summarise

from .conftest import SMALL_RUN, subject_of, tiny
from .test_observe import explicit_maps, planted


def test_prompt_is_what_explicit_maps_say():
    model, ids = planted(size=300.0, sink_logit=10.0), torch.randint(62, (1, 20))
    ids[0, 3] = 63
    of = subject_of(model)
    ordinary = Ordinary.from_ids(of, torch.randint(62, (8, 32)))
    found = prompt.inspect(of, ids, CheckpointEntry(path="p"), {}, ordinary)
    maps, _ = explicit_maps(model, ids)  # (L, 1, H, T, T)
    flat = maps.flatten(0, 2)
    assert [head.head for head in found.heads] == ["0.0", "0.1", "1.0", "1.1"]
    for head, of_head in zip(found.heads, flat, strict=True):
        weight = torch.tensor(head.weight)
        torch.testing.assert_close(weight, of_head.max(-1).values, atol=1e-5, rtol=1e-5)
        looked = of_head.gather(1, torch.tensor(head.looks_at)[:, None])[:, 0]
        torch.testing.assert_close(looked, weight, atol=1e-5, rtol=1e-5)
        alpha = of_head.sum(0) / torch.arange(20, 0, -1)
        torch.testing.assert_close(torch.tensor(head.alpha), alpha, atol=1e-5, rtol=1e-5)
    token = found.tokens[3]
    assert {"spike", "massive"} <= {*token.rules} and token.channel == 7 and token.sink_heads == 2
    # of one text, but compared with ordinary text
    size, usual = found.magnitudes[found.layers.index(token.after)][3], ordinary.sums[found.layers.index(token.after)]
    assert (token.magnitude, token.ratio) == pytest.approx((size, size / usual.layer.item()))
    scale = max(usual.layer.item(), usual.channels[7].item())
    assert token.strength == pytest.approx(size / max(30 * usual.layer.item(), 5 * usual.typical.item() * scale))
    assert found.tokens[10].looks_at == LookedAt(position=3, heads=2) or found.tokens[10].looks_at.heads >= 2


def test_vocabulary_finds_the_one_token_that_spikes():
    of = subject_of(planted(size=300.0))
    ids = torch.randint(62, (4, 32))
    found = summarise(of, observe(of, ids, progress=False))
    probe = prompt.vocabulary(of, found, ids, 64, batch_size=10)
    for place in (probe.first, probe.second):
        assert place.spiking == 1
        assert (place.tokens[0].id, place.tokens[0].channel) == (63, 7)
        assert sum(place.histogram.counts) == 64
        assert len(place.strength) == 64 and (torch.tensor(place.strength) >= 1).sum() == 1
        assert place.strength[63] == pytest.approx(place.tokens[0].strength, abs=0.001)


def test_vocabulary_in_second_place_sees_the_first():
    """A token's strength there is that of the whole two-token sequence's last token, compared with ordinary text, at
    the taps that attention reads."""
    of = subject_of(tiny())
    ids = torch.randint(64, (2, 32))
    ordinary = Ordinary.from_ids(of, ids)
    found = summarise(of, observe(of, ids, progress=False, ordinary=ordinary))
    probe = prompt.vocabulary(of, found, ids, 64)
    pair = torch.tensor([[int(ids[0, 0]), 17]])
    streams = CleanPass.run(of, pair, ordinary=ordinary).streams
    strengths = []
    for x, usual in zip(streams[:-1], ordinary.sums[:-1], strict=True):
        scale = torch.maximum(usual.channels, usual.layer)
        thresholds = torch.maximum(30 * usual.layer, 5 * usual.typical * scale)
        strengths.append((x[0, 1].abs() / thresholds).max().item())
    assert probe.second.strength[17] == pytest.approx(max(strengths), rel=0.01, abs=0.001)


@pytest.fixture(scope="module")
def bytes_run(tmp_path_factory):
    """A checkpoint of a byte model, which can read a prompt."""
    import importlib
    import sys

    from spikesink.errors import cli

    out = tmp_path_factory.mktemp("bytes")
    old = sys.argv
    sys.argv = ["train.py", *SMALL_RUN, "--vocab_size=257", "--bos", "--dataset=stdlib", f"--out_dir={out}"]
    try:
        cli(importlib.import_module("train").main)
    finally:
        sys.argv = old
    return out / "ckpt.pt"


def test_prompt_command(cli, bytes_run, tmp_path):
    text = "<b>x</b> $a"
    code, out, err = cli(
        "detect.py", bytes_run, "--prompt", text, f"--json={tmp_path / 'p.json'}", f"--html={tmp_path / 'p.html'}"
    )
    assert code == 0, err
    found = json.loads((tmp_path / "p.json").read_text())
    assert [t["text"] for t in found["tokens"]] == ["<bos>", *text]
    assert "most heads look at" in out
    assert "<b>x" not in (tmp_path / "p.html").read_text()
    for arguments, words in (
        (["--prompt", ""], "empty"),
        (["--prompt", "x" * 99], "more than the model's 16"),
        (["--prompt", "x", "--tokens=a.npy"], "--tokens is another"),
        (["--json=a", "--html=a"], "both name a"),
    ):
        code, _, err = cli("detect.py", bytes_run, *arguments)
        assert code == 2 and words in err and err.count("\n") == 1


def test_compare_and_vocab_commands(cli, bytes_run, trained, tmp_path):
    files = [f"--json={tmp_path / 'c.json'}", f"--html={tmp_path / 'c.html'}"]
    code, out, err = cli("detect.py", "--compare", bytes_run, trained, "--seq_len=16", "--n_seq=8", *files)
    assert code == 0, err
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["schema"] == COMPARISON_SCHEMA
    assert [f["checkpoint"]["path"] for f in found["findings"]] == [str(bytes_run), str(trained)]
    assert "vocab_size" in out and "Sink_1 (0.3)" in out
    assert "Side by side" in (tmp_path / "c.html").read_text()
    code, out, err = cli("detect.py", bytes_run, "--vocab", "--n_seq=8", *files)
    assert code == 0, err
    probe = json.loads((tmp_path / "c.json").read_text())["vocabulary"]
    assert probe["vocab_size"] == 257 and "of 257 tokens are spikes" in out
    for wrong in ([], ["--compare", bytes_run, "nowhere"], [bytes_run, "--vocab", "--prompt", "a"]):
        code, _, err = cli("detect.py", *wrong, "--n_seq=8", *files)
        assert code == 2 and err.count("\n") == 1, err


def test_a_ratio_of_zero_medians_is_no_spike():
    x = torch.zeros(1, 8, 4)
    usual = Usual.from_states(x.flatten(0, 1))
    x[0, 3, 2] = 1e9
    assert not spike_entries(x, usual).any()
