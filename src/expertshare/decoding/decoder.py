"""Decode a batch of prompts to its end, block by block."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from expertshare.decoding.batch import RowBatch, make_row
from expertshare.decoding.canvas import Canvas
from expertshare.decoding.captured_steps import CapturedSteps
from expertshare.decoding.geometry import check_prompts, lay_out
from expertshare.decoding.graphs import Graphs, graphs_of
from expertshare.decoding.options import DecodingOptions
from expertshare.decoding.results import BlockResult, Generation, join_blocks
from expertshare.decoding.watching import Watcher
from expertshare.errors import InputError
from expertshare.measure.cost import Cost, CostLedger, PartClock
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer


class BlockDecoder:
    """Decodes prompts with one model, one runtime and one set of options; holds no state of its own but captured steps,
    which serve one batch after another."""

    def __init__(
        self, model: MoETransformer, runtime: Runtime, options: DecodingOptions, *, graphs: Graphs | None = None
    ) -> None:
        """graphs: how steps are captured, by default as the model's device does it, if it can. Raises PolicyError or
        InputError for a policy or options that the model cannot work with."""
        self.model = model
        self.runtime = replace(runtime, policy=runtime.policy.bind(model.config.router))
        self.options = options.resolve(model.config)
        self.steps = CapturedSteps(model, self.runtime, self.options, graphs or graphs_of(model.device))

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
    """One batch being decoded. Iterate it for blocks; `generation()` says what came of it so far."""

    def __init__(
        self,
        decoder: BlockDecoder,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        watcher: Watcher | None = None,
    ) -> None:
        model, options = decoder.model, decoder.options
        config = model.config
        self._clock = decoder.runtime.clock or PartClock()
        self._seconds_before = dict(self._clock.seconds)
        self._elapsed_s = 0.0
        runtime = replace(decoder.runtime, clock=self._clock)
        own_bytes = config.num_expert_parameters * model.dtype.itemsize
        self._ledger = CostLedger(config.num_moe_layers, runtime.bytes_per_expert or own_bytes)
        geometries = [lay_out(len(prompt), options, config) for prompt in prompts]
        self._rows = [
            make_row(index, index, geometry, options, seed=seeds[index], device=model.device)
            for index, geometry in enumerate(geometries)
        ]
        canvas = Canvas.lay(prompts, geometries, mask_id=config.mask_id, device=model.device)
        super().__init__(model, runtime, self._ledger, canvas, watcher)
        self._steps, self._uncaptured_because = decoder.steps, decoder.steps.why_not(watched=watcher is not None)
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
        whether it has it now: a block, or that all rows are finished. For who looks at steps; `next` alone is enough
        otherwise."""
        if self._ready or (self._started and not self._active):
            return True
        start = time.perf_counter()
        with torch.no_grad():
            if not self._started:
                self._started = True
                self._capture()
                self.start(self._rows)
            self._ready.extend(self.step())
            if self._captured is not None and not self._active:
                self._steps.give_back(self._captured)
        self._elapsed_s += time.perf_counter() - start
        return bool(self._ready)

    def _capture(self) -> None:
        if self._uncaptured_because is not None:
            return
        lent = self._steps.lend(self._rows)
        if isinstance(lent, str):
            self._uncaptured_because = lent
            return
        lent.begin(self.canvas, self._rows)
        self.step_by_replay(lent)

    @property
    def elapsed_s(self) -> float:
        """Seconds of decoding so far, those between steps left out."""
        return self._elapsed_s

    def cost(self) -> Cost:
        """What the forwards so far asked of the experts."""
        return self._ledger.cost()

    def generation(self) -> Generation:
        """Answers, cost and time of the blocks yielded so far; complete once the iterator is drained."""
        spent = {part: s - self._seconds_before.get(part, 0.0) for part, s in self._clock.seconds.items()}
        return Generation(
            rows=tuple(join_blocks(blocks) for blocks in self._results),
            cost=self.cost(),
            elapsed_s=self._elapsed_s,
            seconds_by_part=PartClock(spent).shares(self._elapsed_s),
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
