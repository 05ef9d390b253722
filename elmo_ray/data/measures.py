"""Measures of text beside a model's losses.

`PositionCounter` counts unknown words, code points and sentences without unknown words, position by position.
`add_one_perplexity` is the perplexity of the simplest language model, as a yardstick: the frequency of each word, with
add-one smoothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmo_ray.data.corpus import Corpus
from elmo_ray.data.encode import EncodedBlock, encode_block, read_block
from elmo_ray.data.text import OnError
from elmo_ray.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class PositionCounts:
    """Counts of n positions, in the order of the forward direction; a sentence has the same positions in both.

    known:      bool [n], the position is in a sentence without an unknown word.
    unknown:    bool [n], the target is `<UNK>`: the text spells it so, or has a word outside of the vocabulary.
    characters: int64 [n], the code points of a target that is a known word, otherwise 0.
    """

    known: NDArray[np.bool_]
    unknown: NDArray[np.bool_]
    characters: NDArray[np.int64]

    def slice(self, first: int, last: int) -> PositionCounts:
        """Return the counts of positions [first, last)."""
        return PositionCounts(self.known[first:last], self.unknown[first:last], self.characters[first:last])


class PositionCounter:
    """Counter for blocks that were encoded with one vocabulary."""

    def __init__(self, vocabulary: Vocabulary):
        self.unk = vocabulary.unk
        self.word_lengths = np.fromiter(map(len, vocabulary.words), np.int64, vocabulary.size)

    def count(self, block: EncodedBlock) -> PositionCounts:
        """Return the counts of a block: n words of a sentence give n + 1 positions, the last with the target `</S>`."""
        lengths = block.lengths.astype(np.int64)
        n_tokens, n_sentences = len(block.ids), len(lengths)
        sentence = np.repeat(np.arange(n_sentences), lengths)
        position = np.arange(n_tokens) + sentence  # The position that has each token as its target.
        is_unknown = (block.ids < 0) | (block.ids == self.unk)
        clean = np.bincount(sentence[is_unknown], minlength=n_sentences) == 0
        unknown = np.zeros(n_tokens + n_sentences, np.bool_)
        characters = np.zeros(n_tokens + n_sentences, np.int64)
        unknown[position] = is_unknown
        characters[position] = np.where(block.ids < 0, 0, self.word_lengths[np.maximum(block.ids, 0)])
        return PositionCounts(np.repeat(clean, lengths + 1), unknown, characters)


def add_one_perplexity(train: Corpus, test: Corpus, vocabulary: Vocabulary, on_error: OnError = "fail") -> float:
    """Return the perplexity of `test` when a target's probability is (its count in `train` + 1) / (positions + V).

    The targets are those of the forward direction: the words, unknown ones as `<UNK>`, and `</S>` after each sentence.
    The backward direction has the same value, with `<S>` in the place of `</S>`. Both texts are read in this process.
    """
    counts = _target_counts(train, vocabulary, on_error)
    probability = (counts + 1.0) / (counts.sum() + vocabulary.size)
    wanted = _target_counts(test, vocabulary, on_error)
    return math.exp(-float((wanted * np.log(probability)).sum()) / float(wanted.sum()))


def _target_counts(corpus: Corpus, vocabulary: Vocabulary, on_error: OnError) -> NDArray[np.int64]:
    """Return the number of positions of each target, int64 [V]."""
    counts = np.zeros(vocabulary.size, np.int64)
    for block in corpus.blocks():
        # No characters are needed, so unknown words are encoded in the fewest ids.
        encoded = encode_block(read_block(block), vocabulary, 3, on_error, block.path, block.start)
        counts += np.bincount(np.where(encoded.ids < 0, vocabulary.unk, encoded.ids), minlength=vocabulary.size)
        counts[vocabulary.eos] += len(encoded.lengths)
    return counts


def perplexity(loss: float) -> float:
    """Return exp of a mean loss in nats, or infinity where a float cannot hold it."""
    return math.exp(loss) if loss < 709.0 else math.inf
