"""What every server counts of its requests, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class RequestMetrics:
    """One registry for one application, so that several can live in a process. requests: by path and status; seconds:
    by path."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "expertshare_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "expertshare_request_seconds",
            "From the request to the last byte of the response.",
            ["path"],
            buckets=SECONDS,
            registry=self.registry,
        )

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
