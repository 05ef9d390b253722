"""Choice of a biLM's layers for vectors that leave the program, and batches of sentences of similar length.

`embed` and `serve` give all layers side by side, the top one, their average, or a sum with a factor for each layer.

Shapes: L layers, B sentences, T positions with the markers, D dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from elmo_ray.config.model import ModelConfig
from elmo_ray.config.schema import show
from elmo_ray.errors import ConfigError

LayerChoice = tuple[float, ...] | str
"""One of all, top and average, or a factor for each layer, word vectors first."""


def layer_factors(choice: LayerChoice, config: ModelConfig, key: str) -> tuple[float, ...] | None:
    """Return the factor of each layer in a sum, or None for all layers side by side.

    key: the choice's name in errors. Raises ConfigError if there is another number of factors than of layers, or if the
    layers have several sizes and cannot be combined.
    """
    count = config.lstm.n_layers + 1
    factors: tuple[float, ...] | None
    if isinstance(choice, str):
        factors = {"all": None, "top": (0.0,) * (count - 1) + (1.0,), "average": (1 / count,) * count}[choice]
    elif len(choice) != count:
        raise ConfigError(f"{key}={show(list(choice))}: the model has {count} layers, the word vectors included")
    else:
        factors = choice
    if (factors is None or factors[0]) and (why := config.unequal_layers):
        shown = show(list(choice) if isinstance(choice, tuple) else choice)
        raise ConfigError(f"{key}={shown}: {why}; set {key}=top")
    return factors


def choose_layers(layers: Sequence[Tensor], factors: Sequence[float] | None) -> Tensor:
    """Return [L, B, T, D] of layers [B, T, D]: all of them, or their sum as a single layer."""
    if factors is None:
        return torch.stack(list(layers))
    mixed = torch.zeros_like(layers[-1])
    for factor, layer in zip(factors, layers, strict=True):
        if factor:
            mixed = mixed + factor * layer
    return mixed[None]


def batches_by_length(sentences: Sequence[Sequence[str]], most: int) -> Iterator[list[int]]:
    """Yield numbers of sentences of similar length, longest first: `most` padded positions, or one longer sentence."""
    order = sorted(range(len(sentences)), key=lambda number: -len(sentences[number]))
    waiting = iter(order)
    for number in waiting:
        rows = max(1, most // (len(sentences[number]) + 2))
        yield [number, *itertools.islice(waiting, rows - 1)]
