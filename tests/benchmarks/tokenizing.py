"""Speed of `prepare` where it makes sentences of documents, beside the tokenizer alone on one core.

    python tests/benchmarks/tokenizing.py FILE [FILE ...] [--language en]

Each FILE has one tokenised sentence a line. Its sentences are written as people write them, in documents of 40, as one
JSONL file of all of them. spaCy (on some of the documents) and the tokenizer take the documents from memory, in one
process. Then Ray tasks on all CPUs make the texts of the file as in `prepare`: with cold processes, with processes that
know the words, and of the tokenised sentences without a tokenizer. Ray is started before, as its start does not depend
on the text. CPU time is what to compare where other programs use the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SENTENCES_OF_A_DOCUMENT = 40
SPACY_DOCUMENTS = 500


def documents_of(paths: Iterable[str]) -> Iterator[list[str]]:
    lines = (line.rstrip("\n") for path in paths for line in open(path, encoding="utf-8") if line.split())
    while document := list(itertools.islice(lines, SENTENCES_OF_A_DOCUMENT)):
        yield document


def write(path: Path, documents: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)


def alone(path: Path, language: str) -> tuple[int, float, float]:
    """Return the tokens of all documents, the seconds of the tokenizer in this process, and those of CPU time."""
    from elmo_ray.text.tokenizers import make_tokenizer

    tokenizer = make_tokenizer("spacy", language)
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    begin, cpu = time.monotonic(), time.process_time()
    tokens = 0
    for start in range(0, len(texts), 500):
        tokens += sum(len(words) for document in tokenizer(texts[start : start + 500]) for words in document)
    return tokens, time.monotonic() - begin, time.process_time() - cpu


def show(name: str, tokens: int, seconds: float, cpu: float) -> None:
    print(f"{name:34}  {tokens / seconds:8,.0f}  {tokens / cpu:8,.0f}", flush=True)


def spacy_itself(path: Path, language: str) -> tuple[int, float, float]:
    """Return tokens, seconds and seconds of CPU time of spaCy's blank pipeline with its sentencizer."""
    import spacy

    pipeline = spacy.blank(language)
    pipeline.add_pipe("sentencizer")
    texts = [json.loads(line)["text"] for line in itertools.islice(path.open(encoding="utf-8"), SPACY_DOCUMENTS)]
    begin, cpu = time.monotonic(), time.process_time()
    found = [[token.text for token in sentence] for text in pipeline.pipe(texts) for sentence in text.sents]
    return sum(map(len, found)), time.monotonic() - begin, time.process_time() - cpu


def _timed(task: dict[str, Any]) -> tuple[int, float]:
    """Make a text in a worker process; return its tokens and the seconds of CPU time."""
    from elmo_ray.data.indexing import run_task

    begin = time.process_time()
    run_task(task)
    seconds = time.process_time() - begin
    return len(Path(task["target"]).read_bytes().split()), seconds


def prepared(path: Path, folder: Path, cores: int, **data: str) -> tuple[int, float, float]:
    """Return the tokens of all texts that are made of a file on all cores, the seconds, and those of CPU time."""
    from elmo_ray.cluster.tasks import run_tasks
    from elmo_ray.data.documents import TextForm
    from elmo_ray.data.indexing import make_task
    from elmo_ray.data.units import cut_units

    form = TextForm(**data)  # type: ignore[arg-type]
    folder.mkdir()
    todo = [make_task(unit, unit.text_path(folder, form), form) for unit in cut_units([str(path)], form)]
    begin = time.monotonic()
    made = [result for _, result in run_tasks(_timed, todo, workers=cores, cpus=1.0)]
    return sum(tokens for tokens, _ in made), time.monotonic() - begin, sum(seconds for _, seconds in made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--language", default="en")
    arguments = parser.parse_args()
    # By its path: a library of the same name may be installed.
    place = Path(__file__).with_name("tokenizers.py")
    spec = importlib.util.spec_from_file_location("tokenizer_benchmark", place)
    assert spec is not None and spec.loader is not None
    quality = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quality)

    import ray

    from elmo_ray.cluster.session import free_cpus
    from elmo_ray.machine import available_cores

    cores, language = available_cores(), arguments.language
    with tempfile.TemporaryDirectory(prefix="elmo-ray-tokenizing-") as name:
        folder = Path(name)
        raw, tokenised = folder / "raw.jsonl", folder / "tokenised.jsonl"
        write(raw, map(quality.detokenize, documents_of(arguments.files)))
        write(tokenised, map("\n".join, documents_of(arguments.files)))
        print(f"{'':34}  tokens/s  a second of CPU time")
        show("spaCy with its sentencizer", *spacy_itself(raw, language))
        show("data.tokenizer=spacy in a program", *alone(raw, language))
        free_cpus()  # starts Ray
        # The start of the worker processes is no part of the work either.
        prepared(tokenised, folder / "first", cores, tokenizer="none")
        show("texts made, spacy", *prepared(raw, folder / "spacy", cores, tokenizer="spacy", language=language))
        show("texts made, spacy, warm", *prepared(raw, folder / "warm", cores, tokenizer="spacy", language=language))
        show("texts made, none", *prepared(tokenised, folder / "none", cores, tokenizer="none"))
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
