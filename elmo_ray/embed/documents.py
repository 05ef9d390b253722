"""Documents with the columns that `embed.keep` names beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from elmo_ray.data.documents import MISSING, Counts, DocumentReader, Piece, TextForm, no_column, value_at
from elmo_ray.data.parquet import column_of, column_type, is_text_type, parquet_file
from elmo_ray.errors import DataError, short

Content = str | list[str] | None
"""Text of a document, or its words where it is one sentence, or None for null."""

_ROWS = 256
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Documents:
    """Batch of documents in their order.

    kept: for each name of `embed.keep` an Arrow array with a value for each document. kinds: for each name the Arrow
    type of the values. is_json: the arrays hold the values as JSON, as text, because other batches of the file may have
    values of another type.
    """

    contents: list[Content]
    kept: list[Any]
    kinds: list[Any]
    is_json: bool = False


def read_kept_documents(source: str, form: TextForm, keep: Sequence[str], counts: Counts) -> Iterator[Documents]:
    """Yield the documents of a file in batches of bounded size, with the columns `keep`.

    Their contents are text, or lists of words in JSONL and Parquet. Raises DataError as `data.documents.read_documents`
    does, and for kept columns that are not there or have values of several types. counts: `bad` is counted here.
    """
    reader = DocumentReader(Piece(source), form, counts)
    kind = form.kind(source)
    if kind == "parquet":
        yield from _parquet(reader, keep)
    elif kind != "text":
        yield from _records(reader, keep)
    else:
        batch: list[Content] = []
        size = 0
        for text in reader.text():
            batch.append(text)
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                yield Documents(batch, [], [])
                batch, size = [], 0
        if batch:
            yield Documents(batch, [], [])


def _records(reader: DocumentReader, keep: Sequence[str]) -> Iterator[Documents]:
    paths = [name.split(".") for name in keep]
    seen: set[str] = set()
    batch: list[Content] = []
    kept: list[list[Any]] = [[] for _ in keep]
    size = 0
    record: dict[str, Any] = {}
    for number, record in reader.records():
        content = value_at(record, reader.names)
        if content is MISSING:
            setting = f"data.column={reader.form.column}"
            raise DataError(no_column(reader.place(number), setting, reader.names, record))
        batch.append(_content(content, reader, number))
        for name, path, column in zip(keep, paths, kept, strict=True):
            value = value_at(record, path)
            if value is not MISSING:
                seen.add(name)
            column.append(None if value is MISSING else value)
        size += len(batch[-1] or "")
        if size >= _BATCH_CHARACTERS or len(batch) >= _ROWS:
            yield _json_batch(reader.source, batch, dict(zip(keep, kept, strict=True)), seen, record)
            batch, kept, size = [], [[] for _ in keep], 0
    if batch:
        yield _json_batch(reader.source, batch, dict(zip(keep, kept, strict=True)), seen, record)


def _json_batch(
    source: str, batch: list[Content], kept: dict[str, list[Any]], seen: set[str], last: dict[str, Any]
) -> Documents:
    """Return a batch of records. Raises DataError for a column that no object so far has, as one that is misspelt."""
    import pyarrow as pa

    for name in kept:
        if name not in seen:
            raise DataError(no_column(source, f"embed.keep={name}", name.split("."), last))
    kinds = [json_array(column, f"{source}: embed.keep={name}").type for name, column in kept.items()]
    texts = [
        pa.array([None if value is None else json.dumps(value) for value in column], pa.large_string())
        for column in kept.values()
    ]
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


def _content(value: Any, reader: DocumentReader, number: int) -> Content:
    """Return the content of a document. Raises DataError where it is neither text nor a list of words."""
    if value is None:
        return None
    if isinstance(value, str):
        return reader.checked(value, number)
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return [reader.checked(word, number) for word in value]
    raise DataError(
        f"{reader.place(number)}: data.column={reader.form.column} is {short(json.dumps(value, default=str), 40)}, "
        "neither text nor a list of words; name another column"
    )


def _parquet(reader: DocumentReader, keep: Sequence[str]) -> Iterator[Documents]:
    import pyarrow as pa

    source, column = reader.source, reader.form.column
    paths = [name.split(".") for name in keep]
    with parquet_file(source) as table:
        kind = column_type(table.schema_arrow, reader.names, source, f"data.column={column}")
        for name, path in zip(keep, paths, strict=True):
            column_type(table.schema_arrow, path, source, f"embed.keep={name}")
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not is_text_type(kind.value_type if is_list else kind):
            raise DataError(
                f"{source}: data.column={column} has values of {kind}, neither text nor lists of words; name another "
                "column"
            )
        rows = 0
        for batch in table.iter_batches(_ROWS, columns=list(dict.fromkeys([column, *keep]))):
            values = reader.values(column_of(batch, reader.names), rows)
            contents = [_content(value, reader, number) for number, value in enumerate(values, start=rows)]
            rows += len(contents)
            kept = [_plain(column_of(batch, path)) for path in paths]
            yield Documents(contents, kept, [array.type for array in kept])


def _plain(array: Any) -> Any:
    """Return an Arrow array without a dictionary, which would be another one in each batch, and without views."""
    import pyarrow as pa

    if pa.types.is_string_view(array.type):
        return array.cast(pa.string())  # Arrow cannot take rows of views
    if pa.types.is_binary_view(array.type):
        return array.cast(pa.binary())
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
