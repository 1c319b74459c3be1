"""Which kind of data file it is, by name and content, and the files of a folder."""

import gzip
import json
import zipfile

import pytest
import tiny_tokenizers

from para_jax.config import DataSection
from para_jax.data import row_files, token_cache
from para_jax.data.records import load_records, read_records
from para_jax.data.training_data import load_training_data

ROWS = [{"prompt": f"the lazy dog {i}", "completion": "yes"} for i in range(3)]


def test_an_array_of_objects_is_read_like_json_lines(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("\ufeff\n" + json.dumps(ROWS, indent=2))
    assert [record[:2] for record in read_records(file)] == [tuple(row.values()) for row in ROWS]
    assert [record.place for record in read_records(file)] == [f"{file}[{i}]" for i in range(3)]
    data = load_training_data(DataSection(train=str(file)), tiny_tokenizers.plain())
    assert list(data.places) == [f"{file}[{i}]" for i in range(3)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"prompt": "a"', "x.json: not a JSON array"),
        ("[1]", r"x.json\[0\]: the item is a int"),
        ('[{"prompt": "\\ud800", "completion": "b"}]', r"x.json\[0\]: a text: .*surrogate"),
        ("[]", "x.json has no rows"),
        ('[{"prompt": "a", "completion": ""}]', r"x.json\[0\]: completion is empty"),
    ],
)
def test_a_wrong_array_is_an_error_that_names_the_item(tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_records(tmp_path / "x.json")


def test_an_array_too_large_to_read_at_once_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "MAX_ARRAY", 20)
    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    with pytest.raises(ValueError, match="x.json: a JSON array of more than 20 bytes"):
        read_records(tmp_path / "x.json")


def test_a_table_under_the_name_of_json_lines_says_what_to_do(tmp_path):
    (tmp_path / "x.jsonl").write_text("prompt,completion\na,b\n")
    with pytest.raises(ValueError, match=r"x.jsonl:1: not JSON.*\n.*\.csv"):
        read_records(tmp_path / "x.jsonl")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_folder_may_hold_any_kind_for_each_split(tmp_path, ending):
    mark = "\t" if ending == ".tsv" else ","
    text = json.dumps(ROWS[0]) + "\n" if "json" in ending else f"prompt{mark}completion\na{mark}yes\n"
    (tmp_path / f"train{ending}").write_text(text)
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[1]))
    section = DataSection(train=str(tmp_path))
    assert [record.completion for record in load_records(section, "train")] == ["yes"]
    assert load_records(section, "validation") is None and load_records(section, "test")[0].prompt == ROWS[1]["prompt"]


def test_the_token_cache_tells_kinds_of_files_apart(tmp_path, monkeypatch):
    """The same bytes are other rows as CSV and as TSV."""
    monkeypatch.setattr(token_cache, "MIN_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = "prompt\tcompletion,x\nthe dog\tyes,no\n"
    found = []
    for name, prompt in (("a.csv", "{prompt\tcompletion}"), ("b.tsv", "{prompt}"), ("c.csv", "{prompt\tcompletion}")):
        (tmp_path / name).write_text(text)
        section = DataSection(train=str(tmp_path / name), prompt=prompt, completion="{x}" if "csv" in name else "yes")
        data = load_training_data(section, tiny_tokenizers.plain())
        assert list(data.places) == [f"{tmp_path / name}:2"]
        found.append(data.examples[0])
    assert found[0] == found[2] != found[1]
    assert len(list((tmp_path / "cache" / "para_jax" / "tokens").glob("*.tokens"))) == 2


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_another_encoding_is_named_and_a_mark_of_utf_8_is_read(tmp_path, ending):
    file, text = tmp_path / f"x{ending}", '{"prompt": "\u00e9", "completion": "b"}\n'
    text = text if ending == ".jsonl" else f"[{text}]"
    file.write_bytes(text.encode("utf-8-sig") * (2 if ending == ".jsonl" else 1))  # as `cat` joins files of Windows
    assert {record.prompt for record in read_records(file)} == {"\u00e9"}
    for encoding in ("utf-16", "latin-1"):  # PowerShell's > writes UTF-16
        file.write_bytes(text.encode(encoding))
        with pytest.raises(
            ValueError, match=r"x.json.*: not .*JSON.*: it is not UTF-8 text .*; save the file as UTF-8"
        ):
            read_records(file)


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_a_packed_file_is_named(tmp_path, ending):
    file = tmp_path / f"x{ending}"
    file.write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}'))
    with pytest.raises(ValueError, match="x.* is a gzip file; unpack it"):
        read_records(file)
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("xl/workbook.xml", "")
    with pytest.raises(ValueError, match="x.* is a zip file, as .xlsx is; "):
        read_records(file)
