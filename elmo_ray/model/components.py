"""Parts of a model: what can be frozen or have a learning rate of its own, and when each of them trains."""

from __future__ import annotations

from collections.abc import Iterable

from elmo_ray.config import PretrainConfig


def part_of(parameter: str) -> str:
    """`char_cnn.filters.3` -> char_cnn, `lstm.layers.0.bias` -> lstm.0; as `ModelConfig.parts` names them."""
    words = parameter.split(".")
    if words[0] == "lstm":
        return f"lstm.{words[2]}"
    if words[0] == "char_cnn":
        parts = {
            "embedding": "char_embedding",
            "highways": "highway",
            "filters": "char_cnn",
            "filter_biases": "char_cnn",
        }
        return parts.get(words[1], "projection")
    return "softmax" if parameter.startswith("softmax") else parameter


def trained_at(config: PretrainConfig, parameters: Iterable[str], step: int) -> frozenset[str]:
    """Those of the parameters that 0-based `step` trains: the softmax alone at first, then all that is not frozen."""
    if step < (config.train.softmax_first or 0):
        return frozenset(name for name in parameters if part_of(name) == "softmax")
    return frozenset(name for name in parameters if part_of(name) not in config.train.freeze)
