import json
import subprocess
import sys
from pathlib import Path

import pytest

from elmo_ray.data.sample import SampleCorpus, prose_sentences, tokenise, write_sample


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> SampleCorpus:
    return write_sample(tmp_path_factory.mktemp("sample"))


def lines(paths: tuple[str, ...]) -> list[str]:
    return [line for path in paths for line in Path(path).read_text("utf-8").splitlines()]


def test_size_and_shares(corpus: SampleCorpus) -> None:
    assert len(corpus.train) == 6 and len(corpus.valid) == len(corpus.test) == 1
    sizes = {split: sum(len(line.split()) for line in lines(getattr(corpus, split))) for split in corpus.tokens}
    assert sizes == corpus.tokens
    assert sizes["train"] > 150_000
    assert 8_000 < min(sizes["valid"], sizes["test"]) <= max(sizes["valid"], sizes["test"]) < 0.1 * sizes["train"]
    shards = [Path(path).stat().st_size for path in corpus.train]
    assert max(shards) < 1.3 * min(shards)


def test_no_sentence_is_in_two_texts(corpus: SampleCorpus) -> None:
    train, valid, test = (lines(getattr(corpus, split)) for split in ("train", "valid", "test"))
    assert len({*train, *valid, *test}) == len(train) + len(valid) + len(test)


def test_it_is_english(corpus: SampleCorpus) -> None:
    text = lines(corpus.train)
    words = [word for line in text for word in line.split()]
    common = {"the", "of", "a", "to", "is", "and", "in", ".", ",", "for", "be", "that", "(", ")"}
    assert sum(word in common for word in words) > 0.3 * len(words)
    assert sum(line.endswith((".", "?", "!", ":")) for line in text) > 0.8 * len(text)
    assert not any(mark in line for line in text for mark in (">>>", "::=", "====", "----", "://"))
    assert max(len(line.split()) for line in text) <= 100
    assert 10 < len(words) / len(text) < 30


@pytest.mark.slow
def test_gathered_once_and_the_same_everywhere(corpus: SampleCorpus, tmp_path: Path) -> None:
    folder = Path(corpus.train[0]).parent
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_sample(folder) == corpus
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    # In another process, with another hash seed.
    code = f"from elmo_ray.data.sample import write_sample; write_sample({str(tmp_path)!r})"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={"PYTHONHASHSEED": "7", "PATH": ""})
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_what_is_missing_is_gathered_again(corpus: SampleCorpus, tmp_path: Path) -> None:
    for path in Path(corpus.train[0]).parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "valid.txt").unlink()
    note = json.loads((tmp_path / "sample.json").read_text("utf-8"))
    assert write_sample(tmp_path).tokens == note["tokens"]
    assert (tmp_path / "valid.txt").exists()


def test_prose_of_a_docstring() -> None:
    text = """Return the `number` of items, e.g. the **length** of a list.

    This doesn't include the header (see :func:`count_all`). The second
    sentence is on two well-
    known lines.

        x = [item for item in items if item]
        for y in x: print(y)

    >>> count([1, 2])
    a result of the call that is not prose

    Arguments
    =========
    * items is the list that is counted, or
      None for all of them.
    +------+-----------------------------+
    | cell | a table is not a sentence . |
    +------+-----------------------------+
    """
    assert list(prose_sentences(text)) == [
        "Return the number of items , e.g. the length of a list .",
        "This does n't include the header ( see count_all ) .",
        "The second sentence is on two well-known lines .",
        "items is the list that is counted , or None for all of them .",
    ]


def test_tokens() -> None:
    assert tokenise("He said: \"It's 3.14, isn't it?\"") == [
        *["He", "said", ":", '"', "It", "'s", "3.14", ",", "is", "n't", "it", "?", '"']
    ]
    assert tokenise("os.path.join(a, b)...") == ["os.path.join", "(", "a", ",", "b", ")", "..."]
    assert tokenise("a well-known rule -- i.e. this one.") == [
        *["a", "well-known", "rule", "--", "i.e.", "this", "one", "."]
    ]
