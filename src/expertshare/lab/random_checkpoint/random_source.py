"""A random model as something to write: experts, routers and head come out as they are asked for, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.convert.scheme import Scheme
from expertshare.convert.tensor_file import TensorEntry
from expertshare.lab.random_checkpoint.calibration import Calibration, LayerUse
from expertshare.lab.random_checkpoint.characters import printable_ids
from expertshare.lab.random_checkpoint.pool import ExpertPool
from expertshare.lab.random_checkpoint.random_model import RandomTensors, Recipe
from expertshare.types import ExpertBank, QuantisedBank

_ROWS_AT_A_TIME = 4096


class RandomSource:
    """An ExpertSource. scheme: how the pool is quantised, once per layer; "none" gives floats.

    Memory: one layer's pool (8 experts), one dense tensor, all routers, and a few blocks of hidden states.
    """

    def __init__(self, recipe: Recipe, scheme: Scheme) -> None:
        self._recipe, self._scheme = recipe, scheme
        text_ids = printable_ids(recipe.config)
        self._tensors = RandomTensors(recipe, text_ids)
        self._calibration = Calibration(self._tensors, text_ids)
        self._uses: list[LayerUse] = []
        self._pool: tuple[int, ExpertPool, ExpertBank | QuantisedBank] | None = None

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self._recipe.config

    @property
    def dense(self) -> tuple[TensorEntry, ...]:
        """Everything but the routed experts."""
        return self._tensors.entries

    def uses(self) -> tuple[LayerUse, ...]:
        """What the calibration blocks did in each MoE layer."""
        self._advance(self.config.num_layers)
        return tuple(self._uses[self.config.num_dense_layers :])

    @torch.no_grad()
    def tensor(self, name: str) -> Tensor:
        """One dense tensor; a router once the layers before it have run."""
        entry = self._tensors.places[name].entry
        if entry.endswith("moe.router.weight"):
            self._advance(int(entry.split(".")[1]) + 1)
            return self._calibration.routers[name]
        tensor = self._tensors.draw(name)
        if entry == "head.weight":
            self._advance(self.config.num_layers)
            _make_blind(tensor, self._calibration.common_direction())
        return tensor

    @torch.no_grad()
    def expert(self, moe_layer: int, expert: int) -> ExpertBank | QuantisedBank:
        """One expert, in the form in which it is stored."""
        if self._pool is None or self._pool[0] != moe_layer:
            self._pool = None  # let go of one layer before the next is drawn
            pool = self._tensors.pool(moe_layer)
            self._pool = (moe_layer, pool, self._scheme.quantise(pool.bank))
        _, pool, stored = self._pool
        return pool.expert(expert, stored)

    @torch.no_grad()
    def _advance(self, num_layers: int) -> None:
        """Carry the calibration blocks behind layer `num_layers` - 1."""
        for index in range(len(self._uses), num_layers):
            moe_layer = index - self.config.num_dense_layers
            pool = self._tensors.pool(moe_layer) if moe_layer >= 0 else None
            self._uses.append(self._calibration.run(index, pool))


def _make_blind(head_VD: Tensor, direction_D: Tensor) -> None:
    """Take out of every row what all positions have in common: it would give all of them the same token."""
    for rows in torch.split(head_VD, _ROWS_AT_A_TIME):
        own = rows.float()
        rows.copy_(own - torch.outer(own @ direction_D, direction_D))
