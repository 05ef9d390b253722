"""A run's folder, STORAGE/NAME, and the decision how to start in it: fresh, resumed, or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elmo_ray import storage
from elmo_ray.checkpoints.identity import saved_settings
from elmo_ray.checkpoints.manifest import PROGRESS_FILE
from elmo_ray.checkpoints.read import Checkpoint, newest_checkpoint
from elmo_ray.config import PretrainConfig
from elmo_ray.errors import ConfigError
from elmo_ray.storage.files import file_lock
from elmo_ray.storage.local_copy import local_folder
from elmo_ray.storage.store_lock import store_lock

logger = logging.getLogger(__name__)

_JOB_FOLDER = "/runtime_resources/working_dir_files/"
"""Part of the path of the folder in which Ray unpacks `--working-dir`."""


@dataclass(frozen=True)
class RunFolder:
    """Folder of a run.

    path: absolute; for a run in an object store the local folder in which this process works. newest: the run's newest
    whole checkpoint, or None. finished: True if that is the end for which `train.duration` asks. aside: the new place
    of an old run that --fresh replaces. uri: the place of a run in an object store, else None.
    """

    path: Path
    newest: Checkpoint | None
    finished: bool
    aside: Path | None = None
    uri: str | None = None

    @property
    def place(self) -> str:
        """Path or URI by which all machines find the run."""
        return self.uri or str(self.path)

    def make(self) -> None:
        """Move an old run aside and make the folder; ConfigError where the storage cannot be written."""
        try:
            if self.aside is not None:
                os.replace(self.path, self.aside)
                logger.info("--fresh: the run that was in %s is now in %s", self.place, self.aside)
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> ConfigError:
        storage_path = self.place.rpartition("/")[0]
        return ConfigError(f"run.storage_path={storage_path}: cannot be written ({error.strerror})")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock: two drivers of one run would delete each other's checkpoints.

        Raises ConfigError where another process holds it, or the storage cannot be written. On a file system the lock
        is released however its holder ends.
        """
        with contextlib.ExitStack() as stack:
            try:
                if self.uri is not None:
                    stack.enter_context(store_lock(self.uri))
                else:
                    stack.enter_context(file_lock(self.path.parent / f".{self.path.name}.lock"))
            except BlockingIOError:
                raise ConfigError(
                    f"run.name={self.path.name}: another process is running {self.path}; wait for its end or stop it"
                ) from None
            except OSError as error:
                raise self._unwritable(error) from None
            yield


def open_run(config: PretrainConfig, resume: bool, fresh: bool) -> RunFolder:
    """Return the folder to run in.

    A name that is already used needs `resume`, or `fresh` to move the old run aside. Nothing on the disk changes before
    `RunFolder.make`, so that an error before it loses nothing. Raises ConfigError where the name is used and neither is
    given, and CheckpointError where the run to resume has checkpoints but none is whole.
    """
    name = config.run.name or time.strftime("run-%Y%m%d-%H%M%S")
    place = storage.join(storage.absolute(config.run.storage_path), name)
    try:
        used = any(storage.exists(storage.join(place, entry)) for entry in ("checkpoints", "metrics", "config.yaml"))
    except OSError as error:
        raise ConfigError(f"run.storage_path={config.run.storage_path}: {error.strerror}") from None
    path = local_folder(place)
    if _JOB_FOLDER in place:
        logger.warning(
            "run.storage_path=%s lies in this job's own folder, which Ray removes: name an absolute path or a URI",
            config.run.storage_path,
        )
    if used and fresh and storage.is_uri(place):
        raise ConfigError(
            f"run.name={name}: {place} has a run already, and objects cannot be renamed: choose another run.name"
        )
    if used and fresh:
        return RunFolder(path, None, False, path.with_name(f"{name}.before-{time.strftime('%Y%m%d-%H%M%S')}"))
    if used and not resume:
        raise ConfigError(f"run.name={name}: {place} has a run already; --resume goes on with it, --fresh starts anew")
    if resume and not used:
        logger.info("--resume: there is no run in %s yet; starting fresh", place)
    newest = newest_checkpoint(storage.join(place, "checkpoints")) if used else None
    finished = newest is not None and _is_finished(newest, config)
    return RunFolder(path, newest, finished, uri=place if storage.is_uri(place) else None)


def _is_finished(newest: Checkpoint, config: PretrainConfig) -> bool:
    asked = saved_settings(newest).get("train.duration") == str(config.train.duration)
    return asked and newest.json(PROGRESS_FILE).get("finished") is True
