"""Parquet, and folders of save_to_disk, read by pyarrow alone: the records of the same JSON lines."""

import json
import sys
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny_tokenizers
from tiny_run import write_rows

from para_jax.config import DataSection
from para_jax.data import token_cache
from para_jax.data.given import with_data
from para_jax.data.records import load_records, read_records
from para_jax.data.row_files import read_rows
from para_jax.data.sources import class_labels_of, source_of
from para_jax.data.training_data import load_training_data

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = [{"prompt": f"Köln\n{i}", "completion": f"w{i}", "references": [f"w{i}", "w"], "label": i} for i in range(5)]


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf cache"))
    datasets.disable_progress_bars()


def saved(tmp_path, kind, rows=ROWS):
    """The rows as data.train, and the place of the first."""
    data, folder = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows), tmp_path / "folder"
    file = tmp_path / "x.parquet"
    if kind == "file":
        data.to_parquet(file)
        return file, f"{file}[0]"
    if kind == "misnamed":
        data.to_parquet(file)
        return file.rename(tmp_path / "x.jsonl"), f"{tmp_path / 'x.jsonl'}[0]"
    if kind == "folder":
        folder.mkdir()
        data.to_parquet(folder / "train.parquet")
        return folder, f"{folder / 'train.parquet'}[0]"
    if kind == "hub":
        (folder / "data").mkdir(parents=True)
        data.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        return folder, f"hf:{folder}::train[0]"
    (data if kind == "dataset" else datasets.DatasetDict(train=data, test=data)).save_to_disk(folder)
    return folder, f"{folder if kind == 'dataset' else folder / 'train'}[0]"


KINDS = ["file", "misnamed", "folder", "hub", "dataset", "dict"]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_give_the_records_of_the_same_json_lines(tmp_path, kind):
    source, place = saved(tmp_path, kind)
    found = load_records(DataSection(train=str(source)), "train")
    same = read_records(write_rows(tmp_path / "same.jsonl", ROWS))
    assert [record[:4] for record in found] == [record[:4] for record in same]
    assert found[0].place == place
    data = load_training_data(DataSection(train=str(source)), tiny_tokenizers.plain())
    assert list(data.places) == [record.place for record in found]
    assert (load_records(DataSection(train=str(source)), "test") is not None) == (kind == "dict")
    if kind in ("dataset", "dict"):
        assert load_records(DataSection(train=f"hf:{source}"), "train") == found


def test_messages_and_nulls_are_read_as_in_json_lines(tmp_path):
    source, _ = saved(tmp_path, "file", [{"messages": CHAT, "x": None}])
    assert read_records(source)[0].completion == "b"
    source, _ = saved(tmp_path, "file", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}])
    with pytest.raises(ValueError, match=r"x.parquet\[1\]: no field 'completion'"):
        read_records(source)


CALLS = [
    [{"type": "function", "function": {"name": "f", "arguments": given}}] for given in ({"city": "Rome"}, {"n": 3})
]
CALLED = [
    {
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": calls}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    for calls in CALLS
]


@pytest.mark.parametrize("kind", ["file", "hub", "dataset", "given"])
def test_fields_that_other_rows_have_are_no_nulls(tmp_path, kind):
    """Arrow gives every struct all fields of its column. A chat template would write them."""
    if kind == "given":
        section = with_data(DataSection(), datasets.Dataset.from_list(CALLED))
    else:
        section = DataSection(train=str(saved(tmp_path, kind, CALLED)[0]))
    found = load_records(section, "train")
    assert [record.prompt for record in found] == [row["prompt"] for row in CALLED]


def test_an_unknown_time_zone_is_named(tmp_path):
    table = pa.table({"prompt": ["a"], "completion": ["b"], "x": pa.array([0], pa.timestamp("us", tz="Nope/Zone"))})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet\[0\].*Nope/Zone"):
        read_records(tmp_path / "x.parquet")


def test_the_token_cache_holds_parquet_and_saved_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "MIN_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokens = tmp_path / "cache" / "para_jax" / "tokens"
    for kind in ("file", "dataset"):
        source, _ = saved(tmp_path, kind)
        first, again = (load_training_data(DataSection(train=str(source)), tiny_tokenizers.plain()) for _ in range(2))
        assert list(first.examples) == list(again.examples) and list(first.places) == list(again.places)
    assert len(list(tokens.glob("*.tokens"))) == 2


def test_images_are_left_out(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "image": {"bytes": b"\xff\x00", "path": "x.png"}}]
    assert len(read_records(saved(tmp_path, "file", rows)[0])) == 1


def section_of(tmp_path, kind, data):
    """A data section whose data.train is this datasets.Dataset: from disk, or from Python."""
    if kind in ("given", "table"):
        return with_data(DataSection(), data if kind == "given" else data.with_format("arrow")[:])
    return DataSection(train=str(saved(tmp_path, kind, data)[0]))


@pytest.mark.parametrize("kind", ["file", "hub", "dataset", "given", "table"])
def test_images_in_lists_and_bytes_are_not_read_unless_they_are_asked_for(tmp_path, kind):
    image, text = datasets.Image(), datasets.Value("string")
    bad = {"bytes": b"\xff\x00", "path": None}  # can't be decoded
    kinds = dict(prompt=text, completion=text, images=datasets.List(image), image=image, x=datasets.Value("binary"))
    row = {"prompt": "a", "completion": "b", "images": [bad], "image": bad, "x": b"\xff"}
    section = section_of(tmp_path, kind, datasets.Dataset.from_list([row], features=datasets.Features(kinds)))
    assert [record[:2] for record in load_records(section, "train")] == [("a", "b")]
    with pytest.raises(ValueError, match="0.*: x is not UTF-8 text"):
        load_records(replace(section, prompt="{x}"), "train")


@pytest.mark.parametrize("kind", ["file", "hub", "dataset", "given", "table"])
def test_a_column_of_json_holds_what_its_texts_say(tmp_path, kind):
    """`load_dataset` makes such columns of JSON lines where the types of rows differ."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": value}} for value in ({"a": 1}, {"b": None})]
    chats = [[*CHAT, CHAT[0], {"role": "tool", "content": "d", "calls": [call]}, CHAT[1]] for call in calls]
    own = datasets.Json()
    features = datasets.Features(messages=datasets.List(own), completion=own, parts={"q": own}, n=own)
    rows = [{"messages": chat, "completion": "yes", "parts": {"q": [1]}, "n": None} for chat in chats]
    section = section_of(tmp_path, kind, datasets.Dataset.from_list(rows, features=features))
    found = [row for _, row in source_of(section, "train").rows()] if kind != "file" else None
    found = found or [row for _, row in read_rows(tmp_path / "x.parquet")]
    assert [{"n": None, **row} for row in found] == rows
    asked = replace(section, prompt="q", completion="{completion}")
    assert {record.completion for record in load_records(asked, "train")} == {"yes"}


def test_a_wrong_json_text_and_a_repeated_column_are_named(tmp_path):
    table = pyarrow.table({"x": pyarrow.array(["1", "{"], pyarrow.json_())})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet\[1\]: .*x is not JSON"):
        list(read_rows(tmp_path / "x.parquet"))
    table = pyarrow.table({"x": pyarrow.array(['{"a": 1, "a": 2}'], pyarrow.json_())})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet\[0\]: x is not JSON: 'a' is there twice"):
        list(read_rows(tmp_path / "x.parquet"))
    twice = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "x.parquet")
    for read in (lambda: read_records(tmp_path / "x.parquet"), lambda: with_data(DataSection(), twice)):
        with pytest.raises(ValueError, match="the column 'prompt' is there twice"):
            read()


def test_what_is_damaged_is_named(tmp_path):
    file, _ = saved(tmp_path, "file")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="x.parquet: not a Parquet file"):
        read_records(file)
    folder, _ = saved(tmp_path, "dataset")
    arrow = next(folder.glob("*.arrow"))
    arrow.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="folder: damaged"):
        load_records(DataSection(train=str(folder)), "train")
    for name in ("../x.arrow", "/etc/passwd", "gone.arrow", 3):
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(ValueError, match="state.json: .* is not a file of the folder"):
            load_records(DataSection(train=str(folder)), "train")


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    file, _ = saved(tmp_path, "file")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"x.parquet: .*pip install 'para_jax\[hf\]'"):
        read_records(file)


@pytest.mark.parametrize(
    "described",
    [b"\xff", b"[]", b"{", b'{"info": 1}', b'{"info": {"features": [1]}}', b'{"info": {"features": {"a": 1}}}'],
)
def test_a_description_of_another_form_tells_of_no_classes(tmp_path, described):
    table = pa.Table.from_pylist([{"a": 1}]).replace_schema_metadata({"huggingface": described})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    section = DataSection(train=str(tmp_path / "x.parquet"), prompt="{a}", completion="{a}")
    assert class_labels_of(tmp_path / "x.parquet") == {} and len(load_records(section, "train")) == 1


# -------------------------------------------------------------------------------------------------------------- splits


@pytest.fixture
def splits(tmp_path):
    """A saved DatasetDict with a row in each split, named for it. The test label is hidden, as in GLUE."""
    names = datasets.ClassLabel(names=["no", "yes"])
    rows = {"train": 0, "validation": 1, "test": -1}
    data = {
        split: datasets.Dataset.from_list([{"prompt": split, "completion": "x", "label": label}]).cast_column(
            "label", names
        )
        for split, label in rows.items()
    }
    made = datasets.DatasetDict(data)
    made.save_to_disk(tmp_path / "folder")
    data["validation"].save_to_disk(tmp_path / "alone")
    return made, tmp_path / "folder"


def prompts(section, split):
    found = load_records(section, split)
    return None if found is None else [record.prompt for record in found]


def test_a_source_that_names_its_split_has_no_other_splits(splits):
    """Its training data would be the validation and the test data too."""
    section = DataSection(train=f"hf:{splits[1]}::train")
    assert [prompts(section, split) for split in ("train", "validation", "test")] == [["train"], None, None]
    section = DataSection(train=f"hf:{splits[1]}::validation", test=f"hf:{splits[1]}::train")
    assert [prompts(section, split) for split in ("train", "validation", "test")] == [["validation"], None, ["train"]]
    made = datasets.DatasetDict(dev=splits[0]["train"])
    made.save_to_disk(splits[1] / "of dev")
    with pytest.raises(ValueError, match="data.train: .* has no split train, but dev; write hf:.*of dev::SPLIT"):
        load_records(DataSection(train=str(splits[1] / "of dev")), "train")
    for wrong in ("train[:50%]", "dev"):
        with pytest.raises(ValueError, match="no split .*; choose one of test, train, validation"):
            load_records(DataSection(train=f"hf:{splits[1]}::{wrong}"), "train")


def test_a_split_with_hidden_labels_is_no_test_data(splits, capsys):
    made, folder = splits
    for source in (str(folder), f"hf:{folder}"):
        section = DataSection(train=source)
        assert [prompts(section, split) for split in ("train", "validation", "test")] == [
            ["train"],
            ["validation"],
            None,
        ]
    assert prompts(DataSection(train=str(folder), test=str(folder)), "test") == ["test"]  # asked for by name
    section = with_data(DataSection(), made)
    assert 'data["test"]: its labels are hidden (-1), so it is left out' in capsys.readouterr().err
    assert [prompts(section, split) for split in ("train", "validation", "test")] == [["train"], ["validation"], None]

    with pytest.raises(ValueError, match=r'data\["test"\] must be .*; got IterableDataset'):
        with_data(DataSection(), {"train": made["train"], "test": made["test"].to_iterable_dataset()})


def test_validation_data_with_hidden_labels_is_left_out_with_one_warning(splits, tmp_path, capsys):
    made = datasets.DatasetDict(train=splits[0]["train"], validation=splits[0]["test"], test=splits[0]["test"])
    made.save_to_disk(tmp_path / "saved")
    (tmp_path / "hub").mkdir()
    for split, rows in made.items():
        rows.to_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    for source, label in (
        (f"{tmp_path}/saved", f"{tmp_path}/saved/validation"),
        (f"hf:{tmp_path}/saved", ""),  # the same split
        (f"{tmp_path}/hub", f"hf:{tmp_path}/hub::validation"),
        (f"hf:{tmp_path}/hub", ""),
    ):
        for _ in range(2):
            found = [prompts(DataSection(train=source), split) for split in ("train", "validation", "test")]
            assert found == [["train"], None, None]
        said = f"warning: {label}: its labels are hidden (-1), so it is left out\n"
        assert capsys.readouterr().err == (said if label else "")


def test_a_data_set_without_splits_is_what_it_is_named_for(splits, tmp_path):
    alone = tmp_path / "alone"
    for source in (str(alone), f"hf:{alone}"):
        assert prompts(DataSection(train="x", validation=source), "validation") == ["validation"]
        section = DataSection(train=source)
        assert prompts(section, "train") == ["validation"] and prompts(section, "validation") is None
    with pytest.raises(ValueError, match="no split 'train\\[:50%\\]'; it is one data set, without splits"):
        load_records(DataSection(train=f"hf:{alone}::train[:50%]"), "train")
