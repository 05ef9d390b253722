"""A window of an LSTM layer with projection on a GPU: the products of a time step, and one kernel for all between two.

The gates of a step are a dozen operations of PyTorch, each of which reads and writes memory. In one Triton kernel they
read and write every number once, and so run at the memory's speed. Products are cuBLAS's, except for those of few rows,
which are split along the sum so that the whole GPU reads the weight. Gates, outputs and the projection's input are kept
in the products' type, the memory cell in float32. The backward pass overwrites the gates with their gradients.

Sums have a fixed order, and no kernel adds atomically: the same input gives the same bits.

Shapes: D directions, T window, B rows, I input, P output of a cell (projection), H memory cell, K length of a sum.
Gates [..., 4H] in TensorFlow's order i, j, f, o. A name that ends in `_d`, `_b`, `_k` or `_n` is a stride.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from elmo_ray.kernels.gpu.arithmetic import block_for, product_float32, tanh


def window(
    x_DTBI: Tensor,
    hidden_DBP: Tensor,
    memory_DBH: Tensor,
    input_kernel: Tensor,
    hidden_kernel: Tensor,
    bias: Tensor,
    projection: Tensor | None,
    cell_clip: float | None,
    projection_clip: float | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return the outputs [D, T, B, P] and the memory cells [D, T, B, H] after every step of a window, in float32.

    hidden_DBP, memory_DBH: the state before the window, which gets no gradient; the memory cells returned have none
    either. input_kernel [D, I, 4H], hidden_kernel [D, P, 4H], bias [D, 4H], to whose forget gate 1 is added here.
    projection [D, H, P]; None where H = P: then there is no clip of its result either. cell_clip, projection_clip:
    bounds, None for no clip; at a bound the gradient is 0. dtype: of the products, None for float32.
    """
    outputs_DTBP, memories_DTBH = _Window.apply(
        x_DTBI,
        hidden_DBP,
        memory_DBH,
        input_kernel,
        hidden_kernel,
        bias,
        projection,
        cell_clip,
        None if projection is None else projection_clip,
        dtype,
    )
    return outputs_DTBP, memories_DTBH


@triton.jit
def _clip(x, bound):  # type: ignore[no-untyped-def]
    # Comparisons and not minimum and maximum: NaN stays NaN, and the training step is seen to be bad.
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def _gate(gates, recurrent, bias, inside):  # type: ignore[no-untyped-def]
    """Return a gate before its activation: the input's product, the bias, and the product with the output before."""
    return tl.load(gates, inside).to(tl.float32) + tl.load(bias, inside) + tl.load(recurrent, inside).to(tl.float32)


@triton.jit
def _forward_gates(  # type: ignore[no-untyped-def]
    gates, recurrent, bias, memory, new_memory, gated, gates_d, memory_d, gated_d, rows, H, bound,
    CLIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns the input's product in gates [D, B, 4H] into the activated gates; recurrent: [D, B, 4H]."""
    d, b = (tl.program_id(0) // rows).to(tl.int64), (tl.program_id(0) % rows).to(tl.int64)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < H
    g, r, a = gates + d * gates_d + b * 4 * H + x, recurrent + (d * rows + b) * 4 * H + x, bias + d * 4 * H + x
    i, j = tl.sigmoid(_gate(g, r, a, inside)), tanh(_gate(g + H, r + H, a + H, inside))
    # The forget bias of 1 is added here and never stored.
    f = tl.sigmoid(_gate(g + 2 * H, r + 2 * H, a + 2 * H, inside) + 1.0)
    o = tl.sigmoid(_gate(g + 3 * H, r + 3 * H, a + 3 * H, inside))
    c = f * tl.load(memory + d * memory_d + b * H + x, inside) + i * j
    if CLIPS:
        c = _clip(c, bound)
    product_type = gates.dtype.element_ty
    tl.store(g, i.to(product_type), inside)
    tl.store(g + H, j.to(product_type), inside)
    tl.store(g + 2 * H, f.to(product_type), inside)
    tl.store(g + 3 * H, o.to(product_type), inside)
    tl.store(new_memory + d * memory_d + b * H + x, c, inside)
    tl.store(gated + d * gated_d + b * H + x, (o * tanh(c)).to(product_type), inside)


@triton.jit
def _backward_gates(  # type: ignore[no-untyped-def]
    d_gated, gates, memory, new_memory, d_memory, d_gated_d, gates_d, memory_d, rows, H, bound,
    LAST: tl.constexpr, CLIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns activated gates into their gradients before activation, and d_memory [D, B, H] of the step after this one
    into this step's."""
    d, b = (tl.program_id(0) // rows).to(tl.int64), (tl.program_id(0) % rows).to(tl.int64)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < H
    g, carried = gates + d * gates_d + b * 4 * H + x, d_memory + (d * rows + b) * H + x
    i, j = tl.load(g, inside).to(tl.float32), tl.load(g + H, inside).to(tl.float32)
    f, o = tl.load(g + 2 * H, inside).to(tl.float32), tl.load(g + 3 * H, inside).to(tl.float32)
    c = tl.load(new_memory + d * memory_d + b * H + x, inside)
    # Computing the tanh again is cheaper than reading it.
    tanh_c = tanh(c)
    d_m = tl.load(d_gated + d * d_gated_d + b * H + x, inside).to(tl.float32)
    d_c = d_m * o * (1.0 - tanh_c * tanh_c)
    if not LAST:
        d_c += tl.load(carried, inside)
    if CLIPS:
        d_c = tl.where((c <= -bound) | (c >= bound), 0.0, d_c)
    before = tl.load(memory + d * memory_d + b * H + x, inside)
    product_type = gates.dtype.element_ty
    tl.store(g, (d_c * j * i * (1.0 - i)).to(product_type), inside)
    tl.store(g + H, (d_c * i * (1.0 - j * j)).to(product_type), inside)
    tl.store(g + 2 * H, (d_c * before * f * (1.0 - f)).to(product_type), inside)
    tl.store(g + 3 * H, (d_m * tanh_c * o * (1.0 - o)).to(product_type), inside)
    tl.store(carried, d_c * f, inside)


@triton.jit
def _forward_clip(  # type: ignore[no-untyped-def]
    parts, output, output_d, rows, P, bound, SPLITS: tl.constexpr, CLIPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Clips the sum of parts [SPLITS, D, B, P], or without parts the output itself, into output [D, B, P]."""
    d, b = (tl.program_id(0) // rows).to(tl.int64), (tl.program_id(0) % rows).to(tl.int64)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < P
    at = output + d * output_d + b * P + x
    if SPLITS == 0:
        y = tl.load(at, inside).to(tl.float32)
    else:
        size = tl.num_programs(0).to(tl.int64) * P
        y = tl.load(parts + (d * rows + b) * P + x, inside)
        for s in tl.static_range(1, SPLITS):
            y += tl.load(parts + s * size + (d * rows + b) * P + x, inside)
    if CLIPS:
        y = _clip(y, bound)
    tl.store(at, y.to(output.dtype.element_ty), inside)


@triton.jit
def _backward_clip(  # type: ignore[no-untyped-def]
    d_output, parts, output, d_raw, d_output_d, d_output_b, output_d, d_raw_d, rows, P, bound,
    SPLITS: tl.constexpr, CLIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient before the clip, d_raw [D, B, P]: d_output plus the parts [SPLITS, D, B, P] that came back
    through the step after this one, and 0 where the output is at a bound."""
    d, b = (tl.program_id(0) // rows).to(tl.int64), (tl.program_id(0) % rows).to(tl.int64)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < P
    y = tl.load(d_output + d * d_output_d + b * d_output_b + x, inside).to(tl.float32)
    size = tl.num_programs(0).to(tl.int64) * P
    for s in tl.static_range(0, SPLITS):
        y += tl.load(parts + s * size + (d * rows + b) * P + x, inside).to(tl.float32)
    if CLIPS:
        o = tl.load(output + d * output_d + b * P + x, inside).to(tl.float32)
        # The output was rounded to its type when it was stored, so the bound must be, too.
        limit = tl.full((BLOCK,), bound, tl.float32).to(output.dtype.element_ty).to(tl.float32)
        y = tl.where((o <= -limit) | (o >= limit), 0.0, y)
    tl.store(d_raw + d * d_raw_d + b * P + x, y.to(d_raw.dtype.element_ty), inside)


@triton.jit
def _split_product(  # type: ignore[no-untyped-def]
    a, w, out, a_d, a_b, w_d, w_k, w_n, rows, N, PER,
    SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write out [SPLITS, D, B, N]: the parts of a [D, B, K] @ w [D, K, N] that each PER of the sum's K terms give."""
    d, s = (tl.program_id(2) // SPLITS).to(tl.int64), tl.program_id(2) % SPLITS
    m, n = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    k = s * PER + tl.arange(0, BK)
    has_row, has_column = (m < rows)[:, None], (n < N)[None, :]
    x = a + d * a_d + m[:, None].to(tl.int64) * a_b + k[None, :]
    y = w + d * w_d + k[:, None].to(tl.int64) * w_k + n[None, :] * w_n
    total = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, PER, BK):
        total = tl.dot(tl.load(x, has_row, 0.0), tl.load(y, has_column, 0.0), total, input_precision="ieee")
        x += BK
        y += BK * w_k
    directions = tl.num_programs(2) // SPLITS
    at = out + ((s.to(tl.int64) * directions + d) * rows + m[:, None]) * N + n[None, :]
    tl.store(at, total, has_row & has_column)


_TILE_ROWS, _TILE_COLUMNS, _TILE_SUM = 128, 64, 64
"""Size of what one program of `_split_product` computes, and how many terms of the sum it reads at a time."""


def splits_for(rows: int, length: int, dtype: torch.dtype) -> int:
    """Return into how many parts a product's sum of `length` terms is split; 0: cuBLAS does it.

    Measured on an H200 in bf16: with 256 rows and fewer the split product takes 5 to 11 microseconds where cuBLAS takes
    up to 27, with 512 rows cuBLAS wins.
    """
    splits = 16 if length >= 16384 else 8
    if dtype.itemsize != 2 or rows > 256 or length < 4096 or length % (splits * _TILE_SUM):
        return 0
    return splits


def split_product(out: Tensor, a: Tensor, w: Tensor) -> None:
    """Write the parts of a product whose sum is split.

    out: [S, D, B, N] float32, contiguous. a: [D, B, K], its last dimension contiguous. w: [D, K, N] with any strides. K
    is a multiple of 64 S.
    """
    splits, (d, rows, length), n = len(out), a.shape, w.shape[-1]
    tile_rows = min(_TILE_ROWS, max(16, triton.next_power_of_2(rows)))
    _split_product[(triton.cdiv(n, _TILE_COLUMNS), triton.cdiv(rows, tile_rows), d * splits)](
        a, w, out, a.stride(0), a.stride(1), w.stride(0), w.stride(1), w.stride(2), rows, n, length // splits,
        SPLITS=splits, BM=tile_rows, BN=_TILE_COLUMNS, BK=_TILE_SUM, num_warps=4, num_stages=4,
    )  # fmt: skip


class _Buffers(NamedTuple):
    """A window as it is computed: gates [D, T, B, 4H], gated [D, T, B, H] (o tanh(memory), which goes into the
    projection), outputs [D, T + 1, B, P] and memories [D, T + 1, B, H].

    Place 0 of the last two is the state before the window, so that no step copies the one before it. Memories are
    float32, the others of the products' type.
    """

    gates: Tensor
    gated: Tensor
    outputs: Tensor
    memories: Tensor


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, block_for(width))


def _run_forward(
    buffers: _Buffers,
    hidden_kernel: Tensor,
    bias: Tensor,
    projection: Tensor | None,
    cell_clip: float | None,
    projection_clip: float | None,
) -> None:
    """Fill the buffers, whose gates hold the input's product and whose places 0 hold the state."""
    gates_DTBG, gated_DTBH, outputs, memories = buffers
    d, steps, b, _ = gates_DTBG.shape
    h, p = memories.shape[-1], outputs.shape[-1]
    recurrent_DBG = gates_DTBG.new_empty(d, b, 4 * h)
    splits = 0 if projection is None else splits_for(b, h, gates_DTBG.dtype)
    parts = memories.new_empty(max(1, splits), d, b, p)
    for step in range(steps):
        gates, gated, output = gates_DTBG[:, step], gated_DTBH[:, step], outputs[:, step + 1]
        torch.bmm(outputs[:, step], hidden_kernel, out=recurrent_DBG)
        _forward_gates[_grid(d * b, h)](
            gates, recurrent_DBG, bias, memories[:, step], memories[:, step + 1], gated,
            gates.stride(0), memories.stride(0), gated.stride(0), b, h, cell_clip or 0.0,
            CLIPS=cell_clip is not None, BLOCK=block_for(h),
        )  # fmt: skip
        if projection is None:
            continue
        if splits:
            split_product(parts, gated, projection)
        else:
            torch.bmm(gated, projection, out=output)
        if splits or projection_clip is not None:
            _forward_clip[_grid(d * b, p)](
                parts, output, output.stride(0), b, p, projection_clip or 0.0,
                SPLITS=splits, CLIPS=projection_clip is not None, BLOCK=block_for(p),
            )  # fmt: skip


def _run_backward(
    d_outputs_DTBP: Tensor,
    buffers: _Buffers,
    hidden_kernel: Tensor,
    projection: Tensor | None,
    cell_clip: float | None,
    projection_clip: float | None,
) -> Tensor:
    """Overwrite the gates with their gradients, and return that of the projection's result before its clip, [D, T, B,
    P]."""
    gates_DTBG, _, outputs, memories = buffers
    d, steps, b, _ = gates_DTBG.shape
    h, p = memories.shape[-1], outputs.shape[-1]
    d_raw_DTBP = gates_DTBG.new_empty(d, steps, b, p)
    d_gated, d_memory = gates_DTBG.new_empty(d, b, h), memories.new_empty(d, b, h)
    splits = splits_for(b, 4 * h, gates_DTBG.dtype)
    parts = gates_DTBG.new_empty(max(1, splits), d, b, p, dtype=torch.float32 if splits else gates_DTBG.dtype)
    for step in reversed(range(steps)):
        is_last = step == steps - 1
        gates, d_output, output, d_raw = (
            gates_DTBG[:, step], d_outputs_DTBP[:, step], outputs[:, step + 1], d_raw_DTBP[:, step]
        )  # fmt: skip
        if not is_last and splits:
            split_product(parts, gates_DTBG[:, step + 1], hidden_kernel.transpose(1, 2))
        elif not is_last:
            torch.bmm(gates_DTBG[:, step + 1], hidden_kernel.transpose(1, 2), out=parts[0])
        _backward_clip[_grid(d * b, p)](
            d_output, parts, output, d_raw,
            d_output.stride(0), d_output.stride(1), output.stride(0), d_raw.stride(0), b, p, projection_clip or 0.0,
            SPLITS=0 if is_last else max(1, splits), CLIPS=projection_clip is not None, BLOCK=block_for(p),
        )  # fmt: skip
        if projection is None:
            d_gated = d_raw
        else:
            torch.bmm(d_raw, projection.transpose(1, 2), out=d_gated)
        _backward_gates[_grid(d * b, h)](
            d_gated, gates, memories[:, step], memories[:, step + 1], d_memory,
            d_gated.stride(0), gates.stride(0), memories.stride(0), b, h, cell_clip or 0.0,
            LAST=is_last, CLIPS=cell_clip is not None, BLOCK=block_for(h),
        )  # fmt: skip
    return d_raw_DTBP


class _Window(torch.autograd.Function):
    """The autograd function of `window`, with its arguments."""

    @staticmethod
    @custom_fwd(device_type="cuda", cast_inputs=torch.float32)  # within torch.autocast
    def forward(
        ctx: Any,
        x_DTBI: Tensor,
        hidden_DBP: Tensor,
        memory_DBH: Tensor,
        input_kernel: Tensor,
        hidden_kernel: Tensor,
        bias: Tensor,
        projection: Tensor | None,
        cell_clip: float | None,
        projection_clip: float | None,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        (d, t, b, _), p, h = x_DTBI.shape, hidden_DBP.shape[-1], memory_DBH.shape[-1]
        low = x_DTBI.dtype if dtype is None else dtype
        # Converted once a window and not once a time step.
        x, w_input, w_hidden = x_DTBI.reshape(d, t * b, -1).to(low), input_kernel.to(low), hidden_kernel.to(low)
        w_projection = None if projection is None else projection.to(low)
        outputs, memories = x.new_empty(d, t + 1, b, p), memory_DBH.new_empty(d, t + 1, b, h)
        outputs[:, 0].copy_(hidden_DBP)
        memories[:, 0].copy_(memory_DBH)
        gates = torch.bmm(x, w_input).view(d, t, b, 4 * h)
        gated = outputs[:, 1:] if projection is None else x.new_empty(d, t, b, h)
        buffers = _Buffers(gates, gated, outputs, memories)
        _run_forward(buffers, w_hidden, bias.contiguous(), w_projection, cell_clip, projection_clip)
        ctx.save_for_backward(x, w_input, w_hidden, w_projection, *buffers)
        ctx.clips = cell_clip, projection_clip
        ctx.set_materialize_grads(False)  # else the memories' gradient would be a tensor of zeros
        # A copy even in float32: what the backward pass reads is nobody else's to change.
        outputs_DTBP, memories_DTBH = outputs[:, 1:].to(x_DTBI.dtype, copy=True), memories[:, 1:]
        ctx.mark_non_differentiable(memories_DTBH)
        return outputs_DTBP, memories_DTBH

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cuda")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w_input, w_hidden, w_projection, *saved = ctx.saved_tensors
        buffers, d_outputs = _Buffers(*saved), grads[0]
        if d_outputs is None:
            return (None,) * 10
        if torch._C._autograd._get_current_graph_task_keep_graph():  # retain_graph: the gates are needed once more
            buffers = buffers._replace(gates=buffers.gates.clone())
        if d_outputs.stride(-1) != 1:
            d_outputs = d_outputs.contiguous()
        d_raw = _run_backward(d_outputs, buffers, w_hidden, w_projection, *ctx.clips).flatten(1, 2)
        d_gates, previous, gated = (
            tensor.flatten(1, 2) for tensor in (buffers.gates, buffers.outputs[:, :-1], buffers.gated)
        )
        d_x = d_projection = None
        if ctx.needs_input_grad[0]:
            d_x = torch.bmm(d_gates, w_input.transpose(1, 2)).to(d_outputs.dtype).view(*d_outputs.shape[:3], -1)
        if w_projection is not None:
            d_projection = product_float32(gated.transpose(1, 2), d_raw)
        return (
            d_x,
            None,
            None,
            product_float32(x.transpose(1, 2), d_gates),
            product_float32(previous.transpose(1, 2), d_gates),
            torch.sum(d_gates, dim=1, dtype=torch.float32),
            d_projection,
            None,
            None,
            None,
        )
