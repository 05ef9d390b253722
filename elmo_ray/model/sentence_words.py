"""Tokenised sentences as the input of a `SentenceEncoder`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from elmo_ray.data.distinct import encode_with_markers
from elmo_ray.data.vocabulary import SENTENCE_BEGIN_WORD, SENTENCE_END_WORD, Vocabulary
from elmo_ray.errors import ConfigError
from elmo_ray.model.sentence_encoder import IntArray, SentenceEncoder


@torch.no_grad()
def encode_sentences(
    encoder: SentenceEncoder, vocabulary: Vocabulary | None, batch: Sequence[Sequence[str]]
) -> tuple[Tensor, Tensor, IntArray]:
    """Vectors of the distinct words, places [B, T] with the sentence markers, and positions [B] of each sentence: the
    arguments of `SentenceEncoder.layers`. vocabulary: needed for word input, where words outside are `<UNK>`."""
    seen = {SENTENCE_BEGIN_WORD: 0, SENTENCE_END_WORD: 1}
    lengths = np.fromiter(map(len, batch), np.int64, len(batch)) + 2
    places = np.zeros((len(batch), int(lengths.max())), np.int64)
    for row, words in zip(places, batch, strict=True):
        row[1 : len(words) + 1] = [seen.setdefault(word, len(seen)) for word in words]
        row[len(words) + 1] = 1
    model = encoder.model
    if model.char_cnn is not None:
        vectors = encoder.word_vectors(encode_with_markers(list(seen), model.config.char_cnn.max_characters))
    else:
        if vocabulary is None:
            raise ConfigError("a model with word input needs its vocabulary")
        ids = [vocabulary.ids.get(word, vocabulary.unk) for word in seen]
        vectors = model.encode_types(torch.tensor(ids, device=encoder.device))
    return vectors, torch.from_numpy(places).to(encoder.device), lengths
