"""Quality and speed of `data.tokenizer=spacy` beside spaCy itself, on tokenised text that is written as prose again.

    python tests/benchmarks/tokenizers.py FILE [FILE ...] [--language en] [--sentences 20000]
    python tests/benchmarks/tokenizers.py FILE [FILE ...] --write FOLDER

Each FILE has one tokenised sentence a line. Its sentences are written as people write them, in documents of 40, and
tokenised again. sacremoses has a row where it is installed. The table has the F1 of sentences (both ends agree) and of
tokens against the original, and tokens a second of CPU time on one core. With --write the documents of each file are
written to a JSONL file of FOLDER instead, for a training on raw text.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

SENTENCES_OF_A_DOCUMENT = 40

_TO_THE_LEFT = re.compile(r" ([,.;:?!%)\]}]|(?<!\. )\.\.\.|n't|'(?:s|m|d|ll|re|ve|S|M|D|LL|RE|VE)|')(?= |$)")
_TO_THE_RIGHT = re.compile(r"(?<!\S)([(\[{$#]) ")
_MERGED = re.compile(r"\b(can|gon|wan|got) (not|na|ta)\b", re.IGNORECASE)

Sentences = list[list[str]]


def detokenize(sentences: Iterable[str]) -> str:
    """Return tokenised sentences as one text of prose, with the blanks that people write."""
    found, is_open = [], False
    for sentence in sentences:
        tokens = sentence.split()
        words = []
        for place, word in enumerate(tokens):
            if word == '"':
                # Straight quotes take turns, but one at the start of a sentence opens and one at its end closes.
                is_open = place > 0 and (is_open or place == len(tokens) - 1)
                word = '\0"' if is_open else '"\0'
                is_open = not is_open
            words.append(word)
        text = " ".join(words).replace(" \0", "").replace("\0 ", "").replace("\0", "")
        text = _MERGED.sub(r"\1\2", _TO_THE_RIGHT.sub(r"\1", text))
        previous = ""
        while previous != text:
            previous, text = text, _TO_THE_LEFT.sub(r"\1", text)
        # Where a sentence ends without a mark, only the end of a paragraph can have ended it.
        found.append(text + (" " if re.search(r"[.?!]\W*$", text) else "\n\n"))
    return "".join(found)


def documents_of(path: str) -> Iterator[list[str]]:
    """Yield the sentences of each document."""
    with open(path, encoding="utf-8") as file:
        lines = (line.rstrip("\n") for line in file if line.split())
        while document := list(itertools.islice(lines, SENTENCES_OF_A_DOCUMENT)):
            yield document


def write(path: Path, documents: Iterable[str]) -> None:
    """Write documents as JSONL."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)


def spans(sentences: Sentences) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Return the places of sentences and of tokens, counted in characters that are no blanks."""
    places: tuple[set[tuple[int, int]], set[tuple[int, int]]] = (set(), set())
    at = 0
    for words in sentences:
        begin = at
        for word in words:
            places[1].add((at, at + len(word)))
            at += len(word)
        places[0].add((begin, at))
    return places


def f1(found: set[tuple[int, int]], right: set[tuple[int, int]]) -> float:
    """Return the harmonic mean of precision and recall."""
    return 2 * len(found & right) / (len(found) + len(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--language", default="en")
    parser.add_argument("--sentences", type=int, default=20_000, help="read so many of all files, at most, and some")
    parser.add_argument("--write", metavar="FOLDER", type=Path)
    arguments = parser.parse_args()
    if arguments.write is None:
        documents = (document for path in arguments.files for document in documents_of(path))
        number = -(-arguments.sentences // SENTENCES_OF_A_DOCUMENT)
        compare(list(itertools.islice(documents, number)), arguments.language)
        return
    arguments.write.mkdir(parents=True, exist_ok=True)
    for path in arguments.files:
        write(arguments.write / f"{Path(path).stem}.jsonl", map(detokenize, documents_of(path)))


def compare(documents: list[list[str]], language: str) -> None:
    """Print the table of tokenizers on documents of tokenised sentences."""
    import spacy

    from elmo_ray.text.tokenizers import make_tokenizer

    texts = [detokenize(document) for document in documents]
    right = [[line.split() for line in document] for document in documents]
    pipeline = spacy.blank(language)
    pipeline.add_pipe("sentencizer")
    cold = spacy.blank(language)  # a tokenizer remembers what it has seen, so each row has one of its own

    def bare(texts: list[str]) -> list[Sentences]:
        return [
            [[token.text for token in sentence if not token.is_space] for sentence in document.sents]
            for document in pipeline.pipe(texts)
        ]

    def words_only(texts: list[str]) -> list[Sentences]:
        return [[[token.text for token in document if not token.is_space]] for document in cold.tokenizer.pipe(texts)]

    def moses(texts: list[str]) -> list[Sentences]:
        # It has no sentences; a line is one.
        return [[rules.tokenize(line, escape=False) for line in text.split("\n")] for text in texts]

    print(f"{'':34}  sentence F1  token F1  tokens/s")
    tools: dict[str, Callable[[list[str]], list[Sentences]]] = {
        "data.tokenizer=spacy": make_tokenizer("spacy", language),
        "spaCy, with its sentencizer": bare,
        "spaCy's tokenizer, no sentences": words_only,
    }
    with contextlib.suppress(ImportError):
        from sacremoses import MosesTokenizer

        rules = MosesTokenizer(language)
        tools["sacremoses, no sentences"] = moses
    for name, tool in tools.items():
        begin = time.process_time()
        found = tool(texts)
        seconds = time.process_time() - begin
        tokens = sum(len(words) for document in found for words in document)
        scores = []
        for kind in (0, 1):
            ours = {(number, *span) for number, document in enumerate(found) for span in spans(document)[kind]}
            theirs = {(number, *span) for number, document in enumerate(right) for span in spans(document)[kind]}
            scores.append(f1(ours, theirs))  # type: ignore[arg-type]
        print(f"{name:34}  {scores[0]:11.4f}  {scores[1]:8.4f}  {tokens / seconds:8,.0f}")


if __name__ == "__main__":
    main()
