"""How the tokens of one call lie: sequences, padding, and the blocks that share a coreset."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertshare.errors import ConfigError, InputError
from expertshare.models.family import ALIASES, FAMILIES, family_named

CONFIG_KEYS = ("canvas_length", "block_length", "block_size")


def block_length_of(model: nn.Module, given: int | None) -> int | None:
    """Positions of a sharing group; None: all positions of a sequence in a call, as for an autoregressive model."""
    if given is not None:
        return _checked(given, "block_length")
    config: Any = getattr(model, "config", None)
    stated = {
        name: _checked(getattr(config, name), f"{name} of the config")
        for name in CONFIG_KEYS
        if getattr(config, name, None) is not None
    }
    if len(set(stated.values())) > 1:
        raise ConfigError(f"expected one block length in the config, got {stated}: give block_length.")
    if stated:
        return next(iter(stated.values()))
    # what the family was trained with: the configs of the first checkpoints do not say
    model_type = str(getattr(config, "model_type", None))
    name = ALIASES.get(model_type, model_type)
    if name not in FAMILIES:
        return None
    if (length := family_named(name).block_length) is None:
        raise ConfigError(
            f"expected block_length, block_size or canvas_length in the config of a {name} model, whose variants were "
            "trained with blocks of 4 to 64: give block_length"
        )
    return length


def _checked(length: object, what: str) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ConfigError(f"expected {what} to be a whole number of positions, at least 1, got {length!r}.")
    return length


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a stack of layers. live_BS: bool, False for padding. block_length: positions of a sharing group.

    Groups are cut from the first position of the call; the last one of a sequence may be shorter.
    """

    live_BS: Tensor
    block_length: int

    @property
    def blocks(self) -> int:
        """Sharing groups of one sequence."""
        return -(-self.live_BS.shape[1] // self.block_length)

    def grouped(self, x_TX: Tensor, fill: float | bool) -> Tensor:
        """Tokens as groups: [T, X] -> [G, L, X], the missing positions of a last block set to `fill`."""
        batch, length = self.live_BS.shape
        missing = self.blocks * self.block_length - length
        x_BSX = x_TX.reshape(batch, length, x_TX.shape[-1])
        padded = F.pad(x_BSX, (0, 0, 0, missing), value=fill) if missing else x_BSX
        return padded.reshape(batch * self.blocks, self.block_length, x_TX.shape[-1])

    def flat(self, x_PX: Tensor) -> Tensor:
        """Tokens again, from the positions of groups: [G * L, X] -> [T, X]."""
        batch, length = self.live_BS.shape
        return x_PX.reshape(batch, self.blocks * self.block_length, -1)[:, :length].flatten(0, 1)

    def per_token(self, x_GX: Tensor) -> Tensor:
        """Each group's row for every one of its tokens: [G, X] -> [T, X]."""
        return self.flat(x_GX.unsqueeze(1).expand(-1, self.block_length, -1))

    def live_groups(self) -> Tensor:
        """bool [G, L], the missing positions of a last block False."""
        return self.grouped(self.live_BS.reshape(-1, 1), fill=False).squeeze(-1)


def read_call(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], block_length: int | None) -> Call:
    """From the arguments of a stack's forward; block_length None: a sequence is one group.

    Padding comes from attention_mask (decoder_attention_mask where the call has decoder_input_ids): [B, positions],
    or [B, 1, S, keys], boolean or additive, where a padded position is one that does not even see itself.
    """
    given = _signature(type(stack).forward).bind_partial(stack, *args, **kwargs).arguments
    given |= kwargs  # what the signature takes as **kwargs, too
    prefix = "decoder_" if given.get("decoder_input_ids") is not None else ""
    tokens = next((given[n] for n in (f"{prefix}input_ids", "inputs_embeds") if given.get(n) is not None), None)
    if tokens is None:
        raise InputError(
            f"expected input_ids or inputs_embeds in the call of {type(stack).__name__}, to know how its tokens lie in "
            f"sequences, got {', '.join(sorted(map(str, given)))}."
        )
    batch, length = tokens.shape[:2]
    cached: Any = given.get("past_key_values")
    past = int(cached.get_seq_length()) if hasattr(cached, "get_seq_length") else 0
    mask = given.get(f"{prefix}attention_mask")
    live_BS = _live(mask, batch, length, past, tokens.device)
    return Call(live_BS, length if block_length is None else min(block_length, length))


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _live(mask: Any, batch: int, length: int, past: int, device: torch.device) -> Tensor:
    if isinstance(mask, dict):  # one mask for each kind of attention, made beforehand by generate
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] < length:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"expected an attention mask [batch, positions] or [batch, 1, queries, keys] over at least {length} "
            f"positions, got {got}: pass the 2-D mask."
        )
    first = past if past + length <= mask.shape[-1] else mask.shape[-1] - length
    if mask.dim() == 2:
        seen = mask[:, first : first + length]
    else:
        queries = torch.arange(length, device=mask.device)
        seen = mask[:, 0, queries, first + queries]
    additive = mask.dim() == 4 and mask.is_floating_point()
    live = seen >= 0 if additive else seen.bool()
    return live.to(device).expand(batch, length)
