"""Matrices that serve as a factor many times, such as a recurrent kernel at every time step of a window.

A CPU multiplies few rows by a big matrix at half of its speed, because it puts the matrix into the order of its caches
anew for every product. oneDNN's packed weights, which torch has, are put into that order once.

Products of one weight with many inputs, without gradients: on a CPU the weight is laid out for them once, and bias
and activation are part of the product.

Written in the part of Python that TorchScript has, so that loops over products can run without Python's lock (see
`side_by_side.without_lock`); it cannot read a NamedTuple's types from a module whose annotations are strings.
Shapes: M rows, K width of the input, N width of the result.
"""

from functools import lru_cache
from typing import Literal, NamedTuple, Optional

import torch
from torch import Tensor

_WORTH_PACKING = 1 << 16
"""Numbers of a matrix; smaller ones gain nothing."""
_WORTH_PACKING_FLOAT32 = 1 << 20
"""oneDNN puts smaller float32 ones into its order at every product, in less time than once a window takes."""
_WORTH_LINEAR = 1 << 17
"""Numbers of a matrix from which products with few rows are faster by `linear`."""


class Factor(NamedTuple):
    """The right factor of products. matrix: [K, N] or, packed, its transpose in oneDNN's order."""

    matrix: Tensor
    packed: bool


def factor_of(weight: Tensor, rows: int, transposed: bool = False) -> Factor:
    """`weight` [K, N] or [D, K, N], or its transpose where `transposed`, for products of so many rows."""
    enough = _WORTH_PACKING_FLOAT32 if weight.dtype == torch.float32 else _WORTH_PACKING
    if weight.numel() >= enough and can_pack(weight):
        # A linear layer's weight, which is what is packed, is the transpose of the factor. From a view it would take
        # twice as long as from a copy, with it.
        return Factor(packed(weight if transposed else weight.t().contiguous(), rows), True)
    # a copy: products of few rows with a transposed view run at a fraction of the speed on CPUs
    return Factor(weight.transpose(-1, -2).contiguous() if transposed else weight, False)


def packed(weight_NK: Tensor, rows: int) -> Tensor:
    """The weight of a linear layer, which is a factor's transpose, in oneDNN's order for products of so many rows."""
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK, rows)
    return result


def can_pack(weight: Tensor) -> bool:
    """Whether torch has packed products for this matrix here, and they are fast in its type."""
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


def times(x_MK: Tensor, factor: Factor) -> Tensor:
    """x @ factor, in its dtype; without gradients."""
    if factor.packed:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, factor.matrix, None, "none", [], "")
        return result
    if factor.matrix.numel() >= _WORTH_LINEAR:
        return linear(x_MK, factor.matrix)
    return torch.mm(x_MK, factor.matrix)


def linear(x_MK: Tensor, weight_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x @ weight + bias, in the dtype of x and the weight; without gradients.

    On some CPUs oneDNN's float32 products are a tenth faster than those of torch.mm, but the first one of a shape takes
    half a millisecond more.
    """
    if x_MK.dtype == torch.float32 and can_pack(x_MK):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, weight_KN.t(), bias_N, "none", [], "")
        return result
    return torch.mm(x_MK, weight_KN) if bias_N is None else torch.addmm(bias_N, x_MK, weight_KN)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices or two batches of them."""
    return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, in the dtype of `out`."""
    if a.dtype != out.dtype:
        out.copy_(product(a, b))
    elif a.dim() == 2:
        torch.mm(a, b, out=out)
    else:
        torch.bmm(a, b, out=out)


def sum_into(out: Tensor, c: Tensor, a: Tensor, b: Tensor) -> None:
    """out = c + a @ b, in the dtype of `out`; out may be c."""
    if a.dtype != out.dtype:
        torch.add(product(a, b).to(out.dtype), c, out=out)
    elif a.dim() == 2:
        torch.addmm(c, a, b, out=out)
    else:
        torch.baddbmm(c, a, b, out=out)


Activation = Literal["none", "relu", "sigmoid", "tanh"]

_WORTH_LAYOUT = 16
"""Rows; for fewer the layout takes longer than their product."""


class FusedProduct(NamedTuple):
    """x -> activation(x @ weight + bias), see `apply`. weight: [N, K], or what oneDNN has made of it."""

    weight: Tensor
    bias: Optional[Tensor]  # noqa: UP045
    activation: str
    packed: bool


def fused_product(
    weight_NK: Tensor, bias_N: Tensor | None = None, activation: Activation = "none", rows: int = 256
) -> FusedProduct:
    """For about `rows` rows at a time, on the device and in the type of the weight; the bias may be in a wider one.

    oneDNN's own layout of the weight makes float32 products a tenth faster than `torch.mm`. What follows a product
    there is worked out on float32 that is still in registers: `tanh` takes a fifth of the time of PyTorch's, and
    nothing is rounded to bfloat16 before its activation. A first product of M rows takes half a millisecond more, so M
    had better be one of few numbers.
    """
    if rows >= _WORTH_LAYOUT and can_pack(weight_NK):
        return FusedProduct(packed(weight_NK.contiguous(), rows), bias_N, activation, True)
    return FusedProduct(weight_NK, bias_N, activation, False)


def apply_and_add(product: FusedProduct, x_MK: Tensor, c_MN: Tensor) -> Tensor:
    """c + x @ weight, in the type of c, which is that of the weight, for a product without bias and activation."""
    if product.packed:
        return torch.ops.mkldnn._linear_pointwise(x_MK, c_MN, product.weight, None, "add")
    return torch.addmm(c_MN, x_MK, product.weight.t())


def apply(product: FusedProduct, x_MK: Tensor) -> Tensor:
    """[M, N], M at least 1."""
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
