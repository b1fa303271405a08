"""Which batches are decoded by replaying a captured step, and the captured steps that are kept for them."""

from __future__ import annotations

from collections.abc import Sequence

from expertshare.decoding.captured_blocks import BlockShape, CapturedBlocks
from expertshare.decoding.graphs import Graphs
from expertshare.decoding.options import DecodingOptions
from expertshare.decoding.row import Row
from expertshare.experts.whole import ResidentSlabs
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer
from expertshare.routing import policy_at, runs_on_torch

FEWEST_POSITIONS, FINEST_POSITIONS = 128, 1024
"""Capacities are powers of two from the first to the second, then multiples of the second."""
MOST_KEPT = 4
"""Captured steps that wait for another batch of their shape; each holds a cache."""


def capacity_for(positions: int) -> int:
    """The capacity that a canvas of so many positions is given: few of them, so that batches share their graphs."""
    if positions > FINEST_POSITIONS:
        return -(-positions // FINEST_POSITIONS) * FINEST_POSITIONS
    return max(FEWEST_POSITIONS, 1 << (positions - 1).bit_length())


class CapturedSteps:
    """The captured steps of one model under one runtime and one set of options, lent to a batch at a time."""

    def __init__(
        self, model: MoETransformer, runtime: Runtime, options: DecodingOptions, graphs: Graphs | None
    ) -> None:
        """runtime: its policy bound; options: resolved; graphs: None where the model's device has none."""
        self._model, self._runtime, self._options, self._graphs = model, runtime, options, graphs
        self._free: list[CapturedBlocks] = []
        self._refused: dict[BlockShape, str] = {}

    def why_not(self, *, watched: bool) -> str | None:
        """Why a batch cannot be decoded by replays, for people; None where it can, as far as is known before."""
        runtime, config = self._runtime, self._model.config
        policies = [policy_at(runtime.policy, layer, config.num_moe_layers) for layer in range(config.num_moe_layers)]
        reasons = {
            "graphs are switched off": not runtime.graphs,
            f"the model is on {self._model.device}; graphs are a GPU's": self._graphs is None,
            f"the backend {runtime.backend!r} asks the host while it runs; 'triton' does not": (
                runtime.backend != "triton"
            ),
            "full attention runs the whole canvas, which has no cache": config.attention == "full",
            "experts come and go in a store": not isinstance(runtime.store, ResidentSlabs | None),
            "the experts of every token are recorded": runtime.on_plan is not None,
            "a watcher hears of every forward": watched,
            "tokens are sampled, or restricted ones judged": not self._options.takes_the_best,
            f"the policy {runtime.policy.name!r} needs to know of steps": runtime.policy.needs_steps,
            f"no rule expresses the policy {runtime.policy.name!r}: torch routes it": any(map(runs_on_torch, policies)),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def lend(self, rows: Sequence[Row]) -> CapturedBlocks | str:
        """For a batch of these rows, until it is given back; captured first where none is free. Why not, where that
        fails: such a shape is not tried again. Only for batches that `why_not` has nothing against."""
        assert self._graphs is not None
        shape = BlockShape(
            num_rows=len(rows),
            block_length=rows[0].geometry.block_length,
            capacity=capacity_for(max(row.geometry.canvas_length for row in rows)),
        )
        for kept in self._free:
            if kept.shape == shape:
                self._free.remove(kept)
                return kept
        if shape not in self._refused:
            try:
                return CapturedBlocks(self._model, self._runtime, self._graphs, shape)
            except RuntimeError as error:
                self._refused[shape] = f"it cannot be captured: {str(error).partition(chr(10))[0] or repr(error)}"
        return self._refused[shape]

    def give_back(self, captured: CapturedBlocks) -> None:
        """Keep it for another batch; the one that has waited longest gives way."""
        self._free = [*self._free, captured][-MOST_KEPT:]
