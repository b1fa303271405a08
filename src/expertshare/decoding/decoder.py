"""The block loop: denoise, propose, write, close the blocks that are done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from expertshare.decoding.block_causal import CachedPrefix
from expertshare.decoding.canvas import Canvas, Window
from expertshare.decoding.commit_rule import holds_eos, schedule, tokens_to_edit, tokens_to_write
from expertshare.decoding.coreset_memory import CoresetMemory
from expertshare.decoding.forwards import AccountedModel, Forwards
from expertshare.decoding.full_attention import WholeCanvas
from expertshare.decoding.geometry import check_prompts, lay_out
from expertshare.decoding.options import DecodingOptions
from expertshare.decoding.results import BlockResult, FinishReason, Generation, join_blocks
from expertshare.decoding.row import Row
from expertshare.decoding.sampling import draw, propose
from expertshare.errors import InputError, NumericsError
from expertshare.measure.clock import PartClock
from expertshare.measure.cost import Cost, CostLedger
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer


class BlockDecoder:
    """Decodes prompts with one model, one runtime and one set of options; holds no state of its own."""

    def __init__(self, model: MoETransformer, runtime: Runtime, options: DecodingOptions) -> None:
        """Raises PolicyError or InputError for a policy or options that the model cannot work with."""
        self.model = model
        self.runtime = replace(runtime, policy=runtime.policy.bind(model.config.router))
        self.options = options.resolve(model.config)

    def blocks(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None) -> BlockStream:
        """Start decoding: an iterator that yields each block of each row as soon as it is committed.

        seeds: one per prompt, for sampling; by default every row uses the options' seed, so that a prompt's
        answer does not depend on where in a batch it stands. Raises InputError for unusable prompts or seeds.
        """
        check_prompts(prompts, self.options, self.model.config)
        if seeds is not None and len(seeds) != len(prompts):
            raise InputError(f"expected one seed per prompt ({len(prompts)}), got {len(seeds)}. Pass as many, or none.")
        return BlockStream(self, prompts, seeds if seeds is not None else [self.options.seed] * len(prompts))


class BlockStream(Iterator[BlockResult]):
    """One batch being decoded. Iterate it for blocks; `generation()` says what came of it so far."""

    def __init__(self, decoder: BlockDecoder, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
        model, self._options = decoder.model, decoder.options
        config = model.config
        self._clock = decoder.runtime.clock or PartClock()
        self._seconds_before = dict(self._clock.seconds)
        self._elapsed_s = 0.0
        self._runtime = replace(decoder.runtime, clock=self._clock)
        own_bytes = config.num_expert_parameters * model.dtype.itemsize
        self._ledger = CostLedger(config.num_moe_layers, self._runtime.bytes_per_expert or own_bytes)
        self._model = model
        self._eos_ids = torch.tensor(config.eos_ids, dtype=torch.int64, device=model.device)
        self._schedule = schedule(_known(self._options.block_length), _known(self._options.steps_per_block))
        geometries = [lay_out(len(prompt), self._options, config) for prompt in prompts]
        self._rows = [
            Row(
                index=index,
                geometry=geometry,
                generator=torch.Generator(model.device).manual_seed(seeds[index]),
                block=geometry.first_block,
            )
            for index, geometry in enumerate(geometries)
        ]
        self.canvas = Canvas.lay(prompts, geometries, mask_id=config.mask_id, device=model.device)
        memory = CoresetMemory(self._runtime.policy, config.num_moe_layers)
        run = AccountedModel(model, self._runtime, self._ledger, memory)
        full = config.attention == "full"
        self.forwards: Forwards = WholeCanvas(run, self.canvas) if full else CachedPrefix(run, self.canvas, self._rows)
        self._active: list[Row] = []
        self._started = False
        self._ready: deque[BlockResult] = deque()
        self._results: list[list[BlockResult]] = [[] for _ in prompts]

    def __next__(self) -> BlockResult:
        """Decode until some row's block is committed. Raises NumericsError if the model's logits are not
        finite."""
        start = time.perf_counter()
        with torch.no_grad():
            if not self._started:
                self._started, self._active = True, list(self._rows)
                self.forwards.prefill(self._active)
            while self._active and not self._ready:
                self._ready.extend(self.step())
        self._elapsed_s += time.perf_counter() - start
        if not self._ready:
            raise StopIteration
        block = self._ready.popleft()
        self._results[block.row].append(block)
        return block

    def step(self) -> list[BlockResult]:
        """One denoising step of every unfinished row; returns the blocks that it completed."""
        rows, window = self._active, self.canvas.window(self._active)
        hidden_RLD = self.forwards.denoise(rows)
        tokens_RL, confidence_RL = self._propose(rows, window, hidden_RLD)
        write_RL = self._choose(rows, window, tokens_RL, confidence_RL)
        self.canvas.write(window, tokens_RL, write_RL)
        done = self._done(rows, write_RL)
        self.forwards.commit([row for row, finish in done if finish is None])
        return [self._close(row, finish) for row, finish in done]

    def _propose(self, rows: Sequence[Row], window: Window, hidden_RLD: Tensor) -> tuple[Tensor, Tensor]:
        """A token and its confidence for each position that may change; elsewhere the old token and -inf."""
        options, config = self._options, self._model.config
        wanted_RL = window.masked_RL if options.editing_threshold is None else ~window.frozen_RL
        generators = [row.generator for row in rows]
        counts = wanted_RL.sum(dim=1).tolist() if options.temperature or options.remasking == "random" else []
        with self._runtime.timed("head"):
            hidden_CD = hidden_RLD[wanted_RL]
            if options.takes_the_best:
                tokens_C, confidence_C = self._model.best_tokens(
                    hidden_CD, [config.mask_id], backend=self._runtime.backend
                )
                self._check_finite(rows, wanted_RL, confidence_C.isfinite())
            else:
                logits_CV = self._model.logits(hidden_CD, backend=self._runtime.backend)
                self._check_finite(rows, wanted_RL, logits_CV.isfinite().all(dim=1))
                uniform_CV = draw(generators, counts, logits_CV.shape[1]) if options.temperature else None
                tokens_C, confidence_C = propose(logits_CV, options, mask_id=config.mask_id, uniform_CV=uniform_CV)
        if options.remasking == "random":
            confidence_C = draw(generators, counts).float()
        confidence_RL = torch.full(wanted_RL.shape, float("-inf"), device=confidence_C.device)
        confidence_RL = confidence_RL.masked_scatter(wanted_RL, confidence_C)
        return window.tokens_RL.masked_scatter(wanted_RL, tokens_C), confidence_RL

    def _choose(self, rows: Sequence[Row], window: Window, tokens_RL: Tensor, confidence_RL: Tensor) -> Tensor:
        """Which positions take their proposed token: masks by the commit rule, decided ones by the editing
        rule."""
        options, editing = self._options, self._options.editing_threshold
        one_at_least = editing is not None and options.threshold is not None
        least = [1 if one_at_least else self._schedule[min(row.steps, len(self._schedule) - 1)] for row in rows]
        write_RL = tokens_to_write(confidence_RL, window.masked_RL, least, options.threshold)
        if editing is None:
            return write_RL
        editable_RL = ~window.masked_RL & ~window.frozen_RL
        return write_RL | tokens_to_edit(confidence_RL, tokens_RL, window.tokens_RL, editable_RL, editing)

    def _done(self, rows: Sequence[Row], write_RL: Tensor) -> list[tuple[Row, FinishReason | None]]:
        """Count the step, and find the rows whose block is decided, with why the row is finished, if it
        is."""
        window = self.canvas.window(rows)
        eos_R = holds_eos(torch.isin(window.tokens_RL, self._eos_ids), window.masked_RL, window.answer_RL)
        state = torch.stack((window.masked_RL.any(dim=1), write_RL.any(dim=1), eos_R), dim=1).tolist()
        done: list[tuple[Row, FinishReason | None]] = []
        for row, (has_masks, changed, eos) in zip(rows, state, strict=True):
            row.steps += 1
            row.post_steps += not row.has_masks
            row.has_masks = has_masks
            if self._is_decided(row, changed=changed, eos=eos):
                done.append((row, self._finish(row, eos=eos)))
        return done

    def _is_decided(self, row: Row, *, changed: bool, eos: bool) -> bool:
        options = self._options
        if options.editing_threshold is None:
            return not row.has_masks or (eos and options.stop_at_eos)
        # an end-of-text token can still be edited away, so with editing the whole block settles first
        settled = row.post_steps >= options.max_post_steps or (row.post_steps > 0 and not changed)
        return not row.has_masks and settled

    def _finish(self, row: Row, *, eos: bool) -> FinishReason | None:
        if eos and self._options.stop_at_eos:
            return "eos"
        if not row.on_last_block:
            return None
        return "eos" if eos or row.ended else "length"

    def _close(self, row: Row, finish: FinishReason | None) -> BlockResult:
        """Read the row's block out and move the row on, or out of the batch."""
        ids = [] if row.ended else self.canvas.answer(row)
        eos = next((place for place, token in enumerate(ids) if token in self._model.config.eos_ids), len(ids))
        row.ended = row.ended or eos < len(ids)
        result = BlockResult(
            row=row.index,
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

    def _check_finite(self, rows: Sequence[Row], wanted_RL: Tensor, finite_C: Tensor) -> None:
        if finite_C.all():
            return
        candidate = int(finite_C.logical_not().nonzero()[0])
        row = rows[int(wanted_RL.nonzero()[candidate, 0])]
        raise NumericsError(
            f"expected finite logits, got NaN or infinity for row {row.index}, block {row.answer_block}, "
            f"step {row.steps}. Check the checkpoint, or run in float32."
        )

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


def _known(value: int | None) -> int:
    assert value is not None  # resolved options have no gaps
    return value
