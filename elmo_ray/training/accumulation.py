"""A step in parts, for more streams than memory holds at a time; and what travels between workers, in how many bytes.

A part is some rows of the worker's batch. Their gradients are added up before anything is sent, so `train.accumulate`
changes neither what a step is nor what it sends: W workers with A parts each compute what W * A workers compute, but
for the order of sums.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elmo_ray.data.streams import deal
from elmo_ray.training.step_input import StepInput

_BY_ROWS = {"inputs": 1, "targets": 1, "target_rows": 1, "target_log_count": 1, "lengths": 0, "reset": 0}
"""The fields of a StepInput that have a row for each stream, and the dimension of it."""


def divided(batch: StepInput, parts: int) -> StepInput:
    """A copy with its parts, found where the batch is made: on a GPU, how many words a part has would be waited for."""
    result = copy.copy(batch)
    result.parts = tuple(parts_of(batch, parts)) if parts > 1 else ()
    return result


def parts_of(batch: StepInput, parts: int) -> Iterator[tuple[range, StepInput]]:
    """The rows of each part, and its input, with the words of its rows only. One part is the batch itself."""
    if batch.parts:
        yield from batch.parts
        return
    rows = len(batch.lengths)
    if parts == 1 or rows == 1:
        yield range(rows), batch
        return
    for share in deal(rows, min(parts, rows)):
        part = copy.copy(batch)
        for name, dimension in _BY_ROWS.items():
            value = getattr(batch, name)
            if isinstance(value, Tensor):
                setattr(part, name, value.narrow(dimension, share.start, len(share)))
        used, part.inputs = torch.unique(part.inputs, return_inverse=True)  # sorted: classes stay together
        part.types = batch.types[used]
        if batch.type_classes:
            ends = torch.tensor([count for count, _ in batch.type_classes], device=used.device).cumsum(0)
            counts = torch.bincount(torch.searchsorted(ends, used, right=True), minlength=len(ends)).tolist()
            columns = [width for _, width in batch.type_classes]
            part.type_classes = tuple((n, width) for n, width in zip(counts, columns, strict=True) if n)
        yield share, part


def average(gradient: Tensor, world: int, sent_as: str) -> None:
    """The mean over all workers, in place. sent_as: `full`, or `bf16`: half the bytes, 8 bits of precision."""
    if sent_as == "bf16":
        sent = (gradient / world).to(torch.bfloat16)
        dist.all_reduce(sent)
        gradient.copy_(sent)
    else:
        dist.all_reduce(gradient)
        gradient /= world


def send_as_bf16(model: Any) -> None:
    """Let DistributedDataParallel do the same with the dense gradients."""
    model.register_comm_hook(None, _as_bf16)


def _as_bf16(state, bucket):  # type: ignore[no-untyped-def]  # torch looks at the annotations, and wants no strings
    """torch's own hook by another name: with gloo that one is refused, though gloo adds up bf16."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return default_hooks.bf16_compress_hook(state, bucket)
