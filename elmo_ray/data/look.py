"""A look at a text before a week of training: sentences as they are trained on, unknown words, lengths, characters."""

from __future__ import annotations

import collections
import unicodedata
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from elmo_ray.data.corpus import Corpus
from elmo_ray.data.encode import read_block
from elmo_ray.data.text import OnError, decode, split_lines
from elmo_ray.data.vocabulary import UNKNOWN_WORD, Vocabulary
from elmo_ray.errors import short
from elmo_ray.text.unspaced import UNSPACED_ADVICE, find_unspaced

# Blocks that are read, evenly over the text: some 8 MB with data.block_bytes as it is by default.
_BLOCKS = 64
_SENTENCES = 10
_SIZES = (1_000, 10_000, 50_000, 100_000, 500_000)
_QUANTILES = (5, 50, 95, 99)
_CHARACTERS = 12
_SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class Look:
    """Look of a sample of a text.

    sentences: the words of some. unknown_words: those of them that the vocabulary lacks. sampled: the number of
    sentences of the sample. unknown: lines of the vocabulary, from the top, and the share of the text's words that are
    not among them. lengths: quantiles in percent and the words of a sentence. script: that of most letters, as Unicode
    names it. foreign: the commonest characters that do not belong to it, and their counts. repeated: the share of
    sentences of the sample that stand in it more than once. unspaced: the writing without spaces whose words were not
    separated, and an example.
    """

    sentences: list[list[str]]
    unknown_words: list[str]
    sampled: int
    unknown: list[tuple[int, float]]
    lengths: list[tuple[int, int]]
    script: str
    foreign: list[tuple[str, int]]
    repeated: float
    unspaced: tuple[str, str] | None = None

    def lines(self, name: str) -> list[str]:
        """Return the look as text; name: of the text, such as data.train."""
        found = ["", f"{name}, a sample of {self.sampled:,} sentences; | stands after each word:"]
        found += [f"  {short(_marked(words), _SHOWN_CHARACTERS)}" for words in self.sentences]
        shares = ", ".join(f"{100 * share:.2f} % with {lines:,} lines" for lines, share in self.unknown)
        found.append(f"unknown words by size of the vocabulary: {shares}")
        lengths = ", ".join(f"{words} ({part} %)" for part, words in self.lengths)
        found.append(f"words of a sentence (at most so many in this part of them): {lengths}")
        found.append(f"sentences that stand more than once: {100 * self.repeated:.1f} %")
        foreign = ", ".join(f"{shown_character(character)} ({count:,})" for character, count in self.foreign)
        found.append(f"script: {self.script}; the commonest other characters: {foreign or 'none'}")
        return found + self.warnings()

    def warnings(self) -> list[str]:
        """Return what is wrong with the text as a whole, one line each."""
        if self.unspaced is None:
            return []
        writing, word = self.unspaced
        return [
            f"not divided into words: {writing} is written without spaces, as in {short(repr(word), 60)}; "
            f"{UNSPACED_ADVICE}"
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the look as plain values; a sentence as a text with a mark after each word."""
        return {**asdict(self), "sentences": [_marked(words) for words in self.sentences]}


def shown_character(character: str) -> str:
    """Return a character with its number; one that is invisible, or would change the line, by its number alone."""
    number = f"U+{ord(character):04X}"
    category = unicodedata.category(character)
    return number if category[0] == "C" else f"{chr(0x25CC) if category[0] == 'M' else ''}{character} {number}"


def _marked(words: list[str]) -> str:
    return "".join(f"{word}|" for word in words)


def look_at(corpus: Corpus, vocabulary: Vocabulary, on_error: OnError) -> Look:
    """Return how a text looks, by blocks evenly over it. Raises DataError when a file of the corpus is gone."""
    sentences: list[list[str]] = []
    for number in corpus.spread(_BLOCKS):
        block = corpus.block(number)
        text, _ = decode(read_block(block), on_error, block.path, block.start)
        sentences += [words for line in split_lines(text) if (words := line.split())]
    counts = collections.Counter(word for words in sentences for word in words)
    total = max(1, sum(counts.values()))
    sizes = [size for size in _SIZES if size < vocabulary.size] + [vocabulary.size]
    ids = vocabulary.ids
    missing = [
        sum(count for word, count in counts.items() if ids.get(word, size) >= size or word == UNKNOWN_WORD)
        for size in sizes
    ]
    lengths = np.percentile([len(words) for words in sentences], _QUANTILES, method="higher").tolist()
    times = collections.Counter(" ".join(words) for words in sentences)
    script, foreign = _scripts(counts)
    places = np.unique(np.linspace(0, len(sentences) - 1, min(len(sentences), _SENTENCES)).astype(int)).tolist()
    shown = [sentences[place] for place in places]
    return Look(
        shown,
        sorted({word for words in shown for word in words if word not in ids or word == UNKNOWN_WORD}),
        len(sentences),
        [(size, count / total) for size, count in zip(sizes, missing, strict=True)],
        [(part, int(words)) for part, words in zip(_QUANTILES, lengths, strict=True)],
        script,
        foreign,
        sum(count for count in times.values() if count > 1) / max(1, len(sentences)),
        find_unspaced(counts),
    )


def _scripts(counts: collections.Counter[str]) -> tuple[str, list[tuple[str, int]]]:
    """Return the script of most letters, and the commonest characters that do not belong to it with their counts.

    These are letters and marks of other scripts, symbols such as emoji, and characters that are invisible; digits,
    punctuation and ASCII belong to every script.
    """
    characters: collections.Counter[str] = collections.Counter()
    for word, count in counts.items():
        for character in word:
            characters[character] += count
    scripts: collections.Counter[str] = collections.Counter()
    for character, count in characters.items():
        if character.isalpha():
            scripts[_script_of(character)] += count
    main = max(scripts, key=lambda script: scripts[script], default="none")
    foreign = [
        (character, count)
        for character, count in characters.most_common()
        if (kind := unicodedata.category(character)[0]) == "C"
        or (kind in "LM" and _script_of(character) != main)
        or (kind == "S" and not character.isascii())
    ]
    return main, foreign[:_CHARACTERS]


def _script_of(character: str) -> str:
    """Return the script of a letter or mark, such as Latin or Cyrillic; that of Chinese and Japanese is CJK."""
    # A character's name begins with its script: LATIN SMALL LETTER A, CJK UNIFIED IDEOGRAPH-4E00.
    words = unicodedata.name(character, "UNNAMED").split()
    first = words[1] if words[0] in ("FULLWIDTH", "HALFWIDTH") and len(words) > 1 else words[0]
    # Japanese is written in three scripts at a time.
    return "CJK" if first in ("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC") else first.capitalize()
