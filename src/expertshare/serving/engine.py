"""The engine: one thread that owns the model and decodes whatever was ordered, together where that is possible."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from expertshare.decoding import BlockSession, DecodingOptions
from expertshare.decoding.row import check_prompts
from expertshare.experts import SlabStore, StoreStatistics
from expertshare.models import LoadedModel, Runtime
from expertshare.serving.scheduling import (
    EngineBusyError,
    EngineCounts,
    Event,
    Failure,
    FairLock,
    Listener,
    Order,
    PolicyGroup,
    Ticket,
    UsageLedger,
)
from expertshare.serving.settings import EngineLimits, OfferedPolicies
from expertshare.serving.uvicorn_server import Drainable

_LONGEST_RETRY_S = 60


class Engine(Drainable):
    """Continuous batching at block boundaries. Use as `with Engine(...) as engine`, or `start` and `close` it.

    Rows of one policy and block length run together; groups of different ones take turns, a step each. A row joins its
    group when some row of it has finished a block, in the order of asking, and leaves when it is finished, cancelled or
    late. Listeners are called in the engine's thread: they must be quick and must not raise.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        runtime: Runtime,
        *,
        store: SlabStore | None = None,
        limits: EngineLimits | None = None,
        options: DecodingOptions | None = None,
        offered: OfferedPolicies | None = None,
        chat: bool | None = None,
    ) -> None:
        """runtime: how to run the model; its policy is the default one. store: the runtime's, for its figures.
        options: defaults of requests, checked here. chat: whether prompts of the live page go through the chat
        template. Raises InputError or PolicyError."""
        super().__init__("new")
        self.loaded, self.chat, self._store = loaded, chat, store
        self.limits, self.options = limits or EngineLimits(), options or DecodingOptions()
        self.options.resolve(loaded.config)
        self.offered = offered or OfferedPolicies.read(loaded.config.router, runtime.policy)
        self.runtime = replace(runtime, policy=self.offered.default)
        config, dtype = loaded.config, loaded.model.dtype
        self._bytes_per_expert = runtime.bytes_per_expert or config.num_expert_parameters * dtype.itemsize
        self.model_lock = FairLock()
        self.counts = EngineCounts([0] * config.num_moe_layers)
        self._waiting: deque[Ticket] = deque()
        self._groups: deque[PolicyGroup] = deque()
        self._stop = False
        self._seconds_per_row = 1.0
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def max_context(self) -> int:
        """Tokens of a prompt and its answer together."""
        most = self.loaded.config.max_positions
        return most if self.limits.max_context is None else min(most, self.limits.max_context)

    @property
    def max_rows(self) -> int:
        """Rows decoded at once: one where the expert store cannot hold a whole layer, because several rows may need
        more experts together than fit into it."""
        statistics = self.store_statistics()
        if statistics is None or statistics.kind != "budget":
            return self.limits.max_batch
        return 1 if statistics.slots < self.loaded.config.router.num_experts else self.limits.max_batch

    @property
    def num_waiting(self) -> int:
        """Number of rows that wait in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Rows that have a place, those that join at the next end of a block included."""
        return sum(len(group.tickets) for group in list(self._groups))

    def store_statistics(self) -> StoreStatistics | None:
        """Of the expert store, where there is one."""
        return self._store.statistics() if self._store is not None else None

    def submit(self, orders: Sequence[tuple[Order, Listener]]) -> list[Ticket]:
        """Queue rows, all of them or none. Raises InputError, EngineBusyError or EngineClosedError."""
        now = time.monotonic()
        deadline, tickets = now + self.limits.timeout_s, []
        for order, listener in orders:
            resolved = replace(order, options=order.options.resolve(self.loaded.config))
            check_prompts([order.prompt], resolved.options, self.loaded.config)
            tickets.append(Ticket(order=resolved, listener=listener, asked_at=now, deadline=deadline))
        with self._changed:
            self._check_ready()
            free = self.max_rows - self.num_running
            if len(self._waiting) + len(tickets) > self.limits.max_queue + max(0, free):
                raise EngineBusyError(
                    f"the queue is full ({len(self._waiting)} answers wait): ask again later",
                    retry_after_s=self._retry_after_s(),
                )
            self._waiting.extend(tickets)
            self._changed.notify_all()
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Nobody wants these any more: they leave before the next step, and their listeners hear nothing more."""
        with self._changed:
            for ticket in tickets:
                ticket.cancelled = True
            self._changed.notify_all()

    def start(self) -> None:
        """Begin to take orders; once."""
        with self._changed:
            if self._state == "new":
                self._state = "ready"
                self._thread.start()

    def close(self) -> None:
        """Stop after the current step; rows that are not finished are told so."""
        with self._changed:
            started, self._stop = self._state != "new", True
            if self._state != "broken":
                self._state = "closed"
            self._changed.notify_all()
        if started:
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _has_work(self) -> bool:
        return bool(self._waiting or self._groups)

    def _retry_after_s(self) -> int:
        rounds = (len(self._waiting) + self.num_running) / self.max_rows
        return max(1, min(_LONGEST_RETRY_S, math.ceil(rounds * self._seconds_per_row)))

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        finally:  # whatever happened: nobody may wait for ever
            self._end()

    def _turn(self) -> bool:
        """One step of one group. False when the engine is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stop or self._has_work())
            if self._stop:
                return False
            self._sweep()
            self._assign()
            group = self._groups[0] if self._groups else None
            self._groups.rotate(-1)
        if group is not None:
            with self.model_lock:
                group.step()
        with self._changed:
            self._forget_empty_groups()
            self._changed.notify_all()
        return True

    def _sweep(self) -> None:
        """Drop who is cancelled or late, from the queue and from the middle of blocks."""
        now = time.monotonic()
        for ticket in self._tickets():
            if not ticket.cancelled and ticket.deadline > now:
                continue
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            for group in self._groups:
                group.drop(ticket)
            if ticket.cancelled:
                self.counts.finished["cancelled"] += 1
            else:
                self._tell(ticket, Failure(kind="deadline", message="the answer took longer than this server allows"))
        self._forget_empty_groups()

    def _tickets(self) -> list[Ticket]:
        return [*self._waiting, *(ticket for group in self._groups for ticket in group.tickets)]

    def _forget_empty_groups(self) -> None:
        self._groups = deque(group for group in self._groups if group.tickets)

    def _assign(self) -> None:
        """Give free places to those who wait, in the order of asking."""
        free = self.max_rows - self.num_running
        while self._waiting and free > 0:
            ticket = self._waiting.popleft()
            self._group_of(ticket.order).joining.append(ticket)
            free -= 1

    def _group_of(self, order: Order) -> PolicyGroup:
        key = (order.policy, order.options.block_length)
        for group in self._groups:
            if group.key == key:
                return group
        ledger = UsageLedger(self.counts, self._bytes_per_expert)
        session = BlockSession(self.loaded.model, replace(self.runtime, policy=order.policy), ledger)
        self._groups.append(PolicyGroup(key, session, ledger, self._tell))
        return self._groups[-1]

    def _tell(self, ticket: Ticket, event: Event) -> None:
        if isinstance(event, Failure):
            self.counts.finished[event.kind] += 1
        elif event.finish_reason is not None:
            self.counts.finished[event.finish_reason] += 1
            took = time.monotonic() - ticket.asked_at
            self._seconds_per_row += 0.1 * (took - self._seconds_per_row)
        if not ticket.cancelled:
            ticket.listener(event)

    def _end(self) -> None:
        with self._changed:
            broken = not self._stop
            self._state = "broken" if broken else "closed"
            left = self._tickets()
            self._waiting.clear()
            self._groups.clear()
            self._changed.notify_all()
        failure = Failure(kind="shutdown", message="this server is shutting down: ask another one")
        if broken:
            failure = Failure(kind="broken", message="the engine of this server has failed; its log says why")
        for ticket in left:
            self._tell(ticket, failure)
