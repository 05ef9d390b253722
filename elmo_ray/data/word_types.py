"""The distinct words of a batch as rows of character ids, grouped by length for the char CNN.

`TypeTable` and `distinct_types` serve batches of a corpus, whose known words have ids; `distinct_rows` and
`sort_by_length` serve words of any text, which are only rows of characters.
Shapes: N words, U distinct words, C characters, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from elmo_ray import kernels
from elmo_ray.data.characters import PADDING, encode_words, sentence_marker_rows
from elmo_ray.data.vocabulary import SENTENCE_BEGIN_WORD, SENTENCE_END_WORD, Vocabulary

IntArray = NDArray[np.int64]
TypeClasses = tuple[tuple[int, int], ...]
"""For each group of words, in the order of the words: (number of words, columns of characters that they need)."""

LENGTH_CLASSES = (6, 8, 10, 13, 18, 26)
"""Upper bounds, in character ids (bytes + 2), of the groups in which a batch's words go through the char CNN."""


class _LengthClasses:
    """Groups of words by length, for words of `max_characters` ids and filters of a width up to `widest`.

    columns: the columns of characters that the words of each class need. Words of L ids need min(C, L + widest): with
    one window of padding the maximum over positions is that of all C columns (BILM.md, char CNN).
    """

    def __init__(self, max_characters: int, widest: int):
        bounds = [b for b in LENGTH_CLASSES if b + widest < max_characters] + [max_characters]
        self._bounds = np.array(bounds, np.int64)
        self.columns = [min(max_characters, b + widest) for b in bounds]

    def of(self, rows_NC: NDArray[np.int16]) -> NDArray[np.int8]:
        """Return the class of each row, int8 [N]."""
        # numpy sorts numbers of this type by counting.
        return np.searchsorted(self._bounds, (rows_NC != PADDING).sum(axis=1)).astype(np.int8)

    def sort(self, classes_N: NDArray[np.int8]) -> tuple[IntArray, TypeClasses, IntArray]:
        """Return the order of the words by class, the classes that are there, and the new index of each word."""
        order = np.argsort(classes_N, kind="stable")
        counts = np.bincount(classes_N, minlength=len(self._bounds))
        index = np.empty(len(order), np.int64)
        index[order] = np.arange(len(order))
        return order, self.type_classes(counts), index

    def type_classes(self, counts: IntArray) -> TypeClasses:
        """Return the classes that are there. counts: the number of words of each class."""
        return tuple((n, c) for n, c in zip(counts.tolist(), self.columns, strict=True) if n)


class TypeTable:
    """Characters of the vocabulary's words, encoded once, and the grouping of a batch's words by length.

    table:   int16 [V, C], the character ids of the words.
    classes: int8 [V], the length class of each word.
    columns: the columns of characters that the words of each class need, for filters of a width up to `widest`.
    """

    def __init__(self, vocabulary: Vocabulary, max_characters: int, widest: int):
        self.table = vocabulary.characters(max_characters)
        self._length_classes = _LengthClasses(max_characters, widest)
        self.columns = self._length_classes.columns
        self.classes = self._length_classes.of(self.table)

    def gather(self, known: IntArray, unknown: NDArray[np.int16]) -> tuple[NDArray[np.int16], TypeClasses, IntArray]:
        """Return the rows of known ids and then of unknown words, sorted by class.

        The results are the types, int16 [U, C]; their classes; and the index in the types of each of the rows before
        they were sorted, int64 [U].
        """
        types = np.concatenate([self.table.take(known, axis=0), unknown])
        classes = np.concatenate([self.classes[known], self._length_classes.of(unknown)])
        order, type_classes, index = self._length_classes.sort(classes)
        return types.take(order, axis=0), type_classes, index

    def types_of(
        self, ids: IntArray, unknown: NDArray[np.int16], unique_index: UniqueIndex
    ) -> tuple[NDArray[np.int16], TypeClasses, IntArray]:
        """Return the distinct words among `ids`, sorted by class: types, type_classes and the index of each of the ids.

        unknown: int16 [n, C], the characters of the unknown words, which have the n ids behind those of the vocabulary
        and are all among the ids.
        """
        if run := kernels.types_by_class():
            types, counts, index = run(
                ids,
                unknown,
                self._length_classes.of(unknown),
                self.table,
                self.classes,
                len(self.columns),
                unique_index.eights,
                unique_index.index_of,
            )
            return types, self._length_classes.type_classes(counts), index
        words = unique_index.unique(ids)
        types, type_classes, index = self.gather(words[: len(words) - len(unknown)], unknown)
        return types, type_classes, index.take(unique_index.index_of.take(ids))


class UniqueIndex:
    """Finder of the distinct ids among ids from 0 to n - 1, for one thread.

    index_of: int64 [n], for each id of the last call its index in that call's result; other elements have no meaning.
    eights: uint64, the mark of each id as a byte, all 0 between calls; loops look at eight of them at a time.
    """

    # Ids are marked in a table, for np.unique sorts: that takes twice as long for a thousand ids, ten times as long for
    # fifteen thousand, and longer than a step for the ids of many workers. The tables are kept, because clearing memory
    # of the vocabulary's size in every step takes longer than all the rest.

    def __init__(self, n: int):
        self.eights = np.zeros(-(-n // 8), np.uint64)
        self._seen = self.eights.view(np.bool_)
        self.index_of = np.empty(n, np.int64)

    def unique(self, ids: IntArray) -> IntArray:
        """Return the distinct ids of an array [N], in order."""
        if run := kernels.distinct_ids():
            found: IntArray = run(ids, self.eights, self.index_of)
            return found
        self._seen[ids] = True
        found = np.flatnonzero(self._seen)
        self._seen[found] = False
        self.index_of[found] = np.arange(len(found))
        return found


def distinct_types(
    inputs: IntArray,
    vocabulary: Vocabulary,
    characters: TypeTable | None,
    unknown_rows: Callable[[IntArray], NDArray[np.int16]],
    unique_index: UniqueIndex | None = None,
    has_unknown: bool = True,
) -> tuple[NDArray, TypeClasses, IntArray]:
    """Return the distinct words of `inputs`: types, type_classes and inputs as in `streams.Batch`.

    inputs: ids of any shape. Numbers from the vocabulary's size on are unknown words, and the same word may have
    several. The result depends on the words alone, not on these numbers.
    characters: without it, types are vocabulary ids, and unknown words are `<UNK>`.
    unknown_rows: returns the characters, int16 [n, C], of n such numbers.
    unique_index: for as many ids as the vocabulary and `inputs` have together.
    has_unknown: False where the caller knows that no word is unknown.
    """
    n_known, ids = vocabulary.size, inputs.ravel()
    unique_index = unique_index or UniqueIndex(n_known + len(ids))
    if characters is None:
        ids = np.where(ids >= n_known, vocabulary.unk, ids) if has_unknown else ids
        words = unique_index.unique(ids)
        return words, ((len(words), 1),), unique_index.index_of.take(ids).reshape(inputs.shape)
    at = np.flatnonzero(ids >= n_known) if has_unknown else np.zeros(0, np.int64)
    unknown = np.zeros((0, characters.table.shape[1]), np.int16)
    if len(at):
        # The numbers of unknown words depend on the order in which blocks were read, which differs after a resume.
        # Sorted by their characters, the words come in the same order, and so do the terms of sums over words.
        rows = np.ascontiguousarray(unknown_rows(ids[at]))
        distinct, row_index = np.unique(rows.view(f"V{rows[0].nbytes}").ravel(), return_inverse=True)
        unknown = distinct.view(np.int16).reshape(len(distinct), -1)
        ids = ids.copy()
        ids[at] = n_known + row_index
    types, type_classes, index = characters.types_of(ids, unknown, unique_index)
    return types, type_classes, index.reshape(inputs.shape)


def distinct_rows(chars_NC: NDArray[np.int16]) -> tuple[NDArray[np.int16], IntArray]:
    """Return the distinct rows, [U, C], by their first appearance, and the index of each row in them, int64 [N]."""
    rows = np.ascontiguousarray(chars_NC)
    row_bytes = np.dtype((np.void, rows.shape[1] * rows.itemsize))
    seen: dict[bytes, int] = {}
    keys: list[bytes] = rows.view(row_bytes).ravel().tolist()  # type: ignore[assignment]
    index = np.fromiter((seen.setdefault(key, len(seen)) for key in keys), np.int64, len(keys))
    distinct = np.frombuffer(b"".join(seen), dtype=np.int16).reshape(len(seen), rows.shape[1])
    return distinct, index


def sort_by_length(types_UC: NDArray[np.int16], widest: int) -> tuple[NDArray[np.int16], TypeClasses, IntArray]:
    """Return the types sorted by length class, the classes, and the new index of each type, int64 [U].

    widest: the width of the widest filter.
    """
    length_classes = _LengthClasses(types_UC.shape[1], widest)
    order, type_classes, index = length_classes.sort(length_classes.of(types_UC))
    return types_UC[order], type_classes, index


def encode_with_markers(words: Sequence[str], max_characters: int) -> NDArray[np.int16]:
    """Return the character ids of each word, int16 [N, C]; as in bilm-tf, `<S>` and `</S>` are the sentence markers."""
    chars_NC = encode_words(words, max_characters)
    for marker, row in zip((SENTENCE_BEGIN_WORD, SENTENCE_END_WORD), sentence_marker_rows(max_characters), strict=True):
        chars_NC[[word == marker for word in words]] = row
    return chars_NC
