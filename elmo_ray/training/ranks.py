"""What ranks decide together, outside of the step: small objects over a gloo group, and errors that all must share."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from elmo_ray.errors import ElmoRayError, TrainingError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""After which a rank that waits for another gives up; torch's default is half an hour."""


class Ranks:
    """This process among the others. With world 1 nothing is sent and torch.distributed is not needed."""

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        self.control: dist.ProcessGroup | None = None
        self.exchange: dist.ProcessGroup | None = None
        if world > 1:
            # gloo for both, since they carry host memory; the loader thread must not share a group with the training
            # thread
            self.control = dist.new_group(backend="gloo", timeout=TIMEOUT)
            self.exchange = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def from_first(self, value: T | None) -> T:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value  # type: ignore[return-value]
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]  # type: ignore[return-value]

    def all(self, value: T) -> list[T]:
        """Every rank's value, in order of ranks."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value, group=self.control)
        return box

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a host tensor over all ranks."""
        if self.world > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def agree(self, error: ElmoRayError | None) -> None:
        """Raise on every rank when one of them has an error, so that none waits for it."""
        errors = self.all(None if error is None else (type(error).__name__, str(error)))
        if error is not None:
            raise error
        for item in errors:
            if item is not None:
                kinds = {kind.__name__: kind for kind in ElmoRayError.__subclasses__()}
                raise kinds.get(item[0], TrainingError)(item[1])
