"""Can it be trained away, and what for? Fine-tunes a checkpoint against its spikes; loss, spike, sink, int8 after it.

  python -m studies.mitigate out/quickstart/ckpt.pt
  python -m studies.mitigate ckpt.pt --arms clip gate --steps 2000 --seeds 5

Every arm takes the same steps on the same batches as plain fine-tuning (`none`), once per seed, with the run's own data
and settings. Takes detect.py's flags too. Runs go to mitigate/ beside the checkpoint; the same command goes on where it
was stopped and does not train again what is trained. Writes mitigate.json and mitigate.html.
"""

import argparse
import collections
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm

from data.loader import Tokens
from detect import LAB
from model import GPT, GPTConfig
from spikesink import api, files, schema
from spikesink.commands import Outputs, parser_of
from spikesink.edit import quantise
from spikesink.errors import InterruptedRunError, UserError, cli
from spikesink.hooks import on_streams
from spikesink.measure import metrics
from spikesink.measure.findings import Findings
from spikesink.measure.sinks import PRIMARY_SINK_RULE
from spikesink.measure.spikes import PRIMARY_SPIKE_RULE
from spikesink.models import checkpoint
from spikesink.models.checkpoint import Checkpoint
from spikesink.models.hf import device_named
from spikesink.models.subject import Subject
from spikesink.options import Options, from_flags, whole
from studies import report
from train import Run, TrainConfig, saved_run
from trainer import checkpoints
from trainer.machine import DTYPES, Machine

SCHEMA = "spikesink-mitigation-1"


@dataclass(frozen=True)
class Asked:
    """Which checkpoint is fine-tuned how, and how it is looked at."""

    checkpoint: Path
    options: Options
    arms: tuple[str, ...] = ("clip", "penalty", "gate")  # beside `none`
    steps: int = 600
    seeds: int = 3
    learning_rate: float | None = None  # None: the run's min_lr
    clip: float = 10.0  # in largest medians of |h|
    penalty_weight: float = 0.01
    out_dir: Path | None = None  # None: mitigate/ beside the checkpoint
    overwrite: bool = False


# name -> what is added, and as which keys, given the clipping limit and what was asked for
ARMS: dict[str, tuple[str, Callable[[float, Asked], dict[str, Any]]]] = {
    "none": ("nothing: fine-tuning alone", lambda limit, asked: {}),
    "clip": (
        "a clamp on the stream after every sub-layer, for good",
        lambda limit, asked: {"stream_clip": limit},
    ),
    "penalty": (
        "the stream's kurtosis (He et al. 2405.19279) to the training loss",
        lambda limit, asked: {"penalty": "kurtosis", "penalty_weight": asked.penalty_weight},
    ),
    "gate": (
        "a gate per head on the attention output (Qiu et al. 2505.06708)",
        lambda limit, asked: {"gate": "head"},
    ),
}
NOTE = (
    "none: plain fine-tuning for as many steps on the same batches; what an arm does is its difference from that. "
    "Every run starts with a new optimiser. Losses: nats per token. "
    "Numbers of several seeds, which order the batches: mean [lowest, highest]. 95% intervals: paired bootstrap over "
    "sequences, of losses averaged over seeds. top1/median: of the layer where it is largest. with a spike: of "
    "sequences. clip: at K x the median |h| of the layer where that is largest; 10 medians are 6.7 sigma of a normal. "
)
QUIET = ("out_dir", "device", "resume", "overwrite")  # what does not make it another run


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def base_of(content: Checkpoint, asked: Asked) -> TrainConfig:
    """The TrainConfig of plain fine-tuning: the checkpoint's own, at a constant learning rate. Raises UserError."""
    path, stored = asked.checkpoint, content.config
    if "dataset" not in stored:
        raise UserError(f"{path} does not say what it was trained on, so it cannot be trained further on the same")
    kinds = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    fits = lambda value, kind: type(value) is kind or (kind is float and type(value) is int)
    kept = {key: stored[key] for key, kind in kinds.items() if key in stored and fits(stored[key], kind)}
    rate = asked.learning_rate or kept.get("min_lr", TrainConfig.min_lr)
    if not rate:
        raise UserError(f"{path} was trained with min_lr=0: say which --learning_rate")
    settings = {
        "init_from": str(path.resolve()),
        "dtype": kept["dtype"] if kept.get("dtype") in DTYPES else "auto",  # nanoGPT's float16
        "learning_rate": rate,
        "min_lr": rate,
        "lr_schedule": "constant",
        "lr_decay_iters": 0,
        "warmup_iters": asked.steps // 10,  # the optimiser's state is new
        "max_iters": asked.steps,
        "eval_interval": asked.steps,
        "save_interval": max(1, asked.steps // 5),
        "device": device_named(asked.options.device),
        "compile": False,
        "resume": False,
        "overwrite": False,
    }
    try:
        return TrainConfig(**{**kept, **settings})
    except ValueError as error:
        raise UserError(str(error)) from None


def largest_median(subject: Subject, cfg: TrainConfig) -> float:
    """The largest median |h| of any tap of the stream, on 16 validation windows: what clipping must leave alone."""
    data = Tokens(cfg.dataset, "val", cast(GPT, subject.model).config.block_size, cfg.bos)
    ids = data.read(np.linspace(0, data.n_windows - 1, 16).astype(int))[0]
    medians: list[float] = []
    record = lambda x: medians.append(metrics.median_magnitude(x.float()).mean().item())
    with on_streams(subject.streams, [record] * len(subject.streams)):
        subject.losses(ids)
    return max(medians)


def changes_of(name: str, limit: float, asked: Asked, content: Checkpoint) -> dict[str, Any]:
    """The keys that an arm sets. Raises UserError where the checkpoint has what the arm would add."""
    changes = ARMS[name][1](limit, asked)
    had = {**content.model_args, **content.config}
    defaults = dataclasses.asdict(GPTConfig()) | dataclasses.asdict(TrainConfig())
    key = next(iter(changes), None)
    if key and had.get(key, defaults[key]) != defaults[key]:
        raise UserError(f"{asked.checkpoint} has {key}={had[key]} already: leave {name} out of --arms")
    return changes


def fine_tune(name: str, cfg: TrainConfig, changes: dict[str, Any], digest: str, overwrite: bool) -> Path:
    """The checkpoint of one arm with one seed in cfg.out_dir: trained, gone on with, or found done. Raises UserError.

    `digest`: of the checkpoint that it starts from; it is kept beside the run.
    """
    path, origin = Path(cfg.out_dir) / "ckpt.pt", Path(cfg.out_dir) / "init_from.sha256"
    of_training = {key: value for key, value in changes.items() if key not in GPTConfig.__dataclass_fields__}
    of_model = {key: value for key, value in changes.items() if key not in of_training}
    cfg = dataclasses.replace(cfg, **of_training)
    there = checkpoints.Checkpoints(cfg.out_dir)
    saved = saved_run(there)[0] if there.any() and not overwrite else None
    wanted = {**dataclasses.asdict(cfg), **of_model}
    if saved:
        had = {**saved.model_args, **saved.config, "init_from": read(origin)}
        wanted["init_from"] = digest
        other = next((key for key in wanted if key not in QUIET and had.get(key) != wanted[key]), None)
        if other:
            raise UserError(
                f"{path} was trained with {other}={had.get(other)}, not {wanted[other]}: "
                "--overwrite trains again, --out_dir=DIR goes elsewhere"
            )
        if saved.step == cfg.max_iters:
            tqdm.write(f"{name}: trained already, {path}")
            return path
        del wanted["init_from"]  # it may have moved: that is no other checkpoint
    wanted |= {"resume": saved is not None, "overwrite": saved is None}
    tuned = Run.open(wanted, cfg.out_dir, Machine.find(cfg.device))
    files.save_text(origin, digest)
    try:
        tuned.fit(name)
    except InterruptedRunError as stop:
        raise InterruptedRunError(str(stop).replace("go on with --resume", "the same command goes on")) from None
    return path


def read(path: Path) -> str | None:
    """A text file; None where there is none."""
    return path.read_text() if path.is_file() else None


def measure_model(path: Path, options: Options) -> tuple[dict[str, Any], torch.Tensor, Findings]:
    """(What detect and int8 give of a checkpoint, its loss on each sequence (N,), detect's findings)."""
    look = api.open(path, options, lab=LAB, calibration=True)
    found, subject, batch_size = api.detect(look), look.subjects[0], options.batch_size
    losses = look.losses()
    measured = {
        "loss": losses.mean().item(),
        "ppl": losses.mean().exp().item(),
        "top1_over_median": found.largest_ratio,
        "kurtosis": found.largest_kurtosis,
        "spike_sequences": found.measures.rules[PRIMARY_SPIKE_RULE].sequences,
        "sink_sequences": found.measures.rules[PRIMARY_SINK_RULE].best_head,
        "sink_1": found.sinks.first,
        "verdicts": found.verdicts.words,
        "int8": schema.to_json(quantise.quantised_losses(subject, look.ids, look.other_ids, batch_size)),
    }
    return measured, losses, found


def over_seeds(runs: list[Any]) -> Any:
    """Mean, lowest and highest over the runs of every number, nested as in a run; how often each verdict."""
    if isinstance(runs[0], dict):
        return {key: over_seeds([of[key] for of in runs]) for key in runs[0] if key not in ("ci95", "seed", "path")}
    if isinstance(runs[0], str):
        return dict(collections.Counter(runs))
    return {"mean": sum(runs) / len(runs), "lowest": min(runs), "highest": max(runs)}


def mitigate(asked: Asked) -> dict[str, Any]:
    """The findings: the checkpoint, and every arm after fine-tuning."""
    path, content = asked.checkpoint, checkpoint.load(asked.checkpoint)
    cfg, folder = base_of(content, asked), asked.out_dir or api.folder_of(path) / "mitigate"
    limit = float(f"{asked.clip * largest_median(api.load(path, asked.options, lab=LAB).subjects[0], cfg):.4g}")
    arms = {name: changes_of(name, limit, asked, content) for name in ("none", *dict.fromkeys(asked.arms))}
    before, clean, found = measure_model(path, asked.options)
    digest = found.checkpoint.sha256 or ""  # of a file it is known
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in arms}
    each = [(name, seed) for seed in range(1, asked.seeds + 1) for name in arms]
    for name, seed in tqdm(each, desc="runs", disable=None, leave=False):
        where = folder / f"{name}-seed{seed}"
        of_run = dataclasses.replace(cfg, seed=seed, out_dir=str(where))
        tuned = fine_tune(f"{name}, seed {seed}", of_run, arms[name], digest, asked.overwrite)
        measured, of_sequences, _ = measure_model(tuned, asked.options)
        rows[name].append({"seed": seed, "path": str(tuned), **measured})
        losses[name].append(of_sequences)
    mean = {name: torch.stack(of).mean(0) for name, of in losses.items()}
    return {
        "schema": SCHEMA,
        "checkpoint": found.checkpoint,
        "model": found.model,
        "data": found.data,
        "training": {
            "steps": cfg.max_iters,
            "tokens_per_step": cfg.batch_size * cfg.gradient_accumulation_steps * found.model["block_size"],
            "seeds": asked.seeds,
            **{key: getattr(cfg, key) for key in ("learning_rate", "warmup_iters", "dataset", "optimizer", "dtype")},
            "clip": asked.clip,
        },
        "note": NOTE + quantise.NOTE,
        "before": over_seeds([before]),
        "arms": [
            {
                "name": name,
                "adds": ARMS[name][0],
                "changes": arms[name],
                **over_seeds(rows[name]),
                "against_before": metrics.paired_effect(clean, mean[name]),
                "against_none": metrics.paired_effect(mean["none"], mean[name]) if name != "none" else None,
                "runs": rows[name],
            }
            for name in arms
        ],
    }


def checkpoint_file(name: str | None) -> Path:
    """The ckpt.pt that was named, or that is in the folder that was. Raises UserError."""
    if not name:
        raise UserError("which checkpoint? Give a ckpt.pt of train.py or nanoGPT, or its folder")
    path = Path(name)
    if path.suffix == ".pt" or path.is_file():
        return path
    if not (path / "ckpt.pt").is_file():
        raise UserError(
            f"{path} is no checkpoint of train.py or nanoGPT; of a Hugging Face GPT-2 or Llama, train.py "
            f"--init_from={path} makes one"
        )
    return path / "ckpt.pt"


def main() -> None:
    parser, tried = parser_of(__doc__), Asked.arms
    parser.add_argument(
        "--arms", nargs="+", choices=tried, default=tried, metavar="ARM", help=f"of {', '.join(tried)} (default: all)"
    )
    parser.add_argument("--steps", type=whole, default=Asked.steps, metavar="N", help="optimiser steps (default: 600)")
    parser.add_argument("--seeds", type=whole, default=Asked.seeds, metavar="N", help="runs of each arm (default: 3)")
    parser.add_argument("--learning_rate", type=positive, metavar="X", help="default: the run's min_lr")
    parser.add_argument(
        "--clip",
        type=positive,
        default=Asked.clip,
        metavar="K",
        help="clamp at K x the largest median |h| (default: 10)",
    )
    parser.add_argument(
        "--penalty_weight", type=positive, default=Asked.penalty_weight, metavar="X", help="default: 0.01"
    )
    parser.add_argument("--out_dir", type=Path, metavar="DIR", help="of the runs (default: mitigate/ beside it)")
    parser.add_argument("--overwrite", action="store_true", help="train again what is trained already")
    args = parser.parse_args()
    path, options = checkpoint_file(args.checkpoint), from_flags(Options, args)
    flags = {
        f.name: getattr(args, f.name) for f in dataclasses.fields(Asked) if f.name not in ("checkpoint", "options")
    }
    json_path, html_path = from_flags(Outputs, args).paths(path, "mitigate.json", "mitigate.html")
    found = mitigate(Asked(path, options, **{**flags, "arms": tuple(args.arms)}))
    schema.save(json_path, found)
    report.mitigation_page(html_path, found)
    print(f"\n{report.mitigation_terminal(found)}\n\nfindings: {json_path}\npage:     {html_path}")


if __name__ == "__main__":
    cli(main)
