"""The char CNN of a fixed model against the one that trains."""

from __future__ import annotations

import pytest
import torch

from elmo_ray.config.model import CharCnnConfig
from elmo_ray.data.word_types import encode_with_markers, sort_by_length
from elmo_ray.kernels.cpu.char_cnn_inference import FixedCharCnn
from elmo_ray.model.char_cnn import CharCnn


def fixed(cnn: CharCnn, dtype: torch.dtype | None = None) -> FixedCharCnn:
    projection = None if cnn.projection_weight is None else (cnn.projection_weight, cnn.projection_bias)
    highways = [layer.weights for layer in cnn.highways]
    config, filters, biases = cnn.config, list(cnn.filters), list(cnn.filter_biases)
    parts = cnn.embedding, filters, biases, highways, projection
    return FixedCharCnn(*parts, config.activation, config.max_characters, dtype)


WORDS = [chr(97 + i % 26) * (1 + i % 15) + str(i) for i in range(300)]


@pytest.mark.parametrize("n_words", [1, 70, 300])
@pytest.mark.parametrize(
    "config",
    [{}, {"activation": "tanh", "n_highway": 1}, {"filters": [[2, 8]], "n_highway": 0}],
    ids=["relu", "tanh", "no projection"],
)
def test_vectors(config: dict[str, object], n_words: int) -> None:
    settings = CharCnnConfig.model_validate(
        {"filters": [[1, 4], [3, 6], [5, 5]], "embedding_dim": 5, "max_characters": 14, **config}
    )
    cnn = CharCnn(settings, 8)
    generator = torch.Generator().manual_seed(3)
    cnn.reset_parameters(generator)
    with torch.no_grad():
        for parameter in cnn.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    types, classes, _ = sort_by_length(encode_with_markers(WORDS[:n_words], 14), cnn.widest)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        cnn = cnn.to(dtype)
        with torch.no_grad():
            expected = cnn(torch.from_numpy(types))
        found = fixed(cnn).encode(types, classes)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    low = fixed(cnn, torch.bfloat16).encode(types, classes)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected, rtol=0.03, atol=0.1)
