"""Step inputs on their way: unchanged to a CPU; to a GPU pinned, on a stream of their own, and waited for there."""

from __future__ import annotations

import pytest
import torch

from elmo_ray.training.step_input import InputBuffers, PackedInput, StepInput, Transfer, device_lock, wait_for_arrival


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


def packed(batch: StepInput, shapes: StepInput, step: int) -> PackedInput:
    block = torch.empty(batch.packed_size, dtype=torch.uint8)
    batch.copy_to(batch.unpacked(block))
    return PackedInput(shapes, step, step + 1, block)


def test_packed_inputs_stay_until_their_buffer_is_used_again() -> None:
    batches = [made().each(lambda tensor, number=number: tensor + number) for number in range(6)]
    shapes = batches[0].each(lambda tensor: torch.empty_like(tensor, device="meta"))
    buffers = InputBuffers(torch.device("cpu"), 3)
    copied = []
    for step, batch in enumerate(batches):
        source = packed(batch, shapes, step)
        sent, arrived = buffers.copy(source)
        wait_for_arrival(sent, arrived)
        source.packed.zero_()  # the process writes the next one there
        copied.append(sent)
        for each, theirs in zip(copied[-2:], batches[step - 1 : step + 1] if step else batches[:1], strict=True):
            assert_packed(each, theirs)
        assert (sent.step, sent.positions, sent.micro_batches[0][1].step) == (step, step + 1, step)
        if step:
            buffers.release()
    assert copied[5] is copied[2] is not copied[4], "no views are made in a step"
    buffers.copy(packed(batches[0], shapes, 6))
    with pytest.raises(AssertionError):
        for step in (7, 8):
            buffers.copy(packed(batches[0], shapes, step))
    buffers.close()


def test_inputs_of_other_shapes_in_the_same_buffers() -> None:
    buffers, sizes = InputBuffers(torch.device("cpu"), 2), []
    for step, length in enumerate((6, 6, 300, 4, 6, 300)):
        batch = made().each(lambda tensor, n=length: tensor.repeat(n)[:n])
        shapes = batch.each(lambda tensor: torch.empty_like(tensor, device="meta"))
        sent, _ = buffers.copy(packed(batch, shapes, step))
        assert_packed(sent, batch)
        sizes.append(sent.packed_size)
        buffers.release()
    assert sizes[0] == sizes[1] == sizes[4] < sizes[2] == sizes[5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here (or not -m gpu)")
def test_a_step_has_its_input_until_it_is_done() -> None:
    """Steps that take long on the GPU: no copy of a later input comes before they have read theirs."""
    device = torch.device("cuda")
    numbers = torch.arange(1 << 16)
    first = StepInput(0, numbers, (), numbers, numbers, numbers, numbers > 2, 6)
    shapes = first.each(lambda tensor: torch.empty_like(tensor + 0, device="meta"))
    buffers, sums, busy = InputBuffers(device, 3), [], torch.randn(4096, 4096, device=device)
    for step in range(20):
        batch = first.each(lambda tensor, n=step: tensor + n)
        sent, arrived = buffers.copy(packed(batch, shapes, step))
        assert arrived is not None and sent.inputs.is_cuda
        wait_for_arrival(sent, arrived)
        for _ in range(10):
            busy = busy @ busy / 100
        sums.append(sent.inputs.sum())
        buffers.release()
    assert [int(each) for each in sums] == [int((numbers + step).sum()) for step in range(20)]
    buffers.close()


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
