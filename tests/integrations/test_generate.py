"""transformers' own generate under every policy: DiffusionGemma's denoising, and autoregressive decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import expertshare
from expertshare.routing import POLICIES, Layerwise, make_policy

from .tiny_models import CANVAS, TOP_K, VOCAB, build, tokens

SHARING = [name for name, kind in POLICIES.items() if "group_limit" in kind.__dataclass_fields__]


@pytest.fixture(scope="module")
def gemma() -> Any:
    return build("diffusion_gemma")


def denoise(model: Any, ids_BS: torch.Tensor, **more: Any) -> torch.Tensor:
    torch.manual_seed(0)
    done = model.generate(ids_BS, max_new_tokens=2 * CANVAS, max_denoising_steps=3, **more)
    return done.sequences


@pytest.mark.parametrize("name", POLICIES)
def test_diffusion_gemma_generates_under_every_policy(gemma: Any, name: str) -> None:
    policy = make_policy(name, {"budget": 6} if "budget" in POLICIES[name].__dataclass_fields__ else {})
    mask_BS = torch.ones(2, 6, dtype=torch.long)
    mask_BS[1, :2] = 0
    with expertshare.apply(gemma, policy) as handle, handle.metrics() as used:
        sequences = denoise(gemma, tokens(2, 6), attention_mask=mask_BS)
    assert handle.block_length == CANVAS
    assert sequences.shape == (2, 6 + 2 * CANVAS)
    assert sequences.min() >= 0
    assert sequences.max() < VOCAB
    encoder, decoder = ([use for use in used.by_layer if part in use.name] for part in ("encoder", "decoder"))
    assert [use.forwards for use in encoder] == [2, 2], "the prompt, and the first canvas"
    assert {use.forwards for use in decoder} <= {2, 3, 4, 5, 6}
    if "budget" in POLICIES[name].__dataclass_fields__:
        assert max(use.unique_experts for use in used.by_layer) <= 6


def test_vanilla_generates_what_the_model_does(gemma: Any) -> None:
    expected = denoise(gemma, tokens(2, 6))
    with expertshare.apply(gemma, "vanilla"):
        assert torch.equal(denoise(gemma, tokens(2, 6)), expected)


def test_the_canvas_is_one_sharing_group(gemma: Any) -> None:
    """Every forward of the decoder routes within 4 experts a row, and the rows have coresets of their own."""
    with expertshare.apply(gemma, "des-vote:budget=4") as handle, handle.metrics() as used:
        denoise(gemma, tokens(2, 6))
    decoder = [use for use in used.by_layer if "decoder" in use.name]
    assert [use.unique_experts for use in decoder] == [4.0, 4.0]
    assert max(use.union_experts for use in decoder) > 4


def test_one_policy_for_each_layer(gemma: Any) -> None:
    policy = Layerwise(layers=(make_policy("des-vote", {"budget": 4}), make_policy("des-vote", {"budget": 7})))
    with expertshare.apply(gemma, policy) as handle, handle.metrics() as used:
        denoise(gemma, tokens(1, 6))
    assert [use.unique_experts for use in used.by_layer if "decoder" in use.name] == [4.0, 7.0]


@pytest.mark.parametrize("name", POLICIES)
def test_autoregressive_generation_under_every_policy(name: str) -> None:
    model = build("olmoe")
    policy = make_policy(name, {"budget": 6} if "budget" in POLICIES[name].__dataclass_fields__ else {})
    mask_BS = torch.ones(2, 6, dtype=torch.long)
    mask_BS[1, :3] = 0
    with expertshare.apply(model, policy) as handle, handle.metrics() as used:
        ids = model.generate(tokens(2, 6), attention_mask=mask_BS, max_new_tokens=4, do_sample=False)
    assert ids.shape == (2, 10)
    assert used.forwards == 4


@pytest.mark.parametrize("name", ["qwen3_moe", "diffusion_gemma"])
def test_a_static_cache_changes_nothing(name: str) -> None:
    """Its masks have four dimensions and are wider than the tokens seen; padding is found there, too."""
    model = build(name)
    mask_BS = torch.ones(2, 6, dtype=torch.long)
    mask_BS[1, :3] = 0
    more: dict[str, Any] = {"max_denoising_steps": 3} if name == "diffusion_gemma" else {"do_sample": False}
    answers, counts = [], []
    with expertshare.apply(model, "des-vote:budget=5") as handle:
        for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
            torch.manual_seed(0)
            with handle.metrics() as used:
                done = model.generate(tokens(2, 6), attention_mask=mask_BS, max_new_tokens=9, **more, **cache)
            answers.append(getattr(done, "sequences", done))
            counts.append(used.by_layer)
    assert torch.equal(*answers)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", SHARING)
def test_a_single_token_step_is_a_group_of_its_own(name: str) -> None:
    """A token alone votes for its own K experts and keeps them: only the prompt is decided by a coreset."""
    model = build("olmoe")
    with torch.no_grad():
        past = model(tokens(2, 6), use_cache=True).past_key_values
        step = tokens(2, 1, seed=9)
        expected = model(step, past_key_values=past, use_cache=True).logits
        past.crop(-1)
        with expertshare.apply(model, make_policy(name)) as handle, handle.metrics() as used:
            actual = model(step, past_key_values=past, use_cache=True).logits
    if name not in ("des-seq", "block-top-p"):  # these take fewer than K experts from a token, or by their own share
        assert torch.equal(actual, expected)
    assert used.unique_experts <= TOP_K + (name == "block-top-p") * 12
