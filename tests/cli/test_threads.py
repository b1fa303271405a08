"""Who decides about threads: the flag, then OMP_NUM_THREADS, then the machine."""

from __future__ import annotations

import pytest
import torch

from expertshare import native
from expertshare.cli.flags import set_threads
from expertshare.errors import InputError


@pytest.mark.parametrize(
    ("asked", "variable", "expected"), [(3, None, 3), (3, "2", 3), (None, "2", None), (None, None, 5), (None, "", 5)]
)
def test_who_decides(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, variable: str | None, expected: int | None
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.setattr(native, "usable_cores", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    set_threads(asked)
    assert calls == ([] if expected is None else [expected])


@pytest.mark.parametrize("asked", [0, -2])
def test_no_threads_is_refused(asked: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        set_threads(asked)
