"""Step inputs of few shapes, for what is prepared once for each shape (CUDA graphs): distinct words and touched rows
are padded.

Padding changes nothing. Nobody's input is a padding word, so no gradient comes to it; the rows that pad are others than
the touched ones, and Adagrad does not move a row whose gradient is 0. What a batch is padded to depends on that batch
and on the configuration alone, never on the batches before it: a resumed run has the shapes of one never stopped, and
all ranks have the same rows.

Shapes: U distinct words, C characters, R touched rows, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmo_ray.config import PretrainConfig
from elmo_ray.data.characters import PADDING
from elmo_ray.data.word_types import TypeTable
from elmo_ray.training.step_input import StepInput

_GROWTH = 0.1
"""From one size of distinct words to the next, in the number of those that are usual."""

_ROWS_STEPS = 16
"""Into how many sizes the touched rows are rounded up; the last is the most that a step can touch."""

_MULTIPLE = 8  # of sizes, which suits the products


class FixedShapes:
    """Pads StepInputs, which are on the CPU yet.

    columns: of the length classes, rising ([1] for word input); expected: distinct words of each in a batch; rare: how
    many of the rare words are of each, of which a batch has more or less. most_rows: that a step can touch, of the
    softmax table and of an untied word embedding.
    """

    def __init__(
        self,
        columns: Sequence[int],
        expected: NDArray[np.float64],
        rare: NDArray[np.int64],
        n_words: int,
        most_rows: tuple[int, int],
    ):
        self._class_of = {width: number for number, width in enumerate(columns)}
        self._columns = list(columns)
        # twice the spread that draws of words would have
        self._usual = expected + 2.0 * np.sqrt(expected) + 1.0
        self._more = 1.0 + _GROWTH * self._usual.sum() * rare / rare.sum()
        self._n_words = n_words
        self._steps_of_rows = [max(1, _rounded_up(most / _ROWS_STEPS)) for most in most_rows]

    @classmethod
    def of(cls, config: PretrainConfig, n_words: int, characters: TypeTable | None, rows: int) -> FixedShapes:
        """For a worker with so many streams. Words are expected as often as the sampled softmax expects them, by their
        place in the vocabulary."""
        directions = 2 if config.model.bidirectional else 1
        positions = rows * config.train.unroll
        # both directions read the same sentences
        probability = np.log1p(1.0 / np.arange(1, n_words + 1)) / np.log1p(n_words)
        present = -np.expm1(positions * np.log1p(-probability))
        classes, columns = np.zeros(n_words, np.int64), [1]
        if characters is not None:
            classes, columns = characters.classes.astype(np.int64), characters.columns
        expected = np.bincount(classes, present, minlength=len(columns)).astype(np.float64)
        rare = np.bincount(classes[n_words // 2 :], minlength=len(columns))
        targets = directions * config.data.streams * config.train.unroll  # of all ranks
        negatives = directions * config.softmax.negatives
        inputs = targets if config.softmax.tied else 0
        most_rows = min(n_words, targets + negatives + inputs), min(n_words, targets)
        return cls(columns, expected, rare, n_words, most_rows)

    def __call__(self, batch: StepInput) -> StepInput:
        """A padded copy."""
        result = copy.copy(batch)
        self._pad_types(result)
        for name, step in zip(("rows", "input_rows"), self._steps_of_rows, strict=True):
            rows = getattr(batch, name)
            if isinstance(rows, Tensor):
                capacity = min(self._n_words, -(-len(rows) // step) * step)
                setattr(result, name, torch.from_numpy(_filled_up(rows.numpy(), capacity)))
        return result

    def _pad_types(self, batch: StepInput) -> None:
        counts = np.zeros(len(self._columns), np.int64)
        for count, width in batch.type_classes:
            counts[self._class_of[width]] = count
        ends = np.cumsum(counts)
        size = 0
        while (place := _places(ends, capacities := self._capacities(size))) is None:
            size += 1
        types = batch.types.numpy()
        padded = np.full((sum(capacities), *types.shape[1:]), PADDING if types.ndim > 1 else 0, types.dtype)
        padded[place] = types
        batch.types = torch.from_numpy(padded)
        batch.inputs = torch.from_numpy(place[batch.inputs.numpy()])
        batch.type_classes = tuple(zip(capacities, self._columns, strict=True))

    def _capacities(self, size: int) -> list[int]:
        return [_rounded_up(n) for n in self._usual + size * self._more]


def _places(ends: NDArray[np.int64], capacities: Sequence[int]) -> NDArray[np.int64] | None:
    """Where each of the words goes, which come by class, with the places of each class's last word in `ends`; None
    where they do not fit.

    Words for which their class has no room go to the next, whose columns have room for them as well.
    """
    place = np.empty(ends[-1], np.int64)
    done = first = 0
    for end, capacity in zip(ends.tolist(), capacities, strict=True):
        count = min(end - done, capacity)
        place[done : done + count] = np.arange(first, first + count)
        done, first = done + count, first + capacity
    return place if done == len(place) else None


def _filled_up(rows: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The rows, and after them the first others, up to `capacity` of them."""
    free = np.ones(capacity, np.bool_)
    free[rows[rows < capacity]] = False
    return np.concatenate([rows, np.flatnonzero(free)[: capacity - len(rows)]])


def _rounded_up(n: float) -> int:
    return int(-(-n // _MULTIPLE)) * _MULTIPLE
