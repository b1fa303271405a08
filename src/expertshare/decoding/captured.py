"""Denoising steps that are captured once as a graph of the GPU and replayed: forward, head, commit rule and writing.

R rows (those that are finished keep their place, switched off), L positions of a block, C of canvas and cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from expertshare.decoding.cache import KeyValueCache
from expertshare.decoding.commit_rules import StepState
from expertshare.decoding.forwards import AccountedModel
from expertshare.decoding.options import DecodingOptions
from expertshare.decoding.row import Row
from expertshare.kernels import LayerKeyValues
from expertshare.kernels.triton.commit import FLAGS, commit_triton
from expertshare.kernels.triton.graphs import Graphs
from expertshare.measure.cost import ForwardKind
from expertshare.models.runtime import ForwardInput, ForwardOutput, RoutingTrace, Runtime
from expertshare.models.transformer import MoETransformer
from expertshare.routing import policy_at, runs_on_torch

_START, _LEAST, _ON, _PLACE = range(4)


class BlockShape(NamedTuple):
    """What one pair of graphs is made for."""

    num_rows: int
    block_length: int
    capacity: int


@dataclass(frozen=True, slots=True)
class FixedView:
    """One layer's cache, whole, with the place of each row's new positions known to the device only."""

    layer: LayerKeyValues
    rows_R1: Tensor
    index_RL: Tensor

    def extended_by(self, new: LayerKeyValues) -> LayerKeyValues:
        """All positions of the cache, the new positions written in place; a mask says what is there."""
        for held_RHCD, new_RHLD in ((self.layer.keys_BHSD, new.keys_BHSD), (self.layer.values_BHSD, new.values_BHSD)):
            held_RHCD[self.rows_R1, :, self.index_RL] = new_RHLD.transpose(1, 2)
        return self.layer

    def cache_slice(self) -> None:
        """None: the host does not know where."""


class Control:
    """What the host says to a graph before it runs: per row, where its block starts, the least number of tokens to
    write, and whether it takes part; and the places of those that do, one after another."""

    def __init__(self, graphs: Graphs, num_rows: int, device: torch.device) -> None:
        self.numbers_R4 = torch.zeros((num_rows, 4), dtype=torch.int64, device=device)
        self._graphs, self._host_R4 = graphs, graphs.host_buffer(self.numbers_R4)
        self._said = [[0] * 4 for _ in range(num_rows)]

    def say(self, rows: Sequence[Row], standing: Sequence[Row] = ()) -> None:
        """These rows take part, each at its block. standing: others that have a block, whose place in the cache may be
        written to: the next step does that again."""
        wanted = [[*numbers[:_ON], 0, 0] for numbers in self._said]
        for row in standing:
            wanted[row.number][:_ON] = [row.start, row.rule.least_tokens(row)]
        for order, row in enumerate(rows):
            wanted[row.number][:_PLACE] = [row.start, row.rule.least_tokens(row), 1]
            wanted[order][_PLACE] = row.number
        if wanted != self._said:
            self._said = wanted
            self._host_R4.copy_(torch.tensor(wanted))
            self._graphs.send(self._host_R4, self.numbers_R4)

    def column(self, number: int) -> Tensor:
        """One of the numbers: [R, 1]."""
        return self.numbers_R4[:, number : number + 1]


class CapturedBlocks:
    """The rows and the cache of a batch at fixed addresses, and two graphs over them: a step, and a commit forward.

    A step is one replay and one wait, for the report. One pair of graphs serves every block of every answer that fits
    into the shape: attention sees the whole cache through a mask, which the device makes from the blocks' starts.
    Equal to the steps of RowBatch up to the rounding of attention; nothing is written in a step that is not finite.
    Policies that need to know of steps are not for it: a forward is not told what is undecided.
    """

    def __init__(self, model: MoETransformer, runtime: Runtime, graphs: Graphs, shape: BlockShape) -> None:
        """Allocates and captures. Raises RuntimeError where that fails. runtime: its policy bound, a rule."""
        self.shape = shape
        device, size = model.device, (shape.num_rows, shape.capacity)
        self._model, self._runtime, self._graphs = model, replace(runtime, clock=None), graphs
        self._tokens_RC = torch.zeros(size, dtype=torch.int64, device=device)
        self._masked_RC, self._frozen_RC, self._answer_RC = torch.zeros((3, *size), dtype=torch.bool, device=device)
        self.cache = KeyValueCache(
            model.config, num_rows=shape.num_rows, capacity=shape.capacity, dtype=model.dtype, device=device
        )
        self._layers = self.cache.layers
        self._thresholds_R2 = torch.full((shape.num_rows, 2), float("inf"), device=device)
        self._edited_R1 = torch.zeros((shape.num_rows, 1), dtype=torch.bool, device=device)
        self._eos_ids = torch.tensor(model.config.eos_ids, dtype=torch.int64, device=device)
        num_layers, num_experts = model.config.num_moe_layers, model.config.router.num_experts
        self._load_NE = torch.zeros((num_layers, num_experts), dtype=torch.int64, device=device)
        self._unique_NR = torch.zeros((num_layers, shape.num_rows), dtype=torch.int64, device=device)
        self._report_RX = torch.zeros((shape.num_rows, FLAGS + shape.block_length), dtype=torch.int64, device=device)
        # one each: the host may write the commit's while the step's is still on its way
        self._step_control, self._commit_control = (Control(graphs, shape.num_rows, device) for _ in range(2))
        self._replay_step = graphs.capture(self._step, self._fixed)
        self._replay_commit = graphs.capture(self._commit, self._fixed)

    def begin(self, rows: Sequence[Row], run: AccountedModel) -> None:
        """Take over a batch that has not been prefilled, row r first to last; `run` accounts for its forwards. The
        cache is empty, and the rows' canvases are views of this one's from here on."""
        self._run, self._rows = run, rows
        index_C = torch.arange(self.shape.capacity, device=self._model.device)
        for tensor_RC in (self._tokens_RC, self._masked_RC):
            tensor_RC.zero_()
        for row, tokens_C, masked_C in zip(rows, self._tokens_RC, self._masked_RC, strict=True):
            length = row.geometry.canvas_length
            tokens_C[:length], masked_C[:length] = row.tokens_C, row.masked_C
            row.tokens_C, row.masked_C = tokens_C[:length], masked_C[:length]
            self._frozen_RC[row.number] = index_C < row.geometry.answer_start
            self._answer_RC[row.number] = ~self._frozen_RC[row.number] & (index_C < row.geometry.answer_end)
        self.cache.clear()
        wanted = [(row.options.threshold, row.options.editing_threshold) for row in rows]
        shown = [[float("inf") if value is None else value for value in pair] for pair in wanted]
        self._thresholds_R2.copy_(torch.tensor(shown))
        self._edited_R1.copy_(torch.tensor([[row.rule.edits] for row in rows]))

    def step(self, rows: Sequence[Row]) -> list[StepState]:
        """One denoising step of `rows`."""
        self._rows = rows
        self._step_control.say(rows)
        self._replay_step()
        self._account("denoise", self._step_control, rows)
        report = self._graphs.read(self._report_RX).tolist()
        return [StepState.read(report[row.number]) for row in rows]

    def commit(self, rows: Sequence[Row]) -> None:
        """Run the finished blocks of `rows` once more, from their final tokens."""
        if rows:
            self._commit_control.say(rows, self._rows)
            self._replay_commit()
            self._account("commit", self._commit_control, rows)

    def _account(self, kind: ForwardKind, control: Control, rows: Sequence[Row]) -> None:
        """Asked of the device behind the replay, while that runs."""
        places_A = control.column(_PLACE)[: len(rows), 0]
        live_A = torch.ones(len(rows), dtype=torch.bool, device=places_A.device)
        routing = RoutingTrace(self._load_NE, self._unique_NR.index_select(1, places_A))
        self._run.account(kind, rows, routing, live_A)

    def _canvas(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._tokens_RC, self._masked_RC, self._frozen_RC, self._answer_RC

    def _fixed(self) -> Sequence[Tensor]:
        memory = [tensor for layer in self._layers for tensor in (layer.keys_BHSD, layer.values_BHSD)]
        said = [control.numbers_R4 for control in (self._step_control, self._commit_control)]
        results = [self._load_NE, self._unique_NR, self._report_RX]
        return [*self._canvas(), *memory, *said, self._thresholds_R2, self._edited_R1, self._eos_ids, *results]

    def _forward(self, control: Control) -> Tensor:
        """Hidden states of the current blocks."""
        length, device = self.shape.block_length, self._model.device
        on_R1 = control.column(_ON) > 0
        index_RL = control.column(_START) + torch.arange(length, device=device)
        seen_R1C = (torch.arange(self.shape.capacity, device=device) <= index_RL[:, -1:]).unsqueeze(1)
        inputs = ForwardInput(
            tokens_BS=self._tokens_RC.gather(1, index_RL),
            positions_BS=index_RL,
            live_BS=on_R1.expand(-1, length),
            mask_BSP=seen_R1C.expand(-1, length, -1),
            block_length=length,
        )
        rows_R1 = torch.arange(self.shape.num_rows, device=device).unsqueeze(1)
        views = [FixedView(layer, rows_R1, index_RL) for layer in self._layers]
        output: ForwardOutput = self._model(inputs, self._runtime, views)
        self._load_NE.copy_(output.routing.load_NE)
        self._unique_NR.copy_(output.routing.group_experts_NG)
        return output.hidden_BSD

    def _commit(self) -> None:
        self._forward(self._commit_control)

    def _step(self) -> None:
        hidden_RLD = self._forward(self._step_control)
        excluded, size = [self._model.config.mask_id], hidden_RLD.shape[:2]
        best_T, sure_T = self._model.best_tokens(hidden_RLD.flatten(0, 1), excluded, backend=self._runtime.backend)
        commit_triton(
            self._canvas(),
            self._step_control.numbers_R4,
            self._thresholds_R2,
            self._edited_R1,
            (best_T.view(size), sure_T.view(size)),
            self._eos_ids,
            self._report_RX,
        )


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

    def __init__(self, model: MoETransformer, runtime: Runtime, options: DecodingOptions, graphs: Graphs) -> None:
        """runtime: its policy bound; options: resolved."""
        self._model, self._runtime, self._options, self._graphs = model, runtime, options, graphs
        self._free: list[CapturedBlocks] = []
        self._refused: dict[BlockShape, str] = {}

    def why_not(self, *, watched: bool) -> str | None:
        """Why a batch cannot be decoded by replays, for people; None where it can, as far as is known before."""
        runtime, config = self._runtime, self._model.config
        policies = [policy_at(runtime.policy, layer, config.num_moe_layers) for layer in range(config.num_moe_layers)]
        reasons = {
            "full attention runs the whole canvas, which has no cache": config.attention == "full",
            "experts come and go in a store": runtime.store is not None and not runtime.store.resident,
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
