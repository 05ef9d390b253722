"""The loader thread: it turns windows of streams into step inputs, some steps ahead of training.

For each step it draws the noise (negatives, resets), exchanges the target ids with other ranks and finds the touched
rows of the tables, so that the training thread never waits for the CPU. Where a GPU repeats captured steps, a process
of its own does this work (`feed_process.py`), and the thread gets the inputs from it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from elmo_ray.data.encode import WaitInterrupted
from elmo_ray.data.streams import StreamCursors, StreamLoader
from elmo_ray.training.assembler import StepAssembler, step_inputs
from elmo_ray.training.capacities import Capacities
from elmo_ray.training.feed_process import SWITCH_INTERVAL_S, inputs_of_process
from elmo_ray.training.ranks import Flags
from elmo_ray.training.step_input import StepInput, Transfer, wait_for_arrival

logger = logging.getLogger(__name__)

WARN_AFTER_S = 60.0


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


class Feeder:
    """Iterator over `ReadyBatch`es, made by loader and assembler in a thread, `ahead` steps before the training thread.

    flags: called in the thread for this rank's flags. capacities: pad the inputs of captured steps. own_process: a
    process makes the inputs in place of the thread, from the blocks of the loader's source. The iterator raises an
    error of any rank on every rank.
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
        own_process: bool = False,
    ):
        self.loader, self.assembler, self.steps, self.flags = loader, assembler, steps, flags
        self.capacities, self.own_process = capacities, own_process
        self.transfer = Transfer(device)
        self._queue: queue.Queue[ReadyBatch | BaseException | None] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elmo-loader", daemon=True)

    def _run(self) -> None:
        try:
            make = inputs_of_process if self.own_process else step_inputs
            made = make(self.loader, self.assembler, self.steps, self.flags, self.capacities)
            with contextlib.closing(made):
                for batch, cursors, flags in made:
                    sent, arrived = self.transfer(batch)
                    self._put(ReadyBatch(sent, cursors, flags, arrived))
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
        if self.assembler.exchange.is_waiting:
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
