"""The dense operations of a model on the CPU by our own kernels (native/csrc), as Backend describes each.

They are for inference. Results depend on the instruction set, but not on the number of threads or on the other tokens,
queries and rows of a batch. All raise ConfigError, before they write anything, for what a kernel cannot take
(native/calls.py): gradients, another device or dtype, shapes that do not fit, weights that are not contiguous.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from expertshare.errors import ConfigError
from expertshare.kernels.backend import CacheSlice, check_excluded
from expertshare.native import calls
from expertshare.types import QuantisedTable


def linear_cpu(x: Tensor, weight_ND: Tensor) -> Tensor:
    """x [..., D] times the transpose of weight_ND: [..., N] in their dtype, float32 or bfloat16.

    A row of weights is read once for all tokens; sums are float32 and rounded once. No other kernel takes over where
    there are many tokens. The weights need no alignment beyond that of an element.
    """
    return calls.LINEAR(x, weight_ND)[0]


def rms_norm_cpu(x: Tensor, scale_D: Tensor, eps: float) -> Tensor:
    """scale * (x / root mean square of x) over the last dimension; the mean is float32, steps round as torch's."""
    return calls.RMS_NORM(x, scale_D, numbers=(eps,))[0]


def add_and_norm_cpu(x: Tensor, delta: Tensor, scale_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta and `rms_norm_cpu` of it, in one pass."""
    total, normed = calls.ADD_AND_NORM(x, delta, scale_D, numbers=(eps,))
    return total, normed


def turn_heads_cpu(
    qkv_BSHD: Tensor,
    num_heads: int,
    scales: tuple[Tensor, Tensor],
    eps: float,
    tables: tuple[Tensor, Tensor],
    cached: CacheSlice | None,
) -> None:
    """Norm and rotate the heads of queries, then of keys, in place, the values' behind them; then copy keys and values
    to `cached`.

    qkv: contiguous. scales: of queries and keys, [D] each. tables: cosine and sine, [B, 1, S, rotated features] each,
    in the heads' dtype. Rounds wherever TorchBackend does.
    """
    buffers: tuple[Tensor | None, ...] = (None, None)
    starts = array("q", () if cached is None else cached.starts)
    if cached is not None:
        buffers = cached.keys_BHCD, cached.values_BHCD
        batch, length, capacity = len(qkv_BSHD), qkv_BSHD.shape[1], cached.keys_BHCD.shape[2]
        if len(starts) != batch or (batch and not 0 <= min(starts) <= max(starts) <= capacity - length):
            raise ConfigError(
                f"expected {batch} starts of {length} positions each within 0..{capacity}, got {list(cached.starts)}."
            )
    num_kv_heads = (qkv_BSHD.shape[2] - num_heads) // 2
    numbers, given = (starts.buffer_info()[0], eps), (num_heads, num_kv_heads)
    calls.TURN_HEADS(qkv_BSHD, *scales, *tables, *buffers, numbers=numbers, given=given)


def attend_cpu(q_BHSD: Tensor, k_BHPD: Tensor, v_BHPD: Tensor, mask_BSP: Tensor | None) -> Tensor:
    """Softmax attention, grouped heads, scaled by 1 / sqrt(D): [B, S, H * D] in the queries' dtype.

    mask: bool, True where a query sees a key, at least one each; sizes of 1 are expanded; None: all. Scores and sums
    are float32; the softmax's weights are rounded to the dtype once. Keys that a query does not see change nothing,
    unless they are not finite.
    """
    if mask_BSP is not None:
        mask_BSP = _expanded(mask_BSP, (len(q_BHSD), q_BHSD.shape[-2], k_BHPD.shape[-2]))
    return calls.ATTEND(q_BHSD, k_BHPD, v_BHPD, mask_BSP, numbers=(q_BHSD.shape[-1] ** -0.5,))[0]


def _expanded(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    if mask.shape == shape or mask.dim() != len(shape):
        return mask
    return mask.expand([wanted if size == 1 else size for size, wanted in zip(mask.shape, shape, strict=True)])


def best_token_cpu(hidden_RD: Tensor, weight_VD: Tensor, excluded: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The id of each row's largest logit, int64 [R], the lowest one where several are, and its probability under the
    softmax, float32 [R]: NaN where a logit is not finite. `excluded` ids have no part in either.

    Logits are hidden @ weight.T rounded to their dtype, and never all in memory: one pass over the vocabulary.
    """
    check_excluded(excluded, len(weight_VD))
    tokens_R, probability_R = calls.BEST_TOKEN(hidden_RD, weight_VD, torch.tensor(excluded, dtype=torch.int64))
    return tokens_R, probability_R


def quantised_head_cpu(hidden_RD: Tensor, weight: QuantisedTable, excluded: Sequence[int]) -> tuple[Tensor, Tensor]:
    """As `best_token_cpu` with int8 weights [V, D].

    Hidden states are rounded to 8 bits with a scale per 128 features and multiplied by the codes; logits are then
    rounded to the dtype of the hidden states.
    """
    check_excluded(excluded, weight.num_rows)
    excluded_X = torch.tensor(excluded, dtype=torch.int64)
    table = weight.codes_PC, weight.scales_PG
    tokens_R, probability_R = calls.QUANTISED_BEST_TOKEN(hidden_RD, *table, excluded_X, given=(weight.num_rows,))
    return tokens_R, probability_R


def quantised_logits_cpu(hidden: Tensor, weight: QuantisedTable) -> Tensor:
    """Scores of the whole vocabulary [..., V] in the dtype of `hidden` [..., D], from which `quantised_head_cpu`
    chooses."""
    return calls.QUANTISED_LINEAR(hidden, weight.codes_PC, weight.scales_PG, given=(weight.num_rows,))[0]
