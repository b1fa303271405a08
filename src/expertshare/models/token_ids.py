"""Mask, end and padding ids: read from the checkpoint's own files, never constants in the code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertshare.errors import ConfigError
from expertshare.models.config_keys import ConfigKeys

_MASK_KEYS = ("mask_token_id", "mask_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenIds:
    """Ids of special tokens that one source knows; None or empty where it knows none."""

    mask: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialIds:
    """The ids that decoding needs: all known."""

    mask: int
    eos: tuple[int, ...]
    pad: int


def read_special_ids(keys: ConfigKeys, generation: Mapping[str, Any], tokenizer: TokenIds) -> SpecialIds:
    """Resolve the special ids: config.json first, then generation_config.json, then the tokenizer.

    For the end of text generation_config.json goes first, as in transformers. Where nothing names a padding token, the
    first end token pads: padding is masked out everywhere, so its id is never seen. Raises ConfigError that lists where
    it looked if there is no mask id or no end id.
    """
    config = {key: keys.get(key) for key in (*_MASK_KEYS, "eos_token_id", "pad_token_id")}
    mask = _first([config[key] for key in _MASK_KEYS] + [generation.get(key) for key in _MASK_KEYS] + [tokenizer.mask])
    if mask is None:
        raise ConfigError(
            f"found no mask token: looked at {' and '.join(_MASK_KEYS)} in config.json and generation_config.json, and "
            "for a mask token in the tokenizer's special tokens. Add mask_token_id to config.json"
        )
    eos = _first([generation.get("eos_token_id"), config["eos_token_id"], list(tokenizer.eos) or None])
    if eos is None:
        raise ConfigError(
            "found no end-of-text token: looked at eos_token_id in generation_config.json and config.json, and for an "
            "eos token in the tokenizer. Add eos_token_id to config.json"
        )
    ends = tuple(_token_id("eos_token_id", e) for e in (eos if isinstance(eos, list) else [eos]))
    if not ends:
        raise ConfigError("eos_token_id must name at least one token, got an empty list")
    if mask in ends:
        raise ConfigError(
            f"mask_token_id is {mask}, which is an eos_token_id too: a mask is never written, so that no answer would "
            "end. Correct one of them in config.json or generation_config.json"
        )
    pad = _first([config["pad_token_id"], generation.get("pad_token_id"), tokenizer.pad])
    return SpecialIds(
        mask=_token_id("mask_token_id", mask),
        eos=ends,
        pad=ends[0] if pad is None else _token_id("pad_token_id", pad),
    )


def read_block_length(keys: ConfigKeys, generation: Mapping[str, Any], family_default: int) -> int:
    """Positions of one block: `block_size` or `block_length` of either file, else what the family was trained with.

    Several statements that disagree are a ConfigError.
    """
    names = ("block_size", "block_length")
    stated = {keys.integer(n) for n in names if keys.get(n) is not None}
    also = ConfigKeys(generation, "generation_config.json")
    stated |= {also.integer(n) for n in names if also.get(n) is not None}
    if len(stated) > 1:
        raise ConfigError(
            f"block_size and block_length of config.json and generation_config.json disagree: got {sorted(stated)}, "
            "expected one value"
        )
    return stated.pop() if stated else family_default


def _first(candidates: list[Any]) -> Any:
    return next((c for c in candidates if c is not None), None)


def _token_id(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key} must be a token id (a whole number), got {value!r}")
    return value
