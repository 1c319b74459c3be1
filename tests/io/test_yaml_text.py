"""YAML files hold plain values only, and each key once."""

import pytest

from para_jax.io.yaml_text import as_text, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: 1\nb: [x, 2.5, true, null]", {"a": 1, "b": ["x", 2.5, True, None]}),
        ("rate: 1e-3", {"rate": 1e-3}),
        ("day: 2024-02-03", {"day": "2024-02-03"}),
        ("a: &one {b: 1}\nc:\n  <<: *one\n  d: 2", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)
def test_plain_values_are_read(text, value):
    assert parse_yaml(text) == value


def test_a_number_knows_how_it_was_written():
    read = parse_yaml("[007, 1_000, 12:30, 0x1F, 2.50, 1e3, 12, '007', x]")
    assert read == [7, 1000, 750, 31, 2.5, 1000.0, 12, "007", "x"]
    assert list(map(as_text, read)) == ["007", "1_000", "12:30", "0x1F", "2.50", "1e3", "12", "007", "x"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: 1\na: 2", "duplicate key a.*line 2"),
        ("a: [1", "line 1"),
        ("1: a", "key '1' is not text.*line 1"),
        ("a: !!python/object/apply:os.getcwd []", "os.getcwd.*line 1"),
    ],
)
def test_anything_else_is_named(text, named):
    with pytest.raises(ValueError, match=named):
        parse_yaml(text)
