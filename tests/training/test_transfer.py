"""Step inputs on their way: unchanged to a CPU; to a GPU pinned, on a stream of their own, and waited for there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from elmo_ray.training.step_input import StepInput, Transfer, device_lock, wait_for_arrival


def made() -> StepInput:
    numbers = torch.arange(6)
    part = StepInput(0, numbers, (), numbers, numbers, numbers, numbers > 2, 6)
    return StepInput(
        0, numbers, ((6, 1),), numbers + 1, numbers, numbers, numbers > 2, 6, micro_batches=((range(6), part),)
    )


def test_nothing_happens_on_a_cpu() -> None:
    batch = made()
    sent, arrived = Transfer(torch.device("cpu"))(batch)
    wait_for_arrival(sent, arrived)
    assert sent is batch and arrived is None


def test_a_copy_of_every_tensor() -> None:
    batch = made()
    doubled = batch.each(lambda tensor: tensor * 2)
    assert torch.equal(doubled.inputs, batch.inputs * 2) and doubled.rows is None and doubled.positions == 6
    assert torch.equal(doubled.micro_batches[0][1].types, batch.types * 2)
    assert batch.inputs.tolist() == [1, 2, 3, 4, 5, 6]


class FakeCuda:
    """Writes down what a transfer asks of a GPU, in order."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.inside: list[str] = []

    def Stream(self) -> FakeCuda:
        return self

    def Event(self) -> FakeCuda:
        return self

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.inside.append(str(device))
        yield
        self.inside.pop()

    @contextlib.contextmanager
    def stream(self, stream: FakeCuda) -> Iterator[None]:
        self.inside.append("stream")
        yield
        self.inside.pop()

    def record(self, stream: FakeCuda) -> None:
        self.log.append("record")

    def current_stream(self, device: torch.device) -> FakeCuda:
        return self

    def wait_event(self, event: FakeCuda) -> None:
        self.log.append("wait")


def test_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    batch = made()
    count = 2 * len(batch.tensors())

    def pin(self: Tensor) -> Tensor:
        cuda.log.append("pin")
        return self.clone()

    def to(self: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        assert non_blocking and cuda.inside == ["cuda:1", "stream"] and device_lock.locked()
        cuda.log.append("copy")
        return self

    def record_stream(self: Tensor, stream: FakeCuda) -> None:
        cuda.log.append("used")

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "record_stream", record_stream)
    monkeypatch.setattr(torch, "cuda", cuda)
    sent, arrived = Transfer(torch.device("cuda:1"))(batch)
    assert arrived is cuda and cuda.log == ["pin"] * count + ["copy"] * count + ["record"]
    assert not cuda.inside and not device_lock.locked()
    cuda.log.clear()
    wait_for_arrival(sent, arrived)
    assert cuda.log == ["wait"] + ["used"] * count
    assert torch.equal(sent.inputs, batch.inputs)
