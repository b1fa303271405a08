"""A machine whose limits are made up: nothing here depends on how fast it is."""

from __future__ import annotations

import pytest

from expertshare.lab.bench.machine import Machine


@pytest.fixture
def machine() -> Machine:
    return Machine(
        facts={"cpu": "test", "threads": 1},
        cache_bytes=4096,
        instruction_set=None,
        bytes_per_s=2e9,
        macs_per_s={"bfloat16": 4e9, "float32": 1e9},
    )
