"""What ranks tell each other once a step, a step ahead: target ids, and flags on which all must act alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from elmo_ray.errors import DataError, ElmoRayError


@dataclass
class Flags:
    """One rank's flags, or all ranks' combined. stop: somebody asked to stop.

    parts: what became of each rank's part of a checkpoint: the number of the save when it is written, minus it when
    that failed, 0 before. Numbered, because flags travel some steps ahead of training and may speak of an earlier save.
    """

    stop: bool = False
    parts: list[int] = field(default_factory=list)

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

    group: None for a single process. Raises an ElmoRayError on every rank when one of them reports an error.
    """

    HEADER = 5

    def __init__(self, rank: int = 0, world: int = 1, group: dist.ProcessGroup | None = None):
        self.rank, self.world, self.group = rank, world, group

    def gather(
        self,
        ids: NDArray[np.int64],
        capacity: int,
        positions: int,
        noise_hash: int,
        flags: Flags,
        error: ElmoRayError | None = None,
    ) -> Gathered:
        """Share one step's ids (at most `capacity`), positions and flags; `noise_hash` must be equal on all ranks."""
        message = np.full(self.HEADER + capacity, -1, np.int64)
        message[: self.HEADER] = [
            positions,
            noise_hash,
            flags.stop,
            flags.parts[0] if flags.parts else 0,
            error is not None,
        ]
        message[self.HEADER : self.HEADER + len(ids)] = ids
        everything = message[None]
        if self.world > 1:
            mine = torch.from_numpy(message)
            received = torch.empty(self.world, len(message), dtype=torch.int64)
            dist.all_gather(list(received.unbind(0)), mine, group=self.group)
            everything = received.numpy()
        if everything[:, 4].any():
            self._raise(error)
        hashes = everything[:, 1]
        if (hashes != hashes[0]).any():
            raise RuntimeError(
                f"ranks drew different negatives (hashes {hashes.tolist()}): their seeds or versions differ"
            )
        combined = Flags(bool(everything[:, 2].any()), everything[:, 3].tolist())
        return Gathered(everything[:, self.HEADER :], int(everything[:, 0].sum()), combined)

    def _raise(self, error: ElmoRayError | None) -> None:
        messages: list[str | None] = [None if error is None else str(error)] * self.world
        if self.world > 1:
            dist.all_gather_object(messages, None if error is None else str(error), group=self.group)
        if error is not None:
            raise error
        raise DataError(next(m for m in messages if m))
