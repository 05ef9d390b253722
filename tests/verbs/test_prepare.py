import collections
import gzip
import json
import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard
from helpers.terminal import shown_in_terminal
from helpers.tiny_runs import sentences

from elmo_ray import prepare
from elmo_ray.config import PrepareConfig
from elmo_ray.data import indexing, scan
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.documents import TextForm
from elmo_ray.data.encode import encode_block, read_block
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import ConfigError, DataError

WORDS = ["the", "of", "cat", ".", "é", "mat", "<S>", "!!!MAXTERMID", "zebra", "apple"]
# The later the word, the rarer; apple and zebra equally often.
LINES = [" ".join(WORDS[: 1 + n % 8] + (WORDS[8:] if n % 7 == 0 else [])) for n in range(3000)]


def configure(folder: Path, **keys: Any) -> PrepareConfig:
    """Keys are `section__name`; everything happens in this process unless they say otherwise."""
    tree: dict[str, Any] = {"run": {"storage_path": str(folder / "runs")}, "cluster": {"workers": 0}}
    for key, value in {"data__train": str(folder / "*.txt"), "data__block_bytes": 4096, **keys}.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return PrepareConfig.from_dict(tree)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("\n".join(LINES[number * 1000 : (number + 1) * 1000]) + "\n", "utf-8")
    return tmp_path


def exact_counts(lines: list[str]) -> collections.Counter[str]:
    return collections.Counter(word for line in lines for word in line.split())


def test_vocabulary_in_the_original_form(folder: Path) -> None:
    result = prepare.run(configure(folder))
    assert result.vocabulary_path == folder / "runs/prepared/vocab.txt"
    words = result.vocabulary_path.read_text("utf-8").split("\n")
    assert words[:3] == ["<S>", "</S>", "<UNK>"] and words[-1] == ""
    counts = exact_counts(LINES)
    # <S> is a special word already, and !!!MAXTERMID would be skipped by every reader.
    expected = sorted(set(WORDS) - {"<S>", "!!!MAXTERMID"}, key=lambda word: (-counts[word], word))
    assert words[3:-1] == expected
    assert counts["apple"] == counts["zebra"] and words.index("apple") == words.index("zebra") - 1
    assert (result.vocabulary_size, result.counted) == (len(words) - 1, True)
    assert result.vocabulary_sha256 == Vocabulary.read(result.vocabulary_path).sha256
    assert (result.pruned_words, result.pruned_tokens, result.max_missing, result.replaced) == (0, 0, 0, 0)


def test_limits_of_the_vocabulary(folder: Path) -> None:
    assert prepare.run(configure(folder, data__max_vocab=5)).vocabulary_size == 5
    counts = exact_counts(LINES)
    result = prepare.run(configure(folder, data__min_count=counts["apple"] + 1))
    words = Vocabulary.read(result.vocabulary_path).words
    assert words[3:] == [word for word in WORDS[:6] if counts[word] > counts["apple"]]


def test_index_of_the_corpus(folder: Path) -> None:
    (folder / "valid.text").write_bytes((folder / "0.txt").read_bytes())
    result = prepare.run(configure(folder, data__valid=str(folder / "valid.text")))
    directory = folder / "runs" / "prepared"
    assert result.valid is not None and result.test is None
    counts = exact_counts(LINES)
    train = Corpus.load(directory / "train.npz")
    assert train.fingerprint == result.train.fingerprint
    assert (train.tokens, train.sentences) == (sum(counts.values()), 3000)
    assert train.characters == sum(len(word) * number for word, number in counts.items())
    assert [Path(shard.path).name for shard in train.shards] == ["0.txt", "1.txt", "2.txt"]
    assert len(train) > 5
    note = json.loads((directory / "prepare.json").read_text("utf-8"))
    assert note == result.to_dict()
    assert note["train"]["shards"][1]["sha256"] == train.shards[1].sha256
    assert note["valid"]["tokens"] == result.valid.tokens < train.tokens
    assert "3,000" in result.summary() and str(result.vocabulary_path) in result.summary()


def test_given_vocabulary(folder: Path) -> None:
    vocabulary = folder / "given.vocab"
    vocabulary.write_text("the\n<S>\n</S>\n<UNK>\n", "utf-8")
    result = prepare.run(configure(folder, data__vocab=str(vocabulary)))
    assert (result.vocabulary_path, result.vocabulary_size, result.counted) == (vocabulary, 4, False)
    assert not (folder / "runs/prepared/vocab.txt").exists()


def test_compressed_shards(folder: Path) -> None:
    plain = prepare.run(configure(folder))
    packed = folder / "packed"
    packed.mkdir()
    texts = [(folder / f"{number}.txt").read_bytes() for number in range(3)]
    (packed / "0.txt.gz").write_bytes(gzip.compress(texts[0]))
    (packed / "1.txt.zst").write_bytes(zstandard.compress(texts[1]))
    (packed / "2.txt").write_bytes(texts[2])
    result = prepare.run(configure(packed, data__train=str(packed / "[0-9]*")))
    assert result.train.fingerprint == plain.train.fingerprint
    assert result.vocabulary_sha256 == plain.vocabulary_sha256
    assert [Path(shard.source).name for shard in result.train.shards] == ["0.txt.gz", "1.txt.zst", "2.txt"]
    for shard in result.train.shards[:2]:
        assert Path(shard.path).parent == packed / "runs/prepared/text"
    assert result.train.shards[2].path == str(packed / "2.txt")


def test_truncated_shard_is_named(folder: Path) -> None:
    (folder / "1.txt.gz").write_bytes(gzip.compress(LINES[0].encode() * 500)[:-9])
    with pytest.raises(DataError, match=r"^\S+/1\.txt\.gz: is truncated; get the whole file again$"):
        prepare.run(configure(folder, data__train=str(folder / "*.gz")))


def todo(config: PrepareConfig) -> int:
    return prepare.plan(config).tasks


def test_finished_shards_are_not_done_again(folder: Path) -> None:
    config = configure(folder)
    assert todo(config) == 3
    first = prepare.run(config)
    states = {path: path.stat().st_mtime_ns for path in (folder / "runs/prepared/state").iterdir()}
    assert len(states) == 3
    assert todo(config) == 0
    again = prepare.run(config)
    assert (again.train.fingerprint, again.vocabulary_sha256) == (first.train.fingerprint, first.vocabulary_sha256)
    # One file has changed, one is new.
    (folder / "1.txt").write_text("other text\n", "utf-8")
    (folder / "3.txt").write_text("more text\n", "utf-8")
    assert todo(config) == 2
    changed = prepare.run(config)
    untouched = [path for path in states if path.stat().st_mtime_ns == states[path]]
    assert len(untouched) == 2 and len(changed.train.shards) == 4
    assert "text" in Vocabulary.read(changed.vocabulary_path).ids
    # Other blocks need another index; --fresh forgets everything.
    assert todo(configure(folder, data__block_bytes=8192)) == 4
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs/prepared/state").iterdir()}
    prepare.run(config, fresh=True)
    assert all(path.stat().st_mtime_ns > before[path] for path in before)


def test_counts_are_added_to_an_index_without_them(folder: Path) -> None:
    vocabulary = folder / "given.vocab"
    vocabulary.write_text("the\n<S>\n</S>\n<UNK>\n", "utf-8")
    prepare.run(configure(folder, data__vocab=str(vocabulary)))
    assert todo(configure(folder)) == 3
    assert prepare.run(configure(folder)).vocabulary_size == 11
    assert todo(configure(folder, data__vocab=str(vocabulary))) == 0


def test_a_damaged_state_is_made_again(folder: Path) -> None:
    config = configure(folder)
    first = prepare.run(config)
    state = next((folder / "runs/prepared/state").iterdir())
    state.write_bytes(state.read_bytes()[:100])
    assert todo(config) == 1
    assert prepare.run(config).train.fingerprint == first.train.fingerprint


def test_one_large_file_in_segments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "SEGMENT_BYTES", 10_000)
    whole = folder / "whole.text"
    whole.write_text("\n".join(LINES), "utf-8")
    config = configure(folder, data__train=str(whole))
    assert todo(config) == 1 + -(-whole.stat().st_size // 10_000) > 5
    result = prepare.run(config)
    assert exact_counts(LINES)["the"] == sum(
        int((encode_block(read_block(block), Vocabulary.read(result.vocabulary_path)).ids == 3).sum())
        for block in result.train.blocks()
    )
    assert result.train.tokens == sum(exact_counts(LINES).values())
    assert result.train.shards[0].sha256 == scan.hash_file(str(whole))
    assert todo(config) == 0


def test_holdout(folder: Path) -> None:
    everything = prepare.run(configure(folder))
    result = prepare.run(configure(folder, data__holdout=0.2))
    assert result.valid is not None
    assert result.train.tokens + result.valid.tokens == everything.train.tokens
    assert 0.2 * everything.train.positions <= result.valid.positions <= 0.4 * everything.train.positions
    assert set(result.train.blocks()).isdisjoint(result.valid.blocks())
    assert prepare.run(configure(folder, data__holdout=0.2)).valid.fingerprint == result.valid.fingerprint  # type: ignore[union-attr]
    other = prepare.run(configure(folder, data__holdout=0.2, run__seed=2))
    assert other.valid is not None and other.valid.fingerprint != result.valid.fingerprint


def test_words_that_are_only_in_held_out_text_are_unknown(folder: Path) -> None:
    (folder / "0.txt").write_text("".join(f"word{n} the\n" for n in range(3000)), "utf-8")
    result = prepare.run(configure(folder, data__train=str(folder / "0.txt"), data__holdout=0.3))
    vocabulary = Vocabulary.read(result.vocabulary_path)
    assert result.valid is not None
    for corpus, unknown in ((result.train, 0), (result.valid, result.valid.sentences)):
        found = sum(len(encode_block(read_block(block), vocabulary).unknown) for block in corpus.blocks())
        assert found == unknown


def test_memory_of_counting_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(prepare, "CORPUS_WORDS", 600)
    monkeypatch.setattr(indexing, "SEGMENT_WORDS", 400)
    lines = [f"rare{n} the of" for n in range(3000)]
    for number in range(3):
        (folder / f"{number}.txt").write_text("\n".join(lines[number * 1000 : (number + 1) * 1000]), "utf-8")
    result = prepare.run(configure(folder))
    words = Vocabulary.read(result.vocabulary_path).words
    assert words[3:5] == ["of", "the"] and len(words) <= 603
    assert result.pruned_words > 2000 and result.pruned_tokens >= result.pruned_words and result.max_missing > 0
    assert "rare words were dropped to count in bounded memory" in caplog.text
    assert "counting dropped rare words" in result.summary()


def test_warnings_about_the_text(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="elmo_ray")  # whatever another test has set
    prepare.run(configure(folder))
    assert not caplog.records
    (folder / "1.txt").write_text("It rained, and nobody came. So what?\n" * 300 + "many words " * 200, "utf-8")
    (folder / "2.txt").write_bytes(b"\xef\xbb\xbfthe bad \xff byte\n")
    prepare.run(configure(folder, data__on_error="replace"))
    assert [record.levelno for record in caplog.records if "data.train" in record.getMessage()] == [logging.WARNING] * 3
    assert "data.train: punctuation sticks to" in caplog.text
    place = folder / "1.txt"
    assert f"data.train: 1 lines have more than 250 words ({place}, line 301 has 400)" in caplog.text
    assert "data.train: 1 invalid UTF-8 sequences or NULs become U+FFFD" in caplog.text


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def natural(tmp_path: Path) -> Path:
    """A folder with train, valid and test text of a small grammar."""
    train = sentences(600, 1)
    for name, lines in {"train": train, "valid": sentences(60, 2), "test": sentences(60, 3)}.items():
        own = [line for line in lines if name == "train" or line not in train]
        (tmp_path / f"{name}.txt").write_text("".join(f"{line}\n" for line in own), "utf-8")
    return tmp_path


def configure_natural(folder: Path, **keys: Any) -> PrepareConfig:
    texts = {f"data__{name}": str(folder / f"{name}.txt") for name in ("train", "valid", "test")}
    return configure(folder, **{**texts, **keys})


def test_unknown_words_are_told_and_kept(natural: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="elmo_ray")
    result = prepare.run(configure_natural(natural))
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("unknown words: ")]
    assert line.startswith("unknown words: train 0.00 %, valid 0.") and ", test 0." in line
    vocabulary = Vocabulary.read(result.vocabulary_path)
    assert result.valid is not None
    unknown = sum(int((encode_block(read_block(b), vocabulary).ids < 0).sum()) for b in result.valid.blocks())
    assert result.checks.unknown["valid"].share == unknown / result.valid.tokens
    # Another start does not read the text again, and says the same.
    (kept,) = (natural / "runs/prepared/checks").iterdir()
    before = kept.stat().st_mtime_ns
    caplog.clear()
    again = prepare.run(configure_natural(natural))
    assert again.checks == result.checks and kept.stat().st_mtime_ns == before and line in caplog.text


def test_a_vocabulary_of_other_words_is_told(natural: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = prepare.run(configure_natural(natural)).vocabulary_path.read_text("utf-8").split()
    caplog.clear()
    path = natural / "given.vocab"
    # In falling count all is well, and the alphabet is no order.
    path.write_text("\n".join(words), "utf-8")
    prepare.run(configure_natural(natural, data__vocab=str(path)))
    path.write_text("\n".join([*words[:3], *sorted(words[3:])]), "utf-8")
    assert warnings_of(caplog) == []
    prepare.run(configure_natural(natural, data__vocab=str(path)))
    (told,) = warnings_of(caplog)
    assert f"data.vocab={path} is far from falling count: " in told
    caplog.clear()
    path.write_text("\n".join([*words[:3], "other", "words"]), "utf-8")
    prepare.run(configure_natural(natural, data__vocab=str(path)))
    assert [line.split(":")[0] for line in warnings_of(caplog)] == ["data.train", "data.valid", "data.test"]
    assert "100.0 % of the words are not in the vocabulary" in caplog.text


@pytest.mark.parametrize("other", ["valid", "test", "vocab"])
def test_a_file_that_serves_twice_is_refused(natural: Path, other: str) -> None:
    for name in ("valid", "test"):
        (natural / f"{name}.txt").rename(natural / f"{name}.text")
    words = prepare.run(configure(natural)).vocabulary_path
    (natural / "more.txt").write_bytes(words.read_bytes() if other == "vocab" else b"the cat sees the ship .\n" * 40)
    link = natural / "link"
    link.symlink_to(natural / "more.txt")
    with pytest.raises(ConfigError) as caught:
        prepare.run(configure(natural, **{f"data__{other}": str(link)}))
    message = str(caught.value)
    assert message.startswith(f"data.train={natural}/*.txt and data.{other}={link} both name {natural}/more.txt: ")
    with pytest.raises(ConfigError, match="both name"):
        prepare.plan(configure(natural, **{f"data__{other}": str(link)}))
    if other != "vocab":
        return
    # A vocabulary is no text, whether or not it is named as one.
    with pytest.raises(DataError, match=r"more\.txt: is a vocabulary"):
        prepare.run(configure(natural))


def test_sentences_in_two_texts_are_told(natural: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = (natural / "train.txt").read_text("utf-8").splitlines()
    lines = (natural / "valid.txt").read_text("utf-8").splitlines()
    (natural / "valid.txt").write_text("\n".join([*lines, *train[:30]]), "utf-8")
    result = prepare.run(configure_natural(natural))
    (told,) = warnings_of(caplog)
    assert told.startswith("data.valid: ") and "stand in data.train, too" in told
    assert result.checks.shared["test"].found == 0 and result.checks.shared["valid"].found >= 20


def test_an_index_without_samples_of_sentences_is_read(natural: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing(scan.Segment):
        def pack(self) -> bytes:
            self.sentence_sample = None
            return super().pack()

    with monkeypatch.context() as earlier:
        earlier.setattr(scan, "FORMAT_VERSION", 2)
        earlier.setattr(scan, "Segment", Nothing)
        first = prepare.run(configure_natural(natural))
    states = {path: path.stat().st_mtime_ns for path in (natural / "runs/prepared/state").iterdir()}
    again = prepare.run(configure_natural(natural))
    assert again.train.fingerprint == first.train.fingerprint
    assert states == {path: path.stat().st_mtime_ns for path in (natural / "runs/prepared/state").iterdir()}
    # Small texts are compared all the same.
    assert again.checks.shared["valid"].looked_up > 20


def test_a_file_and_its_compressed_copy_are_told(natural: Path, caplog: pytest.LogCaptureFixture) -> None:
    (natural / "train.txt.gz").write_bytes(gzip.compress((natural / "train.txt").read_bytes()))
    prepare.run(configure_natural(natural, data__train=str(natural / "train*")))
    (told,) = warnings_of(caplog)
    assert told.startswith(f"data.train: {natural}/train.txt.gz has the same text as {natural}/train.txt: ")


def test_words_that_are_too_rare(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.min_count=100000: no word of data\.train is seen so often \(the most "
    ):
        prepare.run(configure(folder, data__min_count=100000))


def test_a_training_leaves_the_shared_vocabulary(folder: Path) -> None:
    shared = prepare.run(configure(folder)).vocabulary_path
    before = shared.read_bytes()
    other = prepare.run(configure(folder, data__max_vocab=6), replaces=False)
    assert shared.read_bytes() == before and other.vocabulary_path.name.startswith("vocab-")
    assert Vocabulary.read(other.vocabulary_path).size == 6
    assert prepare.run(configure(folder), replaces=False).vocabulary_path == shared


def test_sentence_markers_in_the_text_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = folder / "marked.text"
    text.write_text("<s> the cat sees <unk> </s>\n" * 50, "utf-8")
    prepare.run(configure(folder, data__train=str(text)))
    unknown, markers = warnings_of(caplog)
    assert "data.train: 50 of 50 sentences spell <s>: training adds sentence markers itself" in markers
    assert "data.train: spells <unk> 50 times" in unknown
    # The same with a vocabulary that is given, which makes unknown words of them.
    vocabulary = folder / "given.txt"
    vocabulary.write_text(
        "<S>\n</S>\n<UNK>\n" + "".join(f"{word}\n" for word in "the cat sees a b c d".split()), "utf-8"
    )
    caplog.clear()
    prepare.run(configure(folder, data__train=str(text), data__vocab=str(vocabulary)))
    assert warnings_of(caplog)[0] == markers


def test_lines_of_one_word_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = folder / "words.list"
    words.write_text("".join(f"word{number}\n" for number in range(200)), "utf-8")
    prepare.run(configure(folder, data__train=[str(folder / "*.txt"), str(words)]))
    (told,) = [message for message in warnings_of(caplog) if "single words" in message]
    assert told.startswith(
        f"data.train: the lines of {words} are single words: is it a list of words, or text without "
    )


@pytest.mark.parametrize(
    ("words", "lengths"),
    [
        ("วันนี้ อากาศ ดี มาก เรา ไป สวน แมว เห็น หมา ใหญ่ บ้าน เก่า ริม น้ำ".split(), (4, 12)),
        (list("今天气很好我们去公园猫看见大狗老房子在河边。"), (6, 20)),
    ],
)
def test_no_warning_about_other_languages(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, words: list[str], lengths: tuple[int, int]
) -> None:
    draw = random.Random(4)
    weights = [1 / (rank + 1) for rank in range(len(words))]
    for name, n in {"train": 500, "valid": 50, "test": 50}.items():
        lines = [" ".join(draw.choices(words, weights, k=draw.randint(*lengths))) for _ in range(n)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), "utf-8")
    first = prepare.run(configure_natural(tmp_path))
    given = tmp_path / "given.vocab"
    given.write_bytes(first.vocabulary_path.read_bytes())
    prepare.run(configure_natural(tmp_path, data__vocab=str(given)))
    assert warnings_of(caplog) == []


def test_bytes_that_are_no_text(folder: Path) -> None:
    (folder / "2.txt").write_bytes(b"fine\n" * 2000 + b"not \xff fine\n")
    with pytest.raises(DataError, match=r"^\S+/2\.txt, line 2001: not UTF-8; .*$"):
        prepare.run(configure(folder))
    assert prepare.run(configure(folder, data__on_error="replace")).replaced == 1
    # What was let pass then is not let pass now.
    with pytest.raises(DataError, match="line 2001"):
        prepare.run(configure(folder))


def test_text_without_words(folder: Path) -> None:
    (folder / "empty.text").write_bytes(b"\n\n")
    with pytest.raises(DataError, match=r"data\.train=\S+empty\.text: no words in 1 files"):
        prepare.run(configure(folder, data__train=str(folder / "empty.text")))
    with pytest.raises(ConfigError, match=r"data\.valid=\S+none\*: no file matches"):
        prepare.run(configure(folder, data__valid=str(folder / "none*")))


@pytest.mark.slow
def test_sample_corpus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = prepare.run(configure(tmp_path, data__train="sample", data__block_bytes=131072))
    assert result.valid is not None and result.test is not None
    assert warnings_of(caplog) == []
    assert result.train.tokens > 150_000 and len(result.train.shards) == 6
    assert all(Path(shard.path).is_relative_to(tmp_path / "runs") for shard in result.train.shards)
    vocabulary = Vocabulary.read(result.vocabulary_path)
    encoded = [encode_block(read_block(block), vocabulary) for block in result.valid.blocks()]
    unknown = sum(int((block.ids < 0).sum()) for block in encoded)
    assert 0 < unknown < 0.1 * result.valid.tokens
    directory = tmp_path / "runs" / "prepared"
    test, _ = prepare.index_texts(("sample",), "data.test", directory, 131072, TextForm())
    assert test.fingerprint == result.test.fingerprint


def test_command(folder: Path) -> None:
    config = folder / "config.yaml"
    config.write_text(f"run: {{storage_path: {folder / 'runs'}}}\ndata: {{train: '{folder}/*.txt'}}\n", "utf-8")
    command = [sys.executable, "-m", "elmo_ray.prepare", str(config), "cluster.workers=0"]
    root = Path(__file__).parents[2]

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], cwd=root, capture_output=True, text=True, check=False)

    dry = call("--dry-run")
    assert dry.returncode == 0 and "to do: 3 tasks" in dry.stdout
    assert not (folder / "runs/prepared/vocab.txt").exists()
    done = call("--json", str(folder / "result.json"))
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "vocabulary: 11 words" in done.stdout
    assert json.loads((folder / "result.json").read_text("utf-8"))["train"]["sentences"] == 3000
    failed = call("data.train=" + str(folder))
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "is a directory" in failed.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_ray_tasks_find_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, ray_session: None
) -> None:
    here = prepare.run(configure(folder))
    (folder / "0.txt").rename(folder / "0.text")
    (folder / "0.txt.gz").write_bytes(gzip.compress((folder / "0.text").read_bytes()))
    monkeypatch.setattr(prepare, "SMALL_BYTES", 0)
    sources = [str(folder / "0.txt.gz"), str(folder / "[12].txt")]
    there = {"data__train": sources, "cluster__workers": 2, "data__prepared_dir": str(tmp_path_factory.mktemp("ray"))}
    config = configure(folder, **there)
    assert todo(config) == 3
    found = prepare.run(config)
    assert found.train.fingerprint == here.train.fingerprint
    assert found.vocabulary_sha256 == here.vocabulary_sha256
    assert todo(config) == 0
    (folder / "2.txt").write_bytes(b"some words\n" * 100 + b"\0\n")
    with pytest.raises(DataError, match=r"^\S+/2\.txt, line 101: a NUL byte; "):
        prepare.run(config)


def test_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"d{number} the cat .\nd{number} it slept ." for number in range(500)]
    for number in range(3):  # the third file has nothing new
        start = 100 * number % 200
        lines = [json.dumps({"text": text}) for text in [*documents[start : start + 300], " "]]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines), "utf-8")
    train = {"data__train": str(tmp_path / "*.jsonl"), "data__deduplicate": "documents", "data__holdout": 0.2}
    config = configure(tmp_path, **train)
    assert prepare.plan(config).tasks == 1  # to make the text of the small files; the rest is not known before
    result = prepare.run(config)
    assert result.documents["train"] == {
        "documents": 903, "empty": 3, "bad": 0, "replaced": 0, "repeated": 500, "compared": 900
    }  # fmt: skip
    assert result.valid is not None and 0 < result.valid.tokens < result.train.tokens
    assert result.train.sentences + result.valid.sentences == 800
    seen = [
        {line.split()[0] for block in part.blocks() for line in read_block(block).decode().splitlines()}
        for part in (result.train, result.valid)
    ]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 400
    note = json.loads((tmp_path / "runs/prepared/prepare.json").read_text("utf-8"))
    assert note == result.to_dict() and note["documents"]["train"]["repeated"] == 500
    # Nothing is left to do, and the sizes are known, also where the text is too large to read it again.
    todo = prepare.plan(config)
    assert todo.tasks == 0
    monkeypatch.setattr(prepare, "SMALL_BYTES", 0)
    sizes = prepare.measure(config, todo)
    assert sizes.exact and sizes.train is not None and sizes.train.fingerprint == result.train.fingerprint
    assert prepare.run(config).to_dict() == result.to_dict()
    with pytest.raises(ConfigError, match=r"data\.deduplicate=documents: \S+/runs/prepared/vocab\.txt is text"):
        prepare.plan(configure(tmp_path, **{**train, "data__train": str(result.vocabulary_path)}))


@pytest.mark.slow
def test_a_bar_in_a_terminal(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("the cat sat .\n" * 100 * (number + 1))
    (tmp_path / "c.yaml").write_text(f"run: {{storage_path: {tmp_path}/runs}}\ncluster: {{workers: 0}}\n")
    command = [sys.executable, "-m", "elmo_ray.prepare", str(tmp_path / "c.yaml"), f"data.train={tmp_path}/*.txt"]
    shown = shown_in_terminal(command)
    assert b"0/3 [" in shown and b"indexing data.train: 3 tasks" in shown


def test_texts_of_other_settings_are_not_replaced_in_a_folder(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"The ship left the harbour at {n} . Nobody waved ."}) for n in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    train = {"data__train": str(tmp_path / "a.jsonl"), "data__tokenizer": "none"}
    first = prepare.run(configure(tmp_path, **train)).vocabulary_path.read_bytes()
    other = configure(tmp_path, **train, data__normalize=["nfc"])
    with pytest.raises(
        ConfigError, match=r"runs/prepared: its texts were made with normalize none, .* normalize nfc; na"
    ):
        prepare.run(other)
    assert (tmp_path / "runs/prepared/vocab.txt").read_bytes() == first
    # a training has texts of its own beside them
    assert prepare.run(other, replaces=False).made_by != prepare.run(configure(tmp_path, **train), True).made_by
    assert json.loads((tmp_path / "runs/prepared/prepare.json").read_text())["made_by"]["normalize"] == ""
