"""The bigram-backcopy task (Guo et al. 2024, "Active-dormant attention heads"): a positive control for sinks.

  python data/backcopy/prepare.py [--sequences=200000]

A sequence is BOS, then 64 characters. After an ordinary character the next one is drawn from the bigram statistics
of Python's own documentation; after a trigger the next one is a copy of the character before the trigger. A head
that copies after triggers has nothing to do elsewhere, and learns to put its attention on BOS.

With one layer and one head (configs/backcopy.py), a sink on BOS emerges by step 800, but no spike by any rule: the
largest entry is at most 23 times the median. A spike takes more than one layer. results/backcopy.md has three seeds.
"""

import pydoc_data.topics
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.writer import alone_in, finish_dataset
from spikesink.errors import Flags, UserError, cli

LENGTH = 64  # characters after BOS; train with block_size=64
ALPHABET = 63
TRIGGERS = "te "


def bigrams() -> tuple[str, np.ndarray]:
    """(characters by frequency, bigram probabilities (A, A)) of the documentation in lower case."""
    text = "".join(text for _, text in sorted(pydoc_data.topics.topics.items())).lower()
    codes = np.frombuffer(text.encode("ascii", "ignore"), dtype=np.uint8)
    chars = np.argsort(-np.bincount(codes, minlength=128), kind="stable")[:ALPHABET]
    rank = np.full(128, -1)
    rank[chars] = np.arange(ALPHABET)
    ids = rank[codes]
    ids = ids[ids >= 0]
    counts = np.zeros((ALPHABET, ALPHABET))
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    return "".join(map(chr, chars)), counts / counts.sum(1, keepdims=True)


def generate(n: int, probabilities: np.ndarray, is_trigger: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws n sequences of character ids: (n, LENGTH)."""
    cumulative = probabilities.cumsum(1)
    ordinary = np.flatnonzero(~is_trigger)
    out = np.empty((n, LENGTH), dtype=np.int64)
    out[:, 0] = rng.choice(ordinary, n)  # a trigger here would have nothing to copy
    for t in range(1, LENGTH):
        now = out[:, t - 1]
        drawn = (rng.random((n, 1)) > cumulative[now]).sum(1).clip(max=ALPHABET - 1)
        out[:, t] = np.where(is_trigger[now], out[:, max(t - 2, 0)], drawn)
    return out


def prepare(sequences: int = 200_000, seed: int = 0) -> None:
    """Writes train.bin, val.bin (a hundredth as many sequences) and meta.json beside this file."""
    chars, probabilities = bigrams()
    is_trigger = np.isin(list(chars), list(TRIGGERS))
    rng, sizes = np.random.default_rng(seed), {"train": sequences, "val": max(200, sequences // 100)}
    meta = {"dtype": "uint16", "vocab_size": ALPHABET + 1, "tokenizer": "chars", "chars": chars, "bos_id": ALPHABET}
    with alone_in(FOLDER):
        for split, n in sizes.items():
            with open(FOLDER / f"{split}.bin.part", "wb") as file:
                for start in range(0, n, 10_000):
                    rows = generate(min(10_000, n - start), probabilities, is_trigger, rng)
                    file.write(rows.astype("<u2").tobytes())
        finish_dataset(FOLDER, meta, {split: n * LENGTH for split, n in sizes.items()})


def main() -> None:
    flags = Flags(description=__doc__)
    flags.add_argument("--sequences", type=int, default=200_000, help="training sequences of 64 characters")
    sequences = flags.parse_args().sequences
    if sequences < 1:
        raise UserError(f"--sequences={sequences} must be at least 1")
    prepare(sequences)


if __name__ == "__main__":
    cli(main)
