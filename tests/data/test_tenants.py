"""Tenants of a folder by their names."""

import datasets
import pytest

from para_jax.config import DataSection
from para_jax.data.records import load_records
from para_jax.data.tenants import tenant_sections

ROW = '{"prompt": "a", "completion": "b"}\n'


def write(file, rows=1):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(ROW * rows)


def test_subfolders_and_jsonl_files_are_tenants(tmp_path):
    write(tmp_path / "acme" / "train.jsonl", 2)
    write(tmp_path / "acme" / "validation.jsonl", 3)
    write(tmp_path / "Globex-2.1_x.JSONL")  # as Windows may write it
    for other in (".hidden.jsonl", "README.md", ".git/train.jsonl"):
        write(tmp_path / other)
    found = tenant_sections(tmp_path, DataSection(max_seq_length=9, validation="elsewhere.jsonl"))
    assert list(found) == ["Globex-2.1_x", "acme"] and found["acme"].max_seq_length == 9
    counts = {(n, s): len(load_records(found[n], s) or []) for n in found for s in ("train", "validation")}
    assert counts == {("Globex-2.1_x", "train"): 1, ("Globex-2.1_x", "validation"): 0, ("acme", "train"): 2,
                      ("acme", "validation"): 3}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["a b", "-a", "_a", "ä", "a\nb", "a:b", "a\\..\\b", "$(x)", "x" * 101, "checkpoints", "Base", "tensorboard"]
)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_unsafe_tenant_name_is_refused(tmp_path, name, kind):
    write(tmp_path / "good.jsonl")
    write(tmp_path / name / "train.jsonl" if kind == "folder" else tmp_path / f"{name}.jsonl")
    with pytest.raises(ValueError, match="cannot be a tenant's name") as error:
        tenant_sections(tmp_path, DataSection())
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_wrong_tenant_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=rf"data\.tenants: {tmp_path} has no tenants"):
        tenant_sections(tmp_path, DataSection())
    write(tmp_path / "acme.jsonl")
    write(tmp_path / "acme" / "train.jsonl")
    with pytest.raises(ValueError, match="'acme' cannot be a tenant's name; .* once each"):
        tenant_sections(tmp_path, DataSection())


def test_the_files_of_one_tenant_are_not_three_tenants(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl")
    with pytest.raises(ValueError, match="'test' cannot be a tenant's name"):
        tenant_sections(tmp_path, DataSection())


def test_splits_that_save_to_disk_wrote_are_tenants_unless_they_are_those_of_one(tmp_path):
    data = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    datasets.DatasetDict(acme=data, globex=data).save_to_disk(tmp_path / "many")
    assert list(tenant_sections(tmp_path / "many", DataSection())) == ["acme", "globex"]
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="'test' cannot be a tenant's name"):
        tenant_sections(tmp_path / "one", DataSection())
