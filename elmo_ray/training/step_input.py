"""The input of one training step, its micro-batches, and its way to the device.

A micro-batch is some rows of the worker's batch, for more streams than memory holds at a time. The gradients of all
micro-batches are added before they are sent to other workers. So `train.accumulate` changes neither the result of a
step nor the bytes that it sends: W workers with A micro-batches each compute the same as W * A workers, except for the
order of sums.

`Transfer` copies an input to a GPU as one block of pinned memory, on a stream of its own, while the step before
computes.

Shapes: D directions, B rows, T window, U distinct words, C characters, K negatives, R touched rows.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from elmo_ray.data.streams import split_evenly
from elmo_ray.kernels.hints import SortedPositions, WindowCounts


@dataclass
class StepInput:
    """Data of a step, on the device.

    types [U, C] (for word input [U]: indices into `input_rows`, or ids with a full softmax), type_classes, inputs
    [D, B, T], targets [D, B, T], lengths [B]: as in `streams.Batch`. reset: [B] rows that start from zero state.
    positions: of all ranks in one direction, the divisor of the loss.
    With a sampled softmax: rows [R] of the softmax table, the same on all ranks; target_rows [D, B, T] and
    negative_rows [D, K], indices into them, and the log expected counts of both; input_rows: rows of an untied word
    embedding.
    For the kernels of a GPU, where `Capacities` has padded the input: window_counts [U] and n_windows as in
    `WindowCounts`; the sorted positions of the inputs (in the order [D, T, B]) and of the targets.
    micro_batches: rows and inputs of the micro-batches, if they were found in advance (`with_micro_batches`). block:
    the memory [bytes] that all other tensors of a packed input are views of.
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
    window_counts: Tensor | None = None
    n_windows: int = 0
    input_order: Tensor | None = None
    input_starts: Tensor | None = None
    target_order: Tensor | None = None
    target_starts: Tensor | None = None
    micro_batches: tuple[tuple[range, StepInput], ...] = ()
    block: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that hold a tensor, by name; not the block."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name != "block"}

    @property
    def windows(self) -> WindowCounts | None:
        return None if self.window_counts is None else WindowCounts(self.window_counts, self.n_windows)

    @property
    def input_positions(self) -> SortedPositions | None:
        return _sorted(self.input_order, self.input_starts)

    @property
    def target_positions(self) -> SortedPositions | None:
        return _sorted(self.target_order, self.target_starts)

    def each(self, function: Callable[[Tensor], Tensor]) -> StepInput:
        """Return a copy in which `function` replaces every tensor, those of the micro-batches too."""
        result = copy.copy(self)
        for name, value in self.tensors().items():
            setattr(result, name, function(value))
        result.micro_batches = tuple((rows, micro.each(function)) for rows, micro in self.micro_batches)
        return result

    def to(self, device: torch.device) -> StepInput:
        """Return a packed copy on `device`, sent by one copy which does not block this thread."""
        host = torch.empty(self.packed_size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.copy_to(self.unpacked(host))
        # torch keeps pinned memory until the copies out of it are done
        return self.unpacked(host.to(device, non_blocking=True))

    @property
    def packed_size(self) -> int:
        """Bytes of all tensors, packed, with those of the micro-batches."""
        return sum(self._sizes())

    def copy_to(self, other: StepInput) -> None:
        """Write all numbers into another input of the same shapes."""
        for each, into in zip(self.all_inputs, other.all_inputs, strict=True):
            for name, tensor in each.tensors().items():
                getattr(into, name).copy_(tensor)

    def unpacked(self, memory: Tensor) -> StepInput:
        """Return an input of the same shapes whose tensors are views of `memory` [packed_size]."""
        blocks = memory.split(self._sizes())
        result, *micros = (each.over(block) for each, block in zip(self.all_inputs, blocks, strict=True))
        result.micro_batches = tuple((rows, m) for (rows, _), m in zip(self.micro_batches, micros, strict=True))
        return result

    @property
    def shape_key(self) -> tuple[Any, ...]:
        """Return all that a captured step depends on besides numbers: equal values mean inputs of one shape."""
        tensors = tuple((name, tensor.shape, tensor.dtype) for name, tensor in self.tensors().items())
        return self.type_classes, self.n_windows, tensors

    @property
    def all_inputs(self) -> list[StepInput]:
        """Return this input, and those of its micro-batches."""
        return [self, *(micro for _, micro in self.micro_batches)]

    def _sizes(self) -> list[int]:
        return [sum(_aligned(tensor.nbytes) for tensor in each.tensors().values()) for each in self.all_inputs]

    def over(self, block: Tensor) -> StepInput:
        """Return an input of the same shapes whose tensors are views of the block, in an order that all inputs have."""
        result = copy.copy(self)
        result.block, start, of_dtype = block, 0, {torch.uint8: block}
        for name, tensor in self.tensors().items():
            if (whole := of_dtype.get(tensor.dtype)) is None:
                whole = of_dtype[tensor.dtype] = block.view(tensor.dtype)
            # one call for each tensor, as there are fifteen of them in every step
            place = whole.storage_offset() + start // tensor.itemsize
            setattr(result, name, whole.as_strided(tensor.shape, _strides(tensor.shape), place))
            start += _aligned(tensor.nbytes)
        return result


@lru_cache(maxsize=1024)
def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Return the strides of a tensor of this shape without gaps."""
    return tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))


_ALIGNMENT = 256
"""Multiple of bytes at which tensors of a packed input begin, as those that torch allocates."""


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def _sorted(order: Tensor | None, starts: Tensor | None) -> SortedPositions | None:
    return None if order is None or starts is None else SortedPositions(order, starts)


_BY_ROWS = {"inputs": 1, "targets": 1, "target_rows": 1, "target_log_count": 1, "lengths": 0, "reset": 0}
"""Fields of a StepInput that have a row for each stream, and the dimension of the rows."""


def with_micro_batches(batch: StepInput, count: int) -> StepInput:
    """Return a copy with `count` micro-batches, if more than one."""
    result = copy.copy(batch)
    # found on the CPU: their shapes depend on the numbers in tensors, for which a step on a GPU would have to wait
    result.micro_batches = tuple(micro_batches_of(batch, count)) if count > 1 else ()
    return result


def micro_batches_of(batch: StepInput, count: int) -> Iterator[tuple[range, StepInput]]:
    """Yield the rows of each micro-batch and its input, which has the words of these rows only.

    With a count of one it is the batch itself.
    """
    if batch.micro_batches:
        yield from batch.micro_batches
        return
    rows = len(batch.lengths)
    if count == 1 or rows == 1:
        yield range(rows), batch
        return
    for share in split_evenly(rows, min(count, rows)):
        micro = copy.copy(batch)
        for name, dimension in _BY_ROWS.items():
            value = getattr(batch, name)
            if isinstance(value, Tensor):
                setattr(micro, name, value.narrow(dimension, share.start, len(share)))
        # sorted, so that the words of a length class stay together
        used, micro.inputs = torch.unique(micro.inputs, return_inverse=True)
        micro.types = batch.types[used]
        if batch.type_classes:
            ends = torch.tensor([count for count, _ in batch.type_classes], device=used.device).cumsum(0)
            counts = torch.bincount(torch.searchsorted(ends, used, right=True), minlength=len(ends)).tolist()
            columns = [width for _, width in batch.type_classes]
            micro.type_classes = tuple((n, width) for n, width in zip(counts, columns, strict=True) if n)
        yield share, micro


@dataclass(frozen=True)
class PackedInput:
    """A step input that another process has packed. shapes: an input whose tensors have shapes and no numbers.

    packed: the bytes [packed_size], which change when the next one is asked for.
    """

    shapes: StepInput
    step: int
    positions: int
    packed: Tensor


class InputBuffers:
    """Buffers on a device into which packed inputs are copied in turn, for the thread that trains on them.

    An input is there until `release` is called for it and another one is copied into the same buffer. So a step
    allocates no memory, and makes no views either, unless its shapes are new.
    """

    def __init__(self, device: torch.device, count: int):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers = [_InputBuffer(device) for _ in range(count)]
        self._copied = self._released = 0

    def copy(self, packed: PackedInput) -> tuple[StepInput, torch.cuda.Event | None]:
        """Return the input on the device, and the event of its arrival on a GPU, which may be still to come.

        The arrival is to be waited for by `wait_for_arrival`. This thread does not wait.
        """
        buffer = self._buffers[self._copied % len(self._buffers)]
        self._copied += 1
        assert self._copied - self._released <= len(self._buffers)
        return buffer.copy(packed, self._stream), buffer.arrived

    def release(self) -> None:
        """Give back the buffer of the oldest input. What this thread starts from here on must not use it."""
        self._buffers[self._released % len(self._buffers)].release()
        self._released += 1

    def close(self) -> None:
        """Wait for copies that are under way, whose memory is freed after this."""
        if self._stream is not None:
            self._stream.synchronize()


class _InputBuffer:
    """Memory for one input, on the host (pinned for a GPU) and on the device; on a CPU they are the same."""

    def __init__(self, device: torch.device):
        self.device = device
        self.arrived, self.released = (torch.cuda.Event() if device.type == "cuda" else None for _ in range(2))
        self._host = self._block = torch.empty(0, dtype=torch.uint8)
        self._shapes: StepInput | None = None
        self._input: StepInput | None = None

    def copy(self, packed: PackedInput, stream: torch.cuda.Stream | None) -> StepInput:
        if self.arrived is not None:
            self.arrived.synchronize()  # the copy of the input before it, some steps ago, has left the pinned memory
        if self._input is None or packed.shapes is not self._shapes:
            self._make_views(packed.shapes)
            assert self._input is not None
        self._host.copy_(packed.packed)
        if stream is not None:
            assert self.arrived is not None and self.released is not None
            with torch.cuda.stream(stream):
                stream.wait_event(self.released)
                self._block.copy_(self._host, non_blocking=True)
                self.arrived.record(stream)
        for each in self._input.all_inputs:
            each.step, each.positions = packed.step, packed.positions
        return self._input

    def _make_views(self, shapes: StepInput) -> None:
        size = shapes.packed_size
        if len(self._host) != size:
            self._host = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            self._block = (
                self._host if self.device.type == "cpu" else torch.empty(size, dtype=torch.uint8, device=self.device)
            )
            # the stream that trains may have work to do with the memory that it had before
            self.release()
        self._shapes, self._input = shapes, shapes.unpacked(self._block)

    def release(self) -> None:
        if self.released is not None:
            self.released.record(torch.cuda.current_stream(self.device))


device_lock = threading.Lock()
"""Lock for being alone with the GPU: memory that another thread asks for would break the capture of a graph."""


class Transfer:
    """Sender of step inputs to a device, for the thread that makes them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, batch: StepInput) -> tuple[StepInput, torch.cuda.Event | None]:
        """Return the input on the device, and the event of its arrival on a GPU, which may be still to come.

        The arrival is to be waited for by `wait_for_arrival`.
        """
        if self.device.type != "cuda":
            return batch, None
        with device_lock, torch.cuda.device(self.device):  # a new thread begins with device 0
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            with torch.cuda.stream(self._stream):
                sent = batch.to(self.device)
                arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return sent, arrived


def wait_for_arrival(batch: StepInput, arrived: torch.cuda.Event | None) -> None:
    """Let the operations that this thread starts from here on use an input sent by `Transfer` or `InputBuffers`.

    The current stream of the device waits, this thread does not.
    """
    if arrived is None:
        return
    stream = torch.cuda.current_stream(batch.inputs.device)
    stream.wait_event(arrived)
    assert batch.block is not None
    # its memory belongs to the stream of copies, and must not be used again before this stream is done with it
    batch.block.record_stream(stream)
