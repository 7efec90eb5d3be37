"""The model against Hugging Face, explicit formulas and the residual identity."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import model as model_module
from model import GPT, Context, GPTConfig
from spikesink.models import convert

from .conftest import TINY, tiny

IDS = torch.randint(64, (3, 32), generator=torch.Generator().manual_seed(0))


def hf_gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 32, "vocab_size": 64}
    source = GPT2LMHeadModel(GPT2Config(**shape, **changes)).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return source


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_gpt2_logits_and_gradients_are_transformers(tmp_path, activation):
    source = hf_gpt2(activation_function=activation, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    source.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).train()
    theirs = source(IDS, labels=IDS)
    logits, loss = ours(IDS[:, :-1])[0], ours(IDS[:, :-1], IDS[:, 1:])[1]
    torch.testing.assert_close(logits, theirs.logits[:, :-1], atol=1e-4, rtol=0)
    loss.backward()
    theirs.loss.backward()
    block, reference = ours.transformer.h[0], source.transformer.h[0]
    torch.testing.assert_close(
        ours.transformer.wte.weight.grad, source.transformer.wte.weight.grad, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        block.attn.f.c_attn.weight.grad, reference.attn.c_attn.weight.grad.T, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(block.mlp.norm_before.weight.grad, reference.ln_2.weight.grad, atol=1e-5, rtol=1e-4)


def test_gpt2_that_this_model_cannot_compute_is_refused():
    with pytest.raises(ValueError, match="attention scaling"):
        convert.from_hf(hf_gpt2(scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(ValueError, match="mish"):
        convert.from_hf(hf_gpt2(activation_function="mish"))


def test_nanogpt_checkpoint_loads():
    source = hf_gpt2()
    names = {f"_orig_mod.{k}": v.T if k.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and v.dim() == 2 else v
             for k, v in source.state_dict().items()}  # fmt: skip
    names["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()  # nanoGPT's causal-mask buffer
    args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32, "bias": True, "vocab_size": 64, "dropout": 0.0}
    ours = GPT.from_checkpoint(convert.Weights(args, convert.from_nanogpt(names))).eval()
    # nanoGPT computes exact GELU where GPT-2 has the tanh approximation
    torch.testing.assert_close(ours(IDS)[0], source(IDS).logits, atol=5e-3, rtol=0)


def choices(key, *values, **others):
    return [{key: value, **others} for value in values]


ARMS = [
    *({"norm_place": p, "norm": n} for p, n in itertools.product(model_module.NORM_PLACES, model_module.NORMS)),
    *({"activation": a, "ffn": f} for a, f in itertools.product(model_module.ACTIVATIONS, ("plain", "gated"))),
    *choices("ffn", "linear", "attention"),
    *choices("qk_norm", *model_module.QK_NORMS, norm="rmsnorm", n_head=4, n_kv_head=2),
    *choices("residual_scale", *sorted({*model_module.RESIDUAL_SCALES} - {"deepnorm"}), "0.3"),
    {"residual_scale": "deepnorm", "init_scale": "deepnorm", "norm_place": "post"},
    {"residual_scale": "0.3", "norm_place": "sandwich"},
    *choices("position", *model_module.POSITIONS),
    *choices("attention", *model_module.ATTENTIONS),
    *(
        {"gate": g, "gate_input": i}
        for g, i in itertools.product(sorted({*model_module.GATES} - {"none"}), model_module.GATE_INPUTS)
    ),
    {"bias": True, "tie": False, "logit_cap": 2.0, "norm_gain": False},
    {"stream_clip": 0.5},
    {"window": 4, "position": "alibi"},
    {"n_register": 3, "position": "rope", "head_dim": 10, "ffn_hidden": 40},
    {"value": "residual"},
    *choices("head_out", *model_module.HEAD_OUTS, n_head=4),
    {"head_out": "differential", "value": "residual", "n_head": 4, "n_kv_head": 2, "gate": "head"},
    {"ffn": "moe", "n_expert": 4, "n_active": 2},
    {"norm_place": "post*1 pre", "window": "cycle(4 0)", "ffn": "moe plain", "bias": "true false", "n_layer": 3},
    {"embedding_init": "unit", "tie": False, "init_scale": "one"},
]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "-".join(map(str, arm.values())))
def test_residual_identity(arm):
    """stream_after == norm_after(stream_before + update), and the update is what the equation says."""
    model = tiny(**arm)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith((".update", "stream")):
            module.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
    logits, _ = model(IDS)
    embedding = model.transformer.wte(IDS)
    if model.config.n_register:
        registers = model.transformer.registers.weight.expand(len(IDS), -1, -1)
        embedding = torch.cat((registers, embedding), dim=1)
    context = Context(IDS, embedding, torch.arange(32))
    before = seen["transformer.stream"]
    for i, block in enumerate(model.transformer.h):
        for kind, sub in (("attn", block.attn), ("mlp", block.mlp)):
            update, after = (seen[f"transformer.h.{i}.{kind}.{tap}"] for tap in ("update", "stream"))
            expected = sub.norm_after(before + update)
            if model.config.stream_clip:
                expected = expected.clamp(-model.config.stream_clip, model.config.stream_clip)
            torch.testing.assert_close(after, expected, atol=0, rtol=0)
            out = sub.f(sub.norm_before(before), context)
            scale = {"inv_sqrt_2L": 0.5, "deepnorm": 4**-0.25, "0.3": 0.3}.get(
                arm.get("residual_scale"), getattr(sub.scale, "scale", 1.0)
            )
            torch.testing.assert_close(update, scale * sub.norm_update(out), atol=1e-6, rtol=1e-6)
            before = after
    expected = model.transformer.ln_f(before[:, model.config.n_register :]) @ model.lm_head.weight.T
    if model.config.logit_cap:
        expected = model.config.logit_cap * torch.tanh(expected / model.config.logit_cap)
    torch.testing.assert_close(logits, expected)
    assert (model.lm_head.weight is model.transformer.wte.weight) == model.config.tie


@pytest.mark.parametrize(
    "text, n_layer, values",
    [
        ("post*2 pre", 5, "post post pre pre pre"),
        ("post pre", 3, "post pre pre"),
        ("post*2 pre*1", 3, "post post pre"),
        ("post*25% pre", 12, "post post post" + " pre" * 9),
        ("post*25% pre", 2, "post pre"),
        ("cycle(post pre*2)", 5, "post pre pre post pre"),
    ],
)
def test_an_axis_varies_by_layer_as_it_is_written(text, n_layer, values):
    config = GPTConfig(**{**TINY, "n_layer": n_layer}, norm_place=text)
    assert [layer.norm_place for layer in config.layers] == values.split()
    assert GPTConfig(**dataclasses.asdict(config)) == config  # as a checkpoint has it
    model = GPT(config)
    posts = [isinstance(block.mlp.norm_after, torch.nn.LayerNorm) for block in model.transformer.h]
    assert posts == [place == "post" for place in values.split()]
    assert isinstance(model.transformer.ln_f, torch.nn.LayerNorm) == (values.split()[-1] == "pre")


def test_each_layer_has_its_own_numbers():
    model = GPT(GPTConfig(**{**TINY, "n_layer": 4}, window="cycle(8*3 0)", n_kv_head="1*2 2", ffn_hidden="8 16"))
    assert [block.attn.f.attend.window for block in model.transformer.h] == [8, 8, 8, 0]
    assert [block.attn.f.c_attn.out_features for block in model.transformer.h] == [64, 64, 96, 96]
    rows = [(8, 8), (16, 8), (16, 8), (16, 32)]
    attention = [6 * (32 * (32 + 2 * 16 * kv) + 32 * 32) for kv in (1, 1, 2, 2)]
    expected = sum(a + 6 * 2 * 32 * hidden + 12 * 32 * seen for a, (hidden, seen) in zip(attention, rows, strict=True))
    assert model.flops_per_token(32) == expected + 6 * 64 * 32


@pytest.mark.parametrize("place", model_module.NORM_PLACES)
def test_norm_placement_is_the_written_formula(place):
    model = tiny(norm_place=place, bias=True)
    x = torch.randn(2, 8, 32)
    sub = model.transformer.h[0].mlp
    ffn = lambda h: F.linear(
        F.gelu(F.linear(h, sub.f.c_fc.weight, sub.f.c_fc.bias)), sub.f.c_proj.weight, sub.f.c_proj.bias
    )

    def norm(h, layer):
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    expected = {
        "pre": lambda: x + ffn(norm(x, sub.norm_before)),
        "post": lambda: norm(x + ffn(x), sub.norm_after),
        "sandwich": lambda: x + norm(ffn(norm(x, sub.norm_before)), sub.norm_update),
        "output": lambda: x + norm(ffn(x), sub.norm_update),
        "none": lambda: x + ffn(x),
    }[place]()
    torch.testing.assert_close(sub(x, None), expected, atol=1e-5, rtol=1e-5)
    assert ("ln_f.weight" in "".join(model.state_dict())) == (place in ("pre", "sandwich", "output"))


def test_deepnorm_is_layernorm_of_alpha_x_plus_f():
    model = tiny(norm_place="post", residual_scale="deepnorm")
    sub, x = model.transformer.h[0].attn, torch.randn(2, 8, 32)
    alpha = (2 * 2) ** 0.25
    torch.testing.assert_close(sub(x, None), sub.norm_after(alpha * x + sub.f(x, None)), atol=1e-4, rtol=1e-4)


def test_gated_ffn_is_matched_and_written_out():
    plain, gated = GPT(GPTConfig(**TINY)), GPT(GPTConfig(**{**TINY, "n_embd": 96}, ffn="gated"))
    assert abs(gated.transformer.h[0].mlp.f.c_proj.weight.numel() * 3 / (8 * 96**2) - 1) < 0.02
    ffn, x = tiny(ffn="gated", activation="silu").transformer.h[0].mlp.f, torch.randn(4, 32)
    gate = x @ ffn.c_gate.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ ffn.c_fc.weight.T)) @ ffn.c_proj.weight.T
    torch.testing.assert_close(ffn(x, None), expected)
    assert plain.num_params() > 0


def test_attention_seam_is_explicit_softmax_with_and_without_bias():
    seam = tiny().transformer.h[0].attn.f.attend
    q, k, v = torch.randn(3, 2, 4, 20, 8).unbind()
    logits = (q @ k.mT) / math.sqrt(8)
    causal = torch.ones(20, 20).tril().bool()
    plain = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    torch.testing.assert_close(seam(q, k, v), plain @ v, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seam.shares(q[:, :, 7:12], k, 7), plain[:, :, 7:12], atol=1e-6, rtol=1e-5)
    bias = torch.zeros(2, 4, 1, 20)
    bias[..., 0] = -torch.inf  # masked for all but itself, and the rest renormalised
    masked = plain.clone()
    masked[:, :, 1:, 0] = 0
    masked = masked / masked.sum(-1, keepdim=True)
    torch.testing.assert_close(seam(q, k, v, bias, chunk=6), masked @ v, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seam(q, k, v, torch.zeros(1), chunk=6), plain @ v, atol=1e-5, rtol=1e-5)


def test_rope_scores_depend_on_distance_only():
    rotate = tiny(position="rope").transformer.h[0].attn.f.rotate
    q, k = (torch.randn(16).expand(1, 1, 32, 16) for _ in "qk")
    q, k = rotate(q, k)
    scores = (q @ k.mT)[0, 0]
    for distance in (0, 1, 9):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert (scores[10, 10] - scores[20, 10]).abs() > 1e-3


def test_init_scales():
    config = {**TINY, "n_embd": 128, "n_layer": 8}
    std = lambda model, name: dict(model.named_parameters())[name].std().item()
    out, into = "transformer.h.3.mlp.f.c_proj.weight", "transformer.h.3.mlp.f.c_fc.weight"
    flat, gpt2 = GPT(GPTConfig(**config, init_scale="one")), GPT(GPTConfig(**config))
    deep = GPT(GPTConfig(**config, init_scale="deepnorm"))
    assert std(flat, out) == pytest.approx(0.02, rel=0.05)
    assert std(gpt2, out) == pytest.approx(0.02 / 4, rel=0.05)
    assert std(gpt2, into) == pytest.approx(0.02, rel=0.05)
    xavier = math.sqrt(2 / (128 + 512))
    assert std(deep, into) == pytest.approx(xavier * (8 * 8) ** -0.25, rel=0.05)
    query = deep.transformer.h[0].attn.f.c_attn.weight[:128].std().item()
    assert query == pytest.approx(math.sqrt(2 / 256), rel=0.05)


def test_gpt2_small_has_gpt2s_parameters():
    with torch.device("meta"):
        assert GPT(GPTConfig(vocab_size=50257, bias=True)).num_params() == 124_439_808 - 1024 * 768


@pytest.mark.parametrize(
    "change, words",
    [
        ({"norm_place": "postnorm"}, "norm_place.*post"),
        ({"n_embd": 33}, "n_embd=33.*n_head=2"),
        ({"n_embd": 30, "n_head": 2, "position": "rope"}, "rope.*even"),
        ({"residual_scale": "deepnorm"}, "deepnorm.*norm_place=pre"),
        ({"residual_scale": "two"}, "residual_scale='two' is not a number or one of"),
        ({"residual_scale": "nan"}, "residual_scale"),
        ({"n_head": 4, "n_kv_head": 3}, "n_head=4.*n_kv_head=3"),
        ({"gate_input": "token"}, "gate_input=token needs a gate"),
        ({"ffn": "linear", "ffn_hidden": 8}, "ffn_hidden=8.*ffn=linear"),
        ({"window": 1}, "window=1"),
        ({"window": -1}, "window=-1 must be 0 or more"),
        ({"dropout": 1.0}, "dropout"),
        ({"n_layer": 0}, "n_layer"),
        ({"norm_place": "post*3 pre"}, "norm_place='post\\*3 pre'.*2"),
        ({"norm_place": "post*1 pre*2"}, "does not fit n_layer=2"),
        ({"norm_place": "cycle(post*2 pre)"}, "describes 3 layers and does not fit n_layer=2"),
        ({"norm_place": "post*x pre"}, "'post\\*x' is not a value of norm_place, or value\\*count"),
        ({"norm_place": "post*inf% pre"}, "is not a value of norm_place"),
        ({"window": "4 wide"}, "'wide' is not a value of window"),
        ({"qk_norm": "none ("}, "'\\(' is not a value of qk_norm"),
        ({"norm_place": "past pre"}, "norm_place='past' is not one of"),
        ({"n_head": "2 4"}, "n_head='2 4' is not of type int, one for all layers"),
        ({"position": "learned rope"}, "learned is added to the embedding"),
        ({"value": "residual", "n_kv_head": "1 2"}, "value=residual needs values of one shape"),
        ({"head_out": "differential", "n_head": 2, "n_kv_head": 1}, "heads in pairs"),
        ({"embedding_init": "unit"}, "unit.*tie=False"),
        ({"n_expert": 4}, "need ffn=moe"),
        ({"ffn": "moe", "n_active": 9}, "n_active=9 is more than n_expert=8"),
    ],
)
def test_impossible_configs_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{**TINY, **change})


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"33 tokens.*block_size=32"):
        tiny()(torch.zeros(1, 33, dtype=torch.long))


COMPILED = [arm for arm in ARMS if not {"attention", "gate"} & arm.keys() and "moe" not in arm.get("ffn", "")]


@pytest.mark.parametrize("arm", COMPILED, ids=str)
def test_compiles_without_breaks(arm):
    torch.compiler.reset()
    model, compiled = tiny(**arm), tiny(**arm)
    compiled.compile_sublayers(fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IDS, IDS)[1], model(IDS, IDS)[1])


@pytest.mark.parametrize("arm", [{}, {"tie": False}, {"logit_cap": 5.0}], ids=str)
def test_chunked_loss_and_its_gradients_are_those_of_whole_logits(arm, monkeypatch):
    monkeypatch.setitem(model_module.MAX_LOGITS_BYTES, "cpu", 4 * TINY["vocab_size"] * 7)  # at most 7 rows at a time
    targets = IDS.clone()
    targets[:, :3] = -1
    chunked, whole = tiny(**arm), tiny(**arm)
    loss = chunked(IDS, targets)[1]
    explicit = F.cross_entropy(whole(IDS)[0].flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(loss, explicit)
    (3 * loss).backward()
    (3 * explicit).backward()
    for (name, p), reference in zip(chunked.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, reference.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("compiled", [False, True])
def test_another_loss_can_take_the_place_of_cross_entropy(compiled):
    """Overridden in a subclass: label smoothing, whose gradients are those of the loss of whole logits."""

    class Smoothed(GPT):
        @staticmethod
        def loss_of_rows(logits, targets):
            return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum", label_smoothing=0.1)

    torch.compiler.reset()
    model, whole = Smoothed(tiny().config), tiny()
    model.load_state_dict(whole.state_dict())
    if compiled:
        model.compile_sublayers(backend="eager")
    loss = model(IDS, IDS)[1]
    explicit = F.cross_entropy(whole(IDS)[0].flatten(0, 1), IDS.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, explicit)
    loss.backward()
    explicit.backward()
    for (name, p), reference in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, reference.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("arm", [{}, {"n_kv_head": 2, "position": "alibi"}, {"window": 5}, {"n_register": 3}], ids=str)
def test_compiled_training_on_a_cpu_is_eager_training(arm):
    torch.compiler.reset()
    eager, compiled = tiny(**arm).train(), tiny(**arm).train()
    compiled.compile_sublayers()
    for model in (eager, compiled):
        model(IDS, IDS)[1].backward()
    for (name, p), reference in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, reference.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_layers_of_a_kind_share_one_compilation():
    torch.compiler.reset()
    counter = CompileCounter()
    model = tiny(n_layer=6, residual_scale="inv_sqrt_2L", qk_norm="head").train()
    model.compile_sublayers(backend=counter)
    for _ in range(2):
        model(IDS, IDS)[1].backward()
    assert counter.frame_count == 3  # attention, FFN, loss
