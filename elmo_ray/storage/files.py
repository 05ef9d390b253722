"""Files that are written aside, hashed on the way, synced and renamed; and the safetensors form written that way.

safetensors' own writer takes a whole file as one byte string or leaves no place to hash: here a tensor's memory goes to
the file in pieces, so that saving needs no second copy of a model. Reading is left to the safetensors library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from elmo_ray.errors import ConfigError, DataError

_CHUNK_BYTES = 4 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class HashingFile:
    """A binary file opened for writing that knows the size and the sha256 of what went through it."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.size, self.sha256 = raw, 0, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, view.nbytes, _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]
            self.raw.write(chunk)
            self.sha256.update(chunk)
        self.size += view.nbytes


def aside(path: Path, owner: int) -> Path:
    """Where `write_file` writes before it renames."""
    return path.with_name(f"{path.name}.tmp-{owner:05d}")


def write_file(path: Path, owner: int, fill: Callable[[HashingFile], object]) -> tuple[int, str]:
    """Write aside, sync, rename; returns size and sha256 of the bytes in memory, so that a bad disk is found on load.

    `owner` (a rank) keeps the names of two writers apart. After an error the file aside may be left; raises OSError.
    """
    temporary = aside(path, owner)
    with open(temporary, "wb") as raw:
        out = HashingFile(raw)
        fill(out)
        raw.flush()
        os.fsync(raw.fileno())
    os.replace(temporary, path)
    return out.size, out.sha256.hexdigest()


def sync_directory(folder: Path) -> None:
    """Make renames in `folder` durable where the file system can; some network file systems cannot sync a directory."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_hash(path: Path) -> str:
    """sha256 of a file, read in pieces; raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as raw:
        while chunk := raw.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_safetensors(out: HashingFile, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors (any shapes, on the host) in safetensors form; equal tensors give equal bytes in any order of keys.

    Raises ValueError for a dtype that the form does not have.
    """
    # Widest elements first keeps every tensor aligned without holes, which the form forbids.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"tensor {name} has dtype {tensor.dtype}, which a checkpoint cannot hold")
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            out.write(flat.view(torch.uint8).numpy().data)


def write_json(path: str | Path, value: object) -> None:
    """Writes aside, then renames; raises ConfigError where the file cannot be written."""
    target = Path(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}") from None


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
