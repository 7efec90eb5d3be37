"""Train a GPT: python train.py CONFIG [CONFIG ...] [--key value ...]

  python train.py postnorm scale/nano --dataset stdlib     small, on a CPU
  python train.py config/postnorm.py                       125M, OpenWebText
  torchrun --nproc_per_node=8 train.py config/postnorm.py  on eight GPUs
  python train.py --resume --out_dir out/postnorm          goes on
  python train.py --replay 812 --out_dir out/postnorm      step 812, looked at
  python train.py postnorm --check                         what a fork broke

CONFIG names a file of configs/: an arm (configs/README.md lists them) or a
size (scale/toy, scale/micro, scale/nano, scale/tiny, scale/gpt2). Without one
it is GPT-2 small, every default. Keys have the last word; they are written
--key value or --key=value, --flag and --no-flag, and shown here with their
defaults. A first ablation, step by step: docs/tutorial.md.

Writes OUT_DIR/ckpt.pt (a link to the newest ckpt-STEP.pt), best.pt, log.jsonl,
loss_spikes.jsonl and config.json.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import filelock
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from data.loader import Tokens
from model import CHOICES as OF_MODEL
from model import CONTRACT, GPT, GPTConfig
from spikesink import __version__, files
from spikesink.errors import InterruptedRunError, StoppedError, UserError, cli, extra, nearest
from spikesink.files import rows_of
from spikesink.measure import metrics
from spikesink.measure.monitor import Monitor
from spikesink.models import checkpoint, convert, hf
from spikesink.models.checkpoint import Checkpoint
from spikesink.models.export import trained_on
from spikesink.text.default_text import titled
from spikesink.text.token_files import other_ids
from spikesink.text.tokenizers import TextTokenizer, same_tokens, tokenizer_of
from trainer import check as contracts
from trainer import checkpoints, config
from trainer.log import TRACKERS, JsonLines, Log, LossWatch, Progress, Speed, TensorBoard, Tracker, warn
from trainer.machine import DTYPES, PARALLEL, Machine, attempt
from trainer.signals import StopSignals

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class TrainConfig:
    """The run. The defaults are nanoGPT's for GPT-2 small on OpenWebText, about 0.5M tokens a step."""

    # what is trained on, how long, where it goes
    out_dir: str = ""  # default: out/ and the names of the config files
    dataset: str = "openwebtext"  # a folder of data/, or a path
    bos: bool = False  # every training window starts with the dataset's BOS token
    max_iters: int = 600000  # optimiser steps
    batch_size: int = 12  # sequences in a micro-batch
    gradient_accumulation_steps: int = 40  # micro-batches in a step, over all ranks
    init_from: str = "scratch"  # or a checkpoint of ours, or a Hugging Face folder or hub name: GPT-2, Llama
    # optimiser
    optimizer: str = "adamw"  # adamw, sgd; muon and soap for the matrices of the blocks, adamw for the rest
    learning_rate: float = 6e-4
    weight_decay: float = 0.1  # on matrices and embeddings
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95  # of sgd and muon
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    # learning-rate schedule
    lr_schedule: str = "cosine"  # cosine, wsd (warmup, stable, decay: linear over the last fifth) or constant
    warmup_iters: int = 2000
    lr_decay_iters: int = 0  # step at which min_lr is reached; 0: max_iters
    min_lr: float = 6e-5
    # loss
    loss_first: int = 0  # first position that the training loss counts
    loss_last: int = 0  # the position after the last one that it counts; 0: all
    losses: dict[str, float] = field(default_factory=dict)  # added: "kurtosis=1e-3 NAME=WEIGHT"; magnitude, the model's
    # log and checkpoints
    eval_interval: int = 2000  # steps between validation losses
    eval_iters: int = 200  # 16 times as many windows in a validation loss, whatever batch_size; always the same ones
    log_interval: int = 1  # steps between lines of log.jsonl
    save_interval: int = 2000  # steps between checkpoints; one more at every best validation loss
    keep_last: int = 2  # newest checkpoints that are kept, besides the best
    keep_every: int = 0  # and those of every so many steps
    async_save: bool = False  # write checkpoints while training goes on
    monitor: int = 100  # steps between looks at spikes and sinks, each logged; under 1% of the time; 0: never
    tensorboard: bool = False  # the log's numbers in OUT_DIR/tensorboard too
    tracker: str = "none"  # the log's numbers there too: none, wandb, trackio
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    parallel: str = "ddp"  # of several ranks: ddp, or fsdp, in which each holds a shard of the model
    dtype: str = "auto"  # of autocast: bfloat16, float32; auto: bfloat16 where the hardware has it
    compile: bool = True  # torch.compile of the sub-layers and the loss; needs a C++ compiler on a CPU
    deterministic: bool = False  # only algorithms that give the same bits again; on a CPU, always
    # seed, going on, looking back
    seed: int = 1337  # of the weights, the batches and dropout
    resume: bool = False  # go on from the newest sound checkpoint of OUT_DIR
    overwrite: bool = False  # start again in an out_dir that holds a run
    replay: int = 0  # compute this step of the run in OUT_DIR again and show its batch; writes nothing
    check: bool = False  # say what this model breaks of what the rest relies on, on a tiny copy; writes nothing

    def __post_init__(self) -> None:
        for key, table in CHOICES.items():
            if getattr(self, key) not in table:
                raise ValueError(f"{key}={getattr(self, key)!r} is not one of: {', '.join(table)}")
        for key in (
            *("weight_decay", "grad_clip", "min_lr", "warmup_iters", "lr_decay_iters", "seed"),
            *("loss_first", "loss_last", "keep_every", "monitor", "replay"),
        ):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} must be 0 or more")
        for name, weight in self.losses.items():
            if weight < 0:
                raise ValueError(f"losses: the weight of {name}, {weight}, must be 0 or more")
        for key in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be in [0, 1)")
        if not 0 <= self.min_lr <= self.learning_rate or self.learning_rate == 0:
            raise ValueError(
                f"min_lr={self.min_lr} must be at most learning_rate={self.learning_rate}, and that above 0"
            )
        if self.loss_last and self.loss_first >= self.loss_last:
            raise ValueError(f"loss_first={self.loss_first} is not before loss_last={self.loss_last}")
        positive = (
            "max_iters batch_size gradient_accumulation_steps eval_interval eval_iters log_interval save_interval "
            "keep_last"
        )
        for key in positive.split():
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")


# what is asked of this command alone, and never taken from a checkpoint
OF_COMMAND = ("out_dir", "resume", "overwrite", "replay", "check", "device", "parallel", "compile", "deterministic")
# what may change when a run is resumed; everything else is what the run is
RESUMABLE = (
    *OF_COMMAND,
    *("dtype", "max_iters", "learning_rate", "min_lr", "lr_schedule", "warmup_iters", "lr_decay_iters", "grad_clip"),
    *("eval_interval", "eval_iters", "log_interval", "save_interval"),
    *("keep_last", "keep_every", "async_save", "monitor", "tensorboard", "tracker"),
)
SCHEMAS = (GPTConfig, TrainConfig)
EVAL_WINDOWS = 16  # windows in a validation loss, for each of eval_iters

# name -> multiplier of (learning_rate - min_lr), given the fraction of the decay that has passed, in [0, 1]
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "wsd": lambda done: min(1.0, (1.0 - done) / 0.2),
    "constant": lambda done: 1.0,
}


def adamw(groups: Iterable[dict[str, Any]], cfg: TrainConfig) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019), one fused kernel."""
    betas = (cfg.beta1, cfg.beta2)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=True)


def on_matrices(make: Callable[..., Optimizer], model: GPT, cfg: TrainConfig) -> list[Optimizer]:
    """The optimiser make(groups, cfg) on the matrices of the blocks, AdamW on the rest."""
    matrices = {id(matrix) for matrix in model.block_matrices()}
    groups = model.optimiser_groups(cfg.weight_decay)
    those = [{**group, "params": [p for p in group["params"] if id(p) in matrices]} for group in groups]
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in matrices]} for group in groups]
    return [make([group for group in those if group["params"]], cfg), adamw(rest, cfg)]


def muon(groups: Iterable[dict[str, Any]], cfg: TrainConfig) -> Optimizer:
    """Muon (Jordan et al. 2024), its step scaled to AdamW's rms."""
    return torch.optim.Muon(groups, cfg.learning_rate, momentum=cfg.momentum, adjust_lr_fn="match_rms_adamw")


def soap(groups: list[dict[str, Any]], cfg: TrainConfig) -> Optimizer:
    """SOAP (Vyas et al. 2024): Adam in the eigenbasis of Shampoo's statistics, of both sides of a matrix, taken anew
    every 10 steps; the first step only finds it. Raises UserError if the package is not installed."""
    with extra("soap"):
        from pytorch_optimizer import SOAP
    widest = max(max(p.shape) for group in groups for p in group["params"])
    optimizer = SOAP(groups, cfg.learning_rate, (cfg.beta1, cfg.beta2), max_precondition_dim=widest)

    def same_layout(*args: Any) -> None:
        """Of the bases in memory: else ranks of a run that goes on have other bits than rank 0, and drift apart."""
        for state in optimizer.state.values():
            state["Q"] = [basis.contiguous() for basis in state["Q"]]

    optimizer.register_step_post_hook(same_layout)
    return optimizer


def sgd(groups: Iterable[dict[str, Any]], cfg: TrainConfig) -> Optimizer:
    """SGD with momentum; its weight decay is the coupled one, L2."""
    return torch.optim.SGD(groups, lr=cfg.learning_rate, momentum=cfg.momentum)


# name -> the optimisers that share a model's parameters out among themselves
OPTIMIZERS: dict[str, Callable[[GPT, TrainConfig], list[Optimizer]]] = {
    "adamw": lambda model, cfg: [adamw(model.optimiser_groups(cfg.weight_decay), cfg)],
    "muon": functools.partial(on_matrices, muon),
    "sgd": lambda model, cfg: [sgd(model.optimiser_groups(cfg.weight_decay), cfg)],
    "soap": functools.partial(on_matrices, soap),
}


def kurtosis_loss(x: Tensor) -> Tensor:
    """He et al.'s kurtosis of a stream (B, T, C) over a sequence's tokens: 1 if all channels are alike, C if one holds
    all. The mean over sequences, and not of the whole batch: so it is the same however micro-batches share that out."""
    return torch.vmap(metrics.channel_kurtosis)(x.float().square().mean(1)).mean()


def magnitude_loss(x: Tensor) -> Tensor:
    """max_j |x_j| / rms(x) of a token, averaged: what is left of the magnitude when the scale of the stream is free."""
    x = x.float()
    return (x.abs().amax(-1) / x.square().mean(-1).add(1e-12).sqrt()).mean()


# name -> function of the stream (B, T, C) after a sub-layer, averaged over sub-layers; a mean over sequences, which is
# the same however micro-batches share these out. Other losses are the model's: a pass leaves them in its attribute
# `losses`, {name: scalar ()}, as a mixture of experts does.
STREAM_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"kurtosis": kurtosis_loss, "magnitude": magnitude_loss}

CHOICES: dict[str, Any] = {
    "lr_schedule": LR_SCHEDULES,
    "optimizer": OPTIMIZERS,
    "dtype": DTYPES,
    "parallel": PARALLEL,
    "tracker": TRACKERS,
}


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Learning rate of update number `step` (from 0): linear warmup, then the schedule down to min_lr."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    end = cfg.lr_decay_iters or cfg.max_iters
    done = min(1.0, (step - cfg.warmup_iters) / max(1, end - cfg.warmup_iters))
    return cfg.min_lr + LR_SCHEDULES[cfg.lr_schedule](done) * (cfg.learning_rate - cfg.min_lr)


def cpp_compiler() -> bool:
    """True if torch.compile can build CPU code here."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def provenance() -> dict[str, Any]:
    """Versions and git commit, for the checkpoint."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "spikesink": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "git_commit": git.stdout.strip() or "unknown",
    }


def noise_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step's dropout noise on a rank: like the batch, a pure function of (seed, step, rank)."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


@torch.no_grad()
def validation_loss(model: nn.Module, data: Tokens, cfg: TrainConfig, machine: Machine) -> float:
    """Mean loss (nats per token) of 16 `eval_iters` fixed windows, or of all if there are fewer.

    The same ones for any batch_size and number of ranks: a batch that is not full is filled up with what counts
    nothing, and every rank runs the model as often, as sharded models must.
    """
    model.eval()
    windows = data.windows(0, min(EVAL_WINDOWS * cfg.eval_iters, data.n_windows))
    size, total = min(cfg.batch_size, len(windows)), torch.zeros((), device=machine.device)
    for first in range(0, len(windows), size * machine.world):
        mine = windows[first + machine.rank * size :][:size]
        x, y = data.read(mine + windows[: size - len(mine)])
        y[max(1, len(mine)) :] = -1
        with machine.autocast():
            loss = model(x.to(machine.device), y.to(machine.device))[1]
        total += len(mine) * loss
    model.train()
    return machine.sum(total).item() / len(windows)


# ------------------------------------------------------------------------------------------- what a run starts from


def foreign_model(name: str, overrides: Mapping[str, Any]) -> tuple[GPTConfig, Checkpoint, TextTokenizer | None]:
    """(GPTConfig, checkpoint, tokenizer of a Hugging Face folder or None) of `init_from`; architecture keys that were
    given change the config. Raises UserError."""
    tokenizer = None
    if Path(name).suffix == ".pt" or (Path(name) / "ckpt.pt").is_file():
        found = checkpoint.load(name)
        found.check_contract(CONTRACT, name)
    else:
        try:
            source = hf.open_model(name)
            tokenizer = hf.Tokenizer.load(hf.Source.locate(name))
            data = trained_on(source.config, getattr(tokenizer, "bos_id", None))
            bos = {"bos": bool(tokenizer.prefix_ids)} if tokenizer else {}
            found = Checkpoint(*convert.from_hf(source), config=bos, data=data)
        except ValueError as error:
            raise UserError(f"init_from={name}: {error}") from None
    keys = {field.name for field in dataclasses.fields(GPTConfig)}
    changes = {key: value for key, value in overrides.items() if key in keys}
    try:
        return GPTConfig(**{**found.model_args, **changes}), found, tokenizer
    except (TypeError, ValueError) as error:
        raise UserError(f"init_from={name}: {error}") from None


def check_start(
    cfg: TrainConfig, block_size: int, data: Tokens, found: Checkpoint, tokenizer: TextTokenizer | None, says: bool
) -> None:
    """Raises UserError where the run's data hold other ids than the weights of `init_from` know. `says`: what else
    differs from what these were trained with is said."""
    same = same_tokens(tokenizer, tokenizer_of(data.meta)) if tokenizer else None
    other = "" if same else "another tokenizer" if same is False else other_ids(data.meta, found.meta)
    if other:
        raise UserError(
            f"init_from={cfg.init_from} was trained on other tokens than {cfg.dataset} has ({other}): prepare the text "
            "with its tokenizer, or start from scratch"
        )
    was = found.config | found.model_args
    now = {"bos": cfg.bos, "block_size": block_size}
    told = [f"{key} {was[key]} -> {value}" for key, value in now.items() if was.get(key, value) != value]
    if was.get("dataset") == cfg.dataset and found.data_sample not in (None, data.sample):
        told.append(f"{cfg.dataset} holds other text now")
    if not same and found.meta.get("tokenizer") is None and found.data_sample != data.sample:
        told.append(f"its tokenizer is not known, its ids are taken to be those of {cfg.dataset}")
    if told and says:
        print(f"init_from={cfg.init_from}: {'; '.join(told)}", file=sys.stderr)


def load_weights(model: GPT, weights: Mapping[str, Tensor], origin: str) -> None:
    """Loads a state dict; gates that it lacks start without effect. Raises UserError naming the first misfit."""
    try:
        model.load_state_dict(convert.with_gates(weights, model.state_dict()))
    except RuntimeError as error:
        first = ", ".join(str(error).splitlines()[1].strip().split(", ")[:3])
        raise UserError(
            f"init_from={origin} does not fit the architecture that was given ({first} ...): leave scale/ and the arm "
            "out, or give what it was trained with"
        ) from None


def fit_vocabulary(model: GPTConfig, cfg: TrainConfig, overrides: Mapping[str, Any], needed: int) -> GPTConfig:
    """The GPTConfig with a vocabulary for `needed` tokens, unless one was given. Raises UserError if that is less."""
    if "vocab_size" not in overrides and cfg.init_from == "scratch":
        return dataclasses.replace(model, vocab_size=-(-needed // 64) * 64)
    if model.vocab_size < needed:
        raise UserError(f"vocab_size={model.vocab_size} is less than the {needed} of {cfg.dataset}")
    return model


def saved_run(kept: checkpoints.Checkpoints, replay: int = 0) -> tuple[Checkpoint, Path]:
    """The checkpoint to go on from: the newest sound one, or for `replay` the nearest before that step; and its path.

    Where there is none before it, one of step 0, whose weights are those that the seed makes. Raises UserError.
    """
    try:
        saved, path = kept.newest(before=replay or None)
    except UserError:
        if not replay or not kept.all():
            raise
        saved, path = kept.newest()
        saved = dataclasses.replace(saved, step=0)
    saved.check_contract(CONTRACT, path)
    told = (saved.optimizer, saved.step, saved.given, saved.loss_watch)
    numbers = [isinstance(value, (int, float)) for value in saved.loss_watch or ()]
    if None in told or not saved.config or not saved.data or numbers != [True] * 3:
        raise UserError(f"{path} is not a run of this train.py: start from it with --init_from={path}")
    if saved.step == 0:
        saved = dataclasses.replace(saved, val_loss=None, best=None, loss_watch=LossWatch().state)
    return saved, path


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """{key: value} of an older version by today's names."""
    now = {key: value for key, value in values.items() if key not in ("penalty", "penalty_weight")}
    if values.get("penalty", "none") != "none":
        now["losses"] = {values["penalty"]: values.get("penalty_weight", 1e-3)}
    if values.get("lr_schedule") == "constant_linear":
        now["lr_schedule"] = "wsd"
    return now


def settings_of(saved: Checkpoint, path: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """{key: value} of a run that goes on: the checkpoint's, but for what was given and may change. Raises UserError."""
    fields, values = config.fields_of(SCHEMAS), {}
    for key, stored in renamed(saved.model_args | saved.config).items():
        if key not in fields:
            raise UserError(f"{path} was trained with {key}={stored}, which this version does not know")
        value = fields[key].read(stored, path)
        if key not in RESUMABLE and overrides.get(key, value) != value:
            raise UserError(f"{path} was trained with {key}={value}, not {overrides[key]}; arms are not mixed")
        if key not in OF_COMMAND:
            values[key] = value
    return values


def load_saved(kept: checkpoints.Checkpoints, replay: int, machine: Machine) -> tuple[Checkpoint, Path]:
    """`saved_run` on every rank; its tensors stay on rank 0, which hands them out shard by shard. Raises UserError."""
    whole: list[Checkpoint] = []

    def read() -> tuple[Checkpoint, Path]:
        saved, path = saved_run(kept, replay)
        whole.append(saved)
        return dataclasses.replace(saved, model={}, optimizer={}), path

    saved, path = machine.on_rank0(read)
    return whole[0] if whole else saved, path


def check_settings(model: GPTConfig, cfg: TrainConfig, machine: Machine) -> None:
    """Raises UserError for settings that each are possible, and together or on this machine are not."""
    if cfg.loss_first >= model.block_size:
        raise UserError(f"loss_first={cfg.loss_first} leaves nothing of block_size={model.block_size} to learn")
    if cfg.gradient_accumulation_steps % machine.world:
        raise UserError(
            f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} is not a multiple of the "
            f"{machine.world} ranks, which share the micro-batches out: make it one, and batch_size as much smaller"
        )
    if machine.sharded and cfg.optimizer in ("muon", "soap"):
        raise UserError(f"{cfg.optimizer} needs whole matrices, of which fsdp leaves each rank a part: --parallel=ddp")


def compiles(cfg: TrainConfig, machine: Machine) -> bool:
    """True if a run's sub-layers and loss are compiled: asked for, and possible here. A replay is not."""
    return cfg.compile and not cfg.replay and (machine.device.type == "cuda" or cpp_compiler())


# ------------------------------------------------------------------------------------------------------- the run


class Update(NamedTuple):
    """What an optimiser step was made with."""

    loss: float  # the batch's, in nats per token
    norm: float  # of the gradient, before clipping
    lr: float
    noted: dict[str, dict[str, float | None]]  # losses and scalars beside it: {name: mean}


class Run:
    """One training run: model, optimiser, data and step, saved to and restored from OUT_DIR.

    run = Run.open(overrides, out_dir, machine)
    run.fit()

    `overrides`: the keys that were asked for; `saved`: the checkpoint to go on from, of `saved_run`.
    """

    model_class: ClassVar = GPT

    @classmethod
    def open(cls, overrides: Mapping[str, Any], out_dir: str | Path, machine: Machine) -> "Run":
        """The run of a command, new or going on from what OUT_DIR holds, which from here on is this process's own.

        Every rank must call it. A replay takes nothing and writes nothing. Raises UserError.
        """
        kept, replay = checkpoints.Checkpoints(out_dir), overrides.get("replay", 0)
        if attempt():  # torchrun gives the same command again
            going_on = machine.on_rank0(kept.any)
            overrides = {**overrides, "resume": going_on, "overwrite": not going_on}
        saved: Checkpoint | None = None
        before: dict[str, Any] = {}
        if overrides.get("resume") or (replay and machine.on_rank0(kept.any)):
            saved, path = load_saved(kept, replay, machine)
            before = settings_of(saved, path, overrides)
        model_config, cfg = config.build(SCHEMAS, {**before, **overrides, "out_dir": str(out_dir)})
        if machine.is_rank0:
            for key, value in before.items():
                if overrides.get(key, value) != value:
                    print(f"changed on resume: {key} {value} -> {overrides[key]}")
        given = renamed(saved.given or {}) if saved else {}
        run = cls(model_config, cfg, given | dict(overrides), machine, saved)
        if not replay:
            machine.on_rank0(run._take_folder)
        return run

    def __init__(
        self,
        model_config: GPTConfig,
        cfg: TrainConfig,
        overrides: Mapping[str, Any],
        machine: Machine,
        saved: Checkpoint | None = None,
    ) -> None:
        self.cfg, self.overrides, self.machine = cfg, dict(overrides), machine.with_dtype(cfg.dtype)
        self.out_dir = Path(cfg.out_dir)
        self.checkpoints = checkpoints.Checkpoints(self.out_dir, cfg.keep_last, cfg.keep_every, cfg.async_save)
        self.path = self.checkpoints.path
        self.step, self.best = 0, math.inf
        self.val_loss: float | None = None
        self.watch, self.signals = LossWatch(), StopSignals()
        self.stopping: str | None = None  # the signal that any rank got, agreed on
        if not cfg.replay:
            machine.on_rank0(self._check_out_dir, saved is not None)
        weights = None
        if cfg.init_from != "scratch" and saved is None:
            model_config, found, tokenizer = foreign_model(cfg.init_from, overrides)
            weights = found.model
        self.train_data = Tokens(cfg.dataset, "train", model_config.block_size, cfg.bos, cfg.seed)
        self.val_data = Tokens(cfg.dataset, "val", model_config.block_size, cfg.bos)
        if saved is None:
            model_config = fit_vocabulary(model_config, cfg, overrides, self.train_data.meta["vocab_size"])
        check_settings(model_config, cfg, machine)
        self.n_micro = cfg.gradient_accumulation_steps // machine.world
        self._make_model(model_config, weights)
        if weights is not None:
            check_start(cfg, model_config.block_size, self.train_data, found, tokenizer, machine.is_rank0)
        if saved is not None:
            self._restore(saved)

    def _make_model(self, model_config: GPTConfig, weights: Mapping[str, Tensor] | None) -> None:
        """The model with the weights that the seed makes, or those given; its optimisers, and what watches it."""
        cfg, machine, self.model_config = self.cfg, self.machine, model_config
        torch.manual_seed(cfg.seed)
        self.model = self.model_class(model_config).to(machine.device)
        if weights is not None:
            load_weights(self.model, weights, cfg.init_from)
        machine.shard(self.model, self.model.transformer.h)
        self.optimizers = OPTIMIZERS[cfg.optimizer](self.model, cfg)
        asked = (getattr(module, "after_update", None) for module in self.model.modules())
        self.after_update: list[Callable[[], Any]] = [method for method in asked if callable(method)]
        self.of_streams: dict[str, list[Tensor]] = {}  # losses of the current forward pass, one per sub-layer
        self._watch_streams()
        self.monitor = Monitor(self.model, cfg.monitor if machine.is_rank0 else 0)

    def _check_out_dir(self, goes_on: bool) -> None:
        """Raises UserError rather than overwrite a run unasked, or where nothing can be written."""
        held = self.checkpoints.any() or (self.out_dir / "log.jsonl").exists()
        if held and not goes_on and not self.cfg.overwrite:
            resume = "--resume goes on with it, " if self.checkpoints.any() else ""
            raise UserError(
                f"{self.out_dir} already holds a run: {resume}--overwrite starts again, --out_dir=DIR goes elsewhere"
            )
        files.check_writable(self.path)

    def _take_folder(self) -> None:
        """Makes OUT_DIR this process's own, without an old run where one is overwritten, and writes config.json.

        Raises UserError if it cannot be written, or another process trains there.
        """
        self.lock = filelock.FileLock(self.out_dir / ".lock")
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            self.checkpoints.sweep()
            if self.cfg.overwrite:
                self.checkpoints.clear()
                (self.out_dir / Tracker.FILE).unlink(missing_ok=True)
            everything = {**dataclasses.asdict(self.model_config), **dataclasses.asdict(self.cfg)}
            told = config.plain({"given": self.overrides, "config": everything})
            text = json.dumps({**told, **provenance()}, indent=1)
            files.write_atomic(self.out_dir / "config.json", lambda file: file.write(text.encode()))
        except filelock.Timeout:
            raise UserError(f"another process trains in {self.out_dir}: stop it, or give another --out_dir") from None
        except OSError as error:
            raise UserError(f"cannot write {self.out_dir}: {error.strerror}") from None

    def _watch_streams(self) -> None:
        """Collects the losses of the stream after every sub-layer, in passes that will be differentiated.

        Raises UserError for one of cfg.losses that is none of these, and that a pass of the model does not leave.
        """
        names = [name for name in self.cfg.losses if name in STREAM_LOSSES]

        def hook(module: nn.Module, args: Any, x: Tensor) -> None:
            if torch.is_grad_enabled():
                for name in names:
                    self.of_streams.setdefault(name, []).append(STREAM_LOSSES[name](x))

        for sub_layer in self.model.sub_layers() if names else ():
            sub_layer.stream.register_forward_hook(hook)
        for name in self.cfg.losses.keys() - set(names):
            x = torch.zeros(1, self.model_config.block_size, dtype=torch.long, device=self.machine.device)
            with self.machine.autocast():
                self.model(x, x)
            if name not in (known := {**STREAM_LOSSES, **self._auxiliary()}):
                raise UserError(f"losses: there is no {name!r}{nearest(name, known)}; there are {', '.join(known)}")

    def _auxiliary(self) -> dict[str, Tensor]:
        """{name: scalar ()}: losses beside the language model's that the last pass left; lets go of the stream's."""
        found = {name: torch.stack(values).mean() for name, values in self.of_streams.items()}
        self.of_streams.clear()
        return getattr(self.model, "losses", {}) | found

    def _restore(self, saved: Checkpoint) -> None:
        """Takes up the state of a checkpoint. Raises UserError if it does not belong to this run."""
        if (saved.data, saved.data_sample) != (self.train_data.meta, self.train_data.sample):
            raise UserError(f"{self.path} was trained on other data than what --dataset={self.cfg.dataset} holds now")
        self.step = saved.step or 0
        if self.step > self.cfg.max_iters:
            raise UserError(f"{self.path} is at step {self.step}, beyond max_iters={self.cfg.max_iters}")
        if self.step:
            self.machine.restore(self.model, self.optimizers, saved.model, saved.optimizer or {})
        self.val_loss, self.watch = saved.val_loss, LossWatch(saved.loss_watch or LossWatch().state)
        self.best = math.inf if saved.best is None else saved.best

    # ---------------------------------------------------------------------------------------------- a step

    @functools.cached_property
    def compiled_model(self) -> nn.Module:
        """What the steps call: the model, compiled if that was asked for and can be, wrapped for its ranks."""
        if compiles(self.cfg, self.machine):
            self.model.compile_sublayers()
        return self.machine.wrap(self.model)

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimiser step, over all micro-batches and ranks."""
        return self.cfg.batch_size * self.cfg.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimiser step, over all micro-batches and ranks."""
        return self.sequences_per_step * self.model_config.block_size

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """x, y (B, T) of the micro-batches of the current step, on this rank; y is -1 where the loss does not count.

        Seeds the dropout noise of the step too: there is no RNG state to lose.
        """
        cfg, machine = self.cfg, self.machine
        torch.manual_seed(noise_seed(cfg.seed, self.step, machine.rank))
        for micro in range(self.n_micro):
            x, y = self.train_data.batch(
                self.step, cfg.batch_size, micro, self.n_micro, rank=machine.rank, world=machine.world
            )
            y[:, : cfg.loss_first] = -1
            y[:, cfg.loss_last or y.size(1) :] = -1
            yield x.to(machine.device), y.to(machine.device)

    def gradients(self) -> Tensor:
        """Leaves the gradients of the current step in the parameters, and in `noted` the means of the losses beside the
        language model's and of the model's scalars. Returns the language model's mean loss () on this rank."""
        mean = torch.zeros((), device=self.machine.device)
        self.noted: dict[tuple[str, str], Tensor] = {}  # (losses or scalars, name) -> mean ()
        for micro, (x, y) in enumerate(self.batches()):
            with self.machine.accumulating(self.compiled_model, last=micro == self.n_micro - 1):
                with self.machine.autocast():
                    loss = self.compiled_model(x, y)[1]
                mean += loss.detach() / self.n_micro
                auxiliary = self._auxiliary()
                for name, weight in self.cfg.losses.items():
                    loss = loss + weight * auxiliary[name]
                for kind, found in (("losses", auxiliary), ("scalars", getattr(self.model, "scalars", {}))):
                    for name, value in found.items():
                        part = value.detach().to(mean) / self.n_micro
                        self.noted[kind, name] = self.noted.get((kind, name), 0) + part
                (loss / self.n_micro).backward()
        return mean

    def agree(self, loss: Tensor) -> tuple[float, dict[str, dict[str, float | None]], str | None]:
        """(Mean over the ranks of their loss (), the means of what is noted, the signal that one of them got); the same
        on every rank, and one wait for the device for all of it."""
        means = torch.stack((loss, *self.noted.values())) / self.machine.world
        everything = self.machine.sum(torch.cat((means, self.signals.votes(self.machine.device)))).tolist()
        noted: dict[str, dict[str, float | None]] = {}
        for (kind, name), value in zip(self.noted, everything[1:], strict=False):
            noted.setdefault(kind, {})[name] = value if math.isfinite(value) else None
        return everything[0], noted, self.signals.elected(everything[len(means) :])

    def clip(self) -> float:
        """Scales the gradients down to grad_clip. Returns their norm before."""
        return self.machine.clip_gradients(self.model.parameters(), self.cfg.grad_clip or math.inf)

    def update(self) -> Update:
        """One optimiser step.

        Raises StoppedError, on every rank and with the weights as they were, if the loss or a gradient is not finite.
        """
        with self.monitor(self.step + 1):  # its number when it is done, as in the log
            loss_here = self.gradients()
        loss, noted, self.stopping = self.agree(loss_here)
        norm = self.clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise StoppedError(f"step {self.step + 1}: loss {loss}, gradient norm {norm}: stopped before the update")
        lr = learning_rate(self.step, self.cfg)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for after_update in self.after_update:
            after_update()
        self.step += 1
        return Update(loss, norm, lr, noted)

    # -------------------------------------------------------------------------------------------- the loop

    def fit(self, name: str = "") -> None:
        """Trains to max_iters, and lets go of OUT_DIR; `name`: what the progress bar calls the run.

        Every rank must call it. Raises InterruptedRunError after a signal, StoppedError if the loss is not finite.
        """
        with contextlib.ExitStack() as stack:
            self.logs: list[Log] = []
            self.progress = Progress(self.cfg.max_iters, self.step, name, hidden=not self.machine.is_rank0)
            stack.callback(self.progress.close)
            self.machine.on_rank0(self._open_logs, stack)
            stack.enter_context(self.signals.listening())
            try:
                self._loop()
            except StoppedError as error:
                self._stopped(error)

    def _open_logs(self, stack: contextlib.ExitStack) -> None:
        """Opens what rows are written to, until `stack` is left. Raises UserError."""
        stack.callback(self.lock.release)
        single = lambda value: value if isinstance(value, (bool, int, float)) else str(value)  # all that HParams takes
        arm = {key: single(value) for key, value in self.overrides.items() if key not in OF_COMMAND}
        logged = int(max((row["step"] for row in rows_of(self.out_dir / "log.jsonl")), default=0))
        try:
            self.logs = [JsonLines(self.out_dir / "log.jsonl", self.step)]
            self.jumps = JsonLines(self.out_dir / "loss_spikes.jsonl", self.step)
        except OSError as error:
            raise UserError(f"cannot write {self.out_dir}: {error.strerror}") from None
        if self.cfg.tensorboard:
            before = rows_of(self.out_dir / "log.jsonl")
            self.logs.append(TensorBoard(self.out_dir / "tensorboard", self.step, arm, before))
        if self.cfg.tracker != "none":
            self.logs.append(Tracker(self.cfg.tracker, self.out_dir, arm, logged))
        for log in (*self.logs, self.jumps):
            stack.callback(log.close)
        self.logs.append(self.progress)

    def _loop(self) -> None:
        speed = Speed(self.tokens_per_step, self.step)
        while not self.done:
            update = self.update()
            self._watch_loss(update)
            evaluates, best = self._is_due(self.cfg.eval_interval), False
            if evaluates or self.monitor.row or self._is_due(self.cfg.log_interval):
                tokens_per_s = speed.at(self.step)
                if evaluates:
                    best = self.evaluate()
                self.log(update, tokens_per_s, evaluates)
                speed.start(self.step)
            self.save_if_due(best)
            self.progress.advance()
            if self.stopping and not self.done:
                raise InterruptedRunError(
                    f"{self.stopping} at step {self.step}: saved {self.path}; go on with --resume"
                )

    @property
    def done(self) -> bool:
        """True once max_iters steps are made."""
        return self.step >= self.cfg.max_iters

    def _is_due(self, interval: int) -> bool:
        """True at every multiple of `interval`, and at the last step."""
        return self.done or self.step % interval == 0

    def evaluate(self) -> bool:
        """Takes the validation loss. Returns whether it is the lowest so far. Raises StoppedError if it is not
        finite."""
        self.val_loss = validation_loss(self.compiled_model, self.val_data, self.cfg, self.machine)
        if not math.isfinite(self.val_loss):
            raise StoppedError(f"step {self.step}: val_loss {self.val_loss} after the update: stopped, not saved")
        is_best = self.val_loss < self.best
        self.best = min(self.val_loss, self.best)
        return is_best

    def log(self, update: Update, tokens_per_s: float, evaluated: bool) -> None:
        """Writes the row of a step."""
        row = {
            "step": self.step,
            "loss": update.loss,
            "val_loss": self.val_loss if evaluated else None,
            "tokens": self.step * self.tokens_per_step,
            "lr": update.lr,
            "grad_norm": update.norm,
            "tokens_per_s": tokens_per_s,
            **update.noted,
            **({"monitor": self.monitor.row} if self.monitor.row else {}),
        }
        for log in self.logs:
            log.write(row)

    def _watch_loss(self, update: Update) -> None:
        """Notes a loss that stands out, with its batch."""
        stands_out, mean, sd = self.watch.stands_out(update.loss)
        if stands_out and self.machine.is_rank0:
            self._note(self.step, {"loss": update.loss, "mean": mean, "sd": sd, "grad_norm": update.norm})

    def _note(self, step: int, row: dict[str, Any]) -> None:
        windows = self.train_data.windows(step - 1, self.sequences_per_step)
        self.jumps.write({"step": step, **row, "windows": windows})

    def _stopped(self, error: StoppedError) -> NoReturn:
        """What is left of a run whose loss or gradient was not finite. Raises StoppedError."""
        spoiled = self.val_loss is not None and not math.isfinite(self.val_loss)
        step = self.step if spoiled else self.step + 1  # the update that spoiled the model, or was not made
        if self.machine.is_rank0:
            self._note(step, {"stopped": str(error)})
            with contextlib.suppress(OSError):
                self.checkpoints.wait()
        sound = self._last_good(before=self.step)  # what was saved at this step has the loss that is not finite
        raise StoppedError(f"{error}; checkpoints: {sound}; --replay={step} shows its batch") from None

    # ----------------------------------------------------------------------------------------------- saving

    def save_if_due(self, best: bool) -> None:
        """Saves at the last step, before stopping, at a best validation loss, and every save_interval."""
        ends = self.done or self.stopping is not None
        if ends or best or self._is_due(self.cfg.save_interval):
            self.save(best, ends)

    def save(self, best: bool = False, last: bool = False) -> None:
        """Everything that is needed to go on, and to know what this model is. Every rank must call it; rank 0 writes.

        What cannot be written is a warning, and training goes on to the next checkpoint; if it is the `last`, a
        UserError.
        """
        weights, optimizer = self.machine.state(self.model, self.optimizers)
        if not self.machine.is_rank0:
            return
        content = self._checkpoint(weights, optimizer)
        wait, write = self.checkpoints.wait, lambda: self.checkpoints.save(content, best)
        for call in (wait, write, *([wait] if last else [])):
            try:
                call()
            except OSError as error:
                said = f"step {self.step}: cannot write a checkpoint ({error.strerror}); {self._last_good()}"
                if last:
                    raise UserError(f"{said}; make room and go on with --resume") from None
                warn(f"{said}; training goes on")

    def _checkpoint(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> Checkpoint:
        return Checkpoint(
            model_args=config.plain(dataclasses.asdict(self.model_config)),
            model=weights,
            optimizer=optimizer,
            config=config.plain(dataclasses.asdict(self.cfg)),
            given=config.plain(self.overrides),
            data=self.train_data.meta,
            data_sample=self.train_data.sample,
            step=self.step,
            tokens=self.step * self.tokens_per_step,
            val_loss=self.val_loss,
            best=None if self.best == math.inf else self.best,
            loss_watch=self.watch.state,
            contract=CONTRACT,
            extra=provenance(),
        )

    def _last_good(self, before: float = math.inf) -> str:
        paths = [path for step, path in self.checkpoints.all().items() if step < before]
        return f"the last good one is {paths[-1]}" if paths else "there is none yet"


# --------------------------------------------------------------------------------------------------- looking back


class Replay(NamedTuple):
    """A step computed again."""

    step: int
    loss: float  # as in the log
    norm: float  # the log's grad_norm
    windows: list[tuple[int, float, list[int]]]  # (window, mean loss of its tokens, its T ids), the worst first
    shares: list[tuple[str, float]]  # (parameter, its share of the squared gradient norm), the largest first


def replay(run: Run) -> Replay:
    """Computes step cfg.replay of a run again from the nearest state before it. Raises UserError on several ranks."""
    if run.machine.world > 1:
        raise UserError("a step is replayed by one process: leave torchrun out")
    for _ in tqdm(range(run.step, run.cfg.replay - 1), desc="replay", unit="step", disable=None):
        run.update()
    losses: list[float] = []
    ids: list[list[int]] = []
    with torch.no_grad():
        for x, y in run.batches():
            with run.machine.autocast():
                logits = run.model(x)[0]
            each = nn.functional.cross_entropy(logits.float().transpose(1, 2), y, ignore_index=-1, reduction="none")
            losses += (each.sum(1) / (y >= 0).sum(1)).tolist()
            ids += x.tolist()
    loss, _, _ = run.agree(run.gradients())
    norm = run.clip()
    squares = {n: p.grad.float().square().sum().item() for n, p in run.model.named_parameters() if p.grad is not None}
    whole = sum(squares.values())
    windows = run.train_data.windows(run.step, run.sequences_per_step)
    worst: Callable[[Any], float] = lambda row: -row[1] if math.isfinite(row[1]) else -math.inf
    return Replay(
        run.cfg.replay,
        loss,
        norm,
        sorted(zip(windows, losses, ids, strict=True), key=worst),
        sorted(((name, square / whole) for name, square in squares.items()), key=worst),
    )


def print_replay(run: Run) -> None:
    """Replays a step and shows it beside what the log says of it."""
    found = replay(run)
    logged = next((row for row in rows_of(run.out_dir / "log.jsonl") if row["step"] == found.step), None)
    words = f" (logged: {logged['loss']:.6f}, {logged['grad_norm']:.6g})" if logged else " (not logged)"
    print(f"step {found.step}: loss {found.loss:.6f}, gradient norm {found.norm:.6g}{words}")
    print("\nlargest gradients, of the squared norm")
    for name, share in found.shares[:5]:
        print(f"{share:7.1%}  {name}")
    text_of = getattr(tokenizer_of(run.train_data.meta), "text", None)
    print(f"\nloss    window  {'text' if text_of else 'ids'}, the worst 10 of {len(found.windows)}")
    for window, loss, ids in found.windows[:10]:
        print(f"{loss:6.3f}  {window:6d}  {repr(text_of(ids))[:100] if text_of else ids[:20]}")


# ------------------------------------------------------------------------------------------------------ the command


def check(
    what: GPT | GPTConfig, cfg: TrainConfig | None = None, only: Collection[str] = ()
) -> Iterator[contracts.Result]:
    """What becomes of every contract of trainer/check.py, or of those named, with a tiny copy of a model."""
    trainer = contracts.Trainer(Run, OPTIMIZERS, cfg or TrainConfig(), cpp_compiler())
    kind, model_config = (GPT, what) if isinstance(what, GPTConfig) else (type(what), what.config)
    return contracts.check(kind, model_config, trainer, only)


def print_check(model_config: GPTConfig, cfg: TrainConfig) -> None:
    """Prints a line for each contract. Raises UserError if one is broken."""
    broken = []
    for result in check(model_config, cfg):
        print(result)
        broken += [result.contract] if result.broken else []
    if broken:
        raise UserError(f"{len(broken)} of {len(contracts.CONTRACTS)} contracts are broken: {', '.join(broken)}")


def be_deterministic(asked: bool) -> None:
    """Only algorithms that give the same bits again; for others torch raises if that was asked for, else warns."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not asked)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def print_run(run: Run, overrides: Mapping[str, Any]) -> None:
    """What is trained, how large it is and on what."""
    cfg, machine = run.cfg, run.machine
    mode = "compiled" if compiles(cfg, machine) else "eager"
    ranks = f"{machine.world} ranks ({machine.parallel})" if machine.world > 1 else "1 rank"
    print("given:", ", ".join(f"{key}={value}" for key, value in overrides.items()) or "nothing, all defaults")
    print(
        f"{run.model.num_params() / 1e6:.2f}M parameters, "
        f"{run.model.flops_per_token(run.model_config.block_size) / 1e6:.1f} MFLOPs a token, "
        f"{run.tokens_per_step:,} tokens of {titled(cfg.dataset, run.train_data.meta, {})} a step, "
        f"{machine.device}, {str(machine.dtype).removeprefix('torch.')}, "
        f"{mode}, {ranks}, from step {run.step} to {cfg.max_iters}"
    )


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((__doc__ or "") + config.describe(SCHEMAS[::-1], OF_MODEL | CHOICES | {"losses": STREAM_LOSSES}))
        return
    overrides, names = config.parse_argv(SCHEMAS, sys.argv[1:], ROOT)
    if overrides.get("check"):
        print_check(*config.build(SCHEMAS, overrides))
        return
    out_dir = overrides.get("out_dir") or str(Path("out") / ("-".join(names) or "gpt2"))
    machine = Machine.find(overrides.get("device", "auto"), overrides.get("parallel", "ddp"))
    if overrides.get("deterministic") or machine.device.type == "cpu":  # there it costs nothing
        be_deterministic(overrides.get("deterministic", False))
    with machine.joined():
        run = Run.open(overrides, out_dir, machine)
        if run.cfg.replay:
            print_replay(run)
            return
        if machine.is_rank0:
            print_run(run, overrides)
        run.fit()
    if machine.is_rank0:
        print(f"checkpoint: {run.path}\nnext: python detect.py {run.path}")


if __name__ == "__main__":
    cli(main)
