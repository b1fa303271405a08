"""The budgeted store: right bytes, never more slots than paid for, whatever fails."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertshare.errors import CheckpointError, ConfigError, ExpertMemoryError
from expertshare.experts import BudgetedStore, ExpertLayout, SlabFormat
from expertshare.experts.layout import LayerFile, layer_file_name
from expertshare.experts.slab import allocate_slabs
from expertshare.types import ExpertBank, Loan, QuantisedBank

from .conversion import FORM, random_model, random_slabs

LAYERS, EXPERTS = 3, 6
SLAB = FORM.slab_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExpertLayout]:
    directory = tmp_path_factory.mktemp("experts")
    return directory, random_model(directory, LAYERS, EXPERTS)


@pytest.fixture
def own_model(tmp_path: Path) -> tuple[Path, ExpertLayout]:
    return tmp_path, random_model(tmp_path, LAYERS, EXPERTS)


def members(*experts: int) -> torch.Tensor:
    active_E = torch.zeros(EXPERTS, dtype=torch.bool)
    active_E[list(experts)] = True
    return active_E


EXPECTED = [FORM.bank(random_slabs(FORM, layer, EXPERTS)) for layer in range(LAYERS)]


def assert_right(loan: Loan, layer: int, active_E: torch.Tensor) -> None:
    """Every active expert of the loan has its own bytes; NaN patterns are compared as bits."""
    bank, expected = loan.bank, EXPECTED[layer]
    assert isinstance(bank, ExpertBank)
    assert isinstance(expected, ExpertBank)
    for expert in active_E.nonzero().flatten().tolist():
        slot = expert if loan.slot_of_E is None else int(loan.slot_of_E[expert])
        for found, right in ((bank.gate_up_EHD, expected.gate_up_EHD), (bank.down_EDF, expected.down_EDF)):
            assert torch.equal(found[slot].view(torch.int32), right[expert].view(torch.int32))


requests = st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=4), min_size=1, max_size=30)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(asked=requests, num_slots=st.integers(4, 20), prefetch=st.booleans(), early=st.booleans())
def test_whatever_is_asked_the_right_experts_are_lent(
    model: tuple[Path, ExpertLayout], asked: list[set[int]], num_slots: int, prefetch: bool, early: bool
) -> None:
    with BudgetedStore(*model, num_slots * SLAB, prefetch=prefetch) as store:
        for turn, experts in enumerate(asked):
            layer, active_E = turn % LAYERS, members(*experts)
            with store.borrow(layer, active_E, early=early) as loan:
                assert isinstance(loan.bank, ExpertBank)
                assert len(loan.bank.down_EDF) <= num_slots
                if loan.arrivals is not None:
                    assert early
                    assert loan.slot_of_E is not None
                    loan.arrivals.wait()
                    assert (loan.arrivals.states_S[loan.slot_of_E[active_E]] == 1).all()
                time.sleep(0)  # let the readers write where they should not
                assert_right(loan, layer, active_E)
        total = store.statistics().total
        assert total.requests == sum(len(experts) for experts in asked)
        misses = total.requests - (total.hits or 0) - total.prefetch_hits
        assert total.reads >= misses
        assert prefetch or (total.prefetch_hits, total.reads) == (0, misses)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(held=st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=4), asked=requests, num_slots=st.integers(8, 12))
def test_what_is_lent_is_never_evicted(
    model: tuple[Path, ExpertLayout], held: set[int], asked: list[set[int]], num_slots: int
) -> None:
    with BudgetedStore(*model, num_slots * SLAB) as store, store.borrow(1, members(*held)) as kept:
        for turn, experts in enumerate(asked):
            with store.borrow(turn % LAYERS, members(*experts)) as loan:
                assert_right(loan, turn % LAYERS, members(*experts))
            assert_right(kept, 1, members(*held))


def test_a_second_round_hits_and_a_small_budget_keeps_what_it_can(model: tuple[Path, ExpertLayout]) -> None:
    coresets = [(0, 1), (2, 3), (4, 5)]
    for num_slots, expected in ((6, 1.0), (4, 1 / 3)):
        with BudgetedStore(*model, num_slots * SLAB, prefetch=False) as store:
            for turn in range(30 * LAYERS):
                if turn == 10 * LAYERS:
                    store.reset()
                with store.borrow(turn % LAYERS, members(*coresets[turn % LAYERS])):
                    pass
            rate = store.statistics().total.hit_rate
            # dropping the longest unused would never hit with 4 slots: each round needs 6
            assert rate is not None
            assert rate >= expected


def test_prefetch_brings_the_next_layers_last_experts(tmp_path: Path) -> None:
    model = tmp_path, random_model(tmp_path, 6, EXPERTS)
    with BudgetedStore(*model, 7 * SLAB, prefetch=True) as store:  # a round needs 12
        for turn in range(20 * 6):
            if turn == 10 * 6:
                store.reset()
            with store.borrow(turn % 6, members(turn % 6, (turn + 1) % 6)):
                for read in list(store._pending.values()):
                    read.wait()
        statistics = store.statistics()
        total = statistics.total
        assert total.prefetch_hits > 0
        assert (total.hits or 0) + total.prefetch_hits == total.requests
        assert statistics.to_json()["bytes_read"] == total.reads * SLAB


def test_prefetch_leaves_what_is_needed_soon(model: tuple[Path, ExpertLayout]) -> None:
    reads = []
    for prefetch in (True, False):
        with BudgetedStore(*model, 5 * SLAB, prefetch=prefetch) as store:
            for turn in range(20 * LAYERS):  # a round needs 6 and has only three layers: nothing is needed much later
                with store.borrow(turn % LAYERS, members(turn % LAYERS, turn % LAYERS + 1)):
                    pass
            reads.append(store.statistics().total.reads)
    assert reads[0] <= reads[1] + LAYERS


def test_a_budget_below_one_coreset_names_the_one_that_works(model: tuple[Path, ExpertLayout]) -> None:
    with BudgetedStore(*model, 3 * SLAB + 100) as store:
        with (
            pytest.raises(
                ExpertMemoryError, match=r"layer 2 needs 5 experts.*at least 20KiB, got 12KiB.*expertshare plan"
            ),
            store.borrow(2, members(0, 1, 2, 3, 4)),
        ):
            pass
        with store.borrow(2, members(0, 1, 2)) as loan:
            assert_right(loan, 2, members(0, 1, 2))
    with pytest.raises(ExpertMemoryError, match="at least 4KiB, which is one expert"):
        BudgetedStore(*model, SLAB - 1)
    with BudgetedStore(*model, 5 * SLAB) as store, store.borrow(2, members(0, 1, 2, 3, 4)) as loan:
        assert_right(loan, 2, members(0, 1, 2, 3, 4))


class _Failing:
    """Stands in for LayerFile.read_into: raises for one expert as long as `broken`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        self.broken = True
        genuine = LayerFile.read_into

        def read_into(file: LayerFile, expert: int, memory: memoryview) -> None:
            if self.broken and expert == 2:
                memory[: SLAB // 2] = bytes(SLAB // 2)
                raise error
            genuine(file, expert, memory)

        monkeypatch.setattr(LayerFile, "read_into", read_into)


def test_an_early_loan_says_who_is_on_the_way_and_counts_what_others_waited(
    model: tuple[Path, ExpertLayout], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, genuine = threading.Event(), LayerFile.read_into

    def slow(file: LayerFile, expert: int, memory: memoryview) -> None:
        gate.wait(10)
        genuine(file, expert, memory)

    with BudgetedStore(*model, 4 * SLAB, prefetch=False) as store:
        with store.borrow(0, members(1)):
            pass
        stalled = store.statistics().total.stall_s
        monkeypatch.setattr(LayerFile, "read_into", slow)
        with store.borrow(0, members(0, 1, 2), early=True) as loan:
            assert loan.arrivals is not None
            assert loan.slot_of_E is not None
            assert loan.arrivals.states_S[loan.slot_of_E[:3]].tolist() == [0, 1, 0]
            loan.arrivals.waited(7.0)
            gate.set()
            while 0 in loan.arrivals.states_S[loan.slot_of_E[:3]].tolist():
                time.sleep(0.001)
            assert_right(loan, 0, members(0, 1, 2))
        assert store.statistics().total.stall_s == pytest.approx(stalled + 7.0, abs=0.5)
        with store.borrow(0, members(0, 1, 2), early=True) as loan:
            assert loan.arrivals is None  # all are there


def _borrow_early(store: BudgetedStore, active_E: torch.Tensor, asks: bool) -> None:
    with store.borrow(0, active_E, early=True) as loan:
        assert loan.arrivals is not None
        if asks:
            loan.arrivals.wait()


@pytest.mark.parametrize("asks", [True, False])
def test_an_early_loan_tells_of_a_failed_read(
    model: tuple[Path, ExpertLayout], monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    failing = _Failing(monkeypatch, CheckpointError("the disk is ill"))
    with BudgetedStore(*model, 4 * SLAB) as store:
        with pytest.raises(CheckpointError, match="the disk is ill"):
            _borrow_early(store, members(0, 2, 3), asks)
        failing.broken = False
        with store.borrow(0, members(0, 2, 3), early=True) as loan:
            if loan.arrivals is not None:
                loan.arrivals.wait()
            assert_right(loan, 0, members(0, 2, 3))
        assert not any(len(lease.slots) for lease in store._leases)


@pytest.mark.parametrize("error", [CheckpointError("the disk is ill"), KeyboardInterrupt()])
def test_after_a_failed_or_interrupted_read_the_store_goes_on(
    model: tuple[Path, ExpertLayout], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    failing = _Failing(monkeypatch, error)
    with BudgetedStore(*model, 4 * SLAB) as store:
        for _ in range(3):
            with pytest.raises(type(error)), store.borrow(0, members(0, 2, 3)):
                pass
            with store.borrow(0, members(0, 1, 3)) as loan:
                assert_right(loan, 0, members(0, 1, 3))
        failing.broken = False
        with store.borrow(0, members(0, 2, 3, 5)) as loan:
            assert_right(loan, 0, members(0, 2, 3, 5))
        assert not any(len(lease.slots) for lease in store._leases)


def test_ctrl_c_while_waiting_leaves_the_read_going(
    model: tuple[Path, ExpertLayout], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, genuine = threading.Event(), LayerFile.read_into

    def slow(file: LayerFile, expert: int, memory: memoryview) -> None:
        gate.wait(10)
        genuine(file, expert, memory)

    monkeypatch.setattr(LayerFile, "read_into", slow)

    def interrupt() -> None:
        time.sleep(0.1)
        os.kill(os.getpid(), 2)

    # A process that was started in the background ignores Ctrl-C, and pytest with it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with BudgetedStore(*model, 4 * SLAB) as store:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt), store.borrow(0, members(0, 1, 2, 3)):
            pass
        signal.signal(signal.SIGINT, before)
        gate.set()
        with store.borrow(1, members(2, 3, 4, 5)) as loan:  # the same slots: the old reads must not land in them
            assert_right(loan, 1, members(2, 3, 4, 5))


def test_a_removed_file_is_still_read_and_a_truncated_one_is_named(own_model: tuple[Path, ExpertLayout]) -> None:
    directory, layout = own_model
    with BudgetedStore(directory, layout, 4 * SLAB, prefetch=False) as store:
        (directory / layer_file_name(0)).unlink()
        with store.borrow(0, members(5)) as loan:  # it is open, so its bytes are there until the store is closed
            assert_right(loan, 0, members(5))
        os.truncate(directory / layer_file_name(1), 4096 + 2 * SLAB)
        with pytest.raises(CheckpointError, match=r"experts-00001\.safetensors ends within expert 3"):
            store.borrow(1, members(1, 3)).__enter__()
        with store.borrow(1, members(1)) as loan:
            assert_right(loan, 1, members(1))
        file = store._files[2]
        os.close(file._fd)
        with pytest.raises(CheckpointError, match=r"reading expert 0 of .*experts-00002.*Bad file descriptor"):
            store.borrow(2, members(0)).__enter__()
        file._fd = -1
    with pytest.raises(CheckpointError, match="is not there"):
        BudgetedStore(directory, layout, 4 * SLAB)


def test_a_closed_store_says_so_and_lent_memory_outlives_it(model: tuple[Path, ExpertLayout]) -> None:
    store = BudgetedStore(*model, 4 * SLAB)
    with store.borrow(0, members(1, 2)) as loan:
        store.close()
        store.close()
        del store._table
        gc.collect()
        assert_right(loan, 0, members(1, 2))
    with pytest.raises(ConfigError, match="closed"), store.borrow(0, members(1)):
        pass


def test_direct_reads_give_the_same_bytes(model: tuple[Path, ExpertLayout]) -> None:
    try:
        store = BudgetedStore(*model, 4 * SLAB, direct=True)
    except ConfigError as error:
        pytest.skip(str(error))
    with store, store.borrow(1, members(0, 5)) as loan:
        assert_right(loan, 1, members(0, 5))


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_left_open(model: tuple[Path, ExpertLayout]) -> None:
    before, threads = _open_descriptors(), threading.active_count()
    for _ in range(5):
        with BudgetedStore(*model, 4 * SLAB) as store, store.borrow(0, members(1, 2)):
            assert _open_descriptors() == before + LAYERS
    assert (_open_descriptors(), threading.active_count()) == (before, threads)
    store = BudgetedStore(*model, 4 * SLAB)
    readers = store._team._threads
    del store  # forgotten, not closed
    gc.collect()
    for reader in readers:
        reader.join(5)
        assert not reader.is_alive()


def test_a_forked_process_is_refused_and_the_first_goes_on(model: tuple[Path, ExpertLayout]) -> None:
    with BudgetedStore(*model, 4 * SLAB) as store:
        child = os.fork()
        if child == 0:
            refused = False
            try:
                store.borrow(0, members(0)).__enter__()
            except ConfigError:
                refused = True
            finally:
                os._exit(0 if refused else 1)
        assert os.waitpid(child, 0)[1] == 0
        with store.borrow(0, members(0)) as loan:
            assert_right(loan, 0, members(0))


def test_two_processes_read_one_model(model: tuple[Path, ExpertLayout]) -> None:
    children = []
    for seed in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _use(model, seed)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def _use(model: tuple[Path, ExpertLayout], seed: int) -> None:
    with BudgetedStore(*model, 5 * SLAB) as store:
        for layer, active_E in _walk(seed, 60):
            with store.borrow(layer, active_E) as loan:
                assert_right(loan, layer, active_E)


def _walk(seed: int, turns: int) -> Iterator[tuple[int, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for turn in range(turns):
        yield turn % LAYERS, members(*torch.randperm(EXPERTS, generator=generator)[:4].tolist())


def test_a_thousand_blocks_leave_memory_flat(model: tuple[Path, ExpertLayout]) -> None:
    def anonymous_bytes() -> int:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024

    with BudgetedStore(*model, 4 * SLAB) as store:
        seen = []
        for layer, active_E in _walk(0, 1000 * LAYERS):
            with store.borrow(layer, active_E):
                pass
            if layer == 0:
                seen.append(anonymous_bytes())
        assert max(seen[200:]) - seen[199] < 1 << 20
        assert not any(len(lease.slots) for lease in store._leases)
        assert len(store._pending) <= 4


def test_quantised_experts_are_lent_as_they_lie(tmp_path: Path) -> None:
    form = SlabFormat(scheme="int4", hidden=64, inner=32, group_size=32, has_minima=True)
    layout = random_model(tmp_path, 2, EXPERTS, form)
    with BudgetedStore(tmp_path, layout, 3 * form.slab_bytes) as store:
        for layer, experts in ((0, (1, 4)), (1, (0, 1, 5)), (0, (4, 5))):
            expected = form.bank(random_slabs(form, layer, EXPERTS))
            with store.borrow(layer, members(*experts)) as loan:
                assert isinstance(loan.bank, QuantisedBank)
                assert isinstance(expected, QuantisedBank)
                assert loan.slot_of_E is not None
                for expert in experts:
                    slot = int(loan.slot_of_E[expert])
                    for found, right in ((loan.bank.gate_up, expected.gate_up), (loan.bank.down, expected.down)):
                        assert torch.equal(found.codes_EPC[slot], right.codes_EPC[expert])
                        assert found.minima_EPG is not None
                        assert right.minima_EPG is not None
                        for a, b in ((found.scales_EPG, right.scales_EPG), (found.minima_EPG, right.minima_EPG)):
                            assert torch.equal(a[slot].view(torch.int16), b[expert].view(torch.int16))


def test_memory_that_the_system_refuses_is_said() -> None:
    with pytest.raises(ExpertMemoryError, match="lower --expert-memory"):
        allocate_slabs(1 << 45, 4096)


def test_several_loans_at_once_need_slots_of_their_own(model: tuple[Path, ExpertLayout]) -> None:
    with BudgetedStore(*model, 4 * SLAB) as store, ExitStack() as loans:
        loans.enter_context(store.borrow(0, members(0, 1)))
        loans.enter_context(store.borrow(1, members(0, 1)))
        with pytest.raises(ExpertMemoryError), store.borrow(2, members(0)):
            pass
