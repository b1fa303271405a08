"""Every way to ask for an unusable policy, and the words that say what was expected, got, and what to do."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest

from expertshare.config import RouterSpec
from expertshare.errors import ConfigError, ExpertShareError, PolicyError
from expertshare.routing import POLICIES, knobs, make_policy, parse_policy

from .cases import SPECS, plain_spec

LLADA2 = SPECS["sigmoid groups 64"]  # minimum coreset 12 with the group limit, 8 without


def says(*words: str) -> str:
    """A pattern that finds the words in this order."""
    return ".*".join(re.escape(word) for word in words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "des-vot",
            ["unknown policy 'des-vot'", "Did you mean 'des-vote'?", "Known:", "block-max", "vanilla"],
        ),
        ("desvote", ["Did you mean 'des-vote'?"]),
        ("topkcap", ["Did you mean 'top-k-cap'?"]),
        ("zzz", ["unknown policy 'zzz'. Known:"]),
        ("", ["unknown policy ''"]),
    ],
)
def test_unknown_policy(name: str, words: list[str]) -> None:
    with pytest.raises(PolicyError, match=says(*words)):
        make_policy(name)


@pytest.mark.parametrize(
    ("name", "knob", "words"),
    [
        (
            "des-vote",
            "guard",
            ["des-vote has no knob 'guard'", "belongs to block-top-p", "takes: ballots, budget"],
        ),
        ("block-top-p", "budget", ["has no knob 'budget'", "belongs to block-max, coverage, des-vote, protected-vote"]),
        ("vanilla", "skip_share", ["belongs to skip", "vanilla takes: no knobs"]),
        ("skip", "name", ["has no knob 'name'", "takes: skip_share"]),
        ("skip", "nonsense", ["skip has no knob 'nonsense': skip takes"]),
    ],
)
def test_knob_of_another_policy(name: str, knob: str, words: list[str]) -> None:
    with pytest.raises(PolicyError, match=says(*words)):
        make_policy(name, {knob: 1})


@pytest.mark.parametrize(
    ("name", "knob", "value", "words"),
    [
        ("des-vote", "budget", "many", ["budget must be a number", "got 'many'"]),
        ("des-vote", "budget", True, ["budget must be a number", "got True"]),
        ("block-top-p", "guard", 12.5, ["guard must be a whole number", "got 12.5"]),
        ("block-top-p", "top_p_experts", "x", ["top_p_experts must be a number"]),
        ("skip", "skip_share", "x", ["skip_share must be a number"]),
        ("top-k-cap", "experts_per_token", 2.0, ["experts_per_token must be a whole number", "got 2.0"]),
        ("des-seq", "experts_per_vote", "two", ["experts_per_vote must be a whole number"]),
        (
            "block-max",
            "group_limit",
            "outside",
            ["group_limit must be one of inside, ignore", "got 'outside'"],
        ),
        ("des-vote", "ballots", 3, ["ballots must be one of ungrouped, grouped", "got 3"]),
    ],
)
def test_value_of_the_wrong_kind(name: str, knob: str, value: Any, words: list[str]) -> None:
    with pytest.raises(PolicyError, match=says(f"{name}: ", *words)):
        make_policy(name, {knob: value})


@pytest.mark.parametrize("p", [0, 0.0, -0.5, 1.0001, 2, float("nan"), float("inf")])
def test_p_outside_its_range(p: float) -> None:
    with pytest.raises(PolicyError, match=says("block-top-p: top_p_experts must lie in (0, 1], got", str(p))):
        make_policy("block-top-p", {"top_p_experts": p}).bind(LLADA2)


@pytest.mark.parametrize("name", [n for n, kind in POLICIES.items() if "budget" in knobs(kind())])
@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (11, ["must lie in 12..64 experts", "8 experts per token", "group limit 'inside'", "got 11"]),
        (65, ["must lie in 12..64 experts", "got 65"]),
        (0, ["must lie in 12..64", "got 0"]),
        (-3, ["must lie in 12..64", "got -3"]),
        (0.1, ["must lie in 12..64", "got 0.1 (6 experts)"]),
        (0.0, ["a count of experts", "fraction in (0, 1]", "got 0.0"]),
        (16.0, ["a whole number", "got 16.0"]),
        (-0.2, ["fraction in (0, 1]", "got -0.2"]),
        (float("nan"), ["fraction in (0, 1]", "got nan"]),
    ],
)
def test_unusable_budget(name: str, budget: float, words: list[str]) -> None:
    with pytest.raises(PolicyError, match=says(f"{name}: ", *words)):
        make_policy(name, {"budget": budget, "group_limit": "inside"}).bind(LLADA2)


def test_the_smallest_budget_depends_on_the_group_rule() -> None:
    assert make_policy("des-vote", {"budget": 12}).bind(LLADA2) == make_policy("des-vote", {"budget": 12})
    make_policy("des-vote", {"budget": 8, "group_limit": "ignore"}).bind(LLADA2)
    with pytest.raises(PolicyError, match=says("must lie in 8..64", "group limit 'ignore'", "got 7")):
        make_policy("des-vote", {"budget": 7, "group_limit": "ignore"}).bind(LLADA2)


@pytest.mark.parametrize("guard", [11, 65, 0, -1])
def test_unusable_guard(guard: int) -> None:
    with pytest.raises(PolicyError, match=says("block-top-p: guard must lie in 12..64 for this model", f"got {guard}")):
        make_policy("block-top-p", {"guard": guard}).bind(LLADA2)


@pytest.mark.parametrize("share", [1.0, 1, -0.1, float("nan")])
def test_unusable_skip_share(share: float) -> None:
    with pytest.raises(PolicyError, match=says("skip: skip_share must lie in [0, 1), got", str(share))):
        make_policy("skip", {"skip_share": share}).bind(LLADA2)


@pytest.mark.parametrize(("name", "knob"), [("top-k-cap", "experts_per_token"), ("des-seq", "experts_per_vote")])
@pytest.mark.parametrize("count", [0, -1, 9])
def test_unusable_count(name: str, knob: str, count: int) -> None:
    with pytest.raises(PolicyError, match=says(f"{name}: {knob} must lie in 1..8 for this model, got {count}")):
        make_policy(name, {knob: count}).bind(LLADA2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("des-vote:budget", ["expected knob=value in 'des-vote:budget'", "got 'budget'", "Example"]),
        ("des-vote:16", ["expected knob=value", "got '16'"]),
        ("des-vote:=16", ["des-vote has no knob ''"]),
        ("des-vote:budget=", ["budget must be a number", "got ''"]),
        ("des-vote:budget=a=b", ["budget must be a number", "got 'a=b'"]),
        ("des-vote:budget=16,budget=20", ["each knob once", "got budget again"]),
        ("des-vote budget=16", ["unknown policy 'des-vote budget=16'", "Did you mean 'des-vote'?"]),
        ("vanilla:budget=3", ["vanilla has no knob 'budget'"]),
        (":budget=3", ["unknown policy ''"]),
    ],
)
def test_malformed_policy_text(text: str, words: list[str]) -> None:
    with pytest.raises(PolicyError, match=says(*words)):
        parse_policy(text)


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("vanilla", "vanilla", {}),
        (
            " des-vote : budget = 16 , group-limit=ignore ",
            "des-vote",
            {"budget": 16, "group_limit": "ignore"},
        ),
        ("des-vote:budget=0.15", "des-vote", {"budget": 0.15}),
        ("block-top-p:top-p-experts=1,guard=20", "block-top-p", {"top_p_experts": 1, "guard": 20}),
        ("skip:skip_share=.5", "skip", {"skip_share": 0.5}),
    ],
)
def test_policy_text_that_is_fine(text: str, name: str, settings: dict[str, Any]) -> None:
    policy = parse_policy(text)
    assert policy == make_policy(name, settings)
    assert knobs(policy).items() >= settings.items()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_experts": 8, "top_k": 9}, ["experts per token must lie in 1..8", "got 9"]),
        ({"num_experts": 8, "top_k": 0}, ["experts per token must lie in 1..8", "got 0"]),
        ({"num_experts": 8, "top_k": 2, "num_groups": 3}, ["groups must divide 8 experts, got 3"]),
        (
            {"num_experts": 8, "top_k": 2, "num_groups": 4, "kept_groups": 5},
            ["kept groups must lie in 1..4, got 5"],
        ),
        (
            {"num_experts": 8, "top_k": 5, "num_groups": 4, "kept_groups": 2},
            ["2 kept groups of 2 experts", "give 5"],
        ),
    ],
)
def test_unusable_router(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError, match=says(*words)):
        RouterSpec(activation="sigmoid", renormalise=True, **values)


def test_all_are_caught_as_one() -> None:
    with pytest.raises(ExpertShareError):
        parse_policy("no-such-policy")
    with pytest.raises(ExpertShareError):
        make_policy("des-vote", {"budget": 1}).bind(plain_spec(8, 2))


WORDS = {
    "voters": ("mask", "all, masked"),
    "group_limit": ("outside", "inside, ignore"),
    "ballots": ("groups", "ungrouped, grouped"),
}


@pytest.mark.parametrize(
    ("name", "knob"), [(name, f.name) for name, kind in POLICIES.items() for f in fields(kind) if f.name in WORDS]
)
def test_a_word_is_checked_where_a_policy_is_made_directly(name: str, knob: str) -> None:
    """Otherwise a misspelt one would quietly mean another."""
    wrong, known = WORDS[knob]
    settings: dict[str, Any] = {knob: wrong}
    with pytest.raises(PolicyError, match=says(name, knob, f"one of {known}", repr(wrong))):
        POLICIES[name](**settings)
