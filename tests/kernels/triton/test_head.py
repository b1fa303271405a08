"""Best token and probability in Triton against those of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expertshare.errors import ConfigError
from expertshare.kernels.quantise import quantise_table, table_rows
from expertshare.kernels.torch_backend import best_of_logits
from expertshare.kernels.triton.backend import TritonBackend


def whole(shape: tuple[int, int], seed: int, most: int) -> Tensor:
    """Whole numbers: every sum of products is exact, in any order, so that equal rows tie."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def expected(hidden_RD: Tensor, weight_VD: Tensor, excluded: Sequence[int]) -> tuple[Tensor, Tensor]:
    return best_of_logits((hidden_RD.float() @ weight_VD.float().T).to(hidden_RD.dtype), excluded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("excluded", [[], [7], [7, 12], list(range(130))])
def test_equals_the_choice_from_logits(excluded: list[int], dtype: torch.dtype, device: torch.device) -> None:
    """With ties within a tile and between tiles, a tile that is wholly excluded, and a vocabulary with a rest."""
    hidden, weight = whole((7, 40), 0, 1), whole((301, 40), 1, 1)
    weight[250] = weight[130] = weight[12]
    hidden[3], hidden[4], hidden[5] = weight[12], weight[7], 0.0
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    tokens, probability = TritonBackend().best_token(hidden.to(device), weight.to(device), excluded)
    right_tokens, right_probability = expected(hidden, weight, excluded)
    assert torch.equal(tokens.cpu(), right_tokens)
    torch.testing.assert_close(probability.cpu(), right_probability, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_rows", [1, 16, 65])
def test_any_number_of_rows(num_rows: int, device: torch.device) -> None:
    hidden, weight = whole((num_rows, 24), 2, 2), whole((70, 24), 3, 2)
    tokens, probability = TritonBackend().best_token(hidden.to(device), weight.to(device), [0])
    right_tokens, right_probability = expected(hidden, weight, [0])
    assert torch.equal(tokens.cpu(), right_tokens)
    torch.testing.assert_close(probability.cpu(), right_probability, rtol=1e-5, atol=1e-7)


def test_an_int8_table(device: torch.device) -> None:
    weight = torch.randn(90, 48, generator=torch.Generator().manual_seed(5))
    hidden, table = whole((5, 48), 4, 1), quantise_table(weight)
    on_device = replace(table, codes_PC=table.codes_PC.to(device), scales_PG=table.scales_PG.to(device))
    tokens, probability = TritonBackend().best_token(hidden.to(device), on_device, [3])
    right_tokens, right_probability = expected(hidden, table_rows(table, torch.arange(90)), [3])
    assert torch.equal(tokens.cpu(), right_tokens)
    torch.testing.assert_close(probability.cpu(), right_probability, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_gives_nan_in_its_row_alone(value: float, device: torch.device) -> None:
    hidden, weight = whole((3, 24), 6, 2), whole((70, 24), 7, 2)
    clean, right = TritonBackend().best_token(hidden.to(device), weight.to(device), [1])
    hidden[1, 2] = value
    tokens, probability = TritonBackend().best_token(hidden.to(device), weight.to(device), [1])
    assert probability.isnan().tolist() == [False, True, False]
    assert torch.equal(probability[[0, 2]], right[[0, 2]])
    assert torch.equal(tokens[[0, 2]], clean[[0, 2]])
    assert 0 <= int(tokens[1]) < 70
    spoiled = weight.clone()
    spoiled[1, 0] = float("nan")  # of an excluded id: its logit counts all the same
    assert TritonBackend().best_token(whole((3, 24), 6, 2).to(device), spoiled.to(device), [1])[1].isnan().all()


def test_no_rows(device: torch.device) -> None:
    nothing, weight = torch.empty(0, 24, device=device), torch.ones(9, 24, device=device)
    tokens, probability = TritonBackend().best_token(nothing, weight, [])
    assert (tokens.shape, probability.shape) == ((0,), (0,))


def test_what_it_cannot_take_is_said_clearly(device: torch.device) -> None:
    hidden, weight = torch.ones(2, 24, device=device), torch.ones(9, 24, device=device)
    with pytest.raises(ConfigError, match="excluded ids must lie in"):
        TritonBackend().best_token(hidden, weight, [9])
    with pytest.raises(ConfigError, match="expected hidden states"):
        TritonBackend().best_token(hidden[:, :8], weight, [])
    with pytest.raises(ConfigError, match="both in float32"):
        TritonBackend().best_token(hidden.half(), weight, [])
    with pytest.raises(ConfigError, match="contiguous"):
        TritonBackend().best_token(hidden, torch.ones(24, 9, device=device).T, [])
