"""English sentences out of documentation strings: code, tables and markup dropped, the rest tokenised."""

import inspect
import re
from collections.abc import Iterator

_SHORTEST, _LONGEST = 4, 100

_MARKUP = [
    (re.compile(r":[a-z:]+:`~?([^`]+)`"), r"\1"),  # :func:`name`
    (re.compile(r"`{1,2}([^`]+)`{1,2}_?"), r"\1"),
    (re.compile(r"(?<![\w*])\*{1,2}(\w[^*\n]*?)\*{1,2}(?![\w*])"), r"\1"),
    (re.compile(r"\s\[\d+\](?=[\s.,;]|$)"), ""),  # footnote marks
]
_BULLET = re.compile(r"\s*(?:[-*+•o]|\(?\d{1,2}[.)]|\[\d+\])\s+(?=\S)")
# Lines that end a paragraph and belong to none: underlines, tables, prompts, grammar, directives.
_NO_PROSE = re.compile(r"\s*(?:[-=*~^+#|_.]{3,}\s*$|[+|]|>>>|\.\.\s|\$ |.*(?:::=|----|====)|@\w)")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:e\.g|i\.e|etc|vs|cf|Mr|Dr|St|No|no|approx|resp|[A-Z]|[a-z])\.$")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9_*])")
_HYPHENATED = re.compile(r"(?<=[a-z])- (?=[a-z])")  # a compound whose parts are on two lines
_TOKEN = re.compile(
    r"(?:[A-Za-z]\.){2,}"  # e.g., U.S.
    r"|etc\."
    r"|n't\b|'(?:s|re|ve|ll|d|m)\b"
    r"|\d+(?:[.,:]\d+)*"
    r"|\w+?(?=n't\b)"
    r"|\w+(?:[-.]\w+)*"
    r"|\.{3}|--+|[-=<>!]=|->"
    r"|\S"
)
_CODE = re.compile(r"[={}|\\;@#$%^&<>~`/+_]|::|\(\)|\[|\]")
_PLAIN_WORD = re.compile(r"[A-Za-z][a-z]*(?:-[a-z]+)*$|n't$|'[a-z]+$")
_COMMON = frozenset(
    "a an and are as be by can for from has if in is it may not of on or that the this to when which with".split()
)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a documentation string that are prose, tokenised: words separated by single spaces."""
    for paragraph in _paragraphs(inspect.cleandoc(text.replace("\t", "    "))):
        for pattern, replacement in _MARKUP:
            paragraph = pattern.sub(replacement, paragraph)
        for sentence in _split_sentences(paragraph):
            words = tokenise(sentence)
            if _is_prose(sentence, words):
                yield " ".join(words)


def tokenise(text: str) -> list[str]:
    """Words, numbers and punctuation of English text, each a token; "don't" gives "do", "n't"."""
    text = text.replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"')
    return _TOKEN.findall(text)


def _paragraphs(text: str) -> Iterator[str]:
    """Runs of lines of the same indentation, joined; a list item is a paragraph."""
    lines: list[str] = []
    indent = -1
    in_code = False
    for line in [*text.splitlines(), ""]:
        bare = line.strip()
        here = len(line) - len(line.lstrip())
        bullet = _BULLET.match(line)
        if not bare:
            in_code = False
        elif bare.startswith(">>>"):
            in_code = True  # what follows a prompt, up to an empty line, is output
        if not bare or in_code or _NO_PROSE.match(line) or bullet or (lines and here != indent):
            if lines:
                yield _join(lines)
            lines, indent = [], -1
        if not bare or in_code or _NO_PROSE.match(line):
            continue
        if bullet:
            bare, here = line[bullet.end() :], bullet.end()
        if indent < 0:
            indent = here
        lines.append(bare)


def _join(lines: list[str]) -> str:
    return _HYPHENATED.sub("-", " ".join(lines))


def _split_sentences(paragraph: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(paragraph):
        piece = paragraph[start : end.start()]
        if not _ABBREVIATION.search(piece):
            yield paragraph[start : end.end()].strip()
            start = end.end()
    yield paragraph[start:].strip()


def _is_prose(sentence: str, words: list[str]) -> bool:
    """Whether most of a sentence is English words, and it is neither a fragment of code nor a list of names."""
    if not _SHORTEST <= len(words) <= _LONGEST or not (sentence[0].isalpha() or sentence[0] in "\"'("):
        return False
    plain = sum(1 for word in words if _PLAIN_WORD.match(word))
    marks = sum(1 for word in words if not any(map(str.isalnum, word)))
    lowered = {word.lower() for word in words}
    if plain < 0.7 * (len(words) - marks) or marks > 0.45 * len(words):
        return False
    if not lowered & _COMMON or "://" in sentence:
        return False
    code = sum(1 for word in words if _CODE.search(word))
    ends = sentence.rstrip("\"')")[-1:] in ".!?:"
    return code <= 0.12 * len(words) and (ends or (len(words) > 5 and code == 0))
