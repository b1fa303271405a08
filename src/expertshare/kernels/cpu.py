"""Experts on the CPU by our own kernel (kernels/native): weights are read once, where they lie, and never copied.

The library `libexpertshare_cpu.so` is built when the package is installed (setup.py) and looked for beside this file,
nowhere else. EXPERTSHARE_ISA names the instruction set to use (avx512_bf16, avx512, avx2, portable) instead of the
best that the processor has; it is read at every call.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from expertshare.errors import ConfigError, nearest
from expertshare.types import ExpertBank, RoutingPlan

LIBRARY = Path(__file__).with_name("libexpertshare_cpu.so")
_ABI_VERSION = 1
_MAX_THREADS = 1024
_num_threads: int | None = None
_team: int | None = None  # address of GOMP_parallel


class _Layer(Structure):
    """es_layer of native/abi.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "ids", "weights", "gate_up", "down", "y")),
        *((name, c_int64) for name in ("num_tokens", "top_k", "num_experts", "hidden", "inner")),
        *((name, c_int64) for name in ("gate_up_stride", "down_stride")),
        *((name, c_int32) for name in ("is_bfloat16", "isa", "num_threads")),
        ("team", c_void_p),
    )


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return (
            f"{LIBRARY.name} is not beside {Path(__file__).name}: there was no C++ compiler when expertshare was "
            f"installed, or it failed. Install g++ or clang++, then expertshare again (pip install -v says why)"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
        version = int(library.es_abi_version())
    except (OSError, AttributeError) as error:
        return f"{LIBRARY.name} cannot be loaded: {error}. Install expertshare again"
    if version != _ABI_VERSION:
        return f"{LIBRARY.name} is of version {version}, expected {_ABI_VERSION}. Install expertshare again"
    library.es_isa_name.restype = c_char_p
    library.es_isa_name.argtypes = library.es_isa_usable.argtypes = [c_int]
    library.es_moe_ffn.argtypes = [POINTER(_Layer)]
    return library


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise ConfigError(f"the expert backend 'cpu' is not available: {library}, or use the backend 'grouped'.")
    return library


def available() -> bool:
    """Whether the library is there and fits."""
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Why `available()` is False, with what to do; None where it is True."""
    library = _load()
    return library if isinstance(library, str) else None


@cache
def _isas() -> dict[str, int]:
    """Every instruction set that the library knows -> its number, the fastest first."""
    library = _library()
    return {library.es_isa_name(isa).decode(): isa for isa in range(library.es_num_isas())}


def usable_instruction_sets() -> list[str]:
    """Those that this build contains and this processor runs, the fastest first."""
    library = _library()
    return [name for name, isa in _isas().items() if library.es_isa_usable(isa)]


@cache
def _usable_isa(asked: str | None) -> str:
    usable = usable_instruction_sets()
    if asked is None:
        return usable[0]
    if asked not in _isas():
        raise ConfigError(f"EXPERTSHARE_ISA={asked!r} is no instruction set. {nearest(asked, _isas())}")
    if asked not in usable:
        raise ConfigError(
            f"EXPERTSHARE_ISA={asked} cannot run here: the processor or the compiler of this build lacks it. "
            f"Expected one of {', '.join(usable)}; unset it to use the best."
        )
    return asked


def instruction_set() -> str:
    """The instruction set that the next call uses. Raises ConfigError if EXPERTSHARE_ISA names none that runs here."""
    return _usable_isa(os.environ.get("EXPERTSHARE_ISA") or None)


def set_num_threads(num_threads: int | None) -> None:
    """Threads of the next calls, the caller's among them; None (the default) means torch's number of threads.

    Changing it ends the old threads and starts new ones, so set it once.
    """
    if num_threads is not None and not 1 <= num_threads <= _MAX_THREADS:
        raise ConfigError(f"expected 1 to {_MAX_THREADS} threads, got {num_threads}.")
    global _num_threads
    _num_threads = num_threads


def num_threads() -> int:
    """Threads that the next call may use; a small one uses fewer."""
    return min(_num_threads or torch.get_num_threads(), _MAX_THREADS)


def use_torch_threads(use: bool) -> None:
    """Run in the threads of torch's OpenMP (libgomp) instead of our own, as long as their number is torch's.

    After every parallel torch operation those threads spin for some milliseconds, in which they would contest the
    cores with ours; inside their team there is nothing to contest. Raises ConfigError where torch has no libgomp.
    """
    global _team
    _team = _gomp_parallel() if use else None


@cache
def _gomp_parallel() -> int:
    maps = Path("/proc/self/maps")
    mapped = maps.read_text().splitlines() if maps.exists() else []
    found = {line.split(maxsplit=5)[-1] for line in mapped if "libgomp" in line}
    paths = sorted(found, key=lambda path: "torch" not in path)  # another library may have brought its own
    if not paths:
        raise ConfigError("torch's threads cannot be used: this torch has no libgomp. Keep the kernel's own threads.")
    address = ctypes.cast(ctypes.CDLL(paths[0]).GOMP_parallel, c_void_p).value
    assert address is not None
    return address


def moe_ffn_cpu(x_TD: Tensor, plan: RoutingPlan, bank: ExpertBank) -> Tensor:
    """As moe_ffn_grouped, for inference. Reads the weights of experts that the plan names and no others.

    Sums over features and slots are float32, slots in order; with bfloat16 weights the hidden features (after SiLU
    and product, themselves float32) are rounded once to bfloat16. The result depends on the instruction set, but not
    on the number of threads or on the other tokens. Rows of the bank must be contiguous; the kernel needs no
    alignment beyond that of an element. Calls from several threads take turns; the interpreter lock is released.
    Raises ConfigError for what the kernel cannot take: gradients, another device or dtype, other layouts.
    """
    library = _library()
    _check(x_TD, plan, bank)
    x_TD, ids_TK, weights_TK = x_TD.contiguous(), plan.expert_ids_TK.contiguous(), plan.weights_TK.contiguous()
    y_TD = torch.empty_like(x_TD)
    num_experts, hidden, inner = bank.down_EDF.shape
    layer = _Layer(
        *(tensor.data_ptr() for tensor in (x_TD, ids_TK, weights_TK, bank.gate_up_EHD, bank.down_EDF, y_TD)),
        *ids_TK.shape,
        num_experts,
        hidden,
        inner,
        bank.gate_up_EHD.stride(0),
        bank.down_EDF.stride(0),
        int(x_TD.dtype == torch.bfloat16),
        _isas()[instruction_set()],
        num_threads(),
        _team if num_threads() == torch.get_num_threads() else None,
    )
    _raise_for(int(library.es_moe_ffn(byref(layer))), num_experts)
    return y_TD


def _check(x_TD: Tensor, plan: RoutingPlan, bank: ExpertBank) -> None:
    """Everything that would make the kernel read outside a tensor, or compute something else."""
    ids_TK, weights_TK, gate_up, down = plan.expert_ids_TK, plan.weights_TK, bank.gate_up_EHD, bank.down_EDF
    features = (x_TD, weights_TK, gate_up, down)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in features):
        raise ConfigError(
            "the expert backend 'cpu' has no gradients: call it under torch.no_grad(), or use the backend 'grouped'."
        )
    devices = {tensor.device.type for tensor in (*features, ids_TK)}
    if devices != {"cpu"}:
        raise ConfigError(f"the expert backend 'cpu' expects tensors on the CPU, got {', '.join(sorted(devices))}.")
    dtypes = (x_TD.dtype, gate_up.dtype, down.dtype)
    if len(set(dtypes)) != 1 or dtypes[0] not in (torch.float32, torch.bfloat16):
        raise ConfigError(
            "the expert backend 'cpu' expects tokens, gate_up and down all in float32 or all in bfloat16, got "
            f"{', '.join(map(str, dtypes))}: convert them, or use the backend 'grouped'."
        )
    if (ids_TK.dtype, weights_TK.dtype) != (torch.int64, torch.float32):
        raise ConfigError(f"expected int64 expert ids and float32 weights, got {ids_TK.dtype} and {weights_TK.dtype}.")
    if down.dim() != 3 or x_TD.dim() != 2 or ids_TK.dim() != 2:
        raise ConfigError(
            "expected x [T, D], expert ids [T, K] and down [E, D, F], got shapes "
            f"{tuple(x_TD.shape)}, {tuple(ids_TK.shape)} and {tuple(down.shape)}."
        )
    num_experts, hidden, inner = down.shape
    expected = ((len(x_TD), hidden), (len(x_TD), ids_TK.shape[1]), ids_TK.shape, (num_experts, 2 * inner, hidden))
    got = (x_TD.shape, ids_TK.shape, weights_TK.shape, gate_up.shape)
    if any(tuple(a) != tuple(b) for a, b in zip(expected, got, strict=True)) or 0 in (hidden, inner):
        raise ConfigError(
            f"x, expert ids, weights and gate_up do not fit down {tuple(down.shape)}: "
            f"expected shapes {[tuple(shape) for shape in expected]}, got {[tuple(shape) for shape in got]}."
        )
    _check_layout("gate_up", gate_up)
    _check_layout("down", down)


def _check_layout(name: str, weights: Tensor) -> None:
    if len(weights) and not weights[0].is_contiguous():
        raise ConfigError(
            f"the expert backend 'cpu' reads weights where they lie and expects each expert of {name} contiguous, got "
            f"strides {weights.stride()} for shape {tuple(weights.shape)}: make it contiguous once, when it is loaded."
        )
    if weights.data_ptr() % weights.element_size() != 0:
        raise ConfigError(f"{name} is not aligned to its elements of {weights.element_size()} bytes: clone it.")


def _raise_for(status: int, num_experts: int) -> None:
    if status == 0:
        return
    reasons = {
        1: f"expert ids must be -1 (unused) or 0 to {num_experts - 1}: the plan does not fit this bank",
        2: "not enough memory for the scratch of this call: pass fewer tokens at a time",
        3: f"{num_threads()} threads could not be started: set fewer with set_num_threads",
        4: "the instruction set cannot run here",
    }
    raise ConfigError(f"the expert backend 'cpu' failed: {reasons[status]}.")
