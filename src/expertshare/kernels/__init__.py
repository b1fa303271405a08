"""Expert computation behind one door: `moe_ffn`."""

from expertshare.kernels.door import AUTO, BACKENDS, Backend, moe_ffn, resolve_backend

__all__ = ["AUTO", "BACKENDS", "Backend", "moe_ffn", "resolve_backend"]
