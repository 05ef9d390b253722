"""Conversion of our parameters to the variables of bilm-tf's TensorFlow graph, and back.

It works for parameters, gradients and Adagrad slots alike, since all have the parameters' shapes. Names and shapes are
those of BILM.md and of bilm-tf's checkpoints: forward-only models have `lm/rnn/` in place of `lm/RNN_{d}/rnn/`, and
one-layer models have `lstm_cell/` without `multi_rnn_cell/cell_0/`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from elmo_ray.config.model import ModelConfig
from elmo_ray.errors import FormatError
from elmo_ray.model.bilm import BiLM

Array = np.ndarray


def cell_prefix(model: ModelConfig, direction: int, layer: int) -> str:
    """Return the beginning of a cell's names, such as `lm/RNN_0/rnn/multi_rnn_cell/cell_1/lstm_cell/`."""
    rnn = f"lm/RNN_{direction}/rnn/" if model.bidirectional else "lm/rnn/"
    return rnn + (f"multi_rnn_cell/cell_{layer}/" if model.lstm.n_layers > 1 else "") + "lstm_cell/"


def _shared_names(model: BiLM) -> dict[str, str]:
    """Return our name -> TensorFlow's for parameters of one variable each, as it is or (filters) with other axes."""
    names: dict[str, str] = {}
    if model.char_cnn is not None:
        names["char_cnn.embedding"] = "lm/char_embed"
        for i in range(len(model.char_cnn.filters)):
            names[f"char_cnn.filters.{i}"] = f"lm/CNN/W_cnn_{i}"
            names[f"char_cnn.filter_biases.{i}"] = f"lm/CNN/b_cnn_{i}"
        for k in range(len(model.char_cnn.highways)):
            for gate in ("carry", "transform"):
                names[f"char_cnn.highways.{k}.{gate}_weight"] = f"lm/CNN_high_{k}/W_{gate}"
                names[f"char_cnn.highways.{k}.{gate}_bias"] = f"lm/CNN_high_{k}/b_{gate}"
        if model.char_cnn.projection_weight is not None:
            names["char_cnn.projection_weight"] = "lm/CNN_proj/W_proj"
            names["char_cnn.projection_bias"] = "lm/CNN_proj/b_proj"
    if model.word_embedding is not None:
        names["word_embedding"] = "lm/embedding"
    if model.softmax_weight is not None:
        names["softmax_weight"] = "lm/softmax/W"
    if model.softmax_bias is not None:
        names["softmax_bias"] = "lm/softmax/b"
    return names


def to_variables(model: BiLM, tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Return TensorFlow's name -> array for tensors by our names; parameters that `tensors` lacks are left out."""
    result: dict[str, Array] = {}
    arrays = {name: t.detach().cpu().numpy() for name, t in tensors.items()}
    for name, variable in _shared_names(model).items():
        if name in arrays:
            array = arrays[name]
            result[variable] = array.transpose(2, 1, 0)[None] if name.startswith("char_cnn.filters.") else array
    for layer in range(model.config.lstm.n_layers):
        prefix = f"lstm.layers.{layer}."
        if prefix + "input_kernel" not in arrays:
            continue
        for d in range(model.directions):
            cell = cell_prefix(model.config, d, layer)
            result[cell + "kernel"] = np.concatenate(
                [arrays[prefix + "input_kernel"][d], arrays[prefix + "hidden_kernel"][d]]
            )
            result[cell + "bias"] = arrays[prefix + "bias"][d]
            if prefix + "projection" in arrays:
                result[cell + "projection/kernel"] = arrays[prefix + "projection"][d]
    return result


def variable_shapes(model: BiLM) -> dict[str, tuple[int, ...]]:
    """Return TensorFlow's name -> shape for all variables of a model, which may be on the meta device."""
    parameters = dict(model.named_parameters())
    shapes: dict[str, tuple[int, ...]] = {}
    for name, variable in _shared_names(model).items():
        shape = tuple(parameters[name].shape)
        shapes[variable] = (1, *reversed(shape)) if name.startswith("char_cnn.filters.") else shape
    for layer in range(model.config.lstm.n_layers):
        prefix = f"lstm.layers.{layer}."
        _, inputs, gates = parameters[prefix + "input_kernel"].shape
        hidden = parameters[prefix + "hidden_kernel"].shape[1]
        for d in range(model.directions):
            cell = cell_prefix(model.config, d, layer)
            shapes[cell + "kernel"] = (inputs + hidden, gates)
            shapes[cell + "bias"] = (gates,)
            if prefix + "projection" in parameters:
                shapes[cell + "projection/kernel"] = tuple(parameters[prefix + "projection"].shape[1:])
    return shapes


def from_variables(model: BiLM, variables: Mapping[str, Array], source: str) -> dict[str, Tensor]:
    """Return our name -> tensor for all parameters of a model, in the CPU's memory.

    Raises FormatError, naming `source`, for a variable that is missing or of another shape.
    """
    shapes = variable_shapes(model)

    def take(variable: str) -> Array:
        if variable not in variables:
            raise FormatError(f"{source}: has no variable {variable}; the options describe another model")
        array = np.asarray(variables[variable])
        if array.shape != shapes[variable]:
            raise FormatError(
                f"{source}: {variable} has shape {list(array.shape)}, the options ask for {list(shapes[variable])}"
            )
        return array

    parameters = dict(model.named_parameters())
    result: dict[str, Tensor] = {}
    for name, variable in _shared_names(model).items():
        array = take(variable)
        if name.startswith("char_cnn.filters."):
            array = array[0].transpose(2, 1, 0)
        result[name] = torch.from_numpy(np.array(array, order="C"))
    for layer in range(model.config.lstm.n_layers):
        prefix = f"lstm.layers.{layer}."
        inputs = parameters[prefix + "input_kernel"].shape[1]
        cells = [cell_prefix(model.config, d, layer) for d in range(model.directions)]
        kernels = np.stack([take(cell + "kernel") for cell in cells])
        result[prefix + "input_kernel"] = torch.from_numpy(kernels[:, :inputs].copy())
        result[prefix + "hidden_kernel"] = torch.from_numpy(kernels[:, inputs:].copy())
        result[prefix + "bias"] = torch.from_numpy(np.stack([take(cell + "bias") for cell in cells]))
        if prefix + "projection" in parameters:
            result[prefix + "projection"] = torch.from_numpy(
                np.stack([take(cell + "projection/kernel") for cell in cells])
            )
    return result
