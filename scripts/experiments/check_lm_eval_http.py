"""lm-eval's scores over HTTP, from `para-jax serve`, and those of ParaLM: equal accuracies and texts, log-likelihoods
within 1e-3.

    python scripts/experiments/check_lm_eval_http.py --documents 40

lm-eval's own models `local-completions` and `local-chat-completions` ask for the base model and a LoRA adapter. PARA
adapters read their prompts, so for them `para-completions` also says where each context ends. All adapters have random
weights that move the scores. The tasks are those of check_lm_eval.py, from local files. Needs the extra [check-serve].
"""

import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
from bench_http import serving
from check_lm_eval import LIMIT, MOVED, compare, farthest, put_backbone, strong_lora, taken, write_tasks
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from measure import options

from para_jax import AdapterBank, Engine, ParaConfig, ParaLM, init_adapter, load_backbone, load_tokenizer, log_to_stderr
from para_jax.evaluation.harness import completions as completions  # registers para-completions
from para_jax.io.record_file import write_record
from para_jax.reports.inspect import new_record

MODELS = {"base": "local-completions", "lora": "local-completions"} | dict.fromkeys(
    ("para", "para-response"), "para-completions"
)


def main():
    parser = options(__doc__, "results/check_lm_eval_http.json")
    parser.add_argument("--documents", type=int, default=40)
    args = parser.parse_args()
    log_to_stderr()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        put_backbone(args.backbone, folder / "backbone")
        cases = compared(folder, write_tasks(folder / "tasks", args.documents))
    wrong = [name for name, case in cases.items() if not is_right(case)]
    report = {"limit": LIMIT, "cases": cases, "failed": wrong}
    write_record(args.output, new_record(shlex.join(["python", *sys.argv]), report))
    for name, case in cases.items():
        off = f"largest difference {case['largest_difference']:.1e}"
        print(f"{name:<24}{case['answers']:>5} answers   {off}   {case['scores']}")
    sys.exit(f"failed: {', '.join(wrong)}" if wrong else 0)


def compared(folder: Path, names: list[str]) -> dict:
    """The cases: each tenant on each task."""
    model, tokenizer = load_backbone(folder / "backbone"), load_tokenizer(folder / "backbone")
    adapters = {"lora": strong_lora(model.config)}
    adapters |= {"para": strong_para(model.config), "para-response": strong_para(model.config, scope="response")}
    bank = AdapterBank.holding(adapters, model.config)
    own, served = (Engine(model, bank, tokenizer, slots=8, max_length=256, max_logprobs=n) for n in (0, 5))
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    cases, base = {}, {}

    def scored(lm, name: str, arguments: dict | None = None, **options) -> dict:
        options |= dict(task_manager=manager, bootstrap_iters=0)
        results = simple_evaluate(lm, arguments, [name], **options)
        assert results is not None
        return taken(results, name)

    with serving(served) as url:
        for tenant, kind in MODELS.items():
            here = ParaLM(own, None if tenant == "base" else tenant)
            for name in names:
                arguments = {
                    "base_url": f"{url}/v1/completions",
                    "model": tenant,
                    "num_concurrent": 4,
                    "max_retries": 1,
                }
                arguments |= {
                    "tokenizer": str(folder / "backbone"),
                    "tokenized_requests": True,
                    "tokenizer_backend": "huggingface",
                }
                ours, theirs = scored(here, name), scored(kind, name, arguments, batch_size=4)
                case = cases[f"{tenant}: {name}"] = compared_case(ours, theirs)
                if tenant == "base":
                    base[name] = ours
                elif name != names[-1]:  # log-likelihoods; an adapter that moves nothing would agree without being used
                    case["moved"] = farthest(zip(base[name]["answers"], ours["answers"], strict=True))
            chat = {"base_url": f"{url}/v1/chat/completions", "model": tenant, "num_concurrent": 4, "max_retries": 1}
            ours = scored(here, names[-1], apply_chat_template=True)
            theirs = scored("local-chat-completions", names[-1], chat, apply_chat_template=True)
            cases[f"{tenant}: chat"] = compared_case(ours | {"contexts": []}, theirs | {"contexts": []})
    return cases


def compared_case(ours: dict, theirs: dict) -> dict:
    case = compare(ours, theirs)
    return case | {"scores_over_http": case.pop("scores_of_hf")}


def strong_para(config, **fields):
    """A PARA adapter whose random weights move the scores."""
    adapter, draw = init_adapter(ParaConfig(r=4, **fields), config), np.random.default_rng(2)
    for weight in adapter.up.values():
        weight[...] = draw.normal(0, 0.001, weight.shape).astype(np.float32)
    return adapter


def is_right(case: dict) -> bool:
    return case["largest_difference"] <= LIMIT and not case["differs"] and case.get("moved", MOVED) >= MOVED


if __name__ == "__main__":
    main()
