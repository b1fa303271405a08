"""Policies as text, there and back."""

from __future__ import annotations

import pytest

from expertshare.errors import PolicyError
from expertshare.routing import POLICIES, make_policy, parse_policies, policy_label, split_policies


@pytest.mark.parametrize(
    ("listed", "parts"),
    [
        ("vanilla,des-vote:budget=16", ["vanilla", "des-vote:budget=16"]),
        ("a:x=1,y=2,b", ["a:x=1,y=2", "b"]),
        ("a:x=1,b:y=2,z=3,c", ["a:x=1", "b:y=2,z=3", "c"]),
        ("a,x=1,b", ["a:x=1", "b"]),
        (" a , b ,", ["a", "b"]),
        ("", []),
    ],
)
def test_commas_part_policies_and_knobs(listed: str, parts: list[str]) -> None:
    assert split_policies(listed) == parts


def test_a_knob_without_a_policy_is_refused() -> None:
    with pytest.raises(PolicyError, match="expected a policy before the knob 'budget=16'"):
        split_policies("budget=16,vanilla")


def test_labels_tell_settings_apart() -> None:
    policies = parse_policies(["des-vote,des-vote:budget=16,group_limit=ignore,des-vote:budget=0.4", "block-top-p"])
    assert [policy_label(policy) for policy in policies] == [
        "des-vote",
        "des-vote:group_limit=ignore,budget=16",
        "des-vote:budget=0.4",
        "block-top-p:top_p_experts=0.6",
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_a_label_is_read_back_as_the_same_policy(name: str) -> None:
    policy = make_policy(name)
    assert parse_policies([policy_label(policy)]) == [policy]
