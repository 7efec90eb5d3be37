"""Datasets by name -> batches. A batch is a pure function of (seed, step, rank, world size).

Files and their format: spikesink/text/token_files.py.
"""

import contextlib
import runpy
import sys
from pathlib import Path

import numpy as np
import torch

from data.writer import lock_of
from spikesink.errors import UserError, nearest
from spikesink.text.token_files import TokenFile, meta_of

ROOT = Path(__file__).parent
SELF_MADE = ("stdlib", "backcopy")  # datasets that need no download and are made on first use, in seconds


def folder(dataset: str) -> Path:
    """The folder of a dataset given by name (under data/) or as a path. Raises UserError with the command to run."""
    path = ROOT / dataset
    if dataset in SELF_MADE:
        make_once(path)
    places = [path] if dataset in SELF_MADE else [Path(dataset), path]
    held = {place.resolve() for place in places if any((place / f"{s}.bin").is_file() for s in ("train", "val"))}
    if len(held) == 2 and Path(dataset).name == dataset:
        raise UserError(f"{dataset} is a dataset here and another in {ROOT}: give ./{dataset} or {path}")
    if held:
        return next(place for place in places if place.resolve() in held)
    known = sorted(p.parent.name for p in ROOT.glob("*/prepare.py"))
    if (path / "prepare.py").is_file():
        small = "; or --dataset=stdlib, which needs no download" if dataset == "openwebtext" else ""  # the default
        raise UserError(f"dataset {dataset!r} is not prepared; run: python data/{path.name}/prepare.py{small}")
    if Path(dataset).suffix == ".bin" and Path(dataset).is_file():
        raise UserError(f"{dataset} is a part of a dataset; give its folder, {Path(dataset).parent}")
    if Path(dataset).is_file():
        raise UserError(
            f"{dataset} is a file, no dataset: python data/text/prepare.py --name=mine {dataset} makes one of it, to "
            "train on; detect.py and ablate.py read it as it is, with --text"
        )
    if Path(dataset).is_dir():
        raise UserError(
            f"{dataset} is no dataset: it holds no train.bin and val.bin, which a prepare.py of data/ makes"
        )
    raise UserError(f"there is no dataset {dataset!r}{nearest(dataset, known)}; known: {', '.join(known)}")


def make_once(path: Path) -> None:
    """Makes a self-made dataset unless it is there; of several processes one makes it and the others wait.

    One of Python's text that was split by number, of which another Python would validate on what was trained on, is
    made again.
    """
    files = [path / name for name in ("train.bin", "val.bin", "meta.json")]
    whole = lambda: all(file.is_file() for file in files) and (path.name != "stdlib" or "split" in meta_of(path))
    if whole():
        return
    with lock_of(path), contextlib.redirect_stdout(sys.stderr):  # a remark, not anyone's output
        if not whole():
            runpy.run_path(str(path / "prepare.py"))["prepare"]()


class Tokens(TokenFile):
    """One split of a dataset, by name or path, in batches: `batch(step)` gives x, y (int64, batch_size x block_size).

    Over an epoch every window is seen once, in an order that depends on `seed` alone; the samples of a step are the
    same whatever the world size, so arms and machines differ only where they are meant to. Raises UserError.
    """

    def __init__(self, dataset: str, split: str, block_size: int, bos: bool = False, seed: int = 0) -> None:
        super().__init__(folder(dataset), split, block_size, bos)
        self.seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)  # the windows of this epoch, in its order

    def _window(self, sample: int) -> int:
        """The window that sample number `sample` of the endless, epoch by epoch shuffled, sequence falls on."""
        epoch, place = divmod(sample, self.n_windows)
        if self._epoch != epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n_windows)
        return int(self._order[place])

    def windows(self, step: int, n: int) -> list[int]:
        """The windows of `step`, which takes n sequences over all micro-batches and ranks."""
        return [self._window(sample) for sample in range(step * n, (step + 1) * n)]

    def batch(
        self, step: int, batch_size: int, micro: int = 0, n_micro: int = 1, *, rank: int = 0, world: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, y of micro-batch `micro` of `n_micro`, at `step`, on `rank` of `world`."""
        first = ((step * n_micro + micro) * world + rank) * batch_size
        return self.read([self._window(sample) for sample in range(first, first + batch_size)])
