"""Check that texts and vocabulary belong together: unknown words, order of the vocabulary, sentences in two texts.

Training hides such mistakes: with a wrong vocabulary its perplexity is low, as the model learns to predict `<UNK>`. The
measures are of a sample of each text, and `prepare` keeps them: the start of a training does not read the text again.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elmo_ray import storage
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.sentence_sample import EVERYTHING, SentenceSample, SentenceSampler, Shared, shared_sentences
from elmo_ray.data.text import BYTE_ORDER_MARK, REPLACEMENT, count_lines
from elmo_ray.data.vocabulary import SPECIAL_WORDS, UNKNOWN_WORD, Vocabulary
from elmo_ray.errors import DataError, short
from elmo_ray.text.unspaced import UNSPACED_ADVICE, find_unspaced

logger = logging.getLogger(__name__)

# Text that is read of each of train, valid and test, in bytes, and the number of places at which it is read.
SAMPLE_BYTES = 8 << 20
SAMPLE_BLOCKS = 64
UNKNOWN_WARNING = 0.2
_LOWER_CASED = 0.02
SHARED_WARNING = 0.05
# Sentences found in a sample below which a share is chance.
_FEWEST_SHARED = 5
# 0 is the order of the text's own counts, 1 is no order at all; a vocabulary of other text has up to 0.25.
ORDER_WARNING = 0.5
_FEWEST_WORDS = 500
# Where all words are about as frequent (the two orders differ by fewer nats), no order is wrong.
_FLAT_NATS = 0.3
_FIRST_LINES = 100
# A special word far behind the place of its count is as bad as a wrong order, which it hardly changes as a whole.
_LATE_SHARE, _LATE_LINE, _LATE_TIMES = 0.01, 100, 10
# Marks of a sentence's begin and end, of other programs too, which training adds by itself.
SENTENCE_MARKERS = (
    "<S>", "</S>", "<s>", "</s>", "<bos>", "<eos>", "<BOS>", "<EOS>", "<sos>", "<SOS>", "[CLS]", "[SEP]",
    "<|endoftext|>",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """Sample of a text: the counts of its words, its sentences, their number, and whether it is all of the text."""

    words: Mapping[str, int]
    sentences: SentenceSample
    n_sentences: int
    whole: bool


@dataclass(frozen=True)
class Unknown:
    """Words of a sample that are not in the vocabulary.

    words: all words of the sample; unknown: those outside of the vocabulary; in_lower_case, in_other_case,
    in_other_form: those of them that are in it in lower case, in any other case, or in another Unicode form.
    frequent: the most frequent ones.
    """

    words: int
    unknown: int
    in_lower_case: int
    in_other_case: int
    in_other_form: int
    whole: bool
    frequent: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of unknown words."""
        return self.unknown / self.words if self.words else 0.0


@dataclass(frozen=True)
class Order:
    """Order of a vocabulary, measured by the text. distance: see ORDER_WARNING.

    first, best: the shares of the text's known words that the first 100 lines hold, and that the 100 most frequent
    words of the text are.
    """

    distance: float
    first: float
    best: float


@dataclass(frozen=True)
class LateWord:
    """Special word of a vocabulary that stands in a line far behind that of its count.

    line: counted from 1. share: of the words and sentence ends of the training text.
    """

    word: str
    line: int
    share: float


@dataclass(frozen=True)
class Marker:
    """Mark of a sentence's begin or end that most sentences of a sample spell."""

    word: str
    count: int
    sentences: int
    whole: bool

    def warning(self, key: str) -> str:
        """Return a message about the text that the setting `key` names."""
        of = "sentences" if self.whole else "sampled sentences"
        return (
            f"{key}: {self.count:,} of {self.sentences:,} {of} spell {self.word}: training adds sentence markers "
            "itself; take them out of the text"
        )


@dataclass(frozen=True)
class TextChecks:
    """Measures of the texts of a training, by the names train, valid and test.

    order: None where it was not measured. shared: the sentences of valid and test that stand in train, too.
    in_lower_case: no word of the vocabulary has a capital letter. late: special words of the vocabulary that stand too
    far down. markers: the texts that spell sentence markers. unspaced: for texts whose words are not separated, the
    writing without spaces and an example.
    """

    unknown: dict[str, Unknown]
    shared: dict[str, Shared]
    order: Order | None
    in_lower_case: bool
    late: LateWord | None
    markers: dict[str, Marker]
    unspaced: dict[str, tuple[str, str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the measures as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextChecks:
        """Return the measures that `to_dict` turned into plain values. Raises TypeError or KeyError for others."""
        return cls(
            {name: Unknown(**fields) for name, fields in values["unknown"].items()},
            {name: Shared(**fields) for name, fields in values["shared"].items()},
            None if values["order"] is None else Order(**values["order"]),
            values["in_lower_case"],
            None if values["late"] is None else LateWord(**values["late"]),
            {name: Marker(**fields) for name, fields in values["markers"].items()},
            {name: (str(writing), str(word)) for name, (writing, word) in values["unspaced"].items()},
        )

    def unknown_line(self) -> str:
        """Return one line with the share of unknown words of each text."""
        shares = ", ".join(f"{name} {100 * unknown.share:.2f} %" for name, unknown in self.unknown.items())
        whole = all(unknown.whole for unknown in self.unknown.values())
        return f"unknown words: {shares}" + ("" if whole else " (of a sample)")

    def warnings(self, vocab: str, softmax: str, softmax_order: str, cure: str | None = None) -> Iterator[str]:
        """Yield a message for each mistake that the measures show.

        vocab: the vocabulary, as messages name it. softmax: the value of softmax.kind. softmax_order: see
        `SoftmaxKind.order`. cure: what to do about unknown words of data.train, where the vocabulary is no file that a
        user named.
        """
        for name, marker in self.markers.items():
            yield marker.warning(f"data.{name}")
        for name, unknown in self.unknown.items():
            # A lower-cased vocabulary leaves out a tenth of English text, and always the same words.
            lower_cased = self.in_lower_case and unknown.in_lower_case > _LOWER_CASED * unknown.words
            if unknown.share > UNKNOWN_WARNING or lower_cased:
                yield (
                    f"data.{name}: {100 * unknown.share:.1f} % of the words are not in the vocabulary, {vocab} "
                    f"(such as {', '.join(map(repr, unknown.frequent))}){_unknown_hint(unknown, cure, name)}"
                )
        for name, (writing, word) in self.unspaced.items():
            yield (
                f"data.{name}: {writing} is written without spaces, and its words are not separated (as in "
                f"{short(repr(word), 40)}); {UNSPACED_ADVICE}"
            )
        order = self.order
        if order is not None and order.distance > ORDER_WARNING and softmax_order:
            yield (
                f"{vocab} is far from falling count: its first {_FIRST_LINES} lines hold {100 * order.first:.1f} % of "
                f"the words of data.train, and the {_FIRST_LINES} most frequent words {100 * order.best:.1f} %; "
                f"softmax.kind={softmax} {softmax_order}: sort the vocabulary by falling count, or set "
                "softmax.kind=full"
            )
        elif self.late is not None and softmax_order:
            late = self.late
            yield (
                f"{vocab}: {late.word} stands in line {late.line:,}, and it is {100 * late.share:.1f} % of what is "
                f"predicted; softmax.kind={softmax} takes the first lines for the most frequent: put "
                f"{', '.join(SPECIAL_WORDS)} in the first lines, or set softmax.kind=full"
            )
        for name, shared in self.shared.items():
            if shared.share > SHARED_WARNING:
                yield (
                    f"data.{name}: {100 * shared.share:.0f} % of its sentences stand in data.train, too "
                    f"({shared.found:,} of {shared.looked_up:,} that were looked up): measures of it are too good; "
                    "take them out of one of the two"
                )


def _unknown_hint(unknown: Unknown, cure: str | None, name: str) -> str:
    if 2 * unknown.in_lower_case > unknown.unknown:
        part = 100 * unknown.in_lower_case / unknown.unknown
        return f"; in lower case {part:.0f} % of these are: is the vocabulary in lower case, and the text not?"
    if 2 * (unknown.in_other_case + unknown.in_lower_case) > unknown.unknown:
        part = 100 * (unknown.in_other_case + unknown.in_lower_case) / unknown.unknown
        return f"; in upper or lower case {part:.0f} % of these are: spell text and vocabulary alike"
    if 2 * unknown.in_other_form > unknown.unknown:
        part = 100 * unknown.in_other_form / unknown.unknown
        return f"; in another Unicode form {part:.0f} % of these are: normalise text and vocabulary alike"
    if cure is not None:
        return f": {cure}" if name == "train" else ": is it text of the same kind, and split alike?"
    return ": is it the vocabulary of this text?"


def read_sample(corpus: Corpus) -> Sample:
    """Return a sample of a corpus: all of a small one, otherwise the start of blocks evenly over it.

    Raises DataError when a file of the corpus is gone.
    """
    whole = int((corpus.block_end - corpus.block_start).sum()) <= SAMPLE_BYTES
    chosen = range(len(corpus)) if whole else corpus.spread(SAMPLE_BLOCKS)
    each = SAMPLE_BYTES // max(1, len(chosen))
    counts: collections.Counter[str] = collections.Counter()
    sentences, n_sentences = SentenceSampler(), 0
    for index in chosen:
        block = corpus.block(index)
        end = block.end if whole else min(block.end, block.start + each)
        data = _read(block.path, block.start, end)
        if end < block.end:
            data = data[: data.rfind(b"\n") + 1]
        if block.start == 0:
            data = data.removeprefix(BYTE_ORDER_MARK)
        sentences.add(data)
        n_sentences += count_lines(data)
        counts.update(data.decode("utf-8", "replace").replace("\0", REPLACEMENT).split())
    return Sample(counts, sentences.sample(), n_sentences, whole)


def check_texts(
    samples: Mapping[str, Sample],
    vocabulary: Vocabulary,
    sentences: Mapping[str, list[SentenceSample] | None],
    is_counted: bool,
) -> TextChecks:
    """Return the measures of texts by their samples.

    sentences: samples of the sentences of whole texts where the index has them, otherwise None. is_counted: the
    vocabulary was counted from the training text, so that its order is right.
    """
    unknown = {name: _unknown(sample, vocabulary) for name, sample in samples.items()}
    # The known words of a text that has few of them are chance.
    order = None if is_counted or unknown["train"].share > 0.5 else _order(samples["train"], vocabulary)
    in_lower_case = all(word == word.lower() for word in vocabulary.words if word not in SPECIAL_WORDS)
    unspaced = {name: found for name, sample in samples.items() if (found := find_unspaced(sample.words)) is not None}
    late = None if is_counted else _late(samples["train"], unknown["train"], vocabulary)
    markers = {name: marker for name, sample in samples.items() if (marker := sentence_marker(sample)) is not None}
    return TextChecks(unknown, _shared(samples, sentences), order, in_lower_case, late, markers, unspaced)


def sentence_marker(sample: Sample) -> Marker | None:
    """Return the sentence marker that more than half of the sentences of a sample spell, or None."""
    word = max(SENTENCE_MARKERS, key=lambda marker: sample.words.get(marker, 0))
    count = sample.words.get(word, 0)
    return Marker(word, count, sample.n_sentences, sample.whole) if 2 * count > sample.n_sentences else None


def _late(sample: Sample, unknown: Unknown, vocabulary: Vocabulary) -> LateWord | None:
    """Return the special word that stands farthest behind the place of its count, or None where they are in order.

    `</S>` is predicted at the end of each sentence, `<S>` by the backward direction at its begin.
    """
    total = sum(sample.words.values()) + sample.n_sentences
    counts = {"<S>": sample.n_sentences, "</S>": sample.n_sentences, UNKNOWN_WORD: unknown.unknown}
    found: list[tuple[float, LateWord]] = []
    for word, count in counts.items():
        place = vocabulary.ids[word]
        rank = sum(other > count for other in sample.words.values())
        if count >= _LATE_SHARE * total and place >= max(_LATE_LINE, _LATE_TIMES * (rank + 1)):
            found.append((count * np.log(place / (rank + 1)), LateWord(word, place + 1, count / total)))
    return max(found, key=lambda each: each[0])[1] if found else None


def _shared(samples: Mapping[str, Sample], sentences: Mapping[str, list[SentenceSample] | None]) -> dict[str, Shared]:
    """Return the sentences of valid and test that stand in train, for the texts whose samples can tell it."""
    shared: dict[str, Shared] = {}
    for name in [name for name in samples if name != "train"]:
        train, own = sentences["train"], sentences[name]
        if train is None or own is None:
            # An index of an earlier version, or text that was set aside by blocks: only small texts are compared.
            if not (samples["train"].whole and samples[name].whole):
                continue
            train, own = [samples["train"].sentences], [samples[name].sentences]
        found = shared_sentences(own, train)
        if found.found >= _FEWEST_SHARED or all(sample.limit == EVERYTHING for sample in (*train, *own)):
            shared[name] = found
    return shared


def _unknown(sample: Sample, vocabulary: Vocabulary) -> Unknown:
    ids = vocabulary.ids
    missing = {word: count for word, count in sample.words.items() if word not in ids or word == UNKNOWN_WORD}
    lower = other = 0
    cased = 0
    folded = {word.casefold() for word in ids} if 2 * sum(missing.values()) > sum(sample.words.values()) else set()
    for word, count in missing.items():
        if word == UNKNOWN_WORD:
            continue
        if word.lower() != word and word.lower() in ids:
            lower += count
        elif not word.isascii() and any(unicodedata.normalize(form, word) in ids for form in ("NFC", "NFD")):
            other += count
        elif word.casefold() in folded:
            cased += count
    frequent = [short(word, 40) for word, _ in collections.Counter(missing).most_common(3)]
    words = sum(sample.words.values())
    return Unknown(words, sum(missing.values()), lower, cased, other, sample.whole, frequent)


def _order(sample: Sample, vocabulary: Vocabulary) -> Order | None:
    """Return how far the vocabulary's order is from that of the text's counts, or None where the text cannot tell.

    A word's place counts by its logarithm and by the word's count, as the sampled softmax draws by the logarithm of
    places. So rare words, whose order is chance, weigh little.
    """
    known = [(vocabulary.ids[w], n) for w, n in sample.words.items() if w in vocabulary.ids and w != UNKNOWN_WORD]
    places = np.array([place for place, _ in known], np.float64)
    counts = np.array([count for _, count in known], np.float64)
    if counts.sum() < _FEWEST_WORDS:
        return None
    falling = np.sort(counts)[::-1]
    total, n_special = counts.sum(), 3
    here = float((counts * np.log(places + 1)).sum() / total)
    best = float((falling * np.log(np.arange(len(falling)) + 1 + n_special)).sum() / total)
    chance = float(np.log(np.arange(vocabulary.size) + 1).mean())
    if chance - best < _FLAT_NATS:
        return None
    first = float(counts[places < _FIRST_LINES].sum() / total)
    return Order((here - best) / (chance - best), first, float(falling[:_FIRST_LINES].sum() / total))


def _read(path: str, start: int, end: int) -> bytes:
    try:
        return storage.read_range(path, start, end)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; it was there when the corpus was indexed") from None
