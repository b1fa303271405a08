"""Experts in Triton against the formula written out in float64, with weights of every kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backends import moe_ffn
from expertshare.errors import ConfigError
from expertshare.kernels.quantise import quantise_bank
from expertshare.kernels.triton.backend import TritonBackend
from expertshare.types import Bank, ExpertBank, QuantisedBank, QuantisedWeight, RoutingPlan

from ..test_moe_ffn import SHAPES, formula, plan_of, relative_error, scene
from ..test_quantise import SCHEMES
from ..test_quantised_kernel import on_slabs, poison, widened

# Largest error, relative to the largest output. float16 and bfloat16: rounding of the hidden features and the result.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def to(device: torch.device, x_TD: Tensor, plan: RoutingPlan, bank: Bank) -> tuple[Tensor, RoutingPlan, Bank]:
    plan = RoutingPlan(*(part.to(device) for part in (plan.expert_ids_TK, plan.weights_TK, plan.active_E)))
    if isinstance(bank, ExpertBank):
        return x_TD.to(device), plan, ExpertBank(bank.gate_up_EHD.to(device), bank.down_EDF.to(device))
    return x_TD.to(device), plan, QuantisedBank(_moved(bank.gate_up, device), _moved(bank.down, device))


def _moved(weight: QuantisedWeight, device: torch.device) -> QuantisedWeight:
    minima = None if weight.minima_EPG is None else weight.minima_EPG.to(device)
    return replace(
        weight, codes_EPC=weight.codes_EPC.to(device), scales_EPG=weight.scales_EPG.to(device), minima_EPG=minima
    )


def run(device: torch.device, x_TD: Tensor, plan: RoutingPlan, bank: Bank) -> Tensor:
    return moe_ffn(*to(device, x_TD, plan, bank), backend="triton").cpu()


def dtypes_of(device: torch.device) -> list[torch.dtype]:
    """The interpreter's bfloat16 product is wrong."""
    return [torch.float32, torch.float16] + ([torch.bfloat16] if device.type == "cuda" else [])


@pytest.mark.parametrize("unused", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_formula(shape: tuple[int, ...], unused: float, device: torch.device) -> None:
    for dtype in dtypes_of(device):
        x_TD, plan, bank = scene(shape, dtype, unused=unused)
        actual = run(device, x_TD, plan, bank)
        assert actual.dtype == dtype
        assert relative_error(actual, formula(x_TD, plan, bank)) < TOLERANCE[dtype]


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 33, 64, 65, 130])
def test_any_number_of_tokens_on_one_expert(num_tokens: int, device: torch.device) -> None:
    """Every height of a tile, and more tokens than one tile holds; another expert has one token."""
    x_TD, _, bank = scene((num_tokens, 1, 3, 40, 24), torch.float32)
    ids_TK = torch.full((num_tokens, 1), 2)
    ids_TK[num_tokens // 2] = 0
    plan = plan_of(ids_TK, torch.rand(num_tokens, 1) + 0.5, 3)
    assert relative_error(run(device, x_TD, plan, bank), formula(x_TD, plan, bank)) < TOLERANCE[torch.float32]


def test_widths_beyond_a_tile(device: torch.device) -> None:
    """Several tiles of columns and several steps over features, both with a rest, and more tiles than programs."""
    for dtype in dtypes_of(device):
        x_TD, plan, bank = scene((6, 2, 5, 200, 72), dtype, unused=0.2)
        assert relative_error(run(device, x_TD, plan, bank), formula(x_TD, plan, bank)) < TOLERANCE[dtype]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_quantised_experts(scheme: object, device: torch.device) -> None:
    """Against products of the widened weights, for experts in one tensor and as views on slabs."""
    for dtype in dtypes_of(device):
        x_TD, plan, bank = scene((9, 2, 4, 192, 64), torch.float32, unused=0.2)
        quantised, x_TD = quantise_bank(bank, scheme), x_TD.to(dtype)  # type: ignore[arg-type]
        expected = formula(x_TD, plan, widened(quantised))
        together = run(device, x_TD, plan, quantised)
        assert together.dtype == dtype
        assert relative_error(together, expected) < TOLERANCE[dtype]
        apart = moe_ffn(*_on_slabs(to(device, x_TD, plan, quantised)), backend="triton").cpu()
        assert torch.equal(apart, together) if device.type == "cpu" else relative_error(apart, expected) < 2e-2


def _on_slabs(moved: tuple[Tensor, RoutingPlan, Bank]) -> tuple[Tensor, RoutingPlan, Bank]:
    x_TD, plan, bank = moved
    assert isinstance(bank, QuantisedBank)
    on_cpu = on_slabs(QuantisedBank(_moved(bank.gate_up, torch.device("cpu")), _moved(bank.down, torch.device("cpu"))))
    return (x_TD, plan, on_cpu) if x_TD.device.type == "cpu" else (x_TD, plan, bank)


def test_inactive_experts_are_never_read(device: torch.device) -> None:
    x_TD, plan, bank = scene((5, 2, 16, 64, 64), torch.float32, unused=0.3)
    assert not plan.active_E.all()
    clean = run(device, x_TD, plan, bank)
    gate_up, down = bank.gate_up_EHD.clone(), bank.down_EDF.clone()
    gate_up[~plan.active_E], down[~plan.active_E] = torch.nan, torch.nan
    assert torch.equal(run(device, x_TD, plan, ExpertBank(gate_up, down)), clean)
    codes = quantise_bank(bank, SCHEMES["int4"])
    clean = run(device, x_TD, plan, codes)
    poisoned = QuantisedBank(*(poison(weight, ~plan.active_E) for weight in (codes.gate_up, codes.down)))
    assert torch.equal(run(device, x_TD, plan, poisoned), clean)


def test_a_bad_token_spoils_only_itself(device: torch.device) -> None:
    x_TD, plan, bank = scene((6, 2, 4, 16, 8), torch.float32)
    ids_TK = plan.expert_ids_TK.clone()
    ids_TK[4:] = -1
    plan = plan_of(ids_TK, plan.weights_TK, 4)
    clean = run(device, x_TD, plan, bank)
    x_TD[3], x_TD[4] = torch.nan, torch.nan
    spoiled = run(device, x_TD, plan, bank)
    assert spoiled[3].isnan().all()
    assert torch.equal(spoiled[:3], clean[:3])
    assert spoiled[4:].eq(0).all()


def test_equal_calls_give_equal_bits(device: torch.device) -> None:
    x_TD, plan, bank = scene((33, 4, 8, 64, 32), torch.float32, unused=0.1)
    first = run(device, x_TD, plan, bank)
    assert all(torch.equal(run(device, x_TD, plan, bank), first) for _ in range(1 if device.type == "cpu" else 20))


def test_ids_beyond_the_bank_count_as_unused(device: torch.device) -> None:
    x_TD, plan, bank = scene((3, 2, 4, 16, 8), torch.float32)
    ids_TK = plan.expert_ids_TK.clone()
    ids_TK[:, 1] = -1
    expected = run(device, x_TD, plan_of(ids_TK, plan.weights_TK, 4), bank)
    ids_TK[:, 1] = 4
    assert torch.equal(run(device, x_TD, replace(plan, expert_ids_TK=ids_TK), bank), expected)


def test_no_tokens_and_no_experts_run(device: torch.device) -> None:
    assert run(device, *scene((0, 2, 4, 16, 8), torch.float32)).shape == (0, 16)
    assert run(device, *scene((3, 2, 4, 16, 8), torch.float32, unused=1.1)).eq(0).all()


def test_what_it_cannot_take_is_said_clearly(device: torch.device) -> None:
    x_TD, plan, bank = to(device, *scene((3, 2, 4, 16, 8), torch.float32))
    assert isinstance(bank, ExpertBank)
    with pytest.raises(ConfigError, match="no gradients"):
        TritonBackend().moe_ffn(x_TD.clone().requires_grad_(), plan, bank)
    with pytest.raises(ConfigError, match=r"float16, torch\.float32"):
        TritonBackend().moe_ffn(x_TD.half(), plan, bank)
    with pytest.raises(ConfigError, match="do not fit down"):
        TritonBackend().moe_ffn(x_TD[:, :8].contiguous(), plan, bank)
    with pytest.raises(ConfigError, match="int64 expert ids"):
        TritonBackend().moe_ffn(x_TD, replace(plan, expert_ids_TK=plan.expert_ids_TK.int()), bank)
    turned = bank.down_EDF.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ConfigError, match="'triton' reads weights in place"):
        TritonBackend().moe_ffn(x_TD, plan, ExpertBank(bank.gate_up_EHD, turned))
    with pytest.raises(ConfigError, match="got them on"):
        TritonBackend().moe_ffn(x_TD.to("meta"), plan, bank)
    if device.type == "cpu":
        with pytest.raises(ConfigError, match="multiplies bfloat16 wrongly"):
            TritonBackend().moe_ffn(
                x_TD.bfloat16(), plan, ExpertBank(bank.gate_up_EHD.bfloat16(), bank.down_EDF.bfloat16())
            )
