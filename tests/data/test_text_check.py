"""Measures of texts and vocabulary: unknown words, order of the vocabulary, sentences in two texts."""

from __future__ import annotations

import collections
import random
from pathlib import Path

import numpy as np
import pytest

from elmo_ray.config.softmax import SOFTMAX_KINDS
from elmo_ray.data import sentence_sample, text_check
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.scan import index_shard
from elmo_ray.data.sentence_sample import SentenceSampler, shared_sentences
from elmo_ray.data.text_check import ORDER_WARNING, TextChecks, check_texts, read_sample
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary

WORDS = [a + b + c for a in "bdfgklmn" for b in "aeiou" for c in ("", "n", "r", "sa", "tu", "mo", "li")]
random.Random(0).shuffle(WORDS)


def text(n: int, seed: int, words: list[str] = WORDS) -> list[str]:
    """Return sentences of words by Zipf's law, the first words the most frequent."""
    draw = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(len(words))]
    return [" ".join(draw.choices(words, weights, k=draw.randint(6, 18))) for _ in range(n)]


def corpus_of(folder: Path, name: str, lines: list[str], block_bytes: int = 4096) -> Corpus:
    path = folder / f"{name}.txt"
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return Corpus.from_shards([index_shard(str(path), block_bytes)])


def counted(lines: list[str]) -> list[str]:
    counts = collections.Counter(word for line in lines for word in line.split())
    return sorted(counts, key=lambda word: (-counts[word], word))


def checks(folder: Path, train: list[str], valid: list[str], words: list[str]) -> TextChecks:
    samples = {
        "train": read_sample(corpus_of(folder, "train", train)),
        "valid": read_sample(corpus_of(folder, "valid", valid)),
    }
    sentences = {name: [sample.sentences] for name, sample in samples.items()}
    found = check_texts(samples, Vocabulary([*SPECIAL_WORDS, *words]), sentences, is_counted=False)
    assert TextChecks.from_dict(found.to_dict()) == found
    return found


def warnings(found: TextChecks, softmax: str = "sampled") -> list[str]:
    return list(found.warnings("data.vocab=words.txt", softmax, SOFTMAX_KINDS[softmax].order))


def test_shares_of_unknown_words(tmp_path: Path) -> None:
    train, valid = ["the cat <UNK> sees"] * 9, ["the dog the cat"] * 5
    found = checks(tmp_path, train, valid, ["the", "cat", "sees"])
    assert found.unknown_line() == "unknown words: train 25.00 %, valid 25.00 %"
    (first, second) = warnings(found)
    assert first.startswith("data.train: 25.0 % of the words are not in the vocabulary, data.vocab=words.txt (such as ")
    assert second.startswith("data.valid: 25.0 % ") and "'dog'" in second
    assert warnings(checks(tmp_path, ["the cat sees"] * 9, ["the cat"] * 4 + ["a dog"], ["the", "cat", "sees"])) == []


def test_a_lower_cased_vocabulary_is_told_below_the_limit(tmp_path: Path) -> None:
    lines = [f"The {line}" for line in text(300, 1)]
    words = ["the", *counted(text(300, 1))]
    (told, again) = warnings(checks(tmp_path, lines, [f"The {line}" for line in text(40, 2)], words))
    assert "in lower case 100 % of these are: is the vocabulary in lower case, and the text not?" in told
    assert again.startswith("data.valid")
    assert warnings(checks(tmp_path, lines, text(40, 2), ["The", *words])) == []


def test_another_unicode_form_is_told(tmp_path: Path) -> None:
    train = ["le cafe\u0301 est ferme\u0301"] * 20
    (told,) = warnings(checks(tmp_path, train, ["le est"] * 4, ["le", "est", "café", "fermé"]))
    assert "in another Unicode form 100 % of these are" in told


def test_another_case_is_told(tmp_path: Path) -> None:
    lines = text(300, 1)
    for change in (str.upper, str.title):
        told, _ = warnings(checks(tmp_path, lines, text(40, 2), [change(word) for word in counted(lines)]))
        assert told.endswith("; in upper or lower case 100 % of these are: spell text and vocabulary alike")


def test_unknown_words_of_a_vocabulary_that_no_user_named(tmp_path: Path) -> None:
    found = checks(tmp_path, ["the cat sees"] * 9, ["a dog"] * 9, ["the"])
    train, valid = found.warnings("counted from data.train", "sampled", "", "raise data.max_vocab=4")
    assert train.endswith("counted from data.train (such as 'cat', 'sees'): raise data.max_vocab=4")
    assert valid.endswith("(such as 'a', 'dog'): is it text of the same kind, and split alike?")


def test_special_words_far_down_the_vocabulary(tmp_path: Path) -> None:
    train, valid = text(800, 1), text(80, 2)
    samples = {
        name: read_sample(corpus_of(tmp_path, name, lines)) for name, lines in (("train", train), ("valid", valid))
    }
    words = counted(train)

    def found(order: list[str], is_counted: bool = False) -> TextChecks:
        return check_texts(samples, Vocabulary(order), {"train": None, "valid": None}, is_counted)

    (told,) = warnings(found([*words, *SPECIAL_WORDS]))
    assert told.startswith(
        f"data.vocab=words.txt: </S> stands in line {len(words) + 2}, and it is 7.7 % of what is predicted; "
        "softmax.kind=sampled takes the first lines for the most frequent: put <S>, </S>, <UNK> in the first lines"
    )
    assert warnings(found([*words, *SPECIAL_WORDS]), "full") == warnings(found([*words, *SPECIAL_WORDS], True)) == []
    assert warnings(found([*SPECIAL_WORDS, *words])) == warnings(found([*words[:9], *SPECIAL_WORDS, *words[9:]])) == []
    # Without unknown words it does not matter where <UNK> stands; with many it does.
    assert warnings(found(["<S>", "</S>", *words, "<UNK>"])) == []
    (told,) = warnings(found(["<S>", "</S>", *words[5:], "<UNK>"]))[-1:]
    assert "<UNK> stands in line " in told


def test_sentence_markers_of_others(tmp_path: Path) -> None:
    train, valid = text(100, 1), [f"[CLS] {line} [SEP]" for line in text(20, 2)]
    assert checks(tmp_path, train, train, counted(train)).markers == {}
    found = checks(tmp_path, train, valid, counted(train))
    assert warnings(found)[0] == (
        "data.valid: 20 of 20 sentences spell [CLS]: training adds sentence markers itself; take them out of the text"
    )


def test_order_of_the_vocabulary(tmp_path: Path) -> None:
    train, valid = text(800, 1), text(80, 2)
    own = counted(train)
    orders = {
        "own": own,
        "rising": own[::-1],
        "alphabet": sorted(own),
        "chance": random.Random(3).sample(own, len(own)),
    }
    distance = {}
    for name, words in orders.items():
        order = checks(tmp_path, train, valid, words).order
        assert order is not None
        distance[name] = order.distance
    assert distance["own"] == pytest.approx(0.0, abs=0.01) and distance["rising"] > 1.1
    assert distance["alphabet"] > 0.7 and distance["chance"] > 0.7 > ORDER_WARNING
    told = warnings(checks(tmp_path, train, valid, sorted(own)))
    assert len(told) == 1 and "data.vocab=words.txt is far from falling count: its first 100 lines hold" in told[0]
    assert warnings(checks(tmp_path, train, valid, sorted(own)), "full") == []


def test_a_vocabulary_of_another_larger_text_is_in_order(tmp_path: Path) -> None:
    # A domain: a fifth of its words come from far down in the other text's vocabulary.
    draw = random.Random(5)
    large = [f"{a}{b}" for a in WORDS for b in ("", "k", "s", "ta")]
    weights = [1 / (rank + 1) for rank in range(len(large))]
    other = counted([" ".join(draw.choices(large, weights, k=12)) for _ in range(4000)])
    special = other[200:230]
    lines = [f"{line} {draw.choice(special)} {draw.choice(special)}" for line in text(300, 6, large)]
    order = checks(tmp_path, lines, lines[:30], other).order
    assert order is not None and order.distance < 0.35


def test_texts_that_cannot_tell_the_order(tmp_path: Path) -> None:
    assert checks(tmp_path, ["the cat"] * 9, ["the"], ["cat", "the"]).order is None
    flat = [" ".join(random.Random(n).sample(WORDS, 20)) for n in range(100)]
    assert checks(tmp_path, flat, flat, sorted(WORDS)).order is None


def test_sentences_in_two_texts(tmp_path: Path) -> None:
    train, valid = text(900, 1), text(100, 2)
    assert checks(tmp_path, train, valid, counted(train)).shared["valid"].found == 0
    leaking = [*valid, *train[:20]]
    found = checks(tmp_path, train, leaking, counted(train))
    assert (found.shared["valid"].found, found.shared["valid"].looked_up) == (20, 120)
    (told,) = warnings(found)
    assert told.startswith("data.valid: 17 % of its sentences stand in data.train, too (20 of 120 that were looked up)")
    # Short sentences stand in any two texts.
    short = ["yes , please .", "no .", "thank you ."] * 30
    assert warnings(checks(tmp_path, [*train, *short], [*valid, *short], counted([*train, *short]))) == []


def test_samples_of_large_texts_meet() -> None:
    shared = text(3000, 3)

    def parts(lines: list[str], n: int) -> list[sentence_sample.SentenceSample]:
        samples = []
        for part in np.array_split(np.array(lines), n):
            sampler = SentenceSampler(kept=400)
            for piece in np.array_split(part, 5):
                sampler.add("".join(f"  {line}\r\n" for line in piece).replace("n ", "n  ").encode())
            samples.append(sampler.sample())
        return samples

    train = parts([*text(20_000, 1), *shared[:1500]], 4)
    assert all(len(sample.hashes) == 400 for sample in train)
    found = shared_sentences(parts(shared, 1), train)
    assert 50 < found.looked_up <= 400 and found.share == pytest.approx(0.5, abs=0.15)


def test_a_sample_is_spread_over_a_large_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"sentence number {number} ." for number in range(5000)]
    corpus = corpus_of(tmp_path, "large", lines)
    whole = read_sample(corpus)
    assert whole.whole and sum(whole.words.values()) == 20_000
    monkeypatch.setattr(text_check, "SAMPLE_BYTES", 20_000)
    monkeypatch.setattr(text_check, "SAMPLE_BLOCKS", 8)
    part = read_sample(corpus)
    numbers = sorted(int(word) for word in part.words if word.isdigit())
    assert not part.whole and 500 < len(numbers) < 1000
    assert numbers[0] == 0 and numbers[-1] > 4500 and {"sentence", "number", "."} <= part.words.keys()
    assert part.words["sentence"] == len(numbers)
