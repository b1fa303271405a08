"""Counts of experts against counts made here from the routers' raw logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expertshare.config import ModelConfig, RouterSpec
from expertshare.decoding import DecodingOptions, generate
from expertshare.measure.cost import FORWARD_KINDS, CostLedger, Turn
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer, initialise
from expertshare.routing import parse_policy

BYTES_PER_EXPERT = 3 * 32 * 16 * 4


def model_of(attention: str = "block_causal") -> MoETransformer:
    """Softmax router, 16 experts, 4 per token, block 8, all three layers with experts."""
    config = ModelConfig(
        family="sdar_moe",
        vocab_size=64,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rotary_dim=8,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        num_dense_layers=0,
        dense_hidden=32,
        expert_hidden=16,
        shared_hidden=0,
        router=RouterSpec(num_experts=16, top_k=4, activation="softmax", renormalise=True),
        attention=attention,  # type: ignore[arg-type]
        block_length=8,
        max_positions=128,
        mask_id=63,
        eos_ids=(),
        pad_id=0,
    )
    model = MoETransformer(config)
    initialise(model, seed=0, std=0.25)
    return model


def turns(*rows: int) -> list[Turn]:
    """Some rows in a first step."""
    return [Turn(row=row, block=0, step=0) for row in rows]


def test_ledger_by_hand() -> None:
    """Two layers, four experts; the second forward has a dead group, whose figures count nowhere."""
    ledger = CostLedger(2, 100)
    ledger.record(
        "denoise",
        turns(0),
        load_NE=torch.tensor([[3, 0, 1, 0], [1, 1, 1, 1]]),
        group_experts_NG=torch.tensor([[2], [4]]),
        live_G=torch.tensor([True]),
    )
    ledger.record(
        "denoise",
        turns(0, 1),
        load_NE=torch.tensor([[2, 2, 2, 0], [4, 2, 0, 0]]),
        group_experts_NG=torch.tensor([[3, 2, 9], [2, 1, 9]]),
        live_G=torch.tensor([True, True, False]),
    )
    cost = ledger.cost()
    assert cost.forwards == {"prefill": 0, "denoise": 2, "commit": 0}
    assert cost.unique_experts_by_layer["denoise"] == pytest.approx((7 / 3, 7 / 3))  # (2+3+2)/3 and (4+2+1)/3
    assert cost.unique_experts["denoise"] == pytest.approx(7 / 3)
    assert cost.union_experts["denoise"] == (2 + 4 + 3 + 2) / 4
    assert cost.expert_bytes == {"prefill": 0, "denoise": 1100, "commit": 0}
    assert cost.pairs["denoise"] == 4 + 4 + 6 + 6
    assert cost.steps[1].unique_experts == (2.5, 1.5)
    assert cost.steps[1].active_experts == (3, 2)
    assert cost.steps[1].groups == 2
    assert cost.unique_experts["prefill"] == 0.0


def test_cost_can_be_read_while_it_grows() -> None:
    """A cost is a value: reading it twice gives the same, and later forwards do not change it."""
    ledger = CostLedger(1, 1)
    one = {
        "load_NE": torch.tensor([[1, 1]]),
        "group_experts_NG": torch.tensor([[2]]),
        "live_G": torch.tensor([True]),
    }
    ledger.record("commit", turns(0), **one)
    first = ledger.cost()
    assert ledger.cost() == first
    ledger.record("commit", turns(0), **one)
    assert first.forwards["commit"] == 1
    assert ledger.cost().forwards["commit"] == 2


def watch_logits(moe: nn.Module, sink: list[Tensor]) -> None:
    """Keep the logits of an MoE layer's router, computed by hand from what the layer is given."""

    def keep(module: Any, given: tuple[Any, ...]) -> None:
        sink.append(given[0] @ module.router.weight.detach().T)

    moe.register_forward_pre_hook(keep)


def chosen_experts(logits: Sequence[Tensor]) -> list[list[set[int]]]:
    """Experts of every token, forward by forward: the four largest logits (softmax keeps their order)."""
    return [[set(token.topk(4).indices.tolist()) for token in flat.flatten(0, 1)] for flat in logits]


def test_counts_equal_the_routers_own_choices() -> None:
    """A single block: every layer's input is caught by hooks, and its experts chosen and counted token by token."""
    model = model_of()
    caught: list[list[Tensor]] = [[] for _ in model.layers]
    layers: Any = model.layers
    for layer, sink in zip(layers, caught, strict=True):
        layer.moe.register_forward_pre_hook(
            lambda m, given, sink=sink: sink.append(given[0] @ m.router.weight.detach().T)
        )
    result = generate(model, Runtime(policy=parse_policy("vanilla")), DecodingOptions(gen_length=5), [[1, 2, 3]])
    by_layer = [chosen_experts(logits) for logits in caught]
    unions = [[len(set().union(*tokens)) for tokens in forwards] for forwards in by_layer]
    forwards = len(unions[0])
    cost = result.cost
    assert cost.forwards == {"prefill": 0, "denoise": forwards, "commit": 0}
    assert cost.unique_experts_by_layer["denoise"] == pytest.approx([sum(u) / forwards for u in unions])
    assert cost.unique_experts["denoise"] == pytest.approx(sum(map(sum, unions)) / (3 * forwards))
    assert cost.union_experts["denoise"] == pytest.approx(cost.unique_experts["denoise"])
    assert cost.expert_bytes["denoise"] == sum(map(sum, unions)) * BYTES_PER_EXPERT
    assert cost.pairs["denoise"] == forwards * 3 * 8 * 4
    assert [step.active_experts for step in cost.steps] == list(zip(*unions, strict=True))


def test_prefill_counts_blocks_apart_and_ignores_padding() -> None:
    """Prompts of one and of three full blocks in one prefill: four groups, and their union is what is
    loaded."""
    model = model_of()
    caught: list[Tensor] = []
    layers: Any = model.layers
    watch_logits(layers[0].moe, caught)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 60, (length,), generator=generator).tolist() for length in (8, 24)]
    result = generate(model, Runtime(policy=parse_policy("vanilla")), DecodingOptions(gen_length=8), prompts)
    step = result.cost.steps[0]
    assert (step.kind, step.groups) == ("prefill", 4)
    tokens = chosen_experts(caught[:1])[0]  # [2 rows x 24 positions]
    groups = [tokens[0:8], tokens[24:32], tokens[32:40], tokens[40:48]]
    unique = [len(set().union(*group)) for group in groups]
    assert step.unique_experts[0] == sum(unique) / 4
    assert step.active_experts[0] == len(set().union(*(expert for group in groups for expert in group)))
    assert step.pairs == (4 * 8 * 4,) * 3


def test_pairs_of_a_batch_are_those_of_its_rows() -> None:
    """Work per token does not depend on the batch; loaded bytes are shared."""
    model, options = model_of(), DecodingOptions(gen_length=12)
    runtime = Runtime(policy=parse_policy("des-vote:budget=6"))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 60, (length,), generator=generator).tolist() for length in (3, 9, 20)]
    together = generate(model, runtime, options, prompts).cost
    alone = [generate(model, runtime, options, [prompt]).cost for prompt in prompts]
    for kind in FORWARD_KINDS:
        assert together.pairs[kind] == sum(cost.pairs[kind] for cost in alone)
        assert together.expert_bytes[kind] <= sum(cost.expert_bytes[kind] for cost in alone)
        assert together.unique_experts[kind] <= 6
        assert together.union_experts[kind] >= together.unique_experts[kind]


def test_json_holds_every_forward() -> None:
    """Plain values; prefill, denoise and commit apart; every record says whose it is."""
    cost = generate(model_of(), Runtime(policy=parse_policy("des-seq")), DecodingOptions(gen_length=9), [[1] * 9]).cost
    data = json.loads(json.dumps(cost.to_json()))
    assert set(data["unique_experts"]) == {"prefill", "denoise", "commit"}
    assert len(data["unique_experts_by_layer"]["denoise"]) == 3
    assert len(data["steps"]) == sum(data["forwards"].values())
    assert data["steps"][0]["turns"] == [{"row": 0, "block": None, "step": None}]
    assert data["steps"][1]["turns"] == [{"row": 0, "block": 0, "step": 0}]
    assert [step["kind"] for step in data["steps"]].count("commit") == data["forwards"]["commit"] == 1
