"""The lab is the clone that made a checkpoint: its model.py and its datasets.

A checkpoint of train.py has weights and settings but no code, and needs the model.py of its fork. We know that file by
its line `CONTRACT = "spikesink-model-1"`, not by its name. We search the current folder and those above it, but accept
only a clone (with a train.py), and never the folder of the checkpoint: opening a stranger's folder must not run code.
"""

import ast
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import nn

from ..errors import UserError
from ..text.sequences import Split, validation_split
from ..text.token_files import Windows
from .checkpoint import Checkpoint

CONTRACT = "spikesink-model-1"  # names the interface of a model.py that Subject and the converters rely on
Build = Callable[[Checkpoint], nn.Module]


@dataclass(frozen=True)
class Lab:
    """The functions and data that a clone adds to the library.

    `build` makes a checkpoint's model, and raises the errors of GPT. `split` opens a dataset's validation split by
    name. `data` is the folder where ablate's probes find BLiMP and the treebank.
    """

    build: Build
    split: Split = validation_split
    data: Path = Path("data")
    contract: str = CONTRACT  # stated in the model.py


def contract_of(file: Path) -> str | None:
    """The contract that a Python file states; None without one, or if it cannot be parsed. The file is not run."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", None) for t in node.targets] == ["CONTRACT"]:
            return str(node.value.value) if isinstance(node.value, ast.Constant) else None
    return None


def find(start: Path | None = None) -> Path | None:
    """The file with our contract in `start` (by default the current folder) or the nearest folder above it. Raises
    UserError if a folder has more than one."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        files = [file for file in sorted(folder.glob("*.py")) if contract_of(file) == CONTRACT]
        if len(files) > 1:
            raise UserError(f"{files[0]} and {files[1]} both state {CONTRACT}: choose one with --model FILE")
        if files:
            return files[0]
    return None


def open_lab(file: str | Path | None, checkpoint: str | Path) -> Lab:
    """Opens the Lab of the model.py `file`, or of the current clone. Runs that file, and says so on stderr. Raises
    UserError if there is none, or if it states another contract."""
    path = Path(file) if file is not None else find()
    beside = path is not None and path.parent.resolve() == Path(checkpoint).resolve().parent
    if path is None or (file is None and (beside or not (path.parent / "train.py").is_file())):
        raise UserError(
            f"{checkpoint} is a checkpoint of train.py, which needs the model.py that made it: run this in its "
            "clone, or give --model path/to/model.py (its code is run)"
        )
    if not path.is_file():
        raise UserError(f"there is no file {path}; --model names the model.py that made the checkpoint")
    stated = contract_of(path)
    if stated != CONTRACT:
        statement = f"states {stated!r}" if stated else "states no CONTRACT"
        raise UserError(f"{path} is not a model.py for this version of spikesink: it {statement}, not {CONTRACT!r}")
    print(f"running {path}", file=sys.stderr)
    datasets = path.resolve().parent / "data"

    def split(name: str, block_size: int, bos: bool = False) -> Windows:
        here = datasets / name
        return validation_split(str(here) if (here / "val.bin").is_file() else name, block_size, bos)

    module = _module(path)
    if not hasattr(module, "GPT"):
        raise UserError(f"{path} has no class GPT")
    return Lab(module.GPT.from_checkpoint, split, datasets)


def _module(path: Path) -> ModuleType:
    name = f"spikesink_lab_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} does not run: {type(error).__name__}: {error}") from None
    return module
