"""What is saved is what is loaded, bit for bit, under the names of the released layouts."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertshare.config import ModelConfig, RouterSpec
from expertshare.errors import CheckpointError, ConfigError
from expertshare.models import MoETransformer, initialise, load_model, save_model

from .layouts import read_checkpoint

LLADA2 = ModelConfig(
    family="llada2_moe",
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rotary_dim=4,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    num_dense_layers=1,
    dense_hidden=24,
    expert_hidden=6,
    shared_hidden=12,
    router=RouterSpec(
        num_experts=8,
        top_k=2,
        activation="sigmoid",
        renormalise=True,
        scaling=2.5,
        num_groups=4,
        kept_groups=2,
        has_bias=True,
    ),
    attention="block_causal",
    block_length=8,
    max_positions=64,
    mask_id=39,
    eos_ids=(38, 37),
    pad_id=36,
)
LLADA22 = replace(LLADA2, expert_capacity=6, router=replace(LLADA2.router, num_groups=1, kept_groups=1))
SOFTMAX = RouterSpec(num_experts=8, top_k=2, activation="softmax", renormalise=True)
_WITHOUT_DENSE = {"num_dense_layers": 0, "dense_hidden": 0, "shared_hidden": 0}
CONFIGS = {
    "llada2_moe": LLADA2,
    "llada2_moe with a capacity": LLADA22,
    "llada2_moe, tied, no bias, no dense layer": replace(
        LLADA2,
        tie_embeddings=True,
        router=replace(LLADA2.router, has_bias=False),
        num_dense_layers=0,
        dense_hidden=0,
    ),
    "llada_moe": replace(
        LLADA2, family="llada_moe", router=replace(SOFTMAX, renormalise=False), attention="full", **_WITHOUT_DENSE
    ),
    "sdar_moe": replace(LLADA2, family="sdar_moe", router=SOFTMAX, **_WITHOUT_DENSE),
}


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> MoETransformer:
    model = MoETransformer(config)
    initialise(model, seed=5, std=0.3)
    for name, buffer in model.named_buffers():
        assert name.endswith("router.bias")
        buffer.copy_(torch.linspace(-1.0, 1.0, buffer.numel()))
    for name, parameter in model.named_parameters():
        if ".router." not in name:
            parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_trip_changes_no_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name], dtype)
    loaded = load_model(save_model(model, tmp_path / "saved"))
    assert loaded.config == model.config
    before, after = model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor, after[key]), key


def test_a_training_model_is_saved_in_the_dtype_asked_for(tmp_path: Path) -> None:
    model = random_model(LLADA2)
    before = model.state_dict()
    after = load_model(save_model(model, tmp_path, dtype=torch.bfloat16)).model.state_dict()
    assert torch.equal(after["embed.weight"], before["embed.weight"].bfloat16())
    assert torch.equal(after["layers.1.moe.router.weight"], before["layers.1.moe.router.weight"])
    with pytest.raises(ConfigError, match="float16"):
        save_model(model, tmp_path, dtype=torch.float16)


def test_names_and_shapes_are_those_of_the_released_layout(tmp_path: Path) -> None:
    shapes = {n: list(t.shape) for n, t in read_checkpoint(save_model(random_model(LLADA2), tmp_path)).items()}
    expected = {
        "model.word_embeddings.weight": [40, 16],
        "model.layers.0.input_layernorm.weight": [16],
        "model.layers.0.attention.query_key_value.weight": [32, 16],
        "model.layers.0.attention.query_layernorm.weight": [8],
        "model.layers.0.attention.key_layernorm.weight": [8],
        "model.layers.0.attention.dense.weight": [16, 16],
        "model.layers.0.post_attention_layernorm.weight": [16],
        "model.layers.0.mlp.gate_proj.weight": [24, 16],
        "model.layers.0.mlp.up_proj.weight": [24, 16],
        "model.layers.0.mlp.down_proj.weight": [16, 24],
        "model.layers.1.mlp.gate.weight": [8, 16],
        "model.layers.1.mlp.gate.expert_bias": [8],
        "model.layers.1.mlp.experts.7.gate_proj.weight": [6, 16],
        "model.layers.1.mlp.experts.7.up_proj.weight": [6, 16],
        "model.layers.1.mlp.experts.7.down_proj.weight": [16, 6],
        "model.layers.1.mlp.shared_experts.gate_proj.weight": [12, 16],
        "model.layers.1.mlp.shared_experts.down_proj.weight": [16, 12],
        "model.norm.weight": [16],
        "lm_head.weight": [40, 16],
    }
    assert {name: shapes[name] for name in expected} == expected
    assert len(shapes) == 3 + 2 * 6 + 3 + 2 + 8 * 3 + 3


def test_config_is_in_the_released_form(tmp_path: Path) -> None:
    save_model(random_model(LLADA2), tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llada2_moe"
    assert (config["num_experts"], config["n_group"], config["topk_group"]) == (8, 4, 2)
    assert (config["mask_token_id"], config["eos_token_id"], config["block_size"]) == (39, [38, 37], 8)
    assert config["dtype"] == "bfloat16"
    generation = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == [38, 37]


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save_model(random_model(LLADA2), tmp_path)
    second = random_model(LLADA2)
    second.embed.weight.data.fill_(0.5)
    save_model(second, tmp_path)
    assert load_model(tmp_path).model.embed.weight.eq(0.5).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


def test_a_failed_save_keeps_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(LLADA2)
    save_model(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def disk_full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("expertshare.models.checkpoint.save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        save_model(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_weights_are_as_readable_as_their_config(tmp_path: Path) -> None:
    save_model(random_model(LLADA2), tmp_path)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_tokenizer_and_other_files_come_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer_config.json", "LICENSE", "notes.txt"):
        (source / name).write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        save_model(random_model(LLADA2), tmp_path / "out", tokenizer_dir=source)
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")
    save_model(random_model(LLADA2), tmp_path / "out", tokenizer_dir=source, extra_files=[source / "LICENSE"])
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "LICENSE"} <= names
    assert "notes.txt" not in names


def test_a_sharded_directory_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="sharded"):
        save_model(random_model(LLADA2), tmp_path)


def test_a_shared_width_that_the_layout_cannot_say_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shared experts"):
        save_model(random_model(replace(LLADA2, shared_hidden=7)), tmp_path)
