"""Products of few rows with a matrix that serves many times, such as a recurrent kernel at every step of a window.

A CPU multiplies few rows by a big matrix at half of its speed, because it puts the matrix into the order of its caches
anew for every product. oneDNN's packed weights, which torch has, are put into that order once; bias and activation can
be part of the product. Nothing here has gradients. Shapes: M rows, K width of the input, N width of the result.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_WORTH_PACKING = 1 << 16
"""Numbers of a matrix; smaller ones gain nothing."""
_WORTH_PACKING_FLOAT32 = 1 << 20
"""oneDNN puts smaller float32 ones into its order at every product, in less time than once a window takes."""
_WORTH_LINEAR = 1 << 17
"""Numbers of a matrix from which products with few rows are faster by `linear`."""


class PackedWeight(NamedTuple):
    """The right factor of products. matrix: [K, N] or, packed, its transpose in oneDNN's order."""

    matrix: Tensor
    packed: bool


def pack(weight: Tensor, rows: int, transposed: bool = False) -> PackedWeight:
    """Pack `weight` [K, N] or [D, K, N], or its transpose where `transposed`, for products of so many rows."""
    enough = _WORTH_PACKING_FLOAT32 if weight.dtype == torch.float32 else _WORTH_PACKING
    if weight.numel() >= enough and can_pack(weight):
        # A linear layer's weight, which is what is packed, is the transpose of the factor. From a view it would take
        # twice as long as from a copy, with it.
        return PackedWeight(packed(weight if transposed else weight.t().contiguous(), rows), True)
    # a copy: products of few rows with a transposed view run at a fraction of the speed on CPUs
    return PackedWeight(weight.transpose(-1, -2).contiguous() if transposed else weight, False)


def packed(weight_NK: Tensor, rows: int) -> Tensor:
    """Return the weight [N, K] of a linear layer in oneDNN's order for products of so many rows."""
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK, rows)
    return result


def can_pack(weight: Tensor) -> bool:
    """Return whether torch has packed products for this matrix here that are fast in its type."""
    return weight.dim() == 2 and _packs(weight.device.type, weight.dtype)


@lru_cache
def _packs(device: str, dtype: torch.dtype) -> bool:
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    try:  # not every build of torch has all of it
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        weight, x, bias = torch.zeros(16, 8, dtype=dtype), torch.zeros(2, 8, dtype=dtype), torch.zeros(16)
        torch.ops.mkldnn._linear_pointwise(x, packed(weight, 2), bias, "tanh", [], "")
        torch.ops.mkldnn._linear_pointwise(x, torch.zeros(2, 16, dtype=dtype), packed(weight, 2), None, "add")
    except (AttributeError, RuntimeError):
        return False
    return True


def matmul(x_MK: Tensor, factor: PackedWeight) -> Tensor:
    """Compute x @ factor, in its dtype; without gradients."""
    if factor.packed:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, factor.matrix, None, "none", [], "")
        return result
    if factor.matrix.numel() >= _WORTH_LINEAR:
        return linear(x_MK, factor.matrix)
    return torch.mm(x_MK, factor.matrix)


def linear(x_MK: Tensor, weight_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Compute x @ weight + bias, in the dtype of x and the weight; without gradients.

    On some CPUs oneDNN's float32 products are a tenth faster than those of torch.mm, but the first one of a shape takes
    half a millisecond more.
    """
    if x_MK.dtype == torch.float32 and can_pack(x_MK):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, weight_KN.t(), bias_N, "none", [], "")
        return result
    return torch.mm(x_MK, weight_KN) if bias_N is None else torch.addmm(bias_N, x_MK, weight_KN)


Activation = Literal["none", "relu", "sigmoid", "tanh"]

_WORTH_LAYOUT = 16
"""Rows; for fewer the layout takes longer than their product."""


class FusedProduct(NamedTuple):
    """x -> activation(x @ weight + bias), see `apply`. weight: [N, K], or what oneDNN has made of it."""

    weight: Tensor
    bias: Tensor | None
    activation: str
    packed: bool


def fused_product(
    weight_NK: Tensor, bias_N: Tensor | None = None, activation: Activation = "none", rows: int = 256
) -> FusedProduct:
    """Lay a weight out for about `rows` rows at a time, on its device and in its type; the bias may be in a wider one.

    oneDNN's own layout of the weight makes float32 products a tenth faster than `torch.mm`. What follows a product
    there is worked out on float32 that is still in registers: `tanh` takes a fifth of the time of PyTorch's, and
    nothing is rounded to bfloat16 before its activation. A first product of M rows takes half a millisecond more, so M
    had better be one of few numbers.
    """
    if rows >= _WORTH_LAYOUT and can_pack(weight_NK):
        return FusedProduct(packed(weight_NK.contiguous(), rows), bias_N, activation, True)
    return FusedProduct(weight_NK, bias_N, activation, False)


def apply(product: FusedProduct, x_MK: Tensor) -> Tensor:
    """Return activation(x @ weight + bias), [M, N], for an M of at least 1."""
    bias = product.bias
    if product.packed:
        return torch.ops.mkldnn._linear_pointwise(x_MK, product.weight, bias, product.activation, [], "")
    result = torch.mm(x_MK, product.weight.t())
    if bias is not None:
        result.add_(bias)
    if product.activation == "relu":
        result.relu_()
    elif product.activation == "sigmoid":
        result.sigmoid_()
    elif product.activation == "tanh":
        result.tanh_()
    return result
