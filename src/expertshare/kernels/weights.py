"""What weights must be for a kernel to read them in place: checked, so that it reads nothing outside a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels.quantise import check_panels, table_shapes
from expertshare.types import PANEL_ROWS, Bank, ExpertBank, QuantisedTable, QuantisedWeight


def projections(bank: Bank) -> dict[str, Tensor | QuantisedWeight]:
    """The two projections of a bank by name: gate_up and down."""
    if isinstance(bank, ExpertBank):
        return {"gate_up": bank.gate_up_EHD, "down": bank.down_EDF}
    return {"gate_up": bank.gate_up, "down": bank.down}


def tensors_of(name: str, weight: Tensor | QuantisedWeight) -> dict[str, Tensor]:
    """Every tensor of one projection, by the name that an error gives it."""
    if isinstance(weight, Tensor):
        return {name: weight}
    parts = {"codes": weight.codes_EPC, "scales": weight.scales_EPG, "minima": weight.minima_EPG}
    return {f"{part} of {name}": tensor for part, tensor in parts.items() if tensor is not None}


def shape_of(weight: Tensor | QuantisedWeight) -> tuple[int, ...]:
    """A projection's shape: [experts, rows, depth]."""
    if isinstance(weight, Tensor):
        return tuple(weight.shape)
    return *weight.codes_EPC.shape[:-2], weight.rows, weight.depth


def check_layout(name: str, weight: Tensor | QuantisedWeight, *, backend: str = "cpu") -> None:
    """Raises ConfigError unless the kernel can read every expert of the weights in place."""
    if isinstance(weight, QuantisedWeight):
        _check_codes(name, weight)
    for part, tensor in tensors_of(name, weight).items():
        if len(tensor) and not tensor[0].is_contiguous():
            raise ConfigError(
                f"the expert backend {backend!r} reads weights in place and expects each expert of {part} "
                f"contiguous, got strides {tensor.stride()} for shape {tuple(tensor.shape)}: make it contiguous once, "
                "when it is loaded."
            )
        if tensor.data_ptr() % tensor.element_size() != 0:
            raise ConfigError(f"{part} is not aligned to its elements of {tensor.element_size()} bytes: clone it.")


def _check_codes(name: str, weight: QuantisedWeight) -> None:
    """Raises ConfigError unless the number of bits is known, and dtypes and shapes are those of it."""
    of_bits = {8: (torch.int8, torch.float32), 4: (torch.uint8, torch.float16)}
    if weight.bits not in of_bits or (weight.bits == 8 and weight.minima_EPG is not None):
        raise ConfigError(f"expected {name} in 4 bits, or in 8 without minima, got {weight.bits} bits.")
    (code, scale), parts = of_bits[weight.bits], tensors_of(name, weight)
    dtypes = [tensor.dtype for tensor in parts.values()]
    if dtypes != [code, *[scale] * (len(parts) - 1)]:
        raise ConfigError(
            f"expected codes of {name} in {code} with scales and minima in {scale} for {weight.bits} bits, got "
            f"{', '.join(map(str, dtypes))}: quantise with kernels.quantise."
        )
    check_panels(weight.rows, weight.depth)
    depth, group = weight.depth, weight.depth if weight.bits == 8 else weight.group_size
    if weight.bits == 4 and (group not in (32, 64) or depth % group):
        raise ConfigError(f"expected {name} in groups of 32 or 64 that divide its depth {depth}, got {group}.")
    expected = (*weight.codes_EPC.shape[:-1], depth // max(1, group) * PANEL_ROWS)
    for part, tensor in list(parts.items())[1:]:
        if tuple(tensor.shape) != expected:
            raise ConfigError(f"expected shape {expected} for {part}, got {tuple(tensor.shape)}.")


def check_table(table: QuantisedTable) -> None:
    """Raises ConfigError unless an embedding or a head has int8 codes and float32 scales that fit each other, dense in
    memory."""
    codes, scales = table.codes_PC, table.scales_PG
    if (codes.dtype, scales.dtype) != (torch.int8, torch.float32):
        raise ConfigError(
            f"expected codes of head in torch.int8 with scales in torch.float32, got {codes.dtype} and {scales.dtype}: "
            "quantise with kernels.quantise.quantise_table."
        )
    if table.num_rows < 1 or codes.dim() != 2:
        raise ConfigError(f"expected codes of head [P, 16 * D], got {tuple(codes.shape)} for {table.num_rows} rows.")
    shapes = table_shapes(table.num_rows, table.depth)
    expected = (shapes["codes"][0], shapes["scales"][0])
    if expected != (tuple(codes.shape), tuple(scales.shape)):
        raise ConfigError(
            f"expected codes and scales of {expected} for {table.num_rows} rows, got {tuple(codes.shape)} and "
            f"{tuple(scales.shape)}."
        )
    if not (codes.is_contiguous() and scales.is_contiguous()) or scales.data_ptr() % 4 or codes.data_ptr() % 4:
        raise ConfigError("expected codes and scales of head contiguous and aligned to 4 bytes: clone them.")


def side_by_side(weights: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Memory for equal matrices, uninitialised: on the CPU one piece for all, in huge pages; elsewhere the weights.

    One alone is too small for these, and reading it, once a layer, would wait for an address every 4 KiB.
    """
    if not weights or not weights[0].is_cpu:
        return weights
    together = torch.empty((len(weights), *weights[0].shape), dtype=dtype)
    native.ask_for_huge_pages(together)
    return together.unbind()


def readable_in_bfloat16(weights: Sequence[Tensor]) -> bool:
    """Whether float32 weights of routers can be read as bfloat16: they lose nothing, and the native library has them,
    which does so on the CPU."""
    return native.available() and all(w.is_cpu and torch.equal(w.bfloat16().float(), w) for w in weights)
