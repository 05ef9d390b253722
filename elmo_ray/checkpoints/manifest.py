"""Form of a checkpoint's `manifest.json`: allowed names and values, its own hash, and checks of the files it names.

Whatever a file holds, which may be a stranger's, the functions that read raise nothing but CheckpointError.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from elmo_ray.errors import CheckpointError
from elmo_ray.storage import Place, file_hash, join

FORMAT = 1
MANIFEST = "manifest.json"
MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
PROGRESS_FILE = "progress.json"
MAX_JSON_BYTES = 16 << 20
_OWN_HASH = "manifest_sha256"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")
_DIRECTORY_NAME = re.compile(r"step-(\d{1,18})-attempt-(\d{1,9})\Z", re.ASCII)
_STREAMS_NAME = re.compile(r"streams-(\d{5,9})-(\d{5,9})\.safetensors\Z", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_KEY = re.compile(r"[A-Za-z0-9_.]{1,100}\Z")


def directory_name(step: int, attempt: int) -> str:
    """Return the name of a checkpoint's directory."""
    return f"step-{step:08d}-attempt-{attempt:03d}"


def parse_directory_name(name: str) -> tuple[int, int] | None:
    """Return (attempt, step) from the name of a checkpoint's directory, or None for another name."""
    match = _DIRECTORY_NAME.match(name)
    return (int(match[2]), int(match[1])) if match else None


def streams_name(first: int, last_exclusive: int) -> str:
    """Return the name of the file with streams first..last_exclusive-1; the name ends with the last stream itself."""
    return f"streams-{first:05d}-{last_exclusive - 1:05d}.safetensors"


def stream_files(names: Iterable[str]) -> list[tuple[int, int, str]]:
    """Return (first, last_exclusive, name) for each stream file among `names`, in order of streams."""
    found = [(int(m[1]), int(m[2]) + 1, name) for name in names if (m := _STREAMS_NAME.match(name))]
    return sorted(found)


def is_file_name(name: object) -> bool:
    """Return True if a checkpoint's file may have this name: plain ASCII, no path, not the name of a manifest."""
    return (
        isinstance(name, str)
        and _FILE_NAME.match(name) is not None
        and name != MANIFEST
        and not name.startswith("part-")
        and ".tmp-" not in name
    )


def finished_manifest(manifest: dict[str, Any], directory: Place) -> dict[str, Any]:
    """Return `manifest` as plain JSON values with its own hash, after `check_manifest`; ValueError if not JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(manifest, allow_nan=False))
    plain[_OWN_HASH] = _hash_of(plain)
    check_manifest(directory, plain)
    return plain


def as_json(value: Mapping[str, Any]) -> bytes:
    """Return the bytes of a manifest, or of the manifest of one rank."""
    return json.dumps(value, indent=1).encode("ascii")


def read_small(path: Path) -> bytes:
    """Return the bytes of a regular file of at most 16 MiB; raises CheckpointError naming the file."""
    check_size(path, None)
    try:
        with open(path, "rb") as raw:
            data = raw.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: is larger than {MAX_JSON_BYTES >> 20} MiB")
    return data


def parse_json(place: Place, data: bytes) -> dict[str, Any]:
    """Return the object that JSON text holds, without NaN; raises CheckpointError naming the file."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place}: is not valid JSON ({error}): the file is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{place}: is not a JSON object")
    return value


def check_manifest(directory: Place, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError unless the manifest is one that this version writes and its own hash is right."""
    path = join(directory, MANIFEST)
    if manifest.get("format") != FORMAT or isinstance(manifest["format"], bool):
        raise CheckpointError(f"{path}: has format {manifest.get('format')!r:.40}; this version reads format {FORMAT}")
    if manifest.get(_OWN_HASH) != _hash_of(manifest):
        raise CheckpointError(f"{path}: does not agree with its own hash: the file is damaged")
    for key, least in (("step", 0), ("world", 1), ("streams", 1)):
        if not is_count(manifest.get(key), least):
            raise CheckpointError(f"{path}: {key} is {manifest.get(key)!r:.40}, not a whole number of at least {least}")
    identity = manifest.get("identity", {})
    for key in identity if isinstance(identity, dict) else ():
        if not _KEY.match(key):  # it will stand in messages
            raise CheckpointError(f"{path}: its identity has {key!r:.80}, which is no setting")
    expected = 0
    for first, last_exclusive, name in stream_files(checked_files(path, manifest)):
        if first != expected or last_exclusive <= first:
            raise CheckpointError(f"{path}: {name} does not begin at stream {expected}: streams are missing or doubled")
        expected = last_exclusive
    if expected != manifest["streams"]:
        raise CheckpointError(f"{path}: has files for streams 0..{expected - 1}, but the run has {manifest['streams']}")


def checked_files(path: Place, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the `files` of a manifest, or of one rank's: name -> {size, sha256}.

    Raises CheckpointError, naming `path`, unless names and values are allowed.
    """
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: has no table of files")
    for name, entry in files.items():
        if not is_file_name(name):
            raise CheckpointError(f"{path}: names the file {name!r:.80}, which no checkpoint may have")
        good = isinstance(entry, dict) and is_count(entry.get("size"), 0)
        if not good or not isinstance(entry.get("sha256"), str) or not _SHA256.match(entry["sha256"]):
            raise CheckpointError(f"{path}: has no size and sha256 for {name}")
    return files


def entry_of(path: Path) -> dict[str, Any]:
    """Return a file's entry for a manifest: its size in bytes and sha256. Raises OSError."""
    return {"size": path.stat().st_size, "sha256": file_hash(path)}


def check_size(path: Path, size: int | None, place: Place | None = None) -> None:
    """Raise CheckpointError unless `path` is a regular file of `size` bytes (None: any size).

    place: the name of the file in the message, where `path` is a copy of it.
    """
    place = path if place is None else place
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{place}: the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise CheckpointError(f"{place}: is not a regular file")
    if size is not None:
        _compare_size(place, status.st_size, size)


def check_sizes(directory: Place, files: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> None:
    """Raise CheckpointError unless `sizes`, of a directory's files in bytes, has all `files` of a manifest."""
    for name, entry in files.items():
        if name not in sizes:
            raise CheckpointError(f"{join(directory, name)}: the file is missing or not a regular file")
        _compare_size(join(directory, name), sizes[name], entry["size"])


def check_content(path: Path, entry: Mapping[str, Any], place: Place | None = None) -> None:
    """Raise CheckpointError unless a file has the size and sha256 of its entry; place: as for `check_size`."""
    place = path if place is None else place
    check_size(path, entry["size"], place)
    try:
        damaged = file_hash(path) != entry["sha256"]
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be read: {error.strerror or error}") from None
    if damaged:
        raise CheckpointError(f"{place}: content differs from its sha256 in {MANIFEST}: the file is damaged")


def _compare_size(place: Place, found: int, size: int) -> None:
    if found != size:
        state = "truncated" if found < size else "too long"
        raise CheckpointError(f"{place}: has {found} bytes, not {size}: the file is {state}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def is_count(value: object, least: int = 0) -> bool:
    """Return True if a value from JSON is a whole number from `least` to 2**62 - 1, so that an int64 holds it."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 62


def _hash_of(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != _OWN_HASH}
    try:
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return "not hashable"
    return hashlib.sha256(text.encode("ascii")).hexdigest()
