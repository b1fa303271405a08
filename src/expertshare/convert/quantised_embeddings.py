"""A source whose embedding and head come out in int8; everything else as it was."""

from __future__ import annotations

from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.convert.source import ExpertSource
from expertshare.convert.tensor_file import DTYPES, TensorEntry
from expertshare.errors import CheckpointError, ConfigError, NumericsError, nearest
from expertshare.experts.layout import EMBEDDINGS
from expertshare.kernels.quantise import quantise_table, table_shapes
from expertshare.models.quantised_vocabulary import PARTS, is_vocabulary
from expertshare.models.table import FAMILIES
from expertshare.types import ExpertBank, QuantisedBank


def check_embeddings(name: str) -> None:
    """Raise ConfigError for a way of storing embeddings that there is not."""
    if name not in EMBEDDINGS:
        raise ConfigError(f"unknown quantisation of embeddings {name!r}. {nearest(name, EMBEDDINGS)}")


def embeddings_setting(name: str) -> dict[str, str]:
    """What a workspace's settings say of it: nothing where nothing is quantised, as before there was a choice."""
    return {} if name == "none" else {"embeddings": name}


class QuantisedEmbeddings:
    """An ExpertSource. Codes and scales are each computed from the whole tensor when they are asked for, so that
    neither waits in memory for the other."""

    def __init__(self, source: ExpertSource) -> None:
        self._source = source
        places = FAMILIES[source.config.family].places(source.config)
        names = {place.name for place in places if is_vocabulary(place)}
        self._parts = {f"{name}.{part}": (name, part) for name in names for part in PARTS}
        self._dense = tuple(part for entry in source.dense for part in _entries(entry, names))

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self._source.config

    @property
    def dense(self) -> tuple[TensorEntry, ...]:
        """Everything but the routed experts."""
        return self._dense

    def tensor(self, name: str) -> Tensor:
        """One dense tensor, or the codes or scales of one."""
        if name not in self._parts:
            return self._source.tensor(name)
        whole, part = self._parts[name]
        try:
            tensor = self._source.tensor(whole)
            weight = quantise_table(tensor if tensor.dtype == DTYPES["BF16"] else tensor.float())
        except NumericsError as error:
            raise CheckpointError(f"{whole} cannot be quantised: {error}") from error
        return weight.codes_PC if part == "codes" else weight.scales_PG

    def expert(self, moe_layer: int, expert: int) -> ExpertBank | QuantisedBank:
        """As the source has it."""
        return self._source.expert(moe_layer, expert)


def _entries(entry: TensorEntry, names: set[str]) -> list[TensorEntry]:
    if entry.name not in names:
        return [entry]
    rows, depth = entry.shape
    layout = table_shapes(rows, depth)
    return [TensorEntry(f"{entry.name}.{part}", dtype, layout[part][0]) for part, dtype in PARTS.items()]
