"""Backend "cpu": our own kernels (native/csrc), for inference on the CPU; what they do not compute stays with torch.

Weights are read once, in place, and never copied; they need no alignment beyond that of an element. Results depend on
the instruction set, but not on the number of threads or on the other tokens, queries and rows of a batch. All raise
ConfigError, before they write anything, for what a kernel cannot take (native/calls.py): gradients, another device or
dtype, shapes that do not fit, weights that are not contiguous.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from expertshare.errors import ConfigError
from expertshare.kernels.backend import LayerKeyValues, Past, check_excluded
from expertshare.kernels.cpu_route import route_layer_cpu
from expertshare.kernels.torch_backend import TorchBackend
from expertshare.kernels.weights import check_layout, projections, shape_of, tensors_of
from expertshare.native import calls
from expertshare.types import Arrivals, Bank, ExpertBank, QuantisedTable, QuantisedWeight, RoutingPlan


class CpuBackend(TorchBackend):
    """The operations that our kernels make faster. It has no gradients, but for those of routing, which are torch's."""

    name = "cpu"
    takes_arrivals = True

    route = staticmethod(route_layer_cpu)

    def __init__(self) -> None:
        self._dense: dict[tuple[int, int], ExpertBank] = {}

    def moe_ffn(self, x_TD: Tensor, plan: RoutingPlan, bank: Bank, arrivals: Arrivals | None = None) -> Tensor:
        """Reads the weights of experts that the plan names and no others; each expert's rows must be contiguous.

        arrivals: experts that are there are computed first, the others as they come, to the same bits.

        Sums over features and slots are float32, slots in order. With bfloat16 weights the hidden features (after SiLU
        and product, themselves float32) are rounded once to bfloat16. With quantised weights, which go with tokens of
        either dtype, tokens and hidden features are rounded to 8 bits with a float32 scale per 128 features, and
        products are summed as integers, whatever the instruction set; a token with a NaN or an infinity gets NaN
        throughout. Calls from several threads wait for each other; the interpreter lock is released.
        """
        checked = _checked(bank)
        calls.refuse_gradients(checked.tensors)
        given = x_TD, plan.expert_ids_TK, plan.weights_TK
        if arrivals is not None:
            waited_ns = torch.zeros(1, dtype=torch.int64)
            try:
                return calls.MOE_FFN(*given, arrivals.states_S, waited_ns, **checked.known)[0]
            except calls.NotArrived:
                arrivals.wait()  # here, where an interrupt and an error get through
            finally:
                arrivals.waited(int(waited_ns) / 1e9)
        return calls.MOE_FFN(*given, None, None, **checked.known)[0]

    def swiglu(self, x: Tensor, gate_up_HD: Tensor, down_DF: Tensor) -> Tensor:
        """A layer of one expert, which every token uses. Its bank is kept, since a kept bank is checked once."""
        calls.refuse_gradients((gate_up_HD, down_DF))
        key = gate_up_HD.data_ptr(), down_DF.data_ptr()
        bank = self._dense.get(key)
        if bank is None or bank.gate_up_EHD.shape[1:] != gate_up_HD.shape:
            bank = self._dense[key] = ExpertBank(gate_up_HD.unsqueeze(0), down_DF.unsqueeze(0))
        return self.moe_ffn(x, _only_expert(math.prod(x.shape[:-1])), bank)

    def linear(self, x: Tensor, weight_ND: Tensor) -> Tensor:
        """A row of weights is read once for all tokens; no other kernel takes over where there are many. Sums are
        float32 and rounded once."""
        return calls.LINEAR(x, weight_ND)[0]

    def rms_norm(self, x: Tensor, scale_D: Tensor, eps: float) -> Tensor:
        """The mean is float32, steps round as torch's."""
        return calls.RMS_NORM(x, scale_D, numbers=(eps,))[0]

    def add_and_norm(self, x: Tensor, delta: Tensor, scale_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Sum and norm in one pass."""
        total, normed = calls.ADD_AND_NORM(x, delta, scale_D, numbers=(eps,))
        return total, normed

    def prepare_heads(
        self,
        qkv_BSHD: Tensor,
        num_heads: int,
        scales: tuple[Tensor, Tensor],
        eps: float,
        tables: tuple[Tensor, Tensor],
        past: Past | None,
    ) -> tuple[Tensor, LayerKeyValues, LayerKeyValues]:
        """In one call: heads are normed and rotated in place, and copied into the cache where the past has one.

        qkv: contiguous. tables: in the heads' dtype. Rounds wherever TorchBackend does.
        """
        cached = None if past is None else past.cache_slice()
        batch, length, all_heads, _ = qkv_BSHD.shape
        num_kv_heads = (all_heads - num_heads) // 2
        buffers: tuple[Tensor | None, ...] = (None, None)
        starts = array("q", () if cached is None else cached.starts)
        if cached is not None:
            buffers, capacity = (cached.keys_BHCD, cached.values_BHCD), cached.keys_BHCD.shape[2]
            if len(starts) != batch or (batch and not 0 <= min(starts) <= max(starts) <= capacity - length):
                raise ConfigError(
                    f"expected {batch} starts of {length} positions each within 0..{capacity}, got "
                    f"{list(cached.starts)}."
                )
        numbers, given = (starts.buffer_info()[0], eps), (num_heads, num_kv_heads)
        calls.QK_NORM_ROPE(qkv_BSHD, *scales, *tables, *buffers, numbers=numbers, given=given)
        q, k, v = torch.split(qkv_BSHD.transpose(1, 2), [num_heads, num_kv_heads, num_kv_heads], dim=1)
        new = LayerKeyValues(k, v)
        if cached is not None:
            return q, new, LayerKeyValues(*cached.reach(length))
        return q, new, new if past is None else past.extended_by(new)

    def attention(self, q_BHSD: Tensor, k_BHPD: Tensor, v_BHPD: Tensor, mask_BSP: Tensor | None) -> Tensor:
        """Scores and sums are float32; the softmax's weights are rounded to the dtype once. Sizes of 1 of a mask are
        expanded. Keys that a query does not see change nothing, unless they are not finite."""
        wanted = len(q_BHSD), q_BHSD.shape[-2], k_BHPD.shape[-2]
        if mask_BSP is not None and mask_BSP.shape != wanted and mask_BSP.dim() == 3:
            mask_BSP = mask_BSP.expand(
                [w if size == 1 else size for size, w in zip(mask_BSP.shape, wanted, strict=True)]
            )
        return calls.ATTEND(q_BHSD, k_BHPD, v_BHPD, mask_BSP, numbers=(q_BHSD.shape[-1] ** -0.5,))[0]

    def logits(self, hidden: Tensor, weight_VD: Tensor | QuantisedTable) -> Tensor:
        """An int8 table is multiplied by its codes, as in `best_token`."""
        if isinstance(weight_VD, Tensor):
            return calls.LINEAR(hidden, weight_VD)[0]
        return calls.QUANTISED_LINEAR(hidden, weight_VD.codes_PC, weight_VD.scales_PG, given=(weight_VD.num_rows,))[0]

    def best_token(
        self, hidden_RD: Tensor, weight_VD: Tensor | QuantisedTable, excluded: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """One pass over the vocabulary, which keeps no logits: they are rounded to the dtype of the hidden states.

        With an int8 table, hidden states are rounded to 8 bits with a scale per 128 features and multiplied by the
        codes.
        """
        excluded_X = torch.tensor(excluded, dtype=torch.int64)
        if isinstance(weight_VD, Tensor):
            check_excluded(excluded, len(weight_VD))
            tokens_R, probability_R = calls.BEST_TOKEN(hidden_RD, weight_VD, excluded_X)
        else:
            num_rows, table = weight_VD.num_rows, (weight_VD.codes_PC, weight_VD.scales_PG)
            check_excluded(excluded, num_rows)
            tokens_R, probability_R = calls.QUANTISED_BEST_TOKEN(hidden_RD, *table, excluded_X, given=(num_rows,))
        return tokens_R, probability_R


@lru_cache(maxsize=64)
def _only_expert(num_tokens: int) -> RoutingPlan:
    """The plan in which every token uses expert 0."""
    ids_TK, weights_TK = torch.zeros(num_tokens, 1, dtype=torch.int64), torch.ones(num_tokens, 1)
    return RoutingPlan(ids_TK, weights_TK, torch.ones(1, dtype=torch.bool))


class _Checked(NamedTuple):
    """A bank that was checked: its tensors, their addresses, and what a call gets beside tensors (its sizes E, D and F,
    the bank packed as the library reads it, and the dtype of its floats).

    Between two calls for a layer all others have passed through the caches: every object that is touched again comes
    from memory, so what can be known beforehand is.
    """

    tensors: list[Tensor]
    addresses: list[int]
    known: dict[str, Any]


_CHECKED: WeakKeyDictionary[Bank, _Checked] = WeakKeyDictionary()
"""Stores and layers lend the same bank for as long as they live; checking it takes 30 microseconds and more."""


def _checked(bank: Bank) -> _Checked:
    """Everything about a bank that would make the kernel read outside a tensor, or compute something else: once, unless
    its tensors were given other memory since."""
    known = _CHECKED.get(bank)
    if known is None or known.addresses != [tensor.data_ptr() for tensor in known.tensors]:
        known = _CHECKED[bank] = _check(bank)
    return known


def _check(bank: Bank) -> _Checked:
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
    if any(tensor.dim() != 3 for tensor in parts):
        raise ConfigError(
            f"expected weights [E, rows, depth], got weights of shapes {[tuple(tensor.shape) for tensor in parts]}."
        )
    for name, weight in weights.items():
        check_layout(name, weight)
    gate_up, shape = (shape_of(weight) for weight in weights.values())
    num_experts, hidden, inner = shape
    if gate_up != (num_experts, 2 * inner, hidden) or 0 in (hidden, inner):
        raise ConfigError(
            f"rows and depth of gate_up do not fit down {shape}: expected shape {(num_experts, 2 * inner, hidden)}, "
            f"got {gate_up}."
        )
    packed = b"".join(_packed(weight) for weight in weights.values()) + struct.pack("3q", *shape)
    known = {"given": shape, "constants": packed, "weights": dtype}
    return _Checked(parts, [tensor.data_ptr() for tensor in parts], known)


def _packed(weight: Tensor | QuantisedWeight) -> bytes:
    """es_weight of native/csrc/abi.h: addresses, bytes from one expert to the next, format."""
    parts: tuple[Tensor | None, ...]
    if isinstance(weight, Tensor):
        parts, kind = (weight, None, None), (weight.element_size() * 8, 0)
    else:
        parts, kind = (weight.codes_EPC, weight.scales_EPG, weight.minima_EPG), (weight.bits, weight.group_size)
    addresses = [0 if part is None else part.data_ptr() for part in parts]
    strides = [0 if part is None else part.stride(0) * part.element_size() for part in parts]
    return struct.pack("3P3q2i", *addresses, *strides, *kind)
