"""How experts, embedding and head are stored: as they were, or quantised by one of the kernels' schemes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import cast

from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.convert.source import ExpertSource
from expertshare.convert.tensor_file import DTYPES, TensorEntry
from expertshare.errors import CheckpointError, ConfigError, NumericsError, nearest
from expertshare.experts.layout import EMBEDDINGS
from expertshare.experts.slab import SchemeName, SlabFormat
from expertshare.kernels.quantise import QUANTISATIONS, Scheme, quantise_bank, quantise_table, table_shapes
from expertshare.models.quantised_vocabulary import PARTS, is_vocabulary
from expertshare.models.table import FAMILIES
from expertshare.types import ExpertBank, QuantisedBank, QuantisedWeight

UNQUANTISED = "none"
SCHEMES = (UNQUANTISED, *QUANTISATIONS)
FLOAT_NAMES = {"F32": "float32", "F16": "float32", "BF16": "bfloat16"}
"""What experts of a checkpoint's dtype are in a slab. float32 holds every float16."""


@dataclass(frozen=True, slots=True)
class ExpertStorage:
    """A way of storing experts. dtype: of floats, "float32" or "bfloat16"; quantised slabs keep the default there."""

    name: SchemeName
    quantisation: Scheme | None = None
    dtype: str = "bfloat16"

    def slab(self, config: ModelConfig) -> SlabFormat:
        """The slabs of a model. Raises ConfigError where its widths do not divide into the scheme's groups."""
        sizes = {"hidden": config.hidden_size, "inner": config.expert_hidden}
        if self.quantisation is None:
            return SlabFormat(scheme=self.name, dtype=self.dtype, **sizes)  # type: ignore[arg-type]
        return SlabFormat(
            scheme=self.name,
            group_size=self.quantisation.group_size or 0,
            has_minima=not self.quantisation.symmetric,
            **sizes,  # type: ignore[arg-type]
        )

    def quantise(self, bank: ExpertBank) -> ExpertBank | QuantisedBank:
        """The bank as it is stored."""
        if self.quantisation is None:
            return bank
        try:
            return quantise_bank(bank, self.quantisation)
        except NumericsError as error:
            raise CheckpointError(f"an expert cannot be quantised: {error}") from error

    def matrices(self, bank: ExpertBank | QuantisedBank) -> dict[str, Tensor]:
        """The parts of a slab, by name, of a bank of one expert, which is quantised first where it has to be."""
        stored = self.quantise(bank) if isinstance(bank, ExpertBank) else bank
        if isinstance(stored, ExpertBank):
            return {"gate_up": stored.gate_up_EHD[0], "down": stored.down_EDF[0]}
        return {**_weight_parts("gate_up", stored.gate_up), **_weight_parts("down", stored.down)}


def make_scheme(name: str, *, group_size: int | None = None, expert_dtype: str = "BF16") -> ExpertStorage:
    """A scheme by name. group_size: for int4 only. expert_dtype: of the experts to be stored, as safetensors names it.

    Raises ConfigError for an unknown name or a group size that the scheme does not have.
    """
    if name not in SCHEMES:
        raise ConfigError(f"unknown quantisation {name!r}. {nearest(name, SCHEMES)}")
    kind = cast(SchemeName, name)
    quantisation = QUANTISATIONS.get(name)
    if group_size is not None:
        if quantisation is None or quantisation.group_size is None:
            raise ConfigError(f"a group size belongs to int4, got {group_size} for {name}: leave --group-size out")
        quantisation = replace(quantisation, group_size=group_size)
    if quantisation is not None:
        return ExpertStorage(kind, quantisation)
    return ExpertStorage(kind, dtype=FLOAT_NAMES[expert_dtype])


def _weight_parts(projection: str, weight: QuantisedWeight) -> dict[str, Tensor]:
    """The tensors of a bank of one, under the names of slab parts."""
    tensors = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {f"{projection}.{name}": value[0] for name, value in tensors.items() if isinstance(value, Tensor)}


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
        """The configuration of the model."""
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
