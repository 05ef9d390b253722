"""The GPU's Adagrad of all dense tensors against PyTorch's operations."""

from __future__ import annotations

import pytest
import torch
from helpers.gpu import DEVICE, relative_error
from torch import Tensor

from elmo_ray.kernels.gpu.dense_adagrad import DenseAdagrad

pytestmark = pytest.mark.gpu

SHAPES = ((3,), (50, 61), (4097,), (1,), (2, 0), (1024,))
RATES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def random_tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(shape, generator=generator) + 0.1).to(DEVICE) for shape in SHAPES]


def scalar(number: float) -> Tensor:
    return torch.tensor(number, device=DEVICE)


def rates_on_device() -> list[Tensor]:
    return list(torch.tensor(RATES, device=DEVICE).unbind())


@pytest.mark.parametrize("on_device", [True, False])
def test_updates(on_device: bool) -> None:
    """Some steps with gradients at new addresses, and at the old ones."""
    values, slots, gradients = random_tensors(1), random_tensors(2), random_tensors(3)
    expected = [[x.double() for x in tensors] for tensors in (values, slots)]
    update = DenseAdagrad(values, slots)
    for step in range(3):
        if step == 1:
            gradients = random_tensors(4)
        elif step == 2:
            for gradient in gradients:
                gradient.mul_(-0.5)
        for value, slot, gradient, rate in zip(*expected, gradients, RATES, strict=True):
            g = gradient.double() / 2
            slot += g * g
            value -= rate * g / slot.sqrt()
        update(gradients, scalar(2.0), rates_on_device() if on_device else RATES)
        for ours, wanted in zip([*values, *slots], [*expected[0], *expected[1]], strict=True):
            assert not ours.numel() or relative_error(ours, wanted) < 1e-6


def test_gradients_that_are_not_contiguous() -> None:
    value, slot, gradient = torch.ones(3, 5), torch.ones(3, 5), torch.arange(15.0).view(5, 3).t()
    value, slot, gradient = value.to(DEVICE), slot.to(DEVICE), gradient.to(DEVICE)
    DenseAdagrad([value], [slot])([gradient], scalar(1.0), [1.0])
    assert relative_error(slot, 1 + gradient**2) < 1e-6
    assert relative_error(value, 1 - gradient / slot.sqrt()) < 1e-6


@pytest.mark.parametrize("divisor", [0.0, float("nan")])
def test_a_bad_step_changes_nothing(divisor: float) -> None:
    values, slots, gradients = random_tensors(1), random_tensors(2), random_tensors(3)
    gradients[1][2, 3] = torch.nan
    DenseAdagrad(values, slots)(gradients, scalar(divisor), RATES)
    for found, before in zip([*values, *slots], [*random_tensors(1), *random_tensors(2)], strict=True):
        assert torch.equal(found, before)


def test_versions_rise() -> None:
    """Whoever keeps what was made of a weight sees that it changed."""
    values, slots = random_tensors(1), random_tensors(2)
    versions = [x._version for x in (*values, *slots)]
    DenseAdagrad(values, slots)(random_tensors(3), scalar(1.0), RATES)
    assert all(x._version > version for x, version in zip((*values, *slots), versions, strict=True))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="captures are a GPU's")
def test_captured() -> None:
    """The second call has nothing to copy, and is replayed with other gradients and rates; the first one is refused."""
    values, slots, gradients = random_tensors(1), random_tensors(2), random_tensors(3)
    rates, update = rates_on_device(), DenseAdagrad(values, slots)
    update(gradients, scalar(0.0), rates)
    divisor, graph = scalar(2.0), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(gradients, divisor, rates)
        with pytest.raises(RuntimeError, match="rates on the device"):
            update(gradients, divisor, RATES)
    for gradient, other in zip(gradients, random_tensors(5), strict=True):
        gradient.copy_(other)
    graph.replay()
    others = [random_tensors(1), random_tensors(2)]
    DenseAdagrad(*others)(random_tensors(5), divisor, RATES)
    assert all(torch.equal(a, b) for a, b in zip([*values, *slots], [*others[0], *others[1]], strict=True))
