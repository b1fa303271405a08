"""The calls of Graphs, in their order, by stand-ins for torch's: it has not been run on a GPU by these tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from expertshare.kernels import TorchBackend
from expertshare.kernels.triton.backend import TritonBackend
from expertshare.kernels.triton.graphs import Graphs


class Recorded:
    """torch.cuda, as far as a capture goes. calls: what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.pools: list[Any] = []

    def stream_named(self, name: str) -> Any:
        class Stream:
            def wait_stream(_, other: Any) -> None:
                self.calls.append(f"{name} waits for {other.name}")

        stream = Stream()
        stream.name = name  # type: ignore[attr-defined]
        return stream

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self.calls.append(f"on {stream.name}")
        yield
        self.calls.append("back")

    @contextmanager
    def graph(self, graph: Any, pool: Any, capture_error_mode: str) -> Iterator[None]:
        self.pools.append(pool)
        self.calls.append(f"capture {capture_error_mode}")
        yield
        self.calls.append("captured")

    def graph_object(self) -> Any:
        calls = self.calls

        class Graph:
            def replay(self) -> None:
                calls.append("replay")

            def pool(self) -> tuple[int, int]:
                return (7, 7)

        return Graph()


def test_work_is_warmed_up_aside_and_captured_into_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Recorded()
    main = cuda.stream_named("main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: cuda.stream_named("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", cuda.on)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: cuda.calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", cuda.graph_object)
    monkeypatch.setattr(torch.cuda, "graph", cuda.graph)
    graphs = Graphs()
    replay = graphs.capture(lambda: cuda.calls.append("work"), list)
    replay()
    assert cuda.calls == [
        *("side waits for main", "on side", "work", "work", "back", "main waits for side", "synchronize"),
        *("capture thread_local", "work", "captured", "replay"),
    ]
    graphs.capture(lambda: None, list)
    assert cuda.pools == [None, (7, 7)]


def test_only_gpus_have_graphs_and_only_of_what_does_not_ask_the_host() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert isinstance(TritonBackend().graphs(gpu), Graphs)
    assert TritonBackend().graphs(cpu) == "the model is on cpu; graphs are a GPU's"
    assert str(TorchBackend().graphs(gpu)).startswith("the backend 'torch' asks the host")
