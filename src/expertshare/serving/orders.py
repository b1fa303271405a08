"""What is asked of the engine, and what it tells about each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from expertshare.decoding import DecodingOptions, FinishReason
from expertshare.errors import ExpertShareError
from expertshare.measure.cost import ForwardKind
from expertshare.types import RoutingPolicy

FailureKind = Literal["deadline", "shutdown", "numerics", "memory", "broken"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One answer to one prompt. options: resolved, with the row's own seed; policy: bound to the model's router."""

    prompt: tuple[int, ...]
    options: DecodingOptions
    policy: RoutingPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class RowUsage:
    """What a row has cost so far. unique_experts: by kind of forward, the mean over forwards, layers and blocks, as
    `generate --json` counts them; 0.0 where there was none."""

    steps: int
    forwards: int
    unique_experts: Mapping[ForwardKind, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A committed block: the tokens that it adds to the answer. finish_reason: of the last block, else None."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    usage: RowUsage


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The row will get no further."""

    kind: FailureKind
    message: str


Event = Progress | Failure
Listener = Callable[[Event], None]


class EngineBusyError(ExpertShareError):
    """The queue is full."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineClosedError(ExpertShareError):
    """The engine takes no orders: not yet, or not any more."""


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """A row's way through the engine. number: in its session, once it is there."""

    order: Order
    listener: Listener
    asked_at: float
    deadline: float
    number: int | None = None
    steps: int = 0
    forwards: int = 0
    cancelled: bool = field(default=False)
