"""Batches of independent sentences: sentences of like length, each a row that begins at zero state.

It is the alternative to `streams`, which carries the state from one sentence to the next. Evaluation uses it.
Shapes: D directions, B rows, T window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmo_ray.data.encode import EncodedBlock
from elmo_ray.data.streams import Batch, IntArray, StreamCursors, inputs_and_targets
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.data.word_types import TypeTable, UniqueIndex, distinct_types

GATHERED_POSITIONS = 1 << 17
"""Positions collected before their sentences are sorted by length."""


@dataclass(frozen=True)
class SentenceGroup:
    """Sentences of like length, the rows of a batch.

    labels:  int64 [B], the caller's number for each sentence.
    lengths: int64 [B], positions of each sentence.
    tokens:  int64 [4, n], the inputs and targets of all collected text, as in `streams.inputs_and_targets`.
    starts:  int64 [B], the index in `tokens` at which each sentence begins.
    unknown: int16 [n unknown words, C], the characters of the unknown words.
    """

    labels: IntArray
    lengths: IntArray
    tokens: NDArray[np.int64]
    starts: IntArray
    unknown: NDArray[np.int16]

    def windows(
        self, unroll: int, vocabulary: Vocabulary, characters: TypeTable | None, directions: int
    ) -> Iterator[Batch]:
        """Yield the positions of the rows, `unroll` at a time; a row that has ended has length 0 and targets of -1."""
        unique_index = UniqueIndex(vocabulary.size + directions * len(self.lengths) * unroll)
        for first in range(0, int(self.lengths.max()), unroll):
            width = min(unroll, int(self.lengths.max()) - first)
            lengths = np.clip(self.lengths - first, 0, width)
            valid_BT = np.arange(width) < lengths[:, None]
            at_BT = np.where(valid_BT, self.starts[:, None] + first + np.arange(width), 0)
            tokens = self.tokens[:, at_BT]
            tokens[0::2, ~valid_BT] = vocabulary.bos
            tokens[1::2, ~valid_BT] = -1
            types, classes, inputs = distinct_types(
                tokens[0 : 2 * directions : 2],
                vocabulary,
                characters,
                lambda numbers: self.unknown[numbers - vocabulary.size],
                unique_index,
            )
            yield Batch(
                types,
                classes,
                inputs,
                tokens[1 : 2 * directions : 2].copy(),
                lengths,
                np.full(len(lengths), first == 0),
                StreamCursors.start(0),
            )


def sentence_groups(
    blocks: Iterable[tuple[EncodedBlock, IntArray]],
    vocabulary: Vocabulary,
    rows: int,
    gathered: int = GATHERED_POSITIONS,
) -> Iterator[SentenceGroup]:
    """Yield all sentences of the blocks once, in groups of at most `rows` sentences of like length.

    With each block comes an array of labels, one for each of its sentences. Memory holds `gathered` positions and a
    block.
    """
    waiting: list[tuple[EncodedBlock, IntArray]] = []
    positions = 0
    for block, labels in blocks:
        waiting.append((block, labels))
        positions += block.positions
        if positions >= gathered:
            yield from _group(waiting, vocabulary, rows)
            waiting, positions = [], 0
    if waiting:
        yield from _group(waiting, vocabulary, rows)


def _group(blocks: list[tuple[EncodedBlock, IntArray]], vocabulary: Vocabulary, rows: int) -> Iterator[SentenceGroup]:
    """Yield the sentences of these blocks in groups, by rising length."""
    pieces, base = [], vocabulary.size
    for block, _ in blocks:
        pieces.append(inputs_and_targets(block, vocabulary, base))
        base += len(block.unknown)
    tokens = np.concatenate(pieces, axis=1)
    unknown = np.concatenate([block.unknown for block, _ in blocks])
    labels = np.concatenate([block_labels for _, block_labels in blocks])
    lengths = np.concatenate([block.lengths for block, _ in blocks]).astype(np.int64) + 1
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(lengths, kind="stable")
    for first in range(0, len(order), rows):
        group = order[first : first + rows]
        yield SentenceGroup(labels[group], lengths[group], tokens, starts[group], unknown)
