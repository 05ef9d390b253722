"""Index files: plain fields and arrays in an .npz, without pickle."""

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elmo_ray import storage
from elmo_ray.errors import DataError
from elmo_ray.storage import is_uri

# What zipfile and numpy raise for damaged bytes: also RuntimeError for encryption, TypeError for a file of one array.
_DAMAGES = (
    OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error, struct.error,
    RuntimeError, TypeError, AttributeError, OverflowError, MemoryError,
)  # fmt: skip


def pack(fields: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> bytes:
    """Plain fields (as JSON) and arrays as the bytes of a compressed .npz."""
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(fields).encode(), dtype=np.uint8)
    np.savez_compressed(buffer, allow_pickle=False, fields=text, **arrays)
    return buffer.getvalue()


def unpack(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """The fields and arrays of what `pack` made; DataError, naming `name`, when they are damaged."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return _fields(arrays.pop("fields")), arrays
    except _DAMAGES as error:
        raise DataError(f"{name}: damaged index ({error}); delete it and run prepare again") from None


def _fields(text: npt.NDArray[Any]) -> dict[str, Any]:
    fields = json.loads(text.tobytes())
    if not isinstance(fields, dict):
        raise ValueError("no fields in it")
    return fields


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """The fields and arrays of a file; DataError when it is missing or damaged."""
    return unpack(read_bytes(path), os.fspath(path))


def read_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The plain fields alone, without reading the arrays; DataError as in `read`."""
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)) if is_uri(path) else path, allow_pickle=False) as file:
            return _fields(file["fields"])
    except _DAMAGES as error:
        raise DataError(f"{path}: no index ({error}); run prepare") from None


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes; DataError when it cannot be read."""
    try:
        return storage.read_bytes(path)
    except OSError as error:
        raise DataError(f"{path}: no index ({error.strerror}); run prepare") from None


def write_aside(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file such that it appears whole or not at all. DataError when the disk takes no more."""
    target = Path(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(data)
        os.replace(aside, target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
