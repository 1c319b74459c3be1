"""The error for a field that a config lacks: it names the field that was probably meant.

People bring names from Transformers, PEFT, TRL and lm-eval. A table of them says more than the nearest spelling.
"""

import dataclasses
import difflib
from typing import Any

from ..io.checks import printable
from .adapter import ADAPTER_CONFIGS
from .bounds import names_in_files

#: Other names of a field, as other libraries and other words have them.
OTHER_NAMES = {
    "adapter": "peft peft_config lora lora_config para adapters",
    "adapter.alora_invocation_tokens": "invocation_tokens alora_tokens alora",
    "adapter.feedforward_modules": "ffn_modules",
    "adapter.layers_to_transform": "layers",
    "adapter.lora_alpha": "alpha scaling",
    "adapter.method": "type name kind peft_type adapter_type",
    "adapter.pooler": "pool pooling",
    "adapter.r": "rank lora_r lora_rank bottleneck",
    "adapter.scope": "positions acts_on",
    "adapter.scope_window": "window",
    "adapter.target_modules": "targets target modules sites lora_target_modules",
    "adapter.use_rslora": "rslora",
    "backbone": "model base base_model",
    "backbone.attention": "attn attn_implementation flash_attention use_flash_attention",
    "backbone.dtype": "torch_dtype precision fp16 bf16",
    "backbone.quantize": "quantization load_in_8bit load_in_4bit bits int8",
    "backbone.source": "model model_name model_name_or_path base_model base_model_name_or_path pretrained path name id",
    "checkpoint.every": "save_steps save_every save_strategy checkpoint_every checkpointing_steps",
    "checkpoint.keep": "save_total_limit keep_last max_to_keep",
    "data": "dataset datasets",
    "data.completion": "completion_template response answer target output label_column text_target",
    "data.max_seq_length": "max_length max_len length seq_length seq_len sequence_length max_seq_len cutoff_len "
    "block_size model_max_length",
    "data.packing": "pack",
    "data.prompt": "prompt_template template input instruction",
    "data.tenants": "tenants_dir tenant",
    "data.test": "test_file test_data test_dataset",
    "data.train": "train_file train_data train_dataset training dataset dataset_name file files path",
    "data.truncate": "truncation",
    "data.validation": "validation_file validation_data val valid dev eval eval_file eval_data eval_dataset",
    "eval": "evaluation validation",
    "eval.batch_size": "per_device_eval_batch_size eval_batch_size",
    "eval.choices": "labels classes label_list",
    "eval.every": "eval_steps eval_every eval_strategy evaluation_strategy interval steps",
    "eval.limit": "max_eval_samples max_samples",
    "eval.max_new_tokens": "max_tokens generation_max_length",
    "eval.metric": "metrics metric_for_best_model score",
    "eval.patience": "early_stopping early_stopping_patience",
    "logging.every": "logging_steps log_every log_interval",
    "output_dir": "output out out_dir output_path save_dir logging_dir",
    "runtime.allow_cpu": "cpu use_cpu no_cuda",
    "seed": "random_seed data_seed",
    "train": "training trainer training_args training_arguments",
    "train.adam_b1": "adam_beta1 beta1",
    "train.adam_b2": "adam_beta2 beta2",
    "train.adam_eps": "adam_epsilon epsilon eps",
    "train.cache_prompts": "cache prompt_cache cache_prompt prompts_cache",
    "train.gradient_accumulation_steps": "gradient_accumulation grad_accum grad_accumulation accumulation_steps "
    "accumulate_grad_batches",
    "train.learning_rate": "lr rate step_size",
    "train.max_grad_norm": "clip grad_clip gradient_clip gradient_clipping clip_grad_norm gradient_clip_val",
    "train.max_steps": "steps num_steps total_steps max_train_steps num_train_steps iterations max_iters",
    "train.num_epochs": "epoch epochs n_epochs num_train_epochs max_epochs",
    "train.per_device_batch_size": "batch bs per_device_train_batch_size train_batch_size micro_batch_size rows",
    "train.remat": "gradient_checkpointing checkpointing",
    "train.schedule": "scheduler lr_schedule lr_scheduler lr_scheduler_type",
    "train.up_lr_ratio": "loraplus_lr_ratio lora_plus",
    "train.warmup_ratio": "warmup warmup_steps num_warmup_steps warmup_fraction",
    "train.weight_decay": "decay wd l2",
}

#: Where a name that several sections know is looked for first; "" is the config itself.
SECTIONS = ("", "train", "adapter", "data", "backbone", "eval")


def unknown_field(section: str, name: str, template: Any, root: Any, owner: str) -> str:
    """Two lines: the field that is not there, with the one that was meant if that is clear, and the fields there are.

    Args:
        section: where it was given: "train.", or "" for the config itself.
        template, root: the dataclass of the section, and the whole config's.
        owner: what has these fields: "train", or an adapter's method.
    """
    meant = meant_field(section, name, template, root)
    others = [method for method, kind in ADAPTER_CONFIGS.items() if name in names_in_files(kind)]
    advice = f"; did you mean {meant}?" if meant else ""
    if section == "adapter." and others:
        advice = f"; it is one of adapter.method={' and '.join(others)}"
    fields = ", ".join(names_in_files(template))
    return f"{section}{printable(name, 100)}: no such field of {owner}{advice}\nthe fields of {owner} are {fields}"


def meant_field(section: str, name: str, template: Any, root: Any) -> str | None:
    """The dotted name of the field that was probably meant; None if none is near."""
    plain = name.lower().replace("-", "_")
    there = dotted_fields(root)
    found = [field for field, names in OTHER_NAMES.items() if field in there and plain in names.split()]
    found += [field for field in there if field.rpartition(".")[2] == plain]  # right, but in another section
    found.sort(key=lambda field: (*SECTIONS, field.rpartition(".")[0]).index(field.rpartition(".")[0]))
    fields = names_in_files(template)
    own = [section + field.rpartition(".")[2] for field in found if field.rpartition(".")[2] in fields]
    own += [field for field in found if field.rpartition(".")[0] == section.rstrip(".")]
    near = difflib.get_close_matches(plain, fields, n=1, cutoff=0.6)
    named = [f"{section}{one}" for one in near]
    return next(iter([*own, *found, *named]), None)


def dotted_fields(root: Any) -> list[str]:
    """The fields of a config and of its sections: train, train.learning_rate, and so on."""
    names = []
    for field in dataclasses.fields(root):
        value = getattr(root, field.name)
        inner = names_in_files(value) if dataclasses.is_dataclass(value) else []
        inner += ["method"] if field.name == "adapter" else []
        names += [field.name, *(f"{field.name}.{name}" for name in inner)]
    return names
