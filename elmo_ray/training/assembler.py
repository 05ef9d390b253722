"""From windows of streams to the inputs of steps: draws, touched rows, micro-batches and padding.

Shapes: B rows (streams) of this worker.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator

import numpy as np
import torch
from numpy.typing import NDArray

from elmo_ray import kernels
from elmo_ray.config import PretrainConfig
from elmo_ray.data.streams import Batch, StreamCursors, StreamLoader
from elmo_ray.data.word_types import UniqueIndex
from elmo_ray.training.capacities import Capacities
from elmo_ray.training.noise import Noise, NoiseAhead, NoiseSampler, RowFinder
from elmo_ray.training.ranks import Exchange, Flags, Gathered
from elmo_ray.training.step_input import StepInput, with_micro_batches

RESET_KEY = 0x7265736574
"""Constant that separates the draws of resets from the other draws of the same (seed, step)."""


def reset_rows(
    reset: str | float, batch: Batch, streams: range, n_streams: int, seed: int, step: int
) -> NDArray[np.bool_]:
    """Return the [B] rows that start this window from zero state (`train.reset`).

    A stream gets the same answer with any number of workers.
    """
    if reset == "never":
        return np.zeros(len(streams), np.bool_)
    if reset == "block":
        return batch.new_block
    if uniform := kernels.uniform():
        draws = np.empty((1, -(-n_streams // 4) * 4))
        uniform(np.array([[seed ^ RESET_KEY, step]], np.uint64), 0, 1.0, draws)
        return draws[0, streams.start : streams.stop] < float(reset)
    random = np.random.Generator(np.random.Philox(key=[seed ^ RESET_KEY, step]))
    return random.random(n_streams)[streams.start : streams.stop] < float(reset)


class StepAssembler:
    """Maker of a StepInput from a worker's Batch: it draws noise, exchanges ids and finds the touched rows.

    noise_ahead: draw in a thread, a step ahead.
    """

    def __init__(
        self, config: PretrainConfig, n_words: int, streams: range, exchange: Exchange, noise_ahead: bool = False
    ):
        self.config, self.n_words, self.streams, self.exchange = config, n_words, streams, exchange
        self.words = config.model.input == "words"
        self.directions = 2 if config.model.bidirectional else 1
        rows = -(-config.data.streams // exchange.world)
        self.capacity = rows * config.train.unroll * self.directions * (2 if self.words else 1)
        self._unique_index = UniqueIndex(n_words)
        self._noise: NoiseSampler | NoiseAhead | None = None
        if config.softmax.facts.samples_words:
            negatives = config.softmax.negatives
            index = UniqueIndex(n_words) if noise_ahead else self._unique_index  # one for each thread
            sampler = NoiseSampler(config.run.seed, self.directions, n_words, negatives, index)
            self._noise = NoiseAhead(sampler) if noise_ahead else sampler
            self._find_rows = RowFinder(n_words, self._unique_index)

    def __call__(self, batch: Batch, step: int, flags: Flags) -> tuple[StepInput, Flags]:
        """Return the input of a step, on the CPU, and the flags of all ranks. flags: of this rank."""
        config = self.config
        noise = None if self._noise is None else self._noise(step)
        inputs = batch.types.astype(np.int64) if self.words else np.zeros(0, np.int64)
        gathered = self._exchange_ids(batch, inputs, noise, flags, step)
        reset = reset_rows(config.train.reset, batch, self.streams, config.data.streams, config.run.seed, step)
        result = StepInput(
            step,
            torch.from_numpy(batch.types),
            batch.type_classes,
            torch.from_numpy(batch.inputs),
            torch.from_numpy(batch.targets),
            torch.from_numpy(batch.lengths),
            torch.from_numpy(reset),
            gathered.positions,
        )
        if noise is not None:
            self._add_rows(result, batch, noise, gathered, inputs)
        return result, gathered.flags

    def _exchange_ids(
        self, batch: Batch, inputs: NDArray[np.int64], noise: Noise | None, flags: Flags, step: int
    ) -> Gathered:
        """Return the ids of all ranks: of targets, and with word input behind them those of inputs."""
        targets = batch.targets.ravel()
        if self.exchange.world == 1 and not self.words:
            return self.exchange.gather(targets, len(targets), batch.positions, 0, flags, step=step)
        # input ids have a fixed place behind all targets, for they touch other rows than targets do
        ids = np.full(self.capacity, -1, np.int64)
        ids[: len(targets)] = targets
        if self.words:
            ids[self.capacity // 2 : self.capacity // 2 + len(inputs)] = inputs
        noise_hash = 0 if noise is None else zlib.crc32(noise.ids.tobytes())
        return self.exchange.gather(ids, self.capacity, batch.positions, noise_hash, flags, step=step)

    def _add_rows(
        self, result: StepInput, batch: Batch, noise: Noise, gathered: Gathered, inputs: NDArray[np.int64]
    ) -> None:
        half = self.capacity // 2 if self.words else gathered.ids.shape[1]
        of_targets, of_inputs = gathered.ids[:, :half].ravel(), gathered.ids[:, half:].ravel()
        tied = self.words and self.config.softmax.tied
        found = self._find_rows(of_targets, of_inputs if tied else of_inputs[:0], batch.targets, noise)
        counts = found.log_counts
        if self.config.train.precision == "fp64":
            counts = counts.astype(np.float64)  # type: ignore[assignment]
        of_target, of_negative = np.split(counts, [batch.targets.size])
        result.rows = torch.from_numpy(found.rows)
        result.target_rows = torch.from_numpy(found.target_rows)
        result.target_log_count = torch.from_numpy(of_target.reshape(batch.targets.shape))
        result.negative_rows = torch.from_numpy(found.negative_rows)
        result.negative_log_count = torch.from_numpy(of_negative.reshape(noise.ids.shape))
        if self.words:
            if not tied:
                result.input_rows = torch.from_numpy(self._unique_index.unique(of_inputs[of_inputs >= 0]))
            result.types = torch.from_numpy(self._unique_index.index_of[inputs])


def step_inputs(
    loader: StreamLoader,
    assembler: StepAssembler,
    steps: range,
    flags: Callable[[], Flags],
    capacities: Capacities | None = None,
) -> Generator[tuple[StepInput, StreamCursors, Flags], None, None]:
    """Yield the input of each step, on the CPU, the cursors after it, and the flags of all ranks.

    flags: returns this rank's flags. Raises an error of any rank on every rank, and WaitInterrupted where one of them
    was to stop while it waited for text.
    """
    for step in steps:
        with assembler.exchange.telling_others(assembler.capacity, flags, step):
            batch = loader.next_batch()
        result, of_all = assembler(batch, step, flags())
        result = with_micro_batches(result, assembler.config.train.accumulate)
        yield result if capacities is None else capacities(result), batch.cursors, of_all
