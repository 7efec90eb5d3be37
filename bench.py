"""Time and memory beside named baselines, measured in one run so that a noisy machine is noisy for all.

  python bench.py --quick                   under two minutes: GPT-2 small's shape at T = 1024
  python bench.py --json bench.json         T = 512 ... 8192, and a small model at T = 32,768

detect: the observing pass (spikesink/observe.py) beside the plain forward pass with its loss, and beside what most
scripts do, transformers with attn_implementation="eager" and output_attentions=True, on one sequence, in float32.
Up to T = 2048 the three alternate, and a ratio is the median over rounds, with the lowest and the highest; beyond, each
runs once. Memory is the peak of resident memory above that of the loaded model, each method in a process of its own.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from model import GPT, GPTConfig
from spikesink import findings, hf
from spikesink.errors import Flags, run
from spikesink.observe import observe
from spikesink.subject import Subject
from spikesink.words import grid, number

LENGTHS, QUICK_LENGTHS = (512, 1024, 2048, 4096, 8192), (1024,)
LONG = {"n_layer": 4, "n_head": 4, "n_embd": 256, "vocab_size": 8192, "block_size": 32768, "position": "rope"}
EAGER_LIMIT = 12e9  # bytes of attention maps: more is not tried
ALTERNATED, ROUNDS = 2048, 5  # up to this length methods alternate for some rounds; beyond, each runs once
METHODS = ("plain", "observe", "eager")


def gpt2(T, attention):
    """A random transformers GPT-2 small for T tokens."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=T, attn_implementation=attention, use_cache=False)
    return transformers.GPT2LMHeadModel(config).eval()


@torch.no_grad()
def maps_of(model, ids):
    """What most scripts do: all maps at once, then Gu et al.'s alpha."""
    out = model(ids, labels=ids, output_attentions=True)
    T = ids.size(1)
    return [attention.sum(2) / torch.arange(T, 0, -1) for attention in out.attentions]


def methods(T):
    """{name: function without arguments} of one sequence of T tokens."""
    torch.manual_seed(0)
    if T not in LENGTHS:
        subject = Subject.of_gpt(GPT(GPTConfig(**LONG)), str)
        ids = torch.randint(LONG["vocab_size"], (1, T))
        return {"plain": lambda: subject.losses(ids), "observe": lambda: observe(subject, ids, 1, progress=False)}
    ids = torch.randint(50257, (1, T))
    subject = hf.subject_of(gpt2(T, "sdpa"), str)
    named = {"plain": lambda: subject.losses(ids), "observe": lambda: observe(subject, ids, 1, progress=False)}
    if map_bytes(T) < EAGER_LIMIT:
        named["eager"] = lambda: maps_of(eager, ids)
        eager = gpt2(T, "eager")
    return named


def map_bytes(T):
    """Bytes of all attention maps of the model at T tokens, in float32."""
    heads = LONG["n_layer"] * LONG["n_head"] if T not in LENGTHS else 12 * 12
    return 4 * heads * T * T


def times(T):
    """{method: seconds of each round}, alternating; the first round, not counted, warms up."""
    named, seconds = methods(T), {}
    for round_ in range(1 + ROUNDS):
        for name, function in named.items():
            start = time.perf_counter()
            function()
            if round_:
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    return seconds


def once(T, name):
    """Seconds of one call, and its peak resident memory above that before it, in MB (Linux; None elsewhere)."""
    function = methods(T)[name]
    linux = Path("/proc/self/clear_refs").exists()
    if linux:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    return {"seconds": [seconds], "mb": (_status("VmHWM") - before) / 1024 if linux else None}


def _status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])  # kB


def child(*arguments):
    """Runs this script for one measurement in a process of its own; its result."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def bench_detect(lengths):
    """A row per length."""
    rows = []
    for T in tqdm(lengths, desc="detect", disable=None):
        names = ["plain", "observe", *(["eager"] if T in LENGTHS and map_bytes(T) < EAGER_LIMIT else [])]
        alone = {name: child("once", T, name) for name in names}
        seconds = child("times", T) if T <= ALTERNATED else {name: alone[name]["seconds"] for name in names}
        ratios = sorted(o / p for o, p in zip(seconds["observe"], seconds["plain"], strict=True))
        rows.append(
            {
                "T": T,
                "model": "GPT-2 small" if T in LENGTHS else "4 layers, 256 wide",
                **{f"{name}_s": statistics.median(seconds[name]) if name in names else None for name in METHODS},
                "ratio": statistics.median(ratios),
                "ratio_range": [ratios[0], ratios[-1]],
                **{f"{name}_mb": alone[name]["mb"] if name in names else None for name in METHODS},
                "maps_mb": map_bytes(T) / 2**20,
            }
        )
    return rows


def detect_rows(rows):
    """(header, rows) of the detect benchmark."""
    header = [
        "T",
        "model",
        "plain s",
        "observe s",
        "ratio",
        "lowest, highest",
        "eager maps s",
        "plain MB",
        "observe MB",
    ]
    header += ["eager MB", "all maps MB"]
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


def main():
    flags = Flags(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="under two minutes")
    flags.add_argument("--json", metavar="FILE", help="where the numbers go")
    flags.add_argument("--child", nargs="+", help=argparse.SUPPRESS)  # how it calls itself
    args = flags.parse_args()
    if args.child:
        what, T, *rest = args.child
        print(json.dumps({"times": times, "once": once}[what](int(T), *rest)))
        return
    machine = {"torch": torch.__version__, "cpu_threads": torch.get_num_threads(), "cpus": os.cpu_count()}
    rows = bench_detect(QUICK_LENGTHS if args.quick else (*LENGTHS, LONG["block_size"]))
    found = {"machine": {**machine, "python": platform.python_version()}, "detect": rows}
    if args.json:
        findings.save(args.json, found)
    print(grid(*detect_rows(rows)))


if __name__ == "__main__":
    run(main)
