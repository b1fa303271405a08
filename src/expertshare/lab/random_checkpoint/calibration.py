"""Carries a few blocks through a random model, layer by layer, to concentrate each router on what it really sees.

The blocks are those of a generation at several moments: a prompt of random characters and an answer block of which 90,
70, 50, 30 and 10 % are still masked. Decoding visits all of these in equal measure, so the mean over them stands for
the mean over steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.lab.bench.concentration import concentrated, mean_unique
from expertshare.lab.random_checkpoint.pool import ExpertPool
from expertshare.lab.random_checkpoint.random_model import RandomTensors
from expertshare.models.layers import rotary_tables
from expertshare.models.runtime import ForwardInput, Runtime
from expertshare.models.transformer import Layer
from expertshare.routing import make_policy, route, router_scores

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
        x_BSD = self._x_BSD
        normed_BSD = layer.attention_norm(x_BSD)
        y_BSD, _ = layer.attention(normed_BSD, self._tables, self._inputs.mask_BSP, None, backend=runtime.backend)
        x_BSD = x_BSD + y_BSD
        h_BSD = layer.mlp_norm(x_BSD)
        if layer.mlp is not None:
            self._x_BSD = x_BSD + layer.mlp(h_BSD, backend=runtime.backend)
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
            y_TD = y_TD + moe.shared(h_BSD.flatten(0, 1), backend=runtime.backend)
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
