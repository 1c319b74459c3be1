"""train: one run from its config to a folder with the best adapter, where training and evaluation meet.

output_dir/{config.yaml, metrics.jsonl, tensorboard/, checkpoints/<step>/, adapter/, profile/}. The same command
resumes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from tqdm import tqdm

from .. import devices
from ..adapters.adapter import Adapter
from ..adapters.files import load_adapter, save_adapter
from ..adapters.folder import mend_folder
from ..backbone.kernel_choice import describe_attention
from ..backbone.load import load_backbone, load_model_config
from ..config import ModelConfig, RunConfig, config_dict, expanded, require
from ..data.batches import Batch, Bucket, Plan, collate, epoch_bits, example_lengths, permutation, plan, plan_buckets
from ..data.example_arrays import ExampleArrays, digest
from ..data.examples import Example
from ..data.packing import Packed, PackingPlan, collate_packed, plan_packing
from ..data.prefetch import prefetch
from ..data.tokenizer import load_tokenizer
from ..data.training_data import TrainingData, load_training_data
from ..evaluation.evaluate import EvalTask, Score, encode_task, evaluate_task, task_of_run
from ..evaluation.shapes import Shapes, plan_shapes, say_evaluation
from ..hub import resolve_backbone
from ..memory import run_mesh
from ..model import init_adapter
from ..processes import arrays_of_first, by_each, by_first, gathered, is_first, require_same
from ..roofline import peak_rate
from ..sharding import place, replicated_lines, rows_over
from ..storage.bucket import Place
from ..training.checkpoint import (
    Progress,
    changed_data,
    describe_changes,
    finish_saving,
    open_checkpoints,
    require_saved,
    restore_checkpoint,
    save_checkpoint,
    steps_in,
)
from ..training.log import Done, Log
from ..training.passes import step_passes
from ..training.profiler import Profiler
from ..training.step import TrainState, init_state, standardise, train_step
from ..training.stop import Interrupted, StopSignal, stop_signals
from .folder import FREE_FIELDS, claim_folder, locked_folder, run_digests

STATISTICS_EXAMPLES = 64


class TrainResult(NamedTuple):
    adapter: Adapter
    """the best one by validation score; the last one where there is no validation data"""
    best_score: float | None
    best_step: int
    step: int
    output_dir: Place


class Work(NamedTuple):
    """What training needs of the data."""

    data: TrainingData
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

    def chosen(self, step: int) -> list[int]:
        """The examples of global batch `step`."""
        return self.plan.batch_indices(step)[1]


def train(config: RunConfig) -> TrainResult:
    """Trains the adapter of a run, or goes on where the same run stopped.

    SIGTERM saves and raises Stopped, a SystemExit with code 0; Ctrl-C saves and raises KeyboardInterrupt.
    Raises ValueError, before anything is written, for data, a mesh or an output folder that do not fit the config, and
    for a folder that another run is writing.
    """
    devices.start(config.runtime)
    require(not config.many, "data.tenants or sweep", config.output_dir, "a run of one adapter; use train_tenants")
    require_same("the config", lambda: {k: v for k, v in config_dict(config).items() if k not in FREE_FIELDS})
    mesh = run_mesh(config)
    tokenizer, work, validation, test = by_each(lambda: read_inputs(config, mesh))
    require_same("the data", lambda: [part and digest(part.examples or []) for part in (work.data, validation, test)])
    by_first(lambda: require_judge(config, [validation]))
    with ExitStack() as held:
        by_first(lambda: held.enter_context(locked_folder(config)))
        by_first(lambda: claim_folder(config))
        model = load_backbone(**vars(config.backbone), mesh=mesh, layout="stacked")
        require_same("the backbone", lambda: model.fingerprint)
        tested = test if config.eval.test else None
        return fit(config, model, tokenizer, work, mesh, validation=validation, test=tested)


def read_inputs(config: RunConfig, mesh) -> tuple[Any, Work, EvalTask | None, EvalTask | None]:
    """What every process reads for itself before the backbone: tokenizer, training data, and tasks to score."""
    resolve_backbone(config.backbone.source)
    tokenizer = load_tokenizer(config.backbone.source)
    work = plan_work(config, tokenizer, mesh)
    validation, test = (task_of_run(config, split, tokenizer) for split in ("validation", "test"))
    require_room(load_model_config(config.backbone.source), work.data, (validation, test))
    return tokenizer, work, validation, test


def require_judge(config: RunConfig, validation: Sequence[EvalTask | None]) -> None:
    """Raises ValueError for eval.patience where nobody has validation data, which alone could end a run early. A run
    that an earlier version began so goes on, and a line says that patience ends nothing."""
    if config.eval.patience is None or any(validation):
        return
    missing = "validation data (data.validation, or validation.jsonl beside train.jsonl)"
    checkpoints = expanded(config.output_dir) / "checkpoints"
    resumes = checkpoints.is_dir() and bool(steps_in(checkpoints))
    require(resumes, "eval.patience", config.eval.patience, f"{missing}; or eval.patience=null")
    devices.say(f"warning: eval.patience ends nothing here: there is no {missing}")


def require_room(model: ModelConfig, data: TrainingData, tasks: Iterable[EvalTask | None]) -> None:
    """Raises ValueError, naming its place, for an example that the model has no tokens or too few positions for, the
    answer that is to be written included."""
    known, most = model.vocab_size, model.max_positions
    asked: list[tuple[Sequence[Example], Sequence[str], int]] = []
    if data.examples.ids.max() >= known or data.examples.lengths.max() > most:
        asked.append((data.examples, data.places, 0))
    for task in filter(None, tasks):
        where = [record.place for record in task.records]
        asked.append((task.examples or [], where, task.max_new_tokens if task.writes else 0))
    for examples, where, new in asked:
        room = f"at most {most}, the model's positions; data.max_seq_length with data.truncate limits them"
        room += f", beside {new} for eval.max_new_tokens" if new else ""
        for (prompt, completion), at in zip(examples, where, strict=True):
            largest, length = max(max(prompt), max(completion)), len(prompt) + max(len(completion), new)
            require(largest < known, f"{at}: token id", largest, f"less than {known}, the model's tokens")
            require(length <= most, f"{at}: tokens", length, room)


def plan_work(config: RunConfig, tokenizer, mesh) -> Work:
    """The training examples and which of them each step reads."""
    data = load_training_data(config.data, tokenizer)
    devices.say(f"training data: {data.report()}")
    rows, passes = step_passes(config.train, mesh)
    buckets, order = plan_order(config, data.examples, rows * passes)
    steps = config.train.max_steps or math.ceil(config.train.num_epochs * order.batches_per_epoch)
    return Work(data, buckets, order, rows, passes, steps)


def plan_order(config: RunConfig, examples: ExampleArrays, rows: int) -> tuple[tuple[Bucket, ...], Plan | PackingPlan]:
    """The compiled shapes, and which examples a global batch of so many rows holds."""
    if not config.data.packing:
        buckets = plan_buckets(examples, config.data.buckets)
        return buckets, plan(example_lengths(examples), buckets=buckets, rows=rows, seed=config.seed)
    order = plan_packing(examples, length=config.data.max_seq_length, rows=rows, seed=config.seed)
    length, completion, segments = order.shape
    padding = 1 - len(examples.ids) / (len(order.packed) * length)
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
    folder = expanded(config.output_dir)
    say_layout(model, mesh)
    say_attention(model, work.buckets, mesh, packed=config.data.packing)
    with jax.set_mesh(mesh), open_checkpoints(folder / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        fresh = place(init_adapter(config.adapter, model.config, seed=config.seed), mesh, model.config)
        state = init_state(fresh, config.train, work.total_steps)
        shapes = shapes_of_run(config, tokenizer, validation, test)
        run = run_digests(config, model.fingerprint, [(work.data.examples, validation, test)])
        require_same("the data", lambda: run)  # also what the ids don't show, such as references
        restored = restore_checkpoint(checkpoints, state, run=run, accept_data=config.data.changed == "accept")
        if restored is None and fresh.needs_statistics:
            statistics = statistics_batches(work.data.examples, work.buckets[-1], work.rows, config.seed)
            state = state._replace(adapter=standardise(model, state.adapter, *statistics))
        state, progress = restored or (state, Progress(0, None, 0, 0, run=run))
        changed, progress = accepted_changes(progress, run)
        expected = f"at least {progress.step}, the steps that this run has done; or another output_dir"
        require(progress.step <= work.total_steps, "train.max_steps", work.total_steps, expected)
        log = Log(
            config, folder, progress if restored else None, peak_rate=peak_rate(model.config, mesh.devices.flatten())
        )
        by_first(lambda: mend_folder(folder / "adapter"))
        profiler = Profiler(config.profiler, folder)
        with closing(log), closing(profiler), stop_signals() as stop:
            loop = Loop(config, model, tokenizer, work, validation, checkpoints, log, profiler, stop, shapes)
            try:
                if test and (not restored or {"test data", "data"} & set(changed)):
                    before = None if restored else state.adapter  # a fresh adapter is the backbone, in shared programs
                    with stop.interrupting():
                        found = evaluate_task(model, before, test, tokenizer, None, shapes)
                    log.write(progress.step, scores("test_before", found), show=True)
                if {"validation data", "data"} & set(changed):
                    progress = loop.rescored(state, progress)
                state, progress = loop.run(state, progress)
                best = state.adapter
                if progress.best_step != progress.step:
                    best = place(kept_adapter(folder, model, state.adapter), mesh, model.config)
                if test:
                    with stop.interrupting():
                        found = evaluate_task(model, best, test, tokenizer, None, shapes)
                    log.write(progress.step, scores("test_after", found), show=True)
            except Interrupted:
                loop.end_early(progress)
    return TrainResult(best, progress.best_score, progress.best_step, progress.step, folder)


def shapes_of_run(config: RunConfig, tokenizer, validation: EvalTask | None, test: EvalTask | None) -> Shapes | None:
    """The compiled shapes that a run's evaluations share, which are said; None where nothing is evaluated."""
    asked = {"validation": (validation, config.eval.limit), "test": (test, None)}
    encoded = {name: encode_task(task, tokenizer, limit) for name, (task, limit) in asked.items() if task}
    if not encoded:
        return None
    say_evaluation({name: [one] for name, one in encoded.items()}, config.eval.batch_size)
    return plan_shapes(list(encoded.values()))


def accepted_changes(progress: Any, run: dict[str, str]) -> tuple[list[str], Any]:
    """The parts of the data that changed since a checkpoint was written, which the config accepts, and its progress as
    one of the new data."""
    changed = changed_data(progress.run, run)
    if changed:
        said = describe_changes(changed, progress.run, run)
        devices.say(
            f"data.changed=accept: the checkpoint of step {progress.step} is of {said}; the run goes on from it"
        )
    return changed, progress._replace(run=run)


def kept_adapter(folder: Place, model, last: Adapter) -> Adapter:
    """The run's best adapter, from the folder that the first process alone reads; as arrays of NumPy."""
    found: list[Adapter] = []
    by_first(lambda: found.append(load_adapter(folder / "adapter", model.config, model=model)))
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), last)
    return arrays_of_first(found[0] if is_first() else empty)


def say_layout(model, mesh) -> None:
    """Says which weights the mesh can't split."""
    for line in replicated_lines(model, mesh, model.config):
        devices.say(line)


def say_attention(model, buckets: tuple[Bucket, ...], mesh, *, packed: bool = False) -> None:
    """Names the kernels of training, evaluation and decoding, and why they are used."""
    platform, lengths = mesh.devices.flat[0].platform, [bucket.length for bucket in buckets]
    devices.say(describe_attention(model.config, model.dtype, platform, model.attention, lengths, packed=packed))


class Loop(NamedTuple):
    """The steps of a run. A NamedTuple, for its parts are handed on and never change."""

    config: RunConfig
    model: Any
    tokenizer: object
    work: Work
    validation: EvalTask | None
    checkpoints: object
    log: Log
    profiler: Profiler
    stop: StopSignal
    shapes: Shapes | None = None
    """of evaluation"""

    def run(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        """Steps until the last one or until patience ends; each value is read when the next step is under way.

        A checkpoint holds what was evaluated before it, and only values that were read and are finite.
        """
        compiled: set[Bucket] = set()
        done: Done | None = None
        saved = progress.step
        total = self.work.total_steps
        with (
            closing(prefetch(self.work.batch, saved, total)) as batches,
            tqdm(total=total, initial=saved, desc="training", unit="step", disable=silent()) as bar,
        ):
            while True:
                stopping = self.stop.reached(progress.step)
                last = progress.step == total
                if not stopping and progress.evaluated < progress.step and (last or self.due("eval", progress.step)):
                    done = self.log_values(done, bar)
                    try:
                        progress = self.evaluate(state, progress)
                    except Interrupted:
                        stopping = True
                last = last or self.out_of_patience(progress)
                if saved < progress.step and (stopping or last or self.due("checkpoint", progress.step)):
                    done = self.log_values(done, bar)
                    self.log.flush()
                    save_checkpoint(self.checkpoints, state, progress)
                    saved = progress.step
                if stopping:
                    self.end_early(progress)
                if last:
                    self.log.flush()
                    by_first(lambda: finish_saving(self.checkpoints))
                    return state, progress
                state, done = self.step(state, batches, progress.step + 1, done, compiled, bar)
                progress = progress._replace(step=progress.step + 1)
                require_saved(self.checkpoints)

    def step(
        self, state: TrainState, batches: Iterator, step: int, done: Done | None, compiled: set[Bucket], bar: tqdm
    ) -> tuple[TrainState, Done]:
        """Dispatches the step with this number (from 1), then logs the one before."""
        begun: float | None = time.monotonic()
        bucket, batch, tokens = next(batches)
        batch = self.placed(batch)
        waited, dispatch = time.monotonic() - begun, self.step_function(bucket)
        self.profiler.before(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            if bucket in compiled:
                state, values = dispatch(state, self.model, batch)
            else:
                compiled.add(bucket)
                done, begun = self.log_values(done, bar), None  # compiling is not a step's time
                with devices.compiling(f"the training step for {self.work.rows} rows of {bucket.length} tokens"):
                    state, values = jax.block_until_ready(dispatch(state, self.model, batch))
        self.log_values(done, bar)
        if self.profiler.on:
            begun = None  # nor is tracing it, and writing the trace
        self.profiler.after(step, values)
        return state, Done(step, values, tokens, begun, waited)

    def log_values(self, done: Done | None, bar: tqdm) -> None:
        """Waits for the values of a step and logs them.

        Raises ValueError, with the step's examples, where one is not finite.
        """
        if done is None:
            return
        values = {name: float(value) for name, value in done.values.items()}
        if not all(map(math.isfinite, values.values())):
            require_finite(done.step, values, self.examples(done.step))
        self.log.step(done, values, bar)

    def examples(self, step: int) -> str:
        """Where the examples of the step with this number (from 1) come from."""
        return places([self.work.data.places[i] for i in self.work.chosen(step - 1)])

    def due(self, what: str, step: int) -> bool:
        """Whether a step is one after which to evaluate ("eval") or to save ("checkpoint")."""
        every = {"eval": self.config.eval.every, "checkpoint": self.config.checkpoint.every or self.config.eval.every}
        return step > 0 and step % every[what] == 0

    def end_early(self, progress: Progress) -> NoReturn:
        self.log.flush()
        stopped_at = f"step {progress.step} of {self.work.total_steps}"
        end_stopped(self.checkpoints, self.stop, self.log.folder, stopped_at)

    def placed(self, batch: Batch | Packed) -> Batch | Packed:
        """The batch on the mesh, its arrays [passes, rows, ...]."""
        return jax.tree.map(lambda a: rows_over(a.reshape(self.work.passes, self.work.rows, *a.shape[1:])), batch)

    def step_function(self, bucket: Bucket) -> Callable:
        static = dict(completion=bucket.completion, config=self.config.train, total_steps=self.work.total_steps)
        return lambda state, model, batch: train_step(state, model, batch, **static)

    def evaluate(self, state: TrainState, progress: Progress) -> Progress:
        """Scores the adapter and keeps it where it is the best so far; without validation data the last one is kept."""
        score = found = None
        if self.validation:
            with self.stop.interrupting():
                given = self.validation, self.tokenizer, self.config.eval.limit, self.shapes
                found = evaluate_task(self.model, state.adapter, *given)
            require_finite(progress.step, {"validation loss": found.loss}, self.validation.name)
            self.log.write(progress.step, scores("validation", found), show=True)
            score = found.score
        progress = progress._replace(evaluated=progress.step)
        if score is not None and progress.best_score is not None and score <= progress.best_score:
            return progress._replace(since_best=progress.since_best + 1)
        self.keep(state.adapter, progress.step, found)
        return progress._replace(best_score=score, best_step=progress.step, since_best=0)

    def rescored(self, state: TrainState, progress: Progress) -> Progress:
        """The progress where the validation data changed: the kept adapter is scored on the new ones, because scores of
        two data sets are never compared."""
        if progress.best_score is None or self.validation is None:
            return progress._replace(best_score=None, since_best=0)
        kept = kept_adapter(self.log.folder, self.model, state.adapter)
        kept = place(kept, jax.sharding.get_mesh(), self.model.config)
        with self.stop.interrupting():
            limit = self.config.eval.limit
            found = evaluate_task(self.model, kept, self.validation, self.tokenizer, limit, self.shapes)
        require_finite(progress.best_step, {"validation loss": found.loss}, self.validation.name)
        was = f"{progress.best_score:.4f} on the data before"
        devices.say(f"the best adapter so far, of step {progress.best_step}: {found.metric} {found.score:.4f} ({was})")
        self.keep(kept, progress.best_step, found)
        return progress._replace(best_score=found.score, since_best=0)

    def keep(self, adapter: Adapter, step: int, found: Score | None) -> None:
        """Writes an adapter into the run's folder, with its score."""
        card, whole = card_lines(self.config, step, found), gathered(adapter)
        to, source = self.log.folder / "adapter", self.config.backbone.source
        by_first(lambda: save_adapter(whole, to, base_model=source, model=self.model, card=card))

    def out_of_patience(self, progress: Progress) -> bool:
        return self.config.eval.patience is not None and progress.since_best >= self.config.eval.patience


def end_stopped(checkpoints, stop: StopSignal, folder: Place, where: str) -> NoReturn:
    """Ends a run that was told to stop, when everything is written, and says where it stands and how to go on."""
    by_first(lambda: finish_saving(checkpoints))
    devices.say(
        f"stopped after {where}, and saved; the same command resumes, or `para-jax train {folder / 'config.yaml'}`"
    )
    stop.end()


def card_lines(config: RunConfig, steps: int, found: Score | None) -> list[str]:
    """What an adapter's model card says of its training and its validation score."""
    card = [f"Trained for {steps} steps on {expanded(config.data.train or '').name}."]
    if config.backbone.quantize:
        card.append(f"The backbone's weights were {config.backbone.quantize} during training.")
    if found:
        card.append(f"Validation {found.metric}: {found.score:.4f}.")
    return card


def silent() -> bool | None:
    """For a progress bar: none on the other processes, nor where stderr is no terminal."""
    return None if is_first() else True


def require_finite(step: int, values: dict[str, float], examples: str) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(
                f"step {step}: the {name} is {value} on {examples}; look at these examples, or begin anew with a lower "
                "train.learning_rate"
            )


def places(each: list[str]) -> str:
    """Examples' places ("file:line"), a file named once: "train.jsonl:7, 12, 31"."""
    lines: dict[str, list[str]] = {}
    for file, _, line in (text.rpartition(":") for text in each):
        lines.setdefault(file, []).append(line)
    return "; ".join(f"{file}:{', '.join(sorted(numbers, key=natural))}" for file, numbers in lines.items())


def natural(number: str) -> tuple[int, str]:
    return len(number), number


def scores(name: str, found: Score) -> dict[str, float]:
    return {f"{name}_{what}": value for what, value in found.values().items()}


def statistics_batches(examples: Sequence[Example], bucket: Bucket, rows: int, seed: int) -> tuple[list[Batch], int]:
    """Batches of STATISTICS_EXAMPLES training prompts (or all, if there are fewer), from which the summaries' mean and
    spread are measured, and how many prompts there are. They are drawn by the seed from the whole file, because a file
    may be sorted. The rows after them only fill up the last batch."""
    drawn = permutation(epoch_bits(seed), len(examples))[:STATISTICS_EXAMPLES].tolist()
    prompts = [examples[i]._replace(completion_ids=[]) for i in drawn]
    cut = [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
    return [collate(part, bucket, rows) for part in cut], len(prompts)
