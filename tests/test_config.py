"""Config files: how they are found, typed and composed, and that an arm differs only where it says."""

import ast
import dataclasses
import enum
import json
from typing import ClassVar, Literal

import pytest

from model import GPTConfig
from spikesink.errors import UserError
from train import TrainConfig, learning_rate
from trainer import config

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
    "output": {"norm_place": "output"},
    "rmsnorm": {"norm": "rmsnorm"},
    "dyt": {"norm": "dyt"},
    "nogain": {"norm_gain": False},
    "qknorm": {"norm": "rmsnorm", "qk_norm": "head"},
    "qk_full": {"norm": "rmsnorm", "qk_norm": "full"},
    "qk_output": {"norm": "rmsnorm", "norm_place": "output", "qk_norm": "full"},
    "postnorm_qk": {"norm_place": "post", "norm": "rmsnorm", "qk_norm": "head"},
    "geglu": {"ffn": "gated"},
    "relu2": {"activation": "relu2"},
    "silu": {"activation": "silu"},
    "tanh": {"activation": "tanh"},
    "identity": {"activation": "identity"},
    "linear": {"ffn": "linear"},
    "attention_ffn": {"ffn": "attention"},
    "scaled_residual": {"residual_scale": "inv_sqrt_2L"},
    "layerscale": {"residual_scale": "learned"},
    "rezero": {"residual_scale": "rezero"},
    "half_residual": {"residual_scale": "0.5"},
    "flat_init": {"init_scale": "one"},
    "softmax1": {"attention": "softmax1"},
    "sink_logit": {"attention": "sink_logit"},
    "kbias": {"attention": "k_bias"},
    "kvbias": {"attention": "kv_bias"},
    "clipped": {"attention": "clipped"},
    "sigmoid": {"attention": "sigmoid"},
    "relu_attention": {"attention": "relu"},
    "window": {"window": 64},
    "grouped": {"n_kv_head": 2},
    "narrow_heads": {"head_dim": 8},
    "wide_heads": {"head_dim": 128},
    "registers": {"n_register": 4},
    "bos": {"bos": True},
    "gate_channel": {"gate": "channel"},
    "gate_head": {"gate": "head"},
    "gate_single": {"gate": "single"},
    "gate_constant": {"gate": "channel", "gate_input": "constant"},
    "gate_position": {"gate": "channel", "gate_input": "position"},
    "gate_token": {"gate": "channel", "gate_input": "token"},
    "sandwich_gate": {"norm_place": "sandwich", "gate": "channel"},
    "rope": {"position": "rope"},
    "alibi": {"position": "alibi"},
    "sinusoidal": {"position": "sinusoidal"},
    "nopos": {"position": "none"},
    "late_loss": {"loss_first": 64},
    "early_loss": {"loss_last": 64},
    "muon": {"optimizer": "muon"},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1, "min_lr": 0.01},
    "nodecay": {"weight_decay": 0.0},
    "beta2": {"beta2": 0.999},
    "stream_clip": {"stream_clip": 20.0},
    "softpick": {"attention": "softpick"},
    "differential": {"head_out": "differential"},
    "head_rmsnorm": {"head_out": "rmsnorm"},
    "value_residual": {"value": "residual"},
    "mixln": {"norm_place": "post*25% pre"},
    "hybrid_window": {"window": "cycle(128*3 0)"},
    "unit_init": {"embedding_init": "unit", "tie": False, "init_scale": "one"},
    "moe": {"ffn": "moe", "losses": {"load_balance": 0.01}},
    "soap": {"optimizer": "soap", "beta1": 0.95, "learning_rate": 3e-3},
    "kurtosis_penalty": {"losses": {"kurtosis": 1e-3}},
    "magnitude_penalty": {"losses": {"magnitude": 0.01}},
    "untied": {"tie": False},
    "biased": {"bias": True},
    "softcap": {"logit_cap": 30.0},
    "llama": {"norm": "rmsnorm", "position": "rope", "ffn": "gated", "activation": "silu"},
}


def load(*argv):
    values, names = config.parse_argv(SCHEMAS, list(argv), ROOT)
    return config.build(SCHEMAS, values), values, names


def flat(*argv):
    return {k: v for instance in load(*argv)[0] for k, v in dataclasses.asdict(instance).items()}


@pytest.mark.parametrize("arm", ARMS)
def test_arm_differs_from_the_baseline_in_its_declared_keys_alone(arm):
    base, this = flat(), flat(arm)
    assert {key: this[key] for key in this if this[key] != base[key]} == ARMS[arm]


def test_every_arm_is_declared_here():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} - {"quickstart", "backcopy"} == set(ARMS)


def test_every_config_file_loads_and_holds_only_lines_that_differ():
    base = flat()
    for path in (ROOT / "configs").rglob("*.py"):
        if path.parent.name == "studies":  # of study.py: tests/test_study.py
            continue
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


@pytest.mark.parametrize("argv", ["--n_layer 3 --bos --no-compile", "--n_layer=3 --bos=true --compile=false"])
def test_flags_are_written_in_both_ways(argv):
    values = flat("scale/nano", *argv.split())
    assert (values["n_layer"], values["bos"], values["compile"]) == (3, True, False)


def test_a_word_after_a_key_is_its_value_and_after_a_switch_a_config():
    values = flat("--dataset", "postnorm")
    assert (values["dataset"], values["norm_place"]) == ("postnorm", "pre")
    assert flat("--bos", "postnorm")["norm_place"] == "post"
    assert flat("--bos", "--no-bos")["bos"] is False and flat("--no-bos", "--bos")["bos"] is True
    assert flat("--out_dir", "a=b")["out_dir"] == "a=b" and flat("--dataset", "-x")["dataset"] == "-x"


def test_an_arm_keeps_what_it_says_at_every_size(tmp_path):
    assert flat("sgd", "scale/nano")["learning_rate"] == flat("scale/nano", "sgd")["learning_rate"] == 0.1
    assert flat("sgd", "scale/nano")["n_embd"] == 128


@pytest.mark.parametrize(
    "argv, words",
    [
        ([""], "no config ''"),
        (["-n_head=4"], "keys are written --key=value"),
        (["n_head=4"], "keys are written --key=value"),
        (["out/ckpt.pt"], "is no config; a checkpoint goes on with --resume"),
        (["--grad_clip=-1"], "grad_clip=-1.0 must be 0 or more"),
        (["--loss_first=-5"], "loss_first=-5 must be 0 or more"),
        (["--beta2=1.5"], "beta2=1.5"),
        (["--seed=-1"], "seed=-1"),
        (["--learning_rate=nan"], "learning_rate='nan' is not of type float|learning_rate=nan"),
        (["--learning_rate=1e-5"], "min_lr=6e-05 must be at most learning_rate=1e-05"),
        (["--norm_eps=-1"], "norm_eps=-1.0 must be above 0"),
        (["--learning_rat=1"], "unknown key 'learning_rat' .did you mean learning_rate"),
        (["--n_layer=two"], "n_layer='two' is not of type int"),
        (["--n_layer=2.0"], "not of type int"),
        (["--compile=maybe"], "compile='maybe' is not of type bool"),
        (["--max_iters"], "--max_iters needs a value"),
        (["--max_iters", "--bos"], "--max_iters needs a value"),
        (["--grad_clip", "-1"], "grad_clip=-1.0 must be 0 or more"),
        (["--bos", "true"], "--bos true: write --bos=true"),
        (["--learning_rat", "1"], "unknown key 'learning_rat' .did you mean learning_rate"),
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
    linear = TrainConfig(**shape, lr_schedule="wsd")
    assert [learning_rate(step, linear) for step in (10, 50, 90)] == [1.0, 1.0, pytest.approx(1.0)]
    assert learning_rate(100, linear) == pytest.approx(0.55)
    assert learning_rate(110, linear) == pytest.approx(0.1)
    assert learning_rate(109, TrainConfig(**shape, lr_schedule="constant")) == 1.0


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Fork:
    """What a fork may ask for."""

    MODEL_WIDE: ClassVar[tuple[str, ...]] = ("width", "maybe", "mode", "sizes", "pair", "names", "weights", "colour")
    width: int = 1
    window: int = 0  # by layer
    gain: bool = True
    maybe: int | None = None
    mode: Literal["fast", "slow"] = "fast"
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (0, "")
    names: list[str] = dataclasses.field(default_factory=list)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    colour: Colour = Colour.RED


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("maybe", "3", 3), ("maybe", "none", None), ("mode", "slow", "slow"), ("sizes", "1,2", (1, 2)),
        ("sizes", "7", (7,)), ("sizes", "()", ()), ("pair", "(1, 'a')", (1, "a")), ("names", "a b", ["a", "b"]),
        ("weights", "a=1e-3 b=2", {"a": 1e-3, "b": 2.0}), ("weights", '{"a": 1}', {"a": 1.0}), ("weights", "", {}),
        ("colour", "BLUE", Colour.BLUE), ("window", "cycle(64*3 0)", "cycle(64*3 0)"), ("window", "64", 64),
        ("gain", "true*2 false", "true*2 false"),
    ],
)  # fmt: skip
def test_a_key_of_any_type_is_read_from_flags_files_and_json_alike(tmp_path, key, text, value):
    """And its type is the same again: JSON has lists for tuples, and no enums."""
    same = lambda found: found == value and type(found) is type(value)
    read = config.parse_argv((Fork,), [f"--{key}={text}"], tmp_path)[0][key]
    assert same(read) and all(type(item) is float for item in (read.values() if isinstance(read, dict) else ()))
    stored = json.loads(json.dumps(config.plain({key: value})))[key]
    assert same(config.fields_of((Fork,))[key].read(stored, "a checkpoint"))
    if key != "colour":
        (tmp_path / "mine.py").write_text(f"{key} = {value!r}\n")
        assert same(config.parse_argv((Fork,), [str(tmp_path / "mine.py")], tmp_path)[0][key])


@pytest.mark.parametrize(
    "flag, words",
    [
        ("width=post*2 pre", "width='post.*' is not of type int"),
        ("window=pre", "window='pre' is not of type int"),
        ("maybe=x", "maybe='x' is not of type int | None"),
        ("mode=fats", r"mode='fats' is not of type Literal\['fast', 'slow'\]"),
        ("sizes=1,b", r"not of type tuple\[int, ...\]"),
        ("pair=(1,)", "not of type tuple"),
        ("weights=a", 'write "name=1 other=2"'),
        ("weights=a=b", "not of type dict"),
        ("colour=GREEN", "not of type Colour: one of RED, BLUE"),
        ("weight=a=1", "unknown key 'weight' .did you mean weights"),
    ],
)
def test_a_wrong_value_of_any_type_is_one_line(tmp_path, flag, words):
    with pytest.raises(UserError, match=words):
        config.parse_argv((Fork,), [f"--{flag}"], tmp_path)


def test_help_shows_the_names_of_a_literal_and_of_an_enum():
    text = config.describe((Fork,))
    assert "slow" in text and "RED, BLUE" in text and "--colour=         RED" in text


def test_help_shows_every_key_with_its_comment():
    text = config.describe(SCHEMAS)
    for schema in SCHEMAS:
        assert all(f"--{field.name}=" in text for field in dataclasses.fields(schema))
    assert "longest sequence, in tokens" in text
