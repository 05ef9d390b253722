"""Checkpoints that prove that they are whole. Knows neither Ray nor torch.distributed.

A checkpoint is a directory `step-00001000-attempt-001/`. Every rank writes its files aside, syncs and renames them, and
then its `part-RANK.json` (names, sizes, sha256). When all parts are there rank 0 writes `manifest.json`, last. A
directory without a manifest that verifies is not a checkpoint, and readers take only files that the manifest names.
Tensors are in safetensors files, nothing is pickled: a stranger's checkpoint can be wrong, but it cannot run code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch

from elmo_ray.checkpoints.manifest import (
    FORMAT,
    MANIFEST,
    check_size,
    checked_files,
    directory_name,
    finished_manifest,
    is_file_name,
    read_json,
    streams_name,
)
from elmo_ray.checkpoints.read import (
    Checkpoint,
    PathLike,
    listed_checkpoints,
    newest_checkpoint,
    open_checkpoint,
    previous_copy,
)
from elmo_ray.errors import CheckpointError
from elmo_ray.storage.files import HashingFile, aside, sync_directory, write_file, write_safetensors

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "commit",
    "copy_best",
    "directory_name",
    "discard",
    "newest_checkpoint",
    "open_checkpoint",
    "prune",
    "streams_name",
    "write_part",
]

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Mapping[str, torch.Tensor]]


# ---------------------------------------------------------------- writing


def write_part(directory: PathLike, rank: int, tensors: Tensors, texts: Mapping[str, str]) -> None:
    """Write the files of one rank, then `part-RANK.json`; after an error nothing of this rank is left in `directory`.

    `tensors` is file name -> tensor name -> tensor (any shape), `texts` is file name -> text. Raises OSError (disk
    full, no permission, `directory` is a finished checkpoint) and ValueError (a name or dtype that none can have).
    """
    folder = Path(directory)
    names = [*tensors, *texts]
    for name in names:
        if not is_file_name(name):
            raise ValueError(f"{name!r} is not a usable file name in a checkpoint")
    if len(set(names)) != len(names):
        raise ValueError(f"a file is given both as tensors and as text: {sorted(names)}")
    part = folder / f"part-{rank:05d}.json"
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} is a finished checkpoint and will not be written again")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # The part manifest of an earlier try must not vouch for files that are being replaced.
        part.unlink(missing_ok=True)
        files: dict[str, dict[str, Any]] = {}
        for name in names:
            if name in tensors:
                fill: Callable[[HashingFile], object] = partial(write_safetensors, tensors=tensors[name])
            else:
                fill = partial(HashingFile.write, data=texts[name].encode("utf-8"))
            size, sha256 = write_file(folder / name, rank, fill)
            files[name] = {"size": size, "sha256": sha256}
        write_json(part, rank, {"format": FORMAT, "rank": rank, "files": files})
        sync_directory(folder)
    except BaseException:
        for path in [*(folder / name for name in names), part]:
            for debris in (path, aside(path, rank)):
                with contextlib.suppress(OSError):
                    debris.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if no other rank has written there
        raise


def commit(directory: PathLike, world: int, manifest_fields: Mapping[str, Any], patience_s: float = 30.0) -> Checkpoint:
    """Rank 0, when all ranks have written: join the part manifests into `manifest.json`, the last file of a checkpoint.

    `manifest_fields` are plain JSON values; `step` and `streams` (S) are required. Waits up to `patience_s` seconds for
    files of other machines that a network file system does not show yet. Raises CheckpointError if a part or file is
    missing, two ranks wrote the same file, or the stream files do not tile 0..S-1; OSError if the manifest cannot be
    written.
    """
    folder = Path(directory)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            files = join_parts(folder, world)
            break
        except CheckpointError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                os.listdir(folder)  # makes an NFS client ask the server again
    manifest = finished_manifest({**manifest_fields, "format": FORMAT, "world": world, "files": files}, folder)
    try:
        write_json(folder / MANIFEST, 0, manifest)
    except BaseException:
        with contextlib.suppress(OSError):
            aside(folder / MANIFEST, 0).unlink(missing_ok=True)
        raise
    sync_directory(folder)
    sync_directory(folder.parent)
    return Checkpoint(folder, manifest)


def join_parts(folder: Path, world: int, check: Callable[[Path, int], None] = check_size) -> dict[str, dict[str, Any]]:
    """The files of all parts, whose manifests are in `folder`; `check` raises CheckpointError for one that is not
    there in its size."""
    files: dict[str, dict[str, Any]] = {}
    for rank in range(world):
        path = folder / f"part-{rank:05d}.json"
        part = read_json(path)
        if part.get("rank") != rank:
            raise CheckpointError(f"{path}: is not the part of rank {rank}")
        for name, entry in checked_files(path, part).items():
            if name in files:
                raise CheckpointError(f"{path}: {name} was written by another rank as well")
            check(folder / name, entry["size"])
            files[name] = entry
    return files


def write_json(path: Path, owner: int, value: dict[str, Any]) -> None:
    data = json.dumps(value, indent=1).encode("ascii")
    write_file(path, owner, lambda out: out.write(data))


WriterState = Literal["idle", "writing", "written", "failed"]


class CheckpointWriter:
    """Writes one rank's part in a thread, one at a time, so that training only waits for the copy to host memory.

    `state` goes idle -> writing -> written | failed, and back to idle with `reset()`. After a failure `error` has the
    exception and this rank's files are gone from the directory. before: called in the thread before each write.
    """

    def __init__(self, rank: int, write: Callable[..., object] = write_part) -> None:
        self.rank, self.write = rank, write
        self.before: Callable[[], object] = lambda: None
        self.state: WriterState = "idle"
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self, directory: PathLike, tensors: Tensors, texts: Mapping[str, str]) -> None:
        """Copy all tensors to host memory (they may change as soon as this returns) and start `write_part`."""
        copies = {
            name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in group.items()}
            for name, group in tensors.items()
        }
        own_texts = dict(texts)

        def job() -> None:
            self.before()
            self.write(directory, self.rank, copies, own_texts)

        self.start_job(job)

    def start_job(self, job: Callable[[], object]) -> None:
        """Run any other slow storage job (such as `copy_best`) under the same rules; RuntimeError while one runs."""
        if self.state == "writing":
            raise RuntimeError("a checkpoint is being written: wait() first")
        self.state, self.error = "writing", None

        def run() -> None:
            try:
                job()
            except Exception as error:  # whatever happened to storage, training goes on
                self.error = error
                self.state = "failed"
            else:
                self.state = "written"

        self._thread = threading.Thread(target=run, name=f"checkpoint-writer-{self.rank}", daemon=True)
        self._thread.start()

    def wait(self) -> WriterState:
        """Wait for the thread, if there is one; the state after it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.state

    def reset(self) -> None:
        """Back to idle; waits for a running write."""
        self.wait()
        self.state, self.error = "idle", None


# ---------------------------------------------------------------- keeping


def prune(
    checkpoints_dir: PathLike, keep: int, protect: Iterable[PathLike] = (), damaged: Iterable[PathLike] = ()
) -> list[Path]:
    """Remove all but the `keep` newest checkpoints and leftovers older than the newest; returns what was removed.

    A checkpoint that lacks a file or has one of the wrong size does not count as kept, and goes when it is older than
    those that do. A directory that is being written is newer than the newest and so never touched; nor are those in
    `protect`. Those in `damaged` (found so by their hashes, which are not computed here) never count as kept: or they
    would crowd out the last good one. What cannot be removed is logged and left.
    """
    spared = {Path(path).name for path in protect}
    bad = {Path(path).name for path in damaged} - spared
    removed: list[Path] = []
    whole = 0
    for folder in reversed(listed_checkpoints(Path(checkpoints_dir))):
        if whole < max(keep, 1) or folder.name in spared:
            if folder.name not in bad and _has_all_files(folder):
                whole += 1
                continue
            if whole == 0 or folder.name in spared:
                continue
        discard(folder)
        removed.append(folder)
    return removed


def _has_all_files(folder: Path) -> bool:
    try:
        open_checkpoint(folder, verify=False).verify(hashes=False)
    except CheckpointError:
        return False
    return True


def discard(directory: PathLike) -> None:
    """Remove a checkpoint directory, finished or not; the manifest first, so that half is never taken for a whole."""
    folder = Path(directory)
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)


def copy_best(checkpoint: Checkpoint, best_dir: PathLike) -> Checkpoint:
    """Copy a checkpoint to `best_dir` (aside, checked against its hashes, then renamed); replaces the one before.

    Raises CheckpointError if the source is damaged and OSError if it cannot be written; the old copy then stays.
    """
    target = Path(best_dir)
    new = target.with_name(target.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        for name, entry in checkpoint.manifest["files"].items():
            check_size(checkpoint.path / name, entry["size"])
            with open(checkpoint.path / name, "rb") as source:
                written = write_file(new / name, 0, partial(_copy, source))
            if written != (entry["size"], entry["sha256"]):
                raise CheckpointError(f"{checkpoint.path / name}: content differs from its sha256 in {MANIFEST}")
        write_json(new / MANIFEST, 0, checkpoint.manifest)
        sync_directory(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(previous_copy(target), ignore_errors=True)
        os.replace(target, previous_copy(target))
    os.replace(new, target)
    sync_directory(target.parent)
    shutil.rmtree(previous_copy(target), ignore_errors=True)
    return Checkpoint(target, checkpoint.manifest)


def _copy(source: BinaryIO, out: HashingFile) -> None:
    while chunk := source.read(4 << 20):
        out.write(chunk)
