"""A whole forward with the backend "triton" against torch's, and on a GPU inside a captured graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backends import backend_named
from expertshare.config import ModelConfig
from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.models import ForwardInput, MoETransformer, Runtime
from expertshare.models.transformer import initialise
from expertshare.routing import POLICIES, make_policy

from .shapes import TINY_LLADA2, TINY_LLADA_MOE, TINY_SDAR

CONFIGS = {"llada2_moe": TINY_LLADA2, "llada_moe": TINY_LLADA_MOE, "sdar_moe": TINY_SDAR}


def model_of(config: ModelConfig, device: torch.device) -> MoETransformer:
    model = MoETransformer(config)
    initialise(model, seed=1, std=0.3)
    return model.to(device).requires_grad_(False)


def block(config: ModelConfig, device: torch.device, *, live: int = 12, seed: int = 0) -> ForwardInput:
    """Two sharing groups, the second one partial."""
    length = 2 * config.block_length
    tokens = torch.randint(3, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    return ForwardInput(
        tokens_BS=tokens.to(device),
        positions_BS=torch.arange(length, device=device).unsqueeze(0),
        live_BS=torch.arange(length, device=device).unsqueeze(0) < live,
        mask_BSP=None,
        block_length=config.block_length,
    )


@pytest.mark.parametrize(
    ("family", "policy_name"), [("llada2_moe", "block-top-p"), ("llada_moe", "des-vote"), ("sdar_moe", "skip")]
)
def test_a_forward_equals_torch_s(family: str, policy_name: str, device: torch.device) -> None:
    config = CONFIGS[family]
    model, inputs = model_of(config, device), block(config, device)
    policy = make_policy(policy_name).bind(config.router)
    expected, found = (
        model(inputs, Runtime(policy=policy, backend=backend_named(name))) for name in ("torch", "triton")
    )
    assert torch.equal(found.routing.load_NE, expected.routing.load_NE)
    assert torch.equal(found.routing.group_experts_NG, expected.routing.group_experts_NG)
    live = inputs.live_BS
    torch.testing.assert_close(found.hidden_BSD[live], expected.hidden_BSD[live], rtol=2e-4, atol=2e-4)
    rows = found.hidden_BSD[live]
    excluded = [config.mask_id]
    ours, theirs = (model.best_tokens(rows, excluded, backend=backend_named(name)) for name in ("triton", "torch"))
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)


def test_an_answer_equals_that_of_torch(device: torch.device) -> None:
    """Two prompts, one with a partial block: prefill, denoising steps and commits."""
    config = CONFIGS["llada2_moe"]
    model = model_of(config, device)
    policy = make_policy("des-vote").bind(config.router)
    options = DecodingOptions(gen_length=8, threshold=0.0, stop_at_eos=False)
    found = []
    for backend in ("triton", "torch"):
        stream = BlockDecoder(model, Runtime(policy=policy, backend=backend_named(backend)), options).blocks(
            [[5, 6, 7], [9] * 8]
        )
        found.append([(block.row, block.token_ids) for block in stream])
    assert found[0] == found[1]


class NoWordFromTheHost(TorchDispatchMode):
    """Fails at operations for which a GPU's host has to wait, or that bring data from the host."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal", "lift_fresh")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, f"{name} has no place in a captured forward"
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{name} by a mask waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy_name", ["vanilla", "block-top-p", "protected-vote"])
def test_a_forward_asks_the_host_nothing(policy_name: str, device: torch.device) -> None:
    """What a captured graph needs, seen without a GPU: by the operations that torch is asked for."""
    config = CONFIGS["llada2_moe"]
    model, inputs = model_of(config, device), block(config, device)
    runtime = Runtime(policy=make_policy(policy_name).bind(config.router), backend=backend_named("triton"))

    def step() -> None:
        hidden_RD = model(inputs, runtime).hidden_BSD.flatten(0, 1)
        model.best_tokens(hidden_RD, [config.mask_id], backend=backend_named("triton"))

    step()  # what is made once may come from the host
    with NoWordFromTheHost():
        step()


@pytest.mark.parametrize("policy_name", POLICIES)
def test_a_captured_forward_equals_an_eager_one(policy_name: str, device: torch.device) -> None:
    """One graph for every coreset: nothing in it depends on what the host knew when it was captured."""
    if device.type != "cuda":
        pytest.skip("graphs are a GPU's")
    config = CONFIGS["llada2_moe"]
    model, inputs = model_of(config, device), block(config, device)
    runtime = Runtime(policy=make_policy(policy_name).bind(config.router), backend=backend_named("triton"))

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        output = model(inputs, runtime)
        hidden_RD = output.hidden_BSD.flatten(0, 1)
        return (
            *model.best_tokens(hidden_RD, [config.mask_id], backend=backend_named("triton")),
            output.routing.load_NE,
        )

    torch.use_deterministic_algorithms(False)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(1, 4):
        inputs.tokens_BS.copy_(block(config, device, seed=seed).tokens_BS)
        eager = [part.clone() for part in step()]
        graph.replay()
        assert torch.equal(captured[0], eager[0])
        torch.testing.assert_close(captured[1], eager[1], rtol=1e-5, atol=1e-7)
        assert torch.equal(captured[2], eager[2])
