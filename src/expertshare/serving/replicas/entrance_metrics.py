"""What an entrance counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class EntranceMetrics:
    """requests and seconds are named as those of a server with one engine are."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "expertshare_requests", "Requests by path and status.", ["path", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "expertshare_request_seconds",
            "From the request to the last byte of the response.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.retried = Counter(
            "expertshare_retried_requests", "Requests that a second replica was asked.", registry=self._registry
        )
        self.lost = Counter(
            "expertshare_lost_requests", "Requests that were told that their replica ended.", registry=self._registry
        )
        self._running = Gauge("expertshare_running", "Requests on their way.", registry=self._registry)
        self._ready = Gauge("expertshare_ready", "1 where new requests are taken.", registry=self._registry)
        self._replicas = Gauge("expertshare_replicas", "Replicas by state.", ["state"], registry=self._registry)

    def text(self, *, running: int, ready: bool, replicas: Mapping[str, int]) -> bytes:
        """In Prometheus' text format, with the values of now."""
        self._running.set(running)
        self._ready.set(int(ready))
        self._replicas.clear()
        for state, count in replicas.items():
            self._replicas.labels(state).set(count)
        return generate_latest(self._registry)
