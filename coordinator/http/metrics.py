"""``/metrics`` in Prometheus' text format. Counts and times only: no prompt, no answer, no key."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.statistics import Statistics
from protocol.limits import CREDIT_MICROS

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class _JobCollector(Collector):
    """Reads the dispatcher's own counts when somebody asks, so that counting costs nothing per job."""

    def __init__(self, statistics: Statistics, gauges: Callable[[], dict[str, float]]) -> None:
        self._statistics, self._gauges = statistics, gauges

    def collect(self) -> Iterator[Metric]:
        counts = self._statistics
        plain = {
            "jobs_started": counts.jobs_started,
            "jobs_done": counts.jobs_done,
            "jobs_cancelled": counts.jobs_cancelled,
            "job_attempts": counts.attempts,
            "takeovers_before_first_token": counts.takeovers_before_first_token,
            "takeovers_mid_stream": counts.takeovers_mid_stream,
            "splices_across_engines": counts.splices_across_engines,
            "workers_ended": counts.workers_ended,
            "prompt_tokens": counts.prompt_tokens,
            "cached_tokens": counts.cached_tokens,
            "completion_tokens": counts.completion_tokens,
            "price_credits": counts.price_micros / CREDIT_MICROS,
        }
        for name, value in plain.items():
            yield CounterMetricFamily(f"archipelag_{name}", name.replace("_", " "), value=value)
        for name, by_code in (("jobs_failed", counts.jobs_failed), ("refusals", counts.refusals)):
            family = CounterMetricFamily(f"archipelag_{name}", name.replace("_", " "), labels=["code"])
            for code, count in sorted(by_code.copy().items()):
                family.add_metric([code], count)
            yield family
        for name, value in self._gauges().items():
            yield GaugeMetricFamily(f"archipelag_{name}", name.replace("_", " "), value=value)


class Metrics:
    """The Coordinator's own registry. ``gauges`` is called at each scrape, in the asyncio thread, and must only read plain numbers."""

    def __init__(self, statistics: Statistics, gauges: Callable[[], dict[str, float]]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_JobCollector(statistics, gauges))
        self._requests = Counter(
            "archipelag_http_requests", "HTTP requests", ["route", "status"], registry=self._registry
        )
        self._request_s = Histogram(
            "archipelag_http_request_seconds",
            "Time from request to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._known: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def request(self, route: str, status: int, seconds: float) -> None:
        """``route`` is a pattern, never the path that came in: its values would be without bound."""
        pair = self._known.get((route, status))
        if pair is None:
            pair = self._requests.labels(route, str(status)), self._request_s.labels(route)
            self._known[route, status] = pair
        pair[0].inc()
        pair[1].observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)
