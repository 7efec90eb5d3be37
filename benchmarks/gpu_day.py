"""Runs everything that needs a GPU, in order of value, within a limited time. docs/gpu_day.md describes it.

  python -m benchmarks.gpu_day --pack data/wiki --data wiki.xz     packs tokens to train on into one small file
  python -m benchmarks.gpu_day --minutes 30 --data wiki.xz         one slice; the same command goes on with the next
  python -m benchmarks.gpu_day --rehearse                          every step at nano scale, on a CPU

One call works for --slice minutes, and all calls together for --minutes. A step starts if its estimated time fits into
the time that remains. --results gets a JSON and a log of each step, and the small files of each arm; a step that has
its JSON is not run again. --out holds data and weights; weights are deleted once measured. Exit code 75: steps remain.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import lzma
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.benchmark import Timer

from benchmarks import bench
from data.loader import folder as folder_of
from spikesink import files, schema
from spikesink.errors import Flags, UserError, cli
from spikesink.files import rows_of
from spikesink.text.token_files import TokenFile, meta_of
from studies.jobs import Job, Study, code_version, plan
from studies.runs.run import RUN_FILES, describe_machine, do_run, read_json
from tests import gpu_checks
from train import ROOT, provenance
from trainer.checkpoints import Checkpoints
from trainer.machine import Machine

Facts = dict[str, Any]


class Size(NamedTuple):
    """The sizes of all steps."""

    shape: dict[str, int]  # of the model whose training speed is measured
    batches: tuple[int, ...]  # batch sizes, tried in this order until one fits
    rounds: int  # timed updates
    compile: bool
    heads: tuple[int, int, int, int]  # (B, H, T, D) of the attention that is timed
    together: tuple[int, ...]  # numbers of micro models that are trained at once
    arms: Facts  # keys that all arms have
    study: Facts
    minutes: float = 0  # for every step; 0: the step's own estimate


COMMON_KEYS: Facts = {"bos": True, "norm": "rmsnorm", "log_interval": 10}
GPT2_SMALL = Size(
    *(bench.SHAPES["124M"], (64, 48, 32, 16, 8, 4), 20, True, (16, 12, 1024, 64), (8, 32, 128)),
    arms={  # 1526 steps of 65,536 tokens: 0.1B
        **{**COMMON_KEYS, "block_size": 1024, "batch_size": 32, "gradient_accumulation_steps": 2, "max_iters": 1526},
        **{"warmup_iters": 150, "eval_iters": 20, "monitor": 50},
    },
    study={"scale": "scale/gpt2", "points": 2, "ablations": ["spike_zero", "spike_mean", "sink_mask", "sink_null"]},
)
NANO = Size(
    {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 256},
    *((8,), 2, False, (1, 2, 64, 16), (3,)),
    arms={
        **{**COMMON_KEYS, "block_size": 32, "batch_size": 4, "gradient_accumulation_steps": 1, "max_iters": 8},
        **{"warmup_iters": 2, "eval_iters": 1, "monitor": 4, "n_layer": 1, "n_embd": 32, "compile": False},
    },
    study={"scale": "scale/nano", "points": 1, "ablations": ["sink_mask"], "n_seq": 8, "seq_len": 16},
    minutes=0.5,
)
# Post-norm and no norm train at half the rate, at which post-norm trains well at micro scale. No rate is tuned here.
HALF = {"learning_rate": 3e-4, "min_lr": 3e-5}
ARMS: Facts = {
    **{"pre": "prenorm", "post": {"configs": "postnorm", **HALF}, "sandwich": "sandwich", "qk": "qk_full"},
    **{"gate": "gate_head", "none": {"configs": "nonorm", **HALF}},
}


@dataclass(frozen=True)
class Day:
    """The arguments of a step."""

    size: Size
    out: Path
    results: Path
    seconds: float  # the step is stopped after this time
    machine: Machine

    def study(self) -> tuple[Study, list[Job]]:
        """The study of the arms and its jobs, one per arm."""
        study = Study("At GPT-2 small's size, which arms have spikes and sinks?", ARMS, [1], **self.size.study)
        keys = {**self.size.arms, "dataset": str(self.out / "data")}
        return study, plan(study, self.out / "runs", keys, code_version())


def correct(day: Day) -> Facts:
    """The checks of tests/gpu_checks.py. Raises UserError naming those that failed."""
    if failed := gpu_checks.run_checks(day.machine.device, Path(tempfile.mkdtemp(dir=day.out))):
        raise UserError(f"failed: {', '.join(failed)}")
    return {"passed": list(gpu_checks.CHECKS)}


def largest(day: Day, name: str, batches: Sequence[int], job: Callable[[int], Facts]) -> Facts:
    """Speed and memory of a job with the first of `batches` that fits. Raises UserError if none fits."""
    for n in batches:
        try:
            answers = bench.measure_jobs({name: job(n)}, day.size.rounds, f"{name}, batch {n}")[name]
        except UserError as error:  # usually out of memory; the log has the reason
            print(f"{name}: batch {n} does not run: {error}", flush=True)
            continue
        step_s = bench.median_seconds(answers)
        per_s = n * day.size.shape["block_size"] / step_s
        return {"batch_size": n, "tokens_per_s": per_s, "step_s": step_s, **answers[-1]}
    raise UserError(f"{name} does not run with any batch size of {batches}")


def speed(day: Day) -> Facts:
    """Speed of train.py and of nanoGPT's recipe, each with the largest batch that fits, and of a matrix product."""
    size, data = day.size, tempfile.mkdtemp(dir=day.out)
    bench.random_tokens(data, size.shape["vocab_size"])
    argv = lambda n, every: bench.arguments(size.shape, n, compile=size.compile, monitor=every, warmup_iters=1)
    run = lambda every: lambda n: {"job": "run", "data": data, "argv": argv(n, every)}
    recipe = lambda n: {"job": "recipe", "shape": size.shape, "batch_size": n, "data": data, "fast": size.compile}
    ceiling = bench.matmul_job(bench.Memory(), "bfloat16")()["flops_per_s"]
    ours, recipes = largest(day, "train.py", size.batches, run(0)), largest(day, "recipe", size.batches, recipe)
    watched = largest(day, "train.py with --monitor=1", [ours["batch_size"]], run(1))
    share, ratio = ours["tokens_per_s"] * ours["flops"] / ceiling, ours["tokens_per_s"] / recipes["tokens_per_s"]
    return {
        **{"ours": ours, "recipe": recipes, "ceiling_flops_per_s": ceiling, "of_ceiling": share, "ratio": ratio},
        **{"half the ceiling": share >= 0.5, "1.25 x the recipe": ratio >= 1.25},
        "a look every 100 steps costs": (watched["step_s"] - ours["step_s"]) / ours["step_s"] / 100,
    }


def mean_seconds(day: Day, calls: dict[str, Callable[[], object]]) -> Facts:
    """{name: mean seconds of a warm call, including the GPU's work}."""
    return {name: Timer("f()", globals={"f": f}).timeit(day.size.rounds).mean for name, f in calls.items()}


def attention(day: Day) -> Facts:
    """Seconds of each kind of attention, by model.py and by flex_attention: forward and, on a GPU, backward."""
    setup = day.size.heads, day.machine.device, day.size.compile
    return {kind: mean_seconds(day, gpu_checks.attention_calls(kind, *setup)) for kind in gpu_checks.KINDS}


def together(day: Day) -> Facts:
    """Seconds of an update of N micro models in float32: one after another, and stacked into one by vmap."""
    calls = lambda n: gpu_checks.micro_calls(n, day.machine.device, day.size.compile)
    return {f"{n} models": mean_seconds(day, calls(n)) for n in (1, *day.size.together)}


def arm(day: Day, name: str) -> Facts:
    """Trains and measures an arm, and keeps its small files. Training that takes too long saves and stops in time."""
    study, jobs = day.study()
    job = jobs[list(ARMS).index(name)]
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # ignored except while training, which handles it
    timer = threading.Timer(max(1, day.seconds - 30), os.kill, (os.getpid(), signal.SIGUSR1))
    timer.daemon = True
    timer.start()
    do_run(job, study, str(day.machine.device), keep_checkpoints=True)
    timer.cancel()
    facts = {"tokens": job.tokens, "epochs": job.tokens / meta_of(day.out / "data")["train_tokens"]}
    for command in ("detect", "ablate") if name == "pre" and job.folder.joinpath("ckpt.pt").exists() else ():
        arguments = command, str(job.folder / "ckpt.pt"), study.seq_len, study.n_seq
        facts[command] = bench.command_job(bench.Memory(), *arguments)()
    Checkpoints(job.folder).clear()
    for file in filter(Path.is_file, (job.folder / name for name in RUN_FILES)):
        files.save_bytes(day.results / name / file.name, file.read_bytes())
    return {**facts, "row": read_json(job.folder / "row.json")}


def draw(day: Day) -> Facts:
    """Makes the table of the arms, its page and figures, without a GPU. Rows of other machines come from --results."""
    from study import Request, write_results

    study, jobs = day.study()
    for job in jobs:
        if not (job.folder / "row.json").exists() and (path := day.results / job.arm / "row.json").exists():
            files.save_bytes(job.folder / "row.json", path.read_bytes())
    command, out = "python -m benchmarks.gpu_day", str(day.out / "drawn")
    request = Request(keep_code=True, name="arms", out=out, results=str(day.results), command=command)
    request.runs_folder.mkdir(parents=True, exist_ok=True)
    table = write_results(study, jobs, request, last=True)
    shutil.copytree(request.runs_folder / "figures", request.table_folder / "figures", dirs_exist_ok=True)
    return {"runs": [row.status for row in table.runs]}


def pack(dataset: str, path: Path, mib: float) -> None:
    """Packs a prepared dataset into at most `mib` MiB by lzma: a line of JSON, validation and training tokens."""
    source, step = folder_of(dataset), 2**16
    meta = {key: value for key, value in meta_of(source).items() if key not in ("bpe", "files")}
    val, train = (TokenFile(source, split, 1).tokens[:n] for split, n in (("val", 2**19), ("train", None)))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lp": 1, "lc": 3, "pb": 1}]  # for tokens of two bytes
    packer = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=filters)
    content = packer.compress(json.dumps({**meta, "val_tokens": len(val)}).encode() + b"\n" + val.tobytes())
    done, max_bytes = 0, int(mib * 2**20) - 4 * step
    while done < len(train) and len(content) < max_bytes:
        content += packer.compress(train[done : done + step].tobytes())
        done = min(len(train), done + step)
    content += packer.flush()
    files.save_bytes(path, content)
    print(f"{path}: {done:,} train tokens in {len(content) / 2**20:.1f} MiB; 0.1B tokens are {1e8 / done:.1f} epochs")


def unpack(path: Path, target: Path) -> None:
    """Makes a dataset folder from a file of `pack`. Raises UserError."""
    try:
        with lzma.open(path) as file:
            meta = json.loads(file.readline())
            width = np.dtype(meta["dtype"]).itemsize
            files.save_bytes(target / "val.bin", file.read(width * meta["val_tokens"]))
            files.save_bytes(target / "train.bin", train := file.read())
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise UserError(f"{path} was not written by --pack: {error}") from None
    schema.save(target / "meta.json", {**meta, "train_tokens": len(train) // width})


ARM_STEPS = {name: (functools.partial(arm, name=name), 7.5) for name in ARMS}
# name -> (step, estimated minutes on an H100)
STEPS: dict[str, tuple[Callable[[Day], Facts], float]] = {
    **{"correct": (correct, 2.5), "speed": (speed, 4), "attention": (attention, 1.5)},
    **{name: ARM_STEPS[name] for name in ("pre", "post")},
    **{"together": (together, 1.5), **ARM_STEPS, "table": (draw, 0.5)},
}
TABLE_PACKAGES = ("scipy", "matplotlib", "jinja2")  # the step table needs these


def estimate(name: str, day: Day) -> float:
    """The estimated seconds of a step. For an arm, they follow from its remaining tokens and the measured speed."""
    measured = (read_json(day.results / "speed.json") or {}).get("found", {}).get("ours")
    if name not in ARMS or not measured or day.size.minutes:
        return 60 * (day.size.minutes or STEPS[name][1])
    keys = ("max_iters", "batch_size", "gradient_accumulation_steps", "block_size")
    rows = rows_of(day.out / "runs" / f"{name}-1" / "log.jsonl")
    tokens = math.prod(day.size.arms[key] for key in keys) - (rows[-1]["tokens"] if rows else 0)
    return 1.1 * tokens / measured["tokens_per_s"] + 120


def run_step(name: str, day: Day, about: Facts, flags: list[str]) -> str:
    """Runs a step in its own process until it ends or its time is over. Returns its status in words."""
    since, log = time.perf_counter(), day.out / f"{name}.log"
    command = [sys.executable, "-m", "benchmarks.gpu_day", f"--step={name}", f"--seconds={day.seconds}", *flags]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # for --deterministic
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if day.machine.device.type == "cpu" else {}
    with open(log, "w") as file:
        streams: Facts = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, **streams)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(day.seconds)
        finally:  # kills its workers too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    text = log.read_text(errors="replace").replace(str(ROOT), ".").replace(sys.prefix, "PYTHON")
    files.save_text(day.results / f"{name}.log", text)
    if code == 130 or (code == -signal.SIGKILL and name in ARMS):
        return "stopped; the next call goes on"
    why = "it took too long" if code == -signal.SIGKILL else text.strip()[-300:]
    ended = {"status": "failed", "why": why} if code else {"status": "done", "found": read_json(day.out / "found.json")}
    schema.save(day.results / f"{name}.json", {**about, "seconds": time.perf_counter() - since, **ended})
    return ended["status"] if not code else f"failed: {why.splitlines()[-1]} ({day.results / name}.log)"


def work_through(args: argparse.Namespace, day: Day, about: Facts, flags: list[str]) -> int:
    """Runs the steps that fit. Returns how many remain for the next calls."""
    since, past_slices, todo = time.monotonic(), read_json(day.results / "slices.json") or [], 0
    for name in STEPS:
        spent, need = time.monotonic() - since, estimate(name, day)
        total_s, slice_s = 60 * args.minutes - sum(past_slices) - spent, 60 * args.slice - spent
        previous, missing = read_json(day.results / f"{name}.json"), []
        if name in (*ARMS, "table") and not (day.out / "data/meta.json").exists():
            missing = ["--data"]
        if name == "table":  # every call makes it again
            previous, arms = None, [arm for arm in ARMS if (day.results / f"{arm}.json").exists()]
            missing += [] if arms else ["an arm"]
            missing += [package for package in TABLE_PACKAGES if importlib.util.find_spec(package) is None]
        # an arm may start even if it needs more than a slice, because the next call resumes it
        fits = need <= total_s and (need <= slice_s or (name in ARMS and spent < 60))
        if previous or missing:
            status = f"{previous['status']} before" if previous else f"skipped, because of missing {', '.join(missing)}"
        elif not fits:
            status = f"not started: it takes about {need:.0f} s, and {max(0, min(total_s, slice_s)):.0f} s remain"
            todo += need <= total_s and (need <= 60 * args.slice or name in ARMS)
        else:
            status = run_step(name, replace(day, seconds=min(total_s, slice_s)), {**about, "step": name}, flags)
            todo += status.startswith("stopped")
        print(f"{name}: {status}", flush=True)
        schema.save(day.results / "slices.json", [*past_slices, time.monotonic() - since])
    return todo


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("--minutes", type=float, default=30.0, help="minutes of all calls together (default: 30)")
    flags.add_argument("--slice", type=float, default=9.0, help="minutes of this call (default: 9)")
    flags.add_argument("--data", metavar="FILE", help="a file that --pack wrote")
    flags.add_argument("--results", default="results/gpu", metavar="DIR")
    flags.add_argument("--out", default="out/gpu", metavar="DIR")
    flags.add_argument("--commit", help="the commit of this code, if git cannot tell")
    flags.add_argument("--rehearse", action="store_true", help="run every step at nano scale on a CPU")
    flags.add_argument("--pack", metavar="DATASET", help="pack a prepared dataset into --data, and stop")
    flags.add_argument("--mib", type=float, default=50.0, help="size limit of the packed file (default: 50)")
    flags.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # runs one step in this process
    flags.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.pack:
        pack(args.pack, Path(args.data or "wiki.xz"), args.mib)
        return
    machine = Machine.find("cpu" if args.rehearse else "auto").with_dtype("auto")
    day = Day(NANO if args.rehearse else GPT2_SMALL, Path(args.out), Path(args.results), args.seconds, machine)
    if args.step:
        schema.save(day.out / "found.json", STEPS[args.step][0](day))
        return
    if args.rehearse and not args.data:
        args.data = str(day.out / "stdlib.xz")
        pack("stdlib", Path(args.data), 0.5)
    if args.data and not (day.out / "data/meta.json").exists():
        unpack(Path(args.data), day.out / "data")
    command = f"python -m benchmarks.gpu_day --minutes {args.minutes:g}{' --rehearse' if args.rehearse else ''}"
    about = {"command": command, **provenance(), "code": code_version(), "machine": describe_machine(machine)}
    about |= {"git_commit": args.commit} if args.commit else {}
    step_flags = [f"--results={args.results}", f"--out={args.out}", *(["--rehearse"] if args.rehearse else [])]
    day.out.mkdir(parents=True, exist_ok=True)
    todo = work_through(args, day, about, step_flags)
    print(f"{about['machine']}: {todo} steps left; results: {day.results}")
    sys.exit(75 if todo else 0)


if __name__ == "__main__":
    cli(main)
