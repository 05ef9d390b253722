import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elmo_ray.data.encode import EncodedBlock, encode_block, encode_text
from elmo_ray.data.lookup import MISSING, WordTable, word_bounds
from elmo_ray.data.text import has_wide_spaces
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary

# Words that share beginnings and ends, with lengths about the borders of the 8-byte groups.
STEMS = ["a", "abcdefg", "abcdefgh", "abcdefghi", "abcdefghabcdefgh", "é" * 12, "é" * 12 + "x", "q" * 24, "q" * 25]
WORDS = sorted({stem[cut:] + end for stem in STEMS for cut in (0, 1) for end in ("", "a", "b", "abcdefgh")} - {""})


def same(one: EncodedBlock, two: EncodedBlock) -> bool:
    return all(
        getattr(one, name).dtype == getattr(two, name).dtype and np.array_equal(getattr(one, name), getattr(two, name))
        for name in ("ids", "lengths", "unknown")
    )


@settings(deadline=None)
@given(st.sets(st.sampled_from(WORDS)), st.lists(st.sampled_from([*WORDS, "\n", "\n", "\t\x0b ", "<S>", "</S>"])))
def test_bytes_give_what_strings_give(known: set[str], pieces: list[str]) -> None:
    vocabulary = Vocabulary.from_words([*SPECIAL_WORDS, *sorted(known)])
    for text in (" ".join(pieces), "".join(pieces)):
        assert not has_wide_spaces(text.encode())
        assert same(encode_block(text.encode(), vocabulary, 12), encode_text(text, vocabulary, 12))


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_any_text(text: str) -> None:
    vocabulary = Vocabulary.from_words([*SPECIAL_WORDS, "a", "é"])
    # a mark of the byte order is no part of a file's text
    assert same(encode_block(text.encode(), vocabulary), encode_text(text.removeprefix("\ufeff"), vocabulary))


def test_many_words_and_their_neighbours() -> None:
    ids = {str(number): number for number in range(0, 200_000, 2)}
    table = WordTable(ids)
    words = [str(number) for number in range(200_000)]
    data = " ".join(words).encode()
    padded = np.frombuffer(data + bytes(WordTable.PADDING - len(data) % 8), dtype=np.uint8)
    starts, ends = word_bounds(padded[: len(data)])
    found = table.find(padded, starts, ends - starts)
    assert found.tolist() == [number if number % 2 == 0 else MISSING for number in range(200_000)]


def test_wide_spaces_are_those_of_python() -> None:
    spaces = [character for character in map(chr, range(128, sys.maxunicode + 1)) if character.isspace()]
    assert len(spaces) >= 17
    assert all(has_wide_spaces(f"x{character}y".encode()) for character in spaces)
    others = "".join(c for c in map(chr, range(128, 0xD800)) if not c.isspace())
    assert not has_wide_spaces(others.encode())
    assert all(not character.split() for character in map(chr, (*range(9, 14), *range(28, 33))))
    assert all(chr(code).split() for code in {*range(1, 128)} - {*range(9, 14), *range(28, 33)})
