"""PARA's efficiency table (arXiv:2502.01033, table 4) on a model at hand: tokens per second and peak memory of
`generate` by method, without and with beams. DoRA's decode step costs what LoRA's costs, and a norm more.

Each side is a process of its own, and the sides take turns.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from contextlib import ExitStack
from pathlib import Path

from measure import main

from para_jax.adapters.adapter import Adapter
from para_jax.adapters.rows import Rows
from para_jax.backbone.load import load_backbone
from para_jax.bench.decode import METHODS, bank_of, tenant
from para_jax.bench.rounds import in_turns, measurement, paired, random_tokens
from para_jax.inference.generate import beam_searches, generate_tokens
from para_jax.inference.sampling import Sampling
from para_jax.model.adapted import init_adapter

COMPARED = ("base", "PARA", "(IA)^3", "LoRA r=8")


def bench_beams(
    backbone: str,
    *,
    beams: tuple[int, ...] = (1, 3),
    rows: int = 1,
    tenants: int = 1,
    prompt: int = 128,
    answer: int = 64,
    rounds: int = 5,
) -> dict:
    """Tokens of the best answers per second, and megabytes that a process holds at most while it generates: the weights
    and the programs too.

    Args:
        rows: prompts, which get `beams` rows each.
        tenants: 1, or `rows`: each prompt then has an adapter of its own.
    """
    if tenants not in (1, rows):
        raise ValueError(f"--tenants is {tenants}; give 1 or {rows}, the number of rows")
    spawn = multiprocessing.get_context("spawn")
    sides, memory = {}, {}
    with ExitStack() as stack:

        def started(*given):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(theirs, backbone, *given), daemon=True)
            process.start()
            stack.callback(process.kill)
            return ours

        def measure(name: str, pipe) -> float:
            pipe.send(True)
            seconds, memory[name] = pipe.recv()
            return rows * answer / seconds

        for count in beams:
            for method in COMPARED:
                name = f"{method}, {count} beam{'s' * (count > 1)}"
                pipe = started(method, count, rows, tenants, prompt, answer)
                pipe.recv()  # it has loaded the model and compiled the programs
                sides[name] = lambda name=name, pipe=pipe: measure(name, pipe)
        found = measurement("tokens/s", in_turns(sides, rounds))
    pairs = {name: f"base, {name.split(', ')[1]}" for name in sides if not name.startswith("base")}
    ratios = {f"{name} / base": paired(found["rounds"], name, base) for name, base in pairs.items()}
    sizes = {"rows": rows, "tenants": tenants, "prompt": prompt, "answer": answer}
    return found | {"ratios": ratios, "parts": {"peak memory": measurement("MB", [memory])}} | sizes


def serve(pipe, backbone: str, method: str, beams: int, rows: int, tenants: int, prompt: int, answer: int) -> None:
    """A side: for each message, the seconds of a batch and the megabytes that this process held at most."""
    model = load_backbone(backbone)
    adapters = adapters_of(model, method, rows, tenants)
    prompts = random_tokens(model, rows, prompt).tolist()
    sampling = Sampling(max_new_tokens=answer, num_beams=beams)

    def generate() -> float:
        begun = time.perf_counter()
        if beams > 1:
            made = [one.answers[0].tokens for one in beam_searches(model, adapters, prompts, sampling, [()] * rows)]
        else:
            made = generate_tokens(model, adapters, prompts, sampling)
        assert all(len(tokens) == answer for tokens in made)
        return time.perf_counter() - begun

    generate()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again, without the loader's and the compiler's
    pipe.send(True)
    while pipe.recv():
        seconds = generate()
        peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        pipe.send((seconds, int(peak) * 1024 / 1e6))


def adapters_of(model, method: str, rows: int, tenants: int) -> Adapter | Rows | None:
    if method == "base":
        return None
    if tenants == 1:
        return tenant(init_adapter(METHODS[method], model.config), 0)
    bank = bank_of(model, METHODS[method], rows)
    return bank.rows(bank.names)


if __name__ == "__main__":
    main(bench_beams)
