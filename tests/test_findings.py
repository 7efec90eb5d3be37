"""Findings: written as JSON and read back, the same rules in every table, and no page where nothing draws one."""

import builtins
import dataclasses
import json
import math
import sys

import pytest
import torch

import spikesink
from spikesink.errors import UserError
from spikesink.measure import sinks, spikes
from spikesink.measure.findings import Findings, Skipped
from spikesink.measure.observe import observe
from spikesink.measure.rules import Curve
from spikesink.measure.sinks import SinkRule
from spikesink.measure.spikes import SpikeRule, beyond
from spikesink.measure.summarise import summarise
from spikesink.show import figures, page, report

from .conftest import subject_of, tiny
from .test_observe import planted
from .test_outcomes import many


def found(**changes):
    with spikesink.open(planted(size=300.0, sink_logit=10.0), tokens=many(8), nulls=2, **changes) as look:
        return spikesink.detect(look)


def test_what_is_written_is_read_back(tmp_path):
    written = found()
    written.save(tmp_path / "f.json")
    read = Findings.load(tmp_path / "f.json")
    assert read.sinks.at(0.5) == written.sinks.at(0.5) and read.sinks.first == written.sinks.at(0.3).first
    assert read.nulls.keys() == written.nulls.keys() and read.verdicts == written.verdicts
    read.save(tmp_path / "g.json")
    assert json.loads((tmp_path / "f.json").read_text()) == json.loads((tmp_path / "g.json").read_text())
    keys = json.loads((tmp_path / "f.json").read_text())
    assert list(keys["sinks"]["gu"]) == ["0.2", "0.3", "0.5", "0.8"] and "epsilon" not in keys["sinks"]["gu"]["0.3"]
    assert "history" not in keys and "parts" not in keys
    with pytest.raises(KeyError, match=r"0\.4 was not measured, only 0\.2, 0\.3, 0\.5, 0\.8"):
        read.sinks.at(0.4)


def test_where_windows_leave_no_key_enough_queries(tmp_path):
    with spikesink.open(tiny(window=4), tokens=many(8), nulls=0) as look:
        narrow = spikesink.detect(look)
    narrow.save(tmp_path / "f.json")
    narrow = Findings.load(tmp_path / "f.json")
    assert narrow.sinks.possible == [False, False] and narrow.sinks.at().best_eligible is None
    assert narrow.sinks.primary_rule.tokens == 0
    terminal = " ".join(report.terminal(narrow).split())
    assert (
        "No key is seen by at least T/4 queries" in terminal and "In attn 0, attn 1 the window is too short" in terminal
    )
    with spikesink.open(tiny(window=8), tokens=many(8), nulls=0) as look:  # a quarter of 32 queries see it
        assert spikesink.detect(look).sinks.possible == [True, True]


def test_what_was_not_run_is_an_empty_object(tmp_path):
    bare = dataclasses.replace(found(), anatomy=None, examples=None, nulls={"init": Skipped(skipped="too large")})
    bare.save(tmp_path / "f.json")
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["anatomy"] == written["examples"] == {} and written["nulls"] == {"init": {"skipped": "too large"}}
    read = Findings.load(tmp_path / "f.json")
    assert read.anatomy is read.examples is None and read.nulls["init"] == Skipped(skipped="too large")
    assert "init (skipped: too large)" in report.terminal(read)
    page.detection_page(tmp_path / "f.html", read)


def test_files_of_another_schema_are_refused(tmp_path):
    (tmp_path / "f.json").write_text(json.dumps({"schema": "spikesink-findings-0"}))
    with pytest.raises(UserError, match=r"spikesink-findings-0.*run detect again"):
        Findings.load(tmp_path / "f.json")


def test_a_rule_of_the_tables_is_everywhere_by_itself(tmp_path, monkeypatch):
    """One entry each, of spikes and of sinks: in the findings, the nulls, the curves, the terminal and the page."""
    fixed = SpikeRule(
        text="|h| >= 7",
        heading="over seven",
        compared="tokens over seven",
        marked=beyond(lambda batch: (torch.zeros_like(batch.mean), torch.full_like(batch.mean, 7.0))),
    )
    mass = Curve("mass", "sink: mass", (0.1, 0.4), 0.4, tokens=lambda obs, share: obs.share > share)
    heavy = SinkRule(text="share > 40%", heading="heavy", compared="heavy tokens", curve=mass)
    monkeypatch.setitem(spikes.SPIKE_RULES, "fixed", fixed)
    monkeypatch.setitem(sinks.SINK_RULES, "heavy", heavy)
    of = found()
    assert of.spikes.rules["fixed"].tokens >= of.spikes.rules["massive"].tokens > 0
    assert of.spikes.rules["fixed"].false_positives.nulls == of.sinks.rules["heavy"].false_positives.nulls == ["init"]
    assert any("fixed" in token.rules for token in of.spikes.tokens)
    for measured in (of.measures, of.nulls["init"]):
        assert {"fixed", "heavy"} <= measured.rules.keys()
        assert [point.at for point in measured.curves["mass"]] == [0.1, 0.4]
    terminal = report.terminal(of)
    assert "over seven" in terminal and "heavy" in terminal
    compared = report.comparison_table(["a"], [of])
    assert {"tokens over seven", "heavy tokens"} <= {row[0] for row in compared.rows}
    page.detection_page(tmp_path / "f.html", of)
    html = (tmp_path / "f.html").read_text()
    # the table of nulls, the table of rules, the figure of the curves
    assert all(words in html for words in ("over seven", "|h| &gt;= 7", "share &gt; 40%", "sink: mass"))
    page.figure_files(tmp_path / "figures", (figures.DETECTION, of.all_parts))
    assert "sink: mass" in (tmp_path / "figures" / "sensitivity.svg").read_text()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2", "plotly"])
def test_without_the_packages_of_pages_the_rest_is_written(cli, trained, tmp_path, monkeypatch, package):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
        return real(name, *args, **kwargs)

    for module in ("page", "figures", "drawing", "ablation_figures"):
        monkeypatch.delitem(sys.modules, f"spikesink.show.{module}")
        monkeypatch.delattr(spikesink.show, module)
    monkeypatch.setattr(builtins, "__import__", missing)
    files = [f"--json={tmp_path / 'f.json'}", f"--html={tmp_path / 'f.html'}"]
    code, out, err = cli("detect.py", trained, "--seq_len=16", "--n_seq=8", "--nulls=0", *files)
    assert code == 0, err
    assert "Sink_1 (0.3)" in out and out.splitlines()[-1].endswith("pip install 'spikesink[pages]'")
    assert Findings.load(tmp_path / "f.json").data.n_seq == 8 and not (tmp_path / "f.html").exists()
    code, _, err = cli("detect.py", trained, "--seq_len=16", "--n_seq=8", f"--figures={tmp_path}", *files)
    assert code == 2 and f"{package} is missing here: pip install 'spikesink[pages]'" in err


def test_a_stream_that_is_mostly_nothing_has_no_ratio():
    """A median of 0: outlier channels, but no spike and no number of times."""
    model = tiny(norm_place="none", position="none", bias=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight[:, 5] = 1.0
    with spikesink.open(model, tokens=many(8), nulls=0) as look:
        of = spikesink.detect(look)
    (channel,) = of.spikes.outlier_channels
    assert (channel.channel, channel.layers, math.isnan(channel.ratio)) == (5, 1, True)
    assert of.spikes.primary_rule.tokens == 0 and "channel 5 after embedding, – x the median" in report.summary(of)[0]


def test_the_last_tap_stands_apart_only_where_no_attention_reads_it():
    subject = subject_of(planted(size=300.0))
    for part in ("", "encoder"):
        one = dataclasses.replace(subject, part=part)
        of = summarise(one, observe(one, many(8), progress=False))
        assert of.spikes.sum.last == (None if part else 8 / (8 * 32))


@pytest.mark.parametrize("place", ["pre", "post"])
def test_the_first_tokens_energy_and_norm_are_those_of_the_sum(place):
    model, ids = tiny(norm_place=place, norm="rmsnorm"), many(8)
    of = summarise(subject_of(model), observe(subject_of(model), ids, progress=False))
    block, kept = model.transformer.h[1], []
    hook = block.mlp.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    outputs = block.mlp.f.register_forward_hook(lambda module, args, output: kept.append(output))
    model(ids)
    hook.remove(), outputs.remove()
    x = (kept[0] + kept[1]).double()  # x + f(x), before a norm behind it
    first, norm = x[:, 0].square(), x.norm(dim=-1)
    layer = next(layer for layer in of.layers if layer.name == "ffn 1")
    assert layer.first_energy == pytest.approx((first.amax(-1) / first.sum(-1)).mean().item(), rel=1e-4)
    assert layer.first_norm == pytest.approx((norm[:, 0] / norm.flatten().median()).mean().item(), rel=1e-3)
