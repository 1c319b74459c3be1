"""A folder of a few files in a bucket that is replaced whole, although each object is replaced for itself.

FOLDER/{the files, para_jax_manifest.json}. The manifest names the files' sha256. A new version is written next to them
first, as FOLDER/versions/DIGEST/*; then the manifest, which puts it in force; then each file under its own name, and
versions/ is deleted. A reader takes the files that the manifest names, wherever they lie at that moment, and never some
of one version and some of another. A folder without a manifest, copied there by other means, is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from .bucket import BucketPath

MANIFEST, VERSIONS = "para_jax_manifest.json", "versions"
#: The most bytes that are read of a manifest.
MOST = 2**16
TRIES = 5


def replace_folder(folder: BucketPath, files: dict[str, bytes]) -> None:
    """Makes the folder hold these files; a kill at any moment leaves the old ones or the new ones.

    Raises ValueError for a folder with other files, OSError where it can't be written.
    """
    inside = {path.name for path in folder.iterdir()}
    others = sorted(inside - {*files, MANIFEST, VERSIONS})
    if others or folder.is_file():
        named = ", ".join(others[:5]) or folder.name
        raise ValueError(f"{folder}: holds other files ({named}), and would be replaced; choose another folder")
    try:
        version = written_version(folder, files)
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


def mend_folder(folder: BucketPath) -> None:
    """Deletes what a kill left of the folder's first version, before it was in force."""
    if not (folder / MANIFEST).is_file():
        (folder / VERSIONS).delete_all()


def written_version(folder: BucketPath, files: dict[str, bytes]) -> BucketPath:
    """The folder in `versions` with these files, under a name made of their content."""
    name = sha256(b"".join(sha256(data).encode() for data in files.values()))[:16]
    for file, data in files.items():
        (folder / VERSIONS / name / file).write_bytes(data)
    return folder / VERSIONS / name


def read_folder(folder: BucketPath, names: list[str], most: int) -> dict[str, bytes]:
    """Those of the files that are there, all of one version.

    Raises ValueError for a file of more than `most` bytes, and for files that are not those of the manifest.
    """
    for _ in range(TRIES):
        manifest = read_manifest(folder)
        if manifest is None:
            found = {name: read(folder / name, most) for name in names}
            if read_manifest(folder) is None:
                return {name: data for name, data in found.items() if data is not None}
            continue
        found = {name: of_version(folder, name, manifest, most) for name in names if name in manifest["files"]}
        if all(data is not None for data in found.values()):
            return found  # pyright: ignore[reportReturnType]
    raise ValueError(
        f"{folder}: its files are not those that {MANIFEST} names. It is being replaced, or was changed otherwise; "
        f"save it again, or delete {MANIFEST} if the files belong together"
    )


def of_version(folder: BucketPath, name: str, manifest: dict, most: int) -> bytes | None:
    """The file of the manifest's version; None where it is not there, because the folder is being replaced.

    Raises ValueError for a file that neither this version nor the one before has.
    """
    expected = manifest["files"][name]
    data = read(folder / name, most)
    if data is not None and sha256(data) == expected:
        return data
    if data is not None and sha256(data) != manifest["before"].get(name) and read_manifest(folder) == manifest:
        raise ValueError(
            f"{folder / name}: not the file that {MANIFEST} names: it was put there by other means. Save the adapter "
            f"again, or delete {MANIFEST} if the files belong together"
        )
    kept = read(folder / VERSIONS / manifest["version"] / name, most)
    return kept if kept is not None and sha256(kept) == expected else None


def read_manifest(folder: BucketPath) -> dict | None:
    """The manifest; None where there is none. ValueError for one that nobody here wrote."""
    data = read(folder / MANIFEST, MOST)
    return None if data is None else checked_manifest(folder / MANIFEST, data)


def checked_manifest(file: BucketPath | Path, data: bytes) -> dict:
    try:
        found = json.loads(data)
        version, files, before = found["version"], found["files"], found["before"]
        sums = [*files.values(), *before.values()]
        sound = re.fullmatch("[0-9a-f]{16}", version) and all(re.fullmatch("[0-9a-f]{64}", text) for text in sums)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{file}: not a manifest; save the adapter again, or delete it if the files belong together")
    return {"version": version, "files": files, "before": before}


def require_whole(folder: Path) -> None:
    """Raises ValueError for a local copy of such a folder whose files are not those that its manifest names."""
    file = folder / MANIFEST
    if not file.is_file() or file.is_symlink():
        return
    with file.open("rb") as stream:
        manifest = checked_manifest(file, stream.read(MOST))
    for name, expected in manifest["files"].items():
        if (folder / name).is_file() and Path(name).name == name:
            with (folder / name).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == expected:
                    continue
            raise ValueError(
                f"{folder / name}: not the file that {MANIFEST} names: it was copied while the adapter was saved, or "
                f"changed. Copy the folder again, or delete {MANIFEST} if the files belong together"
            )


def read(file: BucketPath, most: int) -> bytes | None:
    """An object's content; None where it is not there, or goes meanwhile."""
    try:
        size = file.stat().st_size
        if size > most:
            raise ValueError(f"{file}: {size} bytes; expected {most} at most")
        return file.read_bytes()
    except FileNotFoundError:
        return None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
