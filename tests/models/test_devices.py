"""Devices that are not there are refused with what would work, and backends on the wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertshare import api
from expertshare.errors import ConfigError, ExpertMemoryError
from expertshare.kernels import backend, choose_backend
from expertshare.models import load_model
from expertshare.models.loading import usable_device

REFERENCE = Path(__file__).parents[2] / "models" / "reference"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there() -> None:
    assert usable_device("cpu") == torch.device("cpu")
    for load in (lambda: usable_device("cuda"), lambda: load_model(REFERENCE, device="cuda:1")):
        with pytest.raises(ConfigError, match=r"expected a GPU.*torch sees none.*Use the device 'cpu'"):
            load()


@pytest.mark.usefixtures("one_gpu")
def test_gpus_are_counted() -> None:
    assert usable_device("cuda").type == "cuda"
    assert usable_device("cuda:0").index == 0
    with pytest.raises(ConfigError, match=r"a GPU below 1, as many as torch sees, got device 'cuda:1'"):
        usable_device("cuda:1")


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpu", "unknown device 'gpu'. .*Known: cpu, cuda"), ("xpu", "the device 'xpu': use cpu or cuda")],
)
def test_what_is_no_device(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        usable_device(name)


@pytest.mark.usefixtures("one_gpu")
def test_a_loaded_model_has_to_be_where_it_is_asked_for() -> None:
    loaded = api.load(REFERENCE)
    assert api.load(loaded, device="cpu") is loaded
    with pytest.raises(ConfigError, match="a model on the device 'cuda', got one that is loaded on cpu"):
        api.load(loaded, device="cuda")


@pytest.mark.usefixtures("one_gpu")
def test_a_model_is_held_against_the_memory_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertshare.models.loading.free_memory_bytes", lambda device: 2**20)
    with pytest.raises(ExpertMemoryError, match="of memory of cuda, but 1MiB can be had"):
        api.load(REFERENCE, device="cuda")


@pytest.mark.usefixtures("one_gpu")
def test_a_backend_on_the_wrong_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertshare.kernels.triton.check_available", lambda: None)
    monkeypatch.setattr(backend.native, "library", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="'triton' expects a model on the device 'cuda', got one on 'cpu'"):
        choose_backend("triton", torch.device("cpu"))
    with pytest.raises(ConfigError, match="'cpu' expects a model on the device 'cpu', got one on 'cuda'"):
        choose_backend("cpu", torch.device("cuda"))
    assert choose_backend("triton", torch.device("cuda")).name == "triton"
    assert choose_backend("torch", torch.device("cuda")).name == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match=r"on the device 'cpu' \(TRITON_INTERPRET is set\), got one on 'cuda'"):
        choose_backend("triton", torch.device("cuda"))
