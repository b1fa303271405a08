"""Where the tests of this room run: in Triton's interpreter on the CPU, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from expertshare.kernels.triton import interpreted, unavailable_reason

_REASON = unavailable_reason()
_HAS_GPU = _REASON is None and not interpreted()
DEVICES = [
    pytest.param(
        "cpu",
        id="interpreter",
        marks=pytest.mark.skipif(
            _REASON is not None or not interpreted(), reason=_REASON or "a GPU is there (TRITON_INTERPRET is not set)"
        ),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not _HAS_GPU, reason=_REASON or "no GPU, or TRITON_INTERPRET is set"),
        ],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Both, one of them skipped with the reason."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def unwritten_is_nan() -> Iterator[None]:
    """Outputs that nobody wrote are NaN, or the largest integer."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # a GPU's matrix products would need a variable set
    yield
    torch.use_deterministic_algorithms(False)
