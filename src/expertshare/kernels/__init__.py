"""Computation behind doors: experts by `moe_ffn`, the rest of a model by `linear`, `swiglu`, `rms_norm` and so on."""

from expertshare.kernels.attention import attend
from expertshare.kernels.cpu_experts import one_expert_cpu
from expertshare.kernels.cpu_ops import turn_heads_cpu
from expertshare.kernels.cpu_route import route_layer_cpu
from expertshare.kernels.dense import head, linear, logits, swiglu
from expertshare.kernels.door import AUTO, BACKENDS, Backend, moe_ffn, resolve_backend
from expertshare.kernels.norm import Place, add_and_norm, normalised, rms_norm
from expertshare.kernels.triton.route import route_layer_triton, select_and_assign

__all__ = [
    "AUTO",
    "BACKENDS",
    "Backend",
    "Place",
    "add_and_norm",
    "attend",
    "head",
    "linear",
    "logits",
    "moe_ffn",
    "normalised",
    "one_expert_cpu",
    "resolve_backend",
    "rms_norm",
    "route_layer_cpu",
    "route_layer_triton",
    "select_and_assign",
    "swiglu",
    "turn_heads_cpu",
]
