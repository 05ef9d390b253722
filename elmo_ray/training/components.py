"""Components of a model: the groups of parameters that can be frozen or have a learning rate of their own."""

from __future__ import annotations

from collections.abc import Iterable

from elmo_ray.config import PretrainConfig


def component_of(parameter: str) -> str:
    """Return the component that a parameter belongs to, by the names of `ModelConfig.components`.

    Examples: `char_cnn.filters.3` -> char_cnn, `lstm.layers.0.bias` -> lstm.0.
    """
    words = parameter.split(".")
    if words[0] == "lstm":
        return f"lstm.{words[2]}"
    if words[0] == "char_cnn":
        components = {
            "embedding": "char_embedding",
            "highways": "highway",
            "filters": "char_cnn",
            "filter_biases": "char_cnn",
        }
        return components.get(words[1], "projection")
    return "softmax" if parameter.startswith("softmax") else parameter


def trained_at(config: PretrainConfig, parameters: Iterable[str], step: int) -> frozenset[str]:
    """Return the names of the parameters that the step with this 0-based number trains.

    The first `train.softmax_first` steps train the softmax alone; later steps train everything that is not frozen.
    """
    if step < (config.train.softmax_first or 0):
        return frozenset(name for name in parameters if component_of(name) == "softmax")
    return frozenset(name for name in parameters if component_of(name) not in config.train.freeze)
