"""What is said where Triton cannot run. These tests need neither Triton nor a GPU."""

from __future__ import annotations

import pytest
import torch

from backends import moe_ffn
from expertshare.errors import ConfigError
from expertshare.kernels import choose_backend
from expertshare.kernels import triton as availability
from expertshare.kernels.triton import interpreted, unavailable_reason

from ..test_moe_ffn import scene


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "_not_installed", lambda oldest: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "find_spec", lambda name: None)
    availability._not_installed.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"cannot run here: Triton is not installed.*expertshare\[triton\]"):
            choose_backend("triton", torch.device("cuda"))
        with pytest.raises(ConfigError, match="not installed"):
            moe_ffn(*scene((3, 2, 4, 16, 8), torch.float32), backend="triton")
    finally:
        availability._not_installed.cache_clear()


def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "find_spec", lambda name: object())
    monkeypatch.setattr(availability.metadata, "version", lambda name: "3.5.1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    availability._not_installed.cache_clear()
    try:
        assert unavailable_reason() == "Triton is 3.5.1, expected 3.6 or newer"
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert unavailable_reason() == "Triton is 3.5.1, expected 3.7 or newer"
    finally:
        availability._not_installed.cache_clear()


@pytest.mark.usefixtures("installed")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"torch sees no GPU. Use the backend 'auto'"):
        choose_backend("triton", torch.device("cpu"))


@pytest.mark.usefixtures("installed")
def test_tensors_on_the_cpu_are_refused_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_backend("triton", torch.device("cuda")).name == "triton"
    with pytest.raises(ConfigError, match="tensors on one GPU, got them on cpu"):
        moe_ffn(*scene((3, 2, 4, 16, 8), torch.float32), backend="triton")


def test_the_interpreter_is_asked_for_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("1", True), ("true", True), ("0", False), ("", False)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert interpreted() is expected
