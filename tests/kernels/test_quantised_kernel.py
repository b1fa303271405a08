"""Experts of few bits: the kernel against its arithmetic written out, and against products of the widened weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from backends import moe_ffn
from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels.cpu_backend import _CHECKED, CpuBackend
from expertshare.kernels.quantise import Scheme, dequantise, quantise_bank
from expertshare.types import ExpertBank, QuantisedBank, QuantisedWeight, RoutingPlan

from .test_moe_ffn import formula, plan_of, scene
from .test_quantise import SCHEMES

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernel: {native.unavailable_reason()}")

ISAS = native.usable_instruction_sets() if native.available() else []
schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))

# The kernel's own rounding: float sums of at most some hundred products. Where tokens round to 8 bits, a float that
# differs in its last place may fall on the other side of a tie: one code of one hidden feature.
EXACTLY = 2e-3
# Against products of widened weights: tokens and hidden features to 8 bits, 0.3 to 0.8 % each (uniform rounding of a
# normal span: the largest of 128 is 2.7 deviations, a step a 127th of it, the error 0.29 steps), more for a few tokens.
WIDENED = 0.04

# tokens, experts per token, experts, model features, expert features
SHAPES = [
    (1, 1, 1, 64, 64),
    (32, 8, 16, 192, 64),
    (70, 3, 5, 256, 320),
    (33, 4, 64, 128, 192),
]


@pytest.fixture(autouse=True)
def every_byte_is_accounted_for() -> Iterator[None]:
    """Outputs that nobody wrote are NaN; the number of threads is the default again afterwards."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    native.set_num_threads(None)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EXPERTSHARE_ISA", request.param)
    assert native.instruction_set() == request.param
    return str(request.param)


def quantised_scene(
    shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype = torch.float32, *, unused: float = 0.0, seed: int = 0
) -> tuple[Tensor, RoutingPlan, QuantisedBank]:
    x_TD, plan, bank = scene(shape, dtype, unused=unused, seed=seed)
    return x_TD, plan, quantise_bank(bank, scheme)


def rounded_to_spans(x_TD: Tensor) -> Tensor:
    """Tokens as the kernel sees them: of every 128 features the largest becomes 127."""
    padded = F.pad(x_TD.float(), (0, -x_TD.shape[1] % 128)).unflatten(-1, (-1, 128))
    largest = padded.abs().amax(dim=-1, keepdim=True)
    codes = (padded * torch.where(largest > 0, 127 / largest, 0.0)).round()
    return (codes.double() * (largest / 127).double()).flatten(1)[:, : x_TD.shape[1]]


def emulated(x_TD: Tensor, plan: RoutingPlan, bank: QuantisedBank) -> Tensor:
    """The kernel's arithmetic in float64, where sums of codes times scales are as good as exact."""
    gate_up, down = dequantise(bank.gate_up).double(), dequantise(bank.down).double()
    tokens, y_TD = rounded_to_spans(x_TD), torch.zeros(x_TD.shape, dtype=torch.float64)
    for expert in plan.active_E.nonzero().flatten().tolist():
        token, slot = (plan.expert_ids_TK == expert).nonzero(as_tuple=True)
        gate, up = (tokens[token] @ gate_up[expert].T).chunk(2, dim=-1)
        hidden = rounded_to_spans((F.silu(gate) * up).float())
        y_TD.index_add_(0, token, hidden @ down[expert].T * plan.weights_TK[token, slot, None].double())
    return y_TD


def widened(bank: QuantisedBank) -> ExpertBank:
    return ExpertBank(dequantise(bank.gate_up), dequantise(bank.down))


def share_of_norm(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-9))


@schemes
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_its_arithmetic(isa: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    x_TD, plan, bank = quantised_scene(shape, scheme, unused=0.2, seed=3)
    outputs = []
    for num_threads in (1, 2, 3):
        native.set_num_threads(num_threads)
        outputs.append(CPU.moe_ffn(x_TD, plan, bank))
    assert all(torch.equal(outputs[0], output) for output in outputs)
    assert share_of_norm(outputs[0], emulated(x_TD, plan, bank)) < EXACTLY
    assert share_of_norm(outputs[0], formula(x_TD, plan, widened(bank))) < WIDENED


@schemes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_projection_to_the_last_place(isa: str, scheme: Scheme, dtype: torch.dtype) -> None:
    """Hidden features that 8 bits hold exactly leave nothing to the fall of a tie: gates so large that SiLU is the
    identity, and products that are 127 or 0."""
    generator = torch.Generator().manual_seed(5)
    x_TD = torch.zeros(9, 128, dtype=dtype)
    x_TD[:, 0] = 127.0
    gate_up = torch.zeros(2, 2 * 192, 128)
    gate_up[:, :192, 0] = 1.0
    gate_up[:, 192:, 0] = torch.randint(-1, 2, (2, 192), generator=generator).float()
    down = 0.3 * torch.randn(2, 128, 192, generator=generator)
    bank = quantise_bank(ExpertBank(gate_up, down), scheme)
    plan = plan_of(torch.arange(9).view(9, 1) % 2, torch.ones(9, 1), 2)
    expected = emulated(x_TD, plan, bank)
    assert share_of_norm(CPU.moe_ffn(x_TD, plan, bank), expected) < (1e-6 if dtype == torch.float32 else 4e-3)


@schemes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_instruction_sets_agree_bit_for_bit(
    scheme: Scheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_TD, plan, bank = quantised_scene((37, 4, 9, 320, 192), scheme, dtype, unused=0.1)
    outputs = []
    for name in ISAS:
        monkeypatch.setenv("EXPERTSHARE_ISA", name)
        outputs.append(CPU.moe_ffn(x_TD, plan, bank))
    assert outputs[0].dtype == dtype
    assert all(torch.equal(outputs[0], output) for output in outputs)
    assert share_of_norm(outputs[0], emulated(x_TD, plan, bank)) < EXACTLY + (5e-3 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("shape", [(1, 1, 1, 16, 16), (2, 2, 5, 48, 80), (20, 3, 5, 144, 112), (9, 2, 3, 272, 400)])
def test_any_multiple_of_16_in_8_bits(isa: str, shape: tuple[int, ...]) -> None:
    x_TD, plan, bank = quantised_scene(shape, SCHEMES["int8"], seed=1)
    assert share_of_norm(CPU.moe_ffn(x_TD, plan, bank), emulated(x_TD, plan, bank)) < EXACTLY


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_any_number_of_tokens(isa: str, name: str) -> None:
    """All tokens by the same expert: every split into tiles, and each token as if it were alone."""
    x_TD, _, bank = quantised_scene((140, 1, 1, 160, 96), SCHEMES[name])
    together = CPU.moe_ffn(x_TD, plan_of(torch.zeros(140, 1, dtype=torch.int64), torch.ones(140, 1), 1), bank)
    for num_tokens in [*range(20), 63, 64, 65, 128, 139]:
        plan = plan_of(torch.zeros(num_tokens, 1, dtype=torch.int64), torch.ones(num_tokens, 1), 1)
        assert torch.equal(CPU.moe_ffn(x_TD[:num_tokens], plan, bank), together[:num_tokens])


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("num_threads", [2, 3])
def test_work_of_many_chunks_is_divided_without_a_trace(isa: str, num_threads: int, name: str) -> None:
    """Large enough that every thread takes part, with one large group and many small ones."""
    x_TD, plan, bank = quantised_scene((40, 2, 24, 512, 192), SCHEMES[name], seed=5)
    ids_TK = plan.expert_ids_TK.clone()
    ids_TK[:, 0] = 7
    ids_TK[ids_TK[:, 1] == 7, 1] = -1
    plan = plan_of(ids_TK, plan.weights_TK, 24)
    native.set_num_threads(1)
    alone = CPU.moe_ffn(x_TD, plan, bank)
    native.set_num_threads(num_threads)
    assert all(torch.equal(CPU.moe_ffn(x_TD, plan, bank), alone) for _ in range(5))
    assert share_of_norm(alone, emulated(x_TD, plan, bank)) < EXACTLY


@schemes
def test_other_experts_are_never_read(isa: str, scheme: Scheme) -> None:
    x_TD, plan, bank = quantised_scene((5, 2, 16, 192, 64), scheme, unused=0.3)
    clean = CPU.moe_ffn(x_TD, plan, bank)
    assert not plan.active_E.all()
    poisoned = QuantisedBank(*(poison(weight, ~plan.active_E) for weight in (bank.gate_up, bank.down)))
    assert torch.equal(CPU.moe_ffn(x_TD, plan, poisoned), clean)


def poison(weight: QuantisedWeight, experts_E: Tensor) -> QuantisedWeight:
    codes, scales = weight.codes_EPC.clone(), weight.scales_EPG.clone()
    codes[experts_E], scales[experts_E] = 85, float("nan")
    return replace(weight, codes_EPC=codes, scales_EPG=scales)


@schemes
def test_experts_as_views_on_slabs(isa: str, scheme: Scheme) -> None:
    """One run of bytes per expert with everything in it, at odd multiples of 8 bytes, with bytes between."""
    x_TD, plan, bank = quantised_scene((9, 2, 4, 192, 64), scheme)
    assert torch.equal(CPU.moe_ffn(x_TD, plan, on_slabs(bank)), CPU.moe_ffn(x_TD, plan, bank))


def test_a_remembered_bank_is_checked_again_where_its_minima_moved() -> None:
    x_TD, plan, bank = quantised_scene((9, 2, 4, 192, 64), SCHEMES["32 with minima"])
    assert bank.down.minima_EPG is not None
    before = CPU.moe_ffn(x_TD, plan, bank)
    bank.down.minima_EPG.data = bank.down.minima_EPG + 1
    assert not torch.equal(CPU.moe_ffn(x_TD, plan, bank), before)


def on_slabs(bank: QuantisedBank) -> QuantisedBank:
    parts = [t for w in (bank.gate_up, bank.down) for t in (w.codes_EPC, w.scales_EPG, w.minima_EPG) if t is not None]
    num_experts = len(parts[0])
    sizes = [part.nbytes // num_experts for part in parts]
    slabs = torch.full((num_experts, sum(sizes) + 24), 255, dtype=torch.uint8)
    first, made = 8, []
    for part, size in zip(parts, sizes, strict=True):
        view = slabs[:, first : first + size].view(part.dtype).view(part.shape)
        made.append(view.copy_(part))
        first += size
    views = iter(made)

    def moved(weight: QuantisedWeight) -> QuantisedWeight:
        codes, scales = next(views), next(views)
        minima = None if weight.minima_EPG is None else next(views)
        return replace(weight, codes_EPC=codes, scales_EPG=scales, minima_EPG=minima)

    return QuantisedBank(moved(bank.gate_up), moved(bank.down))


@pytest.mark.parametrize("name", ["int8", "int4", "32 with minima"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_come_through(isa: str, name: str, value: float) -> None:
    x_TD, plan, bank = quantised_scene((4, 2, 3, 160, 64), SCHEMES[name], torch.bfloat16)
    clean = CPU.moe_ffn(x_TD, plan, bank)
    x_TD[1, 5] = value
    y_TD = CPU.moe_ffn(x_TD, plan, bank)
    assert bool(y_TD[1].isnan().all())
    assert torch.equal(y_TD[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_tokens_of_any_size(isa: str, name: str) -> None:
    """Zeros give zeros, tiny tokens nothing that is not finite, and one huge feature spoils its own span alone."""
    x_TD, plan, bank = quantised_scene((4, 1, 1, 256, 64), SCHEMES[name])
    x_TD[0], x_TD[1] = 0.0, x_TD[1] * 1e-37
    x_TD[2, 200] = 1e4
    y_TD = CPU.moe_ffn(x_TD, plan, bank)
    assert not y_TD[0].any()
    assert bool(y_TD.isfinite().all())
    assert share_of_norm(y_TD[2:3], emulated(x_TD, plan, bank)[2:3]) < EXACTLY


@given(
    st.sampled_from(sorted(SCHEMES)),
    st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(4, 9), st.integers(1, 5), st.integers(1, 5)),
    st.floats(0.0, 1.0),
    st.sampled_from(ISAS or ["portable"]),
    st.integers(0, 1000),
)
def test_equals_the_arithmetic(name: str, shape: tuple[int, ...], unused: float, isa: str, seed: int) -> None:
    widths = (64 * shape[3], 64 * shape[4])
    x_TD, plan, bank = quantised_scene((*shape[:3], *widths), SCHEMES[name], unused=unused, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERTSHARE_ISA", isa)
        y_TD = CPU.moe_ffn(x_TD, plan, bank)
    assert y_TD.shape == x_TD.shape
    assert share_of_norm(y_TD, emulated(x_TD, plan, bank)) < 2 * EXACTLY


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@schemes
def test_backends_take_them(scheme: Scheme, dtype: torch.dtype, backend: str) -> None:
    x_TD, plan, bank = quantised_scene((6, 2, 8, 128, 64), scheme, dtype, unused=0.2)
    y_TD = moe_ffn(x_TD, plan, bank, backend=backend)
    assert y_TD.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype] if backend != "cpu" else WIDENED
    assert share_of_norm(y_TD, formula(x_TD, plan, widened(bank))) < tolerance


Scene = tuple[Tensor, RoutingPlan, QuantisedBank]


def with_down(s: Scene, **changes: object) -> Scene:
    return s[0], s[1], replace(s[2], down=replace(s[2].down, **changes))  # type: ignore[arg-type]


def turned(t: Tensor) -> Tensor:
    """The same values with the last two dimensions swapped in memory."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def narrowed(s: Scene) -> Scene:
    """Sizes that fit each other and no panel."""
    gate_up, down = s[2].gate_up, s[2].down
    gate_up = replace(gate_up, codes_EPC=gate_up.codes_EPC[:, :7], scales_EPG=gate_up.scales_EPG[:, :7])
    return s[0], s[1], QuantisedBank(gate_up, replace(down, codes_EPC=down.codes_EPC[..., :-64].contiguous()))


WRONG: dict[str, tuple[str, Callable[[Scene], Scene]]] = {
    "half tokens": ("tokens in float32 or bfloat16", lambda s: (s[0].half(), s[1], s[2])),
    "an expert too many": (
        "-1 .unused. or 0 to 3",
        lambda s: (s[0], replace(s[1], expert_ids_TK=s[1].expert_ids_TK + 4), s[2]),
    ),
    "signed codes": ("codes of down in torch.uint8", lambda s: with_down(s, codes_EPC=s[2].down.codes_EPC.char())),
    "float32 scales": ("torch.float32: quantise", lambda s: with_down(s, scales_EPG=s[2].down.scales_EPG.float())),
    "scales of other groups": (
        r"shape \(4, 8, 32\) for scales of down",
        lambda s: with_down(s, scales_EPG=s[2].down.scales_EPG[..., :1]),
    ),
    "minima of other groups": ("minima of down", lambda s: with_down(s, minima_EPG=s[2].down.scales_EPG[:, :5])),
    "56 hidden features": ("multiples of 16, got 128 rows of 56", lambda s: narrowed(s)),
    "groups of 16": ("groups of 32 or 64", lambda s: with_down(s, group_size=16)),
    "three bits": ("in 4 bits, or in 8", lambda s: with_down(s, bits=3)),
    "8 bits with minima": (
        "8 without minima",
        lambda s: with_down(s, bits=8, minima_EPG=s[2].down.scales_EPG),
    ),
    "other width": (r"expected tokens \[\.\.\., D\].* D = 128", lambda s: (s[0][:, :64].contiguous(), s[1], s[2])),
    "two dimensions": (
        r"expected weights \[E, rows, depth\]",
        lambda s: with_down(s, codes_EPC=s[2].down.codes_EPC[0]),
    ),
    "turned codes": ("codes of down contiguous", lambda s: with_down(s, codes_EPC=turned(s[2].down.codes_EPC))),
    "turned scales": ("scales of down contiguous", lambda s: with_down(s, scales_EPG=turned(s[2].down.scales_EPG))),
    "another device": ("on the CPU", lambda s: with_down(s, scales_EPG=s[2].down.scales_EPG.to("meta"))),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_it_cannot_take_is_said_clearly(what: str) -> None:
    message, spoil = WRONG[what]
    right = quantised_scene((6, 2, 4, 128, 64), SCHEMES["int4"])
    with pytest.raises(ConfigError, match=message):
        CPU.moe_ffn(*spoil(right))
    assert share_of_norm(CPU.moe_ffn(*right), emulated(*right)) < EXACTLY


def test_a_bank_that_was_checked_is_checked_again_when_its_memory_is_another() -> None:
    x_TD, plan, bank = quantised_scene((4, 2, 6, 64, 64), Scheme(bits=8))
    expected = CPU.moe_ffn(x_TD, plan, bank)
    codes, other = bank.down.codes_EPC, torch.zeros(6, 4, 1024, dtype=torch.int8)
    codes.set_(other.untyped_storage(), 0, other.shape, other.stride())
    assert not CPU.moe_ffn(x_TD, plan, bank).any()
    assert expected.any()
    other = torch.zeros(6, 4, 1024, dtype=torch.int8)
    codes.set_(other.untyped_storage(), 0, other.shape, (4 * 1024, 1, 4))
    with pytest.raises(ConfigError, match="contiguous"):
        CPU.moe_ffn(x_TD, plan, bank)


def test_a_bank_is_forgotten_with_its_last_owner() -> None:
    x_TD, plan, bank = quantised_scene((4, 2, 6, 64, 64), Scheme(bits=8))
    before = len(_CHECKED)
    CPU.moe_ffn(x_TD, plan, bank)
    assert len(_CHECKED) == before + 1
    del bank
    assert len(_CHECKED) == before


CPU = CpuBackend()
