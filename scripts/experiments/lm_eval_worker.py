"""The torch side of check_lm_eval.py, in a process of its own: lm-eval's `hf` model, alone and with PEFT's LoRA.

    python scripts/experiments/lm_eval_worker.py FOLDER TASK...

Scores the tasks of FOLDER/tasks on FOLDER/backbone, alone and with FOLDER/lora. Writes FOLDER/theirs.json: scores,
contexts, answers and versions.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def main(folder: Path, names: list[str]) -> None:
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    made: dict = {"versions": {name: version(name) for name in ("torch", "transformers", "peft", "lm_eval")}}
    for who, peft in {"base": {}, "lora": {"peft": str(folder / "lora")}}.items():
        arguments = {"pretrained": str(folder / "backbone"), "dtype": "float32", **peft}
        made[who] = {}
        for name in names:
            options = dict(batch_size=8, device="cpu", task_manager=manager, bootstrap_iters=0)
            results = simple_evaluate("hf", arguments, [name], **options)
            scores = {key: value for key, value in results["results"][name].items() if key.endswith(",none")}
            samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
            made[who][name] = {
                "scores": {key: value for key, value in scores.items() if "stderr" not in key},
                "contexts": [list(arguments)[0] for sample in samples for arguments in sample["arguments"]],
                "answers": [answer for sample in samples for repeats in sample["resps"] for answer in repeats],
            }
    (folder / "theirs.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
