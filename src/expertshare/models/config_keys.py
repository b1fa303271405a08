"""Strict reading of a checkpoint's config.json: every key is used, or known to have no effect, or an error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from expertshare.errors import ConfigError, nearest

NO_EFFECT = frozenset(
    {
        "_attn_implementation",
        "_moe_implementation",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "block_causal_prompt",
        "bos_token_id",
        "core_threshold",
        "dtype",
        "embedding_dropout",
        "id2label",
        "initializer_range",
        "label2id",
        "max_window_layers",
        "mode",
        "output_dropout",
        "output_router_logits",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_deepep",
    }
)
"""Keys about training, bookkeeping or other software: inference does not depend on them, in any family."""


_MOST = {
    "head_dim": 2**14,
    "max_position_embeddings": 2**31,
    "num_attention_heads": 2**14,
    "num_experts": 2**16,
    "num_hidden_layers": 10_000,
    "num_key_value_heads": 2**14,
    "num_shared_experts": 2**10,
    "vocab_size": 2**24,
}
"""Far above every model: a size beyond it is damage, and would be counted through, or overflow, before weights are
read."""
_MOST_ELSEWHERE = 2**20


class ConfigKeys:
    """The keys of one file, and which of them have been read. A null value counts as absent."""

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json") -> None:
        self._raw = raw
        self._where = where
        self._read: set[str] = set()

    def states(self, key: str) -> bool:
        """Whether the key is written at all, be it as null."""
        return key in self._raw

    def get(self, key: str) -> Any:
        """The raw value, None if absent."""
        self._read.add(key)
        return self._raw.get(key)

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; ConfigError if it is missing and there is no default."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{self._where}: {key} must be a whole number of at least {least}, got {value!r}")
        if value > (most := _MOST.get(key, _MOST_ELSEWHERE)):
            raise ConfigError(f"{self._where}: {key} must be at most {most}, got {value}: download it again")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"{self._where}: {key} must be a number above 0, got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A key whose value is true or false."""
        value = self._required(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self._where}: {key} must be true or false, got {value!r}")
        return value

    def expect(self, key: str, *supported: object) -> None:
        """Refuse a value of `key` other than the supported ones; absent and null are supported."""
        value = self.get(key)
        if value is not None and not any(type(value) is type(s) and value == s for s in supported):
            wanted = " or ".join(repr(s) for s in supported) if supported else "null"
            raise ConfigError(
                f"{self._where}: {key}={value!r} is not supported, expected {wanted}: use another checkpoint"
            )

    def refuse_unread(self, without_effect: Iterable[str] = ()) -> None:
        """Raise ConfigError for keys that nobody read and that are not known to be without effect."""
        known = self._read | NO_EFFECT | set(without_effect) | {"model_type"}
        unknown = sorted(set(self._raw) - known)
        if unknown:
            raise ConfigError(
                f"{self._where}: unknown key {unknown[0]!r} ({len(unknown)} in all: {', '.join(unknown[:5])}). It may "
                f"change what the model computes, so it is not skipped. {nearest(unknown[0], known)}"
            )

    def _required(self, key: str, default: object) -> Any:
        value = default if (stated := self.get(key)) is None else stated
        if value is None:
            raise ConfigError(f"{self._where}: the key {key!r} is missing: check that the download is complete")
        return value


def read_rope(keys: ConfigKeys, head_dim: int, family_factor: float) -> tuple[float, int]:
    """Base of the rotary embedding and the number of rotated features per head.

    Knows the flat keys, and the nested `rope_parameters` and `rope_scaling` of transformers 5 and 4. Any scaling of the
    rotary embedding, and `rotary_dim` that disagrees with `partial_rotary_factor`, is a ConfigError. family_factor:
    the share of a head that is rotated, where the file does not say it.
    """
    theta, factor = _absent_or_number(keys, "rope_theta"), _absent_or_number(keys, "partial_rotary_factor")
    for name in ("rope_parameters", "rope_scaling"):
        stated = keys.get(name)
        if stated is not None and not isinstance(stated, Mapping):
            raise ConfigError(f"config.json: {name} must be an object with rope_theta, got {stated!r}")
        nested = ConfigKeys(stated or {}, f"{name} in config.json")
        nested.expect("rope_type", "default")
        nested.expect("type", "default")
        theta = _absent_or_number(nested, "rope_theta") or theta
        factor = _absent_or_number(nested, "partial_rotary_factor") or factor
        nested.refuse_unread()
    if theta is None:
        raise ConfigError("config.json: the key 'rope_theta' is missing: check that the download is complete")
    factor_is_stated, factor = factor is not None, factor or family_factor
    rotary_dim = int(head_dim * factor + 1e-6)  # a factor that is a rounded quotient must not lose a feature
    if keys.get("rotary_dim") is None:
        return theta, rotary_dim
    size = keys.integer("rotary_dim")
    if factor_is_stated and size != rotary_dim:
        raise ConfigError(
            f"config.json: rotary_dim={size} and partial_rotary_factor={factor:g} of head_dim={head_dim} disagree: "
            "correct one of them"
        )
    return theta, size


def refuse_sliding_window(keys: ConfigKeys) -> None:
    """Sliding-window attention is not supported; `sliding_window` has no effect while `use_sliding_window` is false."""
    keys.expect("use_sliding_window", False)
    if keys.get("use_sliding_window") is None:
        keys.expect("sliding_window")
    keys.get("sliding_window")


def _absent_or_number(keys: ConfigKeys, key: str) -> float | None:
    return None if keys.get(key) is None else keys.number(key)


_MASK_KEYS = ("mask_token_id", "mask_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenIds:
    """Ids of special tokens that one source knows; None or empty where it knows none."""

    mask: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


def read_special_ids(keys: ConfigKeys, generation: Mapping[str, Any], tokenizer: TokenIds) -> dict[str, Any]:
    """mask_id, eos_ids and pad_id of a ModelConfig: config.json first, then generation_config.json, then the tokenizer.

    Whatever any of the three calls an end of text ends an answer; those of generation_config.json come first. Where
    nothing names a padding token, the first end token pads: padding is masked out everywhere, so its id is never seen.
    Raises ConfigError that lists where it looked if there is no mask id or no end id.
    """
    config = {key: keys.get(key) for key in (*_MASK_KEYS, "eos_token_id", "pad_token_id")}
    mask = _first([config[key] for key in _MASK_KEYS] + [generation.get(key) for key in _MASK_KEYS] + [tokenizer.mask])
    if mask is None:
        raise ConfigError(
            f"found no mask token: looked at {' and '.join(_MASK_KEYS)} in config.json and generation_config.json, and "
            "for a mask token in the tokenizer's special tokens. Add mask_token_id to config.json"
        )
    stated = [e for e in (generation.get("eos_token_id"), config["eos_token_id"], list(tokenizer.eos)) if e is not None]
    listed = [e for each in stated for e in (each if isinstance(each, list) else [each])]
    if not listed:
        raise ConfigError(
            "found no end-of-text token: looked at eos_token_id in generation_config.json and config.json, and for an "
            "eos token in the tokenizer. Add eos_token_id to config.json"
        )
    ends = tuple(dict.fromkeys(_token_id("eos_token_id", e) for e in listed))
    if mask in ends:
        raise ConfigError(
            f"mask_token_id is {mask}, which is an eos_token_id too: a mask is never written, so that no answer would "
            "end. Correct one of them in config.json or generation_config.json"
        )
    pad = _first([config["pad_token_id"], generation.get("pad_token_id"), tokenizer.pad])
    return {
        "mask_id": _token_id("mask_token_id", mask),
        "eos_ids": ends,
        "pad_id": ends[0] if pad is None else _token_id("pad_token_id", pad),
    }


def read_block_length(keys: ConfigKeys, generation: Mapping[str, Any], family_default: int | None) -> int:
    """Positions of one block: `block_size` or `block_length` of either file, else what the family was trained with.

    Several statements that disagree are a ConfigError, and none where the family has no default.
    """
    files, names = (keys, ConfigKeys(generation, "generation_config.json")), ("block_size", "block_length")
    stated = {file.integer(name) for file in files for name in names if file.get(name) is not None}
    if len(stated) > 1:
        raise ConfigError(
            f"block_size and block_length of config.json and generation_config.json disagree: got {sorted(stated)}, "
            "expected one value"
        )
    length = stated.pop() if stated else family_default
    if length is None:
        raise ConfigError(
            "config.json: found no block_size or block_length there or in generation_config.json, and models of this "
            'family were trained with blocks of 4 to 64: add "block_size" to config.json, as the model\'s name or card '
            "says it (4 for SDAR-30B-A3B-Chat)"
        )
    return length


def _first(candidates: list[Any]) -> Any:
    return next((c for c in candidates if c is not None), None)


def _token_id(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key} must be a token id (a whole number), got {value!r}")
    return value
