import collections
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elmo_ray.data.counts import WordCounter

WORDS = st.lists(st.lists(st.sampled_from([f"word{n}" for n in range(40)]), max_size=30), max_size=20)


@settings(deadline=None)
@given(WORDS, st.integers(2, 30))
def test_bounds_hold_whatever_is_dropped(pieces: list[list[str]], cap: int) -> None:
    counter = WordCounter(cap)
    exact: collections.Counter[str] = collections.Counter()
    for words in pieces:
        counter.add(words)
        exact.update(words)
        assert len(counter.counts) <= cap
    assert all(0 <= number - counter.counts[word] <= counter.max_missing for word, number in exact.items())
    assert sum(counter.counts.values()) + counter.pruned_tokens == sum(exact.values())
    if not counter.pruned_entries:
        assert counter.counts == exact and counter.max_missing == 0


@settings(deadline=None)
@given(WORDS, WORDS)
def test_merged_counts_are_those_of_all_words(one: list[list[str]], two: list[list[str]]) -> None:
    counters = [WordCounter(1000), WordCounter(1000)]
    for counter, pieces in zip(counters, (one, two), strict=True):
        for words in pieces:
            counter.add(words)
    counters[0].merge(counters[1])
    assert counters[0].counts == collections.Counter(word for words in (*one, *two) for word in words)


def test_frequent_words_survive_many_rare_ones() -> None:
    rng = random.Random(0)
    counter = WordCounter(1000)
    for piece in range(100):
        words = ["the"] * 50 + [f"w{rng.randrange(100)}" for _ in range(100)] + [f"rare{piece}-{n}" for n in range(100)]
        counter.add(words)
    assert counter.pruned_entries > 5000
    assert counter.counts["the"] == 5000
    assert counter.max_missing < 40
    assert all(counter.counts[f"w{n}"] for n in range(100))


def test_order_of_words() -> None:
    counter = WordCounter(100)
    counter.add("b a c a b d é e c".split())
    assert counter.by_falling_count() == [("a", 2), ("b", 2), ("c", 2), ("d", 1), ("e", 1), ("é", 1)]
    assert counter.by_falling_count(2, 2) == [("a", 2), ("b", 2)]
    counter.subtract(["a", "b", "b", "b", "unknown"])
    assert counter.by_falling_count(limit=3) == [("c", 2), ("a", 1), ("d", 1)]


def test_arrays_hold_the_whole_counter() -> None:
    counter = WordCounter(4)
    counter.add("a a a b b c d \u200b \x85é".split(" "))
    assert counter.pruned_entries
    arrays = counter.to_arrays()
    assert all(array.dtype in (np.uint8, np.int64) for array in arrays.values())
    again = WordCounter.from_arrays(arrays, 4)
    assert vars(again) == vars(counter)
