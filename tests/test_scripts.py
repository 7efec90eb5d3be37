"""The scripts as a user runs them: findings, pages, and one clear line for every mistake."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from spikesink import files, schema
from spikesink.edit import interventions
from spikesink.measure.findings import SCHEMA, Findings
from spikesink.models import checkpoint
from spikesink.show import page
from spikesink.show.text import visible

from .conftest import ROOT, tiny
from .test_probes import treebank


@pytest.fixture
def detected(cli, trained, tmp_path):
    """Findings of `detect.py` with the given flags."""

    def call(*args):
        out = tmp_path / "f.json"
        code, text, err = cli(
            "detect.py", trained, "--seq_len=16", f"--json={out}", f"--html={tmp_path / 'p.html'}", *args
        )
        assert code == 0, err
        return json.loads(out.read_text()), text

    return call


def test_findings_hold_the_promised_keys(detected, trained):
    found, text = detected("--n_seq=20")
    assert found["schema"] == SCHEMA
    assert found["checkpoint"] == {
        "path": str(trained),
        "sha256": files.file_hash(trained),
        "step": 8,
        "tokens": 1024,
    }
    assert {"name": found["data"]["name"], "n_seq": 20, "seq_len": 16, "tokens": 320, "bos": True}.items() <= found[
        "data"
    ].items()
    assert len(found["layers"]) == 3
    for layer in found["layers"]:
        assert {"index", "kind", "top1", "top2", "top3", "median", "usual", "kurtosis", "inf_norm"} <= layer.keys()
    for rule in found["spikes"]["rules"].values():
        assert {"threshold", "tokens", "fraction", "channels"} <= rule.keys()
    for epsilon in ("0.2", "0.3", "0.5", "0.8"):
        gu = found["sinks"]["gu"][epsilon]
        assert {"by_position", "first", "by_layer", "by_head"} <= gu.keys()
        assert len(gu["by_position"]) == 16 and np.shape(gu["by_head"]) == (1, 2)
    assert {"p_sink_given_spike", "p_spike_given_sink", "jaccard", "lift", "ci95"} <= found["co_occurrence"].keys()
    assert sum(found["sinks"]["share"]) == pytest.approx(1)
    assert "top1/median" in text and "Sink_1" in text and "20 sequences of 16 tokens" in text


def test_detection_loss_is_the_models_own(detected, trained):
    """The loss of the findings is that of the model on those ids, by another path."""
    from data.loader import Tokens
    from model import GPT

    content = checkpoint.load(trained)
    data = Tokens(content.config["dataset"], "val", 16, bos=True)
    x, _ = data.read(np.linspace(0, data.n_windows - 1, 20).astype(int))
    model = GPT.from_checkpoint(content).eval()
    assert detected("--n_seq=20")[0]["data"]["loss"] == pytest.approx(model(x[:, :-1], x[:, 1:])[1].item(), rel=1e-5)


@pytest.mark.parametrize("extra", [{}, {"n_seq": 7}])
def test_ablate_measures_on_the_sequences_of_detect(trained, extra):
    import spikesink
    from detect import LAB

    how = {"lab": LAB, "seq_len": 16, "n_seq": 60} | extra
    one, two = spikesink.open(trained, **how), spikesink.open(trained, calibration=True, **how)
    assert torch.equal(one.ids, two.ids)
    assert len(two.other_ids) == len(one.ids) - 1
    assert not any((two.other_ids == row).all(1).any() for row in one.ids)


def test_tokens_are_used_as_they_are(detected, tmp_path):
    ids = np.random.default_rng(0).integers(0, 60, (10, 16))
    np.save(tmp_path / "t.npy", ids)
    found, _ = detected(f"--tokens={tmp_path / 't.npy'}")
    assert (found["data"]["n_seq"], found["data"]["bos"]) == (10, False)
    for token in found["spikes"]["tokens"]:
        assert ids[token["sequence"], token["position"]] == token["id"]


def test_batch_size_does_not_change_the_findings(detected):
    one, two = (detected("--n_seq=20", f"--batch_size={n}")[0] for n in (3, 20))

    def close(a, b):
        if isinstance(a, dict):
            return all(close(a[k], b[k]) for k in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(close, a, b))
        return a == pytest.approx(b, rel=1e-3, abs=1e-6) if isinstance(a, float) else a == b

    for key in ("layers", "sinks", "co_occurrence"):
        assert close(
            {**one[key], "tokens": 0} if key == "sinks" else one[key],
            {**two[key], "tokens": 0} if key == "sinks" else two[key],
        )


def test_ablation_findings(cli, trained, tmp_path):
    out, page = tmp_path / "a.json", tmp_path / "p.html"
    code, text, err = cli("ablate.py", trained, "--seq_len=16", "--n_seq=20", f"--json={out}", f"--html={page}")
    assert code == 0, err
    found = json.loads(out.read_text())
    assert found["baseline"]["ppl"] == pytest.approx(np.exp(found["baseline"]["loss"]))
    assert [row["name"] for row in found["interventions"]] == list(interventions.INTERVENTIONS)
    for row in found["interventions"] + found["removals"]:
        for entry in (row, *row["control"]):
            assert entry["delta_loss"] == pytest.approx(entry["loss"] - found["baseline"]["loss"], abs=1e-9)
            assert entry["ci95"][0] <= entry["delta_loss"] <= entry["ci95"][1]
        assert row["control"]
    assert "spike_zero" in page.read_text() and "sink_mask" in text
    assert set(found["probes"]) == {"blimp", "linear"} and "Not probed" in text  # toy ids have no text
    assert found["int8"]["per_tensor"]["delta_loss"] == pytest.approx(
        found["int8"]["per_tensor"]["loss"] - found["baseline"]["loss"], abs=1e-6
    )


def test_ablate_probes_a_model_that_reads_text(cli, tmp_path, monkeypatch):
    import ablate

    model = tiny(vocab_size=257, block_size=64)
    args = dataclasses.asdict(model.config)
    data = {"tokenizer": "byte", "vocab_size": 257, "bos_id": 256, "dtype": "uint16"}
    config = {"dataset": "stdlib", "bos": True}
    content = checkpoint.Checkpoint(args, model.state_dict(), config=config, data=data, step=1)
    checkpoint.save(tmp_path / "ckpt.pt", content)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    rows = [
        {"UID": "u", "field": f, "linguistics_term": "t", "sentence_good": f"{f} {i}", "sentence_bad": f"{i} {f}"}
        for f in ("syntax", "semantics")
        for i in range(12)
    ]
    for name in ("blimp", "ud_ewt"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data/blimp/blimp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, n in (("train", 60), ("test", 30)):
        text = "".join(
            "".join(
                f"{i + 1}\t{w.strip()}\t_\t{t}\t_\t_\t{h + 1}\t{r}\t_\t_\n"
                for i, (w, t, h, r) in enumerate(zip(*s, strict=True))
            )
            + "\n"
            for s in treebank(n)
        )
        (tmp_path / f"data/ud_ewt/{split}.conllu").write_text(text)
    monkeypatch.setattr(ablate, "LAB", dataclasses.replace(ablate.LAB, data=tmp_path / "data"))
    out = ["--seq_len=32", "--n_seq=12", f"--text={tmp_path / 'text.txt'}", f"--json={tmp_path / 'a.json'}"]
    code, text, err = cli("ablate.py", tmp_path / "ckpt.pt", *out, "--only", "spike_zero", "bos_remove")
    assert code == 0, err
    found = json.loads((tmp_path / "a.json").read_text())
    for probe in found["probes"].values():
        names = [condition["name"] for condition in probe["conditions"]]
        assert names == ["none", "bos_remove", "bos_remove/second_token"]  # the model has no spikes
    assert "BLiMP under" in text and "linear probe under" in text
    page = (tmp_path / "report.html").read_text()
    assert "selectivity by layer" in page and "How the accuracy on BLiMP changes" in page
    code, text, _ = cli("ablate.py", tmp_path / "ckpt.pt", *out, "--only", "bos_remove", "--no-probes")
    assert code == 0 and "BLiMP" not in text and "Not probed" not in text
    assert cli("ablate.py", tmp_path / "ckpt.pt", "--only", "spike_zap")[0] == 2


def test_page_is_self_contained_and_escapes_token_text(detected, tmp_path):
    found, _ = detected("--n_seq=20")
    attack = "<script>alert(1)</script>$x$"
    for token in (*found["spikes"]["tokens"], *found["sinks"]["tokens"]):
        token["text"] = token["before"] = attack
    found["checkpoint"]["path"] = attack
    page.detection_page(tmp_path / "evil.html", schema.from_json(Findings, found))
    html = (tmp_path / "evil.html").read_text()
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    links = re.findall(r"(?:src|href)=[\"']?([^\"' >]+)", html)
    assert all(link.startswith(("#", "data:")) for link in links), links
    assert "url(http" not in html and "@import" not in html


MISTAKES = {
    "missing checkpoint": (["nowhere.pt"], "no checkpoint nowhere.pt"),
    "unknown flag": (["{ckpt}", "--seqlen=5"], "unknown argument --seqlen=5 .did you mean --seq_len"),
    "not a number": (["{ckpt}", "--n_seq=many"], "n_seq.*'many' is not a whole number"),
    "zero": (["{ckpt}", "--batch_size=0"], "batch_size"),
    "too long": (["{ckpt}", "--seq_len=17"], "17 tokens is longer than the model's block_size=16"),
    "too short": (["{ckpt}", "--seq_len=2"], "too short"),
    "too many": (["{ckpt}", "--n_seq=100000", "--seq_len=16"], "fewer than the 100000 needed"),
    "unknown data": (["{ckpt}", "--data=nothing"], "no dataset 'nothing'.*--text=FILE"),
    "other vocabulary": (["{ckpt}", "--data=backcopy_like"], "no dataset"),
    "missing text": (["{ckpt}", "--text=nowhere.txt"], "nowhere.txt"),
    "missing tokens": (["{ckpt}", "--tokens=nowhere.npy"], "nowhere.npy"),
    "float tokens": (["{ckpt}", "--tokens={float}"], "not an integer array"),
    "pickled tokens": (["{ckpt}", "--tokens={pickled}"], "cannot read --tokens"),
    "tokens out of vocabulary": (["{ckpt}", "--tokens={large}"], "token 64, outside the vocabulary of 64"),
    "padding between tokens": (["{ckpt}", "--tokens={holed}"], "between tokens"),
    "nothing but padding": (["{ckpt}", "--tokens={padding}"], "sequence of only 0 tokens"),
    "no such device": (["{ckpt}", "--device=tpu"], "tpu"),
    "two sources": (["{ckpt}", "--text=a", "--data=b"], "--data and --text are two texts"),
    "unwritable": (["{ckpt}", "--seq_len=16", "--json=/proc/nowhere/f.json"], "cannot write /proc/nowhere/f.json"),
}


@pytest.mark.parametrize("script", ["detect.py", "ablate.py"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(cli, trained, tmp_path, mistake, script):
    np.save(tmp_path / "float.npy", np.zeros((4, 16)))
    np.save(tmp_path / "large.npy", np.full((4, 16), 64))
    np.save(tmp_path / "holed.npy", np.where(np.arange(16) == 5, -100, np.ones((4, 16), dtype=int)))
    np.save(tmp_path / "padding.npy", np.where(np.arange(4)[:, None] == 1, -100, np.ones((4, 16), dtype=int)))
    np.save(tmp_path / "pickled.npy", np.array([{}]), allow_pickle=True)
    files = {name: tmp_path / f"{name}.npy" for name in ("float", "large", "pickled", "holed", "padding")}
    args, words = MISTAKES[mistake]
    code, _, err = cli(script, *(arg.format(ckpt=trained, **files) for arg in args))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    words = words.replace("100000 needed", "199999 needed") if script == "ablate.py" else words
    assert re.search(words, err), err


def test_broken_weights_are_named(cli, trained, tmp_path):
    content = checkpoint.load(trained)
    for name, value in (("nan", torch.nan), ("zero", 0.0)):
        model = {key: torch.full_like(weight, value) for key, weight in content.model.items()}
        checkpoint.save(tmp_path / f"{name}.pt", dataclasses.replace(content, model=model))
    code, _, err = cli("detect.py", tmp_path / "nan.pt", "--seq_len=16")
    assert code == 2
    assert "not finite" in err
    assert cli("detect.py", tmp_path / "zero.pt", "--seq_len=16")[0] == 0


def test_control_characters_of_tokens_are_shown_not_sent():
    assert visible("a\x1b[31m\n\x00") == "a\\x1b[31m⏎\\x00"


def test_checkpoint_that_is_not_one(cli, tmp_path):
    (tmp_path / "c.pt").write_bytes(b"not a checkpoint")
    torch.save({"model": {}, "model_args": {"n_layers": 3}}, tmp_path / "d.pt")
    for name in ("c.pt", "d.pt"):
        code, _, err = cli("detect.py", tmp_path / name)
        assert code == 2 and name in err and err.count("\n") == 1


@pytest.mark.parametrize("script", ["train.py", "detect.py", "ablate.py", "sample.py", "study.py"])
def test_help(cli, script):
    code, out, _ = cli(script, "--help")
    assert code == 0 and f"python {script}" in out


def test_training_on_an_unprepared_dataset_names_the_command():
    done = subprocess.run(
        [sys.executable, "train.py", "config/postnorm.py", "--dataset=wikitext103", "--out_dir=/tmp/never"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if (ROOT / "data/wikitext103/train.bin").exists():
        pytest.skip("wikitext103 is prepared here")
    assert done.returncode == 2
    assert (
        done.stderr.strip() == "error: dataset 'wikitext103' is not prepared; run: python data/wikitext103/prepare.py"
    )
