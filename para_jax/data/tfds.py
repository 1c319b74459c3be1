"""tfds: sources, data sets that tensorflow_datasets wrote into its folder: prepared once, then read without TensorFlow.

A source is tfds:NAME[/CONFIG][:SPLIT], with splits as tensorflow_datasets writes them: tfds:glue/sst2:train[:90%].
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import expanded, printable, shorten

SCHEME = "tfds:"
CATALOG = "https://www.tensorflow.org/datasets/catalog"
READ_AT_ONCE = 1000  # examples


class NotPrepared(ValueError):
    """The data set is not on disk; the message names the folder and the command that prepares it."""


class Prepared(NamedTuple):
    """One split of a data set on disk."""

    name: str
    """NAME or NAME/CONFIG"""
    folder: Path
    """of its newest version"""
    split: str

    def rows(self) -> Iterator[tuple[str, dict]]:
        """Each example's "tfds:NAME:split[index]" and its fields: text, numbers, lists and dicts of them."""
        source = builder_of(self.folder).as_data_source(split=self.split)
        for start in range(0, len(source), READ_AT_ONCE):
            indices = range(len(source))[start : start + READ_AT_ONCE]
            for index, example in zip(indices, source.__getitems__(indices), strict=True):
                place = f"{SCHEME}{self.name}:{self.split}[{index}]"
                yield place, {name: plain(value, f"{place}: {name}") for name, value in example.items()}


def is_tfds(source: str | None) -> bool:
    return source is not None and source.startswith(SCHEME)


def parse(source: str) -> tuple[str, str | None]:
    """NAME[/CONFIG] and the split of a source, None where it names none."""
    found = re.fullmatch(SCHEME + r"(\w+(?:/[\w.+-]+)*)(?::(.+))?", source)
    if not found or ".." in found[1].split("/"):
        raise ValueError(f"{shorten(source)} is not possible; expected tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:SPLIT")
    return found[1], found[2]


def find(source: str, split: str, data_dir: str | None) -> Prepared:
    """The prepared data of data.train, data.validation or data.test (`split`), a tfds: source.

    Where the source names no split, that of the field; for the test data "validation" where a test split is not there
    or hides its labels, as those of GLUE and SuperGLUE do. Nothing is downloaded.
    """
    name, named = parse(source)
    folder = newest(name, data_dir)
    if named is None:
        options = (split, "validation") if split == "test" else (split,)
        named = next((option for option in options if has_answers(folder, option)), split)
    try:
        builder_of(folder).as_data_source(split=named)
    except ValueError:
        there = ", ".join(builder_of(folder).info.splits)
        raise ValueError(
            f"{SCHEME}{name}: no split {shorten(named)}; expected one of {there}, or a part: train[:90%]"
        ) from None
    return Prepared(name, folder, named)


def find_beside(source: str, split: str, data_dir: str | None) -> Prepared | None:
    """The validation or test data of data.train, a tfds: source that names no split; None where it has no such data."""
    name, named = parse(source)
    folder = newest(name, data_dir)
    return Prepared(name, folder, split) if named is None and has_answers(folder, split) else None


def prepare(source: str, data_dir: str | None = None) -> Path:
    """Downloads a data set, writes it as array_record and gives back its folder; one that is there is left as it is.

    ValueError, of one line, says what failed: a package that is missing, the download, or data there as TFRecord.
    """
    name, split = parse(source)
    if split is not None:
        raise ValueError(f"{source}: a data set is prepared with all of its splits; expected {SCHEME}{name}")
    try:
        with redirect_stdout(StringIO()):  # the progress bars go elsewhere
            import tensorflow_datasets as tfds

            # registered by themselves only where every optional package of all data sets is installed
            import tensorflow_datasets.question_answering
            import tensorflow_datasets.text

            builder = tfds.builder(name, data_dir=data_dir and str(expanded(data_dir)))
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # of many kinds: a builder raises what it likes
        raise ValueError(f"{SCHEME}{name}: {reason(error)}") from None
    folder = Path(builder.data_path)
    require_array_record(name, folder)
    return folder


def describe(folder: Path) -> str:
    """The splits of a prepared data set: "train 9427, validation 3270 examples"."""
    splits = builder_of(folder).info.splits
    return ", ".join(f"{name} {split.num_examples}" for name, split in splits.items()) + " examples"


# ----------------------------------------------------------------------------------------------------------- the folder


def newest(name: str, data_dir: str | None) -> Path:
    """The folder of the newest version that is prepared: DATA_DIR/NAME[/CONFIG]/VERSION."""
    from tensorflow_datasets.core.constants import DATA_DIR

    folder = expanded(data_dir or DATA_DIR) / name
    configs = [path for path in sorted(folder.glob("*")) if versions(path)]
    if not versions(folder) and len(configs) > 1:
        there = ", ".join(f"{SCHEME}{name}/{path.name}" for path in configs)
        raise ValueError(f"{SCHEME}{name}: several configs are prepared in {folder}; expected one of {there}")
    found = versions(folder) or [version for path in configs for version in versions(path)]
    if not found:
        raise NotPrepared(
            f"{SCHEME}{name}: nothing is prepared in {folder}; prepare it first: "
            f"`para-jax prepare {SCHEME}{name}{f' --data-dir {shlex.quote(data_dir)}' if data_dir else ''}`"
        )
    require_array_record(name, found[-1])
    return found[-1]


def versions(folder: Path) -> list[Path]:
    """The prepared versions in a folder, the newest last."""
    found = [path.parent for path in folder.glob("*/features.json") if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)]
    return sorted(found, key=lambda path: [int(part) for part in path.name.split(".")])


def require_array_record(name: str, folder: Path) -> None:
    held = builder_of(folder).info.file_format.value
    if held != "array_record":
        raise ValueError(
            f"{SCHEME}{name}: {folder} holds {held} files, but only array_record is read without TensorFlow; prepare "
            f"it in another folder: `para-jax prepare {SCHEME}{name} --data-dir DIR`, and set data.data_dir to that"
        )


def builder_of(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(str(folder))


def has_answers(folder: Path, split: str) -> bool:
    """Whether the split is there and its labels are known: tensorflow_datasets writes -1 for a hidden one."""
    from tensorflow_datasets.core.features import ClassLabel

    builder = builder_of(folder)
    if split not in builder.info.splits:
        return False
    labels = [name for name, feature in builder.info.features.items() if isinstance(feature, ClassLabel)]
    source = builder.as_data_source(split=split)
    return all(source[0][name] != -1 for name in labels)


# ----------------------------------------------------------------------------------------------------------------- rows


def plain(value, place: str):
    """A field without bytes and NumPy types; `place` is what an error names."""
    if isinstance(value, dict):
        return {name: plain(part, place) for name, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), place)
    if isinstance(value, list | tuple):
        return [plain(part, place) for part in value]
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is no UTF-8 text: {error}") from None


def reason(error: BaseException) -> str:
    """Why preparing failed, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError) and cause.name:
            package = cause.name.partition(".")[0]
            return f"to prepare it, {package} is needed, which is not installed: `pip install {package}`"
        cause = cause.__cause__
    line = printable((str(error).strip().splitlines() or [type(error).__name__])[0])
    if "not found" in line:  # such a name or config; what follows lists hundreds
        line = f"{line.partition('. ')[0].rstrip('.')}; {CATALOG} lists them"
    return f"it can't be prepared: {line}"
