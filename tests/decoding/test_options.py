"""Wrong input is refused with what was expected, what came, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from expertshare.config import ModelConfig
from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.errors import InputError, PolicyError
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_length": 0}, "gen_length must be a whole number of at least 1, got 0"),
        ({"gen_length": -3}, "got -3"),
        ({"gen_length": 2.5}, "got 2.5"),
        ({"gen_length": True}, "got True"),
        ({"block_length": 0}, "block_length"),
        ({"steps_per_block": 0}, "steps_per_block"),
        ({"steps_per_block": -1}, "steps_per_block"),
        ({"minimal_top_k": 0}, "minimal_top_k"),
        ({"gen_length": 4, "minimal_top_k": 5}, r"at most gen_length \(4\), got 5"),
        ({"threshold": 1.0}, r"threshold must lie in \[0, 1\), got 1.0"),
        ({"threshold": -0.1}, r"threshold must lie in \[0, 1\)"),
        ({"threshold": float("nan")}, "got nan"),
        ({"editing_threshold": 1.0}, "editing_threshold"),
        ({"editing_threshold": -1.0}, "None turns editing off"),
        ({"max_post_steps": -1}, "max_post_steps"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"remasking": "low"}, "remasking must be"),
        ({"remasking": "random", "threshold": None}, "needs a full-attention model"),
    ],
)
def test_bad_options(config: ModelConfig, options: dict[str, Any], message: str) -> None:
    """Each is an InputError when the options meet the model."""
    with pytest.raises(InputError, match=message):
        DecodingOptions(**options).resolve(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_length": 20}, "multiple of the block length .8.*Use 24"),
        ({"editing_threshold": 0.5}, "block-causal"),
        ({"remasking": "random"}, "Set threshold to None"),
    ],
)
def test_bad_options_for_full_attention(full_config: ModelConfig, options: dict[str, Any], message: str) -> None:
    """What this kind of decoding does not have."""
    with pytest.raises(InputError, match=message):
        DecodingOptions(**options).resolve(full_config)


def test_resolve_fills_in_the_model(config: ModelConfig) -> None:
    """Block and steps from the model; resolving twice changes nothing; block-causal lengths need not be
    multiples."""
    resolved = DecodingOptions(gen_length=13).resolve(config)
    assert (resolved.block_length, resolved.steps_per_block) == (8, 8)
    assert resolved.resolve(config) == resolved
    own = DecodingOptions(gen_length=12, block_length=4, minimal_top_k=6).resolve(config)
    assert (own.block_length, own.steps_per_block) == (4, 2)


def test_only_llada2_shortens_steps_for_few_tokens(config: ModelConfig) -> None:
    """SDAR writes one token a step by default, whatever the length of the answer."""
    few = DecodingOptions(gen_length=2)
    assert few.resolve(config).steps_per_block == 2
    assert few.resolve(replace(config, family="sdar_moe")).steps_per_block == config.block_length


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ([[1], []], "prompt 2 is empty"),
        ([[1] * 119], "119 tokens; with gen_length 10 that is 129, and the model has 128 positions"),
        ([[1, 64]], r"token id 64, expected ids in 0\.\.63"),
        ([[-1]], "token id -1"),
    ],
)
def test_bad_prompts(
    config: ModelConfig,
    make_model: Callable[..., MoETransformer],
    runtime: Callable[..., Runtime],
    prompts: list[list[int]],
    message: str,
) -> None:
    """Refused before any forward."""
    decoder = BlockDecoder(make_model(config), runtime(), DecodingOptions(gen_length=10))
    with pytest.raises(InputError, match=message):
        decoder.blocks(prompts)


def test_the_longest_prompt_fits(
    config: ModelConfig, make_model: Callable[..., MoETransformer], runtime: Callable[..., Runtime]
) -> None:
    """Exactly as many positions as the model has."""
    decoder = BlockDecoder(make_model(replace(config, eos_ids=())), runtime(), DecodingOptions(gen_length=10))
    assert sum(len(block.token_ids) for block in decoder.blocks([[1] * 118])) == 10


def test_seeds_come_one_per_prompt(
    config: ModelConfig, make_model: Callable[..., MoETransformer], runtime: Callable[..., Runtime]
) -> None:
    """Not more, not fewer."""
    decoder = BlockDecoder(make_model(config), runtime(), DecodingOptions(gen_length=8))
    with pytest.raises(InputError, match=r"one seed per prompt \(2\), got 1"):
        decoder.blocks([[1], [2]], seeds=[0])


def test_the_policy_is_bound_to_the_model(
    config: ModelConfig, make_model: Callable[..., MoETransformer], runtime: Callable[..., Runtime]
) -> None:
    """A budget below the model's minimum is refused when the decoder is made."""
    with pytest.raises(PolicyError, match="budget"):
        BlockDecoder(make_model(config), runtime("des-vote:budget=2"), DecodingOptions(gen_length=8))
