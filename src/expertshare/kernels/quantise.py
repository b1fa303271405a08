"""Weights as small integers: int8 with a scale per row, 4 bit with a scale (and a minimum) per group of a row.

Symmetric groups of 32 are the default of 4 bit: at 4.5 bits a weight they err less than groups of 64 with a minimum,
which take as much (benchmarks/quantisation_error.py), and cost the kernel an instruction less.

Codes of 4 bits lie two a byte within their group: byte j of a group of N holds code j in its low half and code
j + N/2 in its high half, so that a kernel gets both runs of neighbours by one mask and one shift.

Experts lie in panels of 16 rows: four bytes of the first row, the same four of the second, and so on; then the next
four of each. So a vector of 16 lanes multiplies 16 rows by the same features of a token, and no sum has to be added up
across lanes. An embedding or a head in 8 bits lies so too, with rows of zeros at its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.errors import ConfigError, NumericsError, nearest
from expertshare.types import PANEL_ROWS, ExpertBank, QuantisedBank, QuantisedTable, QuantisedWeight, RoutingPlan

GROUP_SIZES = (32, 64)
"""Weights that share a scale of 4 bits."""
# What the largest code stands for, over the largest weight of its group: the candidates for a scale. These take 4 % off
# the error of an expert layer with Gaussian weights and 3 % off that of the reference model. With 0.9 among them the
# weights' own error falls as far, but layers of the reference model err 17 % more (benchmarks/quantisation_error.py).
CLIPS = (1.0, 0.95, 1.05)
# Weights quantised at a time: temporaries of a few of them stay in the cache, and far below 100 MB.
_WEIGHTS_AT_A_TIME = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How weights are stored. bits 8: symmetric, a float32 scale per row, group_size None. bits 4: a float16 scale
    per group of 32 or 64, and unless symmetric a float16 minimum. Raises ConfigError for anything else."""

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        rows_of_8 = (self.bits, self.group_size, self.symmetric) == (8, None, True)
        if not rows_of_8 and (self.bits != 4 or self.group_size not in GROUP_SIZES):
            raise ConfigError(
                "expected 8 bits, symmetric, without groups, or 4 bits in groups of 32 or 64, got "
                f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}."
            )

    def layout(self, rows: int, depth: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of each tensor of one matrix, row by row: "codes", "scales" and unless symmetric "minima".

        Raises ConfigError if `depth` is no multiple of the group.
        """
        group = self.group_size or max(1, depth)
        if depth < 1 or depth % group:
            fitting = [f"groups of {size}" for size in GROUP_SIZES if depth > 0 and depth % size == 0]
            raise ConfigError(
                f"rows of {depth} weights cannot be divided into groups of {self.group_size or depth}: "
                f"use {' or '.join([*fitting, 'int8'])}."
            )
        per_group = (rows, depth // group), torch.float32 if self.bits == 8 else torch.float16
        codes = (rows, depth * self.bits // 8), torch.int8 if self.bits == 8 else torch.uint8
        return {"codes": codes, "scales": per_group} | ({} if self.symmetric else {"minima": per_group})

    def panels(self, rows: int, depth: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """The same in panels. Raises ConfigError unless rows and depth are multiples of PANEL_ROWS."""
        check_panels(rows, depth)
        tall = self.layout(rows, depth).items()
        return {name: ((r // PANEL_ROWS, c * PANEL_ROWS), dtype) for name, ((r, c), dtype) in tall}

    def num_bytes(self, rows: int, depth: int) -> int:
        """Bytes of one matrix in this format."""
        return sum(shape[0] * shape[1] * dtype.itemsize for shape, dtype in self.layout(rows, depth).values())


QUANTISATIONS = {"int8": Scheme(bits=8), "int4": Scheme(bits=4, group_size=32)}


def scheme_named(name: str) -> Scheme:
    """An entry of QUANTISATIONS. Raises ConfigError for an unknown name."""
    if name not in QUANTISATIONS:
        raise ConfigError(f"unknown quantisation {name!r}. {nearest(name, QUANTISATIONS)}")
    return QUANTISATIONS[name]


@torch.no_grad()
def quantise(weight: Tensor, scheme: Scheme, *, clips: tuple[float, ...] = CLIPS) -> QuantisedWeight:
    """Round float32 or bfloat16 weights [..., rows, depth] to the nearest codes, ties to even, in panels.

    With 4 bits the scale of each group is the one among `clips` with the smallest squared error. Weights that are not
    cut off are off by at most half a scale. Uses a few MB besides the result, whatever the size of `weight`.
    Raises ConfigError for another dtype, sizes that are no multiples of PANEL_ROWS or a depth that groups do not
    divide, NumericsError for NaN, infinity and weights beyond the range of a float16 scale.
    """
    made = _quantised_rows(weight, scheme, clips)
    check_panels(*weight.shape[-2:])
    parts = {name: to_panels(part) for name, part in made.items()}
    group_size = scheme.group_size or weight.shape[-1]
    return QuantisedWeight(parts["codes"], parts["scales"], parts.get("minima"), scheme.bits, group_size)


@torch.no_grad()
def quantise_table(weight_VD: Tensor) -> QuantisedTable:
    """An embedding or a head in int8, a scale a row. Raises as `quantise` does, but takes any number of rows."""
    num_rows, depth = weight_VD.shape
    check_panels(PANEL_ROWS, depth)
    made = _quantised_rows(weight_VD, QUANTISATIONS["int8"], CLIPS)
    filling = (0, 0, 0, -num_rows % PANEL_ROWS)
    codes, scales = (to_panels(F.pad(made[name], filling)) for name in ("codes", "scales"))
    return QuantisedTable(codes, scales, num_rows)


def table_shapes(num_rows: int, depth: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Shape and dtype of "codes" and "scales" of a QuantisedTable. Raises ConfigError as `quantise_table` does."""
    return QUANTISATIONS["int8"].panels(num_rows + -num_rows % PANEL_ROWS, depth)


def check_panels(rows: int, depth: int) -> None:
    """Raise ConfigError for a matrix that does not divide into panels."""
    if rows < 1 or depth < 1 or rows % PANEL_ROWS or depth % PANEL_ROWS:
        raise ConfigError(
            f"experts are quantised in panels of {PANEL_ROWS} rows and expect sizes that are multiples of "
            f"{PANEL_ROWS}, got {rows} rows of {depth} weights: leave them unquantised."
        )


def to_panels(rows: Tensor) -> Tensor:
    """Codes [..., rows, bytes] or scales and minima [..., rows, groups] -> panels [..., rows / 16, 16 * columns].

    Codes go by four bytes, scales one by one.
    """
    words = _words(rows)
    *others, num_rows, columns = words.shape
    by_panel = words.reshape(*others, num_rows // PANEL_ROWS, PANEL_ROWS, columns).transpose(-2, -1)
    return by_panel.flatten(-2).contiguous().view(rows.dtype)


def from_panels(panels: Tensor) -> Tensor:
    """The inverse of `to_panels`: rows one after another."""
    by_row = torch.unflatten(_words(panels), -1, (-1, PANEL_ROWS)).transpose(-2, -1)
    return by_row.flatten(-3, -2).contiguous().view(panels.dtype)


def _words(part: Tensor) -> Tensor:
    """What stays together: four codes, or one scale."""
    return part.contiguous().view(torch.int32) if part.element_size() == 1 else part


def _quantised_rows(weight: Tensor, scheme: Scheme, clips: tuple[float, ...]) -> dict[str, Tensor]:
    """The tensors of the scheme's layout, row by row."""
    if weight.dtype not in (torch.float32, torch.bfloat16) or weight.dim() < 2:
        raise ConfigError(f"expected float32 or bfloat16 [..., rows, depth], got {weight.dtype} {tuple(weight.shape)}.")
    rows, depth = weight.shape[-2:]
    made = {
        name: weight.new_empty(weight.shape[:-2] + shape, dtype=dtype)
        for name, (shape, dtype) in scheme.layout(rows, depth).items()
    }
    flat_NR = weight.reshape(-1, depth)
    into = {name: tensor.view(-1, tensor.shape[-1]) for name, tensor in made.items()}
    at_a_time = max(1, _WEIGHTS_AT_A_TIME // depth)
    for first in range(0, len(flat_NR), at_a_time):
        part = slice(first, first + at_a_time)
        _fill_rows(flat_NR[part].float(), scheme, clips, {name: tensor[part] for name, tensor in into.items()})
    return made


def quantise_bank(bank: ExpertBank, scheme: Scheme) -> QuantisedBank:
    """Both projections of every expert."""
    return QuantisedBank(quantise(bank.gate_up_EHD, scheme), quantise(bank.down_EDF, scheme))


def dequantise(weight: QuantisedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that the codes stand for: [..., rows, depth]; computed in float32, rounded once to `dtype`."""
    codes, scales = from_panels(weight.codes_EPC), from_panels(weight.scales_EPG).float()
    if weight.bits == 8:
        return (codes.float() * scales).to(dtype)
    values = torch.unflatten(unpack(codes, weight.group_size), -1, (-1, weight.group_size)).float()
    scales = scales.unsqueeze(-1)
    if weight.minima_EPG is None:
        weights = (values - 8) * scales
    else:
        weights = values * scales + from_panels(weight.minima_EPG).float().unsqueeze(-1)
    return weights.flatten(-2).to(dtype)


def table_rows(table: QuantisedTable, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the codes of some rows [...] stand for: [..., D] in `dtype`. Reads those alone."""
    panels = table.codes_PC.view(len(table.codes_PC), -1, PANEL_ROWS, 4)
    panel, lane = rows // PANEL_ROWS, rows % PANEL_ROWS
    codes = panels[panel, :, lane].flatten(-2)
    return (codes.float() * table.scales_PG[panel, lane].unsqueeze(-1)).to(dtype)


def table_slices(table: QuantisedTable, dtype: torch.dtype, rows_at_a_time: int) -> Iterator[Tensor]:
    """The whole table, so many rows (whole panels) at a time, in `dtype`."""
    for first in range(0, table.num_rows, rows_at_a_time):
        panels = slice(first // PANEL_ROWS, (first + rows_at_a_time) // PANEL_ROWS)
        widened = from_panels(table.codes_PC[panels]).float() * from_panels(table.scales_PG[panels])
        yield widened[: table.num_rows - first].to(dtype)


def dequantised_experts(plan: RoutingPlan, bank: QuantisedBank, dtype: torch.dtype) -> tuple[RoutingPlan, ExpertBank]:
    """A bank of the plan's active experts alone, and the plan with ids that count in it. Raises ConfigError for ids
    that the bank does not have."""
    num_experts = len(bank.down.codes_EPC)
    ids_TK = plan.expert_ids_TK
    if ids_TK.numel() and not -1 <= int(ids_TK.min()) <= int(ids_TK.max()) < num_experts:
        raise ConfigError(f"expert ids must be -1 (unused) or 0 to {num_experts - 1}: the plan does not fit this bank.")
    plan, used_U = only_used(plan)
    experts = ExpertBank(*(dequantise(experts_of(weight, used_U), dtype) for weight in (bank.gate_up, bank.down)))
    return plan, experts


def only_used(plan: RoutingPlan) -> tuple[RoutingPlan, Tensor]:
    """The plan with ids that count in the experts it uses, and the ids of these in order: int64 [U]."""
    ids_TK = plan.expert_ids_TK
    unused_and_used, places = torch.unique(F.pad(ids_TK.flatten(), (1, 0), value=-1), return_inverse=True)
    used_U = unused_and_used[1:]
    active_U = torch.ones_like(used_U, dtype=torch.bool)
    return RoutingPlan((places[1:] - 1).view_as(ids_TK), plan.weights_TK, active_U), used_U


def experts_of(weight: QuantisedWeight, experts: int | Tensor) -> QuantisedWeight:
    """Some experts' matrices, in a copy; of one, without the dimension of experts and without copying."""
    minima = None if weight.minima_EPG is None else weight.minima_EPG[experts]
    codes, scales = weight.codes_EPC[experts], weight.scales_EPG[experts]
    return replace(weight, codes_EPC=codes, scales_EPG=scales, minima_EPG=minima)


def unpack(packed: Tensor, group_size: int) -> Tensor:
    """Codes 0 to 15 in the order of their weights: uint8 [..., depth / 2] -> uint8 [..., depth]."""
    halves = torch.unflatten(packed, -1, (-1, group_size // 2))
    return torch.cat((halves & 15, halves >> 4), dim=-1).flatten(-2)


def _fill_rows(rows_NR: Tensor, scheme: Scheme, clips: tuple[float, ...], into: dict[str, Tensor]) -> None:
    """float32 [n, depth] into the n rows of each tensor of `into`."""
    largest = rows_NR.abs().amax()
    if not bool(largest.isfinite()):
        raise NumericsError("expected finite weights, got NaN or infinity: the checkpoint is damaged, fetch it again.")
    if scheme.group_size is None:
        scales = rows_NR.abs().amax(dim=-1, keepdim=True) / 127
        into["codes"].copy_(_codes(rows_NR, scales, 0.0, -127, 127))
        into["scales"].copy_(scales)
        return
    groups = torch.unflatten(rows_NR, -1, (-1, scheme.group_size))
    codes, scales, minima = _best_of(groups, scheme.symmetric, clips)
    if not bool(scales.isfinite().all() & minima.isfinite().all()):
        raise NumericsError(
            f"4-bit scales are float16, the largest weight is {float(largest):g}: rescale the checkpoint, or use int8."
        )
    half = scheme.group_size // 2
    packed = codes[..., :half] + 16 * codes[..., half:]
    into["codes"].copy_(packed.flatten(-2))
    into["scales"].copy_(scales.squeeze(-1))
    if not scheme.symmetric:
        into["minima"].copy_(minima.squeeze(-1))


def _codes(weights: Tensor, scales: Tensor, minima: Tensor | float, lowest: int, highest: int) -> Tensor:
    """The nearest codes, as floats; those of an all-zero row or group are 0 (or `lowest` if that is above)."""
    inverse = torch.where(scales == 0, 0.0, 1 / scales).nan_to_num(posinf=0.0, neginf=0.0)
    return (weights - minima).mul_(inverse).round_().clamp_(lowest, highest)


def _best_of(groups: Tensor, symmetric: bool, clips: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15 [..., size], scale and minimum [..., 1] of each group: of all `clips` the one that errs least."""

    def attempt(clip: float) -> tuple[Tensor, ...]:
        scales, minima = _range(groups, symmetric, clip)
        codes = _codes(groups, scales, minima, 0, 15)
        return codes, scales, minima, torch.addcmul(minima, codes, scales).sub_(groups).square_().sum(-1, keepdim=True)

    def better(kept: tuple[Tensor, ...], fresh: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        errs_less = fresh[-1] < kept[-1]
        return tuple(torch.where(errs_less, new, old) for new, old in zip(fresh, kept, strict=True))

    codes, scales, minima, _ = reduce(better, map(attempt, clips))
    return codes, scales, minima


def _range(groups: Tensor, symmetric: bool, clip: float) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each group, as float16 holds them. Symmetric: the minimum is that of code 0, -8 scales,
    and the scale has the sign with which the largest weight becomes code 0, the only one eight steps from zero."""
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    if symmetric:
        scales = (torch.where(high > -low, high, low) * (clip / -8)).half().float()
        return scales, -8 * scales
    middle, reach = (low + high) / 2, (high - low) / 2 * clip
    return (reach / 7.5).half().float(), (middle - reach).half().float()
