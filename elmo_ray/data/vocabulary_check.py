"""Check of a vocabulary file that a user names for a new model: lines that can never be the words they seem to be."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterator

from elmo_ray.data.vocabulary import SKIPPED_WORD, SPECIAL_IN_OTHER_FORMS, Vocabulary, read_lines
from elmo_ray.errors import DataError, short

logger = logging.getLogger(__name__)

_BLANKS = " \t\n\r\v\f"
_JSON = re.compile(r"\s*[\[{]\s*(?:\"|$)")
# A word and a number, or a number and a word, as in a CSV file.
_COUNTED = re.compile(r"\S*[^\s\d]\S*[,;]\d+|\d+[,;]\S*[^\s\d]\S*")
# So small a share of odd words is usual in a vocabulary that was counted on billions of words of the web.
_FEW = 1e-4


def check_vocabulary_file(path: str) -> None:
    """Refuse a file of data.vocab whose lines are not words, and warn of lines that look wrong.

    Raises DataError, with file and line, for a line with a blank inside, for words with counts, for an empty line, a
    word that stands twice, and a byte order mark; for JSON; and as `Vocabulary.read` does.
    """
    lines = read_lines(path)
    _check_format(lines, path)
    _check_blanks(lines, path)
    Vocabulary.read(path)  # Raises an error for missing special words.
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        word = line.strip(_BLANKS)
        if not word:
            raise DataError(f"{path}, line {number}: is empty, and would be a word of the vocabulary; remove it")
        if word.startswith("\ufeff"):
            raise DataError(f"{path}, line {number}: a byte order mark, which would be part of the word; remove it")
        if word in seen:
            raise DataError(f"{path}, line {number}: {word!r} stands in line {seen[word]} already; remove one of them")
        if word != SKIPPED_WORD:
            seen[word] = number
    for message in _marker_hints(seen, path):
        # No warning: the Penn Treebank and texts made from it have the word <unk>.
        logger.info("data.vocab=%s", message)
    for message in (*_form_hints(seen, path), *_blank_hints(seen, path)):
        logger.warning("data.vocab=%s", message)


def _check_format(lines: list[str], path: str) -> None:
    """Raise DataError for JSON, as tokenizers keep their vocabulary, and for words with counts in a CSV file."""
    if lines and _JSON.match(lines[0]) and (len(lines) == 1 or lines[-1].strip(_BLANKS) in ("}", "]")):
        raise DataError(f"{path}: is JSON; write its words to a text file, one a line, the most frequent ones first")
    counts = [number for number, line in enumerate(lines) if _COUNTED.fullmatch(line.strip(_BLANKS))]
    # Some words of a text look so ("3,000"), but never most of them.
    if 2 * len(counts) > len(lines):
        first = lines[counts[0]].strip(_BLANKS)
        raise DataError(
            f"{path}, line {counts[0] + 1}: {short(repr(first), 60)}: {len(counts):,} of {len(lines):,} lines have a "
            "number beside a comma: are these counts? Leave one word a line"
        )


def _check_blanks(lines: list[str], path: str) -> None:
    """Raise DataError if lines have a blank inside, with their number and the first of them."""
    bad = [number for number, line in enumerate(lines) if any(blank in line.strip(_BLANKS) for blank in " \t\v\f")]
    if not bad:
        return
    first = lines[bad[0]].strip(_BLANKS)
    counted = sum(_has_count(lines[number]) for number in bad)
    guess = ": are these counts? Leave" if 2 * counted > len(bad) else ", which no word has; leave"
    have = "lines has" if len(bad) == 1 else "lines have"
    raise DataError(
        f"{path}, line {bad[0] + 1}: {short(repr(first), 60)}: {len(bad):,} of {len(lines):,} {have} a blank{guess} "
        "one word a line"
    )


def _has_count(line: str) -> bool:
    """Return whether a line is a word with a number before it, as of `uniq -c`, or behind it."""
    fields = line.split()
    return len(fields) > 1 and any(_is_number(field) for field in (fields[0], fields[-1]))


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True


def _marker_hints(lines: dict[str, int], path: str) -> Iterator[str]:
    for word, special in SPECIAL_IN_OTHER_FORMS.items():
        if word in lines:
            yield (
                f"{path}, line {lines[word]}: {word!r} is a word like any other; the special word is {special}, in "
                f"line {lines[special]}"
            )


def _form_hints(lines: dict[str, int], path: str) -> Iterator[str]:
    """Yield a warning if words stand in two Unicode forms, as é in one character and as e with an accent."""
    pairs = [
        (word, composed)
        for word in lines
        if not word.isascii() and (composed := unicodedata.normalize("NFC", word)) != word and composed in lines
    ]
    if pairs:
        word, composed = pairs[0]
        yield from _if_many(
            len(pairs),
            len(lines),
            f"{path}: {_words(len(pairs))} in two Unicode forms ({_escaped(composed)} in line {lines[composed]} and "
            f"{_escaped(word)} in line {lines[word]}); normalise text and vocabulary alike, for example to NFC",
        )


def _blank_hints(lines: dict[str, int], path: str) -> Iterator[str]:
    """Yield a warning if words have a blank beyond ASCII inside, such as U+00A0: text is divided there."""
    bad = [word for word in lines if not word.isascii() and word.split() != [word]]
    if bad:
        yield from _if_many(
            len(bad),
            len(lines),
            f"{path}: {_words(len(bad))} there with a blank beyond ASCII ({_escaped(bad[0])} in line {lines[bad[0]]}), "
            "where text is divided into words; remove the line",
        )


def _if_many(count: int, of: int, message: str) -> Iterator[str]:
    """Yield the message if it is about more than a tiny share of the words; otherwise log it as information."""
    if count > _FEW * of:
        yield message
    else:
        logger.info("%s", message)


def _words(count: int) -> str:
    return "1 word stands" if count == 1 else f"{count:,} words stand"


def _escaped(word: str) -> str:
    return f"{word!r} ({word.encode('unicode_escape').decode()})"
