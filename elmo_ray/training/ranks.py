"""What ranks decide together, outside of the step: small values over a gloo group, and errors that all must share.

A rank that waits too long for the others gives up and names those that did not come.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from elmo_ray.errors import ElmoRayError, TrainingError

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
