"""Instruction sets and threads for tests of the native library."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from expertshare import native

ISAS = native.usable_instruction_sets() if native.available() else []


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """Outputs that nobody wrote are NaN; threads are those of the defaults again afterwards."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    native.set_num_threads(None)
    native.use_torch_threads(None)
