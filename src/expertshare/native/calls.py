"""The native library's functions as a table: what tensors each takes, and what they must be.

A function takes one structure (csrc/abi.h, csrc/norm.h). Its fields are, in this order: constants that were packed
beforehand, a pointer per tensor, the sizes and strides that the row names, other numbers, whether features are
bfloat16, and how to compute (instruction set, threads). Everything that follows from shapes, strides and dtypes is
found out and checked once and then looked up: one check serves speed and clear errors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from ctypes import c_char_p
from dataclasses import dataclass
from functools import cache, partial, reduce
from operator import or_
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from expertshare.errors import ConfigError
from expertshare.native.loading import isa_number, library, num_threads, thread_pool

FEATURES = (torch.float32, torch.bfloat16)
OK, _BAD_EXPERT_ID, _ISA_NAMED, _NOT_ARRIVED = 0, 1, 5, 6  # es_status of csrc/abi.h
_BEST_ISA = -1
_MOST_KNOWN = 4096
_LOW_BITS = 7  # the last bits of an address, which tell whether elements are aligned


class NotArrived(Exception):
    """Weights that a call needs will not come, or took too long: nothing was computed."""


@dataclass(frozen=True, slots=True)
class Arg:
    """A tensor of a call.

    dims: names of its sizes, equal ones for equal sizes; "*T" stands for all leading dimensions, "16" for 16. dtype:
    None for features, which are all float32 or all bfloat16. strides: the first so many dimensions may lie apart, and
    their strides are passed; all others must be contiguous. role: "copied" if it is not, "in place" (an error if it is
    not), or "made" by the call and returned.
    """

    name: str
    dims: str
    dtype: torch.dtype | None = None
    role: Literal["copied", "in place", "made"] = "copied"
    strides: int = 0
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.name} [{', '.join('...' if dim[0] == '*' else dim for dim in self.dims.split())}]"


class _Known(NamedTuple):
    """What follows from the shapes of a call. copies: tensors to be made contiguous. made: dtypes and shapes, None for
    that of the first tensor."""

    numbers: bytes
    is_bfloat16: bool
    copies: list[int]
    made: list[tuple[list[int] | None, torch.dtype]]
    sizes: dict[str, int]


class Call:
    """A row of the table. args: None where the structure has a pointer that stays null; those made come last.

    sizes: what is passed. given: sizes that the caller names, for there is no tensor to take them from. numbers: other
    fields, as `struct` codes. constants: bytes of the constant part. rule: what sizes must fulfil besides, in words and
    as a function of them.
    """

    def __init__(
        self,
        function: str,
        *args: Arg | None,
        sizes: str,
        given: str = "",
        numbers: str = "",
        constants: int = 0,
        rule: tuple[str, Callable[[dict[str, int]], bool]] = ("", lambda _: True),
    ) -> None:
        self._name, self._given, self._rule = function, given.split(), rule
        self._args = [arg for arg in args if arg is not None and arg.role != "made"]
        self._made = [arg for arg in args if arg is not None and arg.role == "made"]
        self._sizes, self._known = sizes.split(), dict[Any, _Known]()
        self._layout = Tensor.stride if any(arg.strides for arg in self._args) else Tensor.is_contiguous
        num_bytes = 8 * (len(self._sizes) + sum(arg.strides for arg in self._args))
        pointers = "".join("8x" if arg is None else "P" for arg in args)
        self._pack = struct.Struct(f"{constants}s{pointers}{num_bytes}s{numbers}iiiP").pack

    def __call__(
        self,
        *tensors: Tensor | None,
        numbers: tuple[float, ...] = (),
        given: tuple[int, ...] = (),
        constants: bytes = b"",
        weights: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Compute; returns what the row says is made. weights: the features' dtype where constants decide it.

        Raises ConfigError for tensors that do not fit the row and for gradients, before anything is written, and where
        memory or threads are lacking; NotArrived.
        """
        refuse_gradients(tensors)
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        facts = [None if t is None else (t.shape, self._layout(t), t.dtype, t.is_cpu) for t in tensors]
        unaligned = reduce(or_, pointers) & _LOW_BITS and tuple(pointer & _LOW_BITS for pointer in pointers)
        key = (weights, given, unaligned, *facts)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[key] = self._learn(tensors, given, weights)
        sizes, is_bfloat16, copies, made_like, _ = known
        if copies:
            tensors = tuple(t.contiguous() if t is not None and i in copies else t for i, t in enumerate(tensors))
            pointers = [0 if t is None else t.data_ptr() for t in tensors]
        first = tensors[0]
        assert first is not None
        made = [
            torch.empty_like(first) if shape is None else torch.empty(shape, dtype=dtype) for shape, dtype in made_like
        ]
        fields = constants, *pointers, *[tensor.data_ptr() for tensor in made], sizes, *numbers, is_bfloat16
        status = run(self._name, self._pack, fields)
        if status != OK:
            _raise_for(status, known.sizes)
        return made

    def _learn(self, tensors: tuple[Tensor | None, ...], given: tuple[int, ...], weights: torch.dtype | None) -> _Known:
        """Check everything that would make the kernel read outside a tensor, or compute something else."""
        pairs = list(zip(self._args, tensors, strict=True))
        present = [(arg, tensor) for arg, tensor in pairs if tensor is not None]
        missing = "".join(f", no {arg.name}" for arg, tensor in pairs if tensor is None and not arg.optional)
        devices = {tensor.device.type for _, tensor in present}
        if missing or devices != {"cpu"}:
            raise ConfigError(
                f"the backend 'cpu' expects tensors on the CPU, got {', '.join(sorted(devices))}{missing}."
            )
        features = _check_dtypes(present, weights)
        sizes, leading = self._bind(present, dict(zip(self._given, given, strict=True)))
        numbers = [int(name) if name.isdigit() else sizes[name] for name in self._sizes]
        copies = []
        for i, (arg, tensor) in enumerate(pairs):
            if tensor is None:
                numbers += [0] * arg.strides
                continue
            size = tensor.element_size()
            if tensor.data_ptr() % size:
                raise ConfigError(f"{arg.name} is not aligned to its elements of {size} bytes: clone it.")
            if tensor.numel() and not tensor[(0,) * arg.strides].is_contiguous():
                if arg.role == "in place":
                    raise ConfigError(
                        f"the backend 'cpu' takes {arg.name} in place and expects the last "
                        f"{tensor.dim() - arg.strides} dimensions contiguous, got strides {tensor.stride()} for shape "
                        f"{tuple(tensor.shape)}: make it contiguous once, when it is loaded."
                    )
                copies.append(i)
                tensor = tensor.contiguous()
            numbers += tensor.stride()[: arg.strides]
        made = []
        for arg in self._made:
            first_dim, *_ = dims = arg.dims.split()
            shape = [math.prod(sizes[name] for name in dim.split("*")) for dim in dims if dim[0] != "*"]
            shape = [*leading, *shape] if first_dim[0] == "*" else shape
            is_like_first = arg.dtype is None and not copies and shape == list(present[0][1].shape)
            made.append((None if is_like_first else shape, arg.dtype or features))
        return _Known(struct.pack(f"{len(numbers)}q", *numbers), features is torch.bfloat16, copies, made, sizes)

    def _bind(self, present: list[tuple[Arg, Tensor]], sizes: dict[str, int]) -> tuple[dict[str, int], list[int]]:
        """Sizes by their names, and what "*" stands for."""
        leading: list[int] | None = None
        fits, known = True, dict(sizes)
        for arg, tensor in present:
            dims, shape = arg.dims.split(), list(tensor.shape)
            if dims[0][0] == "*" and len(shape) >= len(dims) - 1:
                own = shape[: len(shape) - len(dims) + 1]
                leading = own if leading is None else leading
                fits &= own == leading
                dims, shape = [dims[0][1:], *dims[1:]], [math.prod(own), *shape[len(own) :]]
            fits &= len(dims) == len(shape)
            for name, size in zip(dims, shape, strict=False):
                fits &= size == (int(name) if name.isdigit() else known.setdefault(name, size))
        text, holds = self._rule
        if not fits or not holds(known):
            wanted = ", ".join(str(arg) for arg, _ in present) + text
            told = "".join(f", {name} = {size}" for name, size in sizes.items())
            raise ConfigError(f"expected {wanted}{told}, got shapes {[tuple(tensor.shape) for _, tensor in present]}.")
        return known, leading or []


def refuse_gradients(tensors: Iterable[Tensor | None]) -> None:
    """ConfigError where torch would record what is done with one of these: the kernels have no backward pass."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ConfigError("the backend 'cpu' has no gradients: call it under torch.no_grad(), or use 'torch'.")


def _check_dtypes(present: list[tuple[Arg, Tensor]], weights: torch.dtype | None) -> torch.dtype:
    """The features' dtype."""
    features = {arg.name: tensor.dtype for arg, tensor in present if arg.dtype is None}
    features |= {} if weights is None else {"the bank's weights": weights}
    found = list(features.values())
    if len(set(found)) != 1 or found[0] not in FEATURES:
        wanted = "in float32 or bfloat16" if len(found) == 1 else "all in float32 or all in bfloat16"
        raise ConfigError(
            f"the backend 'cpu' expects {', '.join(features)} {wanted}, got {', '.join(map(str, found))}: convert "
            "them, or use the backend 'torch'."
        )
    for arg, tensor in present:
        if tensor.dtype != (arg.dtype or found[0]):
            raise ConfigError(f"expected {arg.name} in {arg.dtype}, got {tensor.dtype}: convert them.")
    return found[0]


def run(name: str, pack: Callable[..., bytes], fields: tuple[Any, ...]) -> int:
    """The es_status of the function `name`, by the instruction set and in the threads that are in use.

    pack: makes its structure of the fields and of how to compute, which comes last. For callers that have checked what
    they pass; all others call a row of the table.
    """
    function, how = _function(name), thread_pool()
    status = function(pack(*fields, _BEST_ISA, *how))
    return function(pack(*fields, isa_number(), *how)) if status == _ISA_NAMED else status


@cache
def _function(name: str) -> Callable[[bytes], int]:
    function = getattr(library(), name)
    function.argtypes = [c_char_p]
    typed: Callable[[bytes], int] = function
    return typed


def _raise_for(status: int, sizes: dict[str, int]) -> NoReturn:
    if status == _NOT_ARRIVED:
        raise NotArrived
    if status == _BAD_EXPERT_ID:
        raise ConfigError(f"expert ids must be -1 (unused) or 0 to {sizes['E'] - 1}: the plan does not fit this bank.")
    reasons = {
        2: "not enough memory for the scratch of this call: pass fewer tokens at a time",
        3: f"{num_threads()} threads could not be started: set fewer with set_num_threads",
        4: "the instruction set cannot run here, or not with such weights",
    }
    raise ConfigError(f"the backend 'cpu' failed: {reasons[status]}.")


_made = partial(Arg, role="made")
_in_place = partial(Arg, role="in place")

_X, _WEIGHTS = Arg("x", "*T D"), _in_place("weights", "N D")
_TABLE = _in_place("codes of weights", "P C", torch.int8), _in_place("scales of weights", "P 16", torch.float32)
_EXCLUDED = Arg("excluded ids", "X", torch.int64)
_CHOICE = _made("ids", "*T", torch.int64), _made("probabilities", "*T", torch.float32)
_NO_CHOICE = None, None, None
_ROWS = " with N and D above 0", lambda s: s["N"] * s["D"] > 0
_PANELS = (
    " with P panels of 16 rows for N rows, C = 16 * D and D a multiple of 16",
    lambda s: s["N"] > 0 == s["D"] % 16 and s["P"] == -(-s["N"] // 16) and s["C"] == 16 * s["D"] > 0,
)
_project = partial(Call, "es_project", _X)
LINEAR = _project(_WEIGHTS, None, *_NO_CHOICE, _made("y", "*T N"), sizes="T N D 0", rule=_ROWS)
BEST_TOKEN = _project(_WEIGHTS, None, _EXCLUDED, *_CHOICE, None, sizes="T N D X", rule=_ROWS)
QUANTISED_LINEAR = _project(*_TABLE, *_NO_CHOICE, _made("y", "*T N"), sizes="T N D 0", given="N", rule=_PANELS)
QUANTISED_BEST_TOKEN = _project(*_TABLE, _EXCLUDED, *_CHOICE, None, sizes="T N D X", given="N", rule=_PANELS)

_normalise = partial(Call, "es_normalise", _X, sizes="T D", numbers="f", rule=(" with D above 0", lambda s: s["D"] > 0))
RMS_NORM = _normalise(None, Arg("scale", "D"), None, _made("y", "*T D"))
ADD_AND_NORM = _normalise(Arg("what is added", "*T D"), Arg("scale", "D"), _made("sum", "*T D"), _made("y", "*T D"))
QK_NORM_ROPE = Call(
    "es_turn_heads",
    _in_place("queries, keys and values", "B S N D"),
    *(Arg("scale of queries", "D"), Arg("scale of keys", "D"), Arg("cosines", "B 1 S R"), Arg("sines", "B 1 S R")),
    _in_place("buffer of keys", "B G C D", strides=2, optional=True),
    _in_place("buffer of values", "B G C D", strides=2, optional=True),
    sizes="B S H G D R",
    given="H G",
    numbers="Pf",
    rule=(
        " with N heads, H of queries and as many of keys as of values, and R even and at most D",
        lambda s: 0 < s["H"] < s["N"] == s["H"] + 2 * s["G"] and s["D"] > 0 and s["R"] % 2 == 0 and s["R"] <= s["D"],
    ),
)
ATTEND = Call(
    "es_attend",
    *(Arg("queries", "B H S D", strides=3), Arg("keys", "B G P D", strides=2), Arg("values", "B G P D", strides=2)),
    Arg("mask", "B S P", torch.bool, strides=2, optional=True),
    _made("y", "B S H*D"),
    sizes="B H G S P D",
    numbers="f",
    rule=(
        " with no size of keys 0 and G a divisor of H",
        lambda s: s["B"] * s["G"] * s["P"] * s["D"] > 0 and s["H"] % s["G"] == 0,
    ),
)
MOE_FFN = Call(
    "es_moe_ffn",
    *(Arg("tokens", "*T D"), Arg("expert ids", "T K", torch.int64), Arg("weights of the plan", "T K", torch.float32)),
    _in_place("states of arrivals", "E", torch.uint8, optional=True),
    _in_place("nanoseconds waited", "1", torch.int64, optional=True),
    _made("y", "*T D"),
    sizes="T K",
    given="E D F",
    constants=136,
)
