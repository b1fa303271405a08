"""Random weights of full-size shapes, filled in place: no second copy, no float32 detour."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from expertshare.config import ModelConfig
from expertshare.errors import InputError
from expertshare.experts.slab import SlabFormat
from expertshare.experts.slot_memory import allocate_slabs
from expertshare.kernels.quantise import scheme_named
from expertshare.measure.memory import available_memory_bytes
from expertshare.models import MoETransformer
from expertshare.models.moe import Router, lay_side_by_side
from expertshare.native import ask_for_huge_pages
from expertshare.types import ExpertBank, QuantisedBank

UNKNOWN_MEMORY_BYTES = 4 * 10**9
"""What may be used where the system does not say how much is free."""

CHUNK = 2**20


def memory_limit_bytes(gigabytes: float | None) -> int:
    """The limit as given, else three quarters of the memory that is free."""
    if gigabytes is not None:
        return int(gigabytes * 1e9)
    free = available_memory_bytes()
    return UNKNOWN_MEMORY_BYTES if free is None else free * 3 // 4


def check_memory(needed: int, limit: int, what: str, advice: str) -> None:
    """Raise InputError where `what` does not fit."""
    if needed > limit:
        raise InputError(
            f"{what} needs {needed / 1e9:.1f} GB, more than the limit of {limit / 1e9:.1f} GB: "
            f"{advice}, or raise --memory"
        )


def random_banks(
    *, count: int, num_experts: int, hidden: int, inner: int, dtype: torch.dtype, seed: int
) -> list[ExpertBank]:
    """`count` layers of experts whose outputs have about the size of their inputs."""
    generator = np.random.Generator(np.random.SFC64(seed))
    return [
        ExpertBank(
            fill(torch.empty(num_experts, 2 * inner, hidden, dtype=dtype), hidden**-0.5, generator),
            fill(torch.empty(num_experts, hidden, inner, dtype=dtype), inner**-0.5, generator),
        )
        for _ in range(count)
    ]


def in_slabs(bank: QuantisedBank, quantisation: str) -> QuantisedBank:
    """The bank copied to where stores have it: slab after slab, in huge pages."""
    down = bank.down
    group = 0 if down.bits == 8 else down.group_size
    form = SlabFormat(scheme=quantisation, hidden=down.rows, inner=down.depth, group_size=group)  # type: ignore[arg-type]
    lent = form.bank(allocate_slabs(len(down.codes_EPC), form.slab_bytes))
    assert isinstance(lent, QuantisedBank)
    for to, of in ((lent.gate_up, bank.gate_up), (lent.down, down)):
        to.codes_EPC.copy_(of.codes_EPC)
        to.scales_EPG.copy_(of.scales_EPG)
    return lent


def fill(tensor: Tensor, std: float, generator: np.random.Generator) -> Tensor:
    """Uniform values of mean 0 and standard deviation `std`, in place; by numpy, which is much faster at it here."""
    ask_for_huge_pages(tensor)
    edge, flat = std * math.sqrt(3.0), tensor.view(-1)
    chunk = np.empty(min(CHUNK, flat.numel()), dtype=np.float32)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        values = chunk[: part.numel()]
        generator.random(dtype=np.float32, out=values)
        part.copy_(torch.from_numpy(values).mul_(2.0 * edge).sub_(edge))
    return tensor


def random_model(config: ModelConfig, dtype: torch.dtype, seed: int, std: float = 0.02) -> MoETransformer:
    """A model in evaluation mode: norms one, selection biases zero, all else random. Routers compute in float32."""
    with torch.device("meta"):
        model = MoETransformer(config).to(dtype)
    for module in model.modules():
        if isinstance(module, Router):
            module.float()
    model = model.to_empty(device="cpu")
    lay_side_by_side([module for module in model.modules() if isinstance(module, Router)], dtype)
    if config.tie_embeddings and isinstance(model.embed, nn.Embedding) and isinstance(model.head, nn.Linear):
        model.head.weight = model.embed.weight
    generator = np.random.Generator(np.random.SFC64(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                fill(parameter, std, generator)
        for buffer in model.buffers():
            buffer.zero_()
    return model.requires_grad_(False).eval()


def model_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights that `random_model` makes."""
    with torch.device("meta"):
        model = MoETransformer(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def quantised_expert_bytes(config: ModelConfig, quantisation: str) -> int:
    """One expert's codes and scales. Raises ConfigError where the widths do not divide into the scheme's groups."""
    scheme, hidden, inner = scheme_named(quantisation), config.hidden_size, config.expert_hidden
    return scheme.num_bytes(2 * inner, hidden) + scheme.num_bytes(hidden, inner)
