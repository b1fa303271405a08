"""An embedding or a head in int8: codes and scales as they are on disk, widened a row or a slice at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from expertshare.errors import ConfigError
from expertshare.kernels.quantise import table_shapes
from expertshare.models.family import Place
from expertshare.types import QuantisedTable

if TYPE_CHECKING:
    from expertshare.models.transformer import MoETransformer

PARTS = {"codes": "I8", "scales": "F32"}
"""The tensors that stand for one: its name in the file, with .codes and .scales, and their dtypes there."""
_ENTRIES = ("embed.weight", "head.weight")


class QuantisedVocabulary(nn.Module):
    """The codes and scales of a QuantisedTable: buffers, since nothing trains them."""

    def __init__(self, vocabulary: int, depth: int) -> None:
        super().__init__()
        for name, (shape, part) in table_shapes(vocabulary, depth).items():
            self.register_buffer(name, torch.empty(shape, dtype=part))
        self.codes: Tensor
        self.scales: Tensor
        self.num_rows = vocabulary

    @property
    def weight(self) -> QuantisedTable:
        """What a backend takes in the place of float weights."""
        return QuantisedTable(self.codes, self.scales, self.num_rows)


def is_vocabulary(place: Place) -> bool:
    """Whether a tensor is the embedding or the head."""
    return place.entry in _ENTRIES


def quantised_places(place: Place) -> list[Place]:
    """Where the parts of a quantised embedding or head lie; any other place as it is."""
    if not is_vocabulary(place):
        return [place]
    entry = place.entry.removesuffix("weight")
    return [Place(f"{place.name}.{part}", f"{entry}{part}") for part in PARTS]


def refuse_quantised_vocabulary(model: MoETransformer, purpose: str) -> None:
    """Raise ConfigError for a model whose embedding or head is quantised: its own weights are gone."""
    if isinstance(model.embed, QuantisedVocabulary):
        raise ConfigError(
            f"{purpose} needs float weights, but this model's embedding and head are in int8: take the checkpoint that "
            "it was converted from"
        )
