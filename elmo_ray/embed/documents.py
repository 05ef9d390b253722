"""Documents of JSONL, Parquet and raw text: their contents, with the columns that `embed.keep` names beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from elmo_ray import storage
from elmo_ray.data.documents import TextForm
from elmo_ray.data.text import BYTE_ORDER_MARK, MAX_LINE_BYTES, REPLACEMENT
from elmo_ray.data.unpack import compression, unpacked_pieces
from elmo_ray.errors import DataError, one_line, short

Content = str | list[str] | None
"""Text of a document, or its words where it is one sentence, or None for null."""

_ROWS = 256
_BATCH_CHARACTERS = 1 << 20
_READ_BYTES = 1 << 20
_WRONG = re.compile("[\0\ud800-\udfff]")
_MISSING = object()


@dataclass(frozen=True)
class Documents:
    """Some documents in their order.

    kept: for each name of `embed.keep` an Arrow array with a value for each document. kinds: for each name the Arrow
    type of the values. is_json: the arrays hold the values as JSON, as text, because other batches of the file may have
    values of another type.
    """

    contents: list[Content]
    kept: list[Any]
    kinds: list[Any]
    is_json: bool = False


@dataclass
class Counts:
    """Numbers of documents, of those without a word, and of lines that are left out."""

    documents: int = 0
    empty: int = 0
    bad: int = 0


def read_documents(source: str, form: TextForm, keep: Sequence[str], counts: Counts) -> Iterator[Documents]:
    """Yield the documents of a file in batches of bounded size. counts: `bad` is counted here.

    A document is a line of text, an object of JSONL, or a row of Parquet. Raises DataError, with the file and the line
    or row, for what cannot be read and for columns that are not there.
    """
    kind = form.kind(source)
    if kind == "parquet":
        yield from _parquet(source, form, keep)
    elif kind == "jsonl":
        yield from _jsonl(source, form, keep, counts)
    else:
        batch: list[Content] = []
        size = 0
        for number, line in _lines(source, form, counts):
            batch.append(_decoded(line, source, number, form))
            size += len(line)
            if size >= _BATCH_CHARACTERS:
                yield Documents(batch, [], [])
                batch, size = [], 0
        if batch:
            yield Documents(batch, [], [])


def _jsonl(source: str, form: TextForm, keep: Sequence[str], counts: Counts) -> Iterator[Documents]:
    names = [form.column.split("."), *(name.split(".") for name in keep)]
    seen = [False] * len(names)
    batch: list[Content] = []
    kept: list[list[Any]] = [[] for _ in keep]
    size = 0
    for number, line in _lines(source, form, counts):
        text = _decoded(line, source, number, form).strip()
        if not text:
            continue
        place = f"{source}, line {number}"
        try:
            record = json.loads(text)
            if not isinstance(record, dict):
                raise ValueError(f"is {short(text, 40)} and no object")
        except (ValueError, RecursionError) as error:
            if form.on_error == "replace":
                counts.bad += 1
                continue
            what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"{place}: is not JSON ({what}); mend it, or leave such lines out with data.on_error=replace"
            ) from None
        values = [_value(record, path) for path in names]
        if values[0] is _MISSING:
            raise DataError(_no_column(place, f"data.column={form.column}", names[0], record))
        batch.append(_content(values[0], place, form))
        for position, value in enumerate(values):
            seen[position] |= value is not _MISSING
        for column, value in zip(kept, values[1:], strict=True):
            column.append(None if value is _MISSING else value)
        size += len(text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _ROWS:
            yield _json_batch(source, batch, kept, keep, names, seen, record)
            batch, kept, size = [], [[] for _ in keep], 0
    if batch:
        yield _json_batch(source, batch, kept, keep, names, seen, record)


def _json_batch(
    source: str,
    batch: list[Content],
    kept: list[list[Any]],
    keep: Sequence[str],
    names: Sequence[Sequence[str]],
    seen: Sequence[bool],
    last: dict[str, Any],
) -> Documents:
    """Return a batch of JSONL. Raises DataError for a column that no object so far has, as one that is misspelt."""
    import pyarrow as pa

    for name, path, is_there in zip(keep, names[1:], seen[1:], strict=True):
        if not is_there:
            raise DataError(_no_column(source, f"embed.keep={name}", path, last))
    kinds = [json_array(column, f"{source}: embed.keep={name}").type for name, column in zip(keep, kept, strict=True)]
    texts = [pa.array([None if v is None else json.dumps(v) for v in column], pa.large_string()) for column in kept]
    return Documents(batch, texts, kinds, is_json=True)


def json_array(values: list[Any], place: str, kind: Any = None) -> Any:
    """Return the Arrow array of JSON values. Raises DataError, which begins with `place`, for values of several types.

    kind: the Arrow type, by default that of the values.
    """
    import pyarrow as pa

    try:
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{place}: its values make no column of one type ({short(str(error), 120)}); leave it out or mend it"
        ) from None


def _value(record: Any, path: Sequence[str]) -> Any:
    """Return the value at a path in a record, None below null, and _MISSING where there is none."""
    for name in path:
        if record is None:
            return None
        if not isinstance(record, dict) or name not in record:
            return _MISSING
        record = record[name]
    return record


def _no_column(place: str, setting: str, path: Sequence[str], record: Any) -> str:
    """Return the message for a column that a record does not have, with those that it has at that depth."""
    there: list[str] = []
    while isinstance(record, dict) and path[len(there)] in record and len(there) + 1 < len(path):
        record = record[path[len(there)]]
        there.append(path[len(there)])
    has = short(", ".join(sorted(map(str, record))), 200) if isinstance(record, dict) else type(record).__name__
    return f"{place}: has no column {'.'.join(path[: len(there) + 1])} ({setting}); it has {has or 'none'}"


def _content(value: Any, place: str, form: TextForm) -> Content:
    """Return the content of a document. Raises DataError where it is neither text nor a list of words."""
    if value is None:
        return None
    if isinstance(value, str):
        return _checked(value, place, form)
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return [_checked(word, place, form) for word in value]
    raise DataError(
        f"{place}: data.column={form.column} is {short(json.dumps(value, default=str), 40)}, neither text nor a list "
        "of words; name another column"
    )


def _checked(text: str, place: str, form: TextForm) -> str:
    """Return text without NULs and halves of surrogate pairs, which JSON can spell. Raises DataError for them."""
    if _WRONG.search(text) is None or "control" in form.normalize and not re.search("[\ud800-\udfff]", text):
        return text
    if form.on_error == "replace":
        return _WRONG.sub(REPLACEMENT, text)
    raise DataError(f"{place}: has a NUL or half of a character; mend it, or set data.on_error=replace")


def _parquet(source: str, form: TextForm, keep: Sequence[str]) -> Iterator[Documents]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with storage.open_read(source) as file:
            # A buffer, or a column of a row group would be read as a whole.
            table = pq.ParquetFile(file, buffer_size=_READ_BYTES)
            names = [form.column, *keep]
            kinds = [_parquet_type(table.schema_arrow, form.column, source, f"data.column={form.column}")]
            kinds += [_parquet_type(table.schema_arrow, name, source, f"embed.keep={name}") for name in keep]
            if not _is_content(kinds[0]):
                raise DataError(
                    f"{source}: data.column={form.column} has values of {kinds[0]}, neither text nor lists of words; "
                    "name another column"
                )
            row = 0
            for batch in table.iter_batches(_ROWS, columns=list(dict.fromkeys(names))):
                values, *kept = [_parquet_column(batch, name) for name in names]
                contents = []
                for number, value in enumerate(values.to_pylist(), start=row):
                    contents.append(_content(value, f"{source}, row {number}", form))
                row += len(contents)
                yield Documents(contents, kept, [array.type for array in kept])
    except pa.ArrowException as error:
        raise DataError(
            f"{source}: is no whole Parquet file ({short(str(error).splitlines()[0], 120)}); get the file again, or "
            "set data.format to what it is"
        ) from None
    except OSError as error:
        raise DataError(f"{source}: {one_line(str(error.strerror or error))}") from None


def _parquet_column(batch: Any, name: str) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    first, *inside = name.split(".")
    values = batch.column(first)
    for part in inside:
        values = pc.struct_field(values, part)
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _parquet_type(schema: Any, name: str, source: str, setting: str) -> Any:
    import pyarrow as pa

    fields = {field.name: field.type for field in schema}
    path = name.split(".")
    kind: Any = None
    for depth, part in enumerate(path):
        if part not in fields:
            has = short(", ".join(fields), 200) or str(kind)
            raise DataError(f"{source}: has no column {'.'.join(path[: depth + 1])} ({setting}); it has {has}")
        kind = fields[part]
        fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    return kind


def _is_content(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _lines(source: str, form: TextForm, counts: Counts) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each line, from 1, and the line without its end; the last one may have no end.

    A line that is too long is left out and counted as bad, or raises DataError, as data.on_error says.
    """
    kind = compression(source)
    rest: list[bytes] = []
    held, number = 0, 1
    try:
        with storage.open_read(source) as file:
            pieces = iter(lambda: file.read(_READ_BYTES), b"") if kind is None else unpacked_pieces(file, source, kind)
            for piece in pieces:
                *whole, last = piece.split(b"\n")
                for line in whole:
                    if held <= MAX_LINE_BYTES:
                        yield number, b"".join([*rest, line]) if rest else line
                    rest, held, number = [], 0, number + 1
                was_good = held <= MAX_LINE_BYTES
                held += len(last)
                if held <= MAX_LINE_BYTES:
                    rest.append(last)
                elif was_good:
                    rest = []
                    if form.on_error != "replace":
                        raise DataError(
                            f"{source}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB; divide it, or leave "
                            "such lines out with data.on_error=replace"
                        )
                    counts.bad += 1
    except OSError as error:
        raise DataError(f"{source}: {error.strerror or error}") from None
    if 0 < held <= MAX_LINE_BYTES:
        yield number, b"".join(rest)


def _decoded(line: bytes, source: str, number: int, form: TextForm) -> str:
    if number == 1:
        line = line.removeprefix(BYTE_ORDER_MARK)
    try:
        return _checked(line.decode(), f"{source}, line {number}", form)
    except UnicodeDecodeError as error:
        if form.on_error == "replace":
            return line.decode("utf-8", "replace").replace("\0", REPLACEMENT)
        raise DataError(
            f"{source}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x}); convert the file, or set "
            "data.on_error=replace"
        ) from None
