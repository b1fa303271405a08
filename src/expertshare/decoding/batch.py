"""Rows that are decoded together: denoise, propose, write, close the blocks that are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from expertshare.decoding.block_causal import CachedPrefix
from expertshare.decoding.canvas import Canvas, Window
from expertshare.decoding.captured_blocks import CapturedBlocks
from expertshare.decoding.commit_rule import holds_eos, schedule, tokens_to_edit, tokens_to_write
from expertshare.decoding.coreset_memory import CoresetMemory
from expertshare.decoding.forwards import AccountedModel, Forwards, Ledger
from expertshare.decoding.full_attention import WholeCanvas
from expertshare.decoding.geometry import RowGeometry
from expertshare.decoding.options import DecodingOptions
from expertshare.decoding.results import BlockResult, FinishReason
from expertshare.decoding.row import Row, StepState
from expertshare.decoding.sampling import draw, propose
from expertshare.decoding.watching import Watcher
from expertshare.errors import NumericsError
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer


class RowBatch:
    """Rows under one policy and one block length, each with options of its own. They share forwards and nothing else:
    what a row is decoded to does not depend on the others."""

    def __init__(
        self,
        model: MoETransformer,
        runtime: Runtime,
        ledger: Ledger,
        canvas: Canvas,
        watcher: Watcher | None = None,
    ) -> None:
        """runtime: its policy bound to the model's router. canvas: of the rows to come."""
        self._model, self._runtime, self._watcher = model, runtime, watcher
        self._eos_ids = torch.tensor(model.config.eos_ids, dtype=torch.int64, device=model.device)
        self.canvas = canvas
        memory = CoresetMemory(runtime.policy, model.config.num_moe_layers)
        self._run = run = AccountedModel(model, runtime, ledger, memory, watcher)
        full = model.config.attention == "full"
        self.forwards: Forwards = WholeCanvas(run, canvas) if full else CachedPrefix(run, canvas)
        self._active: list[Row] = []
        self._captured: CapturedBlocks | None = None

    @property
    def num_rows(self) -> int:
        """Rows that are not finished."""
        return len(self._active)

    def start(self, rows: Sequence[Row]) -> None:
        """Take part from the next step on, behind those that do. The rows are on the canvas."""
        with torch.no_grad():
            self.forwards.prefill(rows)
        self._active = [*self._active, *rows]

    def step_by_replay(self, captured: CapturedBlocks) -> None:
        """Take all steps to come by replays. To be said before any row has started; those that do start together."""
        self._captured = captured
        self.forwards = CachedPrefix(self._run, self.canvas, captured.cache)

    def step(self) -> list[BlockResult]:
        """One denoising step of every unfinished row; returns the blocks that it completed."""
        rows = self._active
        if self._captured is not None:
            states = self._captured.step(rows, self._run)
            self._check_states(rows, states)
        else:
            states = self._ordinary_step(rows)
        done = self._done(rows, states)
        going_on = [row for row, finish in done if finish is None]
        if self._captured is not None:
            self._captured.commit(going_on, rows, self._run)
        else:
            self.forwards.commit(going_on)
        return [self._close(row, finish) for row, finish in done]

    def _ordinary_step(self, rows: Sequence[Row]) -> list[StepState]:
        window = self.canvas.window(rows)
        hidden_RLD = self.forwards.denoise(rows)
        tokens_RL, confidence_RL = self._propose(rows, window, hidden_RLD)
        write_RL = self._choose(rows, window, tokens_RL, confidence_RL)
        self.canvas.write(window, tokens_RL, write_RL)
        if self._watcher is not None:
            self._watcher.hear_step(rows, self.canvas.window(rows), confidence_RL)
        return self._states(rows, write_RL)

    def _propose(self, rows: Sequence[Row], window: Window, hidden_RLD: Tensor) -> tuple[Tensor, Tensor]:
        """A token and its confidence for each position that may change; elsewhere the old token and -inf."""
        tokens_RL = window.tokens_RL.clone()
        confidence_RL = torch.full(tokens_RL.shape, float("-inf"), device=tokens_RL.device)
        edited = [row.options.editing_threshold is not None for row in rows]
        wanted_RL = torch.where(self._column(edited), ~window.frozen_RL, window.masked_RL)
        for best in sorted({row.options.takes_the_best for row in rows}):
            part = [row.options.takes_the_best == best for row in rows]
            part_RL = wanted_RL if all(part) else wanted_RL & self._column(part)
            with self._runtime.timed("head"):
                ask = self._best_tokens if best else self._sampled_tokens
                tokens_C, confidence_C = ask(rows, part_RL, hidden_RLD[part_RL])
            tokens_RL.masked_scatter_(part_RL, tokens_C)
            confidence_RL.masked_scatter_(part_RL, confidence_C)
        random = [row.options.remasking == "random" for row in rows]
        if any(random):
            random_RL = wanted_RL & self._column(random)
            noise_C = draw([row.generator for row in rows], random_RL.sum(dim=1).tolist())
            confidence_RL.masked_scatter_(random_RL, noise_C.float())
        return tokens_RL, confidence_RL

    def _best_tokens(self, rows: Sequence[Row], part_RL: Tensor, hidden_CD: Tensor) -> tuple[Tensor, Tensor]:
        """Of candidates that lie where `part_RL`."""
        mask_id = self._model.config.mask_id
        tokens_C, confidence_C = self._model.best_tokens(hidden_CD, [mask_id], backend=self._runtime.backend)
        self._check_finite(rows, part_RL, confidence_C.isfinite())
        return tokens_C, confidence_C

    def _sampled_tokens(self, rows: Sequence[Row], part_RL: Tensor, hidden_CD: Tensor) -> tuple[Tensor, Tensor]:
        """Of candidates that lie where `part_RL`, by the options of their rows."""
        mask_id = self._model.config.mask_id
        logits_CV = self._model.logits(hidden_CD, backend=self._runtime.backend)
        self._check_finite(rows, part_RL, logits_CV.isfinite().all(dim=1))
        counts, proposed, first = part_RL.sum(dim=1).tolist(), [], 0
        by_row = zip(rows, counts, strict=True)
        for _, run in groupby(by_row, key=lambda pair: _sampling(pair[0].options)):
            members = list(run)
            options, sizes = members[0][0].options, [count for _, count in members]
            last = first + sum(sizes)
            generators = [row.generator for row, _ in members]
            uniform_CV = draw(generators, sizes, logits_CV.shape[1]) if options.temperature else None
            proposed.append(propose(logits_CV[first:last], options, mask_id=mask_id, uniform_CV=uniform_CV))
            first = last
        tokens, confidences = zip(*proposed, strict=True)
        return torch.cat(tokens), torch.cat(confidences)

    def _choose(self, rows: Sequence[Row], window: Window, tokens_RL: Tensor, confidence_RL: Tensor) -> Tensor:
        """Which positions take their proposed token: masks by the commit rule, decided ones by the editing
        rule."""
        least = [row.least_tokens for row in rows]
        threshold_R1 = self._threshold(rows, lambda options: options.threshold)
        write_RL = tokens_to_write(confidence_RL, window.masked_RL, least, threshold_R1)
        if all(row.options.editing_threshold is None for row in rows):
            return write_RL
        editable_RL = ~window.masked_RL & ~window.frozen_RL
        editing_R1 = self._threshold(rows, lambda options: options.editing_threshold)
        return write_RL | tokens_to_edit(confidence_RL, tokens_RL, window.tokens_RL, editable_RL, editing_R1)

    def _column(self, values: Sequence[bool]) -> Tensor:
        return torch.tensor(values, device=self._model.device).unsqueeze(1)

    def _threshold(self, rows: Sequence[Row], of: Callable[[DecodingOptions], float | None]) -> Tensor:
        """float32 [R, 1], infinity where a row has none."""
        values = [of(row.options) for row in rows]
        shown = [float("inf") if value is None else value for value in values]
        return torch.tensor(shown, dtype=torch.float32, device=self._model.device).unsqueeze(1)

    def _states(self, rows: Sequence[Row], write_RL: Tensor) -> list[StepState]:
        window = self.canvas.window(rows)
        eos_R = holds_eos(torch.isin(window.tokens_RL, self._eos_ids), window.masked_RL, window.answer_RL)
        flags = torch.stack((window.masked_RL.any(dim=1), write_RL.any(dim=1), eos_R), dim=1).tolist()
        return [StepState(True, *of_row) for of_row in flags]

    def _done(self, rows: Sequence[Row], states: Sequence[StepState]) -> list[tuple[Row, FinishReason | None]]:
        """Count the step, and find the rows whose block is decided, with why the row is finished, if it
        is."""
        done: list[tuple[Row, FinishReason | None]] = []
        for row, state in zip(rows, states, strict=True):
            row.steps += 1
            row.post_steps += not row.has_masks
            row.has_masks = state.has_masks
            if self._is_decided(row, changed=state.changed, eos=state.eos):
                done.append((row, self._finish(row, eos=state.eos)))
        return done

    def _is_decided(self, row: Row, *, changed: bool, eos: bool) -> bool:
        options = row.options
        if options.editing_threshold is None:
            return not row.has_masks or (eos and options.stop_at_eos)
        # an end-of-text token can still be edited away, so with editing the whole block settles first
        settled = row.post_steps >= options.max_post_steps or (row.post_steps > 0 and not changed)
        return not row.has_masks and settled

    def _finish(self, row: Row, *, eos: bool) -> FinishReason | None:
        if eos and row.options.stop_at_eos:
            return "eos"
        if not row.on_last_block:
            return None
        return "eos" if eos or row.ended else "length"

    def _close(self, row: Row, finish: FinishReason | None) -> BlockResult:
        """Read the row's block out and move the row on, or out of the batch."""
        ids = [] if row.ended else (self._captured or self.canvas).answer(row)
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

    def _check_finite(self, rows: Sequence[Row], wanted_RL: Tensor, finite_C: Tensor) -> None:
        if finite_C.all():
            return
        candidate = int(finite_C.logical_not().nonzero()[0])
        raise _not_finite(rows[int(wanted_RL.nonzero()[candidate, 0])])

    def _check_states(self, rows: Sequence[Row], states: Sequence[StepState]) -> None:
        for row, state in zip(rows, states, strict=True):
            if not state.finite:
                raise _not_finite(row)


def _not_finite(row: Row) -> NumericsError:
    return NumericsError(
        f"expected finite logits, got NaN or infinity for row {row.number}, block {row.answer_block}, "
        f"step {row.steps}. Check the checkpoint, or run in float32.",
        row=row.number,
    )


def make_row(
    number: int, index: int, geometry: RowGeometry, options: DecodingOptions, *, seed: int, device: torch.device
) -> Row:
    """A row before its first block; `options` resolved."""
    assert options.block_length is not None
    assert options.steps_per_block is not None
    return Row(
        number=number,
        index=index,
        geometry=geometry,
        options=options,
        schedule=schedule(options.block_length, options.steps_per_block),
        generator=torch.Generator(device).manual_seed(seed),
        block=geometry.first_block,
    )


def _sampling(options: DecodingOptions) -> tuple[object, ...]:
    """What has to be equal for rows to be sampled in one go."""
    return options.temperature, options.top_k, options.top_p, options.filtered_confidence
