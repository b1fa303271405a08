"""A model whose experts pass through a budget on a device answers as with the resident store, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from backends import backend_named
from expertshare import api
from expertshare.api import loading
from expertshare.convert import convert as quantise
from expertshare.experts import (
    BudgetedStore,
    DeviceSlots,
    ExpertMemory,
    StoreOptions,
    open_store,
    opening,
    read_manifest,
)
from expertshare.kernels.triton import interpreted, unavailable_reason
from expertshare.models import LoadedModel, Runtime, load_model
from expertshare.models.runtime import ForwardInput
from expertshare.native import available
from expertshare.routing import make_policy

from .conversion import convert
from .streams import SimulatedTransfer

REFERENCE = Path(__file__).parents[2] / "models" / "reference"
PROMPT = "Tom has 12 apples. He finds 7 more. How many apples does Tom have now?"
EXACT = "cpu" if available() else "torch"
STEPS: dict[str, Any] = {"gen_length": 32, "threshold": None, "steps_per_block": 6}


@pytest.fixture(scope="module", params=["bfloat16", "int8", "int4"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    if request.param == "bfloat16":
        return convert(REFERENCE, out, torch.bfloat16)
    return quantise(REFERENCE, out, quantise=request.param).path


def slots(converted: Path, count: int) -> ExpertMemory:
    return ExpertMemory(kind="budget", num_bytes=count * read_manifest(converted).format.slab_bytes)


def hidden_states(loaded: LoadedModel, runtime: Runtime, seed: int) -> torch.Tensor:
    device = loaded.model.device
    tokens_BS = torch.randint(3, 500, (1, 32), generator=torch.Generator().manual_seed(seed))
    inputs = ForwardInput(
        tokens_BS=tokens_BS.to(device),
        positions_BS=torch.arange(32, device=device).expand(1, 32),
        live_BS=torch.ones(1, 32, dtype=torch.bool, device=device),
        mask_BSP=None,
        block_length=32,
    )
    with torch.no_grad():
        return loaded.model(inputs, runtime).hidden_BSD  # type: ignore[no-any-return]


@pytest.mark.parametrize("kept", [0, 30])
def test_hidden_states_are_the_same_bit_for_bit(converted: Path, kept: int) -> None:
    loaded = load_model(converted)
    assert loaded.layout is not None
    policy = make_policy("des-vote", {"budget": 16}).bind(loaded.config.router)
    memory = partial(DeviceSlots, transfer=SimulatedTransfer(), num_kept=kept)
    with (
        open_store(converted, loaded.layout, StoreOptions()) as whole,
        BudgetedStore(converted, loaded.layout, slots(converted, 20).num_bytes, memory=memory) as tight,
    ):
        for seed in range(3):
            expected = hidden_states(loaded, Runtime(policy=policy, backend=backend_named(EXACT), store=whole), seed)
            found = hidden_states(loaded, Runtime(policy=policy, backend=backend_named(EXACT), store=tight), seed)
            assert torch.equal(found, expected)
        assert tight.statistics().total.copies > 20


@pytest.mark.parametrize("host_memory", [None, "all"])
def test_answers_through_a_simulated_device_are_the_same(
    converted: Path, host_memory: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = api.generate(str(converted), PROMPT, policy="des-vote:budget=16", backend=EXACT, store="all", **STEPS)
    monkeypatch.setattr(opening, "CudaTransfer", lambda device: SimulatedTransfer())
    monkeypatch.setattr(loading, "check_options", lambda options, device: None)
    monkeypatch.setattr(
        loading, "open_store", lambda path, layout, options, _: open_store(path, layout, options, torch.device("cuda"))
    )
    host = None if host_memory is None else ExpertMemory.parse_host(host_memory)
    options = StoreOptions(memory=slots(converted, 70), host_memory=host)
    found = api.generate(str(converted), PROMPT, policy="des-vote:budget=16", backend=EXACT, store=options, **STEPS)
    assert found.answers[0].token_ids == expected.answers[0].token_ids
    told = found.to_json()["expert_store"]
    assert told["kind"] == "budget"
    assert told["requests"] == sum(sum(step.active_experts) for step in found.cost.steps)
    assert told["bytes_copied"] == told["copies"] * told["slot_bytes"] > 0
    assert told["reads"] == told["copies"] if host is None else told["reads"] <= 3 * 64
    assert found.config["expert_store"].get("host_memory") == host_memory


BACKENDS = [
    "torch",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            unavailable_reason() is not None or interpreted(), reason=unavailable_reason() or "Triton only interprets"
        ),
    ),
]


def every_store(converted: Path) -> Iterator[StoreOptions]:
    for host_memory, prefetch in product((None, "1MiB", "all"), (True, False)):
        host = None if host_memory is None else ExpertMemory.parse_host(host_memory)
        yield StoreOptions(memory=slots(converted, 70), prefetch=prefetch, host_memory=host)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU (torch.cuda.is_available() is false)")
@pytest.mark.parametrize("backend", BACKENDS)
class TestOnAGpu:
    """Run by `pytest -m cuda tests/experts` on a machine with a GPU."""

    @pytest.mark.parametrize("policy", ["vanilla", "des-vote:budget=16"])
    def test_answers_are_the_same_token_for_token(self, converted: Path, backend: str, policy: str) -> None:
        loaded = load_model(converted, device="cuda")
        expected = api.generate(loaded, PROMPT, policy=policy, backend=backend, store="all", **STEPS)
        for options in every_store(converted):
            found = api.generate(loaded, PROMPT, policy=policy, backend=backend, store=options, **STEPS)
            assert found.answers[0].token_ids == expected.answers[0].token_ids
            statistics = found.run.expert_store
            assert statistics is not None
            assert 0 < statistics.total.copies < statistics.total.requests

    def test_hidden_states_are_the_same_bit_for_bit(self, converted: Path, backend: str) -> None:
        loaded = load_model(converted, device="cuda")
        assert loaded.layout is not None
        policy, device = make_policy("des-vote", {"budget": 16}).bind(loaded.config.router), loaded.model.device
        with open_store(converted, loaded.layout, StoreOptions(), device) as whole:
            runtime = Runtime(policy=policy, backend=backend_named(backend), store=whole)
            expected = [hidden_states(loaded, runtime, seed) for seed in range(10)]
        for options in every_store(converted):
            with open_store(converted, loaded.layout, options, device) as tight:
                runtime = Runtime(policy=policy, backend=backend_named(backend), store=tight)
                for seed, right in enumerate(expected):
                    assert torch.equal(hidden_states(loaded, runtime, seed), right)
