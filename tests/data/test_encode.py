import dataclasses
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elmo_ray.data.characters import encode_words
from elmo_ray.data.corpus import Block, Corpus
from elmo_ray.data.encode import EncodedBlock, encode_block, encode_text, load_block, read_block, thread_source
from elmo_ray.data.scan import index_shard
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
VOCABULARY = Vocabulary.from_words([*SPECIAL_WORDS, "the", "cat", ".", "é"])


def sentences_of(block: EncodedBlock, vocabulary: Vocabulary) -> list[tuple[list[int], list[list[int]]]]:
    """(ids, characters) of each sentence with its markers; unknown words have the id of `<UNK>`, as in the original."""
    table = vocabulary.characters(block.unknown.shape[1])
    markers = table[[vocabulary.bos, vocabulary.eos]]
    sentences = []
    for ids in np.split(block.ids, np.cumsum(block.lengths)[:-1]) if len(block.lengths) else []:
        rows = [table[i] if i >= 0 else block.unknown[-i - 1] for i in ids]
        sentences.append(
            (
                [vocabulary.bos, *(int(i) if i >= 0 else vocabulary.unk for i in ids), vocabulary.eos],
                [row.tolist() for row in (markers[0], *rows, markers[1])],
            )
        )
    return sentences


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_encodings_of_the_original(shared: Path, shard: int) -> None:
    folder = shared / "golden" / "data"
    text = folder / "shards" / f"shard-{shard:05d}-of-00003"
    expected = np.load(folder / "batches.npz")
    vocabulary = Vocabulary.read(folder / "vocab.txt")
    found = sentences_of(encode_block(text.read_bytes(), vocabulary, 50), vocabulary)
    assert len(found) == sum(1 for key in expected if key.startswith(f"encode/shard{shard}/")) // 2
    for line, (ids, characters) in enumerate(found):
        assert ids == expected[f"encode/shard{shard}/line{line}/ids"].tolist()
        assert characters == expected[f"encode/shard{shard}/line{line}/chars"].tolist()


def test_own_odd_lines_as_the_original() -> None:
    # The lines of golden/data that are our own writing, with what bilm-tf made of them.
    expected = np.load(GOLDEN / "own_lines.npz")
    vocabulary = Vocabulary.read(GOLDEN / "vocab.txt")
    found = sentences_of(encode_block((GOLDEN / "own_lines.txt").read_bytes(), vocabulary, 50), vocabulary)
    assert len(found) == len(expected.files) // 2 == 29
    for line, (ids, characters) in enumerate(found):
        assert ids == expected[f"line{line}/ids"].tolist()
        assert characters == expected[f"line{line}/chars"].tolist()


def slow_sentences(text: str) -> list[list[str]]:
    """The definition: universal newlines and `str.split`, by the means the original used."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.split() for line in (lines if lines[-1] else lines[:-1])]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([*"a.é\r\n \t\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2028\u3000\u200b", "the", "cat", "\r\n"]))
)
def test_ids_lengths_and_unknown_words(pieces: list[str]) -> None:
    text = "".join(pieces)
    block = encode_block(text.encode(), VOCABULARY, 12)
    sentences = slow_sentences(text)
    assert block.ids.dtype == block.lengths.dtype == np.int32 and block.unknown.dtype == np.int16
    assert block.lengths.tolist() == [len(sentence) for sentence in sentences]
    words = list(itertools.chain.from_iterable(sentences))
    unknown = list(dict.fromkeys(word for word in words if word not in VOCABULARY.ids))
    assert block.unknown.tolist() == encode_words(unknown, 12).tolist()
    assert [VOCABULARY.words[i] if i >= 0 else unknown[-i - 1] for i in block.ids] == words
    assert block.positions == len(words) + len(sentences)


def test_special_words_in_text() -> None:
    block = encode_text("<S> </S> <UNK> <unk> !!!MAXTERMID", VOCABULARY, 20)
    assert block.ids.tolist() == [0, 1, 2, -1, -2]


def test_empty_text() -> None:
    block = encode_block(b"", VOCABULARY, 9)
    assert block.ids.shape == block.lengths.shape == (0,) and block.unknown.shape == (0, 9)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"the cat\r\nthe\rcat \xff\xfe x\n\0 \xef\xbf\xbd\n")
    data = path.read_bytes()
    with pytest.raises(DataError, match=r"bad\.txt, line 3: not UTF-8; .*data\.on_error=replace"):
        encode_block(data, VOCABULARY, 9, path=str(path))
    with pytest.raises(DataError, match=r"bad\.txt, line 4: a NUL byte"):
        encode_block(data[20:], VOCABULARY, 9, path=str(path), offset=20)
    block = encode_block(data, VOCABULARY, 9, on_error="replace")
    # The third U+FFFD of the text was in the file already.
    assert block.replaced == 3
    assert block.lengths.tolist() == [2, 1, 3, 2]
    assert block.unknown.tolist() == encode_words(["\ufffd\ufffd", "x", "\ufffd"], 9).tolist()


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"the cat {number} . é\n" for number in range(2000)), "utf-8")
    return Corpus.from_shards([index_shard(str(path), 4096)])


def test_blocks_in_a_thread(corpus: Corpus) -> None:
    threads = threading.active_count()
    found = list(thread_source(corpus.blocks(), VOCABULARY, 10, look_ahead=2))
    assert len(found) == len(corpus) > 5
    for block, encoded in zip(corpus.blocks(), found, strict=True):
        expected = encode_block(read_block(block), VOCABULARY, 10)
        assert encoded.ids.tolist() == expected.ids.tolist()
        assert encoded.lengths.tolist() == expected.lengths.tolist()
        assert (encoded.unknown == expected.unknown).all()
    assert threading.active_count() == threads


def test_thread_of_an_endless_order_ends_when_closed(corpus: Corpus) -> None:
    threads = threading.active_count()
    asked = []

    def endless() -> Iterator[Block]:
        for number in itertools.count():
            asked.append(number)
            yield corpus.block(number % len(corpus))

    source = thread_source(endless(), VOCABULARY, 10, look_ahead=3)
    for _ in range(20):
        next(source)
    source.close()
    assert threading.active_count() == threads
    assert 20 <= len(asked) <= 20 + 3 + 2


def test_error_of_the_thread_comes_in_its_place(corpus: Corpus) -> None:
    def order() -> Iterator[Block]:
        yield corpus.block(0)
        yield Block(str(Path(corpus.block(0).path).with_name("gone.txt")), 0, 10, 3, 0)

    source = thread_source(order(), VOCABULARY, 10)
    assert next(source).positions == corpus.block(0).positions
    with pytest.raises(DataError, match=r"gone\.txt: No such file"):
        next(source)


def test_a_file_that_changed_since_it_was_indexed(corpus: Corpus) -> None:
    path = Path(corpus.shards[0].path)
    last = corpus.block(len(corpus) - 1)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match="shorter than when it was indexed"):
        read_block(last)
    # As many bytes, words and lines as before.
    path.write_bytes(data[:-20] + data[-20:].replace(b"cat", b"dog"))
    place = rf"^\S+/text\.txt: bytes {last.start} to {last.end} have changed since .*; run prepare again"
    for read in (read_block, lambda block: load_block(block, VOCABULARY)):
        assert read(corpus.block(0))
        with pytest.raises(DataError, match=place):
            read(last)
    path.write_bytes(data)
    load_block(last, VOCABULARY)
    with pytest.raises(DataError, match=rf"positions and had {last.positions + 1} when they were indexed"):
        load_block(dataclasses.replace(last, positions=last.positions + 1), VOCABULARY)
