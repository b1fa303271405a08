"""Every kernel compiles to machine code of an H100, at the shapes of LLaDA2.0-mini, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from expertshare.kernels.triton import OLDEST, _not_installed

MISSING = _not_installed(OLDEST)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]

SCRIPT = Path(__file__).with_name("compile_for_hopper.py")
MOST_SHARED_BYTES = 227 * 1024 // 2
"""Of a multiprocessor, for each of the two programs that share it."""


def test_for_an_h100() -> None:
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT], capture_output=True, text=True, env=outside, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout)
    for name, code in made.items():
        assert code["shared_bytes"] <= MOST_SHARED_BYTES, name
        # No array of a thread has gone to memory. The selection may park a number or two there.
        assert code.get("stack_bytes", 0) <= 32, (name, code)
        if name.split()[0] in ("gate_up", "down", "head"):
            assert code["matrix_products"] > 0, name
            assert code["async_copies"] > 0, f"{name}: loads do not run ahead of products"
