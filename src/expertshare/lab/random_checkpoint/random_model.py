"""Random tensors of a real model's shapes, each drawn when it is asked for, with routers that share like trained ones.

Nothing is kept but the routers: a tensor is a function of the seed and its name. docs/memory.md describes the method.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.convert.source import is_expert
from expertshare.convert.tensor_file import DTYPES, TensorEntry
from expertshare.lab.bench.weights import fill
from expertshare.lab.random_checkpoint.pool import ExpertPool
from expertshare.models.family import Place
from expertshare.models.table import FAMILIES
from expertshare.models.transformer import MoETransformer
from expertshare.types import ExpertBank

POOL_SIZE = 8
"""Experts drawn per layer."""
COMMON_SHARE = 0.2
"""Share of an embedding's variance that all tokens have in common: what a concentrated router can hold on to."""
MASK_GAIN = 0.5
"""Size of the mask's embedding, which is the common direction and nothing else: a mask says nothing of its own."""
SHARPNESS = 3.0
"""Norm weight of queries and keys: logits of attention spread by its square, so that positions look elsewhere."""
ATTENTION_GAIN = 2.0
"""Of what attention adds over what experts add: masks differ by nothing but where they look."""
TEXT_GAIN = 3.0
"""Head rows of printable characters are this much larger, so that answers are text."""
SILU_PRODUCT_RMS = 0.6
"""Root mean square of silu(a) * b for independent normal a and b."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What decides about every byte. unique: experts per block and layer that vanilla routing should use."""

    config: ModelConfig
    unique: int
    seed: int
    dtype: str = "BF16"
    pool_size: int = POOL_SIZE


class RandomTensors:
    """Draws dense tensors by Hugging Face name and pools by layer."""

    def __init__(self, recipe: Recipe, text_ids: range) -> None:
        self.recipe, self._text_ids = recipe, text_ids
        family = FAMILIES[recipe.config.family]
        self.places = {place.name: place for place in family.places(recipe.config) if not is_expert(place)}
        with torch.device("meta"):
            state = MoETransformer(recipe.config).state_dict()
        self.entries = tuple(
            TensorEntry(name, self._dtype(place), tuple(place.of(state[place.entry]).shape))
            for name, place in self.places.items()
        )
        self._shapes = {entry.name: entry for entry in self.entries}

    def draw(self, name: str) -> Tensor:
        """One dense tensor; routers as they are before they are concentrated."""
        entry, place = self._shapes[name], self.places[name]
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        if place.entry.endswith("router.bias"):
            return tensor.zero_()
        if place.entry.endswith("norm.weight"):
            sharp = place.entry.endswith(("q_norm.weight", "k_norm.weight"))
            return tensor.fill_(SHARPNESS if sharp else 1.0)
        fill(tensor, self._std(place, entry), self._generator(name))
        if place.entry == "embed.weight":
            self._share_direction(tensor)
        if place.entry == "head.weight":
            self._prefer_text(tensor)
        return tensor

    def pool(self, moe_layer: int) -> ExpertPool:
        """The drawn experts of one layer."""
        config, recipe = self.recipe.config, self.recipe
        size, dtype = min(recipe.pool_size, config.router.num_experts), DTYPES[recipe.dtype]
        inner, hidden = config.expert_hidden, config.hidden_size
        generator = self._generator(f"experts {moe_layer}")
        gate_up = fill(torch.empty(size, 2 * inner, hidden, dtype=dtype), hidden**-0.5, generator)
        std = self._residual_gain() / SILU_PRODUCT_RMS * inner**-0.5
        return ExpertPool(
            ExpertBank(gate_up, fill(torch.empty(size, hidden, inner, dtype=dtype), std, generator)),
            config.router.num_experts,
        )

    def _dtype(self, place: Place) -> str:
        return "F32" if ".router." in place.entry else self.recipe.dtype

    def _std(self, place: Place, entry: TensorEntry) -> float:
        """Projections keep the size of what they are given; those that write to the residual stream are damped."""
        if place.entry == "embed.weight":
            return math.sqrt(1.0 - COMMON_SHARE)
        std = 1.0 / math.sqrt(entry.shape[-1])
        if place.entry.endswith("attention.out.weight"):
            return std * self._residual_gain() * ATTENTION_GAIN
        if place.entry.endswith("down.weight"):
            return std * self._residual_gain() / SILU_PRODUCT_RMS
        return std

    def _residual_gain(self) -> float:
        """1 / sqrt(2 * layers): all contributions together are as large as an embedding."""
        return 1.0 / math.sqrt(2 * self.recipe.config.num_layers)

    def _share_direction(self, embedding_VD: Tensor) -> None:
        """One direction in every embedding, and nothing else in that of the mask."""
        direction_D = torch.empty(embedding_VD.shape[1])
        fill(direction_D, math.sqrt(COMMON_SHARE), self._generator("common direction"))
        embedding_VD[self.recipe.config.mask_id].zero_()
        for rows in torch.split(embedding_VD, 4096):
            rows.add_(direction_D.to(rows.dtype))
        embedding_VD[self.recipe.config.mask_id].mul_(MASK_GAIN)

    def _prefer_text(self, head_VD: Tensor) -> None:
        head_VD[self._text_ids.start : self._text_ids.stop].mul_(TEXT_GAIN)
        for token in {*self.recipe.config.eos_ids, self.recipe.config.mask_id}:
            head_VD[token].zero_()

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self.recipe.seed, zlib.crc32(name.encode())]))
