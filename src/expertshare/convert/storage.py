"""How experts, embedding and head are stored: as they were, or quantised by one of the kernels' schemes."""

from __future__ import annotations

from dataclasses import fields, replace

from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.convert.source import DTYPES, ExpertSource, TensorEntry
from expertshare.errors import CheckpointError, ConfigError, NumericsError, nearest
from expertshare.experts.layout import EMBEDDINGS
from expertshare.experts.slab import SlabFormat
from expertshare.kernels.quantise import QUANTISATIONS, quantise_bank, quantise_table, table_shapes
from expertshare.models.family import PARTS, family_named, is_vocabulary
from expertshare.types import ExpertBank, QuantisedBank

QUANTISED_OR_NOT = ("none", *QUANTISATIONS)
FLOAT_NAMES = {"F32": "float32", "F16": "float32", "BF16": "bfloat16"}
"""What experts of a checkpoint's dtype are in a slab. float32 holds every float16."""


def slab_format(
    config: ModelConfig, quantise: str, *, group_size: int | None = None, expert_dtype: str = "BF16"
) -> SlabFormat:
    """The slabs of a model. quantise: none, int8 or int4. group_size: for int4 only. expert_dtype: of the experts to be
    stored, as safetensors names it.

    Raises ConfigError for an unknown name, a group size that there is not, or widths that groups do not divide.
    """
    if quantise not in QUANTISED_OR_NOT:
        raise ConfigError(f"unknown quantisation {quantise!r}. {nearest(quantise, QUANTISED_OR_NOT)}")
    scheme, hidden, inner = QUANTISATIONS.get(quantise), config.hidden_size, config.expert_hidden
    if group_size is not None:
        if scheme is None or scheme.group_size is None:
            raise ConfigError(f"a group size belongs to int4, got {group_size} for {quantise}: leave --group-size out")
        scheme = replace(scheme, group_size=group_size)
    if scheme is None:
        return SlabFormat(scheme="none", dtype=FLOAT_NAMES[expert_dtype], hidden=hidden, inner=inner)
    return SlabFormat(
        scheme=quantise, hidden=hidden, inner=inner, group_size=scheme.group_size or 0, has_minima=not scheme.symmetric
    )


def as_stored(bank: ExpertBank, form: SlabFormat) -> ExpertBank | QuantisedBank:
    """Float experts in the numbers that slabs of this format hold. Raises CheckpointError for ones that have no codes,
    such as NaN."""
    if form.scheme == "none":
        return bank
    scheme = QUANTISATIONS[form.scheme]
    try:
        return quantise_bank(bank, replace(scheme, group_size=form.group_size or None, symmetric=not form.has_minima))
    except NumericsError as error:
        raise CheckpointError(f"an expert cannot be quantised: {error}") from error


def slab_matrices(bank: ExpertBank | QuantisedBank) -> dict[str, Tensor]:
    """The parts of a slab, by name, of a bank of one expert as it is stored."""
    if isinstance(bank, ExpertBank):
        return {"gate_up": bank.gate_up_EHD[0], "down": bank.down_EDF[0]}
    return {
        f"{projection}.{field.name}": value[0]
        for projection, weight in (("gate_up", bank.gate_up), ("down", bank.down))
        for field in fields(weight)
        if isinstance(value := getattr(weight, field.name), Tensor)
    }


def check_embeddings(name: str) -> None:
    """Raise ConfigError for a way of storing embeddings that there is not."""
    if name not in EMBEDDINGS:
        raise ConfigError(f"unknown quantisation of embeddings {name!r}. {nearest(name, EMBEDDINGS)}")


def settings_of(layout: str, form: SlabFormat, embeddings: str, **source: object) -> dict[str, object]:
    """The settings of a workspace, which decide about every byte: how it is stored and what of. Nothing is said of
    embeddings that are not quantised, as before there was a choice."""
    quantised = {} if embeddings == "none" else {"embeddings": embeddings}
    return {"layout": layout, "slab": form.to_json(), **source, **quantised}


class QuantisedEmbeddings:
    """An ExpertSource. Codes and scales are each computed from the whole tensor when they are asked for, so that
    neither waits in memory for the other."""

    def __init__(self, source: ExpertSource) -> None:
        self._source, self.config, self.expert = source, source.config, source.expert
        places = family_named(source.config.family).targets(source.config)
        names = {place.name for place in places if is_vocabulary(place)}
        self._parts = {f"{name}.{part}": (name, part) for name in names for part in PARTS}
        self.dense = tuple(part for entry in source.dense for part in _entries(entry, names))

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


def _entries(entry: TensorEntry, names: set[str]) -> list[TensorEntry]:
    if entry.name not in names:
        return [entry]
    layout = table_shapes(*entry.shape)
    return [TensorEntry(f"{entry.name}.{part}", dtype, layout[part][0]) for part, dtype in PARTS.items()]
