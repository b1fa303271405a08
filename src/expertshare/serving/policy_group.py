"""The rows that can be decoded together: those of one policy and one block length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from expertshare.decoding import BlockResult, BlockSession, Joining
from expertshare.errors import ExpertMemoryError, ExpertShareError, NumericsError
from expertshare.serving.orders import Event, Failure, FailureKind, Progress, RowUsage, Ticket
from expertshare.serving.usage import EngineCounts, UsageLedger

Tell = Callable[[Ticket, Event], None]


@dataclass(slots=True)
class PolicyGroup:
    """A session, whose rows are whose, and who joins at the next end of a block."""

    session: BlockSession
    ledger: UsageLedger
    tell: Tell
    joining: list[Ticket] = field(default_factory=list)
    _rows: dict[int, Ticket] = field(default_factory=dict)
    _at_block_end: bool = True

    @property
    def counts(self) -> EngineCounts:
        """Of the whole server."""
        return self.ledger.counts

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
        except NumericsError as error:
            culprits = [error.row] if error.row in self._rows else list(self._rows)
            self._fail(culprits, Failure(kind="numerics", message=str(error)))
        except ExpertMemoryError as error:
            self._fail(list(self._rows), Failure(kind="memory", message=str(error)))
        except ExpertShareError as error:
            self._fail(list(self._rows), Failure(kind="broken", message=str(error)))

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
            kind: FailureKind = "memory" if isinstance(error, ExpertMemoryError) else "broken"
            for ticket in tickets:
                self.tell(ticket, Failure(kind=kind, message=str(error)))
            return
        for number, ticket in zip(numbers, tickets, strict=True):
            ticket.number, self._rows[number] = number, ticket
            self.counts.prompt_tokens += len(ticket.order.prompt)

    def _deliver(self, block: BlockResult) -> None:
        ticket = self._rows[block.row]
        ticket.steps += block.steps
        ticket.forwards += block.forwards
        self.counts.completion_tokens += len(block.token_ids)
        unique = self.ledger.unique_experts(block.row)
        usage = RowUsage(steps=ticket.steps, forwards=ticket.forwards, unique_experts=unique)
        if block.finish_reason is not None:
            del self._rows[block.row]
            self.ledger.forget(block.row)
        self.tell(ticket, Progress(token_ids=block.token_ids, finish_reason=block.finish_reason, usage=usage))

    def _fail(self, rows: list[int], failure: Failure) -> None:
        for number in rows:
            ticket = self._rows[number]
            self._leave(number)
            self.tell(ticket, failure)

    def _leave(self, number: int) -> None:
        del self._rows[number]
        self.session.leave(number)
        self.ledger.forget(number)
