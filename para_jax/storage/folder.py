"""A folder of a few files in a bucket that is replaced atomically, although a bucket replaces one object at a time.

The folder contains the files and para_jax_manifest.json, which lists their sha256. A new version is written in steps:
first its files as FOLDER/versions/DIGEST/*, then the manifest, which makes it the current version, then each file under
its own name. At last versions/ is deleted. A reader takes the files that the manifest lists, from either place, and
never mixes two versions. A folder without a manifest, copied there by other means, is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from .bucket import BucketPath

MANIFEST, VERSIONS = "para_jax_manifest.json", "versions"
#: The maximum size of a manifest.
MAX_MANIFEST_BYTES = 2**16
TRIES = 5


def replace_folder(folder: BucketPath, files: dict[str, bytes]) -> None:
    """Replaces the content of the folder with these files. A kill leaves the old files or the new ones.

    Raises ValueError if the folder has other files, OSError if it can't be written.
    """
    inside = {path.name for path in folder.iterdir()}
    others = sorted(inside - {*files, MANIFEST, VERSIONS})
    if others or folder.is_file():
        named = ", ".join(others[:5]) or folder.name
        raise ValueError(f"{folder} would be replaced, but contains other files ({named}); choose another folder")
    try:
        version = write_version(folder, files)
        sums = {name: sha256(data) for name, data in files.items()}
        before = {name: sha256((folder / name).read_bytes()) for name in files if name in inside}
        manifest = {"version": version.name, "files": sums, "before": before}
        (folder / MANIFEST).write_bytes((json.dumps(manifest, indent=1) + "\n").encode())
    except OSError as error:
        said = error.strerror or error
        raise OSError(f"{folder}: not saved ({said}); what was there before is unchanged") from None
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / VERSIONS).delete_all()


def remove_unfinished(folder: BucketPath) -> None:
    """Deletes a first version that was never finished, because the process was killed."""
    if not (folder / MANIFEST).is_file():
        (folder / VERSIONS).delete_all()


def write_version(folder: BucketPath, files: dict[str, bytes]) -> BucketPath:
    """Writes the files to a folder in `versions` that is named by their content, and returns it."""
    name = sha256(b"".join(sha256(data).encode() for data in files.values()))[:16]
    for file, data in files.items():
        (folder / VERSIONS / name / file).write_bytes(data)
    return folder / VERSIONS / name


def read_folder(folder: BucketPath, names: list[str], max_bytes: int) -> dict[str, bytes]:
    """The files with these names that exist, all of one version.

    Raises ValueError for a file of more than `max_bytes`, and for files that do not match the manifest.
    """
    for _ in range(TRIES):
        manifest = read_manifest(folder)
        if manifest is None:
            found = {name: read(folder / name, max_bytes) for name in names}
            if read_manifest(folder) is None:
                return {name: data for name, data in found.items() if data is not None}
            continue
        found = {
            name: file_of_version(folder, name, manifest, max_bytes) for name in names if name in manifest["files"]
        }
        if all(data is not None for data in found.values()):
            return found  # pyright: ignore[reportReturnType]
    raise ValueError(
        f"{folder}: its files do not match {MANIFEST}, because they are being replaced or were changed by other means. "
        f"Save the adapter again, or delete {MANIFEST} if the files belong together"
    )


def file_of_version(folder: BucketPath, name: str, manifest: dict, max_bytes: int) -> bytes | None:
    """The file in the manifest's version; None if it is missing, because the folder is being replaced.

    Raises ValueError for a file that belongs neither to this version nor to the previous one.
    """
    expected = manifest["files"][name]
    data = read(folder / name, max_bytes)
    if data is not None and sha256(data) == expected:
        return data
    if data is not None and sha256(data) != manifest["before"].get(name) and read_manifest(folder) == manifest:
        raise ValueError(
            f"{folder / name} does not match {MANIFEST}, because it was put there by other means. Save the adapter "
            f"again, or delete {MANIFEST} if the files belong together"
        )
    kept = read(folder / VERSIONS / manifest["version"] / name, max_bytes)
    return kept if kept is not None and sha256(kept) == expected else None


def read_manifest(folder: BucketPath) -> dict | None:
    """The manifest; None if there is none. Raises ValueError if it is damaged."""
    data = read(folder / MANIFEST, MAX_MANIFEST_BYTES)
    return None if data is None else checked_manifest(folder / MANIFEST, data)


def checked_manifest(file: BucketPath | Path, data: bytes) -> dict:
    try:
        found = json.loads(data)
        version, files, before = found["version"], found["files"], found["before"]
        sums = [*files.values(), *before.values()]
        valid = re.fullmatch("[0-9a-f]{16}", version) and all(re.fullmatch("[0-9a-f]{64}", text) for text in sums)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise ValueError(
            f"{file} is not a manifest; save the adapter again, or delete the file if the others belong together"
        )
    return {"version": version, "files": files, "before": before}


def require_matching_manifest(folder: Path) -> None:
    """Raises ValueError for a local copy of such a folder whose files do not match its manifest."""
    file = folder / MANIFEST
    if not file.is_file() or file.is_symlink():
        return
    with file.open("rb") as stream:
        manifest = checked_manifest(file, stream.read(MAX_MANIFEST_BYTES))
    for name, expected in manifest["files"].items():
        if (folder / name).is_file() and Path(name).name == name:
            with (folder / name).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == expected:
                    continue
            raise ValueError(
                f"{folder / name} does not match {MANIFEST}, because it was changed, or copied during a save of the "
                f"adapter. Copy the folder again, or delete {MANIFEST} if the files belong together"
            )


def read(file: BucketPath, max_bytes: int) -> bytes | None:
    """The content of an object; None if it does not exist or is deleted meanwhile."""
    try:
        size = file.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{file} has {size} bytes, more than the allowed {max_bytes}")
        return file.read_bytes()
    except FileNotFoundError:
        return None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
