"""A study file -> the runs that it asks for: which keys, which data, which code.

A run is known again by hashes of all that makes it: its keys, samples of its data, what is measured, and the source
that its numbers depend on.
"""

import ast
import dataclasses
import functools
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

import train
from data.loader import Tokens
from model import GPT, GPTConfig
from spikesink import files
from spikesink.edit import interventions
from spikesink.errors import UserError, nearest
from spikesink.text.sequences import SHORTEST
from studies import hypotheses
from trainer import config

ROOT = Path(__file__).resolve().parents[1]
# folders whose code the numbers of a run depend on; what only shows them (spikesink/show) is not here
HASHED = ("data", "trainer", "spikesink/text", "spikesink/models", "spikesink/measure", "spikesink/edit")
SET_HERE = ("eval_interval", "save_interval", "keep_every", "seed", "device")
SET_HERE += ("out_dir", "resume", "overwrite", "replay")


@dataclass(frozen=True)
class Study:
    """What a study file says."""

    question: str
    arms: dict  # name -> names of configs, or {"configs": names, key: value ...}; the first is the baseline
    seeds: list
    scale: str = "scale/nano"  # configs that all arms start from
    common: dict = field(default_factory=dict)  # keys that all arms have
    hypotheses: list = field(default_factory=list)  # which of H1 to H7 it asks
    points: int = 10  # checkpoints at which every run is looked at, evenly spread, besides step 0
    n_seq: int = 100  # sequences of detect.py and ablate.py
    seq_len: int = 64  # and their length
    ablations: list = field(default_factory=lambda: ["spike_zero", "sink_mask"])
    probes: bool = False  # BLiMP and linear probes under the ablations, where they are prepared
    published: dict = field(default_factory=dict)  # arm -> (perplexity, Sink_1 in %, largest |h|) of Sun et al. 2026

    def __post_init__(self):
        known = {"hypotheses": hypotheses.HYPOTHESES, "ablations": interventions.INTERVENTIONS | interventions.REMOVALS}
        for key, table in {**known, "published": self.arms}.items():
            for name in getattr(self, key):
                if name not in table:
                    raise ValueError(f"{key}: there is no {name!r}{nearest(name, table)}")
        for key, least in (("points", 1), ("n_seq", 2), ("seq_len", SHORTEST)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {least}")
        odd = next((name for name in self.arms if not re.fullmatch(r"[\w.+-]+", name)), None)
        if odd is not None:
            raise ValueError(f"the arm {odd!r} is to name a folder: letters, digits and _ . + - only")
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
    given: dict  # keys for train.py
    model: GPTConfig
    cfg: train.TrainConfig
    what: str  # hash of config, data and what is measured
    code: str  # hash of the code

    @property
    def id(self):
        """By which a finished run is known again."""
        return files.content_hash([self.what, self.code])[:16]

    @property
    def name(self):
        """For people."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def tokens(self):
        """Of the whole training run."""
        return self.cfg.max_iters * self.cfg.batch_size * self.cfg.gradient_accumulation_steps * self.model.block_size


def read_study(name, changes):
    """The Study of a file, with what the command line changes of it. Raises UserError."""
    path = config.find_config(name, ROOT)
    kinds = {f.name: f for f in dataclasses.fields(Study)}
    values = config.read_config(path)
    for key in ("question", "arms", "seeds"):
        if key not in values:
            raise UserError(f"{path} is no study: it has no {key}")
    for key, value in values.items():
        if key not in kinds:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, kinds)}; keys of all runs go into common")
        config.typed(key, value, kinds[key].type, path)
    arms = values["arms"]
    unknown = next((arm for arm in changes.get("arms", ()) if arm not in arms), None)
    if unknown is not None:
        raise UserError(f"{path} has no arm {unknown!r}{nearest(unknown, arms)}")
    if "arms" in changes:
        kept = {name: arm for name, arm in arms.items() if name in changes["arms"]}
        shown = {name: numbers for name, numbers in values.get("published", {}).items() if name in kept}
        values, changes = {**values, "published": shown}, {**changes, "arms": kept}
    return config.build((Study,), values | changes)[0]


def keys_of(entry, origin):
    """{key: value} of an arm or of the common keys: names of configs, or a dict of them and of keys. Raises UserError.

    What the configs say of intervals is left out: a study sets those.
    """
    entry = {"configs": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict):
        raise UserError(f"{origin} is to be names of configs, or a dict of keys; it is {entry!r}")
    rest = {key: value for key, value in entry.items() if key != "configs"}
    own = next((key for key in rest if key in SET_HERE), None)
    if own:
        raise UserError(f"{origin}: {own} is set by the study: see seeds, points, --device")
    argv = [*entry.get("configs", "").split(), *(f"--{key}={value}" for key, value in rest.items())]
    values = config.given(train.SCHEMAS, argv, ROOT)[0]
    if values.get("init_from", "scratch") != "scratch":
        raise UserError(f"{origin}: a study trains from scratch, so init_from has no place in it")
    return {key: value for key, value in values.items() if key not in SET_HERE}


@functools.cache
def data_of(dataset):
    """(meta, the hashes of samples of both splits) of a dataset. Raises UserError."""
    splits = [Tokens(dataset, split, 1) for split in ("train", "val")]
    return splits[0].meta, [split.sample for split in splits]


@functools.cache
def check_sequences(n_seq, seq_len, dataset, bos):
    """Raises UserError if a dataset has too few sequences to measure, and as many of other text for the nulls."""
    wanted, there = 2 * n_seq - 1, Tokens(dataset, "val", seq_len, bos).n_windows
    if there < wanted:
        raise UserError(
            f"{dataset} has {there} validation sequences of {seq_len} tokens, fewer than the {wanted} that "
            f"n_seq={n_seq} needs: lower --n_seq or --seq_len"
        )


def code_version():
    """A hash of the source that runs and their numbers depend on: scripts, data, instruments, not what only shows.

    Comments, docstrings and layout count for nothing, so that mending a sentence does not undo hours of runs.
    """
    scripts = [ROOT / f"{name}.py" for name in ("model", "train", "detect", "ablate")]
    parts = [p for f in HASHED for p in (ROOT / f).rglob("*.py")]
    texts = [f"{path.relative_to(ROOT)}\n{statements(path.read_text())}" for path in (*scripts, *sorted(parts))]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:12]


def statements(source):
    """Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.unparse(tree)


def plan(study, folder, changes, code):
    """The Jobs of a study, seed by seed, so that what is done first can be compared. Raises UserError.

    `changes`: the command line's keys, which come after the scale and the common keys and before the arm's.
    """
    common = {**keys_of(study.scale, "scale"), **keys_of(study.common, "common"), **keys_of(changes, "command line")}
    of_arms = {arm: {**common, **keys_of(entry, f"arm {arm}")} for arm, entry in study.arms.items()}
    jobs, arms = [], {}
    for seed in study.seeds:
        for arm, of_arm in of_arms.items():
            interval = max(1, of_arm.get("max_iters", train.TrainConfig.max_iters) // study.points)
            given = {
                **of_arm,
                "seed": seed,
                **dict.fromkeys(("eval_interval", "save_interval", "keep_every"), interval),
            }
            try:
                model, cfg = config.build(train.SCHEMAS, given)
            except UserError as error:
                raise UserError(f"arm {arm}: {error}") from None
            meta, samples = data_of(cfg.dataset)
            model = train.fit_vocabulary(model, cfg, given, meta["vocab_size"])
            if model.block_size < study.seq_len:
                raise UserError(f"arm {arm}: seq_len={study.seq_len} is more than block_size={model.block_size}")
            check_sequences(study.n_seq, study.seq_len, cfg.dataset, cfg.bos)
            asked = [settings(model, cfg), seed, samples, study.n_seq, study.seq_len, study.ablations, study.probes]
            what = files.content_hash(asked)
            if arms.setdefault(what, arm) != arm:
                others = ",".join(name for name in study.arms if name != arm)
                raise UserError(f"arms {arms[what]} and {arm} are the same here: leave one out, as by --arms={others}")
            jobs.append(Job(arm, seed, folder / f"{arm}-{seed}", given, model, cfg, what, code))
    return jobs


def settings(model, cfg):
    """{key: value} of all that makes a run what it is."""
    everything = {**dataclasses.asdict(model), **dataclasses.asdict(cfg)}
    return {key: value for key, value in everything.items() if key not in (*train.OF_COMMAND, "seed")}


def size(model):
    """(parameters, training FLOPs per token) of a GPTConfig."""
    with torch.device("meta"):
        net = GPT(model)
    return net.num_params(), net.flops_per_token(model.block_size)
