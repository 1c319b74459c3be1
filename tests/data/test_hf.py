"""hf: sources, read by the real `datasets` library from local folders of JSON and Parquet."""

import json
import sys

import datasets
import pytest
import tiny_tokenizers
from tiny_run import write_rows

from para_jax.config import DataSection, load_config
from para_jax.data.hf import open_data_set
from para_jax.data.records import load_records
from para_jax.data.sources import open_split
from para_jax.data.training_data import load_training_data
from para_jax.evaluation.tasks import warn_of_replaced
from para_jax.reports.inspect import source_lines

TEXT = "Köln was founded in 38 BC,\nas “Ara Ubiorum”. "
ROWS = [{"prompt": f"{TEXT}{i}", "completion": f"w{i}"} for i in range(7)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf cache"))
    datasets.disable_progress_bars()


def folder_of(path, **splits):
    """A folder with a file of JSON lines per split; returns it as an hf: source."""
    path.mkdir()
    for split, rows in splits.items():
        write_rows(path / f"{split}.jsonl", rows)
    return f"hf:{path}"


def without_places(records):
    return [record[:4] for record in records]


def test_the_field_gives_the_split_unless_the_source_names_one(tmp_path):
    source = folder_of(tmp_path / "rows", train=ROWS, validation=ROWS[:2], test=ROWS[:3])
    section = DataSection(train=source)
    assert [len(load_records(section, split)) for split in ("train", "validation", "test")] == [7, 2, 3]
    parts = DataSection(train=f"{source}::train[:5]", validation=f"{source}:default:train[5:]")
    assert [len(load_records(parts, split)) for split in ("train", "validation")] == [5, 2]
    assert open_split(parts, "test") is None


def test_a_test_split_with_hidden_labels_is_replaced_by_validation(tmp_path, capsys):
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "p"])})
    folder = tmp_path / "sst2"
    folder.mkdir()
    for split, label in (("train", 1), ("validation", 0), ("test", -1)):
        rows = [{"sentence": split, "label": label}]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    section = DataSection(train=f"hf:{folder}", test=f"hf:{folder}", task="sst2")
    found = load_records(section, "test")
    assert found[0].prompt.startswith("validation")
    warn_of_replaced(f"hf:{folder}::validation", found)
    assert capsys.readouterr().err == ""
    warn_of_replaced(section.test, found)
    assert f"warning: hf:{folder}: there is no test split with labels" in capsys.readouterr().err
    assert open_split(DataSection(train=f"hf:{folder}"), "test") is None


def test_a_config_of_a_data_set_is_chosen_by_name(tmp_path):
    folder = tmp_path / "rows"
    folder_of(folder, train=ROWS, other=ROWS[:1])
    configs = [{"config_name": name, "data_files": f"{file}.jsonl"} for name, file in (("a", "train"), ("b", "other"))]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    found = load_records(DataSection(train=f"hf:{folder}:b"), "train")
    assert [record.place for record in found] == [f"hf:{folder}:b:train[0]"]
    with pytest.raises(ValueError, match=r"hf:.*rows:c: .*'c' not found.*\['a', 'b'\]"):
        load_records(DataSection(train=f"hf:{folder}:c"), "train")


# -------------------------------------------------------------------------------------------------------- training data


def test_training_data_is_named_like_other_sources(tmp_path):
    source, tokenizer = folder_of(tmp_path / "rows", train=ROWS, test=ROWS[:2]), tiny_tokenizers.plain()
    plain = load_training_data(DataSection(train=str(tmp_path / "rows" / "train.jsonl")), tokenizer)
    found = load_training_data(DataSection(train=source), tokenizer)
    assert list(found.examples) == list(plain.examples) and found.places[6] == f"{source}::train[6]"
    part = load_training_data(DataSection(train=f"{source}::train[:5]"), tokenizer)
    assert list(part.examples) == list(plain.examples[:5])


def test_a_changed_file_is_read_again(tmp_path):
    source = folder_of(tmp_path / "rows", train=ROWS)
    assert len(load_records(DataSection(train=source), "train")) == 7
    write_rows(tmp_path / "rows" / "train.jsonl", ROWS[:3])
    assert len(load_records(DataSection(train=source), "train")) == 3


# --------------------------------------------------------------------------------------------------------------- errors


def test_without_datasets_the_error_names_the_extra(tmp_path, monkeypatch):
    source = folder_of(tmp_path / "rows", train=ROWS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:.*rows .*datasets.*pip install 'para_jax\[hf\]'"):
        load_records(DataSection(train=source), "train")


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("hf:", "'hf:'.*hf:NAME"),
        ("hf:{folder}::nothing", "Unknown split .nothing"),
        ("hf:{folder}/absent", "absent: no such folder"),
        ("hf:{folder}/empty", "empty.*data files"),
    ],
)
def test_a_wrong_source_is_an_error_that_names_it(tmp_path, source, named):
    folder = tmp_path / "rows"
    folder_of(folder, train=ROWS, validation=ROWS)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=named) as error:
        load_records(DataSection(train=source.format(folder=folder)), "train")
    assert "\n" not in str(error.value)


def test_other_file_formats_are_refused(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.csv").write_text("prompt,completion\na,b\n")
    with pytest.raises(ValueError, match="rows: it holds csv files"):
        load_records(DataSection(train=f"hf:{tmp_path / 'rows'}"), "train")


def test_code_in_a_data_set_is_never_run(tmp_path):
    folder = tmp_path / "rows"
    source = folder_of(folder, train=ROWS)
    (folder / "rows.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="hf:.*rows: .*rows.py"):
        load_records(DataSection(train=source), "train")
    assert not (tmp_path / "ran").exists()


def test_an_unreachable_hub_is_one_line_and_a_revision_is_passed_on(monkeypatch):
    asked = []

    def unreachable(path, name=None, revision=None):
        asked.append((path, name, revision))
        raise ConnectionError("Couldn't reach the hub\nafter 5 tries")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(ValueError, match=r"hf:user/name@v1:main: Couldn't reach the hub after 5 tries$"):
        open_data_set("hf:user/name@v1:main")
    assert asked == [("user/name", "main", "v1")]


def test_a_dry_run_downloads_nothing(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset_builder", None)
    config = load_config(None, ["data.train=hf:user/name"])
    assert "hf:user/name" in source_lines(config, [config])[0]


def test_a_data_set_of_the_hub_is_asked_for_once(tmp_path, monkeypatch):
    """Each time would be several requests."""
    folder_of(tmp_path / "rows", train=ROWS, validation=ROWS[:2])
    local, asked = datasets.load_dataset_builder, []
    answer = lambda path, **options: asked.append(path) or local(str(tmp_path / "rows"))  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset_builder", answer)
    section = DataSection(train="hf:user/rows", validation_split=0.5)
    assert [len(load_records(section, split)) for split in ("train", "validation")] == [7, 2]
    assert asked == ["user/rows"]
