"""A budget on a device: the right bytes for every computation, however late copies and computation happen."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertshare.errors import CheckpointError, ConfigError, ExpertMemoryError
from expertshare.experts import BudgetedStore, DeviceSlots, ExpertLayout
from expertshare.experts.layout import LayerFile
from expertshare.experts.slot_memory import NUM_STAGED, ReadTeam
from expertshare.types import ExpertBank, Loan

from .conversion import FORM, random_model, random_slabs
from .streams import PACES, Point, SimulatedTransfer

LAYERS, EXPERTS = 3, 6
SLAB = FORM.slab_bytes
EXPECTED = [FORM.bank(random_slabs(FORM, layer, EXPERTS)) for layer in range(LAYERS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExpertLayout]:
    directory = tmp_path_factory.mktemp("experts")
    return directory, random_model(directory, LAYERS, EXPERTS)


def members(*experts: int) -> torch.Tensor:
    active_E = torch.zeros(EXPERTS, dtype=torch.bool)
    active_E[list(experts)] = True
    return active_E


def opened(
    model: tuple[Path, ExpertLayout],
    num_slots: int,
    transfer: SimulatedTransfer,
    *,
    kept: int = 0,
    prefetch: bool = True,
) -> BudgetedStore:
    memory = partial(DeviceSlots, transfer=transfer, num_kept=kept)
    return BudgetedStore(*model, num_slots * SLAB, prefetch=prefetch, memory=memory)


class Reader:
    """Computation that reads what was lent when its time comes, and counts how often that was somebody else's bytes."""

    def __init__(self, transfer: SimulatedTransfer) -> None:
        self.transfer, self.wrong, self.read = transfer, 0, 0

    def read_later(self, loan: Loan, layer: int, active_E: torch.Tensor) -> None:
        self.transfer.compute(partial(self._compare, loan, layer, active_E.nonzero().flatten().tolist()))

    def _compare(self, loan: Loan, layer: int, experts: list[int]) -> None:
        bank, expected = loan.bank, EXPECTED[layer]
        assert isinstance(bank, ExpertBank)
        assert isinstance(expected, ExpertBank)
        assert loan.slot_of_E is not None
        for expert in experts:
            slot = int(loan.slot_of_E[expert])
            pairs = ((bank.gate_up_EHD, expected.gate_up_EHD), (bank.down_EDF, expected.down_EDF))
            self.read += 1
            self.wrong += not all(torch.equal(a[slot].view(torch.int32), b[expert].view(torch.int32)) for a, b in pairs)


requests = st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=4), min_size=1, max_size=30)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(
    asked=requests,
    held=st.sets(st.integers(0, EXPERTS - 1), max_size=3),
    num_slots=st.integers(7, 18),
    kept=st.integers(0, LAYERS * EXPERTS),
    prefetch=st.booleans(),
    pace=st.sampled_from(PACES),
    seed=st.integers(0, 1000),
)
def test_whatever_is_asked_computation_reads_the_right_experts(
    model: tuple[Path, ExpertLayout],
    asked: list[set[int]],
    held: set[int],
    num_slots: int,
    kept: int,
    prefetch: bool,
    pace: str,
    seed: int,
) -> None:
    transfer = SimulatedTransfer(pace, seed=seed)
    reader = Reader(transfer)
    with opened(model, num_slots, transfer, kept=kept, prefetch=prefetch) as store, ExitStack() as outer:
        holding = outer.enter_context(store.borrow(1, members(*held))) if held else None
        for turn, experts in enumerate(asked):
            layer, active_E = turn % LAYERS, members(*experts)
            with store.borrow(layer, active_E) as loan:
                reader.read_later(loan, layer, active_E)
            if holding is not None:
                reader.read_later(holding, 1, members(*held))
        total = store.statistics().total
    transfer.finish()
    assert (reader.wrong, total.requests) == (0, sum(map(len, asked)) + len(held))
    assert reader.read == sum(map(len, asked)) + len(held) * len(asked)
    assert total.copies >= total.requests - (total.hits or 0) - total.prefetch_hits
    assert total.reads <= total.copies <= transfer.num_copies  # one fetched ahead may not have been asked about yet
    if kept == LAYERS * EXPERTS:
        assert total.reads <= kept


def walk(store: BudgetedStore, reader: Reader, turns: int = 90) -> None:
    generator = torch.Generator().manual_seed(0)
    for turn in range(turns):
        layer, active_E = turn % LAYERS, members(*torch.randperm(EXPERTS, generator=generator)[:4].tolist())
        with store.borrow(layer, active_E) as loan:
            reader.read_later(loan, layer, active_E)


@pytest.mark.parametrize(
    ("forget", "pace"), [("vacant", "late computation"), ("arrival", "late copies"), ("staging", "all late")]
)
def test_the_simulation_notices_each_wait_that_is_left_out(
    model: tuple[Path, ExpertLayout], forget: str, pace: str
) -> None:
    for left_out, right in (((forget,), False), ((), True)):
        transfer = SimulatedTransfer(pace, forget=left_out)
        reader = Reader(transfer)
        with opened(model, 5, transfer) as store:
            walk(store, reader)
        transfer.finish()
        assert (reader.wrong == 0) == right


def test_the_borrowing_thread_waits_for_no_copy(model: tuple[Path, ExpertLayout]) -> None:
    transfer = SimulatedTransfer("all late")
    reader = Reader(transfer)
    with opened(model, LAYERS * EXPERTS, transfer, prefetch=False) as store:
        with store.borrow(0, members(*range(EXPERTS))) as loan:
            reader.read_later(loan, 0, members(*range(EXPERTS)))
        assert EXPERTS < NUM_STAGED
        assert reader.read == 0  # lent, used and given back, and nothing has happened yet
    transfer.finish()
    assert (reader.read, reader.wrong) == (EXPERTS, 0)


def test_what_the_host_keeps_is_read_once(model: tuple[Path, ExpertLayout]) -> None:
    found = []
    for kept in (0, 5, LAYERS * EXPERTS):
        transfer = SimulatedTransfer("random")
        reader = Reader(transfer)
        with opened(model, 4, transfer, kept=kept, prefetch=False) as store:
            walk(store, reader)
            statistics = store.statistics()
        transfer.finish()
        assert reader.wrong == 0
        told = statistics.to_json()
        assert told["bytes_copied"] == told["copies"] * SLAB
        assert told["bytes_read"] == told["reads"] * SLAB
        found.append((told["reads"], told["copies"]))
    (none, copies), (some, same), (every, again) = found
    assert copies == same == again == none > some > every
    assert every <= LAYERS * EXPERTS


def test_a_failed_read_costs_neither_a_staging_slab_nor_room(
    model: tuple[Path, ExpertLayout], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, broken = LayerFile.read_into, True

    def read_into(file: LayerFile, expert: int, memory: memoryview) -> None:
        if broken and expert == 2:
            raise CheckpointError("the disk is ill")
        genuine(file, expert, memory)

    monkeypatch.setattr(LayerFile, "read_into", read_into)
    for kept in (0, LAYERS * EXPERTS):
        broken = True
        transfer = SimulatedTransfer("random")
        reader = Reader(transfer)
        with opened(model, 4, transfer, kept=kept) as store:
            for _ in range(2 * NUM_STAGED):
                with pytest.raises(CheckpointError, match="is ill"), store.borrow(0, members(2)):
                    pass
            broken = False
            walk(store, reader)
            assert kept == 0 or store.statistics().total.reads <= kept
        transfer.finish()
        assert reader.wrong == 0


def test_a_budget_below_one_coreset_names_the_one_that_works(model: tuple[Path, ExpertLayout]) -> None:
    with (
        opened(model, 3, SimulatedTransfer()) as store,
        pytest.raises(ExpertMemoryError, match=r"layer 2 needs 5 experts.*at least 20KiB, got 12KiB"),
        store.borrow(2, members(0, 1, 2, 3, 4)),
    ):
        pass
    with pytest.raises(ExpertMemoryError, match="at least 4KiB, which is one expert"):
        BudgetedStore(*model, SLAB - 1, memory=partial(DeviceSlots, transfer=SimulatedTransfer()))


def test_a_store_opened_in_inference_mode_is_filled(model: tuple[Path, ExpertLayout]) -> None:
    transfer = SimulatedTransfer()
    reader = Reader(transfer)
    with torch.inference_mode(), opened(model, 5, transfer) as store:
        walk(store, reader, turns=9)
    transfer.finish()
    assert reader.wrong == 0


def test_a_closed_store_says_so_and_lent_memory_outlives_it(model: tuple[Path, ExpertLayout]) -> None:
    transfer = SimulatedTransfer("all late")
    reader = Reader(transfer)
    store = opened(model, 4, transfer)
    with store.borrow(0, members(1, 2)) as loan:
        store.close()
        store.close()
        reader.read_later(loan, 0, members(1, 2))
    transfer.finish()
    assert (reader.read, reader.wrong) == (2, 0)
    with pytest.raises(ConfigError, match="closed"), store.borrow(0, members(1)):
        pass


def test_what_the_host_keeps_is_brought_by_the_borrowing_thread_at_once(
    model: tuple[Path, ExpertLayout], monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = SimulatedTransfer("all late")
    reader = Reader(transfer)
    with opened(model, 4, transfer, kept=LAYERS * EXPERTS, prefetch=False) as store:
        for layer in range(LAYERS):
            for experts in ((0, 1, 2), (3, 4, 5)):
                with store.borrow(layer, members(*experts)):
                    pass
        store.reset()
        monkeypatch.setattr(ReadTeam, "submit", lambda *_: pytest.fail("queued"))
        walk(store, reader)
        total = store.statistics().total
    transfer.finish()
    assert (reader.wrong, total.reads, total.stall_s) == (0, 0, 0.0)
    assert total.copies == total.requests - (total.hits or 0) > 0


@pytest.mark.parametrize("kept", [0, LAYERS * EXPERTS])
def test_ctrl_c_at_any_call_leaves_no_slot_with_the_wrong_bytes(model: tuple[Path, ExpertLayout], kept: int) -> None:
    class Interrupted(SimulatedTransfer):
        """The borrowing thread is interrupted before, or after, every tenth of its calls."""

        calls = 0

        def interrupt(self, before: bool) -> None:
            if threading.current_thread() is threading.main_thread():
                self.calls += before
                if self.calls % 10 == 0 and before == (self.calls % 20 == 0):
                    raise KeyboardInterrupt

        def copy(self, slot_B: torch.Tensor, staged_B: torch.Tensor, *, after: Point) -> Point:
            self.interrupt(True)
            copied = super().copy(slot_B, staged_B, after=after)
            self.interrupt(False)
            return copied

        def computed(self) -> Point:
            self.interrupt(True)
            point = super().computed()
            self.interrupt(False)
            return point

        def computation_waits(self, copied: Point) -> None:
            self.interrupt(True)
            super().computation_waits(copied)
            self.interrupt(False)

    for pace in PACES:
        transfer = Interrupted(pace)
        reader = Reader(transfer)
        interrupts = 0
        with opened(model, 5, transfer, kept=kept) as store:
            for turn in range(200):
                layer, active_E = turn % LAYERS, members(turn % EXPERTS, (turn * 5 + 1) % EXPERTS, (turn * 3) % EXPERTS)
                try:
                    with store.borrow(layer, active_E) as loan:
                        reader.read_later(loan, layer, active_E)
                except KeyboardInterrupt:
                    interrupts += 1
            assert not any(len(lease.slots) for lease in store._leases)
        transfer.finish()
        assert reader.wrong == 0
        assert interrupts > 10
        assert reader.read > 100
