"""One process or several: torch's own FSDP2, launched by torchrun. Each process holds a shard of every layer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from expertshare.errors import TrainingError
from expertshare.training.config import DistillConfig

_LONGEST_WAIT = timedelta(days=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """The processes of a run. rank: number of this one among `count`; device: where it computes.

    One process is neither sharded nor connected.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def check(self, config: DistillConfig) -> None:
        """Refuse what cannot be shared out: TrainingError."""
        if self.count == 1:
            return
        if config.samples_per_step % self.count:
            raise TrainingError(
                f"samples_per_step must be a multiple of the {self.count} processes, got {config.samples_per_step}: "
                "every process runs the same number of forwards"
            )
        if config.optimiser == "muon":
            raise TrainingError(
                f"muon orthogonalises whole matrices, which {self.count} processes hold in shards: use --optimiser "
                "adamw, or one process"
            )

    def shard(self, module: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Shard every layer, then what is left of the module that holds them, over the processes."""
        if self.count == 1:
            return
        for layer in layers:
            fully_shard(layer)
        fully_shard(module)

    def total(self, *values: float) -> tuple[float, ...]:
        """Sums of the values over all processes."""
        return tuple(self.sum(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place where there are several."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor that processes may hold in parts, put together in each of them. All must ask."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def gather(self, module: nn.Module, optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
        """Whole tensors by name, on the CPU: of parameters, buffers and optimisers; empty but in process 0."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return {
            "model": get_model_state_dict(module, options=options),
            "optimisers": [get_optimizer_state_dict(module, o, options=options) for o in optimisers],
        }

    def scatter(self, module: nn.Module, optimisers: Sequence[torch.optim.Optimizer], state: dict[str, Any]) -> None:
        """Put back what `gather` returned; every process is given all of it."""
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(module, state["model"], options=options)
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            set_optimizer_state_dict(module, optimiser, saved, options=options)

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()


def connect(kind: str = "cpu") -> Processes:
    """Join the processes that torchrun started, by gloo on CPUs ("cpu") and nccl on GPUs ("cuda", one for each);
    without torchrun, one process. Raises TrainingError for another kind, or GPUs that are not there."""
    if kind not in ("cpu", "cuda"):
        raise TrainingError(f"the device must be cpu or cuda, got {kind!r}")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise TrainingError(f"expected a GPU for each process, found {torch.cuda.device_count()}: use --device cpu")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(device=device)
    if not dist.is_initialized():
        # The others wait while the first process answers the prompts, which may take longer than the default allows.
        dist.init_process_group("gloo" if kind == "cpu" else "nccl", timeout=_LONGEST_WAIT)
    return Processes(rank=dist.get_rank(), count=dist.get_world_size(), device=device)


def disconnect(processes: Processes) -> None:
    """Leave the group that `connect` joined, together."""
    if processes.count > 1:
        processes.wait()
        dist.destroy_process_group()
