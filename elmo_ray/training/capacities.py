"""Fixed shapes for a captured step: numbers that depend on the text are padded to one capacity each.

They are the distinct words of a batch, the windows of their characters, and the touched rows of the tables. A capacity
is what a batch of words by the law of the sampled softmax needs; a batch beyond it takes the next 10 % up. It depends
on that batch and the configuration only, never on earlier batches. So a resumed run has the shapes of one that was
never stopped, and all ranks, whose touched rows are the same, have the same number of them.

Padding changes no result. No input is a padding word, so it gets no gradient; padding rows are not among the touched
ones, and Adagrad does not move a row whose gradient is 0.

Shapes: U distinct words, C characters, R touched rows, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmo_ray import kernels
from elmo_ray.config import PretrainConfig
from elmo_ray.data.characters import PADDING
from elmo_ray.data.word_types import TypeTable
from elmo_ray.training.step_input import StepInput

_GROWTH = 1.1
"""Factor from one size to the next."""

_MULTIPLE = 8  # of sizes, which suits matrix products


class Capacities:
    """Function that pads StepInputs, or their micro-batches, while they are still on the CPU.

    words, windows: usual numbers of distinct words and of their windows in a micro-batch. rows, input_rows: of touched
    rows of the softmax table and of an untied word embedding, of all ranks together. n_words: V.
    """

    def __init__(self, words: float, windows: float, rows: float, input_rows: float, n_words: int):
        self._of_words, self._of_rows, self._n_words = (words, windows), (rows, input_rows), n_words

    @classmethod
    def of(cls, config: PretrainConfig, n_words: int, characters: TypeTable | None, rows: int) -> Capacities:
        """Return the capacities for a worker with `rows` streams.

        The expected frequency of a word depends on its rank in the vocabulary, as in the sampled softmax.
        """
        log_absent = np.log1p(-np.log1p(1.0 / np.arange(1, n_words + 1)) / np.log1p(n_words))  # of one position
        unroll = config.train.unroll
        # both directions read the same sentences
        present = -np.expm1(-(-rows // config.train.accumulate) * unroll * log_absent)
        windows = np.zeros(n_words)
        if characters is not None:
            windows = _count_windows(characters.table).astype(np.float64)
        of_all = config.data.streams * unroll
        directions = 2 if config.model.bidirectional else 1
        draws = directions * _draws_for(min(config.softmax.negatives or 0, n_words), log_absent)
        touched, read = (-np.expm1(count * log_absent).sum() for count in (of_all + draws, of_all))
        return cls(
            _usual(present.sum(), present.sum()),
            _usual(present @ windows, present @ windows**2),
            _usual(touched, touched),
            _usual(read, read),
            n_words,
        )

    def usual_sizes(self) -> tuple[int, int, int]:
        """Return the padded numbers of distinct words, of touched rows and of input rows of most batches."""
        words, rows, input_rows = _next_size((self._of_words[0], *self._of_rows), (0, 0, 0))
        return words, min(self._n_words, rows), min(self._n_words, input_rows)

    def __call__(self, batch: StepInput) -> StepInput:
        """Return a padded copy, with the sorted positions that kernels sum gradients by."""
        rows, input_rows = (
            None if some is None else self._padded_rows(some, usual)
            for some, usual in zip((batch.rows, batch.input_rows), self._of_rows, strict=True)
        )

        def padded(part: StepInput) -> StepInput:
            result = copy.copy(part)
            result.rows, result.input_rows = rows, input_rows
            self._pad_words(result)
            result.input_order, result.input_starts = sorted_positions(
                result.inputs.transpose(1, 2).numpy(), len(result.types)
            )
            if rows is not None and result.target_rows is not None:
                result.target_order, result.target_starts = sorted_positions(result.target_rows.numpy(), len(rows))
            return result

        if not batch.micro_batches:
            return padded(batch)
        result = copy.copy(batch)
        result.micro_batches = tuple((share, padded(micro)) for share, micro in batch.micro_batches)
        return result

    def _pad_words(self, batch: StepInput) -> None:
        types = batch.types.numpy()
        by_characters = types.ndim > 1
        counts = _count_windows(types) if by_characters else np.zeros(0, np.int32)
        words, windows = _next_size(self._of_words, (len(types), int(counts.sum())))
        more = words - len(types)
        filler = np.full((more, *types.shape[1:]), PADDING if by_characters else 0, types.dtype)
        batch.types = torch.from_numpy(np.concatenate([types, filler]))
        batch.type_classes = ((words, types.shape[1] if by_characters else 1),)
        if by_characters:
            batch.window_counts = torch.from_numpy(np.concatenate([counts, np.zeros(more, np.int32)]))
            batch.n_windows = windows

    def _padded_rows(self, rows: Tensor, usual: float) -> Tensor:
        (size,) = _next_size((usual,), (len(rows),))
        return torch.from_numpy(_filled_up(rows.numpy(), min(self._n_words, size)))


def sorted_positions(ids: NDArray[np.int64], count: int) -> tuple[Tensor, Tensor]:
    """Return order and starts of `SortedPositions` for ids of any shape, all of them below `count`."""
    flat = ids.reshape(-1)
    if run := kernels.sort_positions():
        order, starts = run(flat, count)
        return torch.from_numpy(order), torch.from_numpy(starts)
    order = np.argsort(flat, kind="stable").astype(np.int32)
    starts = np.zeros(count + 1, np.int32)
    np.cumsum(np.bincount(flat, minlength=count), out=starts[1:])
    return torch.from_numpy(order), torch.from_numpy(starts)


def _count_windows(types_UC: NDArray[np.int16]) -> NDArray[np.int32]:
    """Return [U]: a window for each character, and one for the padding if there is any."""
    lengths = np.count_nonzero(types_UC != PADDING, axis=1)
    return np.minimum(lengths + 1, types_UC.shape[1]).astype(np.int32)


def _draws_for(count: int, log_absent: NDArray[np.float64]) -> float:
    """Return how many draws of words have so many distinct ones, as expected; without end for all words."""
    low, high = 0.0, 1.0
    while high < 1e12 and -np.expm1(high * log_absent).sum() < count:
        low, high = high, 4.0 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(middle * log_absent).sum() < count else (low, middle)
    return high


def _usual(mean: float, variance: float) -> float:
    """Return a number that most draws of words do not exceed."""
    return float(mean + 2.0 * math.sqrt(variance) + 1.0)


def _next_size(usual: Sequence[float], needed: Sequence[int]) -> list[int]:
    """Return the first size of all these numbers, from the usual one upwards, that is enough for each."""
    sizes = list(usual)
    while any(_rounded_up(size) < n for size, n in zip(sizes, needed, strict=True)):
        sizes = [size * _GROWTH for size in sizes]
    return [_rounded_up(size) for size in sizes]


def _rounded_up(n: float) -> int:
    return math.ceil(n / _MULTIPLE) * _MULTIPLE


def _filled_up(rows: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Return the rows, followed by the first other rows, `capacity` in all."""
    free = np.ones(capacity, np.bool_)
    free[rows[rows < capacity]] = False
    return np.concatenate([rows, np.flatnonzero(free)[: capacity - len(rows)]])
