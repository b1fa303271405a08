"""The best token and its probability on the GPU, from hidden states, in one pass over the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from expertshare.errors import ConfigError
from expertshare.kernels.backend import check_excluded
from expertshare.kernels.triton.availability import check_devices, interpreted
from expertshare.kernels.triton.tiles import power_of_two, tiles_for
from expertshare.kernels.weights import check_table
from expertshare.types import QuantisedTable

TILES_AT_A_TIME = 1024


def best_token_triton(
    hidden_RD: Tensor, weight_VD: Tensor | QuantisedTable, excluded: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """As Backend.best_token: token int64 [R], the lowest of equals, and its probability float32 [R] without `excluded`.

    The probability is NaN where a logit of the row is not finite. Logits are rounded to the dtype of the hidden states,
    as if they were stored. An int8 table enters as codes; its scale is applied to the sum. Raises ConfigError as
    moe_ffn_triton does.
    """
    from expertshare.kernels.triton.device.head import best_of_tiles_kernel, head_kernel

    _check(hidden_RD, weight_VD)
    codes, scales = _parts(weight_VD)
    vocabulary, depth = _size(weight_VD)
    check_excluded(excluded, vocabulary)
    num_rows, device = len(hidden_RD), hidden_RD.device
    tokens_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    probability_R = torch.empty(num_rows, dtype=torch.float32, device=device)
    if num_rows == 0:
        return tokens_R, probability_R
    tiles = tiles_for("head", num_rows, depth, vocabulary, hidden_RD.dtype)
    num_tiles = -(-vocabulary // tiles.columns)
    best, total = (torch.empty((num_tiles, num_rows), dtype=torch.float32, device=device) for _ in range(2))
    token = torch.empty((num_tiles, num_rows), dtype=torch.int32, device=device)
    head_kernel[(num_tiles, -(-num_rows // tiles.rows))](
        hidden_RD.contiguous(),
        codes,
        scales,
        _on_device(tuple(excluded), device),
        best,
        token,
        total,
        num_rows,
        VOCABULARY=vocabulary,
        DEPTH=depth,
        BITS=8 if isinstance(weight_VD, QuantisedTable) else 0,
        NUM_EXCLUDED=len(excluded),
        **tiles.launch(),
    )
    best_of_tiles_kernel[(num_rows,)](
        best,
        token,
        total,
        tokens_R,
        probability_R,
        num_rows,
        NUM_TILES=num_tiles,
        TILES=min(TILES_AT_A_TIME, power_of_two(num_tiles)),
        num_warps=4,
    )
    return tokens_R, probability_R


def _parts(weight_VD: Tensor | QuantisedTable) -> tuple[Tensor, Tensor]:
    """Weights, or codes (four bytes of them as one number) and scales; those of floats are never read."""
    if isinstance(weight_VD, Tensor):
        return weight_VD, weight_VD
    return weight_VD.codes_PC.view(torch.int32), weight_VD.scales_PG


def _size(weight_VD: Tensor | QuantisedTable) -> tuple[int, int]:
    """Ids and features."""
    if isinstance(weight_VD, Tensor):
        return weight_VD.shape[0], weight_VD.shape[-1]
    return weight_VD.num_rows, weight_VD.depth


@cache
def _on_device(excluded: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied once: a copy from the host inside a captured graph is an error. One entry at least; it may go unread."""
    return torch.tensor(excluded or (-1,), dtype=torch.int32, device=device)


def _check(hidden_RD: Tensor, weight_VD: Tensor | QuantisedTable) -> None:
    is_table = isinstance(weight_VD, QuantisedTable)
    parts = (weight_VD.codes_PC, weight_VD.scales_PG) if isinstance(weight_VD, QuantisedTable) else (weight_VD,)
    check_devices(hidden_RD, *parts)
    if torch.is_grad_enabled() and (hidden_RD.requires_grad or parts[0].requires_grad):
        raise ConfigError("the backend 'triton' has no gradients: call it under torch.no_grad(), or use 'torch'.")
    floats = {hidden_RD.dtype} if is_table else {hidden_RD.dtype, parts[0].dtype}
    if len(floats) != 1 or hidden_RD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            "the backend 'triton' expects hidden states and head both in float32, bfloat16 or float16, got "
            f"{', '.join(sorted(map(str, floats)))}."
        )
    if interpreted() and hidden_RD.dtype == torch.bfloat16:
        raise ConfigError("Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16 there.")
    if isinstance(weight_VD, QuantisedTable):
        check_table(weight_VD)
    if parts[0].dim() != 2 or hidden_RD.dim() != 2 or hidden_RD.shape[1] != _size(weight_VD)[1]:
        raise ConfigError(
            f"expected hidden states [R, D] and a head [V, D], got {tuple(hidden_RD.shape)} and {_size(weight_VD)}."
        )
    if not parts[0].is_contiguous():
        raise ConfigError("the backend 'triton' expects the head contiguous: make it so once, when it is loaded.")
