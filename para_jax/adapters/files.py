"""The adapter folder: adapter_config.json, adapter_model.safetensors and a model card, as in Hugging Face PEFT.

Methods that PEFT knows are read and written in its format (formats/peft.py), the others in our own (formats/own.py),
and so are scopes that PEFT doesn't know.

A folder may come from a hub, so its content is not trusted: no pickle is read, no link is followed, sizes are bounded,
and a field or a tensor that is not known is refused. Only the first two files are opened.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..backbone.text_part import has_image_part, text_tensors, whole_name
from ..config import ModelConfig
from ..io.atomic import errors_named, files_left, replacing, write_bytes
from ..io.checks import expanded, one_of, shorten
from ..io.hub import BUILT_IN, BUILT_IN_HUB_ID, resolve_adapter
from ..io.storage.bucket import BucketPath, Place
from ..io.storage.cache import of_one_version
from ..io.tensor_file import StoredTensor, stored_tensors
from ..io.untrusted import one_line, read_json, safe_names
from .adapter import Adapter, abstract, with_leaves
from .card import example_of, given_lines, model_card, with_test_score
from .formats.own import ValueCounts, own_config, read_own_config, require_same_backbone
from .formats.peft import peft_base, peft_config, peft_tensors
from .method import Method, require_peft_fits
from .methods import METHODS, form_named, method_of
from .scope import scope_of

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
#: The name of an older PEFT for the weights.
PICKLE = "adapter_model.bin"


class Described(NamedTuple):
    """What an adapter folder says about itself, without its weights."""

    method: Method
    config: Any
    backbone: dict
    """num_layers; in our own format also model_type, width, site_widths and perhaps fingerprint"""
    base_model: str
    """where the backbone comes from; "" if it is not named"""
    counts: ValueCounts


# -------------------------------------------------------------------------------------------------------------- saving


def save_adapter(
    adapter: Adapter,
    folder: str | Path | BucketPath,
    *,
    base_model: str | Path | None = None,
    model=None,
    card: str | Iterable[str] = (),
    example: str | list[dict] = "a prompt",
) -> None:
    """Writes an adapter folder, or replaces the adapter in it as `write_folder` does.

    Args:
        base_model: where the backbone comes from, for the model card and adapter_config.json (None or "": not named).
            The built-in name becomes the hub id of that model.
        model: the backbone itself. A folder in our own format keeps its fingerprint, that of its first layer's q_proj:
            loading the adapter on a backbone of the same shape that differs there gives a warning.
        card: further Markdown of the model card, a text or lines: data, scores, licences.
        example: the prompt of the example code in the card.

    Raises ValueError for a folder that holds other files, OSError where it can't be written (a full disk).

    >>> save_adapter(adapter, "runs/copy/adapter", model=model)
    >>> load_adapter("runs/copy/adapter", model.config, model=model).config == adapter.config
    True
    """
    from safetensors.numpy import save

    base_model, folder = hub_name(one_line(str(base_model or ""))), expanded(folder).resolve()
    method = method_of(adapter.config).form_of(adapter.config)
    card = [card] if isinstance(card, str) else card
    config = config_json(method, adapter, base_model, getattr(model, "fingerprint", None))
    tensors = {name: np.asarray(array, np.float32) for name, array in method.to_tensors(adapter).items()}
    if method.in_peft and has_image_part(adapter.backbone.model_type):
        tensors = {whole_name(name): array for name, array in tensors.items()}
    files = {
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS: save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, {"format": "pt"}),
        CARD: model_card(method, adapter.config, base_model, card, example).encode(),
    }
    write_folder(folder, files)


def hub_name(base_model: str) -> str:
    """The name of a backbone that other libraries know."""
    return BUILT_IN_HUB_ID if base_model == BUILT_IN else base_model


def copy_for_peft(source: Path, folder: str | Path | BucketPath, *, base_model: str = "") -> None:
    """Writes a copy of a folder in PEFT's format, with the hub id of its base model and a new model card. The weights
    are the same bytes.

    Args:
        base_model: the hub id or folder to name; default: what the adapter names.

    Raises ValueError for an adapter that PEFT does not know, or that names no base model.
    """
    files = of_one_version(source / CONFIG, lambda: files_for_peft(source, base_model))
    write_folder(expanded(folder).resolve(), files)


def files_for_peft(source: Path, base_model: str) -> dict[str, bytes]:
    """The files of copy_for_peft, by name."""
    method, config, _, named = read_config(source)
    require_peft_fits(str(source), method, config)
    base_model = hub_name(one_line(base_model) or named)
    if not base_model:
        raise ValueError(f"{source} names no base model, and PEFT needs one; give its hub id")
    held = {key: value for key, value in read_json(own_file(source, CONFIG)).items() if key != "revision"}
    written = held | peft_base(base_model)
    card = (source / CARD).read_bytes() if (source / CARD).is_file() and not (source / CARD).is_symlink() else b""
    text = str(card, "utf-8", "replace")
    return {
        CONFIG: (json.dumps(written, indent=2) + "\n").encode(),
        WEIGHTS: own_file(source, WEIGHTS).read_bytes(),
        CARD: model_card(method, config, base_model, given_lines(text), example_of(text)).encode(),
    }


def add_test_score(folder: str | Path | BucketPath, line: str) -> None:
    """Adds a line with the test score to the model card of an adapter that was saved."""
    card = expanded(folder).resolve() / CARD
    write_bytes(card, with_test_score(card.read_bytes().decode(), line).encode())


def write_folder(folder: Place, files: dict[str, bytes]) -> None:
    """Writes the weights first and the config last, each atomically: a folder with a config is whole.

    If the config changes, the old one is deleted first, so a kill may leave no adapter. If it stays the same, as in a
    run, a kill leaves the old adapter or the new one, because the weights are one file.
    """
    require_replaceable(folder)
    config = folder / CONFIG
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in [left for name in files for left in files_left(folder / name)]:
            left.unlink()
        with replacing(folder / WEIGHTS) as stream:
            stream.write(files[WEIGHTS])
            # New weights must never meet an old config: a folder without one holds no adapter.
            if config.is_file() and config.read_bytes() != files[CONFIG]:
                config.unlink()
        for name in (CARD, CONFIG):
            write_bytes(folder / name, files[name])


def require_replaceable(folder: Place) -> None:
    """Raises ValueError for a folder with files that no adapter has: its README.md may be another one's."""
    if folder.exists():
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        left = {left.name for name in (CONFIG, WEIGHTS, CARD) for left in files_left(folder / name)}
        if others := sorted(names - {CONFIG, WEIGHTS, CARD} - left):
            raise ValueError(
                f"{folder} holds other files ({safe_names(others)}), so it is not an adapter's alone; move them away, "
                "or choose another folder"
            )


def config_json(method: Method, adapter: Adapter, base_model: str, fingerprint: str | None) -> dict:
    """The content of adapter_config.json."""
    if method.to_peft_config is not None:
        shared = peft_config(method.peft_type, adapter.config, adapter.backbone, base_model)
        return shared | method.to_peft_config(adapter.config, adapter.backbone)
    return own_config(method.peft_type, adapter.config, adapter.backbone, base_model, fingerprint)


# ------------------------------------------------------------------------------------------------------------- loading


def load_adapter(source: str | Path | BucketPath, model_config: ModelConfig, *, model=None) -> Adapter:
    """The adapter of a folder or a hub id (user/name or user/name@revision), for the backbone of `model_config`.

    Args:
        model: the backbone itself; a fingerprint that differs from the adapter's gives a warning.

    Raises ValueError, naming the problem, for an adapter that is damaged, not supported or made for another backbone.

    >>> load_adapter("runs/a/adapter", model.config).config.r
    12
    """
    try:
        folder = resolve_adapter(source)
        return of_one_version(folder / CONFIG, lambda: read_adapter(folder, source, model_config, model))
    except ValueError as error:
        raise error if str(source) in str(error) else ValueError(f"{source}: {error}") from None


def read_adapter(folder: Path, source: str | Path | BucketPath, model_config: ModelConfig, model) -> Adapter:
    """The adapter of a folder; `source` is the name that the user gave it."""
    method, config, backbone, base_model = read_config(folder)
    if not method.in_peft:
        require_same_backbone(backbone, model_config, base_model)
    theirs, ours = backbone.get("fingerprint"), getattr(model, "fingerprint", None)
    if theirs and ours and theirs != ours:
        warnings.warn(
            f"{source}: the adapter was trained on other weights of this shape, or on the same in another dtype (the "
            f"fingerprint of its backbone's first q_proj is {shorten(theirs, 16)}, this one's {shorten(ours, 16)})",
            stacklevel=5,
        )
    tensors = read_tensors(folder, expected_shapes(method, config, model_config))
    config, leaves = method.from_tensors(config, model_config, tensors)
    adapter = abstract_adapter(method, config, model_config)
    return with_leaves(adapter, {name: jnp.array(leaf) for name, leaf in leaves.items()})


@lru_cache(64)
def abstract_adapter(method: Method, config: Any, model_config: ModelConfig) -> Adapter:
    """`abstract`, kept for the next adapter of the same config: thousands may be loaded."""
    return abstract(method.adapter, config, model_config)


@lru_cache(64)
def expected_shapes(method: Method, config: Any, model_config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a folder's tensors, by name."""
    if method.tensor_shapes is not None:
        return method.tensor_shapes(config, model_config)
    tensors = jax.eval_shape(method.to_tensors, abstract_adapter(method, config, model_config))
    return {name: tensor.shape for name, tensor in tensors.items()}


def read_adapter_config(folder: str | Path | BucketPath) -> Described:
    """What an adapter folder says about itself. PARA's needs no weights for it."""
    place = expanded(folder)
    local = resolve_adapter(place) if isinstance(place, BucketPath) else place
    method, config, backbone, base_model = read_config(local)
    counts = ValueCounts(*method.count_values(config, backbone, lambda: tensor_shapes(local)))
    if scope_of(config)[0] == "prompt":
        counts = counts._replace(carried=0)
    return Described(method, config, backbone, base_model, counts)


def read_config(folder: Path) -> tuple[Method, Any, dict, str]:
    """adapter_config.json, checked: the method, its config, the backbone, and the name of the base model."""
    file = own_file(folder, CONFIG)
    found = read_json(file)
    kind = found.get("peft_type")
    method = form_named(kind)
    if method is None:
        known = one_of(method.peft_type for method in METHODS)
        raise ValueError(f"{file}: peft_type {shorten(kind)} is not supported; expected {known}")
    shapes = tensor_shapes(folder) if method.in_peft else {}
    try:
        if method.from_peft_config is not None:
            layers = [layer for _, _, layer in peft_tensors(shapes)]
            if not layers:
                raise ValueError(
                    f"no tensor in {WEIGHTS} belongs to a decoder's layer (base_model.model.model.layers.0. ...); the "
                    f"first is {shorten(next(iter(shapes), None))}"
                )
            config = method.from_peft_config(found, shapes)
            backbone = {"num_layers": 1 + max(layers)}
        else:
            config, backbone = read_own_config(method.config, found)
            method.adapter.layers(config, backbone["num_layers"])  # raises for a layer that the backbone lacks
    except ValueError as error:
        raise ValueError(f"{file}: {str(error)[:500]}") from None
    named = [found.get("base_model_name_or_path"), found.get("revision") if method.in_peft else None]
    base_model, revision = (text if isinstance(text, str) else "" for text in named)
    return method, config, backbone, one_line(f"{base_model}@{revision}" if base_model and revision else base_model)


def own_file(folder: Path, name: str) -> Path:
    """folder/name, if it is a plain file. Raises ValueError for a link, which may lead out of the folder."""
    file = folder / name
    if file.is_symlink():
        raise ValueError(f"{file} is a link, which may lead out of the folder; put the file itself there")
    if not file.is_file():
        advice = f"choose a folder with {CONFIG} and {WEIGHTS}"
        if (folder / PICKLE).exists():
            advice = (
                f"{PICKLE} is a pickle, which could run code, so it is not read. Convert it: "
                f"safetensors.torch.save_file(torch.load({PICKLE!r}, weights_only=True), {WEIGHTS!r})"
            )
        raise ValueError(f"{folder} has no {name}; {advice}")
    return file


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the folder's tensors, by name. Their content is not read."""
    return {name: tensor.shape for name, tensor in weights_of(folder).items()}


def read_tensors(folder: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The folder's tensors as float32. Raises ValueError unless they are finite and have the expected names and
    shapes."""
    stored = weights_of(folder)
    require_as_expected(folder / WEIGHTS, stored, expected)
    tensors = {name: tensor.read().astype(np.float32, copy=False) for name, tensor in stored.items()}
    require_finite(str(folder / WEIGHTS), tensors)
    return tensors


def weights_of(folder: Path) -> dict[str, StoredTensor]:
    """The tensors in the folder's weights file, by name."""
    return text_tensors(stored_tensors(own_file(folder, WEIGHTS)))


def require_as_expected(file: Path, stored: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]]) -> None:
    problems = {
        "missing": [name for name in expected if name not in stored],
        "unknown": [name for name in stored if name not in expected],
        "misshapen": [
            f"{name} {list(tensor.shape)} (expected {list(expected[name])})"
            for name, tensor in stored.items()
            if name in expected and tensor.shape != expected[name]
        ],
        "not of F32, F16 or BF16": [n for n, tensor in stored.items() if tensor.dtype not in ("F32", "F16", "BF16")],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {safe_names(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{file}: the tensors do not match {CONFIG}. {listed}")


def require_finite(where: str, tensors: dict[str, np.ndarray]) -> None:
    broken = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(f"{where}: these tensors have NaN or infinite values: {safe_names(broken)}")
