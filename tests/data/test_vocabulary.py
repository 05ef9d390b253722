import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elmo_ray.data.characters import encode_words
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "data"


def test_reads_odd_lines_as_the_original() -> None:
    # vocab.txt has duplicates, an empty line, a padded word and !!!MAXTERMID; the JSON is what bilm-tf made of it.
    expected = json.loads((GOLDEN / "vocabulary.json").read_text("utf-8"))
    vocabulary = Vocabulary.read(GOLDEN / "vocab.txt")
    assert vocabulary.words == expected["id_to_word"]
    assert vocabulary.ids == expected["word_to_id"]
    assert vocabulary.size == len(vocabulary) == expected["vocab_size"]
    assert (vocabulary.bos, vocabulary.eos, vocabulary.unk) == (0, 1, 2)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_line_ends_and_place_of_special_words(tmp_path: Path, ending: bytes) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(ending.join([b"the", b"<UNK>", b"", b"</S>", b"cat", b"<S>"]))
    vocabulary = Vocabulary.read(path)
    assert vocabulary.words == ["the", "<UNK>", "", "</S>", "cat", "<S>"]
    assert (vocabulary.bos, vocabulary.eos, vocabulary.unk) == (5, 3, 1)
    assert vocabulary.path == str(path)


def test_characters_has_marker_rows_for_the_ids_in_use() -> None:
    vocabulary = Vocabulary(["<S>", "a", "<S>", "</S>", "<UNK>", "é"])
    table = vocabulary.characters(9)
    assert table.dtype == np.int16 and table.shape == (6, 9)
    # Of two lines <S> the last is the sentence begin; the other is spelt out, as <UNK> is.
    assert table[2].tolist() == [258, 256, 259] + [260] * 6
    assert table[3].tolist() == [258, 257, 259] + [260] * 6
    assert (table[[0, 1, 4, 5]] == encode_words(["<S>", "a", "<UNK>", "é"], 9)).all()
    assert vocabulary.characters(9) is table
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 1


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=6).map(str.strip)))
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    words = [word for word in words if "\n" not in word and "\r" not in word]
    written = Vocabulary.from_words([*SPECIAL_WORDS, *words])
    written.write(path)
    read = Vocabulary.read(path)
    assert read.words == written.words
    assert read.sha256 == written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [entry.name for entry in path.parent.iterdir()] == ["vocab.txt"]


def test_hash_tells_orders_apart() -> None:
    first = Vocabulary.from_words([*SPECIAL_WORDS, "a", "b"])
    second = Vocabulary.from_words([*SPECIAL_WORDS, "b", "a"])
    assert first.sha256 != second.sha256


@pytest.mark.parametrize("word", ["a\nb", " a", "!!!MAXTERMID"])
def test_words_that_a_file_cannot_hold(word: str) -> None:
    with pytest.raises(DataError, match="cannot stand in a vocabulary file"):
        Vocabulary.from_words([*SPECIAL_WORDS, word])


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: cannot read the vocabulary \(No such file"):
        Vocabulary.read(tmp_path / "none.txt")
    path = tmp_path / "bad.txt"
    path.write_bytes(b"<S>\n</S>\n<UNK>\n\xff\n")
    with pytest.raises(DataError, match=r"bad\.txt, line 4: not UTF-8"):
        Vocabulary.read(path)
    path.write_bytes(b"<S>\nthe\n")
    with pytest.raises(DataError, match=r"bad\.txt: the vocabulary has no line </S> and no line <UNK>"):
        Vocabulary.read(path)
    path.write_bytes(b"<S>\r</S>\r\n<UNK>\rcaf\xe9\r")
    with pytest.raises(DataError, match=r"bad\.txt, line 4: not UTF-8"):
        Vocabulary.read(path)
    path.write_bytes(b"\xef\xbb\xbf<S>\n</S>\n<UNK>\n")
    with pytest.raises(DataError, match=r"bad\.txt, line 1: a byte order mark"):
        Vocabulary.read(path)
    # Before another word it is part of that word, as in the original.
    path.write_bytes(b"\xef\xbb\xbfthe\n<S>\n</S>\n<UNK>\n")
    assert Vocabulary.read(path).words[0] == "\ufeffthe"


def test_compressed_and_foreign_files(tmp_path: Path) -> None:
    content = b"<S>\n</S>\n<UNK>\nthe\n"
    (tmp_path / "vocab.txt").write_bytes(content)
    (tmp_path / "vocab.txt.gz").write_bytes(gzip.compress(content))
    plain, packed = (Vocabulary.read(tmp_path / name) for name in ("vocab.txt", "vocab.txt.gz"))
    assert packed.words == plain.words and packed.sha256 == plain.sha256
    (tmp_path / "vocab.txt.gz").write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(DataError, match=r"vocab\.txt\.gz: is truncated"):
        Vocabulary.read(tmp_path / "vocab.txt.gz")
    (tmp_path / "vocab.zip").write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(DataError, match=r"vocab\.zip: is a zip file; unpack it first"):
        Vocabulary.read(tmp_path / "vocab.zip")


def test_special_words_are_needed_where_they_are_used(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("<S>\n</S>\nthe\n")
    with pytest.raises(DataError, match=r"words\.txt: the vocabulary has no line <UNK>"):
        Vocabulary.read(tmp_path / "words.txt")
    vocabulary = Vocabulary.read(tmp_path / "words.txt", SPECIAL_WORDS[:2])
    assert (vocabulary.bos, vocabulary.eos, vocabulary.size) == (0, 1, 3)
    with pytest.raises(DataError, match=r"words\.txt: the vocabulary has no line <UNK>"):
        _ = vocabulary.unk
    assert Vocabulary(["the"], needed=()).characters().tolist() == encode_words(["the"]).tolist()
