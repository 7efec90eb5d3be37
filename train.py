"""Train a GPT: python train.py CONFIG [CONFIG ...] [--key=value ...]

  python train.py postnorm scale/nano --dataset=stdlib     small, on a CPU
  python train.py config/postnorm.py                       125M, OpenWebText
  torchrun --nproc_per_node=8 train.py config/postnorm.py  on eight GPUs
  python train.py --resume --out_dir=out/postnorm          goes on
  python train.py --replay=812 --out_dir=out/postnorm      step 812, looked at

CONFIG names a file of configs/: an arm (configs/README.md lists them) or a
size (scale/toy, scale/micro, scale/nano, scale/tiny, scale/gpt2). Without one
it is GPT-2 small, every default. Keys have the last word; they are written
--key=value, and shown here with their defaults. A first ablation, step by
step: docs/tutorial.md.

Writes OUT_DIR/ckpt.pt (a link to the newest ckpt-STEP.pt), best.pt, log.jsonl,
loss_spikes.jsonl and config.json.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
from tqdm import tqdm

from data.loader import Tokens
from model import CHOICES as OF_MODEL
from model import GPT, GPTConfig
from spikesink import __version__, files
from spikesink.errors import InterruptedRunError, StoppedError, UserError, cli
from spikesink.files import rows_of
from spikesink.measure import metrics
from spikesink.measure.monitor import Monitor
from spikesink.models import checkpoint, convert, hf
from spikesink.text.tokenizers import tokenizer_of
from trainer import checkpoints, config
from trainer.log import TRACKERS, JsonLines, LossWatch, TensorBoard, Tracker, warn
from trainer.machine import DTYPES, PARALLEL, Machine, attempt

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
    optimizer: str = "adamw"  # adamw, muon (matrices of the blocks; AdamW for the rest), sgd
    learning_rate: float = 6e-4
    weight_decay: float = 0.1  # on matrices and embeddings
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95  # of sgd and muon
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    # learning-rate schedule
    lr_schedule: str = "cosine"  # cosine, constant_linear (constant, then linear over the last fifth) or constant
    warmup_iters: int = 2000
    lr_decay_iters: int = 0  # step at which min_lr is reached; 0: max_iters
    min_lr: float = 6e-5
    # loss
    loss_first: int = 0  # first position that the training loss counts
    loss_last: int = 0  # the position after the last one that it counts; 0: all
    penalty: str = "none"  # on the residual stream, against spikes: none, kurtosis, magnitude
    penalty_weight: float = 1e-3
    # log and checkpoints
    eval_interval: int = 2000  # steps between validation losses
    eval_iters: int = 200  # batches in a validation loss; always the same ones
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

    def __post_init__(self):
        for key, table in CHOICES.items():
            if getattr(self, key) not in table:
                raise ValueError(f"{key}={getattr(self, key)!r} is not one of: {', '.join(table)}")
        for key in (
            *("weight_decay", "grad_clip", "min_lr", "warmup_iters", "lr_decay_iters", "seed"),
            *("loss_first", "loss_last", "penalty_weight", "keep_every", "monitor", "replay"),
        ):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} must be 0 or more")
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
OF_COMMAND = ("out_dir", "resume", "overwrite", "replay", "device", "parallel", "compile", "deterministic")
# what may change when a run is resumed; everything else is what the run is
RESUMABLE = (
    *OF_COMMAND,
    *("dtype", "max_iters", "learning_rate", "min_lr", "lr_schedule", "warmup_iters", "lr_decay_iters", "grad_clip"),
    *("eval_interval", "eval_iters", "log_interval", "save_interval"),
    *("keep_last", "keep_every", "async_save", "monitor", "tensorboard", "tracker"),
)
SCHEMAS = (GPTConfig, TrainConfig)

# name -> multiplier of (learning_rate - min_lr), given the fraction of the decay that has passed, in [0, 1]
LR_SCHEDULES = {
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant_linear": lambda done: min(1.0, (1.0 - done) / 0.2),
    "constant": lambda done: 1.0,
}


def adamw(groups, cfg):
    """AdamW (Loshchilov & Hutter 2019), one fused kernel."""
    betas = (cfg.beta1, cfg.beta2)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=True)


def muon(model, cfg):
    """Muon (Jordan et al. 2024) on the matrices of the blocks, its step scaled to AdamW's rms; AdamW on the rest."""
    matrices = model.block_matrices()
    taken = {id(matrix) for matrix in matrices}
    groups = model.optimiser_groups(cfg.weight_decay)
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
    settings = {"lr": cfg.learning_rate, "momentum": cfg.momentum, "weight_decay": cfg.weight_decay}
    return [torch.optim.Muon(matrices, **settings, adjust_lr_fn="match_rms_adamw"), adamw(rest, cfg)]


def sgd(groups, cfg):
    """SGD with momentum; its weight decay is the coupled one, L2."""
    return torch.optim.SGD(groups, lr=cfg.learning_rate, momentum=cfg.momentum)


# name -> the optimisers that share a model's parameters out among themselves
OPTIMIZERS = {
    "adamw": lambda model, cfg: [adamw(model.optimiser_groups(cfg.weight_decay), cfg)],
    "muon": muon,
    "sgd": lambda model, cfg: [sgd(model.optimiser_groups(cfg.weight_decay), cfg)],
}


def kurtosis_penalty(x):
    """He et al.'s kurtosis of a stream (B, T, C) over the batch: 1 if all channels are alike, C if one holds all."""
    return metrics.channel_kurtosis(x.float().square().mean((0, 1)))


def magnitude_penalty(x):
    """max_j |x_j| / rms(x) of a token, averaged: what is left of the magnitude when the scale of the stream is free."""
    x = x.float()
    return (x.abs().amax(-1) / x.square().mean(-1).add(1e-12).sqrt()).mean()


PENALTIES = {"none": None, "kurtosis": kurtosis_penalty, "magnitude": magnitude_penalty}

CHOICES = {
    "lr_schedule": LR_SCHEDULES,
    "optimizer": OPTIMIZERS,
    "penalty": PENALTIES,
    "dtype": DTYPES,
    "parallel": PARALLEL,
    "tracker": TRACKERS,
}


def learning_rate(step, cfg):
    """Learning rate of update number `step` (from 0): linear warmup, then the schedule down to min_lr."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    end = cfg.lr_decay_iters or cfg.max_iters
    done = min(1.0, (step - cfg.warmup_iters) / max(1, end - cfg.warmup_iters))
    return cfg.min_lr + LR_SCHEDULES[cfg.lr_schedule](done) * (cfg.learning_rate - cfg.min_lr)


def cpp_compiler():
    """True if torch.compile can build CPU code here."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def provenance():
    """Versions and git commit, for the checkpoint."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "spikesink": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "git_commit": git.stdout.strip() or "unknown",
    }


@torch.no_grad()
def validation_loss(model, data, cfg, machine):
    """Mean loss (nats per token) over `eval_iters` fixed batches, the same ones for any number of ranks."""
    model.eval()
    total = torch.zeros((), device=machine.device)
    for first in range(0, cfg.eval_iters, machine.world):  # every rank as often: sharded models run together
        x, y = data.batch(first + machine.rank, cfg.batch_size)
        with machine.autocast():
            loss = model(x.to(machine.device), y.to(machine.device))[1]
        total += loss if first + machine.rank < cfg.eval_iters else 0
    model.train()
    return machine.sum(total).item() / cfg.eval_iters


def foreign_model(name, given):
    """(GPTConfig, state dict) of `init_from`; given architecture keys change the config. Raises UserError."""
    if Path(name).suffix == ".pt" or (Path(name) / "ckpt.pt").is_file():
        content = checkpoint.load(name)
    else:
        try:
            content = convert.from_hf(hf.open_model(name))
        except ValueError as error:
            raise UserError(f"init_from={name}: {error}") from None
    keys = {field.name for field in dataclasses.fields(GPTConfig)}
    changes = {key: value for key, value in given.items() if key in keys}
    try:
        return GPTConfig(**{**content["model_args"], **changes}), content["model"]
    except (TypeError, ValueError) as error:
        raise UserError(f"init_from={name}: {error}") from None


def load_weights(model, weights, origin):
    """Loads a state dict; gates that it lacks start without effect. Raises UserError naming the first misfit."""
    try:
        model.load_state_dict(convert.with_gates(weights, model.state_dict()))
    except RuntimeError as error:
        first = ", ".join(str(error).splitlines()[1].strip().split(", ")[:3])
        raise UserError(
            f"init_from={origin} does not fit the architecture that was given ({first} ...): leave scale/ and the arm "
            "out, or give what it was trained with"
        ) from None


def fit_vocabulary(model_config, cfg, given, needed):
    """The GPTConfig with a vocabulary for `needed` tokens, unless one was given. Raises UserError if that is less."""
    if "vocab_size" not in given and cfg.init_from == "scratch":
        return dataclasses.replace(model_config, vocab_size=-(-needed // 64) * 64)
    if model_config.vocab_size < needed:
        raise UserError(f"vocab_size={model_config.vocab_size} is less than the {needed} of {cfg.dataset}")
    return model_config


class Run:
    """One training run: model, optimiser, data and step, saved to and restored from OUT_DIR.

    `given`: the keys that were asked for; `saved`: the checkpoint to go on from, as `saved_run` returned it.
    """

    def __init__(self, model_config, cfg, given, machine, saved=None):
        self.cfg, self.given, self.machine = cfg, given, machine.at(cfg.dtype)
        self.out_dir = Path(cfg.out_dir)
        self.checkpoints = checkpoints.Checkpoints(self.out_dir, cfg.keep_last, cfg.keep_every, cfg.async_save)
        self.path = self.checkpoints.path
        self.step, self.val_loss, self.best = 0, None, math.inf
        self.watch = LossWatch()
        self.signal = None  # the name of a signal that asked this rank to stop
        self.stopping = None  # that of one that any rank got, agreed on
        if not cfg.replay:
            machine.from_chief(self._check_out_dir, saved)
        weights = None
        if cfg.init_from != "scratch" and not saved:
            model_config, weights = foreign_model(cfg.init_from, given)
        self.train_data = Tokens(cfg.dataset, "train", model_config.block_size, cfg.bos, cfg.seed)
        self.val_data = Tokens(cfg.dataset, "val", model_config.block_size, cfg.bos)
        self.model_config = model_config
        if not saved:
            self.model_config = fit_vocabulary(model_config, cfg, given, self.train_data.meta["vocab_size"])
        if cfg.loss_first >= model_config.block_size:
            raise UserError(
                f"loss_first={cfg.loss_first} leaves nothing of block_size={model_config.block_size} to learn"
            )
        if cfg.gradient_accumulation_steps % machine.world:
            raise UserError(
                f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} is not a multiple of the "
                f"{machine.world} ranks, which share the micro-batches out: make it one, and batch_size as much smaller"
            )
        if machine.sharded and cfg.optimizer == "muon":
            raise UserError("muon needs whole matrices, of which fsdp leaves each rank a part: --parallel=ddp")
        self.n_micro = cfg.gradient_accumulation_steps // machine.world
        torch.manual_seed(cfg.seed)
        self.model = GPT(self.model_config).to(machine.device)
        if weights is not None:
            load_weights(self.model, weights, cfg.init_from)
        machine.shard(self.model, self.model.transformer.h)
        self.optimizers = OPTIMIZERS[cfg.optimizer](self.model, cfg)
        self.penalties = []  # of the current forward pass, one per sub-layer
        if cfg.penalty != "none":
            self._watch_streams()
        self.monitor = Monitor(self.model, cfg.monitor if machine.chief else 0)
        if saved:
            self._restore(saved)

    def _check_out_dir(self, saved):
        """Raises UserError rather than overwrite a run unasked, or where nothing can be written."""
        held = self.checkpoints.any() or (self.out_dir / "log.jsonl").exists()
        if held and not saved and not self.cfg.overwrite:
            raise UserError(
                f"{self.out_dir} already holds a run: --resume goes on with it, --overwrite starts again, "
                "--out_dir=DIR goes elsewhere"
            )
        files.check_writable(self.path)

    def _watch_streams(self):
        """Collects the penalty of the stream after every sub-layer, in passes that will be differentiated."""
        penalty = PENALTIES[self.cfg.penalty]

        def hook(module, args, x):
            if torch.is_grad_enabled():
                self.penalties.append(penalty(x))

        for block in self.model.transformer.h:
            for sub_layer in (block.attn, block.mlp):
                sub_layer.stream.register_forward_hook(hook)

    def _restore(self, saved):
        if (saved["data"], saved.get("data_sample")) != (self.train_data.meta, self.train_data.sample):
            raise UserError(f"{self.path} was trained on other data than what --dataset={self.cfg.dataset} holds now")
        if saved["step"] > self.cfg.max_iters:
            raise UserError(f"{self.path} is at step {saved['step']}, beyond max_iters={self.cfg.max_iters}")
        if saved["step"]:
            self.machine.restore(self.model, self.optimizers, saved["model"], saved["optimizer"])
        self.step, self.val_loss, self.watch = saved["step"], saved["val_loss"], LossWatch(saved["loss_watch"])
        self.best = math.inf if saved["best"] is None else saved["best"]

    def save(self, best=False, last=False):
        """Everything that is needed to go on, and to know what this model is. Every rank must call it; rank 0 writes.

        What cannot be written is a warning, and training goes on to the next checkpoint; if it is the `last`, a
        UserError.
        """
        weights, optimizer = self.machine.state(self.model, self.optimizers)
        if not self.machine.chief:
            return
        content = {
            "model_args": dataclasses.asdict(self.model_config),
            "model": weights,
            "optimizer": optimizer,
            "config": dataclasses.asdict(self.cfg),
            "given": self.given,
            "data": self.train_data.meta,
            "data_sample": self.train_data.sample,
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "val_loss": self.val_loss,
            "best": None if self.best == math.inf else self.best,
            "loss_watch": self.watch.state,
            **provenance(),
        }
        wait, write = self.checkpoints.wait, lambda: self.checkpoints.save(content, best)
        for call in (wait, write, *([wait] if last else [])):
            try:
                call()
            except OSError as error:
                said = f"step {self.step}: cannot write a checkpoint ({error.strerror}); {self._last_good()}"
                if last:
                    raise UserError(f"{said}; make room and go on with --resume") from None
                warn(f"{said}; training goes on")

    def _last_good(self):
        return f"the last good one is {self.path}" if self.path.exists() else "there is none yet"

    @property
    def tokens_per_step(self):
        """Tokens in one optimiser step, over all micro-batches and ranks."""
        return self.sequences_per_step * self.model_config.block_size

    @property
    def sequences_per_step(self):
        """Sequences in one optimiser step, over all micro-batches and ranks."""
        return self.cfg.batch_size * self.cfg.gradient_accumulation_steps

    def batches(self):
        """x, y (B, T) of the micro-batches of the current step, on this rank; y is -1 where the loss does not count.

        Dropout noise, like the batch, is a pure function of (seed, step, rank): there is no RNG state to lose.
        """
        cfg, machine = self.cfg, self.machine
        torch.manual_seed(hash((cfg.seed, self.step, machine.rank)))
        for micro in range(self.n_micro):
            x, y = self.train_data.batch(
                self.step, cfg.batch_size, micro, self.n_micro, rank=machine.rank, world=machine.world
            )
            y[:, : cfg.loss_first] = -1
            y[:, cfg.loss_last or y.size(1) :] = -1
            yield x.to(machine.device), y.to(machine.device)

    def gradients(self, model):
        """Gradients of the current step, clipped, the same on every rank. Returns (loss, gradient norm)."""
        cfg, machine = self.cfg, self.machine
        total = torch.zeros((), device=machine.device)
        for micro, (x, y) in enumerate(self.batches()):
            with machine.accumulating(model, last=micro == self.n_micro - 1):
                with machine.autocast():
                    loss = model(x, y)[1]
                total += loss.detach() / self.n_micro
                if self.penalties:
                    loss = loss + cfg.penalty_weight * torch.stack(self.penalties).mean()
                    self.penalties.clear()
                (loss / self.n_micro).backward()
        # every rank learns at the same step that one of them was asked to stop
        asked = torch.tensor([float(name == self.signal) for name in SIGNALS], device=machine.device)
        loss, *asked = machine.sum(torch.cat((total[None] / machine.world, asked))).tolist()
        self.stopping = next((name for name, ranks in zip(SIGNALS, asked, strict=True) if ranks), None)
        return loss, machine.gradient_norm(self.model.parameters(), cfg.grad_clip or math.inf)

    def update(self, model):
        """One optimiser step. Returns loss, gradient norm and learning rate.

        Raises StoppedError, on every rank and with the weights as they were, if the loss or a gradient is not finite.
        """
        with self.monitor(self.step + 1):  # its number when it is done, as in the log
            loss, norm = self.gradients(model)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise StoppedError(f"step {self.step + 1}: loss {loss}, gradient norm {norm}: stopped before the update")
        lr = learning_rate(self.step, self.cfg)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss, norm, lr

    def open_folder(self):
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
            everything = {**dataclasses.asdict(self.model_config), **dataclasses.asdict(self.cfg)}
            text = json.dumps({"given": self.given, "config": everything, **provenance()}, indent=1)
            files.write_atomic(self.out_dir / "config.json", lambda file: file.write(text.encode()))
            self.log = JsonLines(self.out_dir / "log.jsonl", self.step)
            self.jumps = JsonLines(self.out_dir / "loss_spikes.jsonl", self.step)
        except filelock.Timeout:
            raise UserError(f"another process trains in {self.out_dir}: stop it, or give another --out_dir") from None
        except OSError as error:
            raise UserError(f"cannot write {self.out_dir}: {error.strerror}") from None

    def train(self, model, name=""):
        """To max_iters; `model` is what is called: self.model, perhaps compiled or wrapped by DDP. `name`: what the
        progress bar calls it."""
        with contextlib.ExitStack() as stack:
            logs = []
            if self.machine.chief:
                stack.callback(self.lock.release)
                logs = [self.log]
                arm = {key: value for key, value in self.given.items() if key not in OF_COMMAND}
                if self.cfg.tensorboard:
                    before = rows_of(self.out_dir / "log.jsonl")
                    logs.append(TensorBoard(self.out_dir / "tensorboard", self.step, arm, before))
                if self.cfg.tracker != "none":
                    logs.append(Tracker(self.cfg.tracker, self.out_dir.name, arm))
                for log in (*logs, self.jumps):
                    stack.callback(log.close)
            stack.enter_context(self._stopping_on_signals())
            self._train(model, logs, name)

    @contextlib.contextmanager
    def _stopping_on_signals(self):
        """Within, SIGNALS end the run after the step that it is at."""
        before = {name: signal.signal(getattr(signal, name), self._stop) for name in SIGNALS}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)

    def _stop(self, number, frame):
        """Asks for a stop after the current step; a second Ctrl-C or SIGTERM ends the process at once."""
        self.signal = signal.Signals(number).name
        if number != signal.SIGUSR1:
            signal.signal(number, signal.default_int_handler)

    def _train(self, model, logs, name):
        cfg, chief = self.cfg, self.machine.chief
        since, seen = time.perf_counter(), self.step
        hidden, label = None if chief else True, f"{name}: " if name else ""
        bar = tqdm(total=cfg.max_iters, initial=self.step, unit="step", desc=name or None, disable=hidden)
        while self.step < cfg.max_iters:
            try:
                loss, norm, lr = self.update(model)
            except StoppedError as error:
                bar.close()
                self._stopped(error)
            self._watch_loss(loss, norm)
            last, best = self.step == cfg.max_iters, False
            evaluated = last or self.step % cfg.eval_interval == 0
            if evaluated or self.monitor.row or self.step % cfg.log_interval == 0:
                now = time.perf_counter()
                speed = (self.step - seen) * self.tokens_per_step / (now - since)
                if evaluated:
                    self.val_loss = validation_loss(model, self.val_data, cfg, self.machine)
                    best = self.val_loss < self.best
                    self.best = min(self.val_loss, self.best)
                row = {
                    "step": self.step,
                    "loss": loss,
                    "val_loss": self.val_loss if evaluated else None,
                    "tokens": self.step * self.tokens_per_step,
                    "lr": lr,
                    "grad_norm": norm,
                    "tokens_per_s": speed,
                }
                if self.monitor.row:
                    row["monitor"] = self.monitor.row
                since, seen = time.perf_counter(), self.step
                for log in logs:
                    log.write(row)
                looked = self.monitor.words()
                bar.set_postfix_str(", ".join(filter(None, (f"loss={loss:.3f}", looked))), refresh=False)
                if chief and evaluated:
                    words = f"loss {loss:.4f}, val_loss {self.val_loss:.4f}, {speed:,.0f} tokens/s"
                    words = ", ".join(filter(None, (words, looked)))
                    bar.write(f"{label}step {self.step}: {words}", file=sys.stdout)
            ends = last or self.stopping is not None
            if ends or best or self.step % cfg.save_interval == 0:
                self.save(best, ends)
            bar.update()
            if self.stopping and not last:
                bar.close()
                raise InterruptedRunError(
                    f"{self.stopping} at step {self.step}: saved {self.path}; go on with --resume"
                )
        bar.close()

    def _watch_loss(self, loss, norm):
        """Notes a loss that stands out, with its batch."""
        found, mean, sd = self.watch.stands_out(loss)
        if found and self.machine.chief:
            self._note(self.step, {"loss": loss, "mean": mean, "sd": sd, "grad_norm": norm})

    def _note(self, step, row):
        windows = self.train_data.windows(step - 1, self.sequences_per_step)
        self.jumps.write({"step": step, **row, "windows": windows})

    def _stopped(self, error):
        """What is left of a run whose loss or gradient was not finite. Raises StoppedError."""
        step = self.step + 1
        if self.machine.chief:
            self._note(step, {"stopped": str(error)})
            with contextlib.suppress(OSError):
                self.checkpoints.wait()
        raise StoppedError(f"{error}; checkpoints: {self._last_good()}; --replay={step} shows its batch") from None

    def replay(self):
        """Computes step cfg.replay again from the nearest state before it. Returns a dict.

        `loss` and `grad_norm` as in the log; `windows`: [(window, mean loss of its tokens, its ids (T,))], the worst
        first; `shares`: [(parameter, its share of the squared gradient norm)], the largest first.
        """
        if self.machine.world > 1:
            raise UserError("a step is replayed by one process: leave torchrun out")
        for _ in tqdm(range(self.step, self.cfg.replay - 1), desc="replay", unit="step", disable=None):
            self.update(self.model)
        with torch.no_grad():
            losses, ids = [], []
            for x, y in self.batches():
                with self.machine.autocast():
                    logits = self.model(x)[0]
                each = torch.nn.functional.cross_entropy(
                    logits.float().transpose(1, 2), y, ignore_index=-1, reduction="none"
                )
                losses += (each.sum(1) / (y >= 0).sum(1)).tolist()
                ids += x.tolist()
        loss, norm = self.gradients(self.model)
        squares = {name: p.grad.float().square().sum().item() for name, p in self.model.named_parameters()}
        whole = sum(squares.values())
        windows = self.train_data.windows(self.step, self.sequences_per_step)
        worst = lambda row: -row[1] if math.isfinite(row[1]) else -math.inf
        return {
            "step": self.cfg.replay,
            "loss": loss,
            "grad_norm": norm,
            "windows": sorted(zip(windows, losses, ids, strict=True), key=worst),
            "shares": sorted(((name, square / whole) for name, square in squares.items()), key=worst),
        }


SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


def saved_run(checkpoints, replay=0):
    """The checkpoint to go on from: the newest sound one, or for `replay` the nearest before that step. A dict.

    Where there is none before it, one of step 0, whose weights are those that the seed makes. Raises UserError.
    """
    try:
        saved, path = checkpoints.newest(before=replay or None)
    except UserError:
        if not replay or not checkpoints.all():
            raise
        saved, path = checkpoints.newest()
        saved["step"] = 0
    number = (int, float)
    kinds = {"optimizer": dict, "step": int, "config": dict, "data": dict, "given": dict}
    kinds |= {"val_loss": (*number, type(None)), "best": (*number, type(None)), "loss_watch": list}
    if (
        not all(isinstance(saved.get(key), kind) for key, kind in kinds.items())
        or [isinstance(value, number) for value in saved["loss_watch"]] != [True] * 3
    ):
        raise UserError(f"{path} is not a run of this train.py: start from it with --init_from={path}")
    if saved["step"] == 0:
        saved |= {"val_loss": None, "best": None, "loss_watch": LossWatch().state}
    return {**saved, "path": str(path)}


def settings_of(saved, given):
    """{key: value} of a run that goes on: the checkpoint's, but for what was given and may change. Raises UserError."""
    fields, values, path = config.fields_of(SCHEMAS), {}, saved["path"]
    for key, stored in (saved["model_args"] | saved["config"]).items():
        if key not in fields:
            raise UserError(f"{path} was trained with {key}={stored}, which this version does not know")
        value = config.typed(key, stored, fields[key].type, path)
        if key not in RESUMABLE and given.get(key, value) != value:
            raise UserError(f"{path} was trained with {key}={value}, not {given[key]}; arms are not mixed")
        if key not in OF_COMMAND:
            values[key] = value
    return values


def open_run(given, out_dir, machine):
    """The Run of a command: new, or going on from what OUT_DIR holds. Raises UserError."""
    there, replay = checkpoints.Checkpoints(out_dir), given.get("replay", 0)
    if attempt():  # torchrun gives the same command again
        going_on = machine.from_chief(there.any)
        given = {**given, "resume": going_on, "overwrite": not going_on}
    saved, tensors = None, {"model": {}, "optimizer": {}}

    def read():  # the tensors stay on rank 0, which hands them out shard by shard
        saved = saved_run(there, replay)
        tensors.update(model=saved.pop("model"), optimizer=saved.pop("optimizer"))
        return saved

    if given.get("resume") or (replay and machine.from_chief(there.any)):
        saved = machine.from_chief(read)
    before = settings_of(saved, given) if saved else {}
    model_config, cfg = config.build(SCHEMAS, {**before, **given, "out_dir": out_dir})
    if machine.chief:
        for key, value in before.items():
            if given.get(key, value) != value:
                print(f"changed on resume: {key} {value} -> {given[key]}")
    if saved:
        saved, given = saved | tensors, saved["given"] | given
    return Run(model_config, cfg, given, machine, saved)


def compiles(cfg, machine):
    """True if a run's sub-layers and loss are compiled: asked for, and possible here."""
    return cfg.compile and (machine.device.type == "cuda" or cpp_compiler())


def ready(run_):
    """What the steps of a run call: its model, compiled if that was asked for and can be, wrapped for its ranks."""
    if compiles(run_.cfg, run_.machine):
        run_.model.compile()
    return run_.machine.wrap(run_.model)


def carry_out(run_, name=""):
    """Trains an opened run, whose folder is open too, to its end; `name`: what the progress bar calls it.

    Raises InterruptedRunError after a signal, StoppedError if the loss is not finite.
    """
    run_.train(ready(run_), name)


def be_deterministic(asked):
    """Only algorithms that give the same bits again; for others torch raises if that was asked for, else warns."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not asked)
    torch.utils.deterministic.fill_uninitialized_memory = False


def print_replay(run_):
    """Replays a step and shows it beside what the log says of it."""
    found = run_.replay()
    logged = next((row for row in rows_of(run_.out_dir / "log.jsonl") if row["step"] == found["step"]), None)
    words = f" (logged: {logged['loss']:.6f}, {logged['grad_norm']:.6g})" if logged else " (not logged)"
    print(f"step {found['step']}: loss {found['loss']:.6f}, gradient norm {found['grad_norm']:.6g}{words}")
    print("\nlargest gradients, of the squared norm")
    for name, share in found["shares"][:5]:
        print(f"{share:7.1%}  {name}")
    text_of = getattr(tokenizer_of(run_.train_data.meta), "text", None)
    print(f"\nloss    window  {'text' if text_of else 'ids'}, the worst 10 of {len(found['windows'])}")
    for window, loss, ids in found["windows"][:10]:
        print(f"{loss:6.3f}  {window:6d}  {repr(text_of(ids))[:100] if text_of else ids[:20]}")


def main():
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__ + config.describe(SCHEMAS[::-1], OF_MODEL | CHOICES))
        return
    given, files = config.given(SCHEMAS, sys.argv[1:], ROOT)
    out_dir = given.get("out_dir") or str(Path("out") / ("-".join(files) or "gpt2"))
    machine = Machine.find(given.get("device", "auto"), given.get("parallel", "ddp"))
    if given.get("deterministic") or machine.device.type == "cpu":  # there it costs nothing
        be_deterministic(given.get("deterministic", False))
    with machine.joined():
        run_ = open_run(given, out_dir, machine)
        if run_.cfg.replay:
            print_replay(run_)
            return
        machine.from_chief(run_.open_folder)
        cfg, machine = run_.cfg, run_.machine
        if machine.chief:
            mode = "compiled" if compiles(cfg, machine) else "eager"
            print("given:", ", ".join(f"{key}={value}" for key, value in given.items()) or "nothing, all defaults")
            ranks = f"{machine.world} ranks ({machine.parallel})" if machine.world > 1 else "1 rank"
            print(
                f"{run_.model.num_params() / 1e6:.2f}M parameters, "
                f"{run_.model.flops_per_token(run_.model_config.block_size) / 1e6:.1f} MFLOPs a token, "
                f"{run_.tokens_per_step:,} tokens a step, "
                f"{machine.device}, {str(machine.dtype).removeprefix('torch.')}, "
                f"{mode}, {ranks}, from step {run_.step} to {cfg.max_iters}"
            )
        carry_out(run_)
    if machine.chief:
        print(f"checkpoint: {run_.path}\nnext: python detect.py {run_.path}")


if __name__ == "__main__":
    cli(main)
