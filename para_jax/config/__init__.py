"""Frozen dataclasses for models, adapters and runs, and `load_config`, which makes a run of a YAML file and
overrides."""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .. import atomic
from ..storage import bucket as storage
from ..storage.bucket import BucketPath
from ..yaml_text import MAX_LENGTH, parse_yaml

#: The linear layers whose output an adapter may change, named as Hugging Face names them, always in this order.
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: Linears of Phi-3 that hold several sites, in the order of their rows.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


# --------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """One rotary embedding (arXiv:2104.09864, rotate-half form): how fast each of the first `dims` of a head turns."""

    dims: int
    theta: float = 10000.0
    scaling: str = "none"
    """none | linear (all frequencies / factor) | llama3 (only the low ones)"""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What may differ from layer to layer: the rotary embedding, and the window in tokens (None: full attention)."""

    rotary: RotaryConfig
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer. The families of backbone/families.py differ only by these values."""

    model_type: str
    vocab_size: int
    width: int
    hidden_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kinds: tuple[LayerKind, ...]
    """one a layer"""
    max_positions: int = 4096
    activation: str = "silu"
    """silu | gelu (erf) | gelu_tanh | relu"""
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    """norms multiply by (norm_offset + weight); 1 in the Gemma families"""
    pre_norm: bool = True
    post_norm: bool = False
    """norms on the outputs of attention and feed-forward, before they join the residual stream"""
    qk_norm: str = "none"
    """none | head (over each head) | projection (over all heads at once)"""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float = 1.0
    """query times key times this"""
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    tied_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.kinds)

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def site_width(self, site: str) -> int:
        """The width of a site's output."""
        return {
            "q_proj": self.q_width,
            "k_proj": self.kv_width,
            "v_proj": self.kv_width,
            "o_proj": self.width,
            "gate_proj": self.hidden_width,
            "up_proj": self.hidden_width,
            "down_proj": self.width,
        }[site]

    def site_axis(self, site: str) -> str:
        """The name of the axis of a site's output, for sharding.py."""
        return {
            "q_proj": "heads",
            "k_proj": "kv_heads",
            "v_proj": "kv_heads",
            "o_proj": "width",
            "down_proj": "width",
        }.get(site, "hidden")

    def site_input_width(self, site: str) -> int:
        """The width of a site's input."""
        return {"o_proj": self.q_width, "down_proj": self.hidden_width}.get(site, self.width)

    def site_input_axis(self, site: str) -> str:
        """The name of the axis of a site's input."""
        return {"o_proj": "heads", "down_proj": "hidden"}.get(site, "width")


# ------------------------------------------------------------------------------------------------------------- adapter


@dataclass(frozen=True, kw_only=True)
class ParaConfig:
    """PARA (arXiv:2502.01033). r = 12 is the only rank that gives the paper's 8.9M parameters on LLaMA-2 7B
    [derived]."""

    r: int = 12
    pooler: str = "last"
    """last | mean | max | constant (a learned vector a layer instead of the prompt's state: the control that shows what
    reading the prompt is worth) [our choice: all four]"""
    summary: str = "raw"
    """raw | rms | standardised [our choice: all three]"""
    activation: str = "gelu"
    """gelu (erf) | gelu_tanh | silu | relu | identity | rational"""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "up_proj")
    layers_to_transform: tuple[int, ...] | None = None
    """the layers that have a generator, counted from 0; None: all [our choice]"""

    POOLERS: typing.ClassVar = ("last", "mean", "max", "constant")
    SUMMARIES: typing.ClassVar = ("raw", "rms", "standardised")
    ACTIVATIONS: typing.ClassVar = ("gelu", "gelu_tanh", "silu", "relu", "identity", "rational")

    def __post_init__(self):
        require(isinstance(self.r, int) and self.r >= 1, "r", self.r, "a whole number of at least 1")
        require(self.pooler in self.POOLERS, "pooler", self.pooler, one_of(self.POOLERS))
        require(self.summary in self.SUMMARIES, "summary", self.summary, one_of(self.SUMMARIES))
        require(self.activation in self.ACTIVATIONS, "activation", self.activation, one_of(self.ACTIVATIONS))
        require_sites(self)
        if self.layers_to_transform is not None:
            require_layers(self)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (arXiv:2106.09685), with the names and defaults of Hugging Face PEFT."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    """scale by lora_alpha / sqrt(r) (arXiv:2312.03732) instead of lora_alpha / r"""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        require(isinstance(self.r, int) and self.r >= 1, "r", self.r, "a whole number of at least 1")
        require(0 < self.lora_alpha < float("inf"), "lora_alpha", self.lora_alpha, "a number above 0")
        require_sites(self)

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


@dataclass(frozen=True, kw_only=True)
class Ia3Config:
    """(IA)^3 (arXiv:2205.05638), with the names and defaults of Hugging Face PEFT."""

    target_modules: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    feedforward_modules: tuple[str, ...] = ("down_proj",)
    """the targets whose input is scaled, not their output: down_proj, where it is a target, or none"""

    def __post_init__(self):
        require_sites(self)
        scaled = tuple(self.feedforward_modules)
        require(set(scaled) <= {"down_proj"}, "feedforward_modules", scaled, "down_proj or none")
        object.__setattr__(self, "feedforward_modules", tuple(s for s in scaled if s in self.target_modules))


def require_sites(config) -> None:
    """Checks `target_modules` and puts it into the order of SITES."""
    sites = tuple(config.target_modules)
    require(
        bool(sites) and set(sites) <= set(SITES), "target_modules", sites, "a non-empty part of " + ", ".join(SITES)
    )
    object.__setattr__(config, "target_modules", tuple(site for site in SITES if site in sites))


def require_layers(config) -> None:
    """Checks `layers_to_transform` and makes it a tuple."""
    given = config.layers_to_transform
    layers = tuple(given) if isinstance(given, (tuple, list, range)) else ()
    rise = all(type(i) is int and i >= 0 for i in layers) and layers == tuple(sorted(set(layers)))
    expected = "None (all layers), or whole numbers of at least 0 that rise, such as (20, 21, 22)"
    require(bool(layers) and rise, "layers_to_transform", given, expected)
    object.__setattr__(config, "layers_to_transform", layers)


#: The adapter methods and their configs. A new method is one line here and one file in adapters/.
ADAPTER_CONFIGS = {"para": ParaConfig, "lora": LoraConfig, "ia3": Ia3Config}
#: The kernels for attention of whole sequences.
ATTENTION = ("auto", "plain", "splash", "cudnn")


# ----------------------------------------------------------------------------------------------------------------- run


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


# Fields whose override is taken as it stands (OmegaConf would read "{output}" as a mapping), with \n for a newline.
TEXT_FIELDS = ("data.prompt", "data.completion")


def load_config(file: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """A RunConfig from a YAML file (None: the defaults) and overrides such as "train.learning_rate=3e-3". An override
    of adapter.method drops what the file says of the other method's fields.

    Raises ValueError, naming the field and the nearest known one, for an unknown key, a wrong type or a bad value.
    """
    given = {} if file is None else read_yaml(expanded(file))
    changes: dict = {}
    for text in overrides:
        changes = merged(changes, parse_override(text))
    if method_of(changes) not in (None, method_of(given) or "para"):
        given.pop("adapter", None)  # whose fields are another method's
    run = merged(given, changes)
    adapter = run.get("adapter", {})
    require(isinstance(adapter, dict), "adapter", adapter, "a mapping, such as {method: para, r: 12}")
    method = adapter.get("method", "para")
    require(method in tuple(ADAPTER_CONFIGS), "adapter.method", method, one_of(ADAPTER_CONFIGS))
    run["adapter"] = {name: value for name, value in adapter.items() if name != "method"}
    template = RunConfig(adapter=ADAPTER_CONFIGS[method]())
    require_readable(run, template)
    schema = OmegaConf.structured(template)
    unfreeze(schema)
    try:
        found = OmegaConf.merge(schema, hidden(run))
    except (OmegaConfBaseException, TypeError, ValueError, IndexError, AssertionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        key = getattr(error, "full_key", None)
        said = f"{key}: {lines[0]}" if key else lines[0]
        raise ValueError(f"config{f' {file}' if file else ''}: {printable(shown(said))}") from None
    return to_dataclass(found, template)


def merged(below: dict, above: dict, section: str = "") -> dict:
    """The fields of both; where both have one, `above` wins, and sections are merged."""
    joined = below | above
    for name in below.keys() & above.keys():
        low, high = below[name], above[name]
        if isinstance(high, dict) and low is not None:
            require(isinstance(low, dict), f"{section}{name}", low, "a mapping of fields")
            joined[name] = merged(low, high, f"{section}{name}.")
    return joined


def method_of(given: dict) -> Any:
    """What a file or overrides say of adapter.method."""
    adapter = given.get("adapter")
    return adapter.get("method") if isinstance(adapter, dict) else None


def save_config(config: RunConfig, file: str | Path) -> None:
    """Writes a config as YAML that `load_config` reads back to an equal one; what is there before stays whole."""
    text = yaml.dump(config_dict(config), Dumper=Quoting, sort_keys=False, allow_unicode=True)
    atomic.write_text(expanded(file), text)


class Quoting(yaml.SafeDumper):
    """Quotes texts such as 1e3 too, which OmegaConf reads as numbers, unlike PyYAML."""


def quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


Quoting.add_representer(str, quoted)


def config_dict(config: RunConfig) -> dict[str, Any]:
    """A config as plain dictionaries, lists and scalars, with `adapter.method`."""
    plain = _plain(dataclasses.asdict(config))
    return plain | {"adapter": {"method": adapter_method(config.adapter)} | plain["adapter"]}


def adapter_method(config) -> str:
    """The name under which an adapter config stands in ADAPTER_CONFIGS."""
    return next(name for name, kind in ADAPTER_CONFIGS.items() if kind is type(config))


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raises the ValueError that names a wrong value and says what was expected."""
    if not holds:
        raise ValueError(f"{name}: {shorten(value, 200)} is not possible; expected {expected}")


def shorten(value: object, width: int = 80) -> str:
    """A value as an error shows it: bounded, and without raw control characters."""
    try:
        text = repr(value[: width + 1] if isinstance(value, str) else value)
    except (RecursionError, ValueError):  # nested too deep; a number of too many digits
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= width else text[: width - 3] + "..."


def printable(text: str, width: int = 500) -> str:
    """A text of others in one line: bounded, and what a terminal could act on written out, as in \\x1b."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: width + 1])
    return text if len(text) <= width else text[: width - 3] + "..."


def require_place(name: str, path: str | None) -> None:
    """Raises the ValueError for an address that is neither a path nor gs://bucket/folder."""
    try:
        storage.address(path or "")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


#: Characters of a path.
LONGEST_PATH = 2000


def expanded(path: str | Path | BucketPath) -> Any:
    """The path with ~ and ~user replaced; a storage.BucketPath for gs://bucket/folder.

    Raises ValueError for a user who is not known here, for another address, and for a text that no file system has as a
    path: of more than LONGEST_PATH characters, with NUL or half a character.
    """
    text = str(path)
    if len(text) > LONGEST_PATH:
        raise ValueError(f"{shorten(text)}: {len(text)} characters; expected a path, which has {LONGEST_PATH} at most")
    if "\0" in text or not text.isascii() and any("\ud800" <= c <= "\udbff" for c in text):
        raise ValueError(f"{shorten(text)}: expected a path, which has neither NUL nor half a character")
    if (found := storage.address(path)) is not None:
        return found
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{printable(text)}: no such home folder; give the path itself") from None


def one_of(names) -> str:
    return "one of " + ", ".join(names)


def read_yaml(file: Path) -> dict:
    if file.is_dir():
        raise ValueError(f"config {file}: a folder; expected a .yaml file, such as the config.yaml of a run's folder")
    if not file.is_file():
        raise ValueError(f"config {file}: no such file")
    try:
        with file.open("rb") as stream:  # of any size
            read = parse_yaml(str(stream.read(4 * MAX_LENGTH + 1), "utf-8")) or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"config {file}: not text: {error}") from None
    except ValueError as error:
        raise ValueError(f"config {file}: {printable(str(error))}") from None
    if not isinstance(read, dict):
        raise ValueError(f"config {file}: a run is a mapping of sections (backbone, adapter, data, train, ...)")
    return read


def parse_override(text: str) -> dict:
    """The fields that an override sets, as nested dictionaries."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise ValueError(f"override {shorten(text)}: expected section.field=value, such as train.learning_rate=3e-3")
    try:
        found = value.replace("\\n", "\n") if key in TEXT_FIELDS else parse_yaml(value)
    except ValueError as error:
        raise ValueError(f"override {shorten(text)}: not YAML: {printable(str(error))}") from None
    for name in reversed(key.split(".")):
        found = {name: found}
    return found


def hidden(value: Any) -> Any:
    """The values with their texts written so that OmegaConf takes none of them for a reference (`${...}`, to the
    environment even) or for a missing value (???)."""
    if isinstance(value, dict):
        return {hidden(name): hidden(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [hidden(inner) for inner in value]
    if not isinstance(value, str):
        return value
    text = value.replace(MARK, MARK + "m").replace("${", f"${MARK}{{")
    return MARK + text if text == "???" else text


def shown(value: Any) -> Any:
    """A text as it was before `hidden`."""
    if not isinstance(value, str):
        return value
    return re.sub(f"{MARK}(m?)", lambda found: MARK if found[1] else "", value)


#: Of Unicode's private use: no text means it.
MARK = "\ue000"


def require_readable(given: Any, template, section: str = "") -> None:
    """Refuses a YAML boolean (yes, no, true ...) where a text is meant, which would become "True", and what is not a
    number in a list of numbers, which OmegaConf's error would not name."""
    for f in dataclasses.fields(template):
        value = given.get(f.name) if isinstance(given, dict) else None
        for kind, wanted in ((int, "whole numbers"), (float, "numbers")):
            if isinstance(value, list) and f.type in (tuple[kind, ...], tuple[kind, ...] | None):
                wrong = [v for v in value if not reads_as(kind, v)]
                require(not wrong, section + f.name, wrong, f"a list of {wanted}")
        if isinstance(value, list):
            wrong = [v for v in value if isinstance(v, list | dict)]
            require(not wrong, section + f.name, wrong, "texts or numbers in the list, no lists and mappings")
        if dataclasses.is_dataclass(getattr(template, f.name)):
            require_readable(value, getattr(template, f.name), f"{f.name}.")
        elif f.type is bool and isinstance(value, int | float):
            require(value in (0, 1), section + f.name, value, "true or false")
        elif f.type is not bool and any(isinstance(v, bool) for v in (value if isinstance(value, list) else [value])):
            raise ValueError(
                f"{section}{f.name}: {shorten(value)} is a truth value in YAML; "
                'quote the text, such as \'["yes", "no"]\''
            )


def reads_as(kind: type[int] | type[float], value: Any) -> bool:
    """Whether OmegaConf takes the value for such a number."""
    if not isinstance(value, (str, int, kind)):
        return False
    try:
        kind(value)
    except ValueError:
        return False
    return True


def unfreeze(node: DictConfig) -> None:
    """Lets a merge write into the nodes of frozen dataclasses, which OmegaConf marks read-only."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        if OmegaConf.is_dict(node[key]):
            unfreeze(node[key])


def to_dataclass(node, template) -> Any:
    """The frozen dataclass with a node's values, lists as tuples; __post_init__ checks each section."""
    values = {}
    for f in dataclasses.fields(template):
        value = node[f.name]
        if isinstance(value, DictConfig):
            value = to_dataclass(value, getattr(template, f.name))
        elif OmegaConf.is_config(value):
            value = tuple(map(shown, value))
        values[f.name] = shown(value)
    return type(template)(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


# OmegaConf 2.4 reads `int | None` only where the annotation is a type, not a string; resolve the strings once.
for _section in (
    BackboneSection,
    DataSection,
    TrainSection,
    SweepSection,
    EvalSection,
    MeshSection,
    CheckpointSection,
    LoggingSection,
    ProfilerSection,
    RuntimeSection,
    ParaConfig,
    LoraConfig,
    Ia3Config,
    RunConfig,
):
    _hints = typing.get_type_hints(_section)
    for _field in dataclasses.fields(_section):
        _field.type = _hints[_field.name]
