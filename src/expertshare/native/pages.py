"""Huge pages for weights: a reading pass over gigabytes otherwise waits for an address translation every 4 KiB."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_MADV_HUGEPAGE = 14
_LEAST_BYTES = 4 << 20


def ask_for_huge_pages(tensor: Tensor) -> None:
    """Ask the kernel to back a tensor's memory with huge pages; call it before the memory is first written.

    A hint, without effect on values: small tensors, other systems than Linux and kernels that refuse are left as they
    are. Only whole pages inside the tensor are touched.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.nbytes < _LEAST_BYTES:
        return
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)
