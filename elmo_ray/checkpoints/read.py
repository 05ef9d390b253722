"""Reading checkpoints, ours or a stranger's: verify, take tensors and texts, find the newest that is whole.

Only files that a verified manifest names are read, and whatever they hold, only CheckpointError comes out.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from elmo_ray.checkpoints.manifest import (
    MANIFEST,
    check_manifest,
    check_size,
    parse_directory_name,
    read_json,
    stream_files,
)
from elmo_ray.errors import CheckpointError, short
from elmo_ray.storage.files import file_hash

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. Every method raises CheckpointError naming the file if it is missing or damaged."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def streams(self) -> int:
        """S, the number of streams of the run."""
        return int(self.manifest["streams"])

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(self.manifest["files"])

    def verify(self, hashes: bool = True) -> None:
        """Compare the size and (if `hashes`) the sha256 of every file with the manifest."""
        for name, entry in self.manifest["files"].items():
            path = self.path / name
            check_size(path, entry["size"])
            try:
                damaged = hashes and file_hash(path) != entry["sha256"]
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
            if damaged:
                raise CheckpointError(f"{path}: content differs from its sha256 in {MANIFEST}: the file is damaged")

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of one safetensors file, in host memory."""
        with self._open(name) as handle:
            # Cloned: a tensor that is still mapped from the file would suffer when the file is pruned on NFS.
            return {key: handle.get_tensor(key).clone() for key in handle.keys()}

    def text(self, name: str) -> str:
        path = self._named(name)
        try:
            return path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None

    def json(self, name: str) -> dict[str, Any]:
        return read_json(self._named(name))

    def stream_tensors(self, first: int, last_exclusive: int) -> dict[str, torch.Tensor]:
        """Rows first..last_exclusive-1 of every tensor of the stream files, whose leading dimension is streams."""
        if not 0 <= first < last_exclusive <= self.streams:
            raise CheckpointError(f"{self.path}: has streams 0..{self.streams - 1}, not {first}..{last_exclusive - 1}")
        pieces: dict[str, list[torch.Tensor]] = {}
        for begin, end, name in stream_files(self.files):
            if end <= first or begin >= last_exclusive:
                continue
            rows = slice(max(first, begin) - begin, min(last_exclusive, end) - begin)
            part = self._stream_rows(name, end - begin, rows)
            if pieces and set(part) != set(pieces):
                raise CheckpointError(f"{self.path / name}: has tensors {sorted(part)}, others have {sorted(pieces)}")
            for key, piece in part.items():
                others = pieces.setdefault(key, [])
                if others and (others[0].shape[1:] != piece.shape[1:] or others[0].dtype != piece.dtype):
                    raise CheckpointError(f"{self.path / name}: the form of {key} does not fit that of other streams")
                others.append(piece)
        return {key: torch.cat(group) for key, group in pieces.items()}

    def _stream_rows(self, name: str, n_streams: int, rows: slice) -> dict[str, torch.Tensor]:
        part: dict[str, torch.Tensor] = {}
        with self._open(name) as handle:
            for key in sorted(handle.keys()):
                lazy = handle.get_slice(key)
                shape = lazy.get_shape()
                if not shape or shape[0] != n_streams:
                    raise CheckpointError(f"{self.path / name}: {key} has shape {shape}, not [{n_streams}, ...]")
                part[key] = lazy[rows.start : rows.stop].clone()
        return part

    def _named(self, name: str) -> Path:
        if name not in self.manifest["files"]:
            raise CheckpointError(f"{self.path}: has no file {name}; it has {', '.join(sorted(self.files))}")
        check_size(self.path / name, self.manifest["files"][name]["size"])
        return self.path / name

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        path = self._named(name)
        try:
            with safe_open(path, framework="pt", device="cpu") as handle:
                yield handle
        except CheckpointError:
            raise
        except Exception as error:  # whatever a library makes of a stranger's bytes
            raise CheckpointError(f"{path}: is not a readable safetensors file: {short(str(error))}") from None


def open_checkpoint(directory: PathLike, verify: bool = True) -> Checkpoint:
    """Open a committed checkpoint; with `verify` every byte of it is read and hashed.

    Raises CheckpointError naming the file and what is wrong with it: missing, truncated, damaged, or not ours.
    """
    folder = Path(directory)
    if not folder.exists() and previous_copy(folder).exists():
        folder = previous_copy(folder)  # copy_best was stopped between its two renames
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint directory")
    manifest = read_json(folder / MANIFEST)
    check_manifest(folder, manifest)
    checkpoint = Checkpoint(folder, manifest)
    if verify:
        checkpoint.verify()
    return checkpoint


def newest_checkpoint(
    checkpoints_dir: PathLike, verify: bool = True, damaged: list[Path] | None = None
) -> Checkpoint | None:
    """The newest checkpoint (by attempt, then step) that verifies, with a logged warning for each newer one.

    `damaged` gets the directories of those. None if nothing was ever committed. Raises CheckpointError if there are
    committed checkpoints and all are damaged: starting again from nothing must be the user's decision.
    """
    problems: list[str] = []
    for folder in reversed(listed_checkpoints(Path(checkpoints_dir))):
        if not (folder / MANIFEST).exists():
            logger.warning("%s has no %s: it was never finished; skipped", folder, MANIFEST)
            continue
        try:
            checkpoint = open_checkpoint(folder, verify)
        except CheckpointError as error:
            logger.warning("checkpoint skipped: %s", error)
            problems.append(str(error))
            if damaged is not None:
                damaged.append(folder)
            continue
        if problems:
            logger.warning("%s is taken instead: the newest checkpoint that is whole", folder)
        return checkpoint
    if problems:
        raise CheckpointError(f"{checkpoints_dir}: no checkpoint is whole; the newest: {problems[0]}")
    return None


def listed_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Directories with the name of a checkpoint, finished or not, oldest first: by attempt, then by step.

    That is the order in which they were written: an attempt that walked back past a damaged checkpoint comes after it.
    """
    try:
        names = os.listdir(checkpoints_dir)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{checkpoints_dir}: cannot be listed: {error.strerror or error}") from None
    found = [(key, name) for name in names if (key := parse_directory_name(name)) is not None]
    return [checkpoints_dir / name for _, name in sorted(found) if (checkpoints_dir / name).is_dir()]


def previous_copy(folder: Path) -> Path:
    """Where `copy_best` puts the old copy for a moment."""
    return folder.with_name(folder.name + ".previous")
