"""Our parameters as TensorFlow's variables: names, shapes, axes, and back; what does not fit is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elmo_ray.checkpoints.bilm_tf.variables import cell_prefix, from_variables, to_variables
from elmo_ray.config import PretrainConfig
from elmo_ray.errors import FormatError
from elmo_ray.model.bilm import BiLM

SMALL: dict[str, Any] = {
    "char_cnn": {"filters": [[1, 2], [3, 4]], "embedding_dim": 5, "max_characters": 9, "n_highway": 2},
    "lstm": {"dim": 8, "projection_dim": 4, "n_layers": 2},
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "characters": (SMALL, {}),
    "forward only": ({**SMALL, "bidirectional": False}, {}),
    "one layer, no projection": ({**SMALL, "lstm": {"dim": 6, "projection_dim": 6, "n_layers": 1}}, {}),
    "words": ({"input": "words", "lstm": SMALL["lstm"]}, {}),
    "tied": ({"input": "words", "lstm": SMALL["lstm"]}, {"tied": True}),
}


def model_of(name: str) -> BiLM:
    values, softmax = CASES[name]
    config = PretrainConfig.from_dict({"model": values, "softmax": softmax})
    model = BiLM(config.model, config.softmax, 11)
    model.reset_parameters(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return model


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name: str) -> None:
    model = model_of(name)
    variables = to_variables(model, dict(model.named_parameters()))
    back = from_variables(model, variables, "somewhere")
    parameters = dict(model.named_parameters())
    assert sorted(back) == sorted(parameters)
    assert all(torch.equal(back[key], p) and back[key].is_contiguous() for key, p in parameters.items())
    assert sum(v.size for v in variables.values()) == sum(p.numel() for p in model.parameters())
    model.load_state_dict(back)


def test_names_and_shapes() -> None:
    cell = "lm/RNN_{}/rnn/multi_rnn_cell/cell_{}/lstm_cell/"
    expected = {
        "lm/char_embed": (261, 5),
        "lm/CNN/W_cnn_0": (1, 1, 5, 2),
        "lm/CNN/W_cnn_1": (1, 3, 5, 4),
        "lm/CNN/b_cnn_0": (2,),
        "lm/CNN/b_cnn_1": (4,),
        "lm/CNN_proj/W_proj": (6, 4),
        "lm/CNN_proj/b_proj": (4,),
        "lm/softmax/W": (11, 4),
        "lm/softmax/b": (11,),
        **{
            f"lm/CNN_high_{k}/{kind}_{part}": (6, 6) if kind == "W" else (6,)
            for k in range(2)
            for kind in "Wb"
            for part in ("carry", "transform")
        },
    }
    for d in range(2):
        for layer in range(2):
            place = cell.format(d, layer)
            expected |= {place + "kernel": (8, 32), place + "bias": (32,), place + "projection/kernel": (8, 4)}
    model = model_of("characters")
    found = to_variables(model, dict(model.named_parameters()))
    assert {name: value.shape for name, value in found.items()} == expected
    assert cell_prefix(model_of("forward only").config, 0, 1) == "lm/rnn/multi_rnn_cell/cell_1/lstm_cell/"
    one = model_of("one layer, no projection")
    assert cell_prefix(one.config, 1, 0) == "lm/RNN_1/rnn/lstm_cell/"
    names = set(to_variables(one, dict(one.named_parameters())))
    assert "lm/RNN_0/rnn/lstm_cell/kernel" in names and not any(
        "projection" in n or "CNN_proj" in n for n in names if "lstm_cell" in n
    )
    tied = model_of("tied")
    assert sorted(n for n in to_variables(tied, dict(tied.named_parameters())) if "cell" not in n) == [
        "lm/embedding",
        "lm/softmax/b",
    ]


def test_axes() -> None:
    model = model_of("characters")
    assert model.char_cnn is not None
    variables = to_variables(model, dict(model.named_parameters()))
    weight = model.char_cnn.filters[1].detach()
    assert variables["lm/CNN/W_cnn_1"][0, 2, 3, 1] == weight[1, 3, 2]
    layer = dict(model.named_parameters())
    kernel = variables["lm/RNN_1/rnn/multi_rnn_cell/cell_0/lstm_cell/kernel"]
    assert np.array_equal(kernel[:4], layer["lstm.layers.0.input_kernel"][1].detach())
    assert np.array_equal(kernel[4:], layer["lstm.layers.0.hidden_kernel"][1].detach())


def test_some_tensors_alone() -> None:
    model = model_of("characters")
    slots = {"char_cnn.embedding": torch.ones(261, 5), "softmax_bias": torch.zeros(11)}
    assert sorted(to_variables(model, slots)) == ["lm/char_embed", "lm/softmax/b"]


@pytest.mark.parametrize("name", CASES)
def test_what_is_missing_or_of_another_shape_is_named(name: str) -> None:
    model = model_of(name)
    variables = to_variables(model, dict(model.named_parameters()))
    for key, value in variables.items():
        rest = {k: v for k, v in variables.items() if k != key}
        with pytest.raises(FormatError, match=key) as caught:
            from_variables(model, rest, "dir/model.ckpt")
        assert str(caught.value).startswith("dir/model.ckpt: ")
        with pytest.raises(FormatError, match=key):
            from_variables(model, {**variables, key: value[..., :-1]}, "dir/model.ckpt")
        with pytest.raises(FormatError, match=key):
            from_variables(model, {**variables, key: np.array(1.0, np.float32)}, "dir/model.ckpt")


def test_the_originals_model(shared: Path) -> None:
    from elmo_ray.checkpoints.bilm_tf.options import from_options, read_options

    folder = shared / "golden" / "model"
    options = read_options(folder / "options.json")
    config, softmax = from_options(options)
    model = BiLM(config, softmax, options["n_tokens_vocab"])
    with np.load(folder / "all_variables.npz") as file:
        every = {key.removesuffix(":0"): file[key] for key in file.files}
    loaded = from_variables(model, every, "all_variables.npz")
    model.load_state_dict(loaded)
    back = to_variables(model, loaded)
    assert all(np.array_equal(value, every[name]) for name, value in back.items())
    assert {name for name in every if not name.endswith("Adagrad") and name.startswith("lm/")} == set(back)
