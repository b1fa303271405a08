"""Every layout loads to the same weights; every broken checkpoint is an error that names what is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from expertshare import native
from expertshare.errors import CheckpointError, ConfigError, ExpertShareError, InputError
from expertshare.models import load_model

from .layouts import LLADA2_CONFIG, glm4_pair, merged_names, read_checkpoint, write_checkpoint

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
BIAS = "model.layers.2.mlp.gate.expert_bias"
ROUTER = "model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return glm4_pair(tmp_path_factory.mktemp("original")).directory


@pytest.fixture
def broken(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "broken"))


def write_shards(directory: Path, tensors: dict[str, Tensor], count: int = 3) -> dict[str, str]:
    """Replace the one file by `count` shards and an index; returns the index's map."""
    (directory / "model.safetensors").unlink()
    placed = {name: f"model-{i % count:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(placed.values()):
        save_file({n: t for n, t in tensors.items() if placed[n] == shard}, directory / shard)
    write_index(directory, placed)
    return placed


def write_index(directory: Path, placed: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}), encoding="utf-8")


def state(directory: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return load_model(directory, dtype).model.state_dict()


def assert_same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def test_each_tensor_arrives_in_its_place(original: Path) -> None:
    tensors, loaded = read_checkpoint(original), state(original)
    assert torch.equal(loaded["embed.weight"], tensors["model.word_embeddings.weight"])
    assert torch.equal(loaded["layers.1.moe.experts.gate_up"][3, 24:], tensors[EXPERT])
    gate, down = (tensors[f"model.layers.2.mlp.experts.15.{p}_proj.weight"] for p in ("gate", "down"))
    assert torch.equal(loaded["layers.2.moe.experts.gate_up"][15, :24], gate)
    assert torch.equal(loaded["layers.2.moe.experts.down"][15], down)
    assert torch.equal(loaded["layers.2.moe.router.bias"], tensors[BIAS])
    assert torch.equal(loaded["layers.0.mlp.gate_up.weight"][:48], tensors["model.layers.0.mlp.gate_proj.weight"])


def test_shards_load_the_same(original: Path, broken: Path) -> None:
    write_shards(broken, read_checkpoint(broken))
    assert_same_state(state(broken), state(original))


def test_merged_experts_load_the_same(original: Path, broken: Path) -> None:
    write_checkpoint(broken, LLADA2_CONFIG, merged_names(read_checkpoint(broken)))
    assert "model.layers.1.mlp.experts.gate_proj" in read_checkpoint(broken)
    assert_same_state(state(broken), state(original))


def test_merged_and_sharded_load_the_same(original: Path, broken: Path) -> None:
    write_shards(broken, merged_names(read_checkpoint(broken)))
    assert_same_state(state(broken), state(original))


@pytest.mark.parametrize("routers", [torch.float32, torch.bfloat16], ids=str)
def test_routers_lose_no_bits(broken: Path, routers: torch.dtype) -> None:
    """Weights of a router are narrowed only where they are bfloat16 numbers; its bias never is."""
    tensors = {
        name: tensor.to(routers if name.endswith("mlp.gate.weight") else torch.bfloat16)
        for name, tensor in read_checkpoint(broken).items()
    }
    write_checkpoint(broken, LLADA2_CONFIG, tensors)
    loaded = load_model(broken)
    assert loaded.model.dtype == torch.bfloat16
    kept = routers if native.available() else torch.float32
    for name, tensor in loaded.model.state_dict().items():
        expected = torch.bfloat16 if ".router." not in name else torch.float32 if name.endswith("bias") else kept
        assert tensor.dtype == expected, name
    assert torch.equal(loaded.model.state_dict()["layers.1.moe.router.weight"].float(), tensors[ROUTER].float())
    assert load_model(broken, torch.float32).model.state_dict()["layers.1.moe.router.weight"].dtype == torch.float32


def test_dtype_can_be_chosen(original: Path) -> None:
    assert load_model(original).model.dtype == torch.float32
    assert load_model(original, torch.bfloat16).model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="float16"):
        load_model(original, torch.float16)


def test_float16_is_computed_in_float32(broken: Path) -> None:
    write_checkpoint(broken, LLADA2_CONFIG, {n: t.half() for n, t in read_checkpoint(broken).items()})
    assert load_model(broken).model.dtype == torch.float32


def test_tied_embeddings_need_no_head(broken: Path) -> None:
    tensors = read_checkpoint(broken)
    del tensors["lm_head.weight"]
    write_checkpoint(broken, {**LLADA2_CONFIG, "tie_word_embeddings": True}, tensors)
    model = load_model(broken).model
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, tensors["model.word_embeddings.weight"])


Damage = Callable[[dict[str, Tensor]], None]


def drop(name: str) -> Damage:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, tensor: Tensor) -> Damage:
    return lambda tensors: tensors.update({name: tensor})


def rename(old: str, new: str) -> Damage:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


TENSOR_DAMAGE: dict[str, tuple[Damage, list[str]]] = {
    "missing": (drop(EXPERT), [EXPERT, "missing"]),
    "missing bias": (drop(BIAS), [BIAS, "missing", "router"]),
    "unexpected": (put("model.layers.9.extra", torch.zeros(2)), ["model.layers.9.extra", "unexpected"]),
    "renamed": (rename(EXPERT, EXPERT + "s"), [EXPERT, "missing"]),
    "misshapen": (put(EXPERT, torch.zeros(24, 31)), [EXPERT, "[24, 31]", "[24, 32]"]),
    "transposed": (put("model.layers.0.mlp.down_proj.weight", torch.zeros(48, 32)), ["layers.0.mlp.down_proj"]),
    "quantised": (put(EXPERT, torch.zeros(24, 32, dtype=torch.int8)), [EXPERT, "I8"]),
    "a bias that is no number": (put(BIAS, torch.full((16,), float("nan"))), [BIAS, "finite"]),
    "an infinite router": (put(ROUTER, torch.full((16, 32), float("inf"))), [ROUTER, "finite"]),
    "wrong bias size": (put(BIAS, torch.zeros(8)), [BIAS, "[8]", "[16]"]),
}


@pytest.mark.parametrize("kind", TENSOR_DAMAGE)
def test_damaged_tensors_are_named(kind: str, broken: Path) -> None:
    damage, words = TENSOR_DAMAGE[kind]
    tensors = read_checkpoint(broken)
    damage(tensors)
    write_checkpoint(broken, LLADA2_CONFIG, tensors)
    with pytest.raises(CheckpointError) as caught:
        load_model(broken)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_many_missing_tensors_are_counted(broken: Path) -> None:
    tensors = {n: t for n, t in read_checkpoint(broken).items() if ".experts." not in n}
    write_checkpoint(broken, LLADA2_CONFIG, tensors)
    with pytest.raises(CheckpointError, match=r"96 tensors are missing: .* and 92 more"):
        load_model(broken)


@pytest.mark.parametrize("keep", [0, 7, 5000])
def test_a_truncated_file_is_named(keep: int, broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load_model(broken)


def test_a_file_of_rubbish_is_named(broken: Path) -> None:
    (broken / "model.safetensors").write_bytes(b"not tensors at all" * 10)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not a safetensors file"):
        load_model(broken)


def test_an_absent_shard_is_named(broken: Path) -> None:
    write_shards(broken, read_checkpoint(broken))
    (broken / "model-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001\.safetensors.*not in"):
        load_model(broken)


def test_a_truncated_shard_is_named(broken: Path) -> None:
    write_shards(broken, read_checkpoint(broken))
    shard = broken / "model-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model-00002\.safetensors is truncated"):
        load_model(broken)


def test_an_index_must_agree_with_its_shards(broken: Path) -> None:
    placed = write_shards(broken, read_checkpoint(broken))
    write_index(broken, {**placed, "model.absent.weight": "model-00000.safetensors"})
    with pytest.raises(CheckpointError, match=r"model\.absent\.weight"):
        load_model(broken)
    write_index(broken, {name: shard for name, shard in placed.items() if name != EXPERT})
    with pytest.raises(CheckpointError, match=EXPERT):
        load_model(broken)


def test_an_index_may_not_leave_its_directory(broken: Path) -> None:
    placed = write_shards(broken, read_checkpoint(broken))
    (broken / "model-00000.safetensors").rename(broken.parent / "elsewhere.safetensors")
    outside = {n: "../elsewhere.safetensors" if "00000" in shard else shard for n, shard in placed.items()}
    write_index(broken, outside)
    with pytest.raises(CheckpointError, match="elsewhere"):
        load_model(broken)


def test_an_index_without_a_map_is_an_error(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "model-00000.safetensors")
    (broken / "model.safetensors.index.json").write_text('{"metadata": {}}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="weight_map"):
        load_model(broken)


def test_one_file_may_have_an_index_that_names_it(original: Path, broken: Path) -> None:
    write_index(broken, dict.fromkeys(read_checkpoint(broken), "model.safetensors"))
    assert_same_state(state(broken), state(original))


def test_what_follows_from_the_config_is_left_out(original: Path, broken: Path) -> None:
    tensors = read_checkpoint(broken)
    frequencies = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
    write_checkpoint(broken, LLADA2_CONFIG, tensors | frequencies)
    assert_same_state(state(broken), state(original))


def test_layers_that_predict_further_tokens_are_left_out_and_told(
    original: Path, broken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = read_checkpoint(broken)
    further = {f"model.layers.{LLADA2_CONFIG['num_hidden_layers']}.eh_proj.weight": torch.ones(4, 4)}
    write_checkpoint(broken, {**LLADA2_CONFIG, "num_nextn_predict_layers": 1}, tensors | further)
    assert_same_state(state(broken), state(original))
    assert "left out 1 tensors of layers that predict further tokens" in caplog.text
    write_checkpoint(broken, LLADA2_CONFIG, tensors | further)
    with pytest.raises(CheckpointError, match=r"eh_proj\.weight"):
        load_model(broken)


def test_a_stored_head_of_tied_weights_is_left_out(original: Path, broken: Path) -> None:
    tensors = read_checkpoint(broken)
    write_checkpoint(broken, {**LLADA2_CONFIG, "tie_word_embeddings": True}, tensors)
    tied = load_model(broken).model
    assert torch.equal(tied.embed.weight, load_model(original).model.embed.weight)
    assert not any(name.startswith("head.") and "embed" not in name for name in dict(tied.named_parameters()))


def test_two_layouts_at_once_are_ambiguous(broken: Path) -> None:
    write_index(broken, {EXPERT: "model.safetensors"})
    with pytest.raises(CheckpointError, match="both"):
        load_model(broken)


def test_a_directory_without_weights_says_so(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_model(broken)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1"),
        ("[]", "object"),
        (None, "config.json"),
        ("[" * 100_000, r"config\.json cannot be read"),
        ('{"vocab_size": ' + "1" * 5000 + "}", r"config\.json cannot be read"),
    ],
    ids=["cut", "list", "absent", "deep", "long number"],
)
def test_an_unreadable_config_is_named(text: str | None, words: str, broken: Path) -> None:
    config = broken / "config.json"
    if text is None:
        config.unlink()
    else:
        config.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=words):
        load_model(broken)


def test_a_missing_path_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no directory"):
        load_model(tmp_path / "absent")
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="got the file"):
        load_model(file)


def test_a_hub_id_without_a_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, allow_patterns: list[str], **__: object) -> str:
        assert "*.safetensors" in allow_patterns
        assert not any(pattern.endswith((".py", "*")) for pattern in allow_patterns), "no code is downloaded"
        raise LocalEntryNotFoundError("outgoing traffic has been disabled")

    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"'nobody/no-model'.*outgoing traffic.*Check the"):
        load_model("nobody/no-model")


def test_a_tokenizer_larger_than_the_vocabulary_is_an_error(broken: Path) -> None:
    from tokenizers import Tokenizer, models

    vocab = {f"w{i}": i for i in range(100)}
    Tokenizer(models.WordLevel(vocab, unk_token="w0")).save(str(broken / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="100 tokens, but the model embeds 61"):
        load_model(broken)


def test_all_errors_have_one_base(broken: Path) -> None:
    changed: dict[str, Any] = {**LLADA2_CONFIG, "hidden_size": 64}
    (broken / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(ExpertShareError, match="expected"):
        load_model(broken)
