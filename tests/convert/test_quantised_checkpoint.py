"""Weights that others quantised, against the code of compressed-tensors, and GPTQ against its formula."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from expertshare.convert.quantised_checkpoint import unpack
from expertshare.errors import CheckpointError
from expertshare.models.checkpoint import StoredTensor

NAMES = {torch.int32: "I32", torch.int64: "I64", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}
OUT, IN, GROUP = 16, 64, 32


def headers(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(Path("model.safetensors"), tuple(tensor.shape), NAMES.get(tensor.dtype, "F16"))
        for name, tensor in tensors.items()
    }


def read_all(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain, weights = unpack(settings, headers(tensors))
    assert set(weights) <= set(plain)
    return {name: weights[name].read(tensors.__getitem__) if name in weights else tensors[name] for name in plain}


def words(codes: Tensor, bits: int = 4) -> Tensor:
    """[n, m] codes as int32 [n, m * bits / 32], lowest bits first: a plain loop."""
    rows = []
    for row in codes.tolist():
        packed = []
        for start in range(0, len(row), 32 // bits):
            word = sum(code << bits * i for i, code in enumerate(row[start : start + 32 // bits]))
            packed.append(word - 2**32 if word >= 2**31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


def random_codes(*shape: int, bits: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed))


def random_scales(*shape: int, seed: int = 1) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5).half() / 64


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("order", ["as they lie", "by activation"])
def test_gptq_is_its_formula(version: str, bits: int, order: str) -> None:
    codes_IO, scales_GO = random_codes(IN, OUT, bits=bits), random_scales(IN // GROUP, OUT)
    zeros_GO = random_codes(IN // GROUP, OUT, bits=bits, seed=2).clamp(min=1)
    group_I = torch.arange(IN) // GROUP
    tensors = {
        "x.qweight": words(codes_IO.T, bits).T.contiguous(),
        "x.qzeros": words(zeros_GO - int(version == "gptq"), bits),
        "x.scales": scales_GO,
        "norm.weight": torch.ones(4),
    }
    if order == "by activation":
        group_I = group_I[torch.randperm(IN, generator=torch.Generator().manual_seed(3))]
        tensors["x.g_idx"] = group_I.int()

    found = read_all({"quant_method": "gptq", "bits": bits, "checkpoint_format": version}, tensors)

    assert set(found) == {"x.weight", "norm.weight"}
    expected = [
        [float(scales_GO[group_I[i], o]) * (int(codes_IO[i, o]) - int(zeros_GO[group_I[i], o])) for i in range(IN)]
        for o in range(OUT)
    ]
    assert torch.equal(found["x.weight"], torch.tensor(expected).bfloat16())


@pytest.mark.parametrize("zero_point", [True, False])
def test_awq_as_compressed_tensors_reads_it(zero_point: bool) -> None:
    tensors = {"x.qweight": words(random_codes(IN, OUT)), "x.scales": random_scales(IN // GROUP, OUT)}
    if zero_point:
        tensors["x.qzeros"] = words(random_codes(IN // GROUP, OUT, seed=2))
    peer = AutoAWQConverter(group_size=GROUP, zero_point=zero_point)
    codes_OI, scale_OG, zero_OG = peer._convert_gemm_module(
        tensors["x.qweight"], tensors["x.scales"], tensors.get("x.qzeros")
    )
    scale_OI = scale_OG.float().repeat_interleave(GROUP, 1)
    zero_OI = 0 if zero_OG is None else zero_OG.float().repeat_interleave(GROUP, 1)

    found = read_all({"quant_method": "awq", "bits": 4, "version": "GEMM"}, tensors)

    assert torch.equal(found["x.weight"], (scale_OI * (codes_OI.float() - zero_OI)).bfloat16())


CASES = {
    "int8 by row": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 by tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "int8 by group": ("int-quantized", {"num_bits": 8, "strategy": "group", "group_size": GROUP}),
    "int8 with zero points": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "packed int8": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "packed int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}),
    "packed int4 with zero points": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False},
    ),
    "float8 by row": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "float8 by block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 16]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_compressed_tensors_as_it_decompresses_itself(case: str) -> None:
    layout, arguments = CASES[case]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments), format=layout)
    shape: tuple[int, ...] = {"channel": (OUT, 1), "tensor": (1,), "group": (OUT, IN // GROUP)}.get(
        arguments["strategy"], (2, 4)
    )
    weights = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) * 0.3
    state = {"weight": weights, "weight_scale": random_scales(*shape).float()}
    if arguments.get("symmetric") is False:
        half = 2 ** (arguments["num_bits"] - 1)
        state["weight_zero_point"] = (random_codes(*shape, bits=arguments["num_bits"], seed=2) - half).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(layout)
    stored = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    settings = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
    }

    found = read_all(settings, {f"x.{name}": tensor for name, tensor in stored.items()})

    assert set(found) == {"x.weight"}
    torch.testing.assert_close(found["x.weight"].float(), expected.float(), rtol=2**-8, atol=0)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("shape", [(16, 64), (20, 50)], ids=["whole blocks", "cut blocks"])
def test_fp8_by_blocks_as_compressed_tensors_reads_it(shape: tuple[int, int]) -> None:
    codes = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    tensors = {
        "x.weight": codes,
        "x.weight_scale_inv": random_scales(-(-shape[0] // 8), -(-shape[1] // 16)).float(),
        "x.input_scale": torch.ones(1),
        "y.weight": torch.ones(3, 3),
    }
    expected = FP8BlockDequantizer(weight_block_size=(8, 16))._create_dequantized_weight(
        codes, tensors["x.weight_scale_inv"]
    )

    found = read_all({"quant_method": "fp8", "weight_block_size": [8, 16]}, tensors)

    assert set(found) == {"x.weight", "y.weight"}
    assert torch.equal(found["x.weight"], expected)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 3}, "bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"format": "nvfp4-pack-quantized", "weights": {}}},
            },
            "config_groups",
        ),
        ({"quant_method": "gptq", "bits": 4}, "no tensor ends in .qweight"),
    ],
)
def test_what_is_not_read_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        unpack(settings, headers({"x.weight": torch.ones(2, 2)}))


@pytest.mark.parametrize(
    "settings",
    [
        "gptq",
        {"quant_method": ["gptq"]},
        {"quant_method": "compressed-tensors", "config_groups": None},
        {"quant_method": "compressed-tensors", "config_groups": {"a": 3}},
    ],
)
def test_settings_that_are_none_are_refused_in_words(settings: Any) -> None:
    with pytest.raises(CheckpointError, match="quantization_config cannot be read"):
        unpack(settings, headers({"x.weight": torch.ones(2, 2)}))


def test_parts_that_do_not_fit_are_named() -> None:
    tensors = {
        "x.qweight": words(random_codes(IN, OUT).T).T,
        "x.qzeros": words(random_codes(2, OUT)),
        "x.scales": random_scales(2, OUT // 2),
    }
    with pytest.raises(CheckpointError, match=r"x\.scales \[2, 8\]"):
        read_all({"quant_method": "gptq", "bits": 4}, tensors)
    del tensors["x.qzeros"]
    with pytest.raises(CheckpointError, match=r"has no x\.qzeros"):
        read_all({"quant_method": "gptq", "bits": 4}, tensors)
