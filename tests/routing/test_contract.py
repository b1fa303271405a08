"""The contract, over the whole POLICIES table by itself: a policy that enters the table is held to it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertshare.routing import POLICIES

from .cases import SPECS, policy_settings, scenes
from .contract import CHECKS, Check


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize("policy_name", POLICIES)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_every_policy_keeps_the_contract(policy_name: str, spec_name: str, check: Check, data: st.DataObject) -> None:
    spec = SPECS[spec_name]
    policy = data.draw(st.sampled_from(policy_settings(POLICIES[policy_name], spec)))
    check(policy, spec, data.draw(scenes(spec)))


@pytest.mark.parametrize("policy_name", POLICIES)
def test_the_table_key_is_the_policy_s_own_name(policy_name: str) -> None:
    assert POLICIES[policy_name].name == policy_name
