"""The noise of the sampled softmax: a step's negatives, the rows of the tables that it touches, and expected counts.

`draw_negatives` and `log_expected_count` define them. `NoiseSampler` and `RowFinder` compute the same faster, for all
directions of a step at once.

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

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Negatives:
    """Negatives of one direction and step. ids: [K] int64 distinct vocabulary ids; tries: draws it took to find K
    distinct."""

    ids: NDArray[np.int64]
    tries: int


def draw_negatives(
    seed: int, step: int, direction: int, n_words: int, count: int, table: NDArray[np.int64] | None = None
) -> Negatives:
    """Draw log-uniform negatives without replacement, by a pure function of the arguments.

    As TensorFlow's log_uniform_candidate_sampler(unique=True): draw ids with p(k) = log((k+2)/(k+1)) / log(V+1) one
    after another, keep the first `count` distinct ones; `tries` is the index of the last of them plus one. Needs
    count <= n_words (checked with the configuration). table: [n_words], to be written over.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, 2 * step + direction]))
    draws = np.zeros(0, np.int64)
    # of each drawn id its first place among the draws: ten times as fast as sorting them
    first = np.empty(n_words, np.int64) if table is None else table
    size = 4 * count + 64
    while True:
        uniform = random.random(size)
        more = np.expm1(uniform * math.log1p(n_words)).astype(np.int64)  # exp(u log(V+1)) - 1, rounded down
        draws = np.concatenate([draws, np.minimum(more, n_words - 1)])
        places = np.arange(len(draws))
        first[draws] = len(draws)
        np.minimum.at(first, draws, places)
        kept = np.flatnonzero(first[draws] == places)
        if len(kept) >= count:
            return Negatives(draws[kept[:count]], int(kept[count - 1]) + 1)
        size = len(draws)


def log_expected_count(ids: NDArray[np.int64], tries: int, n_words: int) -> NDArray[np.float32]:
    """Return log(-expm1(tries * log1p(-p(id)))): the log of how often an id is expected among the distinct draws."""
    probability = np.log1p(1.0 / (ids + 1.0)) / math.log1p(n_words)
    return np.log(-np.expm1(tries * np.log1p(-probability))).astype(np.float32)


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
