"""Converting what others quantised gives the slabs of a checkpoint that holds the same weights plainly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert.models import CONFIGS, save_random
from convert.test_quantised_checkpoint import words
from expertshare.convert import convert
from expertshare.convert.sizes import sizes_of
from expertshare.convert.source import read_checkpoint
from expertshare.errors import CheckpointError, InputError
from expertshare.models import load_model

REFERENCE = Path(__file__).parents[2] / "models" / "reference"
GROUP = 32
Tensors = dict[str, Tensor]


def asymmetric(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes 0..15 [O, I], scales (half) and zeros [O, G], and the weights that they stand for."""
    parts = weight_OI.float().view(len(weight_OI), -1, GROUP)
    low, high = parts.amin(-1), parts.amax(-1)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(1, 15)
    codes = (parts / scale.float().unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 15)
    values = scale.float().unsqueeze(-1) * (codes - zero.unsqueeze(-1))
    return codes.flatten(1).long(), scale, zero.long(), values.flatten(1).bfloat16()


def gptq(name: str, weight_OI: Tensor) -> tuple[Tensors, Tensor]:
    codes, scale, zero, plain = asymmetric(weight_OI)
    stem = name.removesuffix("weight")
    tensors = {"qweight": words(codes).T, "qzeros": words(zero.T - 1), "scales": scale.T}
    return {stem + part: tensor.contiguous() for part, tensor in tensors.items()}, plain


def awq(name: str, weight_OI: Tensor) -> tuple[Tensors, Tensor]:
    codes, scale, zero, plain = asymmetric(weight_OI)
    stem = name.removesuffix("weight")
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(codes_XO: Tensor) -> Tensor:
        return words(codes_XO.reshape(len(codes_XO), -1, 8)[:, :, order].flatten(1))

    tensors = {"qweight": packed(codes.T), "qzeros": packed(zero.T), "scales": scale.T}
    return {stem + part: tensor.contiguous() for part, tensor in tensors.items()}, plain


def int8(name: str, weight_OI: Tensor) -> tuple[Tensors, Tensor]:
    scale = weight_OI.float().abs().amax(dim=1, keepdim=True) / 127
    codes = (weight_OI.float() / scale).round().to(torch.int8)
    return {name: codes, f"{name}_scale": scale.bfloat16()}, (codes.float() * scale.bfloat16().float()).bfloat16()


def fp8(name: str, weight_OI: Tensor) -> tuple[Tensors, Tensor]:
    scale = torch.full((-(-weight_OI.shape[0] // 16), -(-weight_OI.shape[1] // 16)), 0.01)
    codes = (weight_OI.float() / 0.01).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}, (codes.float() * torch.tensor(0.01)).bfloat16()


FORMATS: dict[str, tuple[dict[str, Any], Callable[[str, Tensor], tuple[Tensors, Tensor]]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}, gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}},
        },
        int8,
    ),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}, fp8),
}


def two_checkpoints(family: str, method: str, folder: Path) -> tuple[Path, Path]:
    """The experts (and attention) of a random model quantised, and the same model with the weights they stand for."""
    settings, quantise = FORMATS[method]
    plain = save_random(CONFIGS[family], folder / "plain")
    quantised = Path(shutil.copytree(plain, folder / "quantised"))
    tensors = load_file(plain / "model.safetensors")
    stored: Tensors = {}
    for name, tensor in list(tensors.items()):
        if ".experts." in name or name.endswith(("o_proj.weight", "attention.dense.weight")):
            parts, tensors[name] = quantise(name, tensor)
            stored |= parts
        else:
            stored[name] = tensor
    save_file(tensors, plain / "model.safetensors")
    save_file(stored, quantised / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return plain, quantised


def layers(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.suffix == ".safetensors"}


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("family", CONFIGS)
def test_slabs_are_those_of_the_plain_weights(family: str, method: str, tmp_path: Path) -> None:
    plain, quantised = two_checkpoints(family, method, tmp_path)
    for scheme in ("none", "int4"):
        convert(plain, tmp_path / f"a-{scheme}", quantise=scheme)
        convert(quantised, tmp_path / f"b-{scheme}", quantise=scheme)
        assert layers(tmp_path / f"a-{scheme}") == layers(tmp_path / f"b-{scheme}")
    assert "quantization_config" not in json.loads((tmp_path / "b-none" / "config.json").read_text())
    assert load_model(tmp_path / "b-none").config == CONFIGS[family]
    for read in (load_model, sizes_of):
        with pytest.raises(CheckpointError, match="expertshare convert"):
            read(quantised)


def test_a_part_in_a_file_of_its_own_counts_in_the_fingerprint_and_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    _, quantised = two_checkpoints("llada_moe", "gptq", tmp_path)
    whole = load_file(quantised / "model.safetensors")
    scales = {name: tensor for name, tensor in whole.items() if name.endswith(".scales")}
    save_file(scales, quantised / "model-2.safetensors")
    save_file({name: tensor for name, tensor in whole.items() if name not in scales}, quantised / "model-1.safetensors")
    (quantised / "model.safetensors").unlink()
    placed = {name: f"model-{1 + (name in scales)}.safetensors" for name in whole}
    (quantised / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    before = read_checkpoint(quantised).fingerprint
    save_file({name: tensor * 2 for name, tensor in scales.items()}, quantised / "model-2.safetensors")
    assert read_checkpoint(quantised).fingerprint != before
    save_file({name: tensor.byte() for name, tensor in scales.items()}, quantised / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="has dtype U8"):
        convert(quantised, tmp_path / "out")


NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
"""As llama.cpp's converter names them."""


def write_gguf(plain: Path, path: Path, architecture: str) -> None:
    """Experts in Q8_0, everything else as it is; the plain checkpoint gets the weights that the blocks stand for."""
    tensors = load_file(plain / "model.safetensors")
    writer = gguf.GGUFWriter(path, architecture)
    by_layer: dict[tuple[str, str], dict[int, str]] = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            head, _, rest = name.partition(".mlp.experts.")
            expert, projection, _ = rest.split(".")
            by_layer.setdefault((head.split(".")[-1], projection.removesuffix("_proj")), {})[int(expert)] = name
            continue
        found = NAMES.get(name)
        if found is None:
            _, _, layer, rest = name.split(".", 3)
            found = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
        writer.add_tensor(found, tensor.float().numpy())
        tensors[name] = tensor.float()
    for (layer, projection), names in by_layer.items():
        whole = np.stack([tensors[names[expert]].float().numpy() for expert in range(len(names))])
        blocks = gguf.quants.quantize(whole, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"blk.{layer}.ffn_{projection}_exps.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        for expert, value in enumerate(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)):
            tensors[names[expert]] = torch.from_numpy(value.copy()).bfloat16()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(tensors, plain / "model.safetensors")


@pytest.mark.parametrize(("family", "architecture"), [("llada_moe", "llada-moe"), ("sdar_moe", "qwen3moe")])
def test_slabs_of_a_gguf_file(family: str, architecture: str, tmp_path: Path) -> None:
    plain = save_random(CONFIGS[family], tmp_path / "plain")
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_gguf(plain, folder / "model-Q8_0.gguf", architecture)
    with pytest.raises(InputError, match=r"config\.json and tokenizer\.json of the original model"):
        convert(folder, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        shutil.copy(plain / name, folder)
    shutil.copy(REFERENCE / "tokenizer.json", folder)
    shutil.copy(REFERENCE / "tokenizer.json", plain)
    convert(plain, tmp_path / "a")
    convert(folder, tmp_path / "b")
    convert(folder / "model-Q8_0.gguf", tmp_path / "c")
    assert layers(tmp_path / "a") == layers(tmp_path / "b") == layers(tmp_path / "c")
    shutil.copy(folder / "model-Q8_0.gguf", folder / "another.gguf")
    with pytest.raises(InputError, match="2 GGUF files"):
        convert(folder, tmp_path / "d")
