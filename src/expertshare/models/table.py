"""All model families, by the model_type of config.json. Adding a family is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertshare.errors import ConfigError, nearest
from expertshare.models.family import Family
from expertshare.models.llada2_moe import LLADA2_MOE
from expertshare.models.llada_moe import LLADA_MOE
from expertshare.models.sdar_moe import SDAR_MOE

FAMILIES: dict[str, Family] = {
    "llada2_moe": LLADA2_MOE,
    "llada_moe": LLADA_MOE,
    "sdar_moe": SDAR_MOE,
}

ALIASES: dict[str, str] = {
    "llada2_moe_veomni": "llada2_moe",  # written by the training code of LLaDA2
    "llada": "llada_moe",  # what LLaDA-MoE's released config.json says, as the dense LLaDA does
}


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family that config.json names; ConfigError suggests the nearest where there is none."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(
            f"config.json: model_type must name a family, got {model_type!r}. Known: {', '.join(sorted(FAMILIES))}"
        )
    if model_type == "llada" and raw.get("num_experts") is None:
        raise ConfigError(
            "config.json: model_type 'llada' without num_experts is the dense LLaDA, which has no experts to share: "
            "use a mixture-of-experts checkpoint such as LLaDA-MoE"
        )
    name = ALIASES.get(model_type, model_type)
    if name not in FAMILIES:
        raise ConfigError(
            f"config.json: unknown model_type {model_type!r}. {nearest(model_type, {*FAMILIES, *ALIASES})} "
            "docs/add-a-model.md says how to add one"
        )
    return FAMILIES[name]
