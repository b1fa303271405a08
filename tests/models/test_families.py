"""What every family in the table promises, so that a new one needs no new check but its parity test."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.models import MoETransformer
from expertshare.models.family import ALIASES, FAMILIES, Target, family_named

from .test_saving import CONFIGS

LAYOUTS = [
    pytest.param(config, layout, id=f"{name}: {layout.__name__}")
    for name, config in CONFIGS.items()
    for layout in (family_named(config.family).targets, family_named(config.family).merged_targets)
    if layout is not None
]


def meta_state(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = MoETransformer(config)
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize(("config", "layout"), LAYOUTS)
def test_every_weight_has_exactly_one_place(
    config: ModelConfig, layout: Callable[[ModelConfig], Sequence[Target]]
) -> None:
    places = layout(config)
    assert len({place.name for place in places}) == len(places)
    filled = {entry: torch.zeros(tensor.shape) for entry, tensor in meta_state(config).items()}
    for place in places:
        place.of(filled[place.entry]).add_(1.0)
    assert all(tensor.eq(1.0).all() for tensor in filled.values())


def test_every_family_is_covered_here_and_keyed_by_its_name() -> None:
    assert {config.family for config in CONFIGS.values()} == set(FAMILIES)
    assert all(name == family_named(name).name for name in FAMILIES)
    assert set(ALIASES.values()) <= set(FAMILIES)
    assert not set(ALIASES) & set(FAMILIES)
