"""What is asked of the engine, the rows that are decoded together, what each of them has cost, and whose turn it is."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from expertshare.decoding import BlockResult, BlockSession, DecodingOptions, FinishReason, Joining
from expertshare.errors import ExpertMemoryError, ExpertShareError, NumericsError
from expertshare.measure.cost import FORWARD_KINDS, ForwardKind, Turn
from expertshare.routing import RoutingPolicy

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
    """Raised where the queue is full."""

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
    cancelled: bool = False


@dataclass(slots=True)
class EngineCounts:
    """Since the engine began; only its thread writes. N MoE layers.

    unique_sum_N over unique_blocks: unique experts of blocks in denoising forwards, by layer. forwards, expert_bytes:
    by kind of forward. row_steps: denoising steps of rows (one forward is a step of every row in it). finished: rows by
    how they ended.
    """

    unique_sum_N: list[int]
    forwards: Counter[ForwardKind] = field(default_factory=Counter)
    expert_bytes: Counter[ForwardKind] = field(default_factory=Counter)
    row_steps: int = 0
    unique_blocks: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class UsageLedger:
    """A ledger of one session that keeps sums and no history. bytes_per_expert: of one layer."""

    counts: EngineCounts
    bytes_per_expert: int
    _unique: dict[int, Counter[ForwardKind]] = field(default_factory=lambda: defaultdict(Counter))
    _blocks: dict[int, Counter[ForwardKind]] = field(default_factory=lambda: defaultdict(Counter))

    def record(
        self,
        kind: ForwardKind,
        turns: Sequence[Turn],
        *,
        load_NE: Tensor,
        group_experts_NG: Tensor,
        live_G: Tensor,
    ) -> None:
        """Add one forward to the sums."""
        live_RG = live_G.view(len(turns), -1)
        unique_NRG = group_experts_NG.masked_fill(~live_G, 0).view(len(group_experts_NG), *live_RG.shape)
        unique_R, blocks_R = unique_NRG.sum(dim=(0, 2)).tolist(), live_RG.sum(dim=1).tolist()
        for turn, unique, blocks in zip(turns, unique_R, blocks_R, strict=True):
            self._unique[turn.row][kind] += unique
            self._blocks[turn.row][kind] += blocks
        counts = self.counts
        counts.forwards[kind] += 1
        counts.expert_bytes[kind] += int((load_NE > 0).sum()) * self.bytes_per_expert
        if kind == "denoise":
            counts.row_steps += len(turns)
            counts.unique_blocks += sum(blocks_R)
            by_layer = unique_NRG.sum(dim=(1, 2)).tolist()
            counts.unique_sum_N = [old + new for old, new in zip(counts.unique_sum_N, by_layer, strict=True)]

    def unique_experts(self, row: int) -> Mapping[ForwardKind, float]:
        """Mean of a row so far, by kind of forward."""
        unique, blocks, layers = self._unique[row], self._blocks[row], len(self.counts.unique_sum_N)
        return {kind: unique[kind] / max(1, blocks[kind] * layers) for kind in FORWARD_KINDS}

    def forget(self, row: int) -> None:
        """Keep nothing of a row that has left."""
        self._unique.pop(row, None)
        self._blocks.pop(row, None)


@dataclass(slots=True)
class PolicyGroup:
    """A session, whose rows are whose, and who joins at the next end of a block. key: what its rows have in common."""

    key: Hashable
    session: BlockSession
    ledger: UsageLedger
    tell: Callable[[Ticket, Event], None]
    joining: list[Ticket] = field(default_factory=list)
    _rows: dict[int, Ticket] = field(default_factory=dict)
    _at_block_end: bool = True

    @property
    def tickets(self) -> list[Ticket]:
        """All that it has to do with."""
        return [*self._rows.values(), *self.joining]

    def step(self) -> None:
        """Let rows join if nobody is in the middle of the batch's way, then one denoising step; tell what came of it.

        What an error names is dropped, and told; the other rows go on.
        """
        try:
            self._admit()
            if not self._rows:
                return
            blocks = self.session.advance()
            self._at_block_end = bool(blocks)
            for block in blocks:
                self._deliver(block)
        except ExpertShareError as error:
            one = error.row if isinstance(error, NumericsError) else None
            for number in [one] if one in self._rows else list(self._rows):
                ticket = self._rows[number]
                self._leave(number)
                self.tell(ticket, _failure(error))

    def drop(self, ticket: Ticket) -> None:
        """Do no more work for it."""
        if ticket in self.joining:
            self.joining.remove(ticket)
        elif ticket.number is not None and self._rows.get(ticket.number) is ticket:  # other groups have that number too
            self._leave(ticket.number)

    def _admit(self) -> None:
        if not self.joining or (self._rows and not self._at_block_end):
            return
        tickets, self.joining = self.joining, []
        entries = [Joining(prompt=ticket.order.prompt, options=ticket.order.options) for ticket in tickets]
        try:
            numbers = self.session.join(entries)
        except ExpertShareError as error:
            for ticket in tickets:
                self.tell(ticket, _failure(error))
            return
        for number, ticket in zip(numbers, tickets, strict=True):
            ticket.number, self._rows[number] = number, ticket
            self.ledger.counts.prompt_tokens += len(ticket.order.prompt)

    def _deliver(self, block: BlockResult) -> None:
        ticket = self._rows[block.row]
        ticket.steps += block.steps
        ticket.forwards += block.forwards
        self.ledger.counts.completion_tokens += len(block.token_ids)
        unique = self.ledger.unique_experts(block.row)
        usage = RowUsage(steps=ticket.steps, forwards=ticket.forwards, unique_experts=unique)
        if block.finish_reason is not None:
            del self._rows[block.row]
            self.ledger.forget(block.row)
        self.tell(ticket, Progress(token_ids=block.token_ids, finish_reason=block.finish_reason, usage=usage))

    def _leave(self, number: int) -> None:
        del self._rows[number]
        self.session.leave(number)
        self.ledger.forget(number)


def _failure(error: ExpertShareError) -> Failure:
    kind: FailureKind = "memory" if isinstance(error, ExpertMemoryError) else "broken"
    return Failure(kind="numerics" if isinstance(error, NumericsError) else kind, message=str(error))


class FairLock:
    """Like threading.Lock, but fair: a thread that asks again at once after a release waits behind earlier ones.

    The engine holds it for one forward pass at a time, so that the live page can run the model in between.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    def acquire(self, timeout: float = -1) -> bool:
        """Wait for a turn, at most `timeout` seconds (negative: as long as it takes); whether it came."""
        me = object()
        with self._changed:
            self._line.append(me)
            if self._changed.wait_for(lambda: self._line[0] is me, None if timeout < 0 else timeout):
                return True
            self._line.remove(me)
            return False

    def release(self) -> None:
        """Let the next one have its turn. RuntimeError where nobody has one."""
        with self._changed:
            if not self._line:
                raise RuntimeError("release of a lock that nobody holds")
            self._line.popleft()
            self._changed.notify_all()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
