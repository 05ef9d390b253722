"""Documents of JSONL and Parquet files, and raw text, made into text with one tokenised sentence a line.

A file is read as a whole, or a piece of it: the lines that begin in a range of bytes, or rows of Parquet.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from elmo_ray import storage
from elmo_ray.data.parquet import column_of, column_type, is_text_type, missing_column, parquet_file, rows_of
from elmo_ray.data.scan import UNTOKENISED_SHARE, is_joined
from elmo_ray.data.text import BYTE_ORDER_MARK, MAX_LINE_BYTES, REPLACEMENT, OnError
from elmo_ray.data.unpack import compression, unpacked_pieces
from elmo_ray.errors import ConfigError, DataError, short
from elmo_ray.text.records import FORMATS, format_of
from elmo_ray.text.tokenizers import NONE, SPACY, Tokenizer, describe_tokenizer, remembered_tokenizer
from elmo_ray.text.unspaced import UNSPACED_ADVICE, find_unspaced

_READ_BYTES = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
# Rows of a Parquet file that are read at a time; a row may be a book.
_ROWS = 200
# Documents that are tokenised at a time, and the characters after which fewer are.
_BATCH, _BATCH_CHARACTERS = 1000, 1 << 20
# Words of the first documents that are looked at where no tokenizer is set.
_LOOKED_AT = 2000
# Full stops and commas between blanks; fewer may be chance.
_FEWEST_MARKS = 20


@dataclass(frozen=True)
class TextForm:
    """Form of the texts of a corpus, as the settings of `data.` of the same names say.

    format: `auto` goes by the file's name. tokenizer: None is `none` for text; documents of JSONL and Parquet files
    must look tokenised then.
    """

    format: str = "auto"
    column: str = "text"
    tokenizer: str | None = None
    language: str | None = None
    normalize: tuple[str, ...] = ()
    on_error: OnError = "fail"

    def kind(self, source: str) -> str:
        """Return which one of `FORMATS` the file has."""
        return format_of(storage.base_name(source)) if self.format == "auto" else self.format

    def converts(self, source: str) -> bool:
        """Return whether another text is made of the file before it is read as sentences."""
        return self.kind(source) != "text" or self.tokenizer not in (None, NONE) or bool(self.normalize)

    def must_look_tokenised(self, source: str) -> bool:
        """Return whether the file has documents, and no setting says how they are divided into words."""
        return self.tokenizer is None and self.kind(source) != "text"

    def make_tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the texts, the same one for each file. Raises ConfigError as its making does."""
        return remembered_tokenizer(self.tokenizer or NONE, self.language, self.normalize)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - it loads spaCy, and it is asked for every file
    def describe(self) -> dict[str, str]:
        """Return all on which the text depends. Raises ConfigError as `make_tokenizer` does."""
        described = describe_tokenizer(self.tokenizer or NONE, self.language, self.normalize)
        return {**described, "format": self.format, "column": self.column, "on_error": self.on_error}

    def key(self) -> str:
        """Return a hash of all on which the text depends, hexadecimal. Raises ConfigError as `describe` does."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:12]

    def check_column(self, sources: Sequence[str]) -> None:
        """Raise ConfigError if data.column is set and none of the files has columns."""
        if self.column != TextForm.column and all(self.kind(source) == "text" for source in sources):
            raise ConfigError(f"data.column={self.column}: {sources[0]} is text, which has no columns; leave it out")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TextForm:
        return cls(**{**fields, "normalize": tuple(fields["normalize"])})


@dataclass(frozen=True)
class Piece:
    """Part of a file: the lines that begin in the bytes [start, end) of its text, or the rows [start, end) of Parquet.

    end: None is the file's end. The bytes of a compressed file are those of its unpacked text, so that a piece of it is
    read by unpacking all that stands before.
    """

    source: str
    start: int = 0
    end: int | None = None

    @property
    def is_whole(self) -> bool:
        """True for a whole file."""
        return self.start == 0 and self.end is None


@dataclass
class Counts:
    """Numbers of documents, of those that are empty or null, of lines left out, and of characters replaced by U+FFFD.

    Left out are lines that are not JSON or too long, where data.on_error says so.
    """

    documents: int = 0
    empty: int = 0
    bad: int = 0
    replaced: int = 0

    def add(self, other: Counts) -> None:
        """Add the numbers of other text."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def read_documents(piece: Piece, form: TextForm, counts: Counts) -> Iterator[str | None]:
    """Yield the documents of a piece of a file in their order, None for null.

    A document is a line of text, the column of a record, or that of a row of Parquet. Raises DataError, with the
    file and the line or row, for what cannot be read. counts: `bad` and `replaced` are counted here.
    """
    reader = DocumentReader(piece, form, counts)
    kind = form.kind(piece.source)
    if kind == "parquet":
        return reader.parquet()
    return reader.text() if kind == "text" else reader.columns()


def tokenised_documents(piece: Piece, form: TextForm, counts: Counts) -> Iterator[list[bytes]]:
    """Yield the documents of a piece in batches, each as its tokenised sentences, one a line; UTF-8.

    Documents without words are left out. Raises DataError as `read_documents` and the tokenizer do, and ConfigError as
    `make_tokenizer` does.
    """
    source = piece.source
    tokenizer = form.make_tokenizer()
    # The start of a file tells how it is written; so a file is judged alike, however it is cut.
    check = TokenisedCheck(source) if form.must_look_tokenised(source) and piece.start == 0 else None
    for batch in _batches(read_documents(piece, form, counts), counts):
        found = tokenizer(batch)
        if check is not None:
            for sentences in found:
                check.look(sentences)
        texts = ("".join([" ".join(words) + "\n" for words in sentences]) for sentences in found)
        made = [text.encode() for text in texts if text]
        if any(len(text) > MAX_LINE_BYTES and max(map(len, text.split(b"\n"))) > MAX_LINE_BYTES for text in made):
            raise DataError(f"{source}: has a sentence longer than {MAX_LINE_BYTES >> 20} MiB; divide it")
        yield made
    if check is not None:
        check.finish()


def divided_again(source: str, documents: Iterable[str | None]) -> str | None:
    """Return what to say of a file that looks tokenised although spaCy's rules divide it; None if it does not.

    documents: of the file; the first ones are read. Rules that meet `" Yes . " he said .` find other sentences than the
    one of the line.
    """
    words = marks = joined = 0
    for document in itertools.islice(documents, _BATCH):
        for word in (document or "")[:_BATCH_CHARACTERS].split():
            words += 1
            # Some languages have blanks before other marks.
            marks += word in (".", ",")
            joined += is_joined(word)
        if words >= _LOOKED_AT:
            break
    if marks < _FEWEST_MARKS or joined > UNTOKENISED_SHARE * marks:
        return None
    return (
        f"{source}: looks tokenised (full stops and commas stand alone), and data.tokenizer={SPACY} divides it once "
        "more; set data.tokenizer=none to take it as it is"
    )


def _batches(documents: Iterable[str | None], counts: Counts) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        counts.documents += 1
        if document is None or not document.strip():
            counts.empty += 1
            continue
        batch.append(document)
        characters += len(document)
        if len(batch) >= _BATCH or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class TokenisedCheck:
    """Check that documents without a tokenizer are tokenised: text as people write it has `end.` as one word."""

    def __init__(self, source: str) -> None:
        self.source, self.words, self.joined, self.done = source, 0, 0, False
        self.example = ""
        self.counts: collections.Counter[str] = collections.Counter()

    def look(self, sentences: Iterable[Sequence[str]]) -> None:
        if self.done:
            return
        for words in sentences:
            for word in words:
                self.words += 1
                if is_joined(word):
                    self.joined += 1
                    self.example = self.example or word
            self.counts.update(words)
        if self.words >= _LOOKED_AT:
            self.finish()

    def finish(self) -> None:
        if not self.done and (found := find_unspaced(self.counts)) is not None:
            raise DataError(
                f"{self.source}: its documents are written without spaces ({found[0]}, such as "
                f"{short(repr(found[1]), 40)}), so they are not tokenised and rules cannot find their words; "
                f"{UNSPACED_ADVICE}"
            )
        if not self.done and self.joined > UNTOKENISED_SHARE * self.words:
            raise DataError(
                f"{self.source}: its documents are not tokenised (words such as {short(repr(self.example), 40)}); set "
                "data.tokenizer=spacy and data.language=en, or data.tokenizer=none to take it as it is"
            )
        self.done = True
        self.counts.clear()


# ---------------------------------------------------------------- the formats


class DocumentReader:
    """Reader of the documents of a piece of a file, by its format. Its methods raise DataError as `read_documents`."""

    def __init__(self, piece: Piece, form: TextForm, counts: Counts) -> None:
        self.piece, self.form, self.counts = piece, form, counts
        self.source = piece.source
        self.names = form.column.split(".")
        # NULs are taken out before they could do harm.
        self._keeps_nuls = "control" in form.normalize

    def text(self) -> Iterator[str]:
        """Yield the lines of raw text: a line is a paragraph."""
        for number, line in self.lines():
            yield self.checked(line, number)

    def columns(self) -> Iterator[str | None]:
        """Yield the texts of the records, None for null."""
        setting = f"data.column={self.form.column}"
        for number, record in self.records():
            value = value_at(record, self.names)
            if value is MISSING:
                raise DataError(no_column(self.place(number), setting, self.names, record))
            if value is not None and not isinstance(value, str):
                kind = {dict: "an object", list: "a list", bool: "a truth value"}.get(type(value), "a number")
                shown = short(json.dumps(value), 40)
                raise DataError(
                    f"{self.place(number)}: {setting} is {shown}, {kind} and no text; name a column of text"
                )
            yield value if value is None else self.checked(value, number)

    def parquet(self) -> Iterator[str | None]:
        """Yield the texts of the rows of Parquet, None for null."""
        column = self.form.column
        with parquet_file(self.source) as table:
            kind = column_type(table.schema_arrow, self.names, self.source, f"data.column={column}")
            if not is_text_type(kind):
                raise DataError(
                    f"{self.source}: data.column={column} has values of {kind} and no text; name another, or write it "
                    "as strings"
                )
            number = 0
            for batch in rows_of(table, self.piece.start, self.piece.end, [column], _ROWS):
                for value in self.values(column_of(batch, self.names), number):
                    yield value if value is None else self.checked(value, number)
                    number += 1

    def values(self, array: Any, number: int) -> list[Any]:
        """Return the values of an Arrow array, the first of which is in row `number` of the piece."""
        import pyarrow as pa

        try:
            return cast(list[Any], array.to_pylist())
        except UnicodeDecodeError as error:  # nothing checks the bytes of a file's text before
            if not is_text_type(array.type):
                raise DataError(f"{self.place(number)} or after it: not UTF-8 ({error.reason}); mend it") from None
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        found = array.cast(pa.large_string()).view(pa.large_binary()).to_pylist()
        return [None if value is None else self._decoded(value, row) for row, value in enumerate(found, number)]

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield the lines, without their ends and those that are left out, with their numbers in the piece from 0."""
        for number, line in enumerate(self._lines()):
            if line is not None:
                marked = number == 0 and self.piece.start == 0
                yield number, self._decoded(line.removeprefix(BYTE_ORDER_MARK) if marked else line, number)

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the records, as of JSONL, with the numbers of their lines in the piece, from 0."""
        make = FORMATS[self.form.kind(self.source)].records
        assert make is not None
        for number, record in make(self.lines()):
            if not isinstance(record, ValueError):
                yield number, record
            elif self.form.on_error == "replace":
                self.counts.bad += 1
            else:
                raise DataError(
                    f"{self.place(number)}: {record}; mend it, or leave such lines out with data.on_error=replace"
                )

    def _lines(self) -> Iterator[bytes | None]:
        """Yield the lines without their ends, None for one that is too long and left out."""
        try:
            with storage.open_read(self.source) as file:
                start, end = self.piece.start, self.piece.end
                kind, at = compression(self.source), 0
                if kind is None and start:
                    at = start - 1
                    file.seek(at)
                pieces = unpacked_pieces(file, self.source, kind)
                for number, line in enumerate(_split(_range_of_lines(pieces, at, start, end))):
                    if line is not None:
                        yield line
                        continue
                    if self.form.on_error != "replace":
                        raise DataError(
                            f"{self.place(number)}: longer than {MAX_LINE_BYTES >> 20} MiB; divide it, or leave such "
                            "lines out with data.on_error=replace"
                        )
                    self.counts.bad += 1
                    yield None
        except OSError as error:
            raise DataError(f"{self.source}: {error.strerror or error}") from None

    def _decoded(self, line: bytes, number: int) -> str:
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            if self.form.on_error == "replace":
                text = line.decode("utf-8", "replace")
                self.counts.replaced += text.count(REPLACEMENT) - line.count(REPLACEMENT.encode())
                return text
            raise DataError(
                f"{self.place(number)}: not UTF-8 (byte 0x{line[error.start]:02x}); convert the file, or set "
                "data.on_error=replace"
            ) from None

    def checked(self, text: str, number: int) -> str:
        """Return a document without NULs and halves of surrogate pairs, as JSON can spell them and text cannot."""
        wrong = 0 if self._keeps_nuls else text.count("\0")
        if not wrong and (text.isascii() or _is_encodable(text)):
            return text
        if self.form.on_error == "replace":
            mended, surrogates = _SURROGATE.subn(REPLACEMENT, text)
            self.counts.replaced += wrong + surrogates
            return mended if self._keeps_nuls else mended.replace("\0", REPLACEMENT)
        what = "a NUL" if wrong else "half of a surrogate pair"
        raise DataError(f"{self.place(number)}: {what} in the text; mend it, or set data.on_error=replace")

    def place(self, number: int) -> str:
        """Return the file and the number of the line or row, from 1; `number` counts from the start of the piece."""
        if self.form.kind(self.source) != "parquet":
            return f"{self.source}, line {_lines_before(self.source, self.piece.start) + number + 1}"
        return f"{self.source}, row {self.piece.start + number + 1}"


MISSING = object()
"""What `value_at` returns for a value that is not there, which is another thing than null."""


def value_at(record: Any, names: Sequence[str]) -> Any:
    """Return the value at a path of names in a record of JSON: None below null, MISSING where there is none."""
    for name in names:
        if record is None:
            return None
        if not isinstance(record, dict) or name not in record:
            return MISSING
        record = record[name]
    return record


def no_column(place: str, setting: str, names: Sequence[str], record: Any) -> str:
    """Return the message for a column that a record of JSON does not have.

    place: the file, or its line. setting: the setting that names the column, with its value.
    """
    depth = 0
    while isinstance(record, dict) and names[depth] in record and depth + 1 < len(names):
        record = record[names[depth]]
        depth += 1
    if isinstance(record, dict):
        return missing_column(place, setting, names, depth, [str(name) for name in record])
    return missing_column(place, setting, names, depth, None, f"is {short(json.dumps(record, default=str), 40)}")


def _is_encodable(text: str) -> bool:
    try:
        text.encode()  # several times as fast as a search for surrogates
    except UnicodeEncodeError:
        return False
    return True


def _split(pieces: Iterable[bytes]) -> Iterator[bytes | None]:
    """Yield the lines of a file without their ends, as of wc -l; the last one may have no end.

    A line over MAX_LINE_BYTES is None, and is not kept in memory.
    """
    rest: list[bytes] = []
    length = 0  # of `rest`; -1 in a line that is too long
    for piece in pieces:
        *whole, last = piece.split(b"\n")
        for line in whole:
            if length >= 0:
                yield b"".join([*rest, line]) if rest else line
            rest, length = [], 0
        if last and length >= 0:
            rest.append(last)
            length += len(last)
            if length > MAX_LINE_BYTES:
                yield None
                rest, length = [], -1
    if rest:
        yield b"".join(rest)


def _range_of_lines(pieces: Iterable[bytes], at: int, start: int, end: int | None) -> Iterator[bytes]:
    """Yield, in pieces, the lines that begin in the bytes [start, end) of a text; \\n alone ends a line.

    pieces: of the text from the byte `at`, which stands before `start`, if that is not the text's first.
    """
    is_found = start == 0
    for data in pieces:
        if not is_found:
            # The line that begins before `start` is not ours; the byte before `start` may end it.
            found = data.find(b"\n", max(0, start - 1 - at)) if at + len(data) >= start else -1
            if found < 0:
                at += len(data)
                if end is not None and at >= end:
                    return
                continue
            data, at, is_found = data[found + 1 :], at + found + 1, True
            if end is not None and at >= end:
                return
        if end is not None and at + len(data) >= end:
            # The last line goes on beyond `end`.
            found = data.find(b"\n", max(0, end - 1 - at))
            if found >= 0:
                yield data[: found + 1]
                return
        at += len(data)
        yield data


def _lines_before(source: str, start: int) -> int:
    """Return the number of lines that begin before a byte of a text. Reads the file up to there."""
    lines, at, data = 0, 0, b"\n"
    with storage.open_read(source) as file:
        for piece in unpacked_pieces(file, source, compression(source)) if start else ():
            data = piece[: start - at]
            lines += data.count(b"\n")
            at += len(data)
            if at >= start:
                break
    # A line that is cut by `start` begins before it.
    return lines + (not data.endswith(b"\n"))
