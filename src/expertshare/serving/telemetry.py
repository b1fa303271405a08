"""What a server says of itself: log lines as JSON objects, and metrics for Prometheus."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from expertshare.errors import InputError, nearest

if TYPE_CHECKING:
    from expertshare.serving.engine import Engine

LEVELS = ("debug", "info", "warning", "error")
LOGGER = logging.getLogger("expertshare.serving")
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class JSONLines(logging.Formatter):
    """One object per record: time, level, event, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """A line. What a field holds that JSON does not know is written as text."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def log(event: str, **fields: Any) -> None:
    """Write one line of JSON to the log."""
    LOGGER.info(event, extra={"fields": fields})


def checked_level(name: str) -> str:
    """A level as logging spells it. Raises InputError for another word."""
    if name.lower() not in LEVELS:
        raise InputError(f"expected a log level, got {name!r}. {nearest(name.lower(), LEVELS)}")
    return name.upper()


def log_config(level: str) -> dict[str, Any]:
    """For logging.config: our lines and uvicorn's, as JSON on stderr."""
    handler = {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}
    quiet = {"handlers": ["stderr"], "level": level, "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": f"{__name__}.JSONLines"}},
        "handlers": {"stderr": handler},
        "loggers": {"expertshare.serving": quiet, "uvicorn": quiet},
    }


class RequestMetrics(Collector):
    """One registry for one application, so that several can live in a process; a subclass adds the figures that are
    looked up when somebody asks. requests: by path and status; seconds: by path."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(self)
        self.requests = Counter(
            "expertshare_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.seconds = self.histogram("request", "From the request to the last byte of the response.", ["path"])

    def histogram(self, of: str, text: str, labels: Iterable[str] = ()) -> Histogram:
        """A new metric expertshare_OF_seconds, in our buckets."""
        return Histogram(f"expertshare_{of}_seconds", text, labels, buckets=SECONDS, registry=self.registry)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class ServerMetrics(RequestMetrics):
    """Of a server with one engine, by the names of docs/serving.md."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self.first_block_seconds = self.histogram("first_block", "From the request to its first committed block.")

    def collect(self) -> Iterator[Metric]:
        """The engine's own counts, as they are now."""
        engine, counts, statistics = self._engine, self._engine.counts, self._engine.store_statistics()
        yield GaugeMetricFamily("expertshare_queue_length", "Answers that wait for a place.", engine.num_waiting)
        yield GaugeMetricFamily("expertshare_running", "Answers that are being decoded.", engine.num_running)
        yield GaugeMetricFamily("expertshare_ready", "1 where new requests are taken.", int(engine.state == "ready"))
        if statistics is not None and statistics.total.hit_rate is not None:
            rate = statistics.total.hit_rate
            yield GaugeMetricFamily("expertshare_store_hit_rate", "Share of experts that were there.", rate)
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
        unique = SummaryMetricFamily(
            "expertshare_unique_experts",
            "Experts that a block uses in a denoising forward, by MoE layer: sum over blocks, and number of blocks.",
            labels=["layer"],
        )
        for layer, total in enumerate(counts.unique_sum_N):
            unique.add_metric([str(layer)], count_value=counts.unique_blocks, sum_value=total)
        yield unique
