"""Shards of the output of `embed`: a Parquet or HDF5 file for each finished unit, which is whole or not there.

Shapes: L layers, n words of a sentence, D dimensions of a vector.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from elmo_ray.elmo.language_model import Substitutes, Surprisal
from elmo_ray.embed.record import EmbedJob
from elmo_ray.embed.units import Unit
from elmo_ray.storage.files import atomic_write

Row = NDArray | Substitutes | Surprisal
"""Result for a sentence: vectors [L, n, D], means [L, D], substitutes or surprisal."""


class ShardWriter(Protocol):
    """Writer of the sentences of a unit."""

    def write(
        self, first: int, sentences: Sequence[Sequence[str]], rows: Sequence[Row], beside: Mapping[str, Any]
    ) -> None:
        """Add sentences and their results. first: the number of the first sentence. beside: Arrow arrays by name."""


def shard_path(job: EmbedJob, unit: Unit) -> Path:
    """Return the file of a unit."""
    return Path(job.shard_folder) / f"part-{unit.number:06d}.{'hdf5' if job.is_hdf5 else 'parquet'}"


@contextlib.contextmanager
def shard_writer(job: EmbedJob, unit: Unit) -> Iterator[ShardWriter]:
    """Yield a writer for a unit's file, which takes its name at the end. Raises DataError if the disk is full."""
    target = shard_path(job, unit)
    with atomic_write(target, sync=True) as temporary:
        with _Hdf5Shard(temporary) if job.is_hdf5 else _ParquetShard(temporary, job) as writer:
            yield writer


def is_finished(job: EmbedJob, unit: Unit) -> bool:
    """Return True if the file of a unit is there and has all of its sentences."""
    path = shard_path(job, unit)
    try:
        if job.is_hdf5:
            with h5py.File(path, "r") as file:
                return len(file) == unit.count
        import pyarrow.parquet

        return bool(pyarrow.parquet.ParquetFile(path).metadata.num_rows == unit.count)
    except Exception:  # not there, cut off, or of another program: it is made again
        return False


def join_hdf5(job: EmbedJob, units: Sequence[Unit], out: Path) -> None:
    """Join all shards to one file with the keys 0, 1, ...; it appears whole or not at all. Raises DataError."""
    # h5py raises RuntimeError or ValueError for a full disk.
    with atomic_write(out, also=(RuntimeError, ValueError)) as temporary, h5py.File(temporary, "w") as whole:
        for unit in units:
            with h5py.File(shard_path(job, unit), "r") as shard:
                for number in range(unit.first, unit.first + unit.count):
                    shard.copy(str(number), whole)


class _Hdf5Shard:
    """HDF5 file with a dataset for each sentence; its number is the key. A single layer has no first dimension.

    What is kept beside a sentence is in attributes of its dataset.
    """

    def __init__(self, path: Path):
        self.file = h5py.File(path, "w")

    def __enter__(self) -> _Hdf5Shard:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(
        self, first: int, sentences: Sequence[Sequence[str]], rows: Sequence[Row], beside: Mapping[str, Any]
    ) -> None:
        for place, row in enumerate(rows):
            values = np.asarray(row)
            data = values[0] if len(values) == 1 else values
            dataset = self.file.create_dataset(str(first + place), data=data)
            for name, array in beside.items():
                dataset.attrs[name] = array[place].as_py()


class _ParquetShard:
    """Parquet file with a row for each sentence: its number, what is kept beside it, its words, and its results."""

    def __init__(self, path: Path, job: EmbedJob):
        self.path, self.job = path, job
        self.writer: Any = None

    def __enter__(self) -> _ParquetShard:
        return self

    def __exit__(self, *error: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def write(
        self, first: int, sentences: Sequence[Sequence[str]], rows: Sequence[Row], beside: Mapping[str, Any]
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        columns: dict[str, Any] = {
            "sentence": pa.array(range(first, first + len(rows)), pa.int64()),
            **beside,
            "words": pa.array(list(map(list, sentences)), pa.list_(pa.string())),
        }
        columns |= _COLUMNS[self.job.output](rows)
        table = pa.table(columns)
        if self.writer is None:
            self.writer = pyarrow.parquet.ParquetWriter(
                self.path, table.schema, compression="none", use_dictionary=["words.list.element"]
            )
        self.writer.write_table(table)


def _layer_names(layers: int) -> list[str]:
    return ["vector"] if layers == 1 else [f"layer_{number}" for number in range(layers)]


def _vector_columns(rows: Sequence[Any]) -> dict[str, Any]:
    import pyarrow as pa

    offsets = np.cumsum([0, *(row.shape[1] for row in rows)])
    columns = {}
    for number, name in enumerate(_layer_names(len(rows[0]))):
        values = np.concatenate([row[number] for row in rows])
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), vectors)
    return columns


def _mean_columns(rows: Sequence[Any]) -> dict[str, Any]:
    import pyarrow as pa

    values = np.stack(rows)
    return {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values[:, number].reshape(-1)), values.shape[2])
        for number, name in enumerate(_layer_names(values.shape[1]))
    }


def _substitute_columns(rows: Sequence[Any]) -> dict[str, Any]:
    import pyarrow as pa

    columns = {}
    for name in rows[0].ids:
        words = [row.words(name) for row in rows]
        columns[name] = pa.array(words, pa.list_(pa.list_(pa.string())))
        values = [list(row.log_probabilities[name]) for row in rows]
        columns[f"{name}_log_p"] = pa.array(values, pa.list_(pa.list_(pa.float32())))
    return columns


def _surprisal_columns(rows: Sequence[Any]) -> dict[str, Any]:
    import pyarrow as pa

    names = list(rows[0].nats)
    sums = [row.sums for row in rows]
    columns = {name: pa.array([row.nats[name] for row in rows], pa.list_(pa.float32())) for name in names}
    columns |= {f"{name}_end": pa.array([row.end[name] for row in rows], pa.float32()) for name in names}
    columns |= {f"{name}_sum": pa.array([each[name] for each in sums], pa.float64()) for name in names}
    return {**columns, "unknown": pa.array([row.unknown for row in rows], pa.list_(pa.bool_()))}


_COLUMNS = {
    "vectors": _vector_columns,
    "means": _mean_columns,
    "substitutes": _substitute_columns,
    "surprisal": _surprisal_columns,
}

_OWN_NAMES = {
    "vectors": r"vector|layer_\d+",
    "means": r"vector|layer_\d+",
    "substitutes": r"(forward|backward|product)(_log_p)?",
    "surprisal": r"(forward|backward|both)(_end|_sum)?|unknown",
}


def is_own_name(name: str, output: str) -> bool:
    """Return True if the Parquet files of this output have, or may have, a column of this name already."""
    own = f"sentence|document|sentence_in_document|words|{_OWN_NAMES[output]}"
    return re.fullmatch(own, name) is not None
