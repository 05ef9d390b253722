"""Indexing of many files as independent tasks, with results that are kept on disk.

A task is a dictionary of plain values, and its result is bytes: `run_task` unpacks a compressed file, scans a segment
of a text, or hashes a file, in any process. Files are read and unpacked where the task runs, so all processes must see
the same folders. `Indexer` finds the tasks that are not done yet, gives them to a runner, and joins their results.

The state of each segment is one small file in `state/`. It is used again as long as the text's size and time of change,
the block size and segment size, and the request (word counts or not) are the same.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elmo_ray import storage
from elmo_ray.data import scan
from elmo_ray.data.corpus import Corpus, Shard, pack_index, read_index_bytes, read_index_fields
from elmo_ray.data.counts import WordCounter
from elmo_ray.data.documents import Counts, TextForm, converted_path
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
from elmo_ray.data.text import OnError, file_status
from elmo_ray.data.unpack import (
    check_format,
    check_space,
    compression,
    is_unpacked,
    read_counts,
    unpack,
    unpacked_path,
)
from elmo_ray.errors import DataError
from elmo_ray.storage.files import write_aside
from elmo_ray.storage.local_copy import uri_of

logger = logging.getLogger(__name__)

# Distinct words that a task holds for its segment, at most; beyond them the rarest are dropped (see WordCounter).
SEGMENT_WORDS = 1_000_000
_PROGRESS_SECONDS = 10.0

Task = dict[str, Any]
Runner = Callable[[Sequence[Task]], Iterable[tuple[int, bytes]]]
"""A function that runs tasks in any order and yields (index of the task, its result). Raises DataError."""


def unpack_task(source: str, target: str, form: TextForm | None = None) -> Task:
    """Return the task that writes the text of a compressed shard, or makes text of it by `form`; it has no result."""
    return {"kind": "unpack", "source": source, "target": target, "form": None if form is None else form.to_dict()}


def scan_task(
    path: str, number: int, block_bytes: int, on_error: str, cap: int | None, source: str | None = None
) -> Task:
    """Return the task that scans a segment (see `scan_segment`); its result is `Segment.pack()`."""
    return {
        "kind": "scan",
        "path": path,
        "number": number,
        "block_bytes": block_bytes,
        "on_error": on_error,
        "cap": cap,
        "source": source,
    }


def hash_task(path: str) -> Task:
    """Return the task that hashes a file; its result is an index file with `size`, `mtime_ns` and `sha256` (hex)."""
    return {"kind": "hash", "path": path}


def run_task(task: Task) -> bytes:
    """Run a task in this process and return its result. Raises DataError as `unpack` and `scan_segment` do."""
    arguments = {name: value for name, value in task.items() if name != "kind"}
    if task["kind"] == "unpack":
        form = arguments["form"]
        unpack(arguments["source"], arguments["target"], None if form is None else TextForm.from_dict(form))
        return b""
    if task["kind"] == "hash":
        path = arguments["path"]
        status = file_status(path)
        fields = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": hash_file(path)}
        return pack_index(fields, {})
    return scan_segment(**arguments).pack()


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
    sentences: the samples of all segments, or None where a state of an earlier version has none.
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
    sentences: list[SentenceSample] | None = field(default_factory=list)

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


class Indexer:
    """Indexer of files in `directory`, with its folders `state` and `text`; `fresh` ignores earlier results.

    form: how files that are no text with a tokenised sentence in each line are made into such a text.
    """

    def __init__(
        self,
        directory: Path,
        block_bytes: int,
        on_error: OnError,
        runner: Runner,
        fresh: bool = False,
        form: TextForm | None = None,
    ):
        self.directory = directory
        self.form = form or TextForm(on_error=on_error)
        self.texts = storage.join(uri_of(directory), "text")  # Tasks on other machines write and read there.
        self.block_bytes = block_bytes
        self.on_error = on_error
        self.runner = runner
        self.fresh = fresh

    def index(self, sources: Sequence[str], key: str, counter: WordCounter | None = None) -> tuple[Corpus, Findings]:
        """Unpack and scan the files `sources`, named by the setting `key`; return their corpus and findings.

        With a `counter`, their words are added to it. Raises DataError.
        """
        texts = [self._text_path(source) for source in sources]
        documents = any(self.form.converts(source) for source in sources)
        title = f"making sentences of {key}" if documents else f"unpacking shards of {key}"
        self._run(self._unpack_tasks(sources), title, lambda task, result: None)
        if documents:
            self._log_documents(texts, key)
        todo = self._scan_tasks(texts, sources, counter is not None)
        self._run(todo, f"indexing {key}", lambda task, result: write_aside(self._state_path(task), result))
        findings = Findings()
        # Counts are merged in the order of the files: they do not depend on the runner, even when words are dropped.
        shards = [self._read_shard(*names, findings, counter) for names in zip(texts, sources, strict=True)]
        findings.warn(key)
        return Corpus.from_shards(shards), findings

    def pending_tasks(self, sources: Sequence[str], count: bool) -> list[Task]:
        """Return the tasks that `index` would run; for a file that is not unpacked yet, only its unpacking."""
        packed = self._unpack_tasks(sources)
        unknown = {task["source"] for task in packed}
        sources = [source for source in sources if source not in unknown]
        return [*packed, *self._scan_tasks([self._text_path(source) for source in sources], sources, count)]

    def _unpack_tasks(self, sources: Sequence[str]) -> list[Task]:
        """Return the tasks that unpack compressed files. Raises DataError when the disk has too little space."""
        todo: list[Task] = []
        for source in sources:
            text = self._text_path(source)
            if text != source and (self.fresh or not is_unpacked(source, text)):
                converts = self.form.converts(source)
                if self.form.kind(source) == "text":
                    check_format(source)
                todo.append(unpack_task(source, text, self.form if converts else None))
        if todo:
            check_space([task["source"] for task in todo], self.directory)
        return todo

    def _scan_tasks(self, texts: Sequence[str], sources: Sequence[str], count: bool) -> list[Task]:
        """Return the tasks that scan the sources' texts, and hash the large ones, as far as results are missing."""
        todo: list[Task] = []
        cap = SEGMENT_WORDS if count else None
        for path, source in zip(texts, sources, strict=True):
            segments = segment_count(file_status(path).st_size)
            wanted = [
                scan_task(path, number, self.block_bytes, self.on_error, cap, source) for number in range(segments)
            ]
            if segments > 1:
                wanted.append(hash_task(path))
            missing = [task for task in wanted if self.fresh or not self._is_current(task)]
            if missing and path == source:
                check_format(source)
            todo.extend(missing)
        return todo

    def _text_path(self, source: str) -> str:
        """Return the path of the text: `source` itself, or the place for its unpacked text."""
        if self.form.converts(source):
            return converted_path(source, self.texts, self.form)
        packed = compression(source) is not None
        return unpacked_path(source, self.texts) if packed else source

    def _log_documents(self, texts: Sequence[str], key: str) -> None:
        """Log how many documents the texts were made of, and how many of them are empty."""
        total = Counts()
        for counts in map(read_counts, texts):
            total.documents += counts.documents
            total.empty += counts.empty
            total.bad += counts.bad
        logger.info("%s: %s documents, %s of them empty", key, f"{total.documents:,}", f"{total.empty:,}")
        if total.bad:
            logger.warning("%s: %s lines are not JSON and are left out", key, f"{total.bad:,}")

    def _run(self, todo: Sequence[Task], title: str, store: Callable[[Task, bytes], None]) -> None:
        """Run the tasks, store each result as it comes, and log the progress under `title`."""
        if not todo:
            return
        started = reported = time.monotonic()
        for done, (number, result) in enumerate(self.runner(todo), start=1):
            store(todo[number], result)
            if time.monotonic() - reported > _PROGRESS_SECONDS and done < len(todo):
                reported = time.monotonic()
                logger.info("%s: %d of %d tasks in %.0f s", title, done, len(todo), reported - started)
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

    def _read_shard(self, text: str, source: str, findings: Findings, counter: WordCounter | None) -> Shard:
        """Join the stored segments of a text into a shard; add to the findings and to the counter."""
        segments = []
        lines = 0
        for number in range(segment_count(file_status(text).st_size)):
            state = self._state_path(scan_task(text, number, self.block_bytes, self.on_error, None))
            segment = Segment.unpack(read_index_bytes(state), str(state), SEGMENT_WORDS)
            findings.add(segment, source, lines + 1)
            lines += segment.sentences
            if counter is not None and segment.counts is not None:
                counter.merge(segment.counts)
            segment.counts = None
            segments.append(segment)
        sha256 = None
        if len(segments) > 1:
            hashed = read_index_fields(self._state_path(hash_task(text)))
            if (hashed["size"], hashed["mtime_ns"]) != (segments[0].size, segments[0].mtime_ns):
                raise DataError(f"{text}: changed while it was read; run prepare again")
            sha256 = hashed["sha256"]
        shard = join_segments(text, source, segments, sha256)
        if not shard.tokens:
            findings.empty_files.append(source)
        return shard
