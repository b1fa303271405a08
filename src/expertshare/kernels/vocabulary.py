"""The best token and its probability from logits in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertshare.errors import ConfigError

ROWS_AT_A_TIME = 8
"""Rows of the vocabulary that torch widens to float32 together: 5 MB at 157,184 ids, which a cache holds."""


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
