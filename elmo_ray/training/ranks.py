"""Communication between ranks beside the sums of gradients, in host memory over gloo.

`Ranks` is for the training thread: agreements on small values, and errors that must be raised on all ranks. A rank that
waits too long for the others gives up and names those that did not come. `Exchange` is for the loader thread: once for
each step, some steps ahead of training, ranks share their target ids and the flags on which all must act alike.

Shapes: W ranks, n ids of each rank.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from elmo_ray.background import start_thread
from elmo_ray.data.encode import WaitInterrupted
from elmo_ray.errors import DataError, ElmoRayError, TrainingError

T = TypeVar("T")

TIMEOUT_S = 300.0
"""Seconds after which a rank that waits for another gives up; torch's default is half an hour."""

_HEARTBEAT_S = 1.0
_MESSAGE_EVERY_S = 1.0  # from a rank for which the others wait


class RankTimeout(RuntimeError):
    """Error: another rank did not come to a collective in time."""

    # no ElmoRayError, which is final: a restart of the workers may help here


class Ranks:
    """This process's place among the ranks. With world 1 nothing is sent and torch.distributed is not needed.

    Values are sent as JSON. timeout_s: seconds to wait for another rank. step: the step that errors name; the training
    loop sets it.
    """

    def __init__(self, rank: int = 0, world: int = 1, timeout_s: float = TIMEOUT_S):
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self.step = 0
        self.control: dist.ProcessGroup | None = None
        self.exchange: dist.ProcessGroup | None = None
        self._store: torch.distributed.distributed_c10d.Store | None = None
        self._beat = -math.inf
        if world > 1:
            # two groups, for the loader thread must not share one with the training thread
            self.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self.exchange = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self._store = dist.distributed_c10d._get_default_store()
            self.heartbeat(0)

    def broadcast(self, value: T | None) -> T:
        """Return rank 0's value on every rank."""
        return self.gather(value)[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, on every rank and in order of ranks. Tuples become lists."""
        if self.world == 1:
            return [value]
        with self.waiting("an agreement"):
            return list(map(json.loads, gather_bytes(json.dumps(value).encode(), self.world, self.control)))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor in host memory over all ranks; the tensor is overwritten."""
        if self.world > 1:
            with self.waiting("a sum"):
                dist.all_reduce(values, group=self.control)
        return values

    def agree(self, error: ElmoRayError | None) -> None:
        """Raise an error on every rank if one of them has one, so that none waits for it."""
        errors = self.gather(None if error is None else [type(error).__name__, str(error)])
        if error is not None:
            raise error
        for item in errors:
            if item is not None:
                kinds = {kind.__name__: kind for kind in ElmoRayError.__subclasses__()}
                raise kinds.get(item[0], TrainingError)(item[1])

    def run_on_rank_zero(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone, however long it takes, and return its result on every rank.

        The result is a plain value. An ElmoRayError of `work` is raised on every rank.
        """
        if self.world == 1:
            return work()
        future = start_thread(work, "rank-zero") if self.rank == 0 else None
        self.wait_until(lambda: future is None or future.done())
        error = None if future is None else future.exception()
        if error is not None and not isinstance(error, ElmoRayError):
            raise error
        self.agree(error)
        return self.broadcast(None if future is None else future.result())

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready` returns True on every rank, for hours if necessary."""
        # ranks exchange a message every second, so that none of them times out
        while True:
            deadline = time.monotonic() + _MESSAGE_EVERY_S
            while not (mine := ready()) and time.monotonic() < deadline:
                time.sleep(0.005)
            if all(self.gather(mine)):
                return

    def heartbeat(self, step: int) -> None:
        """Tell the other ranks that this one has come to `step`. A rank that times out names it in its error."""
        now = time.monotonic()
        if self._store is not None and now - self._beat >= _HEARTBEAT_S:
            self._beat = now
            self._store.set(f"elmo_ray/{self.rank}", json.dumps([step, time.time()]))

    @contextlib.contextmanager
    def waiting(self, what: str, step: int | None = None) -> Iterator[None]:
        """Turn a time-out of the collective inside this context into a RankTimeout, whichever library raises it.

        Its message names the waiting rank, the step, `what` it waited for and the ranks that are behind.
        """
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            waited = time.monotonic() - start
            # an error that comes at once is no time-out but another one, such as a worker that died
            if self.world == 1 or waited < 0.9 * self.timeout_s:
                raise
            raise RankTimeout(
                f"worker {self.rank}, step {self.step if step is None else step}: waited {waited:.0f} s for the others "
                f"in {what}{self._last_heard()}; cluster.timeout_s={self.timeout_s:g} is the limit"
            ) from error

    def _last_heard(self) -> str:
        """Return the ranks that are behind and since when, as the end of a message."""
        try:
            assert self._store is not None
            names = [f"elmo_ray/{rank}" for rank in range(self.world)]
            notes = {
                rank: json.loads(self._store.get(name))
                for rank, name in enumerate(names)
                if rank != self.rank and self._store.check([name])
            }
        except Exception:  # rank 0, which keeps these notes, may be gone
            return "; worker 0, which knows where they are, does not answer"
        if not notes:
            return ""
        least = min(step for step, _ in notes.values())
        behind = [
            f"worker {rank} was at step {step} {max(0.0, time.time() - at):.0f} s ago"
            for rank, (step, at) in notes.items()
            if step == least
        ]
        return f"; furthest behind: {', '.join(behind[:8])}"


@dataclass
class Flags:
    """Flags of one rank, or of all ranks combined. stop: a stop was requested. save: a checkpoint was, by rank 0.

    rank_files: the state of each rank's files of a checkpoint: the number of the save when they are written, minus that
    number when writing failed, 0 before. committed, cleaned: the same for the work of rank 0 when all are written,
    and after that.
    """

    # states have the number of their save, because flags are sent some steps ahead of training and may belong to an
    # earlier save

    stop: bool = False
    rank_files: list[int] = field(default_factory=list)
    committed: int = 0
    cleaned: int = 0
    save: bool = False

    def all_ended(self, save: int) -> bool:
        """Return whether every rank has ended its writing for this save, with success or not."""
        return bool(self.rank_files) and all(abs(state) == save for state in self.rank_files)

    def all_written(self, save: int) -> bool:
        """Return whether every rank has written its files for this save."""
        return bool(self.rank_files) and all(state == save for state in self.rank_files)


@dataclass
class Gathered:
    """Result of an exchange. ids: [W, n], -1 for none. positions: the sum over all ranks. flags: of all ranks."""

    ids: NDArray[np.int64]
    positions: int
    flags: Flags


_ERROR, _INTERRUPTED = 1, 2
"""Reasons in a rank's message why it has no text for a step."""


class Exchange:
    """Exchange of one message of each rank in each step, over a group that only the loader thread uses.

    is_waiting: True while other ranks are waited for.
    """

    HEADER = 8

    def __init__(self, ranks: Ranks | None = None):
        self.ranks = ranks or Ranks()
        self.rank, self.world, self.group = self.ranks.rank, self.ranks.world, self.ranks.exchange
        self.is_waiting = False

    @contextlib.contextmanager
    def telling_others(self, capacity: int, flags: Callable[[], Flags], step: int) -> Iterator[None]:
        """Tell the other ranks, which wait in `gather`, of an error or a stop that ends this context, and raise it."""
        no_ids = np.zeros(0, np.int64)
        try:
            yield
        except ElmoRayError as error:
            self.gather(no_ids, capacity, 0, 0, flags(), error, step)
            raise
        except WaitInterrupted:
            # no rank trains on this step, so that all stop after the same one
            self.gather(no_ids, capacity, 0, 0, flags(), None, step, interrupted=True)
            raise

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
        """Share one step's ids (at most `capacity`), positions and flags with all ranks.

        noise_hash: hash of the drawn noise, which must be equal on all ranks. error: this rank's error, if it has one.
        interrupted: this rank has no text for the step, as a stop ended its wait. Raises an ElmoRayError on every rank
        if one of them has an error, WaitInterrupted on every rank if one was interrupted, RankTimeout if one does not
        come in time, and RuntimeError for different hashes.
        """
        self.ranks.heartbeat(step)
        if self.world == 1:
            if error is not None:
                raise error
            if interrupted:
                raise WaitInterrupted
            own = Flags(flags.stop, flags.rank_files[:1] or [0], flags.committed, flags.cleaned, flags.save)
            return Gathered(ids[None], positions, own)
        message = np.full(self.HEADER + capacity, -1, np.int64)
        message[: self.HEADER] = [
            positions,
            noise_hash,
            flags.stop,
            flags.rank_files[0] if flags.rank_files else 0,
            _ERROR if error is not None else _INTERRUPTED if interrupted else 0,
            flags.committed,
            flags.cleaned,
            flags.save,
        ]
        message[self.HEADER : self.HEADER + len(ids)] = ids
        received = self._send_to_all(message, step)
        if (received[:, 4] == _ERROR).any():
            self._raise(error)
        if (received[:, 4] == _INTERRUPTED).any():
            raise WaitInterrupted
        hashes = received[:, 1]
        if (hashes != hashes[0]).any():
            raise RuntimeError(
                f"ranks drew different negatives (hashes {hashes.tolist()}): their seeds or versions differ"
            )
        committed, cleaned, save = received[0, 5:8].tolist()
        combined = Flags(bool(received[:, 2].any()), received[:, 3].tolist(), committed, cleaned, bool(save))
        return Gathered(received[:, self.HEADER :], int(received[:, 0].sum()), combined)

    def _send_to_all(self, message: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        """Return [W, n] the messages of all ranks, of which this rank's is one."""
        received = torch.empty(self.world, len(message), dtype=torch.int64)
        self.is_waiting = True
        with self.ranks.waiting("the exchange of target words", step):
            dist.all_gather(list(received.unbind(0)), torch.from_numpy(message), group=self.group)
        self.is_waiting = False
        return received.numpy()

    def _raise(self, error: ElmoRayError | None) -> None:
        """Raise this rank's error, or if it has none that of another rank."""
        messages = gather_bytes(b"" if error is None else str(error).encode(), self.world, self.group)
        if error is not None:
            raise error
        raise DataError(next(m for m in messages if m).decode())


def gather_bytes(data: bytes, world: int, group: dist.ProcessGroup | None) -> list[bytes]:
    """Return every rank's bytes, on every rank."""
    # not by `all_gather_object`, which unpickles data from the network
    sizes = torch.zeros(world, 1, dtype=torch.int64)
    dist.all_gather(list(sizes.unbind(0)), torch.tensor([len(data)]), group=group)
    longest = int(sizes.max())
    padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0") or b"\0"), dtype=torch.uint8)
    received = torch.empty(world, len(padded), dtype=torch.uint8)
    dist.all_gather(list(received.unbind(0)), padded, group=group)
    return [received[rank].numpy().tobytes()[:size] for rank, size in enumerate(sizes[:, 0].tolist())]
