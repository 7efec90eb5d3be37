"""Runs models larger than memory: weights stay in the safetensors files, and are read when their module runs.

accelerate does this, with a hook on every module that has weights of its own. A copy is written to disk only where
transformers stores weights in another form than it computes with (such as one tensor per expert).
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

SHARE = 0.75  # the part of free memory that weights may take; activations need the rest


def free_bytes(limit: float | None = None) -> float:
    """Bytes of memory that this process may still take: the free memory, or the rest of `limit` GiB if that is less.
    Without psutil it is infinite, and raises UserError if there is a limit."""
    if limit is None and importlib.util.find_spec("psutil") is None:
        return math.inf
    with extra("hf"):
        import psutil
    remaining = math.inf if limit is None else limit * 2**30 - psutil.Process().memory_info().rss
    return max(0, min(remaining, psutil.virtual_memory().available))


def parameter_count(model: nn.Module) -> int:
    """How many parameters a model has. Tied parameters count once, also where they are two tensors on disk."""
    tied: Any = getattr(model, "all_tied_weights_keys", {})
    return sum(p.numel() for name, p in model.named_parameters() if not (p.is_meta and name in tied))


def placement(kind: Any, config: Any, free: float, gguf: object = None) -> dict[str, Any]:
    """The arguments of `kind.from_pretrained` that leave the weights on disk, or {} if they fit into `free` bytes.

    `kind`: an AutoModelFor... class of transformers. Raises UserError if they do not fit, and accelerate is missing or
    the model is a GGUF file, `gguf`.
    """
    if free == math.inf:
        return {}
    with torch.device("meta"):
        needed = 4 * parameter_count(kind.from_config(config))  # bytes in float32
    if needed <= SHARE * free:
        return {}
    short = f"the model needs {needed / SHARE / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free, and"
    if gguf:
        raise UserError(f"{short} a GGUF file cannot be read part by part")
    if importlib.util.find_spec("accelerate") is None:
        remedy = "pip install 'spikesink[hf]'"
        raise UserError(f"{short} accelerate, which could read it part by part, is missing: {remedy}")
    print(f"weights of {needed / 2**30:.1f} GiB are read from disk as the model runs", file=sys.stderr)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # its message says the same
    return {"device_map": {"": "disk"}, "offload_folder": temporary_folder()}


def temporary_folder() -> str:
    """Makes a folder that is removed when Python exits."""
    folder = tempfile.mkdtemp(prefix="spikesink-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def weights_at_hand(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context manager in which this module's own weights, without those of its submodules, are in memory."""
    if not any(p.is_meta for p in module.parameters(recurse=False)):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def why_no_second_copy(model: nn.Module, free: float) -> str | None:
    """Says why a second model like this one does not fit into `free` bytes; None if it fits."""
    needed = 4 * parameter_count(model)
    if needed <= SHARE * free:
        return None
    return f"a second model of {needed / 2**30:.1f} GiB does not fit in the memory that is left"
