"""Reading of checkpoints, ours or a stranger's: verify, take tensors and texts, find the newest whole one.

Only files that a verified manifest names are read. Whatever they hold, nothing but CheckpointError is raised.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from elmo_ray.checkpoints.manifest import (
    MANIFEST,
    check_manifest,
    check_size,
    check_sizes,
    parse_directory_name,
    parse_json,
    read_small,
    stream_files,
)
from elmo_ray.checkpoints.stores import StorageError, previous_copy, store_of
from elmo_ray.errors import CheckpointError, short
from elmo_ray.storage import Place, base_name, join

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Committed checkpoint. Every method raises CheckpointError, naming the file, if a file is missing or damaged.

    place: path or URI by which all machines find it. manifest: the checked values of `manifest.json`.
    """

    place: str
    manifest: dict[str, Any]

    @cached_property
    def path(self) -> Path:
        """Folder on this machine with the files; the first access fetches a checkpoint that is in an object store."""
        return store_of(self.place).fetch(self.place, self.manifest)

    @property
    def step(self) -> int:
        """Number of steps that were done."""
        return int(self.manifest["step"])

    @property
    def streams(self) -> int:
        """Number of streams of the run, S."""
        return int(self.manifest["streams"])

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files."""
        return tuple(self.manifest["files"])

    def verify(self, hashes: bool = True, names: Collection[str] | None = None) -> None:
        """Compare the size and (if `hashes`) the sha256 of every file, or of those in `names`, with the manifest."""
        store = store_of(self.place)
        files = self.manifest["files"]
        if names is not None:
            files = {name: entry for name, entry in files.items() if name in names}
        check_sizes(self.place, files, store.files(self.place))
        if hashes:
            store.check(self.place, {**self.manifest, "files": files})

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return all tensors of one safetensors file, in host memory."""
        with self._open(name) as handle:
            # A tensor that is still mapped from the file would be lost when the file is pruned on NFS: clone it.
            return {key: handle.get_tensor(key).clone() for key in handle.keys()}

    def text(self, name: str) -> str:
        """Return the text of a file."""
        path = self._named(name)
        try:
            return path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.at(name)}: cannot be read: {error}") from None

    def json(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file of at most 16 MiB."""
        return parse_json(self.at(name), read_small(self._named(name)))

    def at(self, name: str) -> str:
        """Return the place of a file, for messages."""
        return join(self.place, name)

    def stream_tensors(self, first: int, last_exclusive: int) -> dict[str, torch.Tensor]:
        """Return rows first..last_exclusive-1 of all tensors of the stream files; streams are the leading dimension."""
        if not 0 <= first < last_exclusive <= self.streams:
            raise CheckpointError(f"{self.place}: has streams 0..{self.streams - 1}, not {first}..{last_exclusive - 1}")
        pieces: dict[str, list[torch.Tensor]] = {}
        for begin, end, name in stream_files(self.files):
            if end <= first or begin >= last_exclusive:
                continue
            rows = slice(max(first, begin) - begin, min(last_exclusive, end) - begin)
            found = self._stream_rows(name, end - begin, rows)
            if pieces and set(found) != set(pieces):
                raise CheckpointError(f"{self.at(name)}: has tensors {sorted(found)}, others have {sorted(pieces)}")
            for key, piece in found.items():
                others = pieces.setdefault(key, [])
                if others and (others[0].shape[1:] != piece.shape[1:] or others[0].dtype != piece.dtype):
                    raise CheckpointError(f"{self.at(name)}: the form of {key} does not fit that of other streams")
                others.append(piece)
        return {key: torch.cat(group) for key, group in pieces.items()}

    def _stream_rows(self, name: str, n_streams: int, rows: slice) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        with self._open(name) as handle:
            for key in sorted(handle.keys()):
                lazy = handle.get_slice(key)
                shape = lazy.get_shape()
                if not shape or shape[0] != n_streams:
                    raise CheckpointError(f"{self.at(name)}: {key} has shape {shape}, not [{n_streams}, ...]")
                tensors[key] = lazy[rows.start : rows.stop].clone()
        return tensors

    def _named(self, name: str) -> Path:
        if name not in self.manifest["files"]:
            raise CheckpointError(f"{self.place}: has no file {name}; it has {', '.join(sorted(self.files))}")
        check_size(self.path / name, self.manifest["files"][name]["size"], self.at(name))
        return self.path / name

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        path = self._named(name)
        try:
            with safe_open(path, framework="pt", device="cpu") as handle:
                yield handle
        except CheckpointError:
            raise
        except Exception as error:  # a stranger's bytes may raise anything in a library
            raise CheckpointError(f"{self.at(name)}: is not a readable safetensors file: {short(str(error))}") from None


def open_checkpoint(directory: Place, verify: bool = True) -> Checkpoint:
    """Return the committed checkpoint in a directory; with `verify` every byte of it is read and hashed first.

    Raises CheckpointError naming the file and its fault: missing, truncated, damaged, or not ours.
    """
    place = os.fspath(directory)
    store = store_of(place)
    if not store.exists(join(place, MANIFEST)):
        previous = previous_copy(place)  # copy_best was stopped between its two renames
        if not store.exists(join(previous, MANIFEST)):
            raise CheckpointError(f"{place}: there is no such checkpoint: it has no {MANIFEST}")
        place = previous
    manifest = parse_json(join(place, MANIFEST), store.read(join(place, MANIFEST)))
    check_manifest(place, manifest)
    checkpoint = Checkpoint(place, manifest)
    if verify:
        checkpoint.verify()
    return checkpoint


def newest_checkpoint(
    checkpoints_dir: Place, verify: bool = True, damaged: list[Place] | None = None
) -> Checkpoint | None:
    """Return the newest checkpoint (by attempt, then step) that verifies, or None if none was ever committed.

    Newer ones that do not verify are logged as warnings, and their places are added to `damaged`. Raises
    CheckpointError if there are committed checkpoints and all are damaged: to start again from nothing must be the
    user's decision. Raises StorageError where the storage does not answer, which is no sign of damage.
    """
    problems: list[str] = []
    for place in reversed(listed_checkpoints(checkpoints_dir)):
        try:
            if not store_of(place).exists(join(place, MANIFEST)):
                logger.warning("%s has no %s: it was never finished; skipped", place, MANIFEST)
                continue
            checkpoint = open_checkpoint(place, verify)
        except StorageError:
            raise
        except CheckpointError as error:
            logger.warning("checkpoint skipped: %s", error)
            problems.append(str(error))
            if damaged is not None:
                damaged.append(place)
            continue
        if problems:
            logger.warning("%s is taken instead: the newest checkpoint that is whole", place)
        return checkpoint
    if problems:
        raise CheckpointError(f"{os.fspath(checkpoints_dir)}: no checkpoint is whole; the newest: {problems[0]}")
    return None


def listed_checkpoints(checkpoints_dir: Place) -> list[str]:
    """Return the places of all checkpoints, finished or not, in the order in which they were written."""
    # By attempt, then by step: an attempt that went back past a damaged checkpoint wrote its lower steps later.
    names = store_of(checkpoints_dir).directories(os.fspath(checkpoints_dir))
    found = [(key, name) for name in names if (key := parse_directory_name(name)) is not None]
    return [join(checkpoints_dir, name) for _, name in sorted(found)]


def checkpoints_of_step(checkpoints_dir: Place, step: int) -> list[str]:
    """Return the places of the checkpoints of a step, the newest attempt first, whole or not."""
    found = reversed(listed_checkpoints(checkpoints_dir))
    return [place for place in found if (parse_directory_name(base_name(place)) or (0, -1))[1] == step]
