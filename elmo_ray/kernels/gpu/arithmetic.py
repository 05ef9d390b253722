"""Arithmetic that several GPU kernels share: tanh, and products of bf16 matrices whose sums stay in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The argument exists since PyTorch 2.8, and on CUDA devices only.
_BMM_HAS_OUT_DTYPE = "dtype" in torch.ops.aten.bmm.overloads()


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


def block_for(width: int) -> int:
    """Return how many numbers of a row of `width` one program of an elementwise kernel computes."""
    return min(1024, triton.next_power_of_2(width))


def rows_at_once(block: int) -> int:
    """Return how many rows of `block` numbers one program adds up together, so that they fit into its registers."""
    return max(1, min(16, 8192 // block))


def product_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two batches of matrices, or of two matrices, in float32.

    The sum of bf16 matrices is rounded to bf16 first where PyTorch cannot return it in float32: below 2.8, and on a
    CPU, where the kernels run only in tests.
    """
    if a.ndim == 2:
        return product_float32(a[None], b[None])[0]
    if a.dtype == torch.float32 or not a.is_cuda or not _BMM_HAS_OUT_DTYPE:
        return torch.bmm(a, b).float()
    return torch.bmm(a, b, out_dtype=torch.float32)
