"""Nearest words by context-independent vectors: a quick look at what a model has learned."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo.encoder import check_words, without_autocast
from elmo_ray.model.bilm import BiLM

FREQUENT = 5000
"""Number of words, the most frequent ones of a vocabulary, among which neighbours are looked for."""

_SHOWN = 10
_MATCHES = 20
_WORDS_AT_A_TIME = 512


def words_to_show(vocabulary: Vocabulary, asked: Iterable[str] = ()) -> list[str]:
    """Return the words for a quick look at a model: the ones asked for or, if none is, ten of the vocabulary's own.

    asked: words, and globs (`*`, `?`, `[...]`), each of which stands for its 20 most frequent matches; a glob without a
    match is returned as it is. The vocabulary's own are the words with a letter at the ranks 1, 2, 4, 8 and so on.
    """
    frequent = [vocabulary.words[i] for i in _frequent_ids(vocabulary, FREQUENT)]
    shown: list[str] = []
    for text in asked:
        # A word of the text may be a star itself.
        matches = [text] if text in vocabulary.ids else fnmatch.filter(frequent, text)[:_MATCHES]
        shown += matches or [text]
    if not shown:
        lettered = [word for word in frequent if any(map(str.isalpha, word))]
        shown = [lettered[2**power - 1] for power in range(_SHOWN) if 2**power <= len(lettered)]
    return list(dict.fromkeys(shown))


def _frequent_ids(vocabulary: Vocabulary, count: int) -> list[int]:
    """Return the ids of the first `count` words that are no markers: a vocabulary is in the order of falling count."""
    special = {vocabulary.bos, vocabulary.eos, vocabulary.unk}
    return [i for i in range(min(count + len(special), vocabulary.size)) if i not in special]


@without_autocast
@torch.no_grad()
def nearest_words(
    model: BiLM,
    vocabulary: Vocabulary,
    words: Sequence[str],
    count: int = 6,
    among: int = FREQUENT,
    layer: Literal["softmax", "token"] = "softmax",
) -> dict[str, list[str]]:
    """Return for each of `words` the `count` words of largest cosine, by word.

    Only the `among` most frequent words of the vocabulary take part; a word that is not among them has no entry.
    layer: "softmax" takes the rows of the softmax table as vectors; they describe a word as a prediction and do not
    depend on its spelling. A softmax without a table uses "token" instead. "token" takes the input of the LSTMs, which
    the char CNN computes from a word's characters. Raises TypeError unless `words` is a list of strings.
    """
    check_words(words, "words")
    ids = _frequent_ids(vocabulary, among)
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


def _token_vectors(model: BiLM, vocabulary: Vocabulary, ids: list[int]) -> Tensor:
    """Return the [n, P] input vectors of the words with these ids."""
    if model.char_cnn is None:
        return model.encode_types(torch.tensor(ids))
    characters = model.config.char_cnn.max_characters
    types_UC = torch.from_numpy(vocabulary.characters(characters)[ids])
    pieces = types_UC.split(_WORDS_AT_A_TIME)
    return torch.cat([model.encode_types(piece, ((len(piece), characters),)) for piece in pieces])
