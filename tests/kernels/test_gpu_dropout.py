"""The GPU's dropout: how much it drops, that backward drops the same, and what its masks depend on."""

from __future__ import annotations

import pytest
import torch
from helpers.gpu import DEVICE, Random

from elmo_ray.kernels.gpu.dropout import dropout

pytestmark = pytest.mark.gpu


def key(number: int) -> torch.Tensor:
    return torch.tensor([number], device=DEVICE)


@pytest.mark.parametrize("keep", [0.9, 0.5])
def test_what_is_kept_is_scaled(keep: float) -> None:
    x = Random().normal(7, 1001).requires_grad_()
    y = dropout(x, key(12345), 1, keep)
    kept = y != 0
    assert float(kept.float().mean()) == pytest.approx(keep, abs=0.02)
    assert torch.allclose(y, torch.where(kept, x / keep, 0.0))
    gradient = Random(2).normal(7, 1001)
    (found,) = torch.autograd.grad(y, x, gradient)
    assert torch.allclose(found, torch.where(kept, gradient / keep, 0.0))


def test_masks() -> None:
    """A mask is a function of the key and the use, and of nothing else."""
    x = torch.ones(3000, device=DEVICE)
    first = dropout(x, key(5), 0, 0.5)
    assert torch.equal(first, dropout(x, key(5), 0, 0.5))
    for other in (dropout(x, key(5), 1, 0.5), dropout(x, key(6), 0, 0.5), dropout(x, key(5 + (1 << 40)), 0, 0.5)):
        assert float((first == other).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_all_kept() -> None:
    x = Random().normal(2, 3).t()
    assert torch.equal(dropout(x, key(1), 0, 1.0), x)
