"""Which settings of parts of a model (frozen, with a rate of their own) do not fit the model or each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elmo_ray.config import PretrainConfig

_TABLE_PARTS = ("word_embedding", "softmax")


def part_problems(config: PretrainConfig) -> Iterator[str]:
    """Messages for `train.freeze`, `train.softmax_first` and `optim.part_lr`, checked against `config.model`."""
    parts, freeze, rates = config.model.parts(), config.train.freeze, config.optim.part_lr
    for part in freeze:
        if part not in parts:
            yield f"train.freeze has {part}: the model's parts are {', '.join(parts)}"
    if set(parts) <= set(freeze):
        yield "train.freeze has all parts of the model: nothing is left to train"
    if config.train.softmax_first and "softmax" in freeze:
        yield f"train.softmax_first={config.train.softmax_first} trains the softmax, but train.freeze has it"
    if config.softmax.tied and len(set(_TABLE_PARTS) & set(freeze)) == 1:
        yield "train.freeze: softmax.tied=true makes word_embedding and softmax one table; freeze both or neither"
    layers = config.model.lstm.n_layers
    if isinstance(rates.lstm, tuple) and len(rates.lstm) != layers:
        yield f"optim.part_lr.lstm has {len(rates.lstm)} rates: model.lstm.n_layers={layers}"
    for part in (*(name for name in type(rates).model_fields if name != "lstm"), *(f"lstm.{i}" for i in range(layers))):
        if rates.rate(part) is None:
            continue
        key = "optim.part_lr." + part.split(".")[0]
        if part not in parts:
            yield f"{key} is set, but the model's parts are {', '.join(parts)}"
        elif part in freeze:
            yield f"{key} is set, but train.freeze has {part}; remove one of them"
