"""A process of its own that makes the inputs of steps, for a training thread that must not wait for Python's lock.

A captured step on a GPU takes some milliseconds, in which its thread does nothing but small calls. A thread beside it
that makes the next input takes the lock from it ten times a step. So the process does this work: it cuts windows out of
blocks of text, draws, finds rows, pads, and packs the input into memory that it shares with the worker.

The worker's loader thread answers it, one message at a time: it gives it the next block, of the source that the worker
has anyway (Ray's tasks or a thread), and it exchanges ids and flags with the other workers, whose groups only the
worker has. So errors, stops and the order of everything are those of the thread alone. There is one input in the shared
memory: the process asks for the exchange of a step before it writes that step's input, and the thread answers when the
one before is copied.

Messages are pickled; they pass between the two through a pair of sockets that nobody else can open. The process ends
with its worker, however that ends, for then the socket is closed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elmo_ray import kernels
from elmo_ray.config import PretrainConfig
from elmo_ray.data.corpus import Block, Corpus
from elmo_ray.data.encode import EncodedBlock
from elmo_ray.data.streams import StreamCursors, StreamLoader, StreamPlan
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.data.word_types import TypeTable
from elmo_ray.errors import ElmoRayError
from elmo_ray.machine import keep_freed_memory, signals_blocked
from elmo_ray.training.assembler import StepAssembler, step_inputs
from elmo_ray.training.capacities import Capacities
from elmo_ray.training.ranks import Exchange, Flags, Gathered
from elmo_ray.training.step_input import PackedInput, StepInput

_PACKAGES = Path(__file__).resolve().parents[2]

_CLOSE_S = 10.0

SWITCH_INTERVAL_S = 5e-4
"""Seconds that a thread of the feed waits for Python's lock before it asks for it, where a GPU trains."""


@dataclass(frozen=True)
class _Work:
    """Arguments with which the process begins: those of the StreamPlan (plan), of the loader and of the assembler."""

    config: PretrainConfig
    plan: tuple[Corpus, int, int, bool, int | None]
    streams: range
    cursors: StreamCursors
    vocabulary: Vocabulary
    unroll: int
    characters: TypeTable | None
    directions: int
    world: int
    steps: range
    capacities: Capacities | None


# ------------------------------------------------------------------ in the worker


def inputs_of_process(
    loader: StreamLoader,
    assembler: StepAssembler,
    steps: range,
    flags: Callable[[], Flags],
    capacities: Capacities | None = None,
) -> Generator[tuple[PackedInput, StreamCursors, Flags], None, None]:
    """Yield what `step_inputs` yields, made by a process from the blocks of the loader's source.

    The loader itself is at its start, and stays there. Raises RuntimeError where the process ends before its work.
    """
    exchange = assembler.exchange
    memory = os.memfd_create("elmo_ray_step")
    process, connection = _start(memory)
    step, of_all = steps.start, Flags()
    shapes: StepInput | None = None
    packed = torch.empty(0, dtype=torch.uint8)
    try:
        connection.send(_work_of(loader, assembler, steps, capacities))
        while True:
            kind, *values = connection.recv()
            if kind == "block":
                with exchange.telling_others(assembler.capacity, flags, step):
                    found = loader.next_block()
                connection.send(None if found is None else found[1])
            elif kind == "gather":
                ids, capacity, positions, noise_hash, error, interrupted = values
                gathered = exchange.gather(
                    ids, capacity, positions, noise_hash, flags(), error, step, interrupted=interrupted
                )
                of_all = gathered.flags
                # with one rank the process has all ids itself
                connection.send((gathered.ids if exchange.world > 1 else None, gathered.positions))
            elif kind == "input":
                new_shapes, positions, cursors = values
                if new_shapes is not None:
                    shapes = new_shapes
                    packed = torch.frombuffer(mmap.mmap(memory, 0), dtype=torch.uint8)
                assert shapes is not None
                yield PackedInput(shapes, step, positions, packed[: shapes.packed_size]), cursors, of_all
                step += 1
            elif kind == "end":
                return
            else:
                raise RuntimeError(f"the process that makes the inputs of steps failed:\n{values[0]}")
    except (EOFError, ConnectionError):
        code = process.wait(_CLOSE_S)
        how = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"ended with code {code}"
        raise RuntimeError(f"step {step}: the process that makes the inputs of steps {how}") from None
    finally:
        connection.close()
        os.close(memory)
        _end(process)


def _work_of(loader: StreamLoader, assembler: StepAssembler, steps: range, capacities: Capacities | None) -> _Work:
    """Return what the process needs to make a loader and an assembler like these."""
    plan = loader.plan
    return _Work(
        assembler.config,
        (plan.corpus, plan.n_streams, plan.seed, plan.shuffle, plan.epochs),
        loader.streams,
        loader.cursors,
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


def _start(memory: int) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start the process with the file of the shared memory; return it and this end of the connection."""
    ours, theirs = socket.socketpair()
    paths = [str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Ctrl-C, and the end that a cluster announces to all processes of a job, are for the worker: a process inherits
    # which signals are blocked, and so it is never without that
    with contextlib.closing(theirs), signals_blocked(signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-m", "elmo_ray.training.feed_process", str(theirs.fileno()), str(memory)],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=(theirs.fileno(), memory),
        )
    return process, Connection(ours.detach())


# ------------------------------------------------------------------ in the process


class _WorkersExchange(Exchange):
    """The exchange by way of the worker, which adds its flags and gets those of all."""

    def __init__(self, connection: Connection, world: int):
        super().__init__()
        self.world, self._connection = world, connection

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
        sent = ids if self.world > 1 else ids[:0]
        self._connection.send(("gather", sent, capacity, positions, noise_hash, error, interrupted))
        of_all, of_all_positions = self._connection.recv()
        return Gathered(ids[None] if of_all is None else of_all, of_all_positions, flags)


def _make_inputs(work: _Work, connection: Connection, memory: int) -> None:
    def source(blocks: Iterator[Block]) -> Iterator[EncodedBlock]:
        for _ in blocks:  # the worker's source yields the same ones
            connection.send(("block",))
            if (block := connection.recv()) is None:
                return
            yield block

    kernels.use(work.config.train.kernels)
    plan = StreamPlan(*work.plan)
    loader = StreamLoader(
        plan, work.streams, work.cursors, source, work.vocabulary, work.unroll, work.characters, work.directions
    )
    exchange = _WorkersExchange(connection, work.world)
    assembler = StepAssembler(work.config, work.vocabulary.size, work.streams, exchange, noise_ahead=True)
    last: list[tuple[Any, ...]] = []
    packed: StepInput | None = None
    for batch, cursors, _ in step_inputs(loader, assembler, work.steps, Flags, work.capacities):
        shapes, without_numbers = [each.shape_key for each in batch.all_inputs], None
        if packed is None or shapes != last:
            last, without_numbers = shapes, _without_numbers(batch)
            os.ftruncate(memory, max(os.fstat(memory).st_size, batch.packed_size))
            shared = torch.frombuffer(mmap.mmap(memory, 0), dtype=torch.uint8)
            packed = batch.unpacked(shared[: batch.packed_size])
        batch.copy_to(packed)
        connection.send(("input", without_numbers, batch.positions, cursors))
    connection.send(("end",))


def _without_numbers(batch: StepInput) -> StepInput:
    return batch.each(lambda tensor: torch.empty_like(tensor, device="meta"))


def main() -> None:
    """Make the inputs for the worker that has started this process, until it closes the connection."""
    connection, memory = Connection(int(sys.argv[1])), int(sys.argv[2])
    keep_freed_memory()
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        _make_inputs(connection.recv(), connection, memory)
    except (EOFError, ConnectionError):
        pass  # the worker has closed the connection, or is gone
    except BaseException:
        with contextlib.suppress(ConnectionError):
            connection.send(("failed", traceback.format_exc()))


if __name__ == "__main__":
    main()
