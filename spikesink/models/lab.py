"""The lab that made a checkpoint: its model.py, and its datasets.

A checkpoint of train.py holds weights and settings, no code; it belongs to the model.py of its fork. That file is known
by the line `CONTRACT = "spikesink-model-1"`, not by its name, and is looked for in the current folder and those above
it, in a clone (with a train.py), and never beside the checkpoint: who opens a folder that a stranger sent runs none of
its code unasked.
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
from ..text.token_files import TokenFile, Windows
from .checkpoint import Checkpoint

CONTRACT = "spikesink-model-1"  # what Subject and the converters rely on in a model.py


@dataclass(frozen=True)
class Lab:
    """What a clone adds to the library.

    `build`: a checkpoint -> its model; raises what GPT raises. `split`: a dataset's validation split by
    name. `data`: the folder in which BLiMP and the treebank are prepared for ablate's probes.
    """

    build: Callable[[Checkpoint], nn.Module]
    split: Split = validation_split
    data: Path = Path("data")
    contract: str = CONTRACT  # that the model.py states


def contract_of(file: Path) -> str | None:
    """The contract that a Python file states; None without one, or if it cannot be parsed. Nothing in it is run."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", None) for t in node.targets] == ["CONTRACT"]:
            return str(node.value.value) if isinstance(node.value, ast.Constant) else None
    return None


def find(start: Path | None = None) -> Path | None:
    """The file with our contract in a folder (by default the current one) or the nearest above it. Raises UserError
    where one folder holds several."""
    folder = (start or Path.cwd()).resolve()
    for place in (folder, *folder.parents):
        found = [file for file in sorted(place.glob("*.py")) if contract_of(file) == CONTRACT]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]} both state {CONTRACT}: say which with --model FILE")
        if found:
            return found[0]
    return None


def open_lab(file: str | Path | None, checkpoint: str | Path) -> Lab:
    """The Lab of a model.py: the one that is named, or that of the current clone. Its code is run, and that is said.

    Raises UserError where there is none, or it states another contract.
    """
    path = Path(file) if file is not None else find()
    beside = path is not None and path.parent.resolve() == Path(checkpoint).resolve().parent
    if path is None or (file is None and (beside or not (path.parent / "train.py").is_file())):
        raise UserError(
            f"{checkpoint} is a checkpoint of train.py, which needs the model.py that made it: call this in the clone "
            "it comes from, or give --model path/to/model.py (its code is run)"
        )
    if not path.is_file():
        raise UserError(f"there is no file {path}; --model names the model.py that made the checkpoint")
    stated = contract_of(path)
    if stated != CONTRACT:
        known = f"states {stated!r}" if stated else "states no CONTRACT"
        raise UserError(f"{path} is no model.py that this spikesink knows: it {known}, not {CONTRACT!r}")
    print(f"running {path}", file=sys.stderr)
    datasets = path.resolve().parent / "data"

    def split(name: str, block_size: int, bos: bool = False) -> Windows:
        folder = datasets / name
        return (
            TokenFile(folder, "val", block_size, bos)
            if (folder / "val.bin").is_file()
            else validation_split(name, block_size, bos)
        )

    module = _module(path)
    if not hasattr(module, "GPT"):
        raise UserError(f"{path} has no class GPT")
    return Lab(module.GPT.from_checkpoint, split, datasets)


def _module(path: Path) -> ModuleType:
    name = f"spikesink_lab_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} does not run: {type(error).__name__}: {error}") from None
    return module
