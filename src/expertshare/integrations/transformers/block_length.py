"""How many positions of a model share a coreset, where the caller does not say."""

from __future__ import annotations

from typing import Any

from torch import nn

from expertshare.errors import ConfigError
from expertshare.models import llada2_moe, llada_moe, sdar_moe
from expertshare.models.table import ALIASES

CONFIG_KEYS = ("canvas_length", "block_length", "block_size")

FAMILY_DEFAULTS = {
    "llada2_moe": llada2_moe.BLOCK_LENGTH,
    "llada_moe": llada_moe.BLOCK_LENGTH,
    "sdar_moe": sdar_moe.BLOCK_LENGTH,
}
"""By model_type: what these were trained with; the configs of the first checkpoints do not say."""


def block_length_of(model: nn.Module, given: int | None) -> int | None:
    """Positions of a sharing group; None: all positions of a sequence in a call, as for an autoregressive model."""
    if given is not None:
        return _checked(given, "block_length")
    config: Any = getattr(model, "config", None)
    stated = {
        name: _checked(getattr(config, name), f"{name} of the config")
        for name in CONFIG_KEYS
        if getattr(config, name, None) is not None
    }
    if len(set(stated.values())) > 1:
        raise ConfigError(f"expected one block length in the config, got {stated}: give block_length.")
    model_type = getattr(config, "model_type", None)
    return next(iter(stated.values()), FAMILY_DEFAULTS.get(ALIASES.get(str(model_type), str(model_type))))


def _checked(length: object, what: str) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ConfigError(f"expected {what} to be a whole number of positions, at least 1, got {length!r}.")
    return length
