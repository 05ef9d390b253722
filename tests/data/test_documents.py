"""Documents of JSONL and Parquet files, and raw text, become text with one sentence a line; bad ones are named."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from elmo_ray.data import documents
from elmo_ray.data.documents import TextForm
from elmo_ray.data.indexing import Indexer, run_locally
from elmo_ray.errors import DataError
from elmo_ray.storage.files import make_folder

DOCUMENTS = ["the cat sat .\nit slept .", "a dog ran ."]
LINES = ["the cat sat .", "it slept .", "a dog ran ."]


def text_of(folder: Path, sources: list[Path], **form: Any) -> list[str]:
    """Return the lines that are trained on."""
    for name in ("state", "text"):
        make_folder(folder / name)
    indexer = Indexer(folder, 4096, run_locally, form=TextForm(**form))
    corpus, _ = indexer.index([str(source) for source in sources], "data.train")
    return [line for shard in corpus.shards for line in Path(shard.path).read_text().splitlines()]


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_format_gives_the_same_text(tmp_path: Path) -> None:
    records = [{"id": 1, "text": DOCUMENTS[0]}, {"id": 2, "text": None}, {"text": " "}, {"text": DOCUMENTS[1]}]
    plain = jsonl(tmp_path / "d.jsonl", records)
    packed, small = tmp_path / "d.JSONL.GZ", tmp_path / "d.ndjson.zst"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    # pzstd begins with a frame without text
    small.write_bytes(b"\x50\x2a\x4d\x18\4\0\0\0abcd" + zstandard.compress(plain.read_bytes()))
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    table = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": [DOCUMENTS[0], None, "", DOCUMENTS[1]]}), table, row_group_size=1)
    for source in (plain, packed, small, marked, table):
        assert text_of(tmp_path / f"of-{source.name}", [source]) == LINES, source
    # in one glob, with text between them
    text = tmp_path / "t.txt"
    text.write_text("plain text .\n")
    assert text_of(tmp_path / "mixed", [plain, text, table]) == [*LINES, "plain text .", *LINES]


def test_columns(tmp_path: Path) -> None:
    nested = jsonl(tmp_path / "n.jsonl", [{"page": {"body": DOCUMENTS[0]}}, {"page": None}])
    assert text_of(tmp_path / "one", [nested], column="page.body") == LINES[:2]
    table = tmp_path / "n.parquet"
    pq.write_table(pa.table({"page": [{"body": DOCUMENTS[0], "n": 1}, None], "n": [1, 2]}), table)
    assert text_of(tmp_path / "two", [table], column="page.body") == LINES[:2]
    for source, column, message in (
        (nested, "text", r"n.jsonl, line 1: has no column text \(data.column=text\); it has page"),
        (nested, "page.title", r"has no column page.title \(data.column=page.title\); page has body"),
        (nested, "page.body.x", 'line 1: page.body is "the cat.*, with no columns inside, and data.column=page.body.x'),
        (nested, "page", "data.column=page is .*, an object and no text"),
        (table, "text", r"n.parquet: has no column text \(data.column=text\); it has page, n"),
        (table, "page.title", r"n.parquet: has no column page.title \(.*\); page has body, n"),
        (table, "n.x.y", "n.parquet: n has values of int64, with no columns inside, and data.column=n.x.y names one"),
        (table, "n", "data.column=n has values of int64"),
    ):
        with pytest.raises(DataError, match=message):
            text_of(tmp_path / "three", [source], column=column)
    assert not list((tmp_path / "three" / "text").iterdir())


def test_bad_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "the cat ."}\n{"text": \n{"text": "a \xff ."}\n')
    with pytest.raises(DataError, match="bad.jsonl, line 2: is not JSON .*data.on_error=replace"):
        text_of(tmp_path / "out", [bad])
    caplog.set_level(logging.INFO, logger="elmo_ray")
    assert text_of(tmp_path / "out", [bad], on_error="replace") == ["the cat .", "a \ufffd ."]
    assert "data.train: 1 lines are not JSON or too long and are left out" in caplog.text
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"text": DOCUMENTS}), whole)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match="cut.parquet: is no whole Parquet file"):
        text_of(tmp_path / "out", [cut])
    empty = tmp_path / "empty.parquet"
    empty.write_bytes(b"")
    with pytest.raises(DataError, match="empty.parquet: is no whole Parquet file"):
        text_of(tmp_path / "out", [empty])
    renamed = tmp_path / "renamed.txt"
    renamed.write_bytes(whole.read_bytes())
    with pytest.raises(DataError, match="is a Parquet file; name it .parquet or set data.format=parquet"):
        text_of(tmp_path / "out", [renamed])
    assert text_of(tmp_path / "out", [renamed], format="parquet") == LINES


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    column = pa.array([b"the cat .", None, b"a \xff ."]).view(pa.string())  # Arrow looks at no bytes
    for number, values in enumerate((column, column.cast(pa.large_string()), column.dictionary_encode())):
        source = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"text": values}), source, row_group_size=1)
        with pytest.raises(DataError, match=rf"{number}.parquet, row 3: not UTF-8 \(byte 0xff\)"):
            text_of(tmp_path / "out", [source])
        assert text_of(tmp_path / "out", [source], on_error="replace") == ["the cat .", "a \ufffd ."]


def test_a_list_in_json_is_told(tmp_path: Path) -> None:
    source = tmp_path / "list.jsonl"
    for indent in (None, 1):
        source.write_text(json.dumps([{"text": "a ."}], indent=indent))
        with pytest.raises(
            DataError, match=r"list.jsonl, line 1: is not JSON .*write the objects of a list as one line"
        ):
            text_of(tmp_path / "out", [source])


def test_a_sentence_that_is_too_long_names_the_users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "long.parquet"
    pq.write_table(pa.table({"text": ["a b .\n" * 5000, "dog " * 5000]}), source)
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 10_000)
    with pytest.raises(DataError, match="long.parquet: has a sentence longer than"):
        text_of(tmp_path / "out", [source])


def test_bad_characters_and_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1 << 21)
    source = tmp_path / "d.jsonl"
    for line, message in (
        (b'{"text": "a \\u0000 ."}', "a NUL in the text"),
        (b'{"text": "a \\ud83d ."}', "half of a surrogate pair in the text"),
        (b'{"text": "' + b"a " * (3 << 20) + b'"}', "longer than 2 MiB; divide it, or leave such lines out"),
        (b"{" * 5000, "is not JSON"),
    ):
        source.write_bytes(b'{"text": "the cat ."}\n' + line + b'\n{"text": "it slept ."}')
        with pytest.raises(DataError, match=f"d.jsonl, line 2: {message}.*data.on_error=replace"):
            text_of(tmp_path / "out", [source])
        lines = text_of(tmp_path / "out", [source], on_error="replace")
        assert lines == ["the cat .", *(["a \ufffd ."] if "in the text" in message else []), "it slept ."]
    table = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": ["the cat .", "a", "b \0 ."]}), table, row_group_size=1)
    with pytest.raises(DataError, match="d.parquet, row 3: a NUL in the text"):
        text_of(tmp_path / "out", [table])
    assert text_of(tmp_path / "out", [table], normalize=("control",), tokenizer="none") == ["the cat .", "a", "b ."]
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    assert text_of(tmp_path / "out", [empty]) == []


def test_documents_that_are_not_tokenised(tmp_path: Path) -> None:
    raw = jsonl(tmp_path / "raw.jsonl", [{"text": "The cat sat. It slept, too."}] * 3)
    with pytest.raises(DataError, match="its documents are not tokenised .words such as 'sat.'.*data.tokenizer=spacy"):
        text_of(tmp_path / "out", [raw])
    assert text_of(tmp_path / "out", [raw], tokenizer="none") == ["The cat sat. It slept, too."] * 3
    pytest.importorskip("spacy")
    found = text_of(tmp_path / "out", [raw], tokenizer="spacy", language="en")
    assert found == ["The cat sat .", "It slept , too ."] * 3
    text = tmp_path / "raw.txt"
    text.write_text("The cat sat. It slept, too.\n")
    assert text_of(tmp_path / "out", [text], tokenizer="spacy", language="en") == found[:2]
    # each of the settings has its own text in the folder
    assert len(list((tmp_path / "out" / "text").glob("raw-*.txt"))) == 3


def test_a_text_that_is_made_is_used_again(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "d.jsonl", [{"text": text} for text in DOCUMENTS])
    assert text_of(tmp_path / "out", [source]) == LINES
    (made,) = (tmp_path / "out" / "text").glob("*.txt")
    before = made.stat()
    assert text_of(tmp_path / "out", [source]) == LINES
    assert made.stat().st_mtime_ns == before.st_mtime_ns
    jsonl(source, [{"text": DOCUMENTS[1]}])
    assert text_of(tmp_path / "out", [source]) == LINES[2:]


def test_text_that_is_divided_again_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("spacy")
    tokenised = tmp_path / "tokenised.txt"
    tokenised.write_text('" Yes , yes . " he said .\n' * 30)
    raw = jsonl(tmp_path / "raw.jsonl", [{"text": '"Yes, yes," he said. "That is so." He left.'}] * 30)
    spacy = {"tokenizer": "spacy", "language": "en"}
    text_of(tmp_path / "out", [raw], **spacy)
    text_of(tmp_path / "out", [tokenised], tokenizer="none")
    assert "looks tokenised" not in caplog.text
    text_of(tmp_path / "out", [tokenised], **spacy)
    assert f"data.train: {tokenised}: looks tokenised (full stops and commas stand alone)" in caplog.text
