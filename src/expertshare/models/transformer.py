"""The one transformer behind every family: dense layers first, then mixture-of-experts layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from expertshare.config import ModelConfig
from expertshare.kernels import Backend, LayerKeyValues, Past, TorchBackend
from expertshare.models.layers import Attention, QuantisedVocabulary, RMSNorm, SwiGLU, rotary_tables
from expertshare.models.moe import AbsentExperts, MoE
from expertshare.models.runtime import ForwardInput, ForwardOutput, RoutingTrace, Runtime
from expertshare.types import Routed

TORCH = TorchBackend()


class Layer(nn.Module):
    """Attention, then a dense MLP or experts, each behind a norm and around a residual."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = index < config.num_dense_layers
        self.mlp = SwiGLU(config.hidden_size, config.dense_hidden) if dense else None
        self.moe = None if dense else MoE(config, index - config.num_dense_layers)

    def forward(
        self,
        x_BSD: Tensor,
        delta_BSD: Tensor | None,
        inputs: ForwardInput,
        tables: tuple[Tensor, Tensor],
        past: Past | None,
        runtime: Runtime,
    ) -> tuple[Tensor, Tensor, LayerKeyValues, Routed | None]:
        """delta: what the residual stream x still lacks. Returns the same two for the next layer (a sum and the norm
        behind it are one operation), this layer's new keys and values, and its routing if it has experts."""
        backend = runtime.backend
        with runtime.timed("attention"):
            if delta_BSD is None:
                h_BSD = self.attention_norm(x_BSD, backend)
            else:
                x_BSD, h_BSD = self.attention_norm.of_sum(x_BSD, delta_BSD, backend)
            y_BSD, new = self.attention(h_BSD, tables, inputs.mask_BSP, past, backend)
        x_BSD, h_BSD = self.mlp_norm.of_sum(x_BSD, y_BSD, backend)
        if self.mlp is not None:
            return x_BSD, self.mlp(h_BSD, backend), new, None
        assert self.moe is not None
        length = inputs.block_length
        h_GLD = h_BSD.reshape(-1, length, h_BSD.shape[-1])
        masked_GL = None if inputs.masked_BS is None else inputs.masked_BS.reshape(-1, length)
        previous = inputs.previous[self.moe.moe_layer] if inputs.previous else None
        y_GLD, routed = self.moe(h_GLD, inputs.live_BS.reshape(-1, length), runtime, masked_GL, previous)
        return x_BSD, y_GLD.view(x_BSD.shape), new, routed


class MoETransformer(nn.Module):
    """An MoE diffusion language model. Predictions are for the same position as the token (no shift).

    embed and head may be a QuantisedVocabulary each (models.layers), the same one where they are tied.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed: nn.Embedding | QuantisedVocabulary = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head: nn.Linear | QuantisedVocabulary = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    @property
    def device(self) -> torch.device:
        """The device where the weights are."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and activations."""
        return self.norm.weight.dtype

    def forward(self, inputs: ForwardInput, runtime: Runtime, past: Sequence[Past] | None = None) -> ForwardOutput:
        """Run all layers; `past` holds the keys and values of finished blocks, one entry per layer."""
        x_BSD = runtime.backend.embed(inputs.tokens_BS, self.embed.weight, self.dtype)
        cos, sin = rotary_tables(inputs.positions_BS, self.config)
        tables = (cos.to(x_BSD.dtype), sin.to(x_BSD.dtype))
        delta_BSD: Tensor | None = None
        key_values: list[LayerKeyValues] = []
        routings: list[Routed] = []
        for index, layer in enumerate(self.layers):
            of_layer = past[index] if past is not None else None
            x_BSD, delta_BSD, new, routing = layer(x_BSD, delta_BSD, inputs, tables, of_layer, runtime)
            key_values.append(new)
            if routing is not None:
                routings.append(routing)
        assert delta_BSD is not None  # a model has layers
        _, hidden_BSD = self.norm.of_sum(x_BSD, delta_BSD, runtime.backend)
        trace = RoutingTrace(
            torch.stack([routed.load_E for routed in routings]),
            torch.stack([routed.group_experts_G for routed in routings]),
            tuple(routed.coreset for routed in routings),
        )
        return ForwardOutput(hidden_BSD, tuple(key_values), trace)

    def logits(self, hidden_RD: Tensor, *, backend: Backend = TORCH) -> Tensor:
        """Vocabulary scores of chosen rows: [R, V] in the model's dtype."""
        return backend.logits(hidden_RD, self.head.weight)

    def best_tokens(self, hidden_RD: Tensor, excluded: Sequence[int], *, backend: Backend) -> tuple[Tensor, Tensor]:
        """The most probable token of chosen rows and its probability, `excluded` ids left out: Backend.best_token."""
        return backend.best_token(hidden_RD, self.head.weight, excluded)


def leave_out_experts(model: MoETransformer) -> None:
    """Make a model whose experts come from the runtime's store."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts = AbsentExperts()


def quantise_vocabulary(model: MoETransformer) -> None:
    """Put int8 tables in the place of embedding and head, on their device, uninitialised; one where they are tied."""
    size = (model.config.vocab_size, model.config.hidden_size)
    with torch.device(model.device):
        model.embed = QuantisedVocabulary(*size)
        model.head = model.embed if model.config.tie_embeddings else QuantisedVocabulary(*size)


def initialise(model: MoETransformer, *, seed: int, std: float = 0.02) -> None:
    """Fill every weight from a normal distribution (norms with ones, router biases with zeros), reproducibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        for buffer in model.buffers():
            buffer.zero_()
