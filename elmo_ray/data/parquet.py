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

    Raises DataError if there is no such column, with the setting that names it and the columns that are there.
    """
    import pyarrow as pa

    fields = {field.name: field.type for field in schema}
    kind: Any = None
    for depth, name in enumerate(names):
        if name not in fields:
            has = short(", ".join(fields), 200) or str(kind)
            raise DataError(f"{source}: has no column {'.'.join(names[: depth + 1])} ({setting}); it has {has}")
        kind = fields[name]
        fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    return kind


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


def row_group_bytes(source: str, column: str) -> list[int]:
    """Return the bytes of a column, unpacked, in each row group of a Parquet file. Raises DataError as reading does."""
    with parquet_file(source) as table:
        column_type(table.schema_arrow, column.split("."), source, f"data.column={column}")
        groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
        columns = [[group.column(place) for place in range(group.num_columns)] for group in groups]
        return [
            sum(each.total_uncompressed_size for each in found if f"{each.path_in_schema}.".startswith(f"{column}."))
            for found in columns
        ]
