"""One pass over the text of a shard: blocks and their sizes, word counts, signs that it is not tokenised sentences."""

import dataclasses
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from elmo_ray import storage
from elmo_ray.data.corpus import Shard, pack_index, unpack_index
from elmo_ray.data.counts import WordCounter
from elmo_ray.data.text import OnError, count_lines, cut_blocks, decode, file_status, line_start, split_lines
from elmo_ray.errors import DataError

# A shard is scanned in segments of about this size, which may run at the same time. The cuts of blocks depend on it.
SEGMENT_BYTES = 64 << 20
LONG_LINE_WORDS = 250
# More characters than any model reads of a word (model.char_cnn.max_characters has this limit): not a word but data.
LONG_WORD_CHARACTERS = 1000
FORMAT_VERSION = 2
_HASH_BYTES = 4 << 20


@dataclass
class Segment:
    """What the scan of one segment found. Lists have an entry per block; `counts` is None where words were not counted.

    size, mtime_ns, sha256: of the whole file; the hash is empty where the segment is not all of it.
    checked, joined: words looked at for signs of missing tokenisation, and those that have them.
    long_lines: lines of more than LONG_LINE_WORDS words; the longest is line `longest_line` (from 0, in the segment).
    long_words: words of more than LONG_WORD_CHARACTERS; the first is in line `long_word_line` (from 0, in the segment).
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
    counts: WordCounter | None = None

    def pack(self) -> bytes:
        """The segment as the bytes of an index file."""
        blocks = {name: np.array(getattr(self, name), dtype=np.int64) for name in _BLOCK_LISTS}
        fields = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        counts = self.counts.to_arrays() if self.counts is not None else {}
        return pack_index({**fields, "counted": self.counts is not None}, {**blocks, **counts})

    @classmethod
    def unpack(cls, data: bytes, name: str, cap: int) -> "Segment":
        """The segment that `pack` was called on; DataError, naming `name`, when the bytes are damaged."""
        fields, arrays = unpack_index(data, name)
        try:
            counts = WordCounter.from_arrays(arrays, cap) if fields.pop("counted") else None
            return cls(**fields, **{key: arrays[key].tolist() for key in _BLOCK_LISTS}, counts=counts)
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{name}: no index of a segment; delete it and run prepare again") from None

    @property
    def sentences(self) -> int:
        """Sentences of the segment."""
        return sum(self.block_positions) - sum(self.block_tokens)


_BLOCK_LISTS = ("block_ends", "block_positions", "block_tokens", "block_characters", "block_crc32")
_PLAIN_FIELDS = tuple(
    item.name for item in dataclasses.fields(Segment) if item.name not in _BLOCK_LISTS and item.name != "counts"
)


def segment_count(size: int) -> int:
    """Number of segments of a file of `size` bytes; an empty file has one."""
    return max(1, -(-size // SEGMENT_BYTES))


def scan_shard(path: str, block_bytes: int, on_error: OnError, cap: int | None = None) -> Iterator[Segment]:
    """Scans all segments of a file, one after the other."""
    for number in range(segment_count(file_status(path).st_size)):
        yield scan_segment(path, number, block_bytes, on_error, cap)


def scan_segment(
    path: str, number: int, block_bytes: int, on_error: OnError, cap: int | None = None, source: str | None = None
) -> Segment:
    """Scans the lines that begin in segment `number` of a file; counts words when there is a `cap` (see WordCounter).

    Errors in the text name `source`, the compressed file that it was unpacked from, where there is one.
    Raises DataError for a file that cannot be read, changes meanwhile, has a line over the limit, or, unless `on_error`
    is "replace", is not UTF-8 or has a NUL.
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
            digest = hashlib.sha256()
            for offset, data in cut_blocks(file, start, end, block_bytes):
                digest.update(data)
                _scan_block(segment, offset, data, on_error)
            if segment_count(status.st_size) == 1:
                segment.sha256 = digest.hexdigest()
            now = storage.opened_status(file)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except DataError as error:
        # The lines have the same numbers there, and that is the file to be corrected.
        raise DataError(str(error).replace(path, source or path, 1)) from None
    if (now.st_size, now.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise DataError(f"{path}: changed while it was read; run prepare again")
    return segment


def hash_file(path: str) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    try:
        with storage.open_read(path) as file:
            while data := file.read(_HASH_BYTES):
                digest.update(data)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    return digest.hexdigest()


def join_segments(path: str, source: str, segments: Sequence[Segment], sha256: str | None = None) -> Shard:
    """The shard of these segments, which are all of the file's in order; hashes the file unless its hash is given."""
    if len({(segment.size, segment.mtime_ns) for segment in segments}) != 1:
        raise DataError(f"{path}: changed while it was read; run prepare again")
    lists = {
        name: np.array([value for segment in segments for value in getattr(segment, name)], dtype=np.int64)
        for name in _BLOCK_LISTS
    }
    tokens = int(lists["block_tokens"].sum())
    return Shard(
        path=path,
        source=source,
        size=segments[0].size,
        mtime_ns=segments[0].mtime_ns,
        sentences=int(lists["block_positions"].sum()) - tokens,
        tokens=tokens,
        characters=int(lists["block_characters"].sum()),
        sha256=sha256 or segments[0].sha256 or hash_file(path),
        **lists,
    )


def _scan_block(segment: Segment, offset: int, data: bytes, on_error: OnError) -> None:
    text, replaced = decode(data, on_error, segment.path, offset)
    words = text.split()
    if segment.counts is not None:
        segment.counts.add(words)
    # The signs of untokenised text are looked for in a sample: the first block of each segment.
    if not segment.block_ends:
        segment.checked = len(words)
        segment.joined = sum(map(_is_joined, words))
        segment.byte_order_mark = offset == 0 and text.startswith("\ufeff")
    _find_long_lines(segment, text)
    segment.replaced += replaced
    segment.block_ends.append(offset + len(data))
    segment.block_positions.append(len(words) + count_lines(data))
    segment.block_tokens.append(len(words))
    segment.block_characters.append(len("".join(words)))
    segment.block_crc32.append(zlib.crc32(data))


def _is_joined(word: str) -> bool:
    """Whether punctuation sticks to a word, as in "end." before tokenisation."""
    return word[-1] in ",.;:!?" and word[-2:-1].isalpha()


def _find_long_lines(segment: Segment, text: str) -> None:
    lines = split_lines(text)
    # n words need at least 2 n - 1 characters, so most lines are settled by their length; a long word has more.
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
        long_words = sum(len(word) > LONG_WORD_CHARACTERS for word in words)
        if long_words and not segment.long_words:
            segment.long_word_line = before + number
        segment.long_words += long_words


def index_shard(path: str, block_bytes: int = 131072, on_error: OnError = "fail") -> Shard:
    """Indexes a text file in this process, a block in memory at a time. DataError as in `elmo_ray.data.scan`."""
    place = storage.absolute(path)
    return join_segments(place, place, list(scan_shard(path, block_bytes, on_error)))
