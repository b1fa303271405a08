"""The doors to dense computation: torch, or our own kernel under the backend "cpu". Same results within rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from expertshare.kernels.cpu_experts import swiglu_cpu
from expertshare.kernels.cpu_ops import best_token_cpu, linear_cpu
from expertshare.kernels.quantised_head import quantised_head, quantised_logits
from expertshare.kernels.triton.head import best_token_triton
from expertshare.kernels.vocabulary import best_token
from expertshare.types import QuantisedTable


def linear(x: Tensor, weight_ND: Tensor, *, backend: str) -> Tensor:
    """x [..., D] times the transpose of weight_ND: [..., N] in the same dtype.

    Raises ConfigError for what the backend "cpu" cannot take; the others are torch's own operation.
    """
    return linear_cpu(x, weight_ND) if backend == "cpu" else F.linear(x, weight_ND)


def swiglu(x: Tensor, gate_up_HD: Tensor, down_DF: Tensor, *, backend: str) -> Tensor:
    """down(silu(gate x) * up x) with the gate rows first in gate_up: same shape and dtype as x [..., D].

    To the backend "cpu" this is a layer of one expert, which every token uses. Raises ConfigError as `linear` does.
    """
    if backend != "cpu":
        gate, up = F.linear(x, gate_up_HD).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down_DF)
    return swiglu_cpu(x, gate_up_HD, down_DF)


def head(
    hidden_RD: Tensor, weight_VD: Tensor | QuantisedTable, excluded: Sequence[int], *, backend: str
) -> tuple[Tensor, Tensor]:
    """The most probable token of each row, int64 [R], and its probability, float32 [R]; `excluded` ids left out.

    The probability is NaN where a logit is not finite. Ties go to the lower id. "cpu" and "triton" keep no logits.
    Raises ConfigError for what it cannot take.
    """
    if backend == "triton":
        return best_token_triton(hidden_RD, weight_VD, excluded)
    if isinstance(weight_VD, QuantisedTable):
        return quantised_head(hidden_RD, weight_VD, excluded, backend=backend)
    if backend == "cpu":
        return best_token_cpu(hidden_RD, weight_VD, excluded)
    return best_token(F.linear(hidden_RD, weight_VD), excluded)


def logits(hidden: Tensor, weight_VD: Tensor | QuantisedTable, *, backend: str) -> Tensor:
    """Scores of the whole vocabulary [..., V], in the dtype of `hidden` [..., D]. Raises ConfigError as `linear`."""
    if isinstance(weight_VD, Tensor):
        return linear(hidden, weight_VD, backend=backend)
    found_RV = quantised_logits(hidden.reshape(-1, hidden.shape[-1]), weight_VD, backend=backend)
    return found_RV.view(*hidden.shape[:-1], found_RV.shape[1])
