"""What one training step is given.

Shapes: D directions, B rows, T window, U distinct words, C characters, K negatives, R touched rows.

A step in parts, for more streams than memory holds at a time; and what travels between workers, in how many bytes.

A part is some rows of the worker's batch. Their gradients are added up before anything is sent, so `train.accumulate`
changes neither what a step is nor what it sends: W workers with A parts each compute what W * A workers compute, but
for the order of sums.

Step inputs on their way to the device: pinned memory, and copies beside the step that computes.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elmo_ray.data.streams import split_evenly


@dataclass
class StepInput:
    """All that a step needs, on the device.

    types [U, C] (or [U] for word input: indices into `input_rows`, or ids with a full softmax), type_classes, inputs
    [D, B, T], targets [D, B, T], lengths [B] as in `streams.Batch`; reset [B] rows that start from zero state;
    positions: of all ranks in one direction, the divisor of the loss.
    With a sampled softmax: rows [R] of the softmax table (all ranks have the same), target_rows [D, B, T] and
    negative_rows [D, K] index into them, with the log expected counts of both; input_rows: rows of an untied word
    embedding. scale: the factor of the losses' sum, where it is on the device; None: worked out from `positions`.
    parts: rows and inputs of the parts that it is computed in, where they are ready (`accumulation.py`).
    """

    step: int
    types: Tensor
    type_classes: tuple[tuple[int, int], ...]
    inputs: Tensor
    targets: Tensor
    lengths: Tensor
    reset: Tensor
    positions: int
    rows: Tensor | None = None
    target_rows: Tensor | None = None
    target_log_count: Tensor | None = None
    negative_rows: Tensor | None = None
    negative_log_count: Tensor | None = None
    input_rows: Tensor | None = None
    scale: Tensor | None = None
    micro_batches: tuple[tuple[range, StepInput], ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Those of the fields that are there, by their names."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def each(self, function: Callable[[Tensor], Tensor]) -> StepInput:
        """A copy with `function` of every tensor."""
        result = copy.copy(self)
        for name, value in self.tensors().items():
            setattr(result, name, function(value))
        result.micro_batches = tuple((rows, part.each(function)) for rows, part in self.micro_batches)
        return result

    def to(self, device: torch.device) -> StepInput:
        """A copy on `device`; from pinned memory the transfer does not wait."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> StepInput:
        """A copy in pinned memory."""
        return self.each(Tensor.pin_memory)


_BY_ROWS = {"inputs": 1, "targets": 1, "target_rows": 1, "target_log_count": 1, "lengths": 0, "reset": 0}
"""The fields of a StepInput that have a row for each stream, and the dimension of it."""


def with_micro_batches(batch: StepInput, count: int) -> StepInput:
    """Return a copy with its micro-batches, found where it is made: a step on a GPU would wait for their sizes."""
    result = copy.copy(batch)
    result.micro_batches = tuple(micro_batches_of(batch, count)) if count > 1 else ()
    return result


def micro_batches_of(batch: StepInput, count: int) -> Iterator[tuple[range, StepInput]]:
    """The rows of each part, and its input, with the words of its rows only. One part is the batch itself."""
    if batch.micro_batches:
        yield from batch.micro_batches
        return
    rows = len(batch.lengths)
    if count == 1 or rows == 1:
        yield range(rows), batch
        return
    for share in split_evenly(rows, min(count, rows)):
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


device_quiet = threading.Lock()
"""Held by who must be alone with the GPU for a moment: a graph that is captured bears no other thread's memory."""


@dataclass
class Sent:
    """A step's input on its way; arrived: what the stream that uses it must wait for."""

    batch: StepInput
    arrived: torch.cuda.Event | None = None

    def received(self) -> StepInput:
        """The input, for operations that are asked for from here on; waits on the device and not here."""
        if self.arrived is not None:
            stream = torch.cuda.current_stream(self.batch.inputs.device)
            stream.wait_event(self.arrived)
            for batch in (self.batch, *(part for _, part in self.batch.micro_batches)):
                for tensor in batch.tensors().values():
                    # its memory belongs to the stream of copies, and is not to be used again before this one is done
                    tensor.record_stream(stream)
        return self.batch


class Transfer:
    """Sends step inputs to a device, from the thread that made them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, batch: StepInput) -> Sent:
        if self.device.type != "cuda":
            return Sent(batch)
        with device_quiet, torch.cuda.device(self.device):  # a new thread begins with device 0
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            with torch.cuda.stream(self._stream):
                # torch keeps pinned memory until the copies out of it are done
                sent = Sent(batch.pinned().to(self.device), torch.cuda.Event())
            assert sent.arrived is not None
            sent.arrived.record(self._stream)
        return sent
