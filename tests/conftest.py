"""Order and reproducibility of the whole suite."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels are tested in its interpreter, which must be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Two runs of `make test` on one commit give one answer; a busy machine must not fail a property by its deadline.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

# Processes that share the cores divide them: threads of torch spin while they wait, and others would work meanwhile.
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))

SERVING_LOGS = ("expertshare.serving", "uvicorn")


@pytest.fixture(autouse=True)
def _logs_end_with_the_test() -> Iterator[None]:
    """A server that is refused has pointed these at its test's stderr, which is closed when the next one logs."""
    before = [
        (logger, logger.handlers[:], logger.level, logger.propagate) for logger in map(logging.getLogger, SERVING_LOGS)
    ]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


QUICK_FIRST = ("routing", "kernels", "measure", "tasks", "models", "decoding", "evaluation", "training", "cli")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run packages from the bottom up, so that the first failure is the nearest to its cause; slow tests last."""
    items.sort(key=_order)


def _order(item: pytest.Item) -> tuple[bool, int]:
    package = item.path.parent.name
    slow = item.get_closest_marker("slow") is not None
    return slow, QUICK_FIRST.index(package) if package in QUICK_FIRST else len(QUICK_FIRST)
