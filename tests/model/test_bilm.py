"""The whole model against a slow reference: values and the gradient of every parameter, and where dropout stands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import naive_bilm
from helpers.naive_bilm import close, stacked, state_of

from elmo_ray.config import PretrainConfig, SoftmaxConfig
from elmo_ray.config.model import ModelConfig
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.data.word_types import TypeTable
from elmo_ray.model.bilm import BiLM
from elmo_ray.model.dropout import Dropout, Rates
from elmo_ray.model.lstm import LstmState

WORDS = Vocabulary([*SPECIAL_WORDS, "a", "bee", "of", "cedilla", "ünïcödé", "overlong-beyond-any-limit", ""])
ROWS, WINDOW, LENGTHS = 3, 3, [3, 0, 2]

CASES: dict[str, dict[str, Any]] = {
    "as the original": {},
    "tanh, no skip connections, three layers": {
        "char_cnn": {"activation": "tanh"},
        "lstm": {"n_layers": 3, "use_skip_connections": False},
    },
    "forward only": {"bidirectional": False, "char_cnn": {"n_highway": 0}},
    "one layer without projection": {"lstm": {"n_layers": 1, "dim": 4, "projection_dim": 4}},
    "forward only, one layer, no clips, filters fill the projection": {
        "bidirectional": False,
        "char_cnn": {"filters": [[1, 1], [3, 3]], "activation": "tanh", "n_highway": 2},
        "lstm": {"n_layers": 1, "cell_clip": None, "proj_clip": None},
    },
    "three layers without clips": {"lstm": {"n_layers": 3, "cell_clip": None, "proj_clip": None}},
    "features go into the LSTM": {"char_cnn": {"projection": False, "filters": [[1, 3], [3, 4]]}},
    "features go into the LSTM, forward only, no projection": {
        "bidirectional": False,
        "char_cnn": {"projection": False},
        "lstm": {"dim": 4, "cell_clip": None, "proj_clip": None, "use_skip_connections": False},
    },
    "words": {"input": "words"},
    "words, forward only, no projection": {"input": "words", "bidirectional": False, "lstm": {"dim": 4}},
}


def model_config(case: dict[str, Any]) -> ModelConfig:
    values: dict[str, Any] = {
        "bidirectional": case.get("bidirectional", True),
        "lstm": {
            "dim": 6,
            "projection_dim": 4,
            "n_layers": 2,
            "cell_clip": 0.5,
            "proj_clip": 0.4,
            **case.get("lstm", {}),
        },
    }
    if case.get("input") == "words":
        values["input"] = "words"
    else:
        values["char_cnn"] = {
            "filters": [[1, 2], [3, 4]],
            "embedding_dim": 3,
            "max_characters": 11,
            "n_highway": 1,
            **case.get("char_cnn", {}),
        }
    return PretrainConfig.from_dict({"model": values}).model


def random_model(config: ModelConfig, softmax: SoftmaxConfig | None = None) -> BiLM:
    model = BiLM(config, softmax or SoftmaxConfig(), WORDS.size).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.6, generator=generator)
    return model


def batch_of(config: ModelConfig) -> tuple[torch.Tensor, tuple[tuple[int, int], ...], torch.Tensor, list[list[int]]]:
    """types, classes, inputs [D, B, T], and the types as plain lists."""
    random = np.random.default_rng(3)
    directions = 2 if config.bidirectional else 1
    inputs = torch.from_numpy(random.integers(0, WORDS.size, (directions, ROWS, WINDOW)))
    if config.input == "words":
        return torch.arange(WORDS.size), ((WORDS.size, 1),), inputs, [[i] for i in range(WORDS.size)]
    widest = max(width for width, _ in config.char_cnn.filters)
    table = TypeTable(WORDS, 11, widest)
    types, classes, place = table.gather(np.arange(WORDS.size), np.zeros((0, 11), np.int16))
    return torch.from_numpy(types), classes, torch.from_numpy(place)[inputs], types.tolist()


def random_state(model: BiLM) -> LstmState:
    generator = torch.Generator().manual_seed(2)
    zero = model.lstm.zero_state(ROWS, like=torch.zeros(1, dtype=torch.float64))
    return LstmState(*(torch.empty_like(x).uniform_(-0.3, 0.3, generator=generator) for x in zero))


@pytest.mark.parametrize("dropout", [0.0, 0.4, (0.0, 0.3, 0.5)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_states_and_gradients(case: dict[str, Any], dropout: Rates) -> None:
    config = model_config(case)
    model = random_model(config)
    types, classes, inputs, characters = batch_of(config)
    state = random_state(model)
    noise, mask = None, None
    if dropout:
        noise = Dropout(dropout, 5, 6, 7, torch.device("cpu"))
        again = Dropout(dropout, 5, 6, 7, torch.device("cpu"))
        sizes = [config.word_dim, *[config.lstm.projection_dim] * config.lstm.n_layers]
        places = ["input", *["between"] * (config.lstm.n_layers - 1), "output"]
        ones = [torch.ones(model.directions, WINDOW, ROWS, size, dtype=torch.float64) for size in sizes]
        masks = [again(x, place) for x, place in zip(ones, places, strict=True)]
        untouched = [place for place, mask in zip(places, masks, strict=True) if bool((mask == 1).all())]
        assert untouched == (["input"] if isinstance(dropout, tuple) else [])
        mask = lambda layer, d, t, b: masks[layer][d, t, b]  # noqa: E731
    top, new = model(types, classes, inputs, state, torch.tensor(LENGTHS), noise)
    assert top.shape == (model.directions, ROWS, WINDOW, config.lstm.projection_dim)

    p = {name: q.detach().clone().requires_grad_() for name, q in model.named_parameters()}
    vectors = [
        p["word_embedding"][row[0]] if config.input == "words" else naive_bilm.word_vector(p, config, row)
        for row in characters
    ]
    outputs, expected_state = naive_bilm.run(p, config, vectors, inputs, state_of(*state), LENGTHS, mask)
    valid = [(d, b, t) for d in range(model.directions) for b in range(ROWS) for t in range(LENGTHS[b])]
    expected = torch.stack([outputs[-1][d][b][t] for d, b, t in valid])
    found = torch.stack([top[d, b, t] for d, b, t in valid])
    close(found, expected)
    hidden, cells = stacked(expected_state)
    close(new.hidden, hidden)
    close(new.cell, cells)

    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    dense = model.dense_parameters()
    for name, parameter in model.named_parameters():
        if name.startswith("softmax"):
            continue
        assert (name in dense) == (name != "word_embedding")
        gradient = p[name].grad
        assert gradient is not None and parameter.grad is not None, name
        close(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["as the original", "words"])
def test_layers_for_use(name: str) -> None:
    config = model_config(CASES[name])
    model = random_model(config)
    types, classes, inputs, characters = batch_of(config)
    state = random_state(model)
    with torch.no_grad():
        x_DTBP = torch.nn.functional.embedding(inputs.transpose(1, 2), model.encode_types(types, classes))
        outputs_DTBP, new = model.lstm(x_DTBP, state, torch.tensor(LENGTHS))
    found = [layer_DTBP.transpose(1, 2) for layer_DTBP in (x_DTBP, *outputs_DTBP)]
    p = {key: q.detach() for key, q in model.named_parameters()}
    vectors = [
        p["word_embedding"][row[0]] if config.input == "words" else naive_bilm.word_vector(p, config, row)
        for row in characters
    ]
    outputs, expected_state = naive_bilm.run(p, config, vectors, inputs, state_of(*state), LENGTHS)
    assert len(found) == 1 + config.lstm.n_layers
    for d, b in ((d, b) for d in range(2) for b in range(ROWS)):
        for t in range(LENGTHS[b]):
            close(found[0][d, b, t], vectors[int(inputs[d, b, t])])
            for layer in range(config.lstm.n_layers):
                close(found[layer + 1][d, b, t], outputs[layer][d][b][t])
    close(new.cell, stacked(expected_state)[1])


def test_rows_of_the_word_table_stand_for_the_table() -> None:
    model = random_model(model_config(CASES["words"]))
    assert model.word_embedding is not None
    rows = torch.tensor([2, 5, 9])
    some = model.encode_types(torch.tensor([1, 0, 2, 1]), None, model.word_embedding.detach()[rows])
    assert torch.equal(some, model.encode_types(torch.tensor([5, 2, 9, 5])))


def test_tables() -> None:
    characters, words = model_config(CASES["as the original"]), model_config(CASES["words"])
    model = random_model(characters)
    assert model.word_embedding is None and model.output_weight is model.softmax_weight
    untied = random_model(words)
    assert untied.char_cnn is None and untied.word_embedding is not None
    assert untied.output_weight is untied.softmax_weight
    tied = random_model(words, SoftmaxConfig(tied=True))
    assert tied.softmax_weight is None and tied.output_weight is tied.word_embedding
    published = BiLM(characters, SoftmaxConfig(), 0)
    assert published.softmax_bias is None
    with pytest.raises(ValueError, match="no softmax"):
        _ = published.output_weight


def test_initial_values_are_a_function_of_the_seed_and_as_the_originals() -> None:
    config = PretrainConfig.from_dict({"model": {"input": "words", "lstm": {"dim": 8, "projection_dim": 8}}}).model
    models = [BiLM(config, SoftmaxConfig(), 3000) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.manual_seed(torch.initial_seed() % 1000 + 1)
        model.reset_parameters(seed)
    first, same, other = (dict(m.named_parameters()) for m in models)
    assert all(torch.equal(p, same[name]) for name, p in first.items())
    assert not torch.equal(first["softmax_weight"], other["softmax_weight"])
    assert abs(float(first["softmax_weight"].detach().std()) - 8**-0.5) < 0.01
    assert not first["softmax_bias"].any()
    bound = (6 / 3008) ** 0.5
    assert 0.99 * bound < float(first["word_embedding"].detach().abs().max()) <= bound
