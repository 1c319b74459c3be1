"""Data sets of the real tensorflow_datasets, with the features of the public ones, read without TensorFlow."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.features import ClassLabel, Sequence, Text
from tiny_run import run_folder, words, write_rows
from tiny_tfds import Written, built

from para_jax import cli
from para_jax.config import DataSection
from para_jax.data import tfds as prepared
from para_jax.data.records import load_records, read_records
from para_jax.data.sources import open_split, task_of
from para_jax.data.tfds import prepare

TEXT = "Köln was founded in 38 BC,\nas “Ara Ubiorum”. "


def texts(*names):
    return {name: Text() for name in names}


def labels(*names):
    return {"label": ClassLabel(names=names), "idx": np.int32}


ANSWERS = Sequence({"text": Text(), "answer_start": np.int32})
# The features of the public builders (tensorflow_datasets 4.9), and rows of the same fields as JSON.
PUBLIC = {
    "super_glue/boolq": texts("question", "passage") | labels("False", "True"),
    "super_glue/copa": texts("premise", "choice1", "choice2", "question") | labels("choice1", "choice2"),
    "super_glue/rte": texts("premise", "hypothesis") | labels("entailment", "not_entailment"),
    "glue/sst2": texts("sentence") | labels("negative", "positive"),
    "glue/rte": texts("sentence1", "sentence2") | labels("entailment", "not_entailment"),
    "squad/v1.1": {"id": np.str_, "answers": ANSWERS} | texts("title", "context", "question"),
    "bool_q": {"answer": np.bool_} | texts("question", "passage", "title"),
}


def public_rows(name, count, *, hidden=False):
    """Rows of a public data set; `hidden`: with the label -1, as in the test splits of GLUE and SuperGLUE."""

    def value(feature, field, i):
        if feature is ANSWERS:
            return {"text": [f"Köln {i}", "Ara"], "answer_start": [i, 20]}
        if isinstance(feature, ClassLabel):
            return -1 if hidden else i % 2
        if feature in (np.int32, np.bool_):
            return i % 2 if feature is np.bool_ else i
        return f"{field} {i}: {TEXT}"

    made = [{field: value(feature, field, i) for field, feature in PUBLIC[name].items()} for i in range(count)]
    return [row | ({"answer": bool(row["answer"])} if name == "bool_q" else {}) for row in made]


def public_splits(name):
    known = {"train": public_rows(name, 23), "validation": public_rows(name, 5)}
    hides = name.startswith(("glue", "super_glue"))
    return known | ({"test": public_rows(name, 7, hidden=True)} if hides else {})


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for name, features in PUBLIC.items():
        built(name, features, public_splits(name), folder, config=(name.split("/") + [None])[1])
    return str(folder)


def section(data_dir, train, **fields):
    return DataSection(train=train, data_dir=str(data_dir), **fields)


def without_places(records):
    return sorted(record[:4] for record in records)


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", PUBLIC)
def test_a_prepared_data_set_reads_like_its_json_lines(data_dir, tmp_path, name, split="train"):
    ours = section(data_dir, f"tfds:{name}")
    file = write_rows(tmp_path / "data.jsonl", public_splits(name)[split])
    found = load_records(ours, split)
    assert without_places(found) == without_places(read_records(file, task=task_of(ours)))
    assert {record.place for record in found} == {f"tfds:{name}:{split}[{i}]" for i in range(len(found))}


def test_other_data_sets_are_read_by_the_user_s_templates(tmp_path):
    rows = [{"title": f"t{i} ä", "n": i, "body": f"b{i}"} for i in range(4)]
    built("news", texts("title", "body") | {"n": np.int64}, {"train": rows}, tmp_path)
    found = load_records(section(tmp_path, "tfds:news", prompt="{n}. {title}\n", completion="{body}"), "train")
    assert sorted(r[:2] for r in found) == [(f"{i}. t{i} ä\n", f"b{i}") for i in range(4)]
    with pytest.raises(ValueError, match=r"tfds:news:train\[0\]: .*'prompt'.*data.prompt"):
        load_records(section(tmp_path, "tfds:news"), "train")


def test_templates_and_data_task_override_the_task_of_a_name(data_dir):
    own = section(data_dir, "tfds:glue/sst2", prompt="{sentence}", completion="{label}")
    assert {record.completion for record in load_records(own, "train")} == {"0", "1"} and task_of(own) is None
    assert task_of(section(data_dir, "tfds:glue/rte", task="sst2")) == "sst2"
    assert task_of(section(data_dir, "tfds:glue/rte")) == "rte" and task_of(DataSection(train="data/rte")) is None


def test_a_named_part_of_a_split_implies_no_other_split(data_dir):
    parts = section(data_dir, "tfds:squad:train[:15]", validation="tfds:squad:train[15:]")
    train, validation = load_records(parts, "train"), load_records(parts, "validation")
    assert (len(train), len(validation)) == (15, 8)
    assert without_places(train + validation) == without_places(load_records(section(data_dir, "tfds:squad"), "train"))
    assert open_split(section(data_dir, "tfds:squad:train[:15]"), "validation") is None


def test_a_test_split_with_hidden_labels_becomes_validation(data_dir):
    assert open_split(section(data_dir, "tfds:glue/sst2"), "test") is None
    for name in ("glue/sst2", "squad"):  # one hides its labels, one has no test split
        asked = section(data_dir, f"tfds:{name}", test=f"tfds:{name}")
        assert load_records(asked, "test") == load_records(asked, "validation")
    with pytest.raises(ValueError, match=r"tfds:glue/sst2:test\[0\]: label .*-1"):
        load_records(section(data_dir, None, test="tfds:glue/sst2:test", task="sst2"), "test")


def test_validation_data_with_hidden_labels_is_left_out_with_one_warning(tmp_path, capsys):
    known, hidden = public_rows("glue/sst2", 3), public_rows("glue/sst2", 2, hidden=True)
    built("glue", PUBLIC["glue/sst2"], {"train": known, "validation": hidden}, tmp_path, config="sst2")
    assert [load_records(section(tmp_path, "tfds:glue/sst2"), "validation") for _ in range(2)] == [None, None]
    said = "tfds:glue/sst2:validation: its labels are hidden (-1), so it is left out"
    assert capsys.readouterr().err.count(said) == 1


def test_the_newest_version_is_read(tmp_path):
    for version, count in (("2.9.0", 1), ("2.10.0", 2), ("1.11.11", 3)):
        rows = public_rows("bool_q", count)
        built("bool_q", PUBLIC["bool_q"], {"train": rows}, tmp_path, version=version)
    (tmp_path / "bool_q" / "3.0.0").mkdir()  # what a stopped `prepare` leaves is no version
    assert len(load_records(section(tmp_path, "tfds:bool_q"), "train")) == 2


@pytest.mark.long
def test_showing_data_never_imports_tensorflow(data_dir, tmp_path):
    stub = tmp_path / "site" / "tensorflow" / "__init__.py"
    stub.parent.mkdir(parents=True)
    stub.write_text("__version__ = '2.99.0'\n")
    (tmp_path / "run.yaml").write_text("{}")
    fields = ["data.train=tfds:super_glue/boolq", f"data.data_dir={data_dir}"]
    fields += [f"backbone.source={run_folder(tmp_path / 'run') / 'backbone'}"]
    code = (
        "import sys; from importlib.util import find_spec; from para_jax import cli\n"
        f"code = cli.main(['inspect', {str(tmp_path / 'run.yaml')!r}, '--data', *{fields!r}])\n"
        "print(code, find_spec('tensorflow') is not None, 'tensorflow' in sys.modules, 'array_record' in sys.modules)"
    )
    path = os.pathsep.join([str(stub.parents[1]), str(Path(cli.__file__).parents[2]), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.stdout.splitlines()[-1:] == ["0 True False True"], run.stderr
    assert "tfds:super_glue/boolq:train[0]" in run.stdout and "23 examples" in run.stdout


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tfds:", "'tfds:'.*tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:SPLIT"),
        ("tfds:squad/../../x", r"squad/\.\./\.\./x.*tfds:NAME"),
        ("tfds:squad:nothing", "Unknown split 'nothing'.*train"),
        (
            "tfds:super_glue",
            "several configs .*super_glue; .*tfds:super_glue/boolq, tfds:",
        ),
    ],
)
def test_a_wrong_tfds_source_is_an_error_that_lists_the_choices(data_dir, source, message):
    with pytest.raises(ValueError, match=message):
        load_records(section(data_dir, source), "train")


def test_unprepared_data_is_one_line_with_folder_and_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "run.yaml").write_text("backbone: {source: " + str(run_folder(tmp_path / "made") / "backbone") + "}\n")
    train = ["train", str(tmp_path / "run.yaml"), "data.train=tfds:super_glue/boolq"]
    train += [f"output_dir={tmp_path / 'out'}", "runtime.allow_cpu=true", "runtime.compilation_cache=false"]
    assert cli.main([*train, f"data.data_dir={tmp_path}/my data"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"para-jax: error: tfds:super_glue/boolq is not prepared in {tmp_path}/my data/super_glue/boolq; "
        f"prepare it first: `para-jax prepare tfds:super_glue/boolq --data-dir '{tmp_path}/my data'`"
    )
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "default"))
    assert cli.main(train) == 2
    assert f"{tmp_path}/default/super_glue/boolq; prepare it first: `para-jax prepare tfds:super_glue/boolq`" in (
        capsys.readouterr().err
    )
    assert cli.main([*train, "--dry-run"]) == 0  # which needs no data
    assert "data       tfds:super_glue/boolq is not prepared in" in capsys.readouterr().out
    assert not (tmp_path / "out").exists() and not (tmp_path / "default").exists()


def as_tfrecord(folder):
    """Marks a prepared data set as tensorflow_datasets marks one that it wrote as TFRecord."""
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    for file in folder.glob("*.array_record*"):
        file.rename(file.with_name(file.name.replace("array_record", "tfrecord")))


def test_tfrecord_data_is_an_error_that_says_what_to_do(tmp_path):
    folder = built("bool_q", PUBLIC["bool_q"], {"train": public_rows("bool_q", 2)}, tmp_path)
    as_tfrecord(folder)
    with pytest.raises(ValueError) as error:
        load_records(section(tmp_path, "tfds:bool_q"), "train")
    assert str(error.value) == (
        f"tfds:bool_q: {folder} holds tfrecord files, but only array_record can be read without TensorFlow. "
        "Run `para-jax prepare tfds:bool_q --data-dir DIR` with another folder, and set data.data_dir to it"
    )


# ----------------------------------------------------------------------------------------------------------- preparing


class ParaJaxReviews(Written):
    """A data set that needs no download, under tfds:para_jax_reviews."""

    features = texts("prompt", "completion")
    splits = {
        "train": [{"prompt": words([20 + i]), "completion": "w9"} for i in range(6)],
        "test": [{"prompt": "w8", "completion": "w9"}],
    }


class ParaJaxNeedsAPackage(ParaJaxReviews):
    def _generate_examples(self, rows):
        import a_parser.of_old_files  # noqa: F401 # pyright: ignore

        yield from enumerate(rows)


def test_prepare_writes_what_a_run_reads_and_overwrites_nothing(tmp_path, capsys):
    command = ["prepare", "tfds:para_jax_reviews", "--data-dir", str(tmp_path)]
    assert cli.main(command) == 0
    folder = tmp_path / "para_jax_reviews" / "2.0.0"
    use = f"train on them with data.train=tfds:para_jax_reviews data.data_dir={tmp_path}"
    assert capsys.readouterr().out == f"{folder}: train 6, test 1 examples; {use}\n"
    found = load_records(section(tmp_path, "tfds:para_jax_reviews"), "train")
    assert sorted(record.prompt for record in found) == [f"w{20 + i}" for i in range(6)]
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}
    assert cli.main(command) == 0
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tfds:para_jax_needs_a_package", "cannot prepare it: .*No module named .a_parser"),
        ("tfds:para_jax_unheard_of", "cannot prepare it: Dataset para_jax_unheard_of not found"),
    ],
)
def test_what_stops_prepare_is_one_line(tmp_path, capsys, source, message):
    assert cli.main(["prepare", source, "--data-dir", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines()[-1].startswith(f"para-jax: error: {source}: ")
    assert re.search(message, said.err)
    assert not list(tmp_path.rglob("features.json"))


def test_prepare_takes_a_source_with_its_scheme(tmp_path):
    with pytest.raises(ValueError, match="tfds:"):
        prepare("squad", str(tmp_path))
    assert not prepared.is_tfds("squad") and not prepared.is_tfds(None)
