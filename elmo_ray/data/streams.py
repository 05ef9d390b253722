"""Streams: the rows of the global batch, and the windows of positions that they yield.

The way from a shard of text to a batch, with the files of this folder:

Step 1: `corpus.expand_paths` finds the shards of a setting, and `unpack.py` turns compressed ones into seekable text.
Step 2: `scan.py` reads each text once, in line-aligned blocks that `text.py` cuts, and counts the positions of each
        block; `indexing.py` does so in tasks and keeps their results. The outcome is the index, a `Corpus` of blocks
        (`corpus.py`). On the way `counts.py` counts the words, of which `vocabulary.py` makes the vocabulary.
Step 3: `StreamPlan` (here) shuffles the blocks of an epoch, gives each stream its positions of them, and lists these
        shares of blocks in the order in which windows need them (`BlockShare`).
Step 4: `encode.py` reads the bytes of a block and compares them with the index. It turns known words into ids, by
        `lookup.py`, and unknown words into rows of character ids, by `characters.py`; the result is an `EncodedBlock`.
        This happens ahead of need, in a thread (`encode.thread_source`) or in tasks of Ray Data (`ray_source.py`).
Step 5: `inputs_and_targets` (here) adds the sentence markers: n words become n + 1 positions in each direction.
Step 6: `StreamLoader` (here) cuts the next window of T positions from every stream, and moves the cursors.
Step 7: `word_types.py` replaces the input words of the window by indices into its distinct words, whose characters are
        sorted by length. The outcome is a `Batch`, from which `training/feeding.py` makes the input of a step.

Where Numba is, steps 5 to 7 are compiled loops (`kernels/cpu/feed.py`), which do not hold Python's lock; the forms here
give the same bits.

Evaluation of independent sentences has `sentences.py` in place of steps 3 and 6.

The blocks of an epoch in their order form one line of P positions; of S streams, stream s owns the positions
[s*P//S, (s+1)*P//S) of every epoch. A stream goes on from its cursor, which is two integers, so it can move to another
worker at any window.
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

from elmo_ray import kernels
from elmo_ray.data.corpus import Block, Corpus
from elmo_ray.data.encode import EncodedBlock
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.data.word_types import TypeClasses, TypeTable, UniqueIndex, distinct_types
from elmo_ray.errors import DataError

IntArray = NDArray[np.int64]
BlockSource = Callable[[Iterator[Block]], Iterator[EncodedBlock]]
"""A function that encodes blocks in the order in which they are requested; the iterator of requests may be endless."""


@dataclass
class StreamCursors:
    """Cursors and audit of B streams, int64 [B] each.

    epoch:  the shares that are finished.
    offset: the positions consumed of the next share.
    audit_positions: all positions ever consumed.
    audit_hash: the running CRC-32 of their target ids.
    replaced: the damaged places in the text that became U+FFFD; a block's count comes with its first position.
    """

    epoch: IntArray
    offset: IntArray
    audit_positions: IntArray
    audit_hash: IntArray
    replaced: IntArray

    @classmethod
    def start(cls, n_streams: int) -> StreamCursors:
        """Return the cursors of streams that have read nothing yet."""
        return cls(*(np.zeros(n_streams, np.int64) for _ in fields(cls)))

    def copy(self) -> StreamCursors:
        """Return a copy that shares no memory with this one."""
        return StreamCursors(*(array.copy() for array in self.arrays().values()))

    def arrays(self) -> dict[str, IntArray]:
        """Return the arrays by name, in the order of the constructor's arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class BlockShare:
    """Positions [first, last) of one block that one stream reads in one epoch."""

    stream: int
    epoch: int
    block: int
    first: int
    last: int


class StreamPlan:
    """Assignment of positions to streams: a pure function of the corpus, the number of streams, the seed and the epoch.

    epochs: None for an endless plan. Raises DataError where the corpus has no position at all.
    """

    def __init__(self, corpus: Corpus, n_streams: int, seed: int = 0, shuffle: bool = True, epochs: int | None = None):
        self.corpus = corpus
        self.n_streams = n_streams
        self.seed = seed
        self.shuffle = shuffle
        self.epochs = epochs
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
        """Return the epoch's blocks in order, and the position on the epoch's line at which each of them ends."""
        return self._order(epoch)

    def share(self, stream: int) -> tuple[int, int]:
        """Return the share of `stream`, the positions [first, last) on an epoch's line; it may be empty."""
        return stream * self.positions // self.n_streams, (stream + 1) * self.positions // self.n_streams

    def share_sizes(self) -> IntArray:
        """Return the number of positions of each stream in an epoch, int64 [S]."""
        edges = np.array([s * self.positions // self.n_streams for s in range(self.n_streams + 1)], np.int64)
        return np.diff(edges)

    def steps(self, epochs: float, unroll: int) -> int:
        """Return the number of windows of `unroll` positions until the longest stream has done `epochs` shares."""
        return int(-(-int(np.ceil(epochs * int(self.share_sizes().max()))) // unroll))

    def block_shares(self, stream: int, epoch: int, offset: int) -> Iterator[BlockShare]:
        """Yield the shares of blocks that `stream` reads from a cursor on, without end if the plan is endless."""
        lo, hi = self.share(stream)
        if lo == hi:
            return
        while self.epochs is None or epoch < self.epochs:
            blocks, ends = self.order(epoch)
            at = lo + offset  # On the epoch's line.
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
        """Yield (first window in need of it, share) for the shares of `streams`, in the order of these windows."""
        heap: list[tuple[int, int, BlockShare]] = []
        shares = {s: self.block_shares(s, int(cursors.epoch[k]), int(cursors.offset[k])) for k, s in enumerate(streams)}
        ahead = dict.fromkeys(streams, 0)  # Positions requested so far.

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

    types:   int16 [U, C], character ids of the distinct words, shorter classes first; for word-id input int64 [U],
             vocabulary ids.
    type_classes: (number of types, columns of characters that they need) for each class, in the order of `types`.
    inputs:  int64 [D, B, T], indices into `types`.
    targets: int64 [D, B, T], vocabulary ids, or -1 where there is no position.
    lengths: int64 [B], the valid positions of each row, always its first ones.
    new_block: bool [B], a block began since the last window.
    cursors: the cursors after this batch.
    """

    types: NDArray[np.int16] | IntArray
    type_classes: TypeClasses
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
    """Positions of a share of a block that wait for their window.

    tokens: int64 [4, size], as in `inputs_and_targets`.
    first: the number of the block's positions before these.
    unknown_base: the number of the block's first unknown word in `tokens`.
    unknown: the bytes of the unknown words' rows of characters.
    replaced: the damaged places of the block, if they count with this share.
    done: all its positions went into windows.
    """

    tokens: NDArray[np.int64]
    size: int
    first: int
    unknown_base: int
    unknown: bytes
    replaced: int
    done: bool = False


def inputs_and_targets(block: EncodedBlock, vocabulary: Vocabulary, unknown_base: int = 0) -> NDArray[np.int64]:
    """Return the forward inputs, forward targets, backward inputs and backward targets of a block, int64 [4, n].

    A sentence of n words gives n + 1 positions (BILM.md). As inputs, unknown words are numbered from `unknown_base`; as
    targets they are `<UNK>`.
    """
    if run := kernels.mark_sentences():
        marked: NDArray[np.int64] = run(
            block.ids, block.lengths, unknown_base, vocabulary.bos, vocabulary.eos, vocabulary.unk
        )
        return marked
    lengths = block.lengths.astype(np.int64)
    n_sentences, n_tokens = len(lengths), len(block.ids)
    ids = block.ids.astype(np.int64)
    as_input = np.where(ids < 0, unknown_base - 1 - ids, ids)
    as_target = np.where(ids < 0, vocabulary.unk, ids)
    n = n_tokens + n_sentences
    starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]]) if n_sentences else np.zeros(0, np.int64)
    # Forward, token i is the target of position forward[i].
    forward = np.arange(n_tokens) + np.repeat(np.arange(n_sentences), lengths)
    # Backward, token k of a sentence of m words is the target of the sentence's position m - 1 - k.
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
    """Iterator over the windows of `streams`, a contiguous range, from `cursors` on.

    It takes each block from `source` when a window first needs it. It ends when every stream is done, and never for an
    endless plan.

    unroll: positions of a window (T).
    characters: the table for character input, or None for word-id input (unknown words are then `<UNK>`).
    directions: 2, or 1 for a forward-only model.

    is_waiting: True while the next block has not come from the source.
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
        self.plan, self.streams, self.source, self.unroll, self.directions = plan, streams, source, unroll, directions
        self.vocabulary, self.characters = vocabulary, characters
        self.cursors = cursors.copy()
        self.is_waiting = False
        self._window = 0
        # Each row's pieces: the first one is the row's own until its end, those behind it wait.
        self._pieces: list[deque[_Piece]] = [deque() for _ in streams]
        # Of each row's first piece: the positions that went into windows, those that are left, the number of its
        # block's positions before it, and where it is in memory. Without a piece there are none left.
        self._taken, self._left, self._before = (np.zeros(len(streams), np.int64) for _ in range(3))
        self._addresses, self._strides = (np.zeros(len(streams), np.int64) for _ in range(2))
        self._open_pieces: list[_Piece] = []  # The pieces of all streams, by rising `unknown_base`.
        self._next_base = vocabulary.size
        self._unique_index = UniqueIndex(vocabulary.size + directions * len(streams) * unroll)
        self._filler = np.full((4, unroll), -1, np.int64)  # The positions of a stream that is done.
        self._filler[0::2] = vocabulary.bos
        # One generator gives the blocks to the source and the shares to `_fetch_pieces`, in the same order.
        self._requested: deque[tuple[int, BlockShare]] = deque()
        self._requests = plan.requests(streams, self.cursors, unroll)
        self._blocks = source(self._request_blocks())
        self._pending: tuple[int, BlockShare] | None = None
        self._sizes = plan.share_sizes()[streams.start : streams.stop]

    def _request_blocks(self) -> Iterator[Block]:
        """Yield the blocks for the source, and remember the share for which each is requested."""
        for request in self._requests:
            self._requested.append(request)
            yield self.plan.corpus.block(request[1].block)

    def close(self) -> None:
        """Stop the source's background work."""
        close = getattr(self._blocks, "close", None)
        if close is not None:
            close()

    def next_block(self) -> tuple[tuple[int, BlockShare], EncodedBlock] | None:
        """Return the next block of the source, with the window and the share that need it; None at its end."""
        self.is_waiting = True
        block = next(self._blocks, None)
        self.is_waiting = False
        return None if block is None else (self._requested.popleft(), block)

    def _fetch_pieces(self) -> None:
        """Take every share of the current window from the source. Raises RuntimeError when it ends too early."""
        while True:
            if self._pending is None:
                found = self.next_block()
                if found is None:
                    # Without this check all windows from here on would be empty, without an error.
                    if self._is_missing_positions():
                        raise RuntimeError("the source of encoded blocks ended before the last block")
                    return
                self._pending, self._block = found
            window, share = self._pending
            if window > self._window:
                return
            self._add(share, self._block)
            self._pending = None

    def _is_missing_positions(self) -> bool:
        """Return whether a stream still needs positions that are not in its pieces."""
        if self.plan.epochs is None:
            return bool(self._sizes.any())
        left = np.maximum((self.plan.epochs - self.cursors.epoch) * self._sizes - self.cursors.offset, 0)
        available = [sum(piece.size for piece in pieces) for pieces in self._pieces]
        return bool((left != available - self._taken).any())

    def _add(self, share: BlockShare, block: EncodedBlock) -> None:
        """Add the share's positions of a block to its stream. Raises DataError when they contradict the index."""
        tokens = inputs_and_targets(block, self.vocabulary, self._next_base)
        expected = int(self.plan.corpus.block_positions[share.block])
        if tokens.shape[1] != expected:
            path = self.plan.corpus.block(share.block).path
            raise DataError(
                f"{path}: a block has {tokens.shape[1]} positions, the index says {expected}: "
                "the file changed since it was prepared; run prepare again"
            )
        # A block that several streams share, or that is read again after a resume, is counted once.
        replaced = block.replaced if share.first == 0 else 0
        own, size = tokens[:, share.first : share.last], share.last - share.first
        piece = _Piece(own, size, share.first, self._next_base, block.unknown.tobytes(), replaced)
        self._next_base += len(block.unknown)
        row = share.stream - self.streams.start
        self._pieces[row].append(piece)
        if len(self._pieces[row]) == 1:
            self._begin_piece(row)
        self._open_pieces.append(piece)

    def _begin_piece(self, row: int) -> None:
        """Point to the first of the row's pieces, of which nothing is taken yet, or to none."""
        pieces = self._pieces[row]
        self._taken[row] = 0
        self._left[row] = pieces[0].size if pieces else 0
        self._before[row] = pieces[0].first if pieces else 0
        if pieces:
            self._addresses[row] = pieces[0].tokens.ctypes.data
            self._strides[row] = pieces[0].tokens.strides[0] // pieces[0].tokens.itemsize

    def __iter__(self) -> Iterator[Batch]:
        while self.plan.epochs is None or not self.done():
            yield self.next_batch()

    def done(self) -> bool:
        """Return whether every stream of this loader has finished its last share."""
        if self.plan.epochs is None:
            return False
        return bool(np.all((self.cursors.epoch >= self.plan.epochs) | (self._sizes == 0)))

    def next_batch(self) -> Batch:
        """Return the next window of every stream; streams that are done have targets of -1."""
        self._fetch_pieces()
        rows = len(self._pieces)
        tokens = np.empty((4, rows, self.unroll), np.int64)
        lengths = np.full(rows, self.unroll, np.int64)
        # For each row, the position in its block at which the window begins.
        into_block = self._before + self._taken
        # Most rows are in the middle of a piece, and only need a copy.
        whole = (self._left > self.unroll) & (self._taken > 0)
        others = np.flatnonzero(~whole).tolist()
        for row in others:
            lengths[row] = self._cut_row(row, tokens[:, row])
        inputs, targets, n_unknown = self._next_window(whole, tokens, lengths)
        self._taken[whole] += self.unroll
        self._left[whole] -= self.unroll
        self._window += 1
        # The start of a share counts as the start of a block, even in the middle of one.
        new_block = (np.minimum(into_block, self.cursors.offset) < self.unroll) & (lengths > 0)
        shares, self.cursors.offset = np.divmod(self.cursors.offset + lengths, np.maximum(self._sizes, 1))
        self.cursors.epoch += shares
        self.cursors.audit_positions += lengths
        types, classes, inputs = distinct_types(
            inputs, self.vocabulary, self.characters, self._unknown_rows, self._unique_index, n_unknown > 0
        )
        if others:
            self._open_pieces = [piece for piece in self._open_pieces if not piece.done]
        return Batch(types, classes, inputs, targets, lengths, new_block, self.cursors.copy())

    def _cut_row(self, row: int, tokens: NDArray[np.int64]) -> int:
        """Fill in a row's window, int64 [4, T], from as many pieces as it needs, and return its positions."""
        pieces, n = self._pieces[row], 0
        while n < self.unroll and pieces:
            piece, start = pieces[0], int(self._taken[row])
            stop = min(start + self.unroll - n, piece.size)
            tokens[:, n : n + stop - start] = piece.tokens[:, start:stop]
            n += stop - start
            if start == 0:
                self.cursors.replaced[row] += piece.replaced
            self._taken[row], self._left[row] = stop, piece.size - stop
            if stop == piece.size:
                piece.done = True
                pieces.popleft()
                self._begin_piece(row)
        tokens[:, n:] = self._filler[:, n:]
        return n

    def _next_window(
        self, whole: NDArray[np.bool_], tokens: NDArray[np.int64], lengths: IntArray
    ) -> tuple[IntArray, IntArray, int]:
        """Fill in the rows of `tokens`, int64 [4, B, T], that are `whole`, and move all audit hashes on.

        Returns inputs and targets, int64 [D, B, T], and the number of inputs that are unknown words.
        """
        hashes, n_known = self.cursors.audit_hash, self.vocabulary.size
        if run := kernels.next_window():
            places = self._addresses, self._strides, self._taken
            inputs, targets, n_unknown = run(*places, whole, tokens, lengths, hashes, self.directions, n_known)
            return inputs, targets, n_unknown
        for row in np.flatnonzero(whole).tolist():
            start = int(self._taken[row])
            tokens[:, row] = self._pieces[row][0].tokens[:, start : start + self.unroll]
        # The hash goes position by position, so it does not depend on the length of windows.
        positions = tokens[1::2].transpose(1, 2, 0).astype("<i4", order="C")
        data, row_bytes, position_bytes = positions.tobytes(), positions[0].nbytes, positions[0, 0].nbytes
        rows = zip(range(0, len(data), row_bytes), lengths.tolist(), hashes.tolist(), strict=True)
        hashes[:] = [zlib.crc32(data[at : at + n * position_bytes], before) for at, n, before in rows]
        inputs, targets = tokens[: 2 * self.directions : 2], tokens[1 : 2 * self.directions : 2].copy()
        return inputs, targets, int((inputs >= n_known).sum())

    def _unknown_rows(self, numbers: IntArray) -> NDArray[np.int16]:
        """Return the characters of unknown words, int16 [n, C], by their numbers in the pieces of this window."""
        assert self.characters is not None
        bases = np.array([piece.unknown_base for piece in self._open_pieces], np.int64)
        owners = bases.searchsorted(numbers, side="right") - 1
        width = self.characters.table[0].nbytes
        places = zip(owners.tolist(), ((numbers - bases[owners]) * width).tolist(), strict=True)
        # Each piece has few unknown words, and a slice of an array takes ten times as long as one of bytes.
        rows = b"".join([self._open_pieces[owner].unknown[at : at + width] for owner, at in places])
        return np.frombuffer(rows, np.int16).reshape(len(numbers), -1)


FEWEST_POSITIONS = 200
"""Positions that a stream of held-out text has at least."""


def held_out_streams(positions: int, most: int) -> int:
    """Return the number of streams in which `positions` of held-out text are measured: at most `most`, at least 1."""
    # The first words of a stream are predicted without context, so many short streams would measure another thing.
    return max(1, min(most, positions // FEWEST_POSITIONS))


def fewer_streams_note(subject: str, positions: int, most: int) -> str | None:
    """Return a note that says why held-out text is measured in fewer streams than evaluate.streams=`most`, or None.

    subject: the beginning of the note, such as "the text has".
    """
    streams = held_out_streams(positions, most)
    if streams == most:
        return None
    return (
        f"{subject} {positions:,} positions, so evaluate.streams={most} becomes {streams}: a stream has "
        f"{FEWEST_POSITIONS} positions or more, as its first words are predicted without context"
    )


def split_evenly(n: int, ranges: int) -> list[range]:
    """Return `ranges` contiguous ranges that tile range(n) and differ in length by at most one.

    Streams are split among workers in this way, and rows among micro-batches. The last ranges are empty where `ranges`
    is larger than `n`.
    """
    edges = [-(-i * n // ranges) for i in range(ranges + 1)]
    return [range(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def read_all(loader: StreamLoader, limit: int | None = None) -> Iterator[Batch]:
    """Yield batches until the streams are done or `limit` batches have come; then close the loader."""
    try:
        yield from islice(loader, limit)
    finally:
        loader.close()
