"""Step inputs on their way: unchanged to a CPU; to a GPU pinned, on a stream of their own, and waited for there."""

from __future__ import annotations

import pytest
import torch

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


def assert_packed(sent: StepInput, batch: StepInput) -> None:
    """All tensors are there, in one block of memory and where kernels expect them to begin."""
    blocks = set()
    (_, of_sent), (_, of_batch) = sent.micro_batches[0], batch.micro_batches[0]
    for ours, theirs in ((sent, batch), (of_sent, of_batch)):
        assert list(ours.tensors()) == list(theirs.tensors())
        for name, tensor in theirs.tensors().items():
            mine = ours.tensors()[name]
            assert mine.dtype == tensor.dtype and torch.equal(mine.cpu(), tensor)
            assert mine.storage_offset() * mine.element_size() % 256 == 0
            blocks.add(mine.untyped_storage().data_ptr())
    assert len(blocks) == 1


def test_an_input_is_one_block() -> None:
    batch = made()
    assert_packed(batch.to(torch.device("cpu")), batch)


def test_another_input_over_the_same_block() -> None:
    """As a captured step needs it: a copy of the block is a copy of all tensors."""
    first, second = made(), made().each(lambda tensor: tensor.flip(0))
    here, sent = first.to(torch.device("cpu")), second.to(torch.device("cpu"))
    assert here.block is not None and sent.block is not None
    here.block.copy_(sent.block)
    assert all(torch.equal(here.tensors()[name], value) for name, value in second.tensors().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here (or not -m gpu)")
def test_to_a_gpu() -> None:
    device = torch.device("cuda")
    send = Transfer(device)
    for _ in range(3):
        batch = made()
        sent, arrived = send(batch)
        assert arrived is not None and sent.inputs.is_cuda and not device_lock.locked()
        wait_for_arrival(sent, arrived)
        assert_packed(sent, batch)
