"""JSON of unknown origin is read within bounds, and only a mapping with each name once is accepted."""

import json

import pytest

from para_jax.io.untrusted import MAX_DEPTH, json_mapping, one_line, read_json


def test_a_mapping_is_read():
    assert json_mapping(b'{"a": [1, {"b": null}], "c": "\xc3\xa9"}') == {"a": [1, {"b": None}], "c": "é"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"[1]", r"\[1\]"),
        (b'{"a": 1', "JSON"),
        (b"\xff", "UTF-8"),
        (b'{"a": {"b": 1, "b": 2}}', "b.* twice"),
        (b'{"a": ' + b"9" * 2000 + b"}", "2000 digits"),
        (b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}", str(MAX_DEPTH)),
        (b"[" * 100_000 + b"]" * 100_000, str(MAX_DEPTH)),
    ],
)
def test_anything_else_is_named(text, named):
    with pytest.raises(ValueError, match=named):
        json_mapping(text)


def test_an_error_names_the_file_and_the_bound_on_its_size(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"a": "b" * 50}))
    assert read_json(file)["a"] == "b" * 50
    with pytest.raises(ValueError, match=r"config\.json.* 20 bytes"):
        read_json(file, 20)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: \[\]"):
        read_json(file)


def test_a_text_in_one_line_has_no_control_characters():
    assert one_line("a\x1b[31m\nb\t c") == "a [31m b c"
    assert len(one_line("word " * 1000)) <= 500
