"""The cache in place: what forwards see of it, what stays, what is copied and what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.decoding.cache import KeyValueCache, visible
from expertshare.decoding.forwards import BlockCausal
from expertshare.models.runtime import ForwardInput, LayerKeyValues, Runtime
from expertshare.models.transformer import MoETransformer


@pytest.fixture
def cache(config: ModelConfig) -> KeyValueCache:
    """Four rows of 24 positions."""
    return KeyValueCache(config, num_rows=4, capacity=24, dtype=torch.float32, device=torch.device("cpu"))


def fresh(config: ModelConfig, rows: int, length: int, value: float) -> LayerKeyValues:
    """Keys that hold `value` plus the row's number, values their negatives."""
    number = torch.arange(float(rows)).view(-1, 1, 1, 1)
    keys = (value + number).expand(rows, config.num_kv_heads, length, config.head_dim)
    return LayerKeyValues(keys, -keys)


def first_key(cache: KeyValueCache, layer: int = 0) -> Tensor:
    """One feature of each cached key: [rows, capacity]."""
    return cache.layers[layer].keys_BHSD[:, 0, :, 0]


def test_all_rows_are_seen_in_place(config: ModelConfig, cache: KeyValueCache) -> None:
    views = cache.views([0, 1, 2, 3], [8, 8, 8, 8])
    seen = [view.extended_by(fresh(config, 4, 8, 10.0)) for view in views]
    for layer, view in zip(cache.layers, seen, strict=True):
        assert view.keys_BHSD.shape[2] == view.values_BHSD.shape[2] == 16
        assert view.keys_BHSD.data_ptr() == layer.keys_BHSD.data_ptr()
        assert view.values_BHSD.data_ptr() == layer.values_BHSD.data_ptr()
    assert first_key(cache)[2].tolist() == [0.0] * 8 + [12.0] * 8 + [0.0] * 8
    assert cache.layers[1].values_BHSD[3, 1, 8:16, 5].tolist() == [-13.0] * 8


def test_rows_at_different_blocks_are_written_each_at_its_place(config: ModelConfig, cache: KeyValueCache) -> None:
    cache.views([0, 1, 2, 3], [0, 16, 8, 0])[0].extended_by(fresh(config, 4, 8, 1.0))
    filled = first_key(cache) != 0
    assert [row.nonzero().flatten().tolist() for row in filled] == [
        list(range(8)),
        list(range(16, 24)),
        list(range(8, 16)),
        list(range(8)),
    ]


@pytest.mark.parametrize("rows", [[1], [1, 2], [0, 2], [3, 0]])
def test_some_rows(config: ModelConfig, cache: KeyValueCache, rows: list[int]) -> None:
    """Neighbours are a view; others a copy that is put back. Nobody else's row is touched."""
    views = cache.views(rows, [8] * len(rows))
    for view in views:
        view.extended_by(fresh(config, len(rows), 8, 5.0))
    cache.put_back(rows, views)
    expected = torch.zeros(4, 24)
    for entry, row in enumerate(rows):
        expected[row, 8:16] = 5.0 + entry
    assert all(torch.equal(first_key(cache, layer), expected) for layer in range(config.num_layers))


def test_rows_that_are_kept_keep_their_keys(config: ModelConfig, cache: KeyValueCache) -> None:
    cache.views([0, 1, 2, 3], [0] * 4)[0].extended_by(fresh(config, 4, 8, 1.0))
    before = cache.layers
    cache.keep([0, 1, 2, 3])
    assert cache.layers is before
    cache.keep([1, 3])
    assert first_key(cache)[:, 0].tolist() == [2.0, 4.0]
    cache.views([3], [8])[0].extended_by(fresh(config, 1, 8, 7.0))
    assert first_key(cache)[:, 8].tolist() == [0.0, 7.0]


def test_visible() -> None:
    expected = [[True, False, False], [True] * 3]
    assert visible([1, 3], torch.device("cpu")).tolist() == expected


def masks_of(
    model: MoETransformer, runtime: Runtime, prompts: list[list[int]], options: DecodingOptions
) -> tuple[list[Tensor | None], BlockCausal]:
    """The masks of all forwards behind the prefill."""
    seen: list[ForwardInput] = []
    handle = model.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    stream = BlockDecoder(model, runtime, options).blocks(prompts)
    for _ in stream:
        pass
    handle.remove()
    assert isinstance(stream.forwards, BlockCausal)
    return [inputs.mask_BSP for inputs in seen if inputs.tokens_BS.shape[1] == 8], stream.forwards


def test_rows_at_the_same_block_need_no_mask(
    config: ModelConfig, make_model: Callable[..., MoETransformer], runtime: Callable[..., Runtime]
) -> None:
    masks, _ = masks_of(make_model(config), runtime(), [[5, 6, 7]], DecodingOptions(gen_length=20))
    assert masks
    assert all(mask is None for mask in masks)


def test_a_mask_is_made_once_for_a_block(
    config: ModelConfig, make_model: Callable[..., MoETransformer], runtime: Callable[..., Runtime]
) -> None:
    """One token a step, all rows at the same pace: the steps of a block share one mask, which says who sees what."""
    model = make_model(replace(config, eos_ids=()))
    options = DecodingOptions(gen_length=16, threshold=None)
    masks, _ = masks_of(model, runtime(), [[5] * 8, [6] * 16], options)
    first = masks[0]
    assert first is not None
    assert first.shape == (2, 8, 24)
    assert first[0].sum(dim=1).tolist() == [16] * 8
    assert first[0, :, :16].all()
    assert first[1].all()
    addresses = [mask.data_ptr() for mask in masks if mask is not None]
    assert len(addresses) == 17  # the commit of the first block included
    assert len(set(addresses)) <= 2
