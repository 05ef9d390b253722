"""The word vocabulary: a file with one word a line, by falling count, read exactly as bilm-tf reads it."""

import functools
import hashlib
import os
from collections.abc import Container, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from elmo_ray import storage
from elmo_ray.data.characters import encode_words, sentence_marker_rows
from elmo_ray.data.lookup import WordTable
from elmo_ray.data.text import split_lines
from elmo_ray.data.unpack import unpacked_bytes
from elmo_ray.errors import DataError
from elmo_ray.storage import is_uri
from elmo_ray.storage.files import write_aside

SENTENCE_BEGIN_WORD = "<S>"
SENTENCE_END_WORD = "</S>"
UNKNOWN_WORD = "<UNK>"
SPECIAL_WORDS = (SENTENCE_BEGIN_WORD, SENTENCE_END_WORD, UNKNOWN_WORD)
# The original skips this line and gives it no id.
SKIPPED_WORD = "!!!MAXTERMID"
SPECIAL_IN_OTHER_FORMS = {
    "<s>": SENTENCE_BEGIN_WORD,
    "</s>": SENTENCE_END_WORD,
    "<unk>": UNKNOWN_WORD,
    "<Unk>": UNKNOWN_WORD,
    "[UNK]": UNKNOWN_WORD,
    "@@UNKNOWN@@": UNKNOWN_WORD,
}
"""Words of other programs that are words like any other here, and the special words that may be meant."""


class Vocabulary:
    """Mapping between words and ids.

    words: list of V words, duplicates included; words[i] is the word of id i.
    ids:   the id of each word; a word that stands twice has the last of its ids.
    bos, eos, unk: the ids of `<S>`, `</S>` and `<UNK>`, which may stand anywhere; DataError for one that is missing.
    sha256: hash of the words in order, independent of how the file spells them.
    """

    def __init__(self, words: Iterable[str], path: str | None = None, needed: Iterable[str] = SPECIAL_WORDS) -> None:
        """Number the words in their order. Raises DataError when one of the special words in `needed` is missing."""
        self.path = path
        self.words = list(words)
        self.ids = {word: number for number, word in enumerate(self.words)}
        self.check_special_words(needed)
        self._tables: dict[int, npt.NDArray[np.int16]] = {}

    @classmethod
    def from_words(cls, words: Iterable[str]) -> "Vocabulary":
        """Return a vocabulary of these words, in this order, that `write` and `read` reproduce.

        Raises DataError for a missing special word and for a word that a vocabulary file cannot hold.
        """
        vocabulary = cls(words)
        for word in vocabulary.words:
            if word != word.strip() or "\n" in word or "\r" in word or word == SKIPPED_WORD:
                raise DataError(f"vocabulary: {word!r} cannot stand in a vocabulary file; leave it out")
        return vocabulary

    def check_special_words(self, needed: Iterable[str] = SPECIAL_WORDS) -> None:
        """Raise DataError when one of the special words in `needed` is missing."""
        missing = [word for word in needed if word not in self.ids]
        if missing:
            where = self.path if self.path is not None else "vocabulary"
            them = "it" if len(missing) == 1 else "them"
            raise DataError(
                f"{where}: the vocabulary has no line {' and no line '.join(missing)}; add {them} at the top"
                + _missing_hint(self.ids, missing)
            )

    @functools.cached_property
    def bos(self) -> int:
        return self._special(SENTENCE_BEGIN_WORD)

    @functools.cached_property
    def eos(self) -> int:
        return self._special(SENTENCE_END_WORD)

    @functools.cached_property
    def unk(self) -> int:
        return self._special(UNKNOWN_WORD)

    def _special(self, word: str) -> int:
        self.check_special_words((word,))
        return self.ids[word]

    @classmethod
    def read(cls, path: str | os.PathLike[str], needed: Iterable[str] = SPECIAL_WORDS) -> "Vocabulary":
        """Read a vocabulary file: one word a line, stripped; lines end with \\n, \\r\\n or \\r. It may be .gz or .zst.

        The line `!!!MAXTERMID` is left out. Raises DataError when the file is missing or empty, is not UTF-8 (the
        message names the line), lacks a special word in `needed`, or begins with a byte order mark before one.
        """
        name = os.fspath(path)
        lines = read_lines(path)
        if not lines:
            raise DataError(f"{name}: the vocabulary is empty; its first lines are {', '.join(SPECIAL_WORDS)}")
        words = (line.strip() for line in lines)
        return cls((word for word in words if word != SKIPPED_WORD), path=storage.absolute(name), needed=needed)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the words, one a line, as UTF-8; the file appears whole, or not at all and with a DataError."""
        write_aside(path, self._content())

    @property
    def size(self) -> int:
        """Number of ids (V), duplicates included."""
        return len(self.words)

    def __len__(self) -> int:
        return len(self.words)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the words in the order of their ids, hexadecimal."""
        return hashlib.sha256(self._content()).hexdigest()

    @functools.cached_property
    def table(self) -> WordTable:
        """Table that finds the ids of words in bytes of text; made once."""
        return WordTable(self.ids)

    def characters(self, max_characters: int = 50) -> npt.NDArray[np.int16]:
        """Return the character ids of every word, int16 [V, max_characters], read-only; they are made once.

        The rows of `bos` and `eos` are the sentence markers; `<UNK>` is spelt out, as in the original.
        """
        table_VC = self._tables.get(max_characters)
        if table_VC is None:
            table_VC = encode_words(self.words, max_characters)
            for word, row in zip(SPECIAL_WORDS[:2], sentence_marker_rows(max_characters), strict=True):
                if word in self.ids:
                    table_VC[self.ids[word]] = row
            table_VC.setflags(write=False)
            self._tables[max_characters] = table_VC
        return table_VC

    def _content(self) -> bytes:
        return "".join(f"{word}\n" for word in self.words).encode("utf-8")


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Return the lines of a vocabulary file. Raises DataError as `Vocabulary.read` does, but for special words."""
    name = os.fspath(path)
    try:
        if not is_uri(path) and Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
            # Every process reads the vocabulary, and a pipe can be read only once.
            raise DataError(f"{name}: is no regular file but a pipe or a device; name a file")
        if not is_uri(path) and Path(path).is_dir():
            raise DataError(f"{name}: is a folder and no vocabulary; name the file in it, such as vocab.txt")
        data = unpacked_bytes(storage.read_bytes(path), name)
    except OSError as error:
        raise DataError(f"{name}: cannot read the vocabulary ({error.strerror})") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len(split_lines(data[: error.start].decode() + "."))
        raise DataError(f"{name}, line {line}: not UTF-8; convert the vocabulary to UTF-8") from None
    if text.startswith(tuple(f"\ufeff{word}" for word in SPECIAL_WORDS)):
        raise DataError(f"{name}, line 1: a byte order mark, which would be part of the first word; remove it")
    return split_lines(text)


def _missing_hint(words: Container[str], missing: Iterable[str]) -> str:
    """Return a hint at words that stand in the place of missing special words, or an empty string."""
    for word, special in SPECIAL_IN_OTHER_FORMS.items():
        if special in missing and word in words:
            return f" (it has {word!r}, a word like any other: the special words are {', '.join(SPECIAL_WORDS)})"
    return ""
