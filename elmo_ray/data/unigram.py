"""The simplest language model, as a yardstick: words by their frequency, with add-one smoothing."""

from __future__ import annotations

import math

import numpy as np

from elmo_ray.data.encode import EncodedBlock, encode_block, read_block
from elmo_ray.data.shards import Corpus
from elmo_ray.data.vocabulary import Vocabulary


def add_one_perplexity(train: Corpus, test: Corpus, vocabulary: Vocabulary, on_error: str = "fail") -> float:
    """Perplexity of `test` when a target's probability is (its count in `train` + 1) / (positions + V).

    Targets are those of the biLM's forward direction: the words, unknown ones as `<UNK>`, and `</S>` after each
    sentence; the backward direction has the same value, with `<S>` in its place. Reads both texts in this process.
    """
    counts = _target_counts(train, vocabulary, on_error)
    probability = (counts + 1.0) / (counts.sum() + vocabulary.size)
    wanted = _target_counts(test, vocabulary, on_error)
    return math.exp(-float((wanted * np.log(probability)).sum()) / float(wanted.sum()))


def _target_counts(corpus: Corpus, vocabulary: Vocabulary, on_error: str) -> np.ndarray:
    counts = np.zeros(vocabulary.size, np.int64)
    for block in corpus.blocks():
        encoded: EncodedBlock = encode_block(read_block(block), vocabulary, 3, on_error, block.path, block.start)  # type: ignore[arg-type]
        counts += np.bincount(np.where(encoded.ids < 0, vocabulary.unk, encoded.ids), minlength=vocabulary.size)
        counts[vocabulary.eos] += len(encoded.lengths)
    return counts
