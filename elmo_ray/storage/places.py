"""Places of files: plain paths, and URIs of object stores (`s3://bucket/key`, `gs://`, `az://`, others of fsspec).

A *place* is a path or a URI. Plain paths go to the operating system. An object appears whole or not at all, cannot be
appended to or renamed, and is read by ranges of bytes. The store's own library takes credentials and endpoints from its
environment variables and files (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, an instance's role).

Errors of a store are OSErrors with `strerror`, like those of a disk. A request to a store that is away is made again,
see `elmo_ray.storage.retry`; StoreAway is the error of a store that does not come back. A place that can never be right
(no such protocol, a library that is not installed) raises ConfigError.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from elmo_ray.errors import ConfigError, ElmoRayError, reason
from elmo_ray.storage.files import atomic_write, make_folder
from elmo_ray.storage.retry import StoreAway, is_away, retried, store_name
from elmo_ray.storage.retry_log import log_retries

T = TypeVar("T")

Place = str | os.PathLike[str]

_URI = re.compile(r"([a-z][a-z0-9+.-]+)://")
_READ_AHEAD = 8 << 20
_HASH_BYTES = 4 << 20
# Values that change with an object's content, the most reliable first; each store has some of them.
_VERSIONS = (
    "ETag", "etag", "md5Hash", "content_settings", "checksum", "blob_id", "LastModified", "last_modified", "mtime",
    "updated", "created",
)  # fmt: skip
# What the file system of the Hugging Face Hub says of them, and what we say.
_MISSING_ON_THE_HUB = {
    "(repository not found)": "no such repository, or one that is not open to all; correct the name, or set HF_TOKEN",
    "(revision not found)": "the repository has no such revision",
}
_EXTRAS = {"s3": "s3", "hf": "hub"}


class Status(NamedTuple):
    """Size in bytes and time of change of a file, named as in os.stat_result.

    The time of an object is a number that changes with its content and has no other meaning.
    """

    st_size: int
    st_mtime_ns: int


def is_uri(place: Place) -> bool:
    """Return True for a URI of a store. `absolute` makes plain paths of `file://` URIs."""
    return isinstance(place, str) and _URI.match(place) is not None


def absolute(place: Place) -> str:
    """Return the absolute path, or the URI without a slash at its end; ConfigError for a URI of no store."""
    text = os.fspath(place)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if not is_uri(text):
        return os.path.abspath(os.path.expanduser(text))
    file_system(text)
    protocol, _, rest = text.partition("://")
    bucket, _, key = rest.partition("/")
    if not bucket or ".." in key.split("/"):
        raise ConfigError(f"{text}: is no URI of a store, which has the form {protocol}://BUCKET/NAME")
    return text.rstrip("/")


def absolute_or_none(place: Place | None) -> str | None:
    """Return `absolute` of a place that is given, for a process with another working folder."""
    return None if place is None else absolute(place)


def join(place: Place, *names: str) -> str:
    """Return the place with these names below another place."""
    return "/".join([os.fspath(place).rstrip("/"), *names]) if is_uri(place) else os.path.join(place, *names)


def base_name(place: Place) -> str:
    """Return the last name of a place."""
    return os.path.basename(os.fspath(place).rstrip("/"))


# ---------------------------------------------------------------- reading


def status(place: Place) -> Status | os.stat_result:
    """Return size and time of change of a file; OSError where there is no such file."""
    if not is_uri(place):
        return os.stat(place)
    system, path = file_system(place)
    return _ask(place, lambda: _status(system.info(path)))


def exists(place: Place) -> bool:
    """Return True if there is such a file or folder; OSError where a store does not answer."""
    if not is_uri(place):
        return os.path.exists(place)
    system, path = file_system(place)
    return _ask(place, lambda: bool(system.exists(path)))


def matches(pattern: str) -> list[str]:
    """Return the sorted URIs of all objects that match a URI with `*`, `**` and `?`."""
    system, path = file_system(pattern)

    def request() -> list[str]:
        if not any(character in path for character in "*?["):
            try:
                # isfile would take any refusal for a file that is not there
                return [pattern] if system.info(path)["type"] == "file" else []
            except FileNotFoundError as error:
                if any(sign in str(error) for sign in _MISSING_ON_THE_HUB):
                    raise
                return []
        found = system.glob(path, detail=True)
        return sorted(system.unstrip_protocol(name) for name, info in found.items() if info["type"] == "file")

    return _ask(pattern, request)


def listing(place: Place) -> dict[str, Status]:
    """Return name -> status of all objects below a URI, where names have slashes; an empty dict if there are none."""
    system, path = file_system(place)
    found: dict[str, Any] = _ask(place, lambda: _or_empty(system.find, path, {}))
    return {name[len(path) + 1 :]: _status(info) for name, info in found.items() if name.startswith(path + "/")}


def folders(place: Place) -> list[str]:
    """Return the sorted names of the folders directly below a URI."""
    system, path = file_system(place)
    found: list[dict[str, Any]] = _ask(place, lambda: _or_empty(system.ls, path, []))
    return sorted(base_name(info["name"]) for info in found if info["type"] == "directory")


def _or_empty(find: Callable[..., T], path: str, empty: T) -> T:
    """Return what a file system finds at a path, with details, or `empty` if there is nothing."""
    try:
        return find(path, detail=True)
    except FileNotFoundError:
        return empty


def read_bytes(place: Place) -> bytes:
    """Return all bytes of a file."""
    return read_range(place, 0, None) if is_uri(place) else Path(place).read_bytes()


def read_json(place: Place) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if there is no such file or it holds none that can be read."""
    try:
        value = json.loads(read_bytes(place))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_range(place: Place, start: int, end: int | None) -> bytes:
    """Return bytes [start, end) of a file or object, or fewer where it is shorter; end None: all from `start` on."""
    if not is_uri(place):
        with open(place, "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else max(0, end - start))
    system, path = file_system(place)
    if end is not None and end <= start:
        return b""
    # the file system of the Hub would read ahead by itself
    how = {"cache_type": "none"} if "hf" in _protocols(system) else {}

    def request() -> bytes:
        try:
            return bytes(system.cat_file(path, start=start, end=end, **how))
        except Exception as error:
            if start and not is_away(error) and start >= system.info(path)["size"]:
                return b""  # a range beyond the end, which stores refuse each in their own way
            raise error

    return _ask(place, request)


def file_hash(place: Place) -> str:
    """Return the SHA-256 of a file, hexadecimal; it is read in pieces."""
    digest = hashlib.sha256()
    with open_read(place) as file:
        while data := file.read(_HASH_BYTES):
            digest.update(data)
    return digest.hexdigest()


def open_read(place: Place) -> BinaryIO:
    """Return a file, open for reading, whose `name` is the place; an object is read ahead in pieces of 8 MiB."""
    if not is_uri(place):
        return open(place, "rb")
    return io.BufferedReader(_Object(os.fspath(place)), _READ_AHEAD)  # type: ignore[return-value]


def opened_status(file: BinaryIO) -> Status | os.stat_result:
    """Return the present `status` of a file from `open_read`."""
    return status(file.name) if is_uri(file.name) else os.fstat(file.fileno())


class _Object(io.RawIOBase):
    """File interface of an object, for reading and seeking."""

    def __init__(self, place: str) -> None:
        self.name = place
        self._size = status(place).st_size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = read_range(self.name, self._at, min(self._at + len(buffer), self._size))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


# ---------------------------------------------------------------- writing


def write_bytes(place: Place, data: bytes, only_new: bool = False) -> None:
    """Write an object or file of these bytes, which appears whole or not at all.

    only_new (for few bytes): raise FileExistsError if it exists already. This is certain in folders and in S3; in other
    stores two writers at the same moment may both succeed. If a store's answer was lost, what exists may be one's own.
    """
    if not is_uri(place):
        if not only_new:
            with atomic_write(place, None) as temporary:
                temporary.write_bytes(data)
            return
        make_folder(Path(place).parent)
        with open(place, "xb") as file:
            file.write(data)
        return
    system, path = file_system(place)

    def request() -> None:
        if only_new and system.exists(path):
            raise FileExistsError(errno.EEXIST, "exists already", os.fspath(place))
        if only_new and "s3" in _protocols(system):
            system.pipe_file(path, data, mode="create")
        else:
            system.pipe_file(path, data)

    _ask(place, request)


def upload(source: Path, place: Place) -> None:
    """Copy a local file to an object."""
    system, path = file_system(place)
    _ask(place, lambda: system.put_file(os.fspath(source), path))


def download(place: Place, target: Path) -> None:
    """Copy an object to a local file, which appears whole or not at all."""
    system, path = file_system(place)
    with atomic_write(target, None) as temporary:
        _ask(place, lambda: system.get_file(path, os.fspath(temporary)))


def copy(source: Place, target: Place) -> None:
    """Copy an object to another place of the same store, without a transfer through this machine."""
    system, path = file_system(source)
    _ask(source, lambda: system.cp_file(path, file_system(target)[1]))


def remove(place: Place) -> None:
    """Remove an object if it is there."""
    system, path = file_system(place)
    with contextlib.suppress(FileNotFoundError):
        _ask(place, lambda: system.rm_file(path))


# ---------------------------------------------------------------- fsspec


def file_system(place: Place) -> tuple[Any, str]:
    """Return fsspec's file system for a URI, one instance for each store and process, and the path in it.

    Raises ConfigError for a protocol that does not exist or whose library is not installed.
    """
    import fsspec

    text = os.fspath(place)
    match = _URI.match(text)
    if match is None:
        raise ValueError(f"{text} is no URI")
    try:
        # keep no listings, as other processes write to the store
        system = fsspec.filesystem(match[1], use_listings_cache=False)
    except ImportError:
        extra = _EXTRAS.get(match[1])
        cure = f"pip install 'elmo-ray[{extra}]'" if extra else f"see fsspec's documentation of {match[1]}://"
        raise ConfigError(f"{text}: the package that reads {match[1]}:// is not installed ({cure})") from None
    except Exception as error:  # such as an unknown protocol, or missing credentials where they are needed at once
        raise ConfigError(f"{text}: {reason(error)}") from None
    if "s3" in _protocols(system):
        log_retries()
    return system, system._strip_protocol(text)


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _status(info: dict[str, Any]) -> Status:
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    return Status(int(info.get("size") or 0), int(hashlib.sha256(version.encode()).hexdigest()[:15], 16))


def _ask(place: Place, request: Callable[[], T]) -> T:
    """Return the result of a request to the store of a URI, which is made again while the store is away.

    A store's exceptions become OSErrors of one line.
    """

    def explained() -> T:
        with _explained(place):
            return request()

    return retried(store_name(place), explained)


@contextlib.contextmanager
def _explained(place: Place) -> Iterator[None]:
    """Turn a store's exceptions into OSErrors of one line."""
    text = os.fspath(place)
    try:
        yield
    except (ElmoRayError, FileExistsError):
        raise
    except FileNotFoundError as error:
        why = next((why for sign, why in _MISSING_ON_THE_HUB.items() if sign in str(error)), "no such object or bucket")
        raise FileNotFoundError(errno.ENOENT, why, text) from None
    except Exception as error:  # each store's library has its own exceptions for failures
        if is_away(error):
            raise StoreAway(errno.EIO, f"{type(error).__name__}: {reason(error)}", text) from None
        if isinstance(error, PermissionError):
            raise PermissionError(errno.EACCES, f"access denied ({reason(error)})", text) from None
        raise OSError(errno.EIO, f"{type(error).__name__}: {reason(error)}", text) from None
