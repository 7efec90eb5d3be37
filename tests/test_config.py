"""Config files: how they are found, typed and composed, and that an arm differs only where it says."""

import ast
import dataclasses

import pytest

from model import GPTConfig
from spikesink import config
from spikesink.errors import UserError
from train import TrainConfig, learning_rate

from .conftest import ROOT

SCHEMAS = (GPTConfig, TrainConfig)

# what each arm changes of the baseline, and nothing else
ARMS = {
    "prenorm": {},
    "postnorm": {"norm_place": "post"},
    "nonorm": {"norm_place": "none"},
    "sandwich": {"norm_place": "sandwich"},
    "relu": {"activation": "relu"},
    "swiglu": {"ffn": "gated", "activation": "silu"},
    "deepnorm": {"norm_place": "post", "residual_scale": "deepnorm", "init_scale": "deepnorm"},
}


def load(*argv):
    return config.load(SCHEMAS, list(argv), ROOT)


def flat(*argv):
    return {k: v for instance in load(*argv)[0] for k, v in dataclasses.asdict(instance).items()}


@pytest.mark.parametrize("arm", ARMS)
def test_arm_differs_from_the_baseline_in_its_declared_keys_alone(arm):
    base, this = flat(), flat(arm)
    assert {key: this[key] for key in this if this[key] != base[key]} == ARMS[arm]


def test_every_config_file_loads_and_holds_only_lines_that_differ():
    base = flat()
    for path in (ROOT / "configs").rglob("*.py"):
        assigned = [n.targets[0].id for n in ast.parse(path.read_text()).body if isinstance(n, ast.Assign)]
        values = flat(str(path))
        if path.stem != "gpt2":  # spelled out: the size everything defaults to
            assert [key for key in assigned if values[key] == base[key]] == [], path


def test_defaults_are_nanogpts_for_gpt2_small():
    values = flat("postnorm")
    expected = {
        "dataset": "openwebtext", "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "bias": False,
        "dropout": 0.0, "batch_size": 12, "gradient_accumulation_steps": 40, "learning_rate": 6e-4, "max_iters": 600000,
        "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "warmup_iters": 2000, "min_lr": 6e-5,
        "eval_interval": 2000, "eval_iters": 200, "vocab_size": 50304, "activation": "gelu",
    }  # fmt: skip
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["config/postnorm.py", "configs/postnorm.py", "configs/postnorm", "postnorm"])
def test_names_of_a_config_resolve_alike(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert flat(name)["norm_place"] == "post"


def test_files_compose_left_to_right_and_flags_win(tmp_path):
    (tmp_path / "mine.py").write_text("import math\n_half = 0.5\nn_layer = 3\ndropout = _half\nlearning_rate = 1\n")
    values = flat("postnorm", "scale/nano", str(tmp_path / "mine.py"), "--n_head=2", "--bos", "--compile=false")
    assert (values["norm_place"], values["n_embd"], values["n_layer"], values["n_head"]) == ("post", 128, 3, 2)
    assert (values["dropout"], values["bos"], values["compile"], values["learning_rate"]) == (0.5, True, False, 1.0)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--learning_rat=1"], "unknown key 'learning_rat' .did you mean learning_rate"),
        (["--n_layer=two"], "n_layer='two' is not of type int"),
        (["--n_layer=2.0"], "not of type int"),
        (["--compile=maybe"], "compile='maybe' is not of type bool"),
        (["--max_iters"], "--max_iters needs a value"),
        (["--norm_place=prenorm"], "norm_place='prenorm' is not one of: pre, post"),
        (["--lr_schedule=step"], "lr_schedule"),
        (["--batch_size=0"], "batch_size=0 must be at least 1"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["postnrm"], "no config 'postnrm' .did you mean postnorm"),
    ],
)
def test_mistakes_are_named(argv, words):
    with pytest.raises(UserError, match=words):
        load(*argv)


@pytest.mark.parametrize(
    "text, words", [("n_layer = 'x'", "not of type int"), ("n_layr = 2", "n_layer"), ("1/0", "ZeroDivision")]
)
def test_mistakes_in_a_file_name_the_file(tmp_path, text, words):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load(str(tmp_path / "bad.py"))
    assert "bad.py" in str(caught.value)


def test_learning_rate_schedules():
    shape = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "max_iters": 110}
    cosine = TrainConfig(**shape)
    assert learning_rate(0, cosine) == pytest.approx(1 / 11)  # nanoGPT's warmup
    assert learning_rate(10, cosine) == 1.0
    assert learning_rate(60, cosine) == pytest.approx(0.55)
    assert learning_rate(110, cosine) == learning_rate(500, cosine) == pytest.approx(0.1)
    linear = TrainConfig(**shape, lr_schedule="constant_linear")
    assert [learning_rate(step, linear) for step in (10, 50, 90)] == [1.0, 1.0, pytest.approx(1.0)]
    assert learning_rate(100, linear) == pytest.approx(0.55)
    assert learning_rate(110, linear) == pytest.approx(0.1)
    assert learning_rate(109, TrainConfig(**shape, lr_schedule="constant")) == 1.0


def test_help_shows_every_key_with_its_comment():
    text = config.describe(SCHEMAS)
    for schema in SCHEMAS:
        assert all(f"--{field.name}=" in text for field in dataclasses.fields(schema))
    assert "longest sequence, in tokens" in text
