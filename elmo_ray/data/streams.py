"""Streams: the rows of the global batch, and the windows of positions that they yield.

The blocks of an epoch in their order form one line of P positions; stream s owns positions [s*P//S, (s+1)*P//S) of
every epoch. What a stream needs to go on is its cursor, two integers, so a stream can move to another worker at any
window.
"""

from __future__ import annotations

import heapq
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from elmo_ray.data.corpus import Block, Corpus
from elmo_ray.data.encode import EncodedBlock
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.data.word_types import Marks, TypeTable, distinct_types
from elmo_ray.errors import DataError

IntArray = NDArray[np.int64]
BlockSource = Callable[[Iterator[Block]], Iterator[EncodedBlock]]
"""Encodes blocks in the order in which they are asked for; the request iterator may be endless."""


@dataclass
class StreamCursors:
    """Where some streams are, one element a stream: shares finished, positions consumed of the next share, and the
    audit.

    `audit_positions` counts all positions ever consumed, `audit_hash` is a running CRC-32 of their target ids,
    `replaced` counts the damaged places in the text that became U+FFFD (a block's count with its first position).
    """

    epoch: IntArray
    offset: IntArray
    audit_positions: IntArray
    audit_hash: IntArray
    replaced: IntArray

    @classmethod
    def start(cls, n_streams: int) -> StreamCursors:
        return cls(*(np.zeros(n_streams, np.int64) for _ in fields(cls)))

    def copy(self) -> StreamCursors:
        return StreamCursors(*(array.copy() for array in self.arrays().values()))

    def arrays(self) -> dict[str, IntArray]:
        """Name -> values, in the order in which the constructor takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class BlockShare:
    """Positions [first, last) of one block that one stream will train on in one epoch."""

    stream: int
    epoch: int
    block: int
    first: int
    last: int


class StreamPlan:
    """Which positions belong to which stream: a pure function of corpus, S, seed and epoch.

    Raises DataError where the corpus has no position at all.
    """

    def __init__(self, corpus: Corpus, n_streams: int, seed: int = 0, shuffle: bool = True, epochs: int | None = None):
        self.corpus = corpus
        self.n_streams = n_streams
        self.seed = seed
        self.shuffle = shuffle
        self.epochs = epochs  # None: endless
        self.positions = int(corpus.block_positions.sum())
        if self.positions == 0:
            raise DataError("the corpus has no sentence in it: nothing to read")
        self._order = lru_cache(maxsize=4)(self._compute_order)

    def _compute_order(self, epoch: int) -> tuple[IntArray, IntArray]:
        n = len(self.corpus.block_positions)
        blocks = np.arange(n, dtype=np.int64)
        if self.shuffle:
            blocks = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(n).astype(np.int64)
        return blocks, np.cumsum(self.corpus.block_positions[blocks])

    def order(self, epoch: int) -> tuple[IntArray, IntArray]:
        """The epoch's blocks in order, and the position on the epoch's line at which each of them ends."""
        return self._order(epoch)

    def share(self, stream: int) -> tuple[int, int]:
        """First and last (exclusive) position on an epoch's line that `stream` owns; may be empty."""
        return stream * self.positions // self.n_streams, (stream + 1) * self.positions // self.n_streams

    def share_sizes(self) -> IntArray:
        edges = np.array([s * self.positions // self.n_streams for s in range(self.n_streams + 1)], np.int64)
        return np.diff(edges)

    def steps(self, epochs: float, unroll: int) -> int:
        """Windows of `unroll` positions until the longest stream has done `epochs` shares."""
        return int(-(-int(np.ceil(epochs * int(self.share_sizes().max()))) // unroll))

    def block_shares(self, stream: int, epoch: int, offset: int) -> Iterator[BlockShare]:
        """What `stream` reads from a cursor on, without end unless the plan has a number of epochs."""
        lo, hi = self.share(stream)
        if lo == hi:
            return
        while self.epochs is None or epoch < self.epochs:
            blocks, ends = self.order(epoch)
            at = lo + offset
            i = int(np.searchsorted(ends, at, side="right"))
            while at < hi:
                end = int(ends[i])
                start = end - int(self.corpus.block_positions[blocks[i]])
                last = min(end, hi)
                if last > at:
                    yield BlockShare(stream, epoch, int(blocks[i]), at - start, last - start)
                at = last
                i += 1
            epoch, offset = epoch + 1, 0

    def requests(self, streams: range, cursors: StreamCursors, unroll: int) -> Iterator[tuple[int, BlockShare]]:
        """The shares of `streams` in the order in which they are needed, each with the window that needs it first."""
        heap: list[tuple[int, int, BlockShare]] = []
        shares = {s: self.block_shares(s, int(cursors.epoch[k]), int(cursors.offset[k])) for k, s in enumerate(streams)}
        ahead = dict.fromkeys(streams, 0)  # positions asked for so far

        def push(stream: int) -> None:
            share = next(shares[stream], None)
            if share is not None:
                heapq.heappush(heap, (ahead[stream] // unroll, stream, share))
                ahead[stream] += share.last - share.first

        for stream in streams:
            push(stream)
        while heap:
            window, stream, share = heapq.heappop(heap)
            yield window, share
            push(stream)


@dataclass
class Batch:
    """One window of every stream of a worker. D directions, B rows, T window, U distinct words, C characters.

    types: [U, C] int16 character ids of the distinct words, shorter classes first; word-id input: [U] int64
    vocabulary ids.
    type_classes: (number of types, columns of characters that they need) in the order of `types`.
    inputs: [D, B, T] int64 indices into types.  targets: [D, B, T] int64 vocabulary ids, -1 = no position.
    lengths: [B] valid positions of each row, always its first ones.  new_block: [B] a block began since the last
    window.
    cursors: after this batch.
    """

    types: NDArray[np.int16] | IntArray
    type_classes: tuple[tuple[int, int], ...]
    inputs: IntArray
    targets: IntArray
    lengths: IntArray
    new_block: NDArray[np.bool_]
    cursors: StreamCursors

    @property
    def positions(self) -> int:
        """Positions in one direction."""
        return int(self.lengths.sum())


@dataclass
class _Piece:
    """Part of a block, as positions: rows of `tokens` are forward input, forward target, backward input, backward
    target. first: positions of the block before these. unknown: the bytes of its unknown words' rows of characters."""

    tokens: NDArray[np.int64]  # [4, size]
    size: int
    first: int
    unknown_base: int
    unknown: bytes
    replaced: int
    taken: int = 0


def block_positions(block: EncodedBlock, vocabulary: Vocabulary, unknown_base: int = 0) -> NDArray[np.int64]:
    """[4, n] forward inputs and targets, backward inputs and targets of a block (BILM.md: n words give n + 1
    positions).

    As inputs, unknown words are numbered from `unknown_base`; as targets they are `<UNK>`.
    """
    lengths = block.lengths.astype(np.int64)
    n_sentences, n_tokens = len(lengths), len(block.ids)
    ids = block.ids.astype(np.int64)
    as_input = np.where(ids < 0, unknown_base - 1 - ids, ids)
    as_target = np.where(ids < 0, vocabulary.unk, ids)
    n = n_tokens + n_sentences
    starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]]) if n_sentences else np.zeros(0, np.int64)
    forward = np.arange(n_tokens) + np.repeat(np.arange(n_sentences), lengths)  # token i is this position's target
    # backward, token k of a sentence of m words is the target of position m - 1 - k
    backward = np.repeat(2 * starts + lengths - 1, lengths) - forward
    tokens = np.empty((4, n), np.int64)
    tokens[0, starts] = vocabulary.bos
    tokens[0, forward + 1] = as_input
    tokens[1, forward] = as_target
    tokens[1, starts + lengths] = vocabulary.eos
    tokens[2, starts] = vocabulary.eos
    tokens[2, backward + 1] = as_input
    tokens[3, backward] = as_target
    tokens[3, starts + lengths] = vocabulary.bos
    return tokens


class StreamLoader:
    """Yields the windows of `streams` (a contiguous range) from `cursors` on, reading each block when it is first
    needed.

    characters: table for character input, or None for word-id input (unknown words are then `<UNK>`).
    directions: 2, or 1 for a forward-only model. Ends when every stream is done; never ends for an endless plan.
    """

    def __init__(
        self,
        plan: StreamPlan,
        streams: range,
        cursors: StreamCursors,
        source: BlockSource,
        vocabulary: Vocabulary,
        unroll: int,
        characters: TypeTable | None,
        directions: int = 2,
    ):
        self.plan, self.streams, self.unroll, self.directions = plan, streams, unroll, directions
        self.vocabulary, self.characters = vocabulary, characters
        self.cursors = cursors.copy()
        self._window = 0
        self._pieces: list[deque[_Piece]] = [deque() for _ in streams]
        self._held: list[_Piece] = []  # all of them, in the order of `unknown_base`
        self._next_base = vocabulary.size
        self._marks = Marks(vocabulary.size + directions * len(streams) * unroll)
        self._nothing = np.full((4, unroll), -1, np.int64)  # what a stream that is done yields
        self._nothing[0::2] = vocabulary.bos
        # One generator gives the order to the source and, share by share, to the loop below.
        self._asked: deque[tuple[int, BlockShare]] = deque()
        self._requests = plan.requests(streams, self.cursors, unroll)
        self._blocks = source(self._ask())
        self._pending: tuple[int, BlockShare] | None = None
        self._sizes = plan.share_sizes()[streams.start : streams.stop]

    def _ask(self) -> Iterator[Block]:
        for request in self._requests:
            self._asked.append(request)
            yield self.plan.corpus.block(request[1].block)

    def close(self) -> None:
        """Stop the source's background work."""
        close = getattr(self._blocks, "close", None)
        if close is not None:
            close()

    def _pull(self) -> None:
        """Take from the source every share that the current window needs."""
        while True:
            if self._pending is None:
                block = next(self._blocks, None)
                if block is None:
                    if self._owed():  # or windows would be empty without a word, for ever
                        raise RuntimeError("the source of encoded blocks ended before the last block")
                    return
                self._pending = self._asked.popleft()
                self._block = block
            window, share = self._pending
            if window > self._window:
                return
            self._add(share, self._block)
            self._pending = None

    def _owed(self) -> bool:
        """Whether a stream has positions to come that are not at hand."""
        if self.plan.epochs is None:
            return bool(self._sizes.any())
        left = np.maximum((self.plan.epochs - self.cursors.epoch) * self._sizes - self.cursors.offset, 0)
        at_hand = [sum(piece.size - piece.taken for piece in pieces) for pieces in self._pieces]
        return bool((left != at_hand).any())

    def _add(self, share: BlockShare, block: EncodedBlock) -> None:
        tokens = block_positions(block, self.vocabulary, self._next_base)
        expected = int(self.plan.corpus.block_positions[share.block])
        if tokens.shape[1] != expected:
            path = self.plan.corpus.block(share.block).path
            raise DataError(
                f"{path}: a block has {tokens.shape[1]} positions, the index says {expected}: "
                "the file changed since it was prepared; run prepare again"
            )
        # a block that several streams share, or that is read again after a resume, is counted once
        replaced = block.replaced if share.first == 0 else 0
        mine, size = tokens[:, share.first : share.last], share.last - share.first
        piece = _Piece(mine, size, share.first, self._next_base, block.unknown.tobytes(), replaced)
        self._next_base += len(block.unknown)
        self._pieces[share.stream - self.streams.start].append(piece)
        self._held.append(piece)

    def __iter__(self) -> Iterator[Batch]:
        while self.plan.epochs is None or not self.done():
            yield self.next_batch()

    def done(self) -> bool:
        """Whether every stream of this loader has finished its last share."""
        if self.plan.epochs is None:
            return False
        return bool(np.all((self.cursors.epoch >= self.plan.epochs) | (self._sizes == 0)))

    def next_batch(self) -> Batch:
        """The next window of every stream; streams that are done yield targets of -1."""
        self._pull()
        unroll = self.unroll
        parts: list[NDArray[np.int64]] = []
        filled: list[int] = []
        into_block: list[int] = []  # positions from the block's first to the window's
        ended = False
        for row, pieces in enumerate(self._pieces):
            into_block.append(pieces[0].first + pieces[0].taken if pieces else 0)
            n = 0
            while n < unroll and pieces:
                piece = pieces[0]
                start = piece.taken
                piece.taken = stop = min(start + unroll - n, piece.size)
                parts.append(piece.tokens[:, start:stop])
                n += stop - start
                if start == 0:
                    self.cursors.replaced[row] += piece.replaced
                if stop == piece.size:
                    pieces.popleft()
                    ended = True
            if n < unroll:
                parts.append(self._nothing[:, n:])
            filled.append(n)
        self._window += 1
        tokens = np.concatenate(parts, axis=1).reshape(4, len(filled), unroll)
        lengths = np.array(filled, np.int64)
        # a share's start in the middle of a block counts as a block's
        new_block = (np.minimum(into_block, self.cursors.offset) < unroll) & (lengths > 0)
        self._advance(lengths, tokens[1::2])
        directions = slice(0, 2 * self.directions, 2)
        types, classes, inputs = distinct_types(
            tokens[directions], self.vocabulary, self.characters, self._unknown_rows, self._marks
        )
        if ended:
            self._held = [piece for piece in self._held if piece.taken < piece.size]
        targets = tokens[1:][directions].copy()
        return Batch(types, classes, inputs, targets, lengths, new_block, self.cursors.copy())

    def _advance(self, lengths: IntArray, targets: NDArray[np.int64]) -> None:
        """Cursors after a window of so many positions of each stream; targets: [2, B, T]."""
        cursors = self.cursors
        shares, cursors.offset = np.divmod(cursors.offset + lengths, np.maximum(self._sizes, 1))
        cursors.epoch += shares
        cursors.audit_positions += lengths
        # position by position, so that windows do not matter
        positions = targets.transpose(1, 2, 0).astype("<i4", order="C")
        data, row_bytes, position_bytes = positions.tobytes(), positions[0].nbytes, positions[0, 0].nbytes
        rows = zip(range(0, len(data), row_bytes), lengths.tolist(), cursors.audit_hash.tolist(), strict=True)
        cursors.audit_hash[:] = [zlib.crc32(data[at : at + n * position_bytes], before) for at, n, before in rows]

    def _unknown_rows(self, numbers: IntArray) -> NDArray[np.int16]:
        """Characters of unknown words by their numbers, from the pieces that a window is made of."""
        assert self.characters is not None
        bases = np.array([piece.unknown_base for piece in self._held], np.int64)
        owners = bases.searchsorted(numbers, side="right") - 1
        width = self.characters.table[0].nbytes
        places = zip(owners.tolist(), ((numbers - bases[owners]) * width).tolist(), strict=True)
        # bytes and not arrays: there are few words of each piece, and a slice of an array takes ten times as long
        rows = b"".join([self._held[owner].unknown[at : at + width] for owner, at in places])
        return np.frombuffer(rows, np.int16).reshape(len(numbers), -1)


def deal(n_streams: int, workers: int) -> list[range]:
    """Contiguous ranges of streams for each worker, equal or one more on the first ones (`workers` <= `n_streams`)."""
    edges = [-(-w * n_streams // workers) for w in range(workers + 1)]
    return [range(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def read_all(loader: StreamLoader, limit: int | None = None) -> Iterator[Batch]:
    """Batches until the streams are done or `limit` batches have come; closes the loader."""
    try:
        yield from islice(loader, limit)
    finally:
        loader.close()
