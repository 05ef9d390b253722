"""A highway layer on a GPU: one product for both gates, and one Triton kernel each way for all that is elementwise.

Shapes: U words, F filters.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from elmo_ray.kernels.gpu.arithmetic import block_for, product_float32


def highway(
    x_UF: Tensor,
    carry_weight: Tensor,
    carry_bias: Tensor,
    transform_weight: Tensor,
    transform_bias: Tensor,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return g * relu(x Wt + bt) + (1 - g) * x with g = sigmoid(x Wc + bc), [U, F] in float32.

    carry_weight, transform_weight: [F, F]; carry_bias, transform_bias: [F]. dtype: of the products, None for float32.
    """
    y_UF: Tensor = _Highway.apply(x_UF, carry_weight, carry_bias, transform_weight, transform_bias, dtype)
    return y_UF


@triton.jit
def _highway_forward(product, carry_bias, transform_bias, x, y, F, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write y [U, F] from x [U, F] and its products with both weights [U, 2F]."""
    u, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    g = tl.sigmoid(tl.load(product + u * 2 * F + f, inside).to(tl.float32) + tl.load(carry_bias + f, inside))
    t = tl.load(product + u * 2 * F + F + f, inside).to(tl.float32) + tl.load(transform_bias + f, inside)
    own = tl.load(x + u * F + f, inside)
    # A comparison and not a maximum: NaN stays NaN.
    tl.store(y + u * F + f, own + g * (tl.where(t < 0.0, 0.0, t) - own), inside)


@triton.jit
def _highway_backward(  # type: ignore[no-untyped-def]
    gradient, product, carry_bias, transform_bias, x, d_product, d_x, F, BLOCK: tl.constexpr
):  # fmt: skip
    """Write d_product [U, 2F] and the part of d_x [U, F] that does not come through it.

    Both gates are computed again from the product, which is cheaper than keeping them.
    """
    u, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    g = tl.sigmoid(tl.load(product + u * 2 * F + f, inside).to(tl.float32) + tl.load(carry_bias + f, inside))
    t = tl.load(product + u * 2 * F + F + f, inside).to(tl.float32) + tl.load(transform_bias + f, inside)
    own, d = tl.load(x + u * F + f, inside), tl.load(gradient + u * F + f, inside)
    product_type = d_product.dtype.element_ty
    d_carry = d * (tl.where(t < 0.0, 0.0, t) - own) * g * (1.0 - g)
    tl.store(d_product + u * 2 * F + f, d_carry.to(product_type), inside)
    tl.store(d_product + u * 2 * F + F + f, tl.where(t > 0.0, d * g, 0.0).to(product_type), inside)
    tl.store(d_x + u * F + f, d * (1.0 - g), inside)


class _Highway(torch.autograd.Function):
    """The autograd function of `highway`, with its arguments."""

    @staticmethod
    @custom_fwd(device_type="cuda", cast_inputs=torch.float32)  # within torch.autocast
    def forward(
        ctx: Any,
        x_UF: Tensor,
        carry_weight: Tensor,
        carry_bias: Tensor,
        transform_weight: Tensor,
        transform_bias: Tensor,
        dtype: torch.dtype | None,
    ) -> Tensor:
        x = x_UF.contiguous()
        u, f = x.shape
        x_low = x if dtype is None else x.to(dtype)
        weights = x_low.new_empty(f, 2 * f)
        weights[:, :f].copy_(carry_weight)
        weights[:, f:].copy_(transform_weight)
        product, y, block = torch.mm(x_low, weights), torch.empty_like(x), block_for(f)
        _highway_forward[(u, triton.cdiv(f, block))](product, carry_bias, transform_bias, x, y, f, BLOCK=block)
        ctx.save_for_backward(x, x_low, weights, carry_bias, transform_bias, product)
        return y

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cuda")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, x_low, weights, carry_bias, transform_bias, product = ctx.saved_tensors
        u, f = x.shape
        d_product, d_x, block = torch.empty_like(product), torch.empty_like(x), block_for(f)
        _highway_backward[(u, triton.cdiv(f, block))](
            grads[0].contiguous(), product, carry_bias, transform_bias, x, d_product, d_x, f, BLOCK=block
        )
        d_bias = d_product.sum(0, dtype=torch.float32)
        d_x += torch.mm(d_product, weights.t())
        d_carry_weight = product_float32(x_low.t(), d_product[:, :f])
        d_transform_weight = product_float32(x_low.t(), d_product[:, f:])
        return d_x, d_carry_weight, d_bias[:f], d_transform_weight, d_bias[f:], None
