"""Models larger than memory: their weights stay in the safetensors files, and each is read when its module runs.

accelerate does it, by a hook on every module that has weights of its own. Nothing is rewritten to disk, but where
transformers stores a model's weights otherwise than it computes with them (experts that are one file tensor each).
"""

import atexit
import contextlib
import importlib.util
import logging
import math
import shutil
import sys
import tempfile
from typing import Any

import torch
from torch import nn

from ..errors import UserError, extra

SHARE = 0.75  # of the memory that weights may take; the rest is for what is computed with them


def free_bytes(limit: float | None = None) -> float:
    """Memory that this process may still take, in bytes: what is free now, or what is left of `limit` GiB if less.

    Infinite where psutil is missing and no limit is given. Raises UserError where one is.
    """
    if limit is None and importlib.util.find_spec("psutil") is None:
        return math.inf
    with extra("hf"):
        import psutil
    left = math.inf if limit is None else limit * 2**30 - psutil.Process().memory_info().rss
    return max(0, min(left, psutil.virtual_memory().available))


def parameter_count(model: nn.Module) -> int:
    """How many parameters a model has. On disk, tied ones are tensors of their own; they too count once."""
    tied: Any = getattr(model, "all_tied_weights_keys", {})
    return sum(p.numel() for name, p in model.named_parameters() if not (p.is_meta and name in tied))


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters in float32, wherever they are."""
    return 4 * parameter_count(model)


def placement(kind: Any, config: Any, free: float, gguf: object = None) -> dict[str, Any]:
    """The arguments of `kind.from_pretrained` that leave the weights on disk; none where they fit into `free` bytes.

    `kind`: one of transformers' AutoModelFor... Raises UserError where they would have to stay on disk and accelerate
    is missing, or they are in a GGUF file, `gguf`.
    """
    if free == math.inf:
        return {}
    with torch.device("meta"):
        needed = parameter_bytes(kind.from_config(config))
    if needed <= SHARE * free:
        return {}
    short = f"the model needs {needed / SHARE / 2**30:.1f} GiB, {free / 2**30:.1f} are free, and"
    if gguf:
        raise UserError(f"{short} a GGUF file cannot be read part by part")
    if importlib.util.find_spec("accelerate") is None:
        raise UserError(
            f"{short} accelerate, which could read it from disk part by part, is missing: pip install 'spikesink[hf]'"
        )
    print(f"weights of {needed / 2**30:.1f} GiB are read from disk as the model runs", file=sys.stderr)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # which says the same
    return {"device_map": {"": "disk"}, "offload_folder": passing_folder()}


def passing_folder() -> str:
    """A new folder that is removed when Python ends."""
    folder = tempfile.mkdtemp(prefix="spikesink-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def weights_at_hand(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context manager within which the weights of this module, its parts aside, are in memory."""
    if not any(p.is_meta for p in module.parameters(recurse=False)):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def why_no_second_copy(model: nn.Module, free: float) -> str | None:
    """Why a second model like this one cannot be had in `free` bytes, in words; None if it can."""
    needed = parameter_bytes(model)
    if needed <= SHARE * free:
        return None
    return f"a second model of {needed / 2**30:.1f} GiB does not fit in the memory that is left"
