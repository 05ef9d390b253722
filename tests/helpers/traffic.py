"""Counts what a worker hands to torch.distributed while it trains: bytes of each part of a step, and the time of calls.

Bytes are the size of what is summed or gathered. On the wire a ring sends 2 (W - 1) / W of a sum, and each of W workers
receives W - 1 pieces of what is gathered.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel


class Traffic:
    """bytes, calls, seconds: by part. "dense": DDP's buckets; "tables": rows of the word tables; "exchange": ids
    and flags."""

    def __init__(self) -> None:
        self.bytes: collections.Counter[str] = collections.Counter()
        self.calls: collections.Counter[str] = collections.Counter()
        self.seconds: collections.Counter[str] = collections.Counter()

    def clear(self) -> None:
        for counter in (self.bytes, self.calls, self.seconds):
            counter.clear()

    def add(self, part: str, tensor: torch.Tensor, seconds: float = 0.0) -> None:
        self.bytes[part] += tensor.numel() * tensor.element_size()
        self.calls[part] += 1
        self.seconds[part] += seconds


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count from here on, in this process. TrainSteps must be made inside: their DDP gets a hook that does what the
    one it would have does."""
    traffic = Traffic()
    kept = dist.all_reduce, dist.all_gather, DistributedDataParallel.__init__, default_hooks.bf16_compress_hook

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = kept[0](tensor, *args, **kwargs)
        if kwargs.get("async_op") or (args and args[-1] is True):  # DDP's hooks, which count by themselves
            return result
        traffic.add("tables" if kwargs.get("group") is None else "control", tensor, time.perf_counter() - start)
        return result

    def all_gather(received: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = kept[1](received, tensor, *args, **kwargs)
        long = tensor.dtype == torch.int64 and tensor.numel() > 1
        traffic.add("exchange" if long else "control", tensor, time.perf_counter() - start)
        return result

    def full(state, bucket):  # type: ignore[no-untyped-def]  # torch looks at the annotations
        traffic.add("dense", bucket.buffer())
        return default_hooks.allreduce_hook(state, bucket)

    def half(state, bucket):  # type: ignore[no-untyped-def]
        traffic.add("dense", bucket.buffer().to(torch.bfloat16))
        return kept[3](state, bucket)

    hooked: set[int] = set()

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kept[2](self, *args, **kwargs)
        register = self.register_comm_hook

        def once(state: Any, hook: Any) -> None:
            hooked.add(id(self))
            register(state, hook)

        self.register_comm_hook = once

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) not in hooked:
            self.register_comm_hook(None, full)
        return original_forward(self, *args, **kwargs)

    original_forward = DistributedDataParallel.forward
    dist.all_reduce, dist.all_gather = all_reduce, all_gather  # type: ignore[assignment]
    DistributedDataParallel.__init__, DistributedDataParallel.forward = init, forward  # type: ignore[method-assign]
    default_hooks.bf16_compress_hook = half
    try:
        yield traffic
    finally:
        dist.all_reduce, dist.all_gather = kept[0], kept[1]
        DistributedDataParallel.__init__ = kept[2]  # type: ignore[method-assign]
        DistributedDataParallel.forward = original_forward  # type: ignore[method-assign]
        default_hooks.bf16_compress_hook = kept[3]
