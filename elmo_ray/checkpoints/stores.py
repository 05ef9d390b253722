"""Where a run keeps its checkpoints: folders, or an object store; the same verbs for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from elmo_ray.checkpoints import object_store as object_checkpoints
from elmo_ray.checkpoints import write as checkpoint
from elmo_ray.checkpoints.read import open_checkpoint
from elmo_ray.errors import CheckpointError
from elmo_ray.storage import Place, is_uri


class Committed(Protocol):
    """A committed checkpoint: its place, step and manifest."""

    @property
    def path(self) -> Any: ...
    @property
    def manifest(self) -> dict[str, Any]: ...
    @property
    def step(self) -> int: ...


@dataclass(frozen=True)
class CheckpointStore:
    """The functions of `training.checkpoint` under their names, and

    fetch:   (place) -> Checkpoint whose files can be read on this machine; what is fetched is compared with its hashes.
    at:      (place, the Checkpoint that was fetched from there) -> Committed.
    look:    (place) -> Committed, whole as far as can be seen without fetching it, or CheckpointError.
    of_step: (checkpoints folder, step) -> places, newest attempt first.
    """

    write_part: Callable[..., None]
    commit: Callable[..., Committed]
    newest_checkpoint: Callable[..., Committed | None]
    fetch: Callable[[Place], checkpoint.Checkpoint]
    at: Callable[[str, checkpoint.Checkpoint], Committed]
    look: Callable[[Place], Committed]
    of_step: Callable[[Place, int], list[str]]
    prune: Callable[..., object]
    discard: Callable[[Place], None]
    copy_best: Callable[[Any, Place], object]


def store_of(place: Place) -> CheckpointStore:
    """The store of a run's folder or URI."""
    return _OBJECTS if is_uri(place) else _FOLDERS


def _open(place: Place) -> checkpoint.Checkpoint:
    return open_checkpoint(place, verify=False)


def _folders_of_step(checkpoints_dir: Place, step: int) -> list[str]:
    return [str(path) for path in sorted(Path(checkpoints_dir).glob(f"step-{step:08d}-*"), reverse=True)]


def _fetch(place: Place) -> checkpoint.Checkpoint:
    try:
        return object_checkpoints.open_stored(place)
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be fetched: {error.strerror or error}") from None


_FOLDERS = CheckpointStore(
    checkpoint.write_part,
    checkpoint.commit,
    checkpoint.newest_checkpoint,
    _open,
    lambda place, fetched: fetched,
    open_checkpoint,
    _folders_of_step,
    checkpoint.prune,
    checkpoint.discard,
    checkpoint.copy_best,
)
_OBJECTS = CheckpointStore(
    object_checkpoints.write_part,
    object_checkpoints.commit,
    object_checkpoints.newest_checkpoint,
    _fetch,
    lambda place, fetched: object_checkpoints.StoredCheckpoint(place, fetched.manifest),
    object_checkpoints.look,
    object_checkpoints.of_step,
    object_checkpoints.prune,
    object_checkpoints.discard,
    object_checkpoints.copy_best,
)
