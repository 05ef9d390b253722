"""Words computed once are what the char CNN makes of them, whatever came before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.saved_models import random_model

from elmo_ray.config import PretrainConfig
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.data.word_types import TypeTable
from elmo_ray.elmo.word_cache import WordCache

C = 14
WORDS = [chr(97 + i % 26) * (1 + i % 11) + str(i) for i in range(200)]
VOCABULARY = Vocabulary.from_words([*SPECIAL_WORDS, *WORDS])
CONFIG = PretrainConfig.from_dict(
    {
        "model": {
            "char_cnn": {"filters": [[1, 4], [3, 6]], "embedding_dim": 5, "max_characters": C},
            "lstm": {"dim": 12, "projection_dim": 6},
        }
    }
)


@pytest.mark.parametrize("max_bytes", [1 << 20, 60 * 6 * 8, 1])
def test_vectors_are_those_of_the_char_cnn(max_bytes: int) -> None:
    model = random_model(CONFIG, VOCABULARY.size, dtype=torch.float64)
    assert model.char_cnn is not None
    table, cache = TypeTable(VOCABULARY, C, model.char_cnn.widest), WordCache(model, max_bytes=max_bytes)
    random = np.random.default_rng(2)
    calls: list[int] = []
    assert cache._fixed is not None
    encode = cache._fixed.encode
    cache._fixed.encode = lambda types, classes: calls.append(len(types)) or encode(types, classes)  # type: ignore
    for _ in range(30):
        known = np.unique(random.integers(0, VOCABULARY.size, 20))
        # words may come twice, as the unknown ones of two blocks do
        unknown = VOCABULARY.characters(C)[random.integers(0, VOCABULARY.size, 15)]
        types, classes, _ = table.gather(known, unknown)
        expected = model.encode_types(torch.from_numpy(types))
        assert torch.allclose(cache.vectors(types, classes), expected, rtol=0, atol=1e-12)
    computed = sum(calls)
    if max_bytes == 1 << 20:
        assert computed <= VOCABULARY.size, "each word once"
    else:
        assert computed > VOCABULARY.size, "there was no room for all"


def test_word_ids_need_no_cache() -> None:
    config = PretrainConfig.from_dict({"model": {"input": "words", "lstm": {"dim": 12, "projection_dim": 6}}})
    model = random_model(config, 20)
    assert model.word_embedding is not None
    found = WordCache(model).vectors(np.array([3, 19, 0]), ((3, 1),))
    assert torch.equal(found, model.word_embedding[[3, 19, 0]])
