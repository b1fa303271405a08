"""What the live page needs of whoever decodes for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

Event = dict[str, Any]
"""One event of a trace, ready for JSON; docs/live-page.md says what each type holds."""


class TraceSource(Protocol):
    """Decodes a prompt while somebody watches."""

    def facts(self) -> Mapping[str, Any]:
        """What the page says of the model before anything is decoded, ready for JSON."""
        ...

    def trace(
        self,
        prompt: str,
        policies: Sequence[str],
        *,
        max_tokens: int,
        seed: int,
        stop: threading.Event,
        tokens_per_step: int | None = None,
    ) -> Iterator[Event]:
        """Decode `prompt` once under each policy: a start event, steps and blocks of all runs in turns, an end event.

        tokens_per_step: write that many tokens in a step, the surest ones; None leaves it to the threshold. Ends early,
        without an end event, once `stop` is set. Raises a subclass of ExpertShareError: before the first event for an
        unusable request, later where decoding fails.
        """
        ...
