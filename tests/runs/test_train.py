"""A run: what its folder holds, that it resumes as if nothing had happened, and that it spoils no other folder."""

import json
import os
import re
import shutil
import signal
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from golden_models import FIXTURES
from long_cases import long
from lowering import lowered
from safetensors.numpy import load_file, save_file
from stopped_run import assert_same_arrays, interrupt, train_interrupted
from tiny_run import metrics, rows_of_text, run_config, run_folder, tokenizer, write_rows
from tiny_scores import score

from para_jax import (
    ParaConfig,
    Transformer,
    load_adapter,
    load_backbone,
    load_model_config,
    train,
)
from para_jax.config import CheckpointSection, load_config
from para_jax.evaluation import likelihood as evaluation
from para_jax.evaluation.score import Score
from para_jax.evaluation.scoring import Tasks
from para_jax.evaluation.tasks import task_of_run
from para_jax.inference import generate as generation
from para_jax.runs import loop, scoring
from para_jax.runs import train as runs
from para_jax.runs.folder import decided, with_decided
from para_jax.runs.plan import plan_run
from para_jax.runs.tenants import steps_of, tenant_configs
from para_jax.runtime import devices
from para_jax.runtime.devices import matrix_weights
from para_jax.training.log import TIMES
from para_jax.training.stop import Stopped


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone and data that all tests share; each has its own output_dir."""
    return run_folder(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def config(folder, tmp_path):
    """The run that most tests share a program with; see tiny_run.run_config."""
    return run_config(folder, f"output_dir={tmp_path / 'run'}")


@pytest.fixture(scope="module")
def whole(folder):
    """A run that was never interrupted, with TensorBoard and the test data."""
    config = run_config(folder, f"output_dir={folder / 'whole'}", "eval.test=true", "logging.report_to=[tensorboard]")
    return config, train(config)


def without_rates(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def checkpoints(config):
    """The steps of the checkpoints that lie in a run's folder."""
    folder = Path(config.output_dir) / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def scripted(monkeypatch, *values):
    """Makes the evaluations of adapters give these scores, or (score, loss), in turn, and gives back the adapters that
    were scored."""
    monkeypatch.setattr(scoring, "score_backbone", lambda run, split, asked: None)
    scored, left = [], list(values)

    def scores(tasks, stack, slots):
        if not slots or not tasks.encoded:
            return {}
        scored.append(jax.tree.map(lambda leaf: np.array(leaf[0]), stack.adapters))
        score, loss = left[0] if isinstance(left[0], tuple) else (left[0], 1.0)
        del left[0]
        return {0: Score("validation", "exact_match", score, loss, 8)}

    monkeypatch.setattr(Tasks, "scores", scores)
    return scored


def only_tenant(config):
    """What a run of one adapter trains."""
    return plan_run(config).tenants[0]


def kept_adapter(config):
    return load_adapter(Path(config.output_dir) / "adapter", load_model_config(config.backbone.source))


# ---------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_learns_and_leaves_its_folder(whole):
    config, result = whole
    assert {path.name for path in result.output_dir.iterdir()} == {
        ".lock", "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "adapter", "scores.json",
    }  # fmt: skip
    assert load_config(result.output_dir / "config.yaml") == with_decided(config, decided(config))
    rows = metrics(config)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 3, 6]  # 0: the base model
    assert [row["step"] for row in rows if "test_before_loss" in row] == [6]
    assert [row["step"] for row in rows if "test_after_loss" in row] == [6]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[3:]) < sum(losses[:3]) - 0.5  # three steps are one pass over the data
    assert (result.step, result.best_step) == (6, 6) and result.best_score == -rows[-3]["validation_loss"]


def test_without_the_base_models_scores_a_run_is_the_same(whole, folder, tmp_path):
    given = f"output_dir={tmp_path / 'run'}", "eval.test=true", "eval.base=false"
    config = run_config(folder, *given)
    assert_same_arrays(train(config).adapter, whole[1].adapter)
    rows = metrics(config)
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6]
    assert [name for row in rows for name in row if name.startswith("test_before")] == []
    assert "without the adapter" not in (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert train(run_config(folder, *given[:2])).scores.keys() == {"validation", "test"}  # the field makes no other run


def test_the_kept_adapter_scores_what_the_run_says(whole):
    config, result = whole
    model, kept = load_backbone(config.backbone.source), kept_adapter(config)
    assert_same_arrays(kept, result.adapter)
    found = score(model, kept, task_of_run(config, "validation", tokenizer()), tokenizer())
    assert found.loss == pytest.approx(-result.best_score, abs=1e-5)
    card = (result.output_dir / "adapter" / "README.md").read_text()
    assert "Trained for 6 steps on data" in card and f"Validation loss: {found.loss:.4f}" in card
    (validation,) = [line for line in card.splitlines() if line.startswith("- Validation ")]
    base = next(row["validation_loss"] for row in metrics(config) if row["step"] == 0 and "validation_loss" in row)
    assert validation.endswith(f"; {base:.4f} without the adapter.")


def test_a_finished_run_is_not_repeated(whole, monkeypatch):
    config, result = whole
    before, calls = metrics(config), interrupt(monkeypatch, at_step=0)
    again = train(config)
    assert again[1:] == result[1:] and not calls and metrics(config) == before
    assert_same_arrays(again.adapter, result.adapter)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(whole, config, folder, tmp_path):
    assert_same_arrays(train(config).adapter, whole[1].adapter)
    other = train(run_config(folder, f"output_dir={tmp_path / 'other'}", "seed=1"))
    assert abs(np.asarray(other.adapter.down[...]) - np.asarray(whole[1].adapter.down[...])).max() > 1e-3


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("at_step", [2, 6])
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(at_step, whole, config, monkeypatch):
    config = replace(config, eval=whole[0].eval)
    train_interrupted(config, at_step=at_step)
    with (Path(config.output_dir) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the process died while it wrote
    calls = interrupt(monkeypatch, at_step=0)
    result = train(config)
    assert len(calls) == (6 if at_step == 2 else 3)  # from the checkpoint at step 3, where there is one
    assert_same_arrays(result.adapter, whole[1].adapter)
    assert result[1:4] == whole[1][1:4]
    assert without_rates(metrics(config)) == without_rates(metrics(whole[0]))  # no step lost and none twice


def test_a_signal_after_the_last_step_ends_the_program_too(whole, config, monkeypatch):
    """A program that trains one run after another would not end otherwise, until it is killed within the next one."""
    config = replace(config, eval=whole[0].eval)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        at_call(patched, loop, "finish_saving", 1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        train(config)
    assert checkpoints(config)[-1] == 6
    assert_ends_as(whole, config)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_lets_the_step_end_and_saves_and_the_same_command_resumes(
    number, raised, whole, config, monkeypatch, capsys
):
    config = replace(config, output_dir=f"{config.output_dir} of mine", eval=whole[0].eval)
    config = replace(config, runtime=replace(config.runtime, stopped_exit_code=143))
    with monkeypatch.context() as patched, pytest.raises(raised) as error:
        at_call(patched, loop, "train_step", 2, lambda *_: os.kill(os.getpid(), number))
        train(config)
    assert raised is KeyboardInterrupt or error.value.code == 143
    assert checkpoints(config) == [2] and not (Path(config.output_dir) / "adapter").exists()
    assert capsys.readouterr().err.endswith("\nstopped after step 2 of 6, and saved; the same command resumes\n")
    assert_ends_as(whole, config)
    assert "\nresuming at step 2 of 6\n" in capsys.readouterr().err
    train(config)
    assert "nothing is left to train after step 6" in capsys.readouterr().err


@pytest.mark.parametrize("at", [1, 2, 5])
def test_sigterm_breaks_into_an_evaluation_which_is_made_when_the_run_resumes(at, whole, config, monkeypatch):
    config = replace(config, eval=whole[0].eval)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        at_call(patched, Tasks, "scores", at, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        train(config)  # evaluations: one before training, after steps 3 and 6, two after training
    assert checkpoints(config) == [[], [3], [3, 6], [3, 6], [3, 6]][at - 1]
    assert_ends_as(whole, config)


@pytest.mark.long
def test_the_best_adapter_of_the_checkpoint_stays_the_best_after_a_kill(config, monkeypatch, capsys):
    config = replace(config, eval=replace(config.eval, every=2), checkpoint=CheckpointSection(every=3))
    with monkeypatch.context() as patched, pytest.raises(KeyError):
        scripted(patched, 0.5, 0.4)
        at_call(patched, loop, "train_step", 5, lambda *_: {}["as a kill"])
        train(config)
    kept = kept_adapter(config)
    scripted(monkeypatch, 0.4, 0.3)
    result = train(config)
    assert (result.best_step, result.best_score) == (2, 0.5)
    assert_same_arrays(kept_adapter(config), kept)
    assert "the search begins again" not in capsys.readouterr().err


@pytest.mark.parametrize("lost", [False, True])
def test_the_kept_adapter_is_the_reported_one_where_a_later_one_was_kept_before_a_kill(
    config, monkeypatch, capsys, lost
):
    """Step 4's adapter is the best and is kept, and then the run is killed: its checkpoint, of step 3, knows that of
    step 2. A longer schedule makes others from then on."""
    config = replace(config, eval=replace(config.eval, every=2), checkpoint=CheckpointSection(every=3))
    with monkeypatch.context() as patched, pytest.raises(KeyError):
        scripted(patched, 0.5, 0.9)
        at_call(patched, loop, "train_step", 5, lambda *_: {}["as a kill"])
        train(config)
    assert checkpoints(config) == [3]
    if lost:
        shutil.rmtree(Path(config.output_dir) / "adapter")
    scored = scripted(monkeypatch, 0.4, 0.45, 0.3)
    capsys.readouterr()
    result = train(replace(config, train=replace(config.train, max_steps=8)))
    assert "the search begins again" in capsys.readouterr().err
    assert (result.best_step, result.best_score) == (6, 0.45)
    assert result.scores["validation"]["values"]["exact_match"] == 0.45
    assert_same_arrays(kept_adapter(config), scored[1])


def test_checkpoints_come_as_often_as_asked_and_the_newest_are_kept(whole, config, monkeypatch):
    config = replace(config, eval=whole[0].eval, checkpoint=CheckpointSection(every=2, keep=3))
    calls, real = [], loop.save_checkpoint
    monkeypatch.setattr(loop, "save_checkpoint", lambda *all: (real(*all), calls.append(all[3])))
    train(config)
    assert [(about["step"], about["tenants"][0]["evaluated"]) for about in calls] == [(2, 0), (4, 3), (6, 6)]
    assert checkpoints(config) == [2, 4, 6]


def at_call(monkeypatch, where, name, number, do):
    """Makes the call with this number (from 1) of a function do something with its arguments first."""
    real, calls = getattr(where, name), []

    def calling(*arguments, **settings):
        calls.append(None)
        if len(calls) == number:
            do(*arguments)
        return real(*arguments, **settings)

    monkeypatch.setattr(where, name, calling)


def assert_ends_as(whole, config):
    """The command given again ends with the bits and the log of a run that was never stopped."""
    result = train(config)
    assert_same_arrays(result.adapter, whole[1].adapter)
    assert result[1:4] == whole[1][1:4]
    assert without_rates(metrics(config)) == without_rates(metrics(whole[0]))
    assert contents(result.output_dir / "adapter") == contents(whole[1].output_dir / "adapter")


@pytest.mark.long
def test_a_run_over_a_mesh_resumes_and_equals_one_device(whole, folder, tmp_path):
    config = run_config(
        folder,
        f"output_dir={tmp_path / 'run'}",
        "mesh.data=2",
        "mesh.fsdp=2",
        "mesh.tensor=2",
        "train.per_device_batch_size=2",
    )
    train_interrupted(config, at_step=5)
    train(config)
    for name in ("loss", "validation_loss"):
        ours, theirs = ([row[name] for row in metrics(c) if name in row] for c in (config, whole[0]))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_a_longer_run_goes_on_from_its_last_adapter_although_another_one_was_tested(folder, tmp_path, monkeypatch):
    def gets_worse(tasks, stack, slots):
        calls.append(0)
        loss = float(len(calls))
        return {0: Score(tasks.split, "loss", -loss, loss, 8)} if tasks.encoded and slots else {}

    monkeypatch.setattr(Tasks, "scores", gets_worse)
    losses = []
    for test in ("true", "false"):
        calls = []
        config = run_config(folder, f"output_dir={tmp_path / test}", f"eval.test={test}", "eval.base=false")
        assert train(config).best_step == 3
        train(replace(config, train=replace(config.train, max_steps=8)))
        losses.append([row["loss"] for row in metrics(config) if "loss" in row])
    assert len(losses[0]) == 8 and losses[0] == losses[1]


def test_a_longer_run_goes_on_and_the_config_says_so(config, monkeypatch):
    def no_step(state, *arguments, **settings):
        values = dict.fromkeys(("loss", "grad_norm", "learning_rate", "tokens", "finite"), np.ones(1, np.float32))
        return state._replace(step=state.step + 1), values

    monkeypatch.setattr(loop, "train_step", no_step)
    scripted(monkeypatch, 0.1, 0.2, 0.3)
    longer = replace(config, train=replace(config.train, max_steps=8))
    assert train(config).step == 6
    result = train(longer)
    assert (result.step, result.best_step, result.best_score) == (8, 8, 0.3)
    assert [row["step"] for row in metrics(config) if "loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert load_config(Path(config.output_dir) / "config.yaml").train.max_steps == 8
    with pytest.raises(ValueError, match="train.max_steps: .*6 steps.* has done 8"):
        train(config)


def test_a_token_that_the_backbone_lacks_is_named(config, folder, tmp_path):
    backbone = shutil.copytree(folder / "backbone", tmp_path / "grown")
    grown = deepcopy(tokenizer())
    grown.add_tokens(["<image>"])
    grown.save_pretrained(backbone)
    write_rows(tmp_path / "rows.jsonl", [*rows_of_text(2, 0), {"prompt": "w20 <image>", "completion": "w9"}])
    data = replace(config.data, train=str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match="rows.jsonl:3: token id 256 is not one of the model's 256"):
        train(replace(config, data=data, backbone=replace(config.backbone, source=str(backbone))))
    assert not Path(config.output_dir).exists()


# ------------------------------------------------------------------------------------------- the best, and when to stop


def test_the_best_adapter_is_kept_and_patience_stops_the_run(config, monkeypatch):
    config = replace(config, eval=replace(config.eval, every=1, patience=2))
    scored = scripted(monkeypatch, 0.3, 0.5, 0.5, 0.4, 0.9)
    result = train(config)
    assert (result.step, result.best_step, result.best_score) == (4, 2, 0.5)  # an equal score with an equal loss
    assert [row["step"] for row in metrics(config) if "validation_exact_match" in row] == [1, 2, 3, 4]
    assert_same_arrays(result.adapter, scored[1])
    assert_same_arrays(
        load_adapter(Path(config.output_dir) / "adapter", load_backbone(config.backbone.source).config), scored[1]
    )
    assert train(config)[1:4] == (0.5, 2, 4)  # patience has ended for good


def test_of_equal_scores_the_one_with_the_lower_loss_is_the_best_and_patience_waits_for_more(config, monkeypatch):
    """Where free text is never matched exactly, the loss says that the run still learns."""
    config = replace(config, eval=replace(config.eval, every=1, patience=2))
    scored = scripted(monkeypatch, (0.0, 3.0), (0.0, 2.0), (0.0, 2.5), (0.0, 1.5), (0.0, 1.6), (0.0, 1.7))
    result = train(config)
    assert (result.step, result.best_step, result.scores["validation"]["values"]["loss"]) == (6, 4, 1.5)
    assert_same_arrays(kept_adapter(config), scored[3])


def test_patience_goes_on_counting_after_an_interruption(config, monkeypatch):
    config = replace(config, eval=replace(config.eval, every=1, patience=2))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        scripted(patched, 0.5, 0.4)
        interrupt(patched, at_step=3)
        train(config)
    scripted(monkeypatch, 0.3, 0.9)
    assert train(config)[1:4] == (0.5, 1, 3)


def test_without_validation_data_the_last_adapter_is_kept(folder, tmp_path):
    config = run_config(folder, f"output_dir={tmp_path / 'run'}", f"data.train={folder / 'data' / 'train.jsonl'}")
    result = train(config)
    assert (result.best_score, result.best_step) == (None, 6)
    assert_same_arrays(
        load_adapter(tmp_path / "run" / "adapter", load_backbone(config.backbone.source).config), result.adapter
    )


# -------------------------------------------------------------------------------------------------------------- the log


def test_a_runs_log_counts_the_tokens_without_padding(config, monkeypatch):
    monkeypatch.setitem(devices.PEAK_FLOPS, "cpu", 1e12)
    train(config)
    timed = [row for row in metrics(config) if "step_seconds" in row]
    assert [row["step"] for row in timed] == [2, 3, 4, 5, 6]  # the first one compiled
    tenant = only_tenant(config)
    for row in timed:
        examples = [tenant.data.examples[i] for i in tenant.order.plan.batch_indices(row["step"] - 1)[1]]
        tokens = sum(len(prompt) + len(completion) for prompt, completion in examples)
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(tokens, rel=2e-3)
        flops = 4 * matrix_weights(load_model_config(config.backbone.source)) * tokens
        assert row["model_flops_utilisation"] == pytest.approx(flops / row["step_seconds"] / 1e12, rel=2e-3)
        assert row["input_wait_seconds"] >= 0


def test_a_step_is_dispatched_before_the_values_of_the_one_before_are_read(config, monkeypatch):
    real_step, real_read, order = loop.train_step, loop.read, []
    monkeypatch.setattr(loop, "train_step", lambda *all, **more: (order.append("step"), real_step(*all, **more))[1])
    read = lambda run: (run.pending and order.append(run.pending.done.step), real_read(run))[1]  # noqa: E731
    monkeypatch.setattr(loop, "read", read)
    train(replace(config, eval=replace(config.eval, every=100)))
    assert order == ["step", "step", 1, "step", 2, "step", 3, "step", 4, "step", 5, 6]


# ----------------------------------------------------------------------------------------------------------- the memory


@pytest.mark.long
def test_evaluation_during_training_holds_no_second_copy_of_the_backbone(config, monkeypatch):
    shape = load_model_config(config.backbone.source)
    shape = replace(
        shape, width=256, hidden_width=1024, num_heads=8, num_kv_heads=1, head_dim=32, kinds=shape.kinds * 2
    )
    before, live, programs = live_bytes(), [], []
    model = Transformer(shape, rngs=nnx.Rngs(0)).with_layout("stacked")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert size > 15e6
    monkeypatch.setattr(runs, "load_backbone", lambda *all, **more: model)
    for module, name, where in (
        (evaluation, "eval_nll", programs), (generation, "prefill", None), (generation, "next_token", programs),
    ):  # fmt: skip
        watch(monkeypatch, module, name, live, where)
    config = replace(config, adapter=ParaConfig(r=1), eval=replace(config.eval, metric="exact_match"))
    train(replace(config, train=replace(config.train, max_steps=1)))
    assert len(live) >= 8 and len(programs) == 2
    assert max(live) - before < 1.1 * size
    assert all(program.temp_size_in_bytes < 0.4 * size for program in programs)


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def watch(monkeypatch, module, name, live, programs):
    """Notes the live bytes around each call of a function and, once, what its program needs beside them."""
    real = getattr(module, name)
    first = []

    def watching(*arguments, **settings):
        if programs is not None and not first:
            first.append(None)
            programs.append(lowered(real, arguments, settings).compile().memory_analysis())
        live.append(live_bytes())
        found = real(*arguments, **settings)
        live.append(live_bytes())
        return found

    monkeypatch.setattr(module, name, watching)


# ----------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(("override", "shown"), [
    ("train.learning_rate=0.5", r"train.learning_rate \(0.03 there, 0.5 here\)"),
    ("adapter.r=5", r"adapter.r \(4 there, 5 here\)"),
    ("seed=9", r"seed \(0 there, 9 here\)"),
])  # fmt: skip
def test_a_folder_with_another_run_is_refused_and_left_as_it_is(override, shown, whole, folder):
    before = contents(whole[0].output_dir)
    with pytest.raises(ValueError, match=shown) as error:
        train(run_config(folder, f"output_dir={whole[0].output_dir}", "eval.test=true", override))
    said, advice, *changed = str(error.value).splitlines()
    assert "output_dir" in said and "output_dir" in advice and len(changed) == 1
    assert contents(whole[0].output_dir) == before


def other_theta(backbone):
    described = json.loads((backbone / "config.json").read_text())
    (backbone / "config.json").write_text(
        json.dumps(described | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
    )


def other_last_layer(backbone):
    tensors = load_file(backbone / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = -tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, backbone / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "named"), [long(other_theta, "backbone config"), (other_last_layer, "backbone in float32")]
)
def test_a_run_does_not_go_on_with_another_backbone(change, named, config, tmp_path):
    """Also where its first layer is the same."""
    own = config.backbone.source
    backbone = shutil.copytree(own, tmp_path / "backbone")
    config = replace(config, backbone=replace(config.backbone, source=str(backbone)))
    train_interrupted(config, at_step=5)
    change(backbone)
    with pytest.raises(ValueError, match=f"{config.output_dir}/checkpoints/3: it is of another run: another {named}"):
        train(config)
    shutil.copytree(own, backbone, dirs_exist_ok=True)
    assert train(config).step == 6


def with_data_of_its_own(config, folder, at_step):
    """The run on a copy of its data, interrupted at a step."""
    config = replace(config, data=replace(config.data, train=str(folder / "data")))
    shutil.copytree(Path(config.backbone.source).parent / "data", folder / "data")
    train_interrupted(config, at_step=at_step)
    return config


@pytest.mark.parametrize(("split", "size", "named"), [
    ("train", 20, "training data .20 examples, not the same"),
    ("validation", 9, "validation data .8 examples there, 9 here"),
])  # fmt: skip
def test_a_run_does_not_go_on_with_other_data_than_it_began_with(split, size, named, config, tmp_path):
    config = replace(config, eval=replace(config.eval, test=split == "test"))
    config = with_data_of_its_own(config, tmp_path, 5)
    file = tmp_path / "data" / f"{split}.jsonl"
    held = file.read_text()
    write_rows(file, rows_of_text(size, seed=7)) if size else file.unlink()
    with pytest.raises(ValueError, match=f"checkpoints/3: it is of another run: other {named}.*put that back"):
        train(config)
    file.write_text(held)
    assert train(config).step == 6


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_loss_that_is_not_finite_names_the_step_and_its_examples(whole, config, monkeypatch):
    config = replace(config, eval=whole[0].eval)
    real = loop.train_step

    def broken(state, *arguments, **settings):
        state, values = real(state, *arguments, **settings)
        return state, values | ({"loss": np.full(1, np.nan)} if int(state.step[0]) == 2 else {})

    monkeypatch.setattr(loop, "train_step", broken)
    chosen = only_tenant(config).order.plan.batch_indices(1)[1]
    lines = "; ".join(sorted(f"{config.data.train}/train.jsonl:{i + 1}" for i in chosen))
    said = f"step 2: the loss is nan on {lines}; look at these examples"
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        train(config)
    assert "\n" not in str(error.value) and len(chosen) == 8
    assert [row["step"] for row in metrics(config)] == [0, 1] and not (Path(config.output_dir) / "adapter").exists()
    monkeypatch.undo()
    assert_same_arrays(train(config).adapter, whole[1].adapter)  # nothing of it was saved


def test_a_validation_loss_that_is_not_finite_keeps_the_adapter_before(config, monkeypatch):
    losses = [2.0, 1.0, float("nan")]  # first that of the base model

    def scores(tasks, stack, slots):
        return {0: Score("validation", "loss", -1, losses.pop(0), 8)} if tasks.encoded and slots else {}

    monkeypatch.setattr(Tasks, "scores", scores)
    with pytest.raises(ValueError, match="step 6: .*loss.* is nan"):
        train(config)
    assert "Trained for 3 steps" in (Path(config.output_dir) / "adapter" / "README.md").read_text()
    assert [row["step"] for row in metrics(config) if "validation_loss" in row] == [0, 3]


@pytest.mark.parametrize(("override", "message"), [
    ("data.train=nowhere", "data.train: nowhere.*does not exist"),
    ("data.max_seq_length=9", "tokens exceed data.max_seq_length 9"),
    ("mesh.data=-1 mesh.fsdp=3", "'data': -1, 'fsdp': 3.* 8 devices"),
    ("backbone.source=nowhere", "nowhere"),
    ("eval.choices=[w9]", "eval.choices.* 1 .*2 to 100"),
])  # fmt: skip
def test_a_config_that_does_not_fit_is_an_error_before_anything_is_written(override, message, folder, tmp_path):
    more = ("eval.metric=accuracy",) if override.startswith("eval") else ()
    with pytest.raises(ValueError, match=message) as error:
        train(run_config(folder, f"output_dir={tmp_path / 'run'}", *override.split(), *more))
    assert len(str(error.value).splitlines()) <= 2
    assert not (tmp_path / "run").exists()


def test_epochs_do_not_gain_a_step_by_rounding():
    assert 0.07 * 100 > 7
    for epochs, batches, steps in ((0.07, 100, 7), (0.14, 50, 7), (0.5, 3, 2), (2, 3, 6), (0.001, 3, 1), (1e-8, 3, 1)):
        assert steps_of(load_config(None, [f"train.num_epochs={epochs}"]), batches) == steps


def test_a_run_reads_all_its_data_as_often_as_asked(folder):
    config = run_config(
        folder, "train.max_steps=null", "train.num_epochs=1.5", "train.gradient_accumulation_steps=2", "mesh.data=2",
        "train.per_device_batch_size=1",
    )  # fmt: skip
    plan = plan_run(config)
    layout, order = plan.layout, plan.tenants[0].order
    assert (layout.rows, layout.passes) == (2, 2) and order.total_steps == 8  # 20 examples are 5 steps of 4
    assert sorted(i for step in range(5) for i in order.plan.batch_indices(step)[1]) == [*range(20)]


@pytest.mark.parametrize(
    ("family", "overrides", "said"),
    [
        ("gemma3_text", [], "0.001"), ("gemma2", ["train.learning_rate=3e-4"], "0.0003"), ("llama", [], None),
        ("gemma", ["train.learning_rate=1e-4"], None), ("gemma", ["train.learning_rate=auto"], None),
        ("gemma", ["adapter.summary=rms"], None),
    ],
)  # fmt: skip
def test_a_rate_with_which_gemma_learns_little_is_said(folder, capsys, family, overrides, said):
    config = load_config(None, [f"data.train={folder / 'data'}", *overrides])
    own = list(tenant_configs(config).values())
    runs.say_doubt(config, own, load_model_config(FIXTURES / family))
    warned = capsys.readouterr().err
    assert (f"rate {said}:" in warned and "adapter.summary=rms" in warned) if said else not warned
