"""Quantised experts answer with the same tokens from a tight budget as from memory, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backends import backend_named
from expertshare import api
from expertshare.convert import convert
from expertshare.experts import BudgetedStore, ExpertMemory, StoreOptions, open_store, read_manifest
from expertshare.models import Runtime, load_model
from expertshare.models.runtime import ForwardInput
from expertshare.native import available
from expertshare.routing import make_policy

REFERENCE = Path(__file__).parents[2] / "models" / "reference"
PROMPT = "Tom has 12 apples. He finds 7 more. How many apples does Tom have now?"
BACKENDS = ["torch", *(["cpu"] if available() else [])]


@pytest.fixture(scope="module", params=["int8", "int4"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    return convert(REFERENCE, out, quantise=request.param, quantise_embeddings="int8").path


def budget(converted: Path, slots: int) -> int:
    return slots * read_manifest(converted).format.slab_bytes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefetch", [True, False])
def test_hidden_states_are_the_same_bit_for_bit(converted: Path, backend: str, prefetch: bool) -> None:
    loaded = load_model(converted)
    assert loaded.layout is not None
    policy = make_policy("des-vote", {"budget": 16}).bind(loaded.config.router)
    generator = torch.Generator().manual_seed(0)

    def forward(tokens_BS: torch.Tensor, runtime: Runtime) -> torch.Tensor:
        inputs = ForwardInput(
            tokens_BS=tokens_BS,
            positions_BS=torch.arange(32).expand(1, 32),
            live_BS=torch.ones(1, 32, dtype=torch.bool),
            mask_BSP=None,
            block_length=32,
        )
        with torch.no_grad():
            return loaded.model(inputs, runtime).hidden_BSD  # type: ignore[no-any-return]

    everything = StoreOptions(memory=ExpertMemory(kind="all"))
    with (
        open_store(converted, loaded.layout, everything) as whole,
        BudgetedStore(converted, loaded.layout, budget(converted, 20), prefetch=prefetch) as tight,
    ):
        for _ in range(3):
            tokens_BS = torch.randint(3, 500, (1, 32), generator=generator)
            expected = forward(tokens_BS, Runtime(policy=policy, backend=backend_named(backend), store=whole))
            assert expected.isfinite().all()
            assert torch.equal(
                forward(tokens_BS, Runtime(policy=policy, backend=backend_named(backend), store=tight)), expected
            )
        assert tight.statistics().total.reads > 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_are_the_same_token_for_token(converted: Path, backend: str) -> None:
    options = {"gen_length": 32, "threshold": None, "steps_per_block": 6, "policy": "des-vote:budget=16"}
    expected = api.generate(str(converted), PROMPT, backend=backend, store="all", **options)  # type: ignore[arg-type]
    memories = [ExpertMemory.parse("mmap"), ExpertMemory(kind="budget", num_bytes=budget(converted, 70))]
    for memory in memories:
        store = StoreOptions(memory=memory)
        found = api.generate(str(converted), PROMPT, backend=backend, store=store, **options)  # type: ignore[arg-type]
        assert found.answers[0].token_ids == expected.answers[0].token_ids
        assert found.answers[0].token_ids
