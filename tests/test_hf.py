"""Transformers models through the seam, against eager attention with its explicit maps."""

import base64
import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import spikesink
from model import GPT
from spikesink import schema
from spikesink.edit import interventions
from spikesink.edit.clean_pass import CleanPass
from spikesink.errors import UserError
from spikesink.hooks import hooked, on_streams
from spikesink.measure.observe import observe
from spikesink.measure.summarise import summarise
from spikesink.models import checkpoint, disk_weights, hf
from spikesink.models.export import export

from .conftest import same, tiny

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
IDS = torch.randint(60, (3, 24), generator=torch.Generator().manual_seed(0))
SHAPE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
T5 = {
    "num_layers": 2,
    "num_heads": 4,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "vocab_size": 64,
    "decoder_start_token_id": 0,
}
BART = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
EXPERTS = {
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=64, vocab_size=64),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        num_layers=2,
        num_heads=4,
        hidden_size=32,
        max_position_embeddings=64,
        vocab_size=64,
        window_size=5,
        attention_types=[[["global", "local"], 1]],
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SHAPE),
    "opt": lambda: transformers.OPTConfig(**{**SHAPE, "pad_token_id": 63}, ffn_dim=64, word_embed_proj_dim=32),
    "opt_post_norm": lambda: transformers.OPTConfig(
        **{**SHAPE, "pad_token_id": 63}, ffn_dim=64, word_embed_proj_dim=32, do_layer_norm_before=False
    ),
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=6),
    "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE),
    "gemma2": lambda: transformers.Gemma2Config(**{**GROUPED, "pad_token_id": 0}, sliding_window=6),
    "gpt_oss": lambda: transformers.GptOssConfig(**GROUPED, **EXPERTS, sliding_window=6),
    "phi": lambda: transformers.PhiConfig(**SHAPE),
    "cohere": lambda: transformers.CohereConfig(**{**GROUPED, "pad_token_id": 0}),
    "granite": lambda: transformers.GraniteConfig(**GROUPED, residual_multiplier=0.5),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=2),
    "bert": lambda: transformers.BertConfig(**{**SHAPE, "pad_token_id": 0}),
    "roberta": lambda: transformers.RobertaConfig(**{**SHAPE, "pad_token_id": 63, "max_position_embeddings": 128}),
    "distilbert": lambda: transformers.DistilBertConfig(
        n_layers=2, n_heads=4, dim=32, hidden_dim=64, vocab_size=64, max_position_embeddings=64
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **{**SHAPE, "pad_token_id": 0}, local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=1
    ),
    "t5": lambda: transformers.T5Config(**T5),
    "t5_gated": lambda: transformers.T5Config(**T5, feed_forward_proj="gated-gelu"),
    "bart": lambda: transformers.BartConfig(
        **{f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in BART.items()},
        d_model=32,
        vocab_size=64,
        max_position_embeddings=64,
    ),
}
# how many of a block's sub-layers the stream can be followed through
STEPS = {"gpt_neox": 1, "phi": 1, "cohere": 1, "granite": 1}
POST_NORM = ("opt_post_norm", "bert", "roberta", "distilbert", "bart")
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")


def shaken(model):
    """The model with weights large enough that every part matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def build(family, seed=0):
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    return shaken(hf.model_class(config).from_config(config, attn_implementation="eager").eval())


def eager_truth(model):
    """{part: (maps, hidden states, causal)} and the logits, of transformers' own eager attention."""
    with torch.no_grad():
        if not model.config.is_encoder_decoder:
            out = model(IDS, output_attentions=True, output_hidden_states=True)
            causal = model.config.model_type not in ENCODERS
            return {"": (out.attentions, out.hidden_states, causal)}, out.logits
        start = torch.full((3, 1), model.config.decoder_start_token_id)
        decoder_ids = torch.cat((start, IDS[:, :-1]), dim=1)
        out = model(IDS, decoder_input_ids=decoder_ids, output_attentions=True, output_hidden_states=True)
    return {
        "decoder": (out.decoder_attentions, out.decoder_hidden_states, True),
        "encoder": (out.encoder_attentions, out.encoder_hidden_states, False),
        "cross": (out.cross_attentions, out.encoder_hidden_states, False),
    }, out.logits


@pytest.mark.parametrize("family", FAMILIES)
def test_findings_are_those_of_eager_maps_and_hidden_states(family):
    model = build(family)
    truth, logits = eager_truth(model)
    subjects = hf.subjects_of(model, str)
    assert [subject.part for subject in subjects] == list(truth)
    for subject in subjects:
        maps, states, causal = truth[subject.part]
        assert subject.causal == causal
        obs = observe(subject, IDS, batch_size=2, progress=False)
        found = summarise(subject, obs)
        # of the queries that see the key: all later ones, all, or those of a window
        alpha = torch.stack([m.sum(2) / (m > 0).any(0).any(0).sum(0) for m in maps])  # (L, N, H, T)
        for stats, of_layer in zip(obs.attention, alpha, strict=True):
            torch.testing.assert_close(stats.sums["alpha"], of_layer.sum(0).double(), atol=1e-5, rtol=1e-5)
        for epsilon in (0.2, 0.3, 0.5, 0.8):
            expected = (alpha > epsilon).float().mean((0, 1, 2))
            assert found.sinks.at(epsilon).by_position == pytest.approx(expected.tolist(), abs=1e-6)
        entropy = -(torch.stack(maps) * torch.stack(maps).clamp_min(1e-30).log()).sum(-1).mean((1, 3))
        torch.testing.assert_close(torch.tensor(found.sinks.entropy), entropy, atol=1e-4, rtol=1e-4)
        # after the embedding and after each block; hidden_states[-1] is after the final norm, if there is one
        kinds = ["ffn", "block", "embedding"]
        # post-norm, they are behind the norm of the sum: what the next block reads
        side = found.reads if family in POST_NORM else found.layers
        ends = [layer.top1 for layer in side if layer.kind in kinds]
        expected = [x.abs().flatten(1).max(1).values.mean().item() for x in states[:-1]]
        assert ends[: len(expected)] == pytest.approx(expected, rel=1e-4)
        steps = STEPS.get(family, 3 if subject.part == "decoder" else 2)
        assert len(found.layers) == 1 + 2 * steps
        shift = 1 if causal and subject.part == "" else 0
        targets = IDS[:, shift:]
        loss = torch.nn.functional.cross_entropy(logits[:, : targets.size(1)].flatten(0, 1), targets.flatten())
        assert obs.loss.mean().item() == pytest.approx(loss.item(), rel=1e-4)


def test_gains_and_outputs_off_the_stream():
    """The gated FFN's norm is found also in a parallel block, and is none where the stream could not be followed."""
    (cohere,) = hf.subjects_of(build("cohere"), str)
    block = cohere.model.model.layers[0]
    torch.testing.assert_close(cohere.gated[0].gain(), block.input_layernorm.weight.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cohere.gated[0].down(), block.mlp.down_proj.weight.detach())
    assert hf.subjects_of(build("granite"), str)[0].gated == []
    (olmo,) = hf.subjects_of(build("olmo2"), str)  # no norm before its FFN
    torch.testing.assert_close(olmo.gated[0].gain(), torch.ones(32))
    output = olmo.inner["output"][1]  # before the norm of the update
    assert (output.module, output.place) == (olmo.model.model.layers[0].post_feedforward_layernorm, "input")


@pytest.mark.parametrize("family", [f for f in FAMILIES if STEPS.get(f) != 1])
def test_updates_add_up_to_the_stream(family):
    """sum after = sum before + update, or what a norm made of that sum + update, at every sub-layer that was told
    apart, bit by bit."""
    for subject in hf.subjects_of(build(family), str):
        seen = {}
        reads = [tap for tap in subject.reads if tap is not None]
        taps = subject.streams + subject.inner["update"] + reads
        keep = lambda i, seen=seen: lambda x: seen.update({i: x.view(*IDS.shape, -1)})
        with on_streams(taps, [keep(i) for i in range(len(taps))]):
            subject.losses(IDS)
        streams, updates = len(subject.streams), len(subject.inner["update"])
        assert updates == streams - 1
        for i in range(updates):
            before = [seen[i]]
            if subject.reads[i] is not None:  # post-norm, what is read is what goes on
                before.append(seen[streams + updates + reads.index(subject.reads[i])])
            assert any(torch.equal(state + seen[streams + i], seen[i + 1]) for state in before)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "mistral", "gpt_oss"])
def test_fused_and_explicit_paths_agree_and_a_masked_key_gets_nothing(family):
    subject = hf.subjects_of(build(family), str)[0]
    clean = CleanPass.run(subject, IDS)
    received = []

    def look(module, args, kwargs, output):
        received.append(module.shares(args[0], args[1], 0, kwargs["bias"]))

    with interventions.bos_remove(clean), hooked([(seam.module, look) for seam in subject.attends]):
        assert not torch.equal(subject.losses(IDS), clean.losses)
    for maps in received:
        assert maps[:, :, 1:, 0].abs().max() == 0
    assert torch.equal(subject.losses(IDS), clean.losses)


def test_an_encoders_row_that_loses_all_its_keys_is_no_nan():
    clean = CleanPass.run(hf.subjects_of(build("bert"), str)[0], IDS)
    clean.sinks = [torch.ones_like(keys) for keys in clean.sinks]
    with interventions.sink_mask(clean):
        assert clean.subject.losses(IDS).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_edit_is_the_same_on_the_shared_prefix(family):
    for subject in hf.subjects_of(build(family), str):
        clean = CleanPass.run(subject, IDS)
        for stage in range(len(subject.stages) + 1):
            with clean.prefix(stage):
                assert torch.equal(subject.losses(IDS), clean.losses)
        with_some = [torch.zeros_like(found) for found in clean.sinks]
        with_some[-1][..., 2] = True  # a sink in the last layer, a spike after its first sub-layer that can be edited
        last = max(i for i, tap in enumerate(subject.streams) if tap.writable)
        marked = [torch.zeros_like(entries) for entries in clean.spikes]
        marked[last][:, 3, 1] = True
        clean.sinks, clean.spikes = with_some, marked
        for edit in (
            interventions.spike_zero(clean),
            interventions.sink_relocate(clean),
            interventions.sink_null(clean),
        ):
            with edit:
                whole = subject.losses(IDS)
            with clean.prefix(edit.stage), edit:
                assert torch.equal(subject.losses(IDS), whole)
            assert edit.edited and edit.stage > 0
            assert subject.part == "encoder" or not torch.equal(whole, clean.losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_on_the_stream_is_written_for_all_that_follows(family):
    """To add a vector to the sum after a sub-layer is to add it to the sub-layer's update."""
    for subject in hf.subjects_of(build(family), str):
        updates = {(tap.layer, tap.kind): tap for tap in subject.inner["update"]}
        both = [(tap, updates[tap.layer, tap.kind]) for tap in subject.streams if (tap.layer, tap.kind) in updates]
        assert len(both) == len(subject.streams) - 1 or subject.streams[-1].kind == "block"
        for tap, update in both:
            assert tap.writable
            runs = [run_adding(subject, at) for at in (tap, update)]
            torch.testing.assert_close(*(losses for losses, _ in runs), atol=1e-5, rtol=1e-4)
            for one, two in zip(*(seen for _, seen in runs), strict=True):
                torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def run_adding(subject, tap):
    """(losses, the stream at every tap) where 0.5 is added to channel 1 at one."""
    seen = []
    add = lambda x: x.index_add(-1, torch.tensor([1]), torch.full_like(x[..., :1], 0.5))
    look = [lambda x: seen.append(x.detach().flatten())] * len(subject.streams)
    with on_streams([tap, *subject.streams], [add, *look]):
        return subject.losses(IDS), seen


REFUSED = {
    r"falcon.*bypasses": lambda: transformers.FalconConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=16, vocab_size=64
    ),
    r"(?i)diffllama.*more than once": lambda: transformers.DiffLlamaConfig(
        **{k: v for k, v in GROUPED.items() if k != "head_dim"}
    ),
    r"mamba.*bypasses": lambda: transformers.MambaConfig(num_hidden_layers=1, hidden_size=16, vocab_size=64),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_observed_is_refused_with_the_reason(words):
    model = shaken(AutoModelForCausalLM.from_config(REFUSED[words]()).eval())
    with pytest.raises(UserError, match=words):
        hf.subjects_of(model, str)[0]


def test_an_attention_that_computes_something_else_is_noticed(monkeypatch):
    shares = hf.HFSeam.additive
    monkeypatch.setattr(hf.HFSeam, "additive", lambda self, *args: shares(self, *args) * 0)  # a mask that is lost
    with pytest.raises(UserError, match="gpt_oss cannot be observed: its logits change"):
        hf.subjects_of(build("gpt_oss"), str)[0]


# ------------------------------------------------------------------------------- models that the caller trains on


def in_training(family, attention):
    """A model in train mode, with dropout, but for its second block."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    if hasattr(config, "attention_dropout"):
        config.attention_dropout = 0.1  # 0 by default
    try:
        model = hf.model_class(config).from_config(config, attn_implementation=attention)
    except ValueError:
        pytest.skip(f"{family} has no {attention}")
    shaken(model).train()
    next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)[1].eval()
    model.config.use_cache = True
    return model


def held(model):
    """All of a model that an instrument could change, but for its weights, and torch's random state."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return (
        [m.training for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [copy.deepcopy(vars(config)) for config in configs.values()],
        [p.requires_grad for p in model.parameters()],
        torch.get_rng_state(),
    )


def training_step(model):
    """Logits, loss and gradients of a step in the model's own mode, and the weights after it."""
    torch.manual_seed(3)
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return [out.logits.detach(), out.loss.detach(), [p.grad for p in model.parameters()], model.state_dict()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "llama", "bert", "t5", "bart"])
def test_a_model_in_memory_is_given_back_as_it_was(family, attention):
    """What is held, and bitwise a training step, are those of a copy that nobody looked at."""
    model = in_training(family, attention)
    untouched, before = copy.deepcopy(model), held(model)
    with spikesink.open(model, tokens=IDS, nulls=1, calibration=True) as look:
        assert not any(m.training for m in model.modules())
        spikesink.detect(look)
        with spikesink.spike_zero(look):
            look.loss()
        assert not same(held(model), before)
    assert same(held(model), before)
    assert same(training_step(model), training_step(untouched))


@pytest.mark.parametrize("harm", ["its logits change", "some blocks have no attention", "in the block"])
def test_a_model_in_memory_is_as_it_was_after_a_refusal_and_an_error(harm, monkeypatch):
    model = in_training("gpt2", "sdpa")
    untouched, before = copy.deepcopy(model), held(model)
    additive, stacks = hf.HFSeam.additive, hf.stacks_of
    if harm == "its logits change":
        monkeypatch.setattr(hf.HFSeam, "additive", lambda self, *args: additive(self, *args) * 0)
        monkeypatch.setattr(hf, "lazy_mask", lambda *args, **kwargs: torch.ones(1, 1, 16, 16, dtype=torch.bool))
    elif harm == "some blocks have no attention":
        unhook = lambda model: delattr(model.transformer.h[1].attn, hf.SEAM) or stacks(model)
        monkeypatch.setattr(hf, "stacks_of", unhook)
    with pytest.raises(UserError, match=harm), spikesink.open(model, tokens=IDS):
        raise UserError("in the block")
    assert same(held(model), before)
    monkeypatch.undo()
    assert same(training_step(model), training_step(untouched))


@pytest.mark.parametrize("make", [lambda: in_training("gpt2", "sdpa").eval(), tiny], ids=["transformers", "GPT"])
def test_a_compiled_model_in_memory_is_looked_at_uncompiled(make):
    """Compiled code calls no hook; afterwards the model is compiled as before."""
    model = make()
    with spikesink.open(model, tokens=IDS, nulls=0) as look:
        plain = schema.to_json(spikesink.detect(look))
    model.compile(backend="eager")
    model(IDS)
    compiled = lambda: [[vars(m).get(name) for name in ("_compiled_call_impl", "forward")] for m in model.modules()]
    before = compiled()
    assert any(map(any, before))
    with spikesink.open(model, tokens=IDS, nulls=0) as look:
        assert same(schema.to_json(spikesink.detect(look))["layers"], plain["layers"])
    assert compiled() == before


def test_the_attention_of_inner_configs_comes_back():
    """Setting an outer config's attention sets that of those within it, which may have another."""
    inner = {**GROUPED, "pad_token_id": 0}
    config = transformers.T5GemmaConfig(
        encoder=transformers.T5GemmaModuleConfig(**inner),
        decoder=transformers.T5GemmaModuleConfig(**inner),
        vocab_size=64,
    )
    model = transformers.T5GemmaForConditionalGeneration(config)
    model.config._attn_implementation_internal = "sdpa"
    attentions = lambda: [c._attn_implementation for c in (model.config, model.config.encoder, model.config.decoder)]
    with spikesink.open(model, tokens=IDS) as look:
        assert attentions() == ["spikesink"] * 3 and [s.part for s in look.subjects] == ["decoder", "encoder", "cross"]
    assert attentions() == ["sdpa", "eager", "eager"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "llama", "t5"])
def test_a_bfloat16_model_is_observed_in_its_own_precision_and_that_is_said(family):
    model = build(family).to(torch.bfloat16)
    with spikesink.open(model, tokens=IDS, nulls=0) as look:
        found = spikesink.detect(look)
    assert found.data.dtype == "bfloat16"
    with spikesink.open(model.float(), tokens=IDS, nulls=0) as look:
        assert look.data.dtype == "float32" and look.loss() == pytest.approx(found.data.loss, rel=0.02)


def test_a_deep_bfloat16_model_is_not_refused():
    """Its logits differ by some eps under any other order of sums."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": 24, "hidden_size": 128, "head_dim": 32})
    hf.subjects_of(shaken(transformers.LlamaForCausalLM(config)).to(torch.bfloat16), str)


def test_weights_that_are_missing_are_not_made_up(tmp_path, cli):
    build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"lacks 9 weights, the first model\.layers\.2"):
        hf.open_model(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 128},
        {"num_attention_heads": "4"},
        {"num_attention_heads": 0},
        {"model_type": ["a"]},
        {"quantization_config": {"quant_method": "fp8"}},
        {"rope_parameters": {"rope_type": "nope"}},
    ],
    ids=str,
)
def test_broken_configs_are_one_line(tmp_path, cli, change):
    build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    cli("detect.py", "--help")
    code, _, err = cli("detect.py", tmp_path)
    assert code == 2
    assert err.count("\n") == 1, err


def test_truncated_and_faraway_weights_are_one_line(tmp_path, cli):
    build("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    cli("detect.py", "--help")
    assert cli("detect.py", tmp_path)[0] == 2
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    code, _, err = cli("detect.py", tmp_path)
    assert code == 2
    assert "outside its folder" in err


@pytest.mark.parametrize("family", ["mistral", "gpt_oss"])
def test_chunks_of_rows_are_the_whole(monkeypatch, family):
    subject = hf.subjects_of(build(family), str)[0]
    whole = subject.losses(IDS)
    monkeypatch.setattr("spikesink.models.subject.CHUNK_BYTES", 4 * 3 * 4 * 24 * 5)  # five queries at a time
    torch.testing.assert_close(subject.losses(IDS), whole, atol=1e-5, rtol=1e-5)


def test_padding_is_in_the_lazy_mask():
    from transformers.masking_utils import causal_mask_function

    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[0, :2] = False
    mask = hf.lazy_mask(2, 6, 6, mask_function=causal_mask_function, attention_mask=padding)
    expected = torch.ones(6, 6).tril().bool() & padding[:, None, None]
    assert torch.equal(mask.rows(2, 3, 6).expand(2, 1, 3, 6), expected[:, :, 2:5])
    assert hf.lazy_mask(2, 6, 6, mask_function=causal_mask_function) is None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_detect_and_ablate_a_hugging_face_folder(cli, tmp_path, family):
    build(family).save_pretrained(tmp_path / "hf")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 60, (8, 24)))
    for script in ("detect.py", "ablate.py"):
        out = tmp_path / "f.json"
        code, _, err = cli(script, tmp_path / "hf", f"--tokens={tmp_path / 'ids.npy'}", f"--json={out}")
        assert code == 0, err
        assert json.loads(out.read_text())["model"]["model_type"] == family
    assert (tmp_path / "hf" / "report.html").exists()
    code, _, err = cli("detect.py", tmp_path / "hf")
    assert code == 2
    assert "tokenizer" in err


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "t5_gated"])  # tied; plain; experts; two stacks
def test_weights_left_on_disk_give_the_same_findings(cli, tmp_path, monkeypatch, family):
    build(family).to(torch.bfloat16).save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 60, (8, 24)))
    found = []
    for free in (math.inf, 1000):
        monkeypatch.setattr(disk_weights, "free_bytes", lambda limit, free=free: free)
        code, _, err = cli("detect.py", tmp_path / "hf", f"--tokens={tmp_path / 'ids.npy'}")
        assert code == 0, err
        assert ("from disk" in err) == (free == 1000)
        found.append(json.loads((tmp_path / "hf" / "detect.json").read_text()))
    whole, part = found
    assert "does not fit" in part["nulls"].pop("init")["skipped"]
    del whole["nulls"]["init"]
    for key in ("model", "layers", "co_occurrence", "sensitivity", "measures", "nulls", "anatomy"):
        assert part[key] == whole[key], key


def test_a_model_larger_than_memory_without_accelerate_is_one_line(cli, tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(disk_weights, "free_bytes", lambda limit: 1000)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = cli("detect.py", tmp_path)
    assert code == 2
    assert "accelerate" in err
    assert err.count("\n") == 1


def test_free_memory_is_what_the_process_may_still_take():
    assert disk_weights.free_bytes(10**9) == pytest.approx(disk_weights.free_bytes(), rel=0.1)
    assert disk_weights.free_bytes(1) < 2**30


@pytest.mark.parametrize("family", ["Roberta", "MPNet", "IBert", "Longformer", "Bert", "Electra"])
def test_the_longest_sequence_is_the_longest_that_it_takes(family):
    """RoBERTa's family takes 2 tokens fewer than its config says; of 514, 512 were once too many by 2."""
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, "pad_token_id": 1, "max_position_embeddings": 30})
    model = hf.model_class(config).from_config(config).eval()
    longest = hf.longest(model)
    assert longest == (30 if family in ("Bert", "Electra") else 28)
    model(torch.full((1, longest), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 7))


def test_text_is_translated_by_the_models_own_tokenizer(cli, tmp_path):
    from spikesink.models.export import byte_tokenizer

    config = transformers.LlamaConfig(**{**SHAPE, "vocab_size": 260})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    byte_tokenizer().save_pretrained(tmp_path / "hf")
    (tmp_path / "t.txt").write_text("abcdefgh" * 50)
    code, _, err = cli("detect.py", tmp_path / "hf", f"--text={tmp_path / 't.txt'}", f"--json={tmp_path / 'f.json'}")
    assert code == 0, err
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["spikes"]["tokens"][0]["text"] in "abcdefgh"
    assert found["data"]["seq_len"] == 64


def exportable(model, **data):
    meta = {"vocab_size": 257, "bos_id": 256, **data}
    return checkpoint.Checkpoint(dataclasses.asdict(model.config), model.state_dict(), config={"bos": True}, data=meta)


@pytest.mark.parametrize("arm", [{}, {"position": "rope", "norm": "rmsnorm", "ffn": "gated", "activation": "silu"}])
@pytest.mark.parametrize("tokenizer", ["byte", "gpt2", "gpt2 without its ranks", "chars"])
def test_an_exported_model_reads_the_same_sequences(tmp_path, arm, tokenizer):
    """One that was trained with BOS was once read without it: 1.69% of spikes became 0.06%."""
    ranks = tmp_path / "ranks"
    ranks.write_text("".join(f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256)))
    data = {"tokenizer": tokenizer.split()[0]}
    data |= {"chars": "".join(map(chr, range(256)))} if tokenizer == "chars" else {}
    data |= {"bpe": str(ranks)} if tokenizer == "gpt2" else {}
    model = tiny(vocab_size=320, **arm)
    checkpoint.save(tmp_path / "ckpt.pt", exportable(model, **data))
    text = np.frombuffer(b"Two of them, and a <bos> that is none. " * 99, dtype=np.uint8).astype("<u2").copy()
    text[100::200] = 256
    (tmp_path / "data").mkdir()
    text.tofile(tmp_path / "data" / "val.bin")
    (tmp_path / "data" / "meta.json").write_text(
        json.dumps({"dtype": "uint16", "vocab_size": 257, "bos_id": 256, **data})
    )
    done = export(checkpoint.load(tmp_path / "ckpt.pt"), tmp_path / "hf", build=GPT.from_checkpoint)
    assert ("puts BOS before" in done) == (tokenizer in ("byte", "gpt2"))
    options = {"data": str(tmp_path / "data"), "n_seq": 9, "seq_len": 32}
    with spikesink.open(tmp_path / "ckpt.pt", **options) as one, spikesink.open(tmp_path / "hf", **options) as two:
        assert torch.equal(one.ids, two.ids) and set(two.ids[:, 0].tolist()) == {256} and two.data.bos
        assert one.loss() == pytest.approx(two.loss(), rel=1e-5)
        assert one.vocab_size == two.vocab_size == 257  # what null texts are drawn from


@pytest.mark.parametrize("arm", [{}, {"position": "rope", "norm": "rmsnorm", "ffn": "gated", "activation": "silu"}])
def test_export_refuses_a_fork_that_computes_something_else(tmp_path, arm):
    """Whatever its weights and settings are called: a fork's value residual was once left out with exit code 0."""

    class Fork(GPT):
        def forward(self, idx, targets=None):
            return super().forward(idx)[0] + 0.01 * self.transformer.wte.weight[0].sum(), None

    model = tiny(vocab_size=320, **arm)

    fork = Fork(model.config)
    fork.load_state_dict(model.state_dict())
    with pytest.raises(UserError, match="off by"):
        export(exportable(model, tokenizer="byte"), tmp_path / "hf", build=lambda content: fork)
    more = {**model.state_dict(), "transformer.h.0.attn.f.lam": torch.ones(1)}
    if not arm:
        with pytest.raises(UserError, match=r"cannot export.*attn\.f\.lam"):
            content = dataclasses.replace(exportable(model, tokenizer="byte"), model=more)
            export(content, tmp_path / "hf", build=lambda content: model)
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 320, "bias": False, "vres": True}
    theirs = checkpoint.Checkpoint(args, tiny(vocab_size=320).state_dict(), maker="nanoGPT")
    with pytest.raises(UserError, match="nanoGPT's model has no vres=True"):
        export(theirs, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "setting, words", [({"position": "rope"}, "no position=rope"), ({"norm": "rmsnorm"}, "rmsnorm")]
)
def test_a_fork_of_nanogpt_is_not_opened_as_a_gpt2(tmp_path, setting, words):
    """Its weights fit a GPT-2, but it computes something else."""
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 64, "bias": True}
    content = {"model": tiny(bias=True).state_dict(), "iter_num": 1, "config": {}}
    torch.save({**content, "model_args": args}, tmp_path / "ckpt.pt")
    with spikesink.open(tmp_path / "ckpt.pt", tokens=IDS, n_seq=1) as look:
        assert look.loss() > 0
    torch.save({**content, "model_args": args | setting}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=words):
        spikesink.open(tmp_path / "ckpt.pt", tokens=IDS)


@pytest.mark.parametrize("key", hf.REFUSED_KEYS)
def test_a_config_that_names_code_is_refused_before_anything_loads(cli, tmp_path, key):
    config = {"model_type": "llama", key: "someone/evil-kernel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = cli("detect.py", tmp_path)
    assert code == 2
    assert key in err
    assert err.count("\n") == 1


def test_broken_folders_and_unreachable_names_are_one_line(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    pickled = tmp_path / "pickled"
    build("gpt2").save_pretrained(pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cli("detect.py", "--help")  # what was printed so far
    for name in (tmp_path / "empty", tmp_path / "broken", pickled, "someone/not-a-model"):
        code, _, err = cli("detect.py", name)
        assert code == 2, name
        assert err.count("\n") == 1, err


@pytest.mark.parametrize("kind", ["absent", "boolean", "additive", "lazy"])
def test_the_seam_takes_every_kind_of_mask(kind):
    """Rows of the map, in chunks and cut at the diagonal or whole, are the softmax of what transformers would mask."""
    from types import SimpleNamespace

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 8, generator=generator) for h in (4, 2, 2))
    seen = torch.ones(9, 9).tril().bool()[None, None].repeat(2, 1, 1, 1)
    if kind != "absent":
        seen[1, :, 3:, 0] = False  # one hidden key of one sequence
    masks = {
        "absent": None,
        "boolean": seen,
        "additive": torch.where(seen, 0.0, torch.finfo(torch.float32).min),
        "lazy": hf.LazyMask(lambda b, h, i, j: (j <= i) & ~((b == 1) & (i >= 3) & (j == 0)), 2, 0, 0, None, "cpu"),
    }
    bias = torch.randn(1, 4, 9, 9, generator=generator)
    seam = hf.HFSeam()
    seam.set(SimpleNamespace(is_causal=True), masks[kind], 0.3, position_bias=bias)
    logits = 0.3 * torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) + bias
    maps = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    for first in range(0, 9, 4):
        rows = maps[:, :, first : first + 4]
        torch.testing.assert_close(seam.shares(q[:, :, first : first + 4], k, first), rows)
        cut = min(9, first + 4)
        torch.testing.assert_close(seam.shares(q[:, :, first : first + 4], k[:, :, :cut], first), rows[..., :cut])
    torch.testing.assert_close(seam(q, k, v), maps @ v.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)


def test_ablate_takes_encoders_encoder_decoders_and_padding(cli, tmp_path):
    import numpy as np

    ids = np.random.default_rng(0).integers(4, 60, (8, 24))
    ids[3, 15:] = ids[5, :4] = -100
    np.save(tmp_path / "ids.npy", ids)
    for family in ("bert", "t5"):
        build(family).save_pretrained(tmp_path / family)
        out = tmp_path / f"{family}.json"
        code, _, err = cli("ablate.py", tmp_path / family, f"--tokens={tmp_path / 'ids.npy'}", f"--json={out}")
        assert code == 0, err
        found = json.loads(out.read_text())
        assert [row["name"] for row in found["interventions"]] == list(interventions.INTERVENTIONS)
        assert list(found.get("parts", {})) == {"bert": [], "t5": ["encoder", "cross"]}[family]
    assert list(json.loads((tmp_path / "detect.json").read_text())["parts"]) == ["encoder", "cross"]
