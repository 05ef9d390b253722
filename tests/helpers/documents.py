"""Texts that are made of documents: their making in this process, and what has been made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from elmo_ray.data.corpus import Corpus
from elmo_ray.data.documents import TextForm
from elmo_ray.data.indexing import Findings, Indexer, Task, run_locally, run_task
from elmo_ray.storage.files import make_folder


def backwards(todo: Sequence[Task]) -> Iterable[tuple[int, bytes]]:
    """A runner that has the last task done first."""
    return ((number, run_task(todo[number])) for number in reversed(range(len(todo))))


def index(folder: Path, sources: Sequence[Path], deduplicate: Any = "off", **more: Any) -> tuple[Corpus, Findings]:
    for name in ("state", "text"):
        make_folder(folder / name)
    form = TextForm(**{"tokenizer": "none", **more.pop("form", {})})
    indexer = Indexer(folder, 4096, more.pop("runner", run_locally), form=form, **more)
    return indexer.index([str(source) for source in sources], "data.train", deduplicate=deduplicate)


def lines_of(corpus: Corpus) -> list[str]:
    return [line for shard in corpus.shards for line in Path(shard.path).read_text("utf-8").splitlines()]


def texts_of(folder: Path) -> dict[str, bytes]:
    """Return the contents of all texts, and of the lengths of their documents, by name."""
    return {path.name: path.read_bytes() for path in (folder / "text").iterdir() if path.suffix != ".json"}


def jsonl(path: Path, documents: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), "utf-8")
    return path
