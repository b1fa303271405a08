"""Backend "triton": kernels for GPUs, none of which asks the host; what they do not compute stays with torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from expertshare.errors import ConfigError
from expertshare.kernels.backend import check_excluded
from expertshare.kernels.torch_backend import TorchBackend
from expertshare.kernels.triton import check_devices, interpreted, power_of_two
from expertshare.kernels.triton.graphs import Graphs
from expertshare.kernels.triton.route import route_layer_triton
from expertshare.kernels.weights import check_layout, check_table, projections, shape_of, tensors_of
from expertshare.types import Arrivals, Bank, ExpertBank, QuantisedTable, QuantisedWeight, RoutingPlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS_AT_A_TIME = COLUMNS_AT_A_TIME = TILES_AT_A_TIME = 1024
PROGRAMS_PER_PROCESSOR = 2
PROGRAMS_INTERPRETED = 3
"""In the interpreter programs run one after the other; a few of them show that the tiles are divided well."""
MOST_ROWS = 64
FEWEST_ROWS = 16
"""A tensor core takes no less."""


class TritonBackend(TorchBackend):
    """For inference: routing, experts and the head.

    Raises ConfigError for gradients, dtypes other than float32, bfloat16 and float16, layouts that a kernel cannot
    read, and where Triton cannot run.
    """

    name = "triton"

    route = staticmethod(route_layer_triton)

    def graphs(self, device: torch.device) -> Graphs | str:
        """Graphs of CUDA where the device is a GPU, else why there are none."""
        return Graphs() if device.type == "cuda" else super().graphs(device)

    def moe_ffn(self, x_TD: Tensor, plan: RoutingPlan, bank: Bank, arrivals: Arrivals | None = None) -> Tensor:
        """In four kernels, of which none waits for the host and none touches an expert that nobody uses.

        Sums are float32: over features in the order of the tiles, over slots in their order, so that equal calls give
        equal bits. Hidden features are rounded once to the tokens' dtype. 8-bit weights enter as codes, the scale is
        applied to the sum; 4-bit weights are widened and rounded to the tokens' dtype. Products of float32 are not
        rounded to TF32. Each expert's rows must be contiguous. Ids that are no expert of the bank count as unused: to
        check them would need the host.
        """
        if arrivals is not None:
            arrivals.wait()
        weights = projections(bank)
        _check_experts(x_TD, plan, bank, weights)
        from expertshare.kernels.triton.device import experts as device

        num_experts, depth, inner = shape_of(weights["down"])
        num_tokens, top_k = plan.expert_ids_TK.shape
        if num_tokens == 0:
            return torch.empty_like(x_TD)
        x_TD, on = x_TD.contiguous(), x_TD.device
        ids_TK, weights_TK = plan.expert_ids_TK.contiguous(), plan.weights_TK.contiguous()
        num_pairs = ids_TK.numel()
        # pairs in the order of their experts; where each expert's begin, and how many there are
        scheduled = [torch.empty(size, dtype=torch.int32, device=on) for size in (num_pairs, num_experts, num_experts)]
        pairs_at_a_time = min(PAIRS_AT_A_TIME, power_of_two(num_pairs))
        device.schedule_kernel[(num_experts,)](ids_TK, *scheduled, num_pairs, PAIRS=pairs_at_a_time, num_warps=4)

        def project(name: Literal["gate_up", "down"], given: Tensor, width: int, dtype: torch.dtype) -> Tensor:
            made = torch.empty((num_pairs, width), dtype=dtype, device=on)
            sizes = {"NUM_EXPERTS": num_experts, "EXPERTSP": power_of_two(num_experts), "TOP_K": top_k}
            sizes |= {"DEPTH": given.shape[1], "WIDTH": width}
            tiles = tiles_for(name, num_tokens, given.shape[1], width, x_TD.dtype)
            most_tiles = min(num_pairs, num_experts + num_pairs // tiles.rows) * -(-width // tiles.columns)
            pointers, kind = _passed(weights[name])
            device.project_kernel[(min(_programs(on), most_tiles),)](
                given, made, *scheduled, *pointers, GATED=name == "gate_up", **sizes, **kind, **tiles.launch()
            )
            return made

        hidden_PF = project("gate_up", x_TD, inner, x_TD.dtype)
        out_PD = project("down", hidden_PF, depth, torch.float32)
        y_TD, columns = torch.empty_like(x_TD), min(COLUMNS_AT_A_TIME, power_of_two(depth))
        device.mix_kernel[(num_tokens, -(-depth // columns))](
            out_PD, ids_TK, weights_TK, y_TD, NUM_EXPERTS=num_experts, TOP_K=top_k, DEPTH=depth, BN=columns, num_warps=4
        )
        return y_TD

    def best_token(
        self, hidden_RD: Tensor, weight_VD: Tensor | QuantisedTable, excluded: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """In one pass over the vocabulary.

        Logits are rounded to the dtype of the hidden states, as if they were stored. An int8 table enters as codes; its
        scale is applied to the sum.
        """
        codes, scales, vocabulary = _checked_head(hidden_RD, weight_VD)
        check_excluded(excluded, vocabulary)
        from expertshare.kernels.triton.device import head as device

        (num_rows, depth), on = hidden_RD.shape, hidden_RD.device
        tokens_R = torch.empty(num_rows, dtype=torch.int64, device=on)
        probability_R = torch.empty(num_rows, dtype=torch.float32, device=on)
        if num_rows == 0:
            return tokens_R, probability_R
        tiles = tiles_for("head", num_rows, depth, vocabulary, hidden_RD.dtype)
        num_tiles = -(-vocabulary // tiles.columns)
        of_tiles = [
            torch.empty((num_tiles, num_rows), dtype=dtype, device=on)
            for dtype in (torch.float32, torch.int32, torch.float32)
        ]
        sizes = {"VOCABULARY": vocabulary, "DEPTH": depth, "NUM_EXCLUDED": len(excluded), **tiles.launch()}
        sizes["BITS"] = 8 if isinstance(weight_VD, QuantisedTable) else 0
        given = hidden_RD.contiguous(), codes, scales, _on_device(tuple(excluded), on)
        device.head_kernel[(num_tiles, -(-num_rows // tiles.rows))](*given, *of_tiles, num_rows, **sizes)
        sizes = {"NUM_TILES": num_tiles, "TILES": min(TILES_AT_A_TIME, power_of_two(num_tiles)), "num_warps": 4}
        device.best_of_tiles_kernel[(num_rows,)](*of_tiles, tokens_R, probability_R, num_rows, **sizes)
        return tokens_R, probability_R


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """How much a program multiplies at a time. rows: (token, expert) pairs. columns: outputs. depth: features, of which
    `stages` times as many are on their way.

    Chosen by arithmetic, for a card that is bound by memory: with up to 64 tokens every weight is read once, 16 to 32
    kB of weights are on their way per program, two programs share a multiprocessor. Nothing here was tuned on a GPU.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def launch(self) -> dict[str, int]:
        """As a kernel takes them."""
        sizes = {"BM": self.rows, "BN": self.columns, "BK": self.depth}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


def tiles_for(
    projection: Literal["gate_up", "down", "head"], num_tokens: int, depth: int, columns: int, dtype: torch.dtype
) -> Tiles:
    """num_tokens: of the call. One expert may serve all of them, so that up to MOST_ROWS fit into one tile: its weights
    are then read once. A gate_up tile multiplies two rows of weights for each column."""
    rows = min(MOST_ROWS, max(FEWEST_ROWS, power_of_two(num_tokens)))
    widest = 32 if projection == "gate_up" else 64
    deepest = 64 if dtype == torch.float32 else 128
    return Tiles(
        rows=rows,
        columns=min(widest, max(16, power_of_two(columns))),
        depth=min(deepest, max(32, power_of_two(depth))),
        warps=4,
        stages=3 if rows == MOST_ROWS else 4,
    )


def _passed(weight: Tensor | QuantisedWeight) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Codes (four bytes of them as one number), scales and minima, then the distance between experts in each; and their
    kind. What is not there is never read."""
    if isinstance(weight, Tensor):
        return (weight, weight, weight, weight.stride(0), 0, 0), {"BITS": 0, "GROUP": 0, "HAS_MINIMA": False}
    minima = weight.scales_EPG if weight.minima_EPG is None else weight.minima_EPG
    parts = weight.codes_EPC.view(torch.int32), weight.scales_EPG, minima
    kind = {"BITS": weight.bits, "GROUP": weight.group_size, "HAS_MINIMA": weight.minima_EPG is not None}
    return (*parts, *(part.stride(0) for part in parts)), kind


def _programs(device: torch.device) -> int:
    """Number of programs of a persistent grid: as many as run at once."""
    return PROGRAMS_INTERPRETED if interpreted() else PROGRAMS_PER_PROCESSOR * _processors(device)


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _on_device(excluded: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied once: a copy from the host inside a captured graph is an error. One entry at least; it may go unread."""
    return torch.tensor(excluded or (-1,), dtype=torch.int32, device=device)


def _check(what: str, floats: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Devices, gradients, and that all floats are in one dtype that a kernel takes."""
    check_devices(*floats, *others)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*floats, *others)):
        raise ConfigError("the backend 'triton' has no gradients: call it under torch.no_grad(), or use 'torch'.")
    dtypes = {tensor.dtype for tensor in floats}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise ConfigError(
            f"the backend 'triton' expects {what} in float32, bfloat16 or float16, got "
            f"{', '.join(sorted(map(str, dtypes)))}."
        )
    if interpreted() and torch.bfloat16 in dtypes:
        raise ConfigError("Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16 there.")


def _check_experts(x_TD: Tensor, plan: RoutingPlan, bank: Bank, weights: dict[str, Tensor | QuantisedWeight]) -> None:
    parts = [tensor for name, weight in weights.items() for tensor in tensors_of(name, weight).values()]
    ids_TK, weights_TK = plan.expert_ids_TK, plan.weights_TK
    floats, codes = ([x_TD, *parts], []) if isinstance(bank, ExpertBank) else ([x_TD], parts)
    _check("tokens and weights all", floats, [ids_TK, weights_TK, *codes])
    if (ids_TK.dtype, weights_TK.dtype) != (torch.int64, torch.float32):
        raise ConfigError(f"expected int64 expert ids and float32 weights, got {ids_TK.dtype} and {weights_TK.dtype}.")
    for name, weight in weights.items():
        check_layout(name, weight, backend="triton")
    num_experts, depth, inner = shape_of(weights["down"])
    expected = [(num_experts, 2 * inner, depth), (len(x_TD), depth), (len(x_TD), ids_TK.shape[-1])]
    got = [shape_of(weights["gate_up"]), tuple(x_TD.shape), tuple(weights_TK.shape)]
    if expected != got or ids_TK.shape != weights_TK.shape:
        raise ConfigError(
            f"gate_up, x and weights do not fit down {(num_experts, depth, inner)} and ids {tuple(ids_TK.shape)}: "
            f"expected shapes {expected}, got {got}."
        )


def _checked_head(hidden_RD: Tensor, weight_VD: Tensor | QuantisedTable) -> tuple[Tensor, Tensor, int]:
    """Weights, or codes (four bytes of them as one number) and scales, then the size of the vocabulary. The scales of
    floats are never read."""
    if isinstance(weight_VD, QuantisedTable):
        codes, scales, size = weight_VD.codes_PC, weight_VD.scales_PG, (weight_VD.num_rows, weight_VD.depth)
        _check("hidden states and head both", [hidden_RD], [codes, scales])
        check_table(weight_VD)
    else:
        codes = scales = weight_VD
        size = len(weight_VD), weight_VD.shape[-1]
        _check("hidden states and head both", [hidden_RD, weight_VD], [])
    if codes.dim() != 2 or hidden_RD.dim() != 2 or hidden_RD.shape[1] != size[1]:
        raise ConfigError(f"expected hidden states [R, D] and a head [V, D], got {tuple(hidden_RD.shape)} and {size}.")
    if not codes.is_contiguous():
        raise ConfigError("the backend 'triton' expects the head contiguous: make it so once, when it is loaded.")
    return (codes if scales is codes else codes.view(torch.int32)), scales, size[0]
