"""One device of the capacity model is this project's machine: docs/scaling.md states how far it is off."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def checks():  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location("capacity_check", ROOT / "benchmarks" / "capacity_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["capacity_check"] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["capacity_check"]


def test_expert_layers_lie_between_the_roofline_and_the_sum(checks: ModuleType) -> None:
    found = checks.expert_layer()
    assert len(found) == 8
    for check in found:
        assert check.low <= check.measured <= check.high
        assert -0.35 <= check.error_low <= 0
        assert 0 <= check.error_high <= (0.25 if check.unique >= 32 else 0.35)
    for check in found[-2:]:  # where memory is the limit
        assert -0.08 <= check.error_low <= 0


def test_forwards_lie_between_the_roofline_and_the_sum(checks: ModuleType) -> None:
    found = checks.forwards()
    assert len(found) == 3
    for check in found:
        assert -0.35 <= check.error_low <= 0
        assert 0 <= check.error_high <= 0.25


def test_twenty_layers_behind_a_store_take_about_the_sum(checks: ModuleType) -> None:
    found = checks.decoding("memory-mini-bf16.json", "none")
    assert len(found) == 3
    for check in found:
        assert -0.15 <= check.error_high <= 0.15
        assert -0.4 <= check.error_low <= 0


def test_what_sharing_gains_is_predicted_within_a_fifth(checks: ModuleType) -> None:
    vanilla, shared, _ = checks.forwards()
    gain = vanilla.measured / shared.measured
    for predicted in (vanilla.low / shared.low, vanilla.high / shared.high):
        assert predicted == pytest.approx(gain, rel=0.2)


def test_memory_is_that_of_the_process_less_its_libraries(checks: ModuleType) -> None:
    for check in checks.memory():
        assert 0.2 <= check.measured - check.low <= 0.4  # GB of interpreter, torch and buffers


def test_the_page_has_these_tables(checks: ModuleType) -> None:
    for title, found, unit in (
        ("expert layer", checks.expert_layer(), "ms"),
        ("four layers and the head", checks.forwards(), "ms"),
        ("20 layers, bfloat16", checks.decoding("memory-mini-bf16.json", "none"), "ms"),
    ):
        assert checks.table(title, found, unit) in PAGE
