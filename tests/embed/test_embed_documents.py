"""`embed` with JSONL, Parquet and raw text: the vectors of their sentences, joined with the columns that are kept."""

from __future__ import annotations

import datetime
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers.saved_models import WORDS, save_checkpoint
from helpers.tiny_runs import sentences, tiny_config

from elmo_ray.elmo.encoder import embed_sentences
from elmo_ray.embed import main
from elmo_ray.model.bilm import BiLM

RAW = ["The dog sees the cat. The cat hears!\n\nThe old house.", "It sleeps."]
SPLIT = [["The dog sees the cat .", "The cat hears !", "The old house ."], ["It sleeps ."]]
DAY = datetime.datetime(2024, 5, 17, 12, tzinfo=datetime.timezone.utc)


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def embed(*arguments: object, code: int = 0) -> None:
    assert main([*map(str, arguments), "cluster.workers=0"]) == code


def test_sentences_are_joined_with_their_documents(
    tmp_path: Path, checkpoint: Path, model: BiLM, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("spacy")
    caplog.set_level(logging.INFO, logger="elmo_ray")
    texts = [RAW[0], None, RAW[1], " "]
    ids = ["a", "b", "c", "d"]
    meta = [{"n": 1.5}, {"n": 2}, None, {"n": 4}]
    table = {
        "id": ids,
        "text": texts,
        "meta": pa.array(meta, pa.struct({"n": pa.float32()})),
        "when": pa.array([DAY, None, DAY, DAY], pa.timestamp("ms", "UTC")),
        "kind": pa.array(["x", "y", "x", "y"]).dictionary_encode(),
        "tags": pa.array([["x"], [], None, ["y", "z"]]),
        "view": pa.array(["v", None, "w", "w"], pa.string_view()),
    }
    pq.write_table(pa.table(table), tmp_path / "d.parquet", row_group_size=3)
    records = [dict(zip(("id", "text", "meta"), row, strict=True)) for row in zip(ids, texts, meta, strict=True)]
    del records[3]["meta"]
    plain = jsonl(tmp_path / "d.jsonl", records)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "d.ndjson.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    settings = [
        "data.tokenizer=spacy",
        "data.language=en",
        "embed.layers=top",
        "embed.keep=[id, meta.n, kind, when, tags, view]",
    ]
    embed(checkpoint, tmp_path / "d.parquet", tmp_path / "rows", *settings)
    rows = pq.read_table(tmp_path / "rows")
    names = [
        "sentence",
        "document",
        "sentence_in_document",
        "id",
        "meta.n",
        "kind",
        "when",
        "tags",
        "view",
        "words",
        "vector",
    ]
    assert rows.column_names == names
    assert rows.schema.field("when").type == pa.timestamp("ms", "UTC")
    assert rows.schema.field("meta.n").type == pa.float32() and rows.schema.field("kind").type == pa.string()
    assert rows["sentence"].to_pylist() == list(range(6))
    assert rows["document"].to_pylist() == [0, 0, 0, 1, 2, 3]
    assert rows["sentence_in_document"].to_pylist() == [0, 1, 2, 0, 0, 0]
    assert rows["id"].to_pylist() == ["a", "a", "a", "b", "c", "d"]
    assert rows["tags"].to_pylist() == [["x"], ["x"], ["x"], [], None, ["y", "z"]]
    assert rows["view"].to_pylist() == ["v", "v", "v", None, "w", "w"]
    assert rows["meta.n"].to_pylist() == [1.5, 1.5, 1.5, 2, None, 4] and rows["when"].to_pylist()[2:4] == [DAY, None]
    expected = [*(line.split() for line in SPLIT[0]), [], SPLIT[1][0].split(), []]
    assert rows["words"].to_pylist() == expected
    for ours, theirs in zip(rows["vector"].to_pylist(), embed_sentences(model, expected), strict=True):
        np.testing.assert_allclose(np.array(ours).reshape(theirs[-1].shape), theirs[-1], rtol=0, atol=1e-5)
    assert "in: 4 documents, 2 of them empty or null, each of which has one row without words" in caplog.text
    # the same of JSON, packed or not, and numbers over several files in one job
    settings[-1] = "embed.keep=[id, meta.n]"
    embed(checkpoint, plain, tmp_path / "json", *settings)
    assert pq.read_table(tmp_path / "json", columns=["id", "meta.n", "words"]).to_pydict() == {
        "id": ["a", "a", "a", "b", "c", "d"],
        "meta.n": [1.5, 1.5, 1.5, 2, None, None],
        "words": expected,
    }
    embed(checkpoint, tmp_path / "d.*", tmp_path / "all", *settings)
    every = pq.read_table(tmp_path / "all")
    assert every["document"].to_pylist() == [4 * file + n for file in range(4) for n in (0, 0, 0, 1, 2, 3)]
    assert every["id"].to_pylist() == rows["id"].to_pylist() * 4 and every["sentence"].to_pylist() == list(range(24))
    record = json.loads((tmp_path / "all" / "_embed.json").read_text())
    assert [(file["first_sentence"], file["first_document"]) for file in record["in"]] == [
        (0, 0), (6, 4), (12, 8), (18, 12),
    ]  # fmt: skip
    assert record["settings"]["tokenizer"] == "spacy" and not (tmp_path / "all" / "_unpacked").exists()


def test_a_job_with_documents_goes_on(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Units of part of a document, of several, and a carried state: the bytes of a job that was not stopped."""
    lines = [line or "the dog ." for line in sentences(60, seed=4)]
    records = [{"id": n, "text": "\n".join(lines[3 * n : 3 * n + 3])} for n in range(19)]
    records.insert(5, {"id": 100, "text": "\n".join(lines)})
    source = jsonl(tmp_path / "d.jsonl", records)
    settings = ["data.block_bytes=1024", "embed.keep=id"]
    for name in ("whole", "stopped"):
        embed(checkpoint, source, tmp_path / name, *settings)
    parts = sorted(path.name for path in (tmp_path / "whole").glob("part-*"))
    assert len(parts) > 4
    for name in parts[1:3]:
        (tmp_path / "stopped" / name).unlink()
    embed(checkpoint, source, tmp_path / "stopped", *settings, "--resume")
    for name in parts:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    table = pq.read_table(tmp_path / "whole")
    joined = [" ".join(words) for words in table["words"].to_pylist()]
    assert joined == [line for record in records for line in record["text"].split("\n")]
    kept = [record["id"] for record in records for _ in record["text"].split("\n")]
    assert table["id"].to_pylist() == kept and table.schema.field("id").type == pa.int64()
    embed(checkpoint, source, tmp_path / "carried", "embed.state=carry", "embed.keep=id", "data.block_bytes=1024")
    carried = pq.read_table(tmp_path / "carried")
    assert carried["id"].to_pylist() == kept and carried["document"].equals(table["document"])
    capsys.readouterr()
    embed(checkpoint, source, tmp_path / "whole", "data.block_bytes=1024", "--resume", code=2)
    assert "keep was ['id'] and is []" in capsys.readouterr().err
    embed(checkpoint, source, tmp_path / "whole", *settings, "data.tokenizer=none", "--resume", "--dry-run")
    embed(checkpoint, source, tmp_path / "out.hdf5", "data.block_bytes=1024", "embed.layers=top")
    with h5py.File(tmp_path / "out.hdf5") as file:
        assert len(file) == len(joined)
        assert [int(file[str(n)].attrs["document"]) for n in range(len(file))] == table["document"].to_pylist()
        assert file["1"].attrs["sentence_in_document"] == 1


def test_small_files_share_shards(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(40):
        records = [{"id": f"{number}-{n}", "text": "the dog .\na cat ."} for n in range(number % 3)]
        jsonl(tmp_path / f"{number:02}.jsonl", records)
    (tmp_path / "20.txt").write_text("the old house .\n")  # of another kind, in the middle
    settings = ["embed.layers=top", "embed.output=means"]
    embed(checkpoint, tmp_path / "*.*", tmp_path / "out", *settings)
    assert len(list((tmp_path / "out").glob("part-*"))) == 3
    rows = pq.read_table(tmp_path / "out")
    documents = [n for n in range(40) for _ in range(n % 3)]
    assert len(rows) == 2 * len(documents) + 1 and rows["sentence"].to_pylist() == list(range(len(rows)))
    record = json.loads((tmp_path / "out" / "_embed.json").read_text())
    assert [Path(file["path"]).name for file in record["in"]] == sorted(path.name for path in tmp_path.glob("*.*"))
    # 20.jsonl comes before 20.txt
    for number, file in ((1, 1), (2, 2), (19, 19), (20, 20), (22, 23), (38, 39)):
        before = sum(n < number for n in documents) + (number > 20)
        assert record["in"][file]["first_document"] == before, number
        assert rows["document"].to_pylist()[record["in"][file]["first_sentence"]] == before, number
    assert record["in"][40]["first_sentence"] is None, "39.jsonl is empty"
    assert record["in"][21]["first_sentence"] == 2 * sum(n <= 20 for n in documents)
    # kept columns go with their documents; a carried state ends with its file
    embed(checkpoint, tmp_path / "*.jsonl", tmp_path / "kept", *settings, "embed.keep=id")
    kept = pq.read_table(tmp_path / "kept")["id"].to_pylist()
    assert kept == [f"{number}-{n}" for number in range(40) for n in range(number % 3) for _ in range(2)]
    embed(checkpoint, tmp_path / "0?.jsonl", tmp_path / "carried", *settings, "embed.state=carry")
    assert len(list((tmp_path / "carried").glob("part-*"))) == 6  # 0, 3, 6 and 9 are empty
    (tmp_path / "33.jsonl").write_text("{\n")
    embed(checkpoint, tmp_path / "*.jsonl", tmp_path / "bad", *settings, code=2)
    assert "33.jsonl, line 1: is not JSON" in capsys.readouterr().err and not (tmp_path / "bad").exists()


def test_mistakes_are_one_line(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = jsonl(tmp_path / "good.jsonl", [{"id": 1, "text": "the dog ."}, {"id": 2, "text": "a cat ."}])
    raw = jsonl(tmp_path / "raw.jsonl", [{"id": 1, "text": RAW[0]}])
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"id": ["a"], "text": ["the dog ."]}), table)
    text = tmp_path / "t.txt"
    text.write_text("the dog .\n")
    book = jsonl(tmp_path / "book.jsonl", [{"text": "the dog .", "all": "x" * 2_000_000}])
    mixed = jsonl(tmp_path / "mixed.jsonl", [{"id": 1, "text": "the dog ."}, {"id": "x", "text": "the cat ."}])
    bare = jsonl(tmp_path / "bare.jsonl", [{"text": "the dog .", "meta": [{}]}])
    blobs = tmp_path / "blobs.parquet"
    pq.write_table(pa.table({"text": ["the dog ."] * 2, "all": [[b"x"], [b"x" * 2_000_000]]}), blobs)
    half = tmp_path / "half.jsonl"
    half.write_text('{"text": "the \\ud800 dog ."}\n')
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(table.read_bytes()[:-9])
    renamed = tmp_path / "renamed.txt"
    renamed.write_bytes(good.read_bytes())
    empty = jsonl(tmp_path / "empty.jsonl", [])
    out = tmp_path / "out"
    for source, settings, message in (
        (raw, [], "its documents are not tokenised (words such as 'cat.'); set data.tokenizer=spacy"),
        (good, ["embed.keep=title"], "good.jsonl: has no column title (embed.keep=title); it has id, text"),
        (table, ["embed.keep=[id, page.n]"], "t.parquet: has no column page (embed.keep=page.n); it has id, text"),
        (
            table,
            ["embed.keep=id.n"],
            "t.parquet: id has values of string, with no columns inside, and embed.keep=id.n names one",
        ),
        (
            table,
            ["data.column=id.n"],
            "t.parquet: id has values of string, with no columns inside, and data.column=id.n names one",
        ),
        (good, ["data.column=id"], "good.jsonl, line 1: data.column=id is 1, neither text nor a list of words"),
        (text, ["embed.keep=id"], f"embed.keep=id: {text} is text, which has no columns"),
        (good, ["embed.keep=words"], "embed.keep=words: OUT has a column of this name already"),
        (good, ["embed.keep=[id, id]"], "embed.keep has id twice"),
        (mixed, ["embed.keep=id"], "mixed.jsonl: embed.keep=id: its values make no column of one type"),
        (tmp_path / "[gt]*", ["embed.keep=id"], "is text, which has no columns"),
        (book, ["embed.keep=all"], "book.jsonl: embed.keep=all: a document has a value of 2.0 MB there, which each"),
        (blobs, ["embed.keep=all"], "blobs.parquet: embed.keep=all: a document has a value of 2.0 MB there"),
        (bare, ["embed.keep=meta"], "bare.jsonl: embed.keep=meta: its values are list<item: struct<>>, which Parquet"),
        (half, [], "half.jsonl, line 1: half of a surrogate pair in the text; mend it, or set data.on_error=replace"),
        (cut, [], "cut.parquet: is no whole Parquet file"),
        (renamed, [], "renamed.txt: is JSON; with an object in each line, name it .jsonl or set data.format=jsonl"),
        (empty, [], f"in={empty}: no sentence in 1 files"),
        (good, ["data.format=text", "data.column=id"], "data.column is set, but data.format=text has no columns"),
        (good, ["data.tokenizer=nosuch"], "data.tokenizer=nosuch: no such tokenizer"),
    ):
        capsys.readouterr()
        embed(checkpoint, source, out, *settings, code=2)
        (line,) = capsys.readouterr().err.strip().split("\n")[-1:]
        assert line.startswith("error: ") and message in line, line
        assert not out.exists(), message
    embed(checkpoint, good, tmp_path / "o.hdf5", "embed.keep=id", code=2)
    assert "HDF5 has no columns; name a folder as OUT" in capsys.readouterr().err
    # one text column, two types of id
    embed(checkpoint, f"{tmp_path}/[gt]*[lt]", out, "embed.keep=id", "data.format=auto", code=2)
    assert "is text" in capsys.readouterr().err
    text.unlink()
    embed(checkpoint, f"{tmp_path}/[gt]*", out, "embed.keep=id", code=2)
    assert "t.parquet: a column of embed.keep has other values than in the files before it" in capsys.readouterr().err
    # what is refused above is taken with the setting that the line names
    embed(checkpoint, raw, tmp_path / "as-it-is", "data.tokenizer=none")
    assert pq.read_table(tmp_path / "as-it-is")["words"].to_pylist()[0][4] == "cat."
    embed(checkpoint, half, tmp_path / "half", "data.on_error=replace")
    embed(checkpoint, renamed, tmp_path / "renamed", "data.format=jsonl")


def test_bad_lines_are_left_out_on_request(
    tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte order mark, ends of Windows, a line that is no JSON, one of over 64 MiB, bytes that are not UTF-8."""
    source = tmp_path / "bad.jsonl"
    long = b'{"text": "' + b"dog " * (17 << 20) + b'"}\r\n'
    good = b'\xef\xbb\xbf{"text": "the dog ."}\r\n\r\n', b'{"text": "a \xff cat\\r\\nruns ."}\n{"text": "the end ."}'
    source.write_bytes(good[0] + b"[1]\n" + long + good[1])
    embed(checkpoint, source, tmp_path / "out", code=2)
    assert "bad.jsonl, line 3: is not JSON (is [1] and no object)" in capsys.readouterr().err
    embed(checkpoint, source, tmp_path / "out", "data.on_error=replace", "embed.layers=top")
    words = [" ".join(words) for words in pq.read_table(tmp_path / "out")["words"].to_pylist()]
    assert words == ["the dog .", "a \ufffd cat", "runs .", "the end ."]
    assert "in: 2 lines are not JSON or too long, and are left out" in caplog.text
    assert "in: 1 invalid UTF-8 sequences or NULs become U+FFFD" in caplog.text
    source.write_bytes(good[0] + long)
    embed(checkpoint, source, tmp_path / "new", code=2)
    assert "bad.jsonl, line 3: longer than 64 MiB; divide it" in capsys.readouterr().err


def test_the_tokenizer_of_the_run_is_used(tmp_path: Path, model: BiLM, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("spacy")
    caplog.set_level(logging.INFO, logger="elmo_ray")
    config = tiny_config(data__tokenizer="spacy", data__language="en")
    source = save_checkpoint(tmp_path / "checkpoint", config, WORDS, model)
    raw = tmp_path / "raw.txt"
    raw.write_text("\n".join(text.replace("\n", " ") for text in RAW) + "\n")
    embed(source, raw, tmp_path / "out")
    table = pq.read_table(tmp_path / "out")
    assert [" ".join(words) for words in table["words"].to_pylist()] == [line for each in SPLIT for line in each]
    assert table["document"].to_pylist() == [0, 0, 0, 1]
    assert "data.tokenizer=spacy, as in the training of" in caplog.text
    embed(source, raw, tmp_path / "lines", "data.tokenizer=none")
    assert len(pq.read_table(tmp_path / "lines")) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_ray_makes_what_one_process_makes(
    tmp_path: Path, checkpoint: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elmo_ray.prepare.SMALL_BYTES", 1)
    for number in range(3):
        lines = [line or "the dog ." for line in sentences(80, seed=number)]
        records = [{"id": n, "text": "\n".join(lines[n : n + 2])} for n in range(0, 80, 2)]
        jsonl(tmp_path / f"{number}.jsonl", records)
    arguments = [checkpoint, tmp_path / "*.jsonl", "data.block_bytes=1024", "cluster.threads=1", "embed.keep=id"]
    assert main([*map(str, arguments), str(tmp_path / "pool"), "cluster.workers=2"]) == 0
    embed(*arguments, tmp_path / "alone")
    parts = sorted(path.name for path in (tmp_path / "alone").glob("part-*"))
    assert len(parts) > 4
    for name in parts:
        assert (tmp_path / "pool" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    # a mistake that a task meets
    jsonl(tmp_path / "3.jsonl", [{"id": 1, "text": RAW[0]}])
    assert main([*map(str, arguments), str(tmp_path / "bad"), "cluster.workers=2"]) == 2
