"""Time and memory beside named baselines, measured in one run: what is compared runs in turn, so that noise cancels.

  python -m benchmarks.bench --quick                        under a minute: the small model, detection on a short text
  python -m benchmarks.bench --json results/bench.json      everything but the arms: a quarter of an hour on 2 cores
  python -m benchmarks.bench --only arms                    what each arm costs a token

train: updates of train.py's Run, as a run makes them, beside nanoGPT's recipe (recipe.py). ratio: its time over ours.
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
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.arms import arm_names
from benchmarks.nanogpt_recipe import Recipe
from model import GPT, GPTConfig
from spikesink import files
from spikesink.errors import Flags, cli
from spikesink.measure.observe import observe
from spikesink.models import hf
from spikesink.models.subject import Subject
from spikesink.show.text import grid, number
from train import ROOT, SCHEMAS, Run, TrainConfig, be_deterministic, ready
from trainer import config
from trainer.machine import Machine

CUDA = torch.cuda.is_available()

# ---------------------------------------------------------------------------------- a method in its own process


class Memory:
    """Peak memory in MB above that at the last `start`: the GPU's, or resident memory (Linux; elsewhere None)."""

    before = 0.0

    def start(self):
        """Counts from here."""
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self.before = self._status("VmRSS")

    def peak(self):
        """MB, or None where nothing tells."""
        if CUDA:
            return torch.cuda.max_memory_allocated() / 2**20 - self.before
        return self._status("VmHWM") - self.before if Path("/proc/self/clear_refs").exists() else None

    @staticmethod
    def _status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def work(job):
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

    def __init__(self, job):
        command = [sys.executable, "-m", "benchmarks.bench", "--worker", json.dumps(job)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def once(self):
        """{seconds, mb, ...} of one call."""
        print(file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self):
        for line in self.process.stdout:
            if line.startswith("{"):  # else a remark of a library
                return json.loads(line)
        raise RuntimeError(f"a worker of bench.py ended with exit code {self.process.wait()}")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.communicate()


def in_turn(workers, rounds, bar):
    """{name: [what each call said]} of {name: Worker}, one call of each a round."""
    said = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            said[name].append(worker.once())
            bar.update()
    return said


def measured(jobs, rounds, text):
    """The same of {name: job}, each in a worker that is started for it."""
    with contextlib.ExitStack() as stack, _bar(text, len(jobs) * rounds) as bar:
        return in_turn({name: stack.enter_context(Worker(job)) for name, job in jobs.items()}, rounds, bar)


def seconds(said):
    """Median seconds of a call."""
    return statistics.median(each["seconds"] for each in said)


def ratios(above, below):
    """(median, [lowest, highest]) of the ratio of two methods' seconds, round by round."""
    each = sorted(a["seconds"] / b["seconds"] for a, b in zip(above, below, strict=True))
    return statistics.median(each), [each[0], each[-1]]


# ------------------------------------------------------------------------------------------------------- train

SHAPES = {
    "10M": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 257},  # bytes and a BOS
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257},
}
BATCH = {"10M": 64, "124M": 12} if CUDA else {"10M": 16, "124M": 1}
TRAIN_ROUNDS, ARM_ROUNDS = {"10M": 12, "124M": 8}, 4


def random_tokens(folder, vocab_size):
    """A dataset of random tokens in `folder`: what is learned does not matter here."""
    for split, n in (("train", 2**21), ("val", 2**16)):
        np.random.default_rng(0).integers(vocab_size, size=n, dtype=np.uint16).tofile(Path(folder) / f"{split}.bin")
    meta = {"dtype": "uint16", "vocab_size": vocab_size, "train_tokens": 2**21, "val_tokens": 2**16, "bos_id": 0}
    (Path(folder) / "meta.json").write_text(json.dumps(meta))


def recipe_job(memory, shape, batch_size, data):
    """A call is one update of nanoGPT's recipe, its batch read as nanoGPT reads it."""
    torch.manual_seed(0)
    memory.start()
    T, device = shape["block_size"], torch.device("cuda" if CUDA else "cpu")
    if CUDA:
        torch.backends.cuda.matmul.allow_tf32 = True
    vocab_size = -(-shape["vocab_size"] // 64) * 64
    recipe = Recipe((shape["n_layer"], shape["n_head"], shape["n_embd"], T, vocab_size), device)

    def call():
        tokens = np.memmap(Path(data) / "train.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - T, (batch_size,)).tolist()
        x, y = (
            torch.stack([torch.from_numpy(tokens[i + o : i + o + T].astype(np.int64)) for i in starts]).to(device)
            for o in (0, 1)
        )
        recipe.step([(x, y)])

    return call


def run_job(memory, argv, data):
    """A call is one update of train.py's Run with these arguments, on `data`."""
    given, _ = config.given(SCHEMAS, [*argv, f"--dataset={data}", f"--out_dir={data}/run"], ROOT)
    machine = Machine.find()
    if not CUDA:
        be_deterministic(False)
    torch.compile(lambda x: x + 1)(torch.zeros(1, device=machine.device))  # the compiler is a library too
    memory.start()
    run_ = Run(*config.build(SCHEMAS, given), given, machine)
    model = ready(run_)
    facts = {"tokens": run_.tokens_per_step, "flops": run_.model.flops_per_token(run_.model_config.block_size)}

    def call():
        run_.update(model)
        return facts

    return call


def matmul_job(memory, sizes):
    """A call says the best FLOPs a second of a square matrix product, in bfloat16 where the machine has it."""
    machine = Machine.find().at("auto")
    matrices = {n: torch.randn(n, n, device=machine.device, dtype=machine.dtype) for n in sizes}

    def timed(matrix):
        start = time.perf_counter()
        matrix @ matrix
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return lambda: {"flops_per_s": max(2 * n**3 / min(timed(m) for _ in range(5)) for n, m in matrices.items())}


def arguments(shape, batch_size, **more):
    """Command-line arguments of train.py for a shape; what the dataset says is left to it."""
    keys = {**shape, "batch_size": batch_size, "gradient_accumulation_steps": 1, "compile": True, **more}
    return [f"--{key}={value}" for key, value in keys.items() if key != "vocab_size"]


def bench_train(names, rounds_of):
    """A row per model, of training and of the monitor."""
    rows, looks = [], []
    for name in names:
        shape, batch_size, rounds = SHAPES[name], BATCH[name], rounds_of[name]
        with tempfile.TemporaryDirectory() as data:
            random_tokens(data, shape["vocab_size"])
            jobs = {
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


def train_rows(rows):
    """(header, rows) of the training benchmark."""
    header = ["train", "batch x T", "tokens/s", "recipe's", "ratio", "lowest, highest", "FLOPs use", "recipe's"]
    header += ["matmul TFLOP/s", "peak MB", "recipe's", "ratio"]
    return header, [
        [
            r["model"],
            f"{r['batch_size']} x {r['T']}",
            f"{r['tokens_per_s']:,.0f}",
            f"{r['recipe_tokens_per_s']:,.0f}",
            f"{r['ratio']:.2f}",
            f"{r['ratio_range'][0]:.2f}, {r['ratio_range'][1]:.2f}",
            f"{r['model_flops_use']:.0%}",
            f"{r['recipe_model_flops_use']:.0%}",
            f"{r['matmul_flops_per_s'] / 1e12:.2f}",
            *(number(r[key], ",.0f") for key in ("peak_mb", "recipe_peak_mb")),
            number(r["peak_ratio"], ".2f"),
        ]
        for r in rows
    ]


def monitor_rows(rows):
    """(header, rows) of what the monitor costs."""
    header = ["monitor", "step s", "a look adds s", "lowest, highest", "share of the time", "one look every"]
    return header, [
        [
            r["model"],
            *(f"{r[key]:.3f}" for key in ("step_s", "look_s")),
            "{:.3f}, {:.3f}".format(*r["look_range_s"]),
            f"{r['share']:.2%}",
            f"{r['every']} steps",
        ]
        for r in rows
    ]


# -------------------------------------------------------------------------------------------------------- arms


def bench_arms():
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
    return {"arms": rows}


def arm_rows(rows):
    """(header, rows) of the arms, the dearest first."""
    header = ["arm", "time a token", "lowest, highest", "FLOPs a token", "peak memory"]
    return header, [
        [
            r["arm"],
            f"{r['time']:.2f}",
            f"{r['time_range'][0]:.2f}, {r['time_range'][1]:.2f}",
            *(f"{r[key]:.2f}" for key in ("flops", "peak")),
        ]
        for r in sorted(rows, key=lambda r: -r["time"])
    ]


# ------------------------------------------------------------------------------------------------------ detect

LENGTHS, QUICK_LENGTHS = (512, 1024, 2048, 4096, 8192), (256,)
LONG = {"n_layer": 4, "n_head": 4, "n_embd": 256, "vocab_size": 8192, "block_size": 32768, "position": "rope"}
EAGER_LIMIT = 12e9  # bytes of attention maps: more is not tried
DETECT_ROUNDS = lambda T: 5 if T <= 2048 else 1


def gpt2(T, attention):
    """A random transformers GPT-2 small for T tokens."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    shape = transformers.GPT2Config(n_positions=T, attn_implementation=attention, use_cache=False)
    return transformers.GPT2LMHeadModel(shape).eval()


@torch.no_grad()
def maps_of(model, ids):
    """What most scripts do: all maps at once, then Gu et al.'s alpha."""
    out = model(ids, labels=ids, output_attentions=True)
    for attention in out.attentions:
        attention.sum(2) / torch.arange(ids.size(1), 0, -1)


def detect_job(memory, method, T):
    """A call is one pass over a sequence of T tokens: plain, observe or eager."""
    torch.manual_seed(0)
    if LONG["block_size"] == T:
        subject, ids = Subject.of_gpt(GPT(GPTConfig(**LONG)), str), torch.randint(LONG["vocab_size"], (1, T))
    else:
        model, ids = gpt2(T, "eager" if method == "eager" else "sdpa"), torch.randint(50257, (1, T))
        subject = None if method == "eager" else hf.subject_of(model, str)
    memory.start()
    passes = {
        "plain": lambda: subject.losses(ids),
        "observe": lambda: observe(subject, ids, 1, progress=False),
        "eager": lambda: maps_of(model, ids),
    }

    def call():
        passes[method]()

    return call


def map_bytes(T):
    """Bytes of all attention maps of the model at T tokens, in float32."""
    heads = LONG["n_layer"] * LONG["n_head"] if LONG["block_size"] == T else 12 * 12
    return 4 * heads * T * T


def bench_detect(lengths, rounds_of):
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


def detect_rows(rows):
    """(header, rows) of the detect benchmark."""
    header = ["detect, T", "model", "plain s", "observe s", "ratio", "lowest, highest", "eager maps s", "plain MB"]
    header += ["observe MB", "eager MB", "all maps MB"]
    return header, [
        [
            f"{r['T']:,}",
            r["model"],
            *(number(r[key], ".3g") for key in ("plain_s", "observe_s")),
            f"{r['ratio']:.2f}",
            f"{r['ratio_range'][0]:.2f}, {r['ratio_range'][1]:.2f}",
            number(r["eager_s"], ".3g"),
            *(number(r[key], ",.0f") for key in ("plain_mb", "observe_mb", "eager_mb", "maps_mb")),
        ]
        for r in rows
    ]


# --------------------------------------------------------------------------------------------------- all of it

JOBS = {"recipe": recipe_job, "run": run_job, "matmul": matmul_job, "detect": detect_job}
QUICK_ROUNDS = {"10M": 3}
BENCHMARKS = {  # name -> what is measured in full, what with --quick
    "train": (lambda: bench_train(SHAPES, TRAIN_ROUNDS), lambda: bench_train(QUICK_ROUNDS, QUICK_ROUNDS)),
    "detect": (
        lambda: bench_detect((*LENGTHS, LONG["block_size"]), DETECT_ROUNDS),
        lambda: bench_detect(QUICK_LENGTHS, lambda T: 3),
    ),
    "arms": (bench_arms, dict),
}
ROWS = {"train": train_rows, "monitor": monitor_rows, "detect": detect_rows, "arms": arm_rows}


def _bar(text, total):
    return tqdm(total=total, desc=text, unit="call", disable=None, leave=False)


def main():
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
            print(f"{grid(*ROWS[key](rows))}\n", flush=True)
        found |= measured_now
        if args.json:
            files.save_json(args.json, found)


if __name__ == "__main__":
    cli(main)
