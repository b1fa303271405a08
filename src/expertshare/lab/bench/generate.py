"""`bench generate`: whole answers, end to end, in tokens per second."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from expertshare.decoding import BlockDecoder, DecodingOptions, Generation
from expertshare.decoding.row import check_prompts
from expertshare.errors import InputError
from expertshare.kernels import choose_backend
from expertshare.lab.bench.cases import Case
from expertshare.lab.bench.forward import add_ratios, cpu_left_out, forward_backends
from expertshare.lab.bench.machine import CPU, check_memory, dtype_name
from expertshare.lab.bench.peer_models import IMPLEMENTATIONS, build_peer, decode_with_peer
from expertshare.lab.bench.timing import interleave, spread
from expertshare.lab.bench.weights import model_bytes, random_model
from expertshare.models import MoETransformer, Runtime
from expertshare.routing import RoutingPolicy

Tokens = list[tuple[int, ...]]
WITHOUT_GRAPHS = "triton-no-graphs"
"""The contender that launches kernel by kernel what `triton` replays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is decoded. case: whose shapes a random model has, so that peers can join; None for a loaded one."""

    name: str
    model: MoETransformer
    prompts: Sequence[Sequence[int]]
    options: DecodingOptions
    case: Case | None = None


@dataclass(slots=True)
class Decoding:
    """One policy, backend and batch size, or a peer; remembers the tokens of every call and the costs of the last.
    answer: the tokens of some prompts; our decoder also tells what they cost."""

    answer: Callable[[Sequence[Sequence[int]]], tuple[Tokens, Generation | None]]
    prompts: Sequence[Sequence[int]]
    batch_size: int
    tokens: list[Tokens] = field(default_factory=list)
    last: list[Generation] = field(default_factory=list)

    def __call__(self, turn: int = 0) -> None:
        """Answer all prompts, a batch at a time."""
        del turn
        batches = [self.prompts[at : at + self.batch_size] for at in range(0, len(self.prompts), self.batch_size)]
        answers = [self.answer(batch) for batch in batches]
        self.tokens.append([row for rows, _ in answers for row in rows])
        self.last = [generation for _, generation in answers if generation is not None]

    def to_json(self) -> dict[str, Any]:
        """Cost of the last call; nothing of a peer, whose loop keeps no account. Unique experts: mean over blocks and
        layers, so that batches do not change it."""
        if not self.last:
            return {}
        forwards = [step for part in self.last for step in part.cost.steps if step.kind == "denoise"]
        blocks = sum(step.groups for step in forwards)
        unique = sum(step.groups * statistics.fmean(step.unique_experts) for step in forwards)
        reasons = [part.uncaptured_because for part in self.last if part.uncaptured_because is not None]
        return {
            "captured": not reasons,
            "uncaptured_because": reasons[0] if reasons else None,
            "unique_experts": unique / blocks if blocks else 0.0,
            "denoise_forwards": len(forwards),
            "seconds_by_part": {
                part: sum(generation.seconds_by_part[part] for generation in self.last)
                for part in self.last[0].seconds_by_part
            },
        }


def answer_with(decoder: BlockDecoder, prompts: Sequence[Sequence[int]]) -> tuple[Tokens, Generation]:
    """Tokens and costs of one batch, decoded together."""
    stream = decoder.blocks(prompts)
    for _ in stream:
        pass
    generation = stream.generation()
    return [row.token_ids for row in generation.rows], generation


def _one_by_one(
    answer: Callable[[Sequence[int]], list[int]], prompts: Sequence[Sequence[int]]
) -> tuple[Tokens, Generation | None]:
    return [tuple(answer(prompt)) for prompt in prompts], None


def random_subject(
    name: str,
    case: Case,
    *,
    num_layers: int,
    num_prompts: int,
    prompt_blocks: int,
    gen_length: int,
    threshold: float,
    dtype: torch.dtype,
    seed: int,
    memory_bytes: int,
    device: torch.device = CPU,
) -> Subject:
    """A random model of a case's widths and random prompts of whole blocks. It has no end-of-text token, so that
    every answer has its full length."""
    config = replace(case.stack(num_layers), block_length=case.tokens, eos_ids=())
    check_memory(model_bytes(config, dtype), memory_bytes, "this model", "measure fewer --layers")
    generator = torch.Generator().manual_seed(seed)
    shape = (num_prompts, prompt_blocks * config.block_length)
    prompts = torch.randint(config.vocab_size, shape, generator=generator)
    prompts[prompts == config.mask_id] = config.mask_id - 1 if config.mask_id else 1
    options = DecodingOptions(gen_length=gen_length, threshold=threshold, seed=seed)
    model = random_model(config, dtype, seed).to(device)
    return Subject(name=name, model=model, prompts=prompts.tolist(), options=options, case=case)


def generate_backends(names: Sequence[str] | None, device: torch.device) -> list[str]:
    """As forward_backends, and on a GPU `triton` a second time, without graphs."""
    if names is None:
        chosen = forward_backends(None, device)
        return chosen if device.type == "cpu" else [chosen[0], WITHOUT_GRAPHS, *chosen[1:]]
    found = forward_backends([name for name in names if name != WITHOUT_GRAPHS] or None, device)
    return [name for name in names if name == WITHOUT_GRAPHS or name in found]


def _runtime(backend: str, policy: RoutingPolicy, device: torch.device) -> Runtime:
    chosen = choose_backend("triton" if backend == WITHOUT_GRAPHS else backend, device)
    return Runtime(policy=policy, backend=chosen, graphs=backend != WITHOUT_GRAPHS)


def bench_generate(
    subject: Subject,
    policies: Mapping[str, RoutingPolicy],
    backends: Sequence[str] | None,
    *,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 3,
    warmup: int = 1,
    on_progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Returns {"generations": points, "left_out": ..., "subject": what was decoded}.

    A contender whose tokens differ between repetitions is reported as such (`equal_across_repeats`). Peers join where
    the subject is a case with block-causal attention. Raises InputError for prompts or batch sizes that do not work.
    """
    if any(size < 1 for size in batch_sizes) or repeats < 1:
        raise InputError(f"batch sizes and repeats must be at least 1, got {list(batch_sizes)} and {repeats}")
    config, case = subject.model.config, subject.case
    check_prompts(subject.prompts, subject.options.resolve(config), config)
    peers_join = case is not None and config.attention == "block_causal"
    calls: dict[tuple[str, str, int], Decoding] = {}
    with torch.no_grad():
        for backend in generate_backends(backends, subject.model.device):
            if backend not in IMPLEMENTATIONS:
                for label, policy in policies.items():
                    runtime = _runtime(backend, policy, subject.model.device)
                    decoder = BlockDecoder(subject.model, runtime, subject.options)
                    for size in batch_sizes:
                        calls[backend, label, size] = Decoding(partial(answer_with, decoder), subject.prompts, size)
            elif peers_join:
                assert case is not None
                assert case.peer is not None  # stack() refused it
                peer = build_peer(subject.model, case.peer, IMPLEMENTATIONS[backend])
                options = subject.options
                assert options.threshold is not None
                of_peer = partial(
                    decode_with_peer,
                    peer,
                    config,
                    gen_length=options.gen_length,
                    block_length=options.block_length or config.block_length,
                    threshold=options.threshold,
                )
                calls[backend, "vanilla", 1] = Decoding(partial(_one_by_one, of_peer), subject.prompts, 1)
        on_progress(f"{subject.name}: {len(calls)} contenders, {warmup + repeats} rounds")
        seconds = interleave(calls, repeats=repeats, warmup=warmup)
    points = [_point(subject.name, key, call, seconds[key], calls) for key, call in calls.items()]
    add_ratios(points, lambda point: float(point["tokens_per_s"]))
    return {
        "generations": points,
        "left_out": cpu_left_out(backends or (subject.model.device.type,)),
        "subject": {
            "name": subject.name,
            "num_layers": config.num_layers,
            "num_prompts": len(subject.prompts),
            "dtype": dtype_name(subject.model.dtype),
            "weights": "loaded" if case is None else "random, the same tensors for all",
        },
    }


def _point(
    name: str,
    key: tuple[str, str, int],
    call: Decoding,
    seconds: list[float],
    calls: Mapping[tuple[str, str, int], Decoding],
) -> dict[str, Any]:
    backend, label, batch_size = key
    answers = call.tokens[-1]
    num_tokens = sum(map(len, answers))
    rates = sorted(num_tokens / spent for spent in seconds)
    reference = calls.get((backend, "vanilla", batch_size))
    peers = {
        other: same_tokens(answers, calls[other, "vanilla", 1].tokens[-1])
        for other in IMPLEMENTATIONS
        if (other, "vanilla", 1) in calls and label == "vanilla"
    }
    return {
        "model": name,
        "backend": backend,
        "policy": label,
        "batch_size": batch_size,
        "tokens": num_tokens,
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_range": [rates[0], rates[-1]],
        **spread(seconds),
        "equal_across_repeats": all(tokens == answers for tokens in call.tokens),
        "same_as_vanilla": None if reference is None else same_tokens(answers, reference.tokens[-1]),
        "same_as_peer": peers,
        **call.to_json(),
    }


def same_tokens(answers: Tokens, others: Tokens) -> float:
    """Share of positions with the same token over all answers; a position that only one has counts as different."""
    total = sum(max(len(mine), len(theirs)) for mine, theirs in zip(answers, others, strict=True))
    same = sum(a == b for mine, theirs in zip(answers, others, strict=True) for a, b in zip(mine, theirs, strict=False))
    return same / total if total else 1.0
