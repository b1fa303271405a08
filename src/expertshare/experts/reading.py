"""Slabs on their way from files into slots, by a few threads of which nobody else needs to know."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

from expertshare.experts.slot_memory import Moved

_Queue = SimpleQueue["SlabRead | None"]


class SlabRead:
    """One expert being brought into its slot: run at most once, however often it is queued. Once queued it will be
    done, whatever is interrupted: brought (`moved` says how), skipped because nobody wants it any more, or with an
    error."""

    def __init__(self, bring: Callable[[], Moved], tell: Callable[[bool], None]) -> None:
        """tell: hears whether the expert is in its slot, before anybody who waits does."""
        self.error: BaseException | None = None
        self.moved: Moved | None = None
        self.queued = False
        self.unwanted = False
        self.skipped = False
        self._bring, self._tell = bring, tell
        self._claim = threading.Lock()
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        """Whether the expert is in its slot, or `skipped` or `error` says why not."""
        return self._done.is_set()

    def run(self) -> None:
        """Bring it, unless somebody else does."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            if self.unwanted:
                self.skipped = True
            else:
                self.moved = self._bring()
        except BaseException as error:  # carried to the thread that waits, whatever it is
            self.error = error
        finally:
            self._tell(self.moved is not None)
            self._done.set()

    def wait(self) -> None:
        """Until it is done. Ctrl-C gets through; the read then goes on behind."""
        self._done.wait()


class ReadTeam:
    """Threads that run reads in the order in which they are submitted."""

    def __init__(self, num_threads: int) -> None:
        self._queue: _Queue = SimpleQueue()
        # Daemons: a store that nobody closed must not keep the interpreter from leaving.
        self._threads = [
            threading.Thread(target=_work, args=(self._queue,), name=f"expert-reader-{i}", daemon=True)
            for i in range(num_threads)
        ]
        self._stop = weakref.finalize(self, _dismiss, self._queue, num_threads)
        for thread in self._threads:
            thread.start()

    def submit(self, read: SlabRead) -> None:
        """Have it run by some thread."""
        self._queue.put(read)
        read.queued = True

    def close(self) -> None:
        """Let the threads finish what they were given, and wait for them; twice is fine."""
        self._stop()
        for thread in self._threads:
            thread.join()


def _work(queue: _Queue) -> None:
    while (read := queue.get()) is not None:
        read.run()
        del read  # or the memory of the last slab would outlive its store


def _dismiss(queue: _Queue, num_threads: int) -> None:
    for _ in range(num_threads):
        queue.put(None)
