"""gs:// paths, on an emulator: names, objects, files that grow, and adapters."""

import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_models import FIXTURES, backbone, strong
from running_server import eventually

from para_jax import LoraConfig, ParaConfig, init_adapter, load_adapter
from para_jax.adapters.files import read_adapter_config, save_adapter
from para_jax.adapters.preview import load_previewed, previews
from para_jax.backbone.load import load_model_config
from para_jax.evaluation.journal import AnswerJournal
from para_jax.evaluation.questions import Scored
from para_jax.io.hub import cache_folder, resolve_backbone
from para_jax.io.storage import cache, service
from para_jax.io.storage.bucket import BucketPath, bucket_path
from para_jax.training.checkpoint import open_checkpoints, set_aside, steps_in
from para_jax.training.metrics_file import MetricsWriter, read_metrics, write_metrics


@pytest.fixture
def folder(bucket, request, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return bucket / re.sub(r"\W", "-", request.node.name)


def test_a_bucket_path_has_the_parts_of_its_address():
    path = bucket_path("gs://bucket/a/b.jsonl")
    assert (path.name, path.stem, path.suffix, str(path.parent)) == ("b.jsonl", "b", ".jsonl", "gs://bucket/a")
    assert bucket_path("runs/a") is None and bucket_path(Path("gs/a")) is None and bucket_path(str(path)) == path
    for wrong in (
        "s3://b/a",
        "file:///a",
        "gs://",
        "gs://B/a",
        "gs://bucket/..",
        "gs://bucket/a//b",
        "gs://bucket/\x1b",
    ):
        with pytest.raises(ValueError, match="gs|s3|file"):
            bucket_path(wrong)
    for wrong in ("..", "a/../../b", "", "a\n"):
        with pytest.raises(ValueError, match="gs://bucket/a"):
            path.parent / wrong


def test_objects_are_read_by_ranges_and_listed(folder):
    (folder / "a" / "b.txt").write_bytes(b"0123456789")
    assert sorted(path.name for path in folder.iterdir()) == ["a"]
    assert [path.name for path in (folder / "a").iterdir()] == ["b.txt"]
    with (folder / "a" / "b.txt").open("rb") as stream:
        stream.seek(7)
        assert stream.read(99) == b"789"
    assert folder.is_dir() and not folder.is_file() and (folder / "a" / "b.txt").is_file()
    assert not (folder / "c").exists() and list(folder.glob("*/*.txt")) == [folder / "a" / "b.txt"]
    with pytest.raises(FileNotFoundError, match=str(folder)):
        (folder / "c").read_bytes()


def test_a_client_that_stands_still_keeps_no_other_waiting(folder):
    """Of the emulator, on which the tests of buckets depend."""
    host, port = os.environ["STORAGE_EMULATOR_HOST"].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as silent:
        silent.sendall(
            b"POST /upload/storage/v1/b/para-jax/o?uploadType=media&name=x HTTP/1.1\r\nContent-Length: 9\r\n\r\n"
        )
        time.sleep(0.1)
        (folder / "a.txt").write_bytes(b"0123456789")
    assert (folder / "a.txt").read_bytes() == b"0123456789"


def test_a_request_without_an_answer_is_sent_again(folder, monkeypatch):
    from gcp_storage_emulator import server

    (folder / "a.txt").write_bytes(b"0123456789")
    handle, silent = server.Router.handle, [threading.Event()]

    def answering(router, method):
        if silent:
            silent.pop().wait(20)
        return handle(router, method)

    events = list(silent)
    monkeypatch.setattr(service, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(server.Router, "handle", answering)
    service.file_system_of.cache_clear()
    try:
        assert (folder / "a.txt").read_bytes() == b"0123456789" and not silent
    finally:
        service.file_system_of.cache_clear()
        for event in events:
            event.set()


def test_a_listing_leaves_out_names_that_no_file_has(folder, monkeypatch):
    start = f"{folder.key}/"
    items = [{"name": start + name} for name in ("good", "", "..", ".", "new\nline", "\x1b[2J", "..\\x", "/etc")]
    page = {"items": items, "prefixes": [start + "../", start + "/", start + "kept/"]}
    monkeypatch.setattr(BucketPath, "_page", lambda self, **_: page)
    assert sorted(path.name for path in folder.iterdir()) == ["good", "kept"]


def test_a_page_of_a_listing_may_be_empty_before_others(folder, monkeypatch):
    (folder / "a").write_bytes(b"")
    (folder / "b" / "c").write_bytes(b"")
    whole = BucketPath._page

    def page(self, pageToken=None, **settings):
        return whole(self, **settings) if pageToken == "next" else {"nextPageToken": "next"}

    monkeypatch.setattr(BucketPath, "_page", page)
    assert folder.is_dir() and (folder / "b").is_dir() and not (folder / "c").is_dir()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert sorted(path.name for path in folder.all_files()) == ["a", "c"]


def test_a_stream_never_mixes_two_versions_of_an_object(folder, monkeypatch):
    file = folder / "data.jsonl"
    file.write_bytes(b"old\n" * 100)
    monkeypatch.setattr("para_jax.io.storage.bucket.BLOCK", 16)
    with file.open("rb") as stream:
        assert stream.readline() == b"old\n"
        file.write_bytes(b"new\n" * 100)
        with pytest.raises(OSError, match="data.jsonl"):
            stream.read()


def test_an_unfinished_checkpoint_is_deleted_and_a_damaged_one_renamed(folder):
    for name in ("5/commit_success.txt", "5/state/x", "6/commit_success.txt", "6/state/x", "7/state/x"):
        (folder / name).write_bytes(name.encode())
    assert steps_in(folder) == [6, 5]  # also while orbax deletes the unfinished one, in the background
    with open_checkpoints(folder):
        assert set_aside(folder / "6") == folder / "6.damaged"
        assert steps_in(folder) == [5] and (folder / "6.damaged" / "state" / "x").read_bytes() == b"6/state/x"
    with open_checkpoints(folder):
        eventually(lambda: sorted(path.name for path in folder.iterdir()) == ["5", "6.damaged"])  # in the background


# --------------------------------------------------------------------------------------------------- files that grow


def test_lines_are_added_to_an_object(folder):
    file = folder / "metrics.jsonl"
    rows = MetricsWriter(file)
    for step in range(4):
        rows.add(step, {"loss": 1.5})
        if step % 2:
            rows.flush()
    assert [row["step"] for row in read_metrics(file)] == [0, 1, 2, 3]
    write_metrics(file, [{"step": 0, "loss": 1.5}])
    rows.add(1, {"loss": 1.0})
    rows.flush()
    assert [row["step"] for row in read_metrics(file)] == [0, 1] and list(folder.iterdir()) == [file]


def test_data_is_added_once_although_the_answer_was_lost_or_another_writer_was_quicker(folder, monkeypatch):
    file, join = folder / "lines", BucketPath._join
    file.append(b"1\n")
    for answer in (True, False):  # whether the request reached the service

        def lost(path, part, answer=answer):
            monkeypatch.setattr(BucketPath, "_join", join)
            if answer:
                join(path, part)
            else:
                path.append(b"other\n")
            return False

        monkeypatch.setattr(BucketPath, "_join", lost)
        file.append(b"2\n")
    assert file.read_bytes() == b"1\n2\nother\n2\n" and list(folder.iterdir()) == [file]


def test_two_writers_that_create_one_file_at_once_keep_both_lines(folder, monkeypatch):
    file, is_file = folder / "lines", BucketPath.is_file

    def too_early(path):
        monkeypatch.setattr(BucketPath, "is_file", is_file)
        found = path.is_file()
        file.append(b"other\n")
        return found

    monkeypatch.setattr(BucketPath, "is_file", too_early)
    file.append(b"mine\n")
    assert file.read_bytes() == b"other\nmine\n"


class Killed(BaseException):
    pass


class killed_after:  # noqa: N801
    """Ends the block by Killed at the write or delete after so many."""

    def __init__(self, count, monkeypatch):
        self.left, self.monkeypatch = count, monkeypatch

    def __enter__(self):
        self.patched = self.monkeypatch.context()
        patch = self.patched.__enter__()
        for name in ("write_bytes", "unlink"):
            patch.setattr(BucketPath, name, self.counted(getattr(BucketPath, name)))

    def counted(self, real):
        def call(*arguments, **settings):
            if self.left == 0:
                raise Killed
            self.left -= 1
            return real(*arguments, **settings)

        return call

    def __exit__(self, kind, *_):
        self.patched.__exit__(None, None, None)
        return kind is Killed


# ------------------------------------------------------------------------------------------------------------ adapters


def adapters(config=None):
    model = backbone("llama").config
    return model, [strong(init_adapter(config or ParaConfig(r=4), model), seed=seed) for seed in (1, 2, 3)]


def same(a, b) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("config", [ParaConfig(r=4), LoraConfig(r=4)])
def test_an_adapter_is_saved_loaded_and_replaced_in_a_bucket(config, folder):
    model, (first, second, _) = adapters(config)
    for adapter in (first, second):
        save_adapter(adapter, folder / "adapter", base_model="base")
        assert same(load_adapter(str(folder / "adapter"), model), adapter)
    names = sorted(path.name for path in (folder / "adapter").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert read_adapter_config(folder / "adapter").base_model == "base"
    (folder / "adapter" / "notes.txt").write_bytes(b"mine")
    with pytest.raises(ValueError, match="notes.txt"):
        save_adapter(first, folder / "adapter")
    with pytest.raises(ValueError, match="did you mean gs://.*adapter"):
        load_adapter(str(folder), model)


@pytest.mark.long
def test_a_kill_at_any_write_of_a_run_leaves_the_old_adapter_or_the_new(folder, monkeypatch):
    model, (first, second, _) = adapters()
    outcomes = set()
    for writes in range(4):
        place = folder / str(writes)
        save_adapter(first, place)
        with killed_after(writes, monkeypatch):
            save_adapter(second, place)
        found = load_adapter(str(place), model)
        assert same(found, first) or same(found, second)
        assert same(load_previewed(previews([str(place)], model)[0], model), found)
        outcomes.add(same(found, second))
    assert outcomes == {False, True}


def test_a_kill_while_an_adapter_with_another_config_is_saved_leaves_the_old_one_none_or_the_new(folder, monkeypatch):
    model, (old, *_) = adapters(LoraConfig(r=4, lora_alpha=4))
    _, (_, new, *_) = adapters(LoraConfig(r=4, lora_alpha=8))  # of the same shapes
    outcomes = []
    for writes in range(5):
        place = folder / str(writes)
        save_adapter(old, place)
        with killed_after(writes, monkeypatch):
            save_adapter(new, place)
        try:
            found = load_adapter(str(place), model)
        except ValueError as error:
            assert "no adapter_config.json" in str(error)
            outcomes.append("none")
        else:
            assert same(found, old if found.config == old.config else new)
            outcomes.append(found.config.lora_alpha)
        save_adapter(old, place)
        assert same(load_adapter(str(place), model), old)
    assert outcomes == [4, "none", "none", "none", 8]


def test_an_adapter_that_is_replaced_while_it_is_read_is_read_again(folder, monkeypatch):
    model, (old, *_) = adapters(LoraConfig(r=4, lora_alpha=4))
    _, (_, new, *_) = adapters(LoraConfig(r=4, lora_alpha=8))
    save_adapter(old, folder)
    read, replacements = cache.read, [new]

    def replaced_before_the_weights(file, max_bytes):
        if file.suffix == ".safetensors" and replacements:
            save_adapter(replacements.pop(), folder)
        return read(file, max_bytes)

    monkeypatch.setattr(cache, "read", replaced_before_the_weights)
    found = load_adapter(str(folder), model)
    assert same(found, new) and found.config == new.config and not replacements


def test_two_writers_of_one_file_lose_and_overwrite_nothing(folder):
    """No lock keeps a second one out, such as a worker that was given up and still runs."""
    file, answer = folder / "answers.jsonl", Scored(-1.5, True)
    first, second = AnswerJournal(file), AnswerJournal(file)
    for number in range(3):
        for name, journal in (("first", first), ("second", second)):
            journal.add(f"{name} {number}", answer)
            journal.sync()
    second.add("second 3", answer)
    first.close()
    second.close()
    assert AnswerJournal(file)._answers == dict.fromkeys(
        [f"{name} {number}" for name in ("first", "second") for number in range(3)] + ["second 3"], answer
    )
    with pytest.raises(ValueError, match="answers.jsonl: .*closed"):
        first.add("c", answer)


def test_errors_name_the_address(folder):
    model, (first, *_) = adapters()
    save_adapter(first, folder / "adapter")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=f"{folder}/adapter.*truncated"):
        load_adapter(str(folder / "adapter"), model)


def test_readers_during_a_save_get_one_version_or_the_other(folder):
    model, made = adapters()
    save_adapter(made[0], folder / "adapter")

    def write():
        for i in range(6):
            save_adapter(made[i % 3], folder / "adapter")

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not writing.done():
            found = load_adapter(str(folder / "adapter"), model)
            assert any(same(found, adapter) for adapter in made)
        writing.result()


# ----------------------------------------------------------------------------------------------------------- backbones


def test_a_backbone_is_fetched_once_per_content_without_other_files(folder, monkeypatch):
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((FIXTURES / "llama" / name).read_bytes())
    for name in ("pickle.bin", "code.py", "other/model.safetensors", "consolidated.safetensors"):
        (folder / name).write_bytes(b"not this")
    place = resolve_backbone(str(folder))
    assert sorted(path.name for path in place.iterdir()) == ["config.json", "model.safetensors"]
    assert load_model_config(str(folder)) == backbone("llama").config
    with monkeypatch.context() as patch:
        patch.setattr(BucketPath, "open", None)
        assert resolve_backbone(str(folder)) == place
    (folder / "model.safetensors").write_bytes(b"new")
    assert (resolve_backbone(str(folder)) / "model.safetensors").read_bytes() == b"new"
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert resolve_backbone(f"{folder}/model.gguf").read_bytes() == b"GGUF"
    monkeypatch.setattr("para_jax.io.hub.MAX_TEXT_BYTES", 10)
    with pytest.raises(ValueError, match=f"{folder}/config.json: .* 10"):
        resolve_backbone(str(folder))
    for missing in ("none", "none.gguf"):
        with pytest.raises(ValueError, match=f"{folder}/{missing}: "):
            resolve_backbone(f"{folder}/{missing}")


def test_the_next_fetch_deletes_what_a_killed_one_left(folder, monkeypatch):
    (folder / "model.gguf").write_bytes(b"GGUF")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "fetch", lambda file, to, generation: to.write_bytes(b"GG") and 1 / 0)
        patch.setattr(cache.shutil, "rmtree", lambda *given, **options: None)  # a killed process cleans nothing up
        with pytest.raises(ZeroDivisionError):
            resolve_backbone(f"{folder}/model.gguf")
    copies = cache_folder() / "buckets" / cache.short_digest(str(folder))
    assert [path for path in copies.iterdir() if path.is_dir()]
    place = resolve_backbone(f"{folder}/model.gguf")
    assert {path for path in copies.iterdir() if path.is_dir()} == {place.parent}


def test_a_backbone_that_is_replaced_during_the_fetch_is_refused(folder, monkeypatch):
    file, real = folder / "model.gguf", BucketPath.open
    file.write_bytes(b"GGUF old")

    def replaced_first(path, mode):
        file.write_bytes(b"GGUF new")
        return real(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(BucketPath, "open", replaced_first)
        with pytest.raises(ValueError, match=f"{file} .*replaced"):
            resolve_backbone(str(file))
    assert resolve_backbone(str(file)).read_bytes() == b"GGUF new"


def test_a_write_may_depend_on_the_generation_that_a_read_gave(bucket):
    """tensorstore, below Orbax, rereads a manifest after a while, and writes it only if nobody else has."""
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "gcs", "bucket": "para-jax", "path": "reread/"}).result()
    store.write("manifest", b"1").result()
    seen = store.read("manifest").result().stamp.generation
    assert store.write("manifest", b"2", if_equal=seen).result().generation
    assert not store.write("manifest", b"3", if_equal=seen).result().generation  # somebody else wrote it
    assert store.read("manifest").result().value == b"2"


# -------------------------------------------------------------------------------------------------------------- data


def test_data_of_every_kind_of_file_is_read_from_a_bucket(folder):
    import io

    import pyarrow as pa
    from pyarrow.parquet import write_table

    from para_jax.config import DataSection
    from para_jax.data.records import load_records
    from para_jax.data.tenants import tenant_sections

    stream = io.BytesIO()
    write_table(pa.Table.from_pylist([{"prompt": "a", "completion": "b"}]), stream)
    (folder / "csv" / "train.csv").write_bytes(b"prompt,completion\na,b\n")
    (folder / "csv" / "test.json").write_bytes(b'[{"prompt": "a", "completion": "b"}]')
    (folder / "parquet" / "train.parquet").write_bytes(stream.getvalue())
    for name, split in (("csv", "train"), ("csv", "test"), ("parquet", "train")):
        assert load_records(DataSection(train=str(folder / name)), split)[0][:2] == ("a", "b")
    assert load_records(DataSection(train=str(folder / "parquet")), "validation") is None
    with pytest.raises(ValueError, match="nothing does not exist"):
        load_records(DataSection(train=str(folder / "nothing")), "train")
    with pytest.raises(ValueError, match="'test' cannot be a tenant's name"):
        tenant_sections(str(folder / "csv"), DataSection())
