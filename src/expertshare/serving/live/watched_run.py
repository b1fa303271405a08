"""One run of a trace: a policy decoding the prompt, step by step, and what each step looked like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertshare.decoding import BlockDecoder, BlockStream
from expertshare.decoding.row import Row, Window
from expertshare.measure.cost import ForwardKind
from expertshare.models.runtime import RoutingTrace
from expertshare.routing import policy_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Event = dict[str, Any]
"""One event of a trace, ready for JSON; docs/live-page.md says what each type holds."""


class TokenTexts:
    """What each token reads as by itself, remembered.

    Some tokenizers swallow the space in front of a first token; so each is read behind another one, and what that one
    reads as is cut off. Bytes that are no character by themselves read as the replacement character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._before = list(tokenizer("x", add_special_tokens=False)["input_ids"])
        self._prefix = self._decode([])
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode([token]).removeprefix(self._prefix)
        return self._known[token]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode([*self._before, *tokens], skip_special_tokens=False))


@dataclass(frozen=True, slots=True)
class _Step:
    """A step as the decoder told of it, on the model's device. group: the block's number among the forward's."""

    block: int
    step: int
    group: int
    window: Window
    confidence_L: Tensor
    routing: RoutingTrace


class _Notebook:
    """Keeps the last step, and counts the experts of every forward. One row only."""

    def __init__(self) -> None:
        self.last: _Step | None = None
        self._loads: list[Tensor] = []
        self._denoised: RoutingTrace | None = None
        self._experts_read = 0

    def hear_forward(self, kind: ForwardKind, rows: Sequence[Row], routing: RoutingTrace) -> None:
        self._loads.append(routing.load_NE)
        if kind == "denoise":
            self._denoised = routing

    def hear_step(self, rows: Sequence[Row], window: Window, confidence_RL: Tensor) -> None:
        assert self._denoised is not None  # a step is heard after its forward
        row, whole_canvas = rows[0], self._denoised.group_experts_NG.shape[1] > 1
        self.last = _Step(
            block=row.answer_block,
            step=row.steps,
            group=row.block if whole_canvas else 0,
            window=window,
            confidence_L=confidence_RL[0],
            routing=self._denoised,
        )

    def experts_read(self) -> int:
        """Experts that all forwards so far asked for, each layer's counted by itself."""
        self._experts_read += sum(int((load_NE > 0).sum()) for load_NE in self._loads)
        self._loads.clear()
        return self._experts_read


class WatchedRun:
    """A prompt being decoded under one policy. `advance` is the work; the events are put together outside of it."""

    def __init__(
        self,
        index: int,
        policy: str,
        decoder: BlockDecoder,
        prompt: Sequence[int],
        texts: TokenTexts,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """Raises InputError for a prompt that the model cannot take."""
        self.index, self.policy, self.finished = index, policy, False
        self._notebook = _Notebook()
        self._stream: BlockStream = decoder.blocks([prompt], watcher=self._notebook)
        self._record = policy_record(decoder.runtime.policy)
        own_bytes = decoder.model.config.num_expert_parameters * decoder.model.dtype.itemsize
        self._bytes_per_expert = decoder.runtime.bytes_per_expert or own_bytes
        self._eos_ids, self._texts, self._decode = decoder.model.config.eos_ids, texts, decode
        self._confidence: dict[int, float] = {}
        self._answer: list[int] = []
        self._steps = 0

    def describe(self) -> Event:
        """The run in the start event."""
        return {**self._record, "run": self.index, "policy": self.policy}

    def advance(self) -> bool:
        """One denoising step; returns whether it completed the block. Raises NumericsError or ExpertMemoryError."""
        return self._stream.advance()

    def step_event(self) -> Event:
        """What the last step looked like."""
        step = self._notebook.last
        assert step is not None  # advance comes first
        self._steps += 1
        if step.step == 0:
            self._confidence.clear()
        layers = [torch.nonzero(load_E).flatten().tolist() for load_E in step.routing.load_NE]
        unique_N = step.routing.group_experts_NG[:, step.group].tolist()
        answered = len(self._answer) + self._decided_answer(step.window)
        return {
            "type": "step",
            "run": self.index,
            "block": step.block,
            "step": step.step,
            "steps": self._steps,
            "tokens": self._tokens(step),
            "experts": layers,
            "unique_by_layer": unique_N,
            "unique_experts": sum(unique_N) / len(unique_N),
            "expert_bytes": sum(map(len, layers)) * self._bytes_per_expert,
            "expert_bytes_so_far": self._notebook.experts_read() * self._bytes_per_expert,
            "elapsed_s": self._stream.elapsed_s,
            "tokens_so_far": answered,
        }

    def block_event(self) -> Event:
        """The block that the last step completed."""
        block = next(self._stream)
        self._answer.extend(block.token_ids)
        self.finished = block.finish_reason is not None
        return {
            "type": "block",
            "run": self.index,
            "block": block.block,
            "steps": block.steps,
            "tokens_so_far": len(self._answer),
            "answer": self._decode(self._answer),
            "finish_reason": block.finish_reason,
        }

    def totals(self) -> Event:
        """The run as a whole, by the names of `generate --json`; expert_bytes in all, not by kind of forward."""
        generation = self._stream.generation()
        cost, row = generation.cost, generation.rows[0]
        return {
            "run": self.index,
            "policy": self.policy,
            "text": self._decode(row.token_ids),
            "token_ids": list(row.token_ids),
            "finish_reason": row.finish_reason,
            "tokens": len(row.token_ids),
            "blocks": row.blocks,
            "steps": row.steps,
            "forwards": row.forwards,
            "elapsed_s": generation.elapsed_s,
            "tokens_per_s": len(row.token_ids) / generation.elapsed_s if generation.elapsed_s > 0 else 0.0,
            "unique_experts": cost.unique_experts["denoise"],
            "expert_bytes": sum(cost.expert_bytes.values()),
        }

    def _tokens(self, step: _Step) -> list[Event]:
        window = step.window
        ids, masked, prompt = (x_RL[0].tolist() for x_RL in (window.tokens_RL, window.masked_RL, window.frozen_RL))
        fresh: list[float] = step.confidence_L.tolist()
        tokens: list[Event] = []
        for place, token in enumerate(ids):
            if fresh[place] != float("-inf"):  # decided ones keep the confidence with which they were written
                self._confidence[place] = fresh[place]
            tokens.append(
                {
                    "text": "" if masked[place] else self._texts[token],
                    "masked": masked[place],
                    "confidence": None if prompt[place] else round(self._confidence[place], 4),
                    "role": "prompt" if prompt[place] else "end" if token in self._eos_ids else "answer",
                }
            )
        return tokens

    def _decided_answer(self, window: Window) -> int:
        """Tokens of the block that are decided and belong to the answer, up to the first end-of-text token."""
        counted = 0
        state = zip(*(x_RL[0].tolist() for x_RL in (window.tokens_RL, window.masked_RL, window.answer_RL)), strict=True)
        for token, masked, in_answer in state:
            if in_answer and not masked:
                if token in self._eos_ids:
                    break
                counted += 1
        return counted
