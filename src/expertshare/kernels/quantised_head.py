"""A vocabulary in int8: best token and probability, logits, embeddings, without a float copy of the table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.kernels.cpu_ops import quantised_head_cpu, quantised_logits_cpu
from expertshare.kernels.quantise import table_slices
from expertshare.kernels.vocabulary import best_token
from expertshare.types import QuantisedTable

ROWS_AT_A_TIME = 4096
"""Rows of the vocabulary that torch widens together: 32 MB at 2048 features in float32."""


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
    return quantised_head_cpu(hidden_RD, weight, excluded)


def quantised_logits(hidden_RD: Tensor, weight: QuantisedTable, *, backend: str) -> Tensor:
    """Scores of the whole vocabulary [R, V] in the dtype of hidden_RD, from which `quantised_head` chooses."""
    if backend != "cpu":
        return _logits_by_slices(hidden_RD, weight)
    return quantised_logits_cpu(hidden_RD, weight)


def _logits_by_slices(hidden_RD: Tensor, weight: QuantisedTable) -> Tensor:
    slices = table_slices(weight, hidden_RD.dtype, ROWS_AT_A_TIME)
    return torch.cat([F.linear(hidden_RD, part) for part in slices], dim=-1)
