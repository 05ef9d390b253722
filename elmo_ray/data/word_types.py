"""The distinct words of a batch as rows of character ids, grouped by length. U words, C characters, V vocabulary.

The distinct words among rows of character ids, grouped by length. N words, U distinct words, C characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from elmo_ray.data.characters import PADDING, encode_words, sentence_marker_rows
from elmo_ray.data.vocabulary import SENTENCE_BEGIN_WORD, SENTENCE_END_WORD, Vocabulary

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
        bounds = [b for b in LENGTH_CLASSES if b + widest < max_characters] + [max_characters]
        self.bounds = np.array(bounds, np.int64)
        self.columns = [min(max_characters, b + widest) for b in bounds]
        self.classes = self._classes(self.table)

    def _classes(self, rows: NDArray[np.int16]) -> NDArray[np.int8]:
        """Which of the classes each row belongs to, in a type that numpy sorts by counting."""
        return np.searchsorted(self.bounds, (rows != PADDING).sum(axis=1)).astype(np.int8)

    def gather(self, known: IntArray, unknown: NDArray[np.int16]) -> tuple[NDArray[np.int16], tuple, IntArray]:
        """Rows of known ids then of unknown words, sorted by class; returns types, classes and the new place of each
        row."""
        types = np.concatenate([self.table.take(known, axis=0), unknown])
        classes = np.concatenate([self.classes[known], self._classes(unknown)])
        order = np.argsort(classes, kind="stable")
        counts = np.bincount(classes, minlength=len(self.bounds))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        found = tuple((n, columns) for n, columns in zip(counts.tolist(), self.columns, strict=True) if n)
        return types.take(order, axis=0), found, place


class Marks:
    """Finds the distinct ones among ids from 0 to n - 1, for one thread.

    By marking them in tables: np.unique sorts, which takes twice as long for a thousand ids, ten times for fifteen
    thousand, and longer than a step for those of many workers. The tables are kept, for clearing memory of the
    vocabulary's size at every step takes longer than all the rest.
    """

    def __init__(self, n: int):
        self._marks = np.zeros(n, np.bool_)
        self.place = np.empty(n, np.int64)
        """Of each id that the last call found its place among them; what the others have means nothing."""

    def distinct(self, ids: IntArray) -> IntArray:
        """The distinct ids in order."""
        self._marks[ids] = True
        found = np.flatnonzero(self._marks)
        self._marks[found] = False
        self.place[found] = np.arange(len(found))
        return found


def distinct_types(
    inputs: IntArray,
    vocabulary: Vocabulary,
    characters: TypeTable | None,
    unknown_rows: Callable[[IntArray], NDArray[np.int16]],
    marks: Marks | None = None,
) -> tuple[NDArray, tuple[tuple[int, int], ...], IntArray]:
    """The distinct words of `inputs`: types and type_classes as in `streams.Batch`, and `inputs` as indices into them.

    Numbers from the vocabulary's size on are unknown words, whose characters `unknown_rows` gives; the same word may
    have several. The result depends on the words alone, not on these numbers.
    Without `characters`, types are vocabulary ids and unknown words are `<UNK>`.
    marks: for as many ids as the vocabulary and `inputs` have together.
    """
    n_known, ids = vocabulary.size, inputs.ravel()
    marks = marks or Marks(n_known + len(ids))
    if characters is None:
        ids = np.where(ids >= n_known, vocabulary.unk, ids)
        words = marks.distinct(ids)
        return words, ((len(words), 1),), marks.place.take(ids).reshape(inputs.shape)
    at = np.flatnonzero(ids >= n_known)
    unknown = np.zeros((0, characters.table.shape[1]), np.int16)
    if len(at):
        # Their numbers tell in which order blocks were read, and that is another one after a resume: by their
        # characters they come in the same order, or sums over words would be taken in another.
        rows = np.ascontiguousarray(unknown_rows(ids[at]))
        distinct, places = np.unique(rows.view(f"V{rows[0].nbytes}").ravel(), return_inverse=True)
        unknown = distinct.view(np.int16).reshape(len(distinct), -1)
        ids = ids.copy()
        ids[at] = n_known + places
    words = marks.distinct(ids)
    types, classes, place = characters.gather(words[: len(words) - len(unknown)], unknown)
    return types, classes, place.take(marks.place.take(ids)).reshape(inputs.shape)


Classes = tuple[tuple[int, int], ...]


def distinct_rows(chars_NC: NDArray[np.int16]) -> tuple[NDArray[np.int16], IntArray]:
    """[U, C] rows in the order of their first appearance, and for each of the N rows its place among them."""
    rows = np.ascontiguousarray(chars_NC)
    row_bytes = np.dtype((np.void, rows.shape[1] * rows.itemsize))
    seen: dict[bytes, int] = {}
    keys: list[bytes] = rows.view(row_bytes).ravel().tolist()  # type: ignore[assignment]
    places = np.fromiter((seen.setdefault(key, len(seen)) for key in keys), np.int64, len(keys))
    distinct = np.frombuffer(b"".join(seen), dtype=np.int16).reshape(len(seen), rows.shape[1])
    return distinct, places


def by_length(types_UC: NDArray[np.int16], widest: int) -> tuple[NDArray[np.int16], Classes, IntArray]:
    """Types sorted by the classes of `word_types.LENGTH_CLASSES`, the classes as (words, columns), and the new place of
    each type. widest: the widest filter."""
    most = types_UC.shape[1]
    bounds = [b for b in LENGTH_CLASSES if b + widest < most] + [most]
    classes = np.searchsorted(bounds, (types_UC != PADDING).sum(axis=1))
    order = np.argsort(classes, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    counts = np.bincount(classes, minlength=len(bounds))
    columns = (min(most, b + widest) for b in bounds)
    return types_UC[order], tuple((int(n), c) for n, c in zip(counts, columns, strict=True) if n), place


def encode_with_markers(words: Sequence[str], max_characters: int) -> NDArray[np.int16]:
    """[N, C] character ids; `<S>` and `</S>` in the text are the sentence markers, as in bilm-tf."""
    chars_NC = encode_words(words, max_characters)
    for marker, row in zip((SENTENCE_BEGIN_WORD, SENTENCE_END_WORD), sentence_marker_rows(max_characters), strict=True):
        chars_NC[[word == marker for word in words]] = row
    return chars_NC
