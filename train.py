"""Train a GPT: python train.py CONFIG [CONFIG ...] [--key=value ...]

  python train.py config/postnorm.py                            the 125M post-norm arm, on OpenWebText
  python train.py postnorm scale/nano --dataset=stdlib          the same arm, small enough for a CPU
  torchrun --nproc_per_node=8 train.py config/postnorm.py       on eight GPUs

Writes OUT_DIR/ckpt.pt, OUT_DIR/log.jsonl and OUT_DIR/config.json. Stop it and add --resume to go on.
"""

import contextlib
import dataclasses
import inspect
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

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.loader import Tokens
from model import GPT, GPTConfig
from spikesink import __version__, checkpoint, config, convert, hf, metrics
from spikesink.errors import InterruptedRunError, StoppedError, UserError, run

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class TrainConfig:
    """The run. The defaults are nanoGPT's for GPT-2 small on OpenWebText, about 0.5M tokens a step."""

    out_dir: str = ""  # default: out/ and the names of the config files
    dataset: str = "openwebtext"  # a folder of data/, or a path
    bos: bool = False  # every training window starts with the dataset's BOS token
    max_iters: int = 600000  # optimiser steps
    batch_size: int = 12  # sequences in a micro-batch
    gradient_accumulation_steps: int = 40  # micro-batches in a step, over all ranks
    init_from: str = "scratch"  # or a checkpoint of ours, or a Hugging Face folder or hub name: GPT-2, Llama
    optimizer: str = "adamw"  # adamw, muon (matrices of the blocks; AdamW for the rest), sgd
    learning_rate: float = 6e-4
    weight_decay: float = 0.1  # on matrices and embeddings
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95  # of sgd and muon
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    lr_schedule: str = "cosine"  # cosine, constant_linear (constant, then linear over the last fifth) or constant
    warmup_iters: int = 2000
    lr_decay_iters: int = 0  # step at which min_lr is reached; 0: max_iters
    min_lr: float = 6e-5
    loss_first: int = 0  # first position that the training loss counts
    loss_last: int = 0  # the position after the last one that it counts; 0: all
    penalty: str = "none"  # on the residual stream, against spikes: none, kurtosis, magnitude
    penalty_weight: float = 1e-3
    eval_interval: int = 2000  # steps between validation losses
    eval_iters: int = 200  # batches in a validation loss; always the same ones
    log_interval: int = 1  # steps between lines of log.jsonl
    save_interval: int = 2000  # steps between checkpoints
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    dtype: str = "auto"  # of autocast: bfloat16, float32; auto: bfloat16 where the hardware has it
    compile: bool = True  # torch.compile; needs a C++ compiler on a CPU
    seed: int = 1337  # of the weights, the batches and dropout
    resume: bool = False  # go on from OUT_DIR/ckpt.pt
    overwrite: bool = False  # start again in an out_dir that holds a run

    def __post_init__(self):
        choices = {"lr_schedule": LR_SCHEDULES, "optimizer": OPTIMIZERS, "penalty": PENALTIES, "dtype": DTYPES}
        for key, table in choices.items():
            if getattr(self, key) not in table:
                raise ValueError(f"{key}={getattr(self, key)!r} is not one of: {', '.join(table)}")
        for key in (
            *("weight_decay", "grad_clip", "min_lr", "warmup_iters", "lr_decay_iters", "seed"),
            *("loss_first", "loss_last", "penalty_weight"),
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
            "max_iters batch_size gradient_accumulation_steps eval_interval eval_iters log_interval save_interval"
        )
        for key in positive.split():
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")


# what may change when a run is resumed; everything else is what the run is
RESUMABLE = (
    *("out_dir", "resume", "overwrite", "device", "dtype", "compile", "max_iters"),
    *("learning_rate", "min_lr", "lr_schedule", "warmup_iters", "lr_decay_iters", "grad_clip"),
    *("eval_interval", "eval_iters", "log_interval", "save_interval"),
)

DTYPES = ("auto", "bfloat16", "float32")

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


def learning_rate(step, cfg):
    """Learning rate of update number `step` (from 0): linear warmup, then the schedule down to min_lr."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    end = cfg.lr_decay_iters or cfg.max_iters
    done = min(1.0, (step - cfg.warmup_iters) / max(1, end - cfg.warmup_iters))
    return cfg.min_lr + LR_SCHEDULES[cfg.lr_schedule](done) * (cfg.learning_rate - cfg.min_lr)


@dataclass(frozen=True)
class Machine:
    """Where this process runs: its device, the autocast dtype and its place among the ranks."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    @classmethod
    def find(cls, cfg):
        """From the configuration and torchrun's environment. Raises UserError for a device that is not there."""
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        name = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            device = torch.device(name)
            torch.empty(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"device={cfg.device} is not at hand: {str(error).splitlines()[0]}") from None
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        dtype = cfg.dtype if cfg.dtype != "auto" else ("bfloat16" if has_bfloat16(device) else "float32")
        return cls(device, getattr(torch, dtype), rank, world)

    def autocast(self):
        """Mixed precision for the forward pass; weights, gradients and the residual stream stay float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def mean(self, value):
        """The mean of a float tensor over the ranks."""
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value


def has_bfloat16(device):
    """True if the hardware multiplies bfloat16 matrices natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


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
    for i in range(machine.rank, cfg.eval_iters, machine.world):
        x, y = data.batch(i, cfg.batch_size)
        with machine.autocast():
            total += model(x.to(machine.device), y.to(machine.device))[1]
    model.train()
    return machine.mean(total).item() * machine.world / cfg.eval_iters


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


class Run:
    """One training run: model, optimiser, data and step, saved to and restored from OUT_DIR/ckpt.pt."""

    def __init__(self, model_config, cfg, given, machine):
        self.cfg, self.given, self.machine = cfg, given, machine
        self.out_dir = Path(cfg.out_dir)
        self.path = self.out_dir / "ckpt.pt"
        self.step = 0
        self.val_loss = None
        self.signal = None  # the name of a signal that asked the run to stop
        saved = self._claim_out_dir()
        checkpoint.check_writable(self.path)
        weights = None
        if cfg.init_from != "scratch":
            model_config, weights = foreign_model(cfg.init_from, given)
        self.train_data = Tokens(cfg.dataset, "train", model_config.block_size, cfg.bos, cfg.seed)
        self.val_data = Tokens(cfg.dataset, "val", model_config.block_size, cfg.bos)
        self.model_config = self._fit_vocabulary(model_config)
        if cfg.loss_first >= model_config.block_size:
            raise UserError(
                f"loss_first={cfg.loss_first} leaves nothing of block_size={model_config.block_size} to learn"
            )
        if cfg.gradient_accumulation_steps % machine.world:
            raise UserError(
                f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} is not a multiple of the "
                f"{machine.world} ranks"
            )
        self.n_micro = cfg.gradient_accumulation_steps // machine.world
        torch.manual_seed(cfg.seed)
        self.model = GPT(self.model_config).to(machine.device)
        if weights is not None:
            load_weights(self.model, weights, cfg.init_from)
        self.optimizers = OPTIMIZERS[cfg.optimizer](self.model, cfg)
        self.penalties = []  # of the current forward pass, one per sub-layer
        if cfg.penalty != "none":
            self._watch_streams()
        if saved:
            self._restore(saved)

    def _claim_out_dir(self):
        """The checkpoint to go on from, or None. Raises UserError rather than overwrite a run unasked."""
        if self.cfg.resume:
            return checkpoint.load(self.path)
        if (self.path.exists() or (self.out_dir / "log.jsonl").exists()) and not self.cfg.overwrite:
            raise UserError(
                f"{self.out_dir} already holds a run: --resume goes on with it, --overwrite starts again, "
                "--out_dir=DIR goes elsewhere"
            )
        return None

    def _watch_streams(self):
        """Collects the penalty of the stream after every sub-layer, in passes that will be differentiated."""
        penalty = PENALTIES[self.cfg.penalty]

        def hook(module, args, x):
            if torch.is_grad_enabled():
                self.penalties.append(penalty(x))

        for block in self.model.transformer.h:
            for sub_layer in (block.attn, block.mlp):
                sub_layer.stream.register_forward_hook(hook)

    def _fit_vocabulary(self, model_config):
        needed = self.train_data.meta["vocab_size"]
        if "vocab_size" not in self.given and self.cfg.init_from == "scratch":
            return dataclasses.replace(model_config, vocab_size=-(-needed // 64) * 64)
        if model_config.vocab_size < needed:
            raise UserError(f"vocab_size={model_config.vocab_size} is less than the {needed} of {self.cfg.dataset}")
        return model_config

    def _restore(self, saved):
        if "optimizer" not in saved or "step" not in saved:
            raise UserError(f"{self.path} is not a run of train.py: start from it with --init_from={self.path}")
        ours = dataclasses.asdict(self.model_config) | dataclasses.asdict(self.cfg)
        for key, value in (saved["model_args"] | saved["config"]).items():
            if ours.get(key) != value and key not in RESUMABLE:
                raise UserError(f"{self.path} was trained with {key}={value}, not {ours.get(key)}; arms are not mixed")
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizer"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.val_loss = saved["step"], saved["val_loss"]
        if saved.get("data") != self.train_data.meta:
            raise UserError(f"{self.path} was trained on other data than what --dataset={self.cfg.dataset} holds now")
        if self.step > self.cfg.max_iters:
            raise UserError(f"{self.path} is at step {self.step}, beyond max_iters={self.cfg.max_iters}")
        quiet = ("out_dir", "resume", "overwrite")
        for key, value in saved["config"].items():
            if ours.get(key) != value and key not in quiet and self.machine.rank == 0:
                print(f"changed on resume: {key} {value} -> {ours.get(key)}")

    def save(self):
        """Everything that is needed to go on, and to know what this model is."""
        checkpoint.save(
            self.path,
            {
                "model_args": dataclasses.asdict(self.model_config),
                "model": self.model.state_dict(),
                "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
                "config": dataclasses.asdict(self.cfg),
                "given": self.given,
                "data": self.train_data.meta,
                "step": self.step,
                "tokens": self.step * self.tokens_per_step,
                "val_loss": self.val_loss,
                **provenance(),
            },
        )

    @property
    def tokens_per_step(self):
        """Tokens in one optimiser step, over all micro-batches and ranks."""
        return self.cfg.batch_size * self.cfg.gradient_accumulation_steps * self.model_config.block_size

    def update(self, model):
        """One optimiser step. Returns loss, gradient norm and learning rate.

        Raises StoppedError, with the weights as they were, if the loss or a gradient is not finite.
        """
        cfg, machine = self.cfg, self.machine
        # Dropout noise, like the batch, is a pure function of (seed, step, rank): there is no RNG state to lose.
        torch.manual_seed(hash((cfg.seed, self.step, machine.rank)))
        total = torch.zeros((), device=machine.device)
        for micro in range(self.n_micro):
            x, y = self.train_data.batch(
                self.step, cfg.batch_size, micro, self.n_micro, rank=machine.rank, world=machine.world
            )
            last = micro == self.n_micro - 1
            with contextlib.nullcontext() if last or machine.world == 1 else model.no_sync():
                y[:, : cfg.loss_first] = -1
                y[:, cfg.loss_last or y.size(1) :] = -1
                with machine.autocast():
                    loss = model(x.to(machine.device), y.to(machine.device))[1]
                total += loss.detach() / self.n_micro
                if self.penalties:
                    loss = loss + cfg.penalty_weight * torch.stack(self.penalties).mean()
                    self.penalties.clear()
                (loss / self.n_micro).backward()
        loss = machine.mean(total).item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip or math.inf).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            good = f"the last good checkpoint is {self.path}" if self.path.exists() else "no checkpoint was written yet"
            raise StoppedError(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}: stopped before the update; {good}"
            )
        lr = learning_rate(self.step, cfg)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss, norm, lr

    def open_folder(self):
        """Makes OUT_DIR, without an old run where one is overwritten, and writes config.json. Raises UserError."""
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.out_dir}: {error.strerror}") from None
        if self.cfg.overwrite:
            self.path.unlink(missing_ok=True)
        everything = {**dataclasses.asdict(self.model_config), **dataclasses.asdict(self.cfg)}
        text = json.dumps({"given": self.given, "config": everything, **provenance()}, indent=1)
        checkpoint.write_atomic(self.out_dir / "config.json", lambda file: file.write(text.encode()))

    def train(self, model, name=""):
        """To max_iters; `model` is what is called: self.model, perhaps compiled or wrapped by DDP. `name`: what the
        progress bar calls it."""
        chief = self.machine.rank == 0
        log = open_log(self.out_dir / "log.jsonl", self.step) if chief else contextlib.nullcontext()
        with log as log_file, self._stopping_on_signals():
            self._train(model, log_file, name)

    @contextlib.contextmanager
    def _stopping_on_signals(self):
        """Within, SIGINT and SIGTERM end the run after the step that it is at."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number, frame):
        """Asks for a stop after the current step; the same signal again has its usual effect."""
        self.signal = signal.Signals(number).name
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def _train(self, model, log, name):
        cfg, chief = self.cfg, self.machine.rank == 0
        since, seen = time.perf_counter(), self.step
        hidden, label = None if chief else True, f"{name}: " if name else ""
        bar = tqdm(total=cfg.max_iters, initial=self.step, unit="step", desc=name or None, disable=hidden)
        while self.step < cfg.max_iters:
            loss, norm, lr = self.update(model)
            last = self.step == cfg.max_iters
            evaluated = last or self.step % cfg.eval_interval == 0
            if evaluated or self.step % cfg.log_interval == 0:
                now = time.perf_counter()
                speed = (self.step - seen) * self.tokens_per_step / (now - since)
                if evaluated:
                    self.val_loss = validation_loss(model, self.val_data, cfg, self.machine)
                row = {
                    "step": self.step,
                    "loss": loss,
                    "val_loss": self.val_loss if evaluated else None,
                    "tokens": self.step * self.tokens_per_step,
                    "lr": lr,
                    "grad_norm": norm,
                    "tokens_per_s": speed,
                }
                since, seen = time.perf_counter(), self.step
                if chief:
                    print(json.dumps(row), file=log, flush=True)
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    if evaluated:
                        words = f"loss {loss:.4f}, val_loss {self.val_loss:.4f}, {speed:,.0f} tokens/s"
                        bar.write(f"{label}step {self.step}: {words}", file=sys.stdout)
            stopped = self.signal is not None
            if chief and (last or stopped or self.step % cfg.save_interval == 0):
                self.save()
            bar.update()
            if stopped and not last:
                bar.close()
                raise InterruptedRunError(f"{self.signal} at step {self.step}: saved {self.path}; go on with --resume")
        bar.close()


def step_of(line):
    """The step of a line of log.jsonl; infinity for a broken one, which is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def open_log(path, step):
    """log.jsonl for appending, without the lines of steps after `step` that a resumed run writes again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and step_of(line) <= step]
    checkpoint.write_atomic(path, lambda file: file.write("".join(kept).encode()))
    return open(path, "a", encoding="utf-8")


def main():
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__ + config.describe((TrainConfig, GPTConfig)))
        return
    (model_config, cfg), given, files = config.load((GPTConfig, TrainConfig), sys.argv[1:], ROOT)
    if not cfg.out_dir:
        cfg = dataclasses.replace(cfg, out_dir=str(Path("out") / ("-".join(files) or "gpt2")))
    machine = Machine.find(cfg)
    if machine.world > 1:
        dist.init_process_group("nccl" if machine.device.type == "cuda" else "gloo")
    run_ = Run(model_config, cfg, given, machine)
    chief = machine.rank == 0
    compiled = cfg.compile and (machine.device.type == "cuda" or cpp_compiler())
    if chief:
        run_.open_folder()
        print("given:", ", ".join(f"{key}={value}" for key, value in given.items()) or "nothing, all defaults")
        print(
            f"{run_.model.num_params() / 1e6:.2f}M parameters, "
            f"{run_.model.flops_per_token(run_.model_config.block_size) / 1e6:.1f} MFLOPs a token, "
            f"{run_.tokens_per_step:,} tokens a step, "
            f"{machine.device}, {str(machine.dtype).removeprefix('torch.')}, "
            f"{'compiled' if compiled else 'eager'}, {machine.world} rank(s), from step {run_.step} to {cfg.max_iters}"
        )
    model = run_.model
    if compiled:
        model = torch.compile(model)
    if machine.world > 1:
        ddp = torch.nn.parallel.DistributedDataParallel
        sync = {"forward_sync_buffers", "broadcast_buffers"} & set(inspect.signature(ddp).parameters)
        model = ddp(model, **{max(sync): False})  # the new name of the option where torch has it; buffers are constants
    run_.train(model)
    if machine.world > 1:
        dist.destroy_process_group()
    if chief:
        print(f"checkpoint: {run_.path}\nnext: python detect.py {run_.path}")


if __name__ == "__main__":
    run(main)
