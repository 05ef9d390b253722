"""What is counted about positions beside their losses: unknown words, code points, sentences without unknown words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmo_ray.data.encode import EncodedBlock
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
