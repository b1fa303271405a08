"""Experts on the CPU by our own kernel (native/csrc): weights are read once, where they lie, and never copied."""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import CDLL, Structure, byref, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels.native_weights import (
    NativeWeight,
    addresses,
    check_codes,
    check_layout,
    native_weight,
    projections,
    shape_of,
    tensors_of,
)
from expertshare.types import Arrivals, Bank, ExpertBank, QuantisedBank, RoutingPlan

_FLOATS = (torch.float32, torch.bfloat16)


class _Layer(Structure):
    """es_layer of native/csrc/abi.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "ids", "weights")),
        *((name, NativeWeight) for name in ("gate_up", "down")),
        *((name, c_void_p) for name in ("y", "arrivals", "waited_ns")),
        *((name, c_int64) for name in ("num_tokens", "top_k", "num_experts", "hidden", "inner")),
        ("is_bfloat16", c_int32),
        *native.HOW,
    )


def moe_ffn_cpu(x_TD: Tensor, plan: RoutingPlan, bank: Bank, arrivals: Arrivals | None = None) -> Tensor:
    """As moe_ffn_grouped, for inference. Reads the weights of experts that the plan names and no others.

    arrivals: experts that are there are computed first, the others as they come, to the same bits.

    Sums over features and slots are float32, slots in order. With bfloat16 weights the hidden features (after SiLU
    and product, themselves float32) are rounded once to bfloat16. With quantised weights, which go with tokens of
    either dtype, tokens and hidden features are rounded to 8 bits with a float32 scale per 128 features, and products
    are summed as integers; a token with a NaN or an infinity gets NaN throughout. The result depends on the
    instruction set (that of quantised weights does not), but not on the number of threads or on the other tokens.
    Rows of the bank must be contiguous; the kernel needs no alignment beyond that of an element. Calls from several
    threads take turns; the interpreter lock is released.
    Raises ConfigError for what the kernel cannot take: gradients, another device or dtype, other layouts.
    """
    library = _declared(native.library())
    weights = _weights_of(bank)
    if not _takes(weights, x_TD, plan):
        _check(x_TD, plan, bank, weights)
    x_TD, ids_TK, weights_TK = x_TD.contiguous(), plan.expert_ids_TK.contiguous(), plan.weights_TK.contiguous()
    y_TD = torch.empty_like(x_TD)
    given = (weights.layer, x_TD.data_ptr(), ids_TK.data_ptr(), weights_TK.data_ptr(), y_TD.data_ptr())
    how = (*ids_TK.shape, x_TD.dtype is torch.bfloat16, *native.crew())
    if arrivals is None or not _all_computed(library, given, how, arrivals, weights.shape[0]):
        _raise_for(_status(library, *given, None, None, *how), weights.shape[0])
    return y_TD


def _all_computed(
    library: CDLL, given: tuple[Any, ...], how: tuple[Any, ...], arrivals: Arrivals, num_rows: int
) -> bool:
    """Compute with experts as they come. False where some took too long and were waited for here instead, where an
    interrupt and an error get through: then nothing has been computed."""
    states_S, waited_ns = arrivals.states_S, c_int64()
    if states_S.dtype is not torch.uint8 or states_S.shape != (num_rows,) or not states_S.is_contiguous():
        raise ConfigError(
            f"expected states of arrivals in torch.uint8, one for each of {num_rows} rows, got {states_S.dtype} "
            f"{tuple(states_S.shape)}."
        )
    status = _status(library, *given, states_S.data_ptr(), byref(waited_ns), *how)
    arrivals.waited(waited_ns.value / 1e9)
    if status == _NOT_ARRIVED:
        arrivals.wait()
        return False
    _raise_for(status, num_rows)
    return True


_NOT_ARRIVED = 6  # ES_NOT_ARRIVED of csrc/abi.h


def _status(library: CDLL, *call: Any) -> int:
    status: int = library.es_moe_ffn(*call, -1)
    return library.es_moe_ffn(*call, native.isa_number()) if status == native.ISA_NAMED else status


@cache
def _declared(library: CDLL) -> CDLL:
    library.es_moe_ffn.argtypes = [*[c_void_p] * 7, c_int64, c_int64, c_int, c_int, c_void_p, c_int]
    return library


@dataclass(frozen=True, slots=True)
class _Weights:
    """A bank that was checked, as the library reads it. shape: (experts, D, F). dtypes: of tokens that go with it.

    Between two calls for a layer all others have passed through the caches: every object that is touched again comes
    from memory, so what can be known beforehand is.
    """

    layer: bytes
    memory: tuple[int | None, ...]
    shape: tuple[int, int, int]
    dtypes: tuple[torch.dtype, ...]


_CHECKED: WeakKeyDictionary[Bank, _Weights] = WeakKeyDictionary()
"""Stores and layers lend the same bank for as long as they live; checking it takes 30 microseconds and more."""


def _weights_of(bank: Bank) -> _Weights:
    """Everything about a bank that would make the kernel read outside a tensor, or compute something else: once, unless
    its tensors were given other memory since."""
    known = _CHECKED.get(bank)
    if known is None or known.memory != _memory(bank):
        known = _CHECKED[bank] = _checked(bank)
    return known


def _memory(bank: Bank) -> tuple[int | None, ...]:
    if isinstance(bank, ExpertBank):
        return bank.gate_up_EHD.data_ptr(), bank.down_EDF.data_ptr()
    return *addresses(bank.gate_up), *addresses(bank.down)


def _checked(bank: Bank) -> _Weights:
    weights = projections(bank)
    parts = [tensor for name, weight in weights.items() for tensor in tensors_of(name, weight).values()]
    _check_devices(parts)
    if isinstance(bank, QuantisedBank):
        check_codes("gate_up", bank.gate_up)
        check_codes("down", bank.down)
    if any(tensor.dim() != 3 for tensor in parts):
        raise ConfigError(
            "expected x [T, D], expert ids [T, K] and weights [E, rows, depth], got weights of shapes "
            f"{[tuple(tensor.shape) for tensor in parts]}."
        )
    gate_up, (num_experts, hidden, inner) = (shape_of(weight) for weight in weights.values())
    if gate_up != (num_experts, 2 * inner, hidden) or 0 in (hidden, inner):
        raise ConfigError(
            f"rows and depth of gate_up do not fit down {(num_experts, hidden, inner)}: expected shape "
            f"{(num_experts, 2 * inner, hidden)}, got {gate_up}."
        )
    for name, weight in weights.items():
        check_layout(name, weight)
    layer = _Layer(gate_up=native_weight(weights["gate_up"]), down=native_weight(weights["down"]))
    layer.num_experts, layer.hidden, layer.inner = num_experts, hidden, inner
    return _Weights(
        bytes(layer),
        _memory(bank),
        shape=(num_experts, hidden, inner),
        dtypes=_FLOATS if isinstance(bank, QuantisedBank) else (bank.down_EDF.dtype,),
    )


def _check_devices(tensors: Iterable[Tensor]) -> None:
    devices = {tensor.device.type for tensor in tensors}
    if devices != {"cpu"}:
        raise ConfigError(f"the expert backend 'cpu' expects tensors on the CPU, got {', '.join(sorted(devices))}.")


def _takes(weights: _Weights, x_TD: Tensor, plan: RoutingPlan) -> bool:
    """Whether `_check` would let these pass, at a fraction of its cost; with gradients enabled it is for `_check`."""
    ids_TK, weights_TK = plan.expert_ids_TK, plan.weights_TK
    shape = ids_TK.shape
    return (
        not torch.is_grad_enabled()
        and x_TD.is_cpu
        and ids_TK.is_cpu
        and weights_TK.is_cpu
        and x_TD.dtype in weights.dtypes
        and ids_TK.dtype is torch.int64
        and weights_TK.dtype is torch.float32
        and len(shape) == 2
        and weights_TK.shape == shape
        and x_TD.shape == (shape[0], weights.shape[1])
    )


def _check(x_TD: Tensor, plan: RoutingPlan, bank: Bank, weights: _Weights) -> None:
    """Raise ConfigError for tokens or a plan that do not fit the bank or each other."""
    ids_TK, weights_TK = plan.expert_ids_TK, plan.weights_TK
    parts = [tensor for name, weight in projections(bank).items() for tensor in tensors_of(name, weight).values()]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_TD, weights_TK, *parts)):
        raise ConfigError(
            "the expert backend 'cpu' has no gradients: call it under torch.no_grad(), or use the backend 'grouped'."
        )
    _check_devices((x_TD, weights_TK, ids_TK))
    _check_dtypes(x_TD, plan, bank)
    if x_TD.dim() != 2 or ids_TK.dim() != 2:
        raise ConfigError(
            f"expected x [T, D] and expert ids [T, K], got shapes {tuple(x_TD.shape)} and {tuple(ids_TK.shape)}."
        )
    expected = ((len(x_TD), weights.shape[1]), (len(x_TD), ids_TK.shape[1]), tuple(ids_TK.shape))
    got = (tuple(x_TD.shape), tuple(ids_TK.shape), tuple(weights_TK.shape))
    if expected != got:
        raise ConfigError(
            f"x, expert ids and weights do not fit down {weights.shape}: expected shapes {list(expected)}, got "
            f"{list(got)}."
        )


def _check_dtypes(x_TD: Tensor, plan: RoutingPlan, bank: Bank) -> None:
    if isinstance(bank, ExpertBank):
        dtypes = (x_TD.dtype, bank.gate_up_EHD.dtype, bank.down_EDF.dtype)
        if len(set(dtypes)) != 1 or dtypes[0] not in _FLOATS:
            raise ConfigError(
                "the expert backend 'cpu' expects tokens, gate_up and down all in float32 or all in bfloat16, got "
                f"{', '.join(map(str, dtypes))}: convert them, or use the backend 'grouped'."
            )
    elif x_TD.dtype not in _FLOATS:
        raise ConfigError(f"the expert backend 'cpu' expects tokens in float32 or bfloat16, got {x_TD.dtype}.")
    ids_TK, weights_TK = plan.expert_ids_TK, plan.weights_TK
    if (ids_TK.dtype, weights_TK.dtype) != (torch.int64, torch.float32):
        raise ConfigError(f"expected int64 expert ids and float32 weights, got {ids_TK.dtype} and {weights_TK.dtype}.")


def _raise_for(status: int, num_experts: int) -> None:
    if status == 0:
        return
    reasons = {
        1: f"expert ids must be -1 (unused) or 0 to {num_experts - 1}: the plan does not fit this bank",
        2: "not enough memory for the scratch of this call: pass fewer tokens at a time",
        3: f"{native.num_threads()} threads could not be started: set fewer with set_num_threads",
        4: "the instruction set cannot run here, or not with such weights",
    }
    raise ConfigError(f"the expert backend 'cpu' failed: {reasons[status]}.")
