"""What the operator of a server decides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from expertshare.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """Bounds of the engine. max_batch: rows (answers) decoded at once, whatever their policies. max_queue: rows that
    wait for a place; more are refused. timeout_s: from asking to the last token, waiting included. max_context: tokens
    of a prompt and its answer together (None: the model's positions)."""

    max_batch: int = 16
    max_queue: int = 64
    timeout_s: float = 300.0
    max_context: int | None = None

    def __post_init__(self) -> None:
        _at_least(1, max_batch=self.max_batch, max_context=self.max_context)
        _at_least(0, max_queue=self.max_queue)
        _positive(timeout_s=self.timeout_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Bounds and manners of the HTTP interface.

    model_name: what clients call the model (None: its directory's name). api_key: asked of every request but those for
    health and metrics (None: nobody is asked). max_body_bytes: longest request body. max_prompt_tokens: longest prompt
    (None: what the context leaves). max_choices: answers of one request. body_timeout_s: for a client to send its body;
    send_timeout_s: for a client to take a piece of its answer. log_prompts: put prompts and answers into the log.
    """

    model_name: str | None = None
    api_key: str | None = None
    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    max_choices: int = 8
    body_timeout_s: float = 30.0
    send_timeout_s: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        _at_least(
            1,
            max_body_bytes=self.max_body_bytes,
            max_prompt_tokens=self.max_prompt_tokens,
            max_choices=self.max_choices,
        )
        _positive(body_timeout_s=self.body_timeout_s, send_timeout_s=self.send_timeout_s)
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("expected an API key of some characters, got a blank one: give one, or none at all")


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}: change it")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} must be a finite number of seconds greater than 0, got {value!r}: change it")
