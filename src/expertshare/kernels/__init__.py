"""Expert computation behind one door: `moe_ffn`."""

from expertshare.kernels.door import BACKENDS, Backend, moe_ffn

__all__ = ["BACKENDS", "Backend", "moe_ffn"]
