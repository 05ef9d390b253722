"""The GPU's highway layer against a plain one with autograd."""

from __future__ import annotations

import pytest
import torch
from helpers.gpu import Random, compare, products
from torch import Tensor

from elmo_ray.kernels.gpu.highway import highway

pytestmark = pytest.mark.gpu


def plain_highway(
    x: Tensor, carry_weight: Tensor, carry_bias: Tensor, transform_weight: Tensor, transform_bias: Tensor
) -> Tensor:
    gate = torch.sigmoid(x @ carry_weight + carry_bias)
    return gate * torch.relu(x @ transform_weight + transform_bias) + (1 - gate) * x


def random_leaves(words: int, size: int) -> list[Tensor]:
    random = Random()
    weights = [random.normal(size, size, scale=size**-0.5) for _ in range(2)]
    return [random.normal(words, size), weights[0], random.normal(size), weights[1], random.normal(size)]


@pytest.mark.parametrize(("words", "size"), [(9, 37), (1, 1), (3, 1100)])
def test_values_and_gradients(words: int, size: int) -> None:
    compare(lambda *leaves: highway(*leaves, None), plain_highway, random_leaves(words, size), 2e-6)


@products
def test_types(dtype: torch.dtype | None, tolerance: float) -> None:
    compare(lambda *leaves: highway(*leaves, dtype), plain_highway, random_leaves(20, 64), tolerance)


def test_nan_stays() -> None:
    leaves = random_leaves(4, 5)
    leaves[0][2, 3] = torch.nan
    found = highway(*leaves, None)
    assert found[2].isnan().all() and found.isnan().sum() == 5
