"""int8 is what a hand-written one gives, outliers are what breaks it, and it leaves no trace."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import transformers

from spikesink.edit import quantise
from spikesink.errors import UserError
from spikesink.measure import planted
from spikesink.models import hf

from .conftest import subject_of, tiny

OTHER = torch.randint(64, (5, 32), generator=torch.Generator().manual_seed(2))
SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
HF = {
    "gpt2": lambda: transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=64, vocab_size=64),
    "llama": lambda: transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=64),
    "t5": lambda: transformers.T5Config(
        num_layers=2, num_heads=4, d_model=32, d_kv=8, d_ff=64, vocab_size=64, decoder_start_token_id=0
    ),
}


def hf_subjects(family):
    torch.manual_seed(0)
    config = HF[family]()
    model = hf.model_class(config).from_config(config).eval()
    model.config.use_cache, model.config.return_dict = False, True
    return hf.subjects_of(model, str)


def levels(x, largest, top=127):
    """x to the nearest of -top ... top times largest / top, which broadcasts; in numpy and float32."""
    step = largest.detach().numpy() / np.float32(top)
    with np.errstate(all="ignore"):
        n = np.clip(np.rint(x.detach().numpy() / step), -top, top)
    return torch.from_numpy(np.where(step > 0, n * step, 0).astype(np.float32))


def test_rounding_is_symmetric_to_the_nearest_of_255_levels():
    x = torch.tensor([-300.0, -127.4, -0.6, -0.4, 0.0, 0.4, 0.6, 126.6, 127.0, 300.0])
    expected = [-127, -127, -1, 0, 0, 0, 1, 127, 127, 127]
    assert quantise.rounded(x, torch.tensor(127.0)).tolist() == expected
    assert len(quantise.rounded(torch.linspace(-9, 9, 10001), torch.tensor(9.0)).unique()) == 255
    x, largest = torch.randn(7, 5), torch.tensor([0.5, 1.0, 2.0, 0.0, 9.0])
    torch.testing.assert_close(quantise.rounded(x, largest), levels(x, largest))
    torch.testing.assert_close(quantise.rounded(x, largest, 4), levels(x, largest, 7))
    assert len(quantise.rounded(torch.linspace(-9, 9, 10001), torch.tensor(9.0), 4).unique()) == 15


def by_hand(model, ids, other, granularity, of_weights=True, of_activations=True):
    """The model's loss per sequence with int8 or int4 written out along its forward pass: no hook, no Subject."""
    model, ranges, top = copy.deepcopy(model), {}, 7 if "int4" in granularity else 127
    of_activations = of_activations and granularity != "int4_per_group"
    blocks = [sub_layer for block in model.transformer.h for sub_layer in (block.attn, block.mlp)]
    exact = copy.deepcopy(model)

    def spread(x, name, record):
        if record:
            flat = x.abs().reshape(-1, x.size(-1)).max(0).values
            ranges[name] = torch.maximum(ranges[name], flat) if name in ranges else flat
            return x
        if not of_activations:
            return x
        if "token" in granularity:  # the stream stays as it is
            on_stream = name == "embedding" or name[:4] == "attn" or name[:3] == "ffn"
            return x if on_stream else levels(x, x.abs().max(-1, keepdim=True).values, top)
        return levels(x, ranges[name] if granularity == "per_channel" else ranges[name].max())

    def of_matrix(weight):
        if granularity == "per_tensor":
            return levels(weight, weight.abs().max())
        if granularity == "int4_per_group":  # of 128 inputs; 32 are one group, 200 are two
            return torch.cat([levels(w, w.abs().amax(1, keepdim=True), top) for w in weight.split(128, 1)], 1)
        return levels(weight, weight.abs().amax(1, keepdim=True), top)

    def forward(ids, net, record):
        F = torch.nn.functional
        matrix = lambda m, x, name: F.linear(spread(x, name, record), m.weight, m.bias)
        x = spread(net.wte(ids) + net.wpe(torch.arange(ids.size(1))), "embedding", record)
        for i, block in enumerate(net.h):
            f, h = block.attn.f, block.attn.norm_before(x)
            q, k, v = (p.unflatten(-1, (2, 16)).transpose(1, 2) for p in matrix(f.c_attn, h, f"qkv{i}").chunk(3, -1))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = spread(x + matrix(f.c_proj, out, f"o{i}"), f"attn{i}", record)
            f, h = block.mlp.f, block.mlp.norm_before(x)
            x = x + matrix(f.c_proj, F.gelu(matrix(f.c_fc, h, f"fc{i}")), f"proj{i}")
            x = spread(x, f"ffn{i}", record)
        return net.ln_f(x) @ model.lm_head.weight.T

    with torch.no_grad():
        forward(other, exact.transformer, True)
        for m in [m for block in blocks for m in block.modules() if of_weights and isinstance(m, torch.nn.Linear)]:
            m.weight.copy_(of_matrix(m.weight))
        logits = forward(ids, model.transformer, False)
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return each.mean(1).double()


@pytest.mark.parametrize("granularity", quantise.SCHEMES)
def test_losses_are_those_of_int8_by_hand(ids, granularity):
    model = tiny(bias=True, ffn_hidden=200)
    subject = subject_of(model)
    clean = quantise.sequence_losses(subject, ids)
    found = quantise.quantised_losses(subject, ids[:2], OTHER[:2])[granularity]
    for entry, halves in (
        (found, {}),
        (found.weights_only, {"of_activations": False}),
        (found.activations_only, {"of_weights": False}),
    ):
        if entry is None:
            assert granularity == "int4_per_group"
            continue
        expected = by_hand(model, ids[:2], OTHER[:2], granularity, **halves)
        assert entry.loss == pytest.approx(expected.mean().item(), rel=1e-5)
        assert entry.delta_loss == pytest.approx((expected - clean[:2]).mean().item(), abs=1e-5)
        assert entry.ci95[0] <= entry.delta_loss <= entry.ci95[1]


@contextlib.contextmanager
def quantised(subject, ranges, name):
    of_weights, of_activations = quantise.SCHEMES[name]
    rest = quantise.activations(subject, ranges, of_activations) if of_activations else contextlib.nullcontext()
    with quantise.weights(subject, of_weights), rest:
        yield


def error(subject, ids, other, granularity, spikes=None):
    """Mean |change| of the log-probabilities in int8, with spikes planted on the first tokens of both texts or not."""
    spikes = spikes or (lambda n: contextlib.nullcontext())
    outputs = lambda: subject.logits(ids).log_softmax(-1)
    with torch.no_grad():
        with spikes(len(other)):
            ranges = quantise.Ranges(subject, other)
        with spikes(len(ids)):
            clean = outputs()
            with quantised(subject, ranges, granularity):
                return (outputs() - clean).abs().mean().item()


def test_an_outlier_channel_breaks_one_scale_and_not_one_per_channel_or_token(ids):
    subject = subject_of(tiny())
    first = torch.arange(32) == 0
    spikes = lambda n: planted.spikes(subject, first.expand(n, -1), channel=7, size=1000.0)
    plain, spiked = (
        {name: error(subject, ids, OTHER, name, planting) for name in quantise.SCHEMES} for planting in (None, spikes)
    )
    assert spiked["per_tensor"] > 10 * plain["per_tensor"]
    # a scale per channel loses that channel (of all 32) on the other tokens; one scale loses all channels
    assert spiked["per_tensor"] > 4 * spiked["per_channel"]
    # the spikes are on other tokens than most, and the stream stays as it is
    assert spiked["per_token"] < 2 * plain["per_token"] and plain["int4_per_token"] > 5 * plain["per_token"]


@pytest.mark.parametrize("family", ["ours", *HF])
def test_weights_and_losses_come_back_bit_by_bit(ids, family):
    ours = {"ffn": "gated", "gate": "channel", "gate_input": "constant"}  # the gate's input is one vector
    for subject in [subject_of(tiny(**ours))] if family == "ours" else hf_subjects(family):
        before = {name: value.clone() for name, value in subject.model.state_dict().items()}
        storages = {name: value.data_ptr() for name, value in subject.model.state_dict().items()}
        clean = subject.losses(ids)
        ranges = quantise.Ranges(subject, OTHER)
        for name in quantise.SCHEMES:
            with pytest.raises(KeyError), quantised(subject, ranges, name):
                assert not torch.equal(subject.losses(ids), clean)
                raise KeyError
            assert torch.equal(subject.losses(ids), clean)
        after = subject.model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert storages == {name: value.data_ptr() for name, value in after.items()}


@pytest.mark.parametrize("family, n", [("gpt2", 4), ("llama", 7), ("t5", None)])
def test_every_matrix_of_the_blocks_is_quantised_along_its_outputs(family, n):
    subject = hf_subjects(family)[0]
    found = quantise.matrices(subject)
    # T5: 6 in a block of the encoder (four of attention, two of the FFN), 10 in one of the decoder
    assert len(found) == (2 * n if n else 2 * 6 + 2 * 10)
    exact = {module: module.weight.clone() for module in found}
    with quantise.weights(subject, quantise.OUTPUT):
        for module, weight in exact.items():
            rows, new = (w.T if family == "gpt2" else w for w in (weight, module.weight))
            assert not torch.equal(new, rows)
            torch.testing.assert_close(new.abs().amax(1), rows.abs().amax(1))  # the largest of an output is a level
            assert (new - rows).abs().le(rows.abs().amax(1, keepdim=True) / 127 / 2 * 1.001).all()
    embedding = subject.model.get_input_embeddings().weight
    assert all(embedding is not module.weight for module in found)


def test_an_embedding_tied_to_nothing_in_the_blocks_stays(ids):
    model = tiny()
    subject, head = subject_of(model), model.lm_head.weight.clone()
    with quantise.weights(subject, quantise.MATRIX):
        assert torch.equal(model.lm_head.weight, head)
        assert all(len(m.weight.unique()) <= 255 for m in quantise.matrices(subject))


def test_ranges_are_the_largest_of_the_other_text():
    subject = subject_of(tiny())
    one = quantise.Ranges(subject, OTHER, batch_size=2)
    first, second = (quantise.Ranges(subject, part) for part in (OTHER[:3], OTHER[3:]))
    assert len(one.largest) == 5 + 2 * 4  # taps of the stream, matrices
    for whole, a, b in zip(one.largest, first.largest, second.largest, strict=True):
        torch.testing.assert_close(whole, torch.maximum(a, b), rtol=1e-5, atol=1e-5)


def test_a_model_on_disk_is_refused_in_one_line():
    subject = subject_of(tiny())
    subject.stages[0].to("meta")
    with pytest.raises(UserError, match="read from disk"), quantise.weights(subject, quantise.MATRIX):
        pass
