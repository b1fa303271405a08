"""A random model as something to write: experts, routers and head come out as they are asked for, layer by layer.

A few blocks are carried through the model, to concentrate each router on what it really sees. They are those of a
generation at several moments: a prompt of random characters and an answer block of which 90, 70, 50, 30 and 10 % are
still masked. Decoding visits all of these in equal measure, so the mean over them stands for the mean over steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.convert.storage import as_stored
from expertshare.experts.slab import SlabFormat
from expertshare.lab.bench.weights import concentrated, mean_unique
from expertshare.lab.random_checkpoint.characters import printable_ids
from expertshare.lab.random_checkpoint.random_tensors import ExpertPool, RandomTensors, Recipe
from expertshare.models.layers import rotary_tables
from expertshare.models.runtime import ForwardInput, Runtime
from expertshare.models.transformer import Layer
from expertshare.routing import make_policy, route, router_scores
from expertshare.types import ExpertBank, QuantisedBank

MASKED_SHARES = (0.9, 0.7, 0.5, 0.3, 0.1)
PROMPT_BLOCKS = 2


@dataclass(frozen=True, slots=True)
class LayerUse:
    """What a layer's vanilla routing does with the answer blocks: unique experts, mean over blocks; the root mean
    square of the residual stream behind it."""

    unique: float
    activation: float


class Calibration:
    """The hidden states between two layers. Layers must be run in order, each once."""

    def __init__(self, tensors: RandomTensors, text_ids: range) -> None:
        self._tensors, self._config = tensors, tensors.recipe.config
        generator = torch.Generator().manual_seed(tensors.recipe.seed)
        self._preferences = generator
        self._inputs = _blocks(self._config, text_ids, generator)
        embedding = next(name for name, place in tensors.places.items() if place.entry == "embed.weight")
        self._x_BSD = tensors.draw(embedding)[self._inputs.tokens_BS].float()
        self._tables = rotary_tables(self._inputs.positions_BS, self._config)
        self.routers: dict[str, Tensor] = {}

    def run(self, index: int, pool: ExpertPool | None) -> LayerUse:
        """Concentrate layer `index`'s router (its weights are then in `routers` by name) and carry on behind it."""
        layer, config = self._layer(index), self._config
        runtime = Runtime(policy=make_policy("vanilla").bind(config.router))
        x_BSD, backend = self._x_BSD, runtime.backend
        normed_BSD = layer.attention_norm(x_BSD, backend)
        y_BSD, _ = layer.attention(normed_BSD, self._tables, self._inputs.mask_BSP, None, backend)
        x_BSD = x_BSD + y_BSD
        h_BSD = layer.mlp_norm(x_BSD, backend)
        if layer.mlp is not None:
            self._x_BSD = x_BSD + layer.mlp(h_BSD, backend)
            return LayerUse(0.0, float(self._x_BSD.square().mean().sqrt()))
        assert layer.moe is not None
        assert pool is not None
        moe, answers_GLD = layer.moe, h_BSD[:, -config.block_length :]
        preference_E = torch.randn(config.router.num_experts, generator=self._preferences)
        weight_ED = concentrated(
            moe.router.weight, preference_E, answers_GLD, moe.router.bias, config.router, self._tensors.recipe.unique
        )
        moe.router.weight.copy_(weight_ED)
        self.routers[self._router_name(index)] = weight_ED
        h_GLD = h_BSD.reshape(-1, config.block_length, h_BSD.shape[-1])
        live_GL = torch.ones(h_GLD.shape[:2], dtype=torch.bool)
        scores = router_scores(moe.router(h_GLD), live_GL, config.router, moe.router.bias)
        _, plan = route(scores, runtime.policy, config.router)
        y_TD = pool.compute(h_BSD.flatten(0, 1), plan)
        if moe.shared is not None:
            y_TD = y_TD + moe.shared(h_BSD.flatten(0, 1), backend)
        self._x_BSD = x_BSD + y_TD.view(x_BSD.shape)
        ids_BSK = plan.expert_ids_TK.view(*x_BSD.shape[:2], -1)[:, -config.block_length :]
        unique = mean_unique(ids_BSK.flatten(0, 1), len(x_BSD), config.router)
        return LayerUse(unique, float(self._x_BSD.square().mean().sqrt()))

    def common_direction(self) -> Tensor:
        """Unit vector [D] along the mean of the answers' final hidden states."""
        x_LD = self._x_BSD[:, -self._config.block_length :].flatten(0, 1)
        mean_D = (x_LD * torch.rsqrt(x_LD.square().mean(dim=-1, keepdim=True) + self._config.rms_norm_eps)).mean(dim=0)
        return torch.nn.functional.normalize(mean_D, dim=0)

    def _router_name(self, index: int) -> str:
        wanted = f"layers.{index}.moe.router.weight"
        return next(name for name, place in self._tensors.places.items() if place.entry == wanted)

    def _layer(self, index: int) -> Layer:
        """The layer's dense weights in float32; its experts stay without memory."""
        with torch.device("meta"):
            layer = Layer(self._config, index)
        if layer.moe is not None:
            del layer.moe.experts
        layer = layer.to_empty(device="cpu").requires_grad_(False).eval()
        state, prefix = layer.state_dict(), f"layers.{index}."
        for name, place in self._tensors.places.items():
            if place.entry.startswith(prefix):
                whole = state[place.entry.removeprefix(prefix)]
                place.of(whole).copy_(self._tensors.draw(name))
        return layer


def _blocks(config: ModelConfig, text_ids: range, generator: torch.Generator) -> ForwardInput:
    """One sequence for each masked share, all of the same prompt: tokens [B, S]."""
    length = config.block_length
    size = (len(MASKED_SHARES), (PROMPT_BLOCKS + 1) * length)
    tokens_BS = torch.randint(text_ids.start, text_ids.stop, size, generator=generator)
    tokens_BS[:, :-length] = tokens_BS[0, :-length]
    for row, share in enumerate(MASKED_SHARES):
        masked = torch.randperm(length, generator=generator)[: max(1, round(share * length))]
        tokens_BS[row, size[1] - length + masked] = config.mask_id
    positions_S = torch.arange(size[1])
    block_S = positions_S // length
    sees_SS = block_S.unsqueeze(1) >= block_S
    if config.attention == "full":
        sees_SS = torch.ones_like(sees_SS)
    return ForwardInput(
        tokens_BS=tokens_BS,
        positions_BS=positions_S.expand(size),
        live_BS=torch.ones(size, dtype=torch.bool),
        mask_BSP=sees_SS.expand(size[0], -1, -1),
        block_length=length,
    )


_ROWS_AT_A_TIME = 4096


class RandomSource:
    """An ExpertSource. form: of the slabs that experts are stored in; the pool is quantised once per layer.

    Memory: one layer's pool (8 experts), one dense tensor, all routers, and a few blocks of hidden states.
    """

    def __init__(self, recipe: Recipe, form: SlabFormat) -> None:
        self._form = form
        text_ids = printable_ids(recipe.config)
        self._tensors = RandomTensors(recipe, text_ids)
        self.config, self.dense = recipe.config, self._tensors.entries
        self._calibration = Calibration(self._tensors, text_ids)
        self._uses: list[LayerUse] = []
        self._pool: tuple[int, ExpertPool, ExpertBank | QuantisedBank] | None = None

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
            self._pool = (moe_layer, pool, as_stored(pool.bank, self._form))
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
