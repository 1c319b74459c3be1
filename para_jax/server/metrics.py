"""Metrics: what Prometheus reads at /metrics. Names, meanings and buckets are vLLM's (vllm/v1/metrics/loggers.py,
docs.vllm.ai "Production Metrics"), so its dashboards and the gateways that know vLLM work unchanged. Those that begin
with para_jax are our own.

Gauges are read from the engine at each request for metrics. The rest is counted from each request's Outcome.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from ..serving.engine import Engine
from .models import Models
from .outcome import Outcome
from .traffic import Traffic

FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
TOKENS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))
FINISH_REASONS = ("stop", "length", "abort", "error")
#: Codes of what ends a request although the engine works.
ABORTS = ("client_left", "timeout", "shutting_down")


class Metrics:
    """What is counted and measured. Any thread may use it.

    metrics.begin(outcome)     when the engine has taken a request
    metrics.observe(outcome)   when a request has ended, also one that was refused
    metrics.render()           the text for Prometheus
    """

    def __init__(self, engine: Engine, models: Models, *, max_tenants: int = 1000):
        """
        Args:
            max_tenants: tenants with a label of their own, at most.
        """
        self._engine, self._models = engine, models
        self.traffic = Traffic(models, max_tenants)
        self.first_token, self.token = Histogram(FIRST_TOKEN_SECONDS), Histogram(TOKEN_SECONDS)
        self.request, self.queue, self.prefill, self.decode = (Histogram(REQUEST_SECONDS) for _ in range(4))
        self.prompt_tokens, self.new_tokens = Histogram(TOKENS), Histogram(TOKENS)
        self._finished: Counter[str] = Counter(dict.fromkeys(FINISH_REASONS, 0))
        self._statuses: Counter[str] = Counter()
        self._engine_failures = 0
        self._lock = threading.Lock()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)  # type: ignore[arg-type]  # it has collect()

    def begin(self, outcome: Outcome) -> None:
        """Counts the tokens of a request while they come. Call it when the engine has taken the request."""
        self.traffic.begin(outcome)

    def observe(self, outcome: Outcome) -> None:
        """Counts a request that has ended."""
        with self._lock:
            self._statuses["none" if outcome.status is None else str(outcome.status)] += 1
            if outcome.served:
                self._finished.update(finished_reasons(outcome))
        if not outcome.served:
            return
        self.traffic.end(outcome)
        self.prompt_tokens.observe(outcome.prompt_tokens)
        if outcome.started is not None and outcome.queued is not None:
            self.queue.observe(outcome.started - outcome.queued)
        if outcome.first_token is not None:
            self.first_token.observe(outcome.first_token - outcome.received)
            self.new_tokens.observe(outcome.new_tokens)
            if outcome.started is not None:
                self.prefill.observe(outcome.first_token - outcome.started)
            if outcome.ended is not None:
                self.decode.observe(outcome.ended - outcome.first_token)
        for seconds, tokens in outcome.gaps:
            self.token.observe(seconds / max(tokens, 1), tokens)
        if outcome.ended is not None:
            self.request.observe(outcome.ended - outcome.received)

    def count_engine_failure(self) -> None:
        """Counts a round of the engine that raised."""
        with self._lock:
            self._engine_failures += 1

    def render(self) -> tuple[bytes, str]:
        """The metrics as text, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    # ------------------------------------------------------------------------------------ what Prometheus's client asks

    def collect(self) -> Iterator[Metric]:
        yield from self._of_engine()
        yield from self._of_requests()
        yield from self._of_tenants()

    def _of_engine(self) -> Iterator[Metric]:
        engine, base = self._engine, self._models.base
        running, waiting, cache = engine.running, engine.waiting, engine.prefix_cache
        gauges = {
            "num_requests_running": ("Samples that hold a slot.", sum(running.values())),
            "num_requests_waiting": ("Samples that wait for a slot.", sum(waiting.values())),
            "kv_cache_usage_perc": ("Share of the KV cache in use, from 0 to 1.", engine.kv_usage),
        }
        for name, (text, value) in gauges.items():
            yield with_value(GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"]), [base], value)
        counters = {
            "prefix_cache_queries": ("Prompt tokens that were looked for in the prefix cache.", cache.queries),
            "prefix_cache_hits": ("Prompt tokens that were found in the prefix cache.", cache.hits),
        }
        for name, (text, value) in counters.items():
            yield with_value(CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"]), [base], value)
        labels = {"max_lora": str(engine.slots)}
        labels |= {"running_lora_adapters": names_in_label(running), "waiting_lora_adapters": names_in_label(waiting)}
        text = "Tenants with requests. The value is the time in seconds since 1970."
        info = GaugeMetricFamily("vllm:lora_requests_info", text, labels=list(labels))
        yield with_value(info, list(labels.values()), time.time())

    def _of_requests(self) -> Iterator[Metric]:
        base = self._models.base
        with self._lock:
            finished, statuses, failures = dict(self._finished), dict(self._statuses), self._engine_failures
        text = "Samples that have ended, by reason."
        success = CounterMetricFamily("vllm:request_success", text, labels=["model_name", "finished_reason"])
        for reason, count in finished.items():
            success.add_metric([base, reason], count)
        yield success
        histograms = {
            "time_to_first_token_seconds": ("From a request's arrival to its first token.", self.first_token),
            "inter_token_latency_seconds": ("Between two tokens of an answer.", self.token),
            "e2e_request_latency_seconds": ("From a request's arrival to its end.", self.request),
            "request_queue_time_seconds": ("From the queue to a slot.", self.queue),
            "request_prefill_time_seconds": ("From a slot to the first token.", self.prefill),
            "request_decode_time_seconds": ("From the first token to a request's end.", self.decode),
            "request_prompt_tokens": ("Tokens of a request's prompts.", self.prompt_tokens),
            "request_generation_tokens": ("Tokens of a request's answers.", self.new_tokens),
        }
        for name, (text, histogram) in histograms.items():
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            buckets, summed = histogram.read()
            family.add_metric([base], buckets, summed)
            yield family
        http = CounterMetricFamily("para_jax_http_responses", "HTTP requests that have ended.", labels=["status"])
        for status, count in statuses.items():
            http.add_metric([status], count)
        yield http
        failed = CounterMetricFamily("para_jax_engine_failures", "Rounds of the engine that raised an error.")
        yield with_value(failed, [], failures)

    def _of_tenants(self) -> Iterator[Metric]:
        base, counts = self._models.base, self.traffic.by_tenant()
        requests = CounterMetricFamily(
            "para_jax_tenant_requests", "Requests that have ended, by how.", labels=["tenant", "outcome"]
        )
        prompt = CounterMetricFamily("para_jax_tenant_prompt_tokens", "Tokens of prompts.", labels=["tenant"])
        new = CounterMetricFamily("para_jax_tenant_generation_tokens", "Tokens of answers.", labels=["tenant"])
        for tenant, of_one in counts.items():
            label = base if tenant is None else tenant
            for outcome, count in of_one.requests.items():
                requests.add_metric([label, outcome], count)
            prompt.add_metric([label], of_one.prompt_tokens)
            new.add_metric([label], of_one.new_tokens)
        yield from (requests, prompt, new)
        summed, labels = self.traffic.total(), ["model_name"]
        text = "Tokens of prompts, with those from the prefix cache."
        yield with_value(CounterMetricFamily("vllm:prompt_tokens", text, labels=labels), [base], summed.prompt_tokens)
        text = "Tokens of answers."
        yield with_value(CounterMetricFamily("vllm:generation_tokens", text, labels=labels), [base], summed.new_tokens)


class Histogram:
    """Counts by upper bound. An observation may count for several: the tokens of one piece have the same time."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, count: int = 1) -> None:
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += count
            self._sum += value * count

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """How many are at most each bound, and the sum of all."""
        with self._lock:
            counts, summed = self._counts.copy(), self._sum
        bounds = [*map(str, self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(counts), strict=True)), summed


def finished_reasons(outcome: Outcome) -> list[str]:
    """vLLM's words for how the choices of a request ended. Those that an error ended early have one of ABORTS, or an
    error of the engine."""
    if outcome.error is None:
        return outcome.finish_reasons
    ended = [reason for reason in outcome.finish_reasons if reason != "error"]
    early = "abort" if outcome.error in ABORTS else "error"
    return ended + [early] * (outcome.choices - len(ended))


def names_in_label(tenants: dict[str | None, int]) -> str:
    """The names of tenants, with commas between them. A name with a comma would be read as two, so it is left out."""
    return ",".join(name for name in tenants if name is not None and "," not in name)


def with_value(family, labels: list[str], value: float) -> Metric:
    """The family with its one value."""
    family.add_metric(labels, value)
    return family
