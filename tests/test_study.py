"""A study end to end, killed and continued, its statistics against planted numbers, its verdicts on planted tables."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import filelock
import numpy as np
import pytest

import study
from spikesink.errors import UserError
from studies import aggregate, hypotheses, jobs, measures, tables

from .conftest import ROOT, SMALL_RUN

STUDIES = sorted(path.stem for path in (ROOT / "configs" / "studies").glob("*.py"))
CI = "configs/studies/ci.py"


def folders(path):
    return f"--out={path / 'out'}", f"--results={path / 'results'}"


def results_of(path, name="ci"):
    return path / "results" / name


def table_of(path, name="ci"):
    return json.loads((results_of(path, name) / "table.json").read_text())


def without_times(path):
    """table.json and table.md as they are, but for how long it took."""
    table = table_of(path)
    assert set(table.pop("times")) == {"pre-1", "pre-2", "post-1", "post-2"}
    return json.dumps(table), (results_of(path) / "table.md").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the ci study, run without a stop, as a user would; and how long it took."""
    path = tmp_path_factory.mktemp("whole")
    since = time.monotonic()
    subprocess.run([*COMMAND, CI, *folders(path)], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    return path, time.monotonic() - since


COMMAND = [sys.executable, "study.py"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}


def test_the_table_holds_what_is_promised(whole):
    table = table_of(whole[0])
    assert (table["schema"], table["baseline"], list(table["arms"])) == ("spikesink-study-1", "pre", ["pre", "post"])
    assert table["command"] == f"python study.py {CI}"
    for arm in table["arms"].values():
        assert arm["parameters"] > 0 and arm["matched"] and (arm["done"], arm["diverged"]) == (2, 0)
        for row in arm["seeds"]:
            assert (row["status"], row["step"], row["tokens"]) == ("done", 60, 60 * 16 * 32)
            assert set(row["measures"]) >= set(measures.MEASURES)
            assert row["loss"] == row["measures"]["loss"] == row["course"][-1]["loss"]
            assert [point["step"] for point in row["course"]] == [0, 30, 60]
            assert (
                row["course"][0]["loss"] is None and row["course"][0]["measures"]["short loss"] > 4
            )  # nothing learned
            assert set(row["ablations"]["interventions"]) == {"spike_zero", "sink_mask"}
        mean = np.mean([row["loss"] for row in arm["seeds"]])
        assert arm["mean"]["loss"] == {"n": 2, "mean": pytest.approx(mean), "ci95": None}  # two seeds: no interval
    of = {name: {row["seed"]: row["loss"] for row in arm["seeds"]} for name, arm in table["arms"].items()}
    by_seed = [of["post"][seed] - of["pre"][seed] for seed in (1, 2)]
    assert table["arms"]["post"]["difference"]["loss"]["mean"] == pytest.approx(np.mean(by_seed))
    assert table["arms"]["post"]["changes"] == {"norm_place": "post"}
    assert {of["verdict"] for of in table["hypotheses"].values()} <= {"underpowered", "not asked"}


def test_files_of_the_results(whole):
    folder = results_of(whole[0])
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    drawn = {f"figures/{name}.{kind}" for name in ("arms", "course", "plane") for kind in ("svg", "png")}
    logs = {f"logs/{arm}-{seed}.jsonl" for arm in ("pre", "post") for seed in (1, 2)}
    assert names == {"table.json", "table.md", "index.html", "figures/captions.txt"} | drawn | logs
    page = (folder / "index.html").read_text()
    assert "H2: underpowered" in page and not re.search(r"""(src|href)=["']?http|url\(http""", page)
    assert not list((whole[0] / "out").rglob("*.pt"))  # they are large, and measured


def test_regression(whole):
    """Within 3% (and 0.03) of the committed table where the data are the same; 15% where Python's text is another."""
    committed, now = json.loads((ROOT / "results" / "ci" / "table.json").read_text()), table_of(whole[0])
    close = 0.03 if committed["data"] == now["data"] else 0.15
    for name, arm in committed["arms"].items():
        for old, new in zip(arm["seeds"], now["arms"][name]["seeds"], strict=True):
            assert (new["seed"], new["status"], new["step"]) == (old["seed"], old["status"], old["step"])
            for measure in ("loss", "short loss", "top1/median", "largest |h|", "kurtosis", "Sink_1", "first key"):
                assert new["measures"][measure] == pytest.approx(old["measures"][measure], rel=close, abs=close), (
                    measure
                )


def test_killed_at_a_random_moment_it_goes_on_to_the_same_table(whole, tmp_path):
    path, took = whole
    seed = random.randrange(2**32)
    process = subprocess.Popen(
        [*COMMAND, CI, *folders(tmp_path)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list((tmp_path / "out").rglob("job.json")) and process.poll() is None:
        time.sleep(0.01)
    drawn = random.Random(seed)
    time.sleep(drawn.uniform(0, 0.5 * took))
    process.send_signal(drawn.choice([signal.SIGKILL, signal.SIGTERM]))
    process.wait()
    subprocess.run([*COMMAND, CI, *folders(tmp_path)], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert without_times(tmp_path) == without_times(path), f"killed at a moment drawn with seed {seed}"


@pytest.fixture
def small(tmp_path, toy_data):
    """A study file of two arms, one of which cannot but diverge."""
    keys = dict(option.removeprefix("--").split("=") for option in SMALL_RUN)
    keys = {key: value for key, value in keys.items() if key not in jobs.SET_HERE}
    keys |= {"dataset": str(toy_data), "bos": True}
    wild = {"optimizer": "sgd", "learning_rate": 1e30, "grad_clip": 0.0}
    file = tmp_path / "small.py"
    file.write_text(
        f'question = "?"\ncommon = {keys}\nseeds = [1, 2]\narms = {{"calm": {{}}, "wild": {wild}}}\n'
        'hypotheses = ["H1"]\npoints = 2\nn_seq = 4\nseq_len = 16\nablations = []\n'
        'published = {"calm": (None, 1.5, 2)}\n'
    )
    return file


def test_divergence_is_a_result_and_what_is_done_is_not_done_again(small, tmp_path, cli, monkeypatch):
    code, out, err = cli("study.py", small, *folders(tmp_path))
    assert code == 0, err
    table = table_of(tmp_path, "small")
    calm, wild = table["arms"]["calm"], table["arms"]["wild"]
    assert [row["status"] for row in wild["seeds"]] == ["diverged", "diverged"]
    assert all(row["step"] <= 3 and row["lr"] > 1e29 and row["loss"] is None for row in wild["seeds"])
    assert (wild["done"], wild["diverged"], wild["mean"], calm["done"]) == (0, 2, {}, 2)
    assert "| –, 1.5, 2 |" in (results_of(tmp_path, "small") / "table.md").read_text()
    assert "2 done, 2 diverged" in out and "diverged at learning rate" in tables.markdown(table)

    def refuse(*args):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(study, "trained", refuse)
        assert cli("study.py", small, *folders(tmp_path))[0] == 0
        assert table_of(tmp_path, "small") == table
        elsewhere = f"--out={tmp_path / 'elsewhere'}", f"--results={tmp_path / 'results'}"
        assert cli("study.py", small, *elsewhere, "--extend")[0] == 0
        assert table_of(tmp_path, "small") == table
        with pytest.raises(AssertionError, match="trained again"):
            cli("study.py", small, *elsewhere, "--extend", "--seeds=1,2,3")
        code, _, err = cli("study.py", small, *elsewhere, "--extend", "--seeds=3")
        assert code == 2 and "holds 4 runs that are not asked for, calm-1 the first" in err
        assert table_of(tmp_path, "small") == table
        patch.setattr(study, "code_version", lambda: "other code")
        assert cli("study.py", small, *folders(tmp_path), "--keep_code")[0] == 0
        kept = table_of(tmp_path, "small")
        assert kept["code"] == "other code" != kept["arms"]["calm"]["seeds"][0]["code"] == table["code"]
        with pytest.raises(AssertionError, match="trained again"):
            cli("study.py", small, *folders(tmp_path))
    some = ("--arms=calm", "--seeds=2", "--max_iters=4", "--name=x", "--keep_checkpoints")
    code, out, err = cli("study.py", small, *folders(tmp_path), *some)
    assert code == 0, err
    kept = (tmp_path / "out" / "x" / "calm-2").glob("ckpt-*.pt")
    assert [path.name for path in sorted(kept)] == [f"ckpt-{step:08d}.pt" for step in (0, 2, 4)]
    row = table_of(tmp_path, "x")["arms"]["calm"]["seeds"][0]
    assert (row["seed"], row["step"]) == (2, 4)


def test_what_another_process_trains_is_left_alone(small, tmp_path, cli):
    folder = tmp_path / "out" / "small" / "calm-1"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text('{"job": "of other keys"}')
    with filelock.FileLock(folder / ".lock"):
        code, _, err = cli("study.py", small, *folders(tmp_path))
        assert code == 2 and "another study trains in" in err and (folder / "job.json").is_file()


def test_ranks_share_the_runs_out(small, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "study.py"]
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(small), *folders(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [row for arm in table_of(tmp_path, "small")["arms"].values() for row in arm["seeds"]]
    assert [row["status"] for row in rows] == ["done", "done", "diverged", "diverged"]


def test_the_hash_of_the_code_is_of_what_it_does():
    code = 'def f(a):\n    """Doc."""\n    return a + 1  # why\n'
    assert jobs.statements(code) == jobs.statements('"""Module."""\n\n\ndef f(\n    a,\n):\n    return (a + 1)')
    assert jobs.statements(code) != jobs.statements(code.replace("+ 1", "+ 2"))


def test_a_run_that_another_study_has_done_is_not_done_again(whole):
    path = whole[0]
    rows = [path / "out" / name / "pre-2" / "row.json" for name in ("ci", "second")]
    argv = [*COMMAND, CI, *folders(path), "--name=second", "--arms=pre", "--seeds=2,3"]
    subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert rows[0].read_bytes() == rows[1].read_bytes()  # with how long it took
    logs = [results_of(path, name) / "logs" / "pre-2.jsonl" for name in ("ci", "second")]
    assert logs[0].read_bytes() == logs[1].read_bytes()
    assert [row["status"] for row in table_of(path, "second")["arms"]["pre"]["seeds"]] == ["done", "done"]
    assert (
        json.loads((path / "out" / "second" / "pre-3" / "row.json").read_text())["weights"]
        != json.loads(rows[0].read_text())["weights"]
    )


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_resolves(name, cli, tmp_path):
    code, out, err = cli("study.py", f"configs/studies/{name}.py", "--dry", "--warmup=0", *folders(tmp_path))
    assert code == 0, err
    assert "left: " in out and "not measured" in out and not list(tmp_path.iterdir())


def test_dry_measures(small, cli, tmp_path):
    code, out, err = cli("study.py", small, "--dry", "--warmup=1", "--arms=calm", *folders(tmp_path))
    assert code == 0, err
    assert "hours of training one run" in out and not (tmp_path / "out").exists()


def test_an_arm_keeps_what_it_says_and_nothing_else_differs(tmp_path):
    asked = jobs.read_study("configs/studies/optimiser.py", {})
    planned = jobs.plan(asked, tmp_path, {"learning_rate": "1e-3", "max_iters": "100"}, "code")
    by_arm = {job.arm: job.cfg for job in planned}
    assert (by_arm["adamw"].learning_rate, by_arm["lr_quarter"].learning_rate, by_arm["muon"].max_iters) == (
        1e-3,
        5e-4,
        100,
    )
    assert len({job.what for job in planned}) == len(planned) == 3 * len(asked.arms)
    assert [job.seed for job in planned[: len(asked.arms)]] == [1] * len(
        asked.arms
    )  # what is done first can be compared
    own = [jobs.settings(job.model, job.cfg) for job in planned if job.arm in ("adamw", "decay_0")][:2]
    assert {key for key in own[0] if own[0][key] != own[1][key]} == {"weight_decay"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["configs/studies/norms.py"], "did you mean studies/norm"),
        (["configs/postnorm.py"], "is no study"),
        ([CI, "--max_itres=3"], "did you mean max_iters"),
        ([CI, "--arms=pro"], "did you mean pre"),
        ([CI, "--seed=3"], "seed is set by the study"),
        ([CI, "--seeds=3,3"], "twice"),
        ([CI, "--seq_len=65"], "more than block_size"),
        ([CI, "--seq_len=7"], "must be at least 8"),
        ([CI, "--n_seq=1_000_000"], "fewer than the 1999999"),
        (["configs/studies/optimiser.py", "--dataset=backcopy", "--weight_decay=0"], "adamw and decay_0 are the same"),
        (["configs/studies/emergence.py", "--dataset=backcopy", "--out=/dev/null/x"], "cannot write /dev/null/x"),
        ([CI, "--init_from=gpt2"], "trains from scratch"),
        ([CI, "--hypotheses=H9"], "no 'H9'"),
        ([CI, "scale/nano"], "unknown argument"),
        ([CI, "--common=3"], "write it into the study file"),
        ([CI, "--extend"], "is no table of study.py"),
    ],
)
def test_mistakes_are_one_line(arguments, words, cli, tmp_path):
    code, out, err = cli("study.py", *folders(tmp_path), *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err


# ------------------------------------------------------------------------------------------------- statistics


def test_intervals_cover_what_they_say():
    """Of 2000 studies of three seeds: t has the mean in 95% of its intervals, a percentile bootstrap in far fewer."""
    rng = np.random.default_rng(0)
    draws = rng.normal(3.0, 2.0, (2000, 3))
    inside = lambda ci: ci[0] <= 3.0 <= ci[1]
    t = np.mean([inside(aggregate.interval(row)["ci95"]) for row in draws])
    boots = [row[rng.integers(0, 3, (200, 3))].mean(1) for row in draws]
    bootstrap = np.mean([inside(np.quantile(b, [0.025, 0.975])) for b in boots])
    assert abs(t - 0.95) < 0.015 and bootstrap < 0.85
    logs = np.mean([inside([math.log(x) for x in aggregate.interval(np.exp(row), "log")["ci95"]]) for row in draws])
    assert abs(logs - 0.95) < 0.015


def test_p_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(0)
    p = np.array([aggregate.chance(row) for row in rng.normal(0.0, 1.0, (2000, 4))])
    assert abs((p < 0.05).mean() - 0.05) < 0.015 and abs(np.median(p) - 0.5) < 0.05
    assert aggregate.chance([1.0, 2.0]) is None
    assert (aggregate.chance([1.0, 1.0, 1.0]), aggregate.chance([0.0, 0.0, 0.0])) == (0.0, 1.0)


def test_intervals_by_hand():
    found = aggregate.interval([1.0, 2.0, 3.0, None])
    half = 4.302652729911275 / math.sqrt(3)  # t of 2 degrees of freedom
    assert found == {"n": 3, "mean": 2.0, "ci95": pytest.approx([2 - half, 2 + half])}
    assert aggregate.interval([0.9, 1.0, 0.95], "share")["ci95"][1] == 1.0
    assert aggregate.interval([1.0, 100.0], "log") == {"n": 2, "mean": pytest.approx(10.0), "ci95": None}
    assert aggregate.interval([0.0, 100.0, 10.0], "log") == {"n": 3, "mean": 0.0, "ci95": None}
    assert aggregate.interval([None]) == {"n": 0, "mean": None, "ci95": None}
    assert tables.cell(aggregate.interval([0.25, None, None]), "Sink_1", 3) == "25.0% (1 of 3)"
    base = {1: 10.0, 2: 20.0, 3: 40.0, 4: 7.0}
    assert aggregate.paired({s: 2 * x for s, x in base.items() if s < 4}, base, "log")["ci95"] == pytest.approx([2, 2])
    assert aggregate.paired({1: 11.0, 2: 21.0, 3: None}, base)["mean"] == 1.0
    shares = aggregate.paired({1: 0.0, 2: 0.1, 3: 0.0}, {1: 0.7, 2: 1.0, 3: 1.0}, "share")
    assert shares["mean"] == pytest.approx(-2.6 / 3) and shares["ci95"][0] == -1.0


def run_of(seed, loss, course=(), **numbers):
    """A planted row; `course`: losses at steps 10, 20, ..., the last of them the run's own."""
    values = {"loss": loss, **numbers}
    points = [{"step": 10 * (i + 1), "loss": x, "measures": {**values, "loss": x}} for i, x in enumerate(course)]
    verdicts = {"spike": "present", "sink": "present", "co_occurrence": "present"}
    return {"seed": seed, "status": "done", "step": 10 * len(points), "loss": loss, "measures": values} | {
        "course": points,
        "verdicts": verdicts,
    }


def test_at_equal_loss_the_better_run_is_taken_earlier():
    good, bad = run_of(1, 1.0, (3.0, 2.0, 1.5, 1.0)), run_of(1, 1.9, (4.0, 3.0, 2.5, 1.9))
    assert [point["step"] for point in aggregate.at_equal_loss(good, bad)] == [30, 40]
    assert [point["step"] for point in aggregate.at_equal_loss(bad, good)] == [40, 30]
    equal, at = aggregate.compare([bad], [good])
    assert equal["loss"]["mean"] == pytest.approx(0.9)
    assert (at["step"], at["baseline_step"], at["measures"]["loss"]["mean"]) == (40, 30, pytest.approx(0.4))


def test_onset_is_where_it_stays():
    course = [{"step": s, "measures": {"best head": x}} for s, x in ((0, 0.0), (1, 0.9), (2, None), (3, 0.6), (4, 1.0))]
    assert aggregate.onset(course, "best head") == 3
    assert aggregate.onset(course[:3], "best head") is None


def test_interactions_are_what_is_beyond_the_sum():
    arm = lambda changes, values: {
        "changes": changes,
        "seeds": [run_of(s, x, **{"kurtosis": math.exp(x)}) for s, x in enumerate(values)],
    }
    arms = {
        "base": arm({}, (1.0, 2.0, 3.0)),
        "a": arm({"norm_place": "post"}, (1.5, 2.5, 3.5)),
        "b": arm({"gate": "head"}, (0.8, 1.8, 2.8)),
        "ab": arm({"norm_place": "post", "gate": "head"}, (2.3, 3.3, 4.3)),
    }
    found = aggregate.interactions(arms, "base")
    assert list(found) == ["a and b"]
    assert found["a and b"]["loss"]["mean"] == pytest.approx(1.0)
    assert found["a and b"]["kurtosis"]["mean"] == pytest.approx(math.e)


# --------------------------------------------------------------------------------------------------- verdicts


def planted(arms, asked=("H1", "H2", "H3", "H4", "H5", "H6", "H7")):
    """A table of three seeds per arm from {arm: (changes, {measure: mean})}; the seeds lie 1% about the mean."""
    made, base = {}, next(iter(arms))
    for name, (changes, numbers) in arms.items():
        seeds = [
            run_of(seed, 1.0, (1.0,), **{m: x * (1 + 0.01 * (seed - 2)) for m, x in numbers.items()})
            for seed in (1, 2, 3)
        ]
        made[name] = {"changes": changes, "seeds": seeds, **aggregate.arm_summary(seeds)}
    for arm in made.values():
        if arm is not made[base]:
            arm["difference"], arm["equal_loss"] = aggregate.compare(arm["seeds"], made[base]["seeds"])
    config = {"norm_place": "pre"}
    return {"arms": made, "baseline": base, "asked": asked, "config": config, "measured": {"seq_len": 64}}


PRE = {
    "spike tokens": 0.002,
    "sink tokens": 0.005,
    "P(sink | spike)": 0.9,
    "spike_zero: loss": 0.04,
    "spike_zero: control loss": 0.0,
    "short loss": 1.0,
    "BLiMP": 0.7,
    "sink_mask: BLiMP": -0.1,
    "spikes first": 0.1,
    "spikes punctuation": 0.9,
    "sinks first": 0.9,
    "percentile sequences": 0.9,
    "percentile false": 0.01,
    "share sequences": 0.9,
    "share false": 0.01,
    "top1/median": 100.0,
    "Sink_1": 0.5,
}
POST = {"norm_place": "post"}, {**PRE, "P(sink | spike)": 0.05}
RELU = {"activation": "relu"}, {**PRE, "top1/median": 200.0}


def verdicts(table):
    return {name: of["verdict"] for name, of in hypotheses.judge(table).items()}


def test_verdicts_where_all_is_as_claimed():
    table = planted({"pre": ({}, PRE), "post": POST, "relu": RELU})
    assert verdicts(table) == dict.fromkeys(hypotheses.HYPOTHESES, "supported")
    for of in hypotheses.judge(table).values():
        assert any(c.isdigit() for c in of["reason"]) and of["rule"]


OTHERWISE = {
    "H1": {"spike tokens": 0.02},
    "H2": {"P(sink | spike)": 0.5},
    "H3": {"spike_zero: loss": 0.2},
    "H4": {"sink_mask: BLiMP": -0.001},
    "H5": {"spikes first": 0.95, "spikes punctuation": 0.1},
    "H6": {"percentile false": 0.8},
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_verdicts_where_it_is_not(name):
    pre = {**PRE, **OTHERWISE[name]}
    assert verdicts(planted({"pre": ({}, pre), "post": POST, "relu": RELU}))[name] == "contradicted"


def test_h7_is_contradicted_by_arms_that_are_alike():
    assert verdicts(planted({"pre": ({}, PRE), "relu": ({"activation": "relu"}, PRE)}))["H7"] == "contradicted"


def test_verdicts_without_evidence():
    arms = {"pre": ({}, PRE), "post": POST, "relu": RELU}
    table = planted(arms)
    for arm in table["arms"].values():
        arm["verdicts"]["spike"] = {"underpowered": 3}  # absence is no evidence
    assert {verdicts(table)[name] for name in ("H1", "H2", "H3", "H4", "H5")} == {"underpowered"}
    table = planted(arms)
    for arm in table["arms"].values():
        arm["seeds"] = arm["seeds"][:2]
        arm |= aggregate.arm_summary(arm["seeds"])
    table["arms"]["relu"]["difference"], _ = aggregate.compare(
        table["arms"]["relu"]["seeds"], table["arms"]["pre"]["seeds"]
    )
    assert set(verdicts(table).values()) == {"underpowered"}
    assert verdicts(planted({"pre": ({}, PRE)}))["H2"] == "not asked"
    assert set(verdicts(planted(arms, asked=())).values()) == {"not asked"}


# ------------------------------------------------------------------------------------------------ RESULTS.md


def test_results_say_what_the_tables_hold():
    """RESULTS.md is made of its template and the committed tables; its prose has no measured number of its own."""
    from studies import write_results as write

    assert (ROOT / "RESULTS.md").read_text() == write.render()
    prose = re.sub(r"\{[^{}]+\}|```.*?```", "", write.TEMPLATE.read_text(), flags=re.DOTALL)
    published = re.compile(r"(Beside|took both|as in Sun).*?\)", re.DOTALL)
    allowed = {"0.3", "0.2%", "0.5%", "80%", "10%", "3 to 5%", "95%", "99.9", "1.56%"}  # rules and claims
    found = set(re.findall(r"\d+\.\d+%?|\d+%", published.sub("", prose)))
    assert found <= allowed | {"5%"}, found - allowed


def test_a_field_that_names_nothing_is_refused():
    from studies import write_results as write

    with pytest.raises(UserError, match="no_such_arm"):
        write.filled("ci; no_such_arm; loss", {"ci": json.loads((ROOT / "results/ci/table.json").read_text())})
