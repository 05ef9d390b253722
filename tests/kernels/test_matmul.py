"""Factors in oneDNN's order are the matrices that they were made of."""

from __future__ import annotations

import pytest
import torch

from elmo_ray.kernels.matmul import can_pack, pack

BF16_HERE = can_pack(torch.zeros(2, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(
    not BF16_HERE, reason="this CPU has no bf16 products"))])  # fmt: skip
@pytest.mark.parametrize("transposed", [False, True])
def test_a_packed_factor_is_the_matrix(dtype: torch.dtype, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1024, 1024, generator=generator).to(dtype)
    factor = pack(weight, 32, transposed)
    assert factor.packed
    plain = weight.t() if transposed else weight
    x = torch.randn(32, plain.shape[0], generator=generator).to(dtype)
    found = torch.ops.mkldnn._linear_pointwise(x, factor.matrix, None, "none", [], "")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, x @ plain, rtol=tolerance, atol=tolerance * 60)


def test_what_gains_nothing_is_not_packed() -> None:
    assert not pack(torch.zeros(16, 64), 32).packed
    assert not pack(torch.zeros(512, 1024, dtype=torch.float64), 32).packed
    assert not can_pack(torch.zeros(2, 512, 1024))
