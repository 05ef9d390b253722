"""Two kinds of storage for checkpoints: folders and object stores.

`Store` has the few operations of which `read` and `write` are made. A *place* is the path or URI of a file, or of a
directory with files. On both kinds of storage a file appears whole or not at all: an object store works like that, and
in a folder a file is written under another name and renamed. Reading raises CheckpointError, and StorageError where the
storage does not answer; writing raises OSError.
"""

from __future__ import annotations

import abc
import contextlib
import getpass
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from elmo_ray import storage
from elmo_ray.checkpoints.manifest import (
    MANIFEST,
    MAX_JSON_BYTES,
    as_json,
    check_content,
    check_size,
    entry_of,
    read_small,
)
from elmo_ray.errors import CheckpointError
from elmo_ray.storage import Place, is_uri, join
from elmo_ray.storage.files import atomic_write, file_lock, make_folder, sync_directory

_FETCHED_FOR_S = 1800.0
"""Seconds after which a fetched checkpoint makes room for another of the same run: nobody reads it any more."""


class StorageError(CheckpointError):
    """Error of storage that does not answer. It is no sign of a damaged checkpoint."""


class Store(abc.ABC):
    """Operations on files and directories of one kind of storage."""

    @abc.abstractmethod
    def put(self, place: str, write: Callable[[Path], object]) -> dict[str, Any]:
        """Make a file by calling `write` with a local path to write to; return its entry: size in bytes, and sha256."""

    @abc.abstractmethod
    def read(self, place: str) -> bytes:
        """Return the bytes of a small file (16 MiB at most)."""

    @abc.abstractmethod
    def exists(self, place: str) -> bool:
        """Return True if there is such a file."""

    @abc.abstractmethod
    def files(self, directory: str) -> dict[str, int]:
        """Return name -> size in bytes of the files in a directory; an empty dict if there is no such directory."""

    @abc.abstractmethod
    def directories(self, directory: str) -> list[str]:
        """Return the names of the directories in a directory; an empty list if there is no such directory."""

    @abc.abstractmethod
    def copy(self, source: str, target: str, entry: Mapping[str, Any]) -> None:
        """Copy a file with the size and sha256 of `entry`; CheckpointError where this process sees other content."""

    @abc.abstractmethod
    def remove(self, place: str) -> None:
        """Remove a file if it is there."""

    @abc.abstractmethod
    def remove_directory(self, directory: str) -> None:
        """Remove a directory and its content, the manifest first: half a checkpoint must not look like a whole one."""

    @abc.abstractmethod
    def replacing(self, directory: str) -> contextlib.AbstractContextManager[str]:
        """Give an empty directory to write to, which replaces `directory` when the block ends without an error."""

    @abc.abstractmethod
    def fetch(self, directory: str, manifest: Mapping[str, Any]) -> Path:
        """Return a local folder with the files that the manifest names."""

    @abc.abstractmethod
    def check(self, directory: str, manifest: Mapping[str, Any]) -> None:
        """Raise CheckpointError unless all files have the sizes and hashes of the manifest."""


def store_of(place: Place) -> Store:
    """Return the store that a path or URI is in."""
    return _OBJECTS if is_uri(place) else _FOLDERS


def previous_copy(directory: Place) -> str:
    """Return the name that an old directory has for a moment while a new one takes its place."""
    return f"{os.fspath(directory)}.previous"


# ---------------------------------------------------------------- folders


class FolderStore(Store):
    """Store of checkpoints in folders of a file system that all machines see."""

    def put(self, place: str, write: Callable[[Path], object]) -> dict[str, Any]:
        folder = Path(place).parent
        if not folder.is_dir():
            make_folder(folder)
            sync_directory(folder.parent)
        with atomic_write(place, None, sync=True) as temporary:
            write(temporary)
            entry = entry_of(temporary)
        sync_directory(folder)
        return entry

    def read(self, place: str) -> bytes:
        return read_small(Path(place))

    def exists(self, place: str) -> bool:
        return os.path.exists(place)

    def files(self, directory: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for name in _names(directory):
            with contextlib.suppress(OSError):  # gone meanwhile, or a link in a circle
                status = os.stat(os.path.join(directory, name))
                if stat.S_ISREG(status.st_mode):
                    found[name] = status.st_size
        return found

    def directories(self, directory: str) -> list[str]:
        return [name for name in _names(directory) if os.path.isdir(os.path.join(directory, name))]

    def copy(self, source: str, target: str, entry: Mapping[str, Any]) -> None:
        check_size(Path(source), entry["size"])
        with atomic_write(target, None, sync=True) as temporary:
            shutil.copyfile(source, temporary)
            check_content(temporary, entry, source)

    def remove(self, place: str) -> None:
        Path(place).unlink(missing_ok=True)

    def remove_directory(self, directory: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            Path(directory, MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(directory)

    @contextlib.contextmanager
    def replacing(self, directory: str) -> Iterator[str]:
        new, previous = f"{directory}.new", previous_copy(directory)
        shutil.rmtree(new, ignore_errors=True)
        try:
            yield new
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        if os.path.exists(directory):
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(directory, previous)
        os.replace(new, directory)
        sync_directory(Path(directory).parent)
        shutil.rmtree(previous, ignore_errors=True)

    def fetch(self, directory: str, manifest: Mapping[str, Any]) -> Path:
        return Path(directory)

    def check(self, directory: str, manifest: Mapping[str, Any]) -> None:
        for name, entry in manifest["files"].items():
            check_content(Path(directory, name), entry)


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed: {error.strerror or error}") from None


# ---------------------------------------------------------------- object stores


class ObjectStore(Store):
    """Store of checkpoints below a URI, where directories are the beginnings of names and nothing can be renamed.

    Writing needs room for one file at a time in the folder for temporary files (TMPDIR). A checkpoint that is read is
    fetched to this machine once, for all workers on it, and then compared with the manifest's hashes.
    """

    def put(self, place: str, write: Callable[[Path], object]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="elmo-ray-part-") as folder:
            path = Path(folder, storage.base_name(place))
            write(path)
            entry = entry_of(path)
            storage.upload(path, place)
        return entry

    def read(self, place: str) -> bytes:
        with _answering(place):
            if storage.status(place).st_size > MAX_JSON_BYTES:
                raise CheckpointError(f"{place}: is larger than {MAX_JSON_BYTES >> 20} MiB")
            return storage.read_bytes(place)

    def exists(self, place: str) -> bool:
        with _answering(place):
            return storage.exists(place)

    def files(self, directory: str) -> dict[str, int]:
        with _answering(directory):
            return {name: status.st_size for name, status in storage.listing(directory).items() if "/" not in name}

    def directories(self, directory: str) -> list[str]:
        with _answering(directory):
            return storage.folders(directory)

    def copy(self, source: str, target: str, entry: Mapping[str, Any]) -> None:
        storage.copy(source, target)  # within the store: this process does not see the content

    def remove(self, place: str) -> None:
        storage.remove(place)

    def remove_directory(self, directory: str) -> None:
        self.remove(join(directory, MANIFEST))
        for name in storage.listing(directory):
            self.remove(join(directory, name))

    @contextlib.contextmanager
    def replacing(self, directory: str) -> Iterator[str]:
        # A process that dies in the block leaves a directory without a manifest, so its caller must be able to begin
        # again.
        self.remove_directory(directory)
        yield directory

    def fetch(self, directory: str, manifest: Mapping[str, Any]) -> Path:
        parent, _, name = directory.rpartition("/")
        data = as_json(manifest)
        with _answering(directory), contextlib.ExitStack() as stack:
            run = _cache() / hashlib.sha256(parent.encode()).hexdigest()[:16]
            folder, known = run / name, run / name / MANIFEST
            # Workers of one machine take turns: the first one fetches, the others find the files there.
            stack.enter_context(file_lock(run / ".lock", wait=True))
            _make_room(folder)
            if known.exists() and known.read_bytes() == data:
                return folder
            shutil.rmtree(folder, ignore_errors=True)
            try:
                for name, entry in manifest["files"].items():
                    place = join(directory, name)
                    with _answering(place):
                        storage.download(place, folder / name)
                    check_content(folder / name, entry, place)
                with atomic_write(known, None) as temporary:  # last: with it, all files are known to be whole
                    temporary.write_bytes(data)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return folder

    def check(self, directory: str, manifest: Mapping[str, Any]) -> None:
        self.fetch(directory, manifest)


@contextlib.contextmanager
def _answering(place: str) -> Iterator[None]:
    """Turn OSErrors of reading at `place` into CheckpointError or StorageError."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{place}: the file is missing") from None
    except OSError as error:
        raise StorageError(f"{place}: cannot be read: {error.strerror or error}") from None


def _cache() -> Path:
    """Return the folder of fetched checkpoints on this machine, which belongs to this user alone."""
    folder = Path(tempfile.gettempdir(), f"elmo-ray-{getpass.getuser()}", "fetched")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.parent.stat().st_uid != os.getuid():
        raise CheckpointError(f"{folder.parent}: belongs to somebody else; set TMPDIR to a folder of your own")
    return folder


def _make_room(folder: Path) -> None:
    """Remove other checkpoints of the same run that were fetched long ago."""
    for other in folder.parent.iterdir():
        if other.is_dir() and other != folder and time.time() - other.stat().st_mtime > _FETCHED_FOR_S:
            shutil.rmtree(other, ignore_errors=True)


_FOLDERS, _OBJECTS = FolderStore(), ObjectStore()
