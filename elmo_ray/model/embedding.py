"""Sentences to vectors: every layer of the biLM at every word, as bilm-tf, AllenNLP and simple_elmo give them.

Shapes: D directions, T window, P projection, L layers, C characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmo_ray.data.characters import encode_words, sentence_marker_rows
from elmo_ray.data.vocabulary import SENTENCE_BEGIN_WORD, SENTENCE_END_WORD, Vocabulary
from elmo_ray.model.bilm import BiLM

_MARKERS = (SENTENCE_BEGIN_WORD, SENTENCE_END_WORD)


@torch.no_grad()
def embed_sentences(
    model: BiLM, sentences: Iterable[Sequence[str]], vocabulary: Vocabulary | None = None, carry: bool = False
) -> Iterator[NDArray[np.float32]]:
    """Yields for each sentence of n words [L + 1, n, D * P]: the word vectors (once for each direction), then the
    layers.

    Sentence markers take part and are left out of the result. carry: the state at a sentence's end is the next one's
    start, as the originals do; otherwise each begins at zero. vocabulary: needed for word-id input, where words
    outside of it are `<UNK>`; without use for characters.
    """
    reference = next(model.parameters())
    state = None
    for words in sentences:
        types = _types([_MARKERS[0], *words, _MARKERS[1]], model, vocabulary).to(reference.device)
        types_UP = model.encode_types(types)
        order = torch.arange(len(types), device=reference.device)
        inputs_DBT = torch.stack([order, order.flip(0)][: model.directions])[:, None, :]
        if state is None or not carry:
            state = model.lstm.zero_state(1, like=types_UP)
        layers, state = model.layers(types_UP, inputs_DBT, state)
        yield torch.stack([_join(layer_DBTP) for layer_DBTP in layers]).float().cpu().numpy()


def _join(layer_DBTP: Tensor) -> Tensor:
    """[n, D * P] both directions in the order of the text, without the markers."""
    directions = [layer_DBTP[0, 0], *(backward.flip(0) for backward in layer_DBTP[1:, 0])]
    return torch.cat(directions, dim=-1)[1:-1]


def _types(words: Sequence[str], model: BiLM, vocabulary: Vocabulary | None) -> Tensor:
    """[n, C] character ids of words, or [n] vocabulary ids."""
    if model.char_cnn is None:
        if vocabulary is None:
            raise ValueError("a model with word input needs the vocabulary")
        return torch.tensor([vocabulary.ids.get(word, vocabulary.unk) for word in words])
    chars_NC = encode_words(words, model.config.char_cnn.max_characters)
    for marker, row in zip(_MARKERS, sentence_marker_rows(chars_NC.shape[1]), strict=True):
        chars_NC[[word == marker for word in words]] = row
    return torch.from_numpy(chars_NC)
