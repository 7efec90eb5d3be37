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

import psutil
import torch

from ..errors import UserError

SHARE = 0.75  # of the memory that weights may take; the rest is for what is computed with them


def room(limit=None):
    """Bytes of memory that this process may still take: what is free now, or what is left of `limit` GiB if less."""
    left = math.inf if limit is None else limit * 2**30 - psutil.Process().memory_info().rss
    return max(0, min(left, psutil.virtual_memory().available))


def count(model):
    """How many parameters a model has. On disk, tied ones are tensors of their own; they too count once."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return sum(p.numel() for name, p in model.named_parameters() if not (p.is_meta and name in tied))


def size(model):
    """Bytes of a model's parameters in float32, wherever they are."""
    return 4 * count(model)


def placement(kind, config, room):
    """The arguments of `kind.from_pretrained` that leave the weights on disk; none where they fit into `room` bytes.

    Raises UserError where they would have to stay there and accelerate is missing.
    """
    if room == math.inf:
        return {}
    with torch.device("meta"):
        model = kind.from_config(config)
    if size(model) <= SHARE * room:
        return {}
    if importlib.util.find_spec("accelerate") is None:
        needed, had = size(model) / SHARE / 2**30, room / 2**30
        raise UserError(
            f"the model needs {needed:.1f} GiB, {had:.1f} are free, and accelerate, which could read it "
            "from disk part by part, is missing: pip install -e .[hf]"
        )
    print(f"weights of {size(model) / 2**30:.1f} GiB are read from disk as the model runs", file=sys.stderr)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # which says the same
    folder = tempfile.mkdtemp(prefix="spikesink-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"device_map": {"": "disk"}, "offload_folder": folder}


def loaded(module):
    """A context manager within which the weights of this module, its parts aside, are at hand."""
    if not any(p.is_meta for p in module.parameters(recurse=False)):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def no_copy(model, room):
    """Why a second model like this one cannot be had in `room` bytes, in words; None if it can."""
    if size(model) <= SHARE * room:
        return None
    return f"a second model of {size(model) / 2**30:.1f} GiB does not fit in the memory that is left"
