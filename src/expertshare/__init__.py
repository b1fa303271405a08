"""expertshare: Mixture-of-Experts diffusion language models with expert sharing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertshare.integrations.transformers import apply as apply

__version__ = "0.1.0"

_LAZY = {"apply": "expertshare.integrations.transformers"}
"""Name: the module that is imported when it is first used. Importing expertshare imports neither torch nor
transformers."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
