"""lm-eval's scores here and by its `hf` model (torch, PEFT): equal accuracies and texts, log-likelihoods within 1e-3.

    python scripts/experiments/check_lm_eval.py --torch-python /path/to/python-with-torch-peft-and-lm-eval

On --backbone, converted to a Hugging Face folder, alone and with a LoRA adapter of random weights, float32 on a CPU.
The tasks are local files with data made here, no hub is asked: choices of one and of several tokens, contexts that end
with a space, empty contexts (mutual information), few-shot examples, and answers to be written. Both adapters are
answered in one pass here. The torch side (lm_eval_worker.py) needs the extra [bench-lm-eval].
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"

from measure import options

from para_jax import (
    AdapterBank,
    LoraConfig,
    init_adapter,
    load_adapter,
    load_backbone,
    load_tokenizer,
    log_to_stderr,
    save_adapter,
)
from para_jax.backbone.gguf.convert import convert_gguf
from para_jax.evaluation.answers import Answerer
from para_jax.evaluation.harness.tasks import load_tasks, record, replay
from para_jax.io.hub import resolve_backbone
from para_jax.io.record_file import write_record
from para_jax.reports.inspect import new_record
from para_jax.runtime.devices import library_versions

LIMIT, MOVED = 1e-3, 0.1
WORKER = Path(__file__).with_name("lm_eval_worker.py")
PLACES = {"fish": "in the sea", "camel": "in the desert", "cow": "on a farm", "bee": "in a hive", "seal": "on the ice"}
CHOOSE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {file}, test: {file}}}}}
training_split: train
test_split: test
output_type: multiple_choice
num_fewshot: {shots}
doc_to_text: "{text}"
target_delimiter: "{delimiter}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: {other}, aggregation: mean, higher_is_better: true}}
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def main():
    parser = options(__doc__, "results/check_lm_eval.json")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--documents", type=int, default=40)
    args = parser.parse_args()
    log_to_stderr()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        put_backbone(args.backbone, folder / "backbone")
        names = write_tasks(folder / "tasks", args.documents)
        model = load_backbone(folder / "backbone")
        save_adapter(strong_lora(model.config), folder / "lora", base_model=str(folder / "backbone"))
        ours = our_samples(folder, names, model)
        done = subprocess.run([args.torch_python, str(WORKER), str(folder), *names], text=True, capture_output=True)
        if done.returncode:
            sys.exit(f"the torch side failed:\n{done.stderr[-3000:]}")
        theirs = json.loads((folder / "theirs.json").read_text())
    cases = {
        f"{who}: {name}": compare(ours[who][name], theirs[who][name]) for who in ("base", "lora") for name in names
    }
    for name in names[:-1]:  # of log-likelihoods; an adapter that moves nothing would agree without being used
        pairs = zip(ours["base"][name]["answers"], ours["lora"][name]["answers"], strict=True)
        cases[f"lora: {name}"]["moved"] = farthest(pairs)
    report = {
        "versions": library_versions() | theirs["versions"],
        "limit": LIMIT,
        "cases": cases,
        "failed": [
            name
            for name, case in cases.items()
            if not case["largest_difference"] <= LIMIT or case["differs"] or not case.get("moved", MOVED) >= MOVED
        ],
    }
    write_record(args.output, new_record(shlex.join(["python", *sys.argv]), report))
    for name, case in cases.items():
        off = f"largest difference {case['largest_difference']:.1e}"
        print(f"{name:<18}{case['answers']:>5} answers   {off}   {case['scores']}")
    sys.exit(f"failed: {', '.join(report['failed'])}" if report["failed"] else 0)


def put_backbone(source: str, folder: Path) -> None:
    """The backbone as a Hugging Face folder, which lm-eval's tokenizer and `hf` model read."""
    place = resolve_backbone(source)
    if place.is_dir():
        folder.symlink_to(place.resolve())
    else:
        convert_gguf(place, folder, load_tokenizer(source))


def write_tasks(folder: Path, documents: int) -> list[str]:
    """The task files and their data; the names of the tasks."""
    folder.mkdir()
    draw, rows = np.random.default_rng(0), []
    for _ in range(documents):
        animal = str(draw.choice(list(PLACES)))
        count, choices = int(draw.integers(2, 90)), [str(one) for one in draw.permutation(list(PLACES.values()))]
        text = f"There are {count} animals in the picture. One of them is a {animal}. The {animal} lives"
        rows.append({"text": text, "choices": choices, "label": choices.index(PLACES[animal])})
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {
        "plain": dict(shots=0, text="{{text}}", delimiter=" ", other="acc_norm"),
        "space": dict(shots=0, text="{{text}}  ", delimiter="", other="acc_norm"),
        "shots": dict(shots=3, text="{{text}}", delimiter=" ", other="acc_norm"),
        "mutual": dict(shots=0, text="{{text}}", delimiter=" ", other="acc_mutual_info"),
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(CHOOSE.format(name=name, file=file, **task))
    (folder / "write.yaml").write_text(WRITE.format(file=file))
    return [*tasks, "write"]


def strong_lora(config):
    """A LoRA adapter whose random weights move the scores."""
    adapter, draw = init_adapter(LoraConfig(r=8, lora_alpha=16), config), np.random.default_rng(1)
    for weight in adapter.b.values():
        weight[...] = draw.normal(0, 0.01, weight.shape).astype(np.float32)
    return adapter


def our_samples(folder: Path, names: list[str], model) -> dict:
    tokenizer = load_tokenizer(folder / "backbone")
    bank = AdapterBank.holding({"lora": load_adapter(folder / "lora", model.config)}, model.config)
    tasks = load_tasks(names, folder / "tasks", limit=None, fewshot=None, chat=False)
    options = tokenizer, model.config.max_positions
    questions = [
        (who, one) for task in tasks for one in record(task, *options, sampling_seed=0) for who in (None, "lora")
    ]
    answerer = Answerer(model, bank, tokenizer, rows=16)
    answers = dict(zip(questions, answerer.answer(questions), strict=True))
    made = {}
    for who in (None, "lora"):
        each = {
            task.name: replay(
                task, *options, lambda one, who=who: answers[who, one], sampling_seed=0, samples=True
            )  # fmt: skip
            for task in tasks
        }
        made[who or "base"] = {name: taken(found, name) for name, found in each.items()}
    return made


def taken(results: dict, name: str) -> dict:
    """A task's scores, and every answer in the order of the documents."""
    scores = {key: value for key, value in results["results"][name].items() if key.endswith(",none")}
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return {
        "scores": {key: float(value) for key, value in scores.items() if "stderr" not in key},
        "contexts": [list(arguments)[0] for sample in samples for arguments in sample["arguments"]],
        "answers": [answer for sample in samples for repeats in sample["resps"] for answer in repeats],
    }


def farthest(pairs) -> float:
    """The largest difference of log-likelihoods; NaN where one is."""
    return float(np.max([abs(a[0] - b[0]) for a, b in pairs]))


def compare(ours: dict, theirs: dict) -> dict:
    assert ours["contexts"] == theirs["contexts"], "the two sides asked different things"
    pairs = list(zip(ours["answers"], theirs["answers"], strict=True))
    texts = isinstance(ours["answers"][0], str)
    differs = sum(a != b if texts else bool(a[1]) != bool(b[1]) for a, b in pairs)
    return {
        "answers": len(pairs),
        "largest_difference": 0.0 if texts else farthest(pairs),
        "differs": int(differs) + (ours["scores"] != theirs["scores"]),
        "scores": ours["scores"],
        "scores_of_hf": theirs["scores"],
    }


if __name__ == "__main__":
    main()
