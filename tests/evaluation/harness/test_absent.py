"""Without the extra: a clear error that names it, and everything else works."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from expertshare import api
from expertshare.errors import InputError
from expertshare.models import LoadedModel


def test_the_error_names_the_extra(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def absent(name: str, *more: Any) -> Any:
        return None if name == "lm_eval" else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(InputError, match=r"lm_eval is not installed: pip install 'expertshare\[eval\]'"):
        api.evaluate(loaded, ["gsm8k"], ["vanilla"], out=tmp_path / "run", data=tmp_path)
    assert not (tmp_path / "run").exists()
