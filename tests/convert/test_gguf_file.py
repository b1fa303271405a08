"""GGUF files written by the package gguf, read under Hugging Face names."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from expertshare.convert.gguf_file import GgufFile
from expertshare.errors import CheckpointError

EXPERTS, INNER, HIDDEN = 3, 32, 256
NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.gate.weight",
    *(f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in range(EXPERTS)),
]


def blocks(kind: GGMLQuantizationType, *shape: int, seed: int = 0) -> np.ndarray:
    """Random codes with finite scales: every code that the type has, unlike what a quantiser would write."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    rows = random.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    scale = np.float16(random.uniform(0.001, 0.01, rows.shape[:-1])).view(np.uint8).reshape(*rows.shape[:-1], 2)
    for start in {"Q4_K": (0, 2), "Q6_K": (size - 2,)}.get(kind.name, (0,)):
        rows[..., start : start + 2] = scale
    return rows.reshape(*shape[:-1], -1)


def write(
    path: Path, kind: GGMLQuantizationType, arch: str = "llada-moe", extra: str | None = None
) -> dict[str, np.ndarray]:
    writer = gguf.GGUFWriter(path, arch)
    tensors = {
        "token_embd.weight": blocks(kind, 4, HIDDEN),
        "blk.0.attn_q.weight": blocks(kind, 8, HIDDEN, seed=1),
        "blk.0.ffn_up_exps.weight": blocks(kind, EXPERTS, INNER, HIDDEN, seed=2),
    }
    for name, data in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    router = np.random.default_rng(3).normal(size=(EXPERTS, HIDDEN)).astype(np.float32)
    writer.add_tensor("blk.0.ffn_gate_inp.weight", router)
    if extra is not None:
        writer.add_tensor(extra, router)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {**tensors, "router": router}


def q8_0(data: np.ndarray) -> np.ndarray:
    """A half scale and 32 signed bytes, written out."""
    parts = data.reshape(*data.shape[:-1], -1, 34)
    scale = parts[..., :2].copy().view(np.float16).astype(np.float32)
    return (scale * parts[..., 2:].copy().view(np.int8)).reshape(*data.shape[:-1], -1)


def q4_0(data: np.ndarray) -> np.ndarray:
    """A half scale and 16 bytes: the first 16 values in the low halves, the others in the high ones, less 8."""
    parts = data.reshape(*data.shape[:-1], -1, 18)
    scale = parts[..., :2].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([parts[..., 2:] & 15, parts[..., 2:] >> 4], axis=-1).astype(np.float32) - 8
    return (scale * codes).reshape(*data.shape[:-1], -1)


def q6_k(data: np.ndarray) -> np.ndarray:
    """128 bytes of low halves, 64 of high quarters, 16 signed scales of 16 values each, a half for all of them."""
    out = []
    for block in data.reshape(-1, 210):
        low, high = block[:128].astype(int), block[128:192].astype(int)
        scales, whole = block[192:208].view(np.int8).astype(np.float32), block[208:].view(np.float16)[0]
        values = np.zeros(256, dtype=np.float32)
        for half in range(2):
            for i in range(32):
                for part in range(4):
                    nibble = low[64 * half + i + 32 * (part % 2)] >> 4 * (part // 2) & 15
                    code = nibble | (high[32 * half + i] >> 2 * part & 3) << 4
                    index = 128 * half + 32 * part + i
                    values[index] = np.float32(whole) * scales[index // 16] * (code - 32)
        out.append(values)
    return np.concatenate(out).reshape(*data.shape[:-1], -1)


def q4_k(data: np.ndarray) -> np.ndarray:
    """Two halves (of scales, of minima), 8 pairs of 6 bits packed into 12 bytes, 128 bytes of codes."""
    out = []
    for block in data.reshape(-1, 144):
        whole, least = block[:4].view(np.float16).astype(np.float32)
        packed, codes = block[4:16].astype(int), block[16:].astype(int)
        values = []
        for group in range(8):
            if group < 4:
                scale, minimum = packed[group] & 63, packed[group + 4] & 63
            else:
                scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
                minimum = packed[group + 4] >> 4 | packed[group] >> 6 << 4
            part = codes[32 * (group // 2) : 32 * (group // 2) + 32] >> 4 * (group % 2) & 15
            values.append(whole * scale * part - least * minimum)
        out.append(np.concatenate(values))
    return np.concatenate(out).reshape(*data.shape[:-1], -1)


FORMULAS = {"Q4_0": q4_0, "Q8_0": q8_0, "Q4_K": q4_k, "Q6_K": q6_k}


@pytest.mark.parametrize("kind", FORMULAS)
def test_every_type_is_its_formula(kind: str, tmp_path: Path) -> None:
    tensors = write(tmp_path / "model.gguf", GGMLQuantizationType[kind])

    file = GgufFile(tmp_path / "model.gguf", "llada_moe", NAMES, 1)

    assert list(file.stored) == NAMES
    for name, stored in file.stored.items():
        assert tuple(file.read(name).shape) == stored.shape, name
    expected = torch.from_numpy(FORMULAS[kind](tensors["blk.0.ffn_up_exps.weight"])).bfloat16()
    for expert in range(EXPERTS):
        found = file.read(f"model.layers.0.mlp.experts.{expert}.up_proj.weight")
        torch.testing.assert_close(found, expected[expert], rtol=2**-7, atol=1e-6)
    assert torch.equal(file.read("model.layers.0.mlp.gate.weight"), torch.from_numpy(tensors["router"]))
    assert file.stored["model.layers.0.mlp.gate.weight"].dtype == "F32"
    assert expected.abs().max() > 0.05


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", GGMLQuantizationType.Q8_0, arch="llama")
    with pytest.raises(CheckpointError, match="'llama', expected llada-moe"):
        GgufFile(tmp_path / "model.gguf", "llada_moe", NAMES, 1)


def test_a_tensor_of_no_part_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", GGMLQuantizationType.Q8_0, extra="blk.0.attn_sinks.weight")
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_sinks\.weight"):
        GgufFile(tmp_path / "model.gguf", "llada_moe", NAMES, 1)


@pytest.mark.parametrize("size", [0, 3, 40, 400])
def test_a_cut_file_is_refused(size: int, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", GGMLQuantizationType.Q8_0)
    whole = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match="truncated or not a GGUF file"):
        GgufFile(tmp_path / "model.gguf", "llada_moe", NAMES, 1)
