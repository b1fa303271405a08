"""Rounding weights to few bits: how far off each may be, how codes lie in bytes, and what cannot be rounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertshare.errors import ConfigError, NumericsError
from expertshare.kernels.quantise import (
    QUANTISATIONS,
    Scheme,
    dequantise,
    dequantised_experts,
    quantise,
    quantise_bank,
    scheme_named,
    unpack,
)
from expertshare.types import QuantisedWeight

from .test_moe_ffn import scene

SCHEMES = {
    **QUANTISATIONS,
    "64": Scheme(bits=4, group_size=64),
    "32 with minima": Scheme(bits=4, group_size=32, symmetric=False),
    "64 with minima": Scheme(bits=4, group_size=64, symmetric=False),
}
schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))


def codes_of(weight: QuantisedWeight) -> Tensor:
    """One integer per weight, each from its own place, by the formula of docs/expert-layout.md."""
    row, feature = torch.arange(weight.rows).view(-1, 1), torch.arange(weight.depth).view(1, -1)
    half = weight.group_size // 2
    byte = feature if weight.bits == 8 else feature // weight.group_size * half + feature % half
    panels = weight.codes_EPC[..., row // 16, byte // 4 * 64 + row % 16 * 4 + byte % 4].long()
    if weight.bits == 8:
        return panels
    return torch.where(feature % weight.group_size < half, panels % 16, panels // 16)


def per_weight(weight: QuantisedWeight, per_group: Tensor) -> Tensor:
    row, feature = torch.arange(weight.rows).view(-1, 1), torch.arange(weight.depth).view(1, -1)
    return per_group[..., row // 16, feature // weight.group_size * 16 + row % 16].double()


@given(
    st.sampled_from(sorted(SCHEMES)),
    st.integers(0, 10_000),
    st.sampled_from([1e-4, 0.02, 1.0, 300.0]),
    st.sampled_from([0.0, 3.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_weight_is_within_half_a_step(
    name: str, seed: int, size: float, offset: float, dtype: torch.dtype
) -> None:
    """Weights whose code is not the last on its side: those are cut off, which the search for a scale may want."""
    scheme = SCHEMES[name]
    generator = torch.Generator().manual_seed(seed)
    weight = ((torch.randn(3, 16, 128, generator=generator) + offset) * size).to(dtype)
    made = quantise(weight, scheme)
    codes = codes_of(made)
    step = per_weight(made, made.scales_EPG).abs()
    lowest, highest = (-127, 127) if scheme.bits == 8 else (0, 15)
    assert codes.min() >= lowest
    assert codes.max() <= highest
    inside = torch.ones_like(codes, dtype=torch.bool) if scheme.bits == 8 else (codes > 0) & (codes < 15)
    error = (dequantise(made).double() - weight.double()).abs()
    assert bool((error <= step * 0.5 * (1 + 1e-4) + 1e-12)[inside].all())
    assert float(error.norm() / weight.double().norm()) < (0.01 if scheme.bits == 8 else 0.2)


@schemes
def test_dequantised_by_the_definition(scheme: Scheme) -> None:
    made = quantise(torch.randn(2, 32, 128), scheme)
    codes, scales = codes_of(made).double(), per_weight(made, made.scales_EPG)
    if made.minima_EPG is not None:
        expected = codes * scales + per_weight(made, made.minima_EPG)
    else:
        expected = scales * (codes if scheme.bits == 8 else codes - 8)
    torch.testing.assert_close(dequantise(made).double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(dequantise(made, torch.bfloat16), dequantise(made).bfloat16())


@schemes
def test_tensors_are_those_of_the_layout(scheme: Scheme) -> None:
    made = quantise(torch.randn(3, 32, 192), scheme)
    parts = {"codes": made.codes_EPC, "scales": made.scales_EPG, "minima": made.minima_EPG}
    got = {name: (tuple(part.shape[1:]), part.dtype) for name, part in parts.items() if part is not None}
    assert got == scheme.panels(32, 192)
    assert scheme.num_bytes(32, 192) * 3 == sum(part.nbytes for part in parts.values() if part is not None)
    assert (made.bits, made.rows, made.depth) == (scheme.bits, 32, 192)


def test_four_bits_take_about_an_eighth_of_float32() -> None:
    assert SCHEMES["int4"].num_bytes(100, 2048) == 100 * 2048 * 4.5 / 8
    assert SCHEMES["64"].num_bytes(100, 2048) == 100 * 2048 * 4.25 / 8


def test_codes_of_a_group_by_hand() -> None:
    """Weights 0, 1 .. 31 of a group in steps of one: the lowest is the minimum, and halves lie half a group apart."""
    group = torch.arange(32) % 16
    made = quantise(group.expand(16, -1).float(), SCHEMES["32 with minima"], clips=(1.0,))
    assert made.codes_EPC.tolist() == [[17 * (4 * quad + i) for quad in range(4) for _ in range(16) for i in range(4)]]
    assert made.scales_EPG.tolist() == [[1.0] * 16]
    assert made.minima_EPG is not None
    assert not made.minima_EPG.any()
    assert torch.equal(unpack(torch.arange(16, dtype=torch.uint8)[None] * 17, 32)[0].long(), group)


def test_rows_of_a_panel_lie_by_turns() -> None:
    """Row r of 16 rows in steps of r: its four codes follow those of row r - 1, and its scale its scale."""
    weight = torch.arange(1.0, 17.0).view(16, 1) * torch.tensor([[127.0, 1.0, 2.0, 3.0] * 4])
    made = quantise(weight, SCHEMES["int8"])
    assert made.codes_EPC.tolist() == [[127, 1, 2, 3] * 64]
    assert made.scales_EPG.tolist() == [[float(row) for row in range(1, 17)]]


def test_ties_go_to_even() -> None:
    made = quantise(torch.tensor([127.0, 0.5, 1.5, 2.5] + [-0.5, -1.5] * 6).expand(16, 16), SCHEMES["int8"])
    assert codes_of(made)[0].tolist() == [127, 0, 2, 2] + [0, -2] * 6


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_weight_is_kept_without_loss(sign: float) -> None:
    """Eight steps from zero there is one code only: the scale has the sign that gives it to the largest weight."""
    weight = torch.zeros(16, 32)
    weight[0, 5], weight[0, 6] = sign * 0.5, -sign * 0.25
    assert torch.equal(dequantise(quantise(weight, SCHEMES["int4"])), weight)


@schemes
def test_searching_for_a_scale_never_errs_more(scheme: Scheme) -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    searched, plain = quantise(weight, scheme), quantise(weight, scheme, clips=(1.0,))
    errors = [float((dequantise(made) - weight).norm()) for made in (searched, plain)]
    assert errors[0] < errors[1] * (1 if scheme.bits == 4 else 1.0001)


@schemes
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    weight = torch.randn(2, 16, 128)
    weight[0, 1] = 0
    weight[1, 3, :64] = 0
    restored = dequantise(quantise(weight, scheme))
    assert not restored[0, 1].any()
    assert scheme.bits == 8 or not restored[1, 3, :64].any()


@schemes
def test_large_weights_are_quantised_in_parts(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3, 16, 128)
    whole = quantise(weight, scheme)
    monkeypatch.setattr("expertshare.kernels.quantise._WEIGHTS_AT_A_TIME", 300)
    parts = quantise(weight, scheme)
    assert torch.equal(whole.codes_EPC, parts.codes_EPC)
    assert torch.equal(whole.scales_EPG, parts.scales_EPG)


@schemes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(scheme: Scheme, value: float) -> None:
    weight = torch.randn(2, 128)
    weight[1, 77] = value
    with pytest.raises(NumericsError, match="expected finite weights"):
        quantise(weight, scheme)


def test_weights_beyond_float16_scales() -> None:
    with pytest.raises(NumericsError, match="use int8"):
        quantise(torch.full((16, 32), 1e6), SCHEMES["int4"])
    assert torch.equal(dequantise(quantise(torch.full((16, 32), 1e6), SCHEMES["int8"])), torch.full((16, 32), 1e6))


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"groups of 32: use int8\.", lambda: quantise(torch.ones(16, 80), SCHEMES["int4"])),
        (
            r"groups of 64: use groups of 32 or int8\.",
            lambda: quantise(torch.ones(16, 96), replace(SCHEMES["int4"], group_size=64)),
        ),
        ("rows of 48 weights", lambda: quantise(torch.ones(16, 48), SCHEMES["64"])),
        ("multiples of 16, got 8 rows of 64", lambda: quantise(torch.ones(8, 64), SCHEMES["int4"])),
        ("multiples of 16, got 16 rows of 40", lambda: quantise(torch.ones(16, 40), SCHEMES["int8"])),
        ("float32 or bfloat16", lambda: quantise(torch.ones(2, 64).half(), SCHEMES["int4"])),
        ("rows, depth", lambda: quantise(torch.ones(64), SCHEMES["int4"])),
        ("group_size=16", lambda: Scheme(bits=4, group_size=16)),
        ("bits=3", lambda: Scheme(bits=3, group_size=32)),
        ("symmetric=False", lambda: Scheme(bits=8, symmetric=False)),
        ("Did you mean 'int4'", lambda: scheme_named("int44")),
    ],
)
def test_what_cannot_be_done_is_said_clearly(message: str, make: object) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_only_experts_in_use_are_widened() -> None:
    x_TD, plan, bank = scene((5, 2, 16, 64, 32), torch.float32, unused=0.3)
    local, experts = dequantised_experts(plan, quantise_bank(bank, SCHEMES["int4"]), x_TD.dtype)
    used = plan.active_E.nonzero().flatten()
    assert len(experts.down_EDF) == len(used) < 16
    assert torch.equal(torch.where(local.expert_ids_TK < 0, -1, used[local.expert_ids_TK]), plan.expert_ids_TK)
    assert torch.equal(experts.down_EDF, dequantise(quantise(bank.down_EDF, SCHEMES["int4"]))[used])
