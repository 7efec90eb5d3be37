"""Where a process runs, and how several train one model: device, autocast, ranks; DDP and FSDP2.

torchrun says in the environment which rank this is; without it there is one. What only one rank may do (read a
checkpoint, write) rank 0 does, and what it found reaches the others through `from_chief`.
"""

import contextlib
import ctypes
import dataclasses
import inspect
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous

from spikesink.errors import UserError, no_device

DTYPES = ("auto", "bfloat16", "float32")
PARALLEL = ("ddp", "fsdp")


def attempt():
    """How often torchrun has started this run again, after the death of a rank."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@dataclass(frozen=True)
class Machine:
    """Where this process runs: its device, the autocast dtype and its place among the ranks."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    parallel: str = "ddp"

    @classmethod
    def find(cls, device="auto", parallel="ddp"):
        """From the keys of a run and torchrun's environment. Raises UserError for a device that is not there."""
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        name = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            found = torch.device(name)
            torch.empty(1, device=found).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise no_device(device, error) from None
        if found.type == "cuda":
            torch.cuda.set_device(found)
            torch.set_float32_matmul_precision("high")
        else:
            keep_freed_memory()
        return cls(found, torch.float32, rank, world, parallel)

    def at(self, dtype):
        """The same machine computing in `dtype`, one of DTYPES; auto: bfloat16 where the hardware has it."""
        if dtype == "auto":
            dtype = "bfloat16" if has_bfloat16(self.device) else "float32"
        return dataclasses.replace(self, dtype=getattr(torch, dtype))

    @property
    def chief(self):
        """True on the rank that reads and writes for all."""
        return self.rank == 0

    @property
    def sharded(self):
        """True if every rank holds only its shard of the weights."""
        return self.world > 1 and self.parallel == "fsdp"

    @contextlib.contextmanager
    def joined(self):
        """The ranks talk to each other within the block."""
        if self.world > 1:
            # torchrun may give a restarted run the store of the one that died, with the addresses of the dead
            store = dist.PrefixStore(f"attempt-{attempt()}", next(rendezvous("env://"))[0])
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        try:
            yield
        except UserError as error:
            if error.everywhere:  # else the others are in the middle of something
                self._part()
            raise
        self._part()

    def _part(self):
        # gloo's group lives until errors.run ends the process: its destructor waits, holding Python's lock, for a
        # thread that may need that lock to let go of the last tensor
        if self.world > 1 and dist.get_backend() == "nccl":
            dist.destroy_process_group()

    def from_chief(self, function, *args):
        """What function(*args) returns on rank 0, on every rank; its UserError is raised on every rank."""
        if self.world == 1:
            return function(*args)
        told = [None]
        if self.chief:
            try:
                told = [function(*args)]
            except UserError as error:
                told = [error]
        dist.broadcast_object_list(told, src=0, device=self.device)
        if isinstance(told[0], UserError):
            told[0].everywhere = True
            raise told[0]
        return told[0]

    def autocast(self):
        """Mixed precision for the forward pass; weights, gradients and the residual stream stay float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum(self, value):
        """A tensor summed over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def shard(self, model, blocks):
        """Under FSDP2, leaves each rank its shard of every block and of the rest of the model, in place.

        Every rank must hold the same weights before. Optimisers are made after it.
        """
        if self.sharded:
            for block in blocks:
                fully_shard(block)
            fully_shard(model)

    def wrap(self, model):
        """What is called in training: under DDP the (perhaps compiled) model in its wrapper, else the model."""
        if self.world == 1 or self.sharded:
            return model
        ddp = torch.nn.parallel.DistributedDataParallel
        sync = {"forward_sync_buffers", "broadcast_buffers"} & set(inspect.signature(ddp).parameters)
        return ddp(model, **{max(sync): False})  # the new name of the option where torch has it; buffers are constants

    def accumulating(self, model, last):
        """Context of one micro-batch's passes through what `wrap` returned: gradients travel with the `last` only."""
        if self.sharded:
            model.set_requires_gradient_sync(last)
        elif self.world > 1 and not last:
            return model.no_sync()
        return contextlib.nullcontext()

    def gradient_norm(self, parameters, limit):
        """The norm of all gradients, which are then scaled down to `limit`; a float, the same on every rank."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = (norm.full_tensor() if self.sharded else norm).item()
        if norm > limit:  # else a pass over all of them is saved
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        return norm

    def state(self, model, optimizers):
        """(weights, optimiser state) by parameter name, whole and on the CPU; empty on the other ranks of several.

        Every rank must call it: shards are gathered.
        """
        weights, state = get_state_dict(model, optimizers, options=_WHOLE)
        first = {}  # shared weights stay shared in the file
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in weights:
                weights[name] = weights[first.setdefault(id(parameter), name)]
        return weights, state

    def restore(self, model, optimizers, weights, state):
        """Loads what `state` returned; only rank 0 need have it. Raises UserError if it does not fit."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.world > 1)
        try:
            if any(group.get("momentum", True) for optimizer in optimizers for group in optimizer.param_groups):
                set_optimizer_state_dict(model, optimizers, state, options=options)  # plain SGD has no state
            set_model_state_dict(model, weights, options=options)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"the checkpoint does not fit its own settings: {str(error).splitlines()[0]}") from None


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def keep_freed_memory():
    """Has glibc keep what is freed: else every large tensor of every step is mapped, zeroed and unmapped by the kernel.

    A tenth to a fifth of a training step on a CPU; does nothing where the C library is another.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def has_bfloat16(device):
    """True if the hardware multiplies bfloat16 matrices natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
