"""Hugging Face layout -> expert layout -> Hugging Face layout changes no bit; what lies between is as documented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertshare.convert import convert, restore, verify
from expertshare.convert.convert import open_expert_layout
from expertshare.errors import CheckpointError, ConfigError, InputError
from expertshare.experts.layout import open_layers, read_manifest
from expertshare.kernels.quantise import dequantise
from models.layouts import LLADA2_CONFIG, glm4_pair, merged_names, write_checkpoint

from .models import CONFIGS, LLADA2, read_all, same_bits, save_random


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", CONFIGS)
def test_there_and_back_changes_no_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_random(CONFIGS[family], tmp_path / "source", dtype=dtype)
    assert convert(source, tmp_path / "experts").fresh
    restore(tmp_path / "experts", tmp_path / "back")
    assert same_bits(read_all(source), read_all(tmp_path / "back"))
    for name in ("config.json", "generation_config.json"):
        assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_shards_hold_the_same_and_none_is_too_large(tmp_path: Path) -> None:
    source = save_random(LLADA2, tmp_path / "source")
    convert(source, tmp_path / "experts")
    restore(tmp_path / "experts", tmp_path / "back", max_shard_bytes=100_000)
    assert same_bits(read_all(source), read_all(tmp_path / "back"))
    shards = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(shards) > 3
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 100_000 for shard in shards)
    # and shards are a source like any other
    convert(tmp_path / "back", tmp_path / "again")
    assert (tmp_path / "again" / "experts-00001.safetensors").read_bytes() == (
        tmp_path / "experts" / "experts-00001.safetensors"
    ).read_bytes()


def test_a_merged_layout_gives_the_same_experts_and_comes_back_merged(tmp_path: Path) -> None:
    plain = glm4_pair(tmp_path / "plain").directory
    (tmp_path / "merged").mkdir()
    write_checkpoint(tmp_path / "merged", LLADA2_CONFIG, merged_names(read_all(plain)))
    for name in ("plain", "merged"):
        convert(tmp_path / name, tmp_path / f"{name}-experts")
    for file in (tmp_path / "plain-experts").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "merged-experts" / file.name).read_bytes()
    restore(tmp_path / "merged-experts", tmp_path / "back")
    assert same_bits(read_all(tmp_path / "merged"), read_all(tmp_path / "back"))


def test_float16_experts_are_float32_in_a_slab_and_float16_again(tmp_path: Path) -> None:
    source = save_random(LLADA2, tmp_path / "source", dtype=torch.float32)
    halves = {name: tensor.half() for name, tensor in read_all(source).items()}
    save_file(halves, source / "model.safetensors")
    convert(source, tmp_path / "experts")
    assert read_manifest(tmp_path / "experts").format.dtype == "float32"
    restore(tmp_path / "experts", tmp_path / "back")
    assert same_bits(halves, read_all(tmp_path / "back"))


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.01), ("int4", 0.1)])
def test_quantised_experts_are_near_the_original(scheme: str, most: float, tmp_path: Path) -> None:
    """Relative root-mean-square error of Gaussian weights. Rounding errs by step / sqrt(12) on average: the largest
    of 64 weights is about 2.5 deviations, 127 steps of 8 bits: 0.6 %; that of 32 is 2.1, 8 steps of 4 bits: 8 %."""
    source = save_random(LLADA2, tmp_path / "source", dtype=torch.float32)
    convert(source, tmp_path / "experts", quantise=scheme)
    layout = read_manifest(tmp_path / "experts")
    assert layout.format.scheme == scheme
    original = read_all(source)
    layers = open_layers(tmp_path / "experts", layout)
    slab = torch.empty(layout.format.slab_bytes, dtype=torch.uint8)
    for expert in (0, 7, 15):
        layers[1].read_into(expert, memoryview(slab.numpy()))
        bank = layout.format.bank(slab.unsqueeze(0))
        prefix = f"model.layers.2.mlp.experts.{expert}"
        gate_up = torch.cat([original[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up")])
        for wanted, stored in ((gate_up, bank.gate_up), (original[f"{prefix}.down_proj.weight"], bank.down)):
            error = (dequantise(stored)[0] - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
            assert error < most
    for layer in layers:
        layer.close()
    with pytest.raises(CheckpointError, match="original weights cannot be had"):
        restore(tmp_path / "experts", tmp_path / "back")
    assert verify(tmp_path / "experts") > 0


def test_dense_tensors_are_those_of_the_source(tmp_path: Path) -> None:
    source = save_random(LLADA2, tmp_path / "source")
    convert(source, tmp_path / "experts")
    original = {n: t for n, t in read_all(source).items() if ".mlp.experts." not in n}
    assert same_bits(original, load_file(tmp_path / "experts" / "dense.safetensors"))


def test_the_same_again_is_already_there_and_another_is_refused(tmp_path: Path) -> None:
    source = save_random(LLADA2, tmp_path / "source")
    assert convert(source, tmp_path / "experts").fresh
    assert not convert(source, tmp_path / "experts").fresh
    with pytest.raises(CheckpointError, match="another slab"):
        convert(source, tmp_path / "experts", quantise="int8")
    other = save_random(LLADA2, tmp_path / "other", seed=4)
    with pytest.raises(CheckpointError, match="another source_sha256"):
        convert(other, tmp_path / "experts")
    with pytest.raises(InputError, match="not made by this command"):
        convert(source, tmp_path / "other")
    with pytest.raises(InputError, match="already in the expert layout"):
        convert(tmp_path / "experts", tmp_path / "twice")


def test_unknown_names_and_sizes_are_told(tmp_path: Path) -> None:
    source = save_random(LLADA2, tmp_path / "source")
    with pytest.raises(ConfigError, match="Did you mean 'int4'"):
        convert(source, tmp_path / "out", quantise="int44")
    with pytest.raises(ConfigError, match="leave --group-size out"):
        convert(source, tmp_path / "out", quantise="int8", group_size=32)
    with pytest.raises(ConfigError, match="groups of 32 or 64"):
        convert(source, tmp_path / "out", quantise="int4", group_size=48)
    with pytest.raises(ConfigError, match="divides inner 32"):
        convert(source, tmp_path / "out", quantise="int4", group_size=64)
    with pytest.raises(InputError, match="neither"):
        verify(source)
    assert not list(tmp_path.glob("out*"))


def test_experts_of_several_dtypes_are_refused(tmp_path: Path) -> None:
    source = save_random(LLADA2, tmp_path / "source")
    tensors = read_all(source)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    tensors[name] = tensors[name].float()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="BF16, F32"):
        convert(source, tmp_path / "out")


def test_the_layout_reads_back_what_the_source_holds(tmp_path: Path) -> None:
    source = save_random(LLADA2, tmp_path / "source")
    convert(source, tmp_path / "experts")
    manifest = json.loads((tmp_path / "experts" / "expert_layout.json").read_text(encoding="utf-8"))
    assert manifest["source"]["name"] == "source"
    original = read_all(source)
    with open_expert_layout(tmp_path / "experts", read_manifest(tmp_path / "experts")) as reader:
        bank = reader.expert(0, 5)
        assert torch.equal(bank.down_EDF[0], original["model.layers.1.mlp.experts.5.down_proj.weight"])
        assert torch.equal(bank.gate_up_EHD[0, 32:], original["model.layers.1.mlp.experts.5.up_proj.weight"])
