"""train: one run from its config to a folder with the best adapter, where training and evaluation meet.

output_dir/{config.yaml, metrics.jsonl, tensorboard/, checkpoints/<step>/, adapter/}. The same command resumes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import jax
from tqdm import tqdm

from . import devices
from .adapters.adapter import Adapter
from .adapters.files import load_adapter, save_adapter
from .backbone.kernels import attention_kernel
from .backbone.load import load_backbone
from .config import RunConfig, config_dict, load_config, save_config
from .data.batches import Batch, Bucket, Plan, collate, example_lengths, plan, plan_buckets
from .data.examples import Example
from .data.packing import Packed, PackingPlan, collate_packed, plan_packing
from .data.reader import read
from .data.sources import Encoded, encode_records, load_records
from .data.tokenizer import load_tokenizer
from .evaluation.evaluate import EvalTask, Score, evaluate_task, task_of_run
from .model import init_adapter
from .sharding import make_mesh, place, rows_over
from .training.checkpoint import Progress, open_checkpoints, restore_checkpoint, save_checkpoint
from .training.step import TrainState, init_state, standardise, train_step

# A folder holds the same run although these differ.
FREE_FIELDS = ("output_dir", "logging", "runtime")
STATISTICS_EXAMPLES = 64


class TrainResult(NamedTuple):
    adapter: Adapter
    """the best one by validation score; the last one where there is no validation data"""
    best_score: float | None
    best_step: int
    step: int
    output_dir: Path


class Work(NamedTuple):
    """What training needs of the data."""

    data: Encoded
    buckets: tuple[Bucket, ...]
    plan: Plan | PackingPlan
    rows: int
    """of a pass, over all devices"""
    passes: int
    total_steps: int

    def batch(self, step: int) -> tuple[Bucket, Batch | Packed, int]:
        """Global batch `step`: NumPy arrays [rows * passes, ...], and how many tokens they hold without padding."""
        if isinstance(self.plan, PackingPlan):
            chosen = [[self.data.examples[i] for i in row] for row in self.plan.batch_rows(step)]
            packed = collate_packed(chosen, self.plan.shape, self.rows * self.passes)
            return self.buckets[0], packed, int((packed.segment >= 0).sum())
        index, chosen = self.plan.batch_indices(step)
        made = collate([self.data.examples[i] for i in chosen], self.buckets[index], self.rows * self.passes)
        return self.buckets[index], made, int(made.length[: len(chosen)].sum())


def train(config: RunConfig) -> TrainResult:
    """Trains the adapter of a run, or goes on where the same run stopped.

    Raises ValueError, before anything is written, for data, a mesh or an output folder that do not fit the config.
    """
    devices.start(config.runtime)
    mesh = make_mesh(**vars(config.mesh))
    tokenizer = load_tokenizer(config.backbone.source)
    work = plan_work(config, tokenizer, mesh)
    validation, test = (task_of_run(config, split, tokenizer) for split in ("validation", "test"))
    claim_folder(config)
    model = load_backbone(**vars(config.backbone), mesh=mesh, layout="stacked")
    return fit(config, model, tokenizer, work, mesh, validation=validation, test=test if config.eval.test else None)


def plan_work(config: RunConfig, tokenizer, mesh) -> Work:
    """The training examples and which of them each step reads."""
    records = load_records(config.data, "train")
    data = encode_records(records or [], tokenizer, config.data)
    devices.say(f"training data: {data.report()}")
    rows, passes = (
        config.train.per_device_batch_size * mesh.shape["data"] * mesh.shape["fsdp"],
        config.train.gradient_accumulation_steps,
    )
    buckets, order = plan_order(config, data.examples, rows * passes)
    steps = config.train.max_steps or math.ceil(config.train.num_epochs * order.batches_per_epoch)
    return Work(data, buckets, order, rows, passes, steps)


def plan_order(config: RunConfig, examples: list[Example], rows: int) -> tuple[tuple[Bucket, ...], Plan | PackingPlan]:
    """The compiled shapes, and which examples a global batch of so many rows holds."""
    if not config.data.packing:
        buckets = plan_buckets(examples, config.data.buckets)
        return buckets, plan(example_lengths(examples), buckets=buckets, rows=rows, seed=config.seed)
    order = plan_packing(examples, length=config.data.max_seq_length, rows=rows, seed=config.seed)
    length, completion, segments = order.shape
    padding = 1 - sum(example_lengths(examples)) / (len(order.packed) * length)
    devices.say(
        f"packed {len(examples)} examples into {len(order.packed)} rows of {length} tokens, at most {segments} a row; "
        f"{padding:.1%} of the tokens are padding"
    )
    return (Bucket(length, completion),), order


def fit(
    config: RunConfig,
    model,
    tokenizer,
    work: Work,
    mesh,
    *,
    validation: EvalTask | None = None,
    test: EvalTask | None = None,
) -> TrainResult:
    """The training loop, with a backbone that is loaded already. The folder must be claimed."""
    folder = Path(config.output_dir)
    say_attention(model, work.buckets, mesh)
    with jax.set_mesh(mesh), open_checkpoints(folder / "checkpoints") as checkpoints:
        fresh = place(init_adapter(config.adapter, model.config, seed=config.seed), mesh, model.config)
        state = init_state(fresh, config.train, work.total_steps)
        restored = restore_checkpoint(checkpoints, state)
        if restored is None and getattr(config.adapter, "summary", "raw") == "standardised":
            state = state._replace(adapter=standardise(model, state.adapter, statistics_batches(work)))
        state, progress = restored or (state, Progress(0, None, 0, 0))
        with closing(Log(config, folder, progress.step if restored else None)) as log:
            if test and not restored:
                log.write(0, scores("test_before", evaluate_task(model, None, test, tokenizer)), show=True)
            state, progress = Loop(config, model, tokenizer, work, validation, checkpoints, log).run(state, progress)
            best = state.adapter
            if progress.best_step != progress.step:
                best = load_adapter(folder / "adapter", model.config, model=model)
            if test:
                log.write(progress.step, scores("test_after", evaluate_task(model, best, test, tokenizer)), show=True)
    return TrainResult(best, progress.best_score, progress.best_step, progress.step, folder)


def say_attention(model, buckets: tuple[Bucket, ...], mesh) -> None:
    """Names the kernels of training's attention, and why they are used."""
    on = mesh.devices.flat[0].platform
    found = {attention_kernel(model.config, bucket.length, model.dtype, on) for bucket in buckets}
    devices.say("attention: " + "; ".join(f"{kernel} ({why})" for kernel, why in sorted(found)))


class Loop(NamedTuple):
    """The steps of a run. A NamedTuple, for its parts are handed on and never change."""

    config: RunConfig
    model: object
    tokenizer: object
    work: Work
    validation: EvalTask | None
    checkpoints: object
    log: Log

    def run(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        """Steps until the last one or until patience ends; each value is read when the next step is under way."""
        seen: set[Bucket] = set()
        pending = None
        total = self.work.total_steps
        with (
            closing(read(self.work.batch, progress.step, total)) as batches,
            tqdm(total=total, initial=progress.step, desc="training", unit="step", disable=None) as bar,
        ):
            while progress.step < total and not self.out_of_patience(progress):
                bucket, batch, tokens = next(batches)
                batch = self.placed(batch)
                first, step = bucket not in seen, self.step_function(bucket)
                if first:
                    seen.add(bucket)
                    pending = self.log.step(pending, None, bar)  # tokens/s without the time of compiling
                    with devices.compiling(f"the training step for {self.work.rows} rows of {bucket.length} tokens"):
                        state, values = jax.block_until_ready(step(state, self.model, batch))
                else:
                    state, values = step(state, self.model, batch)
                progress = progress._replace(step=progress.step + 1)
                pending = self.log.step(pending, (progress.step, values, tokens), bar)
                if progress.step % self.config.eval.every == 0 or progress.step == total:
                    pending = self.log.step(pending, None, bar)
                    progress = self.evaluate(state, progress)
                    save_checkpoint(self.checkpoints, state, progress)
        return state, progress

    def placed(self, batch: Batch | Packed) -> Batch | Packed:
        """The batch on the mesh, its arrays [passes, rows, ...]."""
        return jax.tree.map(lambda a: rows_over(a.reshape(self.work.passes, self.work.rows, *a.shape[1:])), batch)

    def step_function(self, bucket: Bucket) -> Callable:
        static = dict(completion=bucket.completion, config=self.config.train, total_steps=self.work.total_steps)
        return lambda state, model, batch: train_step(state, model, batch, **static)

    def evaluate(self, state: TrainState, progress: Progress) -> Progress:
        """Scores the adapter and keeps it where it is the best so far; without validation data the last one is kept."""
        score = None
        if self.validation:
            found = evaluate_task(self.model, state.adapter, self.validation, self.tokenizer, self.config.eval.limit)
            require_finite(progress.step, {"validation loss": found.loss})
            self.log.write(progress.step, scores("validation", found), show=True)
            score = found.score
        if score is not None and progress.best_score is not None and score <= progress.best_score:
            return progress._replace(since_best=progress.since_best + 1)
        card = [f"Trained for {progress.step} steps on {Path(self.config.data.train or '').name}."]
        if self.config.backbone.quantize:
            card.append(f"The backbone's weights were {self.config.backbone.quantize} during training.")
        if self.validation:
            card.append(f"Validation {self.validation.metric}: {score:.4f}.")
        save_adapter(
            state.adapter,
            self.log.folder / "adapter",
            base_model=self.config.backbone.source,
            model=self.model,
            card=card,
        )
        return progress._replace(best_score=score, best_step=progress.step, since_best=0)

    def out_of_patience(self, progress: Progress) -> bool:
        return self.config.eval.patience is not None and progress.since_best >= self.config.eval.patience


class Log:
    """metrics.jsonl, TensorBoard and wandb; the first process alone writes.

    What a run that goes on after `step` will write again is dropped; all of it for None, a run that starts.
    """

    def __init__(self, config: RunConfig, folder: Path, step: int | None):
        self.folder, self.every = folder, config.logging.every
        self.first = jax.process_index() == 0
        self.writers = [WRITERS[name](config, folder, step) for name in config.logging.report_to] if self.first else []
        self.file = folder / "metrics.jsonl"
        self.clock: float | None = None
        if self.first and self.file.exists():
            replace_file(self.file, "" if step is None else lines_up_to(step, self.file.read_text()))

    def step(self, pending, new, bar: tqdm):
        """Writes the values of the step before, when the next is dispatched (or None: none comes at once), and gives
        back the new ones."""
        if pending is not None:
            step, values, tokens = pending
            values = {name: float(value) for name, value in values.items()}
            require_finite(step, values)
            now = time.monotonic()
            rate = {"tokens_per_second": round(tokens / (now - self.clock), 1)} if self.clock else {}
            self.clock = None if new is None else now
            bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate.get('tokens_per_second', 0):.0f} tokens/s")
            bar.update()
            if step % self.every == 0:
                self.write(step, values | rate)
        return new

    def write(self, step: int, values: dict[str, float], *, show: bool = False) -> None:
        if show:
            devices.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        if self.first:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        for writer in self.writers:
            writer(step, values)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


class TensorBoard:
    def __init__(self, config: RunConfig, folder: Path, step: int | None):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=(step or 0) + 1)

    def __call__(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    def __init__(self, config: RunConfig, folder: Path, step: int | None):
        try:
            import wandb
        except ImportError:
            raise ValueError("logging.report_to: wandb is not installed; `pip install 'para_jax[wandb]'`") from None
        self.run = wandb.init(dir=str(folder), config=config_dict(config), name=folder.name)

    def __call__(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


WRITERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def scores(name: str, found: Score) -> dict[str, float]:
    return {f"{name}_loss": found.loss} | ({} if found.metric == "loss" else {f"{name}_{found.metric}": found.score})


def require_finite(step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"step {step}: the {name} is {value}; lower train.learning_rate")


def lines_up_to(step: int, text: str) -> str:
    """The lines of metrics.jsonl that a run keeps when it goes on after this step: not the score after training, which
    is measured again, and not a line that was cut off when the run was."""
    kept = []
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            if row["step"] <= step and not any(name.startswith("test_after") for name in row):
                kept.append(line + "\n")
    return "".join(kept)


def statistics_batches(work: Work) -> list[Batch]:
    """Some training prompts, from which the summaries' mean and spread are measured; a last short batch is filled up
    with the first ones again."""
    count = min(STATISTICS_EXAMPLES, len(work.data.examples))
    chosen = [work.data.examples[i % count] for i in range(-(-count // work.rows) * work.rows)]
    return [collate(chosen[i : i + work.rows], work.buckets[-1], work.rows) for i in range(0, len(chosen), work.rows)]


# ---------------------------------------------------------------------------------------------------------- the folder


def claim_folder(config: RunConfig) -> None:
    """Makes the output folder and writes the resolved config into it; a folder that holds another run is refused."""
    folder = Path(config.output_dir)
    file, part = folder / "config.yaml", folder / ".config.yaml"
    if file.is_file():
        difference = differences(load_config(file), config)
        if difference:
            raise ValueError(
                f"output_dir {folder} holds another run, which differs in {'; '.join(difference)}; "
                "choose another output_dir, or the same config to resume"
            )
    elif folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - {part}):
        raise ValueError(f"output_dir {folder} holds something else than a run; choose another")
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, part)
        os.replace(part, file)


def differences(held: RunConfig, wanted: RunConfig) -> list[str]:
    """What makes two configs two runs: "train.learning_rate (0.1 there, 0.2 here)". A longer run is the same run."""

    def flat(value, name=""):
        if not isinstance(value, dict):
            return {name: value}
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}" if name else key).items()}

    there, here = flat(config_dict(held)), flat(config_dict(wanted))
    free = lambda name: name.split(".")[0] in FREE_FIELDS or name == "train.max_steps"  # noqa: E731
    names = [name for name in there | here if not free(name) and there.get(name) != here.get(name)]
    return [f"{name} ({there.get(name)!r} there, {here.get(name)!r} here)" for name in names]


def replace_file(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}")
    part.write_text(text)
    os.replace(part, file)
