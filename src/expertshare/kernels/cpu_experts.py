"""Experts on the CPU by our own kernel (native/csrc): weights are read once, in place, and never copied."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from expertshare.errors import ConfigError
from expertshare.kernels.weights import check_codes, check_layout, projections, shape_of, tensors_of
from expertshare.native import calls
from expertshare.types import Arrivals, Bank, ExpertBank, QuantisedWeight, RoutingPlan


def moe_ffn_cpu(x_TD: Tensor, plan: RoutingPlan, bank: Bank, arrivals: Arrivals | None = None) -> Tensor:
    """As Backend.moe_ffn, for inference. Reads the weights of experts that the plan names and no others.

    arrivals: experts that are there are computed first, the others as they come, to the same bits.

    Sums over features and slots are float32, slots in order. With bfloat16 weights the hidden features (after SiLU
    and product, themselves float32) are rounded once to bfloat16. With quantised weights, which go with tokens of
    either dtype, tokens and hidden features are rounded to 8 bits with a float32 scale per 128 features, and products
    are summed as integers; a token with a NaN or an infinity gets NaN throughout. The result depends on the
    instruction set (that of quantised weights does not), but not on the number of threads or on the other tokens.
    Rows of the bank must be contiguous; the kernel needs no alignment beyond that of an element. Calls from several
    threads wait for each other; the interpreter lock is released.
    Raises ConfigError for what the kernel cannot take: gradients, another device or dtype, other layouts.
    """
    weights = _weights_of(bank)
    if torch.is_grad_enabled():
        calls.refuse_gradients(weights.tensors)
    tensors, shape, packed, dtype = (
        (x_TD, plan.expert_ids_TK, plan.weights_TK),
        weights.shape,
        weights.packed,
        weights.dtype,
    )
    if arrivals is not None:
        waited_ns = torch.zeros(1, dtype=torch.int64)
        try:
            coming = arrivals.states_S, waited_ns
            return calls.MOE_FFN(*tensors, *coming, given=shape, constants=packed, weights=dtype)[0]
        except calls.NotArrived:
            arrivals.wait()  # here, where an interrupt and an error get through
        finally:
            arrivals.waited(int(waited_ns) / 1e9)
    return calls.MOE_FFN(*tensors, None, None, given=shape, constants=packed, weights=dtype)[0]


def one_expert_cpu(x: Tensor, bank: ExpertBank) -> Tensor:
    """down(silu(gate x) * up x) of a bank with one expert, which is checked once if it is kept: the shape of x."""
    return moe_ffn_cpu(x, _of_all(math.prod(x.shape[:-1])), bank)


def swiglu_cpu(x: Tensor, gate_up_HD: Tensor, down_DF: Tensor) -> Tensor:
    """down(silu(gate x) * up x) with the gate rows first in gate_up: same shape and dtype as x [..., D]."""
    return one_expert_cpu(x, ExpertBank(gate_up_HD.unsqueeze(0), down_DF.unsqueeze(0)))


@lru_cache(maxsize=64)
def _of_all(num_tokens: int) -> RoutingPlan:
    """Every token uses expert 0."""
    ids_TK, weights_TK = torch.zeros(num_tokens, 1, dtype=torch.int64), torch.ones(num_tokens, 1)
    return RoutingPlan(ids_TK, weights_TK, torch.ones(1, dtype=torch.bool))


@dataclass(frozen=True, slots=True)
class _Weights:
    """A bank that was checked. packed: as the library reads it. shape: (experts, D, F). dtype: None if quantised.

    Between two calls for a layer all others have passed through the caches: every object that is touched again comes
    from memory, so what can be known beforehand is.
    """

    packed: bytes
    addresses: list[int]
    shape: tuple[int, int, int]
    dtype: torch.dtype | None
    tensors: list[Tensor]


_CHECKED: WeakKeyDictionary[Bank, _Weights] = WeakKeyDictionary()
"""Stores and layers lend the same bank for as long as they live; checking it takes 30 microseconds and more."""


def _weights_of(bank: Bank) -> _Weights:
    """Everything about a bank that would make the kernel read outside a tensor, or compute something else: once, unless
    its tensors were given other memory since."""
    known = _CHECKED.get(bank)
    if known is None or known.addresses != [tensor.data_ptr() for tensor in known.tensors]:
        known = _CHECKED[bank] = _checked(bank)
    return known


def _checked(bank: Bank) -> _Weights:
    weights = projections(bank)
    parts = [tensor for name, weight in weights.items() for tensor in tensors_of(name, weight).values()]
    devices = {tensor.device.type for tensor in parts}
    if devices != {"cpu"}:
        raise ConfigError(f"the backend 'cpu' expects weights on the CPU, got {', '.join(sorted(devices))}.")
    dtype = None
    if isinstance(bank, ExpertBank):
        dtype = bank.down_EDF.dtype
        if bank.gate_up_EHD.dtype != dtype:
            raise ConfigError(f"expected gate_up and down in one dtype, got {bank.gate_up_EHD.dtype} and {dtype}.")
    else:
        check_codes("gate_up", bank.gate_up)
        check_codes("down", bank.down)
    if any(tensor.dim() != 3 for tensor in parts):
        raise ConfigError(
            f"expected weights [E, rows, depth], got weights of shapes {[tuple(tensor.shape) for tensor in parts]}."
        )
    gate_up, (num_experts, hidden, inner) = (shape_of(weight) for weight in weights.values())
    if gate_up != (num_experts, 2 * inner, hidden) or 0 in (hidden, inner):
        raise ConfigError(
            f"rows and depth of gate_up do not fit down {(num_experts, hidden, inner)}: expected shape "
            f"{(num_experts, 2 * inner, hidden)}, got {gate_up}."
        )
    for name, weight in weights.items():
        check_layout(name, weight)
    shape = num_experts, hidden, inner
    packed = b"".join(_packed(weight) for weight in weights.values()) + struct.pack("3q", *shape)
    return _Weights(packed, [tensor.data_ptr() for tensor in parts], shape, dtype, parts)


def _packed(weight: Tensor | QuantisedWeight) -> bytes:
    """es_weight of native/csrc/abi.h: addresses, bytes from one expert to the next, format."""
    parts: tuple[Tensor | None, ...] = (
        (weight, None, None) if isinstance(weight, Tensor) else (weight.codes_EPC, weight.scales_EPG, weight.minima_EPG)
    )
    kind = (weight.element_size() * 8, 0) if isinstance(weight, Tensor) else (weight.bits, weight.group_size)
    addresses = [0 if part is None else part.data_ptr() for part in parts]
    strides = [0 if part is None else part.stride(0) * part.element_size() for part in parts]
    return struct.pack("3P3q2i", *addresses, *strides, *kind)
