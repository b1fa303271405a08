"""A denoising step as one replay: forward, head, commit rule and writing of the current blocks, at fixed addresses.

R rows (those that are finished keep their place, switched off), L positions of a block, C of canvas and cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from expertshare.decoding.cache import KeyValueCache
from expertshare.decoding.canvas import Canvas
from expertshare.decoding.forwards import AccountedModel
from expertshare.decoding.graphs import Graphs
from expertshare.decoding.row import Row, StepState
from expertshare.kernels.triton.commit import FLAGS, commit_triton
from expertshare.measure.cost import ForwardKind
from expertshare.models.runtime import ForwardInput, ForwardOutput, LayerKeyValues, RoutingTrace, Runtime
from expertshare.models.transformer import MoETransformer

_START, _LEAST, _ON, _PLACE = range(4)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockShape:
    """What one pair of graphs is made for."""

    num_rows: int
    block_length: int
    capacity: int


@dataclass(frozen=True, slots=True)
class FixedRoom:
    """One layer's cache, whole, with the place of each row's new positions known to the device only."""

    layer: LayerKeyValues
    rows_R1: Tensor
    index_RL: Tensor

    def extended_by(self, new: LayerKeyValues) -> LayerKeyValues:
        """All that the cache has room for, the new positions written in place; a mask says what is there."""
        for held_RHCD, new_RHLD in ((self.layer.keys_BHSD, new.keys_BHSD), (self.layer.values_BHSD, new.values_BHSD)):
            held_RHCD[self.rows_R1, :, self.index_RL] = new_RHLD.transpose(1, 2)
        return self.layer

    def place(self) -> None:
        """Who writes by itself would have to know where."""
        return


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
            wanted[row.index][:_ON] = [row.start, row.least_tokens]
        for order, row in enumerate(rows):
            wanted[row.index][:_PLACE] = [row.start, row.least_tokens, 1]
            wanted[order][_PLACE] = row.index
        if wanted != self._said:
            self._said = wanted
            self._host_R4.copy_(torch.tensor(wanted))
            self._graphs.send(self._host_R4, self.numbers_R4)

    def column(self, number: int) -> Tensor:
        """One of the numbers: [R, 1]."""
        return self.numbers_R4[:, number : number + 1]


class CapturedBlocks:
    """Canvas and cache of a batch at fixed addresses, and two graphs over them: a denoising step, and a commit forward.

    A step is one replay and one wait, for the report. One pair of graphs serves every block of every answer that fits
    into the shape: attention sees the whole cache through a mask, which the device makes from the blocks' starts.
    Equal to the steps of RowBatch up to the rounding of attention; nothing is written in a step that is not finite.
    Policies that need to know of steps are not for it: a forward is not told what is undecided.
    """

    def __init__(self, model: MoETransformer, runtime: Runtime, graphs: Graphs, shape: BlockShape) -> None:
        """Allocates and captures. Raises RuntimeError where that fails. runtime: its policy bound, with a recipe."""
        self.shape = shape
        device, size = model.device, (shape.num_rows, shape.capacity)
        self._model, self._runtime, self._graphs = model, replace(runtime, clock=None), graphs
        self._canvas = Canvas.empty(device, size)
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
        self._read: list[list[int]] = []
        self._replay_step = graphs.capture(self._step, self._fixed)
        self._replay_commit = graphs.capture(self._commit, self._fixed)

    def begin(self, canvas: Canvas, rows: Sequence[Row]) -> None:
        """Take over a batch that has not been prefilled; row r lies at place r of its canvas. The cache is empty."""
        for field in fields(canvas):
            mine_RC, theirs_RS = getattr(self._canvas, field.name), getattr(canvas, field.name)
            mine_RC.zero_()
            mine_RC[:, : theirs_RS.shape[1]] = theirs_RS
        self.cache.clear()
        options = [row.options for row in rows]
        wanted = [(entry.threshold, entry.editing_threshold) for entry in options]
        shown = [[float("inf") if value is None else value for value in pair] for pair in wanted]
        self._thresholds_R2.copy_(torch.tensor(shown))
        self._edited_R1.copy_(torch.tensor([[pair[1] is not None] for pair in wanted]))

    def step(self, rows: Sequence[Row], run: AccountedModel) -> list[StepState]:
        """One denoising step of `rows`, accounted for by `run`."""
        self._step_control.say(rows)
        self._replay_step()
        self._account("denoise", self._step_control, rows, run)
        self._read = self._graphs.read(self._report_RX).tolist()
        told = [self._read[row.index][:FLAGS] for row in rows]
        return [StepState(*map(bool, flags)) for flags in told]

    def commit(self, rows: Sequence[Row], standing: Sequence[Row], run: AccountedModel) -> None:
        """Run the finished blocks of `rows` once more, from their final tokens; `standing` are all rows at work."""
        if rows:
            self._commit_control.say(rows, standing)
            self._replay_commit()
            self._account("commit", self._commit_control, rows, run)

    def answer(self, row: Row) -> list[int]:
        """What the row's current block adds to the answer, by the last report."""
        start, end = (index - row.start for index in row.geometry.answer_span(row.block))
        return self._read[row.index][FLAGS:][start:end]

    def _account(self, kind: ForwardKind, control: Control, rows: Sequence[Row], run: AccountedModel) -> None:
        """Asked of the device behind the replay, while that runs."""
        places_A = control.column(_PLACE)[: len(rows), 0]
        live_A = torch.ones(len(rows), dtype=torch.bool, device=places_A.device)
        routing = RoutingTrace(self._load_NE, self._unique_NR.index_select(1, places_A))
        run.account(kind, rows, routing, live_A)

    def _fixed(self) -> Sequence[Tensor]:
        canvas = [getattr(self._canvas, field.name) for field in fields(self._canvas)]
        memory = [tensor for layer in self._layers for tensor in (layer.keys_BHSD, layer.values_BHSD)]
        said = [control.numbers_R4 for control in (self._step_control, self._commit_control)]
        results = [self._load_NE, self._unique_NR, self._report_RX]
        return [*canvas, *memory, *said, self._thresholds_R2, self._edited_R1, self._eos_ids, *results]

    def _forward(self, control: Control) -> Tensor:
        """Hidden states of the current blocks."""
        length, device = self.shape.block_length, self._model.device
        on_R1 = control.column(_ON) > 0
        index_RL = control.column(_START) + torch.arange(length, device=device)
        seen_R1C = (torch.arange(self.shape.capacity, device=device) <= index_RL[:, -1:]).unsqueeze(1)
        inputs = ForwardInput(
            tokens_BS=self._canvas.tokens_BC.gather(1, index_RL),
            positions_BS=self._canvas.positions_BC.gather(1, index_RL),
            live_BS=on_R1.expand(-1, length),
            mask_BSP=seen_R1C.expand(-1, length, -1),
            block_length=length,
        )
        rows_R1 = torch.arange(self.shape.num_rows, device=device).unsqueeze(1)
        rooms = [FixedRoom(layer, rows_R1, index_RL) for layer in self._layers]
        output: ForwardOutput = self._model(inputs, self._runtime, rooms)
        self._load_NE.copy_(output.routing.load_NE)
        self._unique_NR.copy_(output.routing.group_experts_NG)
        return output.hidden_BSD

    def _commit(self) -> None:
        self._forward(self._commit_control)

    def _step(self) -> None:
        hidden_RLD = self._forward(self._step_control)
        excluded, size = [self._model.config.mask_id], hidden_RLD.shape[:2]
        best_T, sure_T = self._model.best_tokens(hidden_RLD.flatten(0, 1), excluded, backend=self._runtime.backend)
        canvas = self._canvas
        commit_triton(
            (canvas.tokens_BC, canvas.masked_BC, canvas.frozen_BC, canvas.answer_BC),
            self._step_control.numbers_R4,
            self._thresholds_R2,
            self._edited_R1,
            (best_T.view(size), sure_T.view(size)),
            self._eos_ids,
            self._report_RX,
        )
