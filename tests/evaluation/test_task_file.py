import pytest
from tiny_run import write_rows

from para_jax.evaluation.task_file import named_file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "data" / "test.jsonl", [{"prompt": "a", "completion": "b"}])
    return tmp_path


@pytest.mark.parametrize(("text", "task", "file", "metric"), [
    ("data", None, "data/test.jsonl", None),
    ("data/test.jsonl", None, "data/test.jsonl", None),
    ("sst2=data", "sst2", "data/test.jsonl", None),
    ("boolq=data/test.jsonl:f1", "boolq", "data/test.jsonl", "f1"),
])  # fmt: skip
def test_a_file_is_named_with_its_task_and_metric(folder, text, task, file, metric):
    found = named_file(text, "test")
    assert (found.task, str(found.file), found.metric) == (task, file, metric)


def test_a_word_may_be_a_task_of_lm_eval(folder):
    assert named_file("hellaswag", "test") is None


@pytest.mark.parametrize(("text", "said"), [
    ("data/tset.jsonl", r"data/tset.jsonl.*no such file.*did you mean data/test.jsonl\?"),
    ("sst2=data/tset.jsonl:f1", r"no such file.*did you mean data/test.jsonl\?"),
    ("songs=data", "'songs'.*sst2"),
    ("data:acc", "did you mean accuracy"),
    ("data:blue", "f1.*'blue'"),
])  # fmt: skip
def test_a_wrong_part_is_named(folder, text, said):
    with pytest.raises(ValueError, match=said):
        named_file(text, "test")


def test_a_folder_without_the_split_is_named(folder):
    with pytest.raises(ValueError, match="data/validation.jsonl is not a file"):
        named_file("data", "validation")
