"""Load a model from a Hugging Face layout, straight into the fused parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from expertshare.config import ModelConfig
from expertshare.errors import CheckpointError, ConfigError
from expertshare.experts import ExpertLayout, ExpertMemory, has_expert_layout, read_manifest
from expertshare.experts.layout import DENSE
from expertshare.models.checkpoint import (
    StoredTensor,
    check_names,
    check_tensors,
    choose_places,
    read_headers,
    read_tensors,
)
from expertshare.models.devices import usable_device
from expertshare.models.family import Place
from expertshare.models.fits import check_fits
from expertshare.models.moe import Router, lay_side_by_side, narrow
from expertshare.models.quantised_vocabulary import QuantisedVocabulary, quantised_places
from expertshare.models.source import read_json, read_optional_json, resolve_source
from expertshare.models.table import family_of
from expertshare.models.tokenizer import load_tokenizer, token_ids
from expertshare.models.transformer import MoETransformer, leave_out_experts, quantise_vocabulary
from expertshare.native import ask_for_huge_pages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model that is ready to run, what it was loaded from, and its tokenizer (None where it comes with none).

    layout: of a converted model, whose experts are not in `model`: open a store for them (experts.open_store).
    """

    model: MoETransformer
    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase | None
    path: Path
    layout: ExpertLayout | None = None


def load_model(
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    expert_memory: ExpertMemory | None = None,
) -> LoadedModel:
    """Load a directory or a hub id. dtype: float32 or bfloat16, by default the checkpoint's own.

    Of a directory that `expertshare convert` wrote, everything but the experts is loaded. Routers compute in float32
    whatever the dtype. A float16 checkpoint is computed in float32 unless told otherwise. device: cpu or cuda.
    expert_memory: what will be given to the experts of a converted model, where that is known.
    Raises InputError, ConfigError or CheckpointError, each naming the file, key or tensor; ExpertMemoryError, before
    weights are read, for a model that does not fit into memory.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    device = usable_device(device)
    path = resolve_source(source)
    raw = read_json(path / "config.json")
    family = family_of(raw)
    tokenizer = load_tokenizer(path)
    generation = read_optional_json(path / "generation_config.json")
    config = family.parse_config(raw, generation, token_ids(tokenizer))
    _check_vocabulary(tokenizer, config)
    layout = read_manifest(path) if has_expert_layout(path) else None
    stored = read_headers(path) if layout is None else read_headers(path, DENSE)
    check_fits(path, expert_memory, dtype=dtype, device=device, stored=stored)
    places = choose_places(family, config, stored)
    with torch.device("meta"):
        model = MoETransformer(config)
    if layout is not None:
        check_layout(layout, config, dtype)
        leave_out_experts(model)
        places = [place for place in places if ".experts." not in place.entry]
        dtype = dtype or layout.format.float_dtype or _own_dtype(stored, places)
        if layout.embeddings != "none":
            places = [part for place in places for part in quantised_places(place)]
            quantise_vocabulary(model)
    check_names(stored, places, path)
    check_tensors(stored, places, model.state_dict())
    model = _allocate(model, dtype or _own_dtype(stored, places), device)
    _fill(model, stored, places)
    if model.dtype is torch.bfloat16:
        narrow(_routers(model))
    return LoadedModel(model=model.eval(), config=config, tokenizer=tokenizer, path=path, layout=layout)


def check_layout(layout: ExpertLayout, config: ModelConfig, dtype: torch.dtype | None) -> None:
    """Raise CheckpointError unless the experts are those of `config`, ConfigError unless they compute in `dtype`."""
    form = layout.format
    found = (layout.num_layers, layout.num_experts, form.hidden, form.inner)
    expected = (config.num_moe_layers, config.router.num_experts, config.hidden_size, config.expert_hidden)
    if found != expected:
        raise CheckpointError(
            f"the expert files hold (MoE layers, experts, features, hidden features) = {found}, expected {expected} by "
            "config.json: convert the model again"
        )
    if dtype is not None and form.float_dtype not in (None, dtype):
        raise ConfigError(
            f"the experts are stored in {form.dtype}, and computed as they are stored; expected that dtype, got "
            f"{str(dtype).removeprefix('torch.')}: leave it out, or convert the model to it"
        )


def _allocate(model: MoETransformer, dtype: torch.dtype, device: str | torch.device) -> MoETransformer:
    """Memory for a model on the meta device, uninitialised: the checkpoint fills all of it."""
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(module, (Router, QuantisedVocabulary)):
            module.float()
    model = model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        ask_for_huge_pages(tensor)
    lay_side_by_side(_routers(model))
    embed, head = model.embed, model.head
    # to_empty gave each of the two a tensor of its own
    if model.config.tie_embeddings and isinstance(embed, nn.Embedding) and isinstance(head, nn.Linear):
        head.weight = embed.weight
    return model


def _routers(model: MoETransformer) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def _fill(model: MoETransformer, stored: Mapping[str, StoredTensor], places: Sequence[Place]) -> None:
    state = model.state_dict()
    with torch.no_grad():
        for place, tensor in read_tensors(stored, places):
            if ".router." in place.entry and not tensor.isfinite().all():
                raise CheckpointError(
                    f"{place.name} in {stored[place.name].file} holds NaN or infinity, expected finite numbers: the "
                    "router would leave experts out without a word. Download the checkpoint again"
                )
            place.of(state[place.entry]).copy_(tensor)


def _own_dtype(stored: Mapping[str, StoredTensor], places: Sequence[Place]) -> torch.dtype:
    return torch.bfloat16 if stored_in_bfloat16(stored, places) else torch.float32


def stored_in_bfloat16(stored: Mapping[str, StoredTensor], places: Sequence[Place]) -> bool:
    """Whether a checkpoint's own dtype is bfloat16: by the embedding, or where that is quantised by the final norm."""
    names = (place.name for entry in ("embed.weight", "norm.weight") for place in places if place.entry == entry)
    return next((stored[name].dtype == "BF16" for name in names if name in stored), False)


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase | None, config: ModelConfig) -> None:
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model embeds {config.vocab_size} (vocab_size in "
            "config.json): they do not belong together"
        )
