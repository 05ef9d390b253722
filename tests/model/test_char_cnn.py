"""Word vectors against a slow reference, and words in cropped columns against the same words in all of them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from helpers import naive_bilm
from helpers.naive_bilm import close

from elmo_ray.config.model import CharCnnConfig, LstmConfig, ModelConfig
from elmo_ray.data.characters import N_CHARACTERS
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.data.word_types import LENGTH_CLASSES, TypeTable
from elmo_ray.model.char_cnn import CharCnn

Activation = Literal["relu", "tanh"]


def model_config(activation: Activation, n_highway: int, projection: bool, max_characters: int = 9) -> ModelConfig:
    filters = ((1, 2), (2, 3), (4, 2))
    return ModelConfig(
        char_cnn=CharCnnConfig(
            filters=filters, activation=activation, embedding_dim=3, n_highway=n_highway, max_characters=max_characters
        ),
        lstm=LstmConfig(dim=8, projection_dim=5 if projection else 7),
    )


def random_cnn(model: ModelConfig, seed: int = 0) -> CharCnn:
    cnn = CharCnn(model.char_cnn, model.lstm.projection_dim).double()
    generator = torch.Generator().manual_seed(seed)
    cnn.reset_parameters(generator)
    with torch.no_grad():
        for parameter in cnn.parameters():  # biases too, and values large enough to leave the linear parts
            parameter.normal_(0.0, 0.7, generator=generator)
    return cnn


def random_types(n: int, max_characters: int, seed: int = 1) -> torch.Tensor:
    """Rows as encode_words makes them, of every length."""
    random = np.random.default_rng(seed)
    words = ["".join(chr(random.integers(97, 123)) for _ in range(i % max_characters)) for i in range(n)]
    vocabulary = Vocabulary([*SPECIAL_WORDS, *words])
    return torch.from_numpy(vocabulary.characters(max_characters).copy())


@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("n_highway", [0, 1, 2])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_values_and_gradients(activation: Activation, n_highway: int, projection: bool) -> None:
    model = model_config(activation, n_highway, projection)
    cnn = random_cnn(model)
    assert (cnn.projection_weight is not None) == projection
    types = random_types(7, 9)
    reference = {f"char_cnn.{name}": p.detach().clone().requires_grad_() for name, p in cnn.named_parameters()}
    expected = torch.stack([naive_bilm.word_vector(reference, model, row) for row in types.tolist()])
    found = cnn(types)
    close(found, expected)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for name, parameter in cnn.named_parameters():
        gradient = reference[f"char_cnn.{name}"].grad
        assert gradient is not None and parameter.grad is not None, name
        assert gradient.abs().max() > 0, name
        close(parameter.grad, gradient)


def whole_numbers(cnn: CharCnn) -> None:
    """Small whole numbers: their products and sums are exact, in whatever order they are taken."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in cnn.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator))


@pytest.mark.parametrize(("max_characters", "widest"), [(50, 7), (50, 5), (50, 1), (20, 7), (12, 12), (9, 4), (27, 1)])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_cropped_columns_have_the_same_maxima(activation: Activation, max_characters: int, widest: int) -> None:
    lengths = sorted(
        {0, 1, 2, max_characters - 3, max_characters - 2, max_characters + 5}
        | {n for b in LENGTH_CLASSES for n in (b - 3, b - 2, b - 1)}
    )
    random = np.random.default_rng(2)
    words = ["".join(chr(random.integers(33, 127)) for _ in range(n)) for n in lengths for _ in range(3)]
    words += ["é" * n for n in (1, 5, max_characters // 2)]
    vocabulary = Vocabulary([*SPECIAL_WORDS, *words])
    table = TypeTable(vocabulary, max_characters, widest)
    known = random.permutation(vocabulary.size)[: vocabulary.size - 4]
    unknown = vocabulary.characters(max_characters)[-4:]
    types, classes, place = table.gather(known, unknown)
    assert sum(n for n, _ in classes) == len(types) == vocabulary.size
    filters = ((1, 3), (widest, 4)) if widest > 1 else ((1, 7),)
    cnn = CharCnn(
        CharCnnConfig(
            filters=filters, activation=activation, embedding_dim=4, n_highway=0, max_characters=max_characters
        ),
        7,
    )
    whole_numbers(cnn)
    whole = cnn(torch.from_numpy(np.concatenate([vocabulary.characters(max_characters)[known], unknown])))
    assert torch.equal(cnn(torch.from_numpy(types), classes)[torch.from_numpy(place)], whole)
    if max_characters == 50:
        assert len(classes) > 3, "nothing was cropped"


def test_gradients_of_cropped_columns() -> None:
    model = ModelConfig(
        char_cnn=CharCnnConfig(filters=((1, 2), (3, 4)), embedding_dim=3, max_characters=30, n_highway=1),
        lstm=LstmConfig(dim=8, projection_dim=5),
    )
    vocabulary = Vocabulary([*SPECIAL_WORDS, *("x" * n for n in range(0, 31, 3))])
    types, classes, place = TypeTable(vocabulary, 30, 3).gather(np.arange(vocabulary.size), np.zeros((0, 30), np.int16))
    gradients = []
    for cropped in (True, False):
        cnn = random_cnn(model)
        if cropped:
            found = cnn(torch.from_numpy(types), classes)[torch.from_numpy(place)]
        else:
            found = cnn(torch.from_numpy(vocabulary.characters(30).copy()))
        found.square().sum().backward()
        gradients.append([parameter.grad for parameter in cnn.parameters()])
    for ours, reference in zip(*gradients, strict=True):
        assert ours is not None and reference is not None
        close(ours, reference)


def test_bf16_is_close_to_fp32_and_keeps_weights_and_gradients_in_fp32() -> None:
    config = CharCnnConfig(filters=((1, 8), (2, 8), (3, 16)), embedding_dim=8, max_characters=20, n_highway=2)
    cnn = CharCnn(config, 16)
    cnn.reset_parameters(torch.Generator().manual_seed(0))
    types = random_types(40, 20)
    exact, low = cnn(types), cnn(types, None, torch.bfloat16)
    assert low.dtype == torch.float32
    assert not torch.equal(low, exact)
    assert float((low - exact).detach().norm()) < 0.03 * float(exact.detach().norm())
    low.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in cnn.parameters()
    )


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_initial_values_are_the_originals(activation: Activation) -> None:
    config = CharCnnConfig(filters=((2, 300), (5, 500)), activation=activation, embedding_dim=16, n_highway=1)
    cnn = CharCnn(config, 128)
    cnn.reset_parameters(torch.Generator().manual_seed(0))
    assert cnn.embedding.shape == (N_CHARACTERS, 16)
    assert float(cnn.embedding.abs().max()) <= 1.0 and abs(float(cnn.embedding.std()) - 3**-0.5) < 0.02
    for weight, width in zip(cnn.filters, (2, 5), strict=True):
        if activation == "relu":
            assert float(weight.abs().max()) <= 0.05 and abs(float(weight.std()) - 0.05 * 3**-0.5) < 0.001
        else:
            assert abs(float(weight.std()) - (1 / (width * 16)) ** 0.5) < 0.01
    highway = cnn.highways[0]
    assert torch.as_tensor(highway.carry_bias).tolist() == [-2.0] * 800
    assert not torch.as_tensor(highway.transform_bias).any()
    for matrix, fan_in in ((highway.carry_weight, 800), (highway.transform_weight, 800), (cnn.projection_weight, 800)):
        assert isinstance(matrix, torch.Tensor)
        assert abs(float(matrix.std()) - fan_in**-0.5) < 0.001
    again = CharCnn(config, 128)
    again.reset_parameters(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(cnn.parameters(), again.parameters(), strict=True))
