"""Computation behind doors: experts by `moe_ffn`, the rest of a model by `linear`, `swiglu`, `attend` and `head`."""

from expertshare.kernels.attention import attend
from expertshare.kernels.dense import head, linear, logits, swiglu
from expertshare.kernels.door import AUTO, BACKENDS, Backend, moe_ffn, resolve_backend

__all__ = [
    "AUTO",
    "BACKENDS",
    "Backend",
    "attend",
    "head",
    "linear",
    "logits",
    "moe_ffn",
    "resolve_backend",
    "swiglu",
]
