"""Our expert computation as an experts implementation of transformers: `experts_implementation="expertshare"`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels.cpu_backend import CpuBackend
from expertshare.types import ExpertBank, RoutingPlan

NAME = "expertshare"
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_OURS = CpuBackend()
_log = logging.getLogger(__name__)
_FITS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
"""Why an experts module's weights and activation are not for our kernel (None: they are), looked at once."""

Observer = Callable[[Tensor], None]
OBSERVERS: WeakKeyDictionary[nn.Module, list[Observer]] = WeakKeyDictionary()
"""Who is told which experts were multiplied (bool [E]), by experts module: ExpertsInterface passes on nothing else."""


def register_experts() -> None:
    """Make the implementation known to transformers; again does no harm."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in the place of an experts module's forward: [T, D] in, [T, D] out, the same dtype.

    Our CPU kernel reads the fused weights where they lie, and no expert that nobody uses: slots of weight 0 are unused.
    For what the kernel does not compute (another device, dtype, activation or layout, biases, gradients) transformers'
    own "grouped_mm" does the work, which is said once in the log. Raises ConfigError for experts that neither can do.
    """
    reason = _why_not_ours(self, hidden_states, top_k_weights)
    if reason is not None:
        if hidden_states.dtype not in _GROUPED_DTYPES:
            raise ConfigError(
                f"the experts implementation {NAME!r} expects float32, bfloat16 or float16, got {hidden_states.dtype}: "
                'convert the model, or use experts_implementation="eager".'
            )
        _say_once(f"experts of {type(self).__name__} are computed by transformers' grouped_mm: {reason}")
        output: Tensor = _grouped_mm()(self, hidden_states, top_k_index, top_k_weights)
        if OBSERVERS.get(self):
            _tell(self, _active(torch.where(top_k_index < self.num_experts, top_k_index, -1), self.num_experts))
        return output
    used_TK = (top_k_weights != 0) & (top_k_index < self.num_experts) & (top_k_index >= 0)
    ids_TK = torch.where(used_TK, top_k_index, -1)
    active_E = _active(ids_TK, self.num_experts)
    bank = ExpertBank(self.gate_up_proj.detach(), self.down_proj.detach())
    result = _OURS.moe_ffn(hidden_states.detach(), RoutingPlan(ids_TK, top_k_weights.float(), active_E), bank)
    _tell(self, active_E)
    return result


def _grouped_mm() -> Callable[..., Tensor]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    function: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    return function


def _active(ids_TK: Tensor, num_experts: int) -> Tensor:
    named = torch.zeros(num_experts + 1, dtype=torch.bool, device=ids_TK.device)
    return named.index_fill_(0, (ids_TK + 1).flatten(), True)[1:]


def _tell(experts: nn.Module, active_E: Tensor) -> None:
    for observer in OBSERVERS.get(experts, ()):
        observer(active_E)


@cache
def _say_once(message: str) -> None:
    _log.warning(message)


def _why_not_ours(experts: Any, x_TD: Tensor, weights_TK: Tensor) -> str | None:
    if experts not in _FITS:
        _FITS[experts] = _why_weights_do_not_fit(experts)
    if _FITS[experts] is not None:
        return _FITS[experts]
    weight = experts.gate_up_proj
    if x_TD.device.type != "cpu" or weight.device.type != "cpu":
        return f"our kernel runs on the CPU, the model is on {weight.device.type}"
    dtypes = {x_TD.dtype, weight.dtype, experts.down_proj.dtype}
    if len(dtypes) > 1 or x_TD.dtype not in (torch.float32, torch.bfloat16):
        return f"our kernel takes float32 or bfloat16 throughout, got {', '.join(sorted(map(str, dtypes)))}"
    tracked = any(tensor.requires_grad for tensor in (x_TD, weights_TK, weight, experts.down_proj))
    if torch.is_grad_enabled() and tracked:
        return "our kernel has no gradients; call the model under torch.no_grad() for inference"
    return native.unavailable_reason()


def _why_weights_do_not_fit(experts: Any) -> str | None:
    gate_up, down = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
    if not isinstance(down, Tensor) or not getattr(experts, "num_experts", 0):
        raise ConfigError(
            f"the experts implementation {NAME!r} expects fused parameters gate_up_proj [E, 2F, H] and down_proj "
            f'[E, H, F], got {type(experts).__name__}: load the model with experts_implementation="eager".'
        )
    if not isinstance(gate_up, Tensor) or not getattr(experts, "has_gate", True):
        return "they have no gate"
    for flag, words in (
        ("has_bias", "they have biases"),
        ("is_transposed", "their weights are transposed"),
        ("has_post_expert_norm", "they have a norm of their own"),
    ):
        if getattr(experts, flag, False):
            return words
    shape = (experts.num_experts, down.shape[-1] * 2, down.shape[-2])
    if tuple(gate_up.shape) != shape or len(down) != experts.num_experts:
        return f"gate_up_proj is {tuple(gate_up.shape)}, not [E, 2F, H] = {shape}"
    if not (gate_up[0].is_contiguous() and down[0].is_contiguous()):
        return "an expert's weights are not contiguous"
    return None if _is_swiglu(experts) else "their activation is not silu(gate) * up with gate rows first"


def _is_swiglu(experts: Any) -> bool:
    """Whether the module's own gate does what the kernel does, on values that tell the known variants apart."""
    probe = torch.linspace(-30.0, 30.0, 64).view(2, 32)
    gate, up = probe.chunk(2, dim=-1)
    with torch.no_grad():
        return torch.allclose(experts._apply_gate(probe), F.silu(gate) * up, rtol=1e-5, atol=1e-6)
