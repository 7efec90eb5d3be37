"""What must hold before a number from a GPU counts: functions that raise AssertionError; they need no pytest.

benchmarks/gpu_day.py calls them on the GPU; its rehearsal, which a test runs, on a CPU. Each takes a device and an
empty folder, and returns what it measured. Two that may become faster, and are not in use, are held here to the numbers
of what they would replace: attention by flex_attention, and many models stacked into one.
"""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.bench import random_tokens
from model import GPT, Attend, GPTConfig, alibi_slopes
from spikesink.files import content_hash
from spikesink.measure import planted
from spikesink.measure.observe import Ordinary, observe
from spikesink.measure.summarise import summarise
from spikesink.models import convert
from spikesink.models.subject import Subject
from train import Run, be_deterministic
from trainer.machine import Machine

Facts = dict[str, Any]
SMALL: dict[str, int] = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 64, "vocab_size": 256}


def small_model(device: torch.device, **changes: Any) -> GPT:
    """The same small model each time, in float32."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **changes})).to(device)


def small_ids(device: torch.device) -> Tensor:
    """Ids (8, 65)."""
    return torch.randint(256, (8, 65), generator=torch.Generator().manual_seed(1)).to(device)


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()


def parity(device: torch.device, folder: Path) -> Facts:
    """Logits and the embedding's gradient are those of transformers' GPT-2, in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: Any = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 256, "n_positions": 64, "bos_token_id": 0}
    torch.manual_seed(0)
    theirs: Any = GPT2LMHeadModel(GPT2Config(**shape, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    ours: Any
    ours, theirs = GPT.from_checkpoint(convert.from_hf(theirs)).to(device), theirs.to(device)
    x, y = small_ids(device)[:, :-1], small_ids(device)[:, 1:]
    logits, expected = ours(x)[0], theirs(x).logits
    ours(x, y)[1].backward()
    nn.functional.cross_entropy(expected.flatten(0, 1), y.flatten()).backward()
    slope, its = ours.transformer.wte.weight.grad, theirs.transformer.wte.weight.grad
    facts = {"logits": relative(logits, expected), "gradient": relative(slope, its)}
    assert max(facts.values()) < 1e-4, facts
    return facts


def compiled_is_eager(device: torch.device, folder: Path) -> Facts:
    """The compiled loss and gradients are the eager ones: to rounding in float32, to bfloat16's under autocast."""
    ids, facts = small_ids(device), {}
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        losses, slopes = [], []
        for compiled in (False, True):
            model = small_model(device)
            if compiled:
                model.compile_sublayers()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(ids[:, :-1], ids[:, 1:].contiguous())[1]
            loss.backward()
            losses.append(loss.detach())
            slopes.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        facts[str(dtype)] = max(relative(losses[1], losses[0]), relative(slopes[1], slopes[0]))
        assert facts[str(dtype)] < limit, facts
    return facts


def small_run(device: torch.device, folder: Path, data: Path, **changes: Any) -> str:
    """The hash of the weights and the optimiser's state after a small run, which goes on if it was begun."""
    keys = {**SMALL, "dataset": str(data), "batch_size": 4, "gradient_accumulation_steps": 2, "max_iters": 8}
    keys |= {"eval_interval": 8, "eval_iters": 1, "save_interval": 8, "warmup_iters": 2, "lr_decay_iters": 8}
    keys |= {"dropout": 0.1, "compile": False, "monitor": 0}
    del keys["vocab_size"]  # the data's
    run = Run.open({**keys, **changes}, folder, Machine.find(str(device)))
    run.fit()
    weights, optimizer = run.machine.state(run.model, run.optimizers)
    return content_hash([weights, optimizer["state"]])


def bitwise(device: torch.device, folder: Path) -> Facts:
    """With --deterministic, a run that was stopped and one that the monitor watched end in the same bits."""
    random_tokens(str(folder), 256)
    be_deterministic(True)
    try:
        whole = small_run(device, folder / "whole", folder)
        small_run(device, folder / "halves", folder, max_iters=4)
        resumed = small_run(device, folder / "halves", folder, resume=True, max_iters=8)
        watched = small_run(device, folder / "watched", folder, monitor=1)
    finally:
        torch.use_deterministic_algorithms(False)
    facts = {"resumed": resumed == whole, "watched": watched == whole}
    assert all(facts.values()), facts
    return facts


def large_spikes(device: torch.device, folder: Path) -> Facts:
    """A planted spike beyond float16's 65,504 is found at its token and channel, in float32 and in bfloat16."""
    ids, facts = small_ids(torch.device("cpu"))[:, :-1], {}
    tokens = torch.zeros(ids.shape, dtype=torch.bool)
    tokens[:, 5] = True
    for dtype in (torch.float32, torch.bfloat16):
        model = small_model(device, embedding_init="unit", tie=False).eval().to(dtype)
        subject = Subject.from_gpt(model, str)
        ordinary = Ordinary.from_ids(subject, ids)
        with planted.spikes(subject, tokens, channel=3, size=3e5, tap=0):
            observation = observe(subject, ids, batch_size=len(ids), progress=False, ordinary=ordinary)
            found = summarise(subject, observation)
        largest = max(layer.max for layer in found.layers)
        facts[str(dtype)] = {"largest": largest, "tokens": found.spikes.primary_rule.tokens}
        assert torch.equal(observation.spikes["spike"].cpu(), tokens), facts
        assert observation.sum.spike_channels["spike"].argmax() == 3 and 65504 < largest < 1e7, facts
    return facts


def wrapped_like_plain(device: torch.device, folder: Path) -> Facts:
    """Two steps under DDP and under FSDP2, over NCCL (gloo on a CPU) with one rank, end where plain ones do."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    ids, ends = small_ids(device), {}
    try:
        for name in ("plain", "ddp", "fsdp"):
            model: Any = small_model(device)
            if name == "fsdp":
                mesh = dist.device_mesh.init_device_mesh(device.type, (1,))
                for block in model.transformer.h:
                    fully_shard(block, mesh=mesh)
                fully_shard(model, mesh=mesh)
            called = DistributedDataParallel(model) if name == "ddp" else model
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
            for _ in range(2):
                called(ids[:, :-1], ids[:, 1:].contiguous())[1].backward()
                optimizer.step()
                optimizer.zero_grad()
            whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
            ends[name] = torch.cat([p.detach().flatten() for p in whole])
    finally:
        dist.destroy_process_group()
    facts = {name: relative(ends[name], ends["plain"]) for name in ("ddp", "fsdp")}
    assert max(facts.values()) < (1e-3 if device.type == "cuda" else 1e-5), facts  # Adam enlarges rounding
    return facts


def host_waits(device: torch.device, folder: Path) -> Facts:
    """A look of the monitor makes the host wait for the GPU less than once a layer. On a CPU nothing is counted."""
    random_tokens(str(folder), 256)
    keys = {**SMALL, "n_layer": 12, "dataset": str(folder), "gradient_accumulation_steps": 1, "compile": False}
    del keys["vocab_size"]
    run, waits = Run.open({**keys, "monitor": 2}, folder / "run", Machine.find(str(device))), []
    for _ in range(4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            run.update()
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(warning.message) for warning in caught))
    run.lock.release()
    facts = {"without a look": waits[2], "with a look": waits[3], "layers": 12}
    assert waits[3] - waits[2] < 12, facts
    return facts


# ------------------------------------------------------------------------------------- attention that is not fused

KINDS: dict[str, Facts] = {
    "softmax": {},
    "window": {"window": 16},
    "alibi": {"position": "alibi"},
    "softmax1": {"attention": "softmax1"},
    "sink_logit": {"attention": "sink_logit"},
}


def by_flex(c: GPTConfig, attend: Attend, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same function as `attend`, of q, k, v (B, H, T, D), by PyTorch's flex_attention.

    A slot of logit s takes exp(s) of a row's sum exp(lse): what is left is sigmoid(lse - s) of the output without it.
    """
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    T, reach = c.block_size, c.window or c.block_size
    mask = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < reach), None, None, T, T, device=str(device))
    slopes, logit = alibi_slopes(c.n_head).to(device), getattr(attend.normalise, "logit", None)
    alibi = (lambda score, b, h, i, j: score - slopes[h] * (i - j)) if c.position == "alibi" else None

    of_both: Any = flex_attention  # returns a pair where it is asked for one

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if c.attention == "softmax":
            return flex_attention(q, k, v, alibi, mask)
        out, aux = of_both(q, k, v, alibi, mask, return_aux=AuxRequest(lse=True))
        kept = torch.sigmoid(aux.lse - (0.0 if logit is None else logit[:, None]))
        return out * kept[..., None].to(out.dtype)

    return call


def attention_pair(kind: str, shape: tuple[int, int, int, int], device: torch.device) -> tuple[Any, ...]:
    """(attention as model.py has it, by flex_attention, [q, k, v]) of a kind; shape (B, H, T, D). A window is T / 4."""
    B, H, T, D = shape
    changes = {**KINDS[kind], **({"window": T // 4} if kind == "window" else {})}
    c, cuda = GPTConfig(n_head=H, n_embd=H * D, block_size=T, **changes), device.type == "cuda"
    attend = Attend(c, 0).to(device).requires_grad_(cuda)  # flex has no backward pass on a CPU
    for parameter in attend.parameters():
        parameter.data.normal_()
    dtype = torch.bfloat16 if cuda else torch.float32
    qkv = [torch.randn(B, H, T, D, device=device, dtype=dtype, requires_grad=cuda) for _ in range(3)]
    return attend.forward, by_flex(c, attend, device), qkv


def attention_calls(kind: str, shape: tuple[int, int, int, int], device: torch.device, compiled: bool) -> Facts:
    """{name: a pass forward and, where there is one, backward}, to be timed."""
    *calls, qkv = attention_pair(kind, shape, device)

    def passes(call: Callable[..., Tensor]) -> None:
        out = call(*qkv)
        if out.requires_grad:
            out.sum().backward()

    calls = [torch.compile(call, dynamic=False) if compiled else call for call in calls]
    return {name: functools.partial(passes, call) for name, call in zip(("ours", "flex"), calls, strict=True)}


def flex_is_ours(device: torch.device, folder: Path) -> Facts:
    """flex_attention gives model.py's output for every kind, and on a GPU its gradients."""
    facts: Facts = {}
    for kind in KINDS:
        torch.manual_seed(0)
        ours, flex, qkv = attention_pair(kind, (2, 4, 256, 64), device)
        outs = []
        for call in (ours, torch.compile(flex, dynamic=False) if device.type == "cuda" else flex):
            out = call(*qkv)
            slopes = torch.autograd.grad(out.float().square().sum(), qkv) if out.requires_grad else ()
            outs.append(torch.cat([part.detach().float().flatten() for part in (out, *slopes)]))
        facts[kind] = relative(outs[1], outs[0])
    assert max(facts.values()) < (3e-2 if device.type == "cuda" else 1e-5), facts
    return facts


# ------------------------------------------------------------------------------------- many small models at once

Step = Callable[[Tensor, Tensor], Tensor]  # x, y (N, B, T) -> losses (N,)
MICRO: Facts = {"n_layer": 4, "n_head": 4, "n_embd": 64, "block_size": 64, "vocab_size": 2048, "norm": "rmsnorm"}
MICRO |= {"position": "rope", "ffn": "gated", "activation": "silu"}


def micro_models(n: int, device: torch.device) -> list[GPT]:
    """The models of seeds 0 ... n - 1."""
    models = []
    for seed in range(n):
        torch.manual_seed(seed)
        models.append(GPT(GPTConfig(**MICRO)).to(device))
    return models


def micro_batch(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x, y (n, 16, 64)."""
    ids = torch.randint(2048, (n, 16, 65), generator=torch.Generator().manual_seed(n)).to(device)
    return ids[..., :-1].contiguous(), ids[..., 1:].contiguous()


def apart(models: list[GPT]) -> Step:
    """One update of each model, one after another, as train.py makes it: clipped to 1, AdamW."""
    optimizers = [torch.optim.AdamW(m.optimizer_groups(0.1), 1e-3, (0.9, 0.95), fused=True) for m in models]

    def step(x: Tensor, y: Tensor) -> Tensor:
        losses = []
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            loss = model(x[i], y[i])[1]
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    return step


def stacked(models: list[GPT], compiled: bool = False) -> tuple[Step, dict[str, Tensor]]:
    """(one update of all models in one pass: vmap over their stacked weights; these weights by name)."""
    weights, buffers = torch.func.stack_module_state(models)
    decays = {id(p) for p in models[0].optimizer_groups(0.1)[0]["params"]}
    names = {name for name, p in models[0].named_parameters() if id(p) in decays}
    groups = [{"params": [p for n, p in weights.items() if (n in names) == d], "weight_decay": 0.1 * d} for d in (1, 0)]
    optimizer = torch.optim.AdamW(groups, 1e-3, (0.9, 0.95), fused=True)

    def loss_of(weights: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(models[0], (weights, buffers), (x,))[0]
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    slopes_of = torch.vmap(torch.func.grad_and_value(loss_of))
    slopes_of = torch.compile(slopes_of, dynamic=False) if compiled else slopes_of

    def step(x: Tensor, y: Tensor) -> Tensor:
        slopes, losses = slopes_of({n: p.detach() for n, p in weights.items()}, buffers, x, y)
        norm = torch.stack([s.flatten(1).square().sum(1) for s in slopes.values()]).sum(0).sqrt()  # of each model
        scale = (1 / (norm + 1e-6)).clamp(max=1)
        for name, p in weights.items():
            p.grad = slopes[name] * scale.view(-1, *[1] * (p.dim() - 1))
        optimizer.step()
        return losses.detach()

    return step, weights


def micro_calls(n: int, device: torch.device, compiled: bool) -> Facts:
    """{name: one update of n models}, to be timed; apart, all that are beyond eight take as long as these."""
    batch, few = micro_batch(n, device), micro_models(min(n, 8), device)
    calls = {"stacked": stacked(micro_models(n, device))[0]}
    if compiled:
        calls["stacked, compiled"] = stacked(micro_models(n, device), compiled=True)[0]
        for model in few:
            model.compile_sublayers()
    calls |= {f"{len(few)} apart": apart(few)}
    return {name: functools.partial(call, *batch) for name, call in calls.items()}


def stacked_is_apart(device: torch.device, folder: Path) -> Facts:
    """Three updates of three stacked models end where those of the models apart do, to float32's rounding."""
    models, (x, y) = micro_models(3, device), micro_batch(3, device)
    alone, (at_once, weights) = apart(models), stacked(micro_models(3, device))
    losses = [(alone(x, y) - at_once(x, y)).abs().max().item() for _ in range(3)]
    pairs = [(p, weights[name][i]) for i, m in enumerate(models) for name, p in m.named_parameters()]
    facts = {"losses": max(losses), "weights": max(relative(w, p) for p, w in pairs)}
    assert facts["losses"] < 1e-5 and facts["weights"] < (1e-3 if device.type == "cuda" else 1e-4), facts
    return facts


Check = Callable[[torch.device, Path], Facts]
CHECKS: dict[str, Check] = {
    "parity": parity,
    "compiled": compiled_is_eager,
    "bitwise": bitwise,
    "large spikes": large_spikes,
    "one rank": wrapped_like_plain,
    "host waits": host_waits,
    "flex": flex_is_ours,
    "stacked": stacked_is_apart,
}


def run_checks(device: torch.device, folder: Path) -> list[str]:
    """Prints what every check measured, or how it failed. Returns the names of those that failed."""
    failed = []
    for name, check in CHECKS.items():
        torch.set_float32_matmul_precision("highest")  # a Run lowers it on a GPU
        (folder / name).mkdir(parents=True)
        try:
            print(f"{name}: {check(device, folder / name)}", flush=True)
        except Exception as error:  # a GPU has many ways to fail, and each is a finding
            failed.append(name)
            print(f"{name} FAILED: {type(error).__name__}: {error}", flush=True)
    return failed
