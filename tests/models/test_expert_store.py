"""A model borrows its experts from the runtime's store, where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from expertshare.experts import ResidentExperts
from expertshare.models.runtime import ForwardInput, Runtime
from expertshare.models.transformer import MoETransformer, initialise
from expertshare.routing import make_policy
from expertshare.training.config import reference_architecture
from expertshare.types import ExpertBank, Loan


class _OnlyActive:
    """A store that lends NaN for every expert that the plan did not ask for, and remembers who asked."""

    resident = True

    def __init__(self, layers: list[ResidentExperts]) -> None:
        self._layers = layers
        self.asked: list[tuple[int, int]] = []

    @contextmanager
    def borrow(self, layer: int, active_E: Tensor, *, early: bool = False) -> Iterator[Loan]:
        self.asked.append((layer, int(active_E.sum())))
        absent_E11, nan, bank = ~active_E[:, None, None], float("nan"), self._layers[layer].bank()
        gate_up_EHD = bank.gate_up_EHD.masked_fill(absent_E11, nan)
        yield Loan(ExpertBank(gate_up_EHD, bank.down_EDF.masked_fill(absent_E11, nan)))


class _Backwards:
    """A store that lends the experts in the opposite order, as one with slots would."""

    resident = True

    def __init__(self, layers: list[ResidentExperts]) -> None:
        self._layers = layers

    @contextmanager
    def borrow(self, layer: int, active_E: Tensor, *, early: bool = False) -> Iterator[Loan]:
        bank = self._layers[layer].bank()
        backwards = ExpertBank(bank.gate_up_EHD.flip(0), bank.down_EDF.flip(0))
        yield Loan(backwards, torch.arange(len(active_E)).flip(0))


def test_a_store_that_lends_only_active_experts_changes_nothing() -> None:
    config = reference_architecture(vocab_size=64, mask_id=0, eos_id=1, pad_id=2, hidden=64, layers=3, expert_hidden=8)
    model = MoETransformer(config)
    initialise(model, seed=1, std=0.2)
    tokens = torch.randint(3, 64, (2, 32), generator=torch.Generator().manual_seed(0))
    inputs = ForwardInput(
        tokens_BS=tokens,
        positions_BS=torch.arange(32).expand(2, 32),
        live_BS=torch.ones(2, 32, dtype=torch.bool),
        mask_BSP=torch.ones(2, 32, 32, dtype=torch.bool),
        block_length=32,
    )
    store = _OnlyActive([module for module in model.modules() if isinstance(module, ResidentExperts)])
    policy = make_policy("des-vote", {"budget": 16}).bind(config.router)
    with torch.no_grad():
        own = model(inputs, Runtime(policy=policy))
        lent = model(inputs, Runtime(policy=policy, store=store))
        reordered = model(inputs, Runtime(policy=policy, store=_Backwards(store._layers)))
    assert torch.equal(own.hidden_BSD, lent.hidden_BSD)
    assert torch.allclose(own.hidden_BSD, reordered.hidden_BSD, rtol=1e-4, atol=1e-5)
    assert store.asked == [(layer, int((load_E > 0).sum())) for layer, load_E in enumerate(own.routing.load_NE)]
    assert all(count <= 32 for _, count in store.asked)
