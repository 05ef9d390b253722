"""Large files are cut and small ones share a text; the texts are the same for every order of work and after a kill."""

from __future__ import annotations

import gzip
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers.documents import backwards, index, jsonl, lines_of, texts_of

from elmo_ray.data import units
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.documents import Counts, Piece, TextForm, read_documents
from elmo_ray.data.encode import read_block
from elmo_ray.data.units import cut_units, read_lengths
from elmo_ray.errors import ConfigError, DataError

FORM = TextForm(tokenizer="none")


def some_documents(count: int, seed: int = 0) -> list[str]:
    """Return documents of one to six sentences; no two sentences are equal."""
    draw = random.Random(seed)
    return [
        "\n".join(f"d{number} s{place} w{draw.random()} ." for place in range(draw.randint(1, 6)))
        for number in range(count)
    ]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)
    monkeypatch.setattr(units, "SMALL_FILE_BYTES", 1000)
    monkeypatch.setattr(units, "GROUP_BYTES", 3000)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_every_cut_gives_every_line_once(
    tmp_path: Path, end: bytes, packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(1)
    lines = [str(number).encode() + b"x" * draw.choice([0, 3, 40, 500]) for number in range(25)]
    monkeypatch.setattr(units, "SMALL_FILE_BYTES", 0)
    monkeypatch.setattr(units, "MOST_PARTS", 40)
    source = tmp_path / f"raw.txt{packed}"
    for last in (b"", end, end + end):
        text = b"\xef\xbb\xbf" + end.join(lines) + last
        # Two members, so that the size which the .gz file states is too small; that of the .zst file is a guess.
        make = gzip.compress if packed == ".gz" else zstandard.ZstdCompressor(write_content_size=False).compress
        source.write_bytes(make(text[:-30]) + make(text[-30:]) if packed else text)
        whole = [line.decode() for line in lines] + ([""] if last == end + end else [])
        for size in (1, 7, 41, 500, 1 << 20):
            monkeypatch.setattr(units, "UNIT_BYTES", size)
            pieces = [piece for unit in cut_units([str(source)], FORM) for piece in unit.pieces]
            if packed:
                assert size > 41 or 1 < len(pieces) <= 40
                assert pieces[-1].end is None
            else:
                assert size > 1000 or len(pieces) == -(-source.stat().st_size // size)
            found = [text for piece in pieces for text in read_documents(piece, FORM, Counts())]
            assert [str(text).rstrip("\r") for text in found] == whole, size


def test_errors_name_lines_of_the_file(tmp_path: Path, small_units: None) -> None:
    source = jsonl(tmp_path / "d.jsonl", some_documents(200))
    lines = source.read_bytes().split(b"\n")
    for number in (0, 50, 123, 199):
        bad = tmp_path / "bad.jsonl"
        bad.write_bytes(b"\n".join([*lines[:number], b"{", *lines[number + 1 :]]))
        with pytest.raises(DataError, match=rf"bad\.jsonl, line {number + 1}: is not JSON"):
            index(tmp_path / "out", [bad])
    cut = tmp_path / "cut.parquet"
    pq.write_table(pa.table({"text": some_documents(300)}), cut, row_group_size=50)
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cut\.parquet: is no whole Parquet file"):
        index(tmp_path / "out", [cut])


def test_texts_do_not_depend_on_the_order_of_work(tmp_path: Path, small_units: None) -> None:
    documents = some_documents(300)
    expected = [line for document in documents for line in document.split("\n")]
    plain = jsonl(tmp_path / "d.jsonl", documents)
    table = tmp_path / "d.parquet"
    pq.write_table(pa.table({"n": range(300), "text": documents}), table, row_group_size=7)
    packed = tmp_path / "d.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    raw = tmp_path / "d.txt"
    raw.write_text("\n".join(documents), "utf-8")
    for source, count in ((plain, 10), (table, 8), (packed, 7), (raw, 8)):
        form = {"normalize": ("whitespace",)}  # so that raw text is made into a text, too
        one, two = tmp_path / f"{source.name}-one", tmp_path / f"{source.name}-two"
        corpus, findings = index(one, [source], form=form)
        assert lines_of(corpus) == expected
        assert findings.documents == Counts(len(expected) if source == raw else 300)
        assert len(corpus.shards) >= count and {shard.source for shard in corpus.shards} == {str(source)}
        other, _ = index(two, [source], runner=backwards, form=form)
        assert texts_of(one) == texts_of(two) and other.fingerprint == corpus.fingerprint
        for shard in corpus.shards:
            assert read_lengths(shard.path).sum() == shard.size


def test_small_files_share_texts(tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = some_documents(300)
    sources = [jsonl(tmp_path / f"{number:03}.jsonl", documents[number : number + 1]) for number in range(300)]
    plain = tmp_path / "100.txt"  # text as it is stands between them
    plain.write_text("a b\n")
    sources.insert(150, plain)
    corpus, _ = index(tmp_path / "out", sources)
    expected = [line for document in documents for line in document.split("\n")]
    at = sum(document.count("\n") + 1 for document in documents[:150])
    assert lines_of(corpus) == [*expected[:at], "a b", *expected[at:]]
    assert 10 < len(corpus.shards) < 50
    made = texts_of(tmp_path / "out")
    # Files that are added behind the others leave the first texts as they are; a change is noticed.
    added = jsonl(tmp_path / "999.jsonl", ["x ."])
    more, _ = index(tmp_path / "out", [*sources, added])
    assert lines_of(more)[-1] == "x ." and len(set(texts_of(tmp_path / "out")) - set(made)) <= 2
    jsonl(sources[0], ["changed ."])
    assert lines_of(index(tmp_path / "out", sources)[0])[0] == "changed ."
    sources[78].write_text("")
    assert index(tmp_path / "out", sources)[1].empty_files == [str(sources[78])]
    sources[77].write_text("{\n")
    with pytest.raises(DataError, match=r"077\.jsonl, line 1: is not JSON"):
        index(tmp_path / "out", sources)
    monkeypatch.setattr(units, "GROUP_FILES", 100)
    monkeypatch.setattr(units, "GROUP_BYTES", 1 << 30)
    assert [len(unit.pieces) for unit in cut_units([str(source) for source in sources[:150]], FORM)] == [100, 50]


_PREPARE = """
import sys
from elmo_ray import prepare
from elmo_ray.data import units
units.UNIT_BYTES, units.SMALL_FILE_BYTES = 1 << 16, 0
prepare.SMALL_BYTES, prepare.BATCH_TASKS = 0, 1
sys.exit(prepare.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=(pytest.mark.slow, pytest.mark.ray))])
def test_a_killed_prepare_goes_on(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "d.jsonl", [*some_documents(10_000), *some_documents(5_000)])
    config = tmp_path / "c.yaml"
    config.write_text(f"cluster: {{workers: {workers}}}\n")
    settings = [f"data.train={source}", "data.tokenizer=none", "data.deduplicate=sentences"]
    command = [sys.executable, "-c", _PREPARE, str(config), *settings, f"run.storage_path={tmp_path / 'killed'}"]

    monkeypatch.setattr(units, "UNIT_BYTES", 1 << 16)
    monkeypatch.setattr(units, "SMALL_FILE_BYTES", 0)
    whole, _ = index(tmp_path / "whole", [source], "sentences", runner=backwards)
    made = [name for name in texts_of(tmp_path / "whole") if name.endswith(".txt") and "sentences" not in name]
    assert len(made) > 20
    killed = tmp_path / "killed" / "prepared"
    for reached in (5, len(made) + 2):  # the second one while it leaves repeated sentences out
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(killed.glob("text/*.txt"))) < reached:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "making sentences of data.train: " not in done.stderr, "all texts were made before"
    assert texts_of(killed) == texts_of(tmp_path / "whole")
    assert not list(killed.glob("text/.*"))
    prepared = Corpus.load(killed / "train.npz")
    assert lines_of(prepared) == lines_of(whole)


def test_blocks_end_with_documents(tmp_path: Path, small_units: None) -> None:
    # Of the long documents some are longer than a block of 4096 bytes.
    draw = random.Random(3)
    documents = [
        "\n".join(f"d{number} s{place} ." for place in range(draw.choice([1, 5, 40, 900]))) for number in range(400)
    ]
    for name in ("d.jsonl", "d.jsonl.gz"):  # many texts, and one
        source = jsonl(tmp_path / "d.jsonl", documents)
        if name.endswith(".gz"):
            (tmp_path / name).write_bytes(gzip.compress(source.read_bytes()))
        corpus, _ = index(tmp_path / f"of-{name}", [tmp_path / name])
        parts = corpus.split(0.1, 5)
        seen = [{line.split()[0] for block in part.blocks() for line in read(block)} for part in parts]
        assert not seen[0] & seen[1] and seen[0] | seen[1] == {f"d{number}" for number in range(400)}
        assert abs(parts[1].positions - 0.1 * corpus.positions) < 4000
        assert int(np.max(corpus.block_end - corpus.block_start)) <= 4096
        again, _ = index(tmp_path / f"of-{name}", [tmp_path / name])  # from the stored states
        assert again.split(0.1, 5)[1].fingerprint == parts[1].fingerprint


def read(block: Any) -> list[str]:
    return read_block(block).decode().splitlines()


def test_the_last_block_of_a_text_holds_a_whole_document(tmp_path: Path) -> None:
    name = "é" * 110 + ".jsonl"  # nearly as long as a name can be
    source = jsonl(tmp_path / name, ["\n".join(["a b c d ."] * 2000)] * 2)
    corpus, _ = index(tmp_path / "out", [source])
    with pytest.raises(ConfigError, match="needs more blocks than the 1 of this corpus"):
        index(tmp_path / "one", [jsonl(tmp_path / "one.jsonl", ["\n".join(["a ."] * 5000)])])[0].split(0.1, 1)
    assert corpus.split(0.1, 1)[1].positions == corpus.positions // 2


def test_every_piece_is_read_by_its_own_bounds(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    texts = [str(number) for number in range(1000)]
    for rows in (1000, 300, 10, 1):
        pq.write_table(pa.table({"text": texts}), table, row_group_size=rows)
        for step in (7, 250, 999):
            pieces = [Piece(str(table), start, min(start + step, 1000)) for start in range(0, 1000, step)]
            found = [list(read_documents(piece, FORM, Counts())) for piece in [*pieces, Piece(str(table), 400)]]
            assert [len(part) for part in found[:-2]] == [step] * (len(pieces) - 1)
            assert [text for part in found[:-1] for text in part] == texts and found[-1] == texts[400:]


def test_large_row_groups_and_compressed_files_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 5000)
    monkeypatch.setattr(units, "SMALL_FILE_BYTES", 0)
    documents = [f"d{number} {random.Random(number).random()} ." for number in range(2000)]
    expected = [line for document in documents for line in document.split("\n")]
    table, packed = tmp_path / "d.parquet", tmp_path / "d.jsonl.gz"
    # two small row groups, a large one, a small one
    with pq.ParquetWriter(table, pa.schema({"text": pa.string()})) as writer:
        for start, end in ((0, 40), (40, 80), (80, 1990), (1990, 2000)):
            writer.write_table(pa.table({"text": documents[start:end]}))
    packed.write_bytes(gzip.compress(jsonl(tmp_path / "d.jsonl", documents).read_bytes()))
    for source, count in ((table, 10), (packed, 8)):
        cut = cut_units([str(source)], FORM)
        assert len(cut) == count
        corpus, findings = index(tmp_path / f"of-{source.name}", [source], runner=backwards)
        assert lines_of(corpus) == expected and findings.documents == Counts(2000) and not findings.empty_files
    assert [unit.pieces[0].start for unit in cut_units([str(table)], FORM)][:2] == [0, 80]
    # The errors name the row, or the line, of the file.
    documents[1500] = "a \0 ."
    pq.write_table(pa.table({"text": documents}), table)
    packed.write_bytes(gzip.compress(jsonl(tmp_path / "d.jsonl", documents).read_bytes()))
    for source, place in ((table, r"d\.parquet, row 1501"), (packed, r"d\.jsonl\.gz, line 1501")):
        with pytest.raises(DataError, match=f"{place}: a NUL in the text"):
            index(tmp_path / "bad", [source])


def test_a_mistake_leaves_no_part_of_a_text(tmp_path: Path) -> None:
    """The mistake of one task ends others in the middle, and some of these take a moment to end."""
    source = jsonl(tmp_path / "d.jsonl", some_documents(3))
    parts = []

    def runner(todo: Any) -> Any:
        for seconds in ("0", "0.5"):
            process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
            parts.append(tmp_path / "out" / "text" / f".d.txt.{socket.gethostname()}.{process.pid}.part")
            parts[-1].write_text("half")
            threading.Thread(target=process.wait).start()
        raise DataError("d.jsonl, line 9: a mistake")
        yield

    with pytest.raises(DataError, match="line 9"):
        index(tmp_path / "out", [source], runner=runner)
    assert len(parts) == 2 and not any(part.exists() for part in parts)
