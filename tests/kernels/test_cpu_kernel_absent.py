"""Without a compiler the installation goes on, and without the library the reason is said; neither needs the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from backends import moe_ffn
from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels import choose_backend
from expertshare.native import calls, loading

from .test_moe_ffn import scene

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A place where there is no library yet."""
    monkeypatch.setattr(loading, "LIBRARY", tmp_path / "libexpertshare_cpu.so")
    caches = (loading._load, loading._isas, loading._usable_isa, calls._function)
    for one in caches:
        one.cache_clear()
    yield tmp_path / "libexpertshare_cpu.so"
    for one in caches:
        one.cache_clear()


def test_a_missing_library_is_said_and_the_default_still_works(library: Path) -> None:
    assert not native.available()
    assert "no C++ compiler" in str(native.unavailable_reason())
    x_TD, plan, bank = scene((3, 2, 4, 16, 8), torch.float32)
    assert moe_ffn(x_TD, plan, bank).shape == (3, 16)
    with pytest.raises(ConfigError, match=r"'cpu' is not available.*use the backend 'torch'"):
        moe_ffn(x_TD, plan, bank, backend="cpu")


def test_auto_falls_back_to_torch_and_says_so_once(library: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [choose_backend("auto", torch.device("cpu")).name for _ in range(3)] == ["torch"] * 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no C++ compiler" in caplog.text
    assert choose_backend("auto", torch.device("meta")).name == "torch"
    with pytest.raises(ConfigError, match="'cpu' is not available"):
        choose_backend("cpu", torch.device("cpu"))


def test_a_library_that_cannot_be_loaded_is_said(library: Path) -> None:
    library.write_text("not a library")
    assert "cannot be loaded" in str(native.unavailable_reason())


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_a_failing_compiler_is_one_line_and_no_failure(compiler: str, tmp_path: Path) -> None:
    arguments = ["setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "CXX": compiler},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "kernel" in line]
    assert len(said) == 1
    assert said[0].startswith("expertshare: CPU expert kernel not built, torch will be used instead: ")
    assert compiler in said[0]
    assert not list(tmp_path.rglob("*.so"))
