"""Experts on the CPU by our own kernel (native/csrc): weights are read once, where they lie, and never copied."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels.native_weights import (
    NativeWeight,
    check_codes,
    check_layout,
    native_weight,
    projections,
    shape_of,
    tensors_of,
)
from expertshare.types import Bank, ExpertBank, RoutingPlan


class _Layer(Structure):
    """es_layer of native/csrc/abi.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "ids", "weights")),
        *((name, NativeWeight) for name in ("gate_up", "down")),
        ("y", c_void_p),
        *((name, c_int64) for name in ("num_tokens", "top_k", "num_experts", "hidden", "inner")),
        *((name, c_int32) for name in ("is_bfloat16", "isa", "num_threads")),
        ("team", c_void_p),
    )


def moe_ffn_cpu(x_TD: Tensor, plan: RoutingPlan, bank: Bank) -> Tensor:
    """As moe_ffn_grouped, for inference. Reads the weights of experts that the plan names and no others.

    Sums over features and slots are float32, slots in order. With bfloat16 weights the hidden features (after SiLU
    and product, themselves float32) are rounded once to bfloat16. With quantised weights, which go with tokens of
    either dtype, tokens and hidden features are rounded to 8 bits with a float32 scale per 128 features, and products
    are summed as integers; a token with a NaN or an infinity gets NaN throughout. The result depends on the
    instruction set (that of quantised weights does not), but not on the number of threads or on the other tokens.
    Rows of the bank must be contiguous; the kernel needs no alignment beyond that of an element. Calls from several
    threads take turns; the interpreter lock is released.
    Raises ConfigError for what the kernel cannot take: gradients, another device or dtype, other layouts.
    """
    library = native.library()
    library.es_moe_ffn.argtypes = [POINTER(_Layer)]
    _check(x_TD, plan, bank)
    x_TD, ids_TK, weights_TK = x_TD.contiguous(), plan.expert_ids_TK.contiguous(), plan.weights_TK.contiguous()
    y_TD = torch.empty_like(x_TD)
    weights = projections(bank)
    num_experts, hidden, inner = shape_of(weights["down"])
    layer = _Layer(
        *(tensor.data_ptr() for tensor in (x_TD, ids_TK, weights_TK)),
        *(native_weight(weight) for weight in weights.values()),
        y_TD.data_ptr(),
        *ids_TK.shape,
        num_experts,
        hidden,
        inner,
        int(x_TD.dtype == torch.bfloat16),
        native.isa_number(),
        native.num_threads(),
        native.team(),
    )
    _raise_for(int(library.es_moe_ffn(byref(layer))), num_experts)
    return y_TD


def _check(x_TD: Tensor, plan: RoutingPlan, bank: Bank) -> None:
    """Everything that would make the kernel read outside a tensor, or compute something else."""
    ids_TK, weights_TK, weights = plan.expert_ids_TK, plan.weights_TK, projections(bank)
    parts = [tensor for name, weight in weights.items() for tensor in tensors_of(name, weight).values()]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_TD, weights_TK, *parts)):
        raise ConfigError(
            "the expert backend 'cpu' has no gradients: call it under torch.no_grad(), or use the backend 'grouped'."
        )
    devices = {tensor.device.type for tensor in (x_TD, weights_TK, ids_TK, *parts)}
    if devices != {"cpu"}:
        raise ConfigError(f"the expert backend 'cpu' expects tensors on the CPU, got {', '.join(sorted(devices))}.")
    _check_dtypes(x_TD, plan, bank)
    if any(tensor.dim() != 3 for tensor in parts) or x_TD.dim() != 2 or ids_TK.dim() != 2:
        raise ConfigError(
            "expected x [T, D], expert ids [T, K] and weights [E, rows, depth], got shapes "
            f"{tuple(x_TD.shape)}, {tuple(ids_TK.shape)} and {[tuple(tensor.shape) for tensor in parts]}."
        )
    gate_up, down = (shape_of(weight) for weight in weights.values())
    num_experts, hidden, inner = down
    expected = ((len(x_TD), hidden), (len(x_TD), ids_TK.shape[1]), ids_TK.shape, (num_experts, 2 * inner, hidden))
    got = (x_TD.shape, ids_TK.shape, weights_TK.shape, gate_up)
    if any(tuple(a) != tuple(b) for a, b in zip(expected, got, strict=True)) or 0 in (hidden, inner):
        raise ConfigError(
            f"x, expert ids, weights and gate_up do not fit down {down}: "
            f"expected shapes {[tuple(shape) for shape in expected]}, got {[tuple(shape) for shape in got]}."
        )
    for name, weight in weights.items():
        check_layout(name, weight)


def _check_dtypes(x_TD: Tensor, plan: RoutingPlan, bank: Bank) -> None:
    floats = (torch.float32, torch.bfloat16)
    if isinstance(bank, ExpertBank):
        dtypes = (x_TD.dtype, bank.gate_up_EHD.dtype, bank.down_EDF.dtype)
        if len(set(dtypes)) != 1 or dtypes[0] not in floats:
            raise ConfigError(
                "the expert backend 'cpu' expects tokens, gate_up and down all in float32 or all in bfloat16, got "
                f"{', '.join(map(str, dtypes))}: convert them, or use the backend 'grouped'."
            )
    else:
        if x_TD.dtype not in floats:
            raise ConfigError(f"the expert backend 'cpu' expects tokens in float32 or bfloat16, got {x_TD.dtype}.")
        check_codes("gate_up", bank.gate_up)
        check_codes("down", bank.down)
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
