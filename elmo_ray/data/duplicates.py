"""Exact repetitions of documents or sentences in the texts of a corpus: all but the first are left out.

Step (1) hashes the documents or sentences of every text, (2) finds those whose hash has been seen before in the order
of the corpus, and (3) writes the texts again without them. Steps 1 and 3 are tasks, each for a span of one text. Step 2
sorts the hashes, a part of them at a time: its memory is bounded but for one bit for each document or sentence.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from elmo_ray import storage
from elmo_ray.data.text import file_status
from elmo_ray.data.units import documents_path, pack_lengths, read_lengths
from elmo_ray.data.unpack import text_fields, write_text
from elmo_ray.errors import DataError

Kind = Literal["documents", "sentences"]

# Size of a span, about.
SPAN_BYTES = 64 << 20
# Hashes that are sorted at a time: some 40 MB.
_SORTED = 1 << 19
# Hashes are kept in order in so many ranges of equal width, so that a part of them is one range of a file.
_RANGES = 1024
_RANGE_SHIFT = np.uint64(54)
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")])
_READ_BYTES = 1 << 20

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Span:
    """Documents [first, last) of a text, which are its bytes [start, end)."""

    text: str
    first: int
    last: int
    start: int
    end: int

    def to_list(self) -> list[Any]:
        """Return the span as plain values."""
        return [self.text, self.first, self.last, self.start, self.end]


def spans_of(text: str) -> list[Span]:
    """Return the spans of a text that was made of documents; none for an empty one."""
    ends = np.cumsum(read_lengths(text), dtype=np.int64)
    if not len(ends):
        return []
    starts = np.concatenate(([0], ends[:-1]))
    firsts = np.unique(np.searchsorted(starts, np.arange(0, int(ends[-1]), SPAN_BYTES))).tolist()
    firsts = [first for first in firsts if first < len(ends)]
    return [
        Span(text, first, last, int(starts[first]), int(ends[last - 1]))
        for first, last in itertools.pairwise([*firsts, len(ends)])
    ]


def hash_span(span: Span, kind: Kind) -> bytes:
    """Return the hashes of a span's documents or sentences as the bytes of a file, for `find_repeated`."""
    digests = bytearray()
    for documents in _documents(span):
        items = documents if kind == "documents" else _lines(b"".join(documents))
        for item in items:
            digests += hashlib.blake2b(item, digest_size=16).digest()
    halves = np.frombuffer(bytes(digests), "<u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    records = np.empty(len(halves), _RECORD)
    records["high"], records["low"], records["place"] = halves[order, 0], halves[order, 1], order
    table = np.searchsorted(records["high"] >> _RANGE_SHIFT, np.arange(_RANGES + 1, dtype=np.uint64))
    return table.astype("<i8").tobytes() + records.tobytes()


def find_repeated(files: Sequence[Path]) -> tuple[list[UInt8], list[int]]:
    """Return, for each file of `hash_span` in the order of the corpus, which items are repeated, and how many it has.

    An item is a document or a sentence. Those that are repeated are packed as by `np.packbits`, a bit for each: 1 where
    an equal one stands before it in the corpus.
    """
    tables = [np.fromfile(path, "<i8", _RANGES + 1) for path in files]
    counts = [int(table[-1]) for table in tables]
    found = [np.zeros(-(-count // 8), np.uint8) for count in counts]
    sizes = sum((np.diff(table) for table in tables), np.zeros(_RANGES, np.int64))
    for begin, end in _parts(sizes):
        parts = [_read_range(path, table, begin, end) for path, table in zip(files, tables, strict=True)]
        records = np.concatenate(parts)
        owners = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        del parts
        # The sort is stable and the files come in order: of equal hashes the first of the corpus comes first.
        order = np.lexsort((records["low"], records["high"]))
        high, low = records["high"][order], records["low"][order]
        again = order[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]
        again.sort()
        places, owners = records["place"][again], owners[again]
        edges = np.searchsorted(owners, np.arange(len(files) + 1))
        for number in np.unique(owners).tolist():
            mine = places[edges[number] : edges[number + 1]]
            np.bitwise_or.at(found[number], mine >> 3, (128 >> (mine & 7)).astype(np.uint8))
    return found, counts


def write_unrepeated(span: Span, kind: Kind, repeated: UInt8, target: storage.Place, made_of: str) -> None:
    """Write a span without its repeated documents or sentences; repeated: from `find_repeated`. Raises DataError."""
    n_items = 8 * len(repeated)
    keeps = iter((np.unpackbits(repeated, count=n_items) == 0).tolist())
    lengths: list[npt.NDArray[np.uint32]] = []

    def pieces() -> Iterator[bytes]:
        for documents in _documents(span):
            if kind == "documents":
                kept = [document for document, keep in zip(documents, keeps, strict=False) if keep]
            else:
                kept = [b"".join(itertools.compress(_lines(document), keeps)) for document in documents]
                kept = [document for document in kept if document]
            lengths.append(np.array([len(document) for document in kept], np.uint32))
            yield b"".join(kept)

    def note(text: Any) -> dict[str, Any]:
        return {**text_fields(text), "made_of": made_of}

    def documents_file() -> dict[str, bytes]:
        return {documents_path(target): pack_lengths(np.concatenate([np.zeros(0, np.uint32), *lengths]))}

    write_text(span.text, target, pieces(), note, documents_file)


def unrepeated_path(span: Span, kind: Kind, repeated: UInt8) -> str:
    """Return the place for a span without its repeated items; another choice of items has another place."""
    digest = hashlib.sha256(f"{span.first}-{span.last}-".encode() + repeated.tobytes()).hexdigest()[:12]
    return f"{span.text.removesuffix('.txt')}-{kind}-{digest}.txt"


def state_of(text: storage.Place) -> str:
    """Return the identity of a text as it is now, by its size and time of change."""
    status = file_status(str(text))
    return f"{text} {status.st_size} {status.st_mtime_ns}"


def _parts(sizes: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield consecutive ranges of hashes, at least one at a time and not more than _SORTED hashes if possible."""
    begin, held = 0, 0
    for number, size in enumerate(sizes.tolist()):
        if held and held + size > _SORTED:
            yield begin, number
            begin, held = number, 0
        held += size
    if held:
        yield begin, len(sizes)


def _read_range(path: Path, table: npt.NDArray[np.int64], begin: int, end: int) -> npt.NDArray[Any]:
    count = int(table[end] - table[begin])
    return np.fromfile(path, _RECORD, count, offset=8 * (_RANGES + 1) + _RECORD.itemsize * int(table[begin]))


def _documents(span: Span) -> Iterator[list[bytes]]:
    """Yield the documents of a span, in batches. Raises DataError when the text cannot be read."""
    lengths = read_lengths(span.text)[span.first : span.last].tolist()
    batch: list[int] = []
    held = 0
    try:
        with storage.open_read(span.text) as file:
            file.seek(span.start)
            for place, length in enumerate(lengths, start=1):
                batch.append(length)
                held += length
                if held >= _READ_BYTES or place == len(lengths):
                    data = file.read(held)
                    if len(data) < held:
                        raise DataError(f"{span.text}: became shorter while it was read; run prepare again")
                    ends = list(itertools.accumulate(batch, initial=0))
                    yield [data[start:end] for start, end in itertools.pairwise(ends)]
                    batch, held = [], 0
    except OSError as error:
        raise DataError(f"{span.text}: {error.strerror or error}") from None


def _lines(data: bytes) -> list[bytes]:
    """Return the lines of a text, each with its end."""
    return [line + b"\n" for line in data.split(b"\n")[:-1]]
