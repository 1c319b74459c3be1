"""The mesh that a run takes by itself: the least fsdp whose estimate fits a device. What the config gives is kept."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from tiny_run import run_config, run_folder

from para_jax.backbone import kernel_choice
from para_jax.backbone.load import load_model_config
from para_jax.config import load_config
from para_jax.estimate import longest_row
from para_jax.estimate.longest_row import parts_of_row
from para_jax.estimate.memory import (
    GIB,
    abstract_mesh,
    choose_mesh,
    device_memory,
    estimate_memory,
    run_bytes,
    run_mesh,
    with_own_kernel,
)

V5E, H100 = 16 * GIB, int(0.75 * 80e9)
ON_7B = "configs/llama2-7b-squad.yaml"


def chosen(config, devices, room, **options):
    found = choose_mesh(config, devices, room, **options)
    return tuple(found.sizes.values()), found.fits


@pytest.mark.parametrize(("name", "devices", "room", "sizes"), [
    ("llama2-7b-squad", 16, V5E, (8, 2, 1)),
    ("llama2-7b-boolq", 16, V5E, (16, 1, 1)),
    ("llama2-7b-boolq", 1, H100, (1, 1, 1)),
    ("llama2-13b-squad", 16, V5E, (4, 4, 1)),
    ("llama2-13b-squad", 1, H100, (1, 1, 1)),
    ("gemma-2b-boolq", 16, V5E, (16, 1, 1)),
])  # fmt: skip
def test_the_papers_configs_fit_as_they_stand(name, devices, room, sizes):
    assert chosen(load_config(f"configs/{name}.yaml"), devices, room) == (sizes, True)


@pytest.mark.long
def test_the_smallest_fsdp_that_fits_is_taken():
    config = load_config(ON_7B)
    for room in range(3 * GIB, 24 * GIB, 3 * GIB):
        found = choose_mesh(config, 16, room)
        needs = {}
        for fsdp in (1, 2, 4, 8, 16):
            own = replace(config, mesh=replace(config.mesh, fsdp=fsdp))
            sizes = choose_mesh(own, 16, room).sizes
            assert sizes == {"data": -1, "fsdp": fsdp, "tensor": 1}  # kept, whatever the memory
            needs[fsdp] = run_bytes(config, abstract(16 // fsdp, fsdp, 1))
        fit = [fsdp for fsdp, need in needs.items() if need <= 0.9 * room]
        assert found.sizes["fsdp"] == min(fit, default=16) and found.fits == bool(fit)
        assert f"{needs[found.sizes['fsdp']] / GIB:.1f} GiB" in found.why


def abstract(*sizes):
    return abstract_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))


def test_other_sizes_that_are_given_stay_and_all_devices_are_used():
    config = load_config(ON_7B, ["mesh.tensor=4"])
    assert chosen(config, 16, 5 * GIB)[0] == (1, 4, 4)
    assert chosen(load_config(ON_7B, ["mesh.data=1"]), 16, V5E)[0] == (1, 16, 1)
    assert chosen(load_config(ON_7B, ["mesh.data=1"]), 16, 80 * GIB, all_of_them=False)[0] == (1, 1, 1)


def test_a_step_of_many_tenants_counts_all_their_states():
    own = ["data.tenants=x", "train.rows_per_tenant=4", "train.tenants_at_once=512"]
    config = load_config(ON_7B, own)
    few, many = (estimate_memory(config, abstract(8, 2, 1), tenants).arguments for tenants in (16, 512))
    assert many - few == pytest.approx(496 * 107.3e6 / 16, rel=0.01)
    assert choose_mesh(config, 16, V5E, 512).sizes["fsdp"] > choose_mesh(config, 16, V5E, 16).sizes["fsdp"]


def compiled_temporaries():
    """Temporaries of compiled steps of LLaMA-2 7B on 16 chips, next to the run and the split that each is of."""
    for name, found in json.loads(Path("results/tpu_memory.json").read_text()).items():
        if "scope" in found:
            program, given = found["program"], found["command"].split("v5e:4x4 ")[1].split()
            size = program["temporaries"] if program else found["needed"] - found["arguments"]
            yield pytest.param(given, (found["prompt"], found["completion"]), size, id=name)


@pytest.mark.parametrize(("given", "split", "temporaries"), list(compiled_temporaries()))
def test_the_estimate_of_each_scope_is_near_what_the_compiler_needs(given, split, temporaries, monkeypatch):
    monkeypatch.setattr(longest_row, "longest_split", lambda config: split)
    found = estimate_memory(load_config(ON_7B, given), abstract(1, 16, 1)).temporaries
    assert temporaries == pytest.approx(found, rel=0.2)


def test_of_many_tenants_loras_products_are_not_kept():
    """They have batch dimensions, and train.remat=dots keeps no products with those."""
    many = "data.tenants=x", "train.rows_per_tenant=4", "train.tenants_at_once=16", "train.remat=dots"
    lora, para = (
        estimate_memory(load_config(ON_7B, [*many, f"adapter.method={method}"]), abstract(1, 16, 1), 16).temporaries
        for method in ("lora", "para")
    )
    assert lora == pytest.approx(para, rel=0.1)


def test_with_scope_response_the_memory_depends_on_how_long_completions_may_be():
    def needs(*given):
        config = load_config(ON_7B, ["mesh.data=1", "data.max_seq_length=2048", "train.remat=dots", *given])
        return estimate_memory(config, abstract(1, 16, 1)).temporaries

    everywhere, unknown = needs(), needs("adapter.scope=response", "eval.max_new_tokens=null")
    few, more = (needs("adapter.scope=response", f"eval.max_new_tokens={count}") for count in (16, 512))
    assert few < everywhere / 3 and few < more < everywhere < unknown
    assert needs("eval.max_new_tokens=512") == everywhere


def test_an_unknown_memory_makes_it_one_and_the_run_says_so(tmp_path, capsys):
    assert device_memory(jax.devices()[0]) is None
    config = run_config(run_folder(tmp_path), "mesh.data=-1")
    assert tuple(run_mesh(config).shape.values()) == (8, 1, 1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("mesh: data 8, fsdp 1, tensor 1. ") and "not known" in said[0]
    run_mesh(replace(config, mesh=replace(config.mesh, fsdp=2)))
    assert capsys.readouterr().err == "mesh: data 4, fsdp 2, tensor 1\n"
    run_mesh(replace(config, mesh=replace(config.mesh, data=2, fsdp=2)))
    assert capsys.readouterr().err == "mesh: data 2, fsdp 2, tensor 1. 4 of 8 devices are not used\n"


@pytest.mark.parametrize(("capability", "attention"), [((8, 0), "plain"), ((9, 0), "cudnn")])
def test_the_estimate_of_a_gpu_stores_scores_where_it_has_no_other_kernel(capability, attention, monkeypatch):
    """Gemma's heads are too wide for cuDNN on an A100."""
    config = load_config("configs/gemma-2b-boolq.yaml")
    assert with_own_kernel(config) is config
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernel_choice, "own_capability", lambda: capability)
    own = with_own_kernel(config)
    assert own.backbone.attention == attention
    needs = [estimate_memory(one, abstract_mesh({"data": 8, "fsdp": 1, "tensor": 1})).total for one in (config, own)]
    assert (needs[1] > needs[0]) is (attention == "plain")
    responds = ["adapter.scope=response", "eval.metric=f1", "eval.max_new_tokens=256"]
    config = load_config("configs/gemma-2b-boolq.yaml", responds)
    tails = [parts_of_row(one, load_model_config(one.backbone.source))[1] for one in (config, with_own_kernel(config))]
    assert [tail.kernel for tail in tails] == ["splash", "plain"], "no GPU has a kernel for tails"


def test_the_memory_is_the_devices_own_or_that_of_its_kind():
    def device(kind, stats):
        return SimpleNamespace(platform="tpu", device_kind=kind, memory_stats=lambda: stats)

    assert device_memory(device("TPU v5 lite", {"bytes_limit": 17})) == 17
    assert device_memory(device("TPU v5 lite", None)) == 16 * GIB
    assert device_memory(device("TPU v99", {})) is None
