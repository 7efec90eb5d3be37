"""Runs detect.py on a model of Llama-2-7B's shape, in less memory than half of its float32 weights need.

  python -m benchmarks.seven_b           takes about 15 minutes on 2 cores, and 13.5 GB of disk
  python -m benchmarks.seven_b --layers=8 --hidden=1024 --ffn=2752 --vocab=4000 --max_memory=1 --out=small.md
                                         tries it at a small size

The weights are random, in bfloat16 shards. We plant a spike as Sun et al. describe it: in one early gated FFN, one unit
responds quadratically to one token alone, and writes to one channel. Linux only (/proc).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from spikesink.measure.findings import Findings, Skipped
from spikesink.models import disk_weights, hf

ROOT = Path(__file__).resolve().parents[1]
LAYER, TOKEN, CHANNEL = 1, 7, 11  # where the spike is planted
N_SEQ, SEQ_LEN = 8, 64


def write_model(folder: Path, layers: int, hidden: int, ffn: int, vocab: int) -> None:
    """Writes a random Llama with the planted spike, in a shard per block, so that memory holds only one block."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: Any = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 128}
    shape |= {"intermediate_size": ffn, "vocab_size": vocab, "max_position_embeddings": 4096}
    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    blocks: dict[str, list[str]] = {}
    for name in shapes:
        block = re.match(r"model\.layers\.\d+", name)
        blocks.setdefault(block[0] if block else "", []).append(name)
    draw, mlp = torch.Generator().manual_seed(0), f"model.layers.{LAYER}.mlp"
    place: dict[str, str] = {}
    for i, names in enumerate(sorted(blocks.values())):
        tensors = {name: random_weight(name, shapes[name], layers, draw) for name in names}
        if "model.embed_tokens.weight" in tensors:
            direction = tensors["model.embed_tokens.weight"][TOKEN] / hidden**0.5
        if f"{mlp}.gate_proj.weight" in tensors:
            gate, up, down = (tensors[f"{mlp}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            gate[0] = up[0] = direction  # unit 0 responds to the token's direction
            down[CHANNEL, 0] = 0.5
        file = f"model-{i + 1:05d}-of-{len(blocks):05d}.safetensors"
        save_file({name: x.bfloat16() for name, x in tensors.items()}, folder / file, metadata={"format": "pt"})
        place.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_weight(name: str, shape: Sequence[int], layers: int, draw: torch.Generator) -> torch.Tensor:
    """A weight (out, in), or a norm's gain of ones. Embeddings have standard deviation 1 and updates are small, so that
    a token still has its direction when the planted FFN reads it."""
    if len(shape) == 1:
        return torch.ones(shape)
    std = 1.0 if "embed_tokens" in name else shape[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= (2 * layers) ** 0.5
    return torch.empty(shape).normal_(0.0, std, generator=draw)


def run_measured(command: list[str]) -> tuple[float, float, float, str]:
    """Runs a command. Returns (seconds, peak of its own memory in GiB, peak with mapped files in GiB, output)."""
    start = time.perf_counter()
    anonymous = peak = 0.0
    with tempfile.TemporaryFile("w+") as out, subprocess.Popen(command, cwd=ROOT, stdout=out) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            sizes = {key: int(value) for key, value in re.findall(r"(RssAnon|VmHWM):\s+(\d+) kB", status)}
            anonymous = max(anonymous, sizes.get("RssAnon", 0) / 2**20)
            peak = max(peak, sizes.get("VmHWM", 0) / 2**20)
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
        out.seek(0)
        return seconds, anonymous, peak, out.read()


def plain(folder: str, tokens: str, max_memory: int) -> None:
    """Opens a model as detect.py does, and prints the seconds of a forward pass without hooks."""
    model = hf.open_model(folder, free=disk_weights.free_bytes(max_memory))
    ids = torch.from_numpy(np.load(tokens))
    start = time.perf_counter()
    with torch.no_grad():
        model(ids)
    print(time.perf_counter() - start)


def report(args: argparse.Namespace, rows: list[tuple[str, float, float, float]], findings: Findings, size: int) -> str:
    """The text of the results file."""
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    anatomy, init = findings.anatomy, findings.nulls["init"]
    assert anatomy and anatomy.quadratic_form
    step, channel, form = anatomy.step_up, anatomy.channels[0], anatomy.quadratic_form.channels[0]
    skipped = f", of which\n`init` is skipped: {init.skipped}" if isinstance(init, Skipped) else ""
    table = "\n".join(f"| {name} | {s:.0f} | {own:.2f} | {peak:.2f} |" for name, s, own, peak in rows)
    return f"""# detect.py at the shape of a 7B model

    python detect.py FOLDER --tokens ids.npy --max_memory {args.max_memory}

Commit {commit.decode().strip()}, torch {torch.__version__}, transformers {transformers.__version__}, {args.machine}.
A Llama of {args.layers} layers, width {args.hidden}, FFN {args.ffn}, vocabulary {args.vocab}:
{findings.model["parameters"] / 1e9:.2f}B parameters, {size / 2**30:.1f} GiB in bfloat16 shards, twice that in float32.
Random weights with a planted spike; {N_SEQ} sequences of {SEQ_LEN} tokens.

| run | seconds | peak memory, GiB | with pages of mapped files, GiB |
|---|---|---|---|
{table}

Every pass reads the weights from their files and converts them to float32, one module at a time. detect.py makes 4
passes over 16 tokens to find the streams, one over the text to observe, one for the anatomy, and 4 for the
nulls{skipped}. Its seconds include the SHA-256 of the weights.

Planted: channel {CHANNEL}, by the FFN of block {LAYER}. Found: channel {channel.channel}, by {step.kind} \
{step.layer} for {step.tokens:.0%} of {anatomy.tokens} tokens, |h| {abs(channel.value):.0f}.
The FFN's quadratic form of that channel is {form.norm:.3g} times the median one,
and {form.dominance:.0%} of it has rank one.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 32), ("hidden", 4096), ("ffn", 11008), ("vocab", 32000), ("max_memory", 10)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    folder_help = "make a folder for the weights here, and delete it at the end (default: TMPDIR)"
    parser.add_argument("--folder", help=folder_help)
    machine = f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    parser.add_argument("--machine", default=machine, help="the machine's description in the results file")
    parser.add_argument("--out", type=Path, default=ROOT / "results/seven_b.md")
    parser.add_argument("--plain", nargs=2, help=argparse.SUPPRESS)  # runs `plain`, in its own process
    args = parser.parse_args()
    if args.plain:
        plain(args.plain[0], args.plain[1], args.max_memory)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, tokens, memory = Path(name), Path(name, "ids.npy"), f"--max_memory={args.max_memory}"
        write_model(folder, args.layers, args.hidden, args.ffn, args.vocab)
        ids = np.random.default_rng(0).integers(TOKEN + 1, args.vocab, (N_SEQ, SEQ_LEN))
        ids[::2, 0] = ids[::3, 20] = TOKEN  # first in every second sequence, and at position 20 in every third
        np.save(tokens, ids)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        detect = [sys.executable, "detect.py", name, f"--tokens={tokens}", memory]
        alone = [sys.executable, "-m", "benchmarks.seven_b", memory, "--plain", name, str(tokens)]
        seconds, own, peak, out = run_measured(alone)
        rows = [("opening, and a forward pass that nothing observes", seconds, own, peak)]
        rows += [("the forward pass alone", float(out), own, peak), ("`detect.py`", *run_measured(detect)[:3])]
        findings = Findings.load(folder / "detect.json")
    text = report(args, rows, findings, size)
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
