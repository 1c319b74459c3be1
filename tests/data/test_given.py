"""Rows that a program gives: each kind gives the records of the same JSON lines."""

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny_tokenizers
from tiny_run import write_rows

from para_jax.config import DataSection, RunConfig, config_dict, load_config
from para_jax.data.given import SPLITS, with_data, with_tenants
from para_jax.data.records import load_records, read_records
from para_jax.data.tenants import tenant_sections
from para_jax.data.training_data import load_training_data

ROWS = [{"prompt": f"the lazy dog {i}", "completion": "yes", "label": i, "score": i / 2} for i in range(4)]
KINDS = {
    "list": list,
    "tuple": tuple,
    "pandas": pd.DataFrame,
    "datasets": datasets.Dataset.from_list,
    "of arrays": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    "arrow": pa.Table.from_pylist,
    "arrow batch": pa.RecordBatch.from_pylist,
    "numpy": lambda rows: [row | {"label": np.int64(row["label"]), "score": np.float32(0)} for row in rows],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [None, "train", "test"])
def test_each_kind_gives_the_records_of_the_same_json_lines(tmp_path, kind, split):
    made = KINDS[kind](ROWS)
    section = with_data(DataSection(), made if split is None else {"train": ROWS, split: made})
    found = load_records(section, split or "train")
    same = read_records(write_rows(tmp_path / "same.jsonl", ROWS))
    assert [record[:4] for record in found] == [record[:4] for record in same]
    label = "data" if split is None else f'data["{split}"]'
    assert [record.place for record in found] == [f"{label} row {i}" for i in range(4)]
    assert load_records(section, "validation") is None


def test_splits_of_a_dataset_dict_and_templates(tmp_path):
    rows = datasets.Dataset.from_list([{"q": "why", "n": 1, "a": "so"}])
    section = DataSection(prompt="{q} {n}?", completion="{a}")
    section = with_data(section, datasets.DatasetDict(train=rows, validation=rows))
    assert [load_records(section, split) is not None for split in SPLITS] == [True, True, False]
    assert load_records(section, "validation")[0][:2] == ("why 1?", "so")


def test_a_dataset_with_a_transform_is_refused():
    """Its rows would be read without the transform."""
    rows = datasets.Dataset.from_list(ROWS)
    for data in (rows.with_transform(lambda part: part), {"train": rows, "test": rows.with_transform(lambda p: p)}):
        with pytest.raises(ValueError, match="has a transform, which would not be applied; use dataset.map"):
            with_data(DataSection(), data)


def test_nan_none_and_nat_are_missing_and_numpy_values_are_plain():
    frame = pd.DataFrame({"prompt": ["a", "b"], "completion": ["c", "d"], "label": [1.0, np.nan], "x": [pd.NA, pd.NaT]})
    found = load_records(with_data(DataSection(), frame), "train")
    assert [record.label for record in found] == ["1.0", None]
    references = [{"prompt": "a", "completion": "b", "references": np.array(["b", "c"])}]
    assert load_records(with_data(DataSection(), references), "train")[0].references == ("b", "c")
    frame["completion"] = ["c", None]
    with pytest.raises(ValueError, match="^data row 1: no field 'completion', or it is null"):
        load_records(with_data(DataSection(), frame), "train")


def test_the_places_of_training_data_name_the_row():
    section = with_data(DataSection(max_seq_length=12), {"train": [*ROWS, ROWS[0] | {"prompt": "lazy " * 20}]})
    with pytest.raises(ValueError, match=r'data\["train"\] row 4: \d+ tokens exceed'):
        load_training_data(section, tiny_tokenizers.plain())
    data = load_training_data(with_data(DataSection(), {"train": ROWS}), tiny_tokenizers.plain())
    assert list(data.places)[2] == 'data["train"] row 2'


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("rows.csv", "data must be a list of dicts, .*got str"),
        (iter(ROWS), "data must be .*got list_iterator"),
        ({"train": iter(ROWS)}, r'data\["train"\] must be'),
        ({"train": ROWS, "dev": ROWS}, "keys train, dev; .*dict of train"),
        ({"prompt": ["a"], "completion": ["b"]}, "keys prompt, completion; .*list of dicts"),
    ],
)
def test_data_of_another_kind_is_refused(data, said):
    with pytest.raises(ValueError, match=said):
        with_data(DataSection(), data)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "data has no rows"),
        ([["a", "b"]], "data row 0: the row is a list; write an object"),
        ([*ROWS, {"prompt": "a", "completion": " "}], "data row 4: completion is empty"),
        ([{"prompt": 3, "completion": "b"}], "data row 0: prompt must be text"),
        ([{"prompt": "a", "completion": b"\xff"}], "data row 0: completion is not UTF-8"),
    ],
)
def test_a_wrong_row_is_an_error_that_names_it(rows, said):
    with pytest.raises(ValueError, match=said):
        load_records(with_data(DataSection(), rows), "train")


def test_given_rows_take_the_place_of_the_same_split_and_another_split_is_kept(tmp_path):
    file = write_rows(tmp_path / "held.jsonl", ROWS[:2])
    section = DataSection(validation=str(file))
    assert len(load_records(with_data(section, ROWS), "validation")) == 2
    given = with_data(section, {"train": ROWS, "validation": ROWS[:1]})
    assert len(load_records(given, "validation")) == 1


def test_a_saved_config_says_that_its_data_came_from_python(tmp_path):
    config = RunConfig(data=with_data(DataSection(), ROWS))
    assert config_dict(config)["data"]["train"] == "<python>" and "given" not in config_dict(config)["data"]
    saved = load_config(None, ["data.train=<python>"])
    assert saved == config
    for split in ("train", "test"):
        with pytest.raises(
            ValueError, match=f"data.{split}: the data of this run came from Python; .*data.{split}=FILE"
        ):
            load_records(saved.data, split)
    assert len(load_records(with_data(saved.data, ROWS), "train")) == 4
    file = write_rows(tmp_path / "test.jsonl", ROWS[:1])
    assert len(load_records(load_config(None, ["data.train=<python>", f"data.test={file}"]).data, "test")) == 1
    with pytest.raises(ValueError, match="data.given"):
        load_config(None, ["data.given=x"])


def test_a_data_frame_gives_the_structs_of_its_parquet_file(tmp_path):
    calls = [{"function": {"name": "f", "arguments": one}} for one in ({"city": "Rome"}, {"zip": "1"})]
    rows = [{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
            for call in calls]  # fmt: skip
    pa.parquet.write_table(pa.Table.from_pylist([row | {"completion": "b"} for row in rows]), tmp_path / "t.parquet")
    for frame in (
        pd.read_parquet(tmp_path / "t.parquet"), pd.read_parquet(tmp_path / "t.parquet", dtype_backend="pyarrow")
    ):  # fmt: skip
        found = load_records(with_data(DataSection(), frame), "train")
        assert [record.prompt for record in found] == [row["prompt"] for row in rows]


def test_each_tenant_has_its_own_data():
    section = with_tenants(DataSection(), {"globex": {"train": ROWS, "test": ROWS[:1]}, "acme": pd.DataFrame(ROWS[:2])})
    found = tenant_sections(section.tenants, section)
    assert list(found) == ["acme", "globex"] and found["acme"] != found["globex"]
    assert [len(load_records(one, "train")) for one in found.values()] == [2, 4]
    assert load_records(found["globex"], "test")[0].place == 'data["globex"]["test"] row 0'
    assert load_records(found["acme"], "test") is None
    for names, said in ((["a b"], "'a b' cannot be"), (["a", "A"], "once each"), (["checkpoints"], "cannot")):
        wrong = with_tenants(DataSection(), dict.fromkeys(names, ROWS))
        with pytest.raises(ValueError, match=said):
            tenant_sections(wrong.tenants, wrong)
    assert list(with_tenants(DataSection(), {7: ROWS}).given) == ["7"]  # as pandas groups are named
    with pytest.raises(ValueError, match="came from Python"):
        tenant_sections("<python>", DataSection(tenants="<python>"))
