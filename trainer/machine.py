"""The device and autocast of a process, and how several processes (ranks) train one model with DDP or FSDP2.

torchrun sets the rank in the environment; without torchrun there is one rank. Only rank 0 reads and writes checkpoints,
and `on_rank0` passes its results to the other ranks.
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
    """How often torchrun has restarted this run because a rank died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@dataclass(frozen=True)
class Machine:
    """The device of this process, its autocast dtype and its rank."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    parallel: str = "ddp"

    @classmethod
    def find(cls, device: str = "auto", parallel: str = "ddp") -> "Machine":
        """The machine for the keys of a run and torchrun's environment. Raises UserError if the device is missing."""
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        name = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            torch_device = torch.device(name)
            torch.empty(1, device=torch_device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise no_device(device, error) from None
        if torch_device.type == "cuda":
            torch.cuda.set_device(torch_device)
            torch.set_float32_matmul_precision("high")
        else:
            keep_freed_memory()
        return cls(torch_device, torch.float32, rank, world, parallel)

    def with_dtype(self, dtype: str) -> "Machine":
        """The same machine with autocast to `dtype`, one of DTYPES; auto is bfloat16 if the hardware has it."""
        if dtype == "auto":
            dtype = "bfloat16" if has_bfloat16(self.device) else "float32"
        return dataclasses.replace(self, dtype=getattr(torch, dtype))

    @property
    def is_rank0(self) -> bool:
        """True on the rank that reads and writes for all ranks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """True if every rank holds only its shard of the weights."""
        return self.world > 1 and self.parallel == "fsdp"

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Connects the ranks within the block."""
        if self.world > 1:
            # torchrun may give a restarted run the store of the run that died, with the addresses of its ranks
            store = dist.PrefixStore(f"attempt-{attempt()}", next(rendezvous("env://"))[0])
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        try:
            yield
        except UserError as error:
            if error.everywhere:  # otherwise the other ranks are still at work
                self._disconnect()
            raise
        self._disconnect()

    def _disconnect(self) -> None:
        # gloo's group lives until errors.run ends the process. Its destructor waits for a thread while it holds
        # Python's lock, and that thread may need the lock to free the last tensor.
        if self.world > 1 and dist.get_backend() == "nccl":
            dist.destroy_process_group()

    def on_rank0(self, function: Callable[..., T], *args: Any) -> T:
        """Calls function(*args) on rank 0, and returns its result or raises its UserError on every rank."""
        if self.world == 1:
            return function(*args)
        message: list[Any] = [None]
        if self.is_rank0:
            try:
                message = [function(*args)]
            except UserError as error:
                message = [error]
        dist.broadcast_object_list(message, src=0, device=self.device)
        if isinstance(message[0], UserError):
            message[0].everywhere = True
            raise message[0]
        return message[0]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision for the forward pass; weights, gradients and the residual stream stay float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum(self, value: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """With FSDP2, reduces the model in place to this rank's shard of every block and of the rest. Every rank must
        have the same weights before. Make the optimisers after it."""
        if self.sharded:
            for block in blocks:
                fully_shard(block)
            fully_shard(model)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in training: with DDP a wrapper around the model, else the model."""
        if self.world == 1 or self.sharded:
            return model
        ddp: Any = torch.nn.parallel.DistributedDataParallel
        sync = {"forward_sync_buffers", "broadcast_buffers"} & set(inspect.signature(ddp).parameters)
        return ddp(model, **{max(sync): False})  # the option's newer name if torch has it; buffers are constants

    def accumulating(self, model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        """A context for a micro-batch's passes through the wrapped model. Only the `last` one syncs gradients."""
        if self.sharded:
            model.set_requires_gradient_sync(last)
        elif self.world > 1 and not last:
            return model.no_sync()
        return contextlib.nullcontext()

    def clip_gradients(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Scales all gradients down to a norm of `limit`. Returns their norm before that, the same on every rank."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        norm = (total.full_tensor() if isinstance(total, DTensor) else total).item()
        if norm > limit:  # otherwise multiplying would cost a pass over all gradients
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        return norm

    def state(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(weights, optimiser state) by parameter name, gathered on the CPU of rank 0; empty on the other ranks. Every
        rank must call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, state = get_state_dict(model, optimizers, options=options)
        first: dict[int, str] = {}  # shared weights stay shared in the file
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in weights:
                weights[name] = weights[first.setdefault(id(parameter), name)]
        return weights, state

    def restore(
        self, model: nn.Module, optimizers: Sequence[Optimizer], weights: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """Loads the result of `state`, which only rank 0 needs to have. Raises UserError if it does not fit."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.world > 1)
        try:
            if any(group.get("momentum", True) for optimizer in optimizers for group in optimizer.param_groups):
                set_optimizer_state_dict(model, optimizers, state, options=options)  # plain SGD has no state
            set_model_state_dict(model, weights, options=options)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"the checkpoint does not fit its own settings: {str(error).splitlines()[0]}") from None


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory. Otherwise the kernel maps, zeroes and unmaps every large tensor of every step.
    That would cost a tenth to a fifth of a training step on a CPU. With another C library this does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def has_bfloat16(device: torch.device) -> bool:
    """True if the hardware multiplies bfloat16 matrices natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
