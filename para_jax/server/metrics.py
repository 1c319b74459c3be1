"""Metrics: what Prometheus reads at /metrics. Names, meanings and buckets are vLLM's (vllm/v1/metrics/loggers.py,
docs.vllm.ai "Production Metrics"), so its dashboards and the gateways that know vLLM work unchanged. Those that begin
with para_jax are our own.

What the engine and the tenants' traffic count themselves is read at each request for metrics. The rest is counted from
each request's Outcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from ..serving.engine import Engine
from .models import Models
from .traffic import Outcome, Traffic

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
LORA_LABELS = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
FINISH_REASONS = ("stop", "length", "abort", "error")
#: Codes of what ends a request although the engine works.
ABORTS = ("client_left", "timeout", "shutting_down")


class Metrics:
    """What is counted and measured. Any thread may use it.

    metrics.observe(outcome)   when a request has ended, also one that was refused
    metrics.render()           the text for Prometheus
    """

    def __init__(self, engine: Engine, models: Models):
        self._engine, self._models = engine, models
        self.traffic = Traffic(models)
        self._registry = registry = CollectorRegistry(auto_describe=False)
        registry.register(self)  # type: ignore[arg-type]  # it has collect()

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"vllm:{name}", text, ["model_name"], registry=registry).labels(models.base).set_function(value)

        def histogram(name: str, text: str, bounds: Sequence[float]) -> Histogram:
            made = Histogram(f"vllm:{name}", text, ["model_name"], buckets=bounds, registry=registry)
            return made.labels(models.base)

        gauge("num_requests_running", "Samples that hold a slot.", lambda: sum(engine.running.values()))
        gauge("num_requests_waiting", "Samples that wait for a slot.", lambda: sum(engine.waiting.values()))
        gauge("kv_cache_usage_perc", "Share of the KV cache in use, from 0 to 1.", lambda: engine.kv_usage)
        text = "From a request's arrival to its first token."
        self.first_token = histogram("time_to_first_token_seconds", text, FIRST_TOKEN_SECONDS)
        text = "Between two tokens of an answer."
        self.token = histogram("inter_token_latency_seconds", text, TOKEN_SECONDS)
        text = "From a request's arrival to its end."
        self.request = histogram("e2e_request_latency_seconds", text, REQUEST_SECONDS)
        self.queue = histogram("request_queue_time_seconds", "From the queue to a slot.", REQUEST_SECONDS)
        self.prefill = histogram("request_prefill_time_seconds", "From a slot to the first token.", REQUEST_SECONDS)
        text = "From the first token to a request's end."
        self.decode = histogram("request_decode_time_seconds", text, REQUEST_SECONDS)
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens of a request's prompts.", TOKENS)
        self.new_tokens = histogram("request_generation_tokens", "Tokens of a request's answers.", TOKENS)
        text, labels = "Samples that have ended, by reason.", ["model_name", "finished_reason"]
        finished = Counter("vllm:request_success", text, labels, registry=registry)
        self.finished = {reason: finished.labels(models.base, reason) for reason in FINISH_REASONS}
        text = "HTTP requests that have ended."
        self.responses = Counter("para_jax_http_responses", text, ["status"], registry=registry)
        text = "Rounds of the engine that raised an error."
        self.engine_failures = Counter("para_jax_engine_failures", text, registry=registry)

    def observe(self, outcome: Outcome) -> None:
        """Counts a request that has ended."""
        self.responses.labels("none" if outcome.status is None else str(outcome.status)).inc()
        if not outcome.served:  # refused ones have no tokens and no tenant
            return
        for reason in finished_reasons(outcome):
            self.finished[reason].inc()
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
            for _ in range(tokens):
                self.token.observe(seconds / tokens)  # they came together, so each has its share
        if outcome.ended is not None:
            self.request.observe(outcome.ended - outcome.received)

    def render(self) -> tuple[bytes, str]:
        """The metrics as text, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    # ------------------------------------------------------------------------------------ what Prometheus's client asks

    def collect(self) -> Iterator[Metric]:
        """What others count, and labels that change."""
        engine, base, labels = self._engine, self._models.base, ["model_name"]
        cache, total, counts = engine.prefix_cache, self.traffic.total, self.traffic.by_tenant()
        speculation = engine.speculation
        counters = {
            "prefix_cache_queries": ("Prompt tokens that were looked for in the prefix cache.", cache.queries),
            "prefix_cache_hits": ("Prompt tokens that were found in the prefix cache.", cache.hits),
            "num_preemptions": ("Samples that gave up their slot: no block was free.", engine.preemptions),
            "prompt_tokens": ("Tokens of prompts, with those from the prefix cache.", total.prompt_tokens),
            "spec_decode_num_drafts": ("Drafts that were verified.", speculation.drafts),
            "spec_decode_num_draft_tokens": ("Tokens of these drafts.", speculation.drafted),
            "spec_decode_num_accepted_tokens": ("Those of them that the model wrote too.", speculation.accepted),
            "generation_tokens": ("Tokens of answers.", total.new_tokens),
        }
        for name, (text, value) in counters.items():
            family = CounterMetricFamily(f"vllm:{name}", text, labels=labels)
            family.add_metric([base], value)
            yield family
        text, labels = "Tenants with requests. The value is the time in seconds since 1970.", list(LORA_LABELS)
        info = GaugeMetricFamily("vllm:lora_requests_info", text, labels=labels)
        tenants = [names_in_label(engine.running), names_in_label(engine.waiting)]
        info.add_metric([str(engine.slots), *tenants], time.time())
        yield info
        requests = CounterMetricFamily(
            "para_jax_tenant_requests", "Requests that have ended, by how.", labels=["tenant", "outcome"]
        )
        prompt = CounterMetricFamily("para_jax_tenant_prompt_tokens", "Tokens of prompts.", labels=["tenant"])
        new = CounterMetricFamily("para_jax_tenant_generation_tokens", "Tokens of answers.", labels=["tenant"])
        for tenant, of_tenant in counts.items():
            label = base if tenant is None else tenant
            for outcome, count in dict(of_tenant.requests).items():  # a copy: asyncio adds to it meanwhile
                requests.add_metric([label, outcome], count)
            prompt.add_metric([label], of_tenant.prompt_tokens)
            new.add_metric([label], of_tenant.new_tokens)
        yield from (requests, prompt, new)


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
