"""Products of one weight with many inputs, without gradients: on a CPU the weight is laid out for them once, and bias
and activation are part of the product.

Written in the part of Python that TorchScript has, so that loops over products can run without Python's lock (see
`side_by_side.without_lock`); it cannot read a NamedTuple's types from a module whose annotations are strings.
Shapes: M rows, K width of the input, N width of the result.
"""

from typing import Literal, NamedTuple, Optional

import torch
from torch import Tensor

from elmo_ray.model.products import can_pack, packed

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
