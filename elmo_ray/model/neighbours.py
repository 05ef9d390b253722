"""Nearest words by the context-independent vectors, to see at a glance what a model has learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.model.bilm import BiLM


@torch.no_grad()
def nearest_words(
    model: BiLM, vocabulary: Vocabulary, words: Sequence[str], count: int = 6, among: int = 5000
) -> dict[str, list[str]]:
    """The `count` words of largest cosine with each of `words` that the vocabulary has, among its `among` most
    frequent ones.

    Vectors are rows of the softmax table, which holds what a word means as a prediction; spelling plays no part in
    them.
    """
    special = {vocabulary.bos, vocabulary.eos, vocabulary.unk}
    ids = [i for i in range(min(among + len(special), vocabulary.size)) if i not in special]
    vectors = F.normalize(model.output_weight.detach()[ids].float(), dim=1)
    result: dict[str, list[str]] = {}
    for word in words:
        row = ids.index(vocabulary.ids[word]) if vocabulary.ids.get(word) in ids else None
        if row is None:
            continue
        nearest = (vectors @ vectors[row]).topk(min(count + 1, len(ids))).indices.tolist()
        result[word] = [vocabulary.words[ids[i]] for i in nearest if i != row][:count]
    return result
