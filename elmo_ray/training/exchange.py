"""What ranks tell each other once a step, a step ahead: target ids, and flags on which all must act alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from elmo_ray.errors import DataError, ElmoRayError
from elmo_ray.training.ranks import Ranks, gather_bytes


@dataclass
class Flags:
    """One rank's flags, or all ranks' combined. stop: somebody asked to stop.

    parts: what became of each rank's part of a checkpoint: the number of the save when it is written, minus it when
    that failed, 0 before. Numbered, because flags travel some steps ahead of training and may speak of an earlier save.
    committed, tidied: the same for what rank 0 does when all parts are written, and after that.
    """

    stop: bool = False
    parts: list[int] = field(default_factory=list)
    committed: int = 0
    tidied: int = 0

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
            flags.tidied,
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
        committed, tidied = everything[0, 5:7].tolist()
        combined = Flags(bool(everything[:, 2].any()), everything[:, 3].tolist(), committed, tidied)
        return Gathered(everything[:, self.HEADER :], int(everything[:, 0].sum()), combined)

    def _raise(self, error: ElmoRayError | None) -> None:
        mine = b"" if error is None else str(error).encode()
        messages = [mine] if self.world == 1 else gather_bytes(mine, self.world, self.group)
        if error is not None:
            raise error
        raise DataError(next(m for m in messages if m).decode())
