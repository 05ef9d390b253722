"""Local folders that stand for folders of an object store: processes work in them, and their files are copied there.

Metrics are appended to, HDF5 files are sought in, indexes are renamed: none of that can be done in an object store. So
a run or a prepared folder at a URI has a folder on this machine's disk. Files that have changed are pushed to the
store: on demand, from time to time, and before each checkpoint. The folder belongs to this process and is removed when
the process ends: the store has everything that matters.
"""

from __future__ import annotations

import atexit
import fnmatch
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from elmo_ray.storage import places as storage
from elmo_ray.storage.places import Place, is_uri
from elmo_ray.storage.retry import at_once

logger = logging.getLogger(__name__)

COPY_EVERY_S = 15.0
"""Seconds between two copies of new metrics and logs, in each direction."""

_copies: dict[str, LocalCopy] = {}
"""This process's copies of URIs, by folder."""


def scratch(prefix: str) -> Path:
    """Return a new folder on the local disk (in TMPDIR) that is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"elmo-ray-{prefix}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def local_folder(place: Place) -> Path:
    """Return the folder in which to work on `place`: a plain path itself, or the folder of a URI's local copy."""
    return local_copy_of(place).folder


def local_copy_of(place: Place) -> LocalCopy:
    """Return this process's local copy of a URI, which is empty at first; a plain path is its own copy."""
    return next((copy for copy in _copies.values() if copy.place == place), None) or LocalCopy(os.fspath(place))


def uri_of(folder: Place) -> str:
    """Return the place that all machines see: the URI of a local copy's folder, and any other folder as it is."""
    copy = _copies.get(os.fspath(folder))
    return os.fspath(folder) if copy is None else copy.place


def push(folder: Place, *patterns: str) -> None:
    """Push new and changed files of a local copy's folder, all or those of the patterns; do nothing for other folders.

    Raises OSError where the store does not take them.
    """
    copy = _copies.get(os.fspath(folder))
    if copy is not None:
        copy.push(*patterns)


class LocalCopy:
    """Copy of `place` on this machine, in `folder`; of a plain path it is that folder itself, and nothing is copied.

    Files whose names begin with a dot, as temporary ones do, stay on this machine. Patterns are those of `fnmatch`.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._remote = is_uri(place)
        self.folder = scratch(storage.base_name(place)) if self._remote else Path(place)
        self._known: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._works: list[Callable[[], None]] = []
        if self._remote:
            _copies[os.fspath(self.folder)] = self

    def push(self, *patterns: str) -> None:
        """Copy files that are new or changed since the last copy to the store, all or those of the patterns.

        Raises OSError where the store does not take them.
        """
        if not self._remote:
            return
        with self._lock:
            for name, path in _files(self.folder, patterns):
                status = path.stat()
                version = status.st_size, status.st_mtime_ns
                if self._known.get(name) != version:
                    storage.upload(path, storage.join(self.place, name))
                    self._known[name] = version

    def pull(self, *patterns: str) -> None:
        """Copy objects whose size differs from the file's here to the folder, all or those of the patterns.

        Raises OSError where the store does not give them.
        """
        if not self._remote:
            return
        with self._lock:
            for name, status in storage.listing(self.place).items():
                target = self.folder / name
                if not _chosen(name, patterns) or (target.exists() and target.stat().st_size == status.st_size):
                    continue
                storage.download(storage.join(self.place, name), target)
                here = target.stat()
                self._known[name] = here.st_size, here.st_mtime_ns

    def keep_pushing(self, *patterns: str) -> None:
        """Push every COPY_EVERY_S seconds from now on, in a thread; a failure is logged, and tried again."""
        self._keep(lambda: self.push(*patterns))

    def keep_pulling(self, *patterns: str) -> None:
        """Pull every COPY_EVERY_S seconds from now on, in the same thread."""
        self._keep(lambda: self.pull(*patterns))

    def _keep(self, work: Callable[[], None]) -> None:
        if not self._remote:
            return
        self._works.append(work)
        if self._thread is None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._run, name="local-copy", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        failing = False
        while not self._ended.wait(COPY_EVERY_S):
            try:
                with at_once():
                    for work in self._works:
                        work()
                failing = False
            except OSError as error:
                if not failing:
                    logger.warning("%s: %s; tried again", error.filename or self.place, error.strerror or error)
                failing = True

    def stop(self) -> None:
        """End the thread; what it was to copy is not copied any more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=60)
        self._thread, self._works = None, []

    def close(self, *patterns: str) -> None:
        """End the thread and push a last time; log a warning where the store does not answer."""
        self.stop()
        try:
            self.push(*patterns)
        except OSError as error:
            logger.warning("%s: cannot be sent (%s)", error.filename, error.strerror or error)


def _files(folder: Path, patterns: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(step.startswith(".") for step in name.split("/")) and _chosen(name, patterns):
            yield name, path


def _chosen(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
