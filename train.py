"""Train a GPT: python train.py CONFIG [CONFIG ...] [--key value ...]

  python train.py postnorm scale/nano --dataset stdlib     small, on a CPU
  python train.py config/postnorm.py                       125M, OpenWebText
  torchrun --nproc_per_node=8 train.py config/postnorm.py  on eight GPUs
  python train.py --resume --out_dir out/postnorm          continues a run
  python train.py --replay 812 --out_dir out/postnorm      shows step 812 again
  python train.py postnorm --check                         tests a fork

CONFIG names a file of configs/: an arm (configs/README.md lists them) or a
size (scale/toy, scale/micro, scale/octave, scale/nano, scale/tiny,
scale/gpt2). Without one, the model is GPT-2 small. Keys override config files.
They are written --key value or --key=value, --flag and --no-flag, and are
listed below with their defaults. docs/tutorial.md explains a first ablation
step by step.

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
import time
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
from model import CHOICES as MODEL_CHOICES
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
from spikesink.text.sequences import Reader
from spikesink.text.token_files import other_ids
from spikesink.text.tokenizers import TextTokenizer, same_tokens, tokenizer_of
from trainer import check as contracts
from trainer import checkpoints, config
from trainer.log import TRACKERS, JsonLines, Log, LossWatch, Progress, TensorBoard, Tracker, warn
from trainer.machine import DTYPES, PARALLEL, Machine, attempt
from trainer.signals import StopSignals

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class TrainConfig:
    """The run. The defaults are nanoGPT's for GPT-2 small on OpenWebText, with about 0.5M tokens per step."""

    # data, length, output
    out_dir: str = ""  # default: out/ and the names of the config files
    dataset: str = "openwebtext"  # a folder of data/, or a path
    bos: bool = False  # whether each training window starts with the dataset's BOS token
    max_iters: int = 600000  # optimiser steps
    batch_size: int = 12  # sequences per micro-batch
    gradient_accumulation_steps: int = 40  # micro-batches per step, over all ranks
    init_from: str = "scratch"  # scratch, a checkpoint of ours, or GPT-2 or Llama from a Hugging Face folder or the hub
    # optimiser
    optimizer: str = "adamw"  # adamw, sgd, muon, soap; muon and soap train the blocks' matrices and adamw the rest
    learning_rate: float = 6e-4
    weight_decay: float = 0.1  # of matrices and embeddings
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
    loss_last: int = 0  # position after the last one that it counts; 0: all
    losses: dict[str, float] = field(default_factory=dict)  # "NAME=WEIGHT ...": kurtosis, magnitude or one of the model
    # log and checkpoints
    eval_interval: int = 2000  # steps between validation losses
    eval_iters: int = 200  # a validation loss takes 16 times as many windows, always the same ones for any batch_size
    log_interval: int = 1  # steps between lines of log.jsonl
    save_interval: int = 2000  # steps between checkpoints; the best validation loss is always saved
    keep_last: int = 2  # number of newest checkpoints that are kept, besides the best
    keep_every: int = 0  # the checkpoint of every so many steps is kept as well; 0: none
    async_save: bool = False  # whether training continues while a checkpoint is written
    monitor: int = 100  # steps between logged looks at spikes and sinks, under 1% of the time; 0: never
    tensorboard: bool = False  # whether the log's numbers also go to OUT_DIR/tensorboard
    tracker: str = "none"  # where the log's numbers also go: none, wandb, trackio
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    parallel: str = "ddp"  # for several ranks: ddp, or fsdp, which gives each rank a shard of the model
    dtype: str = "auto"  # of autocast: bfloat16, float32; auto: bfloat16 if the hardware has it
    compile: bool = True  # torch.compile for the sub-layers and the loss; needs a C++ compiler on a CPU
    deterministic: bool = False  # use only algorithms that give the same bits each time; always so on a CPU
    # seed, resume, replay
    seed: int = 1337  # of the weights, the batches and dropout
    resume: bool = False  # continue from the newest intact checkpoint of OUT_DIR
    overwrite: bool = False  # start again in an out_dir that holds a run
    replay: int = 0  # compute this step of the run in OUT_DIR again and show its batch; writes nothing
    check: bool = False  # test on a tiny copy whether the model keeps the rules of model.py; writes nothing

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
        for key in (
            *("max_iters", "batch_size", "gradient_accumulation_steps"),
            *("eval_interval", "eval_iters", "log_interval", "save_interval", "keep_last"),
        ):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")


# keys of a single command, never taken from a checkpoint
COMMAND_KEYS = ("out_dir", "resume", "overwrite", "replay", "check", "device", "parallel", "compile", "deterministic")
# keys that may change when a run is resumed; a change of any other key would make it another run
RESUMABLE = (
    *COMMAND_KEYS,
    *("dtype", "max_iters", "learning_rate", "min_lr", "lr_schedule", "warmup_iters", "lr_decay_iters", "grad_clip"),
    *("eval_interval", "eval_iters", "log_interval", "save_interval"),
    *("keep_last", "keep_every", "async_save", "monitor", "tensorboard", "tracker"),
)
SCHEMAS = (GPTConfig, TrainConfig)
Keys = Mapping[str, Any]  # {key of either: value}
EVAL_WINDOWS = 16  # windows in a validation loss, per eval_iters

# name -> function(fraction of the decay that has passed, in [0, 1]) -> multiplier of (learning_rate - min_lr)
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "wsd": lambda done: min(1.0, (1.0 - done) / 0.2),
    "constant": lambda done: 1.0,
}


def adamw(groups: Iterable[dict[str, Any]], cfg: TrainConfig) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) in one fused kernel."""
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)


def on_matrices(make: Callable[..., Optimizer], model: GPT, cfg: TrainConfig) -> list[Optimizer]:
    """The optimiser make(groups, cfg) for the matrices of the blocks, and AdamW for the rest."""
    ids = {id(matrix) for matrix in model.block_matrices()}
    groups = model.optimizer_groups(cfg.weight_decay)
    matrices = [{**group, "params": [p for p in group["params"] if id(p) in ids]} for group in groups]
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in ids]} for group in groups]
    return [make([group for group in matrices if group["params"]], cfg), adamw(rest, cfg)]


def muon(groups: Iterable[dict[str, Any]], cfg: TrainConfig) -> Optimizer:
    """Muon (Jordan et al. 2024), with its step scaled to AdamW's rms."""
    return torch.optim.Muon(groups, cfg.learning_rate, momentum=cfg.momentum, adjust_lr_fn="match_rms_adamw")


def soap(groups: list[dict[str, Any]], cfg: TrainConfig) -> Optimizer:
    """SOAP (Vyas et al. 2024): Adam in the eigenbasis of Shampoo's statistics, for both sides of a matrix. The basis is
    computed every 10 steps; the first step does nothing else. Raises UserError if the package is missing."""
    with extra("soap"):
        from pytorch_optimizer import SOAP
    widest = max(max(p.shape) for group in groups for p in group["params"])
    optimizer = SOAP(groups, cfg.learning_rate, (cfg.beta1, cfg.beta2), max_precondition_dim=widest)

    def same_layout(*args: Any) -> None:
        """Gives the bases the same memory layout on all ranks. Otherwise the ranks of a resumed run drift apart."""
        for state in optimizer.state.values():
            state["Q"] = [basis.contiguous() for basis in state["Q"]]

    optimizer.register_step_post_hook(same_layout)
    return optimizer


def sgd(groups: Iterable[dict[str, Any]], cfg: TrainConfig) -> Optimizer:
    """SGD with momentum. Its weight decay is coupled (L2)."""
    return torch.optim.SGD(groups, lr=cfg.learning_rate, momentum=cfg.momentum)


# name -> function that returns the optimisers, among which the parameters of the model are divided
OPTIMIZERS: dict[str, Callable[[GPT, TrainConfig], list[Optimizer]]] = {
    "adamw": lambda model, cfg: [adamw(model.optimizer_groups(cfg.weight_decay), cfg)],
    "muon": functools.partial(on_matrices, muon),
    "sgd": lambda model, cfg: [sgd(model.optimizer_groups(cfg.weight_decay), cfg)],
    "soap": functools.partial(on_matrices, soap),
}


def kurtosis_loss(x: Tensor) -> Tensor:
    """He et al.'s kurtosis of a stream (B, T, C) over the tokens of each sequence, averaged over sequences. It is 1 if
    all channels are equally large, and C if one channel has all the energy."""
    return torch.vmap(metrics.channel_kurtosis)(x.float().square().mean(1)).mean()


def magnitude_loss(x: Tensor) -> Tensor:
    """max_j |x_j| / rms(x) of a stream (B, T, C), averaged over tokens. The scale of the stream does not matter."""
    x = x.float()
    return (x.abs().amax(-1) / x.square().mean(-1).add(1e-12).sqrt()).mean()


# name -> function of the stream (B, T, C) after a sub-layer. It must be a mean over sequences, so that the size of the
# micro-batches does not change it. The loss is its average over sub-layers. Other losses come from the model: each pass
# stores them in the model's attribute `losses`, {name: scalar ()}.
STREAM_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"kurtosis": kurtosis_loss, "magnitude": magnitude_loss}

CHOICES: dict[str, Any] = {
    "lr_schedule": LR_SCHEDULES,
    "optimizer": OPTIMIZERS,
    "dtype": DTYPES,
    "parallel": PARALLEL,
    "tracker": TRACKERS,
}


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """The learning rate of update number `step`, from 0: a linear warmup, then the schedule down to min_lr."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    end = cfg.lr_decay_iters or cfg.max_iters
    done = min(1.0, (step - cfg.warmup_iters) / max(1, end - cfg.warmup_iters))
    return cfg.min_lr + LR_SCHEDULES[cfg.lr_schedule](done) * (cfg.learning_rate - cfg.min_lr)


def cpp_compiler() -> bool:
    """True if torch.compile can build CPU code here."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def provenance() -> dict[str, Any]:
    """The versions and the git commit that a checkpoint records."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "spikesink": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "git_commit": git.stdout.strip() or "unknown",
    }


def noise_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the dropout noise of a step on a rank: a pure function of (seed, step, rank), like the batch."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def validation_windows(data: Tokens, cfg: TrainConfig) -> list[int]:
    """The fixed windows of the validation split on which the loss is measured."""
    return data.windows(0, min(EVAL_WINDOWS * cfg.eval_iters, data.n_windows))


@torch.no_grad()
def validation_loss(model: nn.Module, data: Tokens, cfg: TrainConfig, machine: Machine) -> float:
    """Mean loss (nats per token) of 16 `eval_iters` fixed windows, or of all windows if there are fewer. The windows
    are the same for any batch_size and number of ranks. Batches that are not full get windows that do not count, so
    that every rank runs the model equally often; sharded models need that."""
    model.eval()
    windows = validation_windows(data, cfg)
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


# ---------------------------------------------------------------------------------------------- starting a run


def foreign_model(name: str, overrides: Keys) -> tuple[GPTConfig, Checkpoint, TextTokenizer | None]:
    """(GPTConfig, checkpoint, tokenizer of a Hugging Face folder or None) of `init_from`. Architecture keys among the
    overrides change the config. Raises UserError."""
    tokenizer = None
    if Path(name).suffix == ".pt" or (Path(name) / "ckpt.pt").is_file():
        pretrained = checkpoint.load(name)
        pretrained.check_contract(CONTRACT, name)
    else:
        try:
            source = hf.open_model(name)
            tokenizer = hf.Tokenizer.load(hf.Source.locate(name))
            data = trained_on(source.config, getattr(tokenizer, "bos_id", None))
            bos = {"bos": bool(tokenizer.prefix_ids)} if tokenizer else {}
            pretrained = Checkpoint(*convert.from_hf(source), config=bos, data=data)
        except ValueError as error:
            raise UserError(f"init_from={name}: {error}") from None
    keys = {field.name for field in dataclasses.fields(GPTConfig)}
    changes = {key: value for key, value in overrides.items() if key in keys}
    try:
        return GPTConfig(**{**pretrained.model_args, **changes}), pretrained, tokenizer
    except (TypeError, ValueError) as error:
        raise UserError(f"init_from={name}: {error}") from None


def check_start(
    cfg: TrainConfig, block_size: int, data: Tokens, pretrained: Checkpoint, tokenizer: TextTokenizer | None
) -> str:
    """Returns in words how the run differs from the training of the weights of `init_from`, '' if it does not. Raises
    UserError if the ids in the data are not the ids that the weights were trained on."""
    same = same_tokens(tokenizer, tokenizer_of(data.meta)) if tokenizer else None
    other = "" if same else "another tokenizer" if same is False else other_ids(data.meta, pretrained.meta)
    if other:
        raise UserError(
            f"init_from={cfg.init_from} was trained on other tokens than {cfg.dataset} has ({other}): prepare the text "
            "with its tokenizer, or start from scratch"
        )
    old, new = pretrained.config | pretrained.model_args, {"bos": cfg.bos, "block_size": block_size}
    changes = [f"{key} {old[key]} -> {value}" for key, value in new.items() if old.get(key, value) != value]
    if old.get("dataset") == cfg.dataset and pretrained.data_sample not in (None, data.sample):
        changes.append(f"{cfg.dataset} holds other text now")
    if not same and pretrained.meta.get("tokenizer") is None and pretrained.data_sample != data.sample:
        changes.append(f"its tokenizer is not known, its ids are taken to be those of {cfg.dataset}")
    return "; ".join(changes)


def load_weights(model: GPT, weights: Mapping[str, Tensor], origin: str) -> None:
    """Loads a state dict. Gates that it lacks start without effect. Raises UserError naming the first misfit."""
    try:
        model.load_state_dict(convert.with_gates(weights, model.state_dict()))
    except RuntimeError as error:
        first = ", ".join(str(error).splitlines()[1].strip().split(", ")[:3])
        raise UserError(
            f"init_from={origin} does not fit the architecture that was given ({first} ...): leave out scale/ and the "
            "arm, or give those that it was trained with"
        ) from None


def fit_vocabulary(model: GPTConfig, cfg: TrainConfig, overrides: Keys, needed: int) -> GPTConfig:
    """The GPTConfig with a vocabulary for `needed` tokens, unless vocab_size is set. Raises UserError if it is less."""
    if "vocab_size" not in overrides and cfg.init_from == "scratch":
        return dataclasses.replace(model, vocab_size=-(-needed // 64) * 64)
    if model.vocab_size < needed:
        raise UserError(f"vocab_size={model.vocab_size} is less than the {needed} of {cfg.dataset}")
    return model


def saved_run(store: checkpoints.Checkpoints, replay: int = 0) -> tuple[Checkpoint, Path]:
    """The checkpoint to continue from, and its path: the newest intact one, or for `replay` the last before that step.
    If there is none before that step, the checkpoint is of step 0, with the weights of the seed. Raises UserError."""
    try:
        saved, path = store.newest(before=replay or None)
    except UserError:
        if not replay or not store.all():
            raise
        saved, path = store.newest()
        saved = dataclasses.replace(saved, step=0)
    saved.check_contract(CONTRACT, path)
    required = (saved.optimizer, saved.step, saved.given, saved.loss_watch)
    numbers = [isinstance(value, (int, float)) for value in saved.loss_watch or ()]
    if None in required or not saved.config or not saved.data or numbers != [True] * 3:
        raise UserError(f"{path} is not a run of this train.py: start from it with --init_from={path}")
    return saved, path


def renamed(values: Keys) -> dict[str, Any]:
    """{key: value} with the keys of older versions replaced by those of this one."""
    current = {key: value for key, value in values.items() if key not in ("penalty", "penalty_weight")}
    if values.get("penalty", "none") != "none":
        current["losses"] = {values["penalty"]: values.get("penalty_weight", 1e-3)}
    if values.get("lr_schedule") == "constant_linear":
        current["lr_schedule"] = "wsd"
    return current


def settings_of(saved: Checkpoint, path: Path, overrides: Keys) -> dict[str, Any]:
    """{key: value} that a resumed run takes from its checkpoint. Raises UserError for any other override."""
    fields, values = config.fields_of(SCHEMAS), {}
    for key, stored in renamed(saved.model_args | saved.config).items():
        if key not in fields:
            raise UserError(f"{path} was trained with {key}={stored}, which this version does not know")
        value = fields[key].read(stored, path)
        if key not in RESUMABLE and overrides.get(key, value) != value:
            raise UserError(f"{path} was trained with {key}={value}, not {overrides[key]}; arms are not mixed")
        if key not in COMMAND_KEYS:
            values[key] = value
    return values


def load_saved(store: checkpoints.Checkpoints, replay: int, machine: Machine) -> tuple[Checkpoint, Path]:
    """`saved_run` on every rank. Only rank 0 gets the tensors, and later distributes the shards. Raises UserError."""
    whole: list[Checkpoint] = []

    def read() -> tuple[Checkpoint, Path]:
        saved, path = saved_run(store, replay)
        whole.append(saved)
        return dataclasses.replace(saved, model={}, optimizer={}), path

    saved, path = machine.on_rank0(read)
    return whole[0] if whole else saved, path


def check_settings(model: GPTConfig, cfg: TrainConfig, machine: Machine) -> None:
    """Raises UserError for settings that are impossible together or on this machine."""
    if cfg.loss_first >= model.block_size:
        raise UserError(f"loss_first={cfg.loss_first} leaves nothing of block_size={model.block_size} to learn")
    if cfg.gradient_accumulation_steps % machine.world:
        raise UserError(
            f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} is not a multiple of the "
            f"{machine.world} ranks, which divide the micro-batches: make it a multiple, and reduce batch_size to match"
        )
    if machine.sharded and cfg.optimizer in ("muon", "soap"):
        raise UserError(f"{cfg.optimizer} needs whole matrices, but fsdp gives each rank a part: use --parallel=ddp")


def compiles(cfg: TrainConfig, machine: Machine) -> bool:
    """True if a run compiles its sub-layers and loss: cfg says so and this machine can. A replay does not compile."""
    return cfg.compile and not cfg.replay and (machine.device.type == "cuda" or cpp_compiler())


# ------------------------------------------------------------------------------------------------------- the run


class Update(NamedTuple):
    """The numbers of an optimiser step."""

    loss: float  # of the batch, in nats per token
    norm: float  # of the gradient, before clipping
    lr: float
    means: dict[str, dict[str, float | None]]  # {"losses": {name: mean}, "scalars": {name: mean}}


class Run:
    """A training run: model, optimiser, data and step, saved to and restored from OUT_DIR.

    run = Run.open(overrides, out_dir, machine)
    run.fit()

    `overrides`: the keys that the user set. `saved`: the checkpoint of `saved_run` to continue from.
    """

    model_class: ClassVar = GPT

    @classmethod
    def open(cls, overrides: Keys, out_dir: str | Path, machine: Machine) -> "Run":
        """The run of a command, new or continued from OUT_DIR, which it locks for this process. Every rank must call
        it. A replay locks nothing and writes nothing. Raises UserError."""
        store, replay = checkpoints.Checkpoints(out_dir), overrides.get("replay", 0)
        if attempt():  # torchrun runs the same command again
            resumes = machine.on_rank0(store.any)
            overrides = {**overrides, "resume": resumes, "overwrite": not resumes}
        saved: Checkpoint | None = None
        settings: dict[str, Any] = {}
        if overrides.get("resume") or (replay and machine.on_rank0(store.any)):
            saved, path = load_saved(store, replay, machine)
            settings = settings_of(saved, path, overrides)
        model_config, cfg = config.build(SCHEMAS, {**settings, **overrides, "out_dir": str(out_dir)})
        if machine.is_rank0:
            for key, value in settings.items():
                if overrides.get(key, value) != value:
                    print(f"changed on resume: {key} {value} -> {overrides[key]}")
        earlier = renamed(saved.given or {}) if saved else {}
        run = cls(model_config, cfg, earlier | dict(overrides), machine, saved)
        if not replay:
            machine.on_rank0(run._take_folder)
        return run

    def __init__(
        self, model_config: GPTConfig, cfg: TrainConfig, overrides: Keys, machine: Machine, saved: Checkpoint | None
    ) -> None:
        self.cfg, self.overrides, self.machine = cfg, dict(overrides), machine.with_dtype(cfg.dtype)
        self.out_dir = Path(cfg.out_dir)
        self.checkpoints = checkpoints.Checkpoints(self.out_dir, cfg.keep_last, cfg.keep_every, cfg.async_save)
        self.path = self.checkpoints.path
        self.step, self.best = 0, math.inf
        self.val_loss: float | None = None
        self.watch, self.signals = LossWatch(), StopSignals()
        self.stopping: str | None = None  # the signal that some rank received; the same on every rank
        if not cfg.replay:
            machine.on_rank0(self._check_out_dir, saved is not None)
        weights = None
        if cfg.init_from != "scratch" and saved is None:
            model_config, pretrained, tokenizer = foreign_model(cfg.init_from, overrides)
            weights = pretrained.model
        self.train_data = Tokens(cfg.dataset, "train", model_config.block_size, cfg.bos, cfg.seed)
        self.val_data = Tokens(cfg.dataset, "val", model_config.block_size, cfg.bos)
        if saved is None:
            model_config = fit_vocabulary(model_config, cfg, overrides, self.train_data.meta["vocab_size"])
        check_settings(model_config, cfg, machine)
        self.n_micro = cfg.gradient_accumulation_steps // machine.world
        self._make_model(model_config, weights)
        if weights is not None:
            changes = check_start(cfg, model_config.block_size, self.train_data, pretrained, tokenizer)
            if changes and machine.is_rank0:
                print(f"init_from={cfg.init_from}: {changes}", file=sys.stderr)
        if saved is not None:
            self._restore(saved)

    def _make_model(self, model_config: GPTConfig, weights: Mapping[str, Tensor] | None) -> None:
        """Makes the model, with `weights` or the seed's, its optimisers and its monitor."""
        cfg, machine, self.model_config = self.cfg, self.machine, model_config
        torch.manual_seed(cfg.seed)
        self.model = self.model_class(model_config).to(machine.device)
        if weights is not None:
            load_weights(self.model, weights, cfg.init_from)
        machine.shard(self.model, self.model.transformer.h)
        self.optimizers = OPTIMIZERS[cfg.optimizer](self.model, cfg)
        methods = (getattr(module, "after_update", None) for module in self.model.modules())
        self.after_update: list[Callable[[], Any]] = [method for method in methods if callable(method)]
        self.stream_losses: dict[str, list[Tensor]] = {}  # of the current forward pass, one per sub-layer
        self._watch_streams()
        self.monitor = Monitor(self.model, cfg.monitor if machine.is_rank0 else 0)

    def _check_out_dir(self, resumes: bool) -> None:
        """Raises UserError if OUT_DIR holds another run that may not be overwritten, or if it cannot be written."""
        has_run = self.checkpoints.any() or (self.out_dir / "log.jsonl").exists()
        if has_run and not resumes and not self.cfg.overwrite:
            resume = "--resume goes on with it, " if self.checkpoints.any() else ""
            raise UserError(
                f"{self.out_dir} already holds a run: {resume}--overwrite starts again, --out_dir=DIR goes elsewhere"
            )
        files.check_writable(self.path)

    def _take_folder(self) -> None:
        """Locks OUT_DIR for this process, deletes the old run if it is to be overwritten, and writes config.json.
        Raises UserError if OUT_DIR cannot be written or another process trains there."""
        self.lock = filelock.FileLock(self.out_dir / ".lock")
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            self.checkpoints.sweep()
            if self.cfg.overwrite:
                self.checkpoints.clear()
                (self.out_dir / Tracker.FILE).unlink(missing_ok=True)
            values = {**dataclasses.asdict(self.model_config), **dataclasses.asdict(self.cfg)}
            settings = config.plain({"given": self.overrides, "config": values})
            text = json.dumps({**settings, **provenance()}, indent=1)
            files.write_atomic(self.out_dir / "config.json", lambda file: file.write(text.encode()))
        except filelock.Timeout:
            raise UserError(f"another process trains in {self.out_dir}: stop it, or give another --out_dir") from None
        except OSError as error:
            raise UserError(f"cannot write {self.out_dir}: {error.strerror}") from None

    def _watch_streams(self) -> None:
        """Hooks the stream after every sub-layer, so that passes with gradients collect its losses. Raises UserError if
        a loss of cfg.losses is neither one of these nor one of the model."""
        names = [name for name in self.cfg.losses if name in STREAM_LOSSES]

        def hook(module: nn.Module, args: Any, x: Tensor) -> None:
            if torch.is_grad_enabled():
                for name in names:
                    self.stream_losses.setdefault(name, []).append(STREAM_LOSSES[name](x))

        for sub_layer in self.model.sub_layers() if names else ():
            sub_layer.stream.register_forward_hook(hook)
        for name in self.cfg.losses.keys() - set(names):
            x = torch.zeros(1, self.model_config.block_size, dtype=torch.long, device=self.machine.device)
            with self.machine.autocast():
                self.model(x, x)
            if name not in (known := {**STREAM_LOSSES, **self._auxiliary()}):
                raise UserError(f"losses: there is no {name!r}{nearest(name, known)}; there are {', '.join(known)}")

    def _auxiliary(self) -> dict[str, Tensor]:
        """{name: scalar ()} of the auxiliary losses of the last pass. It empties `stream_losses`."""
        means = {name: torch.stack(values).mean() for name, values in self.stream_losses.items()}
        self.stream_losses.clear()
        return getattr(self.model, "losses", {}) | means

    def _restore(self, saved: Checkpoint) -> None:
        """Restores the state of a checkpoint. Raises UserError if it does not belong to this run."""
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
        """The model that the steps call: compiled if `compiles` says so, and wrapped for its ranks."""
        if compiles(self.cfg, self.machine):
            self.model.compile_sublayers()
        return self.machine.wrap(self.model)

    @property
    def sequences_per_step(self) -> int:
        """Sequences per optimiser step, over all micro-batches and ranks."""
        return self.cfg.batch_size * self.cfg.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimiser step, over all micro-batches and ranks."""
        return self.sequences_per_step * self.model_config.block_size

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """x, y (B, T) of this rank's micro-batches in the current step. y is -1 where the loss does not count. It also
        seeds the dropout noise of the step, so that no RNG state need be saved."""
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
        """Computes the gradients of the current step, and in `means` the means of the auxiliary losses and the model's
        scalars. Returns the language model's mean loss () on this rank."""
        mean = torch.zeros((), device=self.machine.device)
        self.means: dict[tuple[str, str], Tensor] = {}  # (losses or scalars, name) -> mean ()
        for micro, (x, y) in enumerate(self.batches()):
            with self.machine.accumulating(self.compiled_model, last=micro == self.n_micro - 1):
                with self.machine.autocast():
                    loss = self.compiled_model(x, y)[1]
                mean += loss.detach() / self.n_micro
                auxiliary = self._auxiliary()
                for name, weight in self.cfg.losses.items():
                    loss = loss + weight * auxiliary[name]
                for kind, values in (("losses", auxiliary), ("scalars", getattr(self.model, "scalars", {}))):
                    for name, value in values.items():
                        part = value.detach().to(mean) / self.n_micro
                        self.means[kind, name] = self.means.get((kind, name), 0) + part
                (loss / self.n_micro).backward()
        return mean

    def agree(self, loss: Tensor) -> tuple[float, dict[str, dict[str, float | None]], str | None]:
        """(loss, means, signal), the same on every rank: the mean of the ranks' losses (), the means of their `means`,
        and the signal that one of them received. All of it waits for the device only once."""
        rank_means = torch.stack((loss, *self.means.values())) / self.machine.world
        sums = self.machine.sum(torch.cat((rank_means, self.signals.votes(self.machine.device)))).tolist()
        means: dict[str, dict[str, float | None]] = {}
        for (kind, name), value in zip(self.means, sums[1:], strict=False):
            means.setdefault(kind, {})[name] = value if math.isfinite(value) else None
        return sums[0], means, self.signals.elected(sums[len(rank_means) :])

    def clip(self) -> float:
        """Scales the gradients down to grad_clip. Returns their norm before that."""
        return self.machine.clip_gradients(self.model.parameters(), self.cfg.grad_clip or math.inf)

    def update(self) -> Update:
        """Makes an optimiser step. If the loss or a gradient is not finite, it changes no weight and raises
        StoppedError on every rank."""
        with self.monitor(self.step + 1):  # the log counts finished steps
            rank_loss = self.gradients()
        loss, means, self.stopping = self.agree(rank_loss)
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
        return Update(loss, norm, lr, means)

    # -------------------------------------------------------------------------------------------- the loop

    def fit(self, name: str = "") -> None:
        """Trains to max_iters and unlocks OUT_DIR. `name`: the name of the run in the progress bar. Every rank must
        call it. Raises InterruptedRunError after a signal, StoppedError if the loss is not finite."""
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
        """Opens the logs, which `stack` closes. Raises UserError."""
        stack.callback(self.lock.release)
        hparam = lambda value: value if isinstance(value, (bool, int, float)) else str(value)  # HParams takes no others
        arm = {key: hparam(value) for key, value in self.overrides.items() if key not in COMMAND_KEYS}
        last_step = int(max((row["step"] for row in rows_of(self.out_dir / "log.jsonl")), default=0))
        try:
            self.logs = [JsonLines(self.out_dir / "log.jsonl", self.step)]
            self.loss_spikes = JsonLines(self.out_dir / "loss_spikes.jsonl", self.step)
        except OSError as error:
            raise UserError(f"cannot write {self.out_dir}: {error.strerror}") from None
        if self.cfg.tensorboard:
            rows = rows_of(self.out_dir / "log.jsonl")
            self.logs.append(TensorBoard(self.out_dir / "tensorboard", self.step, arm, rows))
        if self.cfg.tracker != "none":
            self.logs.append(Tracker(self.cfg.tracker, self.out_dir, arm, last_step))
        for log in (*self.logs, self.loss_spikes):
            stack.callback(log.close)
        self.logs.append(self.progress)

    def _loop(self) -> None:
        start, first_step = time.perf_counter(), self.step  # of the steps since the last row of the log
        while not self.done:
            update = self.update()
            self._watch_loss(update)
            evaluates, best = self._is_due(self.cfg.eval_interval), False
            if evaluates or self.monitor.row or self._is_due(self.cfg.log_interval):
                seconds = time.perf_counter() - start
                if evaluates:
                    best = self.evaluate()
                self.log(update, (self.step - first_step) * self.tokens_per_step / seconds, evaluates)
                start, first_step = time.perf_counter(), self.step
            self.save_if_due(best)
            self.progress.bar.update()
            if self.stopping and not self.done:
                raise InterruptedRunError(
                    f"{self.stopping} at step {self.step}: saved {self.path}; go on with --resume"
                )

    @property
    def done(self) -> bool:
        """True after max_iters steps."""
        return self.step >= self.cfg.max_iters

    def _is_due(self, interval: int) -> bool:
        """True at every multiple of `interval`, and at the last step."""
        return self.done or self.step % interval == 0

    def evaluate(self) -> bool:
        """Measures the validation loss; True if it is the lowest so far. Raises StoppedError if it is not finite."""
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
            **update.means,
            **({"monitor": self.monitor.row} if self.monitor.row else {}),
        }
        for log in self.logs:
            log.write(row)

    def _watch_loss(self, update: Update) -> None:
        """Writes a loss that stands out, and its batch, to loss_spikes.jsonl."""
        stands_out, mean, sd = self.watch.stands_out(update.loss)
        if stands_out and self.machine.is_rank0:
            self._note(self.step, {"loss": update.loss, "mean": mean, "sd": sd, "grad_norm": update.norm})

    def _note(self, step: int, row: dict[str, Any]) -> None:
        windows = self.train_data.windows(step - 1, self.sequences_per_step)
        self.loss_spikes.write({"step": step, **row, "windows": windows})

    def _stopped(self, error: StoppedError) -> NoReturn:
        """Ends a run whose loss or gradient is not finite. Raises StoppedError, which names a sound checkpoint."""
        spoiled = self.val_loss is not None and not math.isfinite(self.val_loss)
        step = self.step if spoiled else self.step + 1  # the update that spoiled the model, or was not made
        if self.machine.is_rank0:
            self._note(step, {"stopped": str(error)})
            with contextlib.suppress(OSError):
                self.checkpoints.wait()
        sound = self._last_good(before=self.step)  # the checkpoint of this step has the loss that is not finite
        raise StoppedError(f"{error}; checkpoints: {sound}; --replay={step} shows its batch") from None

    # ----------------------------------------------------------------------------------------------- saving

    def save_if_due(self, best: bool) -> None:
        """Saves at the last step, before stopping, at the best validation loss, and every save_interval steps."""
        ends = self.done or self.stopping is not None
        if ends or best or self._is_due(self.cfg.save_interval):
            self.save(best, ends)

    def save(self, best: bool = False, last: bool = False) -> None:
        """Writes a checkpoint from which the run can continue. Every rank must call it; rank 0 writes. If it cannot be
        written, this prints a warning and training continues. The `last` one raises UserError instead."""
        weights, optimizer = self.machine.state(self.model, self.optimizers)
        if not self.machine.is_rank0:
            return
        content = self._checkpoint(weights, optimizer)
        wait, write = self.checkpoints.wait, lambda: self.checkpoints.save(content, best)
        for call in (wait, write, *([wait] if last else [])):
            try:
                call()
            except OSError as error:
                message = f"step {self.step}: cannot write a checkpoint ({error.strerror}); {self._last_good()}"
                if last:
                    raise UserError(f"{message}; make room and go on with --resume") from None
                warn(f"{message}; training goes on")

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


# --------------------------------------------------------------------------------------------------- replay


class Replay(NamedTuple):
    """A step that was computed again."""

    step: int
    loss: float  # as in the log
    norm: float  # the log's grad_norm
    windows: list[tuple[int, float, list[int]]]  # (window, mean loss of its tokens, its T ids), the worst first
    shares: list[tuple[str, float]]  # (parameter, its share of the squared gradient norm), the largest first


def replay(run: Run) -> Replay:
    """Computes step cfg.replay of a run again from the last checkpoint before it. Raises UserError on several ranks."""
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
    total = sum(squares.values())
    worst: Callable[[Any], float] = lambda row: -row[1] if math.isfinite(row[1]) else -math.inf
    numbers = run.train_data.windows(run.step, run.sequences_per_step)
    windows = sorted(zip(numbers, losses, ids, strict=True), key=worst)
    shares = sorted(((name, square / total) for name, square in squares.items()), key=worst)
    return Replay(run.cfg.replay, loss, norm, windows, shares)


def print_replay(run: Run) -> None:
    """Replays a step and prints it, with the numbers of the log."""
    result = replay(run)
    row = next((row for row in rows_of(run.out_dir / "log.jsonl") if row["step"] == result.step), None)
    logged = f" (logged: {row['loss']:.6f}, {row['grad_norm']:.6g})" if row else " (not logged)"
    print(f"step {result.step}: loss {result.loss:.6f}, gradient norm {result.norm:.6g}{logged}")
    print("\nlargest gradients, of the squared norm")
    for name, share in result.shares[:5]:
        print(f"{share:7.1%}  {name}")
    text_of = getattr(tokenizer_of(run.train_data.meta), "text", None)
    print(f"\nloss    window  {'text' if text_of else 'ids'}, the worst 10 of {len(result.windows)}")
    for window, loss, ids in result.windows[:10]:
        print(f"{loss:6.3f}  {window:6d}  {repr(text_of(ids))[:100] if text_of else ids[:20]}")


# ------------------------------------------------------------------------------------------------------ the command


def check(
    model: GPT | GPTConfig, cfg: TrainConfig | None = None, only: Collection[str] = ()
) -> Iterator[contracts.Result]:
    """The result of every contract of trainer/check.py, or only of some, for a tiny copy of a model."""
    trainer = contracts.Trainer(Run, OPTIMIZERS, cfg or TrainConfig(), cpp_compiler())
    model_class, model_config = (GPT, model) if isinstance(model, GPTConfig) else (type(model), model.config)
    return contracts.check(model_class, model_config, trainer, only)


def print_check(model_config: GPTConfig, cfg: TrainConfig) -> None:
    """Prints a line for each contract. Raises UserError if one is broken."""
    broken = []
    for result in check(model_config, cfg):
        print(result)
        broken += [result.contract] if result.broken else []
    if broken:
        raise UserError(f"{len(broken)} of {len(contracts.CONTRACTS)} contracts are broken: {', '.join(broken)}")


def be_deterministic(required: bool) -> None:
    """Makes torch use algorithms that give the same bits each time. Where it has none, it raises if `required`, and
    warns otherwise."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not required)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def print_run(run: Run, overrides: Keys) -> None:
    """Prints the overrides, the size of the model, the data and the machine."""
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


def in_bits(run: Run) -> str:
    """The last validation loss in bits per byte, for a line of text; '' if the text of the tokens is not at hand."""
    data, prefix_ids = run.val_data, (run.val_data.meta["bos_id"],) if run.cfg.bos else ()
    x, y = data.read(validation_windows(data, run.cfg))
    tokenizer, config = tokenizer_of(data.meta), run.model_config
    reader = Reader(tokenizer, data.meta, run.cfg.dataset, prefix_ids, (), config.block_size, config.vocab_size)
    n_bytes = reader.predicted_bytes(torch.cat((x[:, :1], y), dim=1), 1)
    bits = None if run.val_loss is None else metrics.bits_per_byte(run.val_loss * y.numel(), n_bytes)
    return "" if bits is None else f", {bits:.4f} bits per byte"


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((__doc__ or "") + config.describe(SCHEMAS[::-1], MODEL_CHOICES | CHOICES | {"losses": STREAM_LOSSES}))
        return
    overrides, names = config.parse_argv(SCHEMAS, sys.argv[1:], ROOT)
    if overrides.get("check"):
        print_check(*config.build(SCHEMAS, overrides))
        return
    out_dir = overrides.get("out_dir") or str(Path("out") / ("-".join(names) or "gpt2"))
    machine = Machine.find(overrides.get("device", "auto"), overrides.get("parallel", "ddp"))
    if overrides.get("deterministic") or machine.device.type == "cpu":  # on a CPU it costs nothing
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
        print(f"val_loss {run.val_loss:.4f} nats per token{in_bits(run)}")
        print(f"checkpoint: {run.path}\nnext: python detect.py {run.path}")


if __name__ == "__main__":
    cli(main)
