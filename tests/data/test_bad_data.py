"""What every verb makes of text and vocabularies that are damaged, missing or not what they seem, as a user meets it:
one line with the file and the cure and exit code 2, or a defined outcome that a warning or a count tells of.
"""

from __future__ import annotations

import bz2
import gzip
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from helpers.verbs_at_work import TextFolder, sentence_bytes, write_texts

from elmo_ray import pretrain
from elmo_ray.data import text
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.training.metrics import read_metrics

GOOD = sentence_bytes(30, 7)


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> TextFolder:
    return TextFolder(tmp_path, capsys, caplog)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of its own; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    assert pretrain.main([str(write_texts(folder))]) == 0
    return folder / "runs" / "tiny"


def bytes_of(data: bytes) -> Callable[[Path], int]:
    return lambda path: path.write_bytes(data)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


NOT_TEXT = "or where only a few bytes are damaged, set data.on_error=replace"
# What stands beside good text: its name's end, how it is made, and what the user reads after the file's name.
REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "latin-1": (
        ".txt",
        bytes_of(GOOD + b"caf\xe9 .\n" + GOOD),
        f", line 31: not UTF-8; convert the file to UTF-8 (iconv), {NOT_TEXT}",
    ),
    "a NUL": (".txt", bytes_of(GOOD + b"\na \0 .\n"), f", line 32: a NUL byte; correct the file, {NOT_TEXT}"),
    "cut in a character": (
        ".txt",
        bytes_of(GOOD + "é".encode()[:1]),
        f", line 31: not UTF-8; convert the file to UTF-8 (iconv), {NOT_TEXT}",
    ),
    "latin-1 in gzip": (
        ".txt.gz",
        bytes_of(gzip.compress(GOOD + b"\xe9\n")),
        f", line 31: not UTF-8; convert the file to UTF-8 (iconv), {NOT_TEXT}",
    ),
    "UTF-16": (".txt", bytes_of(GOOD.decode().encode("utf-16")), ": is UTF-16 or UTF-32; convert it to UTF-8 first"),
    "bzip2": (".txt.bz2", bytes_of(bz2.compress(GOOD)), ": is a bzip2 file; unpack it first"),
    "truncated gzip": (".gz", bytes_of(gzip.compress(GOOD)[:-20]), ": is truncated; get the whole file again"),
    "no gzip": (".gz", bytes_of(GOOD), ": is no .gz file (it begins with b'"),
    "empty gzip": (".gz", bytes_of(b""), ": is no .gz file (it is empty); rename or replace it"),
    "more after gzip": (".gz", bytes_of(gzip.compress(GOOD) + b"more"), ": is damaged (Not a gzipped file"),
    "truncated zstd": (".zst", bytes_of(zstandard.compress(GOOD)[:-9]), ": is truncated; get the whole file again"),
    "no zstd": (".zst", bytes_of(GOOD), ": is no .zst file (it begins with b'"),
    "empty zstd": (".zst", bytes_of(b""), ": is no .zst file (it is empty); rename or replace it"),
    "more after zstd": (".zst", bytes_of(zstandard.compress(GOOD) + b"more"), ": is damaged (zstd decompressor error"),
    "a word of 10 MB": (
        ".txt",
        bytes_of(GOOD + b"x" * 10_000_000 + b"\n"),
        ", line 31: a word of 10,000,000 characters; divide the line into words with blanks between them, or remove it",
    ),
    "Parquet": (
        ".txt",
        bytes_of(b"PAR1\x15\x04" + bytes(99)),
        ": is a Parquet file; name it .parquet or set data.format=parquet",
    ),
    "JSON lines": (
        ".txt",
        bytes_of(b'{"text": "a cat ."}\n' * 9),
        ": is JSON; with an object in each line, name it .jsonl or set",
    ),
    "JSON lines in gzip": (".gz", bytes_of(gzip.compress(b'{"text": "a cat ."}\n' * 9)), ": is JSON; with an object "),
    "CoNLL-U": (
        ".conllu",
        bytes_of(
            b"# 1\n"
            + b"\t".join([b"_"] * 10) * 1
            + b"\n"
            + b"\t".join([b"1"] * 10)
            + b"\n"
            + b"\t".join([b"2"] * 10)
            + b"\n"
        ),
        ": is a CoNLL-U file; write its sentences to a text file",
    ),
    "a directory": ("", Path.mkdir, " is a directory; name its files, as in "),
    "a link to nothing": (".txt", link_to_nothing, ": is a symbolic link to nowhere: No such file or directory ("),
    "a pipe": (".txt", os.mkfifo, ": is no regular file but a pipe or a device ("),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(place: TextFolder, trained: Path, name: str) -> None:
    ending, make, expected = REFUSED[name]
    bad = {text: place.folder / f"{text}-2{ending}" for text in ("train", "test")}
    for path in bad.values():
        make(path)
    for outcome, path in (
        (place.prepare(), bad["train"]),
        (place.prepare("data.on_error=replace") if NOT_TEXT not in expected else place.prepare(), bad["train"]),
        (place.pretrain(), bad["train"]),
        (place.evaluate(trained, "test-*"), bad["test"]),
    ):
        assert outcome.code == 2
        assert f"{path}{expected}" in outcome.errors[0]
    # Nothing half-written: no results, and only whole texts of whole files.
    assert place.results() == set()
    for unpacked in (place.prepared / "text").glob("*.txt"):
        assert unpacked.read_bytes() == GOOD + b"\xe9\n"
    # And the cure helps.
    for path in bad.values():
        path.rmdir() if path.is_dir() else path.unlink()
    assert place.prepare().code == 0


def test_no_permission(place: TextFolder) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (place.folder / "train-1.txt").chmod(0)
    outcome = place.prepare()
    assert outcome.code == 2 and "train-1.txt: no permission to read it (" in outcome.errors[0]


def test_a_line_without_end(place: TextFolder, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_LINE_BYTES", 2 << 20)
    for name in ("train-2.txt", "test-2.txt"):
        (place.folder / name).write_bytes(GOOD + b"no line ends here " * 300_000)
    expected = ", line 31: longer than 2 MiB; write one sentence a line"
    for outcome in (place.prepare(), place.pretrain(), place.evaluate(trained, "test-*")):
        assert outcome.code == 2 and outcome.errors[0].endswith(f"-2.txt{expected}")


# Text that is taken: its bytes, a warning about it or "", and the sentences that it adds.
TAKEN: dict[str, tuple[str, bytes, str, int]] = {
    "an empty file": (".txt", b"", "data.{key}: 1 files have no words ({path})", 0),
    "a gzip of nothing": (".gz", gzip.compress(b""), "data.{key}: 1 files have no words ({path})", 0),
    "empty lines": (".txt", b"\n \n\n", "data.{key}: 1 files have no words ({path})", 3),
    "some empty lines": (".txt", b"a cat .\n\n\nthe dog .\n", "", 4),
    "no last line end": (".txt", GOOD[:-1], "", 30),
    "CRLF": (".txt", GOOD.replace(b"\n", b"\r\n"), "", 30),
    "zeros after gzip": (".gz", gzip.compress(GOOD) + bytes(512), "", 30),
    "a byte order mark": (
        ".txt",
        b"\xef\xbb\xbf" + GOOD,
        "",
        30,
    ),
    "a line of 10 MB": (
        ".txt",
        GOOD + b"the old ship " * 800_000 + b"\n",
        "data.{key}: 1 lines have more than 250 words ({path}, line 31 has 2400000): is it one sentence a line?",
        31,
    ),
    "a word of 50 kB": (
        ".txt",
        GOOD + b"x" * 50_000 + b"\n",
        "data.{key}: 1 words have more than 1000 characters ({path}, line 31): is it text? A counted vocabulary leaves "
        "them out",
        31,
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken(place: TextFolder, trained: Path, name: str) -> None:
    ending, data, warning, added = TAKEN[name]
    before = place.prepare()
    assert before.log == ""
    for text_name in ("train", "test"):
        (place.folder / f"{text_name}-2{ending}").write_bytes(data)
    outcome = place.pretrain("train.duration=3 steps")
    assert outcome.code == 0 and outcome.result["steps"] == 3
    # The vocabulary's change is told in a line of its own.
    lines = [line for line in outcome.log.splitlines() if "vocab.txt: replaced" not in line]
    assert lines == ([warning.format(key="train", path=place.folder / f"train-2{ending}")] if warning else [])
    index = Corpus.load(place.prepared / "train.npz")
    assert index.sentences == before.result["train"]["sentences"] + added
    assert max(map(len, Vocabulary.read(place.prepared / "vocab.txt").words)) < 20
    if name != "a line of 10 MB":  # which would be measured for minutes
        measured = place.evaluate(trained, "test-*")
        assert measured.code == 0 and measured.result["perplexity"] > 1
        assert measured.log == (warning.format(key="test", path=place.folder / f"test-2{ending}") if warning else "")


@pytest.mark.parametrize(("data", "what"), [(b"", "no words in 2 files"), (b"\n\n \n", "no words in 2 files")])
def test_no_text_at_all(place: TextFolder, trained: Path, data: bytes, what: str) -> None:
    for name in ("train-0.txt", "train-1.txt", "test-0.txt"):
        (place.folder / name).write_bytes(data)
    for outcome in (place.prepare(), place.pretrain()):
        assert outcome.code == 2 and outcome.errors == [f"error: data.train={place.folder}/train-*: {what}"]
    measured = place.evaluate(trained, "test-*")
    if data:  # three sentences without words have an end each
        assert measured.code == 0 and measured.result["positions"] == 3 and measured.result["oov_rate"] is None
    else:
        assert measured.errors == [f"error: data.test={place.folder}/test-*: no sentence in 1 files"]


@pytest.mark.parametrize("key", ["valid", "test"])
def test_held_out_text_without_a_word_is_found_before_training(place: TextFolder, key: str) -> None:
    for data in (b"", b"\n \n\n"):
        (place.folder / "held-out").write_bytes(data)
        outcome = place.pretrain(f"data.{key}={place.folder}/held-out")
        assert outcome.errors == [f"error: data.{key}={place.folder}/held-out: no words in 1 files"]
    assert not (place.folder / "runs" / "tiny" / "metrics").exists()


def test_what_is_replaced_is_counted_everywhere(place: TextFolder, trained: Path) -> None:
    lines = sentence_bytes(600, 5).splitlines(keepends=True)
    damaged = b"".join(b"\xff" + line if number % 30 == 0 else line for number, line in enumerate(lines)) + b"a\0 .\n"
    (place.folder / "train-0.txt").write_bytes(damaged)
    (place.folder / "test-0.txt").write_bytes(GOOD + b"\xe9 \xe9\n")
    replace = "data.on_error=replace"
    prepared = place.prepare(replace)
    assert prepared.code == 0 and prepared.result["replaced"] == 21
    assert "replaced by U+FFFD: 21 invalid UTF-8 sequences or NULs" in prepared.printed
    warning = "data.{}: {} invalid UTF-8 sequences or NULs become U+FFFD"
    assert warning.format("train", 21) in prepared.log
    trained_here = place.pretrain(replace, "train.unroll=40")
    assert trained_here.code == 0 and warning.format("train", 21) in trained_here.log
    records = [record for record in read_metrics(place.folder / "runs" / "tiny") if record["kind"] == "train"]
    assert records[-1]["step"] == trained_here.result["steps"] and records[-1]["replaced"] == 21
    measured = place.evaluate(trained, "test-*", replace)
    assert measured.code == 0 and measured.result["replaced"] == 2
    assert "replaced by U+FFFD: 2 invalid" in measured.printed and warning.format("test", 2) in measured.log
    # Known already, and counted all the same; what was let pass then is not let pass without the setting.
    assert place.prepare(replace).result["replaced"] == 21
    assert "train-0.txt, line 1: not UTF-8; " in place.prepare().errors[0]


def shrink(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + GOOD)


def change_in_place(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"the", b"xyz"))


@pytest.mark.parametrize("change", [shrink, grow, change_in_place, Path.unlink])
def test_a_shard_that_changed_since_prepare(place: TextFolder, change: Callable[[Path], None]) -> None:
    """Found at the start: a new run indexes it anew and says what is gone; a run that has begun goes on with no other
    text than its own."""
    first = place.prepare()
    shard = place.folder / "train-1.txt"
    assert place.pretrain("train.duration=10 steps").code == 0
    data = shard.read_bytes()
    change(shard)
    resumed = place.pretrain("--resume")
    assert resumed.code == 2 and resumed.errors[0].startswith("error: data.train")
    gone = f"data.train: 1 files of the last prepare are gone ({shard})"
    assert (gone in resumed.log) == (not shard.exists())
    again = place.prepare()
    assert again.code == 0 and again.result["train"]["fingerprint"] != first.result["train"]["fingerprint"]
    assert ("xyz" in Vocabulary.read(place.prepared / "vocab.txt").ids) == (change is change_in_place)
    # With its own text again the run goes on.
    shard.write_bytes(data)
    mended = place.pretrain("--resume")
    assert mended.code == 0 and mended.result["finished"]


def test_a_change_that_hides_behind_its_time_is_found_when_it_is_read(place: TextFolder) -> None:
    assert place.prepare().code == 0
    shard = place.folder / "train-1.txt"
    before = shard.stat()
    change_in_place(shard)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    outcome = place.pretrain()
    assert outcome.code == 2
    assert f"{shard}: bytes 0 to " in outcome.errors[0] and "run prepare again (with --fresh if" in outcome.errors[0]
    assert place.prepare("--fresh").code == 0
    assert place.pretrain("--fresh", "train.duration=3 steps").code == 0


def test_unpacked_text_that_was_changed_is_unpacked_again(place: TextFolder) -> None:
    shutil.move(place.folder / "train-1.txt", place.folder / "text")
    (place.folder / "train-1.txt.gz").write_bytes(gzip.compress((place.folder / "text").read_bytes()))
    first = place.prepare()
    (unpacked,) = (place.prepared / "text").glob("*.txt")
    change_in_place(unpacked)
    again = place.prepare()
    assert again.result["train"]["fingerprint"] == first.result["train"]["fingerprint"]
    assert unpacked.read_bytes() == (place.folder / "text").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Path.unlink, ": No such file or directory; it was there when the corpus was indexed"),
        (change_in_place, " have changed since they were indexed; run prepare again"),
    ],
)
def test_a_shard_that_changes_while_it_is_trained_on(
    place: TextFolder, change: Callable[[Path], None], expected: str
) -> None:
    shard = place.folder / "train-1.txt"
    run = place.folder / "runs" / "tiny"

    def change_after_some_steps() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any((run / "checkpoints").glob("*/manifest.json")):
            time.sleep(0.02)
        change(shard)

    data = shard.read_bytes()
    thread = threading.Thread(target=change_after_some_steps)
    thread.start()
    outcome = place.pretrain("train.duration=1000000 steps", "train.unroll=40")
    thread.join()
    assert outcome.code == 2 and str(shard) in outcome.errors[0] and expected in outcome.errors[0]
    assert not any(path.name.startswith(".") for path in (run / "checkpoints").iterdir())
    # What was trained is kept.
    shard.write_bytes(data)
    steps = max(record["step"] for record in read_metrics(run)) + 20
    resumed = place.pretrain("--resume", f"train.duration={steps} steps", "train.unroll=40")
    assert resumed.code == 0 and resumed.result["steps"] == steps


VOCABULARY = b"<S>\n</S>\n<UNK>\nthe\ncat\n.\n,\nand\nsees\n"
VOCABULARIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a word twice": (bytes_of(VOCABULARY + b"cat\n"), ", line 10: 'cat' stands in line 5 already; remove one of them"),
    "an empty line": (bytes_of(VOCABULARY + b"\ndog\n"), ", line 10: is empty, and would be a word of the vocabulary"),
    "counts": (bytes_of(VOCABULARY + b"dog\t7\na\t3\n"), ", line 10: 'dog\\t7': 2 of 11 lines have a blank: are these"),
    "uniq -c": (bytes_of(b"  12 <S>\n  12 </S>\n   1 <UNK>\n"), ", line 1: '12 <S>': 3 of 3 lines have a blank: are "),
    "<unk> for <UNK>": (
        bytes_of(VOCABULARY.replace(b"<UNK>", b"<unk>")),
        ": the vocabulary has no line <UNK>; add it at the top (it has '<unk>', a ",
    ),
    "invalid UTF-8": (bytes_of(VOCABULARY + b"caf\xe9\n"), ", line 10: not UTF-8; convert the vocabulary to UTF-8"),
    "Mac line ends": (bytes_of((VOCABULARY + b"caf\xe9\n").replace(b"\n", b"\r")), ", line 10: not UTF-8; "),
    "empty": (bytes_of(b""), ": the vocabulary is empty; its first lines are <S>, </S>, <UNK>"),
    "no <UNK>": (bytes_of(VOCABULARY.replace(b"<UNK>", b"<unk>")), ": the vocabulary has no line <UNK>; add it at the"),
    "byte order mark": (bytes_of(b"\xef\xbb\xbf" + VOCABULARY), ", line 1: a byte order mark, which would be part of"),
    "gone": (lambda path: None, ": cannot read the vocabulary (No such file or directory)"),
    "a directory": (Path.mkdir, ": is a folder and no vocabulary; name the file in it"),
    "a pipe": (os.mkfifo, ": is no regular file but a pipe or a device; name a file"),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies_that_are_refused(place: TextFolder, name: str) -> None:
    make, expected = VOCABULARIES[name]
    path = place.folder / "words"
    make(path)
    for outcome in (place.prepare(f"data.vocab={path}"), place.pretrain(f"data.vocab={path}")):
        assert outcome.code == 2 and f"{path}{expected}" in outcome.errors[0]
    assert place.results() == set()


def test_the_first_word_after_a_byte_order_mark_is_a_word(place: TextFolder) -> None:
    path = place.folder / "train-2.txt"
    path.write_bytes(b"\xef\xbb\xbfbook .\n" + GOOD)
    outcome = place.pretrain("train.duration=2 steps")
    assert outcome.code == 0
    words = Vocabulary.read(place.prepared / "vocab.txt").words
    assert "book" in words and not any("\ufeff" in word for word in words)
    shard = Corpus.load(place.prepared / "train.npz").shards[2]
    assert shard.tokens == len(b"book .".split()) + len(GOOD.split())


def test_a_damaged_vocabulary_of_an_earlier_prepare_is_replaced(place: TextFolder) -> None:
    first = place.prepare()
    (place.prepared / "vocab.txt").write_bytes(b"\xff\n")
    again = place.prepare()
    assert again.code == 0 and again.result["vocabulary"] == first.result["vocabulary"]


def test_an_index_of_an_earlier_version_is_made_anew(place: TextFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from elmo_ray.data import corpus as shards
    from elmo_ray.data import scan

    with monkeypatch.context() as earlier:
        earlier.setattr(scan, "FORMAT_VERSION", 1)
        earlier.setattr(shards, "_FORMAT_VERSION", 1)
        first = place.prepare()
    states = {path: path.stat().st_mtime_ns for path in (place.prepared / "state").iterdir()}
    again = place.prepare()
    assert again.code == 0 and again.result["train"] == first.result["train"]
    assert len(states) == 2 and all(path.stat().st_mtime_ns > states[path] for path in states)
    assert Corpus.load(place.prepared / "train.npz").block_crc32.all()
