"""expertshare: Mixture-of-Experts diffusion language models with expert sharing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {"apply": "expertshare.integrations.transformers"}
"""What is loaded when it is first asked for: importing expertshare loads neither torch nor transformers."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
