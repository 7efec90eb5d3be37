"""A study end to end, killed and continued, its statistics against planted numbers, its verdicts on planted tables."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import filelock
import numpy as np
import pytest

import study
from benchmarks import coverage
from model import GPTConfig
from spikesink import schema
from spikesink.errors import UserError
from studies import aggregate, hypotheses, jobs, tables
from studies.aggregate import Estimate
from studies.runs import measures, rows, run
from studies.table import Arm, Conditions, Table, load_table
from train import TrainConfig

from .conftest import ROOT, SMALL_RUN
from .test_house import MODULES, imports_of

STUDIES = sorted(path.stem for path in (ROOT / "configs" / "studies").glob("*.py"))
STUDIES.remove("mitigate")  # starts from a checkpoint: test_mitigate.py
CI = "configs/studies/ci.py"


def folders(path):
    return f"--out={path / 'out'}", f"--results={path / 'results'}"


def results_of(path, name="ci"):
    return path / "results" / name


def table_of(path, name="ci"):
    return json.loads((results_of(path, name) / "table.json").read_text())


RUNS = {"pre-1", "pre-2", "post-1", "post-2"}


def without_times(path):
    """table.json and table.md as they are, but for how long it took."""
    table = table_of(path)
    assert set(table.pop("times")) == RUNS
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
    assert (table["schema"], table["baseline"], list(table["arms"])) == ("spikesink-study-2", "pre", ["pre", "post"])
    assert table["command"] == f"python study.py {CI}"
    for arm in table["arms"].values():
        assert arm["parameters"] > 0 and len(arm["seeds"]) == 2
        for row in arm["seeds"]:
            assert (row["status"], row["step"], row["tokens"]) == ("done", 60, 60 * 16 * 32)
            assert set(row["measures"]) >= set(measures.MEASURES)
            assert row["loss"] == row["measures"]["loss"] == row["course"][-1]["loss"]
            assert [point["step"] for point in row["course"]] == [0, 30, 60]
            assert (
                row["course"][0]["loss"] is None and row["course"][0]["measures"]["short loss"] > 4
            )  # nothing learned
            assert set(row["ablations"]["interventions"]) == {"spike_zero", "sink_mask"}
    assert table["arms"]["post"]["changes"] == {"norm_place": "post"} and table["planned"] == [["post", "loss"]]
    read = load_table(results_of(whole[0]) / "table.json")
    losses = [row.loss for row in read.base.seeds]
    assert read.base.measures["loss"] == Estimate(tuple(losses), pytest.approx(np.mean(losses)), None)  # no interval
    by_seed = [x.loss - y for x, y in zip(read.arms["post"].seeds, losses, strict=True)]
    assert read.differences["post"]["loss"].values == pytest.approx(by_seed)
    assert {of.verdict for of in hypotheses.judge(read).values()} <= {"cannot tell", "not asked"}
    text = (results_of(whole[0]) / "table.md").read_text()
    assert " ".join(f"{loss:.4f}" for loss in losses) in text and "2 have it" in text
    assert not re.search(r"\[[-+.\d%]+, [-+.\d%]+\]", text.partition("## Notes")[0])  # an interval


def test_files_of_the_results(whole):
    folder = results_of(whole[0])
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    drawn = {f"figures/{name}.{kind}" for name in ("arms", "course", "plane") for kind in ("svg", "png")}
    assert names == {"table.json", "table.md"}
    folder = whole[0] / "out" / "ci"
    made = {"job.json", "log.jsonl", "detect.json", "course.json", "ablate.json", "row.json"}
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"index.html", "figures/captions.txt"} | drawn <= names
    assert {f"{run}/{name}" for run in RUNS for name in made} <= names
    page = (folder / "index.html").read_text()
    assert "H2: cannot tell" in page and not re.search(r"""(src|href)=["']?http|url\(http""", page)
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
    assert [row["status"] for row in calm["seeds"]] == ["done", "done"]
    assert "| –, 1.5, 2 |" in (results_of(tmp_path, "small") / "table.md").read_text()
    assert (
        "2 done, 2 diverged" in out
        and "diverged at learning rate" in (results_of(tmp_path, "small") / "table.md").read_text()
    )

    def refuse(*args):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(run, "train_run", refuse)
        assert cli("study.py", small, *folders(tmp_path))[0] == 0
        assert table_of(tmp_path, "small") == table
        elsewhere = f"--out={tmp_path / 'elsewhere'}", f"--results={tmp_path / 'results'}"
        assert cli("study.py", small, *elsewhere, "--extend")[0] == 0
        assert table_of(tmp_path, "small") == table
        small.write_text(small.read_text() + 'contrasts = [("wild", "loss")]\n')  # after the runs: not planned
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


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the source alone."""
    path = tmp_path_factory.mktemp("clone")
    for folder in ("data", "trainer", "spikesink", "studies"):
        shutil.copytree(ROOT / folder, path / folder, ignore=lambda at, names: [n for n in names if n.endswith(".bin")])
    for script in jobs.SCRIPTS:
        shutil.copy(ROOT / script, path / script)
    return path


CODE = (
    *("model.py", "train.py", "detect.py", "ablate.py", "study.py", "data/loader.py", "trainer/machine.py"),
    *("spikesink/hooks.py", "spikesink/api.py", "spikesink/text/sequences.py", "spikesink/models/subject.py"),
    *("spikesink/measure/observe.py", "spikesink/measure/monitor.py", "spikesink/edit/interventions.py"),
    *("studies/runs/run.py", "studies/runs/measures.py", "trainer/new.py", "spikesink/edit/new.py"),
)
SHOWS = (
    *("spikesink/show/report.py", "studies/tables.py", "studies/hypotheses.py", "studies/aggregate.py"),
    *("data/text/prepare.py", "data/text/new.py", "new.py", "studies/new.py"),
)


@pytest.mark.parametrize("file", CODE + SHOWS)
def test_the_hash_of_the_code_is_of_the_folders_that_numbers_depend_on(clone, file):
    path, before = clone / file, jobs.code_version(clone)
    assert before == jobs.code_version()
    source = path.read_text() if path.exists() else ""
    path.write_text(source + "\nadded = 1  # a statement\n")
    assert (jobs.code_version(clone) != before) == (file in CODE)
    path.write_text(source + "\n# a comment\n") if source else path.unlink()
    assert jobs.code_version(clone) == before


def test_the_hash_of_the_code_is_of_all_that_a_run_imports():
    """The imports at the head of modules, followed from what trains and measures a run, but for those of the commands,
    which print what they find: detect.py is asked for its LAB alone."""
    hashed = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in jobs.hashed_files()}
    hashed = {name.removesuffix(".__init__") for name in hashed}
    seen, left = set(), ["studies.runs.run"]
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += imports_of(name, MODULES[name].body) if name != "spikesink.commands" else []
    assert len(seen) > 30 and {"model", "data.loader", "spikesink.measure.metrics"} <= seen <= hashed


def test_a_run_that_another_study_has_done_is_not_done_again(whole):
    path = whole[0]
    rows = [path / "out" / name / "pre-2" / "row.json" for name in ("ci", "second")]
    argv = [*COMMAND, CI, *folders(path), "--name=second", "--arms=pre", "--seeds=2,3"]
    subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert rows[0].read_bytes() == rows[1].read_bytes()  # with how long it took
    logs = [path / "out" / name / "pre-2" / "log.jsonl" for name in ("ci", "second")]
    assert logs[0].read_bytes() == logs[1].read_bytes()
    assert [row["status"] for row in table_of(path, "second")["arms"]["pre"]["seeds"]] == ["done", "done"]
    assert (
        json.loads((path / "out" / "second" / "pre-3" / "row.json").read_text())["weights"]
        != json.loads(rows[0].read_text())["weights"]
    )


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_resolves(name, cli, tmp_path):
    on_text = name in ("rates", "placement", "clip_levels", "levers", "octave", "octave_rates")  # it is not here
    size = ["--scale=scale/toy"] * on_text
    code, out, err = cli("study.py", f"configs/studies/{name}.py", "--dry", "--warmup=0", *size, *folders(tmp_path))
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
    assert len({job.config_hash for job in planned}) == len(planned) == 8 * len(asked.arms)
    assert [job.seed for job in planned[: len(asked.arms)]] == [1] * len(
        asked.arms
    )  # what is done first can be compared
    own = [jobs.settings(job.model, job.cfg) for job in planned if job.arm in ("adamw", "decay_0")][:2]
    assert {key for key in own[0] if own[0][key] != own[1][key]} == {"weight_decay"}


def test_new_keys_and_names_leave_the_hash_of_other_runs_alone():
    """A key of NEWER counts where it is used; what was renamed counts by its old name."""
    of = lambda **keys: jobs.hashed_settings(jobs.settings(GPTConfig(), TrainConfig(**keys)), 1e-3)
    assert of().keys() >= {"penalty", "penalty_weight"} and not of().keys() & set(jobs.NEWER)
    one, two = of(losses={"kurtosis": 0.5}), of(losses={"kurtosis": 0.5, "load_balance": 0.1})
    assert {key for key in one if one[key] != of()[key]} == {"penalty", "penalty_weight"} and "losses" not in one
    assert two["losses"] == {"kurtosis": 0.5, "load_balance": 0.1}
    assert of(lr_schedule="wsd")["lr_schedule"] == "constant_linear"


def test_one_grammar():
    spaced = [
        "x.py",
        "--seeds",
        "1,2",
        "--probes",
        "--no-compile",
        "--max_iters",
        "3",
        "--out",
        "o",
        "--extend",
        "--keep_code",
    ]
    joined = [
        "x.py",
        "--seeds=1,2",
        "--probes=true",
        "--compile=false",
        "--max_iters=3",
        "--out=o",
        "--extend",
        "--keep_code",
    ]
    found = [study.parse_argv(argv) for argv in (spaced, joined, [*spaced[1:], "x.py"], [*joined[1:], "x.py"])]
    typed = [
        (asked, of_study, {key: str(x).lower() for key, x in of_runs.items()}) for asked, of_study, of_runs in found
    ]
    assert typed == [typed[0]] * 4
    asked, of_study, of_runs = typed[0]
    assert (asked.study, asked.name, asked.out) == ("x.py", "x", "o")
    assert (asked.extend, asked.keep_code, asked.dry) == (True, True, False)
    assert of_study == {"seeds": [1, 2], "probes": True} and of_runs == {"compile": "false", "max_iters": "3"}
    assert (
        asked.command == "python study.py x.py --seeds=1,2 --probes=true --compile=false --max_iters=3 --keep_code=true"
    )
    with pytest.raises(UserError, match="--probes no: write --probes=no"):
        study.parse_argv(["x.py", "--probes", "no"])


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
        ([CI, "--init_from=gpt2"], "there is no checkpoint gpt2"),
        ([CI, "--hypotheses=H9"], "no 'H9'"),
        ([CI, "scale/nano"], f"one study is run, not {CI} scale/nano"),
        ([], "one study is run, not none"),
        ([CI, "--warmup=-1"], "warmup=-1 must be 0 or more"),
        ([CI, "--common=3"], "write it into the study file"),
        ([CI, "--contrasts=post"], "write it into the study file"),
        ([CI, "--extend"], "without --extend a new table is made"),
        ([CI, "--seeds"], "--seeds needs a value"),
        ([CI, "--max_iters", "--dry"], "--max_iters needs a value"),
        ([CI, "--seed", "3"], "seed is set by the study"),
        ([CI, "--keep_cod"], "did you mean keep_code"),
    ],
)
def test_mistakes_are_one_line(arguments, words, cli, tmp_path):
    code, out, err = cli("study.py", *folders(tmp_path), *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err


@pytest.mark.parametrize(
    ("contrast", "words"),
    [
        (("wilf", "loss"), "did you mean wild"),
        (("calm", "loss"), "an arm other than the baseline"),
        (("wild", "Sink_2"), "mean Sink_1"),
    ],
)
def test_a_planned_contrast_that_names_nothing_is_one_line(small, contrast, words, cli, tmp_path):
    small.write_text(small.read_text() + f"contrasts = [{contrast}]\n")
    code, out, err = cli("study.py", small, *folders(tmp_path), "--dry", "--warmup=0")
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err


def test_contrasts_make_no_other_runs(tmp_path):
    asked = jobs.read_study(CI, {})
    other = dataclasses.replace(asked, contrasts=[])
    assert asked.contrasts and jobs.plan(asked, tmp_path, {}, "code") == jobs.plan(other, tmp_path, {}, "code")
    assert jobs.read_study(CI, {"arms": ["pre"]}).contrasts == []


# ------------------------------------------------------------------------------------------------- statistics


def test_intervals_by_hand():
    few = aggregate.estimate([1.0, 2.0, 3.0, None])
    assert few == Estimate((1.0, 2.0, 3.0), 2.0, None)
    assert aggregate.estimate([None]) == Estimate((), None, None)
    assert tables.cell(few, "loss", 4) == "1.0000 2.0000 3.0000 (3 of 4)"
    six = aggregate.estimate([0.0, 0.9, 1.0, 0.95, 1.0, 0.9])
    assert (six.middle, six.ci95) == (pytest.approx(0.925), (0.0, 1.0))
    assert tables.cell(six, "best head", 7) == "92% [0%, 100%] (6 of 7)"
    assert aggregate.median_interval(range(10)) == (1, 8) and aggregate.median_interval(range(5)) is None
    assert aggregate.mover(range(6), range(6)) == pytest.approx((-math.hypot(2.5, 2.5), math.hypot(2.5, 2.5)))


def test_differences_pair_only_where_arms_start_as_one_function():
    base = {seed: 10.0 * seed for seed in range(1, 9)}
    more = {seed: x + seed / 10 for seed, x in base.items()}
    apart, paired = (aggregate.difference(more, base, same_start=same) for same in (False, True))
    assert not apart.paired and apart.ci95[0] < -20 and apart.middle == pytest.approx(0.45)
    assert paired.paired and paired.ci95 == pytest.approx((0.1, 0.8))  # from the least to the largest
    assert not aggregate.difference({s: more[s] for s in range(1, 8)}, base, same_start=True).paired  # seven seeds
    factor = aggregate.difference({s: 2 * x for s, x in base.items()}, base, "log")
    assert factor.middle == pytest.approx(2) == pytest.approx(math.sqrt(factor.ci95[0] * factor.ci95[1]))
    assert aggregate.difference({1: 0.0}, base, "log") is None


def test_p_by_hand():
    low, high = ({seed: x + seed / 100 for seed in range(6)} for x in (0.0, 1.0))
    assert aggregate.p_value(low, high) == pytest.approx(2 / math.comb(12, 6))
    assert aggregate.p_value(dict(list(low.items())[:5]), high) is None
    same = dict.fromkeys(range(8), 1.0)
    assert aggregate.p_value(same, same) is None and aggregate.p_value(same, same, same_start=True) is None
    assert aggregate.p_value(same, dict.fromkeys(range(8), 0.0)) == pytest.approx(2 / math.comb(16, 8))
    steps = {seed: 1.0 + seed / 10 for seed in range(8)}
    assert aggregate.p_value(steps, same | {0: 0.5}, same_start=True) == pytest.approx(2 / 2**8)
    assert aggregate.holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.04, None, 0.09, 0.09])  # 4 x, 3 x, no less


def test_coverage_and_size():
    """Coarsely what results/coverage.md has finely. It can fail: Student's t does."""
    found = coverage.simulate("Over seeds", 1000, (6,))
    assert all(by_n[6][0] >= 0.94 for what in ("interval", "difference") for by_n in found[what].values())
    tests = {**found["test"], **found["any of 4 tests, by Holm"]}
    assert all(by_n[6][0] is None or by_n[6][0] <= 0.13 for by_n in tests.values())
    assert found["test"]["all 4"][6] == [None, 0.0]
    assert found["not used: Student's t (of shares clipped)"]["plain, 10% fail"][6][0] < 0.7
    assert coverage.simulate("Over sequences", 400, (24,))["wilson"]["0 or 1, 60%"][24][0] >= 0.85


def run_of(seed, loss, course=(), **numbers):
    """A planted row; `course`: losses at steps 10, 20, ..., the last of them the run's own."""
    values = {"loss": loss, **numbers}
    points = [rows.Point(10 * (i + 1), 100 * (i + 1), x, {**values, "loss": x}) for i, x in enumerate(course)]
    return rows.Done(
        **{"seed": seed, "job": "j", "code": "c", "status": rows.DONE, "lr": None, "loss": loss, "weights": "w"},
        **{"step": 10 * len(points), "tokens": 100 * len(points), "machine": "here", "torch": "2", "measures": values},
        **{
            "course": points or [rows.Point(0, 0, None, {"short loss": loss})],
            "verdicts": dict.fromkeys(("spike", "sink", "co_occurrence"), "present"),
        },
        **{"ablations": rows.Ablations(), "where": rows.Where({}, {})},
    )


def arm_of(changes, seeds):
    """A planted arm."""
    return Arm(configs="", changes=changes, parameters=1, flops_per_token=1, tokens=1, seeds=seeds)


def test_at_equal_loss_the_better_run_is_taken_where_it_comes_down_to_it():
    good, bad = run_of(1, 1.0, (3.0, 2.0, 1.5, 1.0)), run_of(1, 1.9, (4.0, 3.0, 2.5, 1.9))
    for i, x in enumerate((10.0, 20.0, 80.0, 100.0)):
        good.course[i].measures["kurtosis"] = x
    found, end = aggregate.at_equal_loss(good, bad)
    assert (found.step, found.loss, end) == (22, 1.9, bad)  # a fifth of the way from 2.0 to 1.5
    assert found.measures["kurtosis"] == pytest.approx(20 * 4**0.2)  # of its logarithm
    assert aggregate.at_equal_loss(bad, good) == (end, found)
    again = run_of(1, 1.0, (1.8, 2.4, 1.5, 1.0))  # came down to it twice
    assert aggregate.at_equal_loss(again, bad)[0].step == 26
    late = run_of(1, 1.5, (None, 1.7, 1.6, 1.5))  # no checkpoint above 1.9
    assert aggregate.at_equal_loss(late, bad) is None
    near = run_of(1, 1.895, (None, 1.897, 1.896, 1.895))
    assert aggregate.at_equal_loss(near, bad) == (near, bad)


def test_what_is_not_matched_is_in_no_number():
    base = [run_of(seed, 1.9, (4.0, 1.9), kurtosis=10.0) for seed in (1, 2)]
    arm = [run_of(1, 1.5, (None, 1.5), kurtosis=90.0), run_of(2, 1.8, (2.0, 1.8), kurtosis=20.0)]
    table = planted_of({"pre": arm_of({}, base), "post": arm_of({"norm_place": "post"}, arm)})
    found = table.equal_loss["post"]
    assert (found.matched, found.pairs, found.measures["kurtosis"].values) == (1, 2, pytest.approx((2.0,)))
    assert tables.equal_loss_rows(table)[1][0][:4] == ["post", "1 of 2", "15", "20"]
    table = planted_of({"pre": arm_of({}, base[:1]), "post": arm_of({"norm_place": "post"}, arm[:1])})
    assert set(tables.equal_loss_rows(table)[1][0][4:]) == {"not matched"}


def test_what_still_moves():
    course = lambda *values: [rows.Point(10 * (i + 1), 1, 2.0, {"Sink_1": x}) for i, x in enumerate(values)]
    risen = course(*[0.1] * 8, 0.2, 0.4)
    assert aggregate.last_tenth(risen, "Sink_1") == (0.2, 0.4) and aggregate.moves(0.2, 0.4, "share")
    assert aggregate.last_tenth(course(0.1, 0.4), "Sink_1") is None  # no checkpoint late enough
    pairs = ((1.0, 1.04), (1.0, 0.9), (0.0, 0.0), (0.0, 0.1))
    assert [aggregate.moves(*pair, "log") for pair in pairs] == [False, True, False, True]
    assert aggregate.moves(4.0, 3.98, "plain") and not aggregate.moves(4.0, 3.995, "plain")
    still = run_of(1, 2.0, [2.0] * 10, Sink_1=0.4)
    table = planted_of({"pre": arm_of({}, [dataclasses.replace(still, course=risen)]), "post": arm_of({}, [still])})
    assert tables.still_moving(table) == "Still moving at the end: Sink_1 in pre."


def test_onset_is_where_it_stays():
    shares = (0.0, 0.9, None, 0.6, 1.0)
    course = [rows.Point(step, step, None, {"best head": share}) for step, share in enumerate(shares)]
    assert aggregate.onset(course, "best head") == 3
    assert aggregate.onset(course[:3], "best head") is None


def test_interactions_are_what_is_beyond_the_sum():
    arm = lambda changes, values: arm_of(changes, [run_of(s, x, kurtosis=math.exp(x)) for s, x in enumerate(values)])
    arms = {
        "base": arm({}, (1.0, 2.0, 3.0)),
        "a": arm({"norm_place": "post"}, (1.5, 2.5, 3.5)),
        "b": arm({"gate": "head"}, (0.8, 1.8, 2.8)),
        "ab": arm({"norm_place": "post", "gate": "head"}, (2.3, 3.3, 4.3)),
    }
    found = planted_of(arms).interactions
    assert list(found) == ["a and b"]
    assert found["a and b"]["loss"].middle == pytest.approx(1.0)
    assert found["a and b"]["kurtosis"].middle == pytest.approx(math.e)


# --------------------------------------------------------------------------------------------------- verdicts


def planted_of(arms, asked=("H1", "H2", "H3", "H4", "H5", "H6", "H7"), seq_len=1024, bos=False, planned=()):
    """A table of {name: arm}."""
    words = dict.fromkeys(("name", "question", "command", "code", "spikesink", "torch", "python", "git_commit"), "")
    config = {"norm_place": "pre", "bos": bos, "dataset": "none"}
    config |= dict.fromkeys(("batch_size", "gradient_accumulation_steps", "max_iters", "block_size"), 1)
    config |= dict.fromkeys(("n_layer", "n_head", "n_embd"), 1)
    return Table(
        **{**words, "baseline": next(iter(arms)), "config": config, "data": [], "seeds": [1, 2, 3], "times": {}},
        **{"asked": list(asked), "measured": Conditions(100, seq_len, 1, "float32"), "published": {}, "arms": arms},
        **{"planned": list(planned)},
    )


def planted(arms, n=6, **about):
    """The same from {arm: (changes, {measure: middle})}; `n` seeds lie within 2% about the middle."""
    runs = lambda numbers: [
        run_of(seed, 1.0 + seed, **{m: x * (0.98 + 0.04 * seed / n) for m, x in numbers.items()}) for seed in range(n)
    ]
    made = {name: arm_of(changes, runs(numbers)) for name, (changes, numbers) in arms.items()}
    return planted_of(made, planned=[(name, "top1/median") for name in arms if name in ("relu", "silu")], **about)


PRE = {
    **{"spike tokens": 0.002, "sink tokens": 0.005, "P(sink | spike)": 0.9, "spike_zero: loss": 0.04},
    **{"spike_zero: control loss": 0.001, "BLiMP": 0.7, "sink_mask: BLiMP": -0.1, "spikes first": 0.1},
    **{"spikes punctuation": 0.9, "sinks first": 0.9, "top1/median": 100.0, "Sink_1": 0.5},
    **{"percentile sequences": 0.9, "spike sequences": 0.9, "share sequences": 0.9, "best head": 0.9},
}
NONE = {**PRE, **dict.fromkeys(("percentile sequences", "spike sequences", "share sequences", "best head"), 0.01)}
POST = {"norm_place": "post"}, {**PRE, "P(sink | spike)": 0.05}
RELU = {"activation": "relu"}, {**PRE, "top1/median": 200.0}
ARMS = {"pre": ({}, PRE), "post": POST, "none": ({"norm_place": "none"}, NONE), "relu": RELU}
ARMS |= {"silu": ({"activation": "silu"}, PRE)}  # no other than the baseline: H7 takes one that is


def verdicts(table):
    return {name: of.verdict for name, of in hypotheses.judge(table).items()}


def test_verdicts_where_all_is_as_claimed():
    table = planted(ARMS)
    assert verdicts(table) == dict.fromkeys(hypotheses.HYPOTHESES, "supported")
    for of in hypotheses.judge(table).values():
        assert any(c.isdigit() for c in of.reason) and of.rule
    relu, silu = table.contrasts
    assert (relu.conclusion, silu.conclusion) == ("differs", "no difference seen")
    assert relu.p_holm == pytest.approx(2 * relu.p) == pytest.approx(4 / math.comb(12, 6))


@pytest.mark.parametrize(
    ("name", "arm", "numbers"),
    [
        ("H1", "pre", {"spike tokens": 0.02}),
        ("H1", "pre", {"sink tokens": 0.001}),
        ("H2", "pre", {"P(sink | spike)": 0.5}),
        ("H2", "post", {"P(sink | spike)": 0.5}),
        ("H3", "pre", {"spike_zero: loss": 0.2}),
        ("H3", "pre", {"spike_zero: control loss": 0.05}),  # as much as any edit of its size
        ("H4", "pre", {"sink_mask: BLiMP": -0.001}),
        ("H5", "pre", {"spikes first": 0.95}),
        ("H5", "pre", {"sinks first": 0.1}),
        ("H6", "none", {"percentile sequences": 0.9}),  # fires where there is none
        ("H6", "pre", {"share sequences": 0.2}),
        ("H7", "relu", {"top1/median": 100.0}),
    ],
)
def test_verdicts_where_it_is_not(name, arm, numbers):
    arms = {**ARMS, arm: (ARMS[arm][0], {**ARMS[arm][1], **numbers})}
    found = verdicts(planted(arms))
    assert found[name] == "contradicted" and set(found.values()) - {"contradicted"} == {"supported"}


def test_verdicts_without_evidence():
    few = planted(ARMS, n=5)
    assert set(verdicts(few).values()) == {"cannot tell"}
    assert all("6 seeds" in of.reason for of in hypotheses.judge(few).values())
    table = planted(ARMS)
    for row in table.base.seeds:
        row.verdicts["spike"] = "underpowered"  # absence is no evidence
    found = verdicts(table)
    assert {found[name] for name in ("H1", "H2", "H3", "H4", "H5")} == {"cannot tell"}
    table = planted(ARMS)
    table.base.seeds[0].measures["spike tokens"] = 0.01  # one seed of six is elsewhere
    of = hypotheses.judge(table)["H1"]
    assert of.verdict == "cannot tell" and "about 12 seeds of pre" in of.reason


def test_what_is_not_asked():
    reasons = lambda table: {
        name: of.reason for name, of in hypotheses.judge(table).items() if of.verdict == "not asked"
    }
    assert "1.56%" in reasons(planted(ARMS, seq_len=64))["H1"]
    assert reasons(planted(ARMS, bos=True)).keys() == {"H5"}
    alone = reasons(planted({"pre": ({}, {**PRE, "BLiMP": 0.55})}))
    assert alone.keys() == {"H2", "H4", "H6", "H7"} and "chance" in alone["H4"] and "always fires" in alone["H6"]
    bare = reasons(planted({"pre": ({}, {m: x for m, x in PRE.items() if ": " not in m})}))
    assert bare.keys() == {"H2", "H3", "H4", "H6", "H7"}
    assert hypotheses.judge(planted(ARMS, asked=())) == {}


# --------------------------------------------------------------------------------------------------- results/

TABLES = sorted((ROOT / "results").glob("*/table.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.parent.name)
def test_committed_tables_are_read_and_written_as_they_are(path):
    table = load_table(path)
    assert schema.to_json(table) == json.loads(path.read_text())
    assert tables.markdown(table) == path.with_name("table.md").read_text()


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.parent.name)
def test_the_rows_of_committed_tables_are_the_runs_that_their_commands_ask_for(path, monkeypatch):
    """So that --extend keeps them: same settings, data, seeds and measures. Which code it was is not asked here."""
    table = load_table(path)
    meta = {"vocab_size": table.config["vocab_size"]}
    monkeypatch.setattr(jobs, "data_of", lambda dataset: (meta, table.data[:2]))
    monkeypatch.setattr(jobs, "check_sequences", lambda *args: None)
    monkeypatch.setattr(
        jobs, "start_of", lambda name: ({} if name == "scratch" else table.config, table.data[2:], None)
    )
    monkeypatch.setattr(jobs, "clip_limit", lambda *args: table.arms["clip"].changes["stream_clip"])
    asked, of_study, of_runs = study.parse_argv(table.command.split()[2:])
    assert asked.command == table.command
    asked = jobs.plan(jobs.read_study(asked.study, of_study), path.parent, of_runs, table.code)
    assert {job.id for job in asked} == {row.job for row in table.runs}
    held = study.rows_of_table(path, asked)
    assert len(held) == sum(arm.done + arm.diverged for arm in table.arms.values()) > 0


def test_a_table_of_another_version_is_one_line(tmp_path):
    content = json.loads(TABLES[0].read_text())
    for change, words in (
        ({"schema": "spikesink-study-0"}, "has schema 'spikesink-study-0'"),
        ({"arms": {"pre": {}}}, "arms.pre.configs is missing"),
        ({"seeds": ["1"]}, "seeds[0] is '1'"),
    ):
        (tmp_path / "table.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=re.escape(words)):
            load_table(tmp_path / "table.json")


def test_results_say_what_the_tables_hold():
    """RESULTS.md is made of its template and the committed tables; its prose has no measured number of its own."""
    from studies import write_results as write

    assert (ROOT / "RESULTS.md").read_text() == write.render()
    prose = re.sub(r"\{[^{}]+\}|```.*?```", "", write.TEMPLATE.read_text(), flags=re.DOTALL)
    published = re.compile(r"(Beside|took both|as in Sun).*?\)", re.DOTALL)
    allowed = {
        "0.3",
        "0.2%",
        "0.5%",
        "80%",
        "10%",
        "3 to 5%",
        "95%",
        "99.9",
        "1.56%",
        "90%",
        "0.01",
        "0.5",
    }  # rules and claims
    found = set(re.findall(r"\d+\.\d+%?|\d+%", published.sub("", prose)))
    assert found <= allowed | {"5%"}, found - allowed


def test_a_field_that_names_nothing_is_refused():
    from studies import write_results as write

    with pytest.raises(UserError, match="no_such_arm"):
        write.filled("ci; no_such_arm; loss", {"ci": load_table(ROOT / "results/ci/table.json")})
