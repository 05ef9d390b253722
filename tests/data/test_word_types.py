"""The distinct words of a batch: each once, in an order that the words alone decide."""

from __future__ import annotations

import numpy as np

from elmo_ray.data.characters import encode_words
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.data.word_types import TypeTable, UniqueIndex, distinct_types

C = 12


def test_marks_find_what_sorting_finds_time_after_time() -> None:
    random, unique_index = np.random.default_rng(1), UniqueIndex(90)
    for size in (40, 1, 0, 500, 7):
        ids = random.integers(0, 90, size)
        expected, places = np.unique(ids, return_inverse=True)
        assert np.array_equal(unique_index.unique(ids), expected) and np.array_equal(unique_index.index_of[ids], places)


def test_numbers_of_unknown_words_do_not_matter() -> None:
    vocabulary = Vocabulary([*SPECIAL_WORDS, "the", "a", "extraordinary"])
    table, size = TypeTable(vocabulary, C, 3), vocabulary.size
    text = ["zebra", "the", "ox", "extraordinary", "ox", "a", "ant", "zebra", "the", "ant"]
    results = []
    for words in (["zebra", "ox", "ant"], ["ant", "ox", "zebra", "ox", "zebra", "?"]):
        # the last number of a word that has several, and the first one where it comes again
        last = {word: size + i for i, word in enumerate(words)}
        first = {word: size + i for i, word in reversed(list(enumerate(words)))}
        inputs = np.array(
            [vocabulary.ids.get(w, (first if w in text[:i] else last).get(w)) for i, w in enumerate(text)]
        )
        rows = encode_words(words, C)
        results.append(distinct_types(inputs.reshape(2, 1, 5), vocabulary, table, lambda n, rows=rows: rows[n - size]))
    (types, classes, places), others = results[0], results[1]
    assert np.array_equal(types[places.ravel()], encode_words(text, C)) and len(types) == 6
    assert np.array_equal(types, others[0]) and classes == others[1] and np.array_equal(places, others[2])
