"""What a GPU is told, by stand-ins for torch's streams; memory that the system refuses; options that cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from expertshare.api import loading
from expertshare.errors import ConfigError, ExpertMemoryError, InputError
from expertshare.evaluation.runner import Setup
from expertshare.experts import (
    BudgetedStore,
    ExpertMemory,
    ResidentSlabs,
    StoreOptions,
    open_store,
    opening,
    slot_memory,
)
from expertshare.experts.slot_memory import CudaTransfer, in_chunks, pinned
from expertshare.models import load_model
from expertshare.models.loading import check_fits, check_pinned_fits

from .conversion import FORM, convert, random_model
from .streams import SimulatedTransfer

CUDA = torch.device("cuda", 0)
REFERENCE = Path(__file__).parents[2] / "models" / "reference"


class _Cuda:
    """torch.cuda with streams that note what they are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.current: Any = None
        cuda = self

        class Stream:
            def __init__(self, device: torch.device | str) -> None:
                self.name = "compute" if device == "compute" else "side"

            def wait_event(self, event: Any) -> None:
                cuda.log.append((self.name, "waits", event))

        class Event:
            def __init__(self, blocking: bool = False) -> None:
                self.blocking = blocking

            def record(self, stream: Stream) -> None:
                cuda.log.append((stream.name, "records", self))

            def synchronize(self) -> None:
                cuda.log.append(("host", "waits", self))

        @contextmanager
        def stream(chosen: Stream) -> Iterator[None]:
            before, cuda.current = cuda.current, chosen
            yield
            cuda.current = before

        self.current = Stream("compute")
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)

        def copy(_: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
            self.log.append((self.current.name, "copies", non_blocking))

        monkeypatch.setattr(torch.Tensor, "copy_", copy)


def test_a_copy_waits_for_its_slot_on_the_side_and_computation_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _Cuda(monkeypatch)
    moving: Any = CudaTransfer(CUDA)
    slab = torch.zeros(4, dtype=torch.uint8)
    vacant = moving.computed()
    copied = moving.copy(slab, slab, after=vacant)
    moving.computation_waits(copied)
    moving.host_waits(copied)
    assert cuda.log == [
        ("compute", "records", vacant),
        ("side", "waits", vacant),
        ("side", "copies", True),
        ("side", "records", copied),
        ("compute", "waits", copied),
        ("host", "waits", copied),
    ]
    assert copied.blocking  # a reader that waits must not keep a core busy


def test_pinned_memory_that_the_system_refuses_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **options: object) -> None:
        assert options["pin_memory"]
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be")

    monkeypatch.setattr(slot_memory.torch, "empty", refuse)
    with pytest.raises(ConfigError, match=r"64MiB.*\(CUDA error: out of memory\).*ulimit -l.*memlock.*--host-memory"):
        pinned(64 << 20)


def test_memory_that_the_card_refuses_says_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    _Cuda(monkeypatch)
    moving = CudaTransfer(CUDA)
    monkeypatch.setattr(slot_memory.torch, "empty", refuse)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 8 << 30))
    with pytest.raises(ExpertMemoryError, match=r"100 experts on cuda:0, got no 400KiB: 3GiB are free"):
        moving.slots(100, 4096)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 20])
def test_staging_begins_at_pages_and_wastes_little(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_memory, "_CHUNK_BYTES", 1 << 16)
    asked: list[int] = []

    def allocate(size: int) -> torch.Tensor:
        asked.append(size)
        return torch.zeros(size + 8, dtype=torch.uint8)[8:]

    slabs = in_chunks(count, 8192, allocate)
    assert len(slabs) == count
    assert all(slab.data_ptr() % 4096 == 0 and slab.shape == (8192,) for slab in slabs)
    assert len({slab.data_ptr() for slab in slabs}) == count
    assert all(size <= 1 << 16 for size in asked)
    assert sum(asked) == count * 8192 + len(asked) * 4096
    assert [slab.shape for slab in in_chunks(2, 1 << 17, allocate)] == [(1 << 17,)] * 2  # larger than a piece


def test_a_store_is_opened_for_the_device_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = random_model(tmp_path, 2, 4)
    made: list[SimulatedTransfer] = []
    monkeypatch.setattr(opening, "CudaTransfer", lambda device: made.append(SimulatedTransfer()) or made[-1])
    options = StoreOptions(memory=ExpertMemory.parse("16KiB"), host_memory=ExpertMemory.parse_host("13KiB"))
    with open_store(tmp_path, layout, options, CUDA) as store:
        assert isinstance(store, BudgetedStore)
        assert len(made) == 1
        for _ in range(2):
            for layer in range(2):
                with store.borrow(layer, torch.ones(4, dtype=torch.bool)):
                    pass
        told = store.statistics().total
    assert (told.copies, told.reads) == (16, 8 + 5)  # 13 KiB keep three of eight
    with open_store(tmp_path, layout, StoreOptions(memory=ExpertMemory.parse("16KiB"))) as store:
        assert len(made) == 1
    assert options.to_json()["host_memory"] == "13312"
    assert "host_memory" not in StoreOptions().to_json()


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        (StoreOptions(memory=ExpertMemory.parse("mmap")), CUDA, "a mapping is memory of the host"),
        (StoreOptions(), torch.device("mps"), "on the CPU or on a CUDA device"),
        (StoreOptions(host_memory=ExpertMemory.parse_host("all")), CUDA, "all experts on the GPU: leave one out"),
        (StoreOptions(host_memory=ExpertMemory.parse_host("all")), torch.device("cpu"), "the model is on the CPU"),
        (
            StoreOptions(memory=ExpertMemory.parse("1MiB"), host_memory=ExpertMemory.parse_host("100")),
            CUDA,
            "at least 4KiB, which is one expert, got 100B",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: StoreOptions, device: torch.device, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "CudaTransfer", lambda device: SimulatedTransfer())
    assert FORM.slab_bytes == 4096
    with pytest.raises(ConfigError, match=message):
        open_store(tmp_path, random_model(tmp_path, 2, 4), options, device)


def test_host_memory_is_a_size_or_all() -> None:
    assert ExpertMemory.parse_host("all").slabs(4096, 10) == 10
    assert ExpertMemory.parse_host("9KiB").slabs(4096, 10) == 2
    assert ExpertMemory.parse_host("1GiB").slabs(4096, 10) == 10
    with pytest.raises(InputError, match=r"host memory: expected a size.*or all"):
        ExpertMemory.parse_host("mmap")


def test_all_experts_on_a_card_that_is_too_small_name_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = random_model(tmp_path, 2, 4)

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "to", refuse)
    with pytest.raises(ExpertMemoryError, match=r"all experts on cuda:0, got none for 16KiB more.*--expert-memory"):
        ResidentSlabs(tmp_path, layout, device=CUDA)


def test_what_does_not_fit_on_the_card_or_beside_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = convert(REFERENCE, tmp_path / "model")
    left = {CUDA: 1 << 20}
    monkeypatch.setattr("expertshare.models.loading.free_memory_bytes", left.get)
    budget = ExpertMemory.parse("2MiB")
    with pytest.raises(ExpertMemoryError, match=r"need 2MiB of memory of cuda:0, but 1MiB can be had"):
        check_fits(converted, budget, dense_is_loaded=True, device=CUDA)
    check_fits(converted, ExpertMemory.parse("1MiB"), dense_is_loaded=True, device=CUDA)
    options = StoreOptions(memory=budget, host_memory=ExpertMemory.parse_host("all"))
    with pytest.raises(ExpertMemoryError, match=r"would pin [\d.]+MiB of the host's memory, but 1MiB can be had"):
        check_pinned_fits(converted, options, available_bytes=1 << 20)
    check_pinned_fits(converted, StoreOptions(memory=budget), available_bytes=1)
    with (
        pytest.raises(ConfigError, match="the model is on the CPU"),
        loading.opened(load_model(converted), options, Setup()),
    ):
        pass
