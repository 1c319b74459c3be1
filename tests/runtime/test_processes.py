"""Two processes with four devices each, joined over loopback, train like one process with eight devices. Only the first
process logs, and only it reads and writes the run's folder."""

import json
import re

import numpy as np
import pytest
from tiny_run import rows_of_text, run_config, run_folder, write_rows
from two_processes import run_two

from para_jax import load_adapter, load_model_config, train, train_tenants
from para_jax.config import save_config
from para_jax.training.log import TIMES

pytestmark = pytest.mark.long
OVERRIDES = (
    "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.per_device_batch_size=2", "train.schedule=constant",
    "train.warmup_ratio=0", "eval.metric=exact_match", "train.max_steps=6",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("processes"))


def train_two(folder, *overrides):
    """`para-jax train` on two hosts without a common disk: each has an output_dir of its own."""
    save_config(run_config(folder, *OVERRIDES), folder / "run.yaml")
    among = ("runtime.coordinator={address}", "runtime.num_processes=2", "runtime.process_id={process}")
    own = (f"output_dir={folder / 'first'}", f"output_dir={folder / 'second'}")
    command = ("-m", "para_jax.cli", "train", str(folder / "run.yaml"), own)
    return run_two(*command, *among, *overrides)


@pytest.fixture(scope="module")
def pair(folder):
    """What the two processes said in a run of three steps, and when it went on to the sixth."""
    return [train_two(folder, "train.max_steps=3"), train_two(folder)]


@pytest.fixture(scope="module")
def alone(folder):
    """The same run by this process's eight devices, never stopped."""
    config = run_config(folder, *OVERRIDES, f"output_dir={folder / 'alone'}")
    return train(config)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def test_two_processes_that_stop_and_resume_have_the_numbers_of_one(pair, alone, folder):
    assert [[ended.code for ended in both] for both in pair] == [[0, 0], [0, 0]], pair[-1][0].err
    ours, theirs = metrics(folder / "first"), metrics(folder / "alone")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        np.testing.assert_allclose(list(mine.values()), list(other.values()), atol=1e-5)
    model = load_model_config(folder / "backbone")
    mine, other = (load_adapter(folder / name / "adapter", model) for name in ("first", "alone"))
    np.testing.assert_allclose(mine.down[...], other.down[...], atol=1e-5)
    for site, up in mine.up.items():
        assert abs(up[...]).max() > 1e-2
        np.testing.assert_allclose(up[...], other.up[site][...], atol=1e-5)


def test_only_the_first_process_speaks_and_writes(pair, folder):
    for first, second in pair:
        assert "devices: 8 x cpu" in first.err and "step 3: valid" in pair[0][0].err and "steps" in first.out
        assert second.out == "" and "step 3" not in second.err and "devices" not in second.err
    assert {path.name for path in (folder / "first").iterdir()} >= {"config.yaml", "metrics.jsonl", "checkpoints"}
    assert not (folder / "second").exists()


def test_two_processes_train_many_tenants_as_one_does(folder):
    for seed, (name, size) in enumerate({"acme": 8, "globex": 16}.items()):
        for split, count in (("train", size), ("validation", 6), ("test", 4)):
            write_rows(folder / "tenants" / name / f"{split}.jsonl", rows_of_text(count, seed=10 * seed + len(split)))
    own = (
        f"data.tenants={folder / 'tenants'}", "train.rows_per_tenant=2", "eval.test=true", "eval.metric=loss",
        "train.tenants_at_once=1",
    )  # fmt: skip
    both = train_two(folder, f"output_dir={folder}/tenants-{{process}}", "train.max_steps=2", *own)
    assert [ended.code for ended in both] == [0, 0], both[0].err + both[1].err
    assert re.search(r"globex +loss +.* 2 +2 +test", both[0].out) and both[1].out == ""
    assert not (folder / "tenants-1").exists()
    alone = folder / "tenants-alone"
    found = train_tenants(run_config(folder, *OVERRIDES, f"output_dir={alone}", *own, "train.max_steps=2"))
    for name, entry in found.tenants.items():
        ours, theirs = metrics(folder / "tenants-0" / name), metrics(alone / name)
        assert [row.keys() for row in ours] == [row.keys() for row in theirs] and len(ours) == 6
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(list(mine.values()), list(other.values()), atol=1e-5)
        assert entry["test_after"] != entry["test_before"]


# ------------------------------------------------------------------------------------------------------ what goes wrong

CODE = """
import json, sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from para_jax import make_mesh
from para_jax.runtime.processes import full_arrays, on_every_process, on_first_process, require_same
from para_jax.runtime.sharding import shard_rows
own = int(sys.argv[2])
def said(call):
    try:
        return call()
    except ValueError as error:
        return str(error)
def fails_on(process, kind):
    if own == process:
        raise kind("wrong here")
    return own
with jax.set_mesh(make_mesh(2, 2, 2)):
    rows = shard_rows(np.arange(16).reshape(1, 8, 2))
print(json.dumps({
    "each": said(lambda: on_every_process(lambda: own)),
    "each fails": said(lambda: on_every_process(lambda: fails_on(1, OSError))),
    "first": said(lambda: on_first_process(lambda: fails_on(1, ValueError))),
    "first fails": said(lambda: on_first_process(lambda: fails_on(0, OSError))),
    "same": said(lambda: require_same("the data", lambda: [1, 2])),
    "other": said(lambda: require_same("the data", lambda: [1, own])),
    "rows": [full_arrays(rows).tolist(), full_arrays({"a": np.arange(2), "b": jax.numpy.arange(2)})["b"].tolist()],
    "own rows": sorted({shard.index[1].start for shard in rows.addressable_shards}),
    "mesh": said(lambda: str(make_mesh(2, 2, 1))),
}))
"""


def test_an_error_on_one_process_is_raised_on_all_and_none_waits():
    first, second = (json.loads(ended.out) for ended in run_two("-c", CODE, "{address}", "{process}"))
    assert (first.pop("each"), second.pop("each")) == (0, 1)
    assert (first.pop("own rows"), second.pop("own rows")) == ([0, 2], [4, 6])  # each holds its own rows
    assert first == second == {
        "each fails": "process 1: wrong here",
        "first": 0,
        "first fails": "wrong here",
        "same": None,
        "other": "the data differs between process 0 and process 1; give every host the same",
        "rows": [[[[2 * i, 2 * i + 1] for i in range(8)]], [0, 1]],
        "mesh": "mesh {'data': 2, 'fsdp': 2, 'tensor': 1} does not fit 8 devices; choose sizes whose product is 8",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ what a device holds at once

STATE = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from para_jax import make_mesh
from para_jax.runtime import processes
from para_jax.training.checkpoint import open_checkpoints, restore_checkpoint, save_checkpoint
processes.PIECE = 1 << 14
mesh = make_mesh(2, 2, 2)
# tenants over all devices, over some of them, and one array that lies whole everywhere
specs = {"all": P(("data", "fsdp", "tensor")), "some": P("data"), "inner": P(None, ("fsdp", "tensor")), "whole": P()}
spread = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
shape = {"all": (64, 5000), "some": (6, 20_001), "inner": (3, 40_000), "whole": (100,)}
values = {name: np.random.default_rng(len(name)).normal(size=shape[name]).astype(np.float32) for name in specs}
def placed(values):
    return {name: jax.make_array_from_callback(array.shape, spread[name], lambda index: array[index])
            for name, array in values.items()}
def held():
    buffers = {}  # by address: an array and its shards are seen as arrays of their own
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            buffers[shard.device.id, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    found = {}
    for (device, _), size in buffers.items():
        found[device] = found.get(device, 0) + size
    return max(found.values())
peak = 0
def measured(real):
    def call(tree, *args, **options):
        global peak
        sizes = [leaf.nbytes for leaf in jax.tree.leaves(tree)]
        peak = max(peak, held() + 2 * sum(sizes))
        return real(tree, *args, **options)
    return call
for name in ("broadcast_one_to_all", "process_allgather"):
    setattr(multihost_utils, name, measured(getattr(multihost_utils, name)))
state = placed(values)
share = held()
with open_checkpoints(Path(sys.argv[3]) / "checkpoints") as checkpoints:
    save_checkpoint(checkpoints, state, 3, {"step": 3, "run": {}})
saving, peak = peak, 0
del state
fresh = placed({name: 0 * array for name, array in values.items()})
with open_checkpoints(Path(sys.argv[3]) / "checkpoints") as checkpoints:
    state, progress = restore_checkpoint(checkpoints, fresh, {})
same = all((processes.full_arrays(state)[name] == array).all() for name, array in values.items())
print(json.dumps({"share": share, "saving": saving, "restoring": peak, "same": same, "step": progress["step"],
                  "as it lay": all(state[name].sharding == spread[name] for name in spread)}))
"""


def test_saving_and_resuming_need_no_full_array_on_a_device(tmp_path):
    both = run_two("-c", STATE, "{address}", "{process}", (str(tmp_path / "first"), str(tmp_path / "second")))
    assert [ended.code for ended in both] == [0, 0], both[0].err + both[1].err
    for ended in both:
        found = json.loads(ended.out)
        assert found["same"] and found["as it lay"] and found["step"] == 3
        room = found["share"] + 2 * (1 << 14)
        assert found["saving"] <= room + 4096 and found["restoring"] <= room + 4096, found
    assert not (tmp_path / "second").exists()


ELSEWHERE = """
import os, sys
os.chdir(sys.argv[1])
from para_jax.cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_a_tenant_that_only_one_host_has_is_refused_in_a_run_that_others_are_added_to(folder, monkeypatch):
    def add(name, *hosts):
        for host in hosts:
            write_rows(folder / host / "own" / f"{name}.jsonl", rows_of_text(8, seed=len(name)))

    own = ("data.tenants=own", f"output_dir={folder}/parts", "train.max_steps=1", "train.rows_per_tenant=2")
    config = run_config(folder, *OVERRIDES, *own, "eval.metric=loss")
    save_config(config, folder / "parts.yaml")
    add("acme", "here", "there")
    monkeypatch.chdir(folder / "here")
    train_tenants(config)
    add("globex", "here", "there")
    add("hooli", "there")
    among = ("runtime.coordinator={address}", "runtime.num_processes=2", "runtime.process_id={process}")
    places = (str(folder / "here"), str(folder / "there"))
    both = run_two("-c", ELSEWHERE, places, "train", str(folder / "parts.yaml"), *among)
    assert [ended.code for ended in both] == [2, 2], both[1].err
    assert all("the list of tenants differs" in ended.err for ended in both), both[1].err


KEPT = """
import sys, time
from pathlib import Path
import jax
from para_jax import ParaConfig, init_adapter, load_model_config
from para_jax.runs.scoring import kept_adapter
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
model = type("Model", (), {"config": load_model_config(sys.argv[3])})
try:
    kept_adapter(Path(sys.argv[3]), model, init_adapter(ParaConfig(r=4), model.config, seed=0))
except ValueError as error:
    print("ValueError", error)
"""


def test_a_missing_best_adapter_is_the_same_error_on_all_processes(folder):
    both = run_two("-c", KEPT, "{address}", "{process}", str(folder / "backbone"))
    assert [ended.code for ended in both] == [0, 0], both[1].err
    assert both[0].out == both[1].out and both[0].out.startswith("ValueError"), both
