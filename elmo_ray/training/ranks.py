"""What ranks decide together, outside of the step: small values over a gloo group, and errors that all must share.

A rank that waits too long for the others gives up and names those that did not come.

What ranks tell each other once a step, a step ahead: target ids, and flags on which all must act alike.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from elmo_ray.errors import DataError, ElmoRayError, TrainingError

T = TypeVar("T")

TIMEOUT_S = 300.0
"""After which a rank that waits for another gives up; torch's default is half an hour."""

_HEARTBEAT_S = 1.0
_PATIENCE_S = 1.0  # between two messages of a rank that lets the others wait


class RankTimeout(RuntimeError):
    """Another rank did not come to a collective in time. No ElmoRayError: a restart of the workers may well help."""


class Ranks:
    """This process among the others. With world 1 nothing is sent and torch.distributed is not needed.

    Values that travel are JSON. timeout_s: how long to wait for another rank. step: what errors name, kept by the loop.
    """

    def __init__(self, rank: int = 0, world: int = 1, timeout_s: float = TIMEOUT_S):
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self.step = 0
        self.control: dist.ProcessGroup | None = None
        self.exchange: dist.ProcessGroup | None = None
        self._store: torch.distributed.distributed_c10d.Store | None = None
        self._beat = 0.0
        if world > 1:
            # gloo for both, since they carry host memory; the loader thread must not share a group with the training
            # thread
            self.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self.exchange = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self._store = dist.distributed_c10d._get_default_store()
            self.heartbeat(0)

    def from_first(self, value: T | None) -> T:
        """Rank 0's value, on every rank."""
        return self.all(value)[0]  # type: ignore[return-value]

    def all(self, value: T) -> list[T]:
        """Every rank's value, in order of ranks; tuples come back as lists."""
        if self.world == 1:
            return [value]
        with self.waiting("an agreement"):
            return list(map(json.loads, gather_bytes(json.dumps(value).encode(), self.world, self.control)))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a host tensor over all ranks."""
        if self.world > 1:
            with self.waiting("a sum"):
                dist.all_reduce(values, group=self.control)
        return values

    def agree(self, error: ElmoRayError | None) -> None:
        """Raise on every rank when one of them has an error, so that none waits for it."""
        errors = self.all(None if error is None else [type(error).__name__, str(error)])
        if error is not None:
            raise error
        for item in errors:
            if item is not None:
                kinds = {kind.__name__: kind for kind in ElmoRayError.__subclasses__()}
                raise kinds.get(item[0], TrainingError)(item[1])

    def first_does(self, work: Callable[[], T]) -> T:
        """The plain value of what rank 0 alone does, on every rank, however long it takes. Its ElmoRayError is raised
        on all."""
        if self.world == 1:
            return work()
        results: list[T] = []
        problems: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                problems.append(error)

        thread: threading.Thread | None = None
        if self.rank == 0:
            thread = threading.Thread(target=run, name="first-does", daemon=True)
            thread.start()
        self.wait_until(lambda: thread is None or not thread.is_alive())
        error = problems[0] if problems else None
        if error is not None and not isinstance(error, ElmoRayError):
            raise error
        self.agree(error)
        return self.from_first(results[0] if results else None)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready` on every rank, for hours if need be: those that wait hear from the others meanwhile."""
        while True:
            deadline = time.monotonic() + _PATIENCE_S
            while not (mine := ready()) and time.monotonic() < deadline:
                time.sleep(0.005)
            if all(self.all(mine)):
                return

    def heartbeat(self, step: int) -> None:
        """Let the others know that this rank has come to `step`; for the message of the one who waits in vain."""
        now = time.time()
        if self._store is not None and now - self._beat >= _HEARTBEAT_S:
            self._beat = now
            self._store.set(f"elmo_ray/{self.rank}", json.dumps([step, now]))

    @contextlib.contextmanager
    def waiting(self, what: str, step: int | None = None) -> Iterator[None]:
        """Around a collective: turns the time-out of whatever library into a RankTimeout that says who waits where for
        whom."""
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            waited = time.monotonic() - start
            # an error that comes at once is another one: a worker that died, say
            if self.world == 1 or waited < 0.9 * self.timeout_s:
                raise
            raise RankTimeout(
                f"worker {self.rank}, step {self.step if step is None else step}: waited {waited:.0f} s for the others "
                f"in {what}{self._last_heard()}; cluster.timeout_s={self.timeout_s:g} is the limit"
            ) from error

    def _last_heard(self) -> str:
        """The ranks that are behind, and since when. Not more than a hint: rank 0, which keeps the notes, may be
        gone."""
        try:
            assert self._store is not None
            names = [f"elmo_ray/{rank}" for rank in range(self.world)]
            notes = {
                rank: json.loads(self._store.get(name))
                for rank, name in enumerate(names)
                if rank != self.rank and self._store.check([name])
            }
        except Exception:
            return "; worker 0, which knows where they are, does not answer"
        if not notes:
            return ""
        least = min(step for step, _ in notes.values())
        behind = [
            f"worker {rank} was at step {step} {time.time() - at:.0f} s ago"
            for rank, (step, at) in notes.items()
            if step == least
        ]
        return f"; furthest behind: {', '.join(behind[:8])}"


def gather_bytes(data: bytes, world: int, group: dist.ProcessGroup | None) -> list[bytes]:
    """Every rank's bytes. Not `all_gather_object`, which unpickles what comes over the network."""
    sizes = torch.zeros(world, 1, dtype=torch.int64)
    dist.all_gather(list(sizes.unbind(0)), torch.tensor([len(data)]), group=group)
    longest = int(sizes.max())
    padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0") or b"\0"), dtype=torch.uint8)
    received = torch.empty(world, len(padded), dtype=torch.uint8)
    dist.all_gather(list(received.unbind(0)), padded, group=group)
    return [received[rank].numpy().tobytes()[:size] for rank, size in enumerate(sizes[:, 0].tolist())]


@dataclass
class Flags:
    """One rank's flags, or all ranks' combined. stop: somebody asked to stop.

    parts: what became of each rank's part of a checkpoint: the number of the save when it is written, minus it when
    that failed, 0 before. Numbered, because flags travel some steps ahead of training and may speak of an earlier save.
    committed, cleaned: the same for what rank 0 does when all parts are written, and after that.
    """

    stop: bool = False
    parts: list[int] = field(default_factory=list)
    committed: int = 0
    cleaned: int = 0

    def all_ended(self, save: int) -> bool:
        """Whether every rank has ended its writing for this save, well or not."""
        return bool(self.parts) and all(abs(p) == save for p in self.parts)

    def all_written(self, save: int) -> bool:
        return bool(self.parts) and all(p == save for p in self.parts)


@dataclass
class Gathered:
    """ids: all ranks' ids [W, n], -1 for none; positions: of all ranks; flags combined."""

    ids: NDArray[np.int64]
    positions: int
    flags: Flags


class Exchange:
    """All-gather over a gloo group of its own, so that the loader thread never meets the training thread's collectives.

    Raises an ElmoRayError on every rank when one of them reports an error, RankTimeout when one does not come.
    """

    HEADER = 7

    def __init__(self, ranks: Ranks | None = None):
        self.ranks = ranks or Ranks()
        self.rank, self.world, self.group = self.ranks.rank, self.ranks.world, self.ranks.exchange

    def gather(
        self,
        ids: NDArray[np.int64],
        capacity: int,
        positions: int,
        noise_hash: int,
        flags: Flags,
        error: ElmoRayError | None = None,
        step: int = 0,
    ) -> Gathered:
        """Share one step's ids (at most `capacity`), positions and flags; `noise_hash` must be equal on all ranks."""
        self.ranks.heartbeat(step)
        message = np.full(self.HEADER + capacity, -1, np.int64)
        message[: self.HEADER] = [
            positions,
            noise_hash,
            flags.stop,
            flags.parts[0] if flags.parts else 0,
            error is not None,
            flags.committed,
            flags.cleaned,
        ]
        message[self.HEADER : self.HEADER + len(ids)] = ids
        everything = message[None]
        if self.world > 1:
            mine = torch.from_numpy(message)
            received = torch.empty(self.world, len(message), dtype=torch.int64)
            with self.ranks.waiting("the exchange of target words", step):
                dist.all_gather(list(received.unbind(0)), mine, group=self.group)
            everything = received.numpy()
        if everything[:, 4].any():
            self._raise(error)
        hashes = everything[:, 1]
        if (hashes != hashes[0]).any():
            raise RuntimeError(
                f"ranks drew different negatives (hashes {hashes.tolist()}): their seeds or versions differ"
            )
        committed, cleaned = everything[0, 5:7].tolist()
        combined = Flags(bool(everything[:, 2].any()), everything[:, 3].tolist(), committed, cleaned)
        return Gathered(everything[:, self.HEADER :], int(everything[:, 0].sum()), combined)

    def _raise(self, error: ElmoRayError | None) -> None:
        mine = b"" if error is None else str(error).encode()
        messages = [mine] if self.world == 1 else gather_bytes(mine, self.world, self.group)
        if error is not None:
            raise error
        raise DataError(next(m for m in messages if m).decode())
