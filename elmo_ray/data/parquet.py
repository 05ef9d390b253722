"""Parquet files: opening them with errors of one line, and their columns, which may be inside of others (`a.b`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from elmo_ray import storage
from elmo_ray.errors import DataError, short

_READ_BYTES = 1 << 20


@contextlib.contextmanager
def parquet_file(source: str) -> Iterator[Any]:
    """Yield an open Parquet file; errors of reading it become DataErrors."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with storage.open_read(source) as file:
            # With a buffer the pages of a column are read one after the other, and not a whole row group at once.
            yield pq.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False)
    except pa.ArrowException as error:
        raise DataError(
            f"{source}: is no whole Parquet file ({short(str(error).splitlines()[0], 120)}); get the file again, or "
            "set data.format to what it is"
        ) from None
    except OSError as error:
        # Arrow has an OSError without a number for pages that are damaged.
        what = error.strerror or f"is damaged ({short(str(error), 120)}); get the file again"
        raise DataError(f"{source}: {what}") from None


def column_type(schema: Any, names: Sequence[str], source: str, setting: str) -> Any:
    """Return the Arrow type of a column, `names` from the outside to the inside.

    Raises DataError, with the setting that names it and the columns that are there, where there is none.
    """
    import pyarrow as pa

    fields: dict[str, Any] | None = {field.name: field.type for field in schema}
    kind: Any = None
    for depth, name in enumerate(names):
        if fields is None or name not in fields:
            has = None if fields is None else list(fields)
            raise DataError(missing_column(source, setting, names, depth, has, f"has values of {kind}"))
        kind = fields[name]
        fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else None
    return kind


def missing_column(
    place: str, setting: str, names: Sequence[str], depth: int, has: Sequence[str] | None, what: str = ""
) -> str:
    """Return the message for a column that is not there.

    depth: the number of names of the path that are there. has: the columns at that depth; None where the last name that
    is there holds no columns, which `what` says.
    """
    outer = ".".join(names[:depth])
    if has is None:
        return f"{place}: {outer} {what}, with no columns inside, and {setting} names one; name another column"
    there = short(", ".join(has), 200) or "no columns"
    return f"{place}: has no column {'.'.join(names[: depth + 1])} ({setting}); {outer or 'it'} has {there}"


def column_of(batch: Any, names: Sequence[str]) -> Any:
    """Return the Arrow array of a column of a record batch, which may be inside of others."""
    import pyarrow.compute as pc

    values = batch.column(names[0])
    for name in names[1:]:
        values = pc.struct_field(values, name)
    return values


def is_text_type(kind: Any) -> bool:
    """Return whether an Arrow type is that of text, also of text in a dictionary."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def row_groups(source: str, column: str) -> list[tuple[int, int]]:
    """Return the rows of each row group of a Parquet file, and the bytes of a column in it, unpacked.

    Raises DataError as reading does.
    """
    with parquet_file(source) as table:
        column_type(table.schema_arrow, column.split("."), source, f"data.column={column}")
        groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
        columns = [[group.column(place) for place in range(group.num_columns)] for group in groups]
        sizes = [
            sum(each.total_uncompressed_size for each in found if f"{each.path_in_schema}.".startswith(f"{column}."))
            for found in columns
        ]
        return [(group.num_rows, size) for group, size in zip(groups, sizes, strict=True)]


def rows_of(table: Any, start: int, end: int | None, columns: list[str], most: int) -> Iterator[Any]:
    """Yield some columns of the rows [start, end) of an open Parquet file, as record batches of `most` rows or fewer.

    end: None is the file's end.
    """
    groups: list[int] = []
    skipped = first = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if first + rows > start and (end is None or first < end):
            skipped = skipped if groups else start - first
            groups.append(group)
        first += rows
    left = (first if end is None else end) - start
    # A row within a row group is found by reading those before it.
    for batch in table.iter_batches(most, row_groups=groups, columns=columns):
        wanted = batch.slice(skipped, left)
        skipped = max(0, skipped - batch.num_rows)
        left -= wanted.num_rows
        if wanted.num_rows:
            yield wanted
        if not left:
            return
