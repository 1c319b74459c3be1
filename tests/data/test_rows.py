"""Files of each kind, and the folders of save_to_disk, give the records of the same JSON lines."""

import csv
import json
from dataclasses import replace

import datasets
import pytest
import tiny_tokenizers
from tiny_run import write_rows

from para_jax.config import DataSection
from para_jax.data.given import with_data
from para_jax.data.records import load_records, read_records
from para_jax.data.rows import warn_of_hidden
from para_jax.data.sources import open_split
from para_jax.data.training_data import load_training_data

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = [{"prompt": f"Köln\n{i}", "completion": f"w{i}", "references": [f"w{i}", "w"], "label": i} for i in range(5)]


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf cache"))
    datasets.disable_progress_bars()


def prompts(section, split):
    found = load_records(section, split)
    return None if found is None else [record.prompt for record in found]


# ---------------------------------------------------------------------------------------------------------------- JSON


def test_an_array_of_objects_is_read_like_json_lines(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("\ufeff\n" + json.dumps(ROWS, indent=2))
    same = read_records(write_rows(tmp_path / "same.jsonl", ROWS))
    assert [record[:4] for record in read_records(file)] == [record[:4] for record in same]
    data = load_training_data(DataSection(train=str(file)), tiny_tokenizers.plain())
    assert list(data.places) == [record.place for record in read_records(file)] == [f"{file}[{i}]" for i in range(5)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"prompt": "a"', "x.json: not JSON"),
        ("[1]", r"x.json\[0\]: the row is a int"),
        ("[]", "x.json has no rows"),
        ('[{"prompt": "a", "completion": ""}]', r"x.json\[0\]: completion is empty"),
        ("prompt,completion\na,b\n", r"x.json:1: not JSON.*\n.*\.csv"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_item(tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_records(tmp_path / "x.json")


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_another_encoding_is_an_error_and_a_mark_of_utf_8_is_read(tmp_path, ending):
    file, text = tmp_path / f"x{ending}", '{"prompt": "\u00e9", "completion": "b"}\n'
    text = text if ending == ".jsonl" else f"[{text}]"
    file.write_bytes(text.encode("utf-8-sig") * (2 if ending == ".jsonl" else 1))  # as `cat` joins files of Windows
    assert {record.prompt for record in read_records(file)} == {"\u00e9"}
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="x.json.*: not .*JSON.*"):
        read_records(file)


# ----------------------------------------------------------------------------------------------------------------- CSV


CELLS = [
    ("Is it\r\nraining?", 'a "yes", I think'),
    ("  two ;words", "ß\u2028x"),
    ("0017", "1e3"),
    ("word " * 50_000, "true"),
]


def write_csv(file, rows, header=("prompt", "completion"), **how):
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, **how).writerows([header, *rows])
    return file


@pytest.mark.parametrize("how", [{}, {"lineterminator": "\n"}, {"quoting": csv.QUOTE_ALL}, {"delimiter": ";"}])
def test_the_cells_of_a_csv_file_are_texts_as_they_were_written(tmp_path, how):
    """Also numbers and truth values."""
    found = read_records(write_csv(tmp_path / "x.csv", CELLS, **how))
    assert [record[:2] for record in found] == CELLS
    assert [record.place for record in found] == [f"{tmp_path}/x.csv[{i}]" for i in range(4)]


def test_a_byte_order_mark_and_columns_without_a_name_do_not_matter(tmp_path):
    """pandas writes its index into such a column, and spreadsheets write empty ones."""
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf,prompt,completion,\n0,a,b,\n1,c,d,\n")
    assert [record[:2] for record in read_records(tmp_path / "x.csv")] == [("a", "b"), ("c", "d")]


def test_columns_of_csv_work_as_in_json_lines(tmp_path):
    rows = [("q", "yes", '["yes", "yep"]', "1"), ("q", "no", "", "")]
    file = write_csv(tmp_path / "x.csv", rows, header=("prompt", "completion", "references", "label"))
    assert [record[2:4] for record in read_records(file)] == [(("yes", "yep"), "1"), (("no",), None)]
    assert read_records(write_csv(tmp_path / "y.csv", [(json.dumps(CHAT),)], header=("messages",)))[0].completion == "b"
    empty = write_csv(tmp_path / "alpaca.csv", [("do it", "", "ok")], header=("instruction", "input", "output"))
    assert read_records(empty, prompt="{instruction}[{input}]", completion="{output}")[0].prompt == "do it[]"
    labels = write_csv(tmp_path / "sst2.csv", [("good", "1"), ("bad", "0")], header=("sentence", "label"))
    assert [record.completion for record in read_records(labels, task="sst2")] == ["positive", "negative"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,completion\na,b\nc\n", "Expected 2 columns, got 1"),
        ("", "Empty CSV file"),
        ("prompt,completion\na,\n", r"\[0\]: completion is empty"),
        ("prompt,references\na,[1\n", "Expecting"),
        ("prompt,completion\na,\xff\n", "UTF8"),
    ],
)
def test_an_error_in_a_csv_file_names_the_file(tmp_path, text, said):
    (tmp_path / "x.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"x\.csv.*{said}"):
        read_records(tmp_path / "x.csv")


# --------------------------------------------------------------------------------------------------------------- arrow


def saved(tmp_path, kind, rows=ROWS):
    """The rows as data.train, and the place of the first."""
    data, folder = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows), tmp_path / "folder"
    if kind == "file":
        data.to_parquet(tmp_path / "x.parquet")
        return tmp_path / "x.parquet", f"{tmp_path / 'x.parquet'}[0]"
    if kind == "folder":
        folder.mkdir()
        data.to_parquet(folder / "train.parquet")
        return folder, f"{folder / 'train.parquet'}[0]"
    if kind == "hub":
        (folder / "data").mkdir(parents=True)
        data.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        return f"hf:{folder}", f"hf:{folder}::train[0]"
    (data if kind == "dataset" else datasets.DatasetDict(train=data, test=data)).save_to_disk(folder)
    return folder, f"{folder if kind == 'dataset' else folder / 'train'}[0]"


@pytest.mark.parametrize("kind", ["file", "folder", "hub", "dataset", "dict"])
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
    with pytest.raises(ValueError, match=r"x.parquet\[1\]: no field 'completion', or it is null"):
        read_records(source)


def section_of(tmp_path, kind, data):
    """A data section whose data.train is this datasets.Dataset: from disk, or from Python."""
    if kind in ("given", "table"):
        return with_data(DataSection(), data if kind == "given" else data.with_format("arrow")[:])
    return DataSection(train=str(saved(tmp_path, kind, data)[0]))


EVERYWHERE = pytest.mark.parametrize("kind", ["file", "hub", "dataset", "given", "table"])


@EVERYWHERE
def test_fields_that_other_rows_have_are_no_nulls(tmp_path, kind):
    """Arrow gives every struct all fields of its column. A chat template would write them."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": given}} for given in ({"city": "x"}, {"n": 3})]
    asked = [[CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}] for call in calls]
    rows = [{"prompt": prompt, "completion": CHAT[1:]} for prompt in asked]
    assert prompts(section_of(tmp_path, kind, datasets.Dataset.from_list(rows)), "train") == asked


@EVERYWHERE
def test_images_and_bytes_are_not_decoded_unless_they_are_asked_for(tmp_path, kind):
    image, text = datasets.Image(), datasets.Value("string")
    bad = {"bytes": b"\xff\x00", "path": None}  # can't be decoded
    kinds = dict(prompt=text, completion=text, images=datasets.List(image), image=image, x=datasets.Value("binary"))
    row = {"prompt": "a", "completion": "b", "images": [bad], "image": bad, "x": b"\xff"}
    section = section_of(tmp_path, kind, datasets.Dataset.from_list([row], features=datasets.Features(kinds)))
    assert [record[:2] for record in load_records(section, "train")] == [("a", "b")]
    with pytest.raises(ValueError, match="0.*: x is not UTF-8 text"):
        load_records(replace(section, prompt="{x}"), "train")


@EVERYWHERE
def test_a_column_of_json_holds_what_its_texts_say(tmp_path, kind):
    """`load_dataset` makes such columns of JSON lines where the types of rows differ."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": value}} for value in ({"a": 1}, {"b": [2]})]
    chats = [[*CHAT, CHAT[0], {"role": "tool", "content": "d", "calls": [call]}, CHAT[1]] for call in calls]
    own = datasets.Json()
    features = datasets.Features(messages=datasets.List(own), completion=own, parts={"q": own}, n=own)
    rows = [{"messages": chat, "completion": "yes", "parts": {"q": [1]}, "n": None} for chat in chats]
    section = section_of(tmp_path, kind, datasets.Dataset.from_list(rows, features=features))
    assert [{"n": None, **row} for _, row in open_split(section, "train").rows()] == rows


# -------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".ndjson", ".csv", ".tsv"])
def test_a_folder_may_hold_any_kind_for_each_split(tmp_path, ending):
    mark = "\t" if ending == ".tsv" else ","
    text = json.dumps(ROWS[0]) + "\n" if "json" in ending else f"prompt{mark}completion\nKöln\n,w0\n"
    text = text.replace("Köln\n,", f"Köln{mark}")
    (tmp_path / f"train{ending}").write_text(text)
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[1]))
    section = DataSection(train=str(tmp_path))
    assert [record.completion for record in load_records(section, "train")] == ["w0"]
    assert load_records(section, "validation") is None and prompts(section, "test") == [ROWS[1]["prompt"]]


@pytest.fixture
def splits(tmp_path):
    """A saved DatasetDict with a row in each split, named for it. The test label is hidden, as in GLUE."""
    warn_of_hidden.cache_clear()
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


def test_a_source_that_names_its_split_has_no_other_splits(splits):
    """Its training data would be the validation and the test data too."""
    section = DataSection(train=f"hf:{splits[1]}::train")
    assert [prompts(section, split) for split in ("train", "validation", "test")] == [["train"], None, None]
    section = DataSection(train=f"hf:{splits[1]}::validation", test=f"hf:{splits[1]}::train")
    assert [prompts(section, split) for split in ("train", "validation", "test")] == [["validation"], None, ["train"]]
    for wrong in ("train[:50%]", "dev"):
        with pytest.raises(OSError, match="not found"):
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
    assert prompts(DataSection(train=str(folder), test=f"hf:{folder}::test"), "test") == ["test"]  # asked for by name
    section = with_data(DataSection(), made)
    assert 'data["test"]: its labels are hidden (-1), so it is left out' in capsys.readouterr().err
    assert [prompts(section, split) for split in ("train", "validation", "test")] == [["train"], ["validation"], None]
    with pytest.raises(ValueError, match=r'data\["test"\] must be .*; got IterableDataset'):
        with_data(DataSection(), {"train": made["train"], "test": made["test"].to_iterable_dataset()})


def test_a_data_set_without_splits_is_what_it_is_named_for(splits, tmp_path):
    alone = tmp_path / "alone"
    for source in (str(alone), f"hf:{alone}"):
        assert prompts(DataSection(train="x", validation=source), "validation") == ["validation"]
        section = DataSection(train=source)
        assert prompts(section, "train") == ["validation"] and prompts(section, "validation") is None
