"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from expertshare.serving.engine import Engine

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
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class ServerMetrics(RequestMetrics):
    """Of a server with one engine."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.registry.register(_EngineCollector(engine))
        self.first_block_seconds = Histogram(
            "expertshare_first_block_seconds",
            "From the request to its first committed block.",
            buckets=SECONDS,
            registry=self.registry,
        )


class _EngineCollector(Collector):
    """Reads the engine's own counts when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """All of them, by the names of docs/serving.md."""
        yield from self._gauges()
        yield from self._counters()
        unique = SummaryMetricFamily(
            "expertshare_unique_experts",
            "Experts that a block uses in a denoising forward, by MoE layer: sum over blocks, and number of blocks.",
            labels=["layer"],
        )
        counts = self._engine.counts
        for layer, total in enumerate(counts.unique_sum_N):
            unique.add_metric([str(layer)], count_value=counts.unique_blocks, sum_value=total)
        yield unique

    def _gauges(self) -> Iterator[Metric]:
        engine = self._engine
        yield GaugeMetricFamily("expertshare_queue_length", "Answers that wait for a place.", engine.num_waiting)
        yield GaugeMetricFamily("expertshare_running", "Answers that are being decoded.", engine.num_running)
        yield GaugeMetricFamily("expertshare_ready", "1 where new requests are taken.", int(engine.state == "ready"))
        statistics = engine.store_statistics()
        if statistics is not None and statistics.total.hit_rate is not None:
            rate = statistics.total.hit_rate
            yield GaugeMetricFamily("expertshare_store_hit_rate", "Share of experts that were there.", rate)

    def _counters(self) -> Iterator[Metric]:
        counts = self._engine.counts
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts that were prefilled.", counts.prompt_tokens),
            ("completion_tokens", "Tokens of committed blocks.", counts.completion_tokens),
            ("row_steps", "Denoising steps, each answer's own.", counts.row_steps),
        ):
            yield CounterMetricFamily(f"expertshare_{name}", text, value)
        for name, text, label, values in (
            ("forwards", "Forwards of the model.", "kind", dict(counts.forwards)),
            ("expert_bytes", "Bytes of the experts that forwards used.", "kind", dict(counts.expert_bytes)),
            ("answers", "Answers by how they ended.", "end", dict(counts.finished)),
        ):
            family = CounterMetricFamily(f"expertshare_{name}", text, labels=[label])
            for key, value in values.items():
                family.add_metric([key], value)
            yield family
