"""The distinct words among rows of character ids, grouped by length. N words, U distinct words, C characters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from elmo_ray.data.characters import PADDING, encode_words, sentence_marker_rows
from elmo_ray.data.vocabulary import SENTENCE_BEGIN_WORD, SENTENCE_END_WORD
from elmo_ray.data.word_types import LENGTH_CLASSES

IntArray = NDArray[np.int64]
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
