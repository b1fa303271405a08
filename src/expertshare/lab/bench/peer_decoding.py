"""What one would write around transformers' class to decode LLaDA2-like models: block by block, with its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.errors import InputError
from expertshare.lab.bench.peer_models import peer_cache, peer_logits

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


def decode_with_peer(
    peer: PreTrainedModel,
    config: ModelConfig,
    prompt: Sequence[int],
    *,
    gen_length: int,
    block_length: int,
    threshold: float,
) -> list[int]:
    """Greedy block diffusion of one prompt, to the end: the rules of our decoder, none of its code.

    Every step commits the masks whose token is more probable than `threshold`, at least the most probable one. A
    finished block is run once more from its final tokens, which is what stays in the cache. Lengths must be whole
    blocks. Raises InputError otherwise, or for full attention.
    """
    if config.attention != "block_causal" or len(prompt) % block_length or gen_length % block_length:
        raise InputError(
            f"the plain loop over transformers decodes block-causal models in whole blocks of {block_length}, got "
            f"{config.attention} attention, a prompt of {len(prompt)} and {gen_length} tokens to generate"
        )
    cache = peer_cache(peer, ())
    answer: list[int] = []
    if prompt:
        _forward(peer, cache, torch.tensor([list(prompt)], device=peer.device), 0, block_length)
    for start in range(len(prompt), len(prompt) + gen_length, block_length):
        block_1L = torch.full((1, block_length), config.mask_id, device=peer.device)
        while bool((masked_L := block_1L[0] == config.mask_id).any()):
            logits_LV = _forward(peer, cache, block_1L, start, block_length)[0]
            cache.crop(-block_length)
            logits_LV = logits_LV[masked_L].float()
            logits_LV[:, config.mask_id] = float("-inf")
            confidence_C, token_C = logits_LV.softmax(dim=-1).max(dim=-1)
            accepted_C = confidence_C > threshold
            accepted_C[confidence_C.argmax()] = True
            place_C = masked_L.nonzero().flatten()
            block_1L[0, place_C[accepted_C]] = token_C[accepted_C]
        if start + block_length < len(prompt) + gen_length:
            _forward(peer, cache, block_1L, start, block_length)
        answer += block_1L[0].tolist()
    return answer


def _forward(peer: PreTrainedModel, cache: DynamicCache, tokens_1S: Tensor, start: int, block_length: int) -> Tensor:
    """Whole blocks from position `start` on, which see themselves and everything before them."""
    end = start + tokens_1S.shape[1]
    queries_S, keys_P = torch.arange(start, end, device=peer.device), torch.arange(end, device=peer.device)
    mask_SP = queries_S.unsqueeze(1) // block_length >= keys_P // block_length
    return peer_logits(peer, tokens_1S, queries_S.unsqueeze(0), mask_SP.unsqueeze(0), cache)
