"""What a fork broke is said: every silent mistake put back, caught by its contract, at its place."""

import contextlib

import pytest
import torch
from torch import nn

import model as model_module
import spikesink
import train
from model import GPT, GPTConfig
from spikesink.edit import interventions, outcomes, quantise
from spikesink.edit.clean_pass import CleanPass
from spikesink.edit.findings import Unavailable
from trainer import check as contracts
from trainer import config

from .conftest import ROOT, SMALL_RUN, subject_of, tiny

BASELINE = GPTConfig()
CHEAP = ("causal", "taps", "state", "replay", "rows", "flops", "parameters", "detect")
ARMS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
AXES = {
    "by layer": {"norm_place": "post*25% pre", "window": "cycle(64*3 0)"},
    "shared keys": {"n_kv_head": "4*6 2", "position": "rope"},
    "experts": {"ffn": "moe", "dropout": 0.1},
    "pairs": {"head_out": "differential", "value": "residual", "attention": "softpick"},
    "registers": {"n_register": 4, "window": 8, "gate": "channel", "gate_input": "position"},
}


def broken(only, fork=BASELINE, cfg=None):
    """What is said of one contract; '' where it holds."""
    (result,) = train.check(fork, cfg, only=[only])
    return "; ".join(result.broken)


# ------------------------------------------------------------------------------------------ all of ours hold


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_keeps_the_contracts(arm):
    values, _ = config.parse_argv(train.SCHEMAS, [arm], ROOT)
    found = list(train.check(*config.build(train.SCHEMAS, values), only=CHEAP))
    assert [str(result) for result in found if result.broken] == []
    assert tuple(result.contract for result in found) == CHEAP


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_what_no_arm_has_keeps_them_too(axes):
    found = train.check(GPTConfig(**axes), only=[*CHEAP, "ablate", "export"])
    assert [str(result) for result in found if result.broken] == []


def test_a_tiny_copy_has_every_kind_of_layer():
    small = contracts.tiny(GPTConfig(window="cycle(64*3 0)", norm_place="post*2 pre*10", dropout=0.1, n_kv_head=4))
    assert [layer.window for layer in small.layers] == [6, 6, 6, 0] * 3 and small.n_layer == 12
    assert (small.n_embd, small.n_head, small.n_kv_head, small.dropout) == (32, 4, 2, 0.1)
    assert contracts.tiny(GPTConfig(window="cycle(64*3 0)")).n_layer == 4
    assert contracts.tiny(GPTConfig(n_layer=1, n_head=1, n_embd=16, vocab_size=11)).n_layer == 1
    with pytest.raises(spikesink.UserError, match="no tiny copy"):
        contracts.tiny(Stubborn())


class Stubborn(GPTConfig):
    def _check(self):
        if self.n_embd < 64:
            raise ValueError("n_embd is too small")


def test_the_command_says_each_contract_and_the_broken_ones(cli, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contracts, "CONTRACTS", {k: contracts.CONTRACTS[k] for k in ("causal", "rows")})
    assert cli("train.py", "postnorm", "--check") == (0, "causal: ok.\nrows: ok.\n", "")
    monkeypatch.setitem(model_module.ATTENTIONS, "softpick", lambda c, layer: of_rows(printed_softpick, "less"))
    code, out, err = cli("train.py", "postnorm", "--attention=softpick", "--check")
    assert code == 2 and out.count("BROKEN") == 2
    assert err == "error: 2 of 2 contracts are broken: causal, rows\n"
    assert list(tmp_path.iterdir()) == []


def test_an_exception_is_a_broken_contract_and_the_others_are_checked(monkeypatch):
    def fails(self, x):
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr(GPT, "flops_per_token", fails)
    flops, parameters = train.check(GPTConfig(), only=["flops", "parameters"])
    assert flops.broken[0].startswith("RuntimeError: no such thing (") and flops.broken[0].endswith(", in fails)")
    assert not parameters.broken


# ------------------------------------------------------------------------------------------ causal


def of_rows(function, rows):
    return model_module.RowNormaliser(function, rows)


def printed_softpick(logits):
    """Hidden keys count 1 each in the denominator."""
    powers = logits.exp() - 1
    return powers.relu() / (powers.abs().sum(-1, keepdim=True) + 1e-6)


def test_softpick_as_printed_leaks(monkeypatch):
    monkeypatch.setitem(model_module.ATTENTIONS, "softpick", lambda c, layer: of_rows(printed_softpick, "less"))
    found = broken("causal", GPTConfig(attention="softpick"))
    assert "change when tokens after it do" in found and "transformer.h.0.attn (attention=softpick)" in found
    assert "rows without the keys they do not see" in broken("rows", GPTConfig(attention="softpick"))


def mixing(what, place=0):
    """An FFN that takes `what` of x off in one layer."""

    class Mixing(model_module.PlainFFN):
        def __init__(self, config, layer):
            super().__init__(config, layer)
            self.layer = layer

        def forward(self, x, context):
            return super().forward(x - what(self, x) if self.layer == place else x, context)

    return Mixing


def test_a_mean_over_the_batch_or_the_sequence_is_seen(monkeypatch):
    monkeypatch.setitem(model_module.FFNS, "plain", mixing(lambda module, x: x.mean(0), place=1))
    assert "A sequence alone" in broken("causal") and "transformer.h.1.mlp" in broken("causal")
    monkeypatch.setitem(model_module.FFNS, "plain", mixing(lambda module, x: x.mean(1, keepdim=True)))
    assert "transformer.h.0.mlp (every default)" in broken("causal")
    monkeypatch.setitem(model_module.FFNS, "plain", mixing(lambda module, x: module.training * x.mean(0)))
    assert "than in a batch in training" in broken("causal")


# ------------------------------------------------------------------------------------------ replay


def stale_values():
    """The first layer's values, kept outside the pass."""
    kept = {}

    def value(v, context):
        if "first" not in context.carry:
            context.carry["first"], kept["value"] = True, v
        return 0.5 * (v + kept["value"])

    return value


def test_a_stream_that_changes_between_sub_layers_is_seen(monkeypatch):
    class Averaged(model_module.Block):
        def forward(self, x, context):
            return 0.9 * super().forward(x, context) + 0.1 * context.embedding

    monkeypatch.setattr(model_module, "Block", Averaged)
    assert "between transformer.h.0.mlp" in broken("taps", SMALL)


class Loaded(model_module.PlainFFN):
    """A router's bias that follows the load: `when` says where it is changed."""

    when = "pass"

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("bias", torch.zeros(config.n_embd))
        self.load = 0.0

    def forward(self, x, context):
        self.load = x.detach().mean((0, 1))
        if self.when == "pass":
            self.after_update()
        if self.when == "sum":
            context.add_loss("load", x.square().sum())
        return super().forward(x + self.bias, context)

    def after_update(self):
        self.bias += self.load


@pytest.mark.parametrize("when", ["pass", "sum", "update"])
def test_a_pass_changes_nothing_and_its_losses_are_means(monkeypatch, tmp_path, cli, toy_data, when):
    monkeypatch.setattr(Loaded, "when", when)
    monkeypatch.setitem(model_module.FFNS, "linear", Loaded)
    said = broken("state", SMALL)
    assert ("changes transformer.h.0.mlp.f.bias" in said, "The loss load of a batch" in said) == (
        when == "pass",
        when == "sum",
    )
    if when == "update":
        options = [f"--dataset={toy_data}", "--ffn=linear", *SMALL_RUN, "--max_iters=2", f"--out_dir={tmp_path}"]
        assert cli("train.py", *options)[0] == 0
        saved = spikesink.models.checkpoint.load(tmp_path)
        assert saved.model["transformer.h.0.mlp.f.bias"].any()


def test_what_is_left_on_a_module_is_not_replayed(monkeypatch):
    assert not broken("replay", GPTConfig(value="residual"))
    monkeypatch.setitem(model_module.VALUES, "residual", stale_values())
    found = broken("replay", GPTConfig(value="residual"))
    assert "is not the whole pass; first seen in transformer.h.1.attn (value=residual)" in found


def losses_of(model, ids, *names):
    """Losses under edits of the whole stream: at the embedding, and of a later sub-layer."""
    subject = subject_of(model)
    taps = {"embedding": subject.streams[0], "later": subject.inner["update"][1]}
    conditions = {name: lambda clean, name=name: interventions.remove_sub_layer(clean, taps[name]) for name in names}
    return subject, outcomes.measure_outcomes(subject, ids, conditions, 3).by_name["later"].losses


def test_ablate_makes_whole_passes_where_a_replay_is_none(monkeypatch, ids, capsys):
    monkeypatch.setitem(model_module.VALUES, "residual", stale_values())
    model = tiny(value="residual", n_layer=3)
    subject, guarded = losses_of(model, ids, "embedding", "later")
    assert "Every pass runs the whole model: in a replay, attn 1 reads" in subject.whole_passes[0]
    assert subject.whole_passes[0] in capsys.readouterr().err
    with monkeypatch.context() as whole:
        whole.setattr(CleanPass, "prefix", lambda self, stage: contextlib.nullcontext())
        truth = losses_of(model, ids, "later")[1]
    assert torch.equal(guarded, truth)
    with monkeypatch.context() as unguarded:
        unguarded.setattr(CleanPass, "why_whole", lambda self: "")
        assert (losses_of(model, ids, "embedding", "later")[1] - truth).abs().max() > 0.01
    with spikesink.open(model, tokens=ids, calibration=True, n_seq=3) as look:
        note = spikesink.ablate(look, only=["sink_mask", "remove_step_up"], probe=False).note
        whole = spikesink.open(tiny(value="own"), tokens=ids, calibration=True, n_seq=3)
        assert "Every pass runs the whole model" not in spikesink.ablate(whole, only=["sink_mask"], probe=False).note
        assert ("Every pass runs the whole model" in note) == any(look.subjects[0].whole_passes)


def test_a_model_that_replays_is_replayed(ids):
    subject, _ = losses_of(tiny(value="residual", n_layer=3), ids, "later")
    assert subject.whole_passes == [""]


# ------------------------------------------------------------------------------------------ rows

softmax = lambda logits: logits.softmax(-1)
WRONG_ROWS = {
    "a row sums to 0": (lambda logits: 0.9 * softmax(logits), "one"),
    "more than one": (lambda logits: 1.1 * softmax(logits), "less"),
    "`rows` must be": (softmax, "two"),
    "a share is negative": (lambda x: softmax(x) * torch.where(torch.arange(x.size(-1)) == 1, -1, 1), "less"),
    "`seen` is not what the map shows": (lambda x: softmax(x).masked_fill(torch.arange(x.size(-1)) == 0, 0), "less"),
}


@pytest.mark.parametrize("words", WRONG_ROWS)
def test_rows_are_as_they_are_declared(monkeypatch, words):
    monkeypatch.setitem(model_module.ATTENTIONS, "clipped", lambda c, layer: of_rows(*WRONG_ROWS[words]))
    found = broken("rows", GPTConfig(attention="clipped"))
    assert words in found and "transformer.h.0.attn.f.attend, with rows=" in found


def test_what_the_seam_returns_is_its_map_times_the_values(monkeypatch):
    forward = model_module.Attend.forward
    monkeypatch.setattr(model_module.Attend, "forward", lambda self, *args, **kw: 2 * forward(self, *args, **kw))
    assert "weights @ v + slot is not what it returns" in broken("rows")
    twice_in_training = lambda self, *args, **kw: (1 + self.training) * forward(self, *args, **kw)
    monkeypatch.setattr(model_module.Attend, "forward", twice_in_training)
    assert "returns in training" in broken("rows")


def test_rows_start_where_they_are_asked_to(monkeypatch):
    mask = model_module.Attend.mask
    monkeypatch.setattr(model_module.Attend, "mask", lambda self, first, R, T, device: mask(self, T - R, R, T, device))
    assert not broken("rows")
    monkeypatch.setattr(model_module.Attend, "mask", lambda self, first, R, T, device: mask(self, 0, R, T, device))
    assert "rows of later queries alone" in broken("rows")


# ------------------------------------------------------------------------------------------ FLOPs and parameters


class Loose(model_module.PlainFFN):
    """A matrix that is no nn.Linear."""

    def __init__(self, config, layer, matrix=None):
        super().__init__(config, layer)
        self.matrix = nn.Parameter(0.1 * torch.randn(config.n_embd, config.n_embd) if matrix is None else matrix)

    def forward(self, x, context):
        return super().forward(x @ self.matrix, context)


class Twice(model_module.PlainFFN):
    """A matrix that is used twice."""

    def forward(self, x, context):
        return super().forward(x + self.c_fc(x)[..., : x.size(-1)], context)


class Empty(Loose):
    def __init__(self, config, layer):
        super().__init__(config, layer, torch.empty(config.n_embd, config.n_embd))


class Idle(Loose):
    def forward(self, x, context):
        return model_module.PlainFFN.forward(self, x @ self.matrix.detach(), context)


class Plain(model_module.PlainFFN):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)


@pytest.mark.parametrize(
    "contract, part, words",
    [
        ("flops", Loose, "the difference is in transformer.h.0.mlp.f, transformer.h.1.mlp.f and 1 more: "),
        ("flops", Twice, "the difference is in transformer.h.0.mlp.f.c_fc, transformer.h.1.mlp.f.c_fc and 1 more: "),
        ("parameters", Empty, "transformer.h.0.mlp.f.matrix, transformer.h.1.mlp.f.matrix and 1 more not initialised"),
        ("parameters", Idle, "No gradient reaches transformer.h.0.mlp.f.matrix"),
        ("parameters", Plain, "transformer.h.0.mlp.f.c_proj writes to the stream: make it a StreamLinear"),
    ],
)
def test_parts_of_a_fork_are_named(monkeypatch, contract, part, words):
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setitem(model_module.FFNS, "plain", part)
    assert words in broken(contract)
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)


def test_a_matrix_in_no_linear_is_noted_unless_its_module_says_its_flops(monkeypatch):
    monkeypatch.setitem(model_module.FFNS, "plain", Loose)
    (result,) = train.check(GPTConfig(), only=["parameters"])
    assert not result.broken and "int8 do not see transformer.h.0.mlp.f.matrix" in result.notes[0]
    own = lambda self, T: 6 * (self.matrix.numel() + self.c_fc.weight.numel() + self.c_proj.weight.numel())
    monkeypatch.setattr(Loose, "flops", own, raising=False)
    flops, parameters = train.check(GPTConfig(), only=["flops", "parameters"])
    assert not flops.broken and not parameters.broken and not parameters.notes


def groups_of(choose):
    """optimizer_groups by a rule: parameter, is it a matrix -> the groups (0 decays, 1 does not) it is in."""

    def optimizer_groups(self, weight_decay):
        groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
        for name, p in self.named_parameters():
            for group in choose(name, p):
                groups[group]["params"].append(p)
        return groups

    return optimizer_groups


def test_groups_of_the_optimisers(monkeypatch):
    cases = {
        "adamw: transformer.h.0.attn.f.attend.normalise.key": lambda name, p: [int(p.dim() < 2)],
        "sgd: lm_head.weight is in 0 groups": lambda name, p: [] if "lm_head" in name else [int(p.dim() < 2)],
        "muon: lm_head.weight does not decay": lambda name, p: [int(p.dim() < 2 or "lm_head" in name or "key" in name)],
    }
    fork = GPTConfig(attention="k_bias", tie=False)
    assert not broken("parameters", fork)
    for words, choose in cases.items():
        monkeypatch.setattr(GPT, "optimizer_groups", groups_of(choose))
        assert words in broken("parameters", fork)
    twice = lambda model, cfg: [*train.OPTIMIZERS["adamw"](model, cfg), *train.OPTIMIZERS["sgd"](model, cfg)]
    monkeypatch.undo()
    monkeypatch.setitem(train.OPTIMIZERS, "both", twice)
    assert "both: transformer.wte.weight" in broken("parameters") and "in 2 groups" in broken("parameters")


# ------------------------------------------------------------------------------------------ compile, resume, export

SMALL = GPTConfig(n_layer=1, ffn="linear")


class OtherCompiled(model_module.LinearFFN):
    def forward(self, x, context):
        return super().forward(x, context) * (2 if torch.compiler.is_compiling() else 1)


class OtherGradient(model_module.LinearFFN):
    def forward(self, x, context):
        return super().forward(x.detach() if torch.compiler.is_compiling() else x, context)


@pytest.mark.skipif(not train.cpp_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize(
    "part, words",
    [
        (None, ""),
        (OtherCompiled, "Compiled, transformer.h.0.mlp (ffn=linear) returns something else"),
        (OtherGradient, "Compiled, the gradient of transformer"),
    ],
)
def test_compiled_is_as_written(monkeypatch, part, words):
    if part:
        monkeypatch.setitem(model_module.FFNS, "linear", part)
    found = broken("compiled", SMALL)
    assert words in found and bool(found) == bool(words)


class OwnNoise(model_module.LinearFFN):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x, context):
        noise = 0.1 * torch.randn(x.shape, generator=self.generator) if self.training else 0.0
        return super().forward(x + noise, context)


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_a_resumed_run_is_the_whole_one(optimizer):
    dropped = GPTConfig(n_layer=1, dropout=0.1)
    assert not broken(
        "resume", dropped, train.TrainConfig(optimizer=optimizer, loss_first=64, losses={"kurtosis": 1e-3})
    )


def test_noise_of_its_own_is_not_resumed(monkeypatch):
    monkeypatch.setitem(model_module.FFNS, "linear", OwnNoise)
    assert "and 2 more, transformer" in broken("resume", SMALL)
    (result,) = train.check(SMALL, only=["causal"])
    assert not result.broken and "two training passes differ" in result.notes[0]


def test_an_export_is_right_or_refused_and_does_not_crash(monkeypatch):
    ours, refused = (next(train.check(fork, only=["export"])) for fork in (GPTConfig(activation="relu"), SMALL))
    assert str(ours) == "export: ok." and "not exported: GPT-2 does not compute ffn=linear" in refused.notes[0]
    monkeypatch.setattr("spikesink.models.convert.to_hf", lambda args, state: args["of a fork"] + None)
    assert not broken("export")  # KeyError: refused
    monkeypatch.setattr("spikesink.models.convert.to_hf", lambda args, state: 1 + "")
    assert broken("export").startswith("TypeError: ")


# ------------------------------------------------------------------------------------------ detect, ablate


def test_detect_and_ablate_run_and_find_numbers(monkeypatch):
    bad = lambda module, x: x * (torch.nan if x.abs().sum() % 1 > 0 else 1)
    monkeypatch.setitem(model_module.FFNS, "plain", mixing(bad))
    assert "UserError: the states or the loss are not finite" in broken("detect")
    monkeypatch.undo()
    monkeypatch.setattr("spikesink.edit.ablation.int8", lambda *args: Unavailable(reason="no weights"))
    assert "int8 cannot be tried: no weights" in broken("ablate", SMALL)
    monkeypatch.undo()
    monkeypatch.setattr("spikesink.edit.outcomes.metrics.paired_effect", lambda *args: NAN_EFFECT)
    assert "The loss is not finite under spike_zero" in broken("ablate", SMALL)


NAN_EFFECT = {"loss": torch.nan, "ppl": torch.nan, "delta_loss": torch.nan, "ci95": None}


def test_an_expert_without_tokens_has_no_range():
    model = tiny(ffn="moe")
    ids, subject = torch.full((1, 8), 3), subject_of(model)
    ranges = quantise.Ranges(subject, ids)
    assert None in ranges.largest
    assert torch.isfinite(torch.tensor(quantise.quantised_losses(subject, ids, ids)["per_tensor"].loss))
