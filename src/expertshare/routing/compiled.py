"""The primitives of routing in the native library: the same numbers as the torch code beside each, in microseconds.

A torch operation on a few thousand numbers takes 3 to 30 microseconds; a routing step used to be sixty of them. Who
calls asks `library_for` first. It is exact arithmetic with exact ties, but for two sums: votes and shares are added up
in float64, where float32 numbers of similar size round nothing, and the weights of one token in the order that torch
follows for up to 31 of them (beyond that they may differ from torch's in the last bit).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError

_NUMBER = c_int64
MOST_SLOTS = 64
"""Experts per token that `drop_lightest` takes."""


_ARGUMENTS = {
    "es_top_k": [c_void_p, c_void_p, _NUMBER, _NUMBER, _NUMBER, c_void_p, c_void_p],
    "es_reachable_best": [*[c_void_p] * 7, *[_NUMBER] * 6],
    "es_votes": [c_void_p, c_void_p, *[_NUMBER] * 7, c_void_p, c_void_p],
    "es_tally": [c_void_p, c_void_p, _NUMBER, _NUMBER, _NUMBER, c_void_p],
    "es_group_max": [c_void_p, c_void_p, _NUMBER, _NUMBER, _NUMBER, c_void_p],
    "es_shortest_prefix": [c_void_p, _NUMBER, _NUMBER, c_double, c_void_p],
    "es_drop_lightest": [c_void_p, _NUMBER, _NUMBER, c_double, c_void_p],
    "es_weigh": [c_void_p, c_void_p, c_void_p, _NUMBER, _NUMBER, _NUMBER, c_int, c_float, c_void_p, c_void_p],
    "es_route": [*[c_void_p] * 9, _NUMBER, _NUMBER, c_int, c_int, c_void_p, c_int],
    "es_count_load": [c_void_p, _NUMBER, _NUMBER, _NUMBER, c_void_p, c_void_p],
}


@cache
def declared() -> ctypes.CDLL:
    """The library, with the types of this room's functions. Raises ConfigError where there is none."""
    library = native.library()
    for name, arguments in _ARGUMENTS.items():
        getattr(library, name).argtypes = arguments
    return library


def library_for(*scores: Tensor, masks: tuple[Tensor, ...] = (), ids: tuple[Tensor, ...] = ()) -> ctypes.CDLL | None:
    """The library, where it is there and takes these: on the CPU; scores float32, masks bool, ids int64."""
    if not native.available() or torch.compiler.is_compiling():
        return None
    for dtype, tensors in ((torch.float32, scores), (torch.bool, masks), (torch.int64, ids)):
        for tensor in tensors:
            if tensor.dtype != dtype or not tensor.is_cpu:
                return None
    return declared()


def _finish(status: int) -> None:
    if status != 0:
        raise ConfigError("not enough memory for the scratch of a routing step: pass fewer tokens at a time.")


def _laid_out(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """In rows, and of that shape. Asking first is cheaper than views that change nothing."""
    if tensor.shape == shape and tensor.is_contiguous():
        return tensor
    return tensor.expand(shape).contiguous()


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def top_k(library: ctypes.CDLL, score_xE: Tensor, k: int, front_xE: Tensor | None, *, as_mask: bool) -> Tensor:
    """Ids (int64 [..., k]) or membership (bool [..., E]) of the k best of each row; `front` outranks all others."""
    score_xE = _rows(score_xE)
    experts = score_xE.shape[-1]
    if as_mask:
        found = torch.empty(score_xE.shape, dtype=torch.bool)
    else:
        found = torch.empty((*score_xE.shape[:-1], k), dtype=torch.int64)
    front_xE = None if front_xE is None else _laid_out(front_xE, score_xE.shape)
    front = None if front_xE is None else front_xE.data_ptr()
    to_ids, to_mask = (None, found.data_ptr()) if as_mask else (found.data_ptr(), None)
    rows = score_xE.numel() // experts
    _finish(library.es_top_k(score_xE.data_ptr(), front, rows, experts, k, to_ids, to_mask))
    return found


def cast(library: ctypes.CDLL, choice_GLE: Tensor, live_GL: Tensor, k: int, limit: tuple[int, int]) -> Tensor:
    """Each live token's k best experts, bool [G, L, E]. limit: expert groups, and how many of them a token reaches."""
    choice_GLE, live_GL = _rows(choice_GLE), _laid_out(live_GL, choice_GLE.shape[:2])
    cast_GLE = torch.empty(choice_GLE.shape, dtype=torch.bool)
    pointers = (choice_GLE.data_ptr(), live_GL.data_ptr(), None, None, None, None, cast_GLE.data_ptr())
    _finish(library.es_reachable_best(*pointers, *choice_GLE.shape, k, *limit))
    return cast_GLE


def choose(
    library: ctypes.CDLL,
    choice_GLE: Tensor,
    affinity_GLE: Tensor,
    live_GL: Tensor,
    coreset_GE: Tensor,
    k: int,
    limit: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Ids of each token's k best inside its coreset (int64 [T, k], -1 where there is none), and their affinity or 0."""
    groups, length, experts = choice_GLE.shape
    choice_GLE, affinity_GLE = _rows(choice_GLE), _laid_out(affinity_GLE, choice_GLE.shape)
    live_GL = _laid_out(live_GL, (groups, length))
    coreset_GE = _laid_out(coreset_GE, (groups, experts))
    ids_TK = torch.empty((live_GL.numel(), k), dtype=torch.int64)
    best_TK = torch.empty(ids_TK.shape)
    tensors = (choice_GLE, live_GL, coreset_GE, affinity_GLE, ids_TK, best_TK)
    pointers = (*(tensor.data_ptr() for tensor in tensors), None)
    _finish(library.es_reachable_best(*pointers, groups, length, experts, k, *limit))
    return ids_TK, best_TK


def votes(
    library: ctypes.CDLL, choice_GLE: Tensor, live_GL: Tensor, k: int, limit: tuple[int, int], num_firsts: int
) -> tuple[Tensor, Tensor]:
    """`tally` of `cast`, and which experts are among any token's `num_firsts` best: float32 and bool [G, E]."""
    groups, length, experts = choice_GLE.shape
    choice_GLE, live_GL = _rows(choice_GLE), _laid_out(live_GL, (groups, length))
    votes_GE = torch.empty((groups, experts))
    firsts_GE = torch.empty((groups, experts), dtype=torch.bool)
    pointers = votes_GE.data_ptr(), firsts_GE.data_ptr()
    sizes = groups, length, experts, k, *limit, num_firsts
    _finish(library.es_votes(choice_GLE.data_ptr(), live_GL.data_ptr(), *sizes, *pointers))
    return votes_GE, firsts_GE


def tally(library: ctypes.CDLL, choice_GLE: Tensor, cast_GLE: Tensor) -> Tensor:
    """Sum of the scores of the ballots cast, float32 [G, E], -inf where there is none."""
    choice_GLE, cast_GLE = _rows(choice_GLE), _laid_out(cast_GLE, choice_GLE.shape)
    groups, length, experts = cast_GLE.shape
    votes_GE = torch.empty((groups, experts))
    _finish(library.es_tally(choice_GLE.data_ptr(), cast_GLE.data_ptr(), groups, length, experts, votes_GE.data_ptr()))
    return votes_GE


def group_max(library: ctypes.CDLL, choice_GLE: Tensor, live_GL: Tensor) -> Tensor:
    """Largest score over the live tokens, float32 [G, E], -inf where none is live."""
    groups, length, experts = choice_GLE.shape
    choice_GLE, live_GL = _rows(choice_GLE), _laid_out(live_GL, (groups, length))
    most_GE = torch.empty((groups, experts))
    pointers = choice_GLE.data_ptr(), live_GL.data_ptr()
    _finish(library.es_group_max(*pointers, groups, length, experts, most_GE.data_ptr()))
    return most_GE


def shortest_prefix(library: ctypes.CDLL, score_GE: Tensor, share: float) -> Tensor:
    """bool [G, E]; see shares.shortest_prefix."""
    score_GE = _rows(score_GE)
    member_GE = torch.empty(score_GE.shape, dtype=torch.bool)
    _finish(library.es_shortest_prefix(score_GE.data_ptr(), *score_GE.shape, share, member_GE.data_ptr()))
    return member_GE


def drop_lightest(library: ctypes.CDLL, weight_TK: Tensor, share: float) -> Tensor:
    """bool [T, K], K <= 64; see shares.drop_lightest."""
    weight_TK = _rows(weight_TK)
    kept_TK = torch.empty(weight_TK.shape, dtype=torch.bool)
    _finish(library.es_drop_lightest(weight_TK.data_ptr(), *weight_TK.shape, share, kept_TK.data_ptr()))
    return kept_TK


def weigh(
    library: ctypes.CDLL,
    ids_TK: Tensor,
    affinity_TK: Tensor,
    kept_TK: Tensor | None,
    num_experts: int,
    *,
    renormalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Weights (float32 [T, K]) and active experts (bool [E]). Writes -1 into ids that are not kept."""
    kept_TK = None if kept_TK is None else _laid_out(kept_TK.to(torch.bool), ids_TK.shape)
    weights_TK = torch.empty(affinity_TK.shape)
    active_E = torch.empty(num_experts, dtype=torch.bool)
    status = library.es_weigh(
        ids_TK.data_ptr(),
        affinity_TK.data_ptr(),
        None if kept_TK is None else kept_TK.data_ptr(),
        *ids_TK.shape,
        num_experts,
        int(renormalise),
        scaling,
        weights_TK.data_ptr(),
        active_E.data_ptr(),
    )
    _finish(status)
    return weights_TK, active_E


def count_load(library: ctypes.CDLL, ids_TK: Tensor, groups: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """Pairs per expert (int64 [E]) and unique experts per group (int64 [G])."""
    ids_TK = _rows(ids_TK)
    load_E, unique_G = torch.empty(num_experts, dtype=torch.int64), torch.empty(groups, dtype=torch.int64)
    slots = ids_TK.numel() // max(groups, 1)
    pointers = load_E.data_ptr(), unique_G.data_ptr()
    _finish(library.es_count_load(ids_TK.data_ptr(), groups, slots, num_experts, *pointers))
    return load_E, unique_G
