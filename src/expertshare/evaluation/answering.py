"""Answer many prompts with one model under one policy, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expertshare.decoding import BlockDecoder, BlockResult, DecodingOptions, FinishReason, Generation
from expertshare.decoding.row import check_prompts
from expertshare.evaluation.costs import join_costs
from expertshare.evaluation.setup import Setup
from expertshare.experts import StoreStatistics
from expertshare.measure.cost import Cost
from expertshare.measure.memory import storage_bytes_read
from expertshare.models import LoadedModel, decode_answer
from expertshare.types import RoutingPolicy

BlockListener = Callable[[BlockResult], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One prompt's answer. token_ids and text end before the first end-of-text token."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    steps: int
    forwards: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyRun:
    """All answers under `policy` (bound to the model's router: every knob concrete), in the order of the prompts.

    expert_store: what was asked of the store, None without one. storage_bytes_read: by the process meanwhile, whatever
    for; None where the system does not say. uncaptured_because: why steps were not replayed from a graph, None
    where all were.
    """

    policy: RoutingPolicy
    options: DecodingOptions
    answers: tuple[Answer, ...]
    cost: Cost
    elapsed_s: float
    seconds_by_part: Mapping[str, float]
    expert_store: StoreStatistics | None = None
    storage_bytes_read: int | None = None
    uncaptured_because: str | None = None

    def memory_json(self) -> dict[str, Any]:
        """What the run asked of the expert store and of the storage, by the names of docs/contracts.md."""
        store = self.expert_store
        return {"expert_store": store.to_json() if store else None, "storage_bytes_read": self.storage_bytes_read}

    @property
    def steps(self) -> int:
        """Denoising forwards that the model ran; one forward serves a whole batch."""
        return self.cost.forwards["denoise"]

    @property
    def forwards(self) -> int:
        """Forwards of all kinds that the model ran."""
        return sum(self.cost.forwards.values())

    @property
    def tokens_per_s(self) -> float:
        """Answer tokens for each second of decoding."""
        tokens = sum(len(answer.token_ids) for answer in self.answers)
        return tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0


def answer_prompts(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    policy: RoutingPolicy,
    options: DecodingOptions,
    *,
    setup: Setup,
    on_block: BlockListener | None = None,
) -> PolicyRun:
    """Decode `prompts` (token ids, at least one) in order, a batch at a time. The model must come with a tokenizer.

    on_block hears of every block as it is committed; its row counts all prompts, not those of the batch. Raises
    ConfigError, InputError, PolicyError or NumericsError.
    """
    assert loaded.tokenizer is not None  # encode_prompts refuses a model without one
    decoder = BlockDecoder(loaded.model, setup.runtime(loaded, policy), options)
    if len(prompts) > setup.batch_size:  # all of them, before the first batch costs time
        check_prompts(prompts, decoder.options, loaded.config)
    if setup.store is not None:
        setup.store.reset()
    read_before = storage_bytes_read()
    starts = range(0, len(prompts), setup.batch_size)
    parts: list[Generation] = []
    for start in starts:
        stream = decoder.blocks(prompts[start : start + setup.batch_size])
        for block in stream:
            if on_block is not None:
                on_block(replace(block, row=block.row + start))
        parts.append(stream.generation())
    return PolicyRun(
        policy=decoder.runtime.policy,
        options=decoder.options,
        answers=tuple(
            Answer(
                token_ids=row.token_ids,
                text=decode_answer(loaded.tokenizer, row.token_ids),
                finish_reason=row.finish_reason,
                steps=row.steps,
                forwards=row.forwards,
            )
            for part in parts
            for row in part.rows
        ),
        cost=join_costs([part.cost for part in parts], list(starts)),
        elapsed_s=sum(part.elapsed_s for part in parts),
        seconds_by_part=_join_seconds([part.seconds_by_part for part in parts]),
        expert_store=setup.store.statistics() if setup.store is not None else None,
        storage_bytes_read=_more_than(read_before),
        uncaptured_because=next((why for part in parts if (why := part.uncaptured_because) is not None), None),
    )


def _more_than(before: int | None) -> int | None:
    now = storage_bytes_read()
    return None if before is None or now is None else now - before


def _join_seconds(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}
