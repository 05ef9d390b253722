"""Text that `embed` reads, cut into units of work: blocks of a tokenised text, or of the sentences of documents."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elmo_ray import storage
from elmo_ray.data.corpus import expand_paths
from elmo_ray.data.documents import Counts, TextForm, divided_again
from elmo_ray.data.foreign_formats import HEAD_BYTES
from elmo_ray.data.scan import UNTOKENISED_SHARE, is_joined
from elmo_ray.data.text import OnError, count_lines, cut_blocks, decode, file_status, split_lines
from elmo_ray.data.units import GROUP_BYTES, GROUP_FILES, SMALL_FILE_BYTES
from elmo_ray.data.unpack import check_format, check_space, compression, is_unpacked, unpack, unpacked_path
from elmo_ray.embed.documents import read_kept_documents
from elmo_ray.embed.sentences import (
    MakeSentences,
    SentenceColumns,
    SentenceFile,
    read_note,
    read_words,
    sentence_place,
)
from elmo_ray.errors import ConfigError, DataError, short
from elmo_ray.text.tokenizers import SPACY

logger = logging.getLogger("elmo_ray.embed")

Runner = Callable[[Sequence[MakeSentences]], Iterable[tuple[int, SentenceFile]]]
"""A function that does such work in any order and yields (number of the work, its result)."""

_BLOCK_BYTES = 1 << 18
_LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class Unit:
    """Sentences that a worker makes at a time, and that become one shard of the output.

    path: a seekable text, or a file of sentences that were made of documents. start, end: in bytes, or in batches.
    first: the number of its first sentence, counted over all files from 0. count: the number of its sentences.
    first_document: the number of the first document of its file, counted over all files; a line of a text is one.
    """

    number: int
    path: str
    kind: str
    start: int
    end: int
    first: int
    count: int
    first_document: int


@dataclass(frozen=True)
class TextFile:
    """File of the input, or several small ones whose sentences stand together.

    sources: as the user named them. path: the source, or its unpacked text, or the file of the sentences. sentences:
    None for a text with a tokenised sentence in each line.
    """

    sources: tuple[str, ...]
    path: str
    sentences: SentenceFile | None = None

    @property
    def source(self) -> str:
        """The first of the sources."""
        return self.sources[0]


@dataclass(frozen=True)
class Texts:
    """Files of the input. counts: of their documents, all 0 where all files are tokenised text."""

    files: list[TextFile]
    counts: Counts = field(default_factory=Counts)

    @property
    def sources(self) -> list[str]:
        """The files as the user named them, in their order."""
        return [source for file in self.files for source in file.sources]

    @property
    def has_documents(self) -> bool:
        """True if a file is not just tokenised text: sentences then have the numbers of their documents."""
        return any(file.sentences is not None for file in self.files)


def find_files(
    patterns: Sequence[str],
    form: TextForm,
    keep: Sequence[str],
    unit_bytes: int,
    unpack_to: Path,
    runner: Runner,
    whole: bool = False,
) -> Texts:
    """Return the files that `patterns` name, ready to be read by units.

    Compressed text and text in a store is unpacked, and documents are made into sentences, as far as it is not done
    yet. runner: makes the sentences of files. whole: no unit has sentences of two files. Raises ConfigError and
    DataError for files that cannot be read so.
    """
    sources = expand_paths(patterns, "in")
    documents = [source for source in sources if form.converts(source)]
    texts = [source for source in sources if not form.converts(source)]
    without = next((source for source in sources if form.kind(source) == "text"), None)
    if keep and without is not None:
        raise ConfigError(
            f"embed.keep={','.join(keep)}: {without} is text, which has no columns; leave one of them out"
        )
    form.check_column(sources)
    paths = _unpacked(texts, unpack_to)
    _warn_of_raw_text(texts, form)
    groups = _grouped(sources, form, keep, whole)
    made = _made([group for group in groups if group[0] not in paths], form, keep, unit_bytes, unpack_to, runner)
    counts = Counts()
    for each in made.values():
        counts.add(each.counts)
    if documents:
        _warn_if_tokenised(documents[0], form)
        empty = f", {counts.empty:,} of them empty or null, each of which has one row without words"
        logger.info("in: %s documents%s", f"{counts.documents:,}", empty if counts.empty else "")
    if counts.replaced:
        logger.warning("in: %s invalid UTF-8 sequences or NULs become U+FFFD", f"{counts.replaced:,}")
    if counts.bad:
        logger.warning("in: %s lines are not JSON or too long, and are left out", f"{counts.bad:,}")
    files = [
        TextFile(group, f"{made[group].place}.arrow", made[group])
        if group in made
        else TextFile(group, paths[group[0]])
        for group in groups
    ]
    return Texts(files, counts)


def _grouped(sources: Sequence[str], form: TextForm, keep: Sequence[str], whole: bool) -> list[tuple[str, ...]]:
    """Return the files in their order, in groups of those whose sentences stand together: many small ones in a row."""
    groups: list[tuple[str, ...]] = []
    room = 0  # bytes that may be added to the last group
    for source in sources:
        size = file_status(source).st_size
        # The kept columns of two Parquet files may have types of their own; those of JSON are written as JSON.
        alone = whole or not form.converts(source) or bool(keep and form.kind(source) == "parquet")
        if alone or size >= SMALL_FILE_BYTES:
            groups.append((source,))
            room = 0
            continue
        if room > 0 and len(groups[-1]) < GROUP_FILES:
            groups[-1] = (*groups[-1], source)
        else:
            groups.append((source,))
            room = GROUP_BYTES
        room -= size
    return groups


def _made(
    groups: Sequence[tuple[str, ...]],
    form: TextForm,
    keep: Sequence[str],
    unit_bytes: int,
    folder: Path,
    runner: Runner,
) -> dict[tuple[str, ...], SentenceFile]:
    """Return the sentences of files of documents by these files; those that are not there yet are made."""
    if groups:
        folder.mkdir(parents=True, exist_ok=True)
    places = {group: sentence_place(group, folder, form, keep, unit_bytes) for group in groups}
    found = {group: made for group, place in places.items() if (made := read_note(group, place)) is not None}
    waiting = [MakeSentences(group, places[group], form, tuple(keep), unit_bytes) for group in groups
               if group not in found]  # fmt: skip
    shown, done, total = time.monotonic(), 0, sum(len(make.sources) for make in waiting)
    for number, made in runner(waiting):
        found[waiting[number].sources] = made
        done += len(waiting[number].sources)
        if time.monotonic() - shown >= _LINE_EVERY_S and done < total:
            shown = time.monotonic()
            logger.info("sentences of %d of %d files are made", done, total)
    return found


def _unpacked(sources: Sequence[str], folder: Path) -> dict[str, str]:
    """Return the paths of tokenised texts by their sources; text that is compressed or in a store is copied first."""
    paths: dict[str, str] = {}
    waiting: list[str] = []
    for source in sources:
        check_format(source)
        if compression(source) is None and not storage.is_uri(source):
            paths[source] = source
            continue
        paths[source] = str(unpacked_path(source, folder))
        if not is_unpacked(source, paths[source]):
            waiting.append(source)
    if waiting:
        folder.mkdir(parents=True, exist_ok=True)
        check_space(waiting, folder)
        for source in waiting:
            unpack(source, paths[source])
    return paths


def _warn_of_raw_text(sources: Sequence[str], form: TextForm) -> None:
    """Warn if a text that is taken as tokenised does not look so. Text for which `none` is set is taken as it is."""
    for source in sources if form.tokenizer is None else ():
        try:
            head = b"" if compression(source) else storage.read_range(source, 0, HEAD_BYTES)
        except OSError:
            continue
        words = head.decode("utf-8", "replace").split()
        joined = [word for word in words if is_joined(word)]
        if len(joined) > UNTOKENISED_SHARE * len(words):
            logger.warning(
                "%s: does not look tokenised (words such as %s); set data.tokenizer=spacy and data.language, or "
                "data.tokenizer=none to take it as it is",
                source,
                short(repr(joined[0]), 40),
            )
            return


def _warn_if_tokenised(source: str, form: TextForm) -> None:
    """Warn if a file that spaCy's rules divide looks tokenised. Lists of words are not divided."""
    if form.tokenizer == SPACY:
        batches = read_kept_documents(source, form, (), Counts())
        texts = (content for batch in batches for content in batch.contents if isinstance(content, str))
        if (note := divided_again(source, texts)) is not None:
            logger.warning("%s", note)


def cut_units(files: Sequence[TextFile], block_bytes: int, whole: bool) -> list[Unit]:
    """Return units of about `block_bytes` of text, or of whole files; all text is read once to number its sentences."""
    units: list[Unit] = []
    first = first_document = 0
    for file in files:
        made = file.sentences
        if made is None:
            pieces = list(_line_blocks(file.path, block_bytes))
            documents = sum(count for *_, count in pieces)
        else:
            pieces = [(number, number + 1, count) for number, (count, _, _) in enumerate(made.batches)]
            documents = made.counts.documents
        if whole and pieces:
            pieces = [(pieces[0][0], pieces[-1][1], sum(count for *_, count in pieces))]
        before = first
        for start, end, count in pieces:
            kind = "text" if made is None else "sentences"
            # A line of a text is a document: the first one of its unit has the number of its sentence in the file.
            document = first_document + (first - before if made is None else 0)
            units.append(Unit(len(units), file.path, kind, start, end, first, count, document))
            first += count
        first_document += documents
    return units


def read_sentences(unit: Unit, on_error: OnError) -> Iterator[list[str]]:
    """Yield the words of each sentence of a unit. Raises DataError for text that cannot be read, with file and line."""
    if unit.kind == "sentences":
        yield from read_words(unit.path, unit.start, unit.end)
        return
    with _opened(unit.path) as file:
        for offset, data in cut_blocks(file, unit.start, unit.end, _BLOCK_BYTES):
            text, _ = decode(data, on_error, unit.path, offset)
            for row in split_lines(text):
                yield row.split()


def read_columns(unit: Unit, kinds: Any) -> SentenceColumns:
    """Return the numbers of the documents of a unit's sentences, and what is kept of them.

    kinds: the schema of the kept columns. Raises DataError.
    """
    if unit.kind == "sentences":
        return SentenceColumns.read(unit.path, unit.start, unit.end, unit.first_document, kinds)
    return SentenceColumns.of_lines(unit.first_document, unit.count)


def _opened(path: str) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _line_blocks(path: str, block_bytes: int) -> Iterator[tuple[int, int, int]]:
    with _opened(path) as file:
        for start, data in cut_blocks(file, 0, file_status(path).st_size, block_bytes):
            yield start, start + len(data), count_lines(data)
