"""Which policies a request may name."""

from __future__ import annotations

import pytest

from expertshare.errors import PolicyError
from expertshare.models import LoadedModel
from expertshare.routing import POLICIES, Layerwise, parse_policy
from expertshare.serving import OfferedPolicies


def offer(reference: LoadedModel, *offered: str) -> OfferedPolicies:
    router = reference.config.router
    return OfferedPolicies.read(router, parse_policy("des-vote:budget=24"), offered or None)


def test_everything_within_the_limits_of_the_model_by_default(reference: LoadedModel) -> None:
    everything = offer(reference)
    assert everything.labels == (*POLICIES, *())
    assert everything.choose(None).budget == 24  # type: ignore[attr-defined]
    assert everything.choose("des-vote:budget=0.5").budget == 32  # type: ignore[attr-defined]
    with pytest.raises(PolicyError, match="budget must lie in"):
        everything.choose("des-vote:budget=1")


def test_a_name_allows_any_knobs_and_a_setting_only_itself(reference: LoadedModel) -> None:
    some = offer(reference, "des-seq,block-max:budget=24")
    assert some.labels == ("des-seq", "des-vote:budget=24", "block-max:budget=24")
    for allowed in ("des-seq", "des-seq:experts_per_vote=2", "block-max:budget=24", "block-max:budget=0.375"):
        some.choose(allowed)
    assert some.choose("des-vote:budget=24") == some.default
    for refused in ("vanilla", "block-max", "block-max:budget=18", "des-vote:budget=25"):
        with pytest.raises(PolicyError, match="does not offer"):
            some.choose(refused)


def test_an_offer_that_the_model_cannot_work_with_is_refused_at_the_start(reference: LoadedModel) -> None:
    with pytest.raises(PolicyError, match="budget must lie in"):
        offer(reference, "des-vote:budget=3")
    with pytest.raises(PolicyError, match="at least one"):
        offer(reference, " , ")


def test_a_default_with_a_policy_for_each_layer_has_no_text(reference: LoadedModel) -> None:
    router, layers = reference.config.router, (parse_policy("vanilla"), *[parse_policy("des-vote:budget=24")] * 2)
    some = OfferedPolicies.read(router, Layerwise(layers=layers), ["des-seq"])
    assert some.labels == ("des-seq",)
    assert {some.choose(None): 1}[some.default] == 1  # groups are found by it
