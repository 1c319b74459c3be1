"""A folder with a backbone, two adapters and tiny tasks, and what an evaluation of them leaves."""

from functools import partial

import numpy as np
import pytest
from tiny_harness import GROUP, PICK, ROLLING, SAMPLES, WRITE, command
from tiny_run import rows_of_text, strong_adapters, words, write_rows

from para_jax import AdapterBank, Engine, generate, load_adapter, load_backbone, load_tokenizer
from para_jax.cli import main


@pytest.fixture(scope="session", autouse=True)
def no_hub():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A backbone, two strong tenants, two tasks of ours and three of lm-eval."""
    folder = tmp_path_factory.mktemp("many")
    strong_adapters(folder, ["A/adapter", "B/adapter"])
    model = load_backbone(folder / "backbone")
    draw = np.random.default_rng(0)
    texts = [words(draw.integers(20, 250, int(draw.integers(3, 8)))) for _ in range(6)]
    labels = [
        {"prompt": text, "completion": ("w9", "w10 w11")[i % 2], "label": str(i % 2)} for i, text in enumerate(texts)
    ]
    write_rows(folder / "labels" / "test.jsonl", labels)
    free, words_of = rows_of_text(4, 3), load_tokenizer(folder / "backbone")
    own = load_adapter(folder / "A" / "adapter", model.config)
    for row in free[:2]:  # A is right there, and no other
        said = generate(model, [row["prompt"]], tokenizer=words_of, adapters=own, max_new_tokens=16)
        row["references"] = [row["completion"], *said]
    write_rows(folder / "free" / "test.jsonl", free)
    rows = [{"question": text, "choices": ["w9", "w9 w10", "w30 w31"], "label": i % 3, "answer": "w9"}
            for i, text in enumerate(texts)]  # fmt: skip
    file = write_rows(folder / "tasks" / "data.jsonl", rows)
    tagged = PICK.replace("tiny_pick", "labels\ntag: tiny_tag")
    other = PICK.replace("tiny_pick", "tiny_other").replace("num_fewshot: 1", "num_fewshot: 0")
    sampled = WRITE.replace("tiny_write", "tiny_draw").replace("do_sample: false", "do_sample: true, temperature: 1.0")
    again = sampled.replace("tiny_draw", "tiny_redraw")
    files = {"pick": PICK, "write": WRITE, "rolling": ROLLING, "tagged": tagged, "other": other, "group": GROUP}
    files |= {"draw": sampled, "redraw": again, "samples": SAMPLES}
    for name, text in files.items():
        (folder / "tasks" / f"{name}.yaml").write_text(text.format(file=file))
    return folder


@pytest.fixture
def few_files(monkeypatch):
    """Without lm-eval's ten thousand task files, which are read in seconds."""
    from lm_eval.tasks import TaskManager

    from para_jax.evaluation.harness import tasks as harness_tasks

    monkeypatch.setattr(harness_tasks, "TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture(scope="session")
def whole(folder, tmp_path_factory):
    """The output of a run that was not disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(folder, output)) == 0
    return output


@pytest.fixture(scope="session")
def harness(folder):
    """simple_evaluate of lm-eval on the tiny tasks, with few files to index."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    def run(lm, *tasks, **options):
        return simple_evaluate(lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)

    return run


@pytest.fixture(scope="session")
def engine(folder):
    model = load_backbone(folder / "backbone")
    bank = AdapterBank.holding({n: load_adapter(folder / n / "adapter", model.config) for n in "AB"}, model.config)
    return Engine(model, bank, load_tokenizer(folder / "backbone"), slots=4, max_length=64)
