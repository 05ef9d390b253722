"""The noise of the sampled softmax: a step's negatives, the rows of the tables that it touches, and expected counts.

The draws are those of `model.softmax.draw_negatives`, and the counts those of its `log_expected_count`.

Shapes: D directions, B rows, T window, K negatives, R touched rows, V vocabulary.
"""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmo_ray import kernels
from elmo_ray.data.word_types import UniqueIndex
from elmo_ray.model.softmax import draw_negatives

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Noise:
    """The negatives of a step. ids: int64 [D, K], distinct in each direction; tries: int64 [D], draws that it took."""

    ids: IntArray
    tries: IntArray


class NoiseSampler:
    """Drawer of a step's negatives, for one thread. The noise is a pure function of the arguments and the step.

    unique_index: for the ids of the vocabulary.
    """

    def __init__(self, seed: int, directions: int, n_words: int, count: int, unique_index: UniqueIndex):
        self.seed, self.directions, self.n_words, self.count = seed, directions, n_words, count
        self._unique_index = unique_index
        self._draws = 4 * count + 64  # of each direction at a time; how many does not change what is kept

    def __call__(self, step: int) -> Noise:
        """Return the noise of a step."""
        uniform, keep_first_distinct = kernels.uniform(), kernels.keep_first_distinct()
        if uniform is None or keep_first_distinct is None:
            table = self._unique_index.index_of
            drawn = [
                draw_negatives(self.seed, step, d, self.n_words, self.count, table) for d in range(self.directions)
            ]
            return Noise(np.stack([each.ids for each in drawn]), np.array([each.tries for each in drawn], np.int64))
        keys = np.array([[self.seed, 2 * step + d] for d in range(self.directions)], np.uint64)
        ids = np.empty((self.directions, self.count), np.int64)
        kept, tries = np.zeros(self.directions, np.int64), np.zeros(self.directions, np.int64)
        first = 0
        while kept.min() < self.count:
            draws = np.empty((self.directions, self._draws))
            uniform(keys, first, math.log1p(self.n_words), draws)
            # by NumPy, whose last bit is not the C library's on every machine
            np.expm1(draws, out=draws)
            keep_first_distinct(draws, self.n_words, self._unique_index.eights, ids, kept, tries)
            first += self._draws
        # steps take about as many as each other
        self._draws = 4 * (int(0.255 * tries.max()) + 16)
        return Noise(ids, tries)


class NoiseAhead:
    """The noise of a sampler, drawn in a thread a step ahead of need, as it depends on no text."""

    def __init__(self, sampler: NoiseSampler):
        self._sampler, self._pool = sampler, ThreadPoolExecutor(1, "elmo-noise")
        self._next: tuple[int, Future[Noise]] | None = None

    def __call__(self, step: int) -> Noise:
        """Return the noise of a step, and begin with that of the next one."""
        if self._next is None or self._next[0] != step:
            self._next = step, self._pool.submit(self._sampler, step)
        noise = self._next[1].result()
        self._next = step + 1, self._pool.submit(self._sampler, step + 1)
        return noise


@dataclass(frozen=True)
class Touched:
    """Rows of the softmax table that a step touches, and where its words are in them.

    rows: int64 [R], in order. target_rows [D, B, T] (0 where there is no position) and negative_rows [D, K]: int64,
    indices into `rows`. log_counts: float32 [D * (B * T + K)], the log expected counts of the targets, then of the
    negatives.
    """

    rows: IntArray
    target_rows: IntArray
    negative_rows: IntArray
    log_counts: NDArray[np.float32]


class RowFinder:
    """Finder of the rows that a step touches, for one thread.

    unique_index: for the ids of the vocabulary; after a call its `index_of` has the row of each touched id.
    """

    def __init__(self, n_words: int, unique_index: UniqueIndex):
        self._unique_index = unique_index
        probability = np.log1p(1.0 / (np.arange(n_words) + 1.0)) / math.log1p(n_words)
        with np.errstate(divide="ignore"):  # a vocabulary of one word has the probability 1
            self._log_missed = np.log1p(-probability)

    def __call__(self, ids: IntArray, more_ids: IntArray, targets: IntArray, noise: Noise) -> Touched:
        """Return the rows of `ids`, `more_ids` (flat; -1 for none) and the noise. targets: int64 [D, B, T], among the
        ids."""
        find = kernels.touched_rows() or touched_rows
        tables = self._log_missed, self._unique_index.eights, self._unique_index.index_of
        rows, target_rows, negative_rows, logs = find(ids, more_ids, targets, noise.ids, noise.tries, *tables)
        np.expm1(logs, out=logs)
        np.negative(logs, out=logs)
        counts = np.empty(len(logs), np.float32)
        np.log(logs, out=counts, dtype=np.float64, casting="same_kind")
        return Touched(rows, target_rows, negative_rows, counts)


def touched_rows(
    ids: IntArray,
    more_ids: IntArray,
    targets: IntArray,
    negatives: IntArray,
    tries: IntArray,
    log_missed: NDArray[np.float64],
    eights: NDArray[np.uint64],
    index_of: IntArray,
) -> tuple[IntArray, IntArray, IntArray, NDArray[np.float64]]:
    """Return rows, target_rows and negative_rows as in `Touched`, and float64 [D * (B * T + K)] logs that are missing.

    log_missed: float64 [V], the log of the probability that one draw is not this id. The logs are those of the
    probability that none of a direction's tries was the id, of targets and then of negatives. eights, index_of: tables
    of a `UniqueIndex`.
    """
    marks = eights.view(np.bool_)
    for each in (ids, more_ids, negatives):
        marks[each[each >= 0]] = True
    rows = np.flatnonzero(marks)
    marks[rows] = False
    index_of[rows] = np.arange(len(rows))
    # "no position" has row 0, whether or not word 0 is touched: if it is touched, it is the first row anyway
    index_of[0] = 0
    targets = np.maximum(targets, 0)
    logs = [(tries[:, None] * log_missed[each.reshape(len(tries), -1)]).ravel() for each in (targets, negatives)]
    return rows, index_of[targets], index_of[negatives], np.concatenate(logs)
