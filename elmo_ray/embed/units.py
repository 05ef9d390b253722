"""Text that `embed` reads, cut into units of work: lines of text or JSON, or row groups of Parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elmo_ray.data.corpus import expand_paths
from elmo_ray.data.text import OnError, count_lines, cut_blocks, decode, file_status, split_lines
from elmo_ray.data.unpack import check_space, compression, is_unpacked, unpack, unpacked_path
from elmo_ray.errors import ConfigError, DataError, one_line, short

_BLOCK_BYTES = 1 << 18
_PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True)
class Unit:
    """Sentences that a worker makes at a time, and that become one shard of the output.

    path: a seekable text or a Parquet file. kind: text, jsonl or parquet. start, end: in bytes, or in row groups.
    first: the number of its first sentence, counted over all files from 0. count: the number of its sentences.
    """

    number: int
    path: str
    kind: str
    start: int
    end: int
    first: int
    count: int


@dataclass(frozen=True)
class TextFile:
    """File of the input. source: as the user named it. path: the same, or its unpacked text. kind: as of `Unit`."""

    source: str
    path: str
    kind: str


def find_files(patterns: Sequence[str], column: str | None, unpack_to: Path) -> list[TextFile]:
    """Return the files that `patterns` name; compressed files are unpacked. Raises ConfigError and DataError."""
    files: list[TextFile] = []
    packed: list[str] = []
    for source in expand_paths(patterns, "in"):
        with open(source, "rb") as raw:
            is_parquet = raw.read(4) == _PARQUET_MAGIC
        if is_parquet or source.endswith(".parquet"):
            files.append(TextFile(source, source, "parquet"))
            continue
        squeezed = compression(source) is not None
        name = source.rpartition(".")[0] if squeezed else source
        kind = "jsonl" if name.endswith((".jsonl", ".json", ".ndjson")) else "text"
        path = str(unpacked_path(source, unpack_to)) if squeezed else source
        if squeezed and not is_unpacked(source, Path(path)):
            packed.append(source)
        files.append(TextFile(source, path, kind))
    for file in files:
        if file.kind == "text" and column is not None:
            raise ConfigError(f"embed.column={column}: {file.source} is text, which has no columns")
        if file.kind != "text" and column is None:
            raise ConfigError(f"{file.source}: is {file.kind}; name the column of its sentences with embed.column")
    if packed:
        unpack_to.mkdir(parents=True, exist_ok=True)
        check_space(packed, unpack_to)
        for source in packed:
            unpack(source, unpacked_path(source, unpack_to))
    return files


def cut_units(files: Sequence[TextFile], column: str | None, block_bytes: int, whole: bool) -> list[Unit]:
    """Return units of about `block_bytes` of text, or of whole files; all text is read once to number its sentences."""
    units: list[Unit] = []
    first = 0
    for file in files:
        is_parquet = file.kind == "parquet"
        pieces = list(_row_groups(file.path, column) if is_parquet else _line_blocks(file.path, block_bytes))
        if whole and pieces:
            pieces = [(pieces[0][0], pieces[-1][1], sum(count for *_, count in pieces))]
        for start, end, count in pieces:
            units.append(Unit(len(units), file.path, file.kind, start, end, first, count))
            first += count
    return units


def read_sentences(unit: Unit, column: str | None, on_error: OnError) -> Iterator[list[str]]:
    """Yield the words of each sentence of a unit. Raises DataError for text that cannot be read, with file and line."""
    if unit.kind == "parquet":
        yield from _parquet_sentences(unit, str(column))
        return
    with _opened(unit.path) as file:
        line = 0
        for offset, data in cut_blocks(file, unit.start, unit.end, _BLOCK_BYTES):
            text, _ = decode(data, on_error, unit.path, offset)
            for row in split_lines(text):
                yield row.split() if unit.kind == "text" else _json_words(row, str(column), unit, line)
                line += 1


def _opened(path: str) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _line_blocks(path: str, block_bytes: int) -> Iterator[tuple[int, int, int]]:
    with _opened(path) as file:
        for start, data in cut_blocks(file, 0, file_status(path).st_size, block_bytes):
            yield start, start + len(data), count_lines(data)


def _row_groups(path: str, column: str | None) -> Iterator[tuple[int, int, int]]:
    file = _parquet_file(path)
    names = file.schema_arrow.names
    if column not in names:
        raise ConfigError(f"embed.column={column}: {path} has the columns {', '.join(names)}")
    kind = str(file.schema_arrow.field(column).type)
    if kind.removeprefix("large_") not in ("string", "string_view") and "list" not in kind:
        raise ConfigError(f"embed.column={column}: {path} has {kind} there, not text or lists of words")
    for number in range(file.num_row_groups):
        yield number, number + 1, file.metadata.row_group(number).num_rows


def _parquet_file(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {one_line(str(error))}") from None


def _parquet_sentences(unit: Unit, column: str) -> Iterator[list[str]]:
    import pyarrow

    groups = list(range(unit.start, unit.end))
    try:
        row = 0
        for batch in _parquet_file(unit.path).iter_batches(1024, row_groups=groups, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield _words(value, f"{os.path.basename(unit.path)}, sentence {unit.first + row}")
                row += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{unit.path}: cannot be read as Parquet: {one_line(str(error))}") from None


def _json_words(text: str, column: str, unit: Unit, line: int) -> list[str]:
    where = f"{unit.path}, sentence {unit.first + line}"
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no JSON ({short(str(error), 100)})") from None
    if not isinstance(row, dict) or column not in row:
        raise DataError(f"{where}: has no {column}")
    return _words(row[column], f"{where}, {column}")


def _words(value: Any, where: str) -> list[str]:
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return value
    raise DataError(f"{where}: is neither text nor a list of words")
