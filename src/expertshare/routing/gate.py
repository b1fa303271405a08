"""The router's gate in the native library: hidden states to scores in one pass, for inference on the CPU."""

from __future__ import annotations

from ctypes import Structure, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from expertshare import native
from expertshare.config import RouterSpec
from expertshare.errors import ConfigError
from expertshare.types import RouterScores


class Gate(Structure):
    """es_gate of csrc/affinity.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "w", "bias", "affinity", "choice")),
        *((name, c_int64) for name in ("num_tokens", "depth", "num_experts")),
        *((name, c_int32) for name in ("is_bfloat16", "w_is_bfloat16", "is_softmax")),
        *native.HOW,
    )


def takes(x_GLD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> bool:
    """Whether the library is there and can compute with these: floats, no gradients, all on the CPU."""
    others = (weight_ED,) if bias_E is None else (weight_ED, bias_E)
    return (
        x_GLD.dtype in (torch.float32, torch.bfloat16)
        and x_GLD.is_cpu
        and weights_are_taken(weight_ED, bias_E)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_GLD, *others)))
        and not torch.compiler.is_compiling()
    )


def weights_are_taken(weight_ED: Tensor, bias_E: Tensor | None) -> bool:
    """The part of `takes` that stays true for a layer."""
    fits = weight_ED.dtype in (torch.float32, torch.bfloat16) and weight_ED.is_cpu and weight_ED.is_contiguous()
    if bias_E is not None:
        fits = fits and bias_E.dtype == torch.float32 and bias_E.is_cpu and bias_E.is_contiguous()
    return native.available() and fits


def gate_scores(
    x_GLD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, live_GL: Tensor, spec: RouterSpec
) -> RouterScores:
    """`router_scores` of x times the router's weights, for tensors that `takes` accepts.

    x_GLD, weight_ED: float32 or bfloat16, widened exactly. bias_E: float32. Products and sums are float32: within a few
    units in the last place of torch's, and other ones with another instruction set, but the same for a token whatever
    tokens stand beside it and in however many threads. A logit below -87 counts as -87 (an affinity of 2e-38).
    """
    x_GLD = x_GLD.contiguous()
    affinity_GLE = torch.empty((*x_GLD.shape[:2], len(weight_ED)))
    choice_GLE = affinity_GLE if bias_E is None else torch.empty_like(affinity_GLE)
    gate = gate_of_weights(weight_ED, bias_E, spec)
    gate.x, gate.is_bfloat16 = x_GLD.data_ptr(), int(x_GLD.dtype == torch.bfloat16)
    gate.num_tokens = x_GLD.shape[0] * x_GLD.shape[1]
    gate.affinity = affinity_GLE.data_ptr()
    gate.choice = None if bias_E is None else choice_GLE.data_ptr()
    check_status(native.status_of("es_affinity", gate))
    return RouterScores(affinity_GLE, choice_GLE, live_GL)


def gate_of_weights(weight_ED: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> Gate:
    """The part of the gate, as the library reads it, that stays the same for a layer."""
    gate = Gate()
    gate.w, gate.w_is_bfloat16 = weight_ED.data_ptr(), int(weight_ED.dtype == torch.bfloat16)
    gate.bias = None if bias_E is None else bias_E.data_ptr()
    gate.num_experts, gate.depth = weight_ED.shape
    gate.is_softmax = int(spec.activation == "softmax")
    return gate


def check_status(status: int) -> None:
    """Raise ConfigError unless the library could do what was asked."""
    if status != 0:
        raise ConfigError(
            "the router's gate could not get its memory or its threads: pass fewer tokens at a time, or set fewer "
            "threads with set_num_threads."
        )
