"""A random model as something to write: experts, routers and head come out as they are asked for, layer by layer.

A few blocks are carried through the model, to concentrate each router on what it really sees. They are those of a
generation at several moments: a prompt of random characters and an answer block of which 90, 70, 50, 30 and 10 % are
still masked. Decoding visits all of these in equal measure, so the mean over them stands for the mean over steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.convert.storage import as_stored
from expertshare.decoding.forwards import block_causal_mask
from expertshare.experts.slab import SlabFormat
from expertshare.lab.bench.weights import concentrated, mean_unique
from expertshare.lab.random_checkpoint.characters import printable_ids
from expertshare.lab.random_checkpoint.random_tensors import ExpertPool, RandomModel, RandomTensors
from expertshare.models.layers import rotary_tables
from expertshare.models.moe import MoE
from expertshare.models.runtime import ForwardInput, Runtime
from expertshare.models.transformer import Layer
from expertshare.routing import make_policy, route, router_scores
from expertshare.types import ExpertBank, QuantisedBank

MASKED_SHARES = (0.9, 0.7, 0.5, 0.3, 0.1)
PROMPT_BLOCKS = 2
_ROWS_AT_A_TIME = 4096


class RandomSource:
    """An ExpertSource. form: of the slabs that experts are stored in; a layer's pool is quantised once.

    Memory: one layer's pool (8 experts), one dense tensor, all routers, and a few blocks of hidden states.
    """

    def __init__(self, model: RandomModel, form: SlabFormat) -> None:
        text_ids = printable_ids(model.config)
        self._model, self._form, self._tensors = (model, form, RandomTensors(model, text_ids))
        self.config, self.dense = model.config, tuple(self._tensors.entries.values())
        self._preferences = torch.Generator().manual_seed(model.seed)
        self._inputs = _blocks(model.config, text_ids, self._preferences)
        embedding = next(name for name, target in self._tensors.targets.items() if target.entry == "embed.weight")
        self._x_BSD = self._tensors.draw(embedding)[self._inputs.tokens_BS].float()
        self._tables = rotary_tables(self._inputs.positions_BS, model.config)
        self._routers: dict[int, Tensor] = {}
        self._unique: list[float] = []
        self._activations: list[float] = []
        self._pool: tuple[int, ExpertPool, ExpertBank | QuantisedBank] | None = None

    @torch.no_grad()
    def tensor(self, name: str) -> Tensor:
        """One dense tensor; a router once the layers before it have run."""
        entry = self._tensors.targets[name].entry
        if entry.endswith("moe.router.weight"):
            index = int(entry.split(".")[1])
            self._advance(index + 1)
            return self._routers[index]
        tensor = self._tensors.draw(name)
        if entry == "head.weight":
            self._advance(self.config.num_layers)
            _make_blind(tensor, self._common_direction())
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

    def measured(self) -> dict[str, list[float]]:
        """What vanilla routing does with the answer blocks in each MoE layer: unique experts, mean over blocks; and the
        root mean square of the residual stream behind the layer."""
        self._advance(self.config.num_layers)
        first = self.config.num_dense_layers
        return {"unique_by_layer": self._unique, "activations": self._activations[first:]}

    @torch.no_grad()
    def _advance(self, num_layers: int) -> None:
        """Carry the blocks behind layer `num_layers` - 1. The routers of the layers are concentrated on them."""
        runtime = Runtime(policy=make_policy("vanilla").bind(self.config.router))
        for index in range(len(self._activations), num_layers):
            layer, backend = self._layer(index), runtime.backend
            normed_BSD = layer.attention_norm(self._x_BSD, backend)
            y_BSD, _ = layer.attention(normed_BSD, self._tables, self._inputs.mask_BSP, None, backend)
            x_BSD = self._x_BSD + y_BSD
            h_BSD = layer.mlp_norm(x_BSD, backend)
            if layer.mlp is not None:
                self._x_BSD = x_BSD + layer.mlp(h_BSD, backend)
            else:
                assert layer.moe is not None
                self._x_BSD = x_BSD + self._run_experts(index, layer.moe, h_BSD, runtime)
            self._activations.append(float(self._x_BSD.square().mean().sqrt()))

    def _run_experts(self, index: int, moe: MoE, h_BSD: Tensor, runtime: Runtime) -> Tensor:
        """What the experts of a layer add, once its router is concentrated."""
        config, spec = self.config, self.config.router
        preference_E = torch.randn(spec.num_experts, generator=self._preferences)
        answers_GLD = h_BSD[:, -config.block_length :]
        weight_ED = concentrated(
            moe.router.weight, preference_E, answers_GLD, moe.router.bias, spec, self._model.unique
        )
        moe.router.weight.copy_(weight_ED)
        self._routers[index] = weight_ED
        h_GLD = h_BSD.reshape(-1, config.block_length, h_BSD.shape[-1])
        live_GL = torch.ones(h_GLD.shape[:2], dtype=torch.bool)
        _, plan = route(router_scores(moe.router(h_GLD), live_GL, spec, moe.router.bias), runtime.policy, spec)
        pool = self._tensors.pool(index - config.num_dense_layers)
        y_TD = pool.compute(h_BSD.flatten(0, 1), plan)
        if moe.shared is not None:
            y_TD = y_TD + moe.shared(h_BSD.flatten(0, 1), runtime.backend)
        ids_BSK = plan.expert_ids_TK.view(*h_BSD.shape[:2], -1)[:, -config.block_length :]
        self._unique.append(mean_unique(ids_BSK.flatten(0, 1), len(h_BSD), spec))
        return y_TD.view(h_BSD.shape)

    def _common_direction(self) -> Tensor:
        """Unit vector [D] along the mean of the answers' final hidden states."""
        x_LD = self._x_BSD[:, -self.config.block_length :].flatten(0, 1)
        mean_D = (x_LD * torch.rsqrt(x_LD.square().mean(dim=-1, keepdim=True) + self.config.rms_norm_eps)).mean(dim=0)
        return torch.nn.functional.normalize(mean_D, dim=0)

    def _layer(self, index: int) -> Layer:
        """The layer's dense weights in float32; its experts stay without memory."""
        with torch.device("meta"):
            layer = Layer(self.config, index)
        if layer.moe is not None:
            del layer.moe.experts
        layer = layer.to_empty(device="cpu").requires_grad_(False).eval()
        state, prefix = layer.state_dict(), f"layers.{index}."
        for name, target in self._tensors.targets.items():
            if target.entry.startswith(prefix):
                whole = state[target.entry.removeprefix(prefix)]
                target.of(whole).copy_(self._tensors.draw(name))
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
    live_BS = torch.ones(size, dtype=torch.bool)
    return ForwardInput(
        tokens_BS=tokens_BS,
        positions_BS=torch.arange(size[1]).expand(size),
        live_BS=live_BS,
        mask_BSP=block_causal_mask(live_BS, size[1] if config.attention == "full" else length),
        block_length=length,
    )


def _make_blind(head_VD: Tensor, direction_D: Tensor) -> None:
    """Take out of every row what all positions have in common: it would give all of them the same token."""
    for rows in torch.split(head_VD, _ROWS_AT_A_TIME):
        own = rows.float()
        rows.copy_(own - torch.outer(own @ direction_D, direction_D))
