"""A block of text to word ids, sentence lengths and the characters of words outside the vocabulary."""

import contextlib
import itertools
import queue
import threading
import zlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elmo_ray.data.characters import encode_words
from elmo_ray.data.corpus import Block
from elmo_ray.data.lookup import MISSING, word_bounds
from elmo_ray.data.text import OnError, decode, has_wide_spaces, split_lines
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import DataError
from elmo_ray.storage import is_uri, read_range


@dataclass(frozen=True, eq=False)
class EncodedBlock:
    """The sentences of one block, without sentence markers.

    ids:      int32 [tokens]. An id >= 0 is a vocabulary id; -(k + 1) stands for row k of `unknown`.
    lengths:  int32 [sentences], words of each; their sum is the length of `ids`.
    unknown:  int16 [n, C], the characters of the block's distinct unknown words in the order of their first appearance.
    replaced: how many invalid sequences and NULs became U+FFFD.
    """

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    unknown: npt.NDArray[np.int16]
    replaced: int = 0

    @property
    def positions(self) -> int:
        """A sentence of n words has n + 1 positions in each direction."""
        return len(self.ids) + len(self.lengths)


def encode_text(text: str, vocabulary: Vocabulary, max_characters: int = 50) -> EncodedBlock:
    """Encodes text that has no NUL; sentences and words as in `elmo_ray.data.text`."""
    sentences = [line.split() for line in split_lines(text)]
    lengths = np.fromiter(map(len, sentences), dtype=np.int32, count=len(sentences))
    words = list(itertools.chain.from_iterable(sentences))
    ids = np.fromiter(map(vocabulary.ids.get, words, itertools.repeat(MISSING)), dtype=np.int32, count=len(words))
    missing = np.flatnonzero(ids == MISSING)
    rows: dict[str, int] = {}
    places = [rows.setdefault(words[index], len(rows)) for index in missing.tolist()]
    ids[missing] = -1 - np.asarray(places, dtype=np.int32)
    return EncodedBlock(ids, lengths, encode_words(list(rows), max_characters))


def encode_block(
    data: bytes,
    vocabulary: Vocabulary,
    max_characters: int = 50,
    on_error: OnError = "fail",
    path: str = "text",
    offset: int = 0,
) -> EncodedBlock:
    """Encodes whole lines of UTF-8.

    `path` and `offset` say where they stand, for the DataError of bytes that are no text (see `decode`).
    """
    text, replaced = decode(data, on_error, path, offset)
    if not replaced and b"\r" not in data and not has_wide_spaces(data):
        return _encode_plain(data, vocabulary, max_characters)
    encoded = encode_text(text, vocabulary, max_characters)
    return EncodedBlock(encoded.ids, encoded.lengths, encoded.unknown, replaced)


def _encode_plain(data: bytes, vocabulary: Vocabulary, max_characters: int) -> EncodedBlock:
    """What `encode_text` gives, some three times as fast, for UTF-8 with \\n and ASCII spaces alone."""
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
    rows: dict[str, int] = {}
    places = []
    for start, end in zip(starts[missing].tolist(), ends[missing].tolist(), strict=True):
        word = data[start:end].decode()
        known = vocabulary.ids.get(word) if end - start > table.LONGEST else None
        places.append(known if known is not None else -1 - rows.setdefault(word, len(rows)))
    ids[missing] = np.asarray(places, dtype=np.int32)
    return EncodedBlock(ids, lengths, encode_words(list(rows), max_characters))


def read_block(block: Block) -> bytes:
    """The bytes of a block; DataError when the file is gone or these are not the bytes that were indexed."""
    try:
        if is_uri(block.path):
            data = read_range(block.path, block.start, block.end)
        else:
            with open(block.path, "rb") as file:
                file.seek(block.start)
                data = file.read(block.end - block.start)
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
    """Reads and encodes a block, and holds it to the index: DataError as in `read_block` and `encode_block`.

    The same bytes have another number of positions where another version of Python takes other characters as spaces.
    """
    data = read_block(block)
    encoded = encode_block(data, vocabulary, max_characters, on_error, block.path, block.start)
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
) -> Generator[EncodedBlock, None, None]:
    """Encodes `blocks`, which may never end, in order in a background thread, `look_ahead` ahead of the consumer.

    An error of the thread is raised by the consumer's `next` in its place in the order. Closing the generator, or
    dropping it, stops the thread and waits for it.
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
        except BaseException as error:  # the consumer raises it
            put(error)
        else:
            put(None)

    thread = threading.Thread(target=work, name="encode", daemon=True)
    thread.start()
    try:
        while (item := done.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
