"""scripts/k8s: the manifests fit Kubernetes' schemas, and name only options, paths, ports and metrics that exist."""

import asyncio
import math
import re
import shlex
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml
from tiny_run import tokenizer
from two_processes import address, run_two

from para_jax.backbone.load import load_model_config
from para_jax.cli import parse
from para_jax.config import load_config
from para_jax.estimate.memory import USABLE
from para_jax.estimate.topology import parsed_topology
from para_jax.server.app import create_app
from para_jax.server.config import ServerConfig
from para_jax.server.models import Models
from para_jax.server.serve import LAST_BYTES_SECONDS
from para_jax.serving.speculation import SpeculationStats

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "k8s"
sys.path.insert(0, str(ROOT / "scripts"))

import scale  # noqa: E402

FILES = sorted(FOLDER.glob("*.yaml"))
OBJECTS = {
    f"{file.stem}-{one['kind']}": one for file in FILES for one in yaml.safe_load_all(file.read_text())
}  # fmt: skip
TRAIN, EVALUATE, SERVE = OBJECTS["train-JobSet"], OBJECTS["evaluate-Job"], OBJECTS["serve-Deployment"]
SLICE = TRAIN["spec"]["replicatedJobs"][0]
#: The oldest Kubernetes that serve.yaml names, and the newest with a schema.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
KINDS = {"tpu-v5-lite-podslice": "v5e", "tpu-v6e-slice": "v6e"}


def pod(one):
    return (one["spec"] if one is not SLICE else one["template"]["spec"])["template"]["spec"]


def container(one):
    (found,) = pod(one)["containers"]
    return found


def arguments(one):
    """The arguments of para-jax as the first pod gets them."""
    assert container(one)["command"] == ["para-jax"]
    return [text.replace("$(JOB_COMPLETION_INDEX)", "0") for text in container(one)["args"]]


# --------------------------------------------------------------------------------------------------------- the schemas


@pytest.mark.parametrize("version", VERSIONS)
def test_each_of_kubernetes_own_objects_fits_its_schema(version):
    own = [one for one in OBJECTS.values() if "." not in one["apiVersion"].partition("/")[0].replace(".k8s.io", "")]
    jobs = [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, **SLICE["template"]}]
    assert len(own) >= 3
    for one in own + jobs:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("job", [SLICE["template"]["spec"], EVALUATE["spec"]], ids=["train", "evaluate"])
def test_what_the_api_server_asks_of_a_job_beyond_its_schema(job):
    """kubernetes.io/docs/concepts/workloads/controllers/job: a pod failure policy needs restartPolicy Never, and limits
    per index need an Indexed Job."""
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["completionMode"] == "Indexed"
    assert 0 < job["parallelism"] <= job["completions"]


# --------------------------------------------------------------------------------------------------- what the files say


def test_the_training_command_is_one_that_finds_the_hosts_and_resumes_from_a_bucket():
    options = parse(arguments(SLICE))
    config = load_config(None, options.overrides)
    assert config.runtime.coordinator == "auto" and str(config.output_dir).startswith("gs://")
    assert str(options.config).startswith("gs://")


HOST = """
import sys
from jax._src.clusters import cloud_tpu_cluster as tpu
tpu.running_in_cloud_tpu_vm = True
tpu.get_metadata = lambda key: ("", 404)  # what a node's metadata server says where it knows nothing of TPUs
from para_jax.config import RuntimeSection
from para_jax.runtime.devices import join
join(RuntimeSection(coordinator="auto"))
import jax
print(jax.process_index(), jax.process_count(), jax.device_count())
"""


@pytest.mark.long
def test_auto_joins_the_hosts_that_gke_names():
    """With the variables that GKE sets on the pods of a slice of two hosts."""
    names, port = {"TPU_WORKER_HOSTNAMES": "localhost,localhost"}, address().rpartition(":")[2]
    numbered = "import os, sys; os.environ['TPU_WORKER_ID'] = sys.argv[1]" + HOST
    hosts = run_two("-c", numbered, "{process}", JAX_COORDINATOR_PORT=port, **names)
    assert [host.out for host in hosts] == ["0 2 8\n", "1 2 8\n"], hosts[0].err


def test_a_preempted_run_is_started_again_and_never_taken_for_one_that_has_ended():
    job = SLICE["template"]["spec"]
    (told, others), policy = job["podFailurePolicy"]["rules"], TRAIN["spec"]["failurePolicy"]
    assert job["backoffLimit"] == 0 and told["action"] == others["action"] == "FailJob"  # of one host, for all
    assert told["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert others["onExitCodes"] == {"operator": "In", "values": [143]}
    assert "runtime.stopped_exit_code=143" in container(SLICE)["args"]
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"] and policy["maxRestarts"] > 0


def test_each_shard_has_a_pod_and_an_output_of_its_own():
    options, job = parse(arguments(EVALUATE)), EVALUATE["spec"]
    assert (options.shard.index, options.shard.count) == (0, job["completions"])
    others = [text for text in container(EVALUATE)["args"] if "$(JOB_COMPLETION_INDEX)" in text]
    assert [text.split("=")[0] for text in others] == ["--shard", "--output"]
    assert str(options.output).startswith("gs://")
    assert job["completions"] == 4 * job["parallelism"] and job["podFailurePolicy"]["rules"][0]["action"] == "Ignore"
    merge = next(line for line in (FOLDER / "evaluate.yaml").read_text().splitlines() if "para-jax merge" in line)
    assert f"{{0..{job['completions'] - 1}}}" in merge
    parse(shlex.split(merge.lstrip("# ").split(" #")[0].replace("{0..255}", "0"))[1:])


@pytest.mark.parametrize("one", [SLICE, EVALUATE, SERVE], ids=["train", "evaluate", "serve"])
def test_the_slice_exists_and_its_hosts_have_its_chips(one):
    selector = pod(one)["nodeSelector"]
    kind, topology = (selector[f"cloud.google.com/gke-tpu-{name}"] for name in ("accelerator", "topology"))
    if topology != "1x1":
        parsed_topology(f"{KINDS[kind]}:{topology}")
    hosts = one["template"]["spec"]["parallelism"] if one is SLICE else 1
    assert math.prod(map(int, topology.split("x"))) == hosts * container(one)["resources"]["limits"]["google.com/tpu"]


def test_each_volume_is_mounted_where_the_cache_is():
    for one in (SLICE, EVALUATE, SERVE):
        (mount,), (volume,) = container(one)["volumeMounts"], pod(one)["volumes"]
        assert mount["name"] == volume["name"]
        assert {"name": "XDG_CACHE_HOME", "value": mount["mountPath"]} in container(one)["env"]


def test_the_server_s_options_probes_and_metrics_exist():
    options = parse(arguments(SERVE))
    ServerConfig(**{one.name: getattr(options, one.name) for one in fields(ServerConfig)})
    cache = SimpleNamespace(queries=0, hits=0)
    counts = {"running": {}, "waiting": {}, "kv_usage": 0.0, "prefix_cache": cache, "slots": 3}
    counts |= {"speculation": SpeculationStats(0, 0, 0), "preemptions": 0}
    engine: Any = SimpleNamespace(tokenizer=tokenizer(), **counts)
    app = create_app(engine, models=Models(None, "the-base"))  # not started yet
    said = container(SERVE)
    probes = {kind: said[kind]["httpGet"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    scraped = SERVE["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"]

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pod:8000") as client:
            return {path: await client.get(path) for path in {*(one["path"] for one in probes.values()), scraped}}

    answers = asyncio.run(ask())
    assert {path: one.status_code for path, one in answers.items()} == {"/ready": 503, "/health": 200, "/metrics": 200}
    assert probes["livenessProbe"]["path"] == "/health"  # a server that compiles is alive, and not ready
    named = re.findall(r"vllm:\w+", (FOLDER / "serve.yaml").read_text())
    assert len(named) == 4 and all(f"\n{name}{{" in answers["/metrics"].text for name in named)


def test_open_requests_end_before_the_pod_is_killed():
    options, waits = parse(arguments(SERVE)), container(SERVE)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod(SERVE)["terminationGracePeriodSeconds"] > waits + options.drain_seconds + LAST_BYTES_SECONDS
    timeout = OBJECTS["serve-HTTPRoute"]["spec"]["rules"][0]["timeouts"]["request"]
    assert timeout == f"{options.timeout:.0f}s"


def test_labels_and_ports_agree():
    options, template = parse(arguments(SERVE)), SERVE["spec"]["template"]
    labels, pool, service = template["metadata"]["labels"], OBJECTS["serve-InferencePool"], OBJECTS["serve-Service"]
    for selector in (SERVE["spec"]["selector"]["matchLabels"], pool["spec"]["selector"]["matchLabels"]):
        assert selector.items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    (port,) = container(SERVE)["ports"]
    assert {options.port} == {port["containerPort"], *(each["number"] for each in pool["spec"]["targetPorts"])}
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(options.port) and options.host == "0.0.0.0"
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    backend = OBJECTS["serve-HTTPRoute"]["spec"]["rules"][0]["backendRefs"][0]
    assert [backend["group"] + "/v1", backend["kind"]] == [pool["apiVersion"], pool["kind"]]
    assert backend["name"] == pool["metadata"]["name"]


def test_the_server_s_slots_fit_its_chip():
    options = parse(arguments(SERVE))
    chip = scale.CHIP[KINDS[pod(SERVE)["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]]]
    assert options.backbone.endswith("llama2-7b")
    model = load_model_config("meta-llama/Llama-2-7b-hf")
    needed = scale.weight_bytes(model, options.quantize) + 1e9 * options.kv_cache_gb
    assert 1e9 * options.kv_cache_gb > options.slots * options.max_length / 2 * scale.cache_bytes(model)  # half full
    assert needed < 0.9 * USABLE * chip.memory


def test_the_image_has_what_the_commands_need():
    text = (FOLDER / "Dockerfile").read_text()
    extras = re.search(r'/src\[([\w,]+)\]"', text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    known = project["project"]["optional-dependencies"]
    for folder in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
        assert f"COPY {folder} /src/{folder}\n" in text
    assert extras and {"tpu", "gcs", "serve"} == set(extras[1].split(",")) <= set(known)
    assert 'ENTRYPOINT ["para-jax"]' in text


def test_skypilot_runs_a_command_that_resumes():
    task = yaml.safe_load((ROOT / "scripts" / "skypilot.yaml").read_text())
    program, *rest = shlex.split(task["run"].replace("\\\n", " "))
    config = load_config(None, parse(rest).overrides)
    assert program == ".venv/bin/para-jax" and config.runtime.coordinator == "auto"
    assert str(config.output_dir).startswith("gs://") and task["resources"]["use_spot"]
