"""Experts on the CPU by our own kernel (native/csrc): weights are read once, where they lie, and never copied."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError
from expertshare.types import ExpertBank, RoutingPlan


class _Layer(Structure):
    """es_layer of native/abi.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "ids", "weights", "gate_up", "down", "y")),
        *((name, c_int64) for name in ("num_tokens", "top_k", "num_experts", "hidden", "inner")),
        *((name, c_int64) for name in ("gate_up_stride", "down_stride")),
        *((name, c_int32) for name in ("is_bfloat16", "isa", "num_threads")),
        ("team", c_void_p),
    )


def moe_ffn_cpu(x_TD: Tensor, plan: RoutingPlan, bank: ExpertBank) -> Tensor:
    """As moe_ffn_grouped, for inference. Reads the weights of experts that the plan names and no others.

    Sums over features and slots are float32, slots in order; with bfloat16 weights the hidden features (after SiLU
    and product, themselves float32) are rounded once to bfloat16. The result depends on the instruction set, but not
    on the number of threads or on the other tokens. Rows of the bank must be contiguous; the kernel needs no
    alignment beyond that of an element. Calls from several threads take turns; the interpreter lock is released.
    Raises ConfigError for what the kernel cannot take: gradients, another device or dtype, other layouts.
    """
    library = native.library()
    library.es_moe_ffn.argtypes = [POINTER(_Layer)]
    _check(x_TD, plan, bank)
    x_TD, ids_TK, weights_TK = x_TD.contiguous(), plan.expert_ids_TK.contiguous(), plan.weights_TK.contiguous()
    y_TD = torch.empty_like(x_TD)
    num_experts, hidden, inner = bank.down_EDF.shape
    layer = _Layer(
        *(tensor.data_ptr() for tensor in (x_TD, ids_TK, weights_TK, bank.gate_up_EHD, bank.down_EDF, y_TD)),
        *ids_TK.shape,
        num_experts,
        hidden,
        inner,
        bank.gate_up_EHD.stride(0),
        bank.down_EDF.stride(0),
        int(x_TD.dtype == torch.bfloat16),
        native.isa_number(),
        native.num_threads(),
        native.team(),
    )
    _raise_for(int(library.es_moe_ffn(byref(layer))), num_experts)
    return y_TD


def _check(x_TD: Tensor, plan: RoutingPlan, bank: ExpertBank) -> None:
    """Everything that would make the kernel read outside a tensor, or compute something else."""
    ids_TK, weights_TK, gate_up, down = plan.expert_ids_TK, plan.weights_TK, bank.gate_up_EHD, bank.down_EDF
    features = (x_TD, weights_TK, gate_up, down)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in features):
        raise ConfigError(
            "the expert backend 'cpu' has no gradients: call it under torch.no_grad(), or use the backend 'grouped'."
        )
    devices = {tensor.device.type for tensor in (*features, ids_TK)}
    if devices != {"cpu"}:
        raise ConfigError(f"the expert backend 'cpu' expects tensors on the CPU, got {', '.join(sorted(devices))}.")
    dtypes = (x_TD.dtype, gate_up.dtype, down.dtype)
    if len(set(dtypes)) != 1 or dtypes[0] not in (torch.float32, torch.bfloat16):
        raise ConfigError(
            "the expert backend 'cpu' expects tokens, gate_up and down all in float32 or all in bfloat16, got "
            f"{', '.join(map(str, dtypes))}: convert them, or use the backend 'grouped'."
        )
    if (ids_TK.dtype, weights_TK.dtype) != (torch.int64, torch.float32):
        raise ConfigError(f"expected int64 expert ids and float32 weights, got {ids_TK.dtype} and {weights_TK.dtype}.")
    if down.dim() != 3 or x_TD.dim() != 2 or ids_TK.dim() != 2:
        raise ConfigError(
            "expected x [T, D], expert ids [T, K] and down [E, D, F], got shapes "
            f"{tuple(x_TD.shape)}, {tuple(ids_TK.shape)} and {tuple(down.shape)}."
        )
    num_experts, hidden, inner = down.shape
    expected = ((len(x_TD), hidden), (len(x_TD), ids_TK.shape[1]), ids_TK.shape, (num_experts, 2 * inner, hidden))
    got = (x_TD.shape, ids_TK.shape, weights_TK.shape, gate_up.shape)
    if any(tuple(a) != tuple(b) for a, b in zip(expected, got, strict=True)) or 0 in (hidden, inner):
        raise ConfigError(
            f"x, expert ids, weights and gate_up do not fit down {tuple(down.shape)}: "
            f"expected shapes {[tuple(shape) for shape in expected]}, got {[tuple(shape) for shape in got]}."
        )
    _check_layout("gate_up", gate_up)
    _check_layout("down", down)


def _check_layout(name: str, weights: Tensor) -> None:
    if len(weights) and not weights[0].is_contiguous():
        raise ConfigError(
            f"the expert backend 'cpu' reads weights where they lie and expects each expert of {name} contiguous, got "
            f"strides {weights.stride()} for shape {tuple(weights.shape)}: make it contiguous once, when it is loaded."
        )
    if weights.data_ptr() % weights.element_size() != 0:
        raise ConfigError(f"{name} is not aligned to its elements of {weights.element_size()} bytes: clone it.")


def _raise_for(status: int, num_experts: int) -> None:
    if status == 0:
        return
    reasons = {
        1: f"expert ids must be -1 (unused) or 0 to {num_experts - 1}: the plan does not fit this bank",
        2: "not enough memory for the scratch of this call: pass fewer tokens at a time",
        3: f"{native.num_threads()} threads could not be started: set fewer with set_num_threads",
        4: "the instruction set cannot run here",
    }
    raise ConfigError(f"the expert backend 'cpu' failed: {reasons[status]}.")
