"""Checkpoints in an object store: what `training.checkpoint` does in a folder, under a URI.

The files are the same. A rank writes its part to its machine's disk and sends it, its `part-RANK.json` last; rank 0
sends `manifest.json` when all parts are there in their sizes. An object appears whole or not at all, so nothing is
written aside. To read a checkpoint, a machine fetches it once, for all workers on it, and compares sizes and hashes.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elmo_ray import storage
from elmo_ray.checkpoints.manifest import (
    FORMAT,
    MANIFEST,
    check_manifest,
    finished_manifest,
    parse_directory_name,
    read_json,
)
from elmo_ray.checkpoints.read import Checkpoint, open_checkpoint
from elmo_ray.checkpoints.write import Tensors, join_parts
from elmo_ray.checkpoints.write import write_part as write_part_here
from elmo_ray.errors import CheckpointError, ConfigError
from elmo_ray.storage import Place
from elmo_ray.storage.files import file_hash
from elmo_ray.storage.local_copy import scratch

logger = logging.getLogger(__name__)

_FETCHED_FOR_S = 1800.0
"""After which a fetched checkpoint makes room for another of the same run: nobody is reading it any more."""


@dataclass(frozen=True)
class StoredCheckpoint:
    """A committed checkpoint in a store. path: its URI."""

    path: str
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


# ---------------------------------------------------------------- writing


def write_part(directory: Place, rank: int, tensors: Tensors, texts: Mapping[str, str]) -> None:
    """As `checkpoint.write_part`; needs room for the part in the folder for temporary files (TMPDIR)."""
    uri = os.fspath(directory)
    if storage.exists(storage.join(uri, MANIFEST)):
        raise FileExistsError(f"{uri} is a finished checkpoint and will not be written again")
    part = f"part-{rank:05d}.json"
    names = [*tensors, *texts]
    with tempfile.TemporaryDirectory(prefix="elmo-ray-part-") as folder:
        here = Path(folder, storage.base_name(uri))
        write_part_here(here, rank, tensors, texts)
        try:
            # The part manifest of an earlier try must not vouch for files that are being replaced.
            storage.remove(storage.join(uri, part))
            for name in [*names, part]:
                storage.upload(here / name, storage.join(uri, name))
        except BaseException:
            for name in [part, *names]:
                with contextlib.suppress(OSError):
                    storage.remove(storage.join(uri, name))
            raise


def commit(
    directory: Place, world: int, manifest_fields: Mapping[str, Any], patience_s: float = 30.0
) -> StoredCheckpoint:
    """As `checkpoint.commit`."""
    uri = os.fspath(directory)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            files = _files_of_parts(uri, world)
            break
        except (CheckpointError, FileNotFoundError):
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.5)
    manifest = finished_manifest({**manifest_fields, "format": FORMAT, "world": world, "files": files}, Path(uri))
    storage.write_bytes(storage.join(uri, MANIFEST), _as_json(manifest))
    return StoredCheckpoint(uri, manifest)


def publish(folder: Path, uri: str) -> None:
    """Send a whole checkpoint from this machine, its manifest last. Raises CheckpointError."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    try:
        for name in [*names, MANIFEST]:
            storage.upload(folder / name, storage.join(uri, name))
    except OSError as error:
        raise CheckpointError(f"{uri}: cannot be written ({error.strerror or error})") from None


def _files_of_parts(uri: str, world: int) -> dict[str, dict[str, Any]]:
    sizes = {name: status.st_size for name, status in storage.listing(uri).items()}

    def check(path: Path, size: int) -> None:
        if sizes.get(path.name) != size:
            raise CheckpointError(f"{storage.join(uri, path.name)}: has {sizes.get(path.name)} bytes, not {size}")

    with tempfile.TemporaryDirectory(prefix="elmo-ray-parts-") as folder:
        for rank in range(world):
            name = f"part-{rank:05d}.json"
            storage.download(storage.join(uri, name), Path(folder, name))
        return join_parts(Path(folder), world, check)


def _as_json(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode("ascii")


# ---------------------------------------------------------------- reading


def newest_checkpoint(checkpoints_dir: Place, damaged: list[Place] | None = None) -> StoredCheckpoint | None:
    """As `checkpoint.newest_checkpoint`. A store that does not answer is an error and never a damaged checkpoint."""
    problems: list[str] = []
    for name in reversed(_listed(checkpoints_dir)):
        uri = storage.join(checkpoints_dir, name)
        try:
            if not storage.exists(storage.join(uri, MANIFEST)):
                logger.warning("%s has no %s: it was never finished; skipped", uri, MANIFEST)
                continue
            return StoredCheckpoint(uri, open_stored(uri).manifest)
        except CheckpointError as error:
            logger.warning("checkpoint skipped: %s", error)
            problems.append(str(error))
            if damaged is not None:
                damaged.append(uri)
        except OSError as error:
            raise CheckpointError(f"{uri}: cannot be read: {error.strerror or error}") from None
    if problems:
        raise CheckpointError(f"{checkpoints_dir}: no checkpoint is whole; the newest: {problems[0]}")
    return None


def open_stored(directory: Place) -> Checkpoint:
    """Fetch a checkpoint to this machine, unless that has been done, and compare every byte with its manifest.

    Raises CheckpointError where it is damaged or none, OSError where the store does not answer.
    """
    uri = os.fspath(directory)
    folder = _cache() / hashlib.sha256(uri.rpartition("/")[0].encode()).hexdigest()[:16] / storage.base_name(uri)
    with _one_at_a_time(folder):
        try:
            data = storage.read_bytes(storage.join(uri, MANIFEST))
        except FileNotFoundError:
            raise CheckpointError(f"{uri}: is no checkpoint, as it has no {MANIFEST}") from None
        if not (folder / MANIFEST).exists() or (folder / MANIFEST).read_bytes() != data:
            _fetch(uri, data, folder)
        return open_checkpoint(folder, verify=False)


def stored_source(uri: str, checkpoint: str) -> str | None:
    """The URI of the checkpoint that a SOURCE in a store means: of a run its best (or `last`, or a name), or itself;
    None for a folder of exported weights. Raises ConfigError where it is nothing of these, OSError."""
    if storage.exists(storage.join(uri, MANIFEST)):
        return uri
    inside = storage.folders(uri)
    if "checkpoints" not in inside and "best" not in inside:
        if uri.endswith(".hdf5") or storage.exists(storage.join(uri, "weights.hdf5")):
            return None
        raise ConfigError(f"{uri}: no run, checkpoint or weights.hdf5")
    checkpoints, best = storage.join(uri, "checkpoints"), storage.join(uri, "best")
    if checkpoint == "best" and storage.exists(storage.join(best, MANIFEST)):
        return best
    if checkpoint in ("best", "last"):
        newest = newest_checkpoint(checkpoints)
        if newest is None:
            raise CheckpointError(f"{checkpoints}: has no finished checkpoint yet")
        return newest.path
    if checkpoint not in _listed(checkpoints):
        names = ", ".join(_listed(checkpoints)[-5:]) or "none"
        raise ConfigError(f"checkpoint={checkpoint}: must be best, last or one in {checkpoints} (newest: {names})")
    return storage.join(checkpoints, checkpoint)


def fetched_files(uri: str, names: Iterable[str]) -> Path:
    """A local folder with those files of a folder in a store that are there; of a file: with its neighbours."""
    folder = scratch("fetched")
    parent = uri.rpartition("/")[0] if uri.endswith(".hdf5") else uri
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            storage.download(storage.join(parent, name), folder / name)
    return folder


def _fetch(uri: str, manifest_bytes: bytes, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    aside = folder / f"{MANIFEST}.fetched"
    aside.write_bytes(manifest_bytes)
    manifest = read_json(aside)
    check_manifest(Path(uri), manifest)
    try:
        for name, entry in manifest["files"].items():
            try:
                storage.download(storage.join(uri, name), folder / name)
            except FileNotFoundError:
                raise CheckpointError(f"{uri}/{name}: the file is missing") from None
            size = (folder / name).stat().st_size
            if size != entry["size"]:
                raise CheckpointError(f"{uri}/{name}: has {size} bytes, not {entry['size']}")
            if file_hash(folder / name) != entry["sha256"]:
                raise CheckpointError(f"{uri}/{name}: content differs from its sha256 in {MANIFEST}: it is damaged")
        os.replace(aside, folder / MANIFEST)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _cache() -> Path:
    """Where this machine keeps what it has fetched: one user's own."""
    folder = Path(tempfile.gettempdir(), f"elmo-ray-{getpass.getuser()}", "fetched")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.parent.stat().st_uid != os.getuid():
        raise CheckpointError(f"{folder.parent}: belongs to somebody else; set TMPDIR to a folder of your own")
    return folder


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Workers of one machine take turns: the first fetches, the others find it there. Older ones make room."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for other in folder.parent.iterdir():
            if other.is_dir() and other != folder and time.time() - other.stat().st_mtime > _FETCHED_FOR_S:
                shutil.rmtree(other, ignore_errors=True)
        yield


# ---------------------------------------------------------------- keeping


def prune(checkpoints_dir: Place, keep: int, protect: Iterable[Place] = (), damaged: Iterable[Place] = ()) -> None:
    """As `checkpoint.prune`."""
    spared = {storage.base_name(place) for place in protect}
    bad = {storage.base_name(place) for place in damaged} - spared
    whole = 0
    for name in reversed(_listed(checkpoints_dir)):
        uri = storage.join(checkpoints_dir, name)
        if whole < max(keep, 1) or name in spared:
            if name not in bad and _has_all_files(uri):
                whole += 1
                continue
            if whole == 0 or name in spared:
                continue
        discard(uri)


def look(directory: Place) -> StoredCheckpoint:
    """A checkpoint whose files are all there in their sizes; their content is not read. Raises CheckpointError, OSError
    where the store does not answer."""
    uri = os.fspath(directory)
    with tempfile.TemporaryDirectory(prefix="elmo-ray-look-") as folder:
        try:
            storage.download(storage.join(uri, MANIFEST), Path(folder, MANIFEST))
        except FileNotFoundError:
            raise CheckpointError(f"{uri}: is no checkpoint, as it has no {MANIFEST}") from None
        manifest = read_json(Path(folder, MANIFEST))
    check_manifest(Path(uri), manifest)
    sizes = {name: status.st_size for name, status in storage.listing(uri).items()}
    for name, entry in manifest["files"].items():
        if sizes.get(name) != entry["size"]:
            raise CheckpointError(f"{uri}/{name}: has {sizes.get(name)} bytes, not {entry['size']}")
    return StoredCheckpoint(uri, manifest)


def _has_all_files(uri: str) -> bool:
    try:
        look(uri)
    except CheckpointError:
        return False
    return True


def discard(directory: Place) -> None:
    """As `checkpoint.discard`."""
    uri = os.fspath(directory)
    try:
        storage.remove(storage.join(uri, MANIFEST))
        for name in storage.listing(uri):
            storage.remove(storage.join(uri, name))
    except OSError as error:
        logger.warning("%s could not be removed: %s", uri, error.strerror or error)


def copy_best(checkpoint: Checkpoint | StoredCheckpoint, best_dir: Place) -> None:
    """Copy a checkpoint to `best_dir` inside the store, its manifest last; the one before goes first.

    A process that dies meanwhile leaves a `best_dir` without a manifest; `--resume` makes the copy anew. Raises
    OSError.
    """
    uri = os.fspath(best_dir)
    storage.remove(storage.join(uri, MANIFEST))
    names = checkpoint.manifest["files"]
    for name in storage.listing(uri):
        if name not in names:
            storage.remove(storage.join(uri, name))
    for name in names:
        storage.copy(storage.join(str(checkpoint.path), name), storage.join(uri, name))
    storage.write_bytes(storage.join(uri, MANIFEST), _as_json(checkpoint.manifest))


def of_step(checkpoints_dir: Place, step: int) -> list[str]:
    """The checkpoints of a step, newest attempt first, whole or not."""
    found = [name for name in reversed(_listed(checkpoints_dir)) if (parse_directory_name(name) or (0, -1))[1] == step]
    return [storage.join(checkpoints_dir, name) for name in found]


def _listed(checkpoints_dir: Place) -> list[str]:
    try:
        names = storage.folders(checkpoints_dir)
    except OSError as error:
        raise CheckpointError(f"{checkpoints_dir}: cannot be listed: {error.strerror or error}") from None
    found = [(key, name) for name in names if (key := parse_directory_name(name)) is not None]
    return [name for _, name in sorted(found)]
