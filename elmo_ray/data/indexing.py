"""The index of many files, kept on disk: what has been found out about a file is not found out again.

The state of each segment of a file is one small file in `state/`, and counts as long as the text's size and time of
change, the cut of the blocks, and what was asked (word counts or not) are the same.

The work of `prepare`, in tasks that know nothing of each other and can run in any process.

A task is a dictionary of plain values; its result is bytes. Files are read and, for unpacking, written where the task
runs, so the processes must see the same folders.
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
from elmo_ray.data.scan import (
    LONG_LINE_WORDS,
    LONG_WORD_CHARACTERS,
    Segment,
    hash_file,
    join_segments,
    scan_segment,
    segment_count,
)
from elmo_ray.data.text import OnError, file_status
from elmo_ray.data.unpack import check_space, compression, is_unpacked, unpack, unpacked_path
from elmo_ray.errors import DataError
from elmo_ray.storage.files import write_aside
from elmo_ray.storage.local_copy import uri_of


def unpack_task(source: str, target: str) -> dict[str, Any]:
    """Writes the text of a compressed shard; the result is empty."""
    return {"kind": "unpack", "source": source, "target": target}


def scan_task(
    path: str, number: int, block_bytes: int, on_error: str, cap: int | None, source: str | None = None
) -> dict[str, Any]:
    """Scans a segment, see `scan_segment`; the result is `Segment.pack()`."""
    return {
        "kind": "scan",
        "path": path,
        "number": number,
        "block_bytes": block_bytes,
        "on_error": on_error,
        "cap": cap,
        "source": source,
    }


def hash_task(path: str) -> dict[str, Any]:
    """Hashes a file; the result is an index file with its `size`, `mtime_ns` and `sha256` (hexadecimal)."""
    return {"kind": "hash", "path": path}


def perform(task: dict[str, Any]) -> bytes:
    """Does a task in this process. Raises DataError as the functions it stands for do."""
    arguments = {name: value for name, value in task.items() if name != "kind"}
    if task["kind"] == "unpack":
        unpack(arguments["source"], arguments["target"])
        return b""
    if task["kind"] == "hash":
        path = arguments["path"]
        status = file_status(path)
        fields = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": hash_file(path)}
        return pack_index(fields, {})
    return scan_segment(**arguments).pack()


logger = logging.getLogger(__name__)

# Most distinct words that a task holds for its segment; beyond them the rarest are dropped (see WordCounter).
SEGMENT_WORDS = 1_000_000
_UNTOKENISED_SHARE = 0.04
_PROGRESS_SECONDS = 10.0

Task = dict[str, Any]
Runner = Callable[[Sequence[Task]], Iterable[tuple[int, bytes]]]
"""Does tasks in any order: yields (number of the task, its result). Raises DataError."""


def run_here(todo: Sequence[Task]) -> Iterable[tuple[int, bytes]]:
    """The runner of this process: one task after the other."""
    for number, task in enumerate(todo):
        yield number, perform(task)


@dataclass
class Findings:
    """What is worth a warning in some files.

    checked, joined: words of a sample, and those with punctuation stuck to them.
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

    def add(self, segment: Segment, source: str, first_line: int) -> None:
        """Adds what a segment's scan found; `first_line` counts from 1."""
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

    def warn(self, key: str) -> None:
        """Logs a line for each kind of trouble; `key` says where the files were named."""
        if self.checked and self.joined > _UNTOKENISED_SHARE * self.checked:
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
            logger.warning(
                "%s: %d files begin with a byte order mark, which sticks to their first word (%s)",
                key,
                len(self.marked_files),
                self.marked_files[0],
            )


class Indexer:
    """Indexes files into `directory`, which has the folders `state` and `text`; `fresh` forgets what is known."""

    def __init__(self, directory: Path, block_bytes: int, on_error: OnError, runner: Runner, fresh: bool = False):
        self.directory = directory
        self.texts = storage.join(uri_of(directory), "text")  # tasks on other machines write and read there
        self.block_bytes = block_bytes
        self.on_error = on_error
        self.runner = runner
        self.fresh = fresh

    def index(self, sources: Sequence[str], key: str, counter: WordCounter | None = None) -> tuple[Corpus, Findings]:
        """Unpacks, scans and, for a `counter`, counts the words of files, which `key` named. Raises DataError.

        Counts are merged in the order of the files: they do not depend on the runner even when words are dropped.
        """
        texts = [self._text(source) for source in sources]
        self._perform(self._unpack_tasks(sources), f"unpacking shards of {key}", lambda task, result: None)
        todo = self._scan_tasks(texts, sources, counter is not None)
        self._perform(todo, f"indexing {key}", lambda task, result: write_aside(self._state(task), result))
        findings = Findings()
        shards = [self._shard(*names, findings, counter) for names in zip(texts, sources, strict=True)]
        findings.warn(key)
        return Corpus.from_shards(shards), findings

    def todo(self, sources: Sequence[str], count: bool) -> list[Task]:
        """The tasks that `index` would do; of a file that is yet to be unpacked only that."""
        packed = self._unpack_tasks(sources)
        unknown = {task["source"] for task in packed}
        sources = [source for source in sources if source not in unknown]
        return [*packed, *self._scan_tasks([self._text(source) for source in sources], sources, count)]

    def _unpack_tasks(self, sources: Sequence[str]) -> list[Task]:
        """The tasks that give every compressed file its text. DataError when the disk has no space for them."""
        todo: list[Task] = []
        for source in sources:
            text = self._text(source)
            if text != source and (self.fresh or not is_unpacked(source, text)):
                todo.append(unpack_task(source, text))
        if todo:
            check_space([task["source"] for task in todo], self.directory)
        return todo

    def _scan_tasks(self, texts: Sequence[str], sources: Sequence[str], count: bool) -> list[Task]:
        """The tasks for what is not known yet about the sources' texts, the hashes of large ones among them."""
        todo: list[Task] = []
        cap = SEGMENT_WORDS if count else None
        for path, source in zip(texts, sources, strict=True):
            segments = segment_count(file_status(path).st_size)
            wanted = [
                scan_task(path, number, self.block_bytes, self.on_error, cap, source) for number in range(segments)
            ]
            if segments > 1:
                wanted.append(hash_task(path))
            todo.extend(task for task in wanted if self.fresh or not self._is_known(task))
        return todo

    def _text(self, source: str) -> str:
        packed = compression(source) is not None
        return unpacked_path(source, self.texts) if packed else source

    def _perform(self, todo: Sequence[Task], what: str, keep: Callable[[Task, bytes], None]) -> None:
        if not todo:
            return
        started = told = time.monotonic()
        for done, (number, result) in enumerate(self.runner(todo), start=1):
            keep(todo[number], result)
            if time.monotonic() - told > _PROGRESS_SECONDS and done < len(todo):
                told = time.monotonic()
                logger.info("%s: %d of %d parts in %.0f s", what, done, len(todo), told - started)
        logger.info("%s: %d parts in %.1f s", what, len(todo), time.monotonic() - started)

    def _state(self, task: Task) -> Path:
        path = task["path"]
        part = "sha256" if task["kind"] == "hash" else f"{task['number']:05d}"
        name = f"{Path(path).stem}-{hashlib.sha256(path.encode()).hexdigest()[:12]}-{part}.npz"
        return self.directory / "state" / name

    def _is_known(self, task: Task) -> bool:
        try:
            fields = read_index_fields(self._state(task))
            status = storage.status(task["path"])
        except (DataError, OSError):
            return False
        if (fields.get("size"), fields.get("mtime_ns")) != (status.st_size, status.st_mtime_ns):
            return False
        if task["kind"] == "hash":
            return True
        return (
            fields.get("version") == scan.FORMAT_VERSION
            and fields.get("block_bytes") == self.block_bytes
            and fields.get("segment_bytes") == scan.SEGMENT_BYTES
            and (fields.get("counted", False) or task["cap"] is None)
            and (not fields.get("replaced") or self.on_error == "replace")
        )

    def _shard(self, text: str, source: str, findings: Findings, counter: WordCounter | None) -> Shard:
        segments = []
        lines = 0
        for number in range(segment_count(file_status(text).st_size)):
            state = self._state(scan_task(text, number, self.block_bytes, self.on_error, None))
            segment = Segment.unpack(read_index_bytes(state), str(state), SEGMENT_WORDS)
            findings.add(segment, source, lines + 1)
            lines += segment.sentences
            if counter is not None and segment.counts is not None:
                counter.merge(segment.counts)
            segment.counts = None
            segments.append(segment)
        sha256 = None
        if len(segments) > 1:
            hashed = read_index_fields(self._state(hash_task(text)))
            if (hashed["size"], hashed["mtime_ns"]) != (segments[0].size, segments[0].mtime_ns):
                raise DataError(f"{text}: changed while it was read; run prepare again")
            sha256 = hashed["sha256"]
        shard = join_segments(text, source, segments, sha256)
        if not shard.tokens:
            findings.empty_files.append(source)
        return shard
