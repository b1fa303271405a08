"""What computes a model: an object with its operations, chosen once (`choose_backend`)."""

from expertshare.kernels.backend import AUTO, BACKENDS, Backend, CacheSlice, LayerKeyValues, Past, choose_backend
from expertshare.kernels.torch_backend import TorchBackend

__all__ = [
    "AUTO",
    "BACKENDS",
    "Backend",
    "CacheSlice",
    "LayerKeyValues",
    "Past",
    "TorchBackend",
    "choose_backend",
]
