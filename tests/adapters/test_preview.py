"""What is known of an adapter before its weights are loaded."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from adapter_folder import change_config
from golden_models import FIXTURES, strong

from para_jax import Ia3Config, LoraConfig, ParaConfig, init_adapter, load_adapter, save_adapter
from para_jax.adapters import preview
from para_jax.adapters.bank import content_hash
from para_jax.backbone.load import load_model_config
from para_jax.io.storage import bucket as buckets
from para_jax.io.storage.bucket import BucketPath

CONFIGS = [
    ParaConfig(r=4),
    ParaConfig(r=2, target_modules=("q_proj",), layers_to_transform=(0,)),
    ParaConfig(r=3, scope="response", up_bias=True),
    ParaConfig(r=2, late_r=4),
    LoraConfig(r=2),
    LoraConfig(r=2, scope="prompt"),
    Ia3Config(target_modules=("v_proj", "down_proj")),
]


@pytest.fixture(scope="module")
def model():
    return load_model_config(FIXTURES / "llama")


@pytest.fixture
def sources(model, tmp_path):
    for i, config in enumerate(CONFIGS):
        save_adapter(strong(init_adapter(config, model), i, 0.3), tmp_path / str(i))
    return [str(tmp_path / str(i)) for i in range(len(CONFIGS))]


def test_the_config_is_that_of_the_loaded_adapter_in_the_form_that_a_bank_stacks(sources, model):
    for source, found in zip(sources, preview.previews(sources, model), strict=True):
        assert found.config == load_adapter(source, model).normal(model).config
        assert str(found.place) == source


def test_the_digest_depends_on_the_files_and_not_on_their_place(sources, model, tmp_path):
    copy = shutil.copytree(sources[0], tmp_path / "renamed")
    digests = [one.digest for one in preview.previews([*sources, str(copy)], model)]
    assert len(set(digests)) == len(sources) and digests[0] == digests[-1]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        data = (copy / name).read_bytes()
        for place in (0, len(data) - 1):
            (copy / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert preview.identify(str(copy))[2] != digests[0]
        (copy / name).write_bytes(data)


def test_an_adapter_that_was_replaced_is_not_taken_for_the_one_that_was_looked_at(sources, model, tmp_path):
    """Both have one config. Answers would be recorded under the other one's digest."""
    found = dict(zip("abc", preview.previews(sources[:3], model), strict=True))
    assert content_hash(preview.load_previewed(found["a"], model)) == content_hash(load_adapter(sources[0], model))
    save_adapter(strong(init_adapter(CONFIGS[1], model), 9, 0.3), tmp_path / "1")
    with pytest.raises(ValueError, match="/1: another adapter has replaced it since"):
        preview.load_previewed(found["b"], model)


def test_an_adapter_in_a_bucket_has_the_same_digest_without_its_weights_being_read(sources, model, bucket, monkeypatch):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bucket / "previewed" / name).write_bytes((Path(sources[0]) / name).read_bytes())
    read, names = BucketPath.read_bytes, []
    monkeypatch.setattr(BucketPath, "read_bytes", lambda path: names.append(path.name) or read(path))
    monkeypatch.setattr(BucketPath, "read_range", lambda *_: pytest.fail("the weights were read"))
    assert preview.previews([f"{bucket}/previewed"], model)[0].digest == preview.previews(sources, model)[0].digest
    assert names == ["adapter_config.json"]
    with pytest.raises(ValueError, match="gs://.*nowhere is not an adapter"):
        preview.previews([f"{bucket}/nowhere"], model)


def test_a_composed_object_without_an_md5_is_known_by_its_generation(monkeypatch):
    service = SimpleNamespace(call=lambda *_, **__: {"size": "3", "generation": "7"})
    monkeypatch.setattr(buckets, "file_system", lambda: service)
    assert preview.md5_of(BucketPath("b", "adapter_model.safetensors")) == "7"


def test_a_damaged_adapter_is_named(sources, model, tmp_path):
    (tmp_path / "1" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="/1.*peft_type"):
        preview.previews(sources, model)
    (tmp_path / "1" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="/1 has no adapter_model.safetensors"):
        preview.previews(sources, model)


@pytest.mark.parametrize("field", ["r", "late_r"])
def test_a_rank_that_no_folder_may_have_is_refused_before_an_array_of_it_is_made(sources, model, field):
    change_config(Path(sources[3]), **{field: 2**26})
    for read in (lambda source: preview.previews([source], model), lambda source: load_adapter(source, model)):
        with pytest.raises(ValueError, match="/3.*r must be .*65536; got 67108864"):
            read(sources[3])
