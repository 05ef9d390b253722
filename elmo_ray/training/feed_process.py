"""A process of its own that makes the inputs of steps, for a training thread that must not wait for Python's lock.

A captured step on a GPU takes some milliseconds, in which its thread does nothing but small calls. A thread beside it
that makes the next input takes the lock from it ten times a step. So the process does this work: it cuts windows out of
blocks of text, draws, finds rows, pads, and packs the input into memory that it shares with the worker. There are
`PLACES` inputs in this memory, so that the process is some steps ahead, and the training thread itself copies one out
when it wants it: no thread between them runs in a step.

A thread of the worker answers what the process cannot do: it gives it the next block of Ray's tasks, once in some
steps; it knows of stops; and with several workers it exchanges ids and flags with them, whose groups only the worker
has. Without Ray the process reads and encodes the text itself. Errors, stops and the order of everything are those of
the loader thread.

Messages pass through two pairs of sockets that nobody else can open: questions to the thread, and inputs to the
training thread. The process ends with its worker, however that ends, for then the sockets are closed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elmo_ray import kernels, storage
from elmo_ray.background import start_thread
from elmo_ray.config import PretrainConfig
from elmo_ray.config.command_line import set_up_logging
from elmo_ray.data.corpus import Block, Corpus
from elmo_ray.data.encode import EncodedBlock, ThreadSource, WaitInterrupted, never
from elmo_ray.data.streams import StreamCursors, StreamLoader, StreamPlan
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.data.word_types import TypeTable
from elmo_ray.errors import ElmoRayError
from elmo_ray.machine import join_freed_memory, keep_freed_memory, signals_blocked
from elmo_ray.training.assembler import StepAssembler, step_inputs
from elmo_ray.training.capacities import Capacities
from elmo_ray.training.ranks import Exchange, Flags, Gathered
from elmo_ray.training.step_input import PackedInput, StepInput

_PACKAGES = Path(__file__).resolve().parents[2]

_CLOSE_S = 10.0
_NO_IDS = np.zeros(0, np.int64)

SWITCH_INTERVAL_S = 5e-4
"""Seconds that a thread of the feed waits for Python's lock before it asks for it, where a GPU trains."""

PLACES = 4
"""Inputs in the shared memory: the process is so many steps ahead, beside those that the worker has copied."""

# The process waits for free places, and waking it is a tenth of what an input costs the training thread.
_RELEASED_AT_ONCE = 2


class _Place:
    """A place in memory that the worker and the process share, for one packed input and the numbers beside it.

    file: of the memory; each place has its own, which grows with the input. n_streams: of the worker.
    """

    def __init__(self, file: int, n_streams: int):
        self.file = file
        # the positions of all ranks, then the cursors of the streams, a field after the other
        self._shape = len(dataclasses.fields(StreamCursors)), n_streams
        self._begin = -(-8 * (1 + math.prod(self._shape)) // 256) * 256
        self._memory, self._packed = (torch.empty(0, dtype=torch.uint8) for _ in range(2))
        self._numbers = np.empty(0, np.int64)
        self._keys: list[tuple[Any, ...]] = []
        self._input: StepInput | None = None

    def write(self, batch: StepInput, cursors: StreamCursors) -> StepInput | None:
        """Copy a step's input and numbers; return its shapes, without numbers, if they differ from those before."""
        keys, new = [each.shape_key for each in batch.all_inputs], None
        if self._input is None or keys != self._keys:
            size = self._begin + batch.packed_size
            if len(self._memory) < size:
                os.ftruncate(self.file, size)
            new = batch.each(lambda tensor: torch.empty_like(tensor, device="meta"))
            self.use(new)
            self._keys, self._input = keys, batch.unpacked(self._packed)
        batch.copy_to(self._input)
        self._numbers[0] = batch.positions
        np.stack(list(cursors.arrays().values()), out=self._numbers[1:].reshape(self._shape))
        return new

    def use(self, shapes: StepInput) -> None:
        """Expect inputs of these shapes from here on."""
        if len(self._memory) < self._begin + shapes.packed_size:
            self._memory = torch.frombuffer(mmap.mmap(self.file, 0), dtype=torch.uint8)
            self._numbers = self._memory.numpy()[: self._begin].view(np.int64)[: 1 + math.prod(self._shape)]
        self._input, self._packed = shapes, self._memory[self._begin :][: shapes.packed_size]

    def read(self, step: int) -> tuple[PackedInput, StreamCursors]:
        """Return the input, whose bytes are there until the place is free again, and the cursors after it."""
        assert self._input is not None
        cursors = StreamCursors(*self._numbers[1:].copy().reshape(self._shape))
        return PackedInput(self._input, step, int(self._numbers[0]), self._packed), cursors


@dataclass(frozen=True)
class _Work:
    """Arguments with which the process begins: those of the StreamPlan (plan), of the loader and of the assembler.

    source: with which the process reads text itself; None: it asks for blocks.
    """

    config: PretrainConfig
    plan: tuple[Corpus, int, int, bool, int | None]
    streams: range
    cursors: StreamCursors
    source: ThreadSource | None
    vocabulary: Vocabulary
    unroll: int
    characters: TypeTable | None
    directions: int
    world: int
    steps: range
    capacities: Capacities | None


# ------------------------------------------------------------------ in the worker


class InputProcess:
    """Inputs of steps from a process of its own, which makes them from the blocks of the loader's source.

    They are what `step_inputs` yields for the same arguments. The loader itself is at its start, and stays there. The
    training thread takes an input by `receive` and copies it, then it gives the place back by `release`. `close` ends
    the process and the loader.
    """

    def __init__(
        self,
        loader: StreamLoader,
        assembler: StepAssembler,
        steps: range,
        flags: Callable[[], Flags],
        capacities: Capacities | None = None,
    ):
        self._loader, self._assembler, self._steps, self._flags = loader, assembler, steps, flags
        self._capacities = capacities
        self._exchange = assembler.exchange
        # with several workers the others must hear of errors and of stops that end a wait for text
        self._own_source = loader.source if isinstance(loader.source, ThreadSource) and self._world == 1 else None
        self._received = self._released = 0
        join_freed_memory()
        # with several workers: their flags, for each step whose ids are exchanged
        self._of_all: queue.SimpleQueue[Flags] = queue.SimpleQueue()
        self._places = [_Place(os.memfd_create("elmo_ray_step"), len(loader.streams)) for _ in range(PLACES)]
        self._process, self._questions, self._inputs = _start([place.file for place in self._places])
        self._poll = select.poll()
        self._poll.register(self._inputs, select.POLLIN)
        self._answers = start_thread(self._answer, "elmo-loader")

    def is_ready(self, timeout_s: float = 0.0) -> bool:
        """Return whether `receive` has something to return or to raise, at once or within this time."""
        return bool(self._poll.poll(timeout_s * 1e3))

    def receive(self) -> tuple[PackedInput, StreamCursors, Flags] | None:
        """Return the next step's input, the cursors after it and the flags of all ranks; None after the last.

        Raises an error of any rank on every rank, WaitInterrupted where one was to stop while it waited for text, and
        RuntimeError where the process ends before its work.
        """
        step, place = self._steps.start + self._received, self._places[self._received % PLACES]
        try:
            while (message := self._inputs.recv()) is not None:  # None: the next input is in its place
                kind, *values = message
                if kind == "shapes":
                    place.use(values[0])
                elif kind == "end":
                    return None
                else:
                    error, trace = values
                    raise error or RuntimeError(f"the process that makes the inputs of steps failed:\n{trace}")
        except (EOFError, ConnectionError):
            raise self._failure(step) from None
        self._received += 1
        if self._own_source is not None:
            self._loader.is_waiting = False
        packed, cursors = place.read(step)
        return packed, cursors, self._flags_of_one() if self._world == 1 else self._of_all.get()

    def release(self) -> None:
        """Give back the place of the input that came last; its bytes are not valid from here on."""
        self._released += 1
        if self._released < _RELEASED_AT_ONCE:
            return
        # a process that has ended is noticed by `receive`, after the inputs that it has made
        with contextlib.suppress(ConnectionError):
            self._inputs.send_bytes(bytes(self._released))
        self._released = 0

    def close(self) -> None:
        """End the process and the thread. Text that does not come holds this up, for 40 seconds at most."""
        self._inputs.close()
        with contextlib.suppress(Exception):
            self._answers.exception(timeout=3 * _CLOSE_S)
        _end(self._process)
        for place in self._places:
            os.close(place.file)

    @property
    def _world(self) -> int:
        return self._exchange.world

    def _flags_of_one(self) -> Flags:
        return self._exchange.gather(_NO_IDS, 0, 0, 0, self._flags()).flags

    def _failure(self, step: int) -> BaseException:
        """Return why no input came: an error of the thread, or the end of the process."""
        code = self._process.wait(_CLOSE_S)
        with contextlib.suppress(TimeoutError):
            if (error := self._answers.exception(timeout=_CLOSE_S)) is not None:
                return error
        how = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"ended with code {code}"
        return RuntimeError(f"step {step}: the process that makes the inputs of steps {how}")

    def _answer(self) -> None:
        """Answer the process until it ends, or until a stop, after which the ranks exchange nothing more."""
        step, stop = self._steps.start, False
        with contextlib.closing(self._questions), contextlib.closing(self._loader):
            self._tell(_work_of(self._loader, self._own_source, self._assembler, self._steps, self._capacities))
            while not stop and (question := self._next_question()):
                kind, *values = question
                if kind == "block":
                    with self._exchange.telling_others(self._assembler.capacity, self._flags, step):
                        found = self._loader.next_block()
                    self._tell(None if found is None else found[1])
                elif kind == "waits":
                    assert self._own_source is not None
                    self._loader.is_waiting = True
                    self._tell(self._own_source.interrupted())
                else:
                    stop = self._gather(step, *values)
                    step += 1

    def _next_question(self) -> tuple[Any, ...] | None:
        """Return what the process asks, None when it has ended."""
        try:
            return self._questions.recv()  # type: ignore[no-any-return]
        except (EOFError, ConnectionError):
            return None

    def _tell(self, answer: object) -> None:
        with contextlib.suppress(ConnectionError):  # the process has ended
            self._questions.send(answer)

    def _gather(
        self,
        step: int,
        ids: NDArray[np.int64],
        capacity: int,
        positions: int,
        noise_hash: int,
        error: ElmoRayError | None,
        interrupted: bool,
    ) -> bool:
        """Exchange one step's ids and flags with the other workers; return whether they stop after this step."""
        own = self._flags()
        gathered = self._exchange.gather(
            ids, capacity, positions, noise_hash, own, error, step, interrupted=interrupted
        )
        self._of_all.put(gathered.flags)
        self._tell((gathered.ids, gathered.positions))
        return gathered.flags.stop


def _work_of(
    loader: StreamLoader,
    source: ThreadSource | None,
    assembler: StepAssembler,
    steps: range,
    capacities: Capacities | None,
) -> _Work:
    """Return what the process needs to make a loader and an assembler like these."""
    plan = loader.plan
    return _Work(
        assembler.config,
        (plan.corpus, plan.n_streams, plan.seed, plan.shuffle, plan.epochs),
        loader.streams,
        loader.cursors,
        None if source is None else dataclasses.replace(source, interrupted=never),
        loader.vocabulary,
        loader.unroll,
        loader.characters,
        loader.directions,
        assembler.exchange.world,
        steps,
        capacities,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the process, which ends when its connection is closed; kill it if it does not."""
    try:
        process.wait(_CLOSE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _start(files: list[int]) -> tuple[subprocess.Popen[bytes], Connection, Connection]:
    """Start the process with the files of the shared memory; return it and this end of questions and of inputs."""
    pairs = [socket.socketpair() for _ in range(2)]
    handles = [theirs.fileno() for _, theirs in pairs] + files
    paths = [str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Ctrl-C, and the end that a cluster announces to all processes of a job, are for the worker: a process inherits
    # which signals are blocked, and so it is never without that
    with signals_blocked(signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-m", "elmo_ray.training.feed_process", *map(str, handles)],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=handles,
        )
    for _, theirs in pairs:
        theirs.close()
    questions, inputs = (Connection(ours.detach()) for ours, _ in pairs)
    return process, questions, inputs


# ------------------------------------------------------------------ in the process


class _WorkersExchange(Exchange):
    """The exchange by way of the worker, which adds its flags and gets those of all."""

    def __init__(self, questions: Connection, world: int):
        super().__init__()
        self.world, self._questions = world, questions

    def gather(
        self,
        ids: NDArray[np.int64],
        capacity: int,
        positions: int,
        noise_hash: int,
        flags: Flags,
        error: ElmoRayError | None = None,
        step: int = 0,
        interrupted: bool = False,
    ) -> Gathered:
        self._questions.send(("gather", ids, capacity, positions, noise_hash, error, interrupted))
        of_all, of_all_positions = self._questions.recv()
        return Gathered(of_all, of_all_positions, flags)


def _asking_source(questions: Connection, blocks: Iterator[Block]) -> Iterator[EncodedBlock]:
    """Yield the blocks that the worker gives, whose source yields those of the same requests."""
    for _ in blocks:
        questions.send(("block",))
        if (block := questions.recv()) is None:
            return
        yield block


def _own_source(source: ThreadSource, questions: Connection, blocks: Iterator[Block]) -> Iterator[EncodedBlock]:
    """Yield the blocks that this process reads; ask the worker about a stop while one does not come."""
    looks = 0

    def interrupted() -> bool:
        nonlocal looks
        looks += 1
        if looks == 1:  # before the wait
            return False
        questions.send(("waits",))
        return bool(questions.recv())

    for block in dataclasses.replace(source, interrupted=interrupted)(blocks):
        looks = 0
        yield block


def _make_inputs(work: _Work, questions: Connection, inputs: Connection, files: list[int]) -> None:
    if work.source is None:
        source = partial(_asking_source, questions)
    else:
        set_up_logging()
        storage.expect_answers()  # the worker has reached them
        source = partial(_own_source, work.source, questions)
    kernels.use(work.config.train.kernels)
    plan = StreamPlan(*work.plan)
    loader = StreamLoader(
        plan, work.streams, work.cursors, source, work.vocabulary, work.unroll, work.characters, work.directions
    )
    exchange = Exchange() if work.world == 1 else _WorkersExchange(questions, work.world)
    assembler = StepAssembler(work.config, work.vocabulary.size, work.streams, exchange, noise_ahead=True)
    made = step_inputs(loader, assembler, work.steps, Flags, work.capacities)
    places = [_Place(file, len(work.streams)) for file in files]
    free = len(places)
    for number, (batch, cursors, _) in enumerate(made):
        if free == 0:
            free = len(inputs.recv_bytes())
        free -= 1
        if (new_shapes := places[number % len(places)].write(batch, cursors)) is not None:
            inputs.send(("shapes", new_shapes))
        inputs.send(None)
    inputs.send(("end",))


def main() -> None:
    """Make the inputs for the worker that has started this process, until it closes the connections."""
    handles = list(map(int, sys.argv[1:]))
    questions: Connection = Connection(handles[0])
    inputs: Connection = Connection(handles[1])
    keep_freed_memory()
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        _make_inputs(questions.recv(), questions, inputs, handles[2:])
    except (EOFError, ConnectionError):
        pass  # the worker has closed the connections, or is gone
    except BaseException as error:
        told = error if isinstance(error, ElmoRayError | WaitInterrupted) else None
        with contextlib.suppress(ConnectionError):
            inputs.send(("failed", told, traceback.format_exc()))


if __name__ == "__main__":
    main()
