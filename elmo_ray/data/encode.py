"""Encoding of a block of text: word ids, sentence lengths, and the characters of words outside the vocabulary.

`load_block` reads a block and encodes it. `thread_source` does so for many blocks in a thread of this process;
`elmo_ray.data.ray_source` does it in tasks of Ray.
"""

import contextlib
import itertools
import queue
import threading
import zlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from elmo_ray.data.characters import encode_words
from elmo_ray.data.corpus import Block
from elmo_ray.data.lookup import MISSING, word_bounds
from elmo_ray.data.text import BYTE_ORDER_MARK, OnError, decode, has_wide_spaces, split_lines
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import DataError
from elmo_ray.storage import read_range

T = TypeVar("T")

# Longest wait for a thread that is told to stop, and time between two looks for a stop while text is waited for.
CLOSE_S = 10.0
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True, eq=False)
class EncodedBlock:
    """Sentences of one block, without sentence markers.

    ids:      int32 [tokens]. An id >= 0 is a vocabulary id; -(k + 1) stands for row k of `unknown`.
    lengths:  int32 [sentences], the number of words of each; their sum is the length of `ids`.
    unknown:  int16 [n, C], the characters of the block's distinct unknown words in the order of their first appearance.
    replaced: the number of invalid sequences and NULs that became U+FFFD.
    """

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    unknown: npt.NDArray[np.int16]
    replaced: int = 0

    @property
    def positions(self) -> int:
        """Positions in each direction: a sentence of n words has n + 1 of them."""
        return len(self.ids) + len(self.lengths)


def encode_text(text: str, vocabulary: Vocabulary, max_characters: int = 50) -> EncodedBlock:
    """Encode text without NULs; sentences and words are those of `elmo_ray.data.text`."""
    sentences = [line.split() for line in split_lines(text)]
    lengths = np.fromiter(map(len, sentences), dtype=np.int32, count=len(sentences))
    words = list(itertools.chain.from_iterable(sentences))
    ids = np.fromiter(map(vocabulary.ids.get, words, itertools.repeat(MISSING)), dtype=np.int32, count=len(words))
    missing = np.flatnonzero(ids == MISSING)
    unknown: dict[str, int] = {}  # The row of each unknown word.
    rows = [unknown.setdefault(words[index], len(unknown)) for index in missing.tolist()]
    ids[missing] = -1 - np.asarray(rows, dtype=np.int32)
    return EncodedBlock(ids, lengths, encode_words(list(unknown), max_characters))


def encode_block(
    data: bytes,
    vocabulary: Vocabulary,
    max_characters: int = 50,
    on_error: OnError = "fail",
    path: str = "text",
    offset: int = 0,
) -> EncodedBlock:
    """Encode whole lines of UTF-8.

    They stand at byte `offset` of `path`, and the DataError for invalid bytes names this place (see `decode`). A byte
    order mark at byte 0 is no text.
    """
    text, replaced = decode(data, on_error, path, offset)
    if offset == 0:
        data = data.removeprefix(BYTE_ORDER_MARK)
    if not replaced and b"\r" not in data and not has_wide_spaces(data):
        return _encode_plain(data, vocabulary, max_characters)
    encoded = encode_text(text, vocabulary, max_characters)
    return EncodedBlock(encoded.ids, encoded.lengths, encoded.unknown, replaced)


def _encode_plain(data: bytes, vocabulary: Vocabulary, max_characters: int) -> EncodedBlock:
    """Encode UTF-8 with \\n and ASCII spaces alone: the result of `encode_text`, some three times as fast."""
    table = vocabulary.table
    padded = np.frombuffer(data + bytes(table.PADDING - len(data) % 8), dtype=np.uint8)
    starts, ends = word_bounds(padded[: len(data)])
    word_lengths = ends - starts
    line_ends = np.flatnonzero(padded[: len(data)] == ord("\n"))
    if data and not data.endswith(b"\n"):
        line_ends = np.append(line_ends, len(data))
    lengths = np.diff(np.searchsorted(starts, line_ends), prepend=0).astype(np.int32)
    ids = table.find(padded, starts, word_lengths)
    missing = np.flatnonzero(ids == MISSING)
    unknown: dict[str, int] = {}  # The row of each unknown word.
    found = []
    for start, end in zip(starts[missing].tolist(), ends[missing].tolist(), strict=True):
        word = data[start:end].decode()
        # The table has no words above LONGEST bytes; the dictionary has all.
        known = vocabulary.ids.get(word) if end - start > table.LONGEST else None
        found.append(known if known is not None else -1 - unknown.setdefault(word, len(unknown)))
    ids[missing] = np.asarray(found, dtype=np.int32)
    return EncodedBlock(ids, lengths, encode_words(list(unknown), max_characters))


class WaitInterrupted(Exception):
    """A stop was requested while text was waited for."""


def never() -> bool:
    """Return False: nothing interrupts a wait for text. A function by name, for another process can have it."""
    return False


def get_unless(interrupted: Callable[[], bool], items: queue.Queue[T]) -> T:
    """Return the next item of a queue, however long that takes. Raises WaitInterrupted when `interrupted` says so."""
    while True:
        if interrupted():
            raise WaitInterrupted
        with contextlib.suppress(queue.Empty):
            return items.get(timeout=_LOOK_EVERY_S)


def read_block(block: Block) -> bytes:
    """Return the bytes of a block. Raises DataError when the file is gone or has changed since it was indexed."""
    try:
        data = read_range(block.path, block.start, block.end)
    except OSError as error:
        raise DataError(f"{block.path}: {error.strerror}; it was there when the corpus was indexed") from None
    if len(data) != block.end - block.start:
        raise DataError(f"{block.path}: shorter than when it was indexed; run prepare again")
    if zlib.crc32(data) != block.crc32:
        raise DataError(
            f"{block.path}: bytes {block.start} to {block.end} have changed since they were indexed; run prepare again "
            "(with --fresh if the file's time of change was set back)"
        )
    return data


def load_block(
    block: Block, vocabulary: Vocabulary, max_characters: int = 50, on_error: OnError = "fail"
) -> EncodedBlock:
    """Read and encode a block, and compare it with the index.

    Raises DataError as `read_block` and `encode_block` do, and when the block has other positions than the index says.
    """
    data = read_block(block)
    encoded = encode_block(data, vocabulary, max_characters, on_error, block.path, block.start)
    # Another version of Python may take other characters as spaces; then the same bytes have other positions.
    if encoded.positions != block.positions:
        raise DataError(
            f"{block.path}: bytes {block.start} to {block.end} have {encoded.positions} positions and had "
            f"{block.positions} when they were indexed; run prepare with --fresh"
        )
    return encoded


def thread_source(
    blocks: Iterable[Block],
    vocabulary: Vocabulary,
    max_characters: int = 50,
    look_ahead: int = 8,
    on_error: OnError = "fail",
    interrupted: Callable[[], bool] = never,
) -> Generator[EncodedBlock, None, None]:
    """Yield encoded `blocks` in order, from a background thread that is `look_ahead` blocks ahead of the consumer.

    `blocks` may be endless. An error of the thread is raised by the consumer's `next` in place of its block. Closing or
    dropping the generator stops the thread and waits for it. Raises WaitInterrupted when `interrupted` returns True.
    """
    done: queue.Queue[EncodedBlock | BaseException | None] = queue.Queue(maxsize=max(1, look_ahead))
    stop = threading.Event()

    def put(item: EncodedBlock | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                done.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            for block in blocks:
                if stop.is_set():
                    return
                put(load_block(block, vocabulary, max_characters, on_error))
        except BaseException as error:  # The consumer raises it.
            put(error)
        else:
            put(None)

    thread = threading.Thread(target=work, name="encode", daemon=True)
    thread.start()
    try:
        while (item := get_unless(interrupted, done)) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        # A storage that does not answer may hold the thread for ever.
        thread.join(timeout=CLOSE_S)


@dataclass(frozen=True)
class ThreadSource:
    """`thread_source` with its arguments: a source of blocks that can be given to another process."""

    vocabulary: Vocabulary
    max_characters: int = 50
    look_ahead: int = 8
    on_error: OnError = "fail"
    interrupted: Callable[[], bool] = never

    def __call__(self, blocks: Iterable[Block]) -> Generator[EncodedBlock, None, None]:
        return thread_source(
            blocks, self.vocabulary, self.max_characters, self.look_ahead, self.on_error, self.interrupted
        )
