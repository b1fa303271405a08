"""Answer one item under one policy: the unit of work of an evaluation, in this process or another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from expertshare.config import ModelConfig
from expertshare.decoding import DecodingOptions
from expertshare.decoding.row import check_prompts
from expertshare.errors import InputError
from expertshare.evaluation.answering import answer_prompts
from expertshare.evaluation.items import EvalItem
from expertshare.evaluation.setup import Setup, encode_prompts
from expertshare.experts import SlabStore, StoreOptions, open_store
from expertshare.measure.cost import FORWARD_KINDS, Cost
from expertshare.models import LoadedModel, load_model
from expertshare.types import RoutingPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One item to answer under the policy with this number."""

    item: EvalItem
    policy: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Solved:
    """An answer and what it cost. Mappings are by kind of forward.

    groups: blocks that took part in those forwards. unique_experts: of one block in one layer, mean over them.
    """

    text: str
    finish_reason: str | None
    tokens: int
    steps: int
    forwards: Mapping[str, int]
    groups: Mapping[str, int]
    unique_experts: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverSetup:
    """All that another process needs to answer as this one would. dtype: None is the checkpoint's own. store: how
    every process keeps the experts of a converted model (None: all of them in memory)."""

    model: Path
    dtype: torch.dtype | None
    policies: tuple[RoutingPolicy, ...]
    options: DecodingOptions
    backend: str
    threads: int
    store: StoreOptions | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """A loaded model that answers jobs, one prompt at a time, so that no answer depends on what else is asked.

    store: the experts of a converted model, open; the caller closes it.
    """

    loaded: LoadedModel
    setup: SolverSetup
    store: SlabStore | None = None

    @classmethod
    def load(cls, setup: SolverSetup) -> Solver:
        """Load the model that `setup` names, with a store that lasts as long as the process."""
        loaded = load_model(setup.model, dtype=setup.dtype)
        return cls(loaded=loaded, setup=setup, store=store_of(loaded, setup.store))

    def solve(self, job: Job) -> Solved:
        """Answer one job. Raises InputError or NumericsError."""
        item, setup = job.item, self.setup
        run = answer_prompts(
            self.loaded,
            encode_prompts(self.loaded, [item.prompt], item.chat),
            setup.policies[job.policy],
            options_for(item, setup.options, self.loaded.config),
            setup=Setup(batch_size=1, backend=setup.backend, chat=item.chat, store=self.store),
        )
        [answer] = run.answers
        return Solved(
            text=answer.text,
            finish_reason=answer.finish_reason,
            tokens=len(answer.token_ids),
            steps=answer.steps,
            forwards={kind: run.cost.forwards[kind] for kind in FORWARD_KINDS},
            groups=_groups(run.cost),
            unique_experts={kind: run.cost.unique_experts[kind] for kind in FORWARD_KINDS},
        )

    def check(self, item: EvalItem) -> None:
        """Raise InputError unless the model can be asked this."""
        try:
            prompts = encode_prompts(self.loaded, [item.prompt], item.chat)
            check_prompts(prompts, options_for(item, self.setup.options, self.loaded.config), self.loaded.config)
        except InputError as error:
            raise InputError(f"task {item.task}, item {item.id}: {error}") from error


def store_of(loaded: LoadedModel, options: StoreOptions | None) -> SlabStore | None:
    """The experts of a converted model, by default all in memory; None for a model that has its own."""
    if loaded.layout is None:
        return None
    return open_store(loaded.path, loaded.layout, options or StoreOptions())


def options_for(item: EvalItem, options: DecodingOptions, config: ModelConfig) -> DecodingOptions:
    """The item's own length, in whole blocks where the model needs that, and a seed that only it has."""
    length = item.gen_length
    block = options.block_length or config.block_length
    if config.attention == "full" and block:
        length = -(-length // block) * block
    return replace(options, gen_length=length, seed=item_seed(options.seed, item)).resolve(config)


def item_seed(seed: int, item: EvalItem) -> int:
    """A seed for sampling that depends on nothing but the evaluation's seed and the item; in 0..2**63 - 1."""
    digest = hashlib.blake2b(f"{seed}/{item.task}/{item.id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _groups(cost: Cost) -> dict[str, int]:
    return {kind: sum(step.groups for step in cost.steps if step.kind == kind) for kind in FORWARD_KINDS}
