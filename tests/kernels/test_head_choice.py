"""The head without logits: best token and probability against logits that are all there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels import TorchBackend
from expertshare.kernels.cpu_backend import CpuBackend
from expertshare.kernels.torch_backend import best_of_logits

from .conftest import ISAS

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=f"no native kernel: {native.unavailable_reason()}"),
    pytest.mark.usefixtures("unwritten_is_nan"),
]

CPU = CpuBackend()

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3}  # of the probability, relative
SHAPES = [(1, 5, 8), (1, 2, 1), (7, 33, 5), (65, 700, 129), (32, 1111, 64), (130, 256, 31), (2, 257, 48)]  # R, V, D


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EXPERTSHARE_ISA", request.param)
    return str(request.param)


def scene(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    num_rows, vocabulary, depth = shape
    generator = torch.Generator().manual_seed(seed)
    hidden_RD = torch.randn(num_rows, depth, generator=generator).to(dtype)
    return hidden_RD, (torch.randn(vocabulary, depth, generator=generator) * 3 / depth**0.5).to(dtype)


def formula(logits_RV: Tensor, excluded: list[int]) -> tuple[Tensor, Tensor]:
    """In float64, id by id: excluded ones are not there at all."""
    kept = [token for token in range(logits_RV.shape[1]) if token not in excluded]
    left_RV = logits_RV.double()[:, kept]
    best_R = torch.tensor(kept)[left_RV.argmax(dim=1)]
    weights_RV = (left_RV - left_RV.amax(dim=1, keepdim=True)).exp()
    return best_R, weights_RV.amax(dim=1) / weights_RV.sum(dim=1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_best_of_the_logits(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden_RD, weight_VD = scene(shape, dtype)
    excluded = [shape[1] // 2]
    outputs = []
    for num_threads in (1, 2, 3):
        native.set_num_threads(num_threads)
        outputs += [CPU.best_token(hidden_RD, weight_VD, excluded) for _ in range(3)]
    tokens_R, probability_R = outputs[0]
    best_R, share_R = formula(CPU.linear(hidden_RD, weight_VD), excluded)
    assert torch.equal(tokens_R, best_R)
    torch.testing.assert_close(probability_R.double(), share_R, rtol=TOLERANCE[dtype], atol=0)
    for tokens, probability in outputs:
        assert torch.equal(tokens, tokens_R)
        assert torch.equal(probability, probability_R)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_slow_twin_agrees(dtype: torch.dtype) -> None:
    hidden_RD, weight_VD = scene((37, 1000, 64), dtype)
    tokens_R, probability_R = best_of_logits(hidden_RD @ weight_VD.T, [3, 999])
    best_R, share_R = formula(hidden_RD @ weight_VD.T, [3, 999])
    assert torch.equal(tokens_R, best_R)
    torch.testing.assert_close(probability_R.double(), share_R, rtol=1e-5, atol=0)
    native_R, confidence_R = CPU.best_token(hidden_RD, weight_VD, [3, 999])
    torch_R, sure_R = TorchBackend().best_token(hidden_RD, weight_VD, [3, 999])
    assert torch.equal(torch_R, tokens_R)
    assert torch.equal(sure_R, probability_R)
    if dtype == torch.float32:
        assert torch.equal(native_R, torch_R)
        torch.testing.assert_close(confidence_R, sure_R, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_does_not_depend_on_its_batch(isa: str, dtype: torch.dtype) -> None:
    hidden_RD, weight_VD = scene((70, 530, 40), dtype)
    together = CPU.best_token(hidden_RD, weight_VD, [7])
    for first, last in [(0, 1), (5, 7), (69, 70), (3, 40)]:
        alone = CPU.best_token(hidden_RD[first:last], weight_VD, [7])
        assert torch.equal(alone[0], together[0][first:last])
        assert torch.equal(alone[1], together[1][first:last])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("excluded", [[], [41], [41, 300], [300, 555, 41]])
def test_ties_go_to_the_lowest_id_that_may_be_chosen(isa: str, excluded: list[int], dtype: torch.dtype) -> None:
    """The same row of weights at four places, within a chunk of the vocabulary and in others."""
    hidden_RD, weight_VD = scene((3, 900, 24), dtype)
    tied = [41, 300, 555, 899]
    weight_VD[tied] = hidden_RD[0] * 8
    tokens_R, _ = CPU.best_token(hidden_RD, weight_VD, excluded)
    assert tokens_R[0] == min(set(tied) - set(excluded))


def test_bfloat16_logits_that_round_to_the_same_value_tie(isa: str) -> None:
    """Logits 256.0 and 256.9, both 256 in bfloat16, exact in float32: the lower id, though the other is larger."""
    hidden_RD = torch.tensor([[256.0, 1.0]]).bfloat16()
    weight_VD = torch.zeros(400, 2).bfloat16()
    weight_VD[70] = torch.tensor([1.0, 0.0])
    weight_VD[300] = torch.tensor([1.0, 0.8984375])
    tokens_R, probability_R = CPU.best_token(hidden_RD, weight_VD, [])
    assert tokens_R.tolist() == [70]
    assert probability_R.tolist() == [0.5]


def test_an_excluded_id_weighs_nothing(isa: str) -> None:
    hidden_RD, weight_VD = scene((5, 64, 16), torch.float32)
    weight_VD[9] = 100 * hidden_RD[0]
    expected = CPU.best_token(hidden_RD, weight_VD[[*range(9), *range(10, 64)]].contiguous(), [])
    got = CPU.best_token(hidden_RD, weight_VD, [9])
    assert torch.equal(got[0], expected[0] + (expected[0] >= 9))
    torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=0)


def test_all_but_one_excluded_leaves_certainty() -> None:
    hidden_RD, weight_VD = scene((2, 400, 16), torch.float32)
    tokens_R, probability_R = CPU.best_token(hidden_RD, weight_VD, [*range(300), *range(301, 400)])
    assert tokens_R.tolist() == [300, 300]
    assert probability_R.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("excluded", [[], [350]])
def test_a_logit_that_is_not_finite_is_told(isa: str, bad: float, dtype: torch.dtype, excluded: list[int]) -> None:
    hidden_RD, weight_VD = scene((4, 400, 16), dtype)
    hidden_RD[:, 0] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    clean = CPU.best_token(hidden_RD, weight_VD, excluded)
    weight_VD[350] = 0.0
    weight_VD[350, 0] = bad
    assert CPU.best_token(hidden_RD, weight_VD, excluded)[1].isnan().all()  # 0 times infinity too
    hidden_RD[2, 3] = bad
    weight_VD[350, 0] = 0.0
    spoilt = CPU.best_token(hidden_RD, weight_VD, excluded)
    assert spoilt[1].isnan().tolist() == [False, False, True, False]
    assert torch.equal(best_of_logits(CPU.linear(hidden_RD, weight_VD), excluded)[1].isnan(), spoilt[1].isnan())
    assert clean[1].isfinite().all()


def test_no_rows_and_more_than_are_taken_at_a_time() -> None:
    hidden_RD, weight_VD = scene((2100, 40, 8), torch.float32)
    assert [len(part) for part in CPU.best_token(hidden_RD[:0], weight_VD, [1])] == [0, 0]
    assert [len(part) for part in best_of_logits(hidden_RD[:0] @ weight_VD.T, [1])] == [0, 0]
    assert torch.equal(CPU.best_token(hidden_RD, weight_VD, [1])[0], formula(CPU.linear(hidden_RD, weight_VD), [1])[0])


@pytest.mark.parametrize("excluded", [[-1], [40], list(range(40))])
def test_exclusions_that_cannot_be(excluded: list[int]) -> None:
    hidden_RD, weight_VD = scene((2, 40, 8), torch.float32)
    with pytest.raises(ConfigError, match=r"must lie in 0\.\.39|all 40 ids"):
        CPU.best_token(hidden_RD, weight_VD, excluded)
    with pytest.raises(ConfigError, match=r"must lie in 0\.\.39|all 40 ids"):
        best_of_logits(hidden_RD @ weight_VD.T, excluded)


def test_other_dtypes_are_refused() -> None:
    hidden_RD, weight_VD = scene((2, 40, 8), torch.float32)
    with pytest.raises(ConfigError, match="all in float32 or all in bfloat16"):
        CPU.best_token(hidden_RD.half(), weight_VD.half(), [])
