"""What the tests of GPU kernels share: the device that they run on, and how two functions are compared.

The tests run on a GPU (`python -m pytest -m gpu`), or where TRITON_INTERPRET=1 is set in Triton's interpreter, which
computes with NumPy what the kernels say; `test_gpu_interpreted.py` runs them so. Whether it is set counts when Triton
is imported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

if not HAS_TRITON:
    pytest.skip("Triton is not installed; it comes with torch's CUDA build", allow_module_level=True)
if not INTERPRETED and not torch.cuda.is_available():
    reason = "there is no GPU here (or not -m gpu), and TRITON_INTERPRET=1 is not set"
    pytest.skip(reason, allow_module_level=True)

PRODUCTS = {"float32": (None, 1e-5), "bfloat16": (torch.bfloat16, 0.03)}
"""By name: the type of products, and how far results may be from float64, relative to the norm."""
products = pytest.mark.parametrize(("dtype", "tolerance"), PRODUCTS.values(), ids=PRODUCTS)

Function = Callable[..., Tensor]


class Random:
    """Reproducible random tensors on the tests' device."""

    def __init__(self, seed: int = 1):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(DEVICE)

    def ids(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator).to(DEVICE)

    def distinct(self, below: int, count: int) -> Tensor:
        return torch.randperm(below, generator=self.generator)[:count].to(DEVICE)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the expected norm; infinite where something is not finite."""
    difference = float((found.detach().double() - expected.detach().double()).norm())
    return difference / max(float(expected.detach().norm()), 1e-30) if difference == difference else float("inf")


def compare(ours: Function, plain: Function, leaves: Sequence[Tensor], tolerance: float) -> None:
    """Assert that two functions of the same leaves give the same result and gradients; plain's are computed in float64.

    Every leaf must get a float32 gradient.
    """
    given, exact = [x.clone().requires_grad_() for x in leaves], [x.double().requires_grad_() for x in leaves]
    found, expected = ours(*given), plain(*exact)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    error = relative_error(found, expected)
    assert error <= tolerance, f"result: {error:.2g}"
    gradient = Random(7).normal(*expected.shape)
    gradients = torch.autograd.grad(found, given, gradient)
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    for number, (ours_of, plain_of) in enumerate(zip(gradients, wanted, strict=True)):
        assert ours_of.dtype == torch.float32 and ours_of.shape == plain_of.shape, f"leaf {number}"
        error = relative_error(ours_of, plain_of)
        assert error <= tolerance, f"gradient of leaf {number}: {error:.2g}"
