"""Stores that have every expert at hand, sizes, and opening what was asked for."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from expertshare.errors import ConfigError, InputError
from expertshare.experts import (
    BudgetedStore,
    ExpertLayout,
    ExpertMemory,
    MappedStore,
    ResidentSlabs,
    StoreOptions,
    format_size,
    open_store,
    parse_size,
)
from expertshare.experts.layout import layer_file_name
from expertshare.types import ExpertBank

from .conversion import FORM, random_model, random_slabs

LAYERS, EXPERTS = 2, 4


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, ExpertLayout]:
    return tmp_path, random_model(tmp_path, LAYERS, EXPERTS)


@pytest.mark.parametrize("kind", [MappedStore, ResidentSlabs])
def test_every_expert_is_its_own_row(
    model: tuple[Path, ExpertLayout], kind: type[MappedStore] | type[ResidentSlabs]
) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with kind(*model) as store:
        for layer in range(LAYERS):
            with store.borrow(layer, torch.tensor([True, False, True, True])) as loan:
                expected = FORM.bank(random_slabs(FORM, layer, EXPERTS))
                assert loan.slot_of_E is None
                assert isinstance(loan.bank, ExpertBank)
                assert isinstance(expected, ExpertBank)
                for name in ("gate_up_EHD", "down_EDF"):
                    found, right = getattr(loan.bank, name), getattr(expected, name)
                    assert torch.equal(found.view(torch.int32), right.view(torch.int32))
        statistics = store.statistics()
        assert statistics.total.requests == 6
        assert statistics.total.hit_rate == (None if kind is MappedStore else 1.0)
        assert statistics.to_json()["bytes_read"] == (0 if kind is MappedStore else LAYERS * EXPERTS * FORM.slab_bytes)
        store.reset()
        assert store.statistics().total.requests == 0
    with pytest.raises(ConfigError, match="closed"), store.borrow(0, torch.ones(EXPERTS, dtype=torch.bool)):
        pass
    del loan, found
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_mapping_outlives_its_store_and_never_writes_the_file(model: tuple[Path, ExpertLayout]) -> None:
    path = model[0] / layer_file_name(1)
    before = path.read_bytes()
    store = MappedStore(*model)
    with store.borrow(1, torch.ones(EXPERTS, dtype=torch.bool)) as loan:
        assert isinstance(loan.bank, ExpertBank)
        store.close()
        del store
        gc.collect()
        right = FORM.bank(random_slabs(FORM, 1, EXPERTS))
        assert isinstance(right, ExpertBank)
        assert torch.equal(loan.bank.down_EDF.view(torch.int32), right.down_EDF.view(torch.int32))
        loan.bank.down_EDF.fill_(0)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3GiB", 3 << 30), ("800MB", 800_000_000), ("1.5 gib", 3 << 29), ("4096", 4096), ("7B", 7), (" 2kb ", 2000)],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_size(text) == expected
    assert parse_size(format_size(expected)) >= expected


@pytest.mark.parametrize("text", ["", "3 gigs", "-1GB", "0", "GiB", "1e9", "0.1B", "3GiBs"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a size"):
        parse_size(text)
    with pytest.raises(InputError, match=r"expert memory.*all, or mmap"):
        ExpertMemory.parse(text)


def test_the_store_that_was_asked_for_is_opened(model: tuple[Path, ExpertLayout]) -> None:
    for text, kind in (("all", ResidentSlabs), ("mmap", MappedStore), ("16KiB", BudgetedStore)):
        with open_store(*model, StoreOptions(memory=ExpertMemory.parse(text))) as store:
            assert type(store) is kind
    with pytest.raises(ConfigError, match="direct reads or a mapping"):
        open_store(*model, StoreOptions(memory=ExpertMemory.parse("mmap"), direct=True))
    assert str(ExpertMemory.parse("16KiB")) == "16384"
