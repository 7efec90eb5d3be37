"""Where a process runs, and how several train one model: device, autocast, ranks; DDP and FSDP2.

torchrun says in the environment which rank this is; without it there is one. What only one rank may do (read a
checkpoint, write) rank 0 does, and what it found reaches the others through `on_rank0`.
"""

import contextlib
import ctypes
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from spikesink.errors import UserError, no_device

DTYPES = ("auto", "bfloat16", "float32")
PARALLEL = ("ddp", "fsdp")
T = TypeVar("T")


def attempt() -> int:
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
    def find(cls, device: str = "auto", parallel: str = "ddp") -> "Machine":
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

    def with_dtype(self, dtype: str) -> "Machine":
        """The same machine computing in `dtype`, one of DTYPES; auto: bfloat16 where the hardware has it."""
        if dtype == "auto":
            dtype = "bfloat16" if has_bfloat16(self.device) else "float32"
        return dataclasses.replace(self, dtype=getattr(torch, dtype))

    @property
    def is_rank0(self) -> bool:
        """True on the rank that reads and writes for all."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """True if every rank holds only its shard of the weights."""
        return self.world > 1 and self.parallel == "fsdp"

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
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

    def _part(self) -> None:
        # gloo's group lives until errors.run ends the process: its destructor waits, holding Python's lock, for a
        # thread that may need that lock to let go of the last tensor
        if self.world > 1 and dist.get_backend() == "nccl":
            dist.destroy_process_group()

    def on_rank0(self, function: Callable[..., T], *args: Any) -> T:
        """What function(*args) returns on rank 0, on every rank; its UserError is raised on every rank."""
        if self.world == 1:
            return function(*args)
        told: list[Any] = [None]
        if self.is_rank0:
            try:
                told = [function(*args)]
            except UserError as error:
                told = [error]
        dist.broadcast_object_list(told, src=0, device=self.device)
        if isinstance(told[0], UserError):
            told[0].everywhere = True
            raise told[0]
        return told[0]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision for the forward pass; weights, gradients and the residual stream stay float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum(self, value: Tensor) -> Tensor:
        """A tensor summed over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Under FSDP2, leaves each rank its shard of every block and of the rest of the model, in place.

        Every rank must hold the same weights before. Optimisers are made after it.
        """
        if self.sharded:
            for block in blocks:
                fully_shard(block)
            fully_shard(model)

    def wrap(self, model: nn.Module) -> nn.Module:
        """What is called in training: under DDP the (perhaps compiled) model in its wrapper, else the model."""
        if self.world == 1 or self.sharded:
            return model
        ddp: Any = torch.nn.parallel.DistributedDataParallel
        sync = {"forward_sync_buffers", "broadcast_buffers"} & set(inspect.signature(ddp).parameters)
        return ddp(model, **{max(sync): False})  # the new name of the option where torch has it; buffers are constants

    def accumulating(self, model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of one micro-batch's passes through what `wrap` returned: gradients travel with the `last` only."""
        if self.sharded:
            model.set_requires_gradient_sync(last)
        elif self.world > 1 and not last:
            return model.no_sync()
        return contextlib.nullcontext()

    def clip_gradients(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Scales all gradients down to a norm of `limit`. Returns the norm before, the same on every rank."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        norm = (total.full_tensor() if isinstance(total, DTensor) else total).item()
        if norm > limit:  # else a pass over all of them is saved
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        return norm

    def state(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(weights, optimiser state) by parameter name, whole and on the CPU; empty on the other ranks of several.

        Every rank must call it: shards are gathered.
        """
        weights, state = get_state_dict(model, optimizers, options=_WHOLE)
        first: dict[int, str] = {}  # shared weights stay shared in the file
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in weights:
                weights[name] = weights[first.setdefault(id(parameter), name)]
        return weights, state

    def restore(
        self, model: nn.Module, optimizers: Sequence[Optimizer], weights: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """Loads what `state` returned; only rank 0 need have it. Raises UserError if it does not fit."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.world > 1)
        try:
            if any(group.get("momentum", True) for optimizer in optimizers for group in optimizer.param_groups):
                set_optimizer_state_dict(model, optimizers, state, options=options)  # plain SGD has no state
            set_model_state_dict(model, weights, options=options)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"the checkpoint does not fit its own settings: {str(error).splitlines()[0]}") from None


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def keep_freed_memory() -> None:
    """Has glibc keep what is freed: else every large tensor of every step is mapped, zeroed and unmapped by the kernel.

    A tenth to a fifth of a training step on a CPU; does nothing where the C library is another.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def has_bfloat16(device: torch.device) -> bool:
    """True if the hardware multiplies bfloat16 matrices natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
