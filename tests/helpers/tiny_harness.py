"""Tiny tasks of lm-eval, and the command that evaluates two adapters on them and on two tasks of our own."""

import json

PICK = """
task: tiny_pick
dataset_path: json
dataset_kwargs: {{data_files: {{train: {file}, test: {file}}}}}
training_split: train
test_split: test
num_fewshot: 1
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [w77], max_gen_toks: 5, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
GROUP = """
group: tiny_group
task: [tiny_pick, tiny_other]
aggregate_metric_list: [{{metric: acc, aggregation: mean, weight_by_size: true}}]
"""
SAMPLES = """
group: tiny_samples
task: [tiny_draw, tiny_redraw]
"""


def command(folder, output, *more, tasks=("labels", "free", "tiny_pick", "tiny_write"), adapters="AB"):
    tasks = [folder / task if (folder / task).exists() else task for task in tasks]
    adapters = [folder / name / "adapter" for name in adapters]
    return [str(part) for part in (
        "evaluate", "--backbone", folder / "backbone", "--adapters", *adapters, "--tasks", *tasks, "--include-path",
        folder / "tasks", "--output", output, "--rows", 4, "--allow-cpu", "--no-compilation-cache", *more,
    )]  # fmt: skip


def results(output):
    return {name: json.loads((output / f"{name}.json").read_text()) for name in ("base", "A", "B")}


def lines(output):
    return sorted((output / "answers.jsonl").read_text().splitlines())
