"""Speed of `prepare` where it makes sentences of documents, beside the library alone on one core.

    python tests/benchmarks/tokenizing.py FILE [FILE ...] [--language en]

Each FILE has one tokenised sentence a line. Its sentences are written as people write them, in documents of 40, as one
JSONL file of all of them. spaCy (on some of the documents) and the tokenizer take the documents from memory, in one
process. Then Ray tasks on all CPUs make the texts of the file as in `prepare`: with cold processes, with processes that
know the words, and of the tokenised sentences without a tokenizer; "and indexed" is all that `prepare` does with them,
counting of words included. Ray is started before, as its start does not depend on the text. CPU time is what to compare
where other programs use the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SPACY_DOCUMENTS = 500

Speed = tuple[int, float, float]
"""Tokens, seconds, and seconds of CPU time."""


def alone(path: Path, language: str) -> Speed:
    """Return the speed of the tokenizer on all documents in this process."""
    from elmo_ray.text.tokenizers import make_tokenizer

    tokenizer = make_tokenizer("spacy", language)
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    begin, cpu = time.monotonic(), time.process_time()
    tokens = 0
    for start in range(0, len(texts), 500):
        tokens += sum(len(words) for document in tokenizer(texts[start : start + 500]) for words in document)
    return tokens, time.monotonic() - begin, time.process_time() - cpu


def spacy_itself(path: Path, language: str) -> Speed:
    """Return the speed of spaCy's blank pipeline with its sentencizer."""
    import spacy

    pipeline = spacy.blank(language)
    pipeline.add_pipe("sentencizer")
    texts = [json.loads(line)["text"] for line in itertools.islice(path.open(encoding="utf-8"), SPACY_DOCUMENTS)]
    begin, cpu = time.monotonic(), time.process_time()
    found = [[token.text for token in sentence] for text in pipeline.pipe(texts) for sentence in text.sents]
    return sum(map(len, found)), time.monotonic() - begin, time.process_time() - cpu


def _timed(task: dict[str, Any]) -> tuple[bytes, float]:
    """Run a task in a worker process; return its result and the seconds of CPU time."""
    from elmo_ray.data.indexing import run_task

    begin = time.process_time()
    return run_task(task), time.process_time() - begin


def prepared(path: Path, folder: Path, cores: int, index: bool = False, **data: str) -> Speed:
    """Return the speed with which texts are made of a file on all cores; `index`: and are indexed."""
    from elmo_ray.cluster.tasks import run_tasks
    from elmo_ray.data.counts import WordCounter
    from elmo_ray.data.documents import TextForm
    from elmo_ray.data.indexing import Indexer, make_task
    from elmo_ray.data.units import cut_units

    cpu = 0.0

    def runner(todo: Sequence[dict[str, Any]]) -> Iterable[tuple[int, bytes]]:
        nonlocal cpu
        for number, (result, seconds) in run_tasks(_timed, todo, workers=cores, cpus=1.0):
            cpu += seconds
            yield number, result

    form = TextForm(**data)  # type: ignore[arg-type]
    for name in ("state", "text"):
        (folder / name).mkdir(parents=True)
    begin = time.monotonic()
    if index:
        corpus, _ = Indexer(folder, 1 << 17, runner, form=form).index([str(path)], "data.train", WordCounter(1 << 22))
        return corpus.tokens, time.monotonic() - begin, cpu
    todo = [make_task(unit, unit.text_path(folder / "text", form), form) for unit in cut_units([str(path)], form)]
    for _ in runner(todo):
        pass
    seconds = time.monotonic() - begin
    return sum(len(Path(task["target"]).read_bytes().split()) for task in todo), seconds, cpu


def show(name: str, speed: Speed, cores: int, library: Speed) -> None:
    tokens, seconds, cpu = speed
    of_library = tokens / seconds / cores / (library[0] / library[1])
    of_cpu = tokens / cpu / (library[0] / library[2])
    print(f"{name:34}  {tokens / seconds:10,.0f}  {tokens / cpu:14,.0f}  {of_library:14.2f}  {of_cpu:8.2f}", flush=True)


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

    cores, spacy = available_cores(), {"tokenizer": "spacy", "language": arguments.language}
    with tempfile.TemporaryDirectory(prefix="elmo-ray-tokenizing-") as name:
        folder = Path(name)
        raw, tokenised, text = folder / "raw.jsonl", folder / "tokenised.jsonl", folder / "text.txt"
        documents = [document for path in arguments.files for document in quality.documents_of(path)]
        quality.write(raw, map(quality.detokenize, documents))
        quality.write(tokenised, map("\n".join, documents))
        text.write_text("".join("\n".join(document) + "\n" for document in documents), "utf-8")
        del documents
        print(f"{'':34}  tokens/s    a s of CPU time  / spaCy / cores  by CPU time")
        library = spacy_itself(raw, arguments.language)
        show("spaCy with its sentencizer", library, 1, library)
        show("data.tokenizer=spacy in a program", alone(raw, arguments.language), 1, library)
        free_cpus()  # starts Ray
        # The start of the worker processes is no part of the work either.
        prepared(tokenised, folder / "first", cores, tokenizer="none")
        for title, source, index, form in (
            ("texts made, spacy", raw, False, spacy),
            ("texts made, spacy, warm", raw, False, spacy),
            ("texts made and indexed, spacy", raw, True, spacy),
            ("texts made, none", tokenised, False, {"tokenizer": "none"}),
            ("texts made and indexed, none", tokenised, True, {"tokenizer": "none"}),
            ("tokenised text indexed", text, True, {}),
        ):
            show(title, prepared(source, folder / title, cores, index, **form), cores, library)
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
