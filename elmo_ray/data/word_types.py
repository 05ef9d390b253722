"""The distinct words of a batch as rows of character ids, grouped by length. U words, C characters, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from elmo_ray.data.characters import PADDING
from elmo_ray.data.vocabulary import Vocabulary

IntArray = NDArray[np.int64]

LENGTH_CLASSES = (6, 8, 10, 13, 18, 26)
"""Upper bounds, in character ids (bytes + 2), of the groups in which a batch's words go through the char CNN."""


class TypeTable:
    """Characters of the vocabulary's words, encoded once, and the grouping of a batch's words by length.

    widest: the widest filter. Words of L ids need min(C, L + widest) columns: with one window of padding the maximum
    over positions is that of all C columns (BILM.md, char CNN).
    """

    def __init__(self, vocabulary: Vocabulary, max_characters: int, widest: int):
        self.table = vocabulary.characters(max_characters)
        self.lengths = (self.table != PADDING).sum(axis=1).astype(np.int64)
        bounds = [b for b in LENGTH_CLASSES if b + widest < max_characters] + [max_characters]
        self.bounds = np.array(bounds, np.int64)
        self.columns = [min(max_characters, b + widest) for b in bounds]

    def gather(self, known: IntArray, unknown: NDArray[np.int16]) -> tuple[NDArray[np.int16], tuple, IntArray]:
        """Rows of known ids then of unknown words, sorted by class; returns types, classes and the new place of each
        row."""
        types = np.concatenate([self.table[known], unknown])
        lengths = np.concatenate([self.lengths[known], (unknown != PADDING).sum(axis=1)])
        classes = np.searchsorted(self.bounds, lengths)
        order = np.argsort(classes, kind="stable")
        counts = np.bincount(classes, minlength=len(self.bounds))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        return types[order], tuple((int(n), c) for n, c in zip(counts, self.columns, strict=True) if n), place


def distinct_types(
    inputs: IntArray,
    vocabulary: Vocabulary,
    characters: TypeTable | None,
    unknown_rows: Callable[[IntArray], NDArray[np.int16]],
) -> tuple[NDArray, tuple[tuple[int, int], ...], IntArray]:
    """The distinct words of `inputs`: types and type_classes as in `streams.Batch`, and `inputs` as indices into them.

    Numbers from the vocabulary's size on are unknown words, whose characters `unknown_rows` gives for sorted numbers;
    the same word may have several. The result depends on the words alone, not on these numbers.
    Without `characters`, types are vocabulary ids and unknown words are `<UNK>`.
    """
    if characters is None:
        known = np.where(inputs >= vocabulary.size, vocabulary.unk, inputs)
        words, places = np.unique(known, return_inverse=True)
        return words, ((len(words), 1),), places.reshape(inputs.shape)
    words, places = np.unique(inputs, return_inverse=True)
    n_known = int(np.searchsorted(words, vocabulary.size))
    # Their numbers tell in which order blocks were read, and that is another one after a resume: by their characters
    # they come in the same order, or sums over words would be taken in another.
    unknown = np.ascontiguousarray(unknown_rows(words[n_known:]))
    width = unknown.dtype.itemsize * unknown.shape[1]
    _, first, same = np.unique(unknown.view(f"V{width}").ravel(), return_index=True, return_inverse=True)
    types, classes, place = characters.gather(words[:n_known], unknown[first])
    place = np.concatenate([place[:n_known], place[n_known:][same]])
    return types, classes, place[places.reshape(inputs.shape)]
