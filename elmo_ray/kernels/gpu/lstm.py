"""The time steps of an LSTM layer on a GPU with what lies between two products in one kernel each (Triton).

In `time_steps.py` the gates of a step are a dozen operations, each of which reads and writes memory that a GPU could
have kept in registers, and starts a kernel of its own. Here a step is four kernels: two products, the gates, and the
clip of the projection; backward as well. What they compute is the same, and `choose_steps` compares it before first
use. Triton comes with torch's CUDA build; where it is missing, nothing here is used.

Shapes: D directions, T window, B rows, P output of a cell, H cell. Tensors may lack the leading D; the last dimension
is contiguous, the others have any strides. Gates in the order i, j, f, o.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elmo_ray.kernels.matmul import product, sum_into
from elmo_ray.kernels.time_steps import backward_steps, forward_steps

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it
    triton = None

logger = logging.getLogger(__name__)

_BLOCK = 1024
"""Numbers of a row that one program computes."""


if triton is not None:

    @triton.jit
    def _tanh(x):  # type: ignore[no-untyped-def]
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0

    @triton.jit
    def _at(pointer, row_strides, direction, row, column):  # type: ignore[no-untyped-def]
        """Places in a [D, B, X] tensor; in 64 bits, which a large window needs."""
        return pointer + direction.to(tl.int64) * row_strides[0] + row.to(tl.int64) * row_strides[1] + column

    @triton.jit
    def _forward_gates(  # type: ignore[no-untyped-def]
        gates, gates_at, added, added_at, cell, cell_at, new_cell, new_cell_at, tanh_cell, tanh_at,
        gated, gated_at, gated_low, low_at, rows, width, bound,
        ADDS: tl.constexpr, CLIPS: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Activates the gates in place; added: the recurrent product, where it is not in the gates yet."""
        d, b = tl.program_id(0) // rows, tl.program_id(0) % rows
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        at = _at(gates, gates_at, d, b, column)
        i, j = tl.load(at, inside), tl.load(at + width, inside)
        f, o = tl.load(at + 2 * width, inside), tl.load(at + 3 * width, inside)
        if ADDS:
            more = _at(added, added_at, d, b, column)
            i += tl.load(more, inside).to(i.dtype)
            j += tl.load(more + width, inside).to(j.dtype)
            f += tl.load(more + 2 * width, inside).to(f.dtype)
            o += tl.load(more + 3 * width, inside).to(o.dtype)
        i, j, f, o = tl.sigmoid(i), _tanh(j), tl.sigmoid(f), tl.sigmoid(o)
        c = f * tl.load(_at(cell, cell_at, d, b, column), inside) + i * j
        if CLIPS:
            # comparisons and not minimum and maximum: what is not a number stays so, and the step is seen to be bad
            c = tl.where(c > bound, bound, tl.where(c < -bound, -bound, c)).to(i.dtype)
        tanh_c = _tanh(c)
        m = o * tanh_c
        tl.store(at, i, inside)
        tl.store(at + width, j, inside)
        tl.store(at + 2 * width, f, inside)
        tl.store(at + 3 * width, o, inside)
        tl.store(_at(new_cell, new_cell_at, d, b, column), c, inside)
        tl.store(_at(tanh_cell, tanh_at, d, b, column), tanh_c, inside)
        tl.store(_at(gated, gated_at, d, b, column), m, inside)
        if LOW:
            tl.store(_at(gated_low, low_at, d, b, column), m.to(gated_low.dtype.element_ty), inside)

    @triton.jit
    def _backward_gates(  # type: ignore[no-untyped-def]
        d_gated, d_gated_at, gates, gates_at, cell, cell_at, new_cell, new_cell_at, tanh_cell, tanh_at,
        d_gates, d_gates_at, d_cell, d_cell_at, rows, width, bound,
        LAST: tl.constexpr, CLIPS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """d_cell: the gradient of the cell from the step after this one (none at the LAST), and then this one's."""
        d, b = tl.program_id(0) // rows, tl.program_id(0) % rows
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        at = _at(gates, gates_at, d, b, column)
        i, j = tl.load(at, inside), tl.load(at + width, inside)
        f, o = tl.load(at + 2 * width, inside), tl.load(at + 3 * width, inside)
        tanh_c = tl.load(_at(tanh_cell, tanh_at, d, b, column), inside)
        d_m = tl.load(_at(d_gated, d_gated_at, d, b, column), inside).to(i.dtype)
        into_cell = _at(d_cell, d_cell_at, d, b, column)
        d_c = d_m * o * (1.0 - tanh_c * tanh_c)
        if not LAST:
            d_c += tl.load(into_cell, inside)
        if CLIPS:
            c = tl.load(_at(new_cell, new_cell_at, d, b, column), inside)
            d_c = tl.where((c <= -bound) | (c >= bound), 0.0, d_c).to(i.dtype)
        before = tl.load(_at(cell, cell_at, d, b, column), inside)
        low = d_gates.dtype.element_ty
        to = _at(d_gates, d_gates_at, d, b, column)
        tl.store(to, (d_c * j * i * (1.0 - i)).to(low), inside)
        tl.store(to + width, (d_c * i * (1.0 - j * j)).to(low), inside)
        tl.store(to + 2 * width, (d_c * before * f * (1.0 - f)).to(low), inside)
        tl.store(to + 3 * width, (d_m * tanh_c * o * (1.0 - o)).to(low), inside)
        tl.store(into_cell, d_c * f, inside)

    @triton.jit
    def _forward_clip(  # type: ignore[no-untyped-def]
        raw, raw_at, output, output_at, low, low_at, rows, width, bound,
        CLIPS: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        d, b = tl.program_id(0) // rows, tl.program_id(0) % rows
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        x = tl.load(_at(raw, raw_at, d, b, column), inside).to(output.dtype.element_ty)
        if CLIPS:
            x = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x)).to(output.dtype.element_ty)
        tl.store(_at(output, output_at, d, b, column), x, inside)
        if LOW:
            tl.store(_at(low, low_at, d, b, column), x.to(low.dtype.element_ty), inside)

    @triton.jit
    def _backward_clip(  # type: ignore[no-untyped-def]
        d_output, d_output_at, added, added_at, output, output_at, d_raw, d_raw_at, low, low_at, rows, width, bound,
        ADDS: tl.constexpr, CLIPS: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """d_raw = d_output + added, 0 where the output is a bound."""
        d, b = tl.program_id(0) // rows, tl.program_id(0) % rows
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        x = tl.load(_at(d_output, d_output_at, d, b, column), inside)
        if ADDS:
            x += tl.load(_at(added, added_at, d, b, column), inside).to(x.dtype)
        if CLIPS:
            y = tl.load(_at(output, output_at, d, b, column), inside)
            x = tl.where((y <= -bound) | (y >= bound), 0.0, x).to(d_raw.dtype.element_ty)
        tl.store(_at(d_raw, d_raw_at, d, b, column), x, inside)
        if LOW:
            tl.store(_at(low, low_at, d, b, column), x.to(low.dtype.element_ty), inside)


def _launch(kernel: Any, tensors: list[Tensor], bound: float | None, **flags: bool) -> None:
    """Over all rows of [D, B, X] tensors; X is that of the last one."""
    d, rows, width = tensors[-1].shape
    places = [part for tensor in tensors for part in (tensor, tensor.stride()[:2])]
    block = min(_BLOCK, triton.next_power_of_2(width))
    grid = (d * rows, triton.cdiv(width, block))
    kernel[grid](*places, rows, width, bound or 0.0, CLIPS=bound is not None, BLOCK=block, **flags)


def fused_forward_steps(
    gates_DTBG: Tensor,
    cells_DTBH: Tensor,
    tanh_cells_DTBH: Tensor,
    gated_DTBH: Tensor,
    outputs_DTBP: Tensor,
    hidden_DBP: Tensor,
    cell_DBH: Tensor,
    kernel: Tensor,
    projection: Tensor | None,
    cell_clip: float | None,
    projection_clip: float | None,
) -> None:
    """As `time_steps.forward_steps`, of all directions."""
    low, cell = kernel.dtype, cell_DBH
    mixed = low != gates_DTBG.dtype
    hidden = hidden_DBP.to(low)
    # what the products take, in their type; the window keeps the exact ones
    low_hidden = torch.empty_like(hidden) if mixed else hidden
    low_gated = torch.empty_like(cell_DBH, dtype=low)
    if projection is None:
        projection_clip = None
    for step in range(gates_DTBG.shape[1]):
        gate, new_cell, gated, output = (x[:, step] for x in (gates_DTBG, cells_DTBH, gated_DTBH, outputs_DTBP))
        added = gate
        if mixed:
            added = product(hidden, kernel)
        else:
            sum_into(gate, gate, hidden, kernel)
        tensors = [gate, added, cell, new_cell, tanh_cells_DTBH[:, step], gated, low_gated]
        _launch(_forward_gates, tensors, cell_clip, ADDS=mixed, LOW=mixed)
        raw = gated if projection is None else product(low_gated if mixed else gated, projection)
        _launch(_forward_clip, [raw, output, low_hidden], projection_clip, LOW=mixed)
        hidden, cell = low_hidden if mixed else output, new_cell


def fused_backward_steps(
    d_outputs_DTBP: Tensor,
    gates_DTBG: Tensor,
    cells_DTBH: Tensor,
    tanh_cells_DTBH: Tensor,
    outputs_DTBP: Tensor,
    cell_DBH: Tensor,
    kernel: Tensor,
    projection: Tensor | None,
    cell_clip: float | None,
    projection_clip: float | None,
    d_gates_DTBG: Tensor,
    d_raw_DTBP: Tensor,
) -> None:
    """As `time_steps.backward_steps`, of all directions."""
    low = kernel.dtype
    mixed = low != d_raw_DTBP.dtype
    if d_outputs_DTBP.stride(-1) != 1:
        d_outputs_DTBP = d_outputs_DTBP.contiguous()
    d_cell = torch.empty_like(cell_DBH)
    low_raw = torch.empty_like(d_raw_DTBP[:, 0], dtype=low)
    if projection is None:
        projection_clip = None
    steps = gates_DTBG.shape[1]
    for step in reversed(range(steps)):
        d_raw, last = d_raw_DTBP[:, step], step == steps - 1
        added = d_raw if last else product(d_gates_DTBG[:, step + 1], kernel)
        tensors = [d_outputs_DTBP[:, step], added, outputs_DTBP[:, step], d_raw, low_raw]
        _launch(_backward_clip, tensors, projection_clip, ADDS=not last, LOW=mixed)
        d_gated = d_raw if projection is None else product(low_raw if mixed else d_raw, projection)
        before = cells_DTBH[:, step - 1] if step else cell_DBH
        tensors = [d_gated, gates_DTBG[:, step], before, cells_DTBH[:, step], tanh_cells_DTBH[:, step]]
        _launch(_backward_gates, [*tensors, d_gates_DTBG[:, step], d_cell], cell_clip, LAST=last)


class Steps(NamedTuple):
    """The two functions of a layer's time steps, with the arguments of those in `time_steps.py`."""

    forward: Callable[..., None]
    backward: Callable[..., None]


PLAIN = Steps(forward_steps, backward_steps)
FUSED = Steps(fused_forward_steps, fused_backward_steps)

_of_devices: dict[str, Steps] = {}


def steps_on(device: torch.device) -> Steps:
    """What a layer on this device takes; PLAIN, if `choose_steps` has not chosen."""
    return _of_devices.get(device.type, PLAIN)


def choose_steps(fused: bool, device: torch.device, dtype: torch.dtype | None) -> Steps:
    """From here on this process takes the fused steps on such devices, or not.

    Only on a GPU, where Triton is at hand and computes the same on a small random window; otherwise a line in the log
    says why not. dtype: of the products, None: float32, the type of states.
    """
    chosen = PLAIN
    if device.type != "cuda":
        return chosen
    if fused and triton is None:
        logger.info("no Triton here: the gates of a time step are several kernels")
    elif fused:
        try:
            worst = max(
                largest_difference(device, torch.float32, dtype or torch.float32, clips) for clips in (None, 0.5)
            )
            if worst <= _tolerance(dtype):
                chosen = FUSED
            else:
                logger.warning("fused gates differ from the plain ones by %.2g here: they are not used", worst)
        except Exception as error:  # a compiler or driver that does not fit; the plain steps need neither
            logger.warning("fused gates are not used: %s: %s", type(error).__name__, str(error).split("\n")[0])
    _of_devices[device.type] = chosen
    return chosen


def _tolerance(dtype: torch.dtype | None) -> float:
    """In bf16 a rounding of what goes into a product may fall to the other side."""
    return 0.02 if dtype == torch.bfloat16 else 1e-4


def largest_difference(
    device: torch.device,
    dtype: torch.dtype,
    low: torch.dtype,
    clip: float | None,
    shape: tuple[int, int, int, int, int] = (2, 3, 5, 96, 40),
    with_projection: bool = True,
) -> float:
    """Between fused and plain steps on a random window, relative to the largest value of each tensor.

    dtype: of states; low: of products; clip: both bounds; shape: D, T, B, H and P (which is H without a projection).
    """
    d, t, b, h, p = shape
    p = p if with_projection else h
    generator = torch.Generator().manual_seed(1)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    gates, hidden, cell = random(d, t, b, 4 * h), random(d, b, p), random(d, b, h)
    kernel = random(d, p, 4 * h, scale=p**-0.5).to(low)
    projection = random(d, h, p, scale=2 * h**-0.5).to(low) if with_projection else None
    d_outputs = random(d, t, b, p)
    turned = [None if w is None else w.transpose(-1, -2).contiguous() for w in (kernel, projection)]
    worst, window = 0.0, None
    for steps in (PLAIN, FUSED):
        sizes = (4 * h, h, h, h, p)
        made = [torch.full((d, t, b, size), torch.nan, device=device, dtype=dtype) for size in sizes]
        made[0].copy_(gates)
        steps.forward(*made, hidden, cell, kernel, projection, clip, clip)
        # backward of both from the same window: where one was clipped by a hair the other was too
        window = window or [x.clone() for x in made]
        saved = [window[k].clone() for k in (0, 1, 2, 4)]
        d_gates = saved[0] if low == dtype else torch.full_like(saved[0], torch.nan, dtype=low)
        d_raw = torch.full_like(d_outputs, torch.nan)
        steps.backward(d_outputs, *saved, cell, *turned, clip, clip, d_gates, d_raw)
        found = [*made, d_gates, d_raw]
        if steps is PLAIN:
            expected = found
    for ours, theirs in zip(found, expected, strict=True):
        difference = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        worst = max(worst, float(difference) if torch.isfinite(difference) else torch.inf)
    return worst
