"""Tokenizers: sentences and words of five scripts, errors of settings, functions of the user's own."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

import elmo_ray
from elmo_ray.errors import ConfigError, DataError
from elmo_ray.text.tokenizers import Tokenizer, cut_document, describe_tokenizer, make_tokenizer

needs_spacy = pytest.mark.skipif(importlib.util.find_spec("spacy") is None, reason="needs the extra [text]")


@functools.cache
def spacy_tokenizer(language: str) -> Tokenizer:
    return make_tokenizer("spacy", language)


def sentences(text: str, language: str = "en") -> list[str]:
    return [" ".join(words) for words in spacy_tokenizer(language)([text])[0]]


def user_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str) -> str:
    """Write a module of the user's own with the function `cut`; return the setting that names it."""
    (tmp_path / f"{name}.py").write_text(f"def cut(documents):\n    return {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}:cut"


def test_none_takes_lines_as_sentences() -> None:
    found = make_tokenizer("none")(["The dog\u00a0barks .\r\n\n  It 's late .\rYes", "", " \n "])
    assert found == [[["The", "dog", "barks", "."], ["It", "'s", "late", "."], ["Yes"]], [], []]


@needs_spacy
@pytest.mark.parametrize(
    ("language", "text", "right"),
    [
        (
            "en",
            "Mr. Hill didn't pay. Dr. Low (of St. Ives) did.",
            ["Mr. Hill did n't pay .", "Dr. Low ( of St. Ives ) did ."],
        ),
        ("en", '"Stop!" he cried. "Why?" She left.', ['" Stop ! " he cried .', '" Why ? "', "She left ."]),
        ("en", "It costs 3.14 euros. 12,000 came.", ["It costs 3.14 euros .", "12,000 came ."]),
        ("en", "He saw... and left. Well... Then rain.", ["He saw ... and left .", "Well ...", "Then rain ."]),
        ("en", "See No. 5.\n\nA heading\n \nThe end", ["See No . 5 .", "A heading", "The end"]),
        (
            "en",
            "A wrapped\nline. (It ends.) Yes?! No. He",
            ["A wrapped line .", "( It ends . )", "Yes ? !", "No .", "He"],
        ),
        ("en", "A well-kept house—old.", ["A well-kept house — old ."]),
        ("fr", "Il dit : « Quoi ? » Puis il part.", ["Il dit : « Quoi ? »", "Puis il part ."]),
        ("ru", "«Где ты?» — спросил он. Тишина.", ["« Где ты ? » — спросил он .", "Тишина ."]),
        ("el", "Πού είναι; Στο σπίτι. Καλά!", ["Πού είναι ;", "Στο σπίτι .", "Καλά !"]),
        ("ar", "هل أنت هنا؟ نعم. وصل القطار.", ["هل أنت هنا ؟", "نعم .", "وصل القطار ."]),
        ("hi", "वह घर गया। वह सो गया।", ["वह घर गया ।", "वह सो गया ।"]),
        ("ko", "비가 온다. 집에 간다.", ["비가 온다 .", "집에 간다 ."]),
    ],
)
def test_sentences_and_words(language: str, text: str, right: list[str]) -> None:
    assert sentences(text, language) == right
    assert "".join(right).replace(" ", "") == "".join(text.split())  # nothing is changed or lost


@needs_spacy
def test_words_are_those_of_spacy() -> None:
    import spacy

    text = (
        "Hadn't she (of the U.S.) said: \"I'll e-mail you@example.com at 10:30pm\"?!  $5.20/kg, 7%... end.Next :-) etc."
    )
    rules = spacy.blank("fr")
    right = [token.text for token in rules(text) if not token.is_space]
    found = make_tokenizer("spacy", "fr")([text])[0]
    assert [word for words in found for word in words] == right


@needs_spacy
def test_words_of_a_chunk_do_not_depend_on_its_neighbours() -> None:
    # spaCy takes the quotes of two chunks for its special case '' where they meet, and chunks are learnt in any order.
    tokenizer = spacy_tokenizer("en")
    for number in range(20):
        tokenizer._chunks.clear()  # type: ignore[attr-defined]
        assert tokenizer([f"foo{number}' 'em,'"])[0][0][-3:] == ["'em", ",", "'"]


@needs_spacy
def test_lines_of_a_text_that_is_not_wrapped_are_paragraphs() -> None:
    long = "word " * 50 + "end."
    assert sentences(f"A heading\n{long}\nNo mark here\nLast")[::2] == ["A heading", "No mark here"]
    assert sentences("A heading\nand more\nLast") == ["A heading and more Last"]


@needs_spacy
def test_memory_is_bounded_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"Word{number} isn't here." for number in range(12)]
    right = spacy_tokenizer("en")(texts)
    monkeypatch.setattr("elmo_ray.text.tokenizers._REMEMBERED", 7)
    small = make_tokenizer("spacy", "en")
    assert small(texts) == right == small(texts)
    assert len(small._chunks) <= 9  # type: ignore[attr-defined]


@needs_spacy
def test_a_run_without_blanks_stays_one_word() -> None:
    assert sentences("a " + "x.Y" * 100_000 + " bad.") == ["a " + "x.Y" * 100_000 + " bad ."]


def test_pieces_of_a_document_are_the_document() -> None:
    text = "One two.\nThree four.\n\nFive" * 40 + "x" * 300 + " end"
    pieces = list(cut_document(text, 50))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 450 and len(pieces) > 10
    assert pieces[0].endswith("\n\n")
    assert list(cut_document("")) == []


@pytest.mark.parametrize("language", ["zh", "ja", "th"])
def test_a_language_without_spaces_is_refused_with_advice(language: str) -> None:
    with pytest.raises(ConfigError, match=f"data.language={language}: .* without spaces.*segmenter.*tokenizer=none"):
        make_tokenizer("spacy", language)


@pytest.mark.parametrize(
    ("name", "language", "normalize", "message"),
    [
        ("spacy", None, (), "needs data.language"),
        ("none", "en", (), "data.language=en: only data.tokenizer=spacy"),
        ("nltk", None, (), "data.tokenizer=nltk: no such tokenizer; use none, spacy or package.module:function"),
        ("nowhere.at_all:cut", None, (), "cannot import nowhere.at_all"),
        ("os:cut", None, (), "os has no function cut"),
        ("none", None, ("nfc", "lower"), "data.normalize=lower: no such step; the steps are nfc, control, whitespace"),
    ],
)
def test_settings_that_cannot_be_used(
    name: str, language: str | None, normalize: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_tokenizer(name, language, normalize)
    assert "\n" not in str(caught.value)


@needs_spacy
@pytest.mark.parametrize("language", ["qq", "../en", ""])
def test_unknown_language(language: str) -> None:
    with pytest.raises(ConfigError, match="spaCy has no rules for it"):
        make_tokenizer("spacy", language)


def test_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r"data.tokenizer=spacy: .*; pip install 'elmo-ray\[text\]'$"):
        make_tokenizer("spacy", "en")


def test_function_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = user_function(tmp_path, monkeypatch, "own_words", "[[d.split('/'), []] for d in documents]")
    assert make_tokenizer(name)(["a/b", "c"]) == [[["a", "b"]], [["c"]]]
    before = describe_tokenizer(name)
    (tmp_path / "own_words.py").write_text("cut = None\n")
    assert describe_tokenizer(name)["sha256"] != before["sha256"]


@pytest.mark.parametrize(
    ("number", "body", "message"),
    [
        (0, "[]", "returned 0 lists for 1 documents"),
        (1, "None", "returned NoneType for 1 documents"),
        (2, "documents", "returned str for a document"),
        (3, "[['a b']]", "returned str for a sentence"),
        (4, "[[['a b']]]", "returned the word 'a b'"),
        (5, "[[['a', '']]]", "returned the word ''"),
        (6, "[[[1]]]", "returned a word that is no str"),
        (7, "[[['a', 'b\\ud800']]]", r"returned the word 'b\\ud800', which UTF-8 text cannot have"),
        (8, "[[['b\\0']]]", r"returned the word 'b\\x00', which UTF-8 text cannot have"),
        (9, "documents[7]", r"raised IndexError: list index out of range \(.*wrong_words_9.py, line \d+\)$"),
    ],
)
def test_wrong_results_of_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, body: str, message: str
) -> None:
    name = user_function(tmp_path, monkeypatch, f"wrong_words_{number}", body)
    with pytest.raises(DataError, match=f"data.tokenizer={name}: the function {message}"):
        make_tokenizer(name)(["text"])


@pytest.mark.parametrize(("number", "source"), [(0, "def cut(:"), (1, "raise RuntimeError('no')")])
def test_code_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, source: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"no_words_{number}.py").write_text(source)
    with pytest.raises(ConfigError, match=rf"no_words_{number} cannot be imported: \w+Error: .*line 1\)$"):
        make_tokenizer(f"no_words_{number}:cut")
    with pytest.raises(ConfigError, match="no such tokenizer"):
        make_tokenizer(".relative:cut")


def test_normalization_is_by_choice_and_step_by_step() -> None:
    text = "cafe\u0301 so\u00adft\u200b x\u200cy \x01a\u3000b\u2028c"
    assert make_tokenizer("none")([text]) == [[text.split()]]
    assert make_tokenizer("none", None, ("nfc",))([text])[0][0][0] == unicodedata.normalize("NFC", "cafe\u0301")
    assert make_tokenizer("none", None, ("control",))([text])[0][0][1:4] == ["soft", "x\u200cy", "a"]
    assert make_tokenizer("none", None, ("whitespace", "control", "nfc"))([text]) == [
        [["caf\u00e9", "soft", "x\u200cy", "a", "b"], ["c"]]
    ]


def test_description_has_what_the_result_depends_on() -> None:
    one = describe_tokenizer("none", None, ("whitespace", "nfc"))
    assert one["normalize"] == "nfc,whitespace" and one["tokenizer"] == "none" and one["language"] == ""
    assert one == describe_tokenizer("none", None, ("nfc", "whitespace")) != describe_tokenizer("none")


@needs_spacy
def test_description_has_the_librarys_version() -> None:
    import spacy

    assert describe_tokenizer("spacy", "en")["spacy"] == spacy.__version__


def test_top_level_function() -> None:
    assert elmo_ray.tokenize("a b\nc", language=None, tokenizer="none") == [["a", "b"], ["c"]]


def test_import_needs_no_library() -> None:
    check = "import sys, elmo_ray.text.tokenizers; sys.exit('spacy' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0
