"""The estimate of a step's time: its work is that of the program, and its slowest part is named."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from golden_models import FIXTURES
from roofline import CHIPS, Work, estimate_time, keys_seen, training_work
from tiny_run import run_config, run_folder

from para_jax import init_adapter
from para_jax.backbone.load import abstract_backbone, load_model_config
from para_jax.data.batches import Batch
from para_jax.estimate.longest_row import longest_split
from para_jax.estimate.memory import CHIP_GIB, abstract_mesh
from para_jax.runtime.devices import PEAK_FLOPS, matrix_weights
from para_jax.training.loss import completion_nll

ROWS, LENGTH, COMPLETION = 2, 64, 24


@pytest.fixture
def config(tmp_path):
    """A run of a backbone whose matrix products are nearly all of its work."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128, "vocab_size": 2048}
    found = run_config(run_folder(tmp_path), f"data.max_seq_length={LENGTH}", f"train.per_device_batch_size={ROWS}")
    folder = tmp_path / "wide"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(json.loads((FIXTURES / "llama/config.json").read_text()) | wide))
    return replace(found, backbone=replace(found.backbone, source=str(folder)))


@pytest.mark.long
@pytest.mark.parametrize(("scope", "remat"), [
    ("all", "none"), ("all", "dots"), ("all", "block"), ("response", "dots"), ("response", "block"),
])  # fmt: skip
def test_the_flops_are_those_of_the_program(config, scope, remat):
    config = replace(config, train=replace(config.train, remat=remat), adapter=replace(config.adapter, scope=scope))
    config = replace(config, eval=replace(config.eval, max_new_tokens=COMPLETION))
    prompt, completion = longest_split(config)
    assert (prompt, completion) == (LENGTH, LENGTH if scope == "all" else COMPLETION)
    model_config = load_model_config(config.backbone.source)
    model = abstract_backbone(model_config, jnp.float32, layout="layers")  # the compiler counts a loop once
    adapter = jax.eval_shape(lambda: init_adapter(config.adapter, model_config))
    batch = Batch(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((ROWS, LENGTH), (ROWS,), (ROWS,))))
    static = dict(prompt=prompt, remat=remat)
    of = lambda adapter, model, batch: completion_nll(model, adapter, batch, completion, **static)[0].sum()  # noqa: E731
    counted = jax.jit(jax.value_and_grad(of)).lower(adapter, model, batch).cost_analysis()["flops"]
    one = abstract_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    if scope == "response":  # a scan over the layers doesn't know that the last one's prompts end with keys and values
        used = sum(model_config.site_input_width(site) * model_config.site_width(site) for site in ("k_proj", "v_proj"))
        dropped = (
            2 * (matrix_weights(model_config) / model_config.num_layers - used) + 4 * LENGTH * model_config.q_width
        )
        counted += ROWS * LENGTH * dropped
    assert training_work(config, one).flops == pytest.approx(counted, rel=0.05)
    shared = training_work(config, abstract_mesh({"data": 1, "fsdp": 4, "tensor": 2}))  # 4 times the rows on 8 chips
    assert shared.flops == training_work(config, one).flops / 2


def test_splash_works_on_the_keys_in_sight_and_plain_attention_on_all():
    assert keys_seen(4, None, "plain") == keys_seen(4, 2, "plain") == 4
    assert keys_seen(4, None, "splash") == (1 + 2 + 3 + 4) / 4
    assert keys_seen(4, 2, "splash") == (1 + 2 + 2 + 2) / 4


def test_a_step_is_bound_by_its_slowest_part():
    flops, hbm, ici = CHIPS["v5e"]
    work = Work(2 * flops, 3 * hbm)
    assert estimate_time(work, {}, "v5e")[3:5] == (3, "HBM")
    assert estimate_time(work, {"all-gather": int(4 * ici)}, "v5e")[3:5] == (4, "ICI")
    assert estimate_time(work, {"all-reduce": int(2 * ici)}, "v5e").parts["ICI"] == 4  # there and back
    assert estimate_time(Work(5 * flops, hbm), {}, "v5e")[3:5] == (5, "FLOPs")


def test_the_peaks_of_a_kind_of_chip_are_those_of_its_devices():
    assert set(CHIPS) == set(CHIP_GIB)
    assert all(chip.flops == PEAK_FLOPS[f"TPU {kind}"] for kind, chip in CHIPS.items())
