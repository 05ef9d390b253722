"""Products of one weight with many inputs, without gradients: on a CPU the weight is laid out for them once, and bias
and activation are part of the product.

Shapes: M rows, K width of the input, N width of the result.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from elmo_ray.model.products import can_pack, packed

Activation = Literal["none", "sigmoid", "tanh"]

_WORTH_LAYOUT = 16
"""Rows; for fewer the layout takes longer than their product."""

_IN_PLACE = {"sigmoid": torch.sigmoid_, "tanh": torch.tanh_}


class FusedProduct:
    """x -> activation(x @ weight + bias) for about `rows` rows at a time, on the device and in the type of the weight;
    the bias may be in a wider one.

    oneDNN's own layout of the weight makes float32 products a tenth faster than `torch.mm`. What follows a product
    there is worked out on float32 that is still in registers: `tanh` takes a fifth of the time of PyTorch's, and
    nothing is rounded to bfloat16 before its activation. A first product of M rows takes half a millisecond more, so M
    had better be one of few numbers.
    """

    def __init__(
        self, weight_NK: Tensor, bias_N: Tensor | None = None, activation: Activation = "none", rows: int = 256
    ):
        self._bias, self._activation = bias_N, activation
        self._packed: Tensor | None = None
        if rows >= _WORTH_LAYOUT and can_pack(weight_NK):
            self._packed = packed(weight_NK.contiguous(), rows)
        else:
            self._weight_NK = weight_NK

    def __call__(self, x_MK: Tensor) -> Tensor:
        """[M, N], M at least 1."""
        if self._packed is not None:
            fused = torch.ops.mkldnn._linear_pointwise
            result: Tensor = fused(x_MK, self._packed, self._bias, self._activation, [], "")
            return result
        result = torch.mm(x_MK, self._weight_NK.t())
        if self._bias is not None:
            result = result.add_(self._bias)
        return result if self._activation == "none" else _IN_PLACE[self._activation](result)
