"""Repeated documents and sentences are left out: all but the first of the corpus, whatever the order of the work."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.documents import backwards, index, jsonl, lines_of, texts_of

from elmo_ray.data import duplicates, units
from elmo_ray.data.units import read_lengths
from elmo_ray.errors import ConfigError


def without_repeated(items: list[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def test_first_ones_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)
    monkeypatch.setattr(units, "SMALL_FILE_BYTES", 1000)
    monkeypatch.setattr(units, "GROUP_BYTES", 3000)
    monkeypatch.setattr(duplicates, "SPAN_BYTES", 700)
    monkeypatch.setattr(duplicates, "_SORTED", 50)  # many parts
    draw = random.Random(1)
    documents = [
        "\n".join(f"s{int(draw.paretovariate(0.2)) % 1000} ." for _ in range(draw.randint(1, 3))) for _ in range(600)
    ]
    spaced = [document.replace(" ", "  ") + "\n" for document in documents[:100]]  # the same words
    sources = [jsonl(tmp_path / "a.jsonl", documents), jsonl(tmp_path / "b.jsonl", spaced)]
    table = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": [*documents[50:200], "new ."]}), table, row_group_size=5)
    sources.append(table)
    given = [*documents, *documents[:100], *documents[50:200], "new ."]
    sentences = [line for document in given for line in document.split("\n")]
    kept = without_repeated(given)
    expected = {
        "documents": ([line for document in kept for line in document.split("\n")], len(given) - len(kept)),
        "sentences": (without_repeated(sentences), len(sentences) - len(without_repeated(sentences))),
    }
    caplog.set_level(logging.INFO, logger="elmo_ray")
    out = tmp_path / "out"
    for kind, (lines, repeated) in expected.items():
        total = len(given if kind == "documents" else sentences)
        corpus, findings = index(out, sources, kind)
        assert lines_of(corpus) == lines
        assert (findings.repeated, findings.items) == (repeated, total)
        assert f"data.train: {repeated:,} of {total:,} {kind} stand there again and are left out" in caplog.text
        for shard in corpus.shards:
            assert read_lengths(shard.path).sum() == shard.size and shard.size
        # A run after this one finds the texts as they are, and another order of work makes the same.
        made = texts_of(out)
        caplog.clear()
        again, findings = index(out, sources, kind)
        assert "hashing" not in caplog.text and texts_of(out) == made
        assert again.fingerprint == corpus.fingerprint and findings.repeated == repeated
        index(tmp_path / f"{kind}", sources, kind, runner=backwards)
        assert texts_of(tmp_path / kind).items() <= made.items()
        assert not list((out / ".hashes").iterdir())
    # What is repeated depends on all files: other files leave these texts as they are.
    before = texts_of(out)
    assert lines_of(index(out, sources[2:], "documents")[0]) == [
        line for document in without_repeated([*documents[50:200], "new ."]) for line in document.split("\n")
    ]
    assert before.items() <= texts_of(out).items()
    # A changed file is noticed, and one that lost its text, too.
    jsonl(sources[1], ["new .", "newer ."])
    lines = lines_of(index(out, sources, "documents")[0])
    assert lines[-3:].count("newer .") == 1 and lines.count("new .") == 1
    next(iter((out / "text").glob("*-documents-*.txt"))).unlink()
    assert lines_of(index(out, sources, "documents")[0]) == lines
    assert lines_of(index(out, sources)[0])[-2:] == [*documents[199].split("\n")[-1:], "new ."]


def test_text_that_is_tokenised(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_bytes(b"a b .\r\nc .\n\na  b .\nc .\nd .")
    corpus, findings = index(tmp_path / "out", [text], "sentences", form={"tokenizer": None})
    assert lines_of(corpus) == ["a b .", "c .", "d ."] and (findings.repeated, findings.items) == (2, 5)
    with pytest.raises(ConfigError, match=r"data.deduplicate=documents: \S+/t.txt is text .*deduplicate=sentences"):
        index(tmp_path / "out", [text], "documents")
    # Without repetitions the text is taken as it is made, and an empty one is no trouble.
    text.write_bytes(b"a b .\nc .\n")
    corpus, _ = index(tmp_path / "out", [text], "sentences")
    assert lines_of(corpus) == ["a b .", "c ."] and "sentences" not in corpus.shards[0].path
    text.write_bytes(b"\n")
    assert index(tmp_path / "out", [text], "sentences")[0].sentences == 0


def test_hashes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice does not depend on how many hashes are sorted at a time."""
    draw = np.random.default_rng(0)
    items = [[b"%d" % number for number in draw.integers(0, 3000, 2000)] for _ in range(3)]
    files = []
    for number, part in enumerate(items):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(b"\n".join(part) + b"\n")
        lengths = np.array([path.stat().st_size], np.uint32)
        (tmp_path / f"{number}.documents.npy").write_bytes(units.pack_lengths(lengths))
        (span,) = duplicates.spans_of(str(path))
        files.append(tmp_path / f"{number}.bin")
        files[-1].write_bytes(duplicates.hash_span(span, "sentences"))
    flat = [item for part in items for item in part]
    expected = np.ones(len(flat), np.bool_)
    expected[np.unique(flat, return_index=True)[1]] = False
    for limit in (1, 100, 2_500, 1 << 20):
        monkeypatch.setattr(duplicates, "_SORTED", limit)
        found, counts = duplicates.find_repeated(files)
        assert counts == [2000] * 3
        bits = [np.unpackbits(each, count=2000) for each in found]
        assert np.array_equal(np.concatenate(bits), expected)
