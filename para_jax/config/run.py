"""`RunConfig`: one training run, as sections of fields. configs/ holds examples."""

import json
import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from ..io.checks import expanded, require, require_one_of
from .adapter import ADAPTER_CONFIGS, AdapterConfig, ParaConfig
from .bounds import Bounds, Fraction, JsonObject, NonNegativeFloat, PositiveInt, Seed, check_fields
from .template_variables import template_variables

#: The base model's name among tenants: no adapter.
BASE = "base"
#: How the name of a tensorflow_datasets data set begins.
TFDS = "tfds:"
#: Tokens of an example, for estimates without the data.
ASSUMED_LENGTH = 512
#: Metrics of written answers.
AnswerMetric = Literal[
    "exact_match", "macro_f1", "matthews", "squad", "squad_exact", "f1", "final_number", "sql_match"
]  # fmt: skip


def is_tfds(source: str | None) -> bool:
    return source is not None and source.startswith(TFDS)


class Section:
    """What all sections have: their fields are checked."""

    def __post_init__(self):
        check_fields(self, type(self).__name__.removesuffix("Section").lower() + ".")


@dataclass(frozen=True, kw_only=True)
class BackboneSection(Section):
    source: str = "smollm2-135m"
    """a folder, a hub id (user/name or user/name@revision), a .gguf file, or the built-in name smollm2-135m"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """default: float32 on a CPU, else bfloat16"""
    quantize: Literal["int8"] | None = None
    """int8 stores the kernels of the linear layers in one byte per weight; default: in `dtype`"""
    attention: Literal["auto", "plain", "splash", "cudnn"] = "auto"
    """the kernel for whole sequences: splash needs a TPU, cudnn a GPU. auto tries the device's kernel at the start and
    falls back to plain"""


@dataclass(frozen=True, kw_only=True)
class DataSection(Section):
    train: str | None = None
    """a file of JSON lines, CSV (.csv, .tsv) or Parquet; or a folder with such a file for each split: train.jsonl and
    optionally validation.jsonl and test.jsonl; or a folder of Hugging Face datasets; or
    tfds:NAME[/CONFIG], a data set that `para-jax prepare` wrote. A single split: tfds:glue/sst2:train[:90%]; or
    hf:NAME[@REVISION][:CONFIG[:SPLIT]], a folder or a data set of the Hugging Face hub (extra [hf]). "<python>" is
    written by train(config, data=...)"""
    validation: str | None = None
    """as train: what scores are computed on while training"""
    test: str | None = None
    """as train: what the end of a run is scored on"""
    validation_split: Annotated[float, Bounds(above=0, at_most=0.5)] | None = None
    """the share of the training rows to hold out as validation data, if there is none. A conversation is one row"""
    tenants: str | None = None
    """a folder of tenants to train in one run: each sub-folder (as for `train`) and each data file is one. train,
    validation and test are then ignored"""
    data_dir: str | None = None
    """the folder of tfds: data; default: that of tensorflow_datasets (~/tensorflow_datasets)"""
    task: str | None = None
    """a name from data/tasks.py, which sets templates, metric and choices; default: the task of the tfds: name"""
    prompt: str | None = None
    """a template over the columns, such as "{instruction}\\n{input}"; default: the column `prompt`"""
    completion: str | None = None
    """the template of what follows the prompt"""
    chat_template_kwargs: JsonObject | None = None
    """variables of the tokenizer's chat template, for training and evaluation: {enable_thinking: false}. Serve such an
    adapter with the same ones (--chat-template-kwargs)"""
    max_seq_length: Annotated[int, Bounds(at_least=2)] | None = 512
    """the maximum number of tokens of prompt and completion together; null: that of the longest training example, and
    for evaluation the model's positions"""
    truncate: Literal["error", "skip", "left"] = "error"
    """what happens to longer examples; left cuts the start of the prompt. skip and left report how many"""
    buckets: PositiveInt = 3
    """the maximum number of padded lengths that training compiles for"""
    packing: bool = False
    """put several examples into each training row of max_seq_length tokens (`buckets` is then unused). Evaluation keeps
    one example per row"""
    given: Any = field(default=None, repr=False, compare=False, metadata={"in_file": False})
    """the rows that train(config, data=...) was given, by split (data/given.py); never written to a file"""

    def __post_init__(self):
        super().__post_init__()
        variables = template_variables("data.chat_template_kwargs", self.chat_template_kwargs)
        in_order = json.dumps(variables, sort_keys=True, ensure_ascii=False) if variables else None
        object.__setattr__(self, "chat_template_kwargs", in_order)

    @property
    def assumed_length(self) -> int:
        """max_seq_length; 512 for null, where the data is not read."""
        return self.max_seq_length or ASSUMED_LENGTH

    @property
    def assumed(self) -> str:
        """What to say after a number that `assumed_length` gave."""
        return "" if self.max_seq_length else " (assumed: data.max_seq_length=null follows from the data)"


@dataclass(frozen=True, kw_only=True)
class TrainSection(Section):
    learning_rate: Annotated[float | Literal["auto"], Bounds(at_least=0, below=math.inf, words=("auto",))] | None = None
    """default: the rate of the adapter's method (default_learning_rate in config/adapter.py). auto: the best of several
    short trials on the validation data"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """of the learning rate, after the warm-up"""
    warmup_ratio: Fraction = 0.06
    """the share of the steps that warm up"""
    max_steps: PositiveInt | None = None
    """optimiser steps; default: num_epochs passes over the data. An override of num_epochs drops a file's max_steps"""
    num_epochs: Annotated[float, Bounds(above=0, below=1e9)] = 1.0
    """passes over the training data; max_steps wins over it"""
    batch_size: PositiveInt | None = None
    """rows per optimiser step over all devices; the number of forward passes follows from it. Default:
    per_device_batch_size x gradient_accumulation_steps on each of the data x fsdp devices of the mesh, so the step
    grows with the number of devices"""
    per_device_batch_size: PositiveInt = 8
    """rows per forward pass on each of the data x fsdp devices of the mesh; with batch_size: at most this many"""
    gradient_accumulation_steps: PositiveInt = 1
    """forward passes per optimiser step; 1 if batch_size is set"""
    rows_per_tenant: PositiveInt | None = None
    """for many tenants (data.tenants, sweep): rows of each tenant in a pass, a divisor of per_device_batch_size;
    default: 4, in a sweep all rows of a pass, as in a run of its own. With batch_size: rows of each tenant in a step,
    a divisor of batch_size; default: 4, in a sweep batch_size"""
    tenants_at_once: PositiveInt | None = None
    """for many tenants: how many have weights and optimiser state on the devices at once; when one ends, the next takes
    its place; default: all"""
    sampling: Literal["proportional", "sqrt", "uniform"] = "proportional"
    """for many tenants: how often each is in the batch, by its number of examples, its square root, or equally"""
    init_from: str | None = None
    """a trained adapter to start from, instead of a fresh one: its folder or hub id, or the folder of its run. If that
    is a run of many tenants, each tenant starts from its own adapter there. The section `adapter` must describe it"""
    up_lr_ratio: Annotated[float, Bounds(above=0, below=1e9)] = 1.0
    """the learning rate of PARA's W_up [our choice] and LoRA's B, as a multiple of learning_rate, which all other
    weights use (LoRA+, arXiv:2402.12354; loraplus_lr_ratio in PEFT)"""
    bias_lr_ratio: Annotated[float, Bounds(above=0, below=1e9)] = 30.0
    """the learning rate of PARA's biases (adapter.up_bias), as a multiple of learning_rate: by default (IA)^3's
    [our choice]"""
    max_grad_norm: Annotated[float, Bounds(above=0)] = 1.0
    """gradients are clipped to this norm, each tenant's by itself"""
    weight_decay: Annotated[float, Bounds(at_least=0, below=1e9)] = 0.0
    """AdamW's, towards the adapter that changes nothing: (IA)^3's vectors go to 1 (in PEFT to 0), other weights to 0"""
    adam_b1: Fraction = 0.9
    """the decay of Adam's mean"""
    adam_b2: Fraction = 0.999
    """the decay of Adam's mean square"""
    adam_eps: Annotated[float, Bounds(above=0, below=1e9)] = 1e-8
    """what Adam adds to the root"""
    remat: Literal["none", "dots", "block"] = "dots"
    """what the backward pass keeps of a layer: everything (nothing is recomputed), the outputs of the linear layers, or
    only the input of the layer"""
    cache_prompts: Literal["off", "memory"] = "off"
    """with adapter.scope=response: compute the states of each distinct prompt once, and give them to every step"""

    def __post_init__(self):
        super().__post_init__()
        batch, passes = self.batch_size, self.gradient_accumulation_steps
        expected = f"1, because the passes follow from train.batch_size ({batch})"
        require(batch is None or passes == 1, "train.gradient_accumulation_steps", passes, expected)

    @property
    def peak_learning_rate(self) -> float:
        """learning_rate as a number. A section without a RunConfig has no method, and the default of most. Raises
        ValueError for auto before its trials have chosen a rate."""
        return AdapterConfig.default_learning_rate if self.learning_rate is None else float(self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class SweepSection(Section):
    """Every combination of these values is trained on the same data in one run. An empty list: the run's own value."""

    method: tuple[str, ...] = ()
    """adapter methods to compare, such as [para, lora, ia3]: each is a run of its own in output_dir/METHOD, with its
    own defaults and learning rate. adapter.scope and scope_window apply to all of them. The adapter's other fields and
    train.learning_rate apply to adapter.method only"""
    learning_rate: tuple[NonNegativeFloat, ...] = ()
    """the rates to train side by side"""
    seed: tuple[Seed, ...] = ()
    """for the initial weights of an adapter and the order of its examples"""

    def __bool__(self) -> bool:
        """Whether one run trains several combinations. Methods are runs of their own."""
        return bool(self.learning_rate or self.seed)


@dataclass(frozen=True, kw_only=True)
class EvalSection(Section):
    every: PositiveInt = 200
    """steps between two evaluations on the validation data; the last step is always evaluated"""
    metric: Literal["loss", "accuracy", AnswerMetric] | None = None
    """see evaluation/metrics.py; default: the metric of the task. Without a task it is chosen from the training data:
    accuracy where it has 2 to 20 different completions, each at least 4 times on average; loss, and f1 of what is
    written, where completions are free text (more than 10 words on average, nearly all different); else exact_match,
    and f1"""
    also: tuple[AnswerMetric, ...] = ()
    """more metrics of the same answers to report; default: those of the task"""
    choices: tuple[str, ...] = ()
    """the answers that `accuracy` ranks; default: those of the task, else the different completions of the training
    data. macro_f1 and matthews rank them too, if they are given here or by the task; else the label is written"""
    limit: PositiveInt | None = None
    """the maximum number of validation examples to score"""
    batch_size: PositiveInt = 16
    """rows of an evaluation batch over all devices, rounded up to a multiple of mesh.data x mesh.fsdp"""
    max_new_tokens: PositiveInt | None = None
    """the maximum length of a written answer; default: that of the task, else 1.5 times the tokens of the longest
    completion of the training data, 16 to 512"""
    patience: PositiveInt | None = None
    """stop after this many evaluations without a better score, or the same score with a lower loss"""
    test: bool = False
    """score the test data before and after training"""
    test_limit: PositiveInt | None = None
    """the maximum number of test examples to score, before and after training"""
    base: bool = True
    """score the base model before the first step. Without that, tables and model cards have no score of it"""


@dataclass(frozen=True, kw_only=True)
class MeshSection(Section):
    """Devices along each axis. One axis may be -1: all remaining devices. The default uses every device, with as many
    along fsdp as the memory of one device requires."""

    data: int = -1
    """devices that split the rows and hold all weights; -1: all that remain"""
    fsdp: int | None = None
    """null: 1 where the whole run fits one device by its estimate (memory.py), else the smallest size that fits"""
    tensor: int = 1
    """devices that split heads and widths"""


@dataclass(frozen=True, kw_only=True)
class LoggingSection(Section):
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """metrics.jsonl is written in any case"""
    every: PositiveInt = 1
    """steps between two logged steps"""


@dataclass(frozen=True, kw_only=True)
class CheckpointSection(Section):
    every: PositiveInt | None = None
    """steps between two checkpoints, from which the same command resumes; default: eval.every. The last step is always
    saved"""
    keep: PositiveInt = 2
    """how many of the newest checkpoints to keep"""


@dataclass(frozen=True, kw_only=True)
class RuntimeSection(Section):
    compilation_cache: bool = True
    """keep compiled programs in ~/.cache/para_jax"""
    allow_cpu: bool = False
    """run on the CPU even if the machine has an accelerator"""
    deterministic: bool = False
    """on GPUs, use only algorithms that give the same bits each time, so that a resumed run ends with the same bits as
    one that never stopped; slower. CPUs and TPUs always do so"""
    distributed: Literal["auto", "given", "off"] = "auto"
    """who joins the processes of a run on several hosts. auto: this program, where coordinator is set, unless JAX is
    joined already. given: the program that calls para_jax, such as an actor of Ray; JAX's processes and compilation
    cache, and the handlers of signals, stay as that program has set them. off: none, so JAX must have one process"""
    coordinator: str | None = None
    """for a run on several hosts, each started with the same command: auto (JAX finds the others on Cloud TPU, Slurm,
    Open MPI and Kubernetes), or host:port, the address of the first host and a free port there; default: one host"""
    num_processes: int | None = None
    """with host:port: how many processes there are"""
    process_id: int | None = None
    """with host:port: the number of this process, from 0. Only process 0 logs and writes"""
    stopped_exit_code: Annotated[int, Bounds(at_least=0, at_most=255)] = 0
    """the exit code of a run that SIGTERM has stopped. With 143 a scheduler sees that a preempted run has not ended"""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run; configs/ holds examples, and docs/training.md says how fields are overridden."""

    backbone: BackboneSection = field(default_factory=BackboneSection)
    adapter: Any = field(default_factory=ParaConfig)
    """a ParaConfig, LoraConfig or Ia3Config; in a file, `method` chooses it: para, lora or ia3"""
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    sweep: SweepSection = field(default_factory=SweepSection)
    eval: EvalSection = field(default_factory=EvalSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    runtime: RuntimeSection = field(default_factory=RuntimeSection)
    output_dir: str = "runs/run"
    """the run's folder"""
    seed: Seed = 0
    """of weights, data order and drawn answers"""

    def __post_init__(self):
        check_fields(self)
        if self.output_dir.startswith("~"):
            object.__setattr__(self, "output_dir", str(expanded(self.output_dir)))
        for method in self.sweep.method:
            require_one_of(ADAPTER_CONFIGS, "sweep.method", method)
        if self.train.learning_rate is None and not (self.sweep.learning_rate or self.sweep.method):
            rate = self.adapter.default_learning_rate
            object.__setattr__(self, "train", replace(self.train, learning_rate=rate))
        if self.data.tenants and (self.sweep or self.sweep.method):
            raise ValueError("sweep can't be used together with data.tenants; remove one of them")
        if self.train.learning_rate == "auto" and self.sweep:
            raise ValueError("train.learning_rate=auto can't be used together with a sweep; remove one of them")
        where, scope = self.train.cache_prompts, self.adapter.scope
        if where != "off" and scope != "response":
            raise ValueError(f"train.cache_prompts={where} needs adapter.scope=response; got {scope}")
        if self.many:
            name = "per_device_batch_size" if self.train.batch_size is None else "batch_size"
            rows, batch = self.rows_per_tenant, getattr(self.train, name)
            require(batch % rows == 0, "train.rows_per_tenant", rows, f"a divisor of train.{name} ({batch})")

    @property
    def many(self) -> bool:
        """Whether the run trains many tenants: those of a folder, or the combinations of a sweep."""
        return bool(self.data.tenants or self.sweep)

    @property
    def rows_per_tenant(self) -> int:
        """train.rows_per_tenant, or its default."""
        batch = self.train.batch_size or self.train.per_device_batch_size
        return self.train.rows_per_tenant or (4 if self.data.tenants else batch)

    @property
    def tenant_batch(self) -> int:
        """Rows per optimiser step of one tenant, in a run of many."""
        return self.rows_per_tenant * (1 if self.train.batch_size else self.train.gradient_accumulation_steps)
