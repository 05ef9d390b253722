"""Encoding of blocks by Ray Data tasks, in order: the source of `StreamLoader` for runs on a cluster.

A rank calls `ray_source` in its own process. The requested blocks are cut into segments; each segment is a small Ray
Dataset with a task for each group of blocks. One thread runs the segments one after another, so a rank never has more
than one data task at a time. This matters: a task that is held back by backpressure keeps its CPU, and if one rank
could hold all of them, the others would wait for their data, and all ranks for each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions

from elmo_ray import storage
from elmo_ray.data.corpus import Block
from elmo_ray.data.encode import CLOSE_S, EncodedBlock, WaitInterrupted, get_unless, load_block, never
from elmo_ray.data.text import OnError
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import DataError

_SCHEMA = pa.schema(
    [
        ("ids", pa.binary()),
        ("lengths", pa.binary()),
        ("unknown", pa.binary()),
        ("replaced", pa.int64()),
        ("error", pa.string()),
    ]
)
_TARGET_BLOCK_BYTES = 8 << 20
_FIRST_SEGMENT_BYTES = 8 << 20
"""Text for two seconds of training on a fast GPU; the second segment is ready by then."""
_NICENESS = 15
"""The niceness of data processes; Ray has the same default for its workers."""


class RaySource(Iterator[EncodedBlock]):
    """Iterator over encoded blocks, in order, from Ray Data tasks. Work begins at once.

    `ray.init` must have been called; `blocks` may be endless. Data processes read the vocabulary from its path
    themselves and compare it with its hash. An error in a block is raised as DataError in place of that block. `close`,
    or dropping the source, stops the thread and its tasks. Raises WaitInterrupted when `interrupted` returns True.

    At most two segments (in bytes of text) are requested from `blocks` ahead of the consumer, and one is encoded. It is
    encoded as a whole and waits in the object store; the next one begins when half of it is consumed. For a slow
    consumer Ray Data's executor would poll without a pause and take half a core from training. The first segment is
    short, and each is twice as long as the one before, up to `segment_bytes`: on two cores that is text for an hour,
    and encoding it costs a tenth of the speed in the first minutes.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        task: EncodeTask,
        data_cpus: float,
        segment_bytes: int,
        group_bytes: int,
        interrupted: Callable[[], bool] = never,
    ) -> None:
        self._max_characters = task.max_characters
        self._interrupted = interrupted
        self._tables: queue.Queue[ray.ObjectRef | BaseException | None] = queue.Queue()
        self._stop = threading.Event()
        self._rows: Iterator[EncodedBlock] = iter(())
        # If the thread referred to `self`, dropping the source would not stop it.
        segments = _cut_segments(blocks, segment_bytes, group_bytes)
        arguments = (segments, task, data_cpus, self._tables, self._stop)
        self._thread = threading.Thread(target=_run_segments, args=arguments, name="ray-source", daemon=True)
        self._thread.start()

    def __next__(self) -> EncodedBlock:
        try:
            while not self._stop.is_set():
                for block in self._rows:
                    return block
                item = get_unless(self._interrupted, self._tables)
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    break
                self._rows = _decode_table(self._get(item), self._max_characters)
        except BaseException:
            self._stop.set()
            raise
        self._stop.set()
        raise StopIteration

    def _get(self, reference: ray.ObjectRef) -> pa.Table:
        """Return the table of a reference. Raises WaitInterrupted when a stop is requested before it has come."""
        while True:
            if self._interrupted():
                raise WaitInterrupted
            with contextlib.suppress(ray.exceptions.GetTimeoutError):
                return ray.get(reference, timeout=1.0)

    def close(self) -> None:
        """Stop the thread and wait for it; the iterator is then at its end."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=CLOSE_S)

    def __del__(self) -> None:
        self._stop.set()


def ray_source(
    blocks: Iterable[Block],
    vocabulary_path: str,
    vocabulary_sha256: str,
    max_characters: int = 50,
    data_cpus: float = 0.25,
    on_error: OnError = "fail",
    segment_bytes: int = 64 << 20,
    group_bytes: int = 1 << 20,
    interrupted: Callable[[], bool] = never,
) -> RaySource:
    """Return a source that encodes `blocks` in Ray Data tasks of `data_cpus` logical CPUs, one task at a time.

    A segment has at most `segment_bytes` bytes of text, and a task `group_bytes`, but each at least one block. See
    `RaySource`.
    """
    task = EncodeTask(storage.absolute(vocabulary_path), vocabulary_sha256, max_characters, on_error)
    return RaySource(blocks, task, data_cpus, segment_bytes, group_bytes, interrupted)


def _run_segments(
    segments: Iterator[list[list[Block]]],
    task: EncodeTask,
    data_cpus: float,
    tables: queue.Queue[ray.ObjectRef | BaseException | None],
    stop: threading.Event,
) -> None:
    """Put references to the tables of all segments into the queue, then None or an error: the thread of a source."""
    try:
        for segment in segments:
            with contextlib.closing(_run_segment(segment, task, data_cpus)) as results:
                for reference in results:
                    tables.put(reference)
                    if stop.is_set():
                        return
            while tables.qsize() > len(segment) // 2:
                if stop.wait(0.1):
                    return
        tables.put(None)
    except BaseException as error:  # The consumer raises it.
        tables.put(error)


def _cut_segments(blocks: Iterable[Block], segment_bytes: int, group_bytes: int) -> Iterator[list[list[Block]]]:
    """Yield growing segments of groups of blocks, in order; each segment and group has at least one block."""
    segment: list[list[Block]] = []
    group: list[Block] = []
    in_segment = in_group = 0
    limit = min(_FIRST_SEGMENT_BYTES, segment_bytes)
    for block in blocks:
        size = block.end - block.start
        if group and in_group + size > group_bytes:
            segment.append(group)
            group, in_group = [], 0
        if segment and in_segment + size > limit:
            yield segment
            segment, in_segment = [], in_group
            limit = min(2 * limit, segment_bytes)
        group.append(block)
        in_group += size
        in_segment += size
    if group:
        segment.append(group)
    if segment:
        yield segment


def _run_segment(
    segment: list[list[Block]], task: EncodeTask, data_cpus: float
) -> Generator[ray.ObjectRef, None, None]:
    """Yield references to the tables of a segment's groups, in order. Closing this generator stops the tasks."""
    if not ray.is_initialized():
        raise RuntimeError("Ray is not running")  # Otherwise Ray Data would start a cluster of its own.
    items = [{"blocks": json.dumps([dataclasses.astuple(block) for block in group])} for group in segment]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    context = dataset.context
    context.execution_options.preserve_order = True
    context.target_max_block_size = _TARGET_BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A consumer may take hours for a segment, and by default Ray gives up after 30 minutes without progress.
    context.execution_no_progress_timeout_s = -1
    encoded = dataset.map_batches(
        task.encode, batch_size=None, batch_format="pyarrow", num_cpus=data_cpus, concurrency=1
    )
    for bundle in encoded.iter_internal_ref_bundles():
        yield from bundle.block_refs


@dataclasses.dataclass(frozen=True)
class EncodeTask:
    """Settings of encoding that travel to the data processes, with the vocabulary's path in place of its words."""

    vocabulary_path: str
    vocabulary_sha256: str
    max_characters: int
    on_error: OnError

    def encode(self, batch: pa.Table) -> pa.Table:
        """Return a table with a row for each block, up to the first error, which is a row with only the message."""
        rows: list[dict[str, Any]] = []
        _lower_priority()
        storage.expect_answers()
        try:
            vocabulary = _vocabulary(self.vocabulary_path, self.vocabulary_sha256)
            for fields in itertools.chain.from_iterable(map(json.loads, batch.column("blocks").to_pylist())):
                block = load_block(Block(*fields), vocabulary, self.max_characters, self.on_error)
                row = {name: getattr(block, name).tobytes() for name in ("ids", "lengths", "unknown")}
                rows.append({**row, "replaced": block.replaced})
        except DataError as error:
            # An error in a row, unlike an exception, keeps its place in the order, and Ray neither retries nor logs it.
            rows.append({"error": str(error)})
        return pa.Table.from_pylist(rows, schema=_SCHEMA)


@functools.lru_cache(maxsize=1)
def _lower_priority() -> None:
    """Lower the priority of a data process, once and where Ray has not done it."""
    # Text is encoded long before training needs it.
    os.nice(max(0, _NICENESS - os.nice(0)))


@functools.lru_cache(maxsize=2)
def _vocabulary(path: str, sha256: str) -> Vocabulary:
    """Return the vocabulary of this path, read once in each data process. Raises DataError for another hash."""
    # As a part of the task, a big vocabulary would travel with each of them.
    vocabulary = Vocabulary.read(path)
    if vocabulary.sha256 != sha256:
        raise DataError(f"{path}: the vocabulary has changed since the run was set up (sha256 {vocabulary.sha256:.12})")
    return vocabulary


def _decode_table(table: pa.Table, max_characters: int) -> Iterator[EncodedBlock]:
    """Yield the blocks of a table from `EncodeTask.encode`; raise DataError for its row with an error."""
    for row in range(table.num_rows):
        message = table.column("error")[row].as_py()
        if message is not None:
            raise DataError(message)
        # These are copies: a view would keep the whole group in the object store while a stream needs one block of it.
        ids, lengths = (_array(table, name, row, np.int32) for name in ("ids", "lengths"))
        unknown = _array(table, "unknown", row, np.int16).reshape(-1, max_characters)
        yield EncodedBlock(ids, lengths, unknown, table.column("replaced")[row].as_py())


def _array(table: pa.Table, name: str, row: int, dtype: Any) -> Any:
    return np.frombuffer(table.column(name)[row].as_buffer(), dtype).copy()
