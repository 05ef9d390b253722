"""Words of a quick look at a model: those asked for, and globs of them, or frequent words of the vocabulary itself."""

from __future__ import annotations

from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.elmo.neighbours import FREQUENT, words_to_show


def test_words_of_the_vocabulary_itself() -> None:
    thai = [",", "ที่", ".", "การ", "เป็น", "7", "ใน", "และ"]
    shown = words_to_show(Vocabulary.from_words([*SPECIAL_WORDS, *thai]))
    assert shown == ["ที่", "การ", "ใน"]  # words with a letter, at the ranks 1, 2 and 4
    large = words_to_show(Vocabulary.from_words([*SPECIAL_WORDS, *(f"w{number}" for number in range(2000))]))
    assert large == [f"w{2**power - 1}" for power in range(10)]


def test_words_that_are_asked_for() -> None:
    words = ["the", "then", "*", "cat", *(f"t{number}" for number in range(FREQUENT)), "theory"]
    vocabulary = Vocabulary.from_words([*SPECIAL_WORDS, *words])
    assert words_to_show(vocabulary, ["cat", "the*", "*", "cat"]) == ["cat", "the", "then", "*"]
    assert words_to_show(vocabulary, ["t*"])[:4] == ["the", "then", "t0", "t1"]
    assert len(words_to_show(vocabulary, ["t*"])) == 20
    assert words_to_show(vocabulary, ["zz*", "theory"]) == ["zz*", "theory"]
