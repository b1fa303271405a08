"""The router's gate in the native library: hidden states to scores in one pass, for inference on the CPU."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p

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
        *((name, c_int32) for name in ("is_bfloat16", "is_softmax", "isa", "num_threads")),
        ("team", c_void_p),
    )


def takes(x_GLD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> bool:
    """Whether the library is there and can compute with these: float32 weights, no gradients, all on the CPU."""
    others = (weight_ED,) if bias_E is None else (weight_ED, bias_E)
    return (
        native.available()
        and x_GLD.dtype in (torch.float32, torch.bfloat16)
        and x_GLD.is_cpu
        and all(tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in others)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_GLD, *others)))
        and not torch.compiler.is_compiling()
    )


def gate_scores(
    x_GLD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, live_GL: Tensor, spec: RouterSpec
) -> RouterScores:
    """`router_scores` of x times the router's weights, for tensors that `takes` accepts.

    x_GLD: float32 or bfloat16, widened exactly. Products and sums are float32: within a few units in the last place of
    torch's, and other ones with another instruction set, but the same for a token whatever tokens stand beside it and
    in however many threads. A logit below -87 counts as -87 (an affinity of 2e-38).
    """
    library = native.library()
    library.es_affinity.argtypes = [POINTER(Gate)]
    x_GLD = x_GLD.contiguous()
    affinity_GLE = torch.empty((*x_GLD.shape[:2], len(weight_ED)))
    choice_GLE = affinity_GLE if bias_E is None else torch.empty_like(affinity_GLE)
    gate = describe(x_GLD, weight_ED, bias_E, spec)
    gate.affinity = affinity_GLE.data_ptr()
    gate.choice = None if bias_E is None else choice_GLE.data_ptr()
    check_status(library.es_affinity(byref(gate)))
    return RouterScores(affinity_GLE, choice_GLE, live_GL)


def describe(x_GLD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> Gate:
    """The gate as the library reads it, but for where its scores go. x_GLD: contiguous."""
    groups, length, depth = x_GLD.shape
    return Gate(
        x_GLD.data_ptr(),
        weight_ED.data_ptr(),
        None if bias_E is None else bias_E.data_ptr(),
        None,
        None,
        groups * length,
        depth,
        len(weight_ED),
        int(x_GLD.dtype == torch.bfloat16),
        int(spec.activation == "softmax"),
        native.isa_number(),
        native.num_threads(),
        native.team(),
    )


def check_status(status: int) -> None:
    """Raise ConfigError unless the library could do what was asked."""
    if status != 0:
        raise ConfigError(
            "the router's gate could not get its memory or its threads: pass fewer tokens at a time, or set fewer "
            "threads with set_num_threads."
        )
