"""config.json is read strictly: what is unknown or unsupported is an error that names the key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from expertshare.config import ModelConfig
from expertshare.errors import ConfigError
from expertshare.models.config_keys import TokenIds
from expertshare.models.family import family_named, family_of

from .layouts import EOS, LLADA2_CONFIG, LLADA_MOE_CONFIG, MASK, SDAR_CONFIG

CONFIGS = {"llada2": LLADA2_CONFIG, "llada": LLADA_MOE_CONFIG, "sdar": SDAR_CONFIG}
NO_IDS = TokenIds()

# The released config of LLaDA2.0-mini in the form of its training code, less the keys of the ids.
LLADA2_MINI: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig"},
    "num_hidden_layers": 20,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "model_type": "llada2_moe_veomni",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "norm_head": False,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_key_value_heads": 4,
    "rope_theta": 600000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.3",
    "use_bias": False,
    "use_rmsnorm": True,
    "rms_norm_eps": 1e-06,
    "head_dim": 128,
    "num_shared_experts": 1,
    "use_cache": False,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0,
    "norm_softmax": False,
    "output_dropout": 0.0,
    "vocab_size": 157184,
    "rotary_dim": 64,
    "using_split_qkv_in_self_attention": False,
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "score_function": "sigmoid",
    "initializer_range": 0.02,
    "max_window_layers": 28,
    "output_router_logits": False,
    "pad_token_id": 156892,
    "partial_rotary_factor": 0.5,
    "use_sliding_window": False,
}
LLADA2_IDS = TokenIds(mask=156895, eos=(156892,))


def parse(raw: dict[str, Any], generation: dict[str, Any] | None = None, ids: TokenIds = NO_IDS) -> ModelConfig:
    return family_of(raw).parse_config(raw, generation or {}, ids)


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def test_llada2_mini_reads_as_published() -> None:
    config = parse(LLADA2_MINI, ids=LLADA2_IDS)
    spec = config.router
    assert (config.family, config.attention, config.block_length) == ("llada2_moe", "block_causal", 32)
    assert (config.num_dense_layers, config.dense_hidden) == (1, 5120)
    assert (config.expert_hidden, config.shared_hidden) == (512, 512)
    assert (spec.num_experts, spec.top_k, spec.num_groups, spec.kept_groups) == (256, 8, 8, 4)
    assert (spec.activation, spec.renormalise, spec.scaling, spec.has_bias) == ("sigmoid", True, 2.5, True)
    assert (config.rotary_dim, config.rope_theta) == (64, 600000.0)
    assert (config.mask_id, config.eos_ids, config.pad_id) == (156895, (156892,), 156892)
    assert spec.min_coreset_size("inside") == 12
    assert config.num_expert_parameters * 2 == 6_291_456, "one expert is 6.3 MB in bf16"


def test_llada2_2_routes_without_groups_at_its_capacity() -> None:
    newer = {**without(LLADA2_MINI, "n_group", "topk_group"), "expert_capacity": 48, "block_size": 16}
    for raw in (newer, {**newer, "n_group": None}, {**newer, "n_group": 1, "topk_group": 1}):
        config = parse({**raw, "delete_token_id": 156930, "split_token_id": 156931}, ids=LLADA2_IDS)
        assert (config.expert_capacity, config.block_length) == (48, 16)
        assert (config.router.num_groups, config.router.kept_groups) == (1, 1)


def test_llada2_0_without_groups_stated_is_an_error() -> None:
    with pytest.raises(ConfigError, match="n_group"):
        parse(without(LLADA2_MINI, "n_group"), ids=LLADA2_IDS)


def test_llada_moe_and_sdar_router_rules() -> None:
    llada, sdar = parse(LLADA_MOE_CONFIG), parse(SDAR_CONFIG)
    assert (llada.router.activation, llada.router.renormalise, llada.attention) == ("softmax", False, "full")
    assert (sdar.router.activation, sdar.router.renormalise, sdar.attention) == ("softmax", True, "block_causal")
    assert (llada.block_length, sdar.block_length) == (32, 4)
    with pytest.raises(ConfigError, match='add "block_size"'):
        parse(without(SDAR_CONFIG, "block_size"))
    for stated, renormalises in ((True, True), (False, False)):
        assert parse({**SDAR_CONFIG, "norm_topk_prob": stated}).router.renormalise is renormalises
        assert parse({**LLADA_MOE_CONFIG, "norm_topk_prob": stated}).router.renormalise is False
        assert parse({**LLADA2_CONFIG, "norm_topk_prob": stated}).router.renormalise is True
    assert not llada.router.has_bias
    assert not sdar.router.has_bias


@pytest.mark.parametrize("name", CONFIGS)
def test_to_config_is_the_inverse_of_parse(name: str) -> None:
    config = parse({**CONFIGS[name], "block_size": 8, "eos_token_id": [EOS, 3], "pad_token_id": 5})
    family = family_named(config.family)
    assert parse(family.to_config(config)) == config


@pytest.mark.parametrize(("rotary_dim", "head_dim"), [(30, 88), (106, 152), (64, 128)])
def test_a_share_of_the_head_that_floats_round_gives_its_features_back(rotary_dim: int, head_dim: int) -> None:
    config = replace(parse(LLADA_MOE_CONFIG), rotary_dim=rotary_dim, head_dim=head_dim)
    assert parse(family_named("llada_moe").to_config(config)).rotary_dim == rotary_dim


UNSUPPORTED: list[tuple[str, str, object]] = [
    ("llada2", "hidden_act", "gelu"),
    ("llada2", "rope_scaling", {"type": "yarn", "factor": 4.0}),
    ("llada2", "rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
    ("llada2", "rope_parameters", [5000.0]),
    ("llada2", "rope_parameters", "default"),
    ("llada2", "use_bias", True),
    ("llada2", "use_qkv_bias", True),
    ("llada2", "use_qk_norm", False),
    ("llada2", "score_function", "softmax"),
    ("llada2", "router_dtype", "bf16"),
    ("llada2", "use_sliding_window", True),
    ("llada2", "norm_head", True),
    ("llada2", "use_rmsnorm", False),
    ("llada2", "num_nextn_predict_layers", -1),
    ("llada2", "rotary_dim", 4),
    ("llada2", "first_k_dense_replace", 3),
    ("llada2", "n_group", 5),
    ("llada2", "num_experts_per_tok", 99),
    ("llada2", "hidden_size", "32"),
    ("llada2", "num_hidden_layers", True),
    ("llada2", "rope_theta", 0),
    ("llada2", "norm_topk_prob", "yes"),
    ("llada2", "expert_capacity", 0),
    ("llada2", "mask_token_id", 61),
    ("llada2", "mask_token_id", "<mask>"),
    ("llada", "attention_bias", True),
    ("llada", "clip_qkv", 8.0),
    ("llada", "qk_layernorm", False),
    ("llada", "moe_layer_freq", [0, 1, 1]),
    ("llada", "moe_router_score_function", "sigmoid"),
    ("llada", "moe_router_enable_expert_bias", True),
    ("llada", "routed_scaling_factor", 2.5),
    ("llada", "shared_expert_intermediate_size", 64),
    ("llada", "router_num_group", 8),
    ("sdar", "attention_bias", True),
    ("sdar", "decoder_sparse_step", 2),
    ("sdar", "mlp_only_layers", [0]),
    ("sdar", "use_sliding_window", True),
    ("sdar", "hidden_act", "relu"),
]


# What the message says instead of the key, where the error comes from the architecture's own check.
NAMED_OTHERWISE = {"n_group": "groups", "num_experts_per_tok": "experts per token", "mask_token_id": "mask"}


@pytest.mark.parametrize(("name", "key", "value"), UNSUPPORTED)
def test_unsupported_values_are_named(name: str, key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({**CONFIGS[name], key: value})
    assert key in str(caught.value) or NAMED_OTHERWISE.get(key, key) in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_experts", "rms_norm_eps", "rope_theta"])
def test_missing_keys_are_named(name: str, key: str) -> None:
    if (name, key) == ("llada", "num_experts"):
        pytest.skip("without experts it is the dense LLaDA, which has its own error")
    with pytest.raises(ConfigError, match=key):
        parse(without(CONFIGS[name], key))


@pytest.mark.parametrize("name", CONFIGS)
def test_unknown_keys_are_errors_and_training_keys_are_not(name: str) -> None:
    with pytest.raises(ConfigError, match=r"'attn_sinks'"):
        parse({**CONFIGS[name], "attn_sinks": 4})
    assert parse({**CONFIGS[name], "use_cache": True, "auto_map": {}, "initializer_range": 0.5}) == parse(CONFIGS[name])


def test_sliding_window_matters_only_when_it_is_on() -> None:
    assert parse({**SDAR_CONFIG, "sliding_window": 4096}) == parse(SDAR_CONFIG)
    with pytest.raises(ConfigError, match="sliding_window"):
        parse({**without(SDAR_CONFIG, "use_sliding_window"), "sliding_window": 4096})


def test_rope_parameters_of_transformers_5() -> None:
    flat = without(LLADA2_CONFIG, "rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_dim")
    nested = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    assert parse({**flat, "rope_parameters": nested}) == parse(LLADA2_CONFIG)
    with pytest.raises(ConfigError, match="mscale"):
        parse({**flat, "rope_parameters": {**nested, "mscale": 1.0}})


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("llada2_mo", "Did you mean 'llada2_moe'"), ("gpt2", "unknown model_type 'gpt2'"), (None, "model_type"), (7, "7")],
)
def test_unknown_model_types_are_errors(model_type: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        family_of({**LLADA2_CONFIG, "model_type": model_type})


def test_the_dense_llada_is_told_apart() -> None:
    assert family_of(LLADA_MOE_CONFIG).name == "llada_moe"
    with pytest.raises(ConfigError, match="dense LLaDA"):
        family_of(without(LLADA_MOE_CONFIG, "num_experts"))


def test_a_missing_share_of_rotated_features_is_the_class_s_own() -> None:
    llada2 = without(LLADA2_CONFIG, "partial_rotary_factor", "rotary_dim")
    assert parse(llada2).rotary_dim * 2 == parse(llada2).head_dim
    others = without(SDAR_CONFIG, "partial_rotary_factor", "rotary_dim")
    assert parse(others).rotary_dim == parse(others).head_dim


def test_key_value_heads_that_are_left_out() -> None:
    for raw in (LLADA_MOE_CONFIG, SDAR_CONFIG):
        assert parse(without(raw, "num_key_value_heads")).num_kv_heads == raw["num_attention_heads"]
        with pytest.raises(ConfigError, match="num_key_value_heads must be a whole number of at least 1"):
            parse({**raw, "num_key_value_heads": 0})
    assert parse({**LLADA2_CONFIG, "num_key_value_heads": 0}).num_kv_heads == LLADA2_CONFIG["num_attention_heads"]
    with pytest.raises(ConfigError, match="'num_key_value_heads' is missing"):
        parse(without(LLADA2_CONFIG, "num_key_value_heads"))


def test_rope_scaling_of_type_default_scales_nothing() -> None:
    for key in ("type", "rope_type"):
        assert parse({**SDAR_CONFIG, "rope_scaling": {key: "default"}}) == parse(SDAR_CONFIG)
        with pytest.raises(ConfigError, match="yarn"):
            parse({**SDAR_CONFIG, "rope_scaling": {key: "yarn", "factor": 4.0}})


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "key",
    ["_moe_implementation", "core_threshold", "mode", "attn_implementation", "use_deepep", "block_causal_prompt"],
)
def test_switches_of_other_software_change_nothing(name: str, key: str) -> None:
    assert parse({**CONFIGS[name], key: "anything"}) == parse(CONFIGS[name])


def test_experts_may_be_counted_as_transformers_5_does() -> None:
    renamed = {**without(SDAR_CONFIG, "num_experts"), "num_local_experts": SDAR_CONFIG["num_experts"]}
    assert parse(renamed) == parse(SDAR_CONFIG)
    with pytest.raises(ConfigError, match="one value of num_experts and num_local_experts"):
        parse({**SDAR_CONFIG, "num_local_experts": SDAR_CONFIG["num_experts"] + 1})


@pytest.mark.parametrize(("model_type", "like"), [("lladamoe", LLADA_MOE_CONFIG), ("llada21_moe", LLADA2_CONFIG)])
def test_other_spellings_of_a_family(model_type: str, like: dict[str, Any]) -> None:
    assert parse({**like, "model_type": model_type}) == parse(like)


def test_with_a_capacity_there_is_one_group_whatever_the_file_still_says() -> None:
    """LLaDA2.2: n_group 8 and topk_group 4 are in its config.json, and its gate looks at neither."""
    config = parse({**LLADA2_MINI, "expert_capacity": 48}, ids=LLADA2_IDS)
    assert (config.router.num_groups, config.router.kept_groups) == (1, 1)
    assert config.router.min_coreset_size("inside") == config.router.top_k == 8
    assert parse(LLADA2_MINI, ids=LLADA2_IDS).router.num_groups == 8


def test_ids_come_from_the_files_in_order() -> None:
    bare = without(LLADA2_CONFIG, "mask_token_id", "eos_token_id", "pad_token_id")
    tokenizer = TokenIds(mask=1, eos=(2,), pad=3)
    from_tokenizer = parse(bare, ids=tokenizer)
    assert (from_tokenizer.mask_id, from_tokenizer.eos_ids, from_tokenizer.pad_id) == (1, (2,), 3)
    generation = {"mask_token_id": 4, "eos_token_id": [5, 6], "pad_token_id": 7}
    from_generation = parse(bare, generation, tokenizer)
    assert (from_generation.mask_id, from_generation.eos_ids, from_generation.pad_id) == (4, (5, 6, 2), 7)
    from_config = parse({**bare, "mask_id": 8, "pad_token_id": 9, "eos_token_id": 6}, generation, tokenizer)
    assert (from_config.mask_id, from_config.eos_ids, from_config.pad_id) == (8, (5, 6, 2), 9)


def test_missing_ids_say_where_they_were_looked_for() -> None:
    for key, words in (
        ("mask_token_id", ["mask_token_id", "config.json", "generation_config.json", "tokenizer"]),
        ("eos_token_id", ["eos_token_id", "config.json", "generation_config.json", "tokenizer"]),
    ):
        with pytest.raises(ConfigError) as caught:
            parse(without(LLADA2_CONFIG, key))
        assert all(word in str(caught.value) for word in words)
    assert parse(without(LLADA2_CONFIG, "pad_token_id")).pad_id == EOS
    assert parse(LLADA2_CONFIG).mask_id == MASK


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts", "head_dim")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("key", SIZES)
def test_sizes_that_no_model_has_are_named(name: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be at most"):
        parse({**CONFIGS[name], key: 10**30})


def test_a_mask_that_ends_the_text_is_an_error() -> None:
    with pytest.raises(ConfigError, match=f"mask_token_id.*{EOS}.*eos_token_id"):
        parse({**LLADA2_CONFIG, "mask_token_id": EOS})


def test_block_length_from_either_file() -> None:
    assert parse(without(SDAR_CONFIG, "block_size"), {"block_length": 16}).block_length == 16
    assert parse({**SDAR_CONFIG, "block_size": 8}, {"block_length": 8}).block_length == 8
    with pytest.raises(ConfigError, match=r"block_size.*\[8, 16\]"):
        parse({**SDAR_CONFIG, "block_size": 8}, {"block_length": 16})
