"""A matrix product in another precision than what comes before and after it."""

from __future__ import annotations

import torch
from torch import Tensor


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight, multiplied in the weight's dtype and returned in that of x."""
    return x @ weight if x.dtype == weight.dtype else (x.to(weight.dtype) @ weight).to(x.dtype)


def affine(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return x @ weight + bias. dtype: of the product; None stands for the weight's own."""
    return product(x, weight if dtype is None else weight.to(dtype)) + bias
