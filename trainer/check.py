"""Checks a fork against the contracts that train.py, detect.py and ablate.py rely on.

    for result in check(GPT, config, trainer):
        print(result)

The checks run on a CPU with a tiny copy of the model: the same switches, a few layers of each kind, small widths and a
small vocabulary. Its weights are random, so that every part has an effect. Two numbers count as equal if they differ by
at most TOLERANCE times the largest.
"""

import contextlib
import copy as copying
import dataclasses
import io
import itertools
import json
import math
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import spikesink
from spikesink.edit.clean_pass import CleanPass
from spikesink.edit.findings import Unavailable
from spikesink.errors import UserError
from spikesink.files import save_text
from spikesink.hooks import Tap, hooked, on_streams
from spikesink.models.checkpoint import Checkpoint
from spikesink.models.export import export as to_folder
from spikesink.models.hf import first_line
from spikesink.models.subject import Subject, for_heads

from .machine import Machine

TOLERANCE, GRADIENT_TOLERANCE, FLOPS_TOLERANCE = 1e-4, 1e-3, 0.01
SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "block_size", "vocab_size", "ffn_hidden", "dropout")


class Trainer(NamedTuple):
    """What train.py passes in: its Run, its table of optimisers, a TrainConfig, and whether it can compile here."""

    run: Any
    optimizers: Mapping[str, Callable[[Any, Any], list[Any]]]
    cfg: Any
    compiles: bool = True


class Result(NamedTuple):
    """The result of a contract. `broken` says what is wrong and where; it is empty if the contract holds."""

    contract: str
    broken: list[str]
    notes: list[str]

    def __str__(self) -> str:
        notes = f" Note: {'; '.join(self.notes)}." if self.notes else ""
        return f"{self.contract}: " + (f"BROKEN. {'; '.join(self.broken)}." if self.broken else "ok.") + notes


@dataclass
class Copy:
    """A tiny copy of a model: its class, its config, and notes that are printed with the result."""

    model_class: Any
    config: Any
    trainer: Trainer
    notes: list[str] = field(default_factory=list)

    @property
    def ids(self) -> Tensor:
        """Token ids (4, T), the same each time."""
        shape, generator = (4, self.config.block_size), torch.Generator().manual_seed(0)
        return torch.randint(self.config.vocab_size, shape, generator=generator)

    def model(self, **changes: Any) -> Any:
        """A new model in eval mode, without dropout. Every weight has noise: a scale of 0 would hide its sub-layer."""
        torch.manual_seed(0)
        model = self.model_class(dataclasses.replace(self.config, dropout=0.0, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    def place(self, model: nn.Module, tap: Tap | None) -> str:
        """Names the sub-layer of a tap (None: what follows the last one) and the settings that are no defaults."""
        name = {module: name for name, module in model.named_modules()}[tap.module].rpartition(".")[0] if tap else ""
        where = name if tap and tap.layer >= 0 else "the embedding" if tap else "the last norm or the unembedding"
        values = ((f, getattr(self.config, f.name)) for f in dataclasses.fields(self.config) if f.name not in SIZES)
        return f"{where} ({', '.join(f'{f.name}={v}' for f, v in values if v != f.default) or 'every default'})"

    def first_difference(self, subject: Subject, a: list[Tensor], b: list[Tensor]) -> str:
        """The place where two results of `streams` first differ, or ''."""
        pairs = zip([*subject.streams, None], a, b, strict=True)
        return next((self.place(subject.model, tap) for tap, x, y in pairs if not same(x, y)), "")


def tiny(config: Any) -> Any:
    """The config of the tiny copy. Raises UserError if the model.py refuses such small sizes."""
    heads = min(config.n_head, 4)
    width = min(config.n_embd // config.n_head, 32 // heads)
    changes = {
        "n_head": heads,
        "n_kv_head": heads if config.n_kv_head == config.n_head else capped(config.n_kv_head, 2),
        "n_embd": min(config.n_embd, 32) if config.head_dim else heads * width,
        "head_dim": capped(config.head_dim, 8),
        "block_size": min(config.block_size, 16),
        "vocab_size": min(config.vocab_size, 64),
        "ffn_hidden": capped(config.ffn_hidden, 48),
        "window": capped(config.window, 6),
    }
    kinds = lambda config: {repr({**vars(layer), "n_layer": 0, "layers": 0}) for layer in config.layers}
    try:
        whole = dataclasses.replace(config, **changes)
        for n_layer in range(min(3, config.n_layer), config.n_layer):
            with contextlib.suppress(ValueError):  # an axis says how many layers of each kind there are
                if kinds(fewer := dataclasses.replace(whole, n_layer=n_layer)) == kinds(whole):
                    return fewer
    except ValueError as error:
        raise UserError(f"no tiny copy of this model can be made: {error}; widths of 32 and less must work") from None
    return whole


def capped(value: Any, most: int) -> Any:
    """Limits a number, or each number in a text with a value per layer, to `most`. Counts of layers do not change."""
    return type(value)(re.sub(r"(?<![*\d])\d+", lambda number: str(min(int(number[0]), most)), str(value)))


def same(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    """True if two tensors differ by at most `tolerance` times the largest of b. A nan equals nothing."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def listed(names: list[str]) -> str:
    """Joins names as in 'a, b and 3 more'."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


@torch.no_grad()
def streams(subject: Subject, ids: Tensor) -> list[Tensor]:
    """The stream (B, registers + T, C) at every tap of a pass, then the logits (B, T, V)."""
    states: list[Tensor] = []
    with on_streams(subject.streams, [states.append] * len(subject.streams)):
        logits = subject.logits(ids)
    return [*states, logits]


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """The training loss with the auxiliary ones, for ids (B, T) whose targets are the ids themselves."""
    return model(ids, ids)[1] + sum(getattr(model, "losses", {}).values())


# -------------------------------------------------------------------------------------------- the contracts


def causal(copy: Copy) -> Iterator[str]:
    """Logits do not depend on later tokens, on the length of the sequence, or on other sequences of the batch."""
    model = copy.model()
    subject, ids, T = Subject.from_gpt(model, str), copy.ids, copy.config.block_size
    for training in (False, True):
        model.train(training)
        whole = streams(subject, ids)
        if training and copy.first_difference(subject, streams(subject, ids), whole):
            copy.notes.append("two training passes differ, by noise or state, so only eval mode was compared")
            return
        mode = " in training" if training else ""
        for k in sorted({1, 2, T // 2, T - 1} & set(range(1, T))):
            part = streams(subject, ids[:, :k])
            cut = [x[:, : y.size(1)] for x, y in zip(whole, part, strict=True)]
            if place := copy.first_difference(subject, part, cut):
                off = (part[-1] - cut[-1]).abs().amax((0, 2))
                yield f"Logits at position {off.argmax()} change when tokens after it do{mode}; first seen in {place}"
                return
        if place := copy.first_difference(subject, streams(subject, ids[:1]), [x[:1] for x in whole]):
            yield f"A sequence alone gives other logits than in a batch{mode}; first seen in {place}"
            return


def taps(copy: Copy) -> Iterator[str]:
    """The input of a sub-layer is the output of the one before it, which instruments read and edit."""
    model = copy.model()
    inputs, outputs = list[Tensor](), list[Tensor]()
    readers = [*model.sub_layers(), model.transformer.ln_f]
    pre_hooks = [(module, lambda module, args, kwargs: inputs.append(args[0])) for module in readers]
    hooks = [(module, lambda module, args, kwargs, output: outputs.append(output)) for module in readers[:-1]]
    embedding_hook = (model.transformer.stream, hooks[0][1])
    with torch.no_grad(), hooked([embedding_hook, *hooks], pre_hooks):
        model(copy.ids)
    outputs[-1] = outputs[-1][:, copy.config.n_register :]
    for tap, x, y in zip(Subject.from_gpt(model, str).streams, outputs, inputs, strict=True):
        if x.shape != y.shape or not torch.equal(x, y):
            yield (
                f"The stream changes between {copy.place(model, tap)} and what reads it next. There detect does not "
                "look and edits have no effect. Change it inside the sub-layer, before its tap `stream`"
            )
            return


def state(copy: Copy) -> Iterator[str]:
    """A training pass changes no weight and no buffer, and the model can be copied after it. Auxiliary losses are means
    over sequences, so that a step does not depend on how micro-batches and ranks divide it."""
    model = copy.model().train()
    tensors = lambda: {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: x.detach().clone() for name, x in tensors().items()}
    loss_of(model, copy.ids).backward()
    if changed := [name for name, x in tensors().items() if not torch.equal(x, before[name])]:
        yield (
            f"A training pass changes {listed(changed)}, which would happen in each micro-batch and rank. Change it "
            "once a step, in a method after_update() of its module"
        )
    try:
        copying.deepcopy(model)
    except Exception as error:
        yield f"After a pass the model cannot be copied, because a module stores something of it: {first_line(error)}"
    parts = []
    for ids in (copy.ids, *copy.ids.split(1)):
        torch.manual_seed(0)
        with torch.no_grad():
            model.eval()(ids, ids)
        parts.append({name: float(x) for name, x in getattr(model, "losses", {}).items()})
    for name, value in parts[0].items():
        mean = sum(part[name] for part in parts[1:]) / len(copy.ids)
        if abs(value - mean) > TOLERANCE * max(1, abs(mean)):
            yield f"The loss {name} of a batch is {value:.4g}, not the mean over its sequences, {mean:.4g}"


def replay(copy: Copy) -> Iterator[str]:
    """A pass that is replayed from some stage on gives the same result as the whole pass; ablate.py relies on it."""
    model = copy.model()
    clean = CleanPass.run(Subject.from_gpt(model, str), copy.ids)
    if taps := clean.broken_replay(at_most=sys.maxsize):
        start, first = (copy.place(model, tap) for tap in taps)
        yield (
            f"A pass replayed from {start} on is not the whole pass; first seen in {first}: it reads something that "
            "another pass stored on a module, or that was changed in place in `context.carry`. Put a new object there"
        )


def rows(copy: Copy) -> Iterator[str]:
    """Every attention map is as its seam describes it: `rows`, `seen`, `weights` and `shares` agree."""
    model, calls = copy.model(), list[Any]()
    names = {module: name for name, module in model.named_modules()}
    keep = lambda module, args, kwargs, output: calls.append((module, *args, output))
    with torch.no_grad():
        with hooked([(tap.module, keep) for tap in Subject.from_gpt(model, str).attends]):
            model(copy.ids)
        for seam, *call in calls:
            if fault := row_fault(seam, *call):
                yield f"{names[seam]}, with rows={seam.rows}: {fault}"
                return


def row_fault(seam: Any, q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> str:
    """What is wrong with a seam that was called with q (B, H, T, D), k and v (B, n_kv_head, T, D), or ''."""
    k, T, half = for_heads(k, q.size(1)), q.size(-2), q.size(-2) // 2
    shares, (weights, slot), visible = seam.shares(q, k), seam.weights(q, k), seam.seen(0, T, T)
    sums = shares.sum(-1)
    sums = sums.where(sums != 0, 1) if seam.rows == "one" else sums  # a row may give nothing to any key
    result = weights.to(v.dtype) @ for_heads(v, weights.size(1)) + slot
    draws = (torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(i)) for i, x in enumerate((q, k)))
    shown = seam.shares(*draws).ne(0).flatten(0, 1).any(0)  # bool (T, T)
    early = seam.shares(q[:, :, :half], k[:, :, :half])
    wrong = {
        "`rows` must be one, slot, less or signed": seam.rows not in ("one", "slot", "less", "signed"),
        f"a row sums to {sums.min():.3f}, less than one": seam.rows == "one" and sums.min() < 1 - TOLERANCE,
        f"a row sums to {sums.max():.3f}, more than one": seam.rows != "signed" and sums.max() > 1 + TOLERANCE,
        "a share is negative": seam.rows != "signed" and shares.min() < 0,
        "`seen` is not what the map shows": not torch.equal(shown, visible) or weights[..., ~visible].any(),
        "rows of later queries alone differ": not same(seam.shares(q[:, :, half:], k, half), shares[:, :, half:]),
        "rows without the keys they do not see differ": not same(early, shares[:, :, :half, :half]),
        "weights @ v + slot is not what it returns": not same(result, output),
        "weights @ v + slot is not what it returns in training": not same(result, seam.train()(q, k, v)),
    }
    return next((text for text, is_wrong in wrong.items() if is_wrong), "")


def compiled(copy: Copy) -> Iterator[str]:
    """Compiled as for training, the model has the same loss and gradients as without compilation."""
    if not copy.trainer.compiles:
        copy.notes.append("not tried: there is no C++ compiler here")
        return
    torch._dynamo.reset()
    passes = []
    with torch._inductor.config.patch(fallback_random=True):  # noise as without compilation
        for compiles in (False, True):
            model, outputs = copy.model().train(), list[Tensor]()
            if compiles:
                model.compile_sublayers()
            keep = lambda module, args, kwargs, output, outputs=outputs: outputs.append(output.detach())
            with hooked([(sub_layer, keep) for sub_layer in model.sub_layers()]):
                torch.manual_seed(0)
                loss = loss_of(model, copy.ids)
            loss.backward()
            passes.append((outputs, loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (outputs, loss, grads), (new_outputs, new_loss, new_grads) = passes
    pairs = zip(Subject.from_gpt(model, str).streams[1:], new_outputs, outputs, strict=True)
    limit = GRADIENT_TOLERANCE * max(grad.abs().max() for grad in grads.values())
    if place := next((copy.place(model, tap) for tap, x, y in pairs if not same(x, y)), ""):
        yield f"Compiled, {place} returns something else"
    elif not same(new_loss, loss):
        yield f"Compiled, the loss is {new_loss:.6f}, not {loss:.6f}, though the stream is the same"
    elif wrong := [n for n, x in grads.items() if not (new_grads.get(n, torch.nan) - x).abs().max() <= limit]:
        yield f"Compiled, the gradient of {listed(wrong)} differs"


def flops(copy: Copy) -> Iterator[str]:
    """flops_per_token is what a forward and a backward pass cost when each operation is counted."""
    model = copy.model()
    seams, more = [tap.module for tap in Subject.from_gpt(model, str).attends], copy.config.n_register
    hides = lambda S: any((seam.seen(0, S, S).cpu() != torch.ones(S, S).tril().bool()).any() for seam in seams)
    T = max(T for T in range(1, copy.config.block_size + 1) if T == 1 or not hides(T + more))  # no window hides a key

    def counted(work: Callable[[Tensor], Any]) -> dict[str, float]:
        """{name of a module: FLOPs per added token}, so that work done once per batch does not count."""
        counts = []
        for B in (2, 4):
            with FlopCounterMode(display=False) as counter:
                work(copy.ids[:B, :T])
            counts.append({n.partition(".")[2]: sum(ops.values()) for n, ops in counter.get_flop_counts().items()})
            counts[-1]["all"] = counter.get_total_flops()
        return {name: (n - counts[0].get(name, 0)) / (2 * T) for name, n in counts[1].items()}

    model.train()
    claimed, measured = model.flops_per_token(T), counted(lambda ids: loss_of(model, ids).backward())["all"]
    if abs(claimed - measured) <= FLOPS_TOLERANCE * measured:
        return
    with torch.no_grad():
        forward = counted(model)
    custom = [name for name, module in model.named_modules() if hasattr(module, "flops")]
    wrong = []
    for name, module in model.named_modules():
        own = forward.get(name, 0) - sum(n for child, n in forward.items() if child.rpartition(".")[0] == name)
        passes = 1 if module is model.lm_head else (T + more) / T
        known = 2 * module.weight.numel() * passes if isinstance(module, nn.Linear) else 0 if name in forward else own
        if name and abs(own - known) > 1 and not any(f"{name}.".startswith(f"{outer}.") for outer in custom):
            wrong.append(name)
    where = f"the difference is in {listed(wrong)}: " if wrong else ""
    yield (
        f"flops_per_token({T}) is {claimed:,}, and {measured:,.0f} are done; {where}make a matrix a nn.Linear that is "
        "called once for each token, or give its module flops(T)"
    )


def parameters(copy: Copy) -> Iterator[str]:
    """Every parameter is initialised, gets a gradient, and is in one group of every optimiser, which decays it only if
    it is a matrix. A matrix that writes to the stream is a StreamLinear."""
    if empty := uninitialised(copy):
        yield f"{listed(empty)} not initialised: fill it where it is made"
    model = copy.model().train()
    loss_of(model, copy.ids).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if idle := [n for n, p in trained.items() if p.grad is None]:
        yield f"No gradient reaches {listed(idle)}"
    if zero := [n for n, p in trained.items() if p.grad is not None and not p.grad.any()]:
        copy.notes.append(f"the gradient is zero here of {listed(zero)}")  # as of an expert that no token goes to
    linear = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    cfg = dataclasses.replace(copy.trainer.cfg, weight_decay=0.1)
    for name, make in copy.trainer.optimizers.items():
        faults: dict[str, list[str]] = {}
        groups = [group for optimizer in make(model, cfg) for group in optimizer.param_groups]
        for n, p in trained.items():
            decays = [bool(group["weight_decay"]) for group in groups for q in group["params"] if q is p]
            if fault := group_fault(decays, id(p) in linear):
                faults.setdefault(fault, []).append(n)
        yield from (f"{name}: {listed(names)} {fault}" for fault, names in faults.items())
    owned = {id(p) for m in model.modules() if isinstance(m, nn.Linear) or hasattr(m, "flops") for p in m.parameters()}
    blocks = ((n, p) for n, p in trained.items() if n.startswith("transformer.h.") and p.dim() >= 2)
    if loose := [n for n, p in blocks if id(p) not in owned]:
        copy.notes.append(f"FLOPs, Muon and int8 do not see {listed(loose)}, which no nn.Linear holds")
    yield from plain_outputs(copy, model)


def group_fault(decays: list[bool], is_matrix: bool) -> str:
    """What is wrong with the groups of a parameter, or ''. `decays`: for each of them, whether it decays."""
    if len(decays) != 1:
        return f"is in {len(decays)} groups, not in one"
    fault = "does not decay, and is" if is_matrix else "decays, and is not"
    return "" if decays == [is_matrix] else f"{fault} the weight of a nn.Linear or nn.Embedding"


def uninitialised(copy: Copy) -> list[str]:
    """The names of parameters and buffers with uninitialised memory, which torch fills with NaN here."""
    settings: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    try:
        torch.set_deterministic_debug_mode("warn")
        settings.fill_uninitialized_memory = True
        state = copy.model_class(copy.config)
        return [n for n, x in itertools.chain(state.named_parameters(), state.named_buffers()) if x.isnan().any()]
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]


def plain_outputs(copy: Copy, model: Any) -> Iterator[str]:
    """Names the sub-layers whose update comes from no StreamLinear, if the model.py has that class."""
    files = (sys.modules[c.__module__] for c in copy.model_class.__mro__)
    wanted: Any = next((getattr(file, "StreamLinear", None) for file in files if hasattr(file, "StreamLinear")), ())
    names = {module: name for name, module in model.named_modules()}
    for sub_layer in model.sub_layers() if wanted else ():
        called: list[nn.Module] = []
        keep = lambda module, args, kwargs, output, called=called: called.append(module)
        linear = [m for m in sub_layer.f.modules() if isinstance(m, nn.Linear)]
        with torch.no_grad(), hooked([(m, keep) for m in linear if m.out_features == copy.config.n_embd]):
            model(copy.ids)
        if called and not any(isinstance(m, wanted) for m in called):
            yield f"{names[called[-1]]} writes to the stream: make it a StreamLinear, whose init follows init_scale"


def export(copy: Copy) -> Iterator[str]:
    """The exported model gives the same logits, or the export is refused."""
    content = Checkpoint(dataclasses.asdict(copy.config), copy.model().state_dict())
    with tempfile.TemporaryDirectory() as folder:
        try:
            to_folder(content, Path(folder) / "hf", build=copy.model_class.from_checkpoint)
        except UserError as error:
            copy.notes.append(f"not exported: {str(error).removeprefix('cannot export: ')}")
    yield from ()


def resume(copy: Copy) -> Iterator[str]:
    """A run that was saved and resumed has bit for bit the weights of an uninterrupted one."""
    cfg, T, steps = copy.trainer.cfg, copy.config.block_size, 4
    run_of: Any = type("Run", (copy.trainer.run,), {"model_class": copy.model_class})
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        tokens = np.random.default_rng(0).integers(0, copy.config.vocab_size, 64 * (T + 1)).astype("<u2")
        meta = {"dtype": "uint16", "vocab_size": copy.config.vocab_size, "tokenizer": None, "bos_id": 0}
        for split in ("train", "val"):
            tokens.tofile(data / f"{split}.bin")
        counts = {"train_tokens": len(tokens), "val_tokens": len(tokens)}
        save_text(data / "meta.json", json.dumps(meta | counts))
        values = dataclasses.asdict(copy.config) | dataclasses.asdict(cfg) | {"dataset": str(data), "max_iters": steps}
        values |= {"batch_size": 2, "gradient_accumulation_steps": 2, "eval_iters": 1, "warmup_iters": 1, "monitor": 0}
        values |= {"loss_first": min(cfg.loss_first, T // 4), "loss_last": min(cfg.loss_last, T // 2)}
        values |= {"init_from": "scratch", "tracker": "none", "tensorboard": False, "dtype": "float32"}
        values |= {"compile": False, "device": "cpu", "async_save": False, "check": False}
        states = []
        for parts in ([steps], [steps // 2, steps]):
            for i, last in enumerate(parts):
                out_dir = Path(folder) / str(len(parts))
                run = run_of.open(values | {"resume": i > 0}, out_dir, Machine.find("cpu"))
                while run.step < last:
                    run.update()
                run.save(last=True)
                run.lock.release()
            states.append(run.model.state_dict())
    if wrong := [name for name, x in states[0].items() if not torch.equal(x, states[1][name])]:
        yield (
            f"After {steps // 2} steps, a resume and {steps // 2} more, {listed(wrong)} differs from a run of {steps}: "
            "noise must come from torch's own generator, and state that lasts must be a parameter or a buffer"
        )


def opened(copy: Copy) -> Any:
    """Opens the copy with the library, on 4 sequences and 4 more for calibration."""
    ids = torch.cat((copy.ids, copy.ids.flip(0, 1)))
    return spikesink.open(copy.model(), tokens=ids, n_seq=4, nulls=1, calibration=True)


def detect(copy: Copy) -> Iterator[str]:
    """detect runs and measures a finite loss."""
    with opened(copy) as look:
        loss = spikesink.detect(look).data.loss
    if loss is None or not math.isfinite(loss):
        yield f"The loss that detect measures is {loss}"


def ablate(copy: Copy) -> Iterator[str]:
    """ablate runs with all its interventions and int8, and measures finite losses."""
    with opened(copy) as look:
        findings = spikesink.ablate(look, probe=False)
    losses = {"baseline": findings.baseline.loss} | {entry.name: entry.loss for entry in findings.entries}
    losses |= {f"{e.name}/{control.name}": control.loss for e in findings.entries for control in e.control}
    if isinstance(findings.int8, Unavailable):
        yield f"int8 cannot be tried: {findings.int8.reason}"
    else:
        losses |= {name: change.loss for name, change in findings.int8.items()}
    if wrong := [name for name, loss in losses.items() if not math.isfinite(loss)]:
        yield f"The loss is not finite under {listed(wrong)}"


def runs(copy: Copy) -> Iterator[str]:
    """The model can be built and called."""
    with torch.no_grad():
        copy.model()(copy.ids)
    yield from ()


ALL = (causal, taps, state, replay, rows, flops, parameters, detect, ablate, export, resume, compiled)
CONTRACTS: dict[str, Callable[[Copy], Iterator[str]]] = {contract.__name__: contract for contract in ALL}


def raised(error: Exception, model_class: type) -> str:
    """An exception in one line: its first line, and where in the fork's file it was raised."""
    own = (c for c in model_class.__mro__ if not c.__module__.startswith(("torch", "builtins")))
    files = {getattr(sys.modules[c.__module__], "__file__", None) for c in own}
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if f.filename in files), frames[-1])
    return f"{first_line(error)} ({Path(frame.filename).name}, line {frame.lineno}, in {frame.name})"


def check(model_class: type, config: Any, trainer: Trainer, only: Collection[str] = ()) -> Iterator[Result]:
    """Yields the Result of each contract, or of those named in `only`. Raises UserError if no tiny copy can be made."""
    small = tiny(config)
    selected = {name: contract for name, contract in CONTRACTS.items() if not only or name in only}
    for name, contract in ({"runs": runs} | selected).items():
        copy, threads = Copy(model_class, small, trainer), torch.get_num_threads()
        torch.set_num_threads(1)  # the matrices are so small that several threads would only wait for each other
        # messages of the library are about the tiny copy and would confuse
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stderr(io.StringIO()):
            try:
                broken = list(contract(copy))
            except Exception as error:  # a fork may raise anything; the other contracts are still checked
                broken = [raised(error, model_class)]
            finally:
                torch.set_num_threads(threads)
        if name in selected or broken:
            yield Result(name, broken, copy.notes)
        if name == "runs" and broken:
            return  # the other contracts would fail in the same way
