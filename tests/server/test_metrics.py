"""Prometheus reads what has happened, under vLLM's names."""

import threading
import time
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from para_jax.server.metrics import Histogram, Metrics, finished_reasons
from para_jax.server.outcome import Outcome

BASE = "the-base"


def metrics_of(running=None, waiting=None, names=("A", "B"), **options):
    cache = SimpleNamespace(queries=100, hits=40)
    engine = SimpleNamespace(running=running or {}, waiting=waiting or {}, kv_usage=0.25, prefix_cache=cache, slots=3)
    return Metrics(engine, SimpleNamespace(base=BASE, names=names), **options)


def outcome(tenant="A", **fields):
    times = {"received": 10.0, "queued": 10.5, "started": 12.5, "first_token": 13.0, "ended": 20.0}
    given = {"served": True, "status": 200, "tenant": tenant, "prompt_tokens": 10, "new_tokens": 3} | times
    return Outcome("POST", "/v1/completions", "id", **(given | {"finish_reasons": ["stop"]} | fields))


def read(metrics):
    """{(name, *label values in the order of their names): value}, and the types by name."""
    text = metrics.render()[0].decode()
    families = list(text_string_to_metric_families(text))
    samples = [sample for family in families for sample in family.samples]
    found = {(one.name, *(one.labels[label] for label in sorted(one.labels))): one.value for one in samples}
    assert len(found) == len(samples)
    return found, {family.name: family.type for family in families}


def test_the_names_and_types_are_those_of_vllm():
    _, types = read(metrics_of())
    kinds = {
        "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc lora_requests_info",
        "counter": "prefix_cache_queries prefix_cache_hits prompt_tokens generation_tokens request_success",
        "histogram": "time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds "
        "request_queue_time_seconds",
    }
    expected = {f"vllm:{name}": kind for kind, names in kinds.items() for name in names.split()}
    assert {name: kind for name, kind in types.items() if name.startswith("vllm")} == expected


def test_gauges_are_those_of_the_engine_now():
    metrics = metrics_of(running={None: 1, "A": 2}, waiting={"B": 4, "a,b": 1})
    found, _ = read(metrics)
    assert found["vllm:num_requests_running", BASE] == 3 and found["vllm:num_requests_waiting", BASE] == 5
    assert found["vllm:kv_cache_usage_perc", BASE] == 0.25
    assert found["vllm:prefix_cache_queries_total", BASE] == 100 and found["vllm:prefix_cache_hits_total", BASE] == 40
    at = found["vllm:lora_requests_info", "3", "A", "B"]  # max_lora, running, waiting; "a,b" would be two names
    assert abs(at - time.time()) < 60
    metrics._engine.running = {"A": 1, "B": 1}
    assert ("vllm:lora_requests_info", "3", "A,B", "B") in read(metrics)[0]


def test_a_request_is_counted_and_measured():
    metrics = metrics_of()
    metrics.begin(first := outcome(gaps=[(0.4, 4), (7.0, 1)], new_tokens=5))
    metrics.observe(first)
    metrics.observe(outcome(None, finish_reasons=["stop", "length"]))
    metrics.observe(outcome("A", finish_reasons=["stop", "error"], error="client_left", status=None, first_token=None))
    metrics.observe(Outcome("GET", "/v1/models", "id", status=401, error="invalid_api_key"))
    metrics.count_engine_failure()
    found, _ = read(metrics)
    counts = {"stop": 3, "length": 1, "abort": 1, "error": 0}
    assert {reason: found["vllm:request_success_total", reason, BASE] for reason in counts} == counts
    assert found["vllm:prompt_tokens_total", BASE] == 30 and found["vllm:generation_tokens_total", BASE] == 11
    own = {name: value for name, value in found.items() if name[0].startswith("para_jax")}
    assert own == {
        ("para_jax_tenant_requests_total", "completed", BASE): 1,
        ("para_jax_tenant_requests_total", "completed", "A"): 1,
        ("para_jax_tenant_requests_total", "client_left", "A"): 1,
        ("para_jax_tenant_prompt_tokens_total", BASE): 10,
        ("para_jax_tenant_prompt_tokens_total", "A"): 20,
        ("para_jax_tenant_generation_tokens_total", BASE): 3,
        ("para_jax_tenant_generation_tokens_total", "A"): 8,
        ("para_jax_http_responses_total", "200"): 2,
        ("para_jax_http_responses_total", "none"): 1,
        ("para_jax_http_responses_total", "401"): 1,
        ("para_jax_engine_failures_total",): 1,
    }
    sums = {"time_to_first_token": (6, 2), "inter_token_latency": (7.4, 5), "e2e_request_latency": (30, 3)}
    for name, (total, count) in (sums | {"request_queue_time": (6, 3)}).items():
        assert (found[f"vllm:{name}_seconds_sum", BASE], found[f"vllm:{name}_seconds_count", BASE]) == (total, count)
    buckets = {
        bound: found["vllm:inter_token_latency_seconds_bucket", bound, BASE] for bound in ("0.075", "0.1", "7.5")
    }
    assert buckets == {"0.075": 0, "0.1": 4, "7.5": 5}


def test_how_choices_ended_in_the_words_of_vllm():
    cases = {
        ("client_left", ("stop",)): ["stop"],
        ("client_left", ()): ["abort"],
        ("timeout", ("length", "error")): ["length", "abort"],
        ("engine_failed", ("error",)): ["error"],
        (None, ("error",)): ["error"],
        (None, ()): [],
    }
    for (error, reasons), expected in cases.items():
        assert finished_reasons(outcome(error=error, finish_reasons=list(reasons))) == expected


def test_a_name_with_any_characters_is_one_label():
    name = 'a"b\\c\n{tenant="x"} 1'
    metrics = metrics_of(running={name: 1}, names=(name,))
    metrics.observe(outcome(name))
    found, _ = read(metrics)
    assert found["para_jax_tenant_requests_total", "completed", name] == 1
    assert found["vllm:lora_requests_info", "3", name, ""]


def test_counting_in_many_threads_loses_nothing():
    metrics = metrics_of(names=tuple(f"t{i}" for i in range(20)), max_tenants=10)

    def work(thread):
        for i in range(200):
            metrics.begin(one := outcome(f"t{i % 20}", gaps=[(0.1, 2)]))
            metrics.observe(one)
            if i % 50 == 0:
                metrics.render()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    found, _ = read(metrics)
    assert found["vllm:generation_tokens_total", BASE] == 3 * 1600
    assert found["vllm:inter_token_latency_seconds_count", BASE] == 2 * 1600
    assert sum(v for k, v in found.items() if k[0] == "para_jax_tenant_requests_total") == 1600
    assert len([k for k in found if k[0] == "para_jax_tenant_prompt_tokens_total"]) == 12  # with the base and other


def test_a_histogram_counts_values_up_to_each_bound():
    histogram = Histogram([1.0, 2.0])
    for value, count in ((0.5, 1), (1.0, 2), (1.5, 1), (9.0, 3)):
        histogram.observe(value, count)
    assert histogram.read() == ([("1.0", 3), ("2.0", 4), ("+Inf", 7)], 31.0)
