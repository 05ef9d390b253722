"""Indexing of many files as independent tasks, with results that are kept on disk.

A task is a dictionary of plain values, and its result is bytes: `run_task` unpacks a compressed file, makes the text of
a unit of documents, scans a segment of a text, or hashes a file, in any process. Files are read and written where the
task runs, so all processes must see the same folders. `Indexer` finds the tasks that are not done yet, gives them to a
runner, and joins their results.

The state of each segment is one small file in `state/`. It is used again as long as the text's size and time of change,
the block size and segment size, and the request (word counts or not) are the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elmo_ray import storage
from elmo_ray.data import scan
from elmo_ray.data.corpus import Corpus, Shard, pack_index, read_index_bytes, read_index_fields
from elmo_ray.data.counts import WordCounter
from elmo_ray.data.documents import Counts, Piece, TextForm, divided_again, read_documents
from elmo_ray.data.duplicates import (
    Kind,
    Span,
    UInt8,
    find_repeated,
    hash_span,
    spans_of,
    state_of,
    unrepeated_path,
    write_unrepeated,
)
from elmo_ray.data.scan import (
    LONG_LINE_WORDS,
    LONG_WORD_CHARACTERS,
    UNTOKENISED_SHARE,
    Segment,
    hash_file,
    join_segments,
    scan_segment,
    segment_count,
)
from elmo_ray.data.sentence_sample import SentenceSample
from elmo_ray.data.text import file_status
from elmo_ray.data.units import (
    Unit,
    check_unit,
    cut_units,
    is_current,
    is_made,
    make_text,
    read_counts,
    read_lengths,
    space_needed,
)
from elmo_ray.data.unpack import (
    check_format,
    check_free,
    check_space,
    compression,
    is_unpacked,
    remove_stale,
    unpack,
    unpacked_path,
)
from elmo_ray.errors import ConfigError, DataError
from elmo_ray.storage import read_json
from elmo_ray.storage.files import write_aside, write_json
from elmo_ray.storage.local_copy import uri_of
from elmo_ray.text.tokenizers import SPACY

logger = logging.getLogger(__name__)

# Distinct words that a task holds for its segment, at most; beyond them the rarest are dropped (see WordCounter).
SEGMENT_WORDS = 1_000_000
_PROGRESS_SECONDS = 10.0
_PATIENCE_SECONDS = 5.0
# Fewer lines of one word, such as names or answers, may well be the sentences of a text.
ONE_WORD_LINES = 100
ONE_WORD_AVERAGE = 1.05

Task = dict[str, Any]
"""Kind of the task, its arguments, and `bytes`: how many it reads, about."""
Runner = Callable[[Sequence[Task]], Iterable[tuple[int, bytes]]]
"""A function that runs tasks in any order and yields (index of the task, its result). Raises DataError."""
Deduplicate = Literal["off", "documents", "sentences"]


def unpack_task(source: str, target: str) -> Task:
    """Return the task that writes the text of a compressed shard; it has no result."""
    return {"kind": "unpack", "bytes": file_status(source).st_size, "source": source, "target": target}


def make_task(unit: Unit, target: str, form: TextForm) -> Task:
    """Return the task that makes the text of a unit (see `make_text`); it has no result."""
    return {
        "kind": "make",
        "bytes": unit.bytes_to_read,
        "unit": unit.to_list(),
        "target": target,
        "form": form.to_dict(),
    }


def scan_task(
    path: str,
    number: int,
    block_bytes: int,
    on_error: str,
    cap: int | None,
    source: str | None = None,
    is_made: bool = False,
) -> Task:
    """Return the task that scans a segment (see `scan_segment`); its result is `Segment.pack()`.

    is_made: the text was made of documents, whose lengths are known.
    """
    return {
        "kind": "scan",
        "bytes": min(file_status(path).st_size, scan.SEGMENT_BYTES),
        "path": path,
        "number": number,
        "block_bytes": block_bytes,
        "on_error": on_error,
        "cap": cap,
        "source": source,
        "is_made": is_made,
    }


def hash_task(path: str) -> Task:
    """Return the task that hashes a file; its result is an index file with `size`, `mtime_ns` and `sha256` (hex)."""
    return {"kind": "hash", "bytes": file_status(path).st_size, "path": path}


def run_task(task: Task) -> bytes:
    """Run a task in this process and return its result. Raises DataError as the functions that it calls do."""
    arguments = {name: value for name, value in task.items() if name not in ("kind", "bytes")}
    if task["kind"] == "unpack":
        unpack(arguments["source"], arguments["target"])
        return b""
    if task["kind"] == "make":
        make_text(Unit.from_list(arguments["unit"]), arguments["target"], TextForm.from_dict(arguments["form"]))
        return b""
    if task["kind"] == "find":
        return hash_span(Span(*arguments["span"]), arguments["items"])
    if task["kind"] == "leave out":
        repeated = np.frombuffer(arguments["repeated"], np.uint8)
        span = Span(*arguments["span"])
        write_unrepeated(span, arguments["items"], repeated, arguments["target"], arguments["made_of"])
        return b""
    if task["kind"] == "hash":
        path = arguments["path"]
        status = file_status(path)
        fields = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": hash_file(path)}
        return pack_index(fields, {})
    ends = np.cumsum(read_lengths(task["path"]), dtype=np.int64) if arguments.pop("is_made") else None
    return scan_segment(**arguments, ends=ends).pack()


def run_locally(todo: Sequence[Task]) -> Iterable[tuple[int, bytes]]:
    """Run the tasks one after the other in this process: the simplest `Runner`."""
    for number, task in enumerate(todo):
        yield number, run_task(task)


@dataclass
class Findings:
    """Properties of some files that deserve a warning.

    replaced: invalid UTF-8 sequences and NULs.
    checked, joined: words of a sample, and those of them with punctuation at their end.
    long_lines, longest_words, longest_place: lines of too many words, and the longest: its words, its file and line.
    long_words, long_word_place: words of too many characters, and the file and line of the first.
    marked_files, empty_files: files with a byte order mark, and files without words.
    one_word_files: files whose lines are single words: a list of words, or a text that nobody has divided.
    sentences: the samples of all segments, or None where a state of an earlier version has none.
    documents: counts of the documents of which the texts were made, or None where they were not made of documents.
    repeated, items: with data.deduplicate, the documents or sentences that were left out, and those looked at.
    """

    replaced: int = 0
    checked: int = 0
    joined: int = 0
    long_lines: int = 0
    longest_words: int = 0
    longest_place: str = ""
    long_words: int = 0
    long_word_place: str = ""
    marked_files: list[str] = field(default_factory=list)
    empty_files: list[str] = field(default_factory=list)
    one_word_files: list[str] = field(default_factory=list)
    sentences: list[SentenceSample] | None = field(default_factory=list)
    documents: Counts | None = None
    repeated: int = 0
    items: int = 0

    def add(self, segment: Segment, source: str, first_line: int) -> None:
        """Add the findings of a segment of `source`, whose first line has the number `first_line` (from 1)."""
        self.replaced += segment.replaced
        self.checked += segment.checked
        self.joined += segment.joined
        self.long_lines += segment.long_lines
        if segment.longest_words > self.longest_words:
            self.longest_words = segment.longest_words
            self.longest_place = f"{source}, line {first_line + segment.longest_line}"
        if segment.long_words and not self.long_words:
            self.long_word_place = f"{source}, line {first_line + segment.long_word_line}"
        self.long_words += segment.long_words
        if segment.byte_order_mark:
            self.marked_files.append(source)
        if segment.sentence_sample is None:
            self.sentences = None
        elif self.sentences is not None:
            self.sentences.append(segment.sentence_sample)

    def warn(self, key: str) -> None:
        """Log one warning for each kind of trouble; `key` is the setting that named the files."""
        if self.checked and self.joined > UNTOKENISED_SHARE * self.checked:
            logger.warning(
                "%s: punctuation sticks to %.0f %% of the words (as in `end.`): is the text tokenised?",
                key,
                100 * self.joined / self.checked,
            )
        if self.long_lines:
            logger.warning(
                "%s: %d lines have more than %d words (%s has %d): is it one sentence a line?",
                key,
                self.long_lines,
                LONG_LINE_WORDS,
                self.longest_place,
                self.longest_words,
            )
        if self.long_words:
            logger.warning(
                "%s: %d words have more than %d characters (%s): is it text? A counted vocabulary leaves them out",
                key,
                self.long_words,
                LONG_WORD_CHARACTERS,
                self.long_word_place,
            )
        if self.one_word_files:
            more = "" if len(self.one_word_files) == 1 else f" and {len(self.one_word_files) - 1:,} other files"
            logger.warning(
                "%s: the lines of %s%s are single words: is it a list of words, or text without blanks between the "
                "words? A line is a sentence of words",
                key,
                self.one_word_files[0],
                more,
            )
        if self.empty_files:
            logger.warning("%s: %d files have no words (%s)", key, len(self.empty_files), self.empty_files[0])
        if self.replaced:
            logger.warning("%s: %d invalid UTF-8 sequences or NULs become U+FFFD", key, self.replaced)
        if self.marked_files:
            logger.info(
                "%s: %d files begin with a byte order mark, which is taken off (%s)",
                key,
                len(self.marked_files),
                self.marked_files[0],
            )


@dataclass(frozen=True)
class Text:
    """Text with a sentence in each line. source: the file that errors name. is_made: it was made of documents."""

    path: str
    source: str
    is_made: bool = False


class Indexer:
    """Indexer of files in `directory`, with its folders `state` and `text`; `fresh` ignores earlier results.

    form: how files that are no text with a tokenised sentence in each line are made into such a text.
    """

    def __init__(
        self,
        directory: Path,
        block_bytes: int,
        runner: Runner,
        fresh: bool = False,
        form: TextForm | None = None,
    ):
        self.directory = directory
        self.form = form or TextForm()
        self.texts_place = storage.join(uri_of(directory), "text")  # Tasks on other machines write and read there.
        self.block_bytes = block_bytes
        self.on_error = self.form.on_error
        self.runner = runner
        self.fresh = fresh

    def index(
        self,
        sources: Sequence[str],
        key: str,
        counter: WordCounter | None = None,
        deduplicate: Deduplicate = "off",
    ) -> tuple[Corpus, Findings]:
        """Unpack and scan the files `sources`, named by the setting `key`; return their corpus and findings.

        With a `counter`, their words are added to it. deduplicate: what is left out where it stands again. Raises
        DataError, and ConfigError for settings that do not fit the files.
        """
        findings = Findings()
        inputs = self._inputs(sources, deduplicate)
        units = [unit for unit, _ in inputs if isinstance(unit, Unit)]
        title = f"making sentences of {key}" if units else f"unpacking shards of {key}"
        self._run(self._making_tasks(inputs), title, lambda task, result: None)
        texts = [text for _, text in inputs]
        if units:
            n_files = len({piece.source for unit in units for piece in unit.pieces})
            self._count_documents([text.path for text in texts if text.is_made], n_files, key, findings)
            self._warn_if_tokenised(units[0].source, key)
        if deduplicate != "off":
            texts = self._without_repeated(texts, deduplicate, key, findings)
        todo = self._scan_tasks(texts, counter is not None)
        self._run(todo, f"indexing {key}", lambda task, result: write_aside(self._state_path(task), result))
        # Counts are merged in the order of the files: they do not depend on the runner, even when words are dropped.
        shards = [self._read_shard(text, findings, counter) for text in texts]
        findings.warn(key)
        return Corpus.from_shards(shards), findings

    def pending_tasks(self, sources: Sequence[str], count: bool, deduplicate: Deduplicate = "off") -> list[Task]:
        """Return the tasks that `index` would run; of texts that are not made yet, only their making."""
        inputs = self._inputs(sources, deduplicate)
        todo = self._making_tasks(inputs)
        texts = [text for _, text in inputs]
        if deduplicate != "off":
            if todo:
                return todo
            found = self._known_choice(texts, deduplicate)
            if found is None:
                return [_find_task(span, deduplicate) for text in texts for span in spans_of(text.path)]
            texts = found[0]
        unknown = {task["target"] for task in todo}
        return [*todo, *self._scan_tasks([text for text in texts if text.path not in unknown], count)]

    def texts(self, sources: Sequence[str], deduplicate: Deduplicate = "off") -> list[str]:
        """Return the paths of the texts that are read for these files; they may be missing yet."""
        texts = [text for _, text in self._inputs(sources, deduplicate)]
        if deduplicate != "off":
            texts = (self._known_choice(texts, deduplicate) or (texts,))[0]
        return [text.path for text in texts]

    def _inputs(self, sources: Sequence[str], deduplicate: Deduplicate) -> list[tuple[Unit | str, Text]]:
        """Return what texts are made of, and the texts: units of documents, compressed files, and texts as they are.

        Raises ConfigError where files have no documents that data.deduplicate could compare.
        """
        found: list[tuple[Unit | str, Text]] = []
        # Consecutive files of documents may share units.
        for converts, group in itertools.groupby(
            sources, lambda source: deduplicate == "sentences" or self.form.converts(source)
        ):
            if converts:
                for unit in cut_units(list(group), self.form):
                    path = unit.text_path(self.texts_place, self.form)
                    found.append((unit, Text(path, unit.source if len(unit.pieces) == 1 else path, True)))
                continue
            for source in group:
                if deduplicate == "documents":
                    raise ConfigError(
                        f"data.deduplicate=documents: {source} is text with a sentence in each line, which has no "
                        "documents; set data.deduplicate=sentences"
                    )
                packed = compression(source) is not None
                path = unpacked_path(source, self.texts_place) if packed else source
                found.append((source, Text(path, source)))
        return found

    def _making_tasks(self, inputs: Sequence[tuple[Unit | str, Text]]) -> list[Task]:
        """Return the tasks that make the texts. Raises DataError when the disk has too little space."""
        todo: list[Task] = []
        units: list[Unit] = []
        packed: list[str] = []
        for made_of, text in inputs:
            if isinstance(made_of, Unit):
                if self.fresh or not is_made(made_of, text.path):
                    if len(made_of.pieces) == 1:  # a task of many files does it itself
                        check_unit(made_of, self.form)
                    units.append(made_of)
                    todo.append(make_task(made_of, text.path, self.form))
            elif text.path != made_of and (self.fresh or not is_unpacked(made_of, text.path)):
                check_format(made_of)
                packed.append(made_of)
                todo.append(unpack_task(made_of, text.path))
        if units:
            check_free(space_needed(units), f"the sentences of {len(units)} texts", self.directory)
        if packed:
            check_space(packed, self.directory)
        return todo

    def _scan_tasks(self, texts: Sequence[Text], count: bool) -> list[Task]:
        """Return the tasks that scan the texts, and hash the large ones, as far as results are missing."""
        todo: list[Task] = []
        cap = SEGMENT_WORDS if count else None
        for text in texts:
            # A line of a text that was made of documents has another number than in their file.
            source = text.path if text.is_made else text.source
            segments = segment_count(file_status(text.path).st_size)
            wanted = [
                scan_task(text.path, number, self.block_bytes, self.on_error, cap, source, text.is_made)
                for number in range(segments)
            ]
            if segments > 1:
                wanted.append(hash_task(text.path))
            missing = [task for task in wanted if self.fresh or not self._is_current(task)]
            if missing and text.path == text.source and not text.is_made:
                check_format(text.source)
            todo.extend(missing)
        return todo

    def _count_documents(self, texts: Sequence[str], n_files: int, key: str, findings: Findings) -> None:
        """Log how many documents the texts were made of, and how many of them are empty."""
        total = Counts()
        for counts, empty_files in map(read_counts, texts):
            total.add(counts)
            findings.empty_files += empty_files
        findings.documents = total
        findings.replaced += total.replaced
        logger.info(
            "%s: %s documents of %s files in %s texts, %s of them empty",
            key,
            f"{total.documents:,}",
            f"{n_files:,}",
            f"{len(texts):,}",
            f"{total.empty:,}",
        )
        if total.bad:
            logger.warning("%s: %s lines are not JSON or too long and are left out", key, f"{total.bad:,}")

    def _warn_if_tokenised(self, source: str, key: str) -> None:
        if self.form.tokenizer == SPACY:
            note = divided_again(source, read_documents(Piece(source), self.form, Counts()))
            if note is not None:
                logger.warning("%s: %s", key, note)

    # ---------------------------------------------------------------- data.deduplicate

    def _without_repeated(self, texts: Sequence[Text], kind: Kind, key: str, findings: Findings) -> list[Text]:
        """Return the texts without what is repeated; a text that has nothing of it is taken as it is."""
        found = None if self.fresh else self._known_choice(texts, kind)
        if found is None:
            found = self._leave_out_repeated(texts, kind, key)
        chosen, findings.repeated, findings.items = found
        logger.info(
            "%s: %s of %s %s stand there again and are left out",
            key,
            f"{findings.repeated:,}",
            f"{findings.items:,}",
            kind,
        )
        return chosen

    def _leave_out_repeated(self, texts: Sequence[Text], kind: Kind, key: str) -> tuple[list[Text], int, int]:
        spans = {text.path: spans_of(text.path) for text in texts}
        flat = [span for text in texts for span in spans[text.path]]
        states = {path: state_of(path) for path in spans}
        files = [self._hashes_path(span, kind) for span in flat]
        todo = [_find_task(span, kind) for span, file in zip(flat, files, strict=True) if not file.exists()]
        self._run(
            todo,
            f"hashing {kind} of {key}",
            lambda task, result: write_aside(self._hashes_path(Span(*task["span"]), kind), result),
        )
        repeated, counts = find_repeated(files)
        by_span = dict(zip(flat, repeated, strict=True))
        is_empty = {span: int(np.bitwise_count(by_span[span]).sum()) == n for span, n in zip(flat, counts, strict=True)}
        chosen: list[Text] = []
        writing: list[Task] = []
        for text in texts:
            if not any(by_span[span].any() for span in spans[text.path]):
                chosen.append(text)
                continue
            for span in spans[text.path]:
                if is_empty[span]:
                    continue
                target = unrepeated_path(span, kind, by_span[span])
                made_of = _digest([states[text.path], target])
                chosen.append(Text(target, text.source if text.source != text.path else target, True))
                if self.fresh or not is_current(target, made_of):
                    writing.append(_leave_out_task(span, kind, by_span[span], target, made_of))
        self._run(writing, f"leaving repeated {kind} of {key} out", lambda task, result: None)
        n_repeated = sum(int(np.bitwise_count(bits).sum()) for bits in repeated)
        choice = {
            "texts": [[text.path, text.source, state_of(text.path)] for text in chosen],
            "repeated": n_repeated,
            "items": sum(counts),
        }
        write_json(self._choice_path(texts, kind), choice, DataError)
        for file in files:
            file.unlink(missing_ok=True)
        return chosen, n_repeated, sum(counts)

    def _known_choice(self, texts: Sequence[Text], kind: Kind) -> tuple[list[Text], int, int] | None:
        """Return the texts without what is repeated and the counts, if they stand as they were once written."""
        try:
            choice = read_json(self._choice_path(texts, kind))
            if choice is None or any(state_of(path) != state for path, _, state in choice["texts"]):
                return None
            chosen = [Text(path, source, True) for path, source, _ in choice["texts"]]
            return chosen, int(choice["repeated"]), int(choice["items"])
        except (DataError, KeyError, TypeError, ValueError):
            return None

    def _hashes_path(self, span: Span, kind: Kind) -> Path:
        # The hashes stay on this machine: the name of their folder begins with a dot.
        return self.directory / ".hashes" / f"{_digest([state_of(span.text), span.to_list(), kind])}.bin"

    def _choice_path(self, texts: Sequence[Text], kind: Kind) -> Path:
        states = [[text.source, state_of(text.path)] for text in texts]
        return self.directory / "state" / f"deduplicated-{kind}-{_digest(states)}.json"

    # ---------------------------------------------------------------- tasks and their results

    def _run(self, todo: Sequence[Task], title: str, store: Callable[[Task, bytes], None]) -> None:
        """Run the tasks, store each result as it comes, and log the progress under `title`."""
        if not todo:
            return
        started = reported = time.monotonic()
        try:
            for done, (number, result) in enumerate(self.runner(todo), start=1):
                store(todo[number], result)
                if time.monotonic() - reported > _PROGRESS_SECONDS and done < len(todo):
                    reported = time.monotonic()
                    logger.info("%s: %d of %d tasks in %.0f s", title, done, len(todo), reported - started)
        except BaseException:
            # The mistake of one task ends the others, which takes them a moment.
            patience = time.monotonic() + _PATIENCE_SECONDS
            while remove_stale(self.directory / "text") and time.monotonic() < patience:
                time.sleep(0.1)
            raise
        logger.info("%s: %d tasks in %.1f s", title, len(todo), time.monotonic() - started)

    def _state_path(self, task: Task) -> Path:
        """Return the file for the result of a scan or hash task."""
        path = task["path"]
        suffix = "sha256" if task["kind"] == "hash" else f"{task['number']:05d}"
        name = f"{Path(path).stem}-{hashlib.sha256(path.encode()).hexdigest()[:12]}-{suffix}.npz"
        return self.directory / "state" / name

    def _is_current(self, task: Task) -> bool:
        """Return whether the stored result of a task is still valid for the text and the settings of today."""
        try:
            fields = read_index_fields(self._state_path(task))
            status = storage.status(task["path"])
        except (DataError, OSError):
            return False
        if (fields.get("size"), fields.get("mtime_ns")) != (status.st_size, status.st_mtime_ns):
            return False
        if task["kind"] == "hash":
            return True
        return (
            fields.get("version") in scan.READ_VERSIONS
            and (fields["version"] == scan.FORMAT_VERSION or not fields.get("byte_order_mark"))
            and fields.get("block_bytes") == self.block_bytes
            and fields.get("segment_bytes") == scan.SEGMENT_BYTES
            and (fields.get("counted", False) or task["cap"] is None)
            and (not fields.get("replaced") or self.on_error == "replace")
        )

    def _read_shard(self, text: Text, findings: Findings, counter: WordCounter | None) -> Shard:
        """Join the stored segments of a text into a shard; add to the findings and to the counter."""
        segments = []
        lines = 0
        path, source = text.path, text.source
        for number in range(segment_count(file_status(path).st_size)):
            state = self._state_path(scan_task(path, number, self.block_bytes, self.on_error, None))
            segment = Segment.unpack(read_index_bytes(state), str(state), SEGMENT_WORDS)
            findings.add(segment, path if text.is_made else source, lines + 1)
            lines += segment.sentences
            if counter is not None and segment.counts is not None:
                counter.merge(segment.counts)
            segment.counts = None
            segments.append(segment)
        sha256 = None
        if len(segments) > 1:
            hashed = read_index_fields(self._state_path(hash_task(path)))
            if (hashed["size"], hashed["mtime_ns"]) != (segments[0].size, segments[0].mtime_ns):
                raise DataError(f"{path}: changed while it was read; run prepare again")
            sha256 = hashed["sha256"]
        shard = join_segments(path, source, segments, sha256)
        if not shard.tokens and not text.is_made:  # of the others `_count_documents` knows it
            findings.empty_files.append(source)
        if shard.sentences >= ONE_WORD_LINES and 0.5 < shard.tokens / shard.sentences < ONE_WORD_AVERAGE:
            findings.one_word_files.append(source)
        return shard


def _find_task(span: Span, kind: Kind) -> Task:
    """Return the task that hashes documents or sentences; its result is for `find_repeated`."""
    return {"kind": "find", "bytes": span.end - span.start, "span": span.to_list(), "items": kind}


def _leave_out_task(span: Span, kind: Kind, repeated: UInt8, target: str, made_of: str) -> Task:
    """Return the task that writes a span of a text without what is repeated; it has no result."""
    return {
        "kind": "leave out",
        "bytes": span.end - span.start,
        "span": span.to_list(),
        "items": kind,
        "repeated": repeated.tobytes(),
        "target": target,
        "made_of": made_of,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]
