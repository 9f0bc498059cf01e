"""Metrics in Prometheus's text: of requests under vLLM's names, of experts under this package's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from layerscope_jax.serving.totals import Totals

FIRST_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
NEXT_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
WHOLE_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""Upper bounds (s) of the buckets, as in vLLM."""


class Metrics:
    """Counts of a server; used on the event loop.

    Args:
        model: name that labels every metric.
        requests: returns the number of requests that run, and of those that wait.
        totals: returns the totals of the engine.
        prefix_cache: whether prompts are looked up in a prefix cache.

    Attributes:
        new_tokens: counts tokens.
        first_token_s: histogram of times to first token.
    """

    def __init__(
        self,
        model: str,
        requests: Callable[[], tuple[int, int]],
        totals: Callable[[], Totals],
        prefix_cache: bool,
    ):
        self._registry = CollectorRegistry()
        running = self._made(Gauge, "num_requests_running", "Requests that have a slot.", model)
        running.set_function(lambda: requests()[0])
        waiting = self._made(
            Gauge, "num_requests_waiting", "Requests that wait for their first token.", model
        )
        waiting.set_function(lambda: requests()[1])
        self._prompt_tokens = self._made(Counter, "prompt_tokens", "Tokens of prompts.", model)
        self._prefix_cache = prefix_cache
        self._queries = self._made(
            Counter, "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", model
        )
        self._hits = self._made(
            Counter, "prefix_cache_hits", "Those of them that were there, and were not computed.", model
        )
        self.new_tokens = self._made(Counter, "generation_tokens", "Generated tokens.", model)
        self.first_token_s = self._made(
            Histogram, "time_to_first_token_seconds", "Time to first token.", model, FIRST_S
        )
        self._next_s = [
            self._made(Histogram, name, "Time between two tokens of a request.", model, NEXT_S)
            for name in ("inter_token_latency_seconds", "time_per_output_token_seconds")
        ]
        self._whole_s = self._made(
            Histogram, "e2e_request_latency_seconds", "Time of a whole request.", model, WHOLE_S
        )
        self._ended = Counter(
            "vllm:request_success",
            "Requests that ended, by their finish_reason.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._model = model
        for reason in ("stop", "length", "abort", "error"):
            self._ended.labels(model, reason)
        self._registry.register(_OfEngine(model, totals))

    def _made(self, kind: Any, name: str, text: str, model: str, buckets: Any = None) -> Any:
        more = {} if buckets is None else {"buckets": buckets}
        metric = kind(f"vllm:{name}", text, ("model_name",), registry=self._registry, **more)
        return metric.labels(model)

    def prefilled(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Counts a prompt, of which a prefix cache held `cached_tokens`."""
        self._prompt_tokens.inc(prompt_tokens)
        if self._prefix_cache:
            self._queries.inc(prompt_tokens)
            self._hits.inc(cached_tokens)

    def token_took(self, seconds: float) -> None:
        """Counts a token that is not a request's first."""
        for histogram in self._next_s:
            histogram.observe(seconds)

    def ended(self, reason: str, seconds: float) -> None:
        """Counts a sample that has ended."""
        self._ended.labels(self._model, reason).inc()
        self._whole_s.observe(seconds)

    def text(self) -> bytes:
        """Returns all metrics as Prometheus reads them."""
        return generate_latest(self._registry)


class _OfEngine(Collector):
    """The engine's own figures, computed when they are asked for."""

    def __init__(self, model: str, totals: Callable[[], Totals]):
        self._model, self._totals = model, totals
        self._began = time.perf_counter()

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yields each metric."""
        totals = self._totals()
        for name, text, value in (
            ("experts_needed", "Experts that layers needed.", totals.experts),
            ("expert_hits", "Those of them that were resident when planned.", totals.expert_hits),
            ("bytes_wasted", "Bytes that were prefetched and never used.", totals.wasted_bytes),
            ("link_busy_seconds", "Time in which the link was busy.", totals.link_busy_s),
            ("host_busy_seconds", "Time in which experts were computed on the host.", totals.host_busy_s),
            ("device_busy_seconds", "Time in which the device computed.", totals.device_busy_s),
            ("experts_foreseeable", "Active experts of decode steps with a forecast.", totals.foreseeable),
            ("experts_foreseen", "Those of them that were forecast one layer ahead.", totals.foreseen),
        ):
            yield self._one(CounterMetricFamily(f"layerscope:{name}", text, labels=["model_name"]), value)
        moved = CounterMetricFamily(
            "layerscope:bytes_moved", "Bytes sent over the link, by cause.", labels=["model_name", "cause"]
        )
        moved.add_metric([self._model, "demand"], totals.demand_bytes)
        moved.add_metric([self._model, "prefetch"], totals.prefetch_bytes)
        yield moved
        for name, text, part, whole in (
            ("hit_rate", "Share of needed experts that were resident.", totals.expert_hits, totals.experts),
            (
                "forecast_recall",
                "Share of active experts that were forecast one layer ahead.",
                totals.foreseen,
                totals.foreseeable,
            ),
            (
                "link_share",
                "Share of the time since the start in which the link was busy.",
                totals.link_busy_s,
                time.perf_counter() - self._began,
            ),
        ):
            if whole:
                family = GaugeMetricFamily(f"layerscope:{name}", text, labels=["model_name"])
                yield self._one(family, part / whole)

    def _one(self, family: Any, value: float) -> Any:
        family.add_metric([self._model], value)
        return family
