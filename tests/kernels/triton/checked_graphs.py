"""Graphs without a GPU: work is called again instead of replayed, and held to what a real graph could do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from expertshare.kernels.triton.backend import TritonBackend
from expertshare.kernels.triton.graphs import Graphs, Work

WAITING = (
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal"),
    *("repeat_interleave", "lift_fresh", "pin_memory"),
)
"""Operations for which the host of a GPU waits, or that bring data from it."""


class Transcript(TorchDispatchMode):
    """Notes what torch is asked for, with every number in it; fails where the host would wait.

    A graph repeats what was noted when it was captured. A call with another number, shape or fixed tensor in it would
    be another graph.
    """

    def __init__(self, fixed: Sequence[Tensor]) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._fixed = {tensor.untyped_storage().data_ptr(): number for number, tensor in enumerate(fixed)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{name} has no place in a captured step"
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{name} by a mask waits"
        if name != "set_":  # Triton's interpreter copies what kernels get
            self.lines.append(f"{func} {self._told(args)} {self._told(kwargs or {})}")
        return func(*args, **(kwargs or {}))

    def _told(self, value: Any) -> str:
        if isinstance(value, Tensor):
            place = self._fixed.get(value.untyped_storage().data_ptr(), "-")
            return f"{place}:{value.dtype}{tuple(value.shape)}{value.stride()}"
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(self._told, value))}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key}={self._told(one)}' for key, one in value.items())}}}"
        return repr(value)


class CheckedGraphs(Graphs):
    """Graphs on the CPU. captures, replays, reads: how often each was asked for."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.captures = self.replays = self.reads = 0
        self._fails = fails

    def capture(self, work: Work, fixed: Callable[[], Sequence[Tensor]]) -> Work:
        if self._fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore about it")
        work()  # what is made once may come from the host
        self.captures += 1
        places = [tensor.data_ptr() for tensor in fixed()]
        captured = self._run(work, fixed())

        def replay() -> None:
            self.replays += 1
            assert [tensor.data_ptr() for tensor in fixed()] == places, "a fixed tensor has moved"
            for now, then in zip(self._run(work, fixed()), captured, strict=True):
                assert now == then, "this replay differs from what was captured"

        return replay

    def host_buffer(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    def send(self, values: Tensor, to: Tensor) -> None:
        to.copy_(values)

    def read(self, tensor: Tensor) -> Tensor:
        self.reads += 1
        with torch._C.DisableTorchFunction():
            return OnHost(tensor.clone())

    @staticmethod
    def _run(work: Work, fixed: Sequence[Tensor]) -> list[str]:
        transcript = Transcript(fixed)
        with transcript:
            work()
        return transcript.lines


class CapturableBackend(TritonBackend):
    """Its graphs are those that are given; else a GPU's where the model is on one, and checked ones elsewhere."""

    def __init__(self, graphs: Graphs | None = None) -> None:
        self._graphs = graphs

    def graphs(self, device: torch.device) -> Graphs | str:
        return self._graphs or (CheckedGraphs() if device.type == "cpu" else super().graphs(device))


class OnHost(Tensor):
    """What was read already: looking into it is free."""


class HostWaits(TorchFunctionMode):
    """Notes how often Python looks into a tensor that is not known to be on the host, or makes one for the device."""

    LOOKING = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.LOOKING and not isinstance(args[0], OnHost):
            self.seen.append(name)
        if func is torch.tensor and "device" in (kwargs or {}):
            self.seen.append("tensor")
        return func(*args, **(kwargs or {}))
