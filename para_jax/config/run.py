"""`RunConfig`: one training run, as sections of fields. configs/ holds examples."""

import re
import typing
from dataclasses import dataclass, field
from typing import Any

from .adapter import ParaConfig
from .check import expanded, one_of, require, require_place

#: The kernels for attention of whole sequences.
ATTENTION = ("auto", "plain", "splash", "cudnn")


@dataclass(frozen=True, kw_only=True)
class BackboneSection:
    source: str = "smollm2-135m"
    """a folder, a hub id (user/name or user/name@revision), a .gguf file, or the built-in name smollm2-135m"""
    dtype: str | None = None
    """float32 | bfloat16; default: float32 on a CPU, else bfloat16"""
    quantize: str | None = None
    """int8 (the kernels of the linears, a byte a weight); default: as `dtype` says"""
    attention: str = "auto"
    """the kernel for whole sequences: auto | plain | splash (TPU) | cudnn (GPU). auto tries the device's kernel at
    start, and uses plain where it fails"""

    def __post_init__(self):
        require_place("backbone.source", self.source)
        require(self.dtype in (None, "float32", "bfloat16"), "backbone.dtype", self.dtype, "float32 or bfloat16")
        require(self.quantize in (None, "int8"), "backbone.quantize", self.quantize, "int8, or null for none")
        require(self.attention in ATTENTION, "backbone.attention", self.attention, " or ".join(ATTENTION))


@dataclass(frozen=True, kw_only=True)
class DataSection:
    train: str | None = None
    """a .jsonl file, or a folder with train.jsonl and perhaps validation.jsonl and test.jsonl; or tfds:NAME[/CONFIG], a
    data set that `para-jax prepare` wrote, with perhaps these splits; one split alone: tfds:glue/sst2:train[:90%]"""
    validation: str | None = None
    test: str | None = None
    tenants: str | None = None
    """a folder whose sub-folders (each as for `train`) and .jsonl files are tenants, trained in one run; then
    train, validation and test are not used"""
    data_dir: str | None = None
    """the folder of tfds: data; default: that of tensorflow_datasets (~/tensorflow_datasets)"""
    task: str | None = None
    """a name from data/tasks.py: its templates, its metric, its choices; default: what a tfds: name stands for"""
    prompt: str | None = None
    """a template over the columns, such as "{instruction}\\n{input}"; default: the column `prompt`"""
    completion: str | None = None
    max_seq_length: int = 512
    """tokens of prompt and completion together"""
    cache: bool = True
    """keep the token ids of large training data in the user's cache folder, ~/.cache/para_jax/tokens, for the next
    start"""
    truncate: str = "error"
    """what is done with longer examples: error | skip | left (cut from the prompt's left); each is counted and
    reported"""
    buckets: int = 3
    """the most padded lengths that training compiles for"""
    packing: bool = False
    """put several examples into each training row of max_seq_length tokens (`buckets` is not used then); evaluation
    stays one example a row"""
    changed: str = "refuse"
    """what a run that resumes does if its data are not those it began with: refuse | accept (go on with the new data,
    and score the best adapter again if the validation data changed)"""

    def __post_init__(self):
        require(self.changed in ("refuse", "accept"), "data.changed", self.changed, one_of(("refuse", "accept")))
        for name in ("train", "validation", "test", "tenants"):
            require_place(f"data.{name}", getattr(self, name))
        expected = "a folder on this host: tfds data is not read from a bucket"
        require("://" not in (self.data_dir or ""), "data.data_dir", self.data_dir, expected)
        require(self.max_seq_length >= 2, "data.max_seq_length", self.max_seq_length, "at least 2 tokens")
        require(
            self.truncate in ("error", "skip", "left"),
            "data.truncate",
            self.truncate,
            one_of(("error", "skip", "left")),
        )
        require(self.buckets >= 1, "data.buckets", self.buckets, "at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    learning_rate: float = 1e-3
    schedule: str = "linear"
    """constant | linear | cosine, after the warm-up"""
    warmup_ratio: float = 0.06
    max_steps: int | None = None
    """optimiser steps; default: num_epochs passes over the data"""
    num_epochs: float = 1.0
    batch_size: int | None = None
    """rows of one optimiser step over all devices, the same on any number of chips; the number of passes is then
    derived. Default: per_device_batch_size x gradient_accumulation_steps on each of the mesh's data x fsdp devices, so
    that the step grows with the chips"""
    per_device_batch_size: int = 8
    """rows of one forward pass on each of the mesh's data x fsdp devices; with batch_size: at most so many"""
    gradient_accumulation_steps: int = 1
    """passes of one optimiser step; with batch_size leave it at 1"""
    rows_per_tenant: int | None = None
    """with many tenants (data.tenants, sweep): rows of a pass that each tenant in the batch has; it divides
    per_device_batch_size; default: 4, and in a sweep per_device_batch_size: the batch that one such run would have.
    With batch_size: rows of a step that each tenant in it has; it divides batch_size; default: 4, and in a sweep
    batch_size"""
    tenants_at_once: int | None = None
    """with many tenants: how many have weights and optimiser state on the devices; one that ends leaves its place to
    the next; default: all"""
    sampling: str = "proportional"
    """with many tenants: how often each is in the batch: in proportion to its number of examples | sqrt (of that
    number) | uniform"""
    up_lr_ratio: float = 1.0
    """the learning rate of PARA's W_up [our choice] and LoRA's B over learning_rate, that of all other weights (LoRA+,
    arXiv:2402.12354; loraplus_lr_ratio in PEFT)"""
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps: float = 1e-8
    remat: str = "dots"
    """what the backward pass keeps of a layer: none (all it needs: nothing is made anew) | dots (the outputs of the
    linears) | block (the layer's input only)"""

    REMATS: typing.ClassVar = ("none", "dots", "block")
    SCHEDULES: typing.ClassVar = ("constant", "linear", "cosine")
    SAMPLINGS: typing.ClassVar = ("proportional", "sqrt", "uniform")

    def __post_init__(self):
        require(self.learning_rate >= 0, "train.learning_rate", self.learning_rate, "a number of at least 0")
        require(self.schedule in self.SCHEDULES, "train.schedule", self.schedule, one_of(self.SCHEDULES))
        require(
            0 <= self.warmup_ratio < 1,
            "train.warmup_ratio",
            self.warmup_ratio,
            "a share of the steps, 0 or more and below 1",
        )
        require(self.max_steps is None or self.max_steps >= 1, "train.max_steps", self.max_steps, "at least 1")
        require(0 < self.num_epochs < 1e9, "train.num_epochs", self.num_epochs, "more than 0, and finite")
        require(
            self.per_device_batch_size >= 1, "train.per_device_batch_size", self.per_device_batch_size, "at least 1"
        )
        require(
            self.gradient_accumulation_steps >= 1,
            "train.gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            "at least 1",
        )
        batch, passes = self.batch_size, self.gradient_accumulation_steps
        require(batch is None or batch >= 1, "train.batch_size", batch, "at least 1")
        fits = batch is None or batch % passes == 0
        expected = f"a divisor of train.batch_size ({batch}), or nothing: the passes are derived from batch_size"
        require(fits, "train.gradient_accumulation_steps", passes, expected)
        rows = self.rows_per_tenant
        require(rows is None or rows >= 1, "train.rows_per_tenant", rows, "at least 1")
        at_once = self.tenants_at_once
        require(at_once is None or at_once >= 1, "train.tenants_at_once", at_once, "at least 1")
        require(self.sampling in self.SAMPLINGS, "train.sampling", self.sampling, one_of(self.SAMPLINGS))
        require(0 < self.up_lr_ratio < 1e9, "train.up_lr_ratio", self.up_lr_ratio, "more than 0, and finite")
        require(self.max_grad_norm > 0, "train.max_grad_norm", self.max_grad_norm, "more than 0")
        require(0 <= self.weight_decay < 1e9, "train.weight_decay", self.weight_decay, "a number of at least 0")
        for name in ("adam_b1", "adam_b2"):
            require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "0 or more and below 1")
        require(0 < self.adam_eps < 1e9, "train.adam_eps", self.adam_eps, "more than 0")
        require(self.remat in self.REMATS, "train.remat", self.remat, one_of(self.REMATS))


@dataclass(frozen=True, kw_only=True)
class SweepSection:
    """Every combination of these values is trained on the same data in one run; an empty list: the run's own value."""

    learning_rate: tuple[float, ...] = ()
    seed: tuple[int, ...] = ()
    """of an adapter's first weights and of the order of its examples"""

    def __post_init__(self):
        for name, values in vars(self).items():
            require(len(set(values)) == len(values), f"sweep.{name}", values, "values that differ")
        require(all(rate >= 0 for rate in self.learning_rate), "sweep.learning_rate", self.learning_rate, "0 or more")
        fits = all(0 <= seed < 2**32 for seed in self.seed)
        require(fits, "sweep.seed", self.seed, "whole numbers from 0 to 2**32 - 1")

    def __bool__(self) -> bool:
        return bool(self.learning_rate or self.seed)


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    every: int = 200
    """steps between two evaluations on the validation data; the last step is always evaluated"""
    metric: str | None = None
    """loss | exact_match | accuracy | macro_f1 | matthews | squad | squad_exact | f1 | final_number | sql_match, as
    evaluation/metrics.py defines them; default: the task's, else exact_match"""
    also: tuple[str, ...] = ()
    """more of these metrics, of the same answers, to be reported beside it; default: the task's"""
    choices: tuple[str, ...] = ()
    """the answers that `accuracy` ranks; default: the task's, else the different completions of the training data"""
    limit: int | None = None
    """the most validation examples scored"""
    batch_size: int = 16
    """rows of an evaluation batch, over all devices together; rounded up to a multiple of mesh.data x mesh.fsdp"""
    max_new_tokens: int | None = None
    """the most tokens of a written answer; default: the task's, else 32"""
    patience: int | None = None
    """stop after so many evaluations without a better score"""
    test: bool = False
    """score the test data before and after training"""

    METRICS: typing.ClassVar = (
        "loss",
        "exact_match",
        "accuracy",
        "macro_f1",
        "matthews",
        "squad",
        "squad_exact",
        "f1",
        "final_number",
        "sql_match",
    )

    def __post_init__(self):
        require(self.every >= 1, "eval.every", self.every, "at least 1 step")
        require(self.metric is None or self.metric in self.METRICS, "eval.metric", self.metric, one_of(self.METRICS))
        further = tuple(metric for metric in self.METRICS if metric not in ("loss", "accuracy"))
        require(set(self.also) <= set(further), "eval.also", self.also, "any of " + ", ".join(further))
        require(not (self.also and self.metric == "loss"), "eval.also", self.also, "nothing beside eval.metric=loss")
        require(self.limit is None or self.limit >= 1, "eval.limit", self.limit, "at least 1 example")
        require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "at least 1")
        fits = self.max_new_tokens is None or self.max_new_tokens >= 1
        require(fits, "eval.max_new_tokens", self.max_new_tokens, "at least 1")
        require(self.patience is None or self.patience >= 1, "eval.patience", self.patience, "at least 1 evaluation")


@dataclass(frozen=True, kw_only=True)
class MeshSection:
    """Devices along each axis; one of them may be -1: all that are left. The default uses every device, and gives as
    many to fsdp as the memory of one asks for."""

    data: int = -1
    fsdp: int | None = None
    """null: chosen, 1 where the whole run fits one device by its estimate (memory.py), else the smallest size that
    fits"""
    tensor: int = 1

    def __post_init__(self):
        sizes = (self.data, 1 if self.fsdp is None else self.fsdp, self.tensor)
        fits = all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1
        require(fits, "mesh", vars(self), "sizes of 1 or more, at most one of them -1 (all devices that are left)")


@dataclass(frozen=True, kw_only=True)
class LoggingSection:
    report_to: tuple[str, ...] = ("tensorboard",)
    """any of tensorboard, wandb; metrics.jsonl is always written"""
    every: int = 1

    def __post_init__(self):
        require(
            set(self.report_to) <= {"tensorboard", "wandb"},
            "logging.report_to",
            self.report_to,
            "any of tensorboard, wandb",
        )
        require(self.every >= 1, "logging.every", self.every, "at least 1 step")


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    every: int | None = None
    """steps between two checkpoints, from which the same command resumes; default: eval.every; the last step is always
    saved"""
    keep: int = 2
    """how many of the newest are kept"""

    def __post_init__(self):
        require(self.every is None or self.every >= 1, "checkpoint.every", self.every, "at least 1 step")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")


@dataclass(frozen=True, kw_only=True)
class ProfilerSection:
    start_step: int | None = None
    """the first step, from 1, of which jax.profiler writes a trace into output_dir/profile; default: none is traced"""
    steps: int = 3

    def __post_init__(self):
        fits = self.start_step is None or self.start_step >= 1
        require(fits, "profiler.start_step", self.start_step, "a step from 1 on, or null for no trace")
        require(self.steps >= 1, "profiler.steps", self.steps, "at least 1")


@dataclass(frozen=True, kw_only=True)
class RuntimeSection:
    compilation_cache: bool = True
    allow_cpu: bool = False
    """run on the CPU although the machine has an accelerator"""
    deterministic: bool = False
    """on GPUs, use only algorithms that give the same bits each time, so that a resumed run ends with the bits of one
    that was never stopped; slower. CPUs and TPUs do so anyway"""
    coordinator: str | None = None
    """for a run on several hosts, each of which is given the same command: auto (JAX finds the others itself: Cloud
    TPU, Slurm, Open MPI, Kubernetes), or the first host's address and a free port there, host:port; default: one host
    """
    num_processes: int | None = None
    """beside host:port: how many processes there are"""
    process_id: int | None = None
    """beside host:port: which of them this is, from 0; the first has 0, and alone logs and writes"""

    def __post_init__(self):
        address, among = self.coordinator, (self.num_processes, self.process_id)
        fits = address in (None, "auto") or bool(re.fullmatch(r"\S+:\d+", address))
        require(fits, "runtime.coordinator", address, "auto, or the address of the first host, host:port")
        if address in (None, "auto"):
            require(among == (None, None), "runtime.num_processes, process_id", among, "a coordinator host:port")
            return
        count, own = among
        fits = count is not None and own is not None and 0 <= own < count
        expected = "the number of processes, and this one's from 0 up to it, beside runtime.coordinator"
        require(fits, "runtime.num_processes, process_id", among, expected)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run; configs/ holds examples, and the README says how fields are overridden."""

    backbone: BackboneSection = field(default_factory=BackboneSection)
    adapter: Any = field(default_factory=ParaConfig)
    """a ParaConfig, LoraConfig or Ia3Config; `method` chooses in a file: para | lora | ia3"""
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    sweep: SweepSection = field(default_factory=SweepSection)
    eval: EvalSection = field(default_factory=EvalSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    profiler: ProfilerSection = field(default_factory=ProfilerSection)
    runtime: RuntimeSection = field(default_factory=RuntimeSection)
    output_dir: str = "runs/run"
    seed: int = 0

    def __post_init__(self):
        require_place("output_dir", self.output_dir)
        if self.output_dir.startswith("~"):
            object.__setattr__(self, "output_dir", str(expanded(self.output_dir)))
        require(0 <= self.seed < 2**32, "seed", self.seed, "a whole number from 0 to 2**32 - 1")
        if self.many:
            require(not (self.data.tenants and self.sweep), "sweep", vars(self.sweep), "nothing beside data.tenants")
            name = "per_device_batch_size" if self.train.batch_size is None else "batch_size"
            rows, of = self.rows_per_tenant, getattr(self.train, name)
            require(of % rows == 0, "train.rows_per_tenant", rows, f"a divisor of train.{name} ({of})")

    @property
    def many(self) -> bool:
        """Whether the run trains many tenants: those of a folder, or the combinations of a sweep."""
        return bool(self.data.tenants or self.sweep)

    @property
    def rows_per_tenant(self) -> int:
        """train.rows_per_tenant, or its default."""
        alone = self.train.batch_size or self.train.per_device_batch_size
        return self.train.rows_per_tenant or (4 if self.data.tenants else alone)

    @property
    def tenant_batch(self) -> int:
        """Rows of one optimiser step of one tenant, in a run of many."""
        return self.rows_per_tenant * (1 if self.train.batch_size else self.train.gradient_accumulation_steps)
