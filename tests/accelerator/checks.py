"""What must hold on a real TPU or GPU: `python -m accelerator.checks NAME ...` runs checks by name, or all of them.

test_accelerator.py runs each check in its own process, because the other tests keep JAX on the CPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from golden_models import backbone, golden, golden_tenants, prompts, strong
from tiny_run import run_config, run_folder, tokenizer, words

from para_jax import (
    AdapterBank,
    Engine,
    Ia3Config,
    ParaConfig,
    Request,
    decode,
    forward,
    init_adapter,
    load_backbone,
    pick,
    prefill,
    stack_adapters,
    train,
    vectors,
)
from para_jax.backbone.kernel_choice import AttentionChoice, attention_kernel
from para_jax.backbone.kernels import KERNELS
from para_jax.runtime import devices

#: The matrix products of a TPU and of a GPU round float32 to fewer bits by default.
exact = partial(jax.default_matmul_precision, "highest")


def tenants_of(model) -> list:
    return [strong(init_adapter(ParaConfig(r=4), model.config), seed, 0.3) for seed in (1, 2)]


# ---------------------------------------------------------------------------------------------------------------- model


def golden_logits():
    """The backbones' and PARA's logits are the golden ones of transformers and of an independent PARA."""
    with exact():
        for family in ("llama", "gemma2", "qwen3"):
            expected, model = golden(family), backbone(family)
            mask = expected["attention_mask"] == 1
            found = np.asarray(forward(model, None, expected["input_ids"], None))
            np.testing.assert_allclose(found[mask], expected["logits"][mask], atol=5e-4)
        expected, model = golden("llama", "para"), backbone("llama")
        rows = pick(stack_adapters(golden_tenants("llama")), expected["tenant"])
        tokens, prompt = expected["input_ids"], expected["prompt_lengths"]
        found = np.asarray(forward(model, rows, tokens, prompt, expected["lengths"]))
        mask = expected["attention_mask"] == 1
        np.testing.assert_allclose(found[mask], expected["logits"][mask], atol=5e-4)


def factors_are_exact_without_asking():
    """Factors are float32 products of full precision whatever the default precision is; the summary is the same one."""
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    tenant = strong(init_adapter(ParaConfig(r=4, pooler="constant"), model.config), 1, 0.3)
    tenant.constant[...] = jnp.asarray(np.random.default_rng(0).normal(size=tenant.constant.shape), jnp.float32)
    found = vectors(model, tenant, tokens, 7)
    with exact():
        expected = vectors(model, tenant, tokens, 7)
    for site, made in found.items():
        np.testing.assert_allclose(made, expected[site], atol=1e-6)


def decode_equals_forward():
    """Cached decode gives the logits of the teacher-forced pass, in float32 and in bfloat16."""
    for dtype, atol in (("float32", 5e-4), ("bfloat16", 5e-2)):
        model = load_backbone(Path(__file__).parents[1] / "fixtures" / "llama", dtype=dtype)
        rows, tokens = pick(stack_adapters(tenants_of(model)), jnp.array([0, 1, -1])), prompts(model, 3, 24)
        with exact():
            expected = np.asarray(forward(model, rows, tokens, 7))
            logits, state = prefill(model, rows, tokens[:, :7], 7, max_length=32)
            for at in range(7, 24):
                np.testing.assert_allclose(logits, expected[:, at - 1], atol=atol)
                logits, state = decode(model, state, jnp.asarray(tokens[:, at]))


def attention_equals_plain():
    """The device's kernel gives the values and gradients of plain attention: head widths, windows, packed rows."""
    for width, heads, kv_heads, window, packed in (
        (64, 8, 2, None, False),
        (64, 4, 4, 128, True),
        (128, 8, 8, None, True),
        (128, 8, 1, 200, False),
    ):
        config = replace(backbone("llama").config, head_dim=width)
        name, _ = attention_kernel(
            config, 512, jnp.bfloat16, jax.default_backend(), AttentionChoice(), packed=packed
        )  # plain on a CPU, and on a GPU that is too old for cuDNN's
        draw = np.random.default_rng(0)
        q, k, v, weight = (
            jnp.asarray(draw.normal(size=(2, 512, n, width)), jnp.bfloat16) for n in (heads, kv_heads, kv_heads, heads)
        )
        segment = jnp.asarray(np.arange(512)[None] // 100 * np.ones((2, 1)), jnp.int32) if packed else None

        def weighed(q, k, v, kernel, window=window, segment=segment, weight=weight, width=width):
            mixed, _ = KERNELS[kernel](512, window, segment)(q, k, v, width**-0.5, None)
            return (mixed * weight).astype(jnp.float32).sum(), mixed

        found, expected = (
            jax.jit(jax.grad(partial(weighed, kernel=kernel), argnums=(0, 1, 2), has_aux=True))(q, k, v)
            for kernel in (name, "plain")
        )
        for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            mine, other = (np.asarray(x, np.float32) for x in (mine, other))
            assert np.abs(mine - other).max() <= 0.05 * np.abs(other).max(), (name, width, heads, window, packed)


# -------------------------------------------------------------------------------------------------------------- serving


def a_mixed_batch_equals_each_alone():
    """The engine answers each request of several tenants as it answers it alone."""
    model = backbone("llama")
    bank = AdapterBank(model.config, max_r=4)
    for name, tenant in zip(("acme", "globex"), tenants_of(model), strict=True):
        bank.add(name, tenant)
    bank.add("ia3", strong(init_adapter(Ia3Config(target_modules=("v_proj", "up_proj"), feedforward_modules=()),
                                        model.config), 3, 0.3))  # fmt: skip
    draw = np.random.default_rng(0)
    asked = [
        Request(words(draw.integers(20, 256, 4 + 3 * i)), tenant=name, max_new_tokens=6 + i)
        for i, name in enumerate([None, "acme", "globex", "ia3", "acme", None])
    ]

    def answers(requests):
        engine = Engine(model, bank, tokenizer(), slots=4, max_length=64)
        for request in requests:
            engine.submit(request)
        return sorted((done.id, done.text) for done in engine.run())

    with exact():
        together = [text for _, text in answers(asked)]
        alone = [text for request in asked for _, text in answers([request])]
    assert together == alone and len(set(together)) == len(asked)


# ------------------------------------------------------------------------------------------------------------- training


def losses(folder: Path, *overrides: str) -> list[float]:
    train(run_config(folder, *overrides))
    output = next(text.split("=", 1)[1] for text in reversed(overrides) if text.startswith("output_dir="))
    rows = map(json.loads, (Path(output) / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def a_step_learns_what_it_learns_on_a_cpu():
    """The losses of a run on this device, in float32 and in bfloat16, are those of the CPU."""
    with tempfile.TemporaryDirectory() as name:
        folder = run_folder(Path(name))
        with exact():
            found = losses(folder, f"output_dir={folder}/device", "backbone.dtype=float32")
        on_cpu = [sys.executable, "-m", "accelerator.checks", "--losses", str(folder)]
        said = subprocess.run(on_cpu, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, check=True)
        expected = json.loads(said.stdout.splitlines()[-1])
        np.testing.assert_allclose(found, expected, atol=2e-3)
        half = losses(folder, f"output_dir={folder}/half", "backbone.dtype=bfloat16")
        np.testing.assert_allclose(half, expected, atol=0.1)


def a_resumed_run_ends_with_the_same_bits():
    """With runtime.deterministic, where it is needed, a run that stopped and resumed has the losses of one that did
    not, bit for bit."""
    with tempfile.TemporaryDirectory() as name:
        folder, given = run_folder(Path(name)), ("runtime.deterministic=true", "train.schedule=constant")
        never = losses(folder, *given, "train.warmup_ratio=0", f"output_dir={folder}/never")
        losses(folder, *given, "train.warmup_ratio=0", f"output_dir={folder}/stopped", "train.max_steps=3")
        assert losses(folder, *given, "train.warmup_ratio=0", f"output_dir={folder}/stopped") == never


def a_mesh_computes_what_one_device_does():
    """With several devices: fsdp, data and tensor give the losses of one device."""
    count = len(jax.devices())
    with tempfile.TemporaryDirectory() as name, exact():
        folder = run_folder(Path(name))
        rows = ("backbone.dtype=float32", "train.max_steps=3")
        one = losses(folder, f"output_dir={folder}/one", *rows)
        for axis in ("data", "fsdp") if 8 % count == 0 else ():
            sizes = [f"mesh.{other}={count if other == axis else 1}" for other in ("data", "fsdp", "tensor")]
            each = f"train.per_device_batch_size={8 // count}"
            found = losses(folder, f"output_dir={folder}/over-{axis}", *rows, *sizes, each)
            np.testing.assert_allclose(found, one, atol=2e-3)


def int8_is_close():
    """An int8 backbone runs and stays near the one it was made from."""
    folder = Path(__file__).parents[1] / "fixtures" / "llama"
    model, small = load_backbone(folder), load_backbone(folder, quantize="int8")
    tokens = prompts(model)
    expected, found = (np.asarray(forward(m, tenants_of(m)[0], tokens, 7), np.float32) for m in (model, small))
    assert 0 < np.abs(found - expected).max() < 0.2 * np.abs(expected).max()


# ---------------------------------------------------------------------------------------------------------- benchmarks


def benchmarks_run():
    """Each `para-jax bench` that needs no other data runs with the tiny backbone, and measures more than nothing."""
    from para_jax import bench

    with tempfile.TemporaryDirectory() as name:
        source = run_folder(Path(name)) / "backbone"
        for kind, options in {
            "decode": dict(rows=(1, 4), context=16, rounds=2, bank=8),
            "train": dict(rounds=1),
        }.items():
            found = bench.run(kind, str(source), **options)
            assert all(value > 0 for value in found["medians"].values()), (kind, found["medians"])


CHECKS = {check.__name__: check for check in (
    golden_logits,
    factors_are_exact_without_asking,
    decode_equals_forward,
    attention_equals_plain,
    a_mixed_batch_equals_each_alone,
    a_step_learns_what_it_learns_on_a_cpu,
    a_resumed_run_ends_with_the_same_bits,
    a_mesh_computes_what_one_device_does,
    int8_is_close,
    benchmarks_run,
)}  # fmt: skip


def main(names: list[str]) -> None:
    if names[:1] == ["--losses"]:
        print(json.dumps(losses(Path(names[1]), f"output_dir={names[1]}/cpu", "backbone.dtype=float32")))
        return
    devices.make_deterministic()  # a check of runtime.deterministic needs it, and now no device is in use
    if jax.default_backend() == "cpu" and not os.environ.get("PARA_JAX_CHECKS_ON_CPU"):
        sys.exit("JAX sees no TPU or GPU; install `.[tpu]` or `.[cuda]`, or set PARA_JAX_CHECKS_ON_CPU=1")
    for name in names or CHECKS:
        CHECKS[name]()
        print(f"{name}: holds on {jax.devices()[0].device_kind}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
