"""What docs/, CONTRIBUTING.md and --help say: the tutorial is run as a reader would, and every name exists."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
import train
from spikesink.errors import cli
from trainer import config

from .conftest import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
OFFLINE = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}


def blocks(kind, page="docs/tutorial.md"):
    """The fenced blocks of a page that are marked `kind`."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [text for marked, text in fenced if marked == kind]


def parts():
    """{file: the python block of the tutorial for it, without the line that names it}."""
    named = [block.partition("\n")[::2] for block in blocks("python")]
    return {name.removeprefix("# "): text for name, text in named}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked files, as a fresh clone has them, and the data that it would make, where made already."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    made = [f"data/{d}/{name}" for d in ("stdlib", "backcopy") for name in ("train.bin", "val.bin", "meta.json")]
    for name in [*filter(None, listed.stdout.split("\0")), *made]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    return folder


def bash(command, folder):
    """What a bash block printed. It may not fail anywhere."""
    env = {**OFFLINE, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def windows(printed):
    """The windows that --replay shows, in its order."""
    return [int(row.split()[1]) for row in printed.splitlines() if re.match(r" *\d+\.\d{3} +\d+  ", row)]


def test_the_new_norm_takes_less_than_ten_lines():
    lines = [line for line in parts()["model.py"].splitlines() if line.strip()]
    assert len(lines) < 10 and "ScaleNorm" in lines[0]
    assert "eight lines" in (ROOT / "docs/tutorial.md").read_text() and len(lines) == 8


def test_the_tutorial_does_what_it_says(clone):
    source = (clone / "model.py").read_text()
    table = next(line for line in source.splitlines(keepends=True) if line.startswith("NORMS ="))
    assert source.count("\nNORMS =") == 1
    (clone / "model.py").write_text(source.replace(table, f"{table}\n\n{parts()['model.py']}\n"))
    for name in ("configs/scalenorm.py", "tests/test_scalenorm.py"):
        assert not (clone / name).exists()
        (clone / name).write_text(parts()[name])
    train_it, look, ablate, check, test, again, compare, seeds = (bash(block, clone) for block in blocks("bash"))

    said = blocks("")[1]  # the output that it quotes
    assert said in train_it
    assert "UNDERPOWERED" in look and "top1/median" in look
    out = clone / "out" / "quickstart-prenorm"
    assert all((out / name).is_file() for name in ("detect.html", "report.html"))
    assert "nothing to edit" in ablate and "control: random_keys" in ablate
    assert check.count(": ok.") == len(check.splitlines()) == 12
    assert "2 passed" in test

    replays = [windows(part) for part in again.split("step 1: ")[1:]]
    assert len(replays) == 2 and len(replays[0]) == 10
    drawn = model_free_windows(clone)
    assert all(set(shown) <= set(drawn) for shown in replays)

    header, *rows = compare[: compare.index("what differs")].splitlines()
    assert header.split() == ["quickstart-prenorm", "quickstart-scalenorm"]
    assert any(row.startswith("largest top1/median") for row in rows)
    differs = compare[compare.index("what differs") :].split("\n\n")[0].splitlines()
    assert [line.split() for line in differs[2:]] == [["norm", "layernorm", "scalenorm"]]
    assert seeds[seeds.index("quickstart-prenorm") :].split("\n")[0].split() == [
        *("quickstart-prenorm", "seed2/prenorm", "quickstart-scalenorm", "seed2/scalenorm")
    ]
    assert "scalenorm" in bash("python train.py --help", clone)


def model_free_windows(folder):
    """The windows of step 1, of the seed and the data alone."""
    from data.loader import Tokens

    return Tokens(str(folder / "data" / "stdlib"), "train", 64, True, train.TrainConfig().seed).windows(0, 16)


def test_the_tour_runs_and_its_stored_outputs_say_the_same(clone):
    """Its cells in one namespace, without Jupyter. Numbers may differ between CPUs, verdicts may not."""
    cells = [
        cell for cell in json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"] if cell["cell_type"] == "code"
    ]
    script = "\n".join("".join(cell["source"]) for cell in cells)
    (clone / "docs" / "tour.py").write_text(f"import matplotlib\nmatplotlib.use('Agg')\n{script}")
    printed = bash("cd docs; python tour.py", clone)
    outputs = [output for cell in cells for output in cell["outputs"]]
    stored = "".join("".join(output.get("text", "")) for output in outputs)
    verdicts = [re.findall(r"^(spike|sink|co-occurrence): (\w+)", text, re.MULTILINE) for text in (printed, stored)]
    assert verdicts[0] == verdicts[1] and ("sink", "present") in verdicts[0] and ("spike", "present") in verdicts[0]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (clone / "out" / "tour" / "detect.html").is_file()


def test_the_readmes_python_runs_as_it_stands(clone, trained):
    pages = ("README.md", "docs/metrics.md")
    examples = [block for page in pages for block in blocks("python", page) if "spikesink.open" in block]
    assert len(examples) == 2
    for example, numbers in zip(examples, (1, 2), strict=True):
        script = example if "import spikesink" in example else f"import spikesink\n\n{example}"
        (clone / "example.py").write_text(script.replace('"gpt2"', f'"{trained}"'))  # no network here
        assert len([float(line) for line in bash("python example.py", clone).split()]) == numbers


# ------------------------------------------------------------------------------------------- names and links


def names_in(path):
    """Names of a module: what it assigns, defines, imports, the members of its classes, and keys of its tables."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_file_exists(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    here = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("http") or (here / link).exists(), link
    mine = set(parts())
    for name in re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|sh|toml))`", text):
        rooms = "model|spikesink|tests|data|configs|docs|results|trainer|studies|benchmarks"
        if re.match(rf"({rooms})\b|\w+\.(py|md|sh|toml)$", name):
            made = name in mine or Path(name).stem in ("x", "NAME", "prepare")  # stand for any
            assert made or any((base / name).exists() for base in (ROOT, ROOT / "configs", here)), name


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_a_file_is_in_it(page):
    """`file.py:name`, or `file.py:name.member`."""
    text = (ROOT / page).read_text()
    pairs = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert page != "CONTRIBUTING.md" or len(pairs) > 15
    for file, name in pairs:
        assert set(name.split(".")) <= names_in(ROOT / file), f"{file}:{name}"


def test_pages_name_no_place_of_this_machine():
    for page in (*PAGES, "docs/tour.ipynb"):
        assert not re.search(r"/(work|home|root|tmp)/", (ROOT / page).read_text()), page


# ------------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("script", ["train.py", "detect.py", "ablate.py", "sample.py", "study.py"])
def test_help_fits_the_terminal(cli, monkeypatch, script, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, text, _ = cli(script, "--help")
    assert code == 0 and max(map(len, text.splitlines())) <= width
    assert f"python {script} " in text.splitlines()[0]  # how it is called, at once
    assert "\n\n  python " in "\n".join(text.splitlines()[:3])  # and examples


def test_help_has_every_key_once_under_a_heading_with_its_default():
    text = config.describe(train.SCHEMAS, model.CHOICES | train.CHOICES, width=140)
    for schema in train.SCHEMAS:
        body = text[text.index(f"{schema.__name__}: ") :].splitlines()[2:]
        assert not body[0].startswith(" ")  # a heading
        for key in config.fields_of((schema,)).values():
            found = re.findall(rf"^  --{key.name}= +(\S*)", text, re.MULTILINE)
            assert found in ([str(key.default)], ["default:"]), key.name


def test_help_lists_every_choice():
    for key, table in (model.CHOICES | train.CHOICES).items():
        text = config.describe(train.SCHEMAS, {key: [*table, "brand_new"]}, width=1000)
        row = re.search(rf"^  --{key}= .*$", text, re.MULTILINE)[0]
        assert "brand_new" in row and all(name in row for name in table), row


def test_examples_of_help_name_configs_that_exist():
    sizes = {f"scale/{path.stem}" for path in (ROOT / "configs/scale").glob("*.py")}
    assert sizes == set(re.findall(r"scale/\w+", train.__doc__))


# -------------------------------------------------------------------------------------------------- mistakes


# what a newcomer may type -> what the one line says to do; beside those of test_config.py and test_scripts.py
TRAINING = {
    "prenorm --n_layer two --seed=1": "n_layer='two' is not of type int",
    "prenorm --n_layer --seed=1": "--n_layer needs a value",
    "--bos True": "write --bos=True",
    "--no-n_layer": "unknown key 'no-n_layer'",
    "--no_bos": "write --no-bos",
    "--compile=no!": "true or false",
    "--n_layer=1e3": "write 1000",
    "--lr=1e-3": "--help lists them",
    "--learning-rat 1e-3": "did you mean learning_rate",
    "--batch-size=4": "did you mean batch_size",
    "--zzz=1": "--help lists them",
    "--config=postnorm": "name a config without a flag",
    "--gate=heads": "not one of: none, channel, head, single",
    "nano": "did you mean scale/nano",
    "pre-norm": "did you mean prenorm",
    "arms/rmsnorm.py": "did you mean rmsnorm",
    "help": "scale/gpt2, scale/micro, scale/nano, scale/octave, scale/tiny, scale/toy; keys are written --key=value",
    "configs": "is a folder; name a config in it, as in: prenorm",
    "configs/scale": "scale/gpt2, scale/micro, scale/nano, scale/octave, scale/tiny, scale/toy",
    "README.md": "a config|is no config: that is a .py file of lines",
    "model.py": "model.py: unknown key 'CONTRACT'",
    "{run}": "--resume --out_dir={run} goes on with it",
    "{run}/config.json": "is no config: that is a .py file",
    "{run}/ckpt.pt": "--init_from={run}/ckpt.pt",
    "scale/nano --dataset={text}": "data/text/prepare.py --name=mine {text} makes one of it",
    "scale/nano --dataset={data}/train.bin": "give its folder, {data}",
    "scale/nano --dataset=configs": "holds no train.bin and val.bin",
    "--resume --out_dir=nowhere": "no checkpoint in nowhere",
    "scale/nano --dataset={data} --out_dir={run}": "--resume goes on with it, --overwrite starts again",
}
LOOKING = {
    "{run} {run}": "side by side: --compare A B",
    "{parent}": "these do: {parent}/run",
    "{run}/config.json": "give the folder, {run}",
    "{run}/log.jsonl": "give the ckpt.pt of a run, or the folder",
    "configs/prenorm.py": "is no checkpoint",
    "{data}": "holds neither a ckpt.pt nor",
    "{run} --seq_len=512": "take a --seq_len up to that",
    "{run} --seq-len=16": "did you mean --seq_len",
    "{run} --text={text} --seq_len=16": "give it ids with --tokens|a longer text, or a smaller --seq_len",
    "{run} --text={binary} --seq_len=16": "not text in UTF-8",
    "{run} --text=configs": "Is a directory",
    "{run} --tokens={text}": "not a .npy file of integers; for text use --text",
    "{run} --data={text}": "with --text",
    "--compare": "--help shows how",
    "": "which checkpoint",
}


@pytest.mark.parametrize("script, line", [("train.py", x) for x in TRAINING] + [("detect.py", x) for x in LOOKING])
def test_a_mistake_says_what_to_do(cli, trained, toy_data, tmp_path_factory, monkeypatch, script, line):
    monkeypatch.chdir(ROOT)
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "some.txt").write_text("hi")
    (folder / "some.dat").write_bytes(bytes(range(128, 256)))
    names = {"run": trained.parent, "data": toy_data, "text": folder / "some.txt", "binary": folder / "some.dat"}
    names["parent"] = folder / "runs"
    names["parent"].mkdir()
    (names["parent"] / "run").symlink_to(trained.parent)
    code, _, err = cli(script, *line.format(**names).split())
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    wanted = {**TRAINING, **LOOKING}[line].format(**names) if script == "detect.py" else TRAINING[line].format(**names)
    assert any(words in err for words in wanted.split("|")), err


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("not enough memory: you tried")],
)
def test_too_little_memory_says_what_to_lower(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli(main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "--batch_size" in err


def test_a_compilation_that_was_cut_off_says_what_to_delete(capsys):
    def main():  # as torch 2.13 raises it: InductorError is a RuntimeError
        raise RuntimeError("ImportError: /tmp/torchinductor_me/tl/ctl6xuld.main.so: file too short")

    with pytest.raises(SystemExit):
        cli(main)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "delete /tmp/torchinductor_me, and run" in err


def test_other_errors_stay_tracebacks():
    def main():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        cli(main)


def test_the_version_has_an_entry_in_the_changelog():
    version = importlib.import_module("spikesink").__version__
    assert f"[{version.removesuffix('.0')}" in Path(ROOT / "CHANGELOG.md").read_text()
