"""A GGUF file as the tensors of a Hugging Face checkpoint. Names and block types are those of the package `gguf`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from expertshare.errors import CheckpointError, InputError
from expertshare.models.checkpoint import StoredTensor

if TYPE_CHECKING:
    from gguf import ReaderTensor

GGUF_SUFFIX = ".gguf"
ARCHITECTURES = {
    "llada_moe": ("llada-moe",),
    "llada2_moe": ("bailingmoe2",),
    "sdar_moe": ("qwen3moe", "rnd1"),
}
"""By family: what `general.architecture` may be."""
_ONE_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
_FLOATS = {"F32": torch.float32, "F16": torch.float16}


class GgufFile:
    """An open file. stored: its tensors by the names that the family's checkpoints have.

    names: all names of the checkpoint. Experts that a file holds as one tensor are found under one name each. Raises
    CheckpointError for a file that cannot be read, is of another architecture, or holds tensors that no name is for.
    """

    def __init__(self, path: Path, family: str, names: Iterable[str], num_layers: int) -> None:
        try:
            import gguf
        except ImportError as error:
            raise InputError(
                "reading GGUF files needs the package gguf: install it with pip install 'expertshare[gguf]'"
            ) from error
        self._gguf = gguf
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
            raise CheckpointError(f"{path} is truncated or not a GGUF file ({error}): download it again") from error
        field = reader.get_field(gguf.Keys.General.ARCHITECTURE)
        architecture = field.contents() if field is not None else None
        if architecture not in ARCHITECTURES[family]:
            wanted = " or ".join(ARCHITECTURES[family])
            raise CheckpointError(
                f"{path} holds the architecture {architecture!r}, expected {wanted} for the config.json beside it: put "
                "the config.json of this very model there"
            )
        by_name = {found: arch for arch, found in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(by_name[architecture], num_layers)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._places = {name: place for name in names if (place := self._find(name)) is not None}
        self.stored = {name: self._describe(path, *place) for name, place in self._places.items()}
        used = {tensor.name for tensor, _ in self._places.values()}
        if unused := sorted(set(self._tensors) - used - {"rope_freqs.weight"}):
            raise CheckpointError(
                f"{path}: {len(unused)} tensors belong to no part of this model: {', '.join(unused[:4])}. Expected "
                f"those of {architecture}"
            )

    def read(self, name: str) -> Tensor:
        """One tensor by its Hugging Face name, in the dtype that `stored` says."""
        tensor, expert = self._places[name]
        data = tensor.data if expert is None else tensor.data[expert]
        if tensor.tensor_type.name in _FLOATS:
            return torch.from_numpy(np.array(data))
        values = self._gguf.quants.dequantize(np.ascontiguousarray(data), tensor.tensor_type)
        return torch.from_numpy(values).bfloat16()

    def _find(self, name: str) -> tuple[ReaderTensor, int | None] | None:
        """The file's tensor, and the row of it that is one expert."""
        single = _ONE_EXPERT.fullmatch(name)
        whole = f"{single[1]}.{single[3]}" if single else name.removesuffix(".weight")
        base = self._names.get_name(whole)
        tensor = self._tensors.get(f"{base}.weight") or self._tensors.get(f"{base}.bias")
        return None if tensor is None else (tensor, int(single[2]) if single else None)

    def _describe(self, path: Path, tensor: ReaderTensor, expert: int | None) -> StoredTensor:
        kind = tensor.tensor_type
        try:
            block = np.zeros((1, self._gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
            self._gguf.quants.dequantize(block, kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{tensor.name} in {path} has blocks of type {kind.name}, expected one that the package gguf computes, "
                "such as Q4_0, Q8_0, Q4_K or Q6_K: use a file of one of those"
            ) from error
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return StoredTensor(path, shape if expert is None else shape[1:], kind.name if kind.name in _FLOATS else "BF16")
