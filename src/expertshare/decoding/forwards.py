"""Running the model for some rows, and accounting for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from expertshare.decoding.coreset_memory import CoresetMemory
from expertshare.decoding.row import Row
from expertshare.measure.cost import CostLedger, ForwardKind
from expertshare.models.runtime import ForwardInput, ForwardOutput, Past, Runtime
from expertshare.models.transformer import MoETransformer


class Forwards(Protocol):
    """How a kind of attention runs the steps of decoding."""

    def prefill(self, rows: Sequence[Row]) -> None:
        """Do what the prompts allow before the first block."""
        ...

    def denoise(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states of each row's current block, [R, L, D]."""
        ...

    def commit(self, rows: Sequence[Row]) -> None:
        """Take in the final tokens of each row's current block, before the next one begins."""
        ...


@dataclass(frozen=True, slots=True)
class AccountedModel:
    """The model, how to run it, the ledger that every forward is written to, and the coresets that last several."""

    model: MoETransformer
    runtime: Runtime
    ledger: CostLedger
    memory: CoresetMemory

    def __call__(
        self,
        kind: ForwardKind,
        rows: Sequence[Row],
        inputs: ForwardInput,
        past: Sequence[Past] | None = None,
    ) -> ForwardOutput:
        """One forward in which `rows` take part."""
        groups_per_row = inputs.tokens_BS.shape[1] // inputs.block_length
        previous = self.memory.recall(kind, rows, groups_per_row)
        output: ForwardOutput = self.model(replace(inputs, previous=previous), self.runtime, past)
        self.memory.remember(kind, rows, output.routing.coresets)
        live_G = inputs.live_BS.reshape(-1, inputs.block_length).any(dim=1)
        self.ledger.record(
            kind,
            [row.turn(kind) for row in rows],
            load_NE=output.routing.load_NE,
            group_experts_NG=output.routing.group_experts_NG,
            live_G=live_G,
        )
        for row in rows:
            row.forwards += 1
        return output
