"""Opens datasets by name and reads batches. A batch is a pure function of (seed, step, rank, world size).

spikesink/text/token_files.py describes the files and their format.
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
    datasets = [place for place in places if any((place / f"{s}.bin").is_file() for s in ("train", "val"))]
    if len({place.resolve() for place in datasets}) == 2 and Path(dataset).name == dataset:
        raise UserError(f"{dataset} is a dataset here and another in {ROOT}: give ./{dataset} or {path}")
    if datasets:
        return datasets[0]
    known = sorted(p.parent.name for p in ROOT.glob("*/prepare.py"))
    if (path / "prepare.py").is_file():
        small = "; or --dataset=stdlib, which needs no download" if dataset == "openwebtext" else ""  # the default
        raise UserError(f"dataset {dataset!r} is not prepared; run: python data/{path.name}/prepare.py{small}")
    if Path(dataset).suffix == ".bin" and Path(dataset).is_file():
        raise UserError(f"{dataset} is one file of a dataset; give its folder, {Path(dataset).parent}")
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
    """Makes a self-made dataset unless it exists. If several processes need it, one makes it and the others wait.

    An old stdlib dataset without "split" in its meta.json is made again: it was split by document number, so that with
    another Python version the validation text could be in the training text.
    """
    files = [path / name for name in ("train.bin", "val.bin", "meta.json")]
    whole = lambda: all(file.is_file() for file in files) and (path.name != "stdlib" or "split" in meta_of(path))
    if whole():
        return
    with lock_of(path), contextlib.redirect_stdout(sys.stderr):  # stdout is for the command's own output
        if not whole():
            runpy.run_path(str(path / "prepare.py"))["prepare"]()


class Tokens(TokenFile):
    """A split of a dataset, by name or path. `batch(step)` returns x, y (int64, batch_size x block_size).

    Each epoch takes every window once, in an order that depends only on `seed`. The samples of a step are the same for
    any world size, so that runs on different machines are comparable. Raises UserError.
    """

    def __init__(self, dataset: str, split: str, block_size: int, bos: bool = False, seed: int = 0) -> None:
        super().__init__(folder(dataset), split, block_size, bos)
        self.seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)  # the windows of this epoch, in its order

    def _window(self, sample: int) -> int:
        """The window of sample number `sample`, which counts on over the epochs; each epoch is shuffled anew."""
        epoch, place = divmod(sample, self.n_windows)
        if self._epoch != epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n_windows)
        return int(self._order[place])

    def windows(self, step: int, n: int) -> list[int]:
        """The windows of step `step`, which takes n sequences over all micro-batches and ranks."""
        return [self._window(sample) for sample in range(step * n, (step + 1) * n)]

    def batch(
        self, step: int, batch_size: int, micro: int = 0, n_micro: int = 1, *, rank: int = 0, world: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, y of micro-batch `micro` of `n_micro`, at `step`, on `rank` of `world`."""
        return self.read(self.windows((step * n_micro + micro) * world + rank, batch_size))
