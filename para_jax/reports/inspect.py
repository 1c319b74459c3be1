"""What `para-jax inspect` and `para-jax train --dry-run` print: a config checked without weights, data as tokens, a
folder."""

from __future__ import annotations

import math
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from humanize import naturalsize

from ..adapters.adapter import count_parameters
from ..adapters.card import scope_outline
from ..adapters.files import Described, read_adapter_config
from ..backbone.load import abstract_backbone, load_model_config
from ..backbone.weights import parameter_shapes
from ..config import RunConfig, adapter_method, config_dict, given_fields, is_tfds, load_config
from ..data.given import SPLITS, described, is_given
from ..data.hf import is_hf
from ..data.records import load_records
from ..data.show_example import show_example
from ..data.tenants import tenant_sections
from ..data.tfds import NotPrepared
from ..data.training_data import TrainingData
from ..estimate.memory import abstract_mesh, tree_size
from ..estimate.topology import topology_report
from ..io.checks import expanded, printable
from ..model.adapted import init_adapter
from ..runs.compare import TABLE, method_configs
from ..runs.data_table import data_lines, tenant_lines
from ..runs.plan import SharedResources, planned
from ..runs.report import sample_lines, score_table, tenants_table
from ..runs.tenants import tenant_configs
from ..runs.train import say_doubt
from ..runtime import devices
from ..training.metrics_file import read_metrics
from ..training.passes import lay_out
from ..training.scores_file import read_entries, read_scores, warning_lines
from ..training.step import state_of_one

#: Tenants that a dry run assumes if they can't be counted yet: they fill a step.
MANY = 1_000_000


def dry_run(config: RunConfig, topology: str | None = None) -> str:
    """A run's size by its config and the backbone's, or those of the runs of sweep.method. Reads none of the
    backbone's weights, and writes nothing.

    Args:
        topology: a TPU slice to compile the step for, such as "v5e:4x4" (extra `aot`). It turns JAX to the CPU.

    >>> print(dry_run(load_config("own-data")))
    backbone   smollm2-135m: llama, 30 layers, width 576
    ...
    """
    if config.sweep.method:
        return "\n\n".join(f"{name}\n{dry_run(own, topology)}" for name, own in method_configs(config).items())
    if topology:
        jax.config.update("jax_platforms", "cpu")  # a compiler is needed, not the TPU that this machine may have
    model, own = load_model_config(config.backbone.source), configs_here(config)
    say_doubt(config, own, model)
    adapter = jax.eval_shape(lambda: init_adapter(config.adapter, model, seed=config.seed))
    state = jax.eval_shape(lambda: state_of_one(init_adapter(config.adapter, model), config.train))
    backbone, trained = sum(map(math.prod, parameter_shapes(model).values())), count_parameters(adapter)
    on_cpu = jax.default_backend() == "cpu" and topology is None
    dtype = jnp.dtype(config.backbone.dtype or ("float32" if on_cpu else "bfloat16"))
    weights = tree_size(abstract_backbone(model, dtype, quantize=config.backbone.quantize))
    kept = f"{dtype.name}, linears {config.backbone.quantize}" if config.backbone.quantize else dtype.name
    lines = [
        f"backbone   {config.backbone.source}: {model.model_type}, {model.num_layers} layers, width {model.width}",
        f"parameters {backbone:,} frozen, {trained:,} trained ({trained / (backbone + trained):.3%}); "
        f"{adapter_method(config.adapter)} on {', '.join(config.adapter.target_modules)}"
        f"{scope_outline(config.adapter)}",
        f"memory     weights {size(weights)} ({kept}), adapter {size(tree_size(adapter))}, "
        f"optimiser {size(tree_size(state.optimizer))}" + " of each tenant" * config.many,
        topology_report(config, topology, tenants_of(config)) if topology else step_line(config),
    ]
    return "\n".join(lines + source_lines(config, own))


def configs_here(config: RunConfig) -> list[RunConfig]:
    """The config of each tenant; the run's alone if its tenants are not here yet."""
    return list(tenant_configs(config).values()) if tenants_are_here(config) else [config]


def tenants_of(config: RunConfig) -> int:
    """How many tenants a run trains: those of data.tenants, the combinations of a sweep, or one. If the folder of
    data.tenants does not exist yet, or the data came from Python and is not here, it is train.tenants_at_once."""
    if config.data.tenants is None:
        return max(1, len(config.sweep.learning_rate)) * max(1, len(config.sweep.seed))
    folder = config.data.tenants
    if tenants_are_here(config):
        return len(tenant_sections(folder, config.data))
    if config.train.tenants_at_once is None:
        missing = "the data came from Python" if is_given(folder) else f"{expanded(folder)} does not exist yet"
        raise ValueError(f"data.tenants: {missing}, so its tenants can't be counted; give train.tenants_at_once")
    return config.train.tenants_at_once


def tenants_are_here(config: RunConfig) -> bool:
    """Whether the names of all tenants are known: those of a folder that exists, or of a run without data.tenants."""
    folder = config.data.tenants
    if folder is None:
        return True
    return config.data.given is not None if is_given(folder) else expanded(str(folder)).exists()


def step_line(config: RunConfig) -> str:
    sizes, tenants = mesh_here(config), MANY
    with suppress(ValueError):
        tenants = tenants_of(config)
    needed, here = math.prod(sizes.values()), jax.device_count()
    other = f"; for {needed} devices, and this machine has {here}" if needed > here else ""
    rows, over = config.train.batch_size or 0, sizes["data"] * sizes["fsdp"]
    if rows % over:  # a run may be meant for fewer devices
        other += f"; {over} devices can't split them evenly"
    else:
        layout = lay_out(config, abstract_mesh(sizes), tenants)
        rows = layout.passes * layout.pass_rows
    longest = config.data.assumed_length
    most = f"at most {rows * longest:,} tokens{config.data.assumed}"
    return f"a step     {rows} rows of at most {longest} tokens: {most}{other}"


def source_lines(config: RunConfig, own: list[RunConfig]) -> list[str]:
    """The data, as far as it is known without a tokenizer. Files that do not exist yet are named; they are no error."""
    if config.data.tenants is not None:
        return many_lines(config, own)
    source = config.data.train
    if source is None:
        return ["data       data.train is not set"]
    if is_given(source) or is_hf(source):
        return [f"data       {described(source)}: read when the run starts"]
    if not is_tfds(source) and not expanded(source).exists():
        return [f"data       {source}: not there yet"]
    try:
        found = {split: load_records(config.data, split) for split in SPLITS}
    except NotPrepared as error:
        return [f"data       {error}"]
    return [f"data       {split}: {len(records)} records" for split, records in found.items() if records]


def many_lines(config: RunConfig, own: list[RunConfig]) -> list[str]:
    folder = config.data.tenants
    if is_given(folder) or not expanded(str(folder)).exists():
        return [f"data       {described(folder)}: not there yet"]
    counts = [len(load_records(one.data, "train") or []) for one in own]
    return [f"data       {len(counts)} tenants with {min(counts)} to {max(counts)} records, {sum(counts)} in all"]


def mesh_here(config: RunConfig) -> dict[str, int]:
    """The sizes of the mesh; where the config leaves one open, over the devices of this machine."""
    asked = vars(config.mesh) | {"fsdp": config.mesh.fsdp or 1}
    known = math.prod(size for size in asked.values() if size > 0)
    return {name: size if size > 0 else max(1, jax.device_count() // known) for name, size in asked.items()}


def data_report(config: RunConfig) -> str:
    """Three training examples as tokens, and how all of them are put into batches. With many tenants, a table of them
    and examples of the first."""
    config = replace(config, eval=replace(config.eval, test=True))
    own = tenant_configs(config)
    layout = lay_out(config, abstract_mesh(mesh_here(config)), len(own))
    plan = planned(config, own, layout, None, SharedResources())
    examples = shown_examples(config, plan.tokenizer, plan.tenants[0].data)
    if config.data.tenants:
        return "\n\n".join(["\n".join(tenant_lines(plan)), "examples of the first tenant:", *examples])
    return "\n\n".join([*examples, "\n".join(data_lines(plan))])


def shown_examples(config: RunConfig, tokenizer, data: TrainingData) -> list[str]:
    """The first three examples as tokens, with their places."""
    at_end = getattr(config.adapter, "pooler", None) == "last"
    shown = [show_example(tokenizer, example, read_at_its_end=at_end) for example in data.examples[:3]]
    return [f"{place}\n{text}" for text, place in zip(shown, data.places, strict=False)]


def folder_report(folder: Path) -> str:
    """What a folder holds: a run (its config and last scores) or an adapter (its config and the backbone it belongs
    to)."""
    if (folder / "adapter_config.json").is_file():
        return adapter_report(folder)
    config = load_config(folder / "config.yaml")
    if config.sweep.method:
        return methods_report(folder, config)
    return tenants_report(folder, config) if config.many else run_report(folder, config)


def run_report(folder: Path, config: RunConfig) -> str:
    """The scores in the log of a run of one adapter, its last scores and answers, and its adapter."""
    data = described(config.data.train)
    lines = [f"run        {adapter_method(config.adapter)} on {config.backbone.source}, data {data}"]
    for row in read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else ():
        if any("loss" in name and name != "loss" for name in row):
            values = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "step")
            lines.append(f"step {row['step']:<6}{values}")
    records, adapter = read_scores(folder), folder / "adapter"
    lines += [part for part in (score_table(records), sample_lines(records)) if part]
    lines.append(folder_report(adapter) if adapter.is_dir() else "no adapter yet")
    return "\n".join(lines)


def methods_report(folder: Path, config: RunConfig) -> str:
    """The table of a comparison of methods, as far as it has come."""
    methods, file = ", ".join(config.sweep.method), folder / TABLE
    head = f"run        {methods} on {config.backbone.source}, data {described(config.data.train)}"
    found = "no method has ended yet"
    if file.is_file():
        found = file.read_bytes().decode().rstrip()
    each = f"each method's run is in a folder of its own: para-jax inspect {shlex.quote(str(folder))}/METHOD"
    return "\n".join([head, found, each])


def tenants_report(folder: Path, config: RunConfig) -> str:
    """The tenants of a run that have ended, with their scores, and how many have not."""
    names = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    entries = read_entries(folder)
    what = f"tenants of {config.data.tenants}"
    if config.sweep:
        what = f"combinations of a sweep on {described(config.data.train)}"
    if is_given(config.data.tenants):
        what = "tenants from Python"
    left = len(names) - len(entries)
    return "\n".join(
        [
            f"run        {adapter_method(config.adapter)} on {config.backbone.source}, {len(names)} {what}",
            tenants_table(entries) if entries else "no tenant has ended yet",
            *warning_lines(entries),
            *([f"{left} tenants have not ended; the same command resumes them"] if left and entries else []),
        ]
    )


def adapter_report(folder: Path) -> str:
    """An adapter's config, its backbone, what 1000 such tenants need in an AdapterBank, and what decode carries."""
    found = read_adapter_config(folder)
    fields = {
        k: ", ".join(map(str, v)) or "none" if isinstance(v, tuple) else v
        for k, v in given_fields(found.config).items()
        if v is not None  # layers_to_transform: all
    }
    shape = f"{found.backbone['num_layers']} layers"
    if not found.method.in_peft:
        widths = ", ".join(f"{site} {width}" for site, width in found.backbone["site_widths"].items())
        shape = (
            f"{printable(str(found.backbone['model_type']), 80)}, {shape}, width {found.backbone['width']}; {widths}"
        )
    layers = found.backbone["num_layers"]
    spread = layers / len(found.method.adapter.layers(found.config, layers))  # a bank holds vectors of every layer
    counts = found.counts
    vectors = spread * (counts.vectors - counts.joined)
    single, half = (n * counts.matrices + 4 * vectors for n in (4, 2))  # its vectors stay float32
    return "\n".join(
        [
            f"adapter    {found.method.label}, " + ", ".join(f"{k} {v}" for k, v in fields.items()),
            f"backbone   {printable(found.base_model or 'not named')}: {shape}",
            f"memory     {counts.matrices + counts.vectors:,} values; 1000 such tenants in a bank: "
            f"{size(1000 * single)} of host memory in float32, {size(1000 * half)} in bfloat16",
            f"decode     {carried_line(found)}",
        ]
    )


def carried_line(found: Described) -> str:
    """What decode carries for each row."""
    carried = found.counts.carried
    if not carried:
        return "nothing: the adapter acts on the prompt alone"
    sizes = f"{size(4 * carried)} per row in float32, {size(2 * carried)} in bfloat16"
    also = ", whatever the number of tenants" if found.method.carries == "factors" else ""
    return f"{sizes}: its {found.method.carries}{also}"


def size(count: float) -> str:
    """Bytes for people: 1.234 GB (powers of ten)."""
    return naturalsize(count, format="%.4g")


def new_record(command: str, found: dict) -> dict:
    """What a command measured, with the device and the versions."""
    about = {"command": command, "device": devices.describe_devices(), "versions": devices.library_versions()}
    return about | found


def results(command: str, config: RunConfig, scores: dict, seconds: float) -> dict:
    """The record that --results writes."""
    return new_record(command, {"seconds": round(seconds, 1), "scores": scores, "config": config_dict(config)})
