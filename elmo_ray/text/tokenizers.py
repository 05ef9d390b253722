"""Tokenizers: functions that turn documents into sentences, and sentences into words.

Three kinds have a name: `none` for text that is tokenised, `spacy` for the rules of spaCy's languages, and
`package.module:function` for a function of the user's own. spaCy is an extra (`pip install 'elmo-ray[text]'`), and it
is imported only where it is asked for. No model is downloaded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from elmo_ray.errors import ConfigError, DataError, short
from elmo_ray.text.unspaced import UNSPACED_ADVICE

Tokenizer = Callable[[list[str]], list[list[list[str]]]]
"""Function from documents to, for each of them, its sentences, each a list of words."""

NONE = "none"
SPACY = "spacy"

RULES_VERSION = "2"
"""Version of the rules of this file. Raise it when the same text becomes other words or other sentences."""

WITHOUT_SPACES = {
    "bo": "Tibetan",
    "ja": "Japanese",
    "km": "Khmer",
    "lo": "Lao",
    "my": "Burmese",
    "th": "Thai",
    "yue": "Cantonese",
    "zh": "Chinese",
}
"""Languages that are written without spaces between words. Rules cannot find their words."""

# spaCy's own tokenizers of these languages need a library with a dictionary. Both are written with spaces.
_GENERIC_RULES = {"ko", "vi"}

_MORE_ABBREVIATIONS = {
    "en": "Capt. Cf. Col. Esq. Fig. Figs. Hon. Lieut. Lt. Maj. Mme. Mlle. Mt. Sgt. Vol. Vols. cf. pp. viz.",
    "xx": "Dr. Mr. Mrs. Prof. St.",
}
"""Abbreviations before names and numbers that spaCy's own lists lack, separated by spaces."""

_NUMERO = {"en": frozenset({"No", "Nos"})}
"""Words that are abbreviations only where a number follows: "No. 5", but "He said no. No. Never." """

_MORE_ENDERS = {"el": ";\u037e"}
"""Marks that end a sentence in one language only: the question mark of Greek."""

# Sets of single characters. The straight quote both opens and closes; a chunk's end tells which.
_CLOSERS = frozenset("\"'”’»›)]}」』）】")
_ONLY_CLOSERS = frozenset("”’»›)]}」』）】")
_OPENERS = "\"'“‘«‹([{„‚¿¡「『（【-–—*_"
_ELLIPSIS = re.compile(r"\.{2,}|…+|(?:\. ?){3,}")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")

# A text with a longer line is not wrapped by hand, so each of its lines is a paragraph.
_WRAPPED_LINE = 200
# No language has such words, and the time for the rules would grow with the square of the length.
_LONGEST_CHUNK = 500
# About 60 MB. The whole memory, spaCy's included, is dropped when it is full.
_REMEMBERED = 200_000
# A paragraph is a text of its own for the loop below; this bounds the chunks that stand in memory at one time.
_PIECE = 1 << 20

# Joiners (U+200C, U+200D) are not among them: Persian, the scripts of India and emoji need them.
_INVISIBLE = re.compile("[\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028]|\x1c|\x1d|\x1e")
_BLANK = re.compile(r"[^\S\n]+")
# NUL and halves of surrogate pairs.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def _nfc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _control(text: str) -> str:
    return _CONTROL.sub("", _INVISIBLE.sub("", text))


def _whitespace(text: str) -> str:
    return _BLANK.sub(" ", _LINE_END.sub("\n", text.replace("\u2029", "\n\n")))


NORMALIZATIONS: dict[str, Callable[[str], str]] = {"nfc": _nfc, "control": _control, "whitespace": _whitespace}
"""Steps of `data.normalize`, in the order in which they are applied, whatever the order in the setting."""


def make_tokenizer(name: str, language: str | None = None, normalize: tuple[str, ...] = ()) -> Tokenizer:
    """Return the function that turns documents into sentences of words.

    name: `none` (a line is a sentence, and blanks separate words), `spacy` or `package.module:function`. language: a
    code of spaCy such as `en`, or `xx` for rules of no language; for `spacy` alone. normalize: names of
    `NORMALIZATIONS`, applied to each document first. The result depends on nothing but these settings, the libraries'
    versions and the document. Raises ConfigError for settings that cannot be used and for a missing library.
    """
    unknown = [step for step in normalize if step not in NORMALIZATIONS]
    if unknown:
        raise ConfigError(
            f"data.normalize={short(unknown[0])}: no such step; the steps are {', '.join(NORMALIZATIONS)}"
        )
    if name != SPACY and language is not None:
        raise ConfigError(
            f"data.language={short(language)}: only data.tokenizer=spacy has rules of languages, and data.tokenizer is "
            f"{short(name)}; leave data.language out or set data.tokenizer=spacy"
        )
    if name == NONE:
        split: Callable[[list[str]], list[list[list[str]]]] = _split_lines
    elif name == SPACY:
        split = SpacyTokenizer(language)
    else:
        split = _UserTokenizer(name)
    steps = [step for key, step in NORMALIZATIONS.items() if key in normalize]
    if not steps:
        return split
    return functools.partial(_normalize_and_split, steps, split)


def describe_tokenizer(name: str, language: str | None = None, normalize: tuple[str, ...] = ()) -> dict[str, str]:
    """Return everything that the result of the tokenizer depends on: settings, versions of libraries and of our rules.

    Two equal descriptions give the same words for the same text. Raises ConfigError as `make_tokenizer` does.
    """
    make_tokenizer(name, language, normalize)
    found = {
        "tokenizer": name,
        "language": language or "",
        "normalize": ",".join(step for step in NORMALIZATIONS if step in normalize),
        "rules": RULES_VERSION,
        # Which characters are blanks, letters and small letters is a matter of the Unicode version.
        "unicode": unicodedata.unidata_version,
    }
    if name == SPACY:
        found["spacy"] = importlib.metadata.version("spacy")
    elif name != NONE:
        module = sys.modules[name.partition(":")[0]]
        source = inspect.getsourcefile(module)
        if source is not None:
            with open(source, "rb") as file:
                found["sha256"] = hashlib.sha256(file.read()).hexdigest()
    return found


def tokenize(
    text: str, language: str | None = "en", tokenizer: str = SPACY, normalize: tuple[str, ...] = ()
) -> list[list[str]]:
    """Return the sentences of `text`, each a list of words, as `data.tokenizer` makes them for training.

    The arguments are the settings `data.language`, `data.tokenizer` and `data.normalize`; a tokenizer other than
    `spacy` needs `language=None`. Raises ConfigError for settings that cannot be used and for a missing library.
    """
    return remembered_tokenizer(tokenizer, language, tuple(normalize))([text])[0]


def cut_document(text: str, size: int = _PIECE) -> Iterator[str]:
    """Yield the document in pieces of about `size` characters, cut at the ends of paragraphs.

    A piece without such an end is cut at a line's end, then at a blank; one without blanks stays whole. All characters
    are in the pieces, in their order.
    """
    start = 0
    while len(text) - start > size:
        for mark in ("\n\n", "\n", " "):
            cut = text.rfind(mark, start + size // 2, start + size)
            if cut < 0:
                cut = text.find(mark, start + size, start + 2 * size)
            if cut >= 0:
                break
        else:
            found = re.compile(r"\s").search(text, start + size)
            cut = found.start() if found else len(text)
        end = min(cut + len(mark), len(text))
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


remembered_tokenizer = functools.lru_cache(maxsize=8)(make_tokenizer)
"""`make_tokenizer` that returns the same one again: spaCy's takes a quarter of a second to make."""


def _normalize_and_split(
    steps: Sequence[Callable[[str], str]], split: Tokenizer, documents: list[str]
) -> list[list[list[str]]]:
    return split([functools.reduce(lambda text, step: step(text), steps, document) for document in documents])


def _split_lines(documents: list[str]) -> list[list[list[str]]]:
    """Return the lines of each document as sentences; lines without words are left out."""
    found = []
    for document in documents:
        lines = document.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        found.append([words for line in lines if (words := line.split())])
    return found


class _UserTokenizer:
    """A function of the user's own, whose result is checked."""

    def __init__(self, name: str) -> None:
        module_name, _, function_name = name.partition(":")
        if not module_name or module_name.startswith(".") or not function_name:
            raise ConfigError(
                f"data.tokenizer={short(name)}: no such tokenizer; use {NONE}, {SPACY} or package.module:function of "
                "your own"
            )
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ConfigError(
                f"data.tokenizer={short(name)}: cannot import {module_name} ({short(str(error))}); install it or put "
                "its folder into PYTHONPATH, on all hosts"
            ) from None
        except Exception as error:  # code of the user's own may raise anything
            raise ConfigError(
                f"data.tokenizer={short(name)}: {module_name} cannot be imported: {_told(error)}"
            ) from None
        function = getattr(module, function_name, None)
        if not callable(function):
            raise ConfigError(f"data.tokenizer={short(name)}: {module_name} has no function {function_name}")
        self._name, self._function = name, function

    def __call__(self, documents: list[str]) -> list[list[list[str]]]:
        try:
            found = self._function(list(documents))
        except Exception as error:
            raise self._wrong(f"raised {_told(error)}") from None
        if not isinstance(found, Sequence) or len(found) != len(documents):
            raise self._wrong(f"returned {_size(found)} for {len(documents)} documents; return one list for each")
        for sentences in found:
            if isinstance(sentences, str) or not isinstance(sentences, Sequence):
                raise self._wrong(f"returned {type(sentences).__name__} for a document; return a list of sentences")
            for words in sentences:
                if isinstance(words, str) or not isinstance(words, Sequence):
                    raise self._wrong(f"returned {type(words).__name__} for a sentence; return a list of words")
                if not all(isinstance(word, str) for word in words):
                    raise self._wrong("returned a word that is no str")
                # A blank within a word would make two words of it in the shard.
                sentence = " ".join(words)
                if sentence.split() != list(words):
                    wrong = next(word for word in words if word.split() != [word])
                    raise self._wrong(f"returned the word {short(repr(wrong))}; a word has characters and no blanks")
                if _NO_TEXT.search(sentence):
                    wrong = next(word for word in words if _NO_TEXT.search(word))
                    raise self._wrong(f"returned the word {short(repr(wrong))}, which UTF-8 text cannot have")
        return [[list(words) for words in sentences if words] for sentences in found]

    def _wrong(self, problem: str) -> DataError:
        return DataError(f"data.tokenizer={short(self._name)}: the function {problem}")


class SpacyTokenizer:
    """Words by the rules of a blank spaCy pipeline, sentences by those of spaCy's sentencizer with a few of our own.

    spaCy's rules look at what stands between two blanks (a chunk) and at nothing around it. So each chunk goes through
    spaCy once and is remembered, which is several times as fast as spaCy itself and gives the same words.

    A sentence ends at the end of a chunk that closes with one of the sentencizer's characters (quotes and brackets may
    follow it), unless the next chunk begins with a small letter; after an ellipsis only where the next chunk begins
    with a capital letter; and at a blank line. Single line ends are blanks, except in a document with a line of
    over 200 characters: its lines are paragraphs. Characters are neither changed nor lost. A chunk of over 500
    characters stays one word, and a paragraph of over a million characters is cut at blanks.
    """

    def __init__(self, language: str | None) -> None:
        if language is None:
            raise ConfigError("data.tokenizer=spacy needs data.language, such as en, or xx for rules of no language")
        if language in WITHOUT_SPACES:
            raise ConfigError(
                f"data.language={language}: {WITHOUT_SPACES[language]} is written without spaces, so rules cannot find "
                f"its words; {UNSPACED_ADVICE}"
            )
        self._language = language
        self._load()

    def __call__(self, documents: list[str]) -> list[list[list[str]]]:
        return [self._sentences(document) for document in documents]

    def __reduce__(self) -> tuple[Any, ...]:
        # What is remembered stays here; another process begins with nothing.
        return SpacyTokenizer, (self._language,)

    def _load(self) -> None:
        """Make spaCy's tokenizer, and forget all chunks: spaCy keeps every string that it has seen."""
        self._rules, self._enders = _load_spacy(self._language)
        self._chunks: dict[str, tuple[list[str], str, tuple[int, ...]]] = {}

    def _sentences(self, document: str) -> list[list[str]]:
        found: list[list[str]] = []
        if "\r" in document:
            document = document.replace("\r\n", "\n").replace("\r", "\n")
        is_wrapped = all(len(line) <= _WRAPPED_LINE for line in document.split("\n"))
        for paragraph in _BLANK_LINE.split(document) if is_wrapped else document.split("\n"):
            for piece in cut_document(paragraph) if len(paragraph) > _PIECE else (paragraph,):
                self._add_sentences(piece.split(), found)
        return found

    def _add_sentences(self, chunks: list[str], found: list[list[str]]) -> None:
        """Append the sentences of one paragraph, whose chunks are given, to `found`."""
        sentence: list[str] = []
        end = ""  # how the sentence may end here: "" (not at all), ".", "…" or "#" (of No.)
        self._learn(chunks)
        for place, chunk in enumerate(chunks):
            words, next_end, cuts = self._chunks.get(chunk) or ([chunk], "", ())
            if end:
                # Marks and closing quotes after a blank, as in French, still belong to the sentence.
                if _belongs_to_end(chunk, self._enders):
                    sentence += words
                    end = "." if next_end == "." else end
                    continue
                first = chunk.lstrip(_OPENERS)[:1]
                if not first and place + 1 < len(chunks):  # a dash between blanks
                    first = chunks[place + 1].lstrip(_OPENERS)[:1]
                if not first.islower() and _ends_before(end, first):
                    found.append(sentence)
                    sentence = []
            if cuts:
                start = 0
                for cut in cuts:
                    found.append(sentence + words[start:cut])
                    sentence, start = [], cut
                sentence += words[start:]
            else:
                sentence += words
            end = next_end
        if sentence:
            found.append(sentence)

    def _learn(self, chunks: list[str]) -> None:
        """Remember the words of all chunks that are new and not too long."""
        if len(self._chunks) >= _REMEMBERED:
            self._load()
        new = [chunk for chunk in set(chunks).difference(self._chunks) if len(chunk) <= _LONGEST_CHUNK]
        words: list[str] = []
        at = iter(new)
        # One call for all: a call costs as much as some ten words. Two blanks make a token between two chunks; else
        # spaCy would look for special cases such as '' across the blank, and words would depend on their neighbours.
        for token in self._rules("".join([f"{chunk}  " for chunk in new])) if new else ():
            if token.is_space:
                self._remember(next(at), words)
                words = []
            else:
                words.append(token.text)

    def _remember(self, chunk: str, words: list[str]) -> None:
        """Remember the words of a chunk, how a sentence may end after it, and where sentences end within it."""
        last = len(words)
        while last and words[last - 1] and all(character in _CLOSERS for character in words[last - 1]):
            last -= 1
        end = self._end_of(words[last - 1]) if last else ""
        if end == "." and last == 2 and words[0] in _NUMERO.get(self._language, ()):
            end = "#"
        # "end.Next": spaCy separates a mark between a small and a capital letter, and the sentencizer ends there.
        cuts = tuple(
            place + 1
            for place in range(1, len(words) - 1)
            if words[place] in self._enders and words[place - 1][-1].isalpha() and words[place + 1][0].isalpha()
            if not words[place + 1][0].islower()
        )
        self._chunks[chunk] = words, end, cuts

    def _end_of(self, word: str) -> str:
        if _ELLIPSIS.fullmatch(word):
            return "…"
        return "." if all(character in self._enders for character in word) else ""


def _ends_before(end: str, first: str) -> bool:
    """Return whether a sentence that may end as `end` says does end before `first`, which is no small letter."""
    if end == "…":
        return first.isupper()
    return end == "." or not first.isdigit()


def _belongs_to_end(chunk: str, enders: frozenset[str]) -> bool:
    """Return whether a chunk is one mark of an end or one closing quote or bracket."""
    return len(chunk) == 1 and (chunk in enders or chunk in _ONLY_CLOSERS)


def _load_spacy(language: str) -> tuple[Any, frozenset[str]]:
    """Return spaCy's tokenizer of a language and the characters that end a sentence."""
    try:
        import spacy
        from spacy.pipeline import Sentencizer
    except ImportError as error:
        raise ConfigError(
            f"data.tokenizer=spacy: spaCy cannot be imported ({short(str(error))}); pip install 'elmo-ray[text]'"
        ) from None
    generic = {"nlp": {"tokenizer": {"@tokenizers": "spacy.Tokenizer.v1"}}}
    try:
        pipeline = spacy.blank(language, config=generic if language in _GENERIC_RULES else {})
    except ImportError as error:
        raise ConfigError(
            f"data.language={short(language)}: spaCy has no rules for it or lacks a library "
            f"({short(str(error))}); use a code of https://spacy.io/usage/models#languages, or xx for no language"
        ) from None
    rules: Any = pipeline.tokenizer
    for abbreviation in _MORE_ABBREVIATIONS.get(language, "").split():
        rules.add_special_case(abbreviation, [{"ORTH": abbreviation}])
    if language == "en":
        # As in the text that ELMo was trained on (One Billion Word Benchmark), "well-kept" is one word. Longer dashes
        # still separate.
        infixes = [str(rule).replace("(?:-|–|", "(?:–|") for rule in pipeline.Defaults.infixes or ()]
        rules.infix_finditer = spacy.util.compile_infix_regex(infixes).finditer
    return rules, frozenset(Sentencizer.default_punct_chars).union(_MORE_ENDERS.get(language, ""))


def _told(error: Exception) -> str:
    """Return an error of the user's code in a few words, with the line that raised it."""
    *_, last = [None, *traceback.extract_tb(error.__traceback__)]
    place = f" ({last.filename}, line {last.lineno})" if last and not isinstance(error, SyntaxError) else ""
    return short(f"{type(error).__name__}: {error}", 200) + place


def _size(found: object) -> str:
    return f"{len(found)} lists" if isinstance(found, Sequence) else type(found).__name__
