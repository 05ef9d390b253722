"""Unpacking of compressed shards (.gz, .zst), and writing of texts to the prepared folder."""

import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from elmo_ray import storage
from elmo_ray.data.foreign_formats import HEAD_BYTES, check_magic, check_parquet, check_text
from elmo_ray.errors import DataError
from elmo_ray.storage import Place, Status, is_uri

_MAGIC = {"gz": b"\x1f\x8b", "zst": b"\x28\xb5\x2f\xfd"}
# Bytes 1 to 3 of a frame without text, with which pzstd begins its files; byte 0 is 0x50 to 0x5f.
_SKIPPABLE = b"\x2a\x4d\x18"
_READ_BYTES = 1 << 18
# Bytes to leave free on the disk, and bytes to write before the free space is looked at again.
_SPARE_BYTES = 64 << 20
_CHECK_BYTES = 64 << 20
# For a file that does not state its unpacked size: English text shrinks to a third or a quarter.
_USUAL_RATIO = 4


def compression(path: str) -> str | None:
    """Return "gz", "zst", or None for plain text, by the file's first bytes.

    Raises DataError when they contradict the file's name (an empty or foreign file), when they show another compression
    or encoding, or when the file cannot be read.
    """
    try:
        with storage.open_read(path) as file:
            head = file.read(16)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    check_parquet(head, path)
    return _compression_of(head, path)


def unpacked_bytes(data: bytes, path: str) -> bytes:
    """Return the text in all bytes of a small file, which is plain, gz or zst. Raises DataError as `unpack` does."""
    kind = _compression_of(data[:16], path)
    return data if kind is None else b"".join(unpacked_pieces(io.BytesIO(data), path, kind))


def _compression_of(head: bytes, path: str) -> str | None:
    suffix = path.rpartition(".")[2]
    for kind, magic in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if suffix == "zst" and head[1:4] == _SKIPPABLE and head[0] >> 4 == 5:
        return "zst"
    if suffix in _MAGIC:
        what = f"it begins with {head[:4]!r}" if head else "it is empty"
        raise DataError(f"{path}: is no .{suffix} file ({what}); rename or replace it")
    check_magic(head, path)
    return None


def check_format(source: str) -> None:
    """Raise DataError when the text of a shard, compressed or plain, is another format, as `check_text` does.

    Reads the start of the file. Raises DataError also when it cannot be read or unpacked.
    """
    head = b""
    try:
        kind = compression(source)
        if kind is None:
            head = storage.read_range(source, 0, HEAD_BYTES)
        else:
            with storage.open_read(source) as packed:
                for piece in unpacked_pieces(packed, source, kind):
                    head += piece
                    if len(head) >= HEAD_BYTES:
                        break
    except OSError as error:
        raise DataError(f"{source}: {error.strerror or error}") from None
    check_text(head[:HEAD_BYTES], source)


def unpacked_path(source: str, directory: Place) -> str:
    """Return the place for the text of a compressed shard; its name is different for every source."""
    name = storage.base_name(source)
    for kind in _MAGIC:
        name = name.removesuffix(f".{kind}")
    stem = name.removesuffix(".txt")
    return storage.join(directory, f"{stem}-{hashlib.sha256(source.encode()).hexdigest()[:12]}.txt")


def is_unpacked(source: str, target: Place) -> bool:
    """Return whether `target` is the whole text of `source`, and neither of them has changed since it was unpacked."""
    note = read_note(target)
    try:
        return note is not None and note.items() >= _note_fields(storage.status(source), storage.status(target)).items()
    except OSError:
        return False


def check_space(sources: Sequence[str], directory: Path) -> None:
    """Raise DataError when the disk of `directory` has too little space for the texts of compressed `sources`."""
    check_free(sum(estimate(source) for source in sources), f"{len(sources)} compressed shards", directory)


def check_free(needed: float, what: str, directory: Path) -> None:
    """Raise DataError when the disk of `directory` has too little space for so many bytes of text."""
    needed += _SPARE_BYTES
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise DataError(
            f"data.prepared_dir={directory}: {what} need about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "name a folder on a larger disk"
        )


def unpack(source: str, target: Place) -> int:
    """Write the text of a compressed shard to `target`, whole or not at all; return its size in bytes.

    A `target` in an object store is unpacked to this machine's disk first. Raises DataError for a damaged or truncated
    file and for a full disk.
    """

    def fields(text: Status | os.stat_result) -> dict[str, int]:
        return _note_fields(status, text)

    try:
        status = storage.status(source)
        with storage.open_read(source) as packed:
            kind = compression(source)
            return write_text(source, target, unpacked_pieces(packed, source, kind), fields)
    except OSError as error:
        raise DataError(f"{source}: {error.strerror or error}") from None


def write_text(
    source: str,
    target: Place,
    pieces: Iterable[bytes],
    note: Callable[[Status | os.stat_result], dict[str, Any]],
    also: Callable[[], dict[str, bytes]] = dict,
) -> int:
    """Write the pieces of a text to `target`, whole or not at all, then a note about it; return its size in bytes.

    source: the file of which it is made, for errors. note: gets the status of the text and returns the fields of the
    note, with which the text counts as whole (see `read_note`). also: called after the last piece; it returns the
    contents of other files, by their places, that stand before the note is written. A `target` in an object store is
    written to this machine's disk first. Raises DataError for a full disk.
    """
    try:
        if not is_uri(target):
            size = _write(source, Path(target), pieces)
        else:
            with tempfile.TemporaryDirectory(prefix="elmo-ray-unpack-") as folder:
                here = Path(folder, storage.base_name(target))
                size = _write(source, here, pieces)
                storage.upload(here, target)
        for place, data in also().items():
            storage.write_bytes(place, data)
        storage.write_bytes(_note_path(target), json.dumps(note(storage.status(target))).encode())
    except OSError as error:
        folder = os.fspath(target).rpartition("/")[0]
        raise DataError(f"{source}: its text cannot be written to {folder} ({error.strerror or error})") from None
    return size


def read_note(target: Place) -> dict[str, Any] | None:
    """Return the note on a text that `write_text` wrote, or None where there is none."""
    return storage.read_json(_note_path(target))


def _write(source: str, target: Path, pieces: Iterable[bytes]) -> int:
    remove_stale(target.parent, target.name)
    aside = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        size = 0
        since_check = _CHECK_BYTES
        with open(aside, "wb") as text:
            for piece in pieces:
                if since_check >= _CHECK_BYTES:
                    since_check = 0
                    _check_free(target, source)
                text.write(piece)
                size += len(piece)
                since_check += len(piece)
            text.flush()
            os.fsync(text.fileno())
        os.replace(aside, target)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return size


def remove_stale(folder: Path, name: str | None = None) -> bool:
    """Remove the texts and notes that processes of this machine could not finish, as they were killed; some are large.

    name: of one text, all by default. Returns whether processes that are alive are writing some.
    """
    prefix = "." if name is None else f".{name}."
    is_written = False
    for aside in folder.glob(f"{glob.escape(prefix)}*"):
        rest, _, writer = aside.stem.rpartition(".")
        if aside.suffix not in (".part", ".tmp") or not rest.endswith(f".{socket.gethostname()}"):
            continue
        if _is_alive(writer.partition("-")[0]):
            is_written = True
        else:
            aside.unlink(missing_ok=True)
    return is_written


def read_pieces(file: BinaryIO) -> Iterator[bytes]:
    """Yield a file's content in pieces."""
    while piece := file.read(_READ_BYTES):
        yield piece


def unpacked_pieces(packed: BinaryIO, source: str, kind: str | None) -> Iterator[bytes]:
    """Yield the text of a file that is compressed as `kind` says. Raises DataError when it is truncated or damaged."""
    pieces = read_pieces(packed)
    if kind is not None:
        pieces = _zst_pieces(packed, source) if kind == "zst" else _gz_pieces(packed)
    try:
        yield from pieces
    except EOFError:
        raise DataError(f"{source}: is truncated; get the whole file again") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{source}: is damaged ({error}); get the file again") from None
    except OSError as error:  # here, where it cannot be taken for one of the text that is written
        raise DataError(f"{source}: {error.strerror or error}") from None


def _gz_pieces(packed: BinaryIO) -> Iterator[bytes]:
    with gzip.open(packed, "rb") as text:
        while piece := text.read(_READ_BYTES):
            yield piece


def _zst_pieces(packed: BinaryIO, source: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{source}: needs the package zstandard (pip install zstandard)") from None

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    data = packed.read(_READ_BYTES)
    try:
        while data:
            yield frame.decompress(data)
            data = frame.unused_data
            if frame.eof and (data or (data := packed.read(_READ_BYTES))):
                frame = decompressor.decompressobj()
            elif not frame.eof and not (data := packed.read(_READ_BYTES)):
                raise EOFError
    except zstandard.ZstdError as error:
        raise DataError(f"{source}: is damaged ({error}); get the file again") from None


def estimate(source: str) -> int:
    """Return the unpacked size in bytes by the compressed file, or a guess where it is not stated or unlikely."""
    size = storage.status(source).st_size
    guess = size * _USUAL_RATIO
    kind = _known_compression(source)
    if kind is None:
        return guess if _is_parquet(source) else size
    with storage.open_read(source) as packed:
        if kind == "zst":
            with contextlib.suppress(Exception):  # A defect of the file shows when it is unpacked.
                import zstandard

                stated = zstandard.get_frame_parameters(packed.read(18)).content_size
                return stated if 0 < stated < 1 << 60 else guess
            return guess
        packed.seek(max(0, size - 4))
        # This is the length of the last member, modulo 2**32; in a truncated file it is noise.
        stated = int.from_bytes(packed.read(4), "little")
    return stated if size <= stated <= 10 * size else guess


def _known_compression(source: str) -> str | None:
    try:
        return compression(source)
    except DataError:  # A Parquet file, or one that is found to be bad when it is read.
        return None


def _is_parquet(source: str) -> bool:
    try:
        with storage.open_read(source) as file:
            check_parquet(file.read(16), source)
    except (DataError, OSError):
        return True
    return False


def _check_free(target: Path, source: str) -> None:
    """Raise DataError when the disk of `target` is nearly full."""
    free = shutil.disk_usage(target.parent).free
    if free < _SPARE_BYTES + _CHECK_BYTES:
        raise DataError(
            f"{source}: the disk of {target.parent} is full while unpacking; set data.prepared_dir to a larger one"
        )


def _note_path(target: Place) -> str:
    """Return the path of the note on sizes and times of change of `target` and its source."""
    return os.fspath(target).removesuffix(".txt") + ".unpacked.json"


def text_fields(text: Status | os.stat_result) -> dict[str, int]:
    """Return the fields of a note by which it belongs to a text of this status."""
    return {"text_size": text.st_size, "text_mtime_ns": text.st_mtime_ns}


def _note_fields(source: Status | os.stat_result, text: Status | os.stat_result) -> dict[str, int]:
    return {
        "source_size": source.st_size,
        "source_mtime_ns": source.st_mtime_ns,
        **text_fields(text),
    }


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        return True
    return True
