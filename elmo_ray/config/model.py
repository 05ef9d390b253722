"""Settings of the model: its sizes, its kinds, and the learning rates of its components.

The types of settings that take a number or something else are also here: `Reset`, `Workers`, `Layers` and `LayerRates`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator

from elmo_ray.config.schema import Allowed, Int, Pairs, Section

LARGE = 1e30
"""Largest rate, clip or decay; it still fits a float32."""


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
    """Return a number of workers, or (min, max) with 1 <= min <= max; raise ValueError for anything else."""
    if isinstance(value, list | tuple):
        least, most = map(_workers, value)  # raises ValueError for a list of another length
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


def layer_choice(value: Any) -> str | tuple[float, ...]:
    """Return a choice of the layers that become a word's vector; raise ValueError for anything else."""
    if value in ("all", "top", "average"):
        return str(value)
    numbers = list(value) if isinstance(value, list | tuple) else []
    are_numbers = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
    if numbers and are_numbers and all(-LARGE <= number <= LARGE for number in numbers):
        return tuple(float(number) for number in numbers)
    raise ValueError("not a choice of layers")


Layers = Annotated[
    tuple[float, ...] | Literal["all", "top", "average"],
    PlainValidator(layer_choice),
    Allowed("all, top, average or a list of numbers"),
]


def _layer_rates(value: Any) -> float | tuple[float | None, ...] | None:
    """Return a rate for all layers, or a tuple with a rate or None for each layer."""
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


def _dropout(value: Any) -> float | tuple[float, float, float]:
    """Return one probability for all places, or those of the three places of `model.dropout.PLACES`."""
    if isinstance(value, list | tuple):
        if len(value) != 3:
            raise ValueError("not three probabilities")
        first, between, output = map(_probability, value)
        return first, between, output
    return _probability(value)


def _probability(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
        return float(value)
    raise ValueError("not a probability")


DropoutRates = Annotated[
    float | tuple[float, float, float],
    PlainValidator(_dropout),
    Allowed("a number >= 0 and < 1, or [input, between, output]"),
]


class ComponentRates(Section):
    """Learning rates of components that have their own; the schedule changes all of them."""

    path: ClassVar[str] = "optim.part_lr."
    char_embedding: float | None = Field(
        None, gt=0, le=LARGE, description="The rate of the characters' vectors; null: optim.lr."
    )
    char_cnn: float | None = Field(None, gt=0, le=LARGE, description="The rate of the convolutions; null: optim.lr.")
    highway: float | None = Field(None, gt=0, le=LARGE, description="The rate of the highway layers; null: optim.lr.")
    projection: float | None = Field(
        None, gt=0, le=LARGE, description="The rate of the character CNN's projection; null: optim.lr."
    )
    word_embedding: float | None = Field(
        None, gt=0, le=LARGE, description="The rate of the word table; null: optim.table_lr."
    )
    lstm: LayerRates = Field(None, description="The rates of the LSTM layers, lowest first; null: optim.lr.")
    softmax: float | None = Field(None, gt=0, le=LARGE, description="The rate of the softmax; null: optim.table_lr.")

    def rate(self, component: str) -> float | None:
        """Return the rate of a component, or None where it has no rate of its own."""
        if not component.startswith("lstm."):
            value: float | None = getattr(self, component, None)
            return value
        layer = int(component.removeprefix("lstm."))
        if isinstance(self.lstm, tuple):
            return self.lstm[layer] if layer < len(self.lstm) else None
        return self.lstm


_MOST_FILTERS = 1 << 16
_MOST_PARAMETERS = 10**10  # 40 GB in float32, a hundred times as many as the original has


class CharCnnConfig(Section):
    """Section `model.char_cnn`."""

    path: ClassVar[str] = "model.char_cnn."
    filters: Pairs = Field(
        ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256)), description="The [width, count] of each convolution."
    )
    activation: Literal["relu", "tanh"] = Field(
        "relu", description="The function that is applied after the maximum over positions."
    )
    embedding_dim: Int = Field(16, ge=1, le=4096, description="The size of a character's vector.")
    max_characters: Int = Field(
        50, ge=3, le=1000, description="The number of character ids of a word, with the marks of its begin and end."
    )
    n_highway: Int = Field(2, ge=0, le=100, description="The number of highway layers after the convolutions.")
    projection: bool = Field(
        True,
        description="Project the features to the LSTM's output size; false: the first layer reads them as they are.",
    )

    @property
    def n_filters(self) -> int:
        """Number of features of a word before the projection."""
        return sum(count for _, count in self.filters)

    def _contradictions(self) -> Iterator[str]:
        if not self.filters:
            yield "model.char_cnn.filters=[]: must have a [width, count] at least"
        if len(self.filters) > 100:
            yield f"model.char_cnn.filters has {len(self.filters)} widths: must be <= 100"
            return
        for width, count in self.filters:
            if width < 1 or count < 1:
                yield f"model.char_cnn.filters has [{width}, {count}]: width and count must be integers >= 1"
            elif count > _MOST_FILTERS:
                yield f"model.char_cnn.filters has [{width}, {count}]: count must be <= {_MOST_FILTERS}"
            elif width > self.max_characters:
                yield (
                    f"model.char_cnn.filters has width {width}, but a word has only "
                    f"model.char_cnn.max_characters={self.max_characters} ids; lower the one or raise the other"
                )


class LstmConfig(Section):
    """Section `model.lstm`."""

    path: ClassVar[str] = "model.lstm."
    dim: Int = Field(512, ge=1, le=1 << 16, description="The number of cells of each layer and direction.")
    projection_dim: Int = Field(
        128, ge=1, le=1 << 16, description="The size of a layer's output; equal to dim means no projection."
    )
    n_layers: Int = Field(2, ge=1, le=100, description="The number of layers of each direction.")
    cell_clip: float | None = Field(3.0, gt=0, le=LARGE, description="The bound of the cell state; null: no bound.")
    proj_clip: float | None = Field(
        3.0, gt=0, le=LARGE, description="The bound of the projected output; null: no bound."
    )
    use_skip_connections: bool = Field(True, description="Add a layer's input to its output, from the second layer on.")

    def _contradictions(self) -> Iterator[str]:
        if self.projection_dim > self.dim:
            yield (
                f"model.lstm.projection_dim={self.projection_dim} exceeds model.lstm.dim={self.dim}; "
                "a projection makes smaller (equal: none)"
            )


class ModelConfig(Section):
    """Section `model`."""

    path: ClassVar[str] = "model."
    bidirectional: bool = Field(True, description="false trains the forward direction only.")
    input: Literal["characters", "words"] = Field(
        "characters", description="words uses a table of word vectors instead of the character CNN."
    )
    char_cnn: CharCnnConfig = CharCnnConfig()
    lstm: LstmConfig = LstmConfig()

    def _unused(self) -> dict[str, str]:
        if self.input == "words":
            return {"char_cnn": "model.input=words has no char CNN; remove one of them"}
        if self.char_cnn.n_filters == self.lstm.projection_dim:
            why = f"{self.lstm.projection_dim} features need none for model.lstm.projection_dim; remove it"
            return {"char_cnn.projection": why}
        return {}

    def _contradictions(self) -> Iterator[str]:
        count = self.layer_parameters()
        if count > _MOST_PARAMETERS:
            yield f"model has {count} parameters in its layers: must be <= {_MOST_PARAMETERS}; lower its sizes"

    @property
    def word_dim(self) -> int:
        """Size of a word's vector, which the first LSTM layer reads."""
        if self.input == "characters" and not self.char_cnn.projection:
            return self.char_cnn.n_filters
        return self.lstm.projection_dim

    @property
    def unequal_layers(self) -> str | None:
        """Reason why word vectors and LSTM layers cannot be stacked or mixed; None where they can."""
        if self.word_dim == self.lstm.projection_dim:
            return None
        sizes = f"word vectors of size {self.word_dim} and layers of size {self.lstm.projection_dim}"
        return f"model.char_cnn.projection=false makes {sizes}"

    def components(self) -> tuple[str, ...]:
        """Return the names of the components, which can be frozen or have their own learning rate."""
        names = ["word_embedding"]
        if self.input == "characters":
            names = ["char_embedding", "char_cnn"] + (["highway"] if self.char_cnn.n_highway else [])
            if self.char_cnn.n_filters != self.word_dim:
                names.append("projection")
        return (*names, *(f"lstm.{layer}" for layer in range(self.lstm.n_layers)), "softmax")

    def layer_parameters(self) -> int:
        """Return the number of parameters of the layers, without building the model.

        The tables of words and of characters are not counted.
        """
        cnn, lstm = self.char_cnn, self.lstm
        cell, width, count = lstm.dim, lstm.projection_dim, 0
        if self.input == "characters":
            n = cnn.n_filters
            count += sum(filters * (kernel * cnn.embedding_dim + 1) for kernel, filters in cnn.filters)
            count += 2 * cnn.n_highway * n * (n + 1) + ((n + 1) * width if n != self.word_dim else 0)
        layer = (2 * width + 1) * 4 * cell + (cell * width if cell != width else 0)
        wider = (self.word_dim - width) * 4 * cell  # of the first layer, whose input may have another size
        return count + (2 if self.bidirectional else 1) * (lstm.n_layers * layer + wider)
