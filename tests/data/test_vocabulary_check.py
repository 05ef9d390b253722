"""Lines of a vocabulary that cannot be words are refused, and odd ones are told."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from elmo_ray.data.vocabulary_check import check_vocabulary_file
from elmo_ray.errors import DataError

SPECIAL = "<S>\n</S>\n<UNK>\n"


def check(folder: Path, text: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings about a vocabulary with this text."""
    caplog.clear()
    caplog.set_level(logging.INFO, logger="elmo_ray")
    path = folder / "words.txt"
    path.write_bytes(text.encode())
    check_vocabulary_file(str(path))
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


REFUSED = {
    "uniq -c": ("    120 the\n     11 cat\n", r"line 4: '120 the': 2 of 5 lines have a blank: are these counts\?"),
    "word and count": ("the\t120\ncat\t1e3\n", r"line 4: 'the\\t120': 2 of 5 lines have a blank: are these counts\?"),
    "two words": (
        "the\nnew york\n",
        r"line 5: 'new york': 1 of 5 lines has a blank, which no word has; leave one word",
    ),
    "an empty line": ("the\n\ncat\n", "line 5: is empty"),
    "an empty last line": ("the\ncat\n\n", "line 6: is empty"),
    "a word twice": ("the\ncat\nthe \n", "line 6: 'the' stands in line 4 already"),
    "words and counts of a CSV file": (
        "the,120\ncat,11\nu.s.,3\n1,000,2\n",
        r"line 4: 'the,120': 4 of 7 lines have a num",
    ),
    "a byte order mark": ("\ufeffthe\n", "line 4: a byte order mark"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    lines, expected = REFUSED[name]
    with pytest.raises(DataError, match=expected) as caught:
        check(tmp_path, SPECIAL + lines, caplog)
    assert str(caught.value).startswith(f"{tmp_path / 'words.txt'}, line ")


@pytest.mark.parametrize(
    "text",
    ['{"<S>": 0, "</S>": 1, "<UNK>": 2, "the": 3}', '{\n  "<S>": 0,\n  "the": 1\n}\n', '["<S>","</S>","<UNK>"]\n'],
)
def test_json_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    with pytest.raises(DataError, match="words.txt: is JSON; write its words to a text file, one a line, the most"):
        check(tmp_path, text, caplog)


def test_no_words_and_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="the vocabulary is empty; its first lines are <S>, </S>, <UNK>"):
        check(tmp_path, "", caplog)
    with pytest.raises(DataError, match="has no line <S> and no line </S> and no line <UNK>; add them at the top"):
        check(tmp_path, "@@UNKNOWN@@\nthe\n", caplog)
    with pytest.raises(DataError, match="is a folder and no vocabulary; name the file in it, such as vocab.txt"):
        check_vocabulary_file(str(tmp_path))


def test_what_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # A hint and no warning: the Penn Treebank has this word.
    assert check(tmp_path, SPECIAL + "the\n<unk>\n", caplog) == []
    assert "words.txt, line 5: '<unk>' is a word like any other; the special word is <UNK>, in line 3" in caplog.text
    (told,) = check(tmp_path, SPECIAL + "caf\u00e9\ncafe\u0301\n", caplog)
    assert "1 word stands in two Unicode forms" in told and "in line 4 and" in told and "line 5" in told
    (told,) = check(tmp_path, SPECIAL + "10\u00a0000\n", caplog)
    assert "1 word stands there with a blank beyond ASCII" in told


def test_what_is_right(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert check(tmp_path, SPECIAL + "the\ncafé\ncat\n", caplog) == []
    # Numbers with commas, and words that begin as JSON does.
    assert check(tmp_path, SPECIAL + '1,000\n2,5\nthe\ncat\nsat\n,\n{\n[\n"\n', caplog) == []
    assert check(tmp_path, (SPECIAL + "the\n!!!MAXTERMID\ncat").replace("\n", "\r\n"), caplog) == []
    # A few odd words among very many are those of the web.
    many = "".join(f"word{number}\n" for number in range(20_000))
    assert check(tmp_path, SPECIAL + many + "\u2126\n\u03a9\n", caplog) == []
    assert "two Unicode forms" in caplog.text
