"""Each axis against a formula written out here, and random combinations of them all."""

import contextlib
import copy
import dataclasses
import math
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import model as model_module
import train
from model import CHOICES, GPT, Context, GPTConfig
from spikesink.errors import UserError
from spikesink.measure.observe import Ordinary, observe
from spikesink.models import convert
from spikesink.models.checkpoint import Checkpoint

from .conftest import TINY, subject_of, tiny

T = 20
IDS = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))


def seam_of(**changes):
    torch.manual_seed(0)
    seam = tiny(n_head=4, **changes).transformer.h[0].attn.f.attend
    for parameter in seam.parameters():
        parameter.data.normal_()
    return seam, *torch.randn(3, 2, 4, T, 8).unbind()


def causal_logits(q, k):
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.size(-1))
    return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)


def parameters_of(seam):
    return {name.removeprefix("normalise."): parameter for name, parameter in seam.named_parameters()}


def with_column(logits, column):
    """Softmax over the keys and a column more: the keys' weights and the column's."""
    exponentials, extra = logits.exp(), column.exp()
    total = exponentials.sum(-1, keepdim=True) + extra
    return exponentials / total, extra / total


def k_bias(logits, q, parameters):
    column = (q * parameters["key"][:, None]).sum(-1, keepdim=True) / math.sqrt(q.size(-1))
    weights, extra = with_column(logits, column)
    return weights, extra * parameters["value"][:, None] if "value" in parameters else 0


def softpick(logits):
    """As printed, but for hidden keys, which count nothing: Zuhri et al. 2025, equation 4."""
    powers = (logits.exp() - 1).masked_fill(logits.isneginf(), 0)
    return powers.clip(min=0) / (
        powers.abs().sum(-1, keepdim=True) + 1e-6 * logits.amax(-1, keepdim=True).clip(0).exp()
    ), 0


# kind -> (weights, output of the slot), from logits, q and the seam's parameters
FORMULAS = {
    "softmax": lambda x, q, p: (x.exp() / x.exp().sum(-1, keepdim=True), 0),
    "softmax1": lambda x, q, p: (x.exp() / (1 + x.exp().sum(-1, keepdim=True)), 0),
    "sink_logit": lambda x, q, p: (with_column(x, p["logit"].view(1, -1, 1, 1))[0], 0),
    "k_bias": k_bias,
    "kv_bias": k_bias,
    "clipped": lambda x, q, p: ((1.03 * x.softmax(-1) - 0.03).clip(0, 1), 0),
    "softpick": lambda x, q, p: softpick(x),
    "sigmoid": lambda x, q, p: (1 / (1 + (math.log(32) - x).exp()), 0),
    "relu": lambda x, q, p: (x.clip(min=0) / torch.arange(1, T + 1)[:, None], 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", model_module.ATTENTIONS)
def test_attention_kind_is_its_formula_forward_and_backward(kind):
    seam, q, k, v = seam_of(attention=kind)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    parameters = parameters_of(seam)
    weights, slot = FORMULAS[kind](causal_logits(q, k), q, parameters)
    expected, ours = weights @ v + slot, seam(q, k, v, chunk=7)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    wanted = [*inputs, *parameters.values()]
    gradients = [torch.autograd.grad((out**2).sum(), wanted) for out in (ours, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
    masked = seam(q, k, v, bias=torch.zeros(1), chunk=7)  # the path with a bias is the same function
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", model_module.ATTENTIONS)
def test_received_attention_of_every_kind_is_that_of_its_explicit_map(kind, ids):
    """Convention: the weights, divided by the row's sum where a kind does not normalise (sigmoid, ReLU)."""
    model = tiny(attention=kind)
    maps = []

    def keep(module, args, output):
        q, k, _ = args
        weights, _ = FORMULAS[kind](causal_logits(q, k), q, parameters_of(module))
        maps.append(
            weights / weights.sum(-1, keepdim=True).clamp_min(1e-30) if kind in ("sigmoid", "relu") else weights
        )

    subject, ids = subject_of(model), ids[:, :T]
    ordinary = Ordinary.from_ids(subject, ids)  # a pass of its own
    for block in model.transformer.h:
        block.attn.f.attend.register_forward_hook(keep)
    with torch.no_grad():
        obs = observe(subject, ids, batch_size=6, progress=False, ordinary=ordinary)
    for stats, weights in zip(obs.attention, maps, strict=True):
        alpha = weights.sum(2) / torch.arange(T, 0, -1)
        torch.testing.assert_close(stats.sums["alpha"], alpha.sum(0).double(), atol=1e-5, rtol=1e-4)


def test_sliding_window_and_alibi_are_their_masks():
    seam, q, k, v = seam_of(window=5, position="alibi")
    i, j = torch.arange(T)[:, None], torch.arange(T)
    slopes = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8])[:, None, None]  # Press et al.: 2^(-8i/n), n = 4 heads
    logits = causal_logits(q, k) - slopes * (i - j)
    logits = logits.masked_fill(i - j >= 5, -torch.inf)
    torch.testing.assert_close(seam(q, k, v), logits.softmax(-1) @ v, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seam.shares(q[:, :, 9:], k, 9), logits.softmax(-1)[:, :, 9:], atol=1e-6, rtol=1e-4)


def test_alibi_slopes_beyond_a_power_of_two_are_the_papers():
    assert model_module.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    expected = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]  # for 6: those of 4, then the odd ones of 8
    assert model_module.alibi_slopes(6).tolist() == pytest.approx(expected)


def test_grouped_keys_are_shared_keys():
    few = tiny(n_head=4, n_kv_head=2)
    many = tiny(n_head=4)
    state = few.state_dict()
    for i in range(2):
        q, k, v = state[f"transformer.h.{i}.attn.f.c_attn.weight"].split([32, 16, 16])
        repeat = lambda w: w.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
        state[f"transformer.h.{i}.attn.f.c_attn.weight"] = torch.cat([q, repeat(k), repeat(v)])
    many.load_state_dict(state)
    ids = torch.randint(64, (2, 32))
    torch.testing.assert_close(few(ids)[0], many(ids)[0], atol=1e-5, rtol=1e-4)


def test_sinusoidal_positions_are_vaswanis_at_the_embeddings_scale():
    table = tiny(position="sinusoidal").transformer.wpe.table
    for position, i in ((0, 0), (5, 3), (31, 15)):
        angle = position / 10000 ** (2 * i / 32)
        expected = torch.tensor([math.sin(angle), math.cos(angle)]) * 0.02 * math.sqrt(2)
        torch.testing.assert_close(table[position, 2 * i : 2 * i + 2], expected, atol=1e-6, rtol=1e-4)
    assert table.square().mean().sqrt() == pytest.approx(0.02, rel=1e-3)


GATE_SOURCES = {
    "input": lambda x, e, w: x @ w.T,
    "token": lambda x, e, w: e @ w.T,
    "constant": lambda x, e, w: w[:, 0],
    "position": lambda x, e, w: w.T[:T],
}


@pytest.mark.parametrize("source", GATE_SOURCES)
@pytest.mark.parametrize("gate", ["channel", "head", "single"])
def test_gate_is_its_formula(gate, source):
    attention = tiny(gate=gate, gate_input=source).transformer.h[0].attn.f
    plain = tiny().transformer.h[0].attn.f
    plain.c_attn.weight, plain.c_proj.weight = attention.c_attn.weight, torch.nn.Parameter(torch.eye(32))
    x, embedding = torch.randn(2, 3, T, 32).unbind()
    g = torch.sigmoid(GATE_SOURCES[source](x, embedding, attention.gate.c_gate.weight))
    out = plain(x, None)  # before c_proj, heads x width = 2 x 16
    wide = {"channel": g, "head": g.repeat_interleave(16, dim=-1) if gate == "head" else g, "single": g}[gate]
    torch.testing.assert_close(
        attention(x, Context(None, embedding, None)), (out * wide) @ attention.c_proj.weight.T, atol=1e-5, rtol=1e-4
    )


def test_residual_values_are_half_the_first_layers():
    """Through a whole model: the second layer's values are the mean of its own and the first's."""
    model = tiny(value="residual")
    seen = []
    for block in model.transformer.h:
        block.attn.f.attend.register_forward_hook(lambda m, args, out: seen.append(args[2]))
    x = model.transformer.wte(IDS) + model.transformer.wpe(torch.arange(12))
    model(IDS)
    first, second = (block.attn for block in model.transformer.h)
    own = lambda attn, x: attn.f.qkv(attn.norm_before(x))[2]
    torch.testing.assert_close(seen[0], own(first, x))
    context = Context(IDS, model.transformer.wte(IDS), torch.arange(12))
    x = model.transformer.h[0](x, context)
    torch.testing.assert_close(
        seen[1], (own(second, x) + own(first, model.transformer.wte(IDS) + model.transformer.wpe(torch.arange(12)))) / 2
    )


def test_differential_heads_are_written_out():
    """Two softmax maps on one value of twice the width, subtracted, normed: Ye et al. 2024, equations 1 to 3."""
    model = tiny(head_out="differential", n_head=4)
    attention, x = model.transformer.h[1].attn.f, torch.randn(3, T, 32)
    q, k, v = (x @ w.T for w in attention.c_attn.weight.split(32))
    heads = lambda y, n: y.view(3, T, n, -1).transpose(1, 2)
    maps = causal_logits(heads(q, 4), heads(k, 4)).softmax(-1)
    start = 0.8 - 0.6 * math.exp(-0.3)  # the second layer
    lq1, lk1, lq2, lk2 = attention.head_out.vectors
    factor = (lq1 * lk1).sum().exp() - (lq2 * lk2).sum().exp() + start
    out = torch.stack([(maps[:, 2 * i] - factor * maps[:, 2 * i + 1]) @ heads(v, 2)[:, i] for i in range(2)], dim=2)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * attention.head_out.norm.weight * (1 - start)
    expected = out.flatten(-2) @ attention.c_proj.weight.T
    for mode in (attention.train(), attention.eval()):
        torch.testing.assert_close(mode(x, None), expected, atol=1e-5, rtol=1e-4)
    subject, ids = subject_of(model), torch.randint(64, (2, T))
    obs = observe(subject, ids, progress=False)
    assert [len(stats.sums["alpha"]) for stats in obs.attention] == [4, 4]  # each map by itself
    torch.testing.assert_close(obs.attention[0].sums["mass"], torch.full((4,), 2.0 * T, dtype=torch.float64))


def test_head_rmsnorm_gives_every_head_and_position_one_size():
    attention, x = tiny(head_out="rmsnorm").transformer.h[0].attn.f, torch.randn(2, T, 32)
    seen = []
    attention.head_out.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    attention(x, None)
    out, normed = seen[0]  # (B, T, H, D)
    torch.testing.assert_close(
        normed, out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * attention.head_out.norm.weight
    )


def test_experts_are_written_out_and_their_balance_is_a_sequences():
    model = tiny(ffn="moe", n_expert=4, n_active=2).train()
    moe, x = model.transformer.h[0].mlp.f, torch.randn(3, T, 32)
    context = Context(None, None, None)
    out = moe(x, context)
    probabilities = (x @ moe.router.weight.T).softmax(-1)
    best = probabilities.topk(2, -1)
    for b, t in ((0, 0), (2, 7)):
        experts, weights = best.indices[b, t].tolist(), best.values[b, t] / best.values[b, t].sum()
        expected = sum(w * moe.experts[e](x[b, t], None) for e, w in zip(experts, weights, strict=True))
        torch.testing.assert_close(out[b, t], expected, atol=1e-5, rtol=1e-4)
    share = torch.stack([(best.indices == e).float().mean((1, 2)) for e in range(4)], -1)
    balance = 4 * (share * probabilities.mean(1)).sum(-1)
    torch.testing.assert_close(context.losses["load_balance"], balance.mean())
    one = Context(None, None, None)
    moe(x[:1], one)  # a sequence's own, whatever it is batched with
    torch.testing.assert_close(one.losses["load_balance"], balance[0])
    model(IDS, IDS)[1].backward()  # an expert without tokens has a gradient, of zeros
    assert all(p.grad is not None for p in model.parameters())
    assert set(model.losses) == {"load_balance"} and set(model.scalars) == {"busiest_expert"}
    active = 6 * (2 * 3 * 32 * (8 * round(32 / 3) // 2) + 4 * 32)
    assert model_module.flops_of(moe, T) == active


def test_dyt_and_its_alphas():
    model = tiny(norm="dyt", bias=True)
    block, x = model.transformer.h[0], torch.randn(3, 32)
    assert isinstance(model.transformer.ln_f, torch.nn.RMSNorm)
    fresh = GPT(GPTConfig(**TINY, norm="dyt"))
    assert [
        fresh.transformer.h[1].attn.norm_before.alpha.item(),
        fresh.transformer.h[1].mlp.norm_before.alpha.item(),
    ] == [
        pytest.approx(0.8),
        pytest.approx(0.2),
    ]
    norm = block.attn.norm_before
    torch.testing.assert_close(norm(x), norm.weight * torch.tanh(norm.alpha * x) + norm.bias)


def test_registers_stand_in_front_and_shift_nothing_but_rotary_positions():
    ids = torch.randint(64, (2, 12))
    plain, model = tiny(), tiny(n_register=3)
    state = model.state_dict()
    # registers whose keys get no attention change nothing: compare with the same weights and the registers masked
    plain.load_state_dict({name: value for name, value in state.items() if "registers" not in name})
    mask = torch.zeros(1, 1, 1, 15)
    mask[..., :3] = -torch.inf
    handles = [
        block.attn.f.attend.register_forward_pre_hook(lambda m, a, kw: (a, {**kw, "bias": mask}), with_kwargs=True)
        for block in model.transformer.h
    ]
    torch.testing.assert_close(model(ids)[0], plain(ids)[0], atol=1e-5, rtol=1e-4)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(model(ids)[0], plain(ids)[0], atol=1e-3)
    obs = observe(subject_of(model), ids, progress=False)
    assert obs.ids[:, :4].tolist() == [[-1, -2, -3, row[0]] for row in ids.tolist()]
    assert subject_of(model).text(-2) == "<register 1>"


def test_what_goes_to_a_slot_is_reported(ids):
    from spikesink.measure.summarise import summarise

    torch.manual_seed(0)
    fresh = GPT(GPTConfig(**TINY, attention="softmax1")).eval()  # logits near 0: each of t + 2 takes a share
    found = summarise(subject_of(fresh), observe(subject_of(fresh), ids, progress=False))
    expected = sum(1 / (t + 2) for t in range(32)) / 32
    assert torch.tensor(found.sinks.slot_share).flatten().tolist() == pytest.approx([expected] * 4, abs=0.01)


def test_flops_and_parameters_of_gpt2_small():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, bias=True))
        half = GPT(GPTConfig(vocab_size=50257, bias=True, window=512))
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert model.flops_per_token(1024) == 6 * matrices + 12 * 12 * 768 * 1024
    assert half.flops_per_token(1024) == 6 * matrices + 12 * 12 * 768 * 512


# ------------------------------------------------------------------------------------------ combinations

SHAPE = {"n_embd": 16, "block_size": 12, "vocab_size": 11}
DRAWN = {
    **{key: list(table) for key, table in CHOICES.items()},
    **{key: [False, True] for key in ("bias", "tie", "norm_gain")},
    "gate_input": ["input", "input", *model_module.GATE_INPUTS],
    "n_layer": [1, 2, 3, 2, 3],
    "n_head": [1, 2, 4],
    "n_kv_head": [0, 0, 0, 0, 1, 3],
    "head_dim": [0, 6, 7],
    "ffn_hidden": [0, 0, 24],
    "window": [0, 3, 3, 1, "3 0"],
    "n_register": [0, 2],
    "n_expert": [8] * 9 + [3],
    "embedding_init": ["small"] * 3 + ["unit"],
    "head_out": ["none"] * 3 + [*model_module.HEAD_OUTS],
    "norm_place": [*model_module.NORM_PLACES, "post*1 pre", "cycle(sandwich pre)"],
    "norm": [*model_module.NORMS, "rmsnorm layernorm"],
    "residual_scale": [*model_module.RESIDUAL_SCALES, "0.7", "learned 0.5"],
    "stream_clip": [0.0, 5.0],
    "logit_cap": [0.0, 10.0],
}
configs = st.fixed_dictionaries({key: st.sampled_from(values) for key, values in DRAWN.items()})


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(choice=configs)
def test_any_config_trains_and_reloads_or_is_refused_by_name(choice):
    try:
        config = GPTConfig(**SHAPE, **choice)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal:
        assert any(key in refusal for key in choice), refusal
        return
    ids = torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(0))
    check_gradient(config, ids)
    torch.manual_seed(0)
    model = GPT(config)
    again = GPT.from_checkpoint(Checkpoint(dataclasses.asdict(config), model.state_dict()))
    assert torch.equal(again.eval()(ids)[0], model.eval()(ids)[0])
    assert torch.isfinite(observe(subject_of(model), ids, progress=False).loss).all()
    contracts = train.check(config, only=("causal", "replay", "rows", "flops", "parameters"))
    assert [str(result) for result in contracts if result.broken] == []


def check_gradient(config, ids):
    """In float64, a small step along the gradient of the loss that is trained changes the loss as |gradient|^2 says."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        model = GPT(config)
        model(ids, ids)[1].backward()
        slope = sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)
        assert slope > 0
        step = 1e-8 / slope**0.5  # some relu attention is so curved that 1e-6 is too long
        change = loss_after(model, ids, step) - loss_after(model, ids, -step)
        assert change == pytest.approx(-2 * step * slope, rel=1e-3)
    finally:
        torch.set_default_dtype(torch.float32)


def loss_after(model, ids, step):
    """The loss, of whole logits, after a step of this size down the gradient, which is not taken."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, before in zip(moved.parameters(), model.parameters(), strict=True):
            if before.grad is not None:
                parameter -= step * before.grad
        return torch.nn.functional.cross_entropy(moved(ids)[0].flatten(0, 1), ids.flatten()).item()


def test_drawn_configs_are_valid_often_enough():
    """The property above would be empty if nearly all draws were refused."""
    drawn = find_valid(300)
    assert drawn > 75


def find_valid(n):
    generator = random.Random(0)
    pick = lambda values: generator.choice(list(values))
    valid = 0
    for _ in range(n):
        choice = {key: pick(values) for key, values in DRAWN.items()}
        with contextlib.suppress(ValueError):
            GPTConfig(**SHAPE, **choice)
            valid += 1
    return valid


# ------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize(
    "arm",
    [
        {"bias": True, "activation": "gelu_tanh"},
        {"activation": "relu", "ffn_hidden": 48, "tie": False},
        {"norm": "rmsnorm", "position": "rope", "ffn": "gated", "activation": "silu", "n_kv_head": 1, "head_dim": 10},
        {"norm": "rmsnorm", "position": "rope", "ffn": "gated", "activation": "gelu", "tie": False, "rope_base": 5e5},
    ],
)
def test_exported_model_has_the_same_logits(tmp_path, arm):
    from transformers import AutoModelForCausalLM

    from spikesink.models.export import export

    model = tiny(**arm)
    content = Checkpoint(dataclasses.asdict(model.config), model.state_dict(), data={"tokenizer": "byte"})
    assert export(content, tmp_path / "hf") == "with its tokenizer"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(64, (2, 32))
    torch.testing.assert_close(theirs(ids).logits, model(ids)[0], atol=1e-4, rtol=1e-4)
    again = GPT.from_pretrained(str(tmp_path / "hf")).eval()
    torch.testing.assert_close(again(ids)[0], model(ids)[0], atol=1e-5, rtol=1e-4)


def test_export_refuses_what_neither_family_computes():
    for arm, words in (
        ({"norm_place": "post"}, "GPT-2 does not compute norm_place=post"),
        ({"position": "rope", "norm": "rmsnorm"}, "Llama does not compute ffn=plain"),
        ({"attention": "softmax1", "gate": "head"}, "attention=softmax1.*gate=head"),
        ({"ffn_hidden": "48*2"}, r"GPT-2 does not compute ffn_hidden=48\*2"),
    ):
        model = tiny(**arm)
        with pytest.raises(ValueError, match=words):
            convert.to_hf(dataclasses.asdict(model.config), model.state_dict())


def test_export_writes_all_or_nothing(tmp_path):
    from spikesink.models.export import export

    model = tiny()
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 64, "bias": False}
    content = Checkpoint(args, model.state_dict(), data={"tokenizer": "gpt2", "vocab_size": 64})
    with pytest.raises(UserError, match="no file of BPE ranks"):
        export(content, tmp_path / "hf", bpe=tmp_path / "nowhere")
    assert not (tmp_path / "hf").exists()
    assert "no tokenizer" in export(content, tmp_path / "hf")  # nanoGPT's fields alone are enough
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        export(content, tmp_path / "file" / "hf")


def test_exported_byte_tokenizer_is_bytes():
    from spikesink.models.export import byte_tokenizer

    tokenizer = byte_tokenizer()
    text = "Grüße, 世界!\n\ttab"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.bos_token_id == 256
