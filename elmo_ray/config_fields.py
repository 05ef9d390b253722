"""Settings that take a number or something else: when states are reset, how many workers there are, rates of parts."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator

from elmo_ray.config_schema import Allowed, Section

LARGE = 1e30
"""Of a rate, clip or decay: still a float32."""


def _reset(value: Any) -> float | str:
    if value in ("never", "block"):
        return str(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ValueError("not a way to reset states")


Reset = Annotated[
    float | Literal["never", "block"], PlainValidator(_reset), Allowed("never, block or a probability from 0 to 1")
]


_MOST_WORKERS = 1 << 16


def _workers(value: Any) -> int | tuple[int, int]:
    """A number, or [min, max] with 1 <= min <= max."""
    if isinstance(value, list | tuple):
        least, most = map(_workers, value)  # ValueError for another length
        if isinstance(least, int) and isinstance(most, int) and 1 <= least <= most:
            return least, most
    elif isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST_WORKERS:
        if value == int(value):
            return int(value)
    raise ValueError("not a number of workers")


Workers = Annotated[
    int | tuple[int, int],
    PlainValidator(_workers),
    Allowed(f"an integer >= 0 and <= {_MOST_WORKERS}, or [min, max]"),
]


def _layer_rates(value: Any) -> float | tuple[float | None, ...] | None:
    """A rate for all layers, or a list with one (or null) for each."""
    if isinstance(value, list | tuple):
        return tuple(None if item is None else _rate(item) for item in value)
    return None if value is None else _rate(value)


def _rate(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LARGE and math.isfinite(value):
        return float(value)
    raise ValueError("not a rate")


LayerRates = Annotated[
    float | tuple[float | None, ...] | None,
    PlainValidator(_layer_rates),
    Allowed("a number > 0, a list of them or of null, or null"),
]


class PartRates(Section):
    """Learning rates of the parts that have their own; the schedule acts on them all."""

    path: ClassVar[str] = "optim.part_lr."
    char_embedding: float | None = Field(None, gt=0, le=LARGE, description="of the characters' vectors; null: optim.lr")
    char_cnn: float | None = Field(None, gt=0, le=LARGE, description="of the convolutions; null: optim.lr")
    highway: float | None = Field(None, gt=0, le=LARGE, description="of the highway layers; null: optim.lr")
    projection: float | None = Field(None, gt=0, le=LARGE, description="of the char CNN's projection; null: optim.lr")
    word_embedding: float | None = Field(None, gt=0, le=LARGE, description="of the word table; null: optim.table_lr")
    lstm: LayerRates = Field(None, description="of the LSTM layers, the lowest first; null: optim.lr")
    softmax: float | None = Field(None, gt=0, le=LARGE, description="of the softmax; null: optim.table_lr")

    def rate(self, part: str) -> float | None:
        """Of a part by its name; None where it has none of its own."""
        if not part.startswith("lstm."):
            value: float | None = getattr(self, part, None)
            return value
        layer = int(part.removeprefix("lstm."))
        if isinstance(self.lstm, tuple):
            return self.lstm[layer] if layer < len(self.lstm) else None
        return self.lstm
