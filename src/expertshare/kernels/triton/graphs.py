"""CUDA graphs: work that is recorded once and replayed, and the two ways between the device and its host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], None]
WARM_UP = 2
"""Runs before a capture: kernels are compiled, workspaces allocated, what comes from the host once is there."""


class Graphs:
    """Graphs of one object share the memory of what they compute in between; they run one at a time."""

    def __init__(self) -> None:
        self._memory: Any = None  # an opaque handle

    def capture(self, work: Work, fixed: Callable[[], Sequence[Tensor]]) -> Work:
        """The replay of `work`, after runs in a stream aside that warm it up. `work` asks the host nothing, and gets
        all that changes from `fixed` tensors; these stay where they are, and all that is wanted of it is left there.

        Raises RuntimeError where it cannot be captured.
        """
        del fixed
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # other threads may go on: what they ask of the device has nothing to do with this stream
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            work()
        self._memory = graph.pool()
        return graph.replay

    def host_buffer(self, like: Tensor) -> Tensor:
        """Memory for `send`, of a fixed tensor's shape and dtype, which the device reads by itself."""
        return torch.zeros(like.shape, dtype=like.dtype, pin_memory=True)

    def send(self, values: Tensor, to: Tensor) -> None:
        """Copy a host buffer to a fixed tensor without waiting. After the next `read` the buffer is free."""
        to.copy_(values, non_blocking=True)

    def read(self, tensor: Tensor) -> Tensor:
        """The tensor on the host, after all that was asked of the device: the one wait of a step."""
        return tensor.cpu()
