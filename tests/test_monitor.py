"""The monitor: its numbers are detect's, and training is bitwise what it is without it."""

import contextlib
import copy
import dataclasses
import json
import math
import subprocess
import sys
import types

import pytest
import torch
import transformers
from torch import nn

from model import GPT, GPTConfig
from spikesink.errors import UserError
from spikesink.hooks import hooked
from spikesink.measure import metrics
from spikesink.measure.monitor import Monitor, MonitorCallback, flat, headline
from spikesink.measure.observe import observe
from spikesink.measure.sinks import PRIMARY_SINK_EPSILON, SINK_RULES, alpha_in
from spikesink.models import checkpoint, hf
from spikesink.text.sequences import PADDING
from train import cpp_compiler
from trainer import config
from trainer.log import Tracker, numbers

from .conftest import ROOT, SMALL_RUN, TINY, same, subject_of, tiny
from .test_hf import FAMILIES
from .test_outcomes import many, spikes_last

ARMS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
HF = ("gpt2", "llama")


def row_of(subject, ids):
    """A monitor's row, from detect's pass over the same ids."""
    obs = observe(subject, ids, progress=False)
    layers = []
    for tap, stats in zip(subject.streams, obs.sum.stats, strict=True):
        found = stats.result()
        of = {key: getattr(found, key) for key in ("top1", "median", "kurtosis")}
        layers.append({"name": tap.name, **of, "ratio": found.top1 / found.median})
    attention = []
    for i, tap in enumerate(subject.attends):
        stats = obs.attention[i]
        (_, queries), (seen, _) = max(stats.queries.items())
        alpha = stats.sums["alpha"].mean(0) * (seen >= queries / 4)  # (T,), of keys that enough queries see
        rate = (obs.best_alpha[:, i] > PRIMARY_SINK_EPSILON).double().mean().item()
        best = int(alpha.argmax()) if alpha.any() else None
        attention.append({"name": tap.name, "sink_rate": rate, "best_position": best})
    spike, sink, n = obs.spikes["spike"], SINK_RULES["gu"].tokens(obs), int(obs.tokens.sum())
    overlap = metrics.overlap(spike, sink, obs.tokens)
    return {
        "layers": layers,
        "attention": attention,
        "spike_tokens": spike.sum().item() / n,
        "sink_tokens": sink.sum().item() / n,
        **{key: getattr(overlap, key) for key in ("p_sink_given_spike", "p_spike_given_sink")},
        "sequences": len(ids),
    }


def assert_same_row(ours, theirs, rel=1e-5):
    json.dumps(ours, allow_nan=False)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, list):
            assert [entry["name"] for entry in ours[key]] == [entry["name"] for entry in value]
            for one, two in zip(ours[key], value, strict=True):
                assert {k: v for k, v in one.items() if k != "name"} == pytest.approx(
                    {k: v for k, v in two.items() if k != "name"}, rel=rel
                )
        elif math.isnan(value):
            assert ours[key] is None
        else:
            assert ours[key] == pytest.approx(value, rel=rel, abs=1e-12)


def with_spikes(model):
    """The model with a token, 7, that has a large channel, and keys that many queries look at."""
    with torch.no_grad():
        model.transformer.wte.weight[7, 3] = 60.0
    return model


# ---------------------------------------------------------------------------------------------------- its numbers


@pytest.mark.parametrize("arm", ARMS)
def test_a_row_is_what_detect_measures(arm, ids):
    """In every arm, of the first sequences of the batch, in a pass that trains."""
    fields = config.fields_of((GPTConfig,))
    changes = {key: value for key, value in config.read_config(ROOT / "configs" / f"{arm}.py").items() if key in fields}
    size = TINY | {"n_head": 4 if "n_kv_head" in changes else 2, "n_layer": 4 if "cycle" in str(changes) else 2}
    model = with_spikes(tiny(**{**changes, **size, "dropout": 0.0}))
    subject = subject_of(model)
    monitor = Monitor(model.train(), every=5, sequences=4)
    with monitor(10):
        model(ids, ids)[1].backward()
    model.eval()
    assert_same_row(monitor.row, row_of(subject, ids[:4]))
    assert monitor.row["spike_tokens"] > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_of_a_transformers_model_is_what_detect_measures(family, attention):
    torch.manual_seed(0)
    make = FAMILIES[family]()
    try:
        model = hf.model_class(make).from_config(make, attn_implementation=attention).eval()
    except ValueError:
        pytest.skip(f"{family} has no {attention}")
    subjects = hf.subjects_of(copy.deepcopy(model), str)
    ids = torch.randint(3, 60, (3, 24), generator=torch.Generator().manual_seed(0))
    monitor = Monitor(model, sequences=2)
    inputs = {"input_ids": ids}
    subject = subjects[0]
    if subject.start is not None:
        inputs["decoder_input_ids"] = subject.stream_ids(ids)
    with monitor(0), torch.no_grad():
        model(**inputs)
    if not monitor.row["attention"]:  # it bypasses the interface: the blocks are watched
        assert family == "gpt_neo" and [x["name"] for x in monitor.row["layers"]] == ["block 0", "block 1"]
        return
    assert_same_row(monitor.row, row_of(subject, ids[:2]), rel=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", HF)
def test_padding_is_left_out(family, attention, side):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=attention).eval()
    ids = torch.randint(3, 60, (2, 24))
    mask = torch.ones_like(ids)
    mask[0, 16:] = 0
    padded = torch.where(mask == 1, ids, PADDING)
    expected = row_of(hf.subjects_of(copy.deepcopy(model), str)[0], padded)
    positions = torch.arange(24).expand(2, -1).clone()
    if side == "left":
        ids[0], mask[0], positions[0] = ids[0].roll(8), mask[0].roll(8), positions[0].roll(8)
    monitor = Monitor(model)
    with monitor(0), torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=positions)
    assert_same_row(monitor.row, expected, rel=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", HF)
def test_texts_packed_in_one_row_are_what_they_are_apart(family, attention):
    """Rows of texts of 14 and 10 tokens, and of one of 24."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=attention).eval()
    ids = torch.randint(3, 60, (2, 24))
    text = torch.stack(((torch.arange(24) >= 14).long(), torch.zeros(24, dtype=torch.int64)))
    positions = torch.stack((torch.cat((torch.arange(14), torch.arange(10))), torch.arange(24)))
    seen = (text[:, :, None] == text[:, None]) & torch.ones(24, 24, dtype=torch.bool).tril()
    mask = torch.zeros(2, 1, 24, 24).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
    monitor, apart = Monitor(model), Monitor(model)
    with monitor(0), torch.no_grad():
        packed = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    texts = [ids[0, :14], ids[0, 14:], ids[1]]
    padded = torch.stack([nn.functional.pad(one, (0, 24 - len(one))) for one in texts])
    tokens = torch.arange(24) < torch.tensor([14, 10, 24])[:, None]
    with apart(0), torch.no_grad():
        logits = model(input_ids=padded, attention_mask=tokens.long()).logits
    torch.testing.assert_close(packed.flatten(0, 1), logits[tokens], atol=1e-4, rtol=1e-4)  # the model agrees
    subject = hf.subjects_of(copy.deepcopy(model), str)[0]
    expected = row_of(subject, torch.where(tokens, padded, PADDING))
    for found in (monitor, apart):
        assert_same_row(found.row, expected, rel=1e-4)
    assert monitor.row["sequences"] == 3


def test_sequences_of_padding_alone(ids):
    """They are left out; where there is nothing else, something is measured all the same."""
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]()).eval()
    for lengths, measured in (((32, 0, 9), 2), ((0, 0, 0), 3)):
        mask = (torch.arange(32) < torch.tensor(lengths)[:, None]).long()
        monitor = Monitor(model)
        with monitor(0), torch.no_grad():
            model(input_ids=ids[:3] % 60, attention_mask=mask)
        assert monitor.row["sequences"] == measured and len(monitor.row["attention"]) == 2


@pytest.mark.parametrize("attention", ["softmax", "kv_bias"])
def test_statistics_are_float32_under_autocast(ids, monkeypatch, attention):
    """Queries and keys are made in bfloat16, as in the model; their map is not."""
    model, received, given = tiny(attention=attention), [], []
    attends = [block.attn.f.attend for block in model.transformer.h]
    seen = alpha_in
    monkeypatch.setattr("spikesink.measure.monitor.alpha_in", lambda *how: received.append(seen(*how)) or received[-1])
    pairs = [(attend, lambda module, args, kwargs, out: given.append((module, *args[:2]))) for attend in attends]
    monitor = Monitor(model, sequences=6)
    with torch.no_grad(), hooked(pairs), torch.autocast("cpu", torch.bfloat16), monitor(0):
        model(ids, ids)
    for (ours, _), (attend, q, k) in zip(received, given, strict=True):
        assert q.dtype == torch.bfloat16
        torch.testing.assert_close(ours, seen(attend, q, k, True)[0], rtol=1e-6, atol=1e-6)
    assert monitor.row["layers"][0] == pytest.approx(row_of(subject_of(model), ids)["layers"][0])


def test_a_cast_made_for_a_look_is_not_the_one_that_trains(ids):
    """Autocast keeps the casts of weights, and one made where there is no gradient has none."""
    model = tiny(n_layer=1)
    attn = model.transformer.h[0].attn
    attn.forward = lambda x, embedding: x  # compiled code, too, makes its casts elsewhere
    with torch.autocast("cpu", torch.bfloat16):
        with Monitor(model)(0):
            model(ids)
        attn.f.c_attn(torch.ones(1, 1, 32)).float().sum().backward()
    assert attn.f.c_attn.weight.grad is not None


@pytest.mark.skipif(not cpp_compiler(), reason="needs a C++ compiler")
def test_compiled_sub_layers_are_seen_and_not_compiled_again(ids):
    model = tiny().train()
    expected = row_of(subject_of(model), ids)
    model.train().compile_sublayers()
    model(ids, ids)[1].backward()
    monitor = Monitor(model, sequences=6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (1, 0, 0, 1):
            with monitor(step):
                model(ids, ids)[1].backward()
    assert_same_row(monitor.last, expected, rel=1e-4)


def spikes_before_the_norm():
    """A post-norm model whose first FFN makes a spike of token 7, which the norm of the sum takes away."""
    model = tiny(norm_place="post", bias=True, activation="relu")
    attn, ffn = model.transformer.h[0].attn.f, model.transformer.h[0].mlp.f
    with torch.no_grad():
        model.transformer.wte.weight[:, 3] = 0
        model.transformer.wte.weight[7, 3] = 1.5  # a mark: normalised about 5, others' are about 1
        for parameter in (attn.c_proj.weight, attn.c_proj.bias, ffn.c_fc.weight[0]):
            parameter.zero_()
        ffn.c_fc.weight[0, 3], ffn.c_fc.bias[0], ffn.c_proj.weight[5, 0] = 1.0, -3.5, 150.0
    return model


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.skipif(not cpp_compiler(), reason="no C++ compiler"))]
)
def test_a_spike_that_a_norm_of_the_sum_takes_away_is_seen(ids, compiled):
    model, ids = spikes_before_the_norm(), ids.masked_fill(ids == 7, 8)
    ids[:4, 5] = 7
    sub_layer, sums, after = model.transformer.h[0].mlp, [], []
    before = [(sub_layer.norm_after, lambda module, args, kwargs: sums.append(args[0]))]
    with torch.no_grad(), hooked([(sub_layer, lambda module, args, kwargs, out: after.append(out))], before):
        model(ids[:4])
    largest = sums[0].abs().flatten(1).amax(1)
    assert (largest > 50).all() and after[0].abs().max() < 6
    expected = row_of(subject_of(model), ids[:4])
    monitor = Monitor(model.train())
    if compiled:
        model.compile_sublayers()
    for _ in range(2):
        with monitor(0):
            model(ids, ids)[1].backward()
    assert_same_row(monitor.row, expected, rel=1e-4)
    layers = {layer["name"]: layer for layer in monitor.row["layers"]}
    assert layers["ffn 0"]["top1"] == pytest.approx(largest.mean().item(), rel=1e-4)
    assert layers["attn 1"]["top1"] < 10 and monitor.row["spike_tokens"] == 1 / 32


def test_what_no_attention_reads_does_not_count():
    """Spikes of the last sub-layer alone: it is among the layers, and in no token, unless it is named."""
    model, ids = spikes_last(), many(4)
    for streams, share in ((None, 0), ({"last": model.transformer.h[-1].mlp}, 1 / 32)):
        with (monitor := Monitor(model, streams=streams))(0), torch.no_grad():
            model(ids)
        assert monitor.row["layers"][-1]["ratio"] > 100 and monitor.row["spike_tokens"] == share


def test_a_sink_token_is_one_in_a_twentieth_of_all_heads(ids):
    """Of 24 heads, two; a token that one head alone looks at is none."""
    one, two = (of_planted_heads(ids, heads) for heads in ([(0, 1)], [(0, 1), (1, 3)]))
    assert (one["sink_tokens"], two["sink_tokens"]) == (0, 1 / 32)
    rates = [sum(row["sink_rate"] for row in found["attention"]) for found in (one, two)]
    assert rates == pytest.approx([1 / 12, 2 / 12])


def of_planted_heads(ids, heads):
    """A monitor's row of a model of 2 x 12 heads, in some of which, (layer, head), all queries look at token 7, which
    stands at position 2."""
    model = tiny(n_head=12, n_embd=96, bias=True, position="none", norm_place="none")
    ids = ids.masked_fill(ids == 7, 8)
    ids[:, 2] = 7
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
        model.transformer.wte.weight[:, 95], model.transformer.wte.weight[7, 95] = 0, 1.0
        for layer, head in heads:
            c_attn = model.transformer.h[layer].attn.f.c_attn
            c_attn.weight[8 * head], c_attn.bias[8 * head] = 0, 1.0
            c_attn.weight[96 + 8 * head, 95] = 60.0
    with (monitor := Monitor(model))(0), torch.no_grad():
        model(ids)
    return monitor.row


def test_what_is_not_finite_is_none(ids):
    model = tiny()
    with torch.no_grad():
        model.transformer.h[0].mlp.f.c_proj.weight.fill_(torch.inf)
    monitor = Monitor(model)
    with monitor(0):
        model(ids, ids)
    json.dumps(monitor.row, allow_nan=False)
    assert monitor.row["layers"][2]["top1"] is None and monitor.row["layers"][1]["top1"] is not None
    assert monitor.words() and flat(monitor.row)


# --------------------------------------------------------------------------------------------- it changes nothing


@pytest.fixture
def train(cli, toy_data):
    def call(out, *args):
        code, printed, err = cli("train.py", *SMALL_RUN, f"--dataset={toy_data}", f"--out_dir={out}", *args)
        assert code == 0, err
        return printed

    return call


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(one, two):
    """The same bits but for the time and what the monitor saw."""
    ours, theirs = checkpoint.load(one), checkpoint.load(two)
    for key in ("model", "optimizer", "val_loss", "loss_watch"):
        assert same(getattr(ours, key), getattr(theirs, key)), key
    own = lambda folder: [
        {k: v for k, v in row.items() if k not in ("tokens_per_s", "monitor")} for row in rows(folder)
    ]
    assert own(one) == own(two)


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--dropout=0.2", "--norm_place=post"],
        ["--losses=kurtosis=1e-3", "--dropout=0.1", "--optimizer=muon"],
        ["--dtype=bfloat16", "--dropout=0.1", "--position=rope", "--qk_norm=full"],
        ["--ffn=moe", "--norm_place=post", "--value=residual", "--losses=load_balance=0.1"],
    ],
    ids=lambda extra: " ".join(extra),
)
def test_training_is_bitwise_the_same(train, tmp_path, extra):
    train(tmp_path / "on", "--monitor=1", *extra)
    train(tmp_path / "off", "--monitor=0", *extra)
    assert_same_run(tmp_path / "on", tmp_path / "off")
    assert all("monitor" in row for row in rows(tmp_path / "on"))
    assert not any("monitor" in row for row in rows(tmp_path / "off"))


@pytest.mark.skipif(not cpp_compiler(), reason="needs a C++ compiler")
def test_compiled_training_is_bitwise_the_same(tmp_path, toy_data):
    for name, every in (("on", 2), ("off", 0)):
        options = [*SMALL_RUN, f"--dataset={toy_data}", "--compile=True", "--dtype=bfloat16", f"--monitor={every}"]
        options += ["--dropout=0.1", "--losses=magnitude=1e-3", f"--out_dir={tmp_path / name}"]
        subprocess.run([sys.executable, "train.py", *options], cwd=ROOT, check=True)
    assert_same_run(tmp_path / "on", tmp_path / "off")
    assert [row["step"] for row in rows(tmp_path / "on") if "monitor" in row] == [2, 4, 6, 8]


def test_a_resumed_run_logs_the_same_looks(train, tmp_path):
    extra = ["--monitor=3", "--log_interval=4", "--dropout=0.1", "--lr_decay_iters=8"]
    train(tmp_path / "whole", *extra)
    train(tmp_path / "halves", *extra, "--max_iters=4")
    train(tmp_path / "halves", *extra, "--resume")
    timeless = lambda folder: [{**row, "tokens_per_s": 0} for row in rows(folder)]
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "halves")
    assert [(row["step"], "monitor" in row) for row in rows(tmp_path / "whole")] == [
        (3, True),
        (4, False),
        (6, True),
        (8, False),
    ]


def test_the_line_of_an_evaluation_says_what_was_seen(train, tmp_path):
    printed = train(tmp_path, "--monitor=3")
    line = next(line for line in printed.splitlines() if line.startswith("step 8:"))
    assert line.endswith("% of heads") and "spike " in line
    assert "heads" not in next(line for line in train(tmp_path / "b", "--monitor=0").splitlines() if "step 8:" in line)


def test_the_sequences_are_the_first_of_the_first_micro_batch(train, tmp_path, toy_data):
    from data.loader import Tokens

    train(tmp_path, "--monitor=1", "--max_iters=1")
    kept = json.loads((tmp_path / "config.json").read_text())["config"]
    torch.manual_seed(kept["seed"])
    model = GPT(GPTConfig(**{key: kept[key] for key in (f.name for f in dataclasses.fields(GPTConfig))}))
    x, _ = Tokens(str(toy_data), "train", 16, False, kept["seed"]).batch(0, 4, 0, 2)
    assert_same_row(rows(tmp_path)[0]["monitor"], row_of(subject_of(model), x[:4]))


def fine_tuned(family, attention, every, checkpointed=False):
    """The weights and losses of a plain loop, and its monitor."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=attention).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    data = torch.randint(3, 60, (4, 2, 3, 24), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    monitor = Monitor(model, every=every)
    for step, batches in enumerate(data):
        with monitor(step):
            for ids in batches:
                mask = (torch.arange(24) < 20).long().expand_as(ids) if step == 3 else None
                loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
                loss.backward()
                losses.append(loss.item())
        optimiser.step()
        optimiser.zero_grad()
    return model.state_dict(), losses, monitor


@pytest.mark.parametrize("family", HF)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_fine_tuning_is_bitwise_the_same(family, attention, checkpointed):
    weights, losses, monitor = fine_tuned(family, attention, 1, checkpointed)
    plain_weights, plain_losses, none = fine_tuned(family, attention, 0, checkpointed)
    assert same(weights, plain_weights) and losses == plain_losses
    assert none.row is None and len(monitor.row["attention"]) == 2


@pytest.mark.parametrize("family", HF)
def test_the_trainer_is_bitwise_the_same(family, tmp_path):
    ids = torch.randint(3, 60, (24, 16), generator=torch.Generator().manual_seed(0))
    data, ended = [{"input_ids": row, "labels": row} for row in ids], []
    for every in (0, 2):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
        arguments = transformers.TrainingArguments(
            str(tmp_path / str(every)),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=6,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        callback = MonitorCallback(trainer, every=every)
        trainer.add_callback(callback)
        trainer.train()
        ended.append((model.state_dict(), [row["loss"] for row in trainer.state.log_history if "loss" in row]))
    assert same(*ended)
    seen = [row for row in trainer.state.log_history if "spike/ratio/attn 1" in row]
    assert [row["step"] for row in seen] == [2, 4, 6]
    assert seen[-1].items() >= flat(callback.monitor.row).items()


def test_nothing_is_left_on_a_model(ids):
    """Hooks, modes, the random state and the interface of transformers are what they were."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["gpt2"]())
    model.transformer.h[0].eval()
    held = lambda: (
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [[*vars(m)] for m in model.modules()],
        transformers.AttentionInterface.get_interface,
        model.config._attn_implementation,
        torch.get_rng_state().tolist(),
    )
    before = held()
    monitor = Monitor(model)
    assert held() == before
    with contextlib.suppress(ZeroDivisionError), monitor(0):
        raise ZeroDivisionError
    assert held() == before
    with monitor(7):
        assert held() == before  # no hook at other steps
    with torch.no_grad(), monitor(0):
        model.eval()(ids % 60)


def test_only_the_first_pass_of_a_block_is_seen(ids):
    model = tiny()
    monitor = Monitor(model)
    with monitor(0):
        model(ids[:3], ids[:3])
        model(ids[3:, :9], ids[3:, :9])
    assert_same_row(monitor.row, row_of(subject_of(model), ids[:3]))
    with monitor(1):
        model(ids)
    assert monitor.row is None and monitor.words()


# --------------------------------------------------------------------------------------------------- other models


class Own(nn.Module):
    """A model of neither kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_of_any_model_are_found_or_named(ids):
    model = Own()
    with (monitor := Monitor(model))(0):
        model(ids).sum().backward()
    row = monitor.row
    assert [layer["name"] for layer in row["layers"]] == ["block 0", "block 1", "block 2"]
    assert row["attention"] == [] and row["sink_tokens"] is row["p_sink_given_spike"] is None
    assert monitor.words().endswith("attention not measured")
    with (named := Monitor(model, streams={"in": model.embed, "out": model.blocks[2]}))(0):
        out = model(ids)
    assert [layer["name"] for layer in named.row["layers"]] == ["in", "out"]
    assert named.row["layers"][1]["top1"] == pytest.approx(out[:4].abs().flatten(1).amax(1).mean().item())
    with (inside := Monitor(nn.Sequential(tiny())))(0):
        inside.view.model(ids)
    assert inside.row["attention"]


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), lambda: nn.ModuleList([nn.Linear(2, 2)])])
def test_a_model_without_a_stream_is_told_what_to_give(make):
    with pytest.raises(UserError, match="streams="), Monitor(make())(0):
        pass


def test_a_stream_of_another_shape_and_a_whole_compiled_model_are_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match="streams="), Monitor(model, streams={"a": model[0]})(0):
        model(torch.zeros(3, 2))
    trainer = types.SimpleNamespace(model=model, args=types.SimpleNamespace(torch_compile=True))
    for make in (lambda: Monitor(torch.compile(tiny())), lambda: MonitorCallback(trainer)):
        with pytest.raises(UserError, match="compiled as a whole"):
            make()


# ------------------------------------------------------------------------------------------- TensorBoard, trackers


def test_tensorboard_holds_layers_heatmaps_and_the_arm(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    train(tmp_path, "--tensorboard=True", "--monitor=2", "--max_iters=4", "--norm_place=post")
    train(tmp_path, "--tensorboard=True", "--resume")
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    looks = [row for row in rows(tmp_path) if "monitor" in row]
    for name, value in flat(looks[0]["monitor"]).items():
        assert [e.step for e in seen.Scalars(name)] == [2, 4, 6, 8]
        assert seen.Scalars(name)[0].value == pytest.approx(value)
    assert {"spike/ratio/attn 0", "spike/kurtosis/embedding", "sink/rate/attn 0"} <= flat(looks[0]["monitor"]).keys()
    assert {"heatmap/spike/ratio", "heatmap/spike/kurtosis", "heatmap/sink/rate"} == {*seen.Tags()["images"]}
    assert seen.Images("heatmap/sink/rate")[-1].step == 8  # over both parts of the run
    started = seen.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    arm = plugin_data_pb2.HParamsPluginData.FromString(started).session_start_info.hparams
    assert arm["norm_place"].string_value == "post" and "out_dir" not in arm
    ends = {"val_loss": rows(tmp_path)[-1]["val_loss"], **headline(looks[-1]["monitor"])}
    for name, value in ends.items():
        assert seen.Scalars(f"hparam/{name}")[-1].value == pytest.approx(value)


@pytest.fixture
def tracked(monkeypatch):
    """A module in the place of trackio, which notes its calls."""
    calls, module = [], types.ModuleType("trackio")
    module.init = lambda **how: calls.append(("init", how))
    module.log = lambda row, step: calls.append(("log", row, step))
    module.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module, calls


def test_a_tracker_gets_the_numbers_of_every_row(train, tmp_path, tracked):
    calls = tracked[1]
    train(tmp_path / "arm", "--tracker=trackio", "--monitor=4")
    (_, how), *logged, last = calls
    assert (how["name"][:4], how["config"]["n_layer"]) == ("arm-", 1) and last == ("finish",)
    assert [(row, step) for _, row, step in logged] == [(numbers(row), row["step"]) for row in rows(tmp_path / "arm")]
    assert "spike/ratio/attn 0" in logged[3][1] and "step" not in logged[3][1]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_one_run_in_a_tracker_with_each_step_once(train, tmp_path, monkeypatch, name):
    """As they are: wandb makes a run of every init without an id, trackio knows runs by name and keeps every row."""
    runs, now = {}, []
    module = types.ModuleType(name)

    def init(project, name, config, resume, **more):
        key = more.get("id", f"random {len(runs)}") if module.__name__ == "wandb" else name
        now[:] = [runs.setdefault(key, [])]

    module.init, module.finish = init, lambda: None
    module.log = lambda row, step: now[0].append(step)
    monkeypatch.setitem(sys.modules, name, module)
    given = [f"--tracker={name}", "--lr_decay_iters=8"]
    for out in (tmp_path / "one" / "arm", tmp_path / "two" / "arm"):  # two runs whose folders are called the same
        train(out, *given, "--max_iters=4")
        with open(out / "log.jsonl", "a") as log:
            log.write('{"step": 5}\n{"step": 6}\n')  # killed after step 6, saved at 4
        now[0] += [5, 6]
        train(out, *given, "--resume")
    assert list(runs.values()) == [[1, 2, 3, 4, 5, 6, 7, 8]] * 2
    train(tmp_path / "one" / "arm", *given, "--overwrite", "--max_iters=2")
    assert list(runs.values())[2:] == [[1, 2]]

    def fail(row, step):
        raise OSError("no network")

    module.log, logs = fail, module.log
    train(tmp_path / "one" / "arm", *given, "--resume", "--max_iters=4")
    module.log = logs
    train(tmp_path / "one" / "arm", *given, "--resume")
    assert list(runs.values())[2:] == [[1, 2, 5, 6, 7, 8]]


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_tracker_that_fails_is_one_warning(cli, toy_data, tmp_path, tracked, where):
    def fail(*args, **kwargs):
        raise OSError("no network")

    setattr(tracked[0], where, fail)
    code, _, err = cli(
        "train.py", *SMALL_RUN, f"--dataset={toy_data}", f"--out_dir={tmp_path}", "--tracker=trackio", "--max_iters=4"
    )
    assert code == 0 and err.count("no network; training goes on") == 1


def test_a_tracker_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Tracker("wandb", tmp_path, {})


def test_the_example_of_a_hugging_face_model(tmp_path):
    (tmp_path / "text").write_text("a spike, the sparse and the sink; " * 200)
    command = [sys.executable, "docs/examples/finetune_hf.py", f"--text={tmp_path / 'text'}", "--steps=4", "--every=2"]
    done = subprocess.run(
        [*command, "--length=32", "--batch_size=2"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("{")]
    assert [line.split(":")[0] for line in lines] == [
        "== transformers.Trainer",
        *("step 2", "step 4"),
        "== a plain loop",
        *("step 2", "step 4"),
    ]
    assert all("spike" in line and "of heads" in line for line in lines if line.startswith("step"))
