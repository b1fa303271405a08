"""Memory for plans, made for many at a time.

Between two routings the experts flush the caches, and five tensors that are made with cold ones take ten microseconds,
a tenth of a routing step (docs/performance.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MOST_PLANS = 32
_MOST_TOKENS = 1024
_MOST_KINDS = 64


class Blank(NamedTuple):
    """Uninitialised: the parts of a plan and its counts, on the CPU, and where they lie, in this order.

    ids_TK: int64. weights_TK: float32. active_E: bool. load_E: int64. unique_G: int64.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    active_E: Tensor
    load_E: Tensor
    unique_G: Tensor
    addresses: tuple[int, ...]


_Kind = tuple[int, int, int, int, bool]
_waiting: dict[_Kind, list[Blank]] = {}


def blank(tokens: int, top_k: int, experts: int, groups: int) -> Blank:
    """One that nobody has had before. It shares no element with another, but a piece of memory with a few."""
    kind = (tokens, top_k, experts, groups, torch.is_inference_mode_enabled())
    try:
        return _waiting[kind].pop()
    except (KeyError, IndexError):
        made = _several(*kind[:4])
    first = made.pop()
    if len(_waiting) >= _MOST_KINDS:
        _waiting.clear()
    _waiting[kind] = made  # another thread may have been here: its rest goes
    return first


def _several(tokens: int, top_k: int, experts: int, groups: int) -> list[Blank]:
    count = max(1, min(_MOST_PLANS, _MOST_TOKENS // max(1, tokens)))
    parts = (
        ((count, tokens, top_k), torch.int64),
        ((count, tokens, top_k), torch.float32),
        ((count, experts), torch.bool),
        ((count, experts), torch.int64),
        ((count, groups), torch.int64),
    )
    ids, weights, active, load, unique = (
        torch.empty(shape, dtype=dtype, device="cpu").unbind() for shape, dtype in parts
    )
    each = zip(ids, weights, active, load, unique, strict=True)
    return [Blank(*tensors, addresses=tuple(tensor.data_ptr() for tensor in tensors)) for tensors in each]
