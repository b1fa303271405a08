"""Where a coreset changes nothing, the logits are those of the model without a policy, to the bit."""

from __future__ import annotations

import pytest
import torch

import expertshare

from .tiny_models import ALL, build, logits, tokens

WHOLE = (
    "vanilla",
    "des-vote:budget=1.0",
    "block-max:budget=16,group_limit=inside",
    "block-top-p:top_p_experts=1.0,guard=16",
)


def padding() -> torch.Tensor:
    mask_BS = torch.ones(2, 12, dtype=torch.long)
    mask_BS[1, :5] = 0
    return mask_BS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_an_all_experts_coreset_leaves_the_logits_bit_identical(name: str, dtype: torch.dtype) -> None:
    model, ids_BS = build(name, dtype), tokens()
    for mask_BS in (None, padding()):
        expected = logits(model, ids_BS, mask_BS)
        for policy in WHOLE:
            with expertshare.apply(model, policy):
                assert torch.equal(logits(model, ids_BS, mask_BS), expected), policy


@pytest.mark.parametrize("name", ALL)
def test_removal_gives_the_model_back(name: str) -> None:
    model, ids_BS = build(name), tokens()
    expected = logits(model, ids_BS)
    handle = expertshare.apply(model, "des-vote:budget=6")
    assert not torch.equal(logits(model, ids_BS), expected), "the coreset must bite"
    handle.remove()
    handle.remove()
    assert torch.equal(logits(model, ids_BS), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ZeroDivisionError), expertshare.apply(model, "des-vote:budget=6"):
        _ = 1 / 0
    assert torch.equal(logits(model, ids_BS), expected)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "expertshare"])
def test_exact_whatever_computes_the_experts(implementation: str) -> None:
    model, ids_BS = build("qwen3_moe"), tokens()
    before = model.get_experts_implementation()
    with expertshare.apply(model, "vanilla", experts_implementation=implementation):
        shared = logits(model, ids_BS)
        assert model.config._experts_implementation == implementation
    assert model.get_experts_implementation() == before
    model.set_experts_implementation(implementation)
    assert torch.equal(logits(model, ids_BS), shared)
