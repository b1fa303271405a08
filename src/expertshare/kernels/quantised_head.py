"""A vocabulary in int8: best token and probability, logits, embeddings, without a float copy of the table."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int32, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels.native_weights import check_table
from expertshare.kernels.projection import raise_for
from expertshare.kernels.quantise import table_slices
from expertshare.kernels.vocabulary import best_token, check_excluded
from expertshare.types import QuantisedTable

ROWS_AT_A_TIME = 4096
"""Rows of the vocabulary that torch widens together: 32 MB at 2048 features in float32."""


class _QuantisedHead(Structure):
    """es_quantised_head of native/csrc/abi.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "codes", "scales", "excluded", "ids", "probabilities", "logits")),
        *((name, c_int64) for name in ("num_tokens", "vocabulary", "depth", "num_excluded")),
        ("is_bfloat16", c_int32),
        *native.HOW,
    )


def quantised_head(
    hidden_RD: Tensor, weight: QuantisedTable, excluded: Sequence[int], *, backend: str
) -> tuple[Tensor, Tensor]:
    """As `head` (kernels.dense) with int8 weights [V, D].

    "cpu" rounds hidden states to 8 bits with a scale per 128 features and multiplies the codes; logits are then
    rounded to the dtype of the hidden states, and none is kept. Its result depends neither on the number of threads nor
    on the other rows. Other backends widen weights, a slice at a time. Raises ConfigError as `head` does.
    """
    if backend != "cpu":
        return best_token(_logits_by_slices(hidden_RD, weight), excluded)
    tokens_R = torch.empty(len(hidden_RD), dtype=torch.int64)
    probability_R = torch.empty(len(hidden_RD), dtype=torch.float32)
    _run(hidden_RD, weight, excluded, tokens_R=tokens_R, probability_R=probability_R)
    return tokens_R, probability_R


def quantised_logits(hidden_RD: Tensor, weight: QuantisedTable, *, backend: str) -> Tensor:
    """Scores of the whole vocabulary [R, V] in the dtype of hidden_RD, from which `quantised_head` chooses."""
    if backend != "cpu":
        return _logits_by_slices(hidden_RD, weight)
    logits_RV = torch.empty(len(hidden_RD), weight.num_rows, dtype=hidden_RD.dtype)
    _run(hidden_RD, weight, (), logits_RV=logits_RV)
    return logits_RV


def _logits_by_slices(hidden_RD: Tensor, weight: QuantisedTable) -> Tensor:
    slices = table_slices(weight, hidden_RD.dtype, ROWS_AT_A_TIME)
    return torch.cat([F.linear(hidden_RD, part) for part in slices], dim=-1)


def _run(
    hidden_RD: Tensor,
    weight: QuantisedTable,
    excluded: Sequence[int],
    *,
    tokens_R: Tensor | None = None,
    probability_R: Tensor | None = None,
    logits_RV: Tensor | None = None,
) -> None:
    _check(hidden_RD, weight)
    vocabulary, depth = weight.num_rows, weight.depth
    check_excluded(excluded, vocabulary)
    hidden_RD, excluded_X = hidden_RD.contiguous(), torch.tensor(excluded, dtype=torch.int64)
    pointed = (hidden_RD, weight.codes_PC, weight.scales_PG, excluded_X, tokens_R, probability_R, logits_RV)
    head = _QuantisedHead(
        *(None if tensor is None else tensor.data_ptr() for tensor in pointed),
        len(hidden_RD),
        vocabulary,
        depth,
        len(excluded),
        hidden_RD.dtype is torch.bfloat16,
    )
    raise_for(native.status_of("es_choose_quantised", head))


def _check(hidden_RD: Tensor, weight: QuantisedTable) -> None:
    """Everything that would make the kernel read outside a tensor, or compute something else."""
    codes, scales = weight.codes_PC, weight.scales_PG
    if torch.is_grad_enabled() and hidden_RD.requires_grad:
        raise ConfigError("the backend 'cpu' has no gradients: call it under torch.no_grad(), or use 'grouped'.")
    devices = {tensor.device.type for tensor in (hidden_RD, codes, scales)}
    if devices != {"cpu"}:
        raise ConfigError(f"the backend 'cpu' expects tensors on the CPU, got {', '.join(sorted(devices))}.")
    if hidden_RD.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"the backend 'cpu' expects features in float32 or bfloat16, got {hidden_RD.dtype}.")
    check_table(weight)
    if hidden_RD.dim() != 2 or hidden_RD.shape[1] != weight.depth:
        raise ConfigError(f"expected hidden states [R, {weight.depth}], got shape {tuple(hidden_RD.shape)}.")
