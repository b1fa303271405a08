"""docs/add-a-policy.md is true: its policy runs, its table lines fit, its test passes, the contract holds for it."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertshare.errors import PolicyError
from expertshare.routing import RoutingPolicy, policies, policy_record

from .cases import SPECS, policy_settings, scenes
from .contract import CHECKS, Check

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-policy.md").read_text(encoding="utf-8")
POLICY_CODE, TEST_CODE, UNRULED_CODE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
TABLE_EDITS = re.findall(r"```diff\n (.*?)\n\+(.*?)\n```", PAGE)  # (line that is there, line to add below it)
MODULE = "expertshare.routing.firm_vote"
UNRULED = "expertshare.routing.head_count"


def load(name: str, code: str, folder: Path) -> ModuleType:
    """Import `code` as module `name`, from a file, as a reader of the page would have it."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def firm_vote(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The module of step 1."""
    yield load(MODULE, POLICY_CODE, tmp_path_factory.mktemp("routing"))
    del sys.modules[MODULE]


@pytest.fixture(scope="module")
def head_count(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The module of the policy that no rule expresses."""
    yield load(UNRULED, UNRULED_CODE, tmp_path_factory.mktemp("unruled"))
    del sys.modules[UNRULED]


def edited_table() -> str:
    """The source of the table after step 2."""
    lines = inspect.getsource(policies).splitlines()
    for there, added in TABLE_EDITS:
        assert lines.count(there) == 1, f"the page expects one line {there!r} in policies.py"
        lines.insert(lines.index(there) + 1, added)
    return "\n".join(lines) + "\n"


def test_the_table_takes_its_line(firm_vote: ModuleType, tmp_path: Path) -> None:
    assert len(TABLE_EDITS) == 2
    try:
        edited = load("edited_table", edited_table(), tmp_path)
    finally:
        sys.modules.pop("edited_table", None)
    assert edited.POLICIES["firm-vote"] is firm_vote.FirmVote
    assert list(edited.POLICIES) != list(policies.POLICIES)
    assert edited.parse_policy("firm-vote:budget=16") == edited.make_policy("firm-vote", {"budget": 16})
    with pytest.raises(PolicyError, match="Did you mean 'firm-vote'"):
        edited.make_policy("firmvote")


@pytest.mark.usefixtures("firm_vote")
def test_its_test_passes(tmp_path: Path) -> None:
    try:
        module = load("test_firm_vote", TEST_CODE, tmp_path)
    finally:
        sys.modules.pop("test_firm_vote", None)
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 1
    for test in tests:
        test()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("spec_name", ["softmax renormalised", "sigmoid groups 64", "few kept groups"])
def test_the_contract_holds_for_both(
    firm_vote: ModuleType, head_count: ModuleType, spec_name: str, check: Check
) -> None:
    spec = SPECS[spec_name]
    policies = [p for kind in (firm_vote.FirmVote, head_count.HeadCount) for p in policy_settings(kind, spec)]

    @settings(max_examples=16, deadline=None, derandomize=True)
    @given(policy=st.sampled_from(policies), scene=scenes(spec))
    def holds(policy: RoutingPolicy, scene) -> None:  # type: ignore[no-untyped-def]
        check(policy, spec, scene)

    holds()


def test_its_knobs_are_known_from_their_declaration(firm_vote: ModuleType) -> None:
    """Limits are kept by `bind`, and tried by the contract suite."""
    spec = SPECS["sigmoid groups 64"]
    tried = {policy.firm for policy in policy_settings(firm_vote.FirmVote, spec)}  # type: ignore[attr-defined]
    assert tried == {1, 2, 4, 8}
    with pytest.raises(PolicyError, match=r"firm-vote: firm must lie in 1\.\.8 for this model, got 9"):
        firm_vote.FirmVote(firm=9).bind(spec)


def test_only_the_one_without_a_rule_runs_on_torch(firm_vote: ModuleType, head_count: ModuleType) -> None:
    assert "routed_by" not in policy_record(firm_vote.FirmVote())
    assert policy_record(head_count.HeadCount())["routed_by"] == "torch"


def test_the_files_that_the_page_names_are_there() -> None:
    root = Path(__file__).parents[2]
    named = re.findall(r"`((?:src|tests)/[\w/]+\.py)`", PAGE)
    assert len(named) >= 4
    for path in named:
        assert "firm_vote" in path or (root / path).is_file(), path
