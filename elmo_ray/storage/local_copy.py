"""A local folder that stands for a folder of an object store: worked on here, sent there.

Metrics are appended to, HDF5 files are sought in, indexes are renamed: none of that can be done in an object store. So
a run or a prepared folder at a URI has a folder on this machine's disk, whose files are sent when they have changed.
The folder is this process's own and goes when the process ends: what matters is in the store.

Where a worker writes what is appended to: metrics, TensorBoard, logs.

In the run's folder, or, for a run in an object store, in a folder of its own that is sent there from time to time and
before each checkpoint.
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

logger = logging.getLogger(__name__)

SEND_EVERY_S = 15.0
"""Between two looks for metrics and logs that are new, on both sides."""

_mirrors: dict[str, Mirror] = {}


def scratch(prefix: str) -> Path:
    """A folder on the local disk (of TMPDIR) that goes when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"elmo-ray-{prefix}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def local_folder(place: Place) -> Path:
    """Where to work on what is at `place`: the same, for a plain path; for a URI the folder of its mirror."""
    return mirror_of(place).folder if is_uri(place) else Path(place)


def mirror_of(place: Place) -> Mirror:
    """This process's mirror of a URI, made empty at first."""
    return next((m for m in _mirrors.values() if m.place == place), None) or Mirror(os.fspath(place))


def origin(folder: Place) -> str:
    """The place that all machines see: of a mirror's folder its URI, else the folder itself."""
    mirror = _mirrors.get(os.fspath(folder))
    return os.fspath(folder) if mirror is None else mirror.place


def send(folder: Place, *patterns: str) -> None:
    """Send what is new in a folder if it is a mirror's; OSError where the store does not take it."""
    mirror = _mirrors.get(os.fspath(folder))
    if mirror is not None:
        mirror.push(*patterns)


class Mirror:
    """place: the URI. folder: its files here. Files whose names begin with a dot, or that are being written, stay."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.folder = scratch(storage.base_name(place))
        self._known: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._works: list[Callable[[], None]] = []
        _mirrors[os.fspath(self.folder)] = self

    def push(self, *patterns: str) -> None:
        """Send the files that are new or changed since they were sent or fetched; all, or those of the patterns."""
        with self._lock:
            for name, path in _files(self.folder, patterns):
                status = path.stat()
                version = status.st_size, status.st_mtime_ns
                if self._known.get(name) != version:
                    storage.upload(path, storage.join(self.place, name))
                    self._known[name] = version

    def pull(self, *patterns: str) -> None:
        """Fetch the objects of the patterns whose size is not that of the file here."""
        with self._lock:
            for name, status in storage.listing(self.place).items():
                target = self.folder / name
                if not _chosen(name, patterns) or (target.exists() and target.stat().st_size == status.st_size):
                    continue
                storage.download(storage.join(self.place, name), target)
                here = target.stat()
                self._known[name] = here.st_size, here.st_mtime_ns

    def push_always(self, *patterns: str) -> None:
        """From now on send what is new every some seconds, in a thread; what fails is tried again."""
        self._always(lambda: self.push(*patterns))

    def pull_always(self, *patterns: str) -> None:
        """From now on fetch what is new, likewise."""
        self._always(lambda: self.pull(*patterns))

    def _always(self, work: Callable[[], None]) -> None:
        self._works.append(work)
        if self._thread is None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        failing = False
        while not self._ended.wait(SEND_EVERY_S):
            try:
                for work in self._works:
                    work()
                failing = False
            except OSError as error:
                if not failing:
                    logger.warning("%s: %s; tried again", error.filename or self.place, error.strerror or error)
                failing = True

    def rest(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=60)
        self._thread, self._works = None, []


def _files(folder: Path, patterns: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")) and _chosen(name, patterns):
            yield name, path


def _chosen(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


logger = logging.getLogger(__name__)


class Outbox:
    """folder: where to write; what matches `patterns` is sent."""

    def __init__(self, run_dir: Place, *patterns: str) -> None:
        self.patterns = patterns
        self._mirror = mirror_of(run_dir) if is_uri(run_dir) else None
        self.folder = Path(run_dir) if self._mirror is None else self._mirror.folder
        if self._mirror is not None:
            self._mirror.push_always(*patterns)

    def send(self) -> None:
        """Send what is new, if there is anywhere to send it; OSError."""
        if self._mirror is not None:
            self._mirror.push(*self.patterns)

    def close(self) -> None:
        """Send the rest; a store that does not answer is a warning."""
        try:
            if self._mirror is not None:
                self._mirror.rest()
            self.send()
        except OSError as error:
            logger.warning("%s: cannot be sent (%s)", error.filename, error.strerror or error)
