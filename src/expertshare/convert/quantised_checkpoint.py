"""Checkpoints that others quantised, as the plain weights that they stand for: GPTQ, AWQ, compressed-tensors, FP8.

A quantised weight is stored as several tensors (codes, scales, zero points). `unpack` says which weights a checkpoint
holds in this way, and each computes its weight when it is read. All these formats mean the same, weight = scale * (code
- zero), with a scale per tensor, per row, per group of inputs or per block; they differ in how codes are packed.

Sources, opened: AutoAWQ's and FP8's files as compressed-tensors 0.20 reads them (entrypoints/convert/converters), its
own compressors, and GPTQModel's torch kernel for GPTQ. Tests compare with compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expertshare.errors import CheckpointError
from expertshare.models.checkpoint import StoredTensor

Read = Callable[[str], Tensor]
Parts = Mapping[str, Tensor]

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""AutoAWQ spreads eight neighbouring outputs over a word: output i is the code at this place."""
_WORD_BITS = 32
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "k_scale", "v_scale", "q_scale")
_COMPRESSED = ("int-quantized", "naive-quantized", "float-quantized", "pack-quantized")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantisedWeight:
    """One weight that a checkpoint holds as codes. parts: the names of the tensors that make it, by what they are."""

    stored: StoredTensor
    parts: Mapping[str, str]
    decode: Callable[[Parts], Tensor]

    def read(self, read: Read) -> Tensor:
        """The weight [out, in] in bfloat16. Raises CheckpointError for parts that do not fit each other."""
        parts = {part: read(name) for part, name in self.parts.items()}
        try:
            weight_OI = self.decode(parts)
            if tuple(weight_OI.shape) == self.stored.shape:
                return weight_OI.bfloat16()
        except (RuntimeError, IndexError, TypeError, ZeroDivisionError):
            pass
        shapes = ", ".join(f"{self.parts[part]} {list(tensor.shape)}" for part, tensor in parts.items())
        raise CheckpointError(f"expected tensors that make one weight, got {shapes}: download the checkpoint again")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Format:
    """How one method names and packs things. codes: the tensor that shows a weight's shape, by `shape`."""

    codes: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = field(default=())
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple
    decode: Callable[[Parts], Tensor]


def unpack(
    settings: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], dict[str, QuantisedWeight]]:
    """The tensors that a checkpoint stands for, and those among them that are computed from codes, both by name.

    settings: `quantization_config` of config.json. Tensors about activations are left out: we compute in bfloat16.
    Raises CheckpointError for a method or a setting that is not read.
    """
    try:
        layout = _format(settings)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"config.json: quantization_config cannot be read ({error}), expected an object as its method writes it: "
            "download it again"
        ) from error
    plain = {name: tensor for name, tensor in stored.items() if not name.endswith(_OF_ACTIVATIONS)}
    weights: dict[str, QuantisedWeight] = {}
    marker = layout.required[-1]
    for stem in [name.removesuffix(marker) for name in stored if name.endswith(f".{marker}")]:
        if missing := [part for part in layout.required if stem + part not in stored]:
            raise CheckpointError(f"{stem}{marker} has no {stem}{missing[0]} beside it: is the download complete?")
        parts = {part: stem + part for part in (*layout.required, *layout.optional) if stem + part in stored}
        codes = stored[parts[layout.codes]]
        for name in parts.values():
            del plain[name]
        if len(codes.shape) != 2:
            raise CheckpointError(f"{parts[layout.codes]} has shape {list(codes.shape)}, expected a matrix of codes")
        whole = StoredTensor(codes.file, layout.shape(codes.shape), "BF16")
        plain[f"{stem}weight"] = whole
        weights[f"{stem}weight"] = QuantisedWeight(stored=whole, parts=parts, decode=layout.decode)
    if not weights:
        raise CheckpointError(
            f"config.json announces {settings.get('quant_method')} weights, and no tensor ends in .{marker}: the files "
            "belong to another version of this format, use the original checkpoint"
        )
    return plain, weights


def _format(settings: Mapping[str, Any]) -> _Format:
    method = settings.get("quant_method")
    if method not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise CheckpointError(
            f"expected weights quantised by one of {known} (or a GGUF file), got quant_method={method!r} in "
            "quantization_config: use the original checkpoint"
        )
    return _FORMATS[method](settings)


def _expect(settings: Mapping[str, Any], key: str, *supported: object, default: object = None) -> Any:
    """The value of a setting, which must be one of those that are read."""
    value = settings.get(key, default)
    value = value.lower() if isinstance(value, str) else value
    if value not in supported:
        wanted = " or ".join(repr(choice) for choice in supported)
        raise CheckpointError(
            f"expected {wanted} for {key} in quantization_config, got {value!r}: use the original checkpoint"
        )
    return value


def _gptq(settings: Mapping[str, Any]) -> _Format:
    bits = int(_expect(settings, "bits", 2, 4, 8))
    below_by = 1 if _expect(settings, "checkpoint_format", "gptq", "gptq_v2", default="gptq") == "gptq" else 0

    def decode(parts: Parts) -> Tensor:
        codes_OI = _codes(parts["qweight"].T, bits)
        # The first version of the format stores zero points less one.
        zeros_OG = (_codes(parts["qzeros"], bits).T + below_by) % 2**bits
        return _weight(codes_OI, parts["scales"].T, zeros_OG, parts.get("g_idx"))

    return _Format(
        codes="qweight",
        required=("qzeros", "scales", "qweight"),
        optional=("g_idx",),
        shape=lambda packed: (packed[1], packed[0] * _WORD_BITS // bits),
        decode=decode,
    )


def _awq(settings: Mapping[str, Any]) -> _Format:
    bits = int(_expect(settings, "bits", 4))
    _expect(settings, "version", "gemm", default="gemm")

    def decode(parts: Parts) -> Tensor:
        zeros_OG = _in_order(parts["qzeros"]) if "qzeros" in parts else 2 ** (bits - 1)
        return _weight(_in_order(parts["qweight"]), parts["scales"].T, zeros_OG)

    def _in_order(packed: Tensor) -> Tensor:
        codes = _codes(packed, bits)
        return codes.view(len(codes), -1, len(AWQ_PLACES))[:, :, AWQ_PLACES].flatten(1).T

    return _Format(
        codes="qweight",
        required=("scales", "qweight"),
        optional=("qzeros",),
        shape=lambda packed: (packed[1] * _WORD_BITS // bits, packed[0]),
        decode=decode,
    )


def _compressed_tensors(settings: Mapping[str, Any]) -> _Format:
    groups = [group for group in settings.get("config_groups", {}).values() if group.get("weights")]
    kinds = {(group["weights"].get("num_bits"), group["weights"].get("type", "int")) for group in groups}
    formats = {
        _expect({"format": group.get("format") or settings.get("format")}, "format", *_COMPRESSED) for group in groups
    }
    blocks = {tuple(group["weights"].get("block_structure") or ()) for group in groups}
    if len(kinds) != 1 or len(formats) != 1 or len(blocks) != 1 or settings.get("transform_config"):
        raise CheckpointError(
            "expected one kind of weights in the config_groups of quantization_config and no transforms, got "
            f"{sorted(map(str, kinds))}: use the original checkpoint"
        )
    [(bits, _)], [layout], [block] = kinds, formats, blocks
    if layout != "pack-quantized":
        return _scaled("weight_scale", block or None)
    bits = int(_expect({"num_bits": bits}, "num_bits", 4, 8))

    def decode(parts: Parts) -> Tensor:
        zero = parts.get("weight_zero_point")
        zeros_OG = 2 ** (bits - 1) if zero is None else _codes(zero.T, bits).T
        return _weight(_codes(parts["weight_packed"], bits), parts["weight_scale"], zeros_OG, parts.get("weight_g_idx"))

    return _Format(
        codes="weight_packed",
        required=("weight_scale", "weight_packed"),
        optional=("weight_zero_point", "weight_shape", "weight_g_idx"),
        shape=lambda packed: (packed[0], packed[1] * _WORD_BITS // bits),
        decode=decode,
    )


_FORMATS: dict[Any, Callable[[Mapping[str, Any]], _Format]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": lambda settings: _scaled(
        "weight_scale_inv" if settings.get("weight_block_size") else "weight_scale", settings.get("weight_block_size")
    ),
}


def _scaled(scale: str, block: tuple[int, int] | None) -> _Format:
    """Weights of eight bits under their own name, integers or float8."""

    def decode(parts: Parts) -> Tensor:
        zero = parts.get("weight_zero_point", 0)
        return _weight(parts["weight"], parts[scale], zero, parts.get("weight_g_idx"), block)

    return _Format(
        codes="weight", required=("weight", scale), optional=("weight_zero_point", "weight_g_idx"), decode=decode
    )


def _codes(packed: Tensor, bits: int) -> Tensor:
    """int32 words [rows, words] as codes [rows, words * 32 / bits], the lowest bits first."""
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32)
    codes: Tensor = packed.unsqueeze(-1) >> shifts & 2**bits - 1
    return codes.flatten(1)


def _weight(
    codes_OI: Tensor,
    scale: Tensor,
    zero: Tensor | int,
    groups_I: Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """scale * (code - zero) in float32 [out, in].

    scale, zero: one value, one for each row, or [out, groups], where groups_I [in] says which group an input is in
    (None: groups of neighbours); with a block of so many rows and columns, [row blocks, column blocks].
    """

    def spread(values: Tensor | int) -> Tensor:
        values = torch.as_tensor(values).float()
        if values.numel() == 1:
            return values.reshape(1, 1)
        if values.dim() == 1:
            return values.unsqueeze(1)
        if block is not None:
            values = values.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            return values[: codes_OI.shape[0], : codes_OI.shape[1]]
        if groups_I is not None:
            return values[:, groups_I.long()]
        return values.repeat_interleave(codes_OI.shape[1] // values.shape[1], 1)

    return (codes_OI.float() - spread(zero)) * spread(scale)
