"""Decode prompts block by block. `RowBatch.step` is the whole system: forward, propose, choose, write, commit."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

import torch

from expertshare.decoding.commit_rules import StepState, choose, holds_eos
from expertshare.decoding.forwards import AccountedModel, BlockCausal, Forwards, FullAttention, Ledger, Watcher
from expertshare.decoding.options import BlockResult, DecodingOptions, FinishReason, Generation, join_blocks
from expertshare.decoding.row import Row, Window, check_prompts
from expertshare.decoding.sampling import not_finite, propose_blocks
from expertshare.errors import InputError
from expertshare.measure.cost import Cost, CostLedger, PartClock
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer

if TYPE_CHECKING:
    from expertshare.decoding.captured import CapturedBlocks, CapturedSteps


class RowBatch:
    """Rows under one policy and one block length, each with options of its own. They share forwards and nothing else:
    what a row is decoded to does not depend on the others."""

    def __init__(self, model: MoETransformer, runtime: Runtime, ledger: Ledger, watcher: Watcher | None = None) -> None:
        """runtime: its policy bound to the model's router."""
        self._model, self._runtime, self._watcher = model, runtime, watcher
        self._eos_ids = torch.tensor(model.config.eos_ids, dtype=torch.int64, device=model.device)
        self._run = run = AccountedModel(model, runtime, ledger, watcher)
        self.forwards: Forwards = FullAttention(run) if model.config.attention == "full" else BlockCausal(run)
        self._active: list[Row] = []
        self._captured: CapturedBlocks | None = None

    @property
    def num_rows(self) -> int:
        """Rows that are not finished."""
        return len(self._active)

    def start(self, rows: Sequence[Row]) -> None:
        """Take part from the next step on, behind those that do."""
        with torch.no_grad():
            self.forwards.prefill(rows)
        self._active = [*self._active, *rows]

    def step(self) -> list[BlockResult]:
        """One denoising step of every unfinished row; returns the blocks that it completed."""
        rows = self._active
        states = self._denoise(rows) if self._captured is None else self._captured.step(rows)
        decided = {row: state for row, state in zip(rows, states, strict=True) if self._is_decided(row, state)}
        finishes = {row: self._finish(row, state) for row, state in decided.items()}
        going_on = [row for row, finish in finishes.items() if finish is None]
        (self._captured or self.forwards).commit(going_on)
        return [self._close(row, state, finishes[row]) for row, state in decided.items()]

    def _denoise(self, rows: Sequence[Row]) -> list[StepState]:
        window = Window.of(rows)
        hidden_RLD = self.forwards.denoise(rows, window)
        proposals = propose_blocks(self._model, self._runtime, rows, window, hidden_RLD)
        write_RL = choose(proposals, rows)
        window = window.write(rows, proposals.tokens_RL, write_RL)
        if self._watcher is not None:
            self._watcher.hear_step(rows, window, proposals.confidence_RL)
        masked_R, changed_R = window.masked_RL.any(dim=1), write_RL.any(dim=1)
        eos_R = holds_eos(torch.isin(window.tokens_RL, self._eos_ids), window.masked_RL, window.answer_RL)
        flags_R4 = torch.stack((torch.ones_like(eos_R), masked_R, changed_R, eos_R), dim=1)
        return [StepState.read(report) for report in torch.cat((flags_R4, window.tokens_RL), dim=1).tolist()]

    def _is_decided(self, row: Row, state: StepState) -> bool:
        """Count the step; whether the row's block is finished with it."""
        if not state.finite:
            raise not_finite(row)
        row.steps += 1
        row.post_steps += not row.has_masks
        row.has_masks = state.has_masks
        return row.rule.is_decided(row, state)

    def _finish(self, row: Row, state: StepState) -> FinishReason | None:
        """Why the row is finished, if it is."""
        if state.eos and row.options.stop_at_eos:
            return "eos"
        if not row.on_last_block:
            return None
        return "eos" if state.eos or row.ended else "length"

    def _close(self, row: Row, state: StepState, finish: FinishReason | None) -> BlockResult:
        """Read the row's block out and move the row on, or out of the batch."""
        ids = [] if row.ended else state.token_ids[row.answer_span]
        eos = next((place for place, token in enumerate(ids) if token in self._model.config.eos_ids), len(ids))
        row.ended = row.ended or eos < len(ids)
        result = BlockResult(
            row=row.number,
            block=row.answer_block,
            token_ids=tuple(ids[:eos]),
            finish_reason=finish,
            steps=row.steps,
            forwards=row.forwards,
        )
        if finish is None:
            row.enter_next_block()
        else:
            self._active = [other for other in self._active if other is not row]
        return result


def captured_steps(model: MoETransformer, runtime: Runtime, options: DecodingOptions) -> CapturedSteps | str:
    """Steps that are captured once and replayed; or, for people, why this model and runtime have none."""
    graphs = runtime.backend.graphs(model.device) if runtime.graphs else "graphs are switched off"
    if isinstance(graphs, str):
        return graphs
    from expertshare.decoding.captured import CapturedSteps

    return CapturedSteps(model, runtime, options, graphs)


class BlockDecoder:
    """Decodes prompts with one model, one runtime and one set of options; holds no state of its own but captured steps,
    which serve one batch after another."""

    def __init__(self, model: MoETransformer, runtime: Runtime, options: DecodingOptions) -> None:
        """Raises PolicyError or InputError for a policy or options that the model cannot work with."""
        self.model = model
        self.runtime = replace(runtime, policy=runtime.policy.bind(model.config.router))
        self.options = options.resolve(model.config)
        self.captured = captured_steps(model, self.runtime, self.options)

    def blocks(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int] | None = None,
        *,
        watcher: Watcher | None = None,
    ) -> BlockStream:
        """Start decoding: an iterator that yields each block of each row as soon as it is committed.

        seeds: one per prompt, for sampling; by default every row uses the options' seed, so that a prompt's
        answer does not depend on where in a batch it stands. watcher: hears of every forward and step; without one
        nothing is done for it. Raises InputError for unusable prompts or seeds.
        """
        check_prompts(prompts, self.options, self.model.config)
        if seeds is not None and len(seeds) != len(prompts):
            raise InputError(f"expected one seed per prompt ({len(prompts)}), got {len(seeds)}. Pass as many, or none.")
        return BlockStream(self, prompts, seeds if seeds is not None else [self.options.seed] * len(prompts), watcher)


class BlockStream(RowBatch, Iterator[BlockResult]):
    """One batch being decoded. Iterate it for blocks; `generation()` says what came of it so far. rows: all of its
    rows, finished ones too. elapsed_s: seconds of decoding so far, those between steps left out."""

    def __init__(
        self,
        decoder: BlockDecoder,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        watcher: Watcher | None = None,
    ) -> None:
        model, config = decoder.model, decoder.model.config
        self._clock = decoder.runtime.clock or PartClock()
        self._seconds_before = dict(self._clock.seconds)
        self.elapsed_s = 0.0
        runtime = replace(decoder.runtime, clock=self._clock)
        own_bytes = config.num_expert_parameters * model.dtype.itemsize
        self._ledger = CostLedger(config.num_moe_layers, runtime.bytes_per_expert or own_bytes)
        super().__init__(model, runtime, self._ledger, watcher)
        self.rows = tuple(
            Row.of(number, prompt, decoder.options, config, seed=seed, device=model.device)
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        )
        steps = decoder.captured
        self._uncaptured_because = steps if isinstance(steps, str) else steps.why_not(watched=watcher is not None)
        self._steps = None if isinstance(steps, str) else steps
        self._started = False
        self._ready: deque[BlockResult] = deque()
        self._results: list[list[BlockResult]] = [[] for _ in prompts]

    def __next__(self) -> BlockResult:
        """Decode until some row's block is committed. Raises NumericsError if the model's logits are not
        finite."""
        while not self.advance():
            pass
        if not self._ready:
            raise StopIteration
        block = self._ready.popleft()
        self._results[block.row].append(block)
        return block

    def advance(self) -> bool:
        """Run one denoising step (before the first one the prefill), unless `next` has its answer already; returns
        whether it has it now: a block, or that all rows are finished. For callers that look at steps; `next` alone is
        enough otherwise."""
        if self._ready or (self._started and not self._active):
            return True
        start = time.perf_counter()
        with torch.no_grad():
            if not self._started:
                self._started = True
                self._capture()
                self.start(self.rows)
            self._ready.extend(self.step())
            if self._captured is not None and self._steps is not None and not self._active:
                self._steps.give_back(self._captured)
        self.elapsed_s += time.perf_counter() - start
        return bool(self._ready)

    def _capture(self) -> None:
        """Take all steps to come by replays, where that is possible."""
        if self._steps is None or self._uncaptured_because is not None:
            return
        lent = self._steps.lend(self.rows)
        if isinstance(lent, str):
            self._uncaptured_because = lent
            return
        lent.begin(self.rows, self._run)
        self._captured, self.forwards = lent, BlockCausal(self._run, lent.cache)

    def cost(self) -> Cost:
        """What the forwards so far asked of the experts."""
        return self._ledger.cost()

    def generation(self) -> Generation:
        """Answers, cost and time of the blocks yielded so far; complete once the iterator is drained."""
        spent = {part: s - self._seconds_before.get(part, 0.0) for part, s in self._clock.seconds.items()}
        return Generation(
            rows=tuple(join_blocks(blocks) for blocks in self._results),
            cost=self.cost(),
            elapsed_s=self.elapsed_s,
            seconds_by_part=PartClock(spent).shares(self.elapsed_s),
            uncaptured_because=self._uncaptured_because,
        )


def generate(
    model: MoETransformer,
    runtime: Runtime,
    options: DecodingOptions,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int] | None = None,
) -> Generation:
    """Decode all prompts to the end. Raises InputError, PolicyError or NumericsError."""
    stream = BlockDecoder(model, runtime, options).blocks(prompts, seeds)
    for _ in stream:
        pass
    return stream.generation()


@dataclass(frozen=True, kw_only=True, slots=True)
class Joining:
    """A prompt that is to be decoded. options: resolved, their seed the row's. Checked by `check_prompts`."""

    prompt: tuple[int, ...]
    options: DecodingOptions


class BlockSession(RowBatch):
    """A batch that rows join and leave while it is decoded: continuous batching at block boundaries, with no end of its
    own. A row's number is never given again; its place in the cache is, whose memory grows to the most that was needed
    at once."""

    def __init__(self, model: MoETransformer, runtime: Runtime, ledger: Ledger) -> None:
        """runtime: its policy bound to the model's router."""
        super().__init__(model, runtime, ledger)
        self._numbers = count()

    def join(self, joining: Sequence[Joining]) -> list[int]:
        """Prefill these prompts, together, and decode them from the next step on; returns the numbers of their rows."""
        config, device = self._model.config, self._model.device
        rows = [
            Row.of(next(self._numbers), entry.prompt, entry.options, config, seed=entry.options.seed, device=device)
            for entry in joining
        ]
        self.start(rows)
        return [row.number for row in rows]

    def advance(self) -> list[BlockResult]:
        """One denoising step of all rows; the blocks that it completed. Finished rows have left. Raises
        NumericsError."""
        with torch.no_grad():
            return self.step()

    def leave(self, number: int) -> None:
        """Stop decoding a row, wherever it is in its block: the next step does no work for it."""
        self._active = [row for row in self._active if row.number != number]
