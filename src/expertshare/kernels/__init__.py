"""Computation behind doors: experts by `moe_ffn`, dense layers by `linear` and `swiglu`, the vocabulary by `head`."""

from expertshare.kernels.dense import head, linear, swiglu
from expertshare.kernels.door import BACKENDS, Backend, moe_ffn

__all__ = ["BACKENDS", "Backend", "head", "linear", "moe_ffn", "swiglu"]
