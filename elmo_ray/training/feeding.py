"""The loader thread: it turns windows of streams into step inputs, some steps ahead of training.

For each step it draws the noise (negatives, resets), exchanges the target ids with other ranks and finds the touched
rows of the tables, so that the training thread never waits for the CPU. Where a GPU repeats captured steps, a process
of its own does this work (`feed_process.py`), and the training thread takes the inputs from it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch

from elmo_ray.data.encode import WaitInterrupted
from elmo_ray.data.streams import StreamCursors, StreamLoader
from elmo_ray.training.assembler import StepAssembler, step_inputs
from elmo_ray.training.capacities import Capacities
from elmo_ray.training.feed_process import PLACES, SWITCH_INTERVAL_S, InputProcess
from elmo_ray.training.ranks import Flags
from elmo_ray.training.step_input import InputBuffers, StepInput, Transfer, wait_for_arrival

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

    flags: called for this rank's flags, once for each step, some steps ahead of training. capacities: pad the inputs of
    captured steps. own_process: a process makes the inputs in place of the thread, from the blocks of the loader's
    source; then an input is valid until the next one is asked for. The iterator raises an error of any rank on every
    rank.
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
        self.capacities, self.own_process, self.ahead = capacities, own_process, ahead
        self.device, self.transfer = device, Transfer(device)

    def __iter__(self) -> Iterator[ReadyBatch]:
        made = self._made_by_process() if self.own_process else self._made_by_thread()
        with contextlib.closing(made), _short_switch_interval(self.device):
            while True:
                start = time.perf_counter()
                try:
                    ready = next(made)
                except (StopIteration, WaitInterrupted):
                    return
                ready.waited = time.perf_counter() - start
                wait_for_arrival(ready.batch, ready.arrived)
                yield ready

    def _made_by_process(self) -> Generator[ReadyBatch, None, None]:
        """Yield inputs of a process. The next one, if it is made, is on its way to the device at that time."""
        buffers = InputBuffers(self.device, PLACES)
        process = InputProcess(self.loader, self.assembler, self.steps, self.flags, self.capacities)
        sent: deque[ReadyBatch] = deque()
        last, failure = False, None
        with contextlib.closing(buffers), contextlib.closing(process):
            while True:
                while not last and len(sent) < 2 and (not sent or process.is_ready()):
                    if not sent:
                        self._wait_for(process)
                    try:
                        received = process.receive()
                    except Exception as error:  # raised after the steps before it
                        last, failure = True, error
                        continue
                    if received is None:
                        last = True
                        continue
                    packed, cursors, flags = received
                    batch, arrived = buffers.copy(packed)
                    process.release()
                    sent.append(ReadyBatch(batch, cursors, flags, arrived))
                    last = flags.stop
                if sent:
                    yield sent.popleft()
                    buffers.release()
                elif failure is not None:
                    raise failure
                else:
                    return

    def _wait_for(self, process: InputProcess) -> None:
        start = time.perf_counter()
        while not process.is_ready(WARN_AFTER_S):
            self._warn(start)

    def _made_by_thread(self) -> Generator[ReadyBatch, None, None]:
        """Yield inputs of a thread, which is `ahead` steps ahead."""
        items: queue.Queue[ReadyBatch | BaseException | None] = queue.Queue(maxsize=self.ahead)
        closed = threading.Event()

        def put(item: ReadyBatch | BaseException | None) -> None:
            while not closed.is_set():
                with contextlib.suppress(queue.Full):
                    items.put(item, timeout=0.2)
                    return

        def work() -> None:
            try:
                for batch, cursors, flags in step_inputs(
                    self.loader, self.assembler, self.steps, self.flags, self.capacities
                ):
                    sent, arrived = self.transfer(batch)
                    put(ReadyBatch(sent, cursors, flags, arrived))
                    if flags.stop or closed.is_set():
                        break
                put(None)
            except BaseException as error:
                put(error)
            finally:
                self.loader.close()

        thread = threading.Thread(target=work, name="elmo-loader", daemon=True)
        thread.start()
        try:
            while (item := self._next(items)) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            thread.join(timeout=30)

    def _next(self, items: queue.Queue[ReadyBatch | BaseException | None]) -> ReadyBatch | BaseException | None:
        start = time.perf_counter()
        while True:
            try:
                return items.get(timeout=WARN_AFTER_S)
            except queue.Empty:
                self._warn(start)

    def _warn(self, start: float) -> None:
        """Log since when there is no input, what is waited for, and what may be the matter."""
        if self.loader.is_waiting:
            doing, cure = "waiting for text", ": are the data tasks' CPUs taken by others, or is the storage slow?"
        elif self.assembler.exchange.is_waiting:
            doing, cure = "waiting for the text of other workers", ""
        else:
            streams = self.assembler.config.data.streams
            doing, cure = "cutting windows of text", f": data.streams={streams} is much for this text; lower it"
        logger.warning("%s for %d s%s", doing, time.perf_counter() - start, cure)


@contextlib.contextmanager
def _short_switch_interval(device: torch.device) -> Iterator[None]:
    """Let other threads have Python's lock sooner, while the training thread launches the steps of a GPU."""
    usual = sys.getswitchinterval()
    if device.type == "cuda":
        # a thread that launches small operations takes the lock again before another wakes up, which gets it only by
        # asking: by Python's own interval of 5 ms it waits longer than a step takes
        sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)
