"""Encoding of words as rows of character ids, as bilm-tf makes them for training.

A word becomes `max_characters` ids (C): begin-of-word, the word's UTF-8 bytes, end-of-word, then padding. The bytes are
cut at C - 2, even inside a character. The begin and the end of a sentence are "words" of one special character each.
Shapes: N words, C characters.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SENTENCE_BEGIN = 256
SENTENCE_END = 257
WORD_BEGIN = 258
WORD_END = 259
PADDING = 260
N_CHARACTERS = 261

# The limit keeps the index arrays below at some 50 MB for words of ordinary length.
_WORDS_PER_CHUNK = 1 << 16


def encode_words(words: Sequence[str], max_characters: int = 50) -> npt.NDArray[np.int16]:
    """Return the character ids of each word, int16 [len(words), max_characters].

    No word is special here: `<S>` is spelt out (see `sentence_marker_rows`). Lone surrogates have no UTF-8 form and are
    dropped, as in the original. `max_characters` must be at least 3.
    """
    chars_NC = np.full((len(words), max_characters), PADDING, dtype=np.int16)
    chars_NC[:, 0] = WORD_BEGIN
    for first in range(0, len(words), _WORDS_PER_CHUNK):
        chunk = words[first : first + _WORDS_PER_CHUNK]
        spelt = [word.encode("utf-8", "ignore")[: max_characters - 2] for word in chunk]
        lengths_N = np.fromiter(map(len, spelt), dtype=np.int64, count=len(spelt))
        bytes_all = np.frombuffer(b"".join(spelt), dtype=np.uint8)
        starts_N = np.cumsum(lengths_N) - lengths_N
        rows = np.repeat(np.arange(first, first + len(chunk)), lengths_N)
        columns = np.arange(1, len(bytes_all) + 1) - np.repeat(starts_N, lengths_N)
        chars_NC[rows, columns] = bytes_all
        chars_NC[np.arange(first, first + len(chunk)), lengths_N + 1] = WORD_END
    return chars_NC


def sentence_marker_rows(max_characters: int = 50) -> npt.NDArray[np.int16]:
    """Return the rows of `<S>` and `</S>`, int16 [2, max_characters]."""
    rows_2C = np.full((2, max_characters), PADDING, dtype=np.int16)
    rows_2C[:, 0] = WORD_BEGIN
    rows_2C[:, 1] = (SENTENCE_BEGIN, SENTENCE_END)
    rows_2C[:, 2] = WORD_END
    return rows_2C
