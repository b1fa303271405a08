"""Whole answers by replays of a captured step against the ordinary loop: the same tokens, one wait a step.

Without a GPU a step is called again instead of replayed, and held to what a graph can do (checked_graphs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from expertshare.config import ModelConfig, RouterSpec
from expertshare.decoding import BlockDecoder, BlockResult, BlockStream, DecodingOptions
from expertshare.decoding.captured import capacity_for
from expertshare.decoding.decoder import captured_steps
from expertshare.errors import NumericsError
from expertshare.experts.store import ResidentSlabs
from expertshare.kernels.triton.backend import TritonBackend
from expertshare.kernels.triton.graphs import Graphs
from expertshare.measure.cost import Cost
from expertshare.models import MoETransformer, Runtime
from expertshare.routing import RoutingPolicy, everything, parse_policy
from expertshare.types import Coreset, RouterScores

from .checked_graphs import CapturableBackend, CheckedGraphs, HostWaits
from .shapes import TINY_LLADA2, TINY_LLADA_MOE, TINY_SDAR
from .test_model import model_of

# the interpreter is slow: no more experts, layers and positions than it takes to see every kind of thing
CONFIGS = {
    "llada2": replace(TINY_LLADA2, num_layers=2, block_length=4, router=replace(TINY_LLADA2.router, num_experts=16)),
    "sdar": replace(
        TINY_SDAR,
        attention="block_causal",
        num_layers=1,
        block_length=4,
        router=replace(TINY_SDAR.router, num_experts=12),
    ),
}
PROMPTS = [[5, 6, 7], [9, 4, 3] * 2]
OPTIONS = DecodingOptions(gen_length=5, threshold=0.3, steps_per_block=2, stop_at_eos=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unruled(RoutingPolicy):
    """Chooses by itself, in torch."""

    name: ClassVar[str] = "unruled"

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        return everything(scores)


@pytest.fixture(autouse=True)
def as_decoding_does() -> None:
    torch.use_deterministic_algorithms(False)  # it would fill what is allocated inside graphs, too


def decoder_of(
    config: ModelConfig,
    device: torch.device,
    policy: str,
    options: DecodingOptions = OPTIONS,
    *,
    captured: bool = True,
    graphs: Graphs | None = None,
) -> BlockDecoder:
    runtime = Runtime(policy=parse_policy(policy), backend=CapturableBackend(graphs), graphs=captured)
    return BlockDecoder(model_of(config, device), runtime, options)


def answered(decoder: BlockDecoder, prompts: Sequence[Sequence[int]]) -> tuple[list[BlockResult], Cost, str | None]:
    stream = decoder.blocks(prompts)
    blocks = list(stream)
    generation = stream.generation()
    return blocks, generation.cost, generation.uncaptured_because


@pytest.mark.parametrize(("policy", "num_rows"), [("vanilla", 1), ("vanilla", 2), ("des-vote", 2), ("block-top-p", 1)])
@pytest.mark.parametrize("family", CONFIGS)
def test_answers_equal_those_of_the_ordinary_loop(
    family: str, policy: str, num_rows: int, device: torch.device
) -> None:
    """Rows of different lengths: one is finished while the other goes on, one needs a prefill and the other none."""
    prompts = PROMPTS[:num_rows]
    expected, found = (
        answered(decoder_of(CONFIGS[family], device, policy, captured=captured), prompts) for captured in (False, True)
    )
    assert found[0] == expected[0]
    assert found[1].steps == expected[1].steps
    assert expected[2] == "graphs are switched off"
    assert found[2] is None


OTHER_RULES = {
    "one share a step": replace(OPTIONS, threshold=None),
    "all that are likely": replace(OPTIONS, threshold=0.0),
    "ends at end-of-text": replace(OPTIONS, stop_at_eos=True),
    "edits": replace(OPTIONS, threshold=0.3, editing_threshold=0.2, max_post_steps=2),
}


@pytest.mark.parametrize("rule", OTHER_RULES)
def test_every_greedy_commit_rule(rule: str, device: torch.device) -> None:
    eos_ids = tuple(range(1, 240)) if "end-of-text" in rule else (1,)
    config = replace(CONFIGS["llada2"], eos_ids=eos_ids, num_layers=3 if "likely" in rule else 2)
    expected, found = (
        answered(decoder_of(config, device, "des-vote", OTHER_RULES[rule], captured=captured), PROMPTS)
        for captured in (False, True)
    )
    assert found[0] == expected[0]
    assert found[1].steps == expected[1].steps
    if "end-of-text" in rule:
        assert any(block.finish_reason == "eos" for block in found[0])


def test_a_step_waits_once_and_a_batch_of_the_same_shape_captures_nothing(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("waits are counted by what Python asks of torch on the CPU")
    graphs = CheckedGraphs()
    decoder = decoder_of(CONFIGS["llada2"], device, "des-vote", graphs=graphs)
    for batch in (PROMPTS, [[3] * 5, [8] * 7]):
        stream = decoder.blocks(batch)
        stream.advance()  # prefill, and the first step
        reads = graphs.reads
        waits = waits_of(stream)
        cost = stream.cost()
        assert waits == []
        assert graphs.reads - reads == cost.forwards["denoise"] - 1
        assert cost.forwards["commit"]
    assert graphs.captures == 2  # a step and a commit forward
    ordinary = decoder_of(CONFIGS["llada2"], device, "des-vote", captured=False).blocks(PROMPTS)
    ordinary.advance()
    waits, steps = waits_of(ordinary), ordinary.cost().forwards["denoise"] - 1  # those after the first
    assert len(waits) > 5 * steps


def waits_of(stream: BlockStream) -> list[str]:
    """Run a stream to its end."""
    with HostWaits() as waits:
        while stream._active:
            stream._ready.clear()
            stream.advance()
    return waits.seen


def test_a_store_of_all_experts_is_captured_and_counts_the_same(device: torch.device) -> None:
    config = CONFIGS["llada2"]
    found = []
    for captured in (False, True):
        model = model_of(config, device)
        banks = [layer.moe.experts.bank() for layer in model.layers if layer.moe is not None]
        store = ResidentSlabs.__new__(ResidentSlabs)
        layout = SimpleNamespace(num_layers=len(banks), num_experts=config.router.num_experts)
        super(ResidentSlabs, store).__init__(layout, banks, device)  # type: ignore[arg-type]
        runtime = Runtime(policy=parse_policy("des-vote"), backend=CapturableBackend(), store=store, graphs=captured)
        decoder = BlockDecoder(model, runtime, OPTIONS)
        blocks, _, uncaptured_because = answered(decoder, PROMPTS[:1])
        assert (uncaptured_because is None) == captured
        found.append((blocks, store._asked_N.tolist()))
    assert found[0] == found[1]
    assert found[0][1][0] > 0


def test_two_streams_at_once_have_captured_steps_of_their_own(device: torch.device) -> None:
    decoder = decoder_of(CONFIGS["llada2"], device, "vanilla")
    alone = [answered(decoder, [prompt])[0] for prompt in PROMPTS]
    streams = [decoder.blocks([prompt]) for prompt in PROMPTS]
    mixed: list[list[BlockResult]] = [[], []]
    for _ in range(max(map(len, alone))):
        for stream, blocks in zip(streams, mixed, strict=True):
            blocks.extend(block for block in [next(stream, None)] if block is not None)
    assert mixed == alone


def test_what_fails_to_be_captured_is_decoded_by_the_ordinary_loop_and_told(device: torch.device) -> None:
    expected = answered(decoder_of(CONFIGS["llada2"], device, "vanilla", captured=False), PROMPTS[:1])
    decoder = decoder_of(CONFIGS["llada2"], device, "vanilla", graphs=CheckedGraphs(fails=True))
    for _ in range(2):
        found = answered(decoder, PROMPTS[:1])
        assert found[0] == expected[0]
        assert found[2] == "it cannot be captured: operation not permitted when stream is capturing"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets
def test_a_step_that_is_not_finite_writes_nothing_and_names_its_row(device: torch.device) -> None:
    decoder = decoder_of(CONFIGS["llada2"], device, "vanilla")
    stream = decoder.blocks(PROMPTS)
    stream.advance()
    stream._ready.clear()
    assert stream._captured is not None
    tokens = stream._captured._tokens_RC.clone()
    stream._captured.cache.layers[0].values_BHSD[1, :, 0] = float("nan")
    with pytest.raises(NumericsError, match="for row 1, block") as caught:
        stream.advance()
    assert caught.value.row == 1
    assert torch.equal(stream._captured._tokens_RC, tokens)


REASONS = [
    ({"backend": TritonBackend()}, {}, False, "the model is on cpu; graphs are a GPU's"),
    ({"on_plan": lambda layer, plan: None}, {}, False, "are recorded"),
    ({"store": SimpleNamespace(resident=False)}, {}, False, "experts come and go in a store"),
    ({"graphs": False}, {}, False, "switched off"),
    ({}, {"temperature": 0.5}, False, "tokens are sampled"),
    ({}, {"top_k": 3, "filtered_confidence": True}, False, "tokens are sampled"),
    ({}, {}, True, "a watcher"),
    ({"policy": parse_policy("des-vote:reuse=2")}, {}, False, "needs to know of steps"),
    ({"policy": parse_policy("des-vote:voters=masked")}, {}, False, "needs to know of steps"),
    ({"policy": Unruled()}, {}, False, "no rule expresses"),
    ({}, {}, False, None),
    ({}, {"top_k": 3}, False, None),
    ({"store": ResidentSlabs.__new__(ResidentSlabs)}, {}, False, None),
]


def why_not(model: MoETransformer, runtime: Runtime, options: DecodingOptions, *, watched: bool = False) -> str | None:
    steps = captured_steps(model, runtime, options)
    return steps if isinstance(steps, str) else steps.why_not(watched=watched)


@pytest.mark.parametrize(("runtime", "options", "watched", "reason"), REASONS)
def test_why_a_batch_is_not_captured(
    runtime: dict[str, object], options: dict[str, object], watched: bool, reason: str | None
) -> None:
    config = CONFIGS["llada2"]
    chosen = Runtime(**{"policy": parse_policy("vanilla"), "backend": CapturableBackend(), **runtime})  # type: ignore[arg-type]
    chosen = replace(chosen, policy=chosen.policy.bind(config.router))
    wanted = replace(OPTIONS, **options).resolve(config)  # type: ignore[arg-type]
    why = why_not(MoETransformer(config), chosen, wanted, watched=watched)
    assert why is None if reason is None else why is not None and reason in why


def test_full_attention_is_not_captured() -> None:
    runtime = Runtime(policy=parse_policy("vanilla"), backend=CapturableBackend())
    model = MoETransformer(replace(TINY_LLADA_MOE, attention="full"))
    why = why_not(model, runtime, OPTIONS)
    assert why is not None
    assert "full attention" in why


def test_few_capacities_serve_many_lengths() -> None:
    assert [capacity_for(length) for length in (1, 128, 129, 600, 1024, 1025, 3000)] == [
        *(128, 128, 256, 1024, 1024, 2048, 3072)
    ]


def test_the_checks_catch_what_a_graph_would_not_do() -> None:
    fixed, numbers = [torch.zeros(3)], iter(range(9))
    graphs = CheckedGraphs()
    with pytest.raises(AssertionError, match="_local_scalar_dense has no place"):
        graphs.capture(lambda: fixed[0].add_(fixed[0].sum().item()), lambda: fixed)
    replay = graphs.capture(lambda: fixed[0].add_(next(numbers)), lambda: fixed)
    with pytest.raises(AssertionError, match="differs from what was captured"):
        replay()
    replay = graphs.capture(lambda: fixed[0].add_(1), lambda: fixed)
    replay()
    fixed[0] = torch.zeros(3)
    with pytest.raises(AssertionError, match="has moved"):
        replay()
