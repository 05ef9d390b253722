"""The loader thread: it turns windows of streams into step inputs, some steps ahead of training.

For each step it draws the noise (negatives, resets), exchanges the target ids with other ranks and finds the touched
rows of the tables, so that the training thread never waits for the CPU.

Shapes: B rows (streams) of this worker.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from elmo_ray import kernels
from elmo_ray.config import PretrainConfig
from elmo_ray.data.encode import WaitInterrupted
from elmo_ray.data.streams import Batch, StreamCursors, StreamLoader
from elmo_ray.data.word_types import UniqueIndex
from elmo_ray.errors import ElmoRayError
from elmo_ray.training.capacities import Capacities
from elmo_ray.training.noise import Noise, NoiseSampler, RowFinder
from elmo_ray.training.ranks import Exchange, Flags, Gathered
from elmo_ray.training.step_input import StepInput, Transfer, wait_for_arrival, with_micro_batches

logger = logging.getLogger(__name__)

WARN_AFTER_S = 60.0

SWITCH_INTERVAL_S = 5e-4
"""Seconds that the loader thread waits for Python's lock before it asks for it, where a GPU trains."""

RESET_KEY = 0x7265736574
"""Constant that separates the draws of resets from the other draws of the same (seed, step)."""


@dataclass
class ReadyBatch:
    """A step's input with what the training loop needs beside it.

    cursors: of this worker's streams after the step. flags: of all ranks. arrived: on a GPU the event of the input's
    arrival, which the step must wait for. waited: seconds that the training thread waited for this batch.
    """

    batch: StepInput
    cursors: StreamCursors
    flags: Flags
    arrived: torch.cuda.Event | None = None
    waited: float = 0.0


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
    """Maker of a StepInput from a worker's Batch: it draws noise, exchanges ids and finds the touched rows."""

    def __init__(self, config: PretrainConfig, n_words: int, streams: range, exchange: Exchange):
        self.config, self.n_words, self.streams, self.exchange = config, n_words, streams, exchange
        self.words = config.model.input == "words"
        self.directions = 2 if config.model.bidirectional else 1
        rows = -(-config.data.streams // exchange.world)
        self.capacity = rows * config.train.unroll * self.directions * (2 if self.words else 1)
        self._unique_index = UniqueIndex(n_words)
        self._noise: NoiseSampler | None = None
        if config.softmax.kind == "sampled":
            negatives = config.softmax.negatives
            self._noise = NoiseSampler(config.run.seed, self.directions, n_words, negatives, self._unique_index)
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


class Feeder:
    """Iterator over `ReadyBatch`es, made by loader and assembler in a thread, `ahead` steps before the training thread.

    flags: called in the thread for this rank's flags. capacities: pad the inputs of captured steps. The iterator raises
    an error of any rank on every rank.
    """

    def __init__(
        self,
        loader: StreamLoader,
        assembler: StepAssembler,
        steps: range,
        flags: Callable[[], Flags],
        device: torch.device,
        ahead: int = 2,
        capacities: Capacities | None = None,
    ):
        self.loader, self.assembler, self.steps, self.flags = loader, assembler, steps, flags
        self.capacities = capacities
        self.transfer = Transfer(device)
        self._queue: queue.Queue[ReadyBatch | BaseException | None] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._in_exchange = False
        self._thread = threading.Thread(target=self._run, name="elmo-loader", daemon=True)

    def _run(self) -> None:
        try:
            for step in self.steps:
                exchange, capacity, no_ids = self.assembler.exchange, self.assembler.capacity, np.zeros(0, np.int64)
                try:
                    batch = self.loader.next_batch()
                except ElmoRayError as error:
                    # the other ranks are waiting in the exchange: tell them of the error before giving up
                    exchange.gather(no_ids, capacity, 0, 0, self.flags(), error, step)
                    raise
                except WaitInterrupted:
                    # no rank trains on this step, so that all stop after the same one
                    exchange.gather(no_ids, capacity, 0, 0, self.flags(), None, step, interrupted=True)
                    raise
                self._in_exchange = True
                result, flags = self.assembler(batch, step, self.flags())
                self._in_exchange = False
                result = with_micro_batches(result, self.assembler.config.train.accumulate)
                if self.capacities is not None:
                    result = self.capacities(result)
                sent, arrived = self.transfer(result)
                self._put(ReadyBatch(sent, batch.cursors, flags, arrived))
                if flags.stop or self._closed.is_set():
                    break
            self._put(None)
        except WaitInterrupted:
            self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            self.loader.close()

    def _put(self, item: ReadyBatch | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _next(self, start: float) -> ReadyBatch | BaseException | None:
        """Return the next item, and log a warning while there is none. start: the time when the wait began."""
        while True:
            try:
                return self._queue.get(timeout=WARN_AFTER_S)
            except queue.Empty:
                waited = time.perf_counter() - start
                logger.warning("%s for %d s%s", *self._doing(waited))

    def _doing(self, waited: float) -> tuple[str, float, str]:
        """Return what the loader thread is doing, the seconds waited, and what may be the matter, for a warning."""
        if self.loader.is_waiting:
            cure = "are the data tasks' CPUs taken by others, or is the storage slow?"
            return "waiting for text", waited, f": {cure}"
        if self._in_exchange:
            return "waiting for the text of other workers", waited, ""
        streams = self.assembler.config.data.streams
        return "cutting windows of text", waited, f": data.streams={streams} is much for this text; lower it"

    def __iter__(self) -> Iterator[ReadyBatch]:
        self._thread.start()
        usual = sys.getswitchinterval()
        if self.transfer.device.type == "cuda":
            # a thread that launches small operations takes the lock again before the loader wakes up, and the loader
            # gets it only by asking: by Python's own interval of 5 ms it waits longer than a step takes
            sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            while True:
                start = time.perf_counter()
                item = self._next(start)
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                item.waited = time.perf_counter() - start
                wait_for_arrival(item.batch, item.arrived)
                yield item
        finally:
            sys.setswitchinterval(usual)
            self._closed.set()
            self._thread.join(timeout=30)
