"""Calls of the library's functions that take one structure.

Between two calls for a layer of a model all its experts have passed through the caches: what Python touches comes from
memory, an object at a time. So a call asks for as little as it can, and what can be known beforehand is.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL, POINTER, Structure, byref, c_int32, c_void_p
from functools import cache

from expertshare.native.loading import isa_number, library
from expertshare.native.threads import crew

ISA_NAMED = 5  # ES_ISA_NAMED of csrc/abi.h

HOW: tuple[tuple[str, type[c_int32] | type[c_void_p]], ...] = (
    *((name, c_int32) for name in ("isa", "num_threads")),
    ("team", c_void_p),
)
"""The last fields of such a structure: how to compute. `status_of` fills them."""


def status_of(name: str, call: Structure) -> int:
    """The es_status of the function `name`, computed by the instruction set and in the threads that are in use."""
    call.isa = -1
    call.num_threads, call.team = crew()
    function = _function(library(), name, type(call))
    status = function(byref(call))
    if status == ISA_NAMED:
        call.isa = isa_number()
        status = function(byref(call))
    return status


@cache
def _function(loaded: CDLL, name: str, argument: type[Structure]) -> Callable[..., int]:
    function = getattr(loaded, name)
    function.argtypes = [POINTER(argument)]
    typed: Callable[..., int] = function
    return typed
