"""Stand-ins for remote code: LLaDA2, LLaDA-MoE and SDAR routers and blocks, written from their published interface.

LLaDA2's gate returns (ids, weights, logits), and its block counts the tokens of an expert by setting bits; LLaDA-MoE's
and SDAR's blocks choose for themselves from the logits of a linear gate. The layers around them are as plain as can be.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, INNER, VOCAB = 16, 8, 50


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LLaDA2Gate(nn.Module):
    """Sigmoid, a bias for selection, groups by the sum of their top 2, weights normalised and scaled."""

    def __init__(self, num_experts: int = 16, top_k: int = 4, n_group: int = 4, topk_group: int = 2) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.n_group, self.topk_group = n_group, topk_group
        self.routed_scaling_factor = 2.5
        self.weight = nn.Parameter(torch.randn(num_experts, HIDDEN))
        self.register_buffer("expert_bias", torch.randn(num_experts) / 10)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        logits = F.linear(hidden_states.float(), self.weight.float())
        scores = logits.sigmoid()
        choice = scores + self.expert_bias.float()
        groups = choice.view(len(choice), self.n_group, -1)
        best_groups = groups.topk(2, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1).indices
        outside = torch.ones(len(choice), self.n_group, dtype=torch.bool).scatter(1, best_groups, False)
        choice = groups.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1)
        ids = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.routed_scaling_factor
        return ids, weights, logits


class LLaDA2Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = LLaDA2Gate()
        self.experts = nn.ModuleList(Mlp() for _ in range(self.gate.num_experts))
        self.shared_experts = Mlp()

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        ids, weights, logits = self.gate(hidden_states)
        flat = hidden_states.view(-1, HIDDEN)
        counts = ids.new_zeros(len(ids), len(self.experts)).scatter_(1, ids, 1).sum(0).tolist()
        assert sum(counts) == ids.numel(), "an expert twice in a token would be lost here"
        order = ids.flatten().argsort()
        rows = flat[order // ids.shape[1]].split(counts)
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, rows, strict=True)])
        y = torch.empty_like(outputs).index_copy_(0, order, outputs).view(*ids.shape, -1)
        y = (y.float() * weights.unsqueeze(-1)).sum(1).to(flat.dtype).view_as(hidden_states)
        return y + self.shared_experts(hidden_states), (logits, ids)


class LinearGateBlock(nn.Module):
    """LLaDA-MoE (norm_topk_prob False) and SDAR (True): softmax over all experts in float32, then top-k."""

    def __init__(self, *, norm_topk_prob: bool) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.norm_topk_prob = 16, 4, norm_topk_prob
        self.gate = nn.Linear(HIDDEN, self.num_experts, bias=False)
        nn.init.normal_(self.gate.weight)
        self.experts = nn.ModuleList(Mlp() for _ in range(self.num_experts))
        self.chosen: Tensor | None = None
        self.weights: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden_states.view(-1, HIDDEN)
        logits = self.gate(flat)
        weights, ids = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        self.chosen, self.weights = ids, weights
        weights = weights.to(flat.dtype)
        result = torch.zeros_like(flat)
        hits = F.one_hot(ids, self.num_experts).permute(2, 1, 0)
        for index, expert in enumerate(self.experts):
            slot, token = torch.where(hits[index])
            result.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return result.view_as(hidden_states), logits


class SummedSigmoidBlock(LinearGateBlock):
    """The same interface with another rule in it, which must not be taken for the one above."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(hidden_states)
        outputs = torch.stack([expert(hidden_states) for expert in self.experts], dim=-1)
        return (outputs * logits.sigmoid().unsqueeze(-2)).sum(-1), logits


class Layer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.mlp = mlp

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(F.rms_norm(x, (HIDDEN,))).chunk(3, dim=-1))
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(1)
        return x + self.mlp(F.rms_norm(x, (HIDDEN,)))[0]


class Model(nn.Module):
    """Bidirectional; attention_mask [B, S] of ones and zeros, or additive [B, 1, S, S]."""

    def __init__(self, block: Any, model_type: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        if model_type == "sdar_moe":
            self.config.block_size = 4
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer(block()) for _ in range(2))
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        x = self.embed(input_ids)
        mask = attention_mask
        if mask is not None:
            mask = mask[:, None, None].bool() if mask.dim() == 2 else mask.to(x.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        return SimpleNamespace(logits=self.lm_head(x))


def llada2() -> Model:
    return Model(LLaDA2Block, "llada2_moe")


def llada_moe() -> Model:
    return Model(lambda: LinearGateBlock(norm_topk_prob=False), "llada")


def sdar() -> Model:
    return Model(lambda: LinearGateBlock(norm_topk_prob=True), "sdar_moe")
