"""The model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expertshare.routing.base import TokenPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class Vanilla(TokenPolicy):
    """Every token picks its own experts among all of them: the baseline."""

    name: ClassVar[str] = "vanilla"
