"""Random checkpoints: shapes, spread of activations, unique experts as asked for, and a tokenizer that works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends import moe_ffn_loop
from expertshare.config import ModelConfig
from expertshare.convert import convert, restore, verify
from expertshare.convert.sizes import default_unique, likeness
from expertshare.decoding import DecodingOptions, generate
from expertshare.errors import CheckpointError, ConfigError, InputError
from expertshare.experts.layout import open_layers, read_manifest
from expertshare.kernels.quantise import QUANTISATIONS, dequantise, quantise_bank
from expertshare.lab.bench.cases import find_case
from expertshare.lab.random_checkpoint.characters import first_byte_id, printable_ids, tokenizer_files
from expertshare.lab.random_checkpoint.make_checkpoint import make_checkpoint
from expertshare.lab.random_checkpoint.random_tensors import ExpertPool
from expertshare.models import Runtime, load_model
from expertshare.routing import make_policy
from expertshare.types import ExpertBank, QuantisedBank, RoutingPlan

from .models import directory_bytes

TINY = replace(find_case("tiny").config, vocab_size=400)


def small(name: str) -> ModelConfig:
    """A released model's rules at small widths, wide enough for its number of experts to matter."""
    config = find_case(name).config
    llada2 = config.family == "llada2_moe"
    return replace(
        config,
        vocab_size=1000,
        mask_id=3,
        eos_ids=(1,),
        pad_id=2,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rotary_dim=32 if llada2 else 64,
        dense_hidden=128 if llada2 else 0,
        shared_hidden=64 if llada2 else 0,
        expert_hidden=64,
    )


@pytest.mark.parametrize(
    ("name", "unique"), [("llada2.0-mini", 70), ("llada2.0-mini", 30), ("llada-moe", 45), ("sdar-30b-a3b", 55)]
)
def test_vanilla_uses_as_many_experts_as_asked_for(name: str, unique: int, tmp_path: Path) -> None:
    """On the calibration blocks, and in a real generation from another prompt."""
    config = small(name)
    made = make_checkpoint(config, tmp_path / "made", unique=unique, layout="huggingface", dtype="F32")
    assert made.fresh
    assert abs(made.unique / unique - 1) < 0.05
    assert all(0.8 < activation < 3.0 for activation in made.activations)
    loaded = load_model(made.path)
    assert loaded.tokenizer is not None
    prompt = loaded.tokenizer("A train leaves at noon and goes 60 miles an hour.")["input_ids"]
    with torch.no_grad():
        runtime, options = Runtime(policy=make_policy("vanilla")), DecodingOptions(gen_length=64)
        result = generate(loaded.model, runtime, options, [prompt])
    assert abs(result.cost.unique_experts["denoise"] / unique - 1) < 0.15
    assert len(result.rows[0].token_ids) == 64  # no end of text
    assert set(result.rows[0].token_ids) <= set(printable_ids(config))


@pytest.mark.parametrize("scheme", ["none", "int8", "int4"])
def test_either_layout_holds_the_same_model(scheme: str, tmp_path: Path) -> None:
    """Made as experts = made as Hugging Face and converted, byte for byte: rolling and quantising commute."""
    make_checkpoint(TINY, tmp_path / "direct", unique=12, quantise=scheme)
    make_checkpoint(TINY, tmp_path / "plain", unique=12, layout="huggingface")
    convert(tmp_path / "plain", tmp_path / "converted", quantise=scheme)
    for file in (tmp_path / "direct").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "converted" / file.name).read_bytes(), file.name
    assert verify(tmp_path / "direct") > 0
    if scheme == "none":
        restore(tmp_path / "direct", tmp_path / "back")
        names = [path.name for path in (tmp_path / "plain").glob("*.safetensors")]
        assert [(tmp_path / "back" / n).read_bytes() for n in names] == [
            (tmp_path / "plain" / n).read_bytes() for n in names
        ]


def test_no_two_experts_of_a_layer_are_equal(tmp_path: Path) -> None:
    make_checkpoint(TINY, tmp_path / "made", unique=12)
    layout = read_manifest(tmp_path / "made")
    (first, *rest) = open_layers(tmp_path / "made", layout)
    assert len(set(first.checksums())) == TINY.router.num_experts
    assert not set(first.checksums()) & set(rest[0].checksums())
    for layer in (first, *rest):
        layer.close()


def test_making_again_gives_the_same_and_another_seed_something_else(tmp_path: Path) -> None:
    first = make_checkpoint(TINY, tmp_path / "first", unique=12, quantise="int4")
    make_checkpoint(TINY, tmp_path / "second", unique=12, quantise="int4")
    assert directory_bytes(tmp_path / "first") == directory_bytes(tmp_path / "second")
    again = make_checkpoint(TINY, tmp_path / "first", unique=12, quantise="int4")
    assert not again.fresh
    assert again.unique_by_layer == first.unique_by_layer
    with pytest.raises(CheckpointError, match="another recipe"):
        make_checkpoint(TINY, tmp_path / "first", unique=12, quantise="int4", seed=1)
    make_checkpoint(TINY, tmp_path / "third", unique=12, quantise="int4", seed=1)
    name = "experts-00000.safetensors"
    assert (tmp_path / "third" / name).read_bytes() != (tmp_path / "first" / name).read_bytes()


def test_an_interrupted_making_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def on_progress(name: str, done: int, total: int) -> None:
        if name == "experts-00001.safetensors":
            raise Stop

    make_checkpoint(TINY, tmp_path / "whole", unique=12)
    with pytest.raises(Stop):
        make_checkpoint(TINY, tmp_path / "out", unique=12, on_progress=on_progress)
    make_checkpoint(TINY, tmp_path / "out", unique=12)
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "whole")


def pool(num_experts: int = 20, size: int = 3) -> ExpertPool:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(size, 64, 64, generator=generator) * 0.2
    return ExpertPool(ExpertBank(gate_up, torch.randn(size, 64, 32, generator=generator) * 0.2), num_experts)


def test_the_pool_computes_what_its_experts_compute() -> None:
    made = pool()
    banks = [made.expert(expert) for expert in range(20)]
    assert all(isinstance(bank, ExpertBank) for bank in banks)
    whole = ExpertBank(
        torch.cat([bank.gate_up_EHD for bank in banks]),  # type: ignore[union-attr]
        torch.cat([bank.down_EDF for bank in banks]),  # type: ignore[union-attr]
    )
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(9, 64, generator=generator)
    ids_TK = torch.stack([torch.randperm(20, generator=generator)[:4] for _ in range(9)])
    active_E = torch.zeros(20, dtype=torch.bool).scatter_(0, ids_TK.flatten(), True)
    plan = RoutingPlan(ids_TK, torch.rand(9, 4, generator=generator), active_E)
    expected = moe_ffn_loop(x_TD, plan, whole)
    torch.testing.assert_close(made.compute(x_TD, plan), expected, rtol=1e-5, atol=1e-5)


@given(expert=st.integers(0, 19), scheme=st.sampled_from(sorted(QUANTISATIONS)))
def test_rolling_commutes_with_quantising(expert: int, scheme: str) -> None:
    made, quantisation = pool(), QUANTISATIONS[scheme]
    rolled, plain = made.expert(expert, quantise_bank(made.bank, quantisation)), made.expert(expert)
    assert isinstance(rolled, QuantisedBank)
    assert isinstance(plain, ExpertBank)
    wanted = quantise_bank(plain, quantisation)
    assert torch.equal(dequantise(rolled.gate_up), dequantise(wanted.gate_up))
    assert torch.equal(dequantise(rolled.down), dequantise(wanted.down))


def test_every_released_model_has_its_released_size() -> None:
    """Parameters from the names and shapes that are public: 16.26 B for mini, 102.9 B for flash, 30.5 B for SDAR."""
    sizes = {"llada2.0-mini": 16.26e9, "llada2.0-flash": 102.9e9, "sdar-30b-a3b": 30.5e9, "llada-moe": 7.4e9}
    from expertshare.lab.random_checkpoint.random_tensors import RandomModel, RandomTensors

    for name, expected in sizes.items():
        config = likeness(name)
        tensors = RandomTensors(RandomModel(config=config, unique=50, seed=0), printable_ids(config))
        dense = sum(torch.Size(entry.shape).numel() for entry in tensors.entries.values())
        experts = config.num_moe_layers * config.router.num_experts * config.num_expert_parameters
        assert abs((dense + experts) / expected - 1) < 0.01, name


def test_names_and_options_that_cannot_be_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'llada2\.0-mini'"):
        likeness("llada2-mini")
    with pytest.raises(ConfigError, match="unknown model"):
        likeness("diffusiongemma")
    with pytest.raises(InputError, match=r"2\.\.20"):
        likeness("llada2.0-mini", layers=1)
    with pytest.raises(InputError, match=r"4\.\.32"):
        make_checkpoint(TINY, tmp_path / "out", unique=33)
    with pytest.raises(InputError, match="holds no int4"):
        make_checkpoint(TINY, tmp_path / "out", unique=12, layout="huggingface", quantise="int4")
    with pytest.raises(ConfigError, match="Did you mean 'huggingface'"):
        make_checkpoint(TINY, tmp_path / "out", unique=12, layout="hugging")
    assert default_unique("llada2.0-mini", likeness("llada2.0-mini")) == 70
    assert default_unique("llada2.0-mini", likeness("llada2.0-mini", experts=64)) == 64
    with pytest.raises(ConfigError, match="ids for 256"):
        tokenizer_files(find_case("tiny").config)


@pytest.mark.parametrize("name", ["llada2.0-mini", "sdar-30b-a3b"])
def test_the_tokenizer_gives_bytes_back_and_knows_the_special_ids(name: str, tmp_path: Path) -> None:
    from expertshare.models import decode_answer, encode_prompt, load_tokenizer

    config = likeness(name)
    for file, content in tokenizer_files(config).items():
        (tmp_path / file).write_bytes(content)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    text = "Grüße, 15 + 7 = ?\n\t<tag> 漢字"
    ids = encode_prompt(tokenizer, text)
    assert ids == [first_byte_id(config) + byte for byte in text.encode()]
    assert decode_answer(tokenizer, ids) == text
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (config.mask_id, config.eos_ids[0])
    assert tokenizer.pad_token_id == config.pad_id
    assert len(tokenizer) <= config.vocab_size
