"""Many distinct experts from a few: expert e is pool member e mod P with its rows rolled.

Turn t = e // P rolls the gate and up rows by t * F / turns alike, and the down rows by t * D / turns, turns = E / P
rounded up. Hidden units then meet other columns of the down projection, and outputs other features: every expert is a
function of its own with exactly the statistics of its member. Rolling moves whole rows, so it commutes with every
quantisation whose scales belong to rows or to groups within rows: the pool is drawn and quantised once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.kernels.quantise import from_panels, to_panels
from expertshare.types import ExpertBank, QuantisedBank, QuantisedWeight, RoutingPlan


class ExpertPool:
    """P drawn members standing for E experts of one layer. bank: float32 or bfloat16, [P, ...] each."""

    def __init__(self, bank: ExpertBank, num_experts: int) -> None:
        self.bank = bank
        self._size = bank.down_EDF.shape[0]
        self._turns = -(-num_experts // self._size)

    def member(self, expert: int) -> int:
        """Which member an expert is made from."""
        return expert % self._size

    def shifts(self, expert: int) -> tuple[int, int]:
        """By how many rows gate and up are rolled, and by how many down is."""
        turn, (_, hidden, inner) = expert // self._size, self.bank.down_EDF.shape
        return turn * inner // self._turns, turn * hidden // self._turns

    def expert(self, expert: int, bank: ExpertBank | QuantisedBank | None = None) -> ExpertBank | QuantisedBank:
        """One expert as a bank of one, from this pool's weights or from `bank`, the same pool quantised."""
        member, (inner_shift, hidden_shift) = self.member(expert), self.shifts(expert)
        source = self.bank if bank is None else bank
        if isinstance(source, ExpertBank):
            gate_up = _roll_halves(source.gate_up_EHD[member], inner_shift)
            return ExpertBank(gate_up[None], source.down_EDF[member].roll(hidden_shift, 0)[None])
        return QuantisedBank(
            _moved(source.gate_up, member, inner_shift, halves=True),
            _moved(source.down, member, hidden_shift, halves=False),
        )

    def compute(self, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        """What the experts of the plan make of the tokens, float32 [T, D], without building any of them.

        A rolled expert's hidden units are its member's, rolled; so each member runs its gate and up once for all
        tokens, and its down projection once for all of its pairs.
        """
        y_TD = torch.zeros_like(x_TD)
        _, hidden, inner = self.bank.down_EDF.shape
        ids_TK = plan.expert_ids_TK
        for member in range(self._size):
            tokens_P, slots_P = ((ids_TK >= 0) & (ids_TK % self._size == member)).nonzero(as_tuple=True)
            if len(tokens_P) == 0:
                continue
            gate_TF, up_TF = F.linear(x_TD, self.bank.gate_up_EHD[member].float()).chunk(2, dim=1)
            hidden_PF = (F.silu(gate_TF) * up_TF)[tokens_P]
            turns_P = ids_TK[tokens_P, slots_P] // self._size
            hidden_PF = _rolled_columns(hidden_PF, turns_P * inner // self._turns)
            out_PD = F.linear(hidden_PF, self.bank.down_EDF[member].float())
            out_PD = _rolled_columns(out_PD, turns_P * hidden // self._turns)
            y_TD.index_add_(0, tokens_P, out_PD * plan.weights_TK[tokens_P, slots_P].unsqueeze(1))
        return y_TD


def _roll_halves(rows: Tensor, shift: int) -> Tensor:
    """Gate rows and up rows, rolled alike."""
    return torch.cat([half.roll(shift, 0) for half in rows.chunk(2)])


def _rolled_columns(values_PC: Tensor, shifts_P: Tensor) -> Tensor:
    """Row p rolled by shifts_P[p], as Tensor.roll does it."""
    columns = values_PC.shape[1]
    index_PC = (torch.arange(columns) - shifts_P.unsqueeze(1)) % columns
    return values_PC.gather(1, index_PC)


def _moved(weight: QuantisedWeight, member: int, shift: int, *, halves: bool) -> QuantisedWeight:
    def roll(panels_EPX: Tensor) -> Tensor:
        rows = from_panels(panels_EPX[member])
        return to_panels(_roll_halves(rows, shift) if halves else rows.roll(shift, 0)).unsqueeze(0)

    minima = None if weight.minima_EPG is None else roll(weight.minima_EPG)
    return replace(weight, codes_EPC=roll(weight.codes_EPC), scales_EPG=roll(weight.scales_EPG), minima_EPG=minima)
