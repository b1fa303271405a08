"""The calls of CudaGraphs, in their order, by stand-ins for torch's: it has not been run on a GPU by these tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from expertshare.decoding.captured import CudaGraphs, graphs_of


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
    graphs = CudaGraphs()
    replay = graphs.capture(lambda: cuda.calls.append("work"), list)
    replay()
    assert cuda.calls == [
        *("side waits for main", "on side", "work", "work", "back", "main waits for side", "synchronize"),
        *("capture thread_local", "work", "captured", "replay"),
    ]
    graphs.capture(lambda: None, list)
    assert cuda.pools == [None, (7, 7)]


def test_only_gpus_have_graphs() -> None:
    assert graphs_of(torch.device("cpu")) is None
    assert isinstance(graphs_of(torch.device("cuda")), CudaGraphs)
