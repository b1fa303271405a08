"""Kernels for GPUs, written in Triton. Nothing here imports Triton before a kernel is called.

device/ holds what runs on the GPU, the modules beside it what the host does. Without a GPU the same code runs in
Triton's interpreter, for tests: set TRITON_INTERPRET=1 before Python starts.
"""

from expertshare.kernels.triton.availability import (
    check_available,
    interpreted,
    unavailable_reason,
)

__all__ = ["check_available", "interpreted", "unavailable_reason"]
