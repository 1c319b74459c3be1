from para_jax.io.table import table


def test_columns_are_aligned_and_two_spaces_apart():
    rows = [["name", "steps", ""], ["a", "12", "ended"], ["longer", "3", ""]]
    assert table(rows, left=(0, 2)).splitlines() == ["name    steps", "a          12  ended", "longer      3"]
