"""Reads a study file and plans its runs.

A run is identified by hashes of everything that its row depends on: its keys, samples of its data, what is measured,
and the source code.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_origin, get_type_hints

import torch

import train
from data.loader import Tokens
from detect import LAB
from model import GPT, GPTConfig
from spikesink import api, files
from spikesink.edit import interventions
from spikesink.errors import UserError, nearest
from spikesink.hooks import on_streams
from spikesink.measure import metrics
from spikesink.models import checkpoint
from spikesink.options import Options
from spikesink.text.sequences import SHORTEST
from studies import hypotheses
from studies.runs.measures import EFFECTS, MEASURES
from trainer import config
from trainer.machine import DTYPES

ROOT = Path(__file__).resolve().parents[1]
# The source that the numbers of a row depend on: scripts, and whole folders, so that a new file there counts too. The
# monitor counts, because its hooks run in the passes that train. Not hashed: code that only shows findings
# (spikesink/show), code that works on finished rows (the rest of studies/), and code that prepares data (a run's own
# hash has samples of the data). A test follows the imports of a run and checks that all of them are hashed.
SCRIPTS = ("model.py", "train.py", "detect.py", "ablate.py", "study.py")
HASHED = ("data/*.py", "trainer/**/*.py", "spikesink/**/*.py", "studies/runs/**/*.py")
NOT_HASHED = "spikesink/show"
INTERVALS = ("eval_interval", "save_interval", "keep_every")
SET_HERE = (*INTERVALS, "seed", "device", "out_dir", "resume", "overwrite", "replay")


@dataclass(frozen=True)
class Study:
    """The content of a study file."""

    question: str
    arms: dict[str, Any]  # name -> names of configs, or {"configs": names, key: value ...}; the first is the baseline
    seeds: list[int]
    scale: str = "scale/nano"  # configs that all arms start from
    common: dict[str, Any] = field(default_factory=dict)  # keys that all arms have
    hypotheses: list[str] = field(default_factory=list)  # those of H1 to H7 that the study tests
    points: int = 10  # checkpoints of each run that are measured, evenly spaced, besides step 0
    n_seq: int = 100  # sequences for detect.py and ablate.py
    seq_len: int = 64  # tokens of each of these sequences
    ablations: list[str] = field(default_factory=lambda: ["spike_zero", "sink_mask"])
    probes: bool = False  # run BLiMP and linear probes under the ablations, if their data are prepared
    int8: bool = False  # measure the cost of int8 at every point
    clip: float = 10.0  # an arm's stream_clip="medians" is this many medians |h| of the checkpoint that it starts from
    penalty_weight: float = 1e-3  # an arm's penalty="kurtosis" means losses={"kurtosis": penalty_weight}
    contrasts: list[tuple[str, str]] = field(default_factory=list)  # planned (arm, measure): only these are tested
    # arm -> (perplexity, Sink_1 in %, largest |h|) of Sun et al. 2026
    published: dict[str, list[float | int | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known: dict[str, Mapping[str, Any]] = {
            "hypotheses": hypotheses.HYPOTHESES,
            "ablations": interventions.INTERVENTIONS | interventions.REMOVALS,
            "published": self.arms,
        }
        for key, table in known.items():
            for name in getattr(self, key):
                if name not in table:
                    raise ValueError(f"{key}: there is no {name!r}{nearest(name, table)}")
        others = list(self.arms)[1:]
        for arm, measure in self.contrasts:
            if arm not in others or (measure not in MEASURES and measure.partition(": ")[2] not in EFFECTS):
                near = nearest(arm, others) if arm not in others else nearest(measure, MEASURES)
                raise ValueError(
                    f"contrasts: {(arm, measure)} must be an arm other than the baseline and a measure{near}"
                )
        for key, least in (("points", 1), ("n_seq", 2), ("seq_len", SHORTEST)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {least}")
        if self.clip <= 0:
            raise ValueError(f"clip={self.clip} must be above 0")
        odd_name = next((name for name in self.arms if not re.fullmatch(r"[\w.+-]+", name)), None)
        if odd_name is not None:
            raise ValueError(f"the arm {odd_name!r} must be usable as a folder name: letters, digits and _ . + - only")
        if not self.arms or not self.seeds or any(type(seed) is not int or seed < 0 for seed in self.seeds):
            raise ValueError("a study needs arms, and seeds that are whole numbers")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} names one twice")


@dataclass(frozen=True)
class Job:
    """One run of a study: an arm with a seed."""

    arm: str
    seed: int
    folder: Path
    keys: dict[str, Any]  # keys for train.py
    model: GPTConfig
    cfg: train.TrainConfig
    samples: list[str]  # hashes of samples of its data, and of the checkpoint that it starts from if there is one
    config_hash: str  # hash of the config, the data and what is measured
    code_hash: str

    @property
    def id(self) -> str:
        """The hash that identifies a finished run."""
        return files.content_hash([self.config_hash, self.code_hash])[:16]

    @property
    def name(self) -> str:
        """The run's name in messages."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def tokens(self) -> int:
        """Tokens of the whole training run."""
        return self.cfg.max_iters * self.cfg.batch_size * self.cfg.gradient_accumulation_steps * self.model.block_size


# Keys that were added later. At its default such a key is not hashed, so that older runs keep their hash.
NEWER = ("losses", "embedding_init", "n_expert", "n_active", "value", "head_out")
# key of a study file -> its type
KINDS = {name: get_origin(kind) or kind for name, kind in get_type_hints(Study).items()}


def read_study(name: str, changes: dict[str, Any]) -> Study:
    """Reads a study file, and applies the `changes` of the command line. Raises UserError."""
    path = ROOT / "configs" / "studies" / f"{name}.py"
    path = path if path.is_file() else config.find_config(name, ROOT)
    values = config.read_config(path)
    for key in ("question", "arms", "seeds"):
        if key not in values:
            raise UserError(f"{path} is no study: it has no {key}")
    for key, value in values.items():
        if key not in KINDS:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, KINDS)}; put keys of all runs into common")
        values[key] = config.typed(key, value, KINDS[key], path)
    arms = values["arms"]
    unknown = next((arm for arm in changes.get("arms", ()) if arm not in arms), None)
    if unknown is not None:
        raise UserError(f"{path} has no arm {unknown!r}{nearest(unknown, arms)}")
    if "arms" in changes:
        arms = {name: arm for name, arm in arms.items() if name in changes["arms"]}
        published = {name: numbers for name, numbers in values.get("published", {}).items() if name in arms}
        contrasts = [contrast for contrast in values.get("contrasts", []) if contrast[0] in arms]
        values, changes = {**values, "published": published, "contrasts": contrasts}, {**changes, "arms": arms}
    return config.build((Study,), values | changes)[0]


def keys_of(entry: Any, origin: str) -> dict[str, Any]:
    """{key: value} of an arm or of the common keys. `entry` holds names of configs, or is a dict of them and of keys.
    Keys that the study sets itself (SET_HERE) are dropped from the configs. Raises UserError if `entry` has one."""
    entry = {"configs": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict):
        raise UserError(f"{origin} must be names of configs, or a dict of keys; it is {entry!r}")
    keys = {key: value for key, value in entry.items() if key != "configs"}
    if refused := next((key for key in keys if key in SET_HERE), None):
        raise UserError(f"{origin}: {refused} is set by the study: see seeds, points, --device")
    argv = [*entry.get("configs", "").split(), *(f"--{key}={value}" for key, value in keys.items())]
    values = config.parse_argv(train.SCHEMAS, argv, ROOT)[0]
    return {key: value for key, value in values.items() if key not in SET_HERE}


def arm_keys(study: Study, arm: str, common: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """({key: value}, [hash of the checkpoint that it starts from, if any]) of an arm. Raises UserError."""
    entry = study.arms[arm]
    medians = isinstance(entry, dict) and entry.get("stream_clip") == "medians"
    if isinstance(entry, dict):
        entry = train.renamed({"penalty_weight": study.penalty_weight} | entry)
        entry |= {"stream_clip": 0.0} if medians else {}
    values = {**common, **keys_of(entry, f"arm {arm}")}
    start, hashes, sample = start_of(values.get("init_from", "scratch"))
    values = {**start, **values}
    if sample and values["dataset"] == start["dataset"] and data_of(values["dataset"])[1][0] != sample:
        raise UserError(f"{values['init_from']} was trained on other data than what {values['dataset']} holds now")
    if medians and not hashes:
        raise UserError(f'arm {arm}: stream_clip="medians" needs a checkpoint to start from: --init_from')
    if medians:
        values["stream_clip"] = clip_limit(study.clip, values["init_from"], values["dataset"], values["bos"])
    return values, hashes


@functools.cache
def start_of(name: str) -> tuple[dict[str, Any], list[str], str | None]:
    """({key: value}, [its hash], its data_sample) of a checkpoint, for the runs that start from it. They train as the
    run that made it did, at the learning rate at which it ended. "scratch" has no keys. Raises UserError."""
    if name == "scratch":
        return {}, [], None
    try:
        content = checkpoint.load(name)
    except UserError as error:
        raise UserError(f"{error}; train.py --init_from={name} makes one from a Hugging Face GPT-2 or Llama") from None
    if "dataset" not in content.config:
        raise UserError(f"{name} does not say what it was trained on, so it cannot be trained further on the same")
    fields, known = config.fields_of(train.SCHEMAS), {}
    for key, value in train.renamed(content.model_args | content.config).items():
        with contextlib.suppress(KeyError, UserError):  # a key of another program
            known[key] = fields[key].read(value, name)
    if known.get("dtype") not in DTYPES:  # nanoGPT's float16
        known["dtype"] = "auto"
    dropped = (*train.COMMAND_KEYS, *SET_HERE, "min_lr", "lr_decay_iters", "warmup_iters", "max_iters")
    rate = {"learning_rate": known.get("min_lr", train.TrainConfig.min_lr), "min_lr": 0.0, "lr_schedule": "constant"}
    path = Path(name) / "ckpt.pt" if Path(name).is_dir() else Path(name)
    keys = {key: value for key, value in known.items() if key not in dropped} | rate
    return keys, [files.file_hash(path)[:16]], content.data_sample


@functools.cache
def clip_limit(clip: float, name: str, dataset: str, bos: bool) -> float:
    """`clip` times a checkpoint's largest median |h| over all taps of the stream, on 16 validation windows."""
    subject = api.load(name, Options(), lab=LAB).subjects[0]
    data = Tokens(dataset, "val", cast(GPT, subject.model).config.block_size, bos)
    medians: list[float] = []
    record = lambda x: medians.append(metrics.median_magnitude(x.float()).mean().item())
    with on_streams(subject.streams, [record] * len(subject.streams)):
        subject.losses(data.read([i * (data.n_windows - 1) // 15 for i in range(16)])[0])
    return float(f"{clip * max(medians):.4g}")


@functools.cache
def data_of(dataset: str) -> tuple[dict[str, Any], list[str]]:
    """(meta, hashes of samples of both splits) of a dataset. Raises UserError."""
    splits = [Tokens(dataset, split, 1) for split in ("train", "val")]
    return splits[0].meta, [split.sample for split in splits]


@functools.cache
def check_sequences(n_seq: int, seq_len: int, dataset: str, bos: bool) -> None:
    """Raises UserError if a dataset has too few sequences to measure on; the nulls need as many more."""
    needed, available = 2 * n_seq - 1, Tokens(dataset, "val", seq_len, bos).n_windows
    if available < needed:
        raise UserError(
            f"{dataset} has {available} validation sequences of {seq_len} tokens, fewer than the {needed} that "
            f"n_seq={n_seq} needs: lower --n_seq or --seq_len"
        )


def hashed_files(root: Path = ROOT) -> list[Path]:
    """The source files that the numbers of a row depend on, in a clone of this project."""
    paths = sorted(path for pattern in (*SCRIPTS, *HASHED) for path in root.glob(pattern))
    return [path for path in paths if not path.is_relative_to(root / NOT_HASHED)]


def code_version(root: Path = ROOT) -> str:
    """A hash of these files. It ignores comments, docstrings and layout, so that rewording them repeats no runs."""
    texts = [f"{path.relative_to(root).as_posix()}\n{statements(path.read_text())}" for path in hashed_files(root)]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:12]


def statements(source: str) -> str:
    """Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.unparse(tree)


def plan(study: Study, folder: Path, changes: dict[str, Any], code_hash: str) -> list[Job]:
    """The Jobs of a study, seed by seed, so that the first runs to finish can be compared. Raises UserError.
    `changes`: keys of the command line. They override the scale and the common keys; the arm's keys override them."""
    common = {**keys_of(study.scale, "scale"), **keys_of(study.common, "common"), **keys_of(changes, "command line")}
    arm_settings = {arm: arm_keys(study, arm, common) for arm in study.arms}
    jobs: list[Job] = []
    arms: dict[str, str] = {}
    for seed in study.seeds:
        for arm, (own_keys, start) in arm_settings.items():
            interval = max(1, own_keys.get("max_iters", train.TrainConfig.max_iters) // study.points)
            keys = {**own_keys, "seed": seed, **dict.fromkeys(INTERVALS, interval)}
            try:
                model, cfg = config.build(train.SCHEMAS, keys)
            except UserError as error:
                raise UserError(f"arm {arm}: {error}") from None
            meta, samples = data_of(cfg.dataset)
            model = train.fit_vocabulary(model, cfg, keys, meta["vocab_size"])
            if model.block_size < study.seq_len:
                raise UserError(f"arm {arm}: seq_len={study.seq_len} is more than block_size={model.block_size}")
            check_sequences(study.n_seq, study.seq_len, cfg.dataset, cfg.bos)
            samples = [*samples, *start]
            run_settings = hashed_settings(settings(model, cfg), study.penalty_weight)
            parts = [run_settings, seed, samples, study.n_seq, study.seq_len, study.ablations, study.probes]
            config_hash = files.content_hash([*parts, "int8"] if study.int8 else parts)
            if arms.setdefault(config_hash, arm) != arm:
                others = ",".join(name for name in study.arms if name != arm)
                raise UserError(
                    f"arms {arms[config_hash]} and {arm} are the same here: leave one out, for example --arms={others}"
                )
            jobs.append(Job(arm, seed, folder / f"{arm}-{seed}", keys, model, cfg, samples, config_hash, code_hash))
    return jobs


def settings(model: GPTConfig, cfg: train.TrainConfig) -> dict[str, Any]:
    """{key: value} of everything that defines a run, but for its seed."""
    everything = config.plain({**dataclasses.asdict(model), **dataclasses.asdict(cfg)})
    return {key: value for key, value in everything.items() if key not in (*train.COMMAND_KEYS, "seed")}


def hashed_settings(run_settings: dict[str, Any], penalty_weight: float) -> dict[str, Any]:
    """The settings as they are hashed. Newer keys are in only where they are not at their default, and renamed keys
    have their old names: `losses` was `penalty` and `penalty_weight` (without a penalty, the study's)."""
    defaults, hashed = settings(GPTConfig(), train.TrainConfig()), {}
    for key, value in run_settings.items():
        if key == "losses" and len(value) <= 1:
            [(hashed["penalty"], hashed["penalty_weight"])] = value.items() or [("none", penalty_weight)]
        elif key not in NEWER or value != defaults[key]:
            hashed[key] = "constant_linear" if (key, value) == ("lr_schedule", "wsd") else value
    return hashed


def params_and_flops(model: GPTConfig) -> tuple[int, int]:
    """(parameters, training FLOPs per token) of a GPTConfig."""
    with torch.device("meta"):
        net = GPT(model)
    return net.num_params(), net.flops_per_token(model.block_size)
