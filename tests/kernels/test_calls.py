"""The table of native calls: what one call has been told of shapes does not let another pass that does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError
from expertshare.native import calls

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernel: {native.unavailable_reason()}")


def linear(x: Tensor, weights: Tensor) -> Tensor:
    return calls.LINEAR(x, weights)[0]


def test_a_fit_is_remembered_for_exactly_what_was_checked() -> None:
    x, weights = torch.randn(3, 8), torch.randn(5, 8)
    expected = linear(x, weights)
    assert torch.equal(linear(x.clone(), weights.clone()), expected)
    wrong = {
        "bfloat16, got": (x.bfloat16(), weights),
        r"weights \[N, D\]": (x, weights[:, :7].contiguous()),
        "contiguous once": (x, weights.T.contiguous().T),
        "on the CPU": (x.to("meta"), weights),
        "no gradients": (x, weights.clone().requires_grad_()),
    }
    for message, given in wrong.items():
        with pytest.raises(ConfigError, match=message):
            linear(*given)
    assert torch.equal(linear(x, weights), expected)


def test_elements_that_are_not_aligned_are_refused_whatever_passed_before() -> None:
    weights = torch.randn(5, 8)
    memory = torch.zeros(5 * 8 * 4 + 8, dtype=torch.uint8)
    for skip in (0, 4):
        aligned = memory[skip : skip + weights.nbytes].view(torch.float32).view(5, 8).copy_(weights)
        assert torch.equal(linear(torch.eye(8), aligned), weights.T)
    storage = torch.frombuffer(bytearray(weights.nbytes + 8), dtype=torch.uint8)
    shifted = torch.frombuffer(storage.numpy().data, dtype=torch.float32, count=40, offset=2).view(5, 8)
    assert shifted.data_ptr() % 4 == 2
    with pytest.raises(ConfigError, match="weights is not aligned to its elements of 4 bytes: clone it"):
        linear(torch.eye(8), shifted)
    assert linear(torch.eye(8), shifted.clone()).shape == (8, 5)


def test_what_a_row_does_not_call_optional_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="no weights"):
        calls.LINEAR(torch.randn(3, 8), None)


def test_views_are_copied_where_they_must_be_and_results_are_not_views_of_them() -> None:
    x, scale = torch.randn(4, 6), torch.rand(6)
    expected = calls.RMS_NORM(x, scale, numbers=(1e-6,))[0]
    for view in (x.T.contiguous().T, torch.stack((x, x), dim=1)[:, 1], x.expand(2, 4, 6)[1]):
        found = calls.RMS_NORM(view, scale.expand(2, 6)[1], numbers=(1e-6,))[0]
        assert found.is_contiguous()
        assert torch.equal(found, expected)


def test_only_so_many_shapes_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_MOST_KNOWN", 3)
    weights = torch.randn(5, 8)
    for length in range(8):
        assert linear(torch.ones(length, 8), weights).shape == (length, 5)
    assert len(calls.LINEAR._known) <= 3
