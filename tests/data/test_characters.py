import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elmo_ray.data.characters import PADDING, WORD_BEGIN, WORD_END, encode_words, sentence_marker_rows


def spell(word: str, max_characters: int) -> list[int]:
    """The definition, one word at a time."""
    body = list(word.encode("utf-8", "ignore"))[: max_characters - 2]
    row = [WORD_BEGIN, *body, WORD_END]
    return row + [PADDING] * (max_characters - len(row))


@settings(deadline=None)
@given(st.lists(st.text(max_size=70), max_size=40), st.integers(3, 60))
def test_rows_are_spelt_word_by_word(words: list[str], max_characters: int) -> None:
    rows = encode_words(words, max_characters)
    assert rows.dtype == np.int16
    assert rows.shape == (len(words), max_characters)
    assert rows.tolist() == [spell(word, max_characters) for word in words]


def test_many_words_are_encoded_in_pieces() -> None:
    words = [str(number) for number in range(70_000)]
    rows = encode_words(words, 8)
    for index in (0, 65_535, 65_536, 69_999):
        assert rows[index].tolist() == spell(words[index], 8)


def test_cut_inside_a_character() -> None:
    row = encode_words(["a" + "é" * 30], 50)[0].tolist()
    assert row == [258, ord("a"), *[0xC3, 0xA9] * 23, 0xC3, 259]


def test_sentence_markers() -> None:
    rows = sentence_marker_rows(6)
    assert rows.tolist() == [[258, 256, 259, 260, 260, 260], [258, 257, 259, 260, 260, 260]]
