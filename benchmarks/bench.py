"""Time and memory beside named baselines, measured in one run: what is compared runs in turn, so that noise cancels.

  python -m benchmarks.bench --quick                        under a minute: the small model, detection on a short text
  python -m benchmarks.bench --json results/bench.json      everything but the arms: a quarter of an hour on 2 cores
  python -m benchmarks.bench --only arms                    what each arm costs a token

train: updates of train.py's Run, as a run makes them, beside nanoGPT's recipe (nanogpt_recipe.py). ratio: its time over
ours.
Use of the machine: model FLOPs a second over the best matrix product of the same minutes, in train.py's dtype.
monitor: what a look at spikes and sinks adds to such an update, and its share of the time, one look every 100 steps.
arms: every arm of configs/ beside pre-norm at the tiny scale: time and memory a token, and FLOPs.
detect: the observing pass beside the plain forward pass with its loss, and beside what most scripts do, transformers
with output_attentions=True; one sequence, float32. ratio: observing over plain.
Every method lives in a process of its own; a ratio is the median over rounds, with the lowest and the highest. Memory
is the peak above what the process held with its libraries loaded (train) or its model (detect).
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.arms import arm_names
from benchmarks.nanogpt_recipe import Recipe
from model import GPT, GPTConfig
from spikesink import schema
from spikesink.errors import Flags, cli
from spikesink.measure.observe import observe
from spikesink.models import hf
from spikesink.models.subject import Subject
from spikesink.show.text import grid
from train import ROOT, SCHEMAS, Run, TrainConfig, be_deterministic
from trainer import config
from trainer.machine import Machine

CUDA = torch.cuda.is_available()
Answer = dict[str, Any]  # of a worker to one call: seconds, mb (None where nothing tells), and facts of its job
Row = dict[str, Any]  # of a table, as the JSON has it

# ---------------------------------------------------------------------------------- a method in its own process


class Memory:
    """Peak memory in MB above that at the last `start`: the GPU's, or resident memory (Linux; elsewhere None)."""

    before = 0.0

    def start(self) -> None:
        """Counts from here."""
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self.before = self._status("VmRSS")

    def peak(self) -> float | None:
        """MB, or None where nothing tells."""
        if CUDA:
            return torch.cuda.max_memory_allocated() / 2**20 - self.before
        return self._status("VmHWM") - self.before if Path("/proc/self/clear_refs").exists() else None

    @staticmethod
    def _status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def work(job: dict[str, Any]) -> None:
    """A worker's life: prepares and warms up, then answers each line of stdin with one measured call."""
    memory = Memory()
    warm = job.pop("warm", True)
    call = JOBS[job.pop("job")](memory, **job)
    if warm:
        call()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        facts = call() or {}
        if CUDA:
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        print(json.dumps({"seconds": took, "mb": memory.peak(), **facts}), flush=True)


class Worker:
    """A process that runs one job, again and again, when told to."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", "benchmarks.bench", "--worker", json.dumps(job)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def once(self) -> Answer:
        """{seconds, mb, ...} of one call."""
        print(file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Answer:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):  # else a remark of a library
                return json.loads(line)
        raise RuntimeError(f"a worker of bench.py ended with exit code {self.process.wait()}")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()


def in_turn(workers: Mapping[str, Worker], rounds: int, bar: tqdm) -> dict[str, list[Answer]]:
    """{name: [what each call said]} of {name: Worker}, one call of each a round."""
    said: dict[str, list[Answer]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            said[name].append(worker.once())
            bar.update()
    return said


def measured(jobs: Mapping[str, Mapping[str, Any]], rounds: int, text: str) -> dict[str, list[Answer]]:
    """The same of {name: job}, each in a worker that is started for it."""
    with contextlib.ExitStack() as stack, _bar(text, len(jobs) * rounds) as bar:
        return in_turn({name: stack.enter_context(Worker(job)) for name, job in jobs.items()}, rounds, bar)


def seconds(said: Iterable[Answer]) -> float:
    """Median seconds of a call."""
    return statistics.median(each["seconds"] for each in said)


def ratios(above: list[Answer], below: list[Answer]) -> tuple[float, list[float]]:
    """(median, [lowest, highest]) of the ratio of two methods' seconds, round by round."""
    each = sorted(a["seconds"] / b["seconds"] for a, b in zip(above, below, strict=True))
    return statistics.median(each), [each[0], each[-1]]


# ------------------------------------------------------------------------------------------------------- train

SHAPES: dict[str, dict[str, int]] = {
    "10M": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 257},  # bytes and a BOS
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257},
}
BATCH = {"10M": 64, "124M": 12} if CUDA else {"10M": 16, "124M": 1}
TRAIN_ROUNDS, ARM_ROUNDS = {"10M": 12, "124M": 8}, 4


def random_tokens(folder: str, vocab_size: int) -> None:
    """A dataset of random tokens in `folder`: what is learned does not matter here."""
    for split, n in (("train", 2**21), ("val", 2**16)):
        np.random.default_rng(0).integers(vocab_size, size=n, dtype=np.uint16).tofile(Path(folder) / f"{split}.bin")
    meta = {"dtype": "uint16", "vocab_size": vocab_size, "train_tokens": 2**21, "val_tokens": 2**16, "bos_id": 0}
    (Path(folder) / "meta.json").write_text(json.dumps(meta))


def recipe_job(memory: Memory, shape: dict[str, int], batch_size: int, data: str) -> Callable[[], None]:
    """A call is one update of nanoGPT's recipe, its batch read as nanoGPT reads it."""
    torch.manual_seed(0)
    memory.start()
    T, device = shape["block_size"], torch.device("cuda" if CUDA else "cpu")
    if CUDA:
        torch.backends.cuda.matmul.allow_tf32 = True
    vocab_size = -(-shape["vocab_size"] // 64) * 64
    recipe = Recipe((shape["n_layer"], shape["n_head"], shape["n_embd"], T, vocab_size), device)

    def call() -> None:
        tokens = np.memmap(Path(data) / "train.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - T, (batch_size,)).tolist()
        x, y = (
            torch.stack([torch.from_numpy(tokens[i + o : i + o + T].astype(np.int64)) for i in starts]).to(device)
            for o in (0, 1)
        )
        recipe.step([(x, y)])

    return call


def run_job(memory: Memory, argv: list[str], data: str) -> Callable[[], dict[str, Any]]:
    """A call is one update of train.py's Run with these arguments, on `data`."""
    overrides, _ = config.parse_argv(SCHEMAS, [*argv, f"--dataset={data}"], ROOT)
    machine = Machine.find()
    if not CUDA:
        be_deterministic(False)
    torch.compile(lambda x: x + 1)(torch.zeros(1, device=machine.device))  # the compiler is a library too
    memory.start()
    run = Run.open(overrides, tempfile.mkdtemp(dir=data), machine)
    facts = {"tokens": run.tokens_per_step, "flops": run.model.flops_per_token(run.model_config.block_size)}

    def call() -> dict[str, Any]:
        run.update()
        return facts

    return call


def matmul_job(memory: Memory, sizes: list[int]) -> Callable[[], dict[str, Any]]:
    """A call says the best FLOPs a second of a square matrix product, in bfloat16 where the machine has it."""
    machine = Machine.find().with_dtype("auto")
    matrices = {n: torch.randn(n, n, device=machine.device, dtype=machine.dtype) for n in sizes}

    def timed(matrix: torch.Tensor) -> float:
        start = time.perf_counter()
        matrix @ matrix
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return lambda: {"flops_per_s": max(2 * n**3 / min(timed(m) for _ in range(5)) for n, m in matrices.items())}


def arguments(shape: dict[str, int], batch_size: int, **more: Any) -> list[str]:
    """Command-line arguments of train.py for a shape; what the dataset says is left to it."""
    keys = {**shape, "batch_size": batch_size, "gradient_accumulation_steps": 1, "compile": True, **more}
    return [f"--{key}={value}" for key, value in keys.items() if key != "vocab_size"]


def bench_train(names: Iterable[str], rounds_of: Mapping[str, int]) -> dict[str, list[Row]]:
    """A row per model, of training and of the monitor."""
    rows, looks = [], []
    for name in names:
        shape, batch_size, rounds = SHAPES[name], BATCH[name], rounds_of[name]
        with tempfile.TemporaryDirectory() as data:
            random_tokens(data, shape["vocab_size"])
            jobs: dict[str, dict[str, Any]] = {
                "recipe": {"job": "recipe", "shape": shape, "batch_size": batch_size, "data": data},
                "ours": {"job": "run", "argv": arguments(shape, batch_size, monitor=0), "data": data},
                "watched": {"job": "run", "argv": arguments(shape, batch_size, monitor=1), "data": data},
                "matmul": {"job": "matmul", "sizes": [4096, 8192] if CUDA else [1024, 2048]},
            }
            said = measured(jobs, rounds, f"train {name}")
        tokens, flops = said["ours"][-1]["tokens"], said["ours"][-1]["flops"]
        ceiling = statistics.median(each["flops_per_s"] for each in said["matmul"])
        ratio, between = ratios(said["recipe"], said["ours"])
        peaks = {key: said[key][-1]["mb"] for key in ("recipe", "ours")}
        per_s = {key: tokens / seconds(said[key]) for key in ("recipe", "ours")}
        rows.append(
            {
                "model": name,
                "batch_size": batch_size,
                "T": shape["block_size"],
                "ratio": ratio,
                "ratio_range": between,
                "tokens_per_s": per_s["ours"],
                "recipe_tokens_per_s": per_s["recipe"],
                "matmul_flops_per_s": ceiling,
                "model_flops_use": flops * per_s["ours"] / ceiling,
                "recipe_model_flops_use": flops * per_s["recipe"] / ceiling,
                "peak_mb": peaks["ours"],
                "recipe_peak_mb": peaks["recipe"],
                "peak_ratio": peaks["ours"] / peaks["recipe"] if peaks["recipe"] else None,
            }
        )
        of_looks = [w["seconds"] - o["seconds"] for w, o in zip(said["watched"], said["ours"], strict=True)]
        look_s, step_s, every = statistics.median(of_looks), seconds(said["ours"]), TrainConfig.monitor
        row = {"model": name, "every": every, "step_s": step_s, "look_s": look_s, "share": look_s / step_s / every}
        looks.append({**row, "look_range_s": [min(of_looks), max(of_looks)]})
    return {"train": rows, "monitor": looks}


# -------------------------------------------------------------------------------------------------------- arms


def bench_arms() -> dict[str, list[Row]]:
    """A row per arm, each in turn with pre-norm."""
    baseline_name, *names = arm_names()
    rows = []
    with tempfile.TemporaryDirectory() as data, _bar("arms", ARM_ROUNDS * 2 * len(names)) as bar:
        random_tokens(data, SHAPES["10M"]["vocab_size"])
        job = lambda name: {"job": "run", "argv": [name, "scale/tiny", "--compile=True", "--monitor=0"], "data": data}
        with Worker(job(baseline_name)) as baseline:
            for name in names:
                with Worker(job(name)) as worker:
                    said = in_turn({baseline_name: baseline, name: worker}, ARM_ROUNDS, bar)
                ratio, between = ratios(said[name], said[baseline_name])
                of = {key: said[name][-1][key] / said[baseline_name][-1][key] for key in ("flops", "mb")}
                rows.append({"arm": name, "time": ratio, "time_range": between, "flops": of["flops"], "peak": of["mb"]})
    return {"arms": sorted(rows, key=lambda row: -row["time"])}


# ------------------------------------------------------------------------------------------------------ detect

LENGTHS, QUICK_LENGTHS = (512, 1024, 2048, 4096, 8192), (256,)
LONG: dict[str, Any] = {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 256,
    "vocab_size": 8192,
    "block_size": 32768,
    "position": "rope",
}
EAGER_LIMIT = 12e9  # bytes of attention maps: more is not tried
DETECT_ROUNDS = lambda T: 5 if T <= 2048 else 1


def gpt2(T: int, attention: str) -> Any:
    """A random transformers GPT-2 small for T tokens."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=T, use_cache=False)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@torch.no_grad()
def maps_of(model: Any, ids: torch.Tensor) -> None:
    """What most scripts do: all maps at once, then Gu et al.'s alpha."""
    out = model(ids, labels=ids, output_attentions=True)
    for attention in out.attentions:
        attention.sum(2) / torch.arange(ids.size(1), 0, -1)


def detect_job(memory: Memory, method: str, T: int) -> Callable[[], None]:
    """A call is one pass over a sequence of T tokens: plain, observe or eager."""
    torch.manual_seed(0)
    long = LONG["block_size"] == T
    ids = torch.randint(LONG["vocab_size"] if long else 50257, (1, T))
    one_pass: Callable[[], Any]
    if method == "eager":
        one_pass = functools.partial(maps_of, gpt2(T, "eager"), ids)
    else:
        subject = Subject.of_gpt(GPT(GPTConfig(**LONG)), str) if long else hf.subject_of(gpt2(T, "sdpa"), str)
        observing = functools.partial(observe, subject, ids, 1, progress=False)
        one_pass = observing if method == "observe" else functools.partial(subject.losses, ids)
    memory.start()

    def call() -> None:
        one_pass()

    return call


def map_bytes(T: int) -> int:
    """Bytes of all attention maps of the model at T tokens, in float32."""
    heads = LONG["n_layer"] * LONG["n_head"] if LONG["block_size"] == T else 12 * 12
    return 4 * heads * T * T


def bench_detect(lengths: Iterable[int], rounds_of: Callable[[int], int]) -> dict[str, list[Row]]:
    """A row per length."""
    rows = []
    for T in lengths:
        names = ["plain", "observe"]
        if map_bytes(T) < EAGER_LIMIT:
            names.append("eager")
        rounds = rounds_of(T)
        jobs = {name: {"job": "detect", "method": name, "T": T, "warm": rounds > 1} for name in names}
        said = measured(jobs, rounds, f"detect T={T}")
        ratio, between = ratios(said["observe"], said["plain"])
        rows.append(
            {
                "T": T,
                "model": "4 layers, 256 wide" if LONG["block_size"] == T else "GPT-2 small",
                **{f"{name}_s": seconds(said[name]) if name in said else None for name in DETECT_METHODS},
                "ratio": ratio,
                "ratio_range": between,
                **{f"{name}_mb": said[name][-1]["mb"] if name in said else None for name in DETECT_METHODS},
                "maps_mb": map_bytes(T) / 2**20,
            }
        )
    return {"detect": rows}


DETECT_METHODS = ("plain", "observe", "eager")


# --------------------------------------------------------------------------------------------------- all of it

JOBS: dict[str, Callable[..., Callable[[], dict[str, Any] | None]]] = {
    "recipe": recipe_job,
    "run": run_job,
    "matmul": matmul_job,
    "detect": detect_job,
}
QUICK_ROUNDS = {"10M": 3}
BENCHMARKS: dict[
    str, tuple[Callable[[], dict], Callable[[], dict]]
] = {  # name -> what is measured in full, what with --quick
    "train": (lambda: bench_train(SHAPES, TRAIN_ROUNDS), lambda: bench_train(QUICK_ROUNDS, QUICK_ROUNDS)),
    "detect": (
        lambda: bench_detect((*LENGTHS, LONG["block_size"]), DETECT_ROUNDS),
        lambda: bench_detect(QUICK_LENGTHS, lambda T: 3),
    ),
    "arms": (bench_arms, dict),
}
Form = str | Callable[[Row], str]
COLUMNS: dict[str, list[tuple[str, Form]]] = {  # table -> its columns: title, and how a row's fields are written
    "train": [
        ("train", "{model}"),
        ("batch x T", "{batch_size} x {T}"),
        ("tokens/s", "{tokens_per_s:,.0f}"),
        ("recipe's", "{recipe_tokens_per_s:,.0f}"),
        ("ratio", "{ratio:.2f}"),
        ("lowest, highest", "{ratio_range[0]:.2f}, {ratio_range[1]:.2f}"),
        ("FLOPs use", "{model_flops_use:.0%}"),
        ("recipe's", "{recipe_model_flops_use:.0%}"),
        ("matmul TFLOP/s", lambda row: f"{row['matmul_flops_per_s'] / 1e12:.2f}"),
        ("peak MB", "{peak_mb:,.0f}"),
        ("recipe's", "{recipe_peak_mb:,.0f}"),
        ("ratio", "{peak_ratio:.2f}"),
    ],
    "monitor": [
        ("monitor", "{model}"),
        ("step s", "{step_s:.3f}"),
        ("a look adds s", "{look_s:.3f}"),
        ("lowest, highest", "{look_range_s[0]:.3f}, {look_range_s[1]:.3f}"),
        ("share of the time", "{share:.2%}"),
        ("one look every", "{every} steps"),
    ],
    "arms": [
        ("arm", "{arm}"),
        ("time a token", "{time:.2f}"),
        ("lowest, highest", "{time_range[0]:.2f}, {time_range[1]:.2f}"),
        ("FLOPs a token", "{flops:.2f}"),
        ("peak memory", "{peak:.2f}"),
    ],
    "detect": [
        ("detect, T", "{T:,}"),
        ("model", "{model}"),
        ("plain s", "{plain_s:.3g}"),
        ("observe s", "{observe_s:.3g}"),
        ("ratio", "{ratio:.2f}"),
        ("lowest, highest", "{ratio_range[0]:.2f}, {ratio_range[1]:.2f}"),
        ("eager maps s", "{eager_s:.3g}"),
        ("plain MB", "{plain_mb:,.0f}"),
        ("observe MB", "{observe_mb:,.0f}"),
        ("eager MB", "{eager_mb:,.0f}"),
        ("all maps MB", "{maps_mb:,.0f}"),
    ],
}


def cell(form: Form, row: Row) -> str:
    """A row's fields in a cell; a dash where one was not measured."""
    try:
        return form.format_map(row) if isinstance(form, str) else form(row)
    except TypeError:  # None has no format
        return "–"


def table(name: str, rows: list[Row]) -> str:
    """The rows of a table as text in columns."""
    columns = COLUMNS[name]
    return grid([title for title, _ in columns], [[cell(form, row) for _, form in columns] for row in rows])


def _bar(text: str, total: int) -> tqdm:
    return tqdm(total=total, desc=text, unit="call", disable=None, leave=False)


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="under a minute on a CPU")
    flags.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    flags.add_argument("--json", metavar="FILE", help="where the numbers go")
    flags.add_argument("--worker", metavar="JOB", help=argparse.SUPPRESS)  # how it calls itself
    args = flags.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return
    names = args.only or [name for name in BENCHMARKS if name != "arms"]
    device = torch.cuda.get_device_name() if CUDA else platform.machine()
    found = {
        "machine": {
            **{"torch": torch.__version__, "python": platform.python_version(), "device": device},
            **{"cpu_threads": torch.get_num_threads(), "cpus": os.cpu_count()},
        }
    }
    for name in names:
        full, quick = BENCHMARKS[name]
        measured_now = quick() if args.quick else full()
        for key, rows in measured_now.items():
            print(f"{table(key, rows)}\n", flush=True)
        found |= measured_now
        if args.json:
            schema.save(args.json, found)


if __name__ == "__main__":
    cli(main)
