"""Prometheus reads what has happened, under vLLM's names."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from running_server import eventually, new_engine, running
from tiny_engine import prompt

from para_jax.server.metrics import Metrics, finished_reasons
from para_jax.server.traffic import Outcome
from para_jax.serving.speculation import SpeculationStats

BASE = "the-base"
HISTOGRAMS = ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time")


def metrics_of(running=None, waiting=None, names=("A", "B"), **options):
    counts = {
        "preemptions": 7,
        "prefix_cache": SimpleNamespace(queries=100, hits=40),
        "speculation": SpeculationStats(3, 9, 5),
    }
    engine = SimpleNamespace(running=running or {}, waiting=waiting or {}, kv_usage=0.25, slots=3, **counts)
    return Metrics(engine, SimpleNamespace(base=BASE, names=names, has=names.__contains__), **options)


def outcome(tenant="A", **fields):
    times = {"received": 10.0, "queued": 10.5, "started": 12.5, "first_token": 13.0, "ended": 20.0}
    given = {"served": True, "status": 200, "tenant": tenant, "prompt_tokens": 10, "new_tokens": 3} | times
    return Outcome("POST", "/v1/completions", "id", **(given | {"finish_reasons": ["stop"]} | fields))


def observe(metrics, *arguments, new_tokens=3, **fields):
    """Lets the metrics see a request from when the engine has taken it."""
    one = outcome(*arguments, **fields, new_tokens=0)
    times, one.started = SimpleNamespace(queued=one.queued, started=one.started, first_token=one.first_token), None
    metrics.traffic.begin(one)
    one.note_times([SimpleNamespace(times=times)])
    one.note_piece(0, 13.0, new_tokens, None)
    metrics.observe(one)


def read(metrics):
    return samples_of(metrics.render()[0].decode())


def samples_of(text):
    """{(name, *label values in the order of their names): value}, and the types by name. Without the times at which
    the client's counters and histograms were created."""
    families = [one for one in text_string_to_metric_families(text) if not one.name.endswith("_created")]
    samples = [sample for family in families for sample in family.samples]
    found = {(one.name, *(one.labels[label] for label in sorted(one.labels))): one.value for one in samples}
    assert len(found) == len(samples)
    return found, {family.name: family.type for family in families}


def test_the_names_and_types_are_those_of_vllm():
    _, types = read(metrics_of())
    kinds = {
        "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc lora_requests_info",
        "counter": "num_preemptions prefix_cache_queries prefix_cache_hits prompt_tokens generation_tokens "
        "request_success spec_decode_num_drafts spec_decode_num_draft_tokens spec_decode_num_accepted_tokens",
        "histogram": "time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds "
        "request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens "
        "request_generation_tokens",
    }
    expected = {f"vllm:{name}": kind for kind, names in kinds.items() for name in names.split()}
    assert {name: kind for name, kind in types.items() if name.startswith("vllm")} == expected


def test_gauges_are_those_of_the_engine_now():
    metrics = metrics_of(running={None: 1, "A": 2}, waiting={"B": 4, "a,b": 1})
    found, _ = read(metrics)
    assert found["vllm:num_requests_running", BASE] == 3 and found["vllm:num_requests_waiting", BASE] == 5
    assert found["vllm:kv_cache_usage_perc", BASE] == 0.25
    assert found["vllm:prefix_cache_queries_total", BASE] == 100 and found["vllm:prefix_cache_hits_total", BASE] == 40
    assert found["vllm:num_preemptions_total", BASE] == 7
    assert found["vllm:spec_decode_num_accepted_tokens_total", BASE] == 5
    at = found["vllm:lora_requests_info", "3", "A", "B"]  # max_lora, running, waiting; "a,b" would be two names
    assert abs(at - time.time()) < 60
    metrics._engine.running = {"A": 1, "B": 1}
    assert ("vllm:lora_requests_info", "3", "A,B", "B") in read(metrics)[0]


def test_a_request_is_counted_and_measured():
    metrics = metrics_of()
    observe(metrics, gaps=[(0.4, 4), (7.0, 1)], new_tokens=5)
    observe(metrics, None, finish_reasons=["stop", "length"])
    observe(metrics, finish_reasons=["stop"], error="client_left", choices=2, status=None, first_token=None)
    metrics.observe(Outcome("GET", "/v1/models", "id", status=401, error="invalid_api_key"))
    metrics.engine_failures.inc()
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
    of_tokens = {"request_prompt_tokens": (30, 3), "request_generation_tokens": (8, 2)}
    for name, expected in of_tokens.items():
        assert (found[f"vllm:{name}_sum", BASE], found[f"vllm:{name}_count", BASE]) == expected
    in_parts = [
        found[f"vllm:request_{part}_time_seconds_{what}", BASE]
        for part in ("prefill", "decode")
        for what in ("sum", "count")
    ]
    assert in_parts == [1, 2, 14, 2]
    buckets = {
        bound: found["vllm:inter_token_latency_seconds_bucket", bound, BASE] for bound in ("0.075", "0.1", "7.5")
    }
    assert buckets == {"0.075": 0, "0.1": 4, "7.5": 5}


def test_how_choices_ended_in_the_words_of_vllm():
    cases = {
        (None, ("stop", "length"), 2): ["stop", "length"],
        ("client_left", ("stop",), 1): ["stop"],
        ("client_left", ("stop",), 3): ["stop", "abort", "abort"],
        ("client_left", (), 1): ["abort"],
        ("timeout", ("length",), 2): ["length", "abort"],
        ("shutting_down", (), 2): ["abort", "abort"],
        ("engine_failed", (), 1): ["error"],
        ("engine_error", ("error",), 1): ["error"],  # the logits of one choice are not finite, and it ends the others
        ("engine_error", ("stop", "error"), 3): ["stop", "error", "error"],
        ("ValueError", (), 1): ["error"],
    }
    for (error, reasons, choices), expected in cases.items():
        assert finished_reasons(outcome(error=error, finish_reasons=list(reasons), choices=choices)) == expected


def test_a_name_with_any_characters_is_one_label():
    name = 'a"b\\c\n{tenant="x"} 1'
    metrics = metrics_of(running={name: 1}, names=(name,))
    observe(metrics, name)
    found, _ = read(metrics)
    assert found["para_jax_tenant_requests_total", "completed", name] == 1
    assert found["vllm:lora_requests_info", "3", name, ""]


def test_metrics_can_be_read_while_requests_end():
    metrics, done = metrics_of(names=tuple(f"t{i}" for i in range(20))), threading.Event()

    def scrape():
        while not done.is_set():
            metrics.render()

    with ThreadPoolExecutor(2) as pool:
        scrapes = [pool.submit(scrape) for _ in range(2)]
        for i in range(400):
            observe(metrics, f"t{i % 20}", gaps=[(0.1, 2)], error=f"error-{i % 7}")
        done.set()
        assert [one.result() for one in scrapes] == [None, None]
    found, _ = read(metrics)
    assert found["vllm:generation_tokens_total", BASE] == 3 * 400
    assert sum(v for k, v in found.items() if k[0] == "para_jax_tenant_requests_total") == 400
    assert len([k for k in found if k[0] == "para_jax_tenant_prompt_tokens_total"]) == 21  # with the base


@pytest.mark.long
def test_a_server_shows_its_traffic():
    with running(new_engine()) as server, httpx.Client(base_url=server.url, timeout=60) as client:

        def scrape():
            response = client.get("/metrics")
            assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
            return samples_of(response.text)[0]

        def ask(model, tokens, **fields):
            given = {"model": model, "prompt": prompt(3), "max_tokens": tokens, "ignore_eos": True} | fields
            return client.post("/v1/completions", json=given)

        usages = [ask("A", 5).json()["usage"], ask("base", 7, n=2).json()["usage"], ask("R", 3).json()["usage"]]
        assert ask("unknown", 5).status_code == 404 and ask("A", 0).status_code == 400
        found = scrape()
        for name, field in (("prompt", "prompt_tokens"), ("generation", "completion_tokens")):
            total = sum(usage[field] for usage in usages)
            assert found[f"vllm:{name}_tokens_total", "base"] == total
            for tenant, usage in zip(("A", "base", "R"), usages, strict=True):
                assert found[f"para_jax_tenant_{name}_tokens_total", tenant] == usage[field]
        assert found["vllm:request_success_total", "length", "base"] == 4
        statuses = {status: found["para_jax_http_responses_total", status] for status in ("200", "400", "404")}
        assert statuses == {"200": 3, "400": 1, "404": 1}
        assert found["vllm:prefix_cache_queries_total", "base"] == server.engine.prefix_cache.queries > 0
        times = {name: found[f"vllm:{name}_seconds_count", "base"] for name in HISTOGRAMS}
        assert times == {
            "time_to_first_token": 3,
            "e2e_request_latency": 3,
            "request_queue_time": 3,
            "inter_token_latency": times["inter_token_latency"],
        }
        assert 0 < times["inter_token_latency"] < 22  # all tokens but those of each answer's first piece
        assert not any("unknown" in label for label in found)

        generated = found["vllm:generation_tokens_total", "base"]
        with ThreadPoolExecutor(6) as pool:
            with server.held():
                open = [pool.submit(ask, name, 30) for name in ("A", "A", "R", "base", "B")]
                eventually(lambda: scrape()["vllm:num_requests_waiting", "base"] == 5)
                labels = next(label for label in scrape() if label[0] == "vllm:lora_requests_info")
                assert labels[1:3] == ("3", "") and set(labels[3].split(",")) == {"A", "R", "B"}
            seen = [scrape()]
            while not all(one.done() for one in open):
                seen.append(scrape())
            seen.append(scrape())
        counts = [one["vllm:generation_tokens_total", "base"] - generated for one in seen]
        assert counts == sorted(counts) and counts[-1] == 150
        prompts = [one["vllm:prompt_tokens_total", "base"] - found["vllm:prompt_tokens_total", "base"] for one in seen]
        during = [prompt for count, prompt in zip(counts, prompts, strict=True) if 0 < count < 150]
        assert during and max(during) > 0 and prompts == sorted(prompts)  # tokens are counted while they come
        assert max(one["vllm:num_requests_running", "base"] for one in seen) == 3
        assert max(one["vllm:kv_cache_usage_perc", "base"] for one in seen) > 0
        last = {seen[-1][f"vllm:num_requests_{state}", "base"] for state in ("running", "waiting")}
        assert last == {0} and seen[-1]["vllm:kv_cache_usage_perc", "base"] == 0
        body = {"model": "B", "prompt": prompt(3), "max_tokens": 9, "n": 3, "stream": True}
        with server.held(), client.stream("POST", "/v1/completions", json=body):
            pass  # the client leaves once it has the headers
        eventually(lambda: scrape()["vllm:request_success_total", "abort", "base"] == 3)
