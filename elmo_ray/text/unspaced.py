"""Text that is written without spaces between its words, as Thai and Chinese are: how it is known, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping

UNSPACED_ADVICE = (
    "give data.tokenizer=package.module:function that calls a segmenter with a dictionary, or data.tokenizer=none for "
    "text that is segmented, one sentence a line"
)
"""What to do with such text: rules cannot find its words."""

# The letters of a script, and the longest word that a segmenter would make of them.
_SCRIPTS = {
    "Thai": ("\u0e00-\u0e7f", 20),
    "Lao": ("\u0e80-\u0eff", 20),
    "Tibetan": ("\u0f00-\u0fff", 20),
    "Burmese": ("\u1000-\u109f", 20),
    "Khmer": ("\u1780-\u17ff", 20),
    "Chinese or Japanese": ("\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f", 8),
}
_RUNS = {name: (re.compile(f"[{letters}]+"), longest) for name, (letters, longest) in _SCRIPTS.items()}
_ANY = re.compile(f"[{''.join(letters for letters, _ in _SCRIPTS.values())}]")
_FEWEST_LETTERS = 20
# Shares of a text's characters that are of the script, and of these that stand in words that are too long.
_SHARE_OF_TEXT, _SHARE_IN_LONG_WORDS = 0.3, 0.3


def find_unspaced(words: Mapping[str, int]) -> tuple[str, str] | None:
    """Return the name of a writing without spaces, and a word as an example, if the words show that it has none.

    words: of a text, with their counts. A text that a segmenter has divided has short words, and is not meant.
    """
    candidates = [word for word in words if not word.isascii() and _ANY.search(word)]
    if not candidates:
        return None
    total = sum(len(word) * count for word, count in words.items())
    for name, (letters, longest) in _RUNS.items():
        in_all = in_long = 0
        example = ""
        for word in candidates:
            # Marks within it make no words of it, as the clauses between them may be short.
            size = sum(map(len, letters.findall(word)))
            in_all += size * words[word]
            if size > longest:
                in_long += size * words[word]
                example = example or word
        enough = in_all >= max(_FEWEST_LETTERS, _SHARE_OF_TEXT * total)
        if enough and in_long > _SHARE_IN_LONG_WORDS * in_all:
            return name, example
    return None
