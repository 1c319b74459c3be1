"""Backbone folders: config.json of every family, safetensors in one file and in shards, and the index."""

import json
import random
import shutil
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
from golden_models import FAMILIES, FIXTURES, prompts
from safetensors.numpy import save_file

from para_jax import forward, load_backbone
from para_jax.backbone.families import FAMILIES as FAMILIES_READ
from para_jax.backbone.families import UNSUPPORTED
from para_jax.backbone.load import load_model_config

from . import mutate, tensors
from .cases import Trial, Wrong, shared_folder

INDEX = "model.safetensors.index.json"
#: Keys of config.json that are fields of the ModelConfig as they stand.
SAME = {
    "model_type": "model_type",
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "hidden_width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_embeddings",
    "mlp_bias": "mlp_bias",
}
SOFTCAPS = {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "final_softcap"}


def config(draw: random.Random, folder: Path) -> Trial:
    """A changed config.json is refused, or every field of the model is the one that it says and the logits are
    numbers."""
    family = draw.choice(FAMILIES)
    form = draw.choice(("config.json", "config_legacy.json"))
    made = folder / "backbone"
    made.mkdir()
    (made / "model.safetensors").symlink_to(FIXTURES / family / "model.safetensors")
    said = json.loads((FIXTURES / family / form).read_text())
    file = made / "config.json"
    file.write_bytes(mutate.json_text(draw, said, (*UNSUPPORTED, *SAME, *SOFTCAPS, "rope_scaling", "layer_types")))
    if draw.random() < 0.05:
        mutate.file(draw, file)
    elif draw.random() < 0.03:  # more layers than there are weights for
        file.write_text(
            json.dumps(said | {"num_hidden_layers": draw.choice((40, 1000, 10_000, 2**31)), "layer_types": None})
        )

    def run():
        if draw.random() < 0.5:
            load_model_config(made)
        return load_backbone(made)

    return Trial(run, (str(made), "config.json", "model_type"), partial(check_config, file))


def check_config(file: Path, model) -> None:
    said, found = json.loads(file.read_bytes()), model.config
    same = dict(SAME)
    if found.model_type == "granitemoehybrid":
        same["shared_intermediate_size"] = same.pop("intermediate_size")
    if said.get("tie_word_embeddings") and "lm_head.weight" in tensors.read(file.parent / "model.safetensors"):
        del same["tie_word_embeddings"]  # a head that differs is used
    if "yarn" in json.dumps(said):  # it may lengthen the model
        del same["max_position_embeddings"]
    for key, field in same.items():
        if said.get(key) is not None and said[key] != getattr(found, field):
            raise Wrong(f"{key} is {said[key]!r} in config.json, {getattr(found, field)!r} in the model")
    for key, field in SOFTCAPS.items():
        if key in said and found.model_type in ("gemma2", "gemma3_text") and getattr(found, field) != said[key]:
            raise Wrong(f"{key} is {said[key]!r} in config.json, {getattr(found, field)!r} in the model")
    refused = set(UNSUPPORTED) - set(FAMILIES_READ[found.model_type].defaults)
    asked = [key for key in refused if said.get(key) not in (None, False, 0, "", [], {})]
    if asked:
        raise Wrong(f"accepted a config that asks for {', '.join(asked)}")
    if repr(found) not in LOGITS_SEEN:
        logits = np.asarray(forward(model, None, prompts(model, batch=1, length=4) % found.vocab_size, 3))
        LOGITS_SEEN.add(repr(found))
        if not np.isfinite(logits).all():
            raise Wrong("the logits are not finite")


#: Configs of this process whose logits were looked at: each costs a compilation.
LOGITS_SEEN: set[str] = set()


# ------------------------------------------------------------------------------------------------------------- weights


def weights(draw: random.Random, folder: Path) -> Trial:
    """Weights that are changed are refused, or each is the one that the files hold."""
    made = mutate.copied(draw.choice((single(draw.choice(FAMILIES)), sharded())), folder / "backbone")
    files = sorted(made.glob("*.safetensors"))
    change, index = draw.random(), made / INDEX
    if index.exists() and change < 0.4:
        index.write_bytes(changed_index(draw, json.loads(index.read_text())))
    elif change < 0.92:
        tensors.mutated(draw, draw.choice(files))
    else:
        mutate.file(draw, draw.choice([*files, *([index] if index.exists() else [])]))
    names = (str(made), *(file.name for file in files), INDEX, "checkpoint", "lm_head", "model.")
    return Trial(lambda: load_backbone(made), names, partial(check_weights, made, folder / "plain"))


@cache
def single(family: str) -> Path:
    folder = shared_folder() / family
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / family / name, folder)
    return folder


def sharded() -> Path:
    return FIXTURES / "gemma" / "sharded"


def changed_index(draw: random.Random, found: dict) -> bytes:
    """An index whose tensors lie elsewhere, or one that is changed as any JSON is."""
    shards = found["weight_map"]
    name, other = draw.choice(list(shards)), draw.choice(list(shards.values()))
    paths = ("../model.safetensors", "/etc/passwd", "a\\b.safetensors", "\0.safetensors", "x.safetensors", "x.bin", "")
    change = draw.choice(("other", "path", "name", "remove", "json", "json"))
    if change == "json":
        return mutate.json_text(draw, found)
    if change == "other":
        shards[name] = other
    elif change == "path":
        shards[name] = draw.choice(paths)
    elif change == "name":
        shards[draw.choice(tensors.STRANGE_NAMES)] = shards.pop(name)
    else:
        del shards[name]
    return json.dumps(found).encode()


def check_weights(folder: Path, plain: Path, model) -> None:
    """Compares with a backbone of well-formed files that hold what a strict reading found."""
    try:
        stored = stored_tensors(folder)
    except tensors.Malformed as error:
        raise Wrong(f"accepted weights that the format does not allow: {error}") from None
    plain.mkdir()
    shutil.copy(folder / "config.json", plain)
    save_file({name: array.astype(np.float32) for name, array in stored.items()}, plain / "model.safetensors")
    expected = load_backbone(plain)
    for (path, ours), (_, theirs) in zip(*map(jax.tree_util.tree_leaves_with_path, (model, expected)), strict=True):
        if not np.array_equal(ours, theirs):
            raise Wrong(f"{jax.tree_util.keystr(path)} differs from the files")


def stored_tensors(folder: Path) -> dict[str, np.ndarray]:
    single = folder / "model.safetensors"
    if single.is_file():
        return tensors.read(single)
    shards = json.loads((folder / INDEX).read_bytes())["weight_map"]
    files = {shard: tensors.read(folder / shard) for shard in set(shards.values())}
    everything = {name: array for shard in sorted(files) for name, array in files[shard].items()}
    return everything | {name: files[shard][name] for name, shard in shards.items()}
