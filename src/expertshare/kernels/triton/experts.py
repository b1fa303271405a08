"""Experts on the GPU: four kernels, of which none waits for the host and none touches an expert that nobody uses."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from expertshare.errors import ConfigError
from expertshare.kernels.triton.availability import check_devices, interpreted
from expertshare.kernels.triton.tiles import Tiles, power_of_two, tiles_for
from expertshare.kernels.weights import check_codes, check_layout, projections, shape_of, tensors_of
from expertshare.types import Bank, ExpertBank, QuantisedWeight, RoutingPlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS_AT_A_TIME = 1024
COLUMNS_AT_A_TIME = 1024
PROGRAMS_PER_PROCESSOR = 2
PROGRAMS_INTERPRETED = 3
"""In the interpreter programs run one after the other; a few of them show that the tiles are divided well."""


def moe_ffn_triton(x_TD: Tensor, plan: RoutingPlan, bank: Bank) -> Tensor:
    """As TorchBackend.moe_ffn, for inference, with a bank of floats (float32, bfloat16, float16) or of codes.

    Sums are float32: over features in the order of the tiles, over slots in their order, so that equal calls give equal
    bits. Hidden features are rounded once to the tokens' dtype. 8-bit weights enter as codes, the scale is applied to
    the sum; 4-bit weights are widened and rounded to the tokens' dtype. Products of float32 are not rounded to TF32.
    Rows of the bank must be contiguous. Ids that are no expert of the bank count as unused: to check them would need
    the host. Raises ConfigError for gradients, other dtypes or layouts, and where Triton cannot run.
    """
    weights = projections(bank)
    _check(x_TD, plan, bank, weights)
    num_experts, depth, inner = shape_of(weights["down"])
    num_tokens, top_k = plan.expert_ids_TK.shape
    if num_tokens == 0:
        return torch.empty_like(x_TD)
    return _run(x_TD.contiguous(), plan, weights, num_experts, depth, inner, top_k)


def _run(
    x_TD: Tensor,
    plan: RoutingPlan,
    weights: dict[str, Tensor | QuantisedWeight],
    num_experts: int,
    depth: int,
    inner: int,
    top_k: int,
) -> Tensor:
    from expertshare.kernels.triton.device import experts as device

    ids_TK, weights_TK = plan.expert_ids_TK.contiguous(), plan.weights_TK.contiguous()
    num_pairs = ids_TK.numel()
    order_P = torch.empty(num_pairs, dtype=torch.int32, device=x_TD.device)
    first_E, count_E = (torch.empty(num_experts, dtype=torch.int32, device=x_TD.device) for _ in range(2))
    device.schedule_kernel[(num_experts,)](
        ids_TK, order_P, first_E, count_E, num_pairs, PAIRS=min(PAIRS_AT_A_TIME, power_of_two(num_pairs)), num_warps=4
    )
    hidden_PF = torch.empty((num_pairs, inner), dtype=x_TD.dtype, device=x_TD.device)
    out_PD = torch.empty((num_pairs, depth), dtype=torch.float32, device=x_TD.device)
    scheduled = (order_P, first_E, count_E)
    experts = {"NUM_EXPERTS": num_experts, "EXPERTSP": power_of_two(num_experts)}
    sizes = {**experts, "DEPTH": depth, "INNER": inner}
    tiles = tiles_for("gate_up", len(x_TD), depth, inner, x_TD.dtype)
    device.gate_up_kernel[_grid(tiles, num_pairs, num_experts, inner, x_TD.device)](
        x_TD, hidden_PF, *scheduled, *_pointers(weights["gate_up"]), TOP_K=top_k, **sizes, **_kind(weights["gate_up"]),
        **tiles.launch(),
    )  # fmt: skip
    tiles = tiles_for("down", len(x_TD), inner, depth, x_TD.dtype)
    device.down_kernel[_grid(tiles, num_pairs, num_experts, depth, x_TD.device)](
        hidden_PF, out_PD, *scheduled, *_pointers(weights["down"]), **sizes, **_kind(weights["down"]), **tiles.launch()
    )
    y_TD = torch.empty_like(x_TD)
    columns = min(COLUMNS_AT_A_TIME, power_of_two(depth))
    device.mix_kernel[(len(x_TD), -(-depth // columns))](
        out_PD, ids_TK, weights_TK, y_TD, NUM_EXPERTS=num_experts, TOP_K=top_k, DEPTH=depth, BN=columns, num_warps=4
    )
    return y_TD


def _pointers(weight: Tensor | QuantisedWeight) -> tuple[Any, ...]:
    """Codes (four bytes of them as one number), scales and minima, then the distance between experts in each. What is
    not there is never read."""
    if isinstance(weight, Tensor):
        return weight, weight, weight, weight.stride(0), 0, 0
    minima = weight.scales_EPG if weight.minima_EPG is None else weight.minima_EPG
    words, scales = weight.codes_EPC.view(torch.int32), weight.scales_EPG
    return words, scales, minima, words.stride(0), scales.stride(0), minima.stride(0)


def _kind(weight: Tensor | QuantisedWeight) -> dict[str, Any]:
    if isinstance(weight, Tensor):
        return {"BITS": 0, "GROUP": 0, "HAS_MINIMA": False}
    return {"BITS": weight.bits, "GROUP": weight.group_size, "HAS_MINIMA": weight.minima_EPG is not None}


def _grid(tiles: Tiles, num_pairs: int, num_experts: int, columns: int, device: torch.device) -> tuple[int]:
    """As many programs as run at once, and no more than there can be tiles."""
    most_rows = min(num_pairs, num_experts + num_pairs // tiles.rows)
    return (min(num_programs(device), most_rows * -(-columns // tiles.columns)),)


def num_programs(device: torch.device) -> int:
    """Number of programs of a persistent grid."""
    return PROGRAMS_INTERPRETED if interpreted() else PROGRAMS_PER_PROCESSOR * _processors(device)


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _check(x_TD: Tensor, plan: RoutingPlan, bank: Bank, weights: dict[str, Tensor | QuantisedWeight]) -> None:
    parts = {name: tensor for of, weight in weights.items() for name, tensor in tensors_of(of, weight).items()}
    check_devices(x_TD, plan.expert_ids_TK, plan.weights_TK, *parts.values())
    wants_grad = x_TD.requires_grad or plan.weights_TK.requires_grad or any(t.requires_grad for t in parts.values())
    if torch.is_grad_enabled() and wants_grad:
        raise ConfigError(
            "the expert backend 'triton' has no gradients: call it under torch.no_grad(), or use the backend 'torch'."
        )
    floats = {x_TD.dtype} | ({t.dtype for t in parts.values()} if isinstance(bank, ExpertBank) else set())
    if len(floats) != 1 or x_TD.dtype not in DTYPES:
        raise ConfigError(
            "the expert backend 'triton' expects tokens and weights all in float32, bfloat16 or float16, got "
            f"{', '.join(sorted(map(str, floats)))}."
        )
    if interpreted() and x_TD.dtype == torch.bfloat16:
        raise ConfigError("Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16 there.")
    ids_TK, weights_TK = plan.expert_ids_TK, plan.weights_TK
    if (ids_TK.dtype, weights_TK.dtype) != (torch.int64, torch.float32):
        raise ConfigError(f"expected int64 expert ids and float32 weights, got {ids_TK.dtype} and {weights_TK.dtype}.")
    for name, weight in weights.items():
        if isinstance(weight, QuantisedWeight):
            check_codes(name, weight)
        check_layout(name, weight, backend="triton")
    num_experts, depth, inner = shape_of(weights["down"])
    expected = [(num_experts, 2 * inner, depth), (len(x_TD), depth), (len(x_TD), ids_TK.shape[-1])]
    got = [shape_of(weights["gate_up"]), tuple(x_TD.shape), tuple(weights_TK.shape)]
    if expected != got or ids_TK.shape != weights_TK.shape:
        raise ConfigError(
            f"gate_up, x and weights do not fit down {(num_experts, depth, inner)} and ids {tuple(ids_TK.shape)}: "
            f"expected shapes {expected}, got {got}."
        )
