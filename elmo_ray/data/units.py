"""Units of documents: what one task makes into one text of the prepared folder.

A large file is cut into pieces, and many small files make one unit, so that neither keeps CPUs waiting. Cuts depend on
the files and on the settings alone; so the texts are the same for any number of CPUs, and a run that was killed goes on
at the units that are not done. A text's name depends on its pieces, on the settings and on the version of the library,
so that texts of other settings are never mixed with it. It appears whole or not at all.
"""

from __future__ import annotations

import array
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from elmo_ray import storage
from elmo_ray.data.documents import Counts, Piece, TextForm, tokenised_documents
from elmo_ray.data.parquet import row_groups
from elmo_ray.data.text import file_status
from elmo_ray.data.unpack import check_format, compression, estimate, read_note, text_fields, write_text
from elmo_ray.errors import DataError
from elmo_ray.text.records import FORMATS

# Size of the pieces of a file. With spaCy it is some fifteen seconds of work.
UNIT_BYTES = 16 << 20
# Most pieces of a compressed file or of a row group. For each piece, all before it is unpacked again, so that eight of
# them take four and a half times the time of unpacking, which is about a seventh of the time that spaCy takes.
MOST_PARTS = 8
# Files below this size share a unit with their neighbours.
SMALL_FILE_BYTES = 1 << 20
# Where such a unit ends: it is less than a piece of a file, so that there is work for several CPUs. An object store may
# take a tenth of a second for each file.
GROUP_BYTES, GROUP_FILES = 4 << 20, 1000
_NAME_BYTES = 80


@dataclass(frozen=True)
class Unit:
    """Pieces of files, in their order, of which one text is made."""

    pieces: tuple[Piece, ...]

    @property
    def source(self) -> str:
        """The file of the first piece."""
        return self.pieces[0].source

    @property
    def bytes_to_read(self) -> int:
        """Number of bytes that are read, about."""
        return sum(_bytes_of(piece) for piece in self.pieces)

    def to_list(self) -> list[list[Any]]:
        """Return the unit as plain values."""
        return [[piece.source, piece.start, piece.end] for piece in self.pieces]

    @classmethod
    def from_list(cls, values: Iterable[Sequence[Any]]) -> Unit:
        return cls(tuple(Piece(*value) for value in values))

    def text_path(self, directory: storage.Place, form: TextForm) -> str:
        """Return the place for the text that is made of the unit with these settings."""
        name = storage.base_name(self.source).partition(".")[0]
        # Names of files have at most 255 bytes, and more is added to this one.
        name = name.encode()[:_NAME_BYTES].decode("utf-8", "ignore")
        place = hashlib.sha256(json.dumps(self.to_list()).encode()).hexdigest()[:12]
        return storage.join(os.fspath(directory), f"{name}-{place}-{form.key()}.txt")


def cut_units(sources: Sequence[str], form: TextForm) -> list[Unit]:
    """Return the units of files, in the order of the files.

    A text of over UNIT_BYTES is cut at line ends, and Parquet between row groups. Compressed text and larger row groups
    are cut as well, into MOST_PARTS pieces at most. Consecutive files of less than SMALL_FILE_BYTES share units. Raises
    DataError for a file that cannot be read.
    """
    units: list[Unit] = []
    small: list[Piece] = []
    bytes_of_small = 0

    def flush() -> None:
        nonlocal bytes_of_small
        if small:
            units.append(Unit(tuple(small)))
        small.clear()
        bytes_of_small = 0

    for source in sources:
        size = file_status(source).st_size
        if size >= SMALL_FILE_BYTES:
            flush()
            units.extend(Unit((piece,)) for piece in _pieces(source, size, form))
            continue
        small.append(Piece(source))
        bytes_of_small += size
        if bytes_of_small >= GROUP_BYTES or len(small) >= GROUP_FILES:
            flush()
    flush()
    return units


def _pieces(source: str, size: int, form: TextForm) -> list[Piece]:
    if (kind := form.kind(source)) == "parquet":
        return _pieces_of_parquet(source, form.column)
    packed = compression(source) is not None
    if packed:
        size = estimate(source)
    if size <= UNIT_BYTES or not FORMATS[kind].any_line:
        return [Piece(source)]
    step = max(UNIT_BYTES, -(-size // MOST_PARTS)) if packed else UNIT_BYTES
    # The size of a compressed text is a guess, so the last piece is open.
    return [
        Piece(source, start, None if packed and start + step >= size else min(start + step, size))
        for start in range(0, size, step)
    ]


def _pieces_of_parquet(source: str, column: str) -> list[Piece]:
    cuts = [0]  # numbers of rows
    end = held = 0  # the rows so far, and the bytes of those since the last cut
    for rows, size in row_groups(source, column):
        if size > UNIT_BYTES:
            parts = min(MOST_PARTS, -(-size // UNIT_BYTES), rows)
            cuts += [end + rows * part // parts for part in range(parts + 1)]
            held = 0
        else:
            held += size
            if held >= UNIT_BYTES:
                cuts.append(end + rows)
                held = 0
        end += rows
    cuts = sorted({*cuts, end})
    if len(cuts) <= 2:
        return [Piece(source)]
    return [Piece(source, start, stop) for start, stop in itertools.pairwise(cuts)]


def _bytes_of(piece: Piece) -> int:
    size = file_status(piece.source).st_size
    return size if piece.is_whole else min(size, UNIT_BYTES)


def check_unit(unit: Unit, form: TextForm) -> None:
    """Raise DataError when a file of text in the unit is another format. Reads the starts of the files."""
    for piece in unit.pieces:
        if piece.start == 0 and form.kind(piece.source) == "text":
            check_format(piece.source)


def space_needed(units: Iterable[Unit]) -> int:
    """Return the bytes of the texts of the units, about."""
    pieces = [piece for unit in units for piece in unit.pieces]
    return sum(estimate(piece.source) if piece.is_whole else UNIT_BYTES for piece in pieces)


def make_text(unit: Unit, target: storage.Place, form: TextForm) -> None:
    """Write the text of a unit, the bytes of each of its documents, and a note with the counts.

    Raises DataError for a file that cannot be read, with file and line, and for a full disk.
    """
    check_unit(unit, form)
    state = _state(unit)
    counts = Counts()
    lengths = array.array("I")
    empty: list[str] = []

    def pieces() -> Iterator[bytes]:
        for piece in unit.pieces:
            before = len(lengths)
            for documents in tokenised_documents(piece, form, counts):
                lengths.extend(map(len, documents))
                yield b"".join(documents)
            if len(lengths) == before and piece.is_whole:
                empty.append(piece.source)

    def note(text: Any) -> dict[str, Any]:
        about = {"made_of": state, "made_by": form.describe(), "empty_files": empty}
        return {**text_fields(text), **asdict(counts), **about}

    write_text(
        unit.source,
        target,
        pieces(),
        note,
        lambda: {documents_path(target): pack_lengths(np.array(lengths, np.uint32))},
    )


def is_made(unit: Unit, target: storage.Place) -> bool:
    """Return whether `target` is the whole text of the unit, and neither of them has changed since it was made."""
    return is_current(target, _state(unit))


def is_current(target: storage.Place, made_of: str) -> bool:
    """Return whether a text is there as it was written, made of what `made_of` describes."""
    note = read_note(target)
    if note is None or note.get("made_of") != made_of:
        return False
    try:
        return note.items() >= text_fields(storage.status(target)).items()
    except OSError:
        return False


def read_counts(target: storage.Place) -> tuple[Counts, list[str]]:
    """Return how many documents a text was made of, 0 where that is not known, and the files without words."""
    note = read_note(target) or {}
    counts = Counts(**{name: int(note.get(name, 0)) for name in asdict(Counts())})
    return counts, [str(source) for source in note.get("empty_files", [])]


def documents_path(target: storage.Place) -> str:
    """Return the place of the lengths of a text's documents."""
    return os.fspath(target).removesuffix(".txt") + ".documents.npy"


def pack_lengths(lengths: npt.NDArray[np.uint32]) -> bytes:
    """Return the lengths of documents as the bytes of their file."""
    buffer = io.BytesIO()
    np.save(buffer, lengths.astype("<u4"), allow_pickle=False)
    return buffer.getvalue()


def read_lengths(target: storage.Place) -> npt.NDArray[np.uint32]:
    """Return the bytes of each document of a text, uint32 [documents]; their sum is the size of the text.

    Raises DataError where they cannot be read.
    """
    place = documents_path(target)
    try:
        found: npt.NDArray[np.uint32] = np.load(io.BytesIO(storage.read_bytes(place)), allow_pickle=False)
        if found.ndim != 1 or found.dtype != np.uint32:
            raise ValueError("no lengths")
        return found
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{place}: cannot be read ({error}); run prepare with --fresh") from None


def _state(unit: Unit) -> str:
    """Return a hash of the files of a unit as they are now, by their sizes and times of change."""
    state = []
    for piece in unit.pieces:
        status = file_status(piece.source)
        state.append([piece.source, piece.start, piece.end, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
