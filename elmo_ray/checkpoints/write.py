"""Writing of checkpoints that prove that they are whole, without Ray and torch.distributed.

A checkpoint is a directory `step-00001000-attempt-001/` of a folder or an object store. Every rank writes its files,
each of which appears whole or not at all, and then its own manifest `part-RANK.json` (names, sizes, sha256). When all
ranks have done so, rank 0 joins their manifests into `manifest.json`, the last file. A directory without a manifest
that verifies is not a checkpoint, and readers take only files that the manifest names. Tensors are in safetensors files
and nothing is pickled: a stranger's checkpoint can be wrong, but it cannot run code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from elmo_ray.checkpoints.manifest import (
    FORMAT,
    MANIFEST,
    as_json,
    check_sizes,
    checked_files,
    finished_manifest,
    is_file_name,
    parse_json,
)
from elmo_ray.checkpoints.read import Checkpoint, listed_checkpoints, open_checkpoint
from elmo_ray.checkpoints.stores import StorageError, Store, store_of
from elmo_ray.errors import CheckpointError
from elmo_ray.storage import Place, at_once, base_name, join

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Mapping[str, torch.Tensor]]
"""File name -> tensor name -> tensor of any shape."""


# ---------------------------------------------------------------- writing


def write_rank_files(directory: Place, rank: int, tensors: Tensors, texts: Mapping[str, str]) -> None:
    """Write the files of one rank, and its manifest `part-RANK.json` last; an error leaves none of them there.

    texts: file name -> text. Raises OSError (disk full, no permission, `directory` is a finished checkpoint) and
    ValueError for a name that no file may have.
    """
    place = os.fspath(directory)
    store = store_of(place)
    names = [*tensors, *texts]
    for name in names:
        if not is_file_name(name):
            raise ValueError(f"{name!r} is not a usable file name in a checkpoint")
    if len(set(names)) != len(names):
        raise ValueError(f"a file is given both as tensors and as text: {sorted(names)}")
    own_manifest = _rank_manifest_name(rank)
    if store.exists(join(place, MANIFEST)):
        raise FileExistsError(f"{place} is a finished checkpoint and will not be written again")
    try:
        # The manifest of an earlier try must not vouch for files that are being replaced.
        store.remove(join(place, own_manifest))
        files: dict[str, dict[str, Any]] = {}
        for name, group in tensors.items():
            files[name] = store.put(join(place, name), partial(_write_tensors, tensors=group))
        for name, text in texts.items():
            files[name] = store.put(join(place, name), partial(_write_bytes, data=text.encode("utf-8")))
        about = as_json({"format": FORMAT, "rank": rank, "files": files})
        store.put(join(place, own_manifest), partial(_write_bytes, data=about))
    except BaseException:
        with at_once():
            for name in [own_manifest, *names]:
                with contextlib.suppress(OSError):
                    store.remove(join(place, name))
            with contextlib.suppress(OSError, CheckpointError):
                if not store.files(place):  # no other rank has written there
                    store.remove_directory(place)
        raise


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as a safetensors file; equal tensors give equal bytes in any order of names."""
    ready: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, but a checkpoint needs each of them: write a copy
        ready[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(ready, path)  # writes from the tensors' own memory, without Python's lock
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        number = int(code[1]) if code else 0
        raise OSError(number, os.strerror(number) if code else str(error), str(path)) from None
    path.chmod(mode)  # safetensors makes files that only their owner can read


def _rank_manifest_name(rank: int) -> str:
    return f"part-{rank:05d}.json"


def commit(directory: Place, world: int, manifest_fields: Mapping[str, Any], patience_s: float = 30.0) -> Checkpoint:
    """Join all ranks' manifests into `manifest.json`, the last file of a checkpoint, and return the checkpoint.

    For rank 0, when all ranks have written. manifest_fields: plain JSON values; `step` and `streams` (S) are required.
    patience_s: seconds to wait for files of other machines, as a network file system may show them late. Raises
    CheckpointError if a file is missing, two ranks wrote the same file, or the stream files do not tile 0..S-1, and
    OSError if the manifest cannot be written.
    """
    place = os.fspath(directory)
    store = store_of(place)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            files = _join_rank_files(store, place, world)
            break
        except CheckpointError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.3)
    manifest = finished_manifest({**manifest_fields, "format": FORMAT, "world": world, "files": files}, place)
    store.put(join(place, MANIFEST), partial(_write_bytes, data=as_json(manifest)))
    return Checkpoint(place, manifest)


def _join_rank_files(store: Store, directory: str, world: int) -> dict[str, dict[str, Any]]:
    """Return the files of all ranks, name -> {size, sha256}; CheckpointError where a file is missing."""
    sizes = store.files(directory)  # first: an NFS client that lists a directory asks the server again
    files: dict[str, dict[str, Any]] = {}
    for rank in range(world):
        place = join(directory, _rank_manifest_name(rank))
        manifest = parse_json(place, store.read(place))
        if manifest.get("rank") != rank:
            raise CheckpointError(f"{place}: is not the manifest of rank {rank}")
        for name, entry in checked_files(place, manifest).items():
            if name in files:
                raise CheckpointError(f"{place}: {name} was written by another rank as well")
            files[name] = entry
    check_sizes(directory, files, sizes)
    return files


WriterState = Literal["idle", "writing", "written", "failed"]


class CheckpointWriter:
    """Writer of one rank's files in a thread, so that training waits only for the copy to host memory.

    It does one job at a time. `state` goes idle -> writing -> written | failed, and back to idle with `reset()`. After
    a failure `error` has the exception, and this rank's files are gone from the directory. before: called in the thread
    before each `write_rank_files`.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.before: Callable[[], object] = lambda: None
        self.state: WriterState = "idle"
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self, directory: Place, tensors: Tensors, texts: Mapping[str, str]) -> None:
        """Copy all tensors to host memory (they may change as soon as this returns) and start `write_rank_files`."""
        copies = {
            name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in group.items()}
            for name, group in tensors.items()
        }
        own_texts = dict(texts)

        def job() -> None:
            self.before()
            write_rank_files(directory, self.rank, copies, own_texts)

        self.start_job(job)

    def start_job(self, job: Callable[[], object]) -> None:
        """Run another slow job of storage, such as `copy_best`, in the thread; RuntimeError while a job runs."""
        if self.state == "writing":
            raise RuntimeError("a checkpoint is being written: wait() first")
        self.state, self.error = "writing", None

        def run() -> None:
            try:
                job()
            except Exception as error:  # training goes on, whatever happened to the storage
                self.error = error
                self.state = "failed"
            else:
                self.state = "written"

        self._thread = threading.Thread(target=run, name=f"checkpoint-writer-{self.rank}", daemon=True)
        self._thread.start()

    def wait(self) -> WriterState:
        """Wait for the end of a running job, and return the state after it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.state

    def reset(self) -> None:
        """Wait for the end of a running job, and go back to idle."""
        self.wait()
        self.state, self.error = "idle", None


# ---------------------------------------------------------------- keeping


def prune(checkpoints_dir: Place, keep: int, protect: Iterable[Place] = (), damaged: Iterable[Place] = ()) -> list[str]:
    """Remove all but the `keep` newest whole checkpoints, and leftovers older than the newest; return removed places.

    A checkpoint that lacks a file, or has one of a wrong size, is not whole: it is removed if it is older than the
    newest whole one. A directory that is being written is newer than that, so it stays, and those in `protect` stay.
    damaged: checkpoints that were found damaged by their hashes, which are not computed here; they do not count as
    whole, or they would crowd out the last good one. A directory that cannot be removed is logged and left.
    """
    spared = {base_name(place) for place in protect}
    bad = {base_name(place) for place in damaged} - spared
    removed: list[str] = []
    whole = 0
    for place in reversed(listed_checkpoints(checkpoints_dir)):
        name = base_name(place)
        if whole < max(keep, 1) or name in spared:
            if name not in bad and _has_all_files(place):
                whole += 1
                continue
            if whole == 0 or name in spared:
                continue
        discard(place)
        removed.append(place)
    return removed


def _has_all_files(place: str) -> bool:
    try:
        open_checkpoint(place, verify=False).verify(hashes=False)
    except StorageError:
        raise  # else a whole one would be removed because the storage was away for a moment
    except CheckpointError:
        return False
    return True


def discard(directory: Place) -> None:
    """Remove a checkpoint's directory, finished or not; one that cannot be removed is logged and left."""
    place = os.fspath(directory)
    try:
        with at_once():  # training may wait for it
            store_of(place).remove_directory(place)
    except OSError as error:
        logger.warning("%s could not be removed: %s", place, error.strerror or error)


def copy_best(checkpoint: Checkpoint, best_dir: Place) -> Checkpoint:
    """Copy a checkpoint to `best_dir` of the same storage in place of an older copy, and return the new copy.

    In a folder the copy is checked against its hashes, and after an error the old copy stays; in an object store the
    old copy is removed first. Raises CheckpointError if the source is damaged, OSError if the copy cannot be written.
    """
    target = os.fspath(best_dir)
    store = store_of(target)
    with store.replacing(target) as new:
        for name, entry in checkpoint.manifest["files"].items():
            store.copy(join(checkpoint.place, name), join(new, name), entry)
        store.put(join(new, MANIFEST), partial(_write_bytes, data=as_json(checkpoint.manifest)))
    return Checkpoint(target, checkpoint.manifest)
