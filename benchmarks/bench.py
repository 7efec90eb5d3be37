"""Compares time and memory with named baselines. Methods run alternately in one session, so that noise cancels.

  python -m benchmarks.bench --quick                        minutes: training the small model
  python -m benchmarks.bench --json results/bench.json --model DIR_OR_GGUF     everything but the arms
  python -m benchmarks.bench --only ablate --model DIR_OR_GGUF --rounds 3      one of train, detect, ablate, arms
  python -m benchmarks.bench --only arms                    the cost of each arm per token

train: updates of train.py's Run compared with nanoGPT's recipe (nanogpt_recipe.py) in two variants: bfloat16 and
compiled, and float32 and eager. "its time over ours" above 1 means that train.py is faster. "of the ceiling" is the
model FLOPs per second over those of the best matrix product measured at the same time (table matmul). This share can be
compared between machines; the ratio of times cannot.
monitor: the time that one look at spikes and sinks adds to an update, and its share with one look every 100 steps.
arms: every arm of configs/ compared with pre-norm at the tiny scale: time, FLOPs and memory per token.
detect, ablate: the commands as a user calls them on a trained model (ablate with --no-probes), without the time to load
the model. "plain" is the forward pass with its loss on the same batches, run right after the command, and "ratio" is
the command's time over plain. "passes a condition" is the time of ablate without detect over the time of one plain pass
per condition. Conditions are interventions, removals and controls that had something to edit, and those of int8 and
int4.
Every method runs in its own process. A ratio is the median over rounds, with the lowest and the highest. Memory is the
peak above what the process used with its libraries loaded (train) or with its model (detect, ablate).
"""

import argparse
import contextlib
import functools
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tqdm import trange

from benchmarks.nanogpt_recipe import Recipe
from detect import LAB
from spikesink import api, commands, schema
from spikesink.edit.findings import Ablation
from spikesink.errors import Flags, UserError, cli
from spikesink.models.subject import Subject
from spikesink.show.text import Column, grid, table
from train import ROOT, SCHEMAS, Run, TrainConfig, be_deterministic
from trainer import config
from trainer.machine import Machine

CUDA = torch.cuda.is_available()
Job = dict[str, Any]  # a key of JOBS as "job", and the arguments of its function
Prepare = Callable[..., Callable[[], dict[str, Any] | None]]  # a job's function: returns what is timed
Answer = dict[str, Any]  # a worker's answer to one call: seconds, mb (None where unknown), and facts of its job
Answers = dict[str, list[Answer]]  # by the name of the job
Worker = Callable[[], Answer]
Row = dict[str, Any]  # a table's row, as in the JSON
Tables = dict[str, list[Row]]

# ---------------------------------------------------------------------------------- a method in its own process


class Memory:
    """Peak memory in MB above the memory at the last `start`: the GPU's, or else resident memory (Linux only)."""

    start_mb = 0.0

    def start(self) -> None:
        """Resets the peak, and takes the present memory as the zero point."""
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            self.start_mb = torch.cuda.memory_allocated() / 2**20
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.start_mb = self._status("VmRSS")

    def peak(self) -> float | None:
        """The peak since `start` in MB, or None where it cannot be read."""
        if CUDA:
            return torch.cuda.max_memory_allocated() / 2**20 - self.start_mb
        return self._status("VmHWM") - self.start_mb if Path("/proc/self/clear_refs").exists() else None

    @staticmethod
    def _status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def work(job: Job) -> None:
    """The main loop of a worker: it prepares and warms up, then answers each line of stdin with one timed call."""
    memory = Memory()
    warm = job.pop("warm", True)
    call = JOBS[job.pop("job")](memory, **job)
    if warm:
        call()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        seconds, facts = timed(call)
        print(json.dumps({"seconds": seconds, "mb": memory.peak(), **(facts or {})}), flush=True)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, including the GPU's work, and result) of a call."""
    start = time.perf_counter()
    result = call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@contextlib.contextmanager
def worker(job: Job) -> Iterator[Worker]:
    """Starts a process that runs a job each time it is called."""
    command = [sys.executable, "-m", "benchmarks.bench", "--worker", json.dumps(job)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer() -> Answer:
        for line in process.stdout or ():
            if line.startswith("{"):  # other lines are output of libraries
                return json.loads(line)
        raise UserError(f"a worker of bench.py ended with exit code {process.wait()}; its output is above")

    def call() -> Answer:
        print(file=process.stdin, flush=True)
        return answer()

    answer()  # it is ready
    try:
        yield call
    finally:
        process.communicate()


def measure_jobs(jobs: Mapping[str, Job], rounds: int, text: str, running: Mapping[str, Worker] = {}) -> Answers:
    """Every round calls the workers that are `running`, then each job once, in a worker that is started for it."""
    with contextlib.ExitStack() as stack:
        workers = {**running, **{name: stack.enter_context(worker(job)) for name, job in jobs.items()}}
        answers: Answers = {name: [] for name in workers}
        for _ in trange(rounds, desc=text, unit="round", disable=None, leave=False):
            for name, call in workers.items():
                answers[name].append(call())
    return answers


def median_seconds(answers: Iterable[Answer]) -> float:
    """The median time of a call in seconds."""
    return statistics.median(answer["seconds"] for answer in answers)


def spread(values: Iterable[float]) -> tuple[float, list[float]]:
    """(median, [lowest, highest])."""
    ordered = sorted(values)
    return statistics.median(ordered), [ordered[0], ordered[-1]]


def ratios(numerator: list[Answer], denominator: list[Answer]) -> tuple[float, list[float]]:
    """`spread` of the ratio of two methods' seconds, round by round."""
    return spread(a["seconds"] / b["seconds"] for a, b in zip(numerator, denominator, strict=True))


# ------------------------------------------------------------------------------------------------------- train

SHAPES: dict[str, dict[str, int]] = {
    "10M": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 257},  # bytes and BOS
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257},
}
BATCH = {"10M": 64, "124M": 12} if CUDA else {"10M": 16, "124M": 1}
TRAIN_ROUNDS, QUICK_ROUNDS, ARM_ROUNDS = {"10M": 12, "124M": 8}, {"10M": 3}, 4
OURS = "train.py"
RECIPES = {"nanoGPT, bfloat16, compiled": True, "nanoGPT, float32, eager": False}  # method -> Recipe's `fast`
DTYPES, SIZES = ("bfloat16", "float32"), (4096, 8192) if CUDA else (1024, 2048)  # of the matrix products


def random_tokens(folder: str, vocab_size: int) -> None:
    """Writes a dataset of random tokens to `folder`. Speed does not depend on the text."""
    for split, n in (("train", 2**21), ("val", 2**16)):
        np.random.default_rng(0).integers(vocab_size, size=n, dtype=np.uint16).tofile(Path(folder) / f"{split}.bin")
    meta = {"dtype": "uint16", "vocab_size": vocab_size, "train_tokens": 2**21, "val_tokens": 2**16, "bos_id": 0}
    (Path(folder) / "meta.json").write_text(json.dumps(meta))


def recipe_job(memory: Memory, shape: dict[str, int], batch_size: int, data: str, fast: bool) -> Callable[[], None]:
    """A call makes one update of nanoGPT's recipe, and reads its batch as nanoGPT does."""
    torch.compile(lambda x: x + 1)(torch.zeros(1))  # loads the compiler, whose memory counts as a library's
    torch.manual_seed(0)
    memory.start()
    T, device = shape["block_size"], torch.device("cuda" if CUDA else "cpu")
    if CUDA:
        torch.backends.cuda.matmul.allow_tf32 = True
    vocab_size = -(-shape["vocab_size"] // 64) * 64
    recipe = Recipe((shape["n_layer"], shape["n_head"], shape["n_embd"], T, vocab_size), device, fast)

    def call() -> None:
        tokens = np.memmap(Path(data) / "train.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - T, (batch_size,)).tolist()
        window = lambda i: torch.from_numpy(tokens[i : i + T].astype(np.int64))
        x, y = (torch.stack([window(i + shift) for i in starts]).to(device) for shift in (0, 1))
        recipe.step([(x, y)])

    return call


def run_job(memory: Memory, argv: list[str], data: str) -> Callable[[], dict[str, Any]]:
    """A call makes one update of train.py's Run with these arguments, on `data`."""
    overrides, _ = config.parse_argv(SCHEMAS, [*argv, f"--dataset={data}"], ROOT)
    machine = Machine.find()
    if not CUDA:
        be_deterministic(False)
    torch.compile(lambda x: x + 1)(torch.zeros(1, device=machine.device))  # loads the compiler, as in recipe_job
    memory.start()
    run = Run.open(overrides, tempfile.mkdtemp(dir=data), machine)
    facts = {"tokens": run.tokens_per_step, "flops": run.model.flops_per_token(run.model_config.block_size)}

    def call() -> dict[str, Any]:
        run.update()
        return facts

    return call


def matmul_job(memory: Memory, dtype: str) -> Callable[[], dict[str, Any]]:
    """A call measures the highest FLOPs per second of a square matrix product."""
    machine = Machine.find().with_dtype(dtype)
    matrices = {n: torch.randn(n, n, device=machine.device, dtype=machine.dtype) for n in SIZES}
    best = lambda matrix: min(timed(lambda: matrix @ matrix)[0] for _ in range(5))
    return lambda: {"flops_per_s": max(2 * n**3 / best(matrix) for n, matrix in matrices.items())}


def arguments(shape: dict[str, int], batch_size: int, **more: Any) -> list[str]:
    """Command-line arguments of train.py for a shape. The dataset sets vocab_size."""
    keys = {**shape, "batch_size": batch_size, "gradient_accumulation_steps": 1, "compile": True, **more}
    return [f"--{key}={value}" for key, value in keys.items() if key != "vocab_size"]


def bench_train(args: argparse.Namespace) -> Tables:
    """The tables train (a row per model and method), matmul and monitor (a row per model)."""
    tables: Tables = {"train": [], "matmul": [], "monitor": []}
    for name, rounds in (QUICK_ROUNDS if args.quick else TRAIN_ROUNDS).items():
        shape, batch_size = SHAPES[name], BATCH[name]
        with tempfile.TemporaryDirectory() as data:
            random_tokens(data, shape["vocab_size"])
            run = {"job": "run", "data": data}
            recipe = {"job": "recipe", "shape": shape, "batch_size": batch_size, "data": data}
            jobs: dict[str, Job] = {
                OURS: {**run, "argv": arguments(shape, batch_size, monitor=0)},
                **{method: {**recipe, "fast": fast} for method, fast in RECIPES.items()},
                "watched": {**run, "argv": arguments(shape, batch_size, monitor=1)},
                **{dtype: {"job": "matmul", "dtype": dtype} for dtype in DTYPES},
            }
            answers = measure_jobs(jobs, rounds, f"train {name}")
        tokens, flops = answers[OURS][-1]["tokens"], answers[OURS][-1]["flops"]
        rates = {dtype: statistics.median(answer["flops_per_s"] for answer in answers[dtype]) for dtype in DTYPES}
        tables["matmul"].append({"model": name, **rates})
        for method in (OURS, *RECIPES):
            ratio, bounds = ratios(answers[method], answers[OURS])
            per_s, peak = tokens / median_seconds(answers[method]), answers[method][-1]["mb"]
            row = {"model": name, "batch_size": batch_size, "T": shape["block_size"], "method": method}
            row |= {"tokens_per_s": per_s, "ratio": ratio, "ratio_range": bounds, "peak_mb": peak}
            tables["train"].append({**row, "of_ceiling": flops * per_s / max(rates.values())})
        pairs = zip(answers["watched"], answers[OURS], strict=True)
        look_s, bounds = spread(watched["seconds"] - plain["seconds"] for watched, plain in pairs)
        step_s, every = median_seconds(answers[OURS]), TrainConfig.monitor
        row = {"model": name, "every": every, "step_s": step_s, "look_s": look_s, "look_range_s": bounds}
        tables["monitor"].append({**row, "share": look_s / step_s / every})
    return tables


# -------------------------------------------------------------------------------------------------------- arms


def bench_arms(args: argparse.Namespace) -> Tables:
    """The table arms: a row per arm, which runs alternately with pre-norm."""
    from benchmarks.arms import arm_names  # imports scipy, which train does not need

    first, *names = arm_names()
    rows = []
    with tempfile.TemporaryDirectory() as data:
        random_tokens(data, SHAPES["10M"]["vocab_size"])
        job = lambda name: {"job": "run", "argv": [name, "scale/tiny", "--compile=True", "--monitor=0"], "data": data}
        with worker(job(first)) as baseline:
            for name in args.arms or names:
                rounds = 1 if args.quick else ARM_ROUNDS
                answers = measure_jobs({name: job(name)}, rounds, f"arm {name}", {first: baseline})
                ratio, bounds = ratios(answers[name], answers[first])
                flops, mb = (answers[name][-1][key] / answers[first][-1][key] for key in ("flops", "mb"))
                rows.append({"arm": name, "time": ratio, "time_range": bounds, "flops": flops, "peak": mb})
    return {"arms": sorted(rows, key=lambda row: -row["time"])}


# --------------------------------------------------------------------------------------------- detect and ablate

COMMANDS = {"detect": (commands.detect, ()), "ablate": (commands.ablate, ("--no-probes",))}
N_SEQ, QUICK_N_SEQ = {64: None, 1024: 8}, {64: 2}  # T -> sequences; None: the command's default


def counted(subject: Subject, passed: list[torch.Tensor]) -> Subject:
    """The same Subject, which adds the ids of every pass to `passed`. A rebuilt one does so too."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        passed.append(ids)
        return subject.logits(ids)

    rebuild = subject.rebuild
    return replace(subject, logits=logits, rebuild=rebuild and (lambda: counted(rebuild(), passed)))


@contextlib.contextmanager
def clock(times: dict[str, float], name: str) -> Iterator[None]:
    """Writes the seconds of the block to times[NAME], and its CPU seconds to times[NAME_cpu]."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    times |= {name: time.perf_counter() - wall, f"{name}_cpu": time.process_time() - cpu}


def command_job(memory: Memory, name: str, model: str, T: int, n_seq: int | None) -> Callable[[], dict[str, Any]]:
    """A call runs a command as a user does, and then the plain forward passes of the same batches."""
    command, flags = COMMANDS[name]
    commands.pages(commands.Outputs())  # imports the drawing libraries, which should not count
    argv = [model, f"--seq_len={T}", *flags, *([f"--n_seq={n_seq}"] if n_seq else [])]

    def call() -> dict[str, Any]:
        times: dict[str, float] = {}
        passed: list[torch.Tensor] = []
        subjects: list[Subject] = []
        ablations: list[Ablation] = []

        def load(*args: Any, load: Any = api.load) -> api.Loaded:
            with clock(times, "load"):
                loaded = load(*args)
            memory.start()
            subjects.extend(loaded.subjects)
            return replace(loaded, subjects=[counted(subject, passed) for subject in subjects])

        def ablate(*args: Any, ablate: Any = api.ablate) -> Ablation:
            with clock(times, "ablate"):
                ablations.append(ablate(*args))
            return ablations[0]

        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.multiple(api, load=load, ablate=ablate),
            contextlib.redirect_stdout(io.StringIO()),
            clock(times, "command"),
        ):
            command([*argv, f"--json={folder}/found.json", f"--html={folder}/page.html"], "", LAB)
        facts: dict[str, Any] = {"mb": memory.peak(), "sequences": sum(map(len, passed))}
        with clock(times, "plain"):
            for ids in passed:
                subjects[0].losses(ids)
        for key in ("", "_cpu"):
            facts[f"seconds{key}"] = times[f"command{key}"] - times[f"load{key}"]
            facts[f"plain{key}"] = times[f"plain{key}"]
            facts[f"ratio{key}"] = facts[f"seconds{key}"] / facts[f"plain{key}"]
        for ablation in ablations:
            pass_s = times["plain"] * ablation.data.tokens / sum(ids.numel() for ids in passed)
            n = count_conditions(ablation)
            facts |= {"conditions": n, "passes": times["ablate"] / (n * pass_s)}
        return facts

    return call


def count_conditions(ablation: Ablation) -> int:
    """The number of interventions, removals and controls that edited something, and of the parts of int8 and int4."""
    entries = [entry for _, part in ablation.all_parts for entry in part.entries]
    effects = [effect for entry in entries for effect in (entry, *entry.control)]
    int8s = [part.int8 for _, part in ablation.all_parts if isinstance(part.int8, dict)]
    wholes = [whole for int8 in int8s for whole in int8.values()]
    costs = [cost for whole in wholes for cost in (whole, whole.weights_only, whole.activations_only)]
    return sum(effect.edited > 0 for effect in effects) + sum(cost is not None for cost in costs)


def bench_command(name: str, args: argparse.Namespace) -> Tables:
    """The table detect or ablate: a row per length."""
    if not args.model:
        print(f"{name}: not timed, because it needs a trained model: --model DIR_OR_GGUF\n")
        return {}
    rows = []
    for T, n_seq in (QUICK_N_SEQ if args.quick else N_SEQ).items():
        model = str(Path(args.model).resolve())  # a worker runs in the root of the clone
        job = {"job": "command", "warm": False, "name": name, "model": model, "T": T, "n_seq": n_seq}
        (answers,) = measure_jobs({name: job}, args.rounds, f"{name}, T {T}").values()
        row: Row = {"model": Path(model).name, "T": T, "rounds": args.rounds, "peak_mb": answers[0]["mb"]}
        row |= {key: statistics.median(answer[key] for answer in answers) for key in answers[0] if key != "mb"}
        for key in ("ratio", "ratio_cpu", *(["passes"] if "passes" in row else [])):
            row[key], row[f"{key}_range"] = spread(answer[key] for answer in answers)
        rows.append(row)
    return {name: rows}


# --------------------------------------------------------------------------------------------------- main

JOBS: dict[str, Prepare] = {"recipe": recipe_job, "run": run_job, "matmul": matmul_job, "command": command_job}
BENCHMARKS: dict[str, Callable[[argparse.Namespace], Tables]] = {
    "train": bench_train,
    **{name: functools.partial(bench_command, name) for name in COMMANDS},
    "arms": bench_arms,
}


def field(title: str, key: str, form: str = "", times: float = 1) -> Column:
    """A column of a field of the rows: text, or `times` a number; None is shown as a dash."""
    scaled = lambda value: value if value is None or isinstance(value, str) else times * value
    return Column(title, lambda row: scaled(row[key]), form)


def ranged(title: str, key: str, range_key: str, form: str = ".2f") -> list[Column]:
    """Two columns: a median, and its lowest and highest value."""
    bounds = lambda row: ", ".join(format(x, form) for x in row[range_key])
    return [field(title, key, form), Column("lowest, highest", bounds)]


COMMAND_COLUMNS = [
    *(field("model", "model"), field("T", "T", ",d"), field("sequences passed", "sequences", ",.0f")),
    *(field("s", "seconds", ",.1f"), field("plain s", "plain", ",.1f"), *ranged("ratio", "ratio", "ratio_range")),
    *(field("CPU s", "seconds_cpu", ",.1f"), field("plain CPU s", "plain_cpu", ",.1f")),
    *(*ranged("CPU ratio", "ratio_cpu", "ratio_cpu_range"), field("peak MB", "peak_mb", ",.0f")),
]
COLUMNS: dict[str, Sequence[Column]] = {
    "train": [
        field("train", "model"),
        Column("batch x T", lambda row: f"{row['batch_size']} x {row['T']}"),
        field("method", "method"),
        field("tokens/s", "tokens_per_s", ",.0f"),
        *ranged("its time over ours", "ratio", "ratio_range"),
        field("of the ceiling", "of_ceiling", ".0%"),
        field("peak MB", "peak_mb", ",.0f"),
    ],
    "matmul": [field("matmul", "model"), *(field(f"{dtype} TFLOP/s", dtype, ".2f", 1e-12) for dtype in DTYPES)],
    "monitor": [
        field("monitor", "model"),
        field("step s", "step_s", ".3f"),
        *ranged("a look adds s", "look_s", "look_range_s", ".3f"),
        field("share of the time", "share", ".2%"),
        Column("one look every", lambda row: f"{row['every']} steps"),
    ],
    "arms": [
        field("arm", "arm"),
        *ranged("time a token", "time", "time_range"),
        *(field("FLOPs a token", "flops", ".2f"), field("peak memory", "peak", ".2f")),
    ],
    "detect": COMMAND_COLUMNS,
    "ablate": [
        *COMMAND_COLUMNS,
        field("conditions", "conditions", ".0f"),
        *ranged("passes a condition", "passes", "passes_range"),
    ],
}


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="the small model, few rounds, few sequences")
    flags.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=f"some of {', '.join(BENCHMARKS)}")
    flags.add_argument("--model", metavar="DIR_OR_GGUF", help="a trained model, for detect and ablate")
    flags.add_argument("--arms", nargs="+", metavar="ARM", help="the arms that --only arms runs (default: all)")
    flags.add_argument("--rounds", type=int, default=1, choices=(1, 2, 3), help="for detect and ablate (default: 1)")
    flags.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    flags.add_argument("--worker", metavar="JOB", help=argparse.SUPPRESS)  # bench.py starts its workers with it
    args = flags.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return
    machine = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    machine |= {"device": torch.cuda.get_device_name() if CUDA else platform.machine()}
    results: dict[str, Any] = {"machine": {**machine, "cpu_threads": torch.get_num_threads()}}
    for name in args.only or [name for name in BENCHMARKS if name != "arms"]:
        tables = BENCHMARKS[name](args)
        for key, rows in tables.items():
            print(f"{grid(*table(COLUMNS[key], rows))}\n", flush=True)
        results |= tables
        if args.json:
            schema.save(args.json, results)


if __name__ == "__main__":
    cli(main)
