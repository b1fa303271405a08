"""The best token and its probability, from hidden states by our own kernel or from logits in torch."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels.projection import check_dense, raise_for

ROWS_AT_A_TIME = 8
"""Rows of the vocabulary that torch widens to float32 together: 5 MB at 157,184 ids, which a cache holds."""


class _Head(Structure):
    """es_head of native/csrc/abi.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "w", "excluded", "ids", "probabilities")),
        *((name, c_int64) for name in ("num_tokens", "vocabulary", "depth", "num_excluded")),
        ("is_bfloat16", c_int32),
        *native.HOW,
    )


def best_token_cpu(hidden_RD: Tensor, weight_VD: Tensor, excluded: Sequence[int]) -> tuple[Tensor, Tensor]:
    """As best_token of the logits hidden @ weight.T rounded to their dtype, which are never all in memory.

    One pass over the vocabulary. The result does not depend on the number of threads or on the other rows. Raises
    ConfigError as linear_cpu does.
    """
    check_dense(hidden_RD, weight_VD)
    vocabulary, depth = weight_VD.shape
    check_excluded(excluded, vocabulary)
    hidden_RD = hidden_RD.contiguous()
    excluded_X = torch.tensor(excluded, dtype=torch.int64)
    tokens_R = torch.empty(len(hidden_RD), dtype=torch.int64)
    probability_R = torch.empty(len(hidden_RD), dtype=torch.float32)
    head = _Head(
        *(tensor.data_ptr() for tensor in (hidden_RD, weight_VD, excluded_X, tokens_R, probability_R)),
        len(hidden_RD),
        vocabulary,
        depth,
        len(excluded),
        hidden_RD.dtype is torch.bfloat16,
    )
    raise_for(native.status_of("es_choose", head))
    return tokens_R, probability_R


def best_token(logits_RV: Tensor, excluded: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The id of each row's largest logit, int64 [R], the lowest one where several are, and its probability under the
    softmax, float32 [R]: NaN if a logit of the row is not finite. `excluded` ids have no part in either."""
    check_excluded(excluded, logits_RV.shape[1])
    index_X = torch.tensor(excluded, dtype=torch.int64, device=logits_RV.device)
    slices = [_best_token(some_RV, index_X) for some_RV in torch.split(logits_RV, ROWS_AT_A_TIME)]
    tokens, probabilities = zip(*slices, strict=True)
    return torch.cat(tokens), torch.cat(probabilities)


def _best_token(logits_RV: Tensor, excluded_X: Tensor) -> tuple[Tensor, Tensor]:
    finite_R = logits_RV.isfinite().all(dim=1)
    clean_RV = logits_RV.float().index_fill(1, excluded_X, float("-inf"))
    tokens_R = clean_RV.argmax(dim=1)
    probability_R = clean_RV.softmax(dim=1).gather(1, tokens_R.unsqueeze(1)).squeeze(1)
    return tokens_R, probability_R.masked_fill(~finite_R, float("nan"))


def check_excluded(excluded: Sequence[int], vocabulary: int) -> None:
    """ConfigError for ids that are none, or where no id is left."""
    if any(not 0 <= token < vocabulary for token in excluded):
        raise ConfigError(f"excluded ids must lie in 0..{vocabulary - 1}, got {list(excluded)}.")
    if len(set(excluded)) == vocabulary:
        raise ConfigError(f"all {vocabulary} ids of the vocabulary are excluded: expected one at least to choose from.")
