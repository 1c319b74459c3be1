"""CSV and TSV: the rows of the same JSON lines, and errors that name the line."""

import csv
import json

import pytest

from para_jax.data import csv_file
from para_jax.data.records import read_records

ROWS = [("Is it\r\nraining?", 'a "yes", I think'), ("  two ;words", "ß\u2028x"), ("last", "no")]


def write(file, rows, header=("prompt", "completion"), **how):
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, **how).writerows([header, *rows])
    return file


@pytest.mark.parametrize(
    "how", [{}, {"lineterminator": "\n"}, {"lineterminator": "\r"}, {"quoting": csv.QUOTE_ALL}, {"delimiter": ";"}]
)
def test_texts_with_quotes_commas_and_newlines_are_read_as_they_are(tmp_path, how):
    found = read_records(write(tmp_path / "x.csv", ROWS, **how))
    assert [record[:2] for record in found] == ROWS
    first = tmp_path / "x.csv"
    assert [record.place for record in found] == [f"{first}:2", f"{first}:4", f"{first}:5"]


def test_lines_may_end_with_two_cr_and_lf_as_pythons_writer_does_on_windows(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"prompt,completion\r\r\na,b\r\r\nc,d\r\r\n")
    assert [record[:2] for record in read_records(tmp_path / "x.csv")] == [("a", "b"), ("c", "d")]


def test_lines_may_end_with_cr_alone_as_in_excels_macintosh_files(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_file, "MAX_ROW", 40)
    monkeypatch.setattr(csv_file, "BLOCK", 3)
    file, rows = tmp_path / "x.csv", [(f"a{i}\nb", "c\rd") for i in range(9)]
    found = read_records(write(file, rows, lineterminator="\r", quoting=csv.QUOTE_ALL))
    assert [record[:2] for record in found] == rows
    file.write_bytes(file.read_bytes().removesuffix(b"\r"))
    assert read_records(file) == found
    write(file, [*rows, ("e" * 40, "f")], lineterminator="\r", quoting=csv.QUOTE_ALL)
    with pytest.raises(ValueError, match="x.csv:20: the row is longer than 40 bytes"):
        read_records(file)
    for text, line in ((b"prompt,completion\na,b\nc\rd,e\n", 3), (b"prompt,completion\ra,b\rc\nd,e\r", 3)):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=f"x.csv:{line}: a line break outside quotes.*put quotes around"):
            read_records(file)
    file.write_bytes(b'"a\rb",completion\nc,d\n')
    assert read_records(file, prompt="{a\rb}")[0].prompt == "c"


def test_tabs_separate_in_tsv_and_commas_do_not(tmp_path):
    found = read_records(write(tmp_path / "x.tsv", [("a, b", "c")], delimiter="\t"))
    assert found[0][:2] == ("a, b", "c")


def test_a_byte_order_mark_spaces_in_the_header_and_the_index_of_pandas_do_not_matter(tmp_path):
    file = tmp_path / "x.csv"
    file.write_bytes(b"\xef\xbb\xbf, prompt ,completion\n0,a,b\n\n1,c,d\n")
    assert [record[:2] for record in read_records(file)] == [("a", "b"), ("c", "d")]


def test_columns_without_a_name_at_the_end_do_not_matter(tmp_path):
    """Spreadsheets write them where somebody once typed into these columns."""
    (tmp_path / "x.csv").write_text("prompt,completion,,\r\na,b,,\r\n")
    assert [record[:2] for record in read_records(tmp_path / "x.csv")] == [("a", "b")]


def test_columns_work_as_in_json_lines(tmp_path):
    chat = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    rows = [("q", "yes", '["yes", "yep"]', "1"), ("q", "no", "", "")]
    file = write(tmp_path / "x.csv", rows, header=("prompt", "completion", "references", "label"))
    assert [record[2:4] for record in read_records(file)] == [(("yes", "yep"), "1"), (("no",), None)]
    assert read_records(write(tmp_path / "chat.csv", [(chat,)], header=("messages",)))[0].completion == "b"
    empty = write(tmp_path / "alpaca.csv", [("do it", "", "ok")], header=("instruction", "input", "output"))
    assert read_records(empty, prompt="{instruction}[{input}]", completion="{output}")[0].prompt == "do it[]"
    labels = write(tmp_path / "sst2.csv", [("good", "1"), ("bad", "0")], header=("sentence", "label"))
    assert [record.completion for record in read_records(labels, task="sst2")] == ["positive", "negative"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,completion\na,b\nc\n", ":3: 1 cells, .* 2 .prompt, completion"),
        ("prompt,completion\na,b,c\n", ":2: 3 cells"),
        ("prompt|completion\na|b\n", r":2: the header has one column, 'prompt\|completion'; .* not '\|'"),
        ('prompt,completion\na,"b" c\n', ":2: .*expected after"),
        ('prompt,completion\na,b\nc,"d\n\n', ":3: unexpected end"),
        ("prompt,prompt\na,b\n", ":1: the column 'prompt' is there twice"),
        ("\nprompt,completion\n", ":1: there is no header"),
        ("", ":1: there is no header"),
        ("prompt,answer\na,b\n", ":2: no field 'completion'.*prompt, answer"),
        ("prompt,completion\na,\n", ":2: completion is empty"),
        ("prompt,references\na,[1\n", ":2: references is not JSON"),
        ('prompt,references\na,"[{""b"": 1, ""b"": 2}]"\n', ":2: references is not JSON: 'b' is there twice"),
        ("prompt,completion\n", "x.csv has no rows"),
    ],
)
def test_a_wrong_row_is_an_error_that_names_file_and_line(tmp_path, text, said):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.csv.*{said.removeprefix('x.csv')}"):
        read_records(tmp_path / "x.csv")


def test_a_name_in_the_header_may_have_a_newline(tmp_path):
    (tmp_path / "x.csv").write_text('prompt,completion,"two\nlines"\na,b,c\n"d\n",e,f\n')
    found = read_records(tmp_path / "x.csv", completion="{two\nlines}", prompt="{prompt}")
    assert [(record.prompt, record.completion) for record in found] == [("a", "c"), ("d\n", "f")]
    assert [record.place.rpartition(":")[2] for record in found] == ["3", "4"]


def test_other_encodings_and_endless_rows_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "x.csv"
    file.write_bytes("prompt,completion\na,b\n".encode("utf-16"))
    with pytest.raises(ValueError, match="x.csv:1: not UTF-8"):
        read_records(file)
    monkeypatch.setattr(csv_file, "MAX_ROW", 200)
    file.write_text('prompt,completion\na,b\nc,"' + "d\n" * 200)
    with pytest.raises(ValueError, match="x.csv:3: the row is longer than 200 bytes.*quote"):
        read_records(file)


def test_a_long_document_is_one_cell(tmp_path):
    text = "word " * 50_000
    assert read_records(write(tmp_path / "x.csv", [(text, "b")]))[0].prompt == text
