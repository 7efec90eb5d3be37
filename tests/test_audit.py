"""An audit: findings recomputed from the weights, with the forward pass and the attention maps written out here.

No instrument of spikesink's, nothing of model.py: a state dict is read with torch.load, every sub-layer is a formula
below, maps are whole (T x T), medians are by sorting. Definitions: Sun et al. 2402.17762 (top-1, median), He et al.
2405.19279 eq. 2 (kurtosis), Gu et al. 2410.10781 (Sink_1 at 0.3, the first token's).
"""

import json
import math

import numpy as np
import pytest
import torch
import transformers

from spikesink.models import checkpoint

BACKCOPY = ("backcopy", "--n_embd=64", "--max_iters=250", "--batch_size=32", "--eval_interval=250", "--eval_iters=1")
TEXT = ("--dataset=stdlib", "--bos", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=64", "--batch_size=8")
TEXT += ("--gradient_accumulation_steps=1", "--max_iters=20", "--warmup_iters=2", "--learning_rate=1e-2")
TEXT += ("--eval_interval=20", "--eval_iters=1", "--norm_place=sandwich", "--norm=rmsnorm", "--activation=relu")
SMALL = ("--dtype=float32", "--device=cpu", "--compile=False", "--bias=False")


def layer_norm(x, weight, bias=0.0, eps=1e-5):
    x = x - x.mean(-1, keepdim=True)
    return x / ((x**2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def rms_norm(x, weight, eps=1e-5):
    return x / ((x**2).mean(-1, keepdim=True) + eps).sqrt() * weight


def softmax_map(q, k):
    """The whole causal attention map (N, H, T, T)."""
    T = q.shape[-2]
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    logits = logits.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    e = (logits - logits.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def attention(x, w_qkv, w_out, heads):
    """(output, map) of causal attention without biases."""
    N, T, _ = x.shape
    q, k, v = (part.view(N, T, heads, -1).transpose(1, 2) for part in (x @ w_qkv.T).chunk(3, dim=-1))
    a = softmax_map(q, k)
    return (a @ v).transpose(1, 2).reshape(N, T, -1) @ w_out.T, a


def ours(path, ids):
    """(streams, maps, logits) of a checkpoint of train.py: pre-norm LayerNorm GELU, or sandwich RMSNorm ReLU."""
    content = torch.load(path, weights_only=True)["content"]
    w, heads, n = content["model"], content["model_args"]["n_head"], content["model_args"]["n_layer"]
    sandwich = content["model_args"]["norm_place"] == "sandwich"
    norm = rms_norm if sandwich else layer_norm
    act = torch.relu if sandwich else lambda u: u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: ids.shape[1]]
    streams, maps = [x], []
    for i in range(n):
        for part in ("attn", "mlp"):
            of = lambda name, at=f"transformer.h.{i}.{part}.": w[at + name]
            y = norm(x, of("norm_before.weight"))
            if part == "attn":
                y, a = attention(y, of("f.c_attn.weight"), of("f.c_proj.weight"), heads)
                maps.append(a)
            else:
                y = act(y @ of("f.c_fc.weight").T) @ of("f.c_proj.weight").T
            x = x + (norm(y, of("norm_update.weight")) if sandwich else y)
            streams.append(x)
    return streams, maps, norm(x, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T


def gpt2(folder, ids):
    """The same of transformers' GPT-2: maps by its own output_attentions, streams by hooks."""
    net = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    streams = []
    keep = lambda module, args: streams.append(args[0])
    for block in net.transformer.h:
        block.ln_1.register_forward_pre_hook(keep)
        block.ln_2.register_forward_pre_hook(keep)
    net.transformer.ln_f.register_forward_pre_hook(keep)
    out = net(ids, output_attentions=True)
    return streams, out.attentions, out.logits


def audit(streams, maps, logits, ids):
    """The five findings, and the number of spike and sink tokens."""
    N, T = ids.shape
    layers, spike = [], torch.zeros(N, T, dtype=torch.bool)
    middle = lambda values: values.sort(0).values[(len(values) - 1) // 2]
    for i, x in enumerate(streams):
        size = x.abs()
        flat = size.reshape(N, -1).sort(dim=1).values
        median, top = flat[:, (flat.shape[1] - 1) // 2], flat[:, -1]
        power = x.double().pow(2).mean((0, 1))
        layers.append(((top.mean() / median.mean()).item(), ((power**2).mean() / power.mean() ** 2).item()))
        if i == len(streams) - 1:  # read by no attention
            continue
        tokens = size[:8].flatten(0, 1)  # what is usual: 8 sequences, of at most 64 tokens here
        usual = middle(tokens.flatten())
        scale = torch.maximum(usual, middle(tokens))
        typical = middle((tokens / scale).amax(1))
        spike |= ((size >= 30 * usual) & (size / scale >= 5 * typical)).any(-1)
    queries = torch.arange(T, 0, -1)
    alpha = torch.stack([a.sum(-2) / queries for a in maps], dim=1)  # (N, L, H, T): mean over the queries i >= k
    heads = alpha.shape[1] * alpha.shape[2]
    sink = ((alpha > 0.3) & (queries >= T / 4)).sum((1, 2)) >= max(1, math.ceil(0.05 * heads))
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    loss = -log_p[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    both = (spike & sink).sum().item()
    return {
        "top1/median": max(ratio for ratio, _ in layers),
        "kurtosis": max(kurtosis for _, kurtosis in layers),
        "Sink_1": (alpha[..., 0] > 0.3).double().mean().item(),
        "P(sink | spike)": both / max(1, spike.sum().item()),
        "loss": loss.item(),
        "spikes": spike.sum().item(),
        "sinks": sink.sum().item(),
    }


def said(found):
    """The same numbers as detect.json has them."""
    return {
        "top1/median": max(layer["top1"] / layer["median"] for layer in found["layers"]),
        "kurtosis": max(layer["kurtosis"] for layer in found["layers"]),
        "Sink_1": found["sinks"]["gu"]["0.3"]["first"],
        "P(sink | spike)": found["co_occurrence"]["p_sink_given_spike"],
        "loss": found["data"]["loss"],
        "spikes": found["spikes"]["rules"]["spike"]["tokens"],
        "sinks": found["sinks"]["rules"]["gu"]["tokens"],
    }


def planted(path):
    """The checkpoint with a massive activation on the first position, and a head whose queries all look for it."""
    content = checkpoint.load(path)
    w, width = content.model, content.model_args["n_embd"]
    w["transformer.wpe.weight"][0, 5] = 4.0
    w["transformer.wte.weight"][:, 7] += 0.3
    w["transformer.h.0.attn.f.c_attn.weight"][0, 7] += 2.0  # a query
    w["transformer.h.0.attn.f.c_attn.weight"][width, 5] += 2.0  # and its key
    checkpoint.save(path.with_name("planted.pt"), content)
    return path.with_name("planted.pt")


@pytest.fixture(params=["backcopy", "text", "gpt2"])
def subject(request, tmp_path, cli):
    """(checkpoint, how it is recomputed, ids)."""
    draw = torch.Generator().manual_seed(0)
    if request.param == "gpt2":
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=64, vocab_size=64)
        net = transformers.GPT2LMHeadModel(config)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            net.transformer.wpe.weight[0, 5] = 20.0  # a spike, at which head 0 of the first block then looks
            c_attn = net.transformer.h[0].attn.c_attn
            c_attn.weight[5, 32:40] += 3.0
            c_attn.bias[:8] += 1.0
        net.save_pretrained(tmp_path)
        return tmp_path, gpt2, torch.randint(64, (12, 48), generator=draw)
    arguments = {"backcopy": BACKCOPY, "text": TEXT}[request.param]
    code, _, err = cli("train.py", *arguments, *SMALL, f"--out_dir={tmp_path}")
    assert code == 0, err
    path = planted(tmp_path / "ckpt.pt")
    if request.param == "backcopy":
        ids = torch.randint(63, (12, 64), generator=draw)
        ids[:, 0] = 63
    else:
        ids = torch.randint(32, 127, (12, 64), generator=draw)
        ids[:, 0] = 256
    return path, ours, ids


@torch.no_grad()
def test_five_findings_recomputed(subject, cli, tmp_path):
    path, recompute, ids = subject
    np.save(tmp_path / "ids.npy", ids.numpy())
    found = tmp_path / "found.json"
    options = (f"--tokens={tmp_path / 'ids.npy'}", "--nulls=0", f"--json={found}", f"--html={tmp_path / 'found.html'}")
    code, _, err = cli("detect.py", path, *options)
    assert code == 0, err
    expected, seen = audit(*recompute(path, ids), ids), said(json.loads(found.read_text()))
    assert expected["spikes"] > 0 and expected["sinks"] > 0, expected
    name = "top1/median"  # whose median is one of a histogram's bins
    assert seen.pop(name) == pytest.approx(expected.pop(name), rel=5e-3)
    assert seen == pytest.approx(expected, rel=2e-4)
