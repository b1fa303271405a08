"""All experts in memory: the store that training and small models use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from expertshare.types import ExpertBank, Loan


class ResidentExperts(nn.Module):
    """Experts of one layer as parameters: gate_up [E, 2F, D] (gate rows first) and down [E, D, F]."""

    def __init__(self, num_experts: int, hidden_size: int, expert_hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_hidden, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, expert_hidden))
        self._bank: ExpertBank | None = None

    def bank(self) -> ExpertBank:
        """The weights, as they are; the same object for as long as the parameters are."""
        gate_up, down = self.gate_up, self.down
        if self._bank is None or self._bank.gate_up_EHD is not gate_up or self._bank.down_EDF is not down:
            self._bank = ExpertBank(gate_up, down)
        return self._bank


class ResidentStore:
    """An ExpertStore over modules that are wholly resident: borrowing costs nothing."""

    def __init__(self, layers: list[ResidentExperts]) -> None:
        self._layers = layers

    @contextmanager
    def borrow(self, layer: int, active_E: Tensor, *, early: bool = False) -> Iterator[Loan]:
        """The layer's whole bank."""
        yield Loan(self._layers[layer].bank())
