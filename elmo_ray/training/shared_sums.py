"""Sums over workers that compute on the CPU of one machine, through memory that they share.

gloo takes numbers through sockets: the system copies them twice on the way, and a worker sleeps until they are there.
Here each worker puts its numbers where all can read them, and over gloo goes only the word that they are there, which
also tells of a worker that died or does not come.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from elmo_ray.training.ranks import gather_bytes

logger = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")
"""Files that are memory, on Linux."""

_PIECE_BYTES = 16 << 20
"""Of a worker's numbers, at a time: memory does not grow with the model. A meeting of the workers takes as long as a
tenth of a piece."""

_MOST_WORKERS = 8
"""Each reads what all others wrote; for more, a ring would move less."""


_PART = 8
"""What is taken is at most this part of the folder's space, in which Ray keeps its objects too, and Ray's processes end
where it is full."""


class SharedSums:
    """memory: [2, workers, bytes of a piece], the same for all workers."""

    def __init__(self, memory: Tensor, rank: int):
        self._memory, self._rank, self._turn = memory, rank, 0
        self._word = torch.zeros(1)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each by its sum over all workers, the same bits for all. Contiguous, of one dtype; of the same sizes
        in every worker."""
        for pieces in _pieces(tensors, self._memory.shape[2]):
            self._add(pieces)

    def _add(self, pieces: Sequence[Tensor]) -> None:
        sizes = [len(piece) for piece in pieces]
        numbers = self._memory[self._turn].view(pieces[0].dtype)[:, : sum(sizes)]
        places = [list(of_worker.split(sizes)) for of_worker in numbers]
        # a worker that is ahead puts down its next piece while another still reads this one, but not the next but one
        self._turn = 1 - self._turn
        torch._foreach_copy_(places[self._rank], list(pieces))
        dist.all_reduce(self._word)  # who has the sum of it knows that all have come here
        # in the order of workers, whatever the own place in it; the first two may change places
        others = [place for worker, place in enumerate(places) if worker != self._rank]
        if self._rank > 1:
            torch._foreach_copy_(list(pieces), places[0])
            others = places[1:]
        for other in others:
            torch._foreach_add_(list(pieces), other)


def _pieces(tensors: Sequence[Tensor], most_bytes: int) -> Iterator[list[Tensor]]:
    """Views of the tensors' numbers, in lists of at most so many bytes."""
    pieces: list[Tensor] = []
    room = most = most_bytes // tensors[0].element_size() if tensors else 0
    for tensor in tensors:
        left = tensor.detach().view(-1)
        while len(left):
            pieces.append(left[:room])
            left = left[room:]
            room -= len(pieces[-1])
            if room == 0:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces


def shared_sums(rank: int, world: int) -> SharedSums | None:
    """For all workers of the default group, which is gloo's; None for all of them where not all can have the memory."""
    if not 1 < world <= _MOST_WORKERS:
        return None
    shape = 2, world, _PIECE_BYTES
    path = FOLDER / f"elmo_ray-{secrets.token_hex(16)}"
    memory: Tensor | None = None
    try:
        with contextlib.suppress(OSError):
            if rank == 0:
                memory = _made(path, shape)
        told = json.dumps([str(path), memory is not None]).encode()
        name, made = json.loads(gather_bytes(told, world, None)[0])
        with contextlib.suppress(OSError):
            if rank != 0 and made:
                memory = _mapped(Path(name), shape)
        found = gather_bytes(bytes([memory is not None]), world, None)
    finally:
        if rank == 0:  # the memory stays until nobody has it any more, however the workers end
            path.unlink(missing_ok=True)
    if memory is None or any(has == b"\0" for has in found):
        logger.info("no memory that all workers share: gradients are sent")
        return None
    return SharedSums(memory, rank)


def _made(path: Path, shape: tuple[int, int, int]) -> Tensor:
    size, space = shape[0] * shape[1] * shape[2], os.statvfs(path.parent)
    if size * _PART > space.f_blocks * space.f_frsize:
        raise OSError(f"{path.parent} is too small for {size} bytes")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # what is not there now would end the process when written
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)
    return _mapped(path, shape)


def _mapped(path: Path, shape: tuple[int, int, int]) -> Tensor:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return torch.frombuffer(mmap.mmap(descriptor, shape[0] * shape[1] * shape[2]), dtype=torch.uint8).view(shape)
    finally:
        os.close(descriptor)
