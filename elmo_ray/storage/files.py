"""Local files: atomic writing (a file appears whole or not at all), and a lock between processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

from elmo_ray.errors import ConfigError, DataError, ElmoRayError, reason

logger = logging.getLogger(__name__)

_CURES = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space in your quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EACCES: "allow writing there, or choose another place",
    errno.EPERM: "allow writing there, or choose another place",
    errno.EROFS: "choose a place that is not read-only",
    errno.ENOTDIR: "choose another place: a file stands where a folder is needed",
    errno.EISDIR: "choose another place: a folder has this name",
}


@contextlib.contextmanager
def atomic_write(
    target: str | os.PathLike[str],
    error: type[ElmoRayError] | None = DataError,
    *,
    sync: bool = False,
    also: tuple[type[Exception], ...] = (),
) -> Iterator[Path]:
    """Yield a temporary path beside `target` to write to, and rename it to `target` when the block ends well.

    Missing folders are made. After an error the temporary file is removed, and an older `target` stays as it is.
    error: exception to raise, with the reason and its cure, in place of an OSError; None raises the OSError itself.
    also: exceptions of a library that mean the same as an OSError. sync: put the content on the disk before the rename.
    """
    path = Path(target)
    # Processes of several machines may write the same file on a network file system: a process id is not enough.
    who = f"{socket.gethostname()}.{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.{who}.tmp")
    kinds: tuple[type[Exception], ...] = (OSError, *also)
    try:
        make_folder(path.parent)
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
    except kinds as problem:
        if error is None:
            raise
        raise error(_unwritable(path, problem)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_aside(path: str | os.PathLike[str], data: bytes, error: type[ElmoRayError] = DataError) -> None:
    """Write a file of these bytes by `atomic_write`."""
    with atomic_write(path, error) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: object, error: type[ElmoRayError] = ConfigError) -> None:
    """Write a value as indented JSON by `atomic_write`; ValueError for NaN and infinities."""
    write_aside(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode(), error)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it if they are missing; NotADirectoryError where one of them is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None


def _unwritable(path: Path, problem: Exception) -> str:
    """Return one line: the file, the reason why it cannot be written, and a cure where one is known."""
    cure = _CURES.get(getattr(problem, "errno", None) or 0)
    return f"{path}: cannot be written ({reason(problem)})" + (f"; {cure}" if cure else "")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(folder: Path) -> None:
    """Make renames in `folder` durable, where the file system can."""
    # some network file systems cannot sync a directory
    with contextlib.suppress(OSError):
        _sync(folder)


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock between processes in the form of the file `path`, which is made for it and removed at the end.

    wait: wait for the lock while another process holds it, instead of raising BlockingIOError. Raises OSError where the
    file cannot be made. The system releases the lock however its holder ends.
    """
    make_folder(path.parent)
    how = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    while True:
        file = open(path, "ab")
        try:
            fcntl.flock(file, how)
            # A holder removes the file when it ends: a file that was opened before that is no lock any more.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
            file.close()
        except FileNotFoundError:
            file.close()
        except BlockingIOError:
            file.close()
            raise
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s): do not start this twice", path, error.strerror)
            break
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
