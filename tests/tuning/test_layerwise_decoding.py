"""Per-layer policies through the whole decoder."""

from __future__ import annotations

import pytest

from expertshare.decoding import DecodingOptions, generate
from expertshare.errors import PolicyError
from expertshare.models import LoadedModel, Runtime
from expertshare.routing import Layerwise, make_policy, parse_policy

OPTIONS = DecodingOptions(gen_length=16, threshold=0.9)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15, 16]]


@pytest.mark.parametrize("text", ["vanilla", "des-vote:budget=7", "des-seq:experts_per_vote=2", "skip:skip_share=0.3"])
def test_equal_layers_decode_as_the_plain_policy(any_model: LoadedModel, text: str) -> None:
    plain = parse_policy(text)
    layered = Layerwise(layers=(plain, plain))
    runs = [generate(any_model.model, Runtime(policy=p), OPTIONS, PROMPTS) for p in (plain, layered)]
    assert runs[0].rows == runs[1].rows
    assert runs[0].cost == runs[1].cost


def test_a_layer_is_restricted_alone(any_model: LoadedModel) -> None:
    vanilla, narrow = make_policy("vanilla"), make_policy("des-vote", {"budget": 6})
    cost = generate(any_model.model, Runtime(policy=Layerwise(layers=(narrow, vanilla))), OPTIONS, PROMPTS).cost
    first, second = cost.unique_experts_by_layer["denoise"]
    assert first <= 6 < second


def test_a_policy_for_another_number_of_layers_is_refused(any_model: LoadedModel) -> None:
    policy = Layerwise(layers=(make_policy("vanilla"),) * 3)
    with pytest.raises(PolicyError, match="2 MoE layers, got 3"):
        generate(any_model.model, Runtime(policy=policy), OPTIONS, PROMPTS)
