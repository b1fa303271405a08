"""One model's answers to one set of prompts under one policy, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from expertshare.decoding import BlockDecoder, BlockResult, DecodingOptions, FinishReason, Generation
from expertshare.decoding.decoder import BlockStream
from expertshare.decoding.row import check_prompts
from expertshare.errors import InputError
from expertshare.experts import SlabStore, StoreOptions, StoreStatistics
from expertshare.experts.recording import RoutingRecorder
from expertshare.kernels import AUTO, choose_backend
from expertshare.measure.cost import FORWARD_KINDS, Cost, ForwardKind
from expertshare.measure.memory import storage_bytes_read
from expertshare.models import LoadedModel, Runtime, decode_answer, describe, encode_prompt
from expertshare.routing import POLICIES, RoutingPolicy, native_policy

VANILLA = POLICIES["vanilla"]()
BlockListener = Callable[[BlockResult], None]
ProgressListener = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What all runs of one command share. chat: whether prompts went through the chat template (None: if there is one).

    batch_size: prompts decoded together; a coreset is still per block and prompt. backend: a name of
    expertshare.kernels.BACKENDS, or "auto" for the fastest on the model's device. store: for a converted model, and how
    it was opened. recorder: is told which experts every token of a forward runs. graphs: a GPU may replay
    captured steps.
    """

    batch_size: int = 1
    backend: str = AUTO
    chat: bool | None = None
    store: SlabStore | None = None
    store_options: StoreOptions | None = None
    recorder: RoutingRecorder | None = None
    graphs: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise InputError(f"batch_size must be a whole number of at least 1, got {self.batch_size!r}")

    def runtime(self, loaded: LoadedModel, policy: RoutingPolicy) -> Runtime:
        """How to run the model under a policy. Raises ConfigError for a backend that does not exist or cannot run."""
        return Runtime(
            policy=policy,
            backend=choose_backend(self.backend, loaded.model.device),
            store=self.store,
            bytes_per_expert=loaded.layout.format.expert_bytes if loaded.layout else None,
            on_plan=self.recorder.hear if self.recorder else None,
            graphs=self.graphs,
        )

    def to_json(self, loaded: LoadedModel, options: DecodingOptions) -> dict[str, Any]:
        """The resolved configuration: model, decoding and these."""
        has_template = loaded.tokenizer is not None and loaded.tokenizer.chat_template is not None
        return {
            "model": str(loaded.path),
            "model_facts": asdict(describe(loaded)),
            "decoding": asdict(options.resolve(loaded.config)),
            "batch_size": self.batch_size,
            "backend": choose_backend(self.backend, loaded.model.device).name,
            "chat": has_template if self.chat is None else self.chat,
            "expert_store": self.store_options.to_json() if self.store_options else None,
        }


def own_policy(loaded: LoadedModel) -> RoutingPolicy:
    """What others are held against: the routing that the model was trained with, bound. Vanilla, but for LLaDA2.2,
    which shares experts by itself."""
    return native_policy(loaded.config).bind(loaded.config.router)


def encode_prompts(loaded: LoadedModel, texts: Sequence[str], chat: bool | None) -> list[list[int]]:
    """Token ids of every prompt. Raises InputError for none, an empty one, or a model without a tokenizer."""
    if not texts:
        raise InputError("expected at least one prompt, got none; give some text")
    if loaded.tokenizer is None:
        raise InputError(f"{loaded.path} has no tokenizer: put the model's tokenizer.json there")
    prompts: list[list[int]] = []
    for number, text in enumerate(texts, 1):
        try:
            prompts.append(encode_prompt(loaded.tokenizer, _well_formed(text), chat=chat))
        except InputError as error:
            raise error if len(texts) == 1 else InputError(f"prompt {number}: {error}") from error
    return prompts


def _well_formed(text: str) -> str:
    """As the command line gives bytes that are no UTF-8, and JSON half of a pair, no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"expected UTF-8 text, got something else at character {error.start} of a prompt: re-encode it"
        ) from error
    return text


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
    def texts(self) -> list[str]:
        """The answers' texts, by prompt."""
        return [answer.text for answer in self.answers]

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


def decode_batches(
    decoder: BlockDecoder, prompts: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[int, BlockStream]]:
    """A stream for each batch of `prompts`, with the number of its first prompt; the caller runs it to its end before
    the next. Raises InputError for a prompt that does not fit, before the first batch."""
    check_prompts(prompts, decoder.options, decoder.model.config)
    for start in range(0, len(prompts), batch_size):
        yield start, decoder.blocks(prompts[start : start + batch_size])


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
    if setup.store is not None:
        setup.store.reset()
    read_before = storage_bytes_read()
    parts: list[Generation] = []
    for start, stream in decode_batches(decoder, prompts, setup.batch_size):
        for block in stream:
            if on_block is not None:
                on_block(replace(block, row=block.row + start))
        parts.append(stream.generation())
    read_after = storage_bytes_read()
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
        cost=_join_costs([part.cost for part in parts], setup.batch_size),
        elapsed_s=sum(part.elapsed_s for part in parts),
        seconds_by_part={name: sum(p.seconds_by_part[name] for p in parts) for name in parts[0].seconds_by_part},
        expert_store=setup.store.statistics() if setup.store is not None else None,
        storage_bytes_read=None if read_before is None or read_after is None else read_after - read_before,
        uncaptured_because=next((why for part in parts if (why := part.uncaptured_because) is not None), None),
    )


def _join_costs(costs: Sequence[Cost], batch_size: int) -> Cost:
    """Totals over batches, at least one, whose rows are numbered on; means are weighted as in a single cost."""
    steps = [
        replace(step, turns=tuple(replace(turn, row=turn.row + number * batch_size) for turn in step.turns))
        for number, cost in enumerate(costs)
        for step in cost.steps
    ]
    by_layer: dict[ForwardKind, tuple[float, ...]] = {}
    for kind in FORWARD_KINDS:  # a mean over sharing groups: a batch of many counts for more than a batch of few
        counted = [step for step in steps if step.kind == kind]
        groups = max(1, sum(step.groups for step in counted))
        num_layers = len(costs[0].unique_experts_by_layer[kind])
        by_layer[kind] = tuple(sum(s.unique_experts[n] * s.groups for s in counted) / groups for n in range(num_layers))
    forwards = {kind: sum(cost.forwards[kind] for cost in costs) for kind in FORWARD_KINDS}
    return Cost(
        forwards=forwards,
        unique_experts={kind: sum(by_layer[kind]) / max(1, len(by_layer[kind])) for kind in FORWARD_KINDS},
        union_experts={
            kind: sum(cost.union_experts[kind] * cost.forwards[kind] for cost in costs) / max(1, forwards[kind])
            for kind in FORWARD_KINDS
        },
        expert_bytes={kind: sum(cost.expert_bytes[kind] for cost in costs) for kind in FORWARD_KINDS},
        pairs={kind: sum(cost.pairs[kind] for cost in costs) for kind in FORWARD_KINDS},
        unique_experts_by_layer=by_layer,
        steps=tuple(steps),
    )
