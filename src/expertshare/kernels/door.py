"""The one door to expert computation: same signature whichever backend runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError, nearest
from expertshare.kernels.cpu_experts import moe_ffn_cpu
from expertshare.kernels.grouped import moe_ffn_grouped
from expertshare.kernels.quantise import dequantised_experts
from expertshare.kernels.reference import moe_ffn_reference
from expertshare.kernels.triton import check_available, interpreted
from expertshare.kernels.triton.experts import moe_ffn_triton
from expertshare.types import Arrivals, Bank, ExpertBank, RoutingPlan

Backend = Literal["grouped", "cpu", "triton", "reference"]

BACKENDS: dict[str, Callable[[Tensor, RoutingPlan, ExpertBank], Tensor]] = {
    "grouped": moe_ffn_grouped,
    "cpu": moe_ffn_cpu,
    "triton": moe_ffn_triton,
    "reference": moe_ffn_reference,
}

TAKES_CODES: dict[str, Callable[[Tensor, RoutingPlan, Bank], Tensor]] = {
    "cpu": moe_ffn_cpu,
    "triton": moe_ffn_triton,
}
"""Backends that multiply quantised weights as they are."""

AUTO = "auto"
_log = logging.getLogger(__name__)


def resolve_backend(name: str, device: torch.device) -> str:
    """The backend that `name` stands for on a device; "auto" is the fastest one for inference there.

    Where our own kernel would be the fastest but was not built, that is said once, in one line of the log. Raises
    ConfigError for a name that does not exist and for "cpu" or "triton" where they cannot run.
    """
    if name == AUTO:
        if device.type != "cpu":
            return "grouped"
        reason = native.unavailable_reason()
        if reason is None:
            return "cpu"
        _say_once(f"experts are computed by torch, more slowly than by our own kernel: {reason}")
        return "grouped"
    if name not in BACKENDS:
        raise ConfigError(f"unknown expert backend {name!r}. {nearest(name, [AUTO, *BACKENDS])}")
    if name == "cpu":
        native.library()
    if name == "triton":
        check_available()
    runs_on = {"cpu": "cpu", "triton": "cpu" if interpreted() else "cuda"}.get(name, device.type)
    if device.type != runs_on:
        why = " (TRITON_INTERPRET is set)" if name == "triton" and interpreted() else ""
        raise ConfigError(
            f"the backend {name!r} expects a model on the device {runs_on!r}{why}, got one on {device.type!r}: use "
            f"--device {runs_on}, or the backend 'auto'."
        )
    return name


@cache
def _say_once(message: str) -> None:
    _log.warning(message)


def moe_ffn(
    x_TD: Tensor, plan: RoutingPlan, bank: Bank, *, backend: str = "grouped", arrivals: Arrivals | None = None
) -> Tensor:
    """Run each token through the experts of its plan and mix the outputs with its weights.

    x_TD: float32 or bfloat16, same dtype as the bank unless that is quantised. Returns [T, D] in that dtype; sums are
    float32. Of quantised experts "cpu" and "triton" multiply the codes (moe_ffn_cpu and moe_ffn_triton say how); the
    other backends widen those in use to the tokens' dtype first, which is slow. arrivals: of a loan; "cpu" computes
    meanwhile with what is there, the others wait.
    Raises ConfigError for a backend that does not exist, and for "cpu" or "triton" where they cannot run.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"unknown expert backend {backend!r}. {nearest(backend, BACKENDS)}")
    if arrivals is not None:
        if backend == "cpu":
            return moe_ffn_cpu(x_TD, plan, bank, arrivals)
        arrivals.wait()
    if isinstance(bank, ExpertBank):
        return BACKENDS[backend](x_TD, plan, bank)
    if backend in TAKES_CODES:
        return TAKES_CODES[backend](x_TD, plan, bank)
    return BACKENDS[backend](x_TD, *dequantised_experts(plan, bank, x_TD.dtype))
