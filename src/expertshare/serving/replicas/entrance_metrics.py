"""What an entrance counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Counter, Gauge

from expertshare.serving.request_metrics import RequestMetrics


class EntranceMetrics(RequestMetrics):
    """Of a server in front of several engines."""

    def __init__(self) -> None:
        super().__init__()
        self.retried = Counter(
            "expertshare_retried_requests", "Requests that a second replica was asked.", registry=self.registry
        )
        self.lost = Counter(
            "expertshare_lost_requests", "Requests that were told that their replica ended.", registry=self.registry
        )
        self._running = Gauge("expertshare_running", "Requests on their way.", registry=self.registry)
        self._ready = Gauge("expertshare_ready", "1 where new requests are taken.", registry=self.registry)
        self._replicas = Gauge("expertshare_replicas", "Replicas by state.", ["state"], registry=self.registry)

    def text(self, *, running: int, ready: bool, replicas: Mapping[str, int]) -> bytes:
        """In Prometheus' text format, with the values of now."""
        self._running.set(running)
        self._ready.set(int(ready))
        self._replicas.clear()
        for state, count in replicas.items():
            self._replicas.labels(state).set(count)
        return self.exposition()
