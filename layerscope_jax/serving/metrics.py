"""Metrics in Prometheus's text: of requests under vLLM's names, of experts under this package's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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

TOKENS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))
"""Upper bounds of the buckets of numbers of tokens."""

NAMES = {
    "num_requests_running": "Requests that have a slot.",
    "num_requests_waiting": "Requests that wait for their first token.",
    "kv_cache_usage_perc": "Share of the slots in which a request runs.",
    "prompt_tokens": "Tokens of prompts.",
    "generation_tokens": "Generated tokens.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Those of them that were there, and were not computed.",
    "time_to_first_token_seconds": "Time to first token.",
    "inter_token_latency_seconds": "Time between two tokens of a request.",
    "time_per_output_token_seconds": "Time between two tokens of a request.",
    "e2e_request_latency_seconds": "Time of a whole request.",
    "request_queue_time_seconds": "Time from when a request comes until its prompt is computed.",
    "request_prefill_time_seconds": "Time from then until the first token.",
    "request_decode_time_seconds": "Time from the first token to the last.",
    "request_prompt_tokens": "Tokens of a request's prompt.",
    "request_generation_tokens": "Generated tokens of a request.",
    "request_max_num_generation_tokens": "Generated tokens of the longest sample of a prompt.",
}
"""What metrics under vLLM's names are, beside `request_success`, which has another label."""


class Ended(NamedTuple):
    """What is known of a sample that has ended.

    Attributes:
        reason: its `finish_reason`.
        prompt_tokens, new_tokens: number of tokens.
        whole_s: time (s) since its request came.
        parts_s: times (s) that it waited, was prefilled and decoded; None if it has no token.
    """

    reason: str
    prompt_tokens: int
    new_tokens: int
    whole_s: float
    parts_s: tuple[float, float, float] | None


class Metrics:
    """Counts of a server; used on the event loop.

    Args:
        model: name that labels every metric.
        requests: returns the number of requests that run, and of those that wait.
        slots: most requests that run at once.
        totals: returns the totals of the engine.
        prefix_cache: whether prompts are looked up in a prefix cache.

    Attributes:
        new_tokens: number of tokens so far.
    """

    def __init__(
        self,
        model: str,
        requests: Callable[[], tuple[int, int]],
        slots: int,
        totals: Callable[[], Totals],
        prefix_cache: bool,
    ):
        self._model, self._prefix_cache, self.new_tokens = model, prefix_cache, 0
        self._registry = CollectorRegistry()
        self._made(Gauge, "num_requests_running").set_function(lambda: requests()[0])
        self._made(Gauge, "num_requests_waiting").set_function(lambda: requests()[1])
        self._made(Gauge, "kv_cache_usage_perc").set_function(lambda: requests()[0] / slots)
        self._prompt_tokens = self._made(Counter, "prompt_tokens")
        self._queries = self._made(Counter, "prefix_cache_queries")
        self._hits = self._made(Counter, "prefix_cache_hits")
        self._new_tokens = self._made(Counter, "generation_tokens")
        self._first_s = self._made(Histogram, "time_to_first_token_seconds", FIRST_S)
        self._next_s = [
            self._made(Histogram, name, NEXT_S)
            for name in ("inter_token_latency_seconds", "time_per_output_token_seconds")
        ]
        self._whole_s = self._made(Histogram, "e2e_request_latency_seconds", WHOLE_S)
        self._parts_s = [
            self._made(Histogram, f"request_{part}_time_seconds", WHOLE_S)
            for part in ("queue", "prefill", "decode")
        ]
        self._prompt_lengths = self._made(Histogram, "request_prompt_tokens", TOKENS)
        self._lengths = self._made(Histogram, "request_generation_tokens", TOKENS)
        self._longest = self._made(Histogram, "request_max_num_generation_tokens", TOKENS)
        self._ended = Counter(
            "vllm:request_success",
            "Requests that ended, by their finish_reason.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._ended.labels(model, reason)
        self._registry.register(_OfEngine(model, totals))

    def _made(self, kind: Any, name: str, buckets: Any = None) -> Any:
        more = {} if buckets is None else {"buckets": buckets}
        metric = kind(f"vllm:{name}", NAMES[name], ("model_name",), registry=self._registry, **more)
        return metric.labels(self._model)

    def prefilled(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Counts a prompt, of which a prefix cache held `cached_tokens`."""
        self._prompt_tokens.inc(prompt_tokens)
        if self._prefix_cache:
            self._queries.inc(prompt_tokens)
            self._hits.inc(cached_tokens)

    def token(self, seconds: float, is_first: bool) -> None:
        """Counts a token, and the time from its request if it is the first, or else from the last token."""
        self.new_tokens += 1
        self._new_tokens.inc()
        for histogram in [self._first_s] if is_first else self._next_s:
            histogram.observe(seconds)

    def ended(self, sample: Ended) -> None:
        """Counts a sample that has ended."""
        self._ended.labels(self._model, sample.reason).inc()
        self._whole_s.observe(sample.whole_s)
        self._prompt_lengths.observe(sample.prompt_tokens)
        self._lengths.observe(sample.new_tokens)
        for histogram, seconds in zip(self._parts_s, sample.parts_s or (), strict=False):
            histogram.observe(seconds)

    def longest(self, new_tokens: int) -> None:
        """Counts a prompt whose samples have all ended, by the tokens of the longest."""
        self._longest.observe(new_tokens)

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
