"""Experts that come while the kernel computes: the bits of a bank that was whole, or a word of what is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backends import moe_ffn
from expertshare import native
from expertshare.errors import CheckpointError, ConfigError
from expertshare.kernels.quantise import QUANTISATIONS, quantise_bank
from expertshare.kernels.weights import projections, tensors_of
from expertshare.types import Bank, ExpertBank, QuantisedBank, RoutingPlan

from .test_moe_ffn import plan_of

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernel: {native.unavailable_reason()}")

EXPERTS, HIDDEN, INNER, TOKENS = 8, 256, 128, 24
LATE = (1, 4, 6)
KINDS = ("float32", "bfloat16", "int8", "int4")


class Coming:
    """Arrivals by hand. wait: what happens when somebody asks to wait."""

    def __init__(self, states: list[int], wait: Callable[[], None] = lambda: None) -> None:
        self.states_S = torch.tensor(states, dtype=torch.uint8)
        self._wait, self.num_waits, self.seconds = wait, 0, 0.0

    def wait(self) -> None:
        self.num_waits += 1
        self._wait()

    def waited(self, seconds: float) -> None:
        self.seconds += seconds


def parts_of(bank: Bank) -> list[Tensor]:
    return [tensor for name, weight in projections(bank).items() for tensor in tensors_of(name, weight).values()]


def whole_bank(kind: str) -> Bank:
    torch.manual_seed(3)
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN) * HIDDEN**-0.5
    bank = ExpertBank(gate_up, torch.randn(EXPERTS, HIDDEN, INNER) * INNER**-0.5)
    if kind in QUANTISATIONS:
        return quantise_bank(bank, QUANTISATIONS[kind])
    dtype = getattr(torch, kind)
    return ExpertBank(bank.gate_up_EHD.to(dtype), bank.down_EDF.to(dtype))


def copy_of(bank: Bank) -> Bank:
    if isinstance(bank, QuantisedBank):
        return quantise_bank(
            ExpertBank(torch.zeros(EXPERTS, 2 * INNER, HIDDEN), torch.zeros(EXPERTS, HIDDEN, INNER)),
            QUANTISATIONS["int8" if bank.down.bits == 8 else "int4"],
        )
    return ExpertBank(torch.full_like(bank.gate_up_EHD, float("nan")), torch.full_like(bank.down_EDF, float("nan")))


def bring(expert: int, source: Bank, to: Bank) -> None:
    for part, whole in zip(parts_of(to), parts_of(source), strict=True):
        part[expert] = whole[expert]


def bring_late(source: Bank, to: Bank) -> None:
    for expert in LATE:
        bring(expert, source, to)


def scene(kind: str) -> tuple[Tensor, RoutingPlan, Bank, Bank]:
    """Tokens, a plan over all experts, the whole bank, and one that lacks LATE."""
    whole = whole_bank(kind)
    partly = copy_of(whole)
    for expert in set(range(EXPERTS)) - set(LATE):
        bring(expert, whole, partly)
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(TOKENS)])
    x_TD = torch.randn(TOKENS, HIDDEN, generator=generator)
    plan = plan_of(ids_TK, torch.rand(TOKENS, 3, generator=generator), EXPERTS)
    return x_TD.to(torch.float32 if kind == "float32" else torch.bfloat16), plan, whole, partly


def on_their_way() -> list[int]:
    return [0 if expert in LATE else 1 for expert in range(EXPERTS)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_late_experts_give_the_same_bits(unwritten_is_nan: None, kind: str, threads: int) -> None:
    native.set_num_threads(threads)
    assert any(as_they_came(*scene(kind)) for _ in range(20))  # a busy machine may bring them too late, or too early


def as_they_came(x_TD: Tensor, plan: RoutingPlan, whole: Bank, partly: Bank) -> bool:
    """Compute while a thread brings what is late. The bits are right in any case; whether the kernel itself waited."""

    def reader() -> None:
        for expert in reversed(LATE):  # not in the order in which they are waited for
            time.sleep(0.005)
            bring(expert, whole, partly)
            coming.states_S[expert] = 1

    thread = threading.Thread(target=reader)
    coming = Coming(on_their_way(), thread.join)
    thread.start()
    found = moe_ffn(x_TD, plan, partly, backend="cpu", arrivals=coming)
    thread.join()
    assert torch.equal(found, moe_ffn(x_TD, plan, whole, backend="cpu"))
    return coming.num_waits == 0 and coming.seconds > 0.001


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_are_all_there_are_not_waited_for(unwritten_is_nan: None, kind: str) -> None:
    x_TD, plan, whole, _ = scene(kind)
    coming = Coming([1] * EXPERTS)
    assert torch.equal(
        moe_ffn(x_TD, plan, whole, backend="cpu", arrivals=coming), moe_ffn(x_TD, plan, whole, backend="cpu")
    )
    assert (coming.num_waits, coming.seconds) == (0, 0.0)


def test_experts_that_the_plan_does_not_use_may_stay_away(unwritten_is_nan: None) -> None:
    x_TD, _, whole, partly = scene("bfloat16")
    plan = plan_of(torch.tensor([[0, 2]] * TOKENS), torch.full((TOKENS, 2), 0.5), EXPERTS)
    coming = Coming([2 if expert in LATE else 1 for expert in range(EXPERTS)])
    found = moe_ffn(x_TD, plan, partly, backend="cpu", arrivals=coming)
    assert torch.equal(found, moe_ffn(x_TD, plan, whole, backend="cpu"))


@pytest.mark.parametrize("state", [0, 2])
def test_one_that_takes_long_or_will_not_come_is_waited_for_where_errors_get_through(
    unwritten_is_nan: None, state: int
) -> None:
    x_TD, plan, whole, partly = scene("bfloat16")

    states = on_their_way()
    states[LATE[1]] = state
    coming = Coming(states, lambda: bring_late(whole, partly))
    found = moe_ffn(x_TD, plan, partly, backend="cpu", arrivals=coming)
    assert torch.equal(found, moe_ffn(x_TD, plan, whole, backend="cpu"))
    assert coming.num_waits == 1

    def ill() -> None:
        raise CheckpointError("the disk is ill")

    with pytest.raises(CheckpointError, match="the disk is ill"):
        moe_ffn(x_TD, plan, partly, backend="cpu", arrivals=Coming(states, ill))


def test_nobody_waits_long_for_the_others_once_one_will_not_come(unwritten_is_nan: None) -> None:
    x_TD, plan, _, partly = scene("bfloat16")
    waits = []
    for _ in range(20):  # of which a busy machine may draw out some
        coming = Coming([2 if expert == LATE[0] else state for expert, state in enumerate(on_their_way())])
        moe_ffn(x_TD, plan, partly, backend="cpu", arrivals=coming)
        assert coming.num_waits == 1
        waits.append(coming.seconds)
    assert min(waits) < 0.05  # of a patience of 0.1


def test_torch_waits_first() -> None:
    x_TD, plan, whole, partly = scene("float32")
    coming = Coming(on_their_way(), lambda: bring_late(whole, partly))
    found = moe_ffn(x_TD, plan, partly, arrivals=coming)
    assert torch.equal(found, moe_ffn(x_TD, plan, whole))
    assert coming.num_waits == 1


@pytest.mark.parametrize(
    "states",
    [torch.ones(EXPERTS + 1, dtype=torch.uint8), torch.ones(EXPERTS), torch.ones(2 * EXPERTS, dtype=torch.uint8)[::2]],
)
def test_states_that_do_not_fit_the_bank_are_refused(states: Tensor) -> None:
    x_TD, plan, whole, _ = scene("float32")
    coming = Coming([])
    coming.states_S = states
    with pytest.raises(ConfigError, match="states of arrivals"):
        moe_ffn(x_TD, plan, whole, backend="cpu", arrivals=coming)
