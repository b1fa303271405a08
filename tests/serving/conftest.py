"""The reference model, served."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from expertshare import api
from expertshare.models import LoadedModel

from .server import REFERENCE, Serve, Served, running


@pytest.fixture(scope="session")
def reference() -> LoadedModel:
    """In float32: answers do not depend on the batch."""
    return api.load(REFERENCE, dtype="float32")


@pytest.fixture
def serve(reference: LoadedModel) -> Iterator[Serve]:
    """A server of its own for a test."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(running(reference, **options))


@pytest.fixture(scope="session")
def served(reference: LoadedModel) -> Iterator[Served]:
    """One for all tests that change nothing."""
    with running(reference) as one:
        yield one


@pytest.fixture
def slowly(reference: LoadedModel) -> Iterator[Callable[[float], None]]:
    """Make every forward take so many seconds more."""
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def slow(seconds: float) -> None:
        handles.append(reference.model.register_forward_pre_hook(lambda *_: time.sleep(seconds)))

    yield slow
    for handle in handles:
        handle.remove()
