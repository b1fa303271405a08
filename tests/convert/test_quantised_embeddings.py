"""Embeddings and head in int8: written, loaded and counted without a float copy, and not restored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expertshare import api
from expertshare.convert import convert, restore
from expertshare.convert.sizes import sizes_of
from expertshare.errors import CheckpointError, ConfigError, InputError
from expertshare.experts import read_manifest
from expertshare.experts.layout import DENSE, MANIFEST
from expertshare.kernels import TorchBackend
from expertshare.kernels.cpu_backend import CpuBackend
from expertshare.lab.random_checkpoint.make_checkpoint import make_checkpoint
from expertshare.models import load_model, save_model
from expertshare.models.checkpoint import loaded_bytes, read_headers
from expertshare.native import available

from .models import CONFIGS, LLADA2, read_all, save_random

EMBED, HEAD = "model.word_embeddings.weight", "lm_head.weight"
BACKENDS = [TorchBackend(), *([CpuBackend()] if available() else [])]


def widened(codes_PC: torch.Tensor, scales_PG: torch.Tensor) -> torch.Tensor:
    """What a table in panels stands for, each weight from its own place (docs/expert-layout.md)."""
    row = torch.arange(16 * len(codes_PC)).view(-1, 1)
    feature = torch.arange(codes_PC.shape[1] // 16).view(1, -1)
    codes_VD = codes_PC[row // 16, feature // 4 * 64 + row % 16 * 4 + feature % 4]
    return codes_VD.float() * scales_PG[row // 16, row % 16]


def converted(tmp_path: Path, *, tied: bool = False, quantise: str = "none") -> tuple[Path, Path]:
    source = save_random(replace(LLADA2, tie_embeddings=tied), tmp_path / "source")
    return source, convert(source, tmp_path / "out", quantise=quantise, quantise_embeddings="int8").path


@pytest.mark.parametrize("tied", [False, True])
def test_codes_are_the_nearest_on_the_scale_of_their_row(tmp_path: Path, tied: bool) -> None:
    source, out = converted(tmp_path, tied=tied)
    before, after = read_all(source), load_file(out / DENSE)
    names = [EMBED] if tied else [EMBED, HEAD]
    for name in names:
        codes, scales = after.pop(f"{name}.codes"), after.pop(f"{name}.scales")
        assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
        largest = before[name].float().abs().amax(dim=1)
        torch.testing.assert_close(scales.flatten()[: len(largest)], largest / 127)
        error = (widened(codes, scales)[: len(largest)] - before[name].float()).abs()
        assert (error <= largest[:, None] / 254 * 1.001).all()
    kept = {name: tensor for name, tensor in before.items() if ".mlp.experts." not in name and name not in names}
    assert after.keys() == kept.keys()
    assert all(torch.equal(after[name], kept[name]) for name in kept)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_loads_and_answers(tmp_path: Path, family: str) -> None:
    source = save_random(CONFIGS[family], tmp_path / "source")
    out = convert(source, tmp_path / "out", quantise="int4", quantise_embeddings="int8").path
    whole, loaded = load_model(source), load_model(out)
    state = loaded.model.state_dict()
    assert {"embed.codes", "embed.scales", "head.codes", "head.scales"} <= state.keys()
    assert not {"embed.weight", "head.weight"} & state.keys()
    assert loaded.model.dtype == torch.bfloat16
    tokens = torch.tensor([[3, 200, 7]])
    with torch.no_grad():
        mine, theirs = (BACKENDS[0].embed(tokens, m.embed.weight, m.dtype) for m in (loaded.model, whole.model))
        assert mine.dtype == torch.bfloat16
        assert (mine - theirs).float().norm() < 0.02 * theirs.float().norm()
        hidden_RD = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        exact_RV = whole.model.logits(hidden_RD).float()
        for backend in BACKENDS:
            logits_RV = loaded.model.logits(hidden_RD, backend=backend).float()
            assert (logits_RV - exact_RV).norm() < 0.03 * exact_RV.norm()
            tokens_R, _ = loaded.model.best_tokens(hidden_RD, [0], backend=backend)
            assert torch.equal(tokens_R, logits_RV[:, 1:].argmax(dim=1) + 1)


def test_tied_tables_are_one_in_memory(tmp_path: Path) -> None:
    source, out = converted(tmp_path, tied=True)
    loaded = load_model(out)
    assert loaded.model.head is loaded.model.embed
    assert api.info(loaded).num_parameters == api.info(load_model(source)).num_parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_stay_exact_whatever_the_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    _, out = converted(tmp_path, quantise="int8")
    loaded = load_model(out, dtype)
    assert (
        loaded.model.dtype
        == BACKENDS[0].embed(torch.tensor([1]), loaded.model.embed.weight, loaded.model.dtype).dtype
        == dtype
    )
    assert torch.equal(loaded.model.state_dict()["head.scales"], load_file(out / DENSE)[f"{HEAD}.scales"])


def test_restoring_and_saving_are_refused(tmp_path: Path) -> None:
    _, out = converted(tmp_path)
    with pytest.raises(CheckpointError, match="embedding and head in int8"):
        restore(out, tmp_path / "back")
    with pytest.raises(ConfigError, match="needs float weights"):
        save_model(load_model(out).model, tmp_path / "saved")


def test_the_manifest_says_so_and_is_of_a_version_of_its_own(tmp_path: Path) -> None:
    _, out = converted(tmp_path)
    manifest = json.loads((out / MANIFEST).read_text())
    assert (manifest["version"], manifest["embeddings"]) == (3, "int8")
    assert read_manifest(out).embeddings == "int8"
    plain = convert(tmp_path / "source", tmp_path / "plain").path
    manifest = json.loads((plain / MANIFEST).read_text())
    assert manifest["version"] == 1
    assert "embeddings" not in manifest


def test_a_manifest_with_unknown_embeddings_is_refused(tmp_path: Path) -> None:
    _, out = converted(tmp_path)
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, "embeddings": "int2"}))
    with pytest.raises(CheckpointError, match="int2"):
        read_manifest(out)
    (out / MANIFEST).write_text(json.dumps({**manifest, "version": 1}))
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight"):
        load_model(out)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_the_loaded_model(tmp_path: Path, tied: bool) -> None:
    source, out = converted(tmp_path, tied=tied)
    state = load_model(out).model.state_dict()
    own = {tensor.data_ptr(): tensor.nbytes for tensor in state.values() if tensor.numel()}
    sizes, float_sizes = sizes_of(out), sizes_of(source)
    assert sizes.dense_bytes == sum(own.values())
    assert sizes.embedding_bytes == 304 * 64 + 304 * 4  # whole panels
    assert sizes.dense_parameters == float_sizes.dense_parameters
    assert sizes.float_bytes == 2
    assert loaded_bytes(read_headers(out, DENSE).values()) <= sizes.dense_bytes


def test_a_random_checkpoint_has_them_too(tmp_path: Path) -> None:
    config = replace(LLADA2, vocab_size=400, mask_id=399, eos_ids=(398,), pad_id=398)
    made = make_checkpoint(config, tmp_path / "a", unique=8, quantise="int4", quantise_embeddings="int8")
    assert made.fresh
    again = make_checkpoint(config, tmp_path / "a", unique=8, quantise="int4", quantise_embeddings="int8")
    assert not again.fresh
    floats = make_checkpoint(config, tmp_path / "b", unique=8, quantise="int4").path
    found, whole = load_file(made.path / DENSE), load_file(floats / DENSE)
    for name in (EMBED, HEAD):
        table = widened(found[f"{name}.codes"], found[f"{name}.scales"])[: len(whole[name])]
        steps = found[f"{name}.scales"].flatten()[: len(table), None]
        assert ((table - whole[name].float()).abs() <= steps * 0.501).all()
    answer = api.generate(str(made.path), "Hello", gen_length=8).answers[0]
    assert answer.steps > 0


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    source = save_random(LLADA2, tmp_path / "source")
    with pytest.raises(ConfigError, match="unknown quantisation of embeddings 'int4'"):
        convert(source, tmp_path / "out", quantise_embeddings="int4")
    with pytest.raises(InputError, match="holds no int8 embeddings"):
        make_checkpoint(LLADA2, tmp_path / "o", unique=8, layout="huggingface", quantise_embeddings="int8")
