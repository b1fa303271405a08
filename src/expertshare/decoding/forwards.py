"""Running the model for some rows, and accounting for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from expertshare.decoding.coreset_memory import CoresetMemory
from expertshare.decoding.row import Row
from expertshare.decoding.watching import Watcher
from expertshare.measure.cost import ForwardKind, Turn
from expertshare.models.runtime import ForwardInput, ForwardOutput, Past, RoutingTrace, Runtime
from expertshare.models.transformer import MoETransformer


class Forwards(Protocol):
    """How a kind of attention runs the steps of decoding."""

    def prefill(self, rows: Sequence[Row]) -> None:
        """Take in new rows, and do what their prompts allow before the first block."""
        ...

    def denoise(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states of each row's current block, [R, L, D]."""
        ...

    def commit(self, rows: Sequence[Row]) -> None:
        """Take in the final tokens of each row's current block, before the next one begins."""
        ...


class Ledger(Protocol):
    """Who is told what forwards asked of the experts: measure.cost.CostLedger, or a server's own."""

    def record(
        self,
        kind: ForwardKind,
        turns: Sequence[Turn],
        *,
        load_NE: Tensor,
        group_experts_NG: Tensor,
        live_G: Tensor,
    ) -> None:
        """Note one forward; see CostLedger. The groups of each turn lie together, in the order of `turns`."""
        ...


@dataclass(frozen=True, slots=True)
class AccountedModel:
    """The model, how to run it, the ledger that every forward is written to, the coresets that last several forwards,
    and who else is told, if anybody."""

    model: MoETransformer
    runtime: Runtime
    ledger: Ledger
    memory: CoresetMemory
    watcher: Watcher | None = None

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
        self.account(kind, rows, output.routing, live_G)
        return output

    def account(self, kind: ForwardKind, rows: Sequence[Row], routing: RoutingTrace, live_G: Tensor) -> None:
        """Note a forward in which `rows` took part, whoever ran it. live_G: as in Ledger."""
        self.ledger.record(
            kind,
            [row.turn(kind) for row in rows],
            load_NE=routing.load_NE,
            group_experts_NG=routing.group_experts_NG,
            live_G=live_G,
        )
        if self.watcher is not None:
            self.watcher.hear_forward(kind, rows, routing)
        for row in rows:
            row.forwards += 1
