import hashlib
import itertools
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elmo_ray.data import scan, text
from elmo_ray.data.corpus import Corpus, Shard, expand_paths
from elmo_ray.data.encode import encode_block, read_block
from elmo_ray.data.scan import index_shard
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.errors import ConfigError, DataError

VOCABULARY = Vocabulary.from_words([*SPECIAL_WORDS, "the", "a"])
PIECES = st.sampled_from(["\n", "\r", "\r\n", "\n\n", " ", "a", "the ", "é ", "\u3000", "x" * 30, "the a . " * 9])


def write(folder: Path, content: str | bytes, name: str = "text.txt") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(PIECES, max_size=80), block_bytes=st.integers(1, 90), segment_bytes=st.integers(1, 200))
def test_blocks_tile_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[str], block_bytes: int, segment_bytes: int
) -> None:
    # Small pieces of reading, so that line ends fall on every border.
    monkeypatch.setattr(text, "_READ_BYTES", 3)
    monkeypatch.setattr(scan, "SEGMENT_BYTES", segment_bytes)
    content = "".join(pieces).encode()
    path = write(tmp_path, content)
    shard = index_shard(path, block_bytes)
    corpus = Corpus.from_shards([shard])
    whole = encode_block(content, VOCABULARY, 8)

    assert [*corpus.block_start, shard.size] == [0, *corpus.block_end]
    blocks = [read_block(block) for block in corpus.blocks()]
    assert b"".join(blocks) == content
    for data in blocks:
        assert data.endswith((b"\n", b"\r")) or data is blocks[-1]
        assert len(data) <= block_bytes or text.count_lines(data) == 1
    # No cut inside \r\n, and the encodings of the blocks are that of the file.
    assert not any(one.endswith(b"\r") and two.startswith(b"\n") for one, two in itertools.pairwise(blocks))
    encoded = [encode_block(data, VOCABULARY, 8) for data in blocks]
    assert [n for block in encoded for n in block.lengths] == whole.lengths.tolist()
    assert [block.positions for block in encoded] == corpus.block_positions.tolist()
    assert sum(corpus.block_positions) == whole.positions == corpus.positions
    characters = [
        VOCABULARY.characters(8)[i].tolist() if i >= 0 else block.unknown[-i - 1].tolist()
        for block in encoded
        for i in block.ids
    ]
    assert characters == [
        VOCABULARY.characters(8)[i].tolist() if i >= 0 else whole.unknown[-i - 1].tolist() for i in whole.ids
    ]
    assert (shard.tokens, shard.sentences) == (len(whole.ids), len(whole.lengths))
    assert shard.characters == sum(map(len, content.decode().split())) == corpus.block_characters.sum()
    assert shard.sha256 == hashlib.sha256(content).hexdigest()
    assert shard.block_crc32.tolist() == [zlib.crc32(data) for data in blocks]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(PIECES, max_size=30))
def test_line_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[str]) -> None:
    monkeypatch.setattr(text, "_READ_BYTES", 2)
    content = "".join(pieces)
    path = write(tmp_path, content)
    line, found = 1, []
    for before, here in itertools.pairwise(["", *content]):
        line += before == "\n" or (before == "\r" and here != "\n")
        found.extend([line] * len(here.encode()))
    assert [text.line_number(path, offset) for offset in range(len(found))] == found


def test_shard_of_an_empty_file(tmp_path: Path) -> None:
    shard = index_shard(write(tmp_path, ""), 4096)
    assert (shard.size, shard.sentences, shard.tokens, len(shard.block_ends)) == (0, 0, 0, 0)
    assert len(Corpus.from_shards([shard])) == len(Corpus.from_shards([])) == 0


def test_a_line_without_end_is_an_error_and_not_a_matter_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "MAX_LINE_BYTES", 2 << 20)
    path = write(tmp_path, b"short\n" + b"long line " * 500_000)
    with pytest.raises(DataError, match=r"text\.txt, line 2: longer than 2 MiB; write one sentence a line"):
        index_shard(path, 4096)


@pytest.mark.parametrize(("bad", "what"), [(b"\xc3(", "not UTF-8"), (b"\0", "a NUL byte")])
def test_bytes_that_are_no_text(tmp_path: Path, bad: bytes, what: str) -> None:
    lines = [b"a sentence\n"] * 5000
    lines[4321] = b"a " + bad + b"b\n"
    path = write(tmp_path, b"".join(lines))
    with pytest.raises(DataError, match=rf"text\.txt, line 4322: {what}"):
        index_shard(path, 4096)
    assert index_shard(path, 4096, "replace").tokens == 10_000


def test_indexing_gone_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: No such file"):
        index_shard(str(tmp_path / "gone.txt"))


def make_corpus(tmp_path: Path) -> Corpus:
    shards = [
        index_shard(write(tmp_path, "".join(f"line {i}\n" for i in range(count)), f"{count}.txt"), 4096)
        for count in (3000, 0, 10, 5000)
    ]
    return Corpus.from_shards(shards)


def test_corpus_of_several_shards(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    assert corpus.block_shard.dtype == np.int32
    assert corpus.block_start.dtype == corpus.block_end.dtype == corpus.block_positions.dtype == np.int64
    assert (corpus.sentences, corpus.tokens, corpus.positions) == (8010, 16020, 24030)
    assert sorted(set(corpus.block_shard.tolist())) == [0, 2, 3]
    text_of_all = b"".join(read_block(block) for block in corpus.blocks())
    assert text_of_all == b"".join(Path(shard.path).read_bytes() for shard in corpus.shards)


def test_fingerprint(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    assert make_corpus(tmp_path / "elsewhere").fingerprint == corpus.fingerprint
    assert Corpus.from_shards(corpus.shards[::-1]).fingerprint != corpus.fingerprint
    recut = [index_shard(shard.path, 5000) for shard in corpus.shards]
    assert Corpus.from_shards(recut).fingerprint != corpus.fingerprint
    assert corpus.select(np.arange(3)).fingerprint != corpus.fingerprint
    write(tmp_path, "line x\n" * 10, "10.txt")
    changed = [index_shard(shard.path, 4096) for shard in corpus.shards]
    assert Corpus.from_shards(changed).fingerprint != corpus.fingerprint


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=60), st.floats(0.001, 0.49), st.integers(0, 2**64 - 1))
def test_holdout(positions: list[int], holdout: float, seed: int) -> None:
    ends = np.cumsum(np.array(positions) * 3)
    counts = np.array(positions)
    shard = Shard("/text", "/text", int(ends[-1]), 0, 0, sum(positions), 0, "0", ends, counts, counts, counts, counts)
    corpus = Corpus.from_shards([shard])
    try:
        rest, aside = corpus.split(holdout, seed)
    except ConfigError:
        assert max(positions) > (1 - holdout) * sum(positions)  # one block is nearly everything
        return
    assert sorted([*rest.block_end, *aside.block_end]) == ends.tolist()
    assert rest.block_end.tolist() == sorted(rest.block_end) and len(rest) and len(aside)
    assert rest.positions + aside.positions == corpus.positions
    wanted = holdout * corpus.positions
    assert wanted <= aside.positions < wanted + max(positions)
    assert [part.fingerprint for part in corpus.split(holdout, seed)] == [rest.fingerprint, aside.fingerprint]


def test_holdout_is_fixed_for_ever(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    assert len(corpus) == 21
    chosen = [
        [index for index in range(21) if corpus.block(index) in set(corpus.split(0.1, seed)[1].blocks())]
        for seed in (1, 2)
    ]
    assert chosen == [[11, 13], [13, 19]]


def test_holdout_of_one_block(tmp_path: Path) -> None:
    corpus = Corpus.from_shards([index_shard(write(tmp_path, "a b\n"), 4096)])
    with pytest.raises(ConfigError, match=r"data\.holdout=0\.1 needs more blocks than the 1 of this corpus"):
        corpus.split(0.1, 1)


def test_index_file(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path).split(0.2, 3)[0]
    path = tmp_path / "index.npz"
    corpus.save(path)
    loaded = Corpus.load(path)
    assert loaded.fingerprint == corpus.fingerprint
    assert list(loaded.blocks()) == list(corpus.blocks())
    for one, two in zip(loaded.shards, corpus.shards, strict=True):
        for name in Shard.__dataclass_fields__:
            assert np.array_equal(getattr(one, name), getattr(two, name)), name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"index\.npz: damaged index"):
        Corpus.load(path)
    with pytest.raises(DataError, match=r"none\.npz: no index \(No such file"):
        Corpus.load(tmp_path / "none.npz")
    np.savez(path, fields=np.frombuffer(b'{"format_version": 1, "shards": []}', np.uint8))
    with pytest.raises(DataError, match=r"index\.npz: index format 1, not 2; run prepare again"):
        Corpus.load(path)
    np.savez(path, fields=np.frombuffer(b'{"format_version": 2, "shards": []}', np.uint8))
    with pytest.raises(DataError, match="not a corpus index"):
        Corpus.load(path)


def test_check_files(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    corpus.check_files()
    with open(corpus.shards[2].path, "a") as file:
        file.write("more\n")
    with pytest.raises(DataError, match=r"10\.txt: 75 bytes, 70 when indexed"):
        corpus.check_files()
    os.remove(corpus.shards[0].path)
    with pytest.raises(DataError, match=r"3000\.txt: No such file"):
        corpus.check_files()


def test_expand_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "sub/c.txt", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, "x\n", name)
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt", "sub/c.txt", "odd[1].txt")]
    assert expand_paths(["[ab].txt", "**/c.txt"]) == names[:3]
    assert expand_paths(["b.txt", "a.txt"]) == [names[1], names[0]]
    assert expand_paths(["odd[1].txt"]) == names[3:]
    assert expand_paths(["b.txt", "?.txt"]) == [names[1], names[0]]
    assert "b.txt is named twice" in caplog.text
    with pytest.raises(ConfigError, match=r"^data\.valid=\*\.gz: no file matches \(looked in .*\)$"):
        expand_paths(["*.gz"], "data.valid")
    with pytest.raises(ConfigError, match=r"^data\.train=s\*: sub is a directory; name its files, as in sub/\*\.txt$"):
        expand_paths(["s*"])
    with pytest.raises(ConfigError, match=r": sub is a directory; name its files, as in sub/\*\.txt$"):
        expand_paths(["sub/**/"])
    for pattern, hint in (
        ("a.txt,b.txt", r"several files are given as a list: 'data.train=\[a.txt, b.txt\]'$"),
        ("a.txt b.txt", r"several files are given as a list: 'data.train=\[a.txt, b.txt\]'$"),
        ("{a,b}.txt", "{ } of a shell are no glob here: name the files in a list"),
        ("$CORPUS/a.txt", r"environment variables are written \${NAME}$"),
        ("none, none.txt", r"no file matches \(looked in .*\)$"),
    ):
        with pytest.raises(ConfigError, match=hint):
            expand_paths([pattern])
    with pytest.raises(ConfigError, match="several files are given as one glob in quotes"):
        expand_paths(["a.txt,b.txt"], "in")
    for name in ("news [v2].d", "news v.d"):
        (tmp_path / name).mkdir()
    write(tmp_path, "x\n", "news [v2].d/d.txt")
    inside = str(tmp_path / "news [v2].d" / "d.txt")
    assert expand_paths(["news [v2].d/*.txt"]) == expand_paths(["news [[]v2].d/*.txt"]) == [inside]
    assert expand_paths([f"{tmp_path}/news [v2].d/**/*.txt"]) == [inside]
    with pytest.raises(ConfigError, match=r"no file matches .*; \[ \] stand for one .*write \[\[\] for a bracket"):
        expand_paths(["news [v3].d/*.txt"])
    write(tmp_path, "x\n", "news v.d/e.txt")
    with pytest.raises(ConfigError, match=r"matches news v.d/e.txt as a glob and news \[v2\].d/d.txt as it is spelt"):
        expand_paths(["news [v2].d/*.txt"])
    os.symlink("nowhere", "link.text")
    with pytest.raises(
        DataError, match=r"/link\.text: is a symbolic link to nowhere: No such file or directory \(data"
    ):
        expand_paths(["*.text"])
    os.remove("link.text")
    os.mkfifo("pipe.text")
    with pytest.raises(DataError, match=r"/pipe\.text: is no regular file but a pipe or a device"):
        expand_paths(["pipe.text"])


def test_long_words_are_found(tmp_path: Path) -> None:
    long = "x" * (scan.LONG_WORD_CHARACTERS + 1)
    path = write(tmp_path, "short\n" * 999 + f"a {'y' * scan.LONG_WORD_CHARACTERS} b\nc {long} {long}\n{long}\n")
    (segment,) = scan.scan_shard(path, 4096, "fail")
    assert (segment.long_words, segment.long_word_line, segment.long_lines) == (3, 1000, 0)


def test_errors_in_unpacked_text_name_the_file_that_was_packed(tmp_path: Path) -> None:
    path = write(tmp_path, b"fine\nnot \xff fine\n")
    with pytest.raises(DataError, match=r"^/packed/text\.gz, line 2: not UTF-8; "):
        scan.scan_segment(path, 0, 4096, "fail", source="/packed/text.gz")
