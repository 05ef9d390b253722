"""Sentences of files of documents as an Arrow file: what `embed` reads where its input is not tokenised text.

`write_sentences` reads files of documents once and writes their sentences to `PLACE.arrow`, a record batch for each
unit of work, so that a unit is read without those before it. Small files share a place and units. `PLACE.kept.arrow`
has the columns of `embed.keep`, with a row for each document. `PLACE.json` is written last; it says what they were made
of, so a file that is there is whole.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elmo_ray import storage
from elmo_ray.data.documents import Counts, TextForm, TokenisedCheck
from elmo_ray.embed.documents import Documents, json_array, read_kept_documents
from elmo_ray.errors import DataError, short
from elmo_ray.storage.files import write_json
from elmo_ray.text.tokenizers import SPACY
from elmo_ray.text.unspaced import UNSPACED_ADVICE, find_unspaced

logger = logging.getLogger("elmo_ray.embed")

# Distinct words of a file that are looked at.
_LOOKED_AT = 2000
# A kept value stands beside each sentence of its document.
_LONGEST_KEPT = 1 << 20
# Metadata of a schema whose values are JSON, as text.
_JSON = {b"values": b"json"}


@dataclass(frozen=True)
class SentenceFile:
    """Sentences of files of documents, and what is known of them.

    place: the path of the files without their ends. batches: for each record batch its number of sentences and the
    numbers of its first document and of the document after its last. kept: the schema of the kept columns. starts: for
    each of the sources the number of its first sentence and of its first document, of those of the place.
    """

    place: Path
    counts: Counts
    batches: list[tuple[int, int, int]]
    kept: Any
    starts: list[tuple[int, int]]


def sentence_place(sources: Sequence[str], folder: Path, form: TextForm, keep: Sequence[str], unit_bytes: int) -> Path:
    """Return the place of the sentences of files, whose name is another one for other settings."""
    fields = json.dumps([list(sources), form.key(), list(keep), unit_bytes])
    name = storage.base_name(sources[0]).partition(".")[0]
    return folder / f"{name}-{hashlib.sha256(fields.encode()).hexdigest()[:12]}"


def read_note(sources: Sequence[str], place: Path) -> SentenceFile | None:
    """Return the sentences that were written before, or None where they are not whole or a source has changed."""
    import pyarrow as pa

    note = storage.read_json(f"{place}.json")
    try:
        if note is None or note["sources"] != _status(sources):
            return None
        kept = read_kinds(base64.b64decode(note["kept"]))
        batches = [(int(rows), int(first), int(end)) for rows, first, end in note["batches"]]
        starts = [(int(sentence), int(document)) for sentence, document in note["starts"]]
        return SentenceFile(place, Counts(**note["counts"]), batches, kept, starts)
    except (KeyError, TypeError, ValueError, OSError, pa.ArrowException):
        return None


def _status(sources: Sequence[str]) -> list[list[int]]:
    statuses = map(storage.status, sources)
    return [[status.st_size, status.st_mtime_ns] for status in statuses]


def write_sentences(
    sources: Sequence[str], place: Path, form: TextForm, keep: Sequence[str], unit_bytes: int
) -> SentenceFile:
    """Write the sentences of files of documents to a place, in batches of about `unit_bytes`.

    A document without a word has one sentence without words. Raises DataError, with the file and the line, if the file
    cannot be read, if its documents are not tokenised and no tokenizer is set, or if the disk is full.
    """
    import pyarrow as pa

    counts = Counts()
    starts: list[tuple[int, int]] = []
    try:
        # The status is that of before the reading: a file that changes meanwhile is read again.
        status = _status(sources)
        with contextlib.ExitStack() as stack:
            writer = _Writer(place, keep, stack)
            for source in sources:
                starts.append((writer.sentences, counts.documents))
                _add_documents(source, form, keep, unit_bytes, counts, writer)
            writer.finish()
        note = {
            "sources": status,
            "counts": asdict(counts),
            "batches": writer.batches,
            "starts": starts,
            "kept": base64.b64encode(writer.kinds.serialize().to_pybytes()).decode(),
        }
        write_json(Path(f"{place}.json"), note, DataError)
    except (pa.ArrowException, OSError) as error:
        _remove(place)
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{sources[0]}: its sentences cannot be written to {place.parent} ({short(why)})") from None
    except BaseException:
        _remove(place)
        raise
    return SentenceFile(place, counts, writer.batches, writer.kinds, starts)


@dataclass(frozen=True)
class MakeSentences:
    """Work of `write_sentences`, to be done in any process; the fields are its arguments."""

    sources: tuple[str, ...]
    place: Path
    form: TextForm
    keep: tuple[str, ...]
    unit_bytes: int

    def __call__(self) -> SentenceFile:
        """Do the work. Raises DataError as `write_sentences` does."""
        return write_sentences(self.sources, self.place, self.form, self.keep, self.unit_bytes)


def _add_documents(
    source: str, form: TextForm, keep: Sequence[str], unit_bytes: int, counts: Counts, writer: _Writer
) -> None:
    """Add all sentences of a file to a writer, and count its documents."""
    tokenizer = form.make_tokenizer()
    check = TokenisedCheck(source) if form.must_look_tokenised(source) else None
    looked_at: collections.Counter[str] = collections.Counter()
    for documents in read_kept_documents(source, form, keep, counts):
        writer.keep(documents, source)
        texts = iter(tokenizer([content for content in documents.contents if isinstance(content, str)]))
        for content in documents.contents:
            sentences: list[list[str]]
            if isinstance(content, str):
                sentences = [words for words in next(texts) if words]
                if check is not None:
                    check.look(sentences)
                elif form.tokenizer == SPACY and len(looked_at) < _LOOKED_AT:
                    looked_at.update(word for words in sentences for word in words)
            else:
                sentences = [content] if content else []
            counts.empty += not sentences
            for number, words in enumerate(sentences or [[]]):
                writer.add(words, counts.documents, number)
                if writer.held_bytes >= unit_bytes:
                    writer.flush()
            counts.documents += 1
    if check is not None:
        check.finish()
    if (found := find_unspaced(looked_at)) is not None:
        logger.warning(
            "%s: %s is written without spaces, and rules do not find its words (as in %s); %s",
            source,
            found[0],
            short(repr(found[1]), 40),
            UNSPACED_ADVICE,
        )


class _Writer:
    """Writer of both Arrow files of a place; each flush makes a record batch in both."""

    def __init__(self, place: Path, keep: Sequence[str], stack: contextlib.ExitStack):
        import pyarrow as pa

        self.names = list(keep)
        self.schema = pa.schema({"words": pa.list_(pa.string()), "document": pa.int64(), "sentence": pa.int64()})
        self.kinds = pa.schema([])
        self.batches: list[tuple[int, int, int]] = []
        self.sentences = self.held_bytes = 0
        self._place, self._stack = place, stack
        self._options = pa.ipc.IpcWriteOptions(compression="zstd")
        self._file = stack.enter_context(pa.ipc.new_file(f"{place}.arrow", self.schema, options=self._options))
        self._kept_file: Any = None
        self._words: list[list[str]] = []
        self._documents: list[int] = []
        self._numbers: list[int] = []
        # Kept values of the documents from this number on.
        self._kept: list[Any] = []
        self._first = 0

    def keep(self, documents: Documents, source: str) -> None:
        """Take the kept columns of the next documents, before their sentences. Raises DataError for unequal types."""
        import pyarrow as pa

        if not self.names:
            return
        try:
            schema = pa.schema(list(zip(self.names, documents.kinds, strict=True)))
            self.kinds = pa.unify_schemas([self.kinds, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(
                f"{source}: a column of embed.keep has values of several types ({short(str(error), 120)}); leave it "
                "out or mend it"
            ) from None
        for name, array in zip(self.names, documents.kept, strict=True):
            if (size := _longest(array)) > _LONGEST_KEPT:
                raise DataError(
                    f"{source}: embed.keep={name}: a document has a value of {size / 1e6:.1f} MB there, which each of "
                    "its sentences would repeat; leave it out, and join it by another column"
                )
        batch = pa.RecordBatch.from_arrays(documents.kept, names=self.names)
        if documents.is_json:
            batch = batch.replace_schema_metadata(_JSON)
        if self._kept_file is None:
            self._kept_file = self._stack.enter_context(
                pa.ipc.new_file(f"{self._place}.kept.arrow", batch.schema, options=self._options)
            )
        self._kept.append(batch)

    def add(self, words: list[str], document: int, number: int) -> None:
        """Add a sentence. document: its number in the place. number: that of the sentence in the document."""
        self._words.append(words)
        self._documents.append(document)
        self._numbers.append(number)
        self.held_bytes += sum(map(len, words)) + len(words) + 1
        self.sentences += 1

    def flush(self) -> None:
        """Write the sentences that were added since the last flush, and the kept values of their documents."""
        import pyarrow as pa

        first, end = self._documents[0], self._documents[-1] + 1
        arrays = [
            pa.array(values, field.type)
            for values, field in zip((self._words, self._documents, self._numbers), self.schema, strict=True)
        ]
        self._file.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self.schema))
        if self._kept_file is not None:
            table = pa.Table.from_batches(self._kept)
            whole = table.slice(first - self._first, end - first).combine_chunks()
            self._kept_file.write_batch(whole.to_batches()[0])
            # The last document may go on in the next batch.
            self._kept, self._first = table.slice(end - 1 - self._first).to_batches(), end - 1
        self.batches.append((len(self._words), first, end))
        self._words, self._documents, self._numbers, self.held_bytes = [], [], [], 0

    def finish(self) -> None:
        """Write what is left."""
        if self._words:
            self.flush()


def _longest(array: Any) -> int:
    """Return the bytes of the longest value of an Arrow array, or 0 where all of them together are not too long."""
    if array.nbytes <= _LONGEST_KEPT:
        return 0
    return max(array.slice(place, 1).nbytes for place in range(len(array)))


def read_words(path: str, start: int, end: int) -> Iterator[list[str]]:
    """Yield the words of the sentences in the record batches [start, end). Raises DataError for a damaged file."""
    for batch in _read(path, start, end):
        yield from batch.column("words").to_pylist()


class SentenceColumns:
    """Columns beside the sentences of a unit: their documents, and the kept values of these.

    numbers: int64 [n] of the documents, counted over all files. sentences: int64 [n], of the sentence in its document.
    """

    def __init__(self, numbers: Any, sentences: Any, kept: Any = None, rows: Any = None):
        self.numbers, self.sentences, self._kept, self._rows = numbers, sentences, kept, rows

    @classmethod
    def read(cls, path: str, start: int, end: int, first_document: int, kinds: Any) -> SentenceColumns:
        """Return the columns of the record batches [start, end) of a file.

        first_document: the number of the first document of the file, counted over all files. kinds: the schema of the
        kept columns. Raises DataError for a damaged file.
        """
        import numpy as np
        import pyarrow as pa

        batches = list(_read(path, start, end, ["document", "sentence"]))
        numbers = np.concatenate([batch.column(0).to_numpy() for batch in batches])
        sentences = np.concatenate([batch.column(1).to_numpy() for batch in batches])
        if not kinds.names:
            return cls(numbers + first_document, sentences)
        tables, rows, base = [], [], 0
        for batch, kept in zip(batches, _read(f"{path.removesuffix('.arrow')}.kept.arrow", start, end), strict=True):
            is_json = kept.schema.metadata == _JSON
            arrays = [_cast(kept.column(name), kinds.field(name), is_json) for name in kinds.names]
            tables.append(pa.table(arrays, kinds.names))
            rows.append(batch.column(0).to_numpy() - batch.column(0)[0].as_py() + base)
            base += kept.num_rows
        return cls(numbers + first_document, sentences, pa.concat_tables(tables).combine_chunks(), np.concatenate(rows))

    @classmethod
    def of_lines(cls, first_document: int, count: int) -> SentenceColumns:
        """Return the columns of lines of text, each of which is a document with one sentence."""
        import numpy as np

        return cls(np.arange(first_document, first_document + count), np.zeros(count, np.int64))

    def rows(self, start: int, end: int) -> dict[str, Any]:
        """Return the columns of the sentences [start, end) of the unit, by their names."""
        import pyarrow as pa

        columns = {
            "document": pa.array(self.numbers[start:end]),
            "sentence_in_document": pa.array(self.sentences[start:end]),
        }
        if self._kept is not None:
            kept = self._kept.take(self._rows[start:end])
            columns |= {name: kept.column(name) for name in kept.column_names}
        return columns


def _cast(array: Any, field: Any, is_json: bool) -> Any:
    """Return kept values in the type of the output."""
    import pyarrow as pa

    place = f"embed.keep={field.name}"
    if is_json:
        values = [None if text is None else json.loads(text) for text in array.to_pylist()]
        return json_array(values, place, field.type)
    try:
        return array.cast(field.type)
    except pa.ArrowException as error:
        raise DataError(f"{place}: its values cannot become {field.type} ({short(str(error))})") from None


def _read(path: str, start: int, end: int, columns: Sequence[str] | None = None) -> Iterator[Any]:
    import pyarrow as pa

    try:
        with pa.memory_map(path) as source:
            file = pa.ipc.open_file(source)
            for number in range(start, end):
                batch = file.get_batch(number)
                yield batch if columns is None else batch.select(list(columns))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({short(str(error))}); embed the text anew with --fresh") from None


def read_kinds(data: bytes) -> Any:
    """Return the Arrow schema of these bytes, which `Schema.serialize` made; that of no columns for none."""
    import pyarrow as pa

    return pa.ipc.read_schema(pa.py_buffer(data)) if data else pa.schema([])


def unified_kinds(files: Sequence[tuple[str, SentenceFile]]) -> Any:
    """Return the schema of the kept columns of all files, named by their sources.

    Raises DataError where the types of a column do not go together, or cannot be written.
    """
    import pyarrow as pa

    kinds = pa.schema([])
    for source, file in files:
        try:
            kinds = pa.unify_schemas([kinds, file.kept], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(
                f"{source}: a column of embed.keep has other values than in the files before it "
                f"({short(str(error), 120)}); leave it out or embed the files one by one"
            ) from None
        for kept in kinds:
            if (why := _not_written(kept)) is not None:
                raise DataError(
                    f"{source}: embed.keep={kept.name}: its values are {kept.type}, which Parquet cannot hold ({why}); "
                    "leave it out"
                )
    return kinds


def _not_written(field: Any) -> str | None:
    """Return why Parquet cannot hold values of the type of a field, such as objects without keys; None if it can."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(pa.table([pa.nulls(1, field.type).take(pa.array([0]))], [field.name]), pa.BufferOutputStream())
    except pa.ArrowException as error:
        return short(str(error), 120)
    return None


def _remove(place: Path) -> None:
    for end in (".arrow", ".kept.arrow", ".json"):
        with contextlib.suppress(OSError):
            os.unlink(f"{place}{end}")
