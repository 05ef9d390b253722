"""Nearest words by context-independent vectors: a quick look at what a model has learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo.encoder import check_words, without_autocast
from elmo_ray.model.bilm import BiLM

_WORDS_AT_A_TIME = 512


@without_autocast
@torch.no_grad()
def nearest_words(
    model: BiLM,
    vocabulary: Vocabulary,
    words: Sequence[str],
    count: int = 6,
    among: int = 5000,
    layer: Literal["softmax", "token"] = "softmax",
) -> dict[str, list[str]]:
    """Return for each of `words` the `count` words of largest cosine, by word.

    Only the `among` most frequent words of the vocabulary take part; a word that is not among them has no entry.
    layer: "softmax" takes the rows of the softmax table as vectors; they describe a word as a prediction and do not
    depend on its spelling. A softmax without a table uses "token" instead. "token" takes the input of the LSTMs, which
    the char CNN computes from a word's characters. Raises TypeError unless `words` is a list of strings.
    """
    check_words(words, "words")
    special = {vocabulary.bos, vocabulary.eos, vocabulary.unk}
    ids = [i for i in range(min(among + len(special), vocabulary.size)) if i not in special]
    has_table = model.softmax_weight is not None or (model.tied and model.has_softmax)
    rows = (
        model.output_weight.detach()[ids]
        if layer == "softmax" and has_table
        else _token_vectors(model, vocabulary, ids)
    )
    vectors = F.normalize(rows.float(), dim=1)
    result: dict[str, list[str]] = {}
    for word in words:
        row = ids.index(vocabulary.ids[word]) if vocabulary.ids.get(word) in ids else None
        if row is None:
            continue
        nearest = (vectors @ vectors[row]).topk(min(count + 1, len(ids))).indices.tolist()
        result[word] = [vocabulary.words[ids[i]] for i in nearest if i != row][:count]
    return result


def _token_vectors(model: BiLM, vocabulary: Vocabulary, ids: Sequence[int]) -> Tensor:
    """Return the [n, P] input vectors of the words with these ids."""
    if model.char_cnn is None:
        return model.encode_types(torch.tensor(ids))
    characters = model.config.char_cnn.max_characters
    types_UC = torch.from_numpy(vocabulary.characters(characters)[list(ids)])
    pieces = types_UC.split(_WORDS_AT_A_TIME)
    return torch.cat([model.encode_types(piece, ((len(piece), characters),)) for piece in pieces])
