"""Where a coreset bites: coresets of the right tokens, and weights by the model's own rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expertshare

from . import oracle, stand_ins
from .tiny_models import ALL, CANVAS, NATIVE, TOP_K, build, logits, tokens

BUDGET = 6
BLOCK = 4
POLICY = f"des-vote:budget={BUDGET}"


def routers(model: Any) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if n.endswith((".gate", ".router")) and "experts" not in n}


class Seen:
    """What each router gave back, before the policy (hooked first) and after it (what the experts get)."""

    def __init__(self, model: Any, *, before: bool) -> None:
        self.outputs: dict[str, Any] = {}
        for name, router in routers(model).items():
            router.register_forward_hook(self._keep(name), prepend=before)

    def _keep(self, name: str) -> Any:
        return lambda _module, _args, output: self.outputs.__setitem__(name, output)


def parted(name: str, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights, ids."""
    if name in ("llada_moe", "sdar"):
        weights, ids = output.softmax(-1).topk(TOP_K)
        return output, weights, ids
    return output if name in NATIVE else (output[2], output[1], output[0])


def run(model: Any, mask_BS: Tensor | None = None, length: int = 12) -> tuple[dict[str, Any], dict[str, Any]]:
    """Router outputs before and after the policy, in one and the same forward."""
    with expertshare.apply(model, POLICY, block_length=BLOCK):
        before, after = Seen(model, before=True), Seen(model, before=False)
        logits(model, tokens(length=length), mask_BS)
    return before.outputs, after.outputs


@pytest.mark.parametrize("length", [12, 10])
@pytest.mark.parametrize("name", ALL)
def test_routing_is_the_models_rule_inside_the_vote_of_each_block(name: str, length: int) -> None:
    model = build(name)
    modules = routers(model)
    mask_BS = torch.ones(2, length, dtype=torch.long)
    mask_BS[1, :5] = 0
    before, after = run(model, mask_BS, length)
    assert before
    bitten = 0
    for router, output in before.items():
        live_BS = torch.ones(2, CANVAS) if "decoder" in router else mask_BS
        own = parted(name, output)[0].view(2, live_BS.shape[1], -1)
        _, weights, ids = parted(name, after[router])
        weights, ids = (part.view(2, live_BS.shape[1], -1) for part in (weights, ids))
        for row in range(2):
            for start in range(0, live_BS.shape[1], BLOCK):
                block = [t for t in range(start, min(start + BLOCK, live_BS.shape[1])) if live_BS[row, t]]
                if not block:
                    assert name in ("llada_moe", "sdar") or not weights[row, start : start + BLOCK].any()
                    continue
                choices = [oracle.scores(name, modules[router], own[row, t])[1] for t in block]
                coreset = oracle.vote(choices, TOP_K, BUDGET)
                for t in block:
                    expected = oracle.assign(name, modules[router], own[row, t], coreset, TOP_K)
                    pairs = zip(ids[row, t].tolist(), weights[row, t].tolist(), strict=True)
                    got = {expert: weight for expert, weight in pairs if weight > 1e-30}
                    if name in ("llada_moe", "sdar"):  # their blocks' affair: test_blocks_that_choose_from_logits
                        total = sum(expected.values()) / sum(got.values())
                        got = {e: w * total for e, w in got.items()}
                    assert got == pytest.approx(expected, rel=2e-5)
                    free = oracle.assign(name, modules[router], own[row, t], set(range(16)), TOP_K)
                    bitten += set(expected) != set(free)
    assert bitten > 5, "the coreset must bite"


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4_moe", "diffusion_gemma"])
def test_a_restricted_coreset_is_the_models_own_router_with_the_others_masked(name: str) -> None:
    """One block of one sequence: -inf in the router's own logits outside the coreset, and its own code from there."""
    model = build(name)
    router = next(iter(routers(model).values()))
    linear = router.proj if name == "diffusion_gemma" else router
    seen: list[Any] = []
    with expertshare.apply(model, POLICY, block_length=CANVAS):
        first = Seen(model, before=True)
        keep = router.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
        logits(model, tokens(rows=1, length=CANVAS))
        keep.remove()
    x, (_, weights, ids) = seen[-1]
    own = next(v for n, v in first.outputs.items() if dict(model.named_modules())[n] is router)[0]
    coreset = oracle.vote([oracle.scores(name, router, row)[1] for row in own.view(-1, 16)], TOP_K, BUDGET)
    outside = [e for e in range(16) if e not in coreset]
    plain = torch.nn.functional.linear

    def masked(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return plain(x, weight, bias).index_fill(-1, torch.tensor(outside), float("-inf"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", masked)
        assert linear is not None
        for handle in list(router._forward_hooks):
            router._forward_hooks.pop(handle)
        if name == "glm4_moe":  # a sigmoid of -inf is 0, still above a negative bias
            router.e_score_correction_bias[outside] = float("-inf")
        _, expected_weights, expected_ids = router(x)
    assert set(ids.flatten().tolist()) <= coreset
    empty = torch.zeros(len(ids), 16)
    dense = empty.scatter(1, ids, weights), empty.scatter(1, expected_ids, expected_weights)
    torch.testing.assert_close(*dense, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_dropped_experts_are_the_models_rule_over_those_that_stay(name: str) -> None:
    """Two experts a token instead of four; the other slots weigh nothing and name nobody new."""
    model = build(name)
    modules = routers(model)
    with expertshare.apply(model, "top-k-cap:experts_per_token=2") as handle, handle.metrics() as used:
        before, after = Seen(model, before=True), Seen(model, before=False)
        logits(model, tokens())
    for (router, output), use in zip(before.outputs.items(), sorted(used.by_layer, key=order_in(before)), strict=True):
        own = parted(name, output)[0]
        _, weights, ids = parted(name, after.outputs[router])
        assert use.pairs == 2 * len(own)
        assert len(set(ids.flatten().tolist())) == round(use.union_experts)
        for token in range(len(own)):
            expected = oracle.assign(name, modules[router], own[token], set(range(16)), 2)
            got = {e: w for e, w in zip(ids[token].tolist(), weights[token].tolist(), strict=True) if w > 1e-30}
            total = sum(expected.values()) / sum(got.values()) if name in ("llada_moe", "sdar") else 1.0
            assert {e: w * total for e, w in got.items()} == pytest.approx(expected, rel=2e-5)


def order_in(seen: Seen) -> Any:
    names = list(seen.outputs)
    return lambda use: names.index(use.name)


@pytest.mark.parametrize("name", ["llada_moe", "sdar"])
def test_blocks_that_choose_from_logits_compute_the_models_weights(name: str) -> None:
    """The output of the whole block against the formula: with and without renormalisation."""
    model = build(name)
    block = model.layers[0].mlp
    seen: list[Any] = []
    with expertshare.apply(model, POLICY, block_length=BLOCK):
        first = Seen(model, before=True)
        keep = block.register_forward_hook(lambda _module, args, output: seen.append((args[0], output[0])))
        logits(model, tokens())
        keep.remove()
    x, y = (part.view(2, 12, -1) for part in seen[-1])
    own = first.outputs["layers.0.mlp.gate"].view(2, 12, -1)
    for row in range(2):
        for start in range(0, 12, BLOCK):
            here = range(start, start + BLOCK)
            coreset = oracle.vote([oracle.scores(name, None, own[row, t])[1] for t in here], TOP_K, BUDGET)
            for t in here:
                chosen = oracle.assign(name, None, own[row, t], coreset, TOP_K)
                expected = sum(w * block.experts[e](x[row, t : t + 1].flatten()) for e, w in chosen.items())
                torch.testing.assert_close(y[row, t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in ALL if n != "diffusion_gemma"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_votes(name: str, side: str) -> None:
    """A row's logits do not depend on how many padded positions stand beside it, nor on what they hold."""
    model, ids_BS = build(name), tokens(rows=1, length=9)
    results = []
    for fill in (7, 23):
        pad = torch.full((1, 3), fill)
        padded = torch.cat((pad, ids_BS) if side == "left" else (ids_BS, pad), dim=1)
        mask = torch.ones(1, 12, dtype=torch.long)
        mask[:, : 3 if side == "left" else None] = 0 if side == "left" else 1
        if side == "right":
            mask[:, 9:] = 0
        with expertshare.apply(model, "des-vote:budget=6", block_length=12):
            results.append(logits(model, padded, mask)[:, 3:] if side == "left" else logits(model, padded, mask)[:, :9])
    assert torch.equal(*results)
    with expertshare.apply(model, "des-vote:budget=6", block_length=12):
        alone = logits(model, ids_BS)
    if side == "right" or name in ("llada2", "llada_moe", "sdar"):  # else positions differ: rotation is not exact
        torch.testing.assert_close(results[0], alone, rtol=1e-3, atol=1e-4)


def test_a_4d_mask_tells_padding_too() -> None:
    model, ids_BS = build("sdar"), tokens(rows=1)
    flat = torch.ones(1, 12, dtype=torch.long)
    flat[:, 8:] = 0
    additive = torch.zeros(1, 1, 12, 12).masked_fill(flat[:, None, None] == 0, float("-inf"))
    with expertshare.apply(model, POLICY, block_length=12) as handle:
        with handle.metrics() as two:
            expected = logits(model, ids_BS, flat)
        with handle.metrics() as four:
            assert torch.equal(logits(model, ids_BS, additive), expected)
    assert two.by_layer == four.by_layer


def test_masked_positions_run_no_expert() -> None:
    model = build("olmoe")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1] = 0
    mask[1, 0] = 1
    with expertshare.apply(model, POLICY) as handle, handle.metrics() as used:
        logits(model, tokens(), mask)
    assert used.pairs == 2 * TOP_K * 13


def test_stand_ins_differ_from_a_block_that_only_looks_alike() -> None:
    model = stand_ins.Model(lambda: stand_ins.SummedSigmoidBlock(norm_topk_prob=True), "sdar_moe")
    with pytest.raises(expertshare.errors.ConfigError, match=r"layers\.0\.mlp\.gate .* its rule is not supported"):
        expertshare.apply(model, "vanilla")
