"""The sample corpus: English prose from the documentation that every Python carries, so that a first run needs no data.

Sources are `pydoc_data.topics` (the language reference) and the docstrings of the standard library's modules, read
with `ast` and never imported. Code, tables and markup are left out; what stays is tokenised, one sentence a line. The
result depends on the Python version only.
"""

import ast
import hashlib
import itertools
import json
import logging
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elmo_ray.data import index_file, prose
from elmo_ray.errors import DataError

logger = logging.getLogger(__name__)

TRAIN_SHARDS = 6
# Of the words, each of valid and test. A held-out document is small, so that no single module stands for them all.
_HELD_OUT_SHARE = 0.06
_HELD_OUT_DOCUMENT = 0.01
_FORMAT_VERSION = 1
# Not English, not documentation, or not in every installation.
_SKIPPED_FOLDERS = frozenset(
    "test tests idle_test idlelib lib2to3 site-packages dist-packages __pycache__ pydoc_data encodings "
    "turtledemo".split()
)


@dataclass(frozen=True)
class SampleCorpus:
    """Absolute paths of the shards, and the tokens of each text; no two texts share a document."""

    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]
    tokens: dict[str, int]


def gather(directory: str | os.PathLike[str]) -> SampleCorpus:
    """Writes the sample corpus into `directory`, unless it is there whole already.

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
    known = _read_note(note)
    whole = all((folder / name).exists() for name in itertools.chain(*names.values()))
    if known.get("version") != version or not whole:
        texts = _deal(_documents())
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot be made ({error.strerror})") from None
        tokens = {}
        for split, shards in texts.items():
            for name, lines in zip(names[split], shards, strict=True):
                index_file.write_aside(folder / name, "".join(f"{line}\n" for line in lines).encode())
            tokens[split] = sum(len(line.split()) for line in itertools.chain(*shards))
        known = {"version": version, "tokens": tokens}
        index_file.write_aside(note, json.dumps(known).encode())
        logger.info("sample corpus: %s tokens in %s", f"{sum(tokens.values()):,}", folder)
    paths = {split: tuple(str(folder / name) for name in files) for split, files in names.items()}
    return SampleCorpus(**paths, tokens=known["tokens"])


def _read_note(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def _documents() -> dict[str, list[str]]:
    """Sentences by the topic or module that they stand in; of equal sentences only the first."""
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
    for name, parts in texts.items():
        found = [line for line in dict.fromkeys(itertools.chain(*map(prose.sentences, parts))) if line not in seen]
        seen.update(found)
        if found:
            documents[name] = found
    if not documents:
        raise DataError(f"data.train=sample: this Python has no readable documentation in {root}; name other text")
    return documents


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody's string
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    yield from _docstrings_under(tree)


def _docstrings_under(node: ast.AST) -> Iterator[str]:
    """In the order of the source. Only statements are visited: `ast.walk` visits twenty times as many nodes."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield text
    for part in ("body", "handlers", "orelse", "finalbody"):
        below = getattr(node, part, ())
        for child in below if isinstance(below, list) else ():
            yield from _docstrings_under(child)


def _deal(documents: dict[str, list[str]]) -> dict[str, list[list[str]]]:
    """Whole documents to valid, test and the train shards, in an order that the documents' names scramble."""
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
