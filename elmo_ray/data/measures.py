"""The simplest language model, as a yardstick: words by their frequency, with add-one smoothing.

What is counted about positions beside their losses: unknown words, code points, sentences without unknown words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmo_ray.data.corpus import Corpus
from elmo_ray.data.encode import EncodedBlock, encode_block, read_block
from elmo_ray.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class PositionCounts:
    """One element a position, in the order of the forward direction; a sentence has the same positions in both.

    known: bool, in a sentence without an unknown word. unknown: bool, the target is `<UNK>`, whether the text spells
    it so or has a word outside of the vocabulary. characters: code points of a target that is a known word, else 0.
    """

    known: NDArray[np.bool_]
    unknown: NDArray[np.bool_]
    characters: NDArray[np.int64]

    def part(self, first: int, last: int) -> PositionCounts:
        return PositionCounts(self.known[first:last], self.unknown[first:last], self.characters[first:last])


class PositionCounter:
    """Counts for blocks that were encoded with one vocabulary."""

    def __init__(self, vocabulary: Vocabulary):
        self.unk = vocabulary.unk
        self.word_lengths = np.fromiter(map(len, vocabulary.words), np.int64, vocabulary.size)

    def count(self, block: EncodedBlock) -> PositionCounts:
        """n words of a sentence give n + 1 positions; the last one's target is the sentence's end."""
        lengths = block.lengths.astype(np.int64)
        n_tokens, n_sentences = len(block.ids), len(lengths)
        sentence = np.repeat(np.arange(n_sentences), lengths)
        place = np.arange(n_tokens) + sentence
        is_unknown = (block.ids < 0) | (block.ids == self.unk)
        clean = np.bincount(sentence[is_unknown], minlength=n_sentences) == 0
        unknown = np.zeros(n_tokens + n_sentences, np.bool_)
        characters = np.zeros(n_tokens + n_sentences, np.int64)
        unknown[place] = is_unknown
        characters[place] = np.where(block.ids < 0, 0, self.word_lengths[np.maximum(block.ids, 0)])
        return PositionCounts(np.repeat(clean, lengths + 1), unknown, characters)


def add_one_perplexity(train: Corpus, test: Corpus, vocabulary: Vocabulary, on_error: str = "fail") -> float:
    """Perplexity of `test` when a target's probability is (its count in `train` + 1) / (positions + V).

    Targets are those of the biLM's forward direction: the words, unknown ones as `<UNK>`, and `</S>` after each
    sentence; the backward direction has the same value, with `<S>` in its place. Reads both texts in this process.
    """
    counts = _target_counts(train, vocabulary, on_error)
    probability = (counts + 1.0) / (counts.sum() + vocabulary.size)
    wanted = _target_counts(test, vocabulary, on_error)
    return math.exp(-float((wanted * np.log(probability)).sum()) / float(wanted.sum()))


def _target_counts(corpus: Corpus, vocabulary: Vocabulary, on_error: str) -> np.ndarray:
    counts = np.zeros(vocabulary.size, np.int64)
    for block in corpus.blocks():
        encoded: EncodedBlock = encode_block(read_block(block), vocabulary, 3, on_error, block.path, block.start)  # type: ignore[arg-type]
        counts += np.bincount(np.where(encoded.ids < 0, vocabulary.unk, encoded.ids), minlength=vocabulary.size)
        counts[vocabulary.eos] += len(encoded.lengths)
    return counts


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats, infinity beyond what a float holds."""
    return math.exp(loss) if loss < 709.0 else math.inf
