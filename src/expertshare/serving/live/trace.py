"""A prompt decoded under each policy while somebody watches: what decodes, and what every step looked like."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.decoding.row import Row, Window
from expertshare.errors import InputError
from expertshare.kernels import AUTO, choose_backend
from expertshare.measure.cost import ForwardKind
from expertshare.models import LoadedModel, Runtime, decode_answer, describe, encode_prompt
from expertshare.models.runtime import RoutingTrace
from expertshare.routing import make_policy, parse_policy, policy_record
from expertshare.serving.requests import TraceRequest
from expertshare.serving.scheduling import FairLock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOK_FOR_STOP_S = 0.05

Event = dict[str, Any]
"""One event of a trace, ready for JSON; docs/live-page.md says what each type holds."""


class TraceSource(Protocol):
    """Decodes a prompt while somebody watches."""

    def facts(self) -> Mapping[str, Any]:
        """What the page says of the model before anything is decoded, ready for JSON."""
        ...

    def trace(self, asked: TraceRequest, stop: threading.Event) -> Iterator[Event]:
        """Decode the prompt once under each policy: a start event, steps and blocks of all runs in turns, an end event.

        Ends early, without an end event, once `stop` is set. Raises a subclass of ExpertShareError: before the first
        event for an unusable request, later where decoding fails.
        """
        ...


class ModelTraceSource:
    """Decodes with a loaded model, one denoising step at a time, the runs taking turns block by block."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        lock: threading.Lock | FairLock,
        name: str | None = None,
        options: DecodingOptions | None = None,
        runtime: Runtime | None = None,
        chat: bool | None = None,
    ) -> None:
        """lock: held during every step; others that run the model get it in between. name: as the page shows it, by
        default the model's directory. options: how to decode, lengths and seed aside. runtime: how to run the model,
        its policy aside. chat: None uses the chat template where there is one. Raises InputError for a model without a
        tokenizer."""
        if loaded.tokenizer is None:
            raise InputError(f"{loaded.path} has no tokenizer: put the model's tokenizer.json there")
        self._loaded, self._tokenizer, self._lock, self._chat = loaded, loaded.tokenizer, lock, chat
        self._name, self._options = name or loaded.path.resolve().name, options or DecodingOptions()
        backend = choose_backend(AUTO, loaded.model.device)
        self._runtime = runtime or Runtime(policy=make_policy("vanilla"), backend=backend)
        self._texts = TokenTexts(loaded.tokenizer)

    def facts(self) -> Mapping[str, Any]:
        """Sizes of the model and how it decodes."""
        config, facts = self._loaded.config, describe(self._loaded)
        return {
            "name": self._name,
            "family": config.family,
            "num_parameters": facts.num_parameters,
            "dtype": facts.dtype,
            "num_moe_layers": config.num_moe_layers,
            "num_experts": config.router.num_experts,
            "experts_per_token": config.router.top_k,
            "bytes_per_expert": facts.bytes_per_expert,
            "block_length": self._options.block_length or config.block_length,
            "mask_token": self._tokenizer.convert_ids_to_tokens(config.mask_id),
            "max_positions": config.max_positions,
            "whole_canvas": config.attention == "full",
            "threshold": self._options.threshold,
            "temperature": self._options.temperature,
        }

    def trace(self, asked: TraceRequest, stop: threading.Event) -> Iterator[Event]:
        """As TraceSource says. Raises InputError or PolicyError before the first event; NumericsError or
        ExpertMemoryError later."""
        ids = encode_prompt(self._tokenizer, asked.prompt, self._chat)
        options = self._decoding(asked)
        runs = [self._run(index, policy, options, ids) for index, policy in enumerate(asked.policies)]
        told = {name: value for name, value in asdict(asked).items() if name not in ("prompt", "policies")}
        described = [run.described for run in runs]
        yield {"type": "start", "model": dict(self.facts()), "runs": described, "prompt_tokens": len(ids), **told}
        waiting = runs
        while waiting:
            for run in waiting:
                yield from self._block(run, stop)
                if stop.is_set():
                    return
            waiting = [run for run in waiting if not run.finished]
        yield {"type": "end", "runs": [run.totals() for run in runs]}

    def _decoding(self, asked: TraceRequest) -> DecodingOptions:
        """The server's options, with what the request may choose."""
        options = replace(self._options, gen_length=asked.max_tokens, seed=asked.seed)
        if asked.tokens_per_step is None:
            return options
        length = options.block_length or self._loaded.config.block_length
        return replace(options, threshold=None, steps_per_block=math.ceil(length / asked.tokens_per_step))

    def _run(self, index: int, policy: str, options: DecodingOptions, prompt: Sequence[int]) -> WatchedRun:
        runtime = replace(self._runtime, policy=parse_policy(policy))
        decoder = BlockDecoder(self._loaded.model, runtime, options)
        return WatchedRun(index, policy, decoder, prompt, self._texts)

    def _block(self, run: WatchedRun, stop: threading.Event) -> Iterator[Event]:
        """The steps of the run's next block, then the block."""
        complete = False
        while not complete:
            if not self._take_turn(stop):
                return
            try:
                complete = run.stream.advance()
            finally:
                self._lock.release()
            yield run.step_event()
        yield run.block_event()

    def _take_turn(self, stop: threading.Event) -> bool:
        """Wait for the model; False where nobody wants the trace any more."""
        while not stop.is_set():
            if self._lock.acquire(timeout=_LOOK_FOR_STOP_S):
                return True
        return False


class WatchedRun:
    """A prompt being decoded under one policy, watched by this object. `stream.advance` is the work, after which it has
    its step's event and, where it says so, a block's. described: the run in the start event."""

    _routing: RoutingTrace
    _window: Window
    _confidence_L: Tensor

    def __init__(
        self, index: int, policy: str, decoder: BlockDecoder, prompt: Sequence[int], texts: TokenTexts
    ) -> None:
        """Raises InputError for a prompt that the model cannot take."""
        self.index, self.policy, self.finished = index, policy, False
        self.stream = decoder.blocks([prompt], watcher=self)
        self.described = {**policy_record(decoder.runtime.policy), "run": index, "policy": policy}
        own_bytes = decoder.model.config.num_expert_parameters * decoder.model.dtype.itemsize
        self._bytes_per_expert = decoder.runtime.bytes_per_expert or own_bytes
        self._eos_ids, self._texts = decoder.model.config.eos_ids, texts
        self._confidence: dict[int, float] = {}
        self._answer: list[int] = []
        self._steps = 0

    def hear_forward(self, kind: ForwardKind, rows: Sequence[Row], routing: RoutingTrace) -> None:
        """Keep the routing of the step at hand."""
        if kind == "denoise":
            self._routing = routing

    def hear_step(self, rows: Sequence[Row], window: Window, confidence_RL: Tensor) -> None:
        """Keep the step, on the model's device. One row only."""
        (row,), whole_canvas = rows, self._routing.group_experts_NG.shape[1] > 1
        self._block, self._step, self._group = row.answer_block, row.steps, row.block if whole_canvas else 0
        self._window, self._confidence_L = window, confidence_RL[0]

    def step_event(self) -> Event:
        """What the last step looked like."""
        self._steps += 1
        layers = [torch.nonzero(load_E).flatten().tolist() for load_E in self._routing.load_NE]
        unique_N = self._routing.group_experts_NG[:, self._group].tolist()
        tokens, decided = self._tokens()
        return {
            "type": "step",
            "run": self.index,
            "block": self._block,
            "step": self._step,
            "steps": self._steps,
            "tokens": tokens,
            "experts": layers,
            "unique_by_layer": unique_N,
            "unique_experts": sum(unique_N) / len(unique_N),
            "expert_bytes": sum(map(len, layers)) * self._bytes_per_expert,
            "expert_bytes_so_far": sum(self.stream.cost().expert_bytes.values()),
            "elapsed_s": self.stream.elapsed_s,
            "tokens_so_far": len(self._answer) + decided,
        }

    def block_event(self) -> Event:
        """The block that the last step completed."""
        block = next(self.stream)
        self._answer.extend(block.token_ids)
        self.finished = block.finish_reason is not None
        return {
            "type": "block",
            "run": self.index,
            "block": block.block,
            "steps": block.steps,
            "tokens_so_far": len(self._answer),
            "answer": self._texts.whole(self._answer),
            "finish_reason": block.finish_reason,
        }

    def totals(self) -> Event:
        """The run as a whole, by the names of `generate --json`; expert_bytes in all, not by kind of forward."""
        generation = self.stream.generation()
        cost, row = generation.cost, generation.rows[0]
        return {
            "run": self.index,
            "policy": self.policy,
            "text": self._texts.whole(row.token_ids),
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

    def _tokens(self) -> tuple[list[Event], int]:
        """The positions of the block; and how many are decided and belong to the answer, up to the first end-of-text
        token."""
        if self._step == 0:
            self._confidence.clear()
        tokens: list[Event] = []
        answer: list[bool] = []
        state = (self._window.tokens_RL, self._window.masked_RL, self._window.frozen_RL, self._window.answer_RL)
        places = zip(*(x_RL[0].tolist() for x_RL in state), self._confidence_L.tolist(), strict=True)
        for place, (token, masked, prompt, in_answer, confidence) in enumerate(places):
            if confidence != -math.inf:  # decided ones keep the confidence with which they were written
                self._confidence[place] = confidence
            ends = token in self._eos_ids
            tokens.append(
                {
                    "text": "" if masked else self._texts[token],
                    "masked": masked,
                    "confidence": None if prompt else round(self._confidence[place], 4),
                    "role": "prompt" if prompt else "end" if ends else "answer",
                }
            )
            if in_answer and not masked:
                answer.append(not ends)
        return tokens, [*answer, False].index(False)


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

    def whole(self, tokens: Sequence[int]) -> str:
        """The text of an answer, or of its beginning."""
        return decode_answer(self._tokenizer, tokens)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode([*self._before, *tokens], skip_special_tokens=False))
