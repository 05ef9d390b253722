"""The sample corpus: English prose from the documentation of every Python, so that a first run needs no data.

Its sources are `pydoc_data.topics` (the language reference) and the docstrings of the standard library's modules, which
are read with `ast` and never imported. Code, tables and markup are dropped; the remaining sentences are tokenised and
written one a line. The result depends on the Python version only.
"""

import ast
import hashlib
import inspect
import itertools
import json
import logging
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elmo_ray.errors import DataError
from elmo_ray.storage import read_json
from elmo_ray.storage.files import write_aside

logger = logging.getLogger(__name__)

TRAIN_SHARDS = 6
# Shares of all words: that of valid and of test, and that of the largest document in them. Held-out documents are
# small, so that no single module stands for the whole text.
_HELD_OUT_SHARE = 0.06
_HELD_OUT_DOCUMENT = 0.01
_FORMAT_VERSION = 1
# These folders are not English, not documentation, or not in every installation.
_SKIPPED_FOLDERS = frozenset(
    "test tests idle_test idlelib lib2to3 site-packages dist-packages __pycache__ pydoc_data encodings "
    "turtledemo".split()
)

_SHORTEST, _LONGEST = 4, 100  # Words of a sentence.
_MARKUP = [
    (re.compile(r":[a-z:]+:`~?([^`]+)`"), r"\1"),  # :func:`name`
    (re.compile(r"`{1,2}([^`]+)`{1,2}_?"), r"\1"),
    (re.compile(r"(?<![\w*])\*{1,2}(\w[^*\n]*?)\*{1,2}(?![\w*])"), r"\1"),
    (re.compile(r"\s\[\d+\](?=[\s.,;]|$)"), ""),  # footnote marks
]
_BULLET = re.compile(r"\s*(?:[-*+•o]|\(?\d{1,2}[.)]|\[\d+\])\s+(?=\S)")
# These lines end a paragraph and belong to none: underlines, tables, prompts, grammar, directives.
_NO_PROSE = re.compile(r"\s*(?:[-=*~^+#|_.]{3,}\s*$|[+|]|>>>|\.\.\s|\$ |.*(?:::=|----|====)|@\w)")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:e\.g|i\.e|etc|vs|cf|Mr|Dr|St|No|no|approx|resp|[A-Z]|[a-z])\.$")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9_*])")
_HYPHENATED = re.compile(r"(?<=[a-z])- (?=[a-z])")  # a compound that is broken over two lines
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


def prose_sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a documentation string that are prose, tokenised: words separated by single spaces."""
    for paragraph in _paragraphs(inspect.cleandoc(text.replace("\t", "    "))):
        for pattern, replacement in _MARKUP:
            paragraph = pattern.sub(replacement, paragraph)
        for sentence in _split_sentences(paragraph):
            words = tokenise(sentence)
            if _is_prose(sentence, words):
                yield " ".join(words)


def tokenise(text: str) -> list[str]:
    """Return the words, numbers and punctuation of English text, each a token; "don't" gives "do", "n't"."""
    text = text.replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"')
    return _TOKEN.findall(text)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield paragraphs: runs of lines of the same indentation, joined. A list item is a paragraph."""
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
            in_code = True  # After a prompt come code and its output, up to an empty line.
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
    """Return whether a sentence is mostly of English words, and neither a fragment of code nor a list of names."""
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


@dataclass(frozen=True)
class SampleCorpus:
    """Absolute paths of the shards of each text, and its number of tokens; no two texts share a document."""

    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]
    tokens: dict[str, int]


def write_sample(directory: str | os.PathLike[str]) -> SampleCorpus:
    """Write the sample corpus into `directory`, unless all of it is there already; return its paths and sizes.

    Raises DataError where the standard library's sources cannot be read or the folder cannot be written.
    """
    folder = Path(os.path.abspath(directory))
    names = {
        "train": [f"train-{number:05d}.txt" for number in range(TRAIN_SHARDS)],
        "valid": ["valid.txt"],
        "test": ["test.txt"],
    }
    note = folder / "sample.json"
    version = f"{_FORMAT_VERSION}, Python {platform.python_version()}"
    known = read_json(note) or {}
    complete = all((folder / name).exists() for name in itertools.chain(*names.values()))
    if known.get("version") != version or not complete:
        texts = _assign_documents(_documents())
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot be made ({error.strerror})") from None
        tokens = {}
        for split, shards in texts.items():
            for name, lines in zip(names[split], shards, strict=True):
                write_aside(folder / name, "".join(f"{line}\n" for line in lines).encode())
            tokens[split] = sum(len(line.split()) for line in itertools.chain(*shards))
        known = {"version": version, "tokens": tokens}
        write_aside(note, json.dumps(known).encode())
        logger.info("sample corpus: %s tokens in %s", f"{sum(tokens.values()):,}", folder)
    paths = {split: tuple(str(folder / name) for name in files) for split, files in names.items()}
    return SampleCorpus(**paths, tokens=known["tokens"])


def _documents() -> dict[str, list[str]]:
    """Return the sentences of each topic and module; of equal sentences only the first is kept."""
    texts: dict[str, list[str]] = {}
    try:
        from pydoc_data.topics import topics

        texts.update({f"topic {name}": [text] for name, text in sorted(topics.items())})
    except ImportError:
        logger.warning("this Python has no pydoc_data.topics; the sample corpus is smaller")
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                texts[f"module {path.relative_to(root).as_posix()}"] = list(_docstrings(path))
    seen: set[str] = set()
    documents = {}
    for name, strings in texts.items():
        found = [line for line in dict.fromkeys(itertools.chain(*map(prose_sentences, strings))) if line not in seen]
        seen.update(found)
        if found:
            documents[name] = found
    if not documents:
        raise DataError(f"data.train=sample: this Python has no readable documentation in {root}; name other text")
    return documents


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a source file; none where it cannot be read or parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A source may have invalid escapes in its strings.
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    yield from _docstrings_under(tree)


def _docstrings_under(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings below a node, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield text
    # Only statements are visited: `ast.walk` visits twenty times as many nodes.
    for block in ("body", "handlers", "orelse", "finalbody"):
        below = getattr(node, block, ())
        for child in below if isinstance(below, list) else ():
            yield from _docstrings_under(child)


def _assign_documents(documents: dict[str, list[str]]) -> dict[str, list[list[str]]]:
    """Assign whole documents to valid, test and the train shards, in an order by the hashes of their names."""
    sizes = {name: sum(len(line.split()) for line in lines) for name, lines in documents.items()}
    total = sum(sizes.values())
    order = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out: dict[str, list[str]] = {"valid": [], "test": []}
    filled = dict.fromkeys(held_out, 0)
    train: list[list[str]] = [[] for _ in range(TRAIN_SHARDS)]
    shard_sizes = [0] * TRAIN_SHARDS
    for name in order:
        split = min(filled, key=lambda key: filled[key])
        if filled[split] < _HELD_OUT_SHARE * total and sizes[name] <= _HELD_OUT_DOCUMENT * total:
            held_out[split] += documents[name]
            filled[split] += sizes[name]
        else:
            smallest = shard_sizes.index(min(shard_sizes))
            train[smallest] += documents[name]
            shard_sizes[smallest] += sizes[name]
    return {"train": train, **{split: [lines] for split, lines in held_out.items()}}
