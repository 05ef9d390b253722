"""What is counted about positions of text, against counting word by word."""

from __future__ import annotations

from elmo_ray.data.encode import encode_text
from elmo_ray.data.measures import PositionCounter
from elmo_ray.data.vocabulary import Vocabulary

VOCABULARY = Vocabulary(["<S>", "the", "</S>", "naïve", "<UNK>", "ox", "the"])
TEXT = "the ox\n\nthe zebra naïve\nnaïve </S> <UNK> the\n<S> ox\n"


def test_counts() -> None:
    known, unknown, characters = [], [], []
    for line in TEXT.split("\n")[:-1]:
        words = line.split()
        strange = [word not in VOCABULARY.ids or word == "<UNK>" for word in words]
        known += [not any(strange)] * (len(words) + 1)
        unknown += [*strange, False]
        characters += [*(0 if word not in VOCABULARY.ids else len(word) for word in words), 0]
    counts = PositionCounter(VOCABULARY).count(encode_text(TEXT, VOCABULARY))
    assert counts.known.tolist() == known
    assert counts.unknown.tolist() == unknown
    assert counts.characters.tolist() == characters
    part = counts.slice(2, 7)
    assert part.known.tolist() == known[2:7] and part.characters.tolist() == characters[2:7]


def test_no_text() -> None:
    counts = PositionCounter(VOCABULARY).count(encode_text("", VOCABULARY))
    assert len(counts.known) == len(counts.unknown) == len(counts.characters) == 0
