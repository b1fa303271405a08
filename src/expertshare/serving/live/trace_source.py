"""What decodes for the live page: what it needs, and a model of this process."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.errors import InputError
from expertshare.kernels import AUTO, choose_backend
from expertshare.models import LoadedModel, Runtime, decode_answer, describe, encode_prompt
from expertshare.routing import RoutingPolicy, parse_policy
from expertshare.serving.fair_lock import FairLock
from expertshare.serving.live.watched_run import Event, TokenTexts, WatchedRun
from expertshare.types import ExpertStore


class TraceSource(Protocol):
    """Decodes a prompt while somebody watches."""

    def facts(self) -> Mapping[str, Any]:
        """What the page says of the model before anything is decoded, ready for JSON."""
        ...

    def trace(
        self,
        prompt: str,
        policies: Sequence[str],
        *,
        max_tokens: int,
        seed: int,
        stop: threading.Event,
        tokens_per_step: int | None = None,
    ) -> Iterator[Event]:
        """Decode `prompt` once under each policy: a start event, steps and blocks of all runs in turns, an end event.

        tokens_per_step: write that many tokens in a step, the surest ones; None leaves it to the threshold. Ends early,
        without an end event, once `stop` is set. Raises a subclass of ExpertShareError: before the first event for an
        unusable request, later where decoding fails.
        """
        ...


_LOOK_FOR_STOP_S = 0.05


class ModelTraceSource:
    """Decodes with a loaded model, one denoising step at a time, the runs taking turns block by block."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        lock: threading.Lock | FairLock,
        name: str | None = None,
        options: DecodingOptions | None = None,
        backend: str = AUTO,
        store: ExpertStore | None = None,
        chat: bool | None = None,
    ) -> None:
        """lock: held during every step; others that run the model get it in between. name: as the page shows it, by
        default the model's directory. options: how to decode, lengths and seed aside. store: for a converted model.
        chat: None uses the chat template where there is one. Raises InputError for a model without a tokenizer."""
        if loaded.tokenizer is None:
            raise InputError(f"{loaded.path} has no tokenizer: put the model's tokenizer.json there")
        self._loaded, self._tokenizer, self._lock, self._chat = loaded, loaded.tokenizer, lock, chat
        self._name = name or loaded.path.resolve().name
        self._options = options or DecodingOptions()
        self._backend, self._store = choose_backend(backend, loaded.model.device), store
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

    def trace(
        self,
        prompt: str,
        policies: Sequence[str],
        *,
        max_tokens: int,
        seed: int,
        stop: threading.Event,
        tokens_per_step: int | None = None,
    ) -> Iterator[Event]:
        """As TraceSource says. Raises InputError or PolicyError before the first event; NumericsError or
        ExpertMemoryError later."""
        ids = encode_prompt(self._tokenizer, prompt, self._chat)
        options = self._decoding(max_tokens, seed, tokens_per_step)
        runs = [
            WatchedRun(index, text, self._decoder(parse_policy(text), options), ids, self._texts, self._decode)
            for index, text in enumerate(policies)
        ]
        yield {
            "type": "start",
            "model": dict(self.facts()),
            "runs": [run.describe() for run in runs],
            "prompt_tokens": len(ids),
            "max_tokens": max_tokens,
            "seed": seed,
            "tokens_per_step": tokens_per_step,
        }
        waiting = runs
        while waiting:
            for run in waiting:
                yield from self._block(run, stop)
                if stop.is_set():
                    return
            waiting = [run for run in waiting if not run.finished]
        yield {"type": "end", "runs": [run.totals() for run in runs]}

    def _decoding(self, max_tokens: int, seed: int, tokens_per_step: int | None) -> DecodingOptions:
        """The server's options, with what the request may choose."""
        options = replace(self._options, gen_length=max_tokens, seed=seed)
        if tokens_per_step is None:
            return options
        length = options.block_length or self._loaded.config.block_length
        return replace(options, threshold=None, steps_per_block=math.ceil(length / tokens_per_step))

    def _block(self, run: WatchedRun, stop: threading.Event) -> Iterator[Event]:
        """The steps of the run's next block, then the block."""
        complete = False
        while not complete:
            if not self._take_turn(stop):
                return
            try:
                complete = run.advance()
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

    def _decoder(self, policy: RoutingPolicy, options: DecodingOptions) -> BlockDecoder:
        layout = self._loaded.layout
        runtime = Runtime(
            policy=policy,
            backend=self._backend,
            store=self._store,
            bytes_per_expert=layout.format.expert_bytes if layout else None,
        )
        return BlockDecoder(self._loaded.model, runtime, options)

    def _decode(self, ids: Sequence[int]) -> str:
        return decode_answer(self._tokenizer, ids)
