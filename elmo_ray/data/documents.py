"""Documents of JSONL and Parquet files, and raw text, made into text with one tokenised sentence a line.

A file becomes one text in the prepared folder, whose name depends on the settings and on the version of the library, so
that texts of other settings are never mixed with it. It appears whole or not at all.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from elmo_ray import storage
from elmo_ray.data.scan import UNTOKENISED_SHARE, is_joined
from elmo_ray.data.text import OnError, decode
from elmo_ray.errors import DataError, short
from elmo_ray.text.tokenizers import NONE, describe_tokenizer, make_tokenizer

_JSONL_NAMES = (".jsonl", ".ndjson")
_PARQUET_NAMES = (".parquet", ".parq")
_READ_BYTES = 1 << 20
# Documents that are tokenised at a time, and the characters after which fewer are.
_BATCH, _BATCH_CHARACTERS = 1000, 1 << 20
# Words of the first documents that are looked at where no tokenizer is set.
_LOOKED_AT = 2000


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
        """Return `text`, `jsonl` or `parquet`."""
        if self.format != "auto":
            return self.format
        name = storage.base_name(source).removesuffix(".gz").removesuffix(".zst").lower()
        if name.endswith(_JSONL_NAMES):
            return "jsonl"
        return "parquet" if name.endswith(_PARQUET_NAMES) else "text"

    def converts(self, source: str) -> bool:
        """Return whether another text is made of the file before it is read as sentences."""
        return self.kind(source) != "text" or self.tokenizer not in (None, NONE) or bool(self.normalize)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - it loads spaCy, and it is asked for every file
    def key(self) -> str:
        """Return a hash of all on which the text depends, hexadecimal. Raises ConfigError as `make_tokenizer` does."""
        described = describe_tokenizer(self.tokenizer or NONE, self.language, self.normalize)
        fields = {**described, "format": self.format, "column": self.column, "on_error": self.on_error}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TextForm:
        return cls(**{**fields, "normalize": tuple(fields["normalize"])})


@dataclass
class Counts:
    """Numbers of documents in a file, of those that are empty or null, and of lines that were left out."""

    documents: int = 0
    empty: int = 0
    bad: int = 0


def sentences_of(source: str, pieces: Iterable[bytes], form: TextForm, counts: Counts) -> Iterator[bytes]:
    """Yield the text of a file in pieces: tokenised sentences, one a line.

    pieces: the file's content where it is text or JSONL, unpacked; a Parquet file is opened here. Raises DataError,
    with the file and the line, for what cannot be read, and as `make_tokenizer` and the tokenizer do.
    """
    kind = form.kind(source)
    documents: Iterator[str | None]
    if kind == "parquet":
        documents = _parquet_documents(source, form.column)
    elif kind == "jsonl":
        documents = _jsonl_documents(source, _lines(pieces), form, counts)
    else:
        documents = _text_documents(source, _lines(pieces), form)
    tokenizer = _tokenizer(form.tokenizer or NONE, form.language, form.normalize)
    check = _TokenisedCheck(source) if kind != "text" and form.tokenizer is None else None
    for batch in _batches(documents, counts):
        lines: list[str] = []
        for sentences in tokenizer(batch):
            if check is not None:
                check.look(sentences)
            lines.extend(" ".join(words) + "\n" for words in sentences)
        yield "".join(lines).encode()
    if check is not None:
        check.finish()


# A tokenizer of spaCy takes a quarter of a second to make, and there may be thousands of files.
_tokenizer = functools.lru_cache(maxsize=8)(make_tokenizer)


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


class _TokenisedCheck:
    """Check that documents without a tokenizer are tokenised: text as people write it has `end.` as one word."""

    def __init__(self, source: str) -> None:
        self.source, self.words, self.joined, self.done = source, 0, 0, False
        self.example = ""

    def look(self, sentences: Iterable[Sequence[str]]) -> None:
        if self.done:
            return
        for words in sentences:
            for word in words:
                self.words += 1
                if is_joined(word):
                    self.joined += 1
                    self.example = self.example or word
        if self.words >= _LOOKED_AT:
            self.finish()

    def finish(self) -> None:
        if not self.done and self.joined > UNTOKENISED_SHARE * self.words:
            raise DataError(
                f"{self.source}: its documents are not tokenised (words such as {short(repr(self.example), 40)}); set "
                "data.tokenizer=spacy and data.language=en, or data.tokenizer=none to train on it as it is"
            )
        self.done = True


# ---------------------------------------------------------------- the formats


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file without their ends, as of wc -l; the last one may have no end."""
    rest: list[bytes] = []
    for piece in pieces:
        *whole, last = piece.split(b"\n")
        for line in whole:
            yield b"".join([*rest, line]) if rest else line
            rest = []
        if last:
            rest.append(last)
    if rest:
        yield b"".join(rest)


def _text_documents(source: str, lines: Iterable[bytes], form: TextForm) -> Iterator[str]:
    """Yield the lines of raw text: a line is a paragraph."""
    for number, line in enumerate(lines, start=1):
        yield _decoded(line, source, number, form)


def _jsonl_documents(source: str, lines: Iterable[bytes], form: TextForm, counts: Counts) -> Iterator[str | None]:
    names = form.column.split(".")
    for number, line in enumerate(lines, start=1):
        text = _decoded(line, source, number, form).strip()
        if not text:
            continue
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
                f"{source}, line {number}: is not JSON ({what}); mend it, or leave such lines out with "
                "data.on_error=replace"
            ) from None
        yield _value(record, names, f"{source}, line {number}")


def _value(record: Any, names: Sequence[str], place: str) -> str | None:
    """Return the text of a document in its record, or None where it is null."""
    for depth, name in enumerate(names):
        if record is None:
            return None
        if not isinstance(record, dict) or name not in record:
            has = ", ".join(sorted(map(str, record))) if isinstance(record, dict) else f"a {type(record).__name__}"
            raise DataError(
                f"{place}: has no column {'.'.join(names[: depth + 1])} (data.column={'.'.join(names)}); it has "
                f"{short(has, 200)}"
            )
        record = record[name]
    if record is not None and not isinstance(record, str):
        raise DataError(
            f"{place}: data.column={'.'.join(names)} is {short(json.dumps(record, default=str), 40)}, a "
            f"{type(record).__name__} and no text; name a column of text"
        )
    return record


def _parquet_documents(source: str, column: str) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    names = column.split(".")
    try:
        with storage.open_read(source) as file:
            table = pq.ParquetFile(file)
            kind = _column_type(table.schema_arrow, names, source)
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise DataError(f"{source}: data.column={column} has values of {kind} and no text; name another one")
            for batch in table.iter_batches(_BATCH, columns=[column]):
                values = batch.column(0)
                for name in names[1:]:
                    values = pc.struct_field(values, name)
                yield from values.to_pylist()
    except pa.ArrowException as error:
        raise DataError(
            f"{source}: is no whole Parquet file ({short(str(error).splitlines()[0], 120)}); get the file again, or "
            "set data.format to what it is"
        ) from None
    except OSError as error:
        raise DataError(f"{source}: {error.strerror or error}") from None


def _column_type(schema: Any, names: Sequence[str], source: str) -> Any:
    import pyarrow as pa

    fields = {field.name: field.type for field in schema}
    for depth, name in enumerate(names):
        if name not in fields:
            raise DataError(
                f"{source}: has no column {'.'.join(names[: depth + 1])} (data.column={'.'.join(names)}); it has "
                f"{short(', '.join(fields), 200)}"
            )
        kind = fields[name]
        fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    return kind


def _decoded(line: bytes, source: str, number: int, form: TextForm) -> str:
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        if form.on_error == "replace":
            return decode(line, "replace", source, 0)[0]
        raise DataError(
            f"{source}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x}); convert the file, or set "
            "data.on_error=replace"
        ) from None


def read_pieces(file: BinaryIO) -> Iterator[bytes]:
    """Yield a file's content in pieces."""
    while piece := file.read(_READ_BYTES):
        yield piece


def converted_path(source: str, directory: storage.Place, form: TextForm) -> str:
    """Return the place for the text that is made of a file with these settings."""
    name = storage.base_name(source).partition(".")[0]
    place = hashlib.sha256(source.encode()).hexdigest()[:12]
    return storage.join(os.fspath(directory), f"{name}-{place}-{form.key()}.txt")
