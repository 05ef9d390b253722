"""Scan of a shard's text in one pass: blocks and their sizes, word counts, and signs of text that is not prepared.

A shard is scanned in segments, which may run at the same time in several processes; `join_segments` makes the shard.
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from elmo_ray import storage
from elmo_ray.data.corpus import Int64, Shard, pack_index, unpack_index
from elmo_ray.data.counts import WordCounter
from elmo_ray.data.sentence_sample import EVERYTHING, SentenceSample, SentenceSampler
from elmo_ray.data.text import (
    BYTE_ORDER_MARK,
    OnError,
    count_lines,
    cut_blocks,
    decode,
    file_status,
    line_number,
    line_start,
    split_lines,
)
from elmo_ray.errors import DataError

# Size of a segment, about. The places where blocks are cut depend on it.
SEGMENT_BYTES = 64 << 20
LONG_LINE_WORDS = 250
# No model reads more characters of a word (the limit of model.char_cnn.max_characters), so a longer one is data.
LONG_WORD_CHARACTERS = 1000
# A larger share of words with punctuation at their end is a sign of text that is not tokenised.
UNTOKENISED_SHARE = 0.04
# So much text without a blank is no sentence of words: base64, or a book whose words are not divided.
MAX_WORD_CHARACTERS = 100_000
FORMAT_VERSION = 3
# Version 2 is read, too: it has no sentence samples, and it counts a byte order mark as part of the first word.
READ_VERSIONS = (FORMAT_VERSION, 2)


@dataclass
class Segment:
    """Result of the scan of one segment. Lines count from 0 at the segment's start.

    size, mtime_ns: size (bytes) and time of change (ns) of the whole file.
    sha256: hash of the whole file, hexadecimal; empty where the segment is not all of the file.
    block_*: one element for each block, as in `Shard`.
    replaced: invalid UTF-8 sequences and NULs.
    checked, joined: words of a sample, and those of them with punctuation at their end.
    long_lines: lines of more than LONG_LINE_WORDS words; the longest is line `longest_line`, of `longest_words` words.
    long_words: words of more than LONG_WORD_CHARACTERS; the first is in line `long_word_line`.
    block_continues: for each block, whether it begins within a document; None where no documents are known.
    sentence_sample: None in a state of version 2.
    counts: None where words were not counted.
    """

    path: str
    number: int
    size: int
    mtime_ns: int
    block_bytes: int
    segment_bytes: int = 0
    version: int = 0
    sha256: str = ""
    byte_order_mark: bool = False
    block_ends: list[int] = field(default_factory=list)
    block_positions: list[int] = field(default_factory=list)
    block_tokens: list[int] = field(default_factory=list)
    block_characters: list[int] = field(default_factory=list)
    block_crc32: list[int] = field(default_factory=list)
    replaced: int = 0
    checked: int = 0
    joined: int = 0
    long_lines: int = 0
    longest_words: int = 0
    longest_line: int = 0
    long_words: int = 0
    long_word_line: int = 0
    block_continues: list[bool] | None = None
    sentence_sample: SentenceSample | None = None
    counts: WordCounter | None = None

    def pack(self) -> bytes:
        """Return the segment as the bytes of an index file."""
        arrays: dict[str, npt.NDArray[Any]] = {
            name: np.array(getattr(self, name), dtype=np.int64) for name in _BLOCK_LISTS
        }
        fields = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        if self.counts is not None:
            arrays.update(self.counts.to_arrays())
        if self.block_continues is not None:
            arrays["block_continues"] = np.array(self.block_continues, dtype=np.bool_)
        if self.sentence_sample is not None:
            arrays["sentence_hashes"] = self.sentence_sample.hashes
            fields["sentence_limit"] = self.sentence_sample.limit
        return pack_index({**fields, "counted": self.counts is not None}, arrays)

    @classmethod
    def unpack(cls, data: bytes, name: str, cap: int) -> "Segment":
        """Return the segment that `pack` packed. Raises DataError, naming `name`, when the bytes are damaged."""
        fields, arrays = unpack_index(data, name)
        try:
            counts = WordCounter.from_arrays(arrays, cap) if fields.pop("counted") else None
            limit = fields.pop("sentence_limit", EVERYTHING)
            sample = SentenceSample(arrays["sentence_hashes"], limit) if "sentence_hashes" in arrays else None
            lists = {key: arrays[key].tolist() for key in _BLOCK_LISTS}
            lists["block_continues"] = arrays["block_continues"].tolist() if "block_continues" in arrays else None
            return cls(**fields, **lists, sentence_sample=sample, counts=counts)
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{name}: no index of a segment; delete it and run prepare again") from None

    @property
    def sentences(self) -> int:
        """Number of sentences."""
        return sum(self.block_positions) - sum(self.block_tokens)


_BLOCK_LISTS = ("block_ends", "block_positions", "block_tokens", "block_characters", "block_crc32")
_PLAIN_FIELDS = tuple(
    item.name
    for item in dataclasses.fields(Segment)
    if item.name not in (*_BLOCK_LISTS, "block_continues", "sentence_sample", "counts")
)


def segment_count(size: int) -> int:
    """Return the number of segments of a file of `size` bytes; an empty file has one."""
    return max(1, -(-size // SEGMENT_BYTES))


def scan_shard(path: str, block_bytes: int, on_error: OnError, cap: int | None = None) -> Iterator[Segment]:
    """Yield the scanned segments of a file, one after the other."""
    for number in range(segment_count(file_status(path).st_size)):
        yield scan_segment(path, number, block_bytes, on_error, cap)


def scan_segment(
    path: str,
    number: int,
    block_bytes: int,
    on_error: OnError,
    cap: int | None = None,
    source: str | None = None,
    ends: Int64 | None = None,
) -> Segment:
    """Scan the lines that begin in segment `number` of a file; with a `cap`, count words (see WordCounter).

    ends: int64 [documents], the bytes at which the documents of the text end; blocks end with them where they can.
    Errors in the text name `source`, the compressed file from which it was unpacked, where there is one. Raises
    DataError for a file that cannot be read, changes meanwhile or has a line over the limit. Unless `on_error` is
    "replace", raises it also for text that is not UTF-8 or has a NUL.
    """
    try:
        with storage.open_read(path) as file:
            status = storage.opened_status(file)
            segment = Segment(
                path, number, status.st_size, status.st_mtime_ns, block_bytes, SEGMENT_BYTES, FORMAT_VERSION
            )
            segment.counts = WordCounter(cap) if cap is not None else None
            start = line_start(file, number * SEGMENT_BYTES, status.st_size)
            end = line_start(file, (number + 1) * SEGMENT_BYTES, status.st_size)
            digest, sampler = hashlib.sha256(), SentenceSampler()
            segment.block_continues = None if ends is None else []
            for offset, data in cut_blocks(file, start, end, block_bytes, ends):
                if ends is not None and segment.block_continues is not None:
                    place = int(np.searchsorted(ends, offset))
                    segment.block_continues.append(offset > 0 and (place == len(ends) or int(ends[place]) != offset))
                digest.update(data)
                _scan_block(segment, offset, data, on_error)
                sampler.add(data.removeprefix(BYTE_ORDER_MARK))
            segment.sentence_sample = sampler.sample()
            if segment_count(status.st_size) == 1:
                segment.sha256 = digest.hexdigest()
            now = storage.opened_status(file)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except DataError as error:
        # The lines have the same numbers in the compressed file, and that is the file to be corrected.
        raise DataError(str(error).replace(path, source or path, 1)) from None
    if (now.st_size, now.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise DataError(f"{path}: changed while it was read; run prepare again")
    return segment


def hash_file(path: str) -> str:
    """Return the SHA-256 of a file, hexadecimal. Raises DataError when it cannot be read."""
    try:
        return storage.file_hash(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def join_segments(path: str, source: str, segments: Sequence[Segment], sha256: str | None = None) -> Shard:
    """Return the shard of all segments of a file, in order; the file is hashed here unless its hash is known.

    Raises DataError when the file changed between the scans of its segments.
    """
    if len({(segment.size, segment.mtime_ns) for segment in segments}) != 1:
        raise DataError(f"{path}: changed while it was read; run prepare again")
    lists = {
        name: np.array([value for segment in segments for value in getattr(segment, name)], dtype=np.int64)
        for name in _BLOCK_LISTS
    }
    tokens = int(lists["block_tokens"].sum())
    continues = [each for segment in segments for each in segment.block_continues or ()]
    return Shard(
        path=path,
        source=source,
        size=segments[0].size,
        mtime_ns=segments[0].mtime_ns,
        sentences=int(lists["block_positions"].sum()) - tokens,
        tokens=tokens,
        characters=int(lists["block_characters"].sum()),
        sha256=sha256 or segments[0].sha256 or hash_file(path),
        block_continues=None if segments[0].block_continues is None else np.array(continues, dtype=np.bool_),
        **lists,
    )


def _scan_block(segment: Segment, offset: int, data: bytes, on_error: OnError) -> None:
    """Add the block `data`, which begins at byte `offset` of the file, to the segment."""
    text, replaced = decode(data, on_error, segment.path, offset)
    words = text.split()
    if segment.counts is not None:
        segment.counts.add(words)
    # The sample for signs of untokenised text is the first block of each segment.
    if not segment.block_ends:
        segment.checked = len(words)
        segment.joined = sum(map(is_joined, words))
        segment.byte_order_mark = offset == 0 and data.startswith(BYTE_ORDER_MARK)
    _find_long_lines(segment, text, offset)
    segment.replaced += replaced
    segment.block_ends.append(offset + len(data))
    lines = count_lines(data.removeprefix(BYTE_ORDER_MARK) if offset == 0 else data)
    segment.block_positions.append(len(words) + lines)
    segment.block_tokens.append(len(words))
    segment.block_characters.append(len("".join(words)))
    segment.block_crc32.append(zlib.crc32(data))


def is_joined(word: str) -> bool:
    """Return whether punctuation sticks to the end of a word, as in "end." before tokenisation."""
    return word[-1] in ",.;:!?" and word[-2:-1].isalpha()


def _find_long_lines(segment: Segment, text: str, offset: int) -> None:
    """Add the long lines and long words of the text after the segment's last block, which begins at byte `offset`.

    Raises DataError for a word over MAX_WORD_CHARACTERS.
    """
    lines = split_lines(text)
    # n words need at least 2 n - 1 characters, and a long word has even more: most lines are settled by their length.
    if max(map(len, lines), default=0) <= 2 * LONG_LINE_WORDS:
        return
    before = segment.sentences
    for number, line in enumerate(lines):
        if len(line) <= 2 * LONG_LINE_WORDS:
            continue
        words = line.split()
        if len(words) > LONG_LINE_WORDS:
            segment.long_lines += 1
            if len(words) > segment.longest_words:
                segment.longest_words, segment.longest_line = len(words), before + number
        longest = max(map(len, words), default=0)
        if longest > MAX_WORD_CHARACTERS:
            raise DataError(
                f"{segment.path}, line {line_number(segment.path, offset) + number}: a word of {longest:,} characters; "
                "divide the line into words with blanks between them, or remove it"
            )
        long_words = sum(len(word) > LONG_WORD_CHARACTERS for word in words)
        if long_words and not segment.long_words:
            segment.long_word_line = before + number
        segment.long_words += long_words


def index_shard(path: str, block_bytes: int = 131072, on_error: OnError = "fail") -> Shard:
    """Index a text file in this process, one block in memory at a time. Raises DataError as `scan_segment` does."""
    location = storage.absolute(path)
    return join_segments(location, location, list(scan_shard(path, block_bytes, on_error)))
