"""The index of a corpus: shards of text, cut into line-aligned blocks whose positions are counted.

`Shard` describes one text file, `Corpus` the blocks of several, and `Block` is what is read at once. `expand_paths`
finds the files that a setting names. An index file is an .npz with plain fields (as JSON) and arrays, without pickle.
"""

import glob
import hashlib
import io
import json
import logging
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from elmo_ray import storage
from elmo_ray.errors import ConfigError, DataError
from elmo_ray.storage import is_uri
from elmo_ray.storage.files import write_aside

logger = logging.getLogger(__name__)

Int64 = npt.NDArray[np.int64]

_FORMAT_VERSION = 2

# Errors of zipfile and numpy for damaged bytes: also RuntimeError for encryption, TypeError for a file of one array.
_DAMAGES = (
    OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error, struct.error,
    RuntimeError, TypeError, AttributeError, OverflowError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """Lines in the bytes [start, end) of a text file.

    path:      absolute path, or URI, of the text.
    positions: number of words and sentences together, the same in each direction.
    crc32:     the CRC-32 (zlib) of the bytes, 0 to 2**32 - 1.
    """

    path: str
    start: int
    end: int
    positions: int
    crc32: int


@dataclass(frozen=True, eq=False)
class Shard:
    """One text file and its blocks, which tile it from byte 0.

    path:       absolute path, or URI, of the seekable text.
    source:     the file from which the text was unpacked or made; the same as `path` for a text as it is, and for one
                that was made of several files.
    size, mtime_ns, sha256: size (bytes), time of change (ns) and hash (hexadecimal) of the file at `path`.
    characters: number of Unicode code points of all words.
    block_*:    int64 [n], for each block: the byte at which it ends; its positions; its words; the code points of its
                words; the CRC-32 of its bytes.
    block_continues: bool [n], whether it begins within a document; None where that is not known. It is not saved.
    """

    path: str
    source: str
    size: int
    mtime_ns: int
    sentences: int
    tokens: int
    characters: int
    sha256: str
    block_ends: Int64
    block_positions: Int64
    block_tokens: Int64
    block_characters: Int64
    block_crc32: Int64
    block_continues: npt.NDArray[np.bool_] | None = None


class Corpus:
    """Blocks of text in order: all blocks of some shards, or a selection of them.

    block_shard:  int32 [N], index into `shards`.
    block_start, block_end: int64 [N], bytes.
    block_positions, block_tokens, block_characters, block_crc32: int64 [N], as in `Shard`.
    positions, tokens, sentences, characters: the sums over the blocks.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        block_shard: npt.NDArray[np.int32],
        block_start: Int64,
        block_end: Int64,
        block_positions: Int64,
        block_tokens: Int64,
        block_characters: Int64,
        block_crc32: Int64,
    ) -> None:
        self.shards = tuple(shards)
        self.block_shard = block_shard
        self.block_start = block_start
        self.block_end = block_end
        self.block_positions = block_positions
        self.block_tokens = block_tokens
        self.block_characters = block_characters
        self.block_crc32 = block_crc32
        self.positions = int(block_positions.sum())
        self.tokens = int(block_tokens.sum())
        self.sentences = self.positions - self.tokens
        self.characters = int(block_characters.sum())

    @classmethod
    def from_shards(cls, shards: Sequence[Shard]) -> "Corpus":
        """Return the corpus of all blocks of all shards, in the order given. A shard may be empty."""
        empty = np.zeros(0, dtype=np.int64)
        starts = [np.concatenate((np.zeros(1, np.int64), shard.block_ends))[:-1] for shard in shards]
        numbers = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.block_ends) for shard in shards])
        others = [[getattr(shard, name) for shard in shards] for name in _SHARD_ARRAYS]
        return cls(shards, numbers, *(np.concatenate([empty, *arrays]) for arrays in (starts, *others)))

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.block_shard)

    def block(self, index: int) -> Block:
        """Return the block of this index."""
        return Block(
            self.shards[self.block_shard[index]].path,
            int(self.block_start[index]),
            int(self.block_end[index]),
            int(self.block_positions[index]),
            int(self.block_crc32[index]),
        )

    def blocks(self) -> Iterable[Block]:
        """Return an iterable over all blocks in order."""
        return map(self.block, range(len(self)))

    def spread(self, count: int) -> list[int]:
        """Return the indices of at most `count` blocks that lie evenly over the corpus."""
        return [
            int(index) for index in np.unique(np.linspace(0, len(self) - 1, min(len(self), count)).astype(np.int64))
        ]

    @property
    def fingerprint(self) -> str:
        """Hash of the texts, their order and the blocks; it does not depend on the place of the files."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(shard.sha256.encode())
        for array in (self.block_shard, self.block_start, self.block_end):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()

    def select(self, indices: Int64) -> "Corpus":
        """Return the corpus of these blocks, in this order."""
        return Corpus(self.shards, *(getattr(self, f"block_{name}")[indices] for name in _CORPUS_ARRAYS))

    def split(self, holdout: float, seed: int) -> tuple["Corpus", "Corpus"]:
        """Set whole blocks aside; return the remaining corpus and the held-out one.

        The held-out corpus has about the share `holdout` of all positions, but at least one block. Blocks with parts of
        the same document stay together; so a document is held out or not. The split is a pure function of the blocks'
        positions and documents, `holdout` and `seed`. It is made of a whole corpus, as it comes from `from_shards`.
        Raises ConfigError when nothing would remain.
        """
        group = self._groups()
        count = int(group[-1]) + 1
        positions = np.bincount(group, self.block_positions, count).astype(np.int64)
        order = np.argsort(_scramble(np.arange(count, dtype=np.uint64), seed), kind="stable")
        before = np.cumsum(positions[order]) - positions[order]
        chosen = np.zeros(count, dtype=bool)
        chosen[order] = before < holdout * self.positions
        held_out = chosen[group]
        if held_out.all():
            whole = "" if count == len(self) else ", as each document stays whole"
            raise ConfigError(
                f"data.holdout={holdout} needs more blocks than the {count} of this corpus{whole}; "
                "lower data.block_bytes or name data.valid"
            )
        return self.select(np.flatnonzero(~held_out)), self.select(np.flatnonzero(held_out))

    def _groups(self) -> npt.NDArray[np.int64]:
        """Return for each block the number of its group, from 0: blocks that a document joins are of one group."""
        continues = [
            np.zeros(len(shard.block_ends), np.bool_) if shard.block_continues is None else shard.block_continues
            for shard in self.shards
        ]
        return np.cumsum(~np.concatenate(continues)) - 1

    def check_files(self) -> None:
        """Raise DataError when a file of the corpus is gone or has another size than the one that was indexed."""
        for shard in self.shards:
            try:
                status = storage.status(shard.path)
            except OSError as error:
                raise DataError(f"{shard.path}: {error.strerror}; it was there when the corpus was indexed") from None
            if status.st_size != shard.size:
                raise DataError(f"{shard.path}: {status.st_size} bytes, {shard.size} when indexed; run prepare again")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index as .npz, whole or not at all."""
        shards = [shard_fields(shard) for shard in self.shards]
        arrays = {f"block_{name}": getattr(self, f"block_{name}") for name in _CORPUS_ARRAYS}
        for number, shard in enumerate(self.shards):
            arrays.update({f"shard{number}/{name}": getattr(shard, name) for name in _SHARD_ARRAYS})
        write_aside(path, pack_index({"format_version": _FORMAT_VERSION, "shards": shards}, arrays))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Corpus":
        """Return the corpus of a file that `save` wrote. Raises DataError for any other file."""
        fields, arrays = read_index(path)
        try:
            if fields["format_version"] != _FORMAT_VERSION:
                raise DataError(
                    f"{path}: index format {fields['format_version']}, not {_FORMAT_VERSION}; run prepare again"
                )
            shards = [
                Shard(**{**shard, **{name: arrays[f"shard{number}/{name}"] for name in _SHARD_ARRAYS}})
                for number, shard in enumerate(fields["shards"])
            ]
            blocks = [arrays[f"block_{name}"] for name in _CORPUS_ARRAYS]
            if not _are_valid(blocks, len(shards)):
                raise KeyError("blocks")
            return cls(shards, *blocks)
        except (KeyError, TypeError):
            raise DataError(f"{path}: not a corpus index; run prepare again") from None


def _are_valid(blocks: Sequence[npt.NDArray[Any]], n_shards: int) -> bool:
    """Return whether the arrays of `_CORPUS_ARRAYS` are of integers, [N] each, and hold possible values."""
    shard, start, end, positions, tokens, *_ = blocks
    if any(array.ndim != 1 or len(array) != len(shard) or array.dtype.kind != "i" for array in blocks):
        return False
    if len(shard) == 0:
        return True
    in_order = (0 <= start).all() and (start <= end).all() and (0 <= tokens).all() and (tokens <= positions).all()
    return bool(in_order and shard.min() >= 0 and shard.max() < n_shards)


# In the order of the arguments of `Corpus`; a shard has all but the first two, with `block_ends` in place of `end`.
_CORPUS_ARRAYS = ("shard", "start", "end", "positions", "tokens", "characters", "crc32")
_SHARD_ARRAYS = ("block_ends", "block_positions", "block_tokens", "block_characters", "block_crc32")
_SHARD_FIELDS = ("path", "source", "size", "mtime_ns", "sentences", "tokens", "characters", "sha256")


def shard_fields(shard: Shard) -> dict[str, str | int]:
    """Return the plain fields of a shard, as they go into JSON."""
    return {name: getattr(shard, name) for name in _SHARD_FIELDS}


def pack_index(fields: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> bytes:
    """Return plain fields (as JSON) and arrays as the bytes of a compressed .npz."""
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(fields).encode(), dtype=np.uint8)
    np.savez_compressed(buffer, allow_pickle=False, fields=text, **arrays)
    return buffer.getvalue()


def unpack_index(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return the fields and arrays that `pack_index` packed. Raises DataError, naming `name`, for damaged bytes."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return _index_fields(arrays.pop("fields")), arrays
    except _DAMAGES as error:
        raise DataError(f"{name}: damaged index ({error}); delete it and run prepare again") from None


def _index_fields(text: npt.NDArray[Any]) -> dict[str, Any]:
    fields = json.loads(text.tobytes())
    if not isinstance(fields, dict):
        raise ValueError("no fields in it")
    return fields


def read_index(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return the fields and arrays of an index file. Raises DataError when it is missing or damaged."""
    return unpack_index(read_index_bytes(path), os.fspath(path))


def read_index_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the plain fields of an index file without reading its arrays. Raises DataError as `read_index` does."""
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)) if is_uri(path) else path, allow_pickle=False) as file:
            return _index_fields(file["fields"])
    except _DAMAGES as error:
        raise DataError(f"{path}: no index ({error}); run prepare") from None


def read_index_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of an index file. Raises DataError when it cannot be read."""
    try:
        return storage.read_bytes(path)
    except OSError as error:
        raise DataError(f"{path}: no index ({error.strerror}); run prepare") from None


def expand_paths(patterns: Sequence[str], key: str = "data.train") -> list[str]:
    """Return the absolute paths, or URIs, of the files that `patterns` name; a pattern is a file or a glob, also `**`.

    They are in the order of the patterns, sorted within each, and every file comes once. Raises ConfigError, naming
    `key`, for a pattern that matches nothing and for a directory; DataError for a file that cannot be read.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        if storage.is_uri(pattern):
            paths.update(dict.fromkeys(_matching_objects(pattern, key)))
            continue
        found = _matching_files(pattern, key)
        for name in found:
            path = os.path.abspath(name)
            if os.path.isdir(path):
                folder = name.rstrip("/")
                endings = (os.path.splitext(each)[1] for each in sorted(os.listdir(path)))
                ending = next(filter(None, endings), ".txt")
                raise ConfigError(f"{key}={pattern}: {folder} is a directory; name its files, as in {folder}/*{ending}")
            reason = _unreadable_reason(path)
            if reason is not None:
                raise DataError(f"{path}: {reason} ({key}={pattern}); mend or remove it, or name other files")
            if path in paths:
                logger.warning("%s: %s is named twice and is used once", key, path)
            paths[path] = None
    return list(paths)


_BRACKETS = "[ ] stand for one of the characters between them; write [[] for a bracket that belongs to the name"


def _matching_files(pattern: str, key: str) -> list[str]:
    """Return the files that a path or a glob names, sorted. Raises ConfigError where there are none.

    A folder whose name has brackets may be written as it is: `news [v2]/*.txt`.
    """
    expanded = os.path.expanduser(pattern)
    if os.path.exists(expanded):
        return [expanded]
    found = sorted(glob.glob(expanded, recursive=True))
    literal = _with_literal_folders(expanded)
    if literal != expanded and (inside := sorted(glob.glob(literal, recursive=True))):
        if found:
            raise ConfigError(
                f"{key}={pattern}: matches {found[0]} as a glob and {inside[0]} as it is spelt; {_BRACKETS}"
            )
        return inside
    if not found:
        raise ConfigError(f"{key}={pattern}: no file matches (looked in {os.getcwd()}){_hint_at(expanded, key)}")
    return found


def _hint_at(pattern: str, key: str) -> str:
    """Return the cure for a path or glob that seems to be written for a shell or for another program."""
    for separator in (",", ":", ";", " "):
        names = [name for name in pattern.strip("[]").split(separator) if name]
        if len(names) > 1 and glob.glob(names[0].strip(), recursive=True):
            if key == "in":
                return "; several files are given as one glob in quotes, as in 'part-*.txt'"
            return f"; several files are given as a list: '{key}=[{', '.join(name.strip() for name in names)}]'"
    if "{" in pattern and "}" in pattern:
        return "; { } of a shell are no glob here: name the files in a list, or with * and ?"
    if re.search(r"\$\w", pattern):
        return "; environment variables are written ${NAME}"
    return f"; {_BRACKETS}" if "[" in pattern else ""


def _with_literal_folders(pattern: str) -> str:
    """Return a glob in which the brackets of folders that exist as they are spelt are no longer special."""
    folders = pattern.split("/")[:-1]
    for count in range(len(folders), 0, -1):
        start = "/".join(folders[:count])
        if "[" in start and os.path.isdir(start):
            return start.replace("[", "[[]") + pattern[len(start) :]
    return pattern


def _matching_objects(pattern: str, key: str) -> list[str]:
    """Return the URIs of the objects that a URI, with or without a glob, names."""
    try:
        found = storage.matches(storage.absolute(pattern))
    except OSError as error:
        raise DataError(f"{key}={pattern}: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{key}={error}") from None
    if not found:
        hint = f"; {_BRACKETS}" if "[" in pattern else ""
        raise ConfigError(f"{key}={pattern}: no object matches{hint}")
    return found


def _unreadable_reason(path: str) -> str | None:
    """Return the reason why a path cannot be read as a file, or None."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        link = f"is a symbolic link to {os.readlink(path)}: " if os.path.islink(path) else ""
        return f"{link}{error.strerror}"
    # A pipe is never opened: that would wait for a writer.
    if not stat.S_ISREG(mode):
        return "is no regular file but a pipe or a device"
    return None if os.access(path, os.R_OK) else "no permission to read it"


def _scramble(values: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Return SplitMix64's output function of `values` and `seed`."""
    # A library's random generator may change with its version, and with it the split.
    offset = np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    mixed = (values + offset) * np.uint64(0xD6E8FEB86659FD93)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
