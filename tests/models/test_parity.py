"""Logits equal to those of transformers' own classes, in float32, for tiny random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expertshare import native
from expertshare.kernels.cpu_backend import CpuBackend
from expertshare.models import ForwardInput, LayerKeyValues, MoETransformer, Runtime, load_model
from expertshare.routing import make_policy

from .layouts import LLADA_MOE_CONFIG, MASK, SDAR_CONFIG, VOCAB, Pair, fused_pair, glm4_pair, olmoe_pair, qwen3_pair

BATCH, LENGTH = 2, 24
TOLERANCE = 1e-5

BlockCausal = bool
CASES: dict[str, tuple[Callable[[Path], Pair], BlockCausal, int]] = {
    "llada2-as-glm4": (glm4_pair, True, 8),
    "llada-as-qwen3": (lambda path: qwen3_pair(path, LLADA_MOE_CONFIG, renormalise=False), False, 8),
    "llada-as-olmoe": (olmoe_pair, False, 8),
    "sdar, experts fused": (lambda path: fused_pair(path, SDAR_CONFIG, renormalise=True), True, 4),
    "llada, experts fused": (lambda path: fused_pair(path, LLADA_MOE_CONFIG, renormalise=False), False, 8),
    "sdar-as-qwen3": (lambda path: qwen3_pair(path, SDAR_CONFIG, renormalise=True), True, 4),
}


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Pair, MoETransformer, BlockCausal, int]:
    """A pair, our model loaded from its directory, whether attention is block-causal, and the block length."""
    make, block_causal, block_length = CASES[request.param]
    pair = make(tmp_path_factory.mktemp(request.param))
    return pair, load_model(pair.directory).model, block_causal, block_length


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


def visible(block_causal: bool, block_length: int, length: int = LENGTH) -> Tensor:
    """Who sees whom, written out: everyone, or one's own block and those before it. bool [S, S]."""
    block = torch.arange(length) // block_length
    return block[:, None] >= block[None, :] if block_causal else torch.ones(length, length, dtype=torch.bool)


def oracle_logits(pair: Pair, ids_BS: Tensor, mask_SS: Tensor) -> Tensor:
    """transformers' logits under an additive mask: 0 where visible, -inf elsewhere."""
    additive = torch.zeros(mask_SS.shape).masked_fill(~mask_SS, float("-inf"))
    with torch.no_grad():
        output = pair.oracle(
            input_ids=ids_BS,
            attention_mask=additive.expand(len(ids_BS), 1, -1, -1),
            position_ids=torch.arange(ids_BS.shape[1]).expand_as(ids_BS),
            use_cache=False,
        )
    return output.logits


def our_logits(model: MoETransformer, inputs: ForwardInput, past: list[LayerKeyValues] | None = None) -> Tensor:
    with torch.no_grad():
        output = model(inputs, runtime(model), past)
        return model.logits(output.hidden_BSD)


def runtime(model: MoETransformer) -> Runtime:
    return Runtime(policy=make_policy("vanilla").bind(model.config.router))


def whole_input(ids_BS: Tensor, mask_SS: Tensor, block_length: int, live_BS: Tensor | None = None) -> ForwardInput:
    batch, length = ids_BS.shape
    return ForwardInput(
        tokens_BS=ids_BS,
        positions_BS=torch.arange(length).expand(batch, length),
        live_BS=torch.ones(batch, length, dtype=torch.bool) if live_BS is None else live_BS,
        mask_BSP=mask_SS.expand(batch, length, length),
        block_length=block_length,
    )


def test_logits_equal_the_oracle(case: tuple[Pair, MoETransformer, BlockCausal, int]) -> None:
    pair, model, block_causal, block_length = case
    ids_BS, mask_SS = tokens(), visible(block_causal, block_length)
    expected = oracle_logits(pair, ids_BS, mask_SS)
    assert expected.std() > 0.5, "the oracle's logits must depend on its weights"
    actual = our_logits(model, whole_input(ids_BS, mask_SS, block_length))
    assert (actual - expected).abs().max() < TOLERANCE


def test_the_mask_matters_in_this_comparison(case: tuple[Pair, MoETransformer, BlockCausal, int]) -> None:
    pair, model, block_causal, block_length = case
    ids_BS = tokens()
    expected = oracle_logits(pair, ids_BS, visible(block_causal, block_length))
    wrong = visible(not block_causal, block_length)
    assert (our_logits(model, whole_input(ids_BS, wrong, block_length)) - expected).abs().max() > 1e-2


def test_cached_blocks_equal_the_oracle(case: tuple[Pair, MoETransformer, BlockCausal, int]) -> None:
    pair, model, block_causal, block_length = case
    if not block_causal:
        pytest.skip("with full attention a cache of finished blocks is an approximation, by design")
    ids_BS = tokens()
    expected = oracle_logits(pair, ids_BS, visible(True, block_length))
    past: list[LayerKeyValues] | None = None
    for start in range(0, LENGTH, block_length):
        end = start + block_length
        inputs = ForwardInput(
            tokens_BS=ids_BS[:, start:end],
            positions_BS=torch.arange(start, end).expand(BATCH, block_length),
            live_BS=torch.ones(BATCH, block_length, dtype=torch.bool),
            mask_BSP=torch.ones(BATCH, block_length, end, dtype=torch.bool),
            block_length=block_length,
        )
        with torch.no_grad():
            output = model(inputs, runtime(model), past)
        assert (model.logits(output.hidden_BSD) - expected[:, start:end]).abs().max() < TOLERANCE
        new = list(output.key_values)
        past = new if past is None else [_joined(*layer) for layer in zip(past, new, strict=True)]


def _joined(old: LayerKeyValues, new: LayerKeyValues) -> LayerKeyValues:
    return LayerKeyValues(
        torch.cat((old.keys_BHSD, new.keys_BHSD), dim=2), torch.cat((old.values_BHSD, new.values_BHSD), dim=2)
    )


def test_padding_changes_nothing(case: tuple[Pair, MoETransformer, BlockCausal, int]) -> None:
    """The last block is partial: what stands behind the text must not reach it, nor run any expert."""
    pair, model, block_causal, block_length = case
    real = LENGTH - block_length // 2
    ids_BS = tokens()
    expected = oracle_logits(pair, ids_BS[:, :real], visible(block_causal, block_length)[:real, :real])
    ids_BS[:, real:] = MASK
    live_BS = (torch.arange(LENGTH) < real).expand(BATCH, LENGTH)
    mask_SS = visible(block_causal, block_length) & live_BS[0]
    inputs = whole_input(ids_BS, mask_SS, block_length, live_BS)
    assert (our_logits(model, inputs)[:, :real] - expected).abs().max() < TOLERANCE
    with torch.no_grad():
        load_NE = model(inputs, runtime(model)).routing.load_NE
    assert load_NE.sum(dim=1).tolist() == [BATCH * real * model.config.router.top_k] * model.config.num_moe_layers


@pytest.mark.skipif(not native.available(), reason=f"no native kernel: {native.unavailable_reason()}")
def test_native_layers_equal_the_oracle(case: tuple[Pair, MoETransformer, BlockCausal, int]) -> None:
    pair, model, block_causal, block_length = case
    ids_BS, mask_SS = tokens(), visible(block_causal, block_length)
    by_kernel = replace(runtime(model), backend=CpuBackend())
    with torch.no_grad():
        output = model(whole_input(ids_BS, mask_SS, block_length), by_kernel)
        logits = model.logits(output.hidden_BSD, backend=CpuBackend())
        best_BS, _ = model.best_tokens(output.hidden_BSD.flatten(0, 1), [MASK], backend=CpuBackend())
    expected = oracle_logits(pair, ids_BS, mask_SS)
    assert (logits - expected).abs().max() < TOLERANCE
    expected[..., MASK] = -torch.inf
    assert torch.equal(best_BS.view(ids_BS.shape), expected.argmax(dim=-1))
